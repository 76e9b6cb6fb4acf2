"""Every kernel in device memory against NumPy and the reference: on the emulated device, or on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from emulated_memory import to_device, to_host, wait
from kernel_cases import CASES, WITH_STATS, Vectors, clone, make, not_finite, np_stored, peers_of, wide
from test_kernels import DTYPES, assert_moved, assert_same

from mpilsgd import extension, kernels, reference

pytestmark = pytest.mark.gpu
core, emulated = extension.core, extension.emulated
LENGTHS = [0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1000, 5000]
OVER_PEERS = [
    name
    for name in CASES
    if name.startswith(("pull many", "jacobi", "gauss", "moving", "elastic", "total", "assign", "average"))
]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
only_emulated = pytest.mark.skipif(emulated is None, reason="needs an emulated device")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    if emulated is not None:
        emulated.clear()
    yield
    if emulated is not None:
        emulated.clear()


def on_device(call: Callable, vectors: Vectors, stats: bool) -> Any:
    """Calls a kernel with copies on the device and brings them back."""
    there = dict(zip(vectors, to_device(vectors.values()), strict=True))
    moved = call(kernels, there, stats)
    for key, x in there.items():
        vectors[key].copy_(to_host(x))
    return moved


@by_dtype
@pytest.mark.parametrize("name", CASES)
def test_equals_numpy_and_reference(dtype: torch.dtype, name: str) -> None:
    """All lengths, at and off the alignment that packs need, with and without statistics, one to three peers."""
    call, oracle = CASES[name]
    scalar = np.float64 if dtype == torch.float64 else np.float32
    for i, n in enumerate(LENGTHS):
        for j, start in enumerate((0, 1, 3)):
            n_peers, stats = 1 + (i + j) % 3, (i + j) % 2 == 0
            what = f"{name} n={n} peers={n_peers} start={start} stats={stats}"
            vectors = make(dtype, n, n_peers, start)
            by_torch, by_numpy = clone(vectors), clone(vectors)
            for key, values in oracle(wide(vectors), scalar).items():
                by_numpy[key].copy_(torch.from_numpy(np_stored(name, values, by_numpy[key].dtype)))
            stats = stats and name in WITH_STATS
            moved = on_device(call, vectors, stats)
            wanted = call(reference, by_torch, stats)
            assert_same(vectors, by_numpy, what + ", numpy")
            assert_same(vectors, by_torch, what + ", torch")
            assert_moved(moved, wanted)


@by_dtype
@pytest.mark.parametrize("name", OVER_PEERS)
def test_many_peers(dtype: torch.dtype, name: str) -> None:
    """More than travel with the launch; some of them broken; then few again, and more than ever."""
    call, _ = CASES[name]
    for n, n_peers in ((33, 70), (1000, 65), (100, 3), (1, 150)):
        vectors = make(dtype, n, n_peers)
        vectors["p1"][0] = float("nan")
        if n_peers > 64:
            vectors["p64"][n - 1] = float("inf")
        by_torch, stats = clone(vectors), name in WITH_STATS
        moved = on_device(call, vectors, stats)
        wanted = call(reference, by_torch, stats)
        assert_same(vectors, by_torch, f"{name} n={n} peers={n_peers}")
        assert_moved(moved, wanted)
        if stats:
            assert moved.bad_peers == ((1, 64) if n_peers > 64 else (1,))


@by_dtype
@pytest.mark.parametrize("name", CASES)
def test_values_not_finite(dtype: torch.dtype, name: str) -> None:
    call, _ = CASES[name]
    for n, places in ((1, [0]), (1003, [17, 512, 1002])):
        for key, vectors in not_finite(dtype, n, places):
            by_torch = clone(vectors)
            moved = on_device(call, vectors, True)
            wanted = call(reference, by_torch, True)
            assert_same(vectors, by_torch, f"{name} n={n} not finite in {key}")
            assert_moved(moved, wanted)


@by_dtype
def test_seeds_of_the_rounding(dtype: torch.dtype) -> None:
    for seed in (0, 1, 7, 2**40 + 5, -1):
        v = make(dtype, 1003, 2)
        w = clone(v)

        def rounds(f: Any, u: Vectors, seed: int = seed) -> None:
            f.pull(peers_of(u), u["l"], 0.01, u["o"], 0.003, seed=seed)
            f.elastic(u["c"], peers_of(u), 0.01, 0.02, gauss_seidel=True, seed=seed)
            f.elastic_sum(u["t"], u["c"], [u["p0"]], 0.01, seed=seed)
            f.elastic_apply(u["c"], [u["p1"]], u["t"], 0.01, 0.02, seed=seed)

        on_device(lambda f, u, _: rounds(f, u), v, False)
        rounds(reference, w)
        assert_same(v, w, f"seed {seed}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_value_is_converted_right(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    ties = every[torch.isfinite(every)].float().unique().double()
    values = torch.cat([every.float(), ((ties[1:] + ties[:-1]) / 2).float()])
    total, x, wide_x, rounded = to_device(
        [torch.zeros(len(every)), every, values, torch.zeros(len(values)).to(dtype)]
    )
    kernels.total(total, [x])
    kernels.assign([rounded], wide_x, 1.0)
    wanted = torch.where(torch.isfinite(every), every.float(), 0.0)
    torch.testing.assert_close(to_host(total), wanted, rtol=0, atol=0)
    torch.testing.assert_close(to_host(rounded), values.to(dtype), rtol=0, atol=0, equal_nan=True)


def pulled(n: int, stats: bool = True) -> Any:
    """What comes back before anybody waits."""
    x, leader = to_device([torch.zeros(n), torch.ones(n)])
    where = extension.where_to_run(x, stats)
    return core.pull(where, [x.data_ptr()], leader.data_ptr(), 0.5, 0, 0.0), x, leader


def test_statistics_are_not_waited_for() -> None:
    """And are what they are, however late, in whatever order they are asked for, or never."""
    if emulated is not None:
        emulated.delay(0.02)
    kept = [pulled(10 + i) for i in range(50)]
    if emulated is not None:
        assert not kept[-1][0].ready()
    for i in reversed(range(50)):
        pending, *_ = kept[i]
        assert pending.get() == (0.25 * (10 + i), True, True, ()) == pending.get() and pending.ready()
    late = [pulled(1000 + i) for i in range(40)]
    vectors = [one[1:] for one in late]
    late = late[::7]
    gc.collect()  # the slots of the others are not given out while a launch may write there
    again = [pulled(3000 + i) for i in range(40)]
    assert [one[0].get()[0] for one in again] == [0.25 * (3000 + i) for i in range(40)]
    assert [one[0].get()[0] for one in late] == [0.25 * (1000 + i) for i in range(0, 40, 7)]
    del vectors
    assert pulled(5, stats=False)[0] is None
    nothing = core.pull(core.Where(core.DType.float32, 0, 0, 0, True, 0), [0], 0, 0.5, 0, 0.0)
    assert nothing.ready() and nothing.get() == (0.0, True, True, ())


@only_emulated
def test_a_launch_with_statistics_is_a_launch_and_nothing_else() -> None:
    x, leader = to_device([torch.zeros(5000), torch.ones(5000)])
    kernels.pull(x, leader, 0.5, stats=True)
    emulated.clear()
    emulated.delay(0.0)
    where = extension.where_to_run(x, True)
    for _ in range(10):
        pending = core.pull(where, [x.data_ptr()], leader.data_ptr(), 0.5, 0, 0.0)
        while not pending.ready():
            pass
    calls = emulated.log()
    waits = calls.pop("cudaStreamQuery", 0)
    assert calls.pop("cudaLaunchKernelEx") == 10 == len(emulated.launches()) and waits < 100
    assert set(calls) <= {"cudaGetDevice", "cudaStreamIsCapturing"}, calls
    assert emulated.launches()[0][1:] == (5, 256)  # 1250 packs of 4


@only_emulated
def test_the_order_of_blocks_and_threads_changes_nothing() -> None:
    n = 40_001
    x, leader = make(torch.float32, n, 0)["x"] * 1e3, torch.randn(n)
    found = set()
    for seed in range(20):
        emulated.seed(seed)
        there = to_device([x, leader])
        moved = kernels.pull(there[0], there[1], 0.3, stats=True)
        found.add((moved, to_host(there[0]).sum().item()))
    assert len(found) == 1


@only_emulated
def test_streams_do_not_mix_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [0, *(core.device.new_stream(0) for _ in range(3))]
    pending = []
    for round_ in range(20):
        for i, stream in enumerate(streams):
            monkeypatch.setattr(extension.emulated_current, "stream", stream)
            n = 1 + 100 * i + round_
            pending.append((0.25 * n, pulled(n)))
    for squared, (found, *_) in pending:
        assert found.get()[0] == squared
    for stream in streams[1:]:
        core.device.drop_stream(0, stream)


@only_emulated
def test_grids_fit_the_device() -> None:
    x, leader = to_device([torch.zeros(100_000), torch.ones(100_000)])
    kernels.pull(x, leader, 0.5)
    kernels.check(x)
    assert [grid for _, grid, _ in emulated.launches()] == [10, 10]
    assert (to_host(x) == 0.5).all()


@only_emulated
def test_failures_are_raised_and_leave_nothing_behind() -> None:
    x, leader = to_device([torch.zeros(100), torch.ones(100)])
    kernels.pull(leader, leader, 0.5, stats=True)
    emulated.clear()
    for name, told in (("cudaLaunchKernelEx", "launch"), ("cudaGetDevice", "cudaGetDevice")):
        emulated.fail(name, 1, 719)
        with pytest.raises(RuntimeError, match=f"mpilsgd: CUDA: {told}: unspecified launch failure"):
            kernels.pull(x, leader, 0.5, stats=True)
        assert emulated.last_error() == 0
    for _ in range(100):  # slots of launches that failed are taken again
        emulated.fail("cudaLaunchKernelEx", 1, 719)
        with pytest.raises(RuntimeError):
            kernels.pull(x, leader, 0.5, stats=True)
    assert "cudaHostAlloc" not in emulated.log()
    assert kernels.pull(x, leader, 0.5, stats=True) == (25.0, True, True, ())
    emulated.fail("cudaMemcpyAsync", 1, 1)
    peers = to_device([torch.zeros(10) for _ in range(70)])
    with pytest.raises(RuntimeError, match="cudaMemcpyAsync: invalid argument"):
        kernels.average(peers)


@only_emulated
def test_a_kernel_that_fails_raises_where_its_statistics_are_awaited() -> None:
    emulated.delay(0.05)
    x, leader = to_device([torch.zeros(100), torch.ones(100)])
    emulated.uneven_barrier()
    where = extension.where_to_run(x, True)
    pending = core.pull(where, [x.data_ptr()], leader.data_ptr(), 0.5, 0, 0.0)
    with pytest.raises(RuntimeError, match="not all threads reach"):
        pending.get()
    with pytest.raises(RuntimeError, match="not all threads reach"):
        while not pending.ready():
            pass
    emulated.clear()


@only_emulated
def test_host_and_device_do_not_mix() -> None:
    x, y, total = to_device([torch.zeros(4), torch.ones(4), torch.ones(4)])
    assert (kernels.backend(x), kernels.backend(torch.zeros(4))) == ("cuda", "cpu")
    assert (extension.device_of(x), extension.device_of(x[2:]), extension.device_of(torch.zeros(4))) == (
        0,
        0,
        -1,
    )
    for call in (
        lambda: kernels.pull(x, torch.ones(4), 0.5),
        lambda: kernels.pull(torch.ones(4), x, 0.5),
        lambda: kernels.elastic(x, [y, torch.ones(4)], 0.1, 0.1),
        lambda: kernels.total(torch.ones(4), [x, y]),
        lambda: kernels.average([torch.ones(4), x]),
    ):
        with pytest.raises(ValueError, match=" on cpu:0"):
            call()
    kernels.total(total, [x, y])
    assert to_host(total).tolist() == [1.0] * 4


@pytest.mark.parametrize("bits", [8, 4])
@by_dtype
def test_few_bits(dtype: torch.dtype, bits: int) -> None:
    from mpilsgd import blocks

    for n in (0, 1, 7, 127, 128, 129, 255, 1000, 5000, 100_001):
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        e, r = (
            torch.randn(n, generator=generator).to(torch.promote_types(dtype, torch.float32))
            for _ in range(2)
        )
        codes = torch.zeros(blocks.nbytes(n, dtype, bits), dtype=torch.uint8)
        runs = []
        for on in (lambda v: [t.clone() for t in v], to_device):
            y, residual, base, out, to = on([x, e, r, x, codes])
            kernels.encode(to, y, bits, residual, base, 3.0)
            kernels.decode(to, out, bits, base, 3.0, add=True, follow=True)
            runs.append([to_host(v) for v in (to, residual, base, out)])
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True)), f"n={n}"
    wait()
