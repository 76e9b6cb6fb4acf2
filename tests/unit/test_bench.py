"""`mpilsgd bench kernels` and `mpilsgd info` in one process, small; no speed is asked for."""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mpilsgd import extension
from mpilsgd.comm import inquiry
from mpilsgd.train import bench, bench_device, bench_kernels, info, table


def call(module: object, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return module.run(parser.parse_args(arguments))  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_kernels_table(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(bench, "kernels", "--size", "1e4", "--dtype", dtype, "--repetitions", "3") == 0
    out = capsys.readouterr().out
    assert f"10,000 x {dtype}" in out
    for name in ("pull to two leaders", "elastic pair", "msgd (Nesterov)", "running average", "triad"):
        assert name in out
    assert ">= 1.3" in out and ">= 2.2" in out


def test_threads_are_set_for_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert call(bench, "kernels", "--size", "1000", "--threads", "2", "--repetitions", "1") == 0
    finally:
        torch.set_num_threads(before)
    assert "2 thread(s)" in capsys.readouterr().out


def test_no_cuda_device_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(extension, "emulated", None)
    for part in ("kernels", "exchange"):
        assert call(bench, part, "--device", "cuda") == 2
        assert "no CUDA device" in capsys.readouterr().err


def on_device() -> Any:
    """Within it there is a GPU, or an emulated device."""
    if extension.emulated is None:
        return nullcontext()
    import emulated

    return emulated.Emulation()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_table_on_a_device(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    with on_device():
        assert (
            call(
                bench, "kernels", "--device", "cuda", "--size", "1001", "--dtype", dtype, "--repetitions", "2"
            )
            == 0
        )
    out = capsys.readouterr().out
    assert "sets of 4" in out and f"figures: 1e+03 x {dtype}: pull to two leaders" in out
    assert all(name in out for name in ("of copy", "elastic pair", "copy_ of 1.5", "copy_ of 4", "SGD"))
    assert ("NOT A MEASUREMENT" in out) == (extension.emulated is not None)


@pytest.mark.gpu
def test_a_size_that_the_device_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with on_device():
        assert call(bench, "kernels", "--device", "cuda", "--size", "1e11") == 2
    assert "--size 100,000,000,000: 5600.00 GB are wanted on" in capsys.readouterr().err


@pytest.mark.gpu
def test_rounds_of_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with on_device():
        assert call(bench, "exchange", "--device", "cuda", "--bytes", "4e3", "--repetitions", "2") == 0
    out = capsys.readouterr().out
    assert "1 rank(s) in 1 node(s)" in out and "NCCL is left out: it takes several ranks" in out
    assert "figures: bare pull" in out and "messages through the host" not in out


def test_calls_take_turns_over_the_sets() -> None:
    turns, order = bench_device.Turns(2), []
    a, b = (turns.of([lambda k=k: order.append(k), lambda k=k: order.append(k + 1)]) for k in (0, 10))
    for one in (a, b, a, b, b):
        one()
    assert order == [0, 11, 0, 11, 10]
    assert bench_device.how_many_sets(extension.HOST, 4) == 1


def test_copies_go_from_each_set_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "on_host", lambda place: False)
    sets = [bench_device.vectors(extension.HOST, torch.float32, 200) for _ in range(3)]
    assert sets[0][1].data_ptr() - sets[0][0].data_ptr() == 1024
    copies, before = bench_device.copies(sets, 512), [four[1].clone() for four in sets]
    copies[2]()
    assert torch.equal(sets[0][1], before[2]) and torch.equal(sets[1][1], before[1])


def test_events_are_read_when_they_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        waited = False

        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Event) -> float:
            assert end.waited
            return 2.5

    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    clock = bench_device.clock_of(torch.device("cuda", 0))
    assert bench_kernels._interleaved([lambda: None], 3, clock) == [0.0025] and len(slept) == 3


@pytest.mark.parametrize("size", ["0", "-1", "1.5", "many"])
def test_a_size_that_is_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        call(bench, "kernels", "--size", size)
    assert end.value.code == 2
    assert "--size" in capsys.readouterr().err


def test_repetitions_are_interleaved_there_and_back() -> None:
    order: list[str] = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    bench_kernels._interleaved(calls, 3, bench_device.clock_of(extension.HOST))
    assert "".join(order) == "abbaab"


def test_growth_sees_a_temporary_and_nothing_else() -> None:
    x, n = torch.zeros(16_000_000), 64_000_000
    if bench_kernels._growth(lambda: None, x.device) != bench_kernels._growth(lambda: None, x.device):
        pytest.skip("needs root or a /proc/self/clear_refs that may be written")
    assert bench_kernels._growth(lambda: x.add_(1.0), x.device) < 0.05 * n
    assert 0.9 * n < bench_kernels._growth(lambda: (x + 1.0, None)[1], x.device) < 1.1 * n


def test_info_on_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info) == 0
    out = capsys.readouterr().out
    for word in (
        "MPI_THREAD_",
        "1 on 1 node(s) in 1 group(s)",
        "shared memory",
        "CPU instructions",
        "CUDA devices",
    ):
        assert word in out


def test_info_refuses_a_group_size_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info, "--group_size", "2") == 2
    assert "group_size=2 does not fit" in capsys.readouterr().err


def test_launched_processes() -> None:
    assert inquiry.launched_processes({}) is None
    assert inquiry.launched_processes({"PMI_SIZE": "4"}) == 4
    assert inquiry.launched_processes({"OMPI_COMM_WORLD_SIZE": "many"}) is None


def test_a_launcher_of_another_mpi_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    rows = [{"python": "", "threads": "", "devices": (), "extension": ""}]
    text = info._text(inquiry.info(), [], [[0]], rows)
    assert "WARNING" in text and "the launcher started 4 processes, but MPI sees 1" in text


def test_accelerate_is_told_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "started 2 processes.*mpiexec -n 2 python -m mpi4py"
    assert re.match(f"torchrun {told}", inquiry.apart(1) or "")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert re.match(f"accelerate launch {told}", inquiry.apart(1) or "")
    assert inquiry.apart(2) is None


def test_cuda_support_by_memory_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiry, "memory_kinds", lambda comm: "mpi,system,cuda:device")
    assert inquiry.cuda_support().aware
    monkeypatch.setattr(inquiry, "memory_kinds", lambda comm: "mpi,system")
    monkeypatch.setattr(inquiry, "_query_cuda_support", lambda: 0)
    assert inquiry.cuda_support() == (
        False,
        "mpi_memory_alloc_kinds is mpi,system; MPIX_Query_cuda_support() is 0",
    )
    monkeypatch.setattr(inquiry, "memory_kinds", lambda comm: None)
    monkeypatch.setattr(inquiry, "_query_cuda_support", lambda: None)
    assert not inquiry.cuda_support().aware


def test_ranks_are_written_as_ranges() -> None:
    assert table.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert info._by_rank(["x", "x", "x"]) == "x"
    assert info._by_rank(["x", "y", "x"]) == "rank 0, 2: x; rank 1: y"
