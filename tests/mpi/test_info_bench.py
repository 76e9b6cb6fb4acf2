"""`mpilsgd info` and `mpilsgd bench exchange` under a launcher, small; no speed is asked for."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from harness import CORE

import mpilsgd
from mpilsgd.comm import MPI, inquiry
from mpilsgd.plan import machine
from mpilsgd.train import bench, info, job

pytestmark = [pytest.mark.mpi, pytest.mark.brief(1, 2, 3, "3x2")]
WORLD = MPI.COMM_WORLD


def call(module: object, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return module.run(parser.parse_args(arguments))  # type: ignore[attr-defined]


def test_info_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info) == 0
    out, err = capsys.readouterr()
    if WORLD.rank:
        assert out == ""
    else:
        assert re.search(rf"ranks +{WORLD.size} on \d+ node\(s\)", out)
        assert "WARNING" not in out
    assert err == ""


def test_info_shows_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info, "--group_size", "1") == 0
    out = capsys.readouterr().out
    if WORLD.rank == 0:
        assert f"in {WORLD.size} group(s)" in out
        assert all(f"group {j}: rank {j}" in out for j in range(WORLD.size))


def test_a_group_size_that_does_not_fit_ends_on_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info, "--group_size", str(WORLD.size + 1)) == 2
    assert ("does not fit" in capsys.readouterr().err) == (WORLD.rank == 0)


def test_facts_are_the_same_on_every_rank() -> None:
    facts = inquiry.info()
    assert len(facts["hosts"]) == facts["size"] == WORLD.size
    assert sorted(rank for ranks in facts["nodes"] for rank in ranks) == list(range(WORLD.size))
    assert WORLD.allgather(facts) == [facts] * WORLD.size


@pytest.mark.parametrize("name", ["PMI_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_of_another_mpi_is_told_of_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a script as a warning; `mpilsgd info` and `mpilsgd train` say it themselves."""
    for other in inquiry.LAUNCHER_SIZES:
        monkeypatch.delenv(other, raising=False)
    inquiry.warn_if_apart.cache_clear()
    try:
        assert warnings_of_a_script() == []
        inquiry.warn_if_apart.cache_clear()
        monkeypatch.setenv(name, str(WORLD.size + 3))
        assert call(info) == 0
        assert capsys.readouterr().out.count("the launcher started") == (WORLD.rank == 0)
        assert job.main([]) == 2
        assert capsys.readouterr().err.count("the launcher started") == (WORLD.rank == 0)
        (told,) = warnings_of_a_script()
    finally:
        inquiry.warn_if_apart.cache_clear()
    assert told.category is RuntimeWarning and told.filename == __file__
    sizes = f"the launcher started {WORLD.size + 3} processes, but MPI sees {WORLD.size}"
    assert all(part in str(told.message) for part in (sizes, "beside this python", "--mpi=pmi2"))


def warnings_of_a_script() -> list[warnings.WarningMessage]:
    model = torch.nn.Linear(2, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for method in (mpilsgd.LSGD, mpilsgd.EASGD, mpilsgd.LocalSGD):
            method(torch.optim.SGD(model.parameters(), lr=0.1)).close()
    return told


def test_a_tree_of_too_few_ranks_blames_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    for ranks in ("-1", "0", "1"):
        for more in ([], ["--nodes", "1"], ["--nodes", "3"]):
            assert call(info, "--tree", "--ranks", ranks, *more) == 2
            err = capsys.readouterr().err
            assert (f"ranks must be at least 2, not {ranks}" in err) == (WORLD.rank == 0)
            assert "--nodes" not in err


def test_whole_numbers_of_a_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(info, "--tree", "--ranks", "9", "--parameters", "1e6") == 0
    assert ("a model of 4 MB" in capsys.readouterr().out) == (WORLD.rank == 0)
    for wrong in ("1.5", "inf", "many"):
        with pytest.raises(SystemExit):
            call(info, "--tree", "--parameters", wrong)
        assert wrong in capsys.readouterr().err


def test_bench_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    status = call(bench, "exchange", "--bytes", "64e3", "--repetitions", "2")
    out = capsys.readouterr().out
    if WORLD.size == 1:
        assert status == 2
        return
    assert status == 0
    if WORLD.rank:
        assert out == ""
        return
    for name in (
        "LSGD round",
        "bare pull",
        "Bcast, lerp_",
        "EASGD exchange",
        "AllreduceSGD exchange",
        ">= 6",
    ):
        assert name in out
    assert "gloo all_reduce" in out or "gloo could not start" in out
    assert re.search(r"LocalSGD average=\"quadratic\" .* [+-]\d", out)


@pytest.mark.gpu
def test_bench_exchange_on_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """By each path, its bytes with it; MPI gets the emulated device's memory, as it is the host's."""
    forced = ["--cuda_aware"] if CORE else []
    assert call(bench, "exchange", "--device", "cuda", "--bytes", "8e3", "--repetitions", "2", *forced) == 0
    out = capsys.readouterr().out
    if WORLD.rank:
        assert out == ""
        return
    found = re.findall(
        r"^(LSGD round|EASGD exchange|LocalSGD average|AllreduceSGD exchange) +(\S.*?)  ", out, re.M
    )
    if WORLD.size > 1 and "in 1 node(s)" in out:
        paths = ["device memory (IPC)", "messages through the host"]
        if CORE or "came whole" in out:  # or a CUDA-aware MPI
            paths.append("messages from device memory")
        assert [path for name, path in found if name == "LSGD round"] == paths
        assert len(found) == 4 * len(paths)
        assert re.search(
            r"LSGD round, device memory \(IPC\) +LSGD round, messages through the host +[\d.]+ +>= 4", out
        )
    assert ("NOT A MEASUREMENT" in out) == bool(CORE)
    assert "bare pull" in out and "copy of as many bytes" in out and "figures: " in out


@pytest.mark.parametrize(("fast", "bytes_of_one"), [(False, 4 << 16), (True, 4_000_000)])
def test_a_slow_network_is_tried_with_a_part(
    monkeypatch: pytest.MonkeyPatch, fast: bool, bytes_of_one: int
) -> None:
    """Where every message takes a second the bandwidth is that of the first, else of the whole vector."""
    seconds = 1e-6 if fast else 1.0

    def timed(topology: mpilsgd.Topology, do: Callable[[], object], *_: object, **at_once: int) -> float:
        do()
        return 0.0 if at_once else seconds  # the meetings, or what is moved

    monkeypatch.setattr(machine, "_timed", timed)
    topology = mpilsgd.Topology(shared=False)
    found = machine.measure(topology, 4_000_000, 0.1)
    least = min(map(len, topology.nodes))
    topology.free()
    assert found.memory == pytest.approx(least * 12_000_000 / seconds)
    if WORLD.size > 1:
        assert found.bandwidth == pytest.approx(bytes_of_one / (seconds - found.latency), rel=1e-6)
