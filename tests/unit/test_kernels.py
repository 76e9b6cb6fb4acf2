"""Every kernel, on every instruction set, against NumPy expressions (bit for bit) and the torch reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import CASES, SPECIAL, WITH_STATS, Vectors, clone, make, not_finite, np_stored, wide

from mpilsgd import kernels, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 7, 64, 1000, 100003]
ISAS = kernels._core.instruction_sets()


def assert_same(got: Vectors, wanted: Vectors, why: str) -> None:
    assert got.keys() == wanted.keys()
    for key, t in got.items():
        if not np.array_equal(t.double().numpy(), wanted[key].double().numpy(), equal_nan=True):
            raise AssertionError(f"{why}: {key} is {t}, should be {wanted[key]}")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = kernels.instruction_set()
    kernels._core.select_instruction_set(request.param)
    yield kernels.instruction_set()
    kernels._core.select_instruction_set(best)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Torch's own threads only hinder each other on vectors this short."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_numpy_and_reference(isa: str, dtype: torch.dtype, name: str) -> None:
    call, oracle = CASES[name]
    scalar = np.float64 if dtype == torch.float64 else np.float32
    shapes = [(n, p, start) for n in LENGTHS[:-1] for p, start in ((1, 1), (3, 0), (5, 3))]
    for n, n_peers, start in [*shapes, (LENGTHS[-1], 2, 1)]:
        vectors = make(dtype, n, n_peers, start)
        by_torch = clone(vectors)
        by_numpy = clone(vectors)
        for key, values in oracle(wide(vectors), scalar).items():
            by_numpy[key].copy_(torch.from_numpy(np_stored(name, values, by_numpy[key].dtype)))
        call(kernels, vectors, False)
        call(reference, by_torch, False)
        assert_same(vectors, by_numpy, f"{name} n={n} peers={n_peers} start={start}, numpy")
        assert_same(vectors, by_torch, f"{name} n={n} peers={n_peers} start={start}, torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_threads(threads: int, dtype: torch.dtype, name: str) -> None:
    call, _ = CASES[name]
    vectors = make(dtype, 270_001, 3, start=1)
    by_torch = clone(vectors)
    moved, wanted = call(kernels, vectors, True), call(reference, by_torch, True)
    assert_same(vectors, by_torch, name)
    assert_moved(moved, wanted)


def assert_moved(moved: kernels.Moved | None, wanted: kernels.Moved | None) -> None:
    if wanted is None:
        assert moved is None
    else:
        assert moved is not None
        assert moved.squared_distance == pytest.approx(wanted.squared_distance, rel=1e-6)
        assert moved[1:] == wanted[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WITH_STATS)
def test_stats_change_nothing_and_are_right(isa: str, dtype: torch.dtype, name: str) -> None:
    call, _ = CASES[name]
    for n in LENGTHS:
        vectors = make(dtype, n, 3, start=1)
        quiet, by_torch, before = clone(vectors), clone(vectors), wide(vectors)
        moved = call(kernels, vectors, True)
        assert call(kernels, quiet, False) is None
        assert_same(vectors, quiet, name)
        assert_moved(moved, call(reference, by_torch, True))
        after, ignored = wide(vectors), "tvc"
        distance = sum(
            ((after[key].astype(float) - before[key]) ** 2).sum() for key in after if key not in ignored
        )
        assert moved.squared_distance == pytest.approx(distance, rel=1e-5)
        assert moved[1:] == (True, True, ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_not_finite(isa: str, dtype: torch.dtype, name: str) -> None:
    """Each vector in turn holds NaN and infinities, in the SIMD part, the tail and a second tile."""
    call, _ = CASES[name]
    for n, places in ((1, [0]), (100, [0, 33, 99]), (5003, [17, 2049, 5002])):
        for key, vectors in not_finite(dtype, n, places):
            by_torch = clone(vectors)
            moved, wanted = call(kernels, vectors, True), call(reference, by_torch, True)
            assert_same(vectors, by_torch, f"{name} n={n} not finite in {key}")
            assert_moved(moved, wanted)


@pytest.mark.parametrize("bad", SPECIAL)
def test_guards_by_hand(isa: str, bad: float) -> None:
    def vec(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    x = vec(1, 2)
    assert kernels.pull(x, vec(bad, 4), 0.5, vec(3, bad), 0.25, stats=True) == (1.25, True, False, ())
    assert x.tolist() == [0.5 * 1 + 1, 3]
    c, p, q = vec(0, 0, 1), vec(bad, 2, 3), vec(4, 4, 3)
    moved = kernels.elastic(c, [p, q], 0.5, 0.25, stats=True)
    assert c.tolist() == [1, 1.5, 2] and q.tolist() == [2, 2, 2] and p.tolist()[1:] == [1, 2]
    assert np.array_equal(p.numpy()[:1], [bad], equal_nan=True)
    assert moved == (1 + 1 + 4 + 4 + 1, False, True, (0,))  # the workers' part
    p, q = vec(bad, 2, bad), vec(4, 4, bad)
    moved = kernels.average([p, q], stats=True)
    assert (
        p.tolist()[:2] == q.tolist()[:2] == [4, 3] and not torch.isfinite(p[2]) and not torch.isfinite(q[2])
    )
    assert moved is not None and moved.bad_peers == (0, 1) and not moved.finite
    out = vec(0, 0)
    assert kernels.total(out, [vec(bad, 1), vec(2, 2)], stats=True) == (0.0, False, True, (0,))
    assert out.tolist() == [2, 3]
    assert not kernels.check(vec(1, bad)) and kernels.check(vec(1, 2)) and kernels.check(vec())


def test_overflow_is_seen(isa: str) -> None:
    for dtype in DTYPES:
        big = torch.finfo(dtype).max
        x = torch.tensor([1.0, big], dtype=dtype)
        moved = kernels.pull(x, torch.tensor([1.0, -big], dtype=dtype), -1.0, stats=True)
        assert moved == (0.0, False, True, (0,))
        assert kernels.check(torch.tensor([big, -big, torch.finfo(dtype).tiny], dtype=dtype))


@pytest.mark.parametrize("bad", SPECIAL)
def test_push_by_hand(isa: str, bad: float) -> None:
    def vec(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    c, x, a, u = vec(1, 2, 3, bad), vec(5, bad, 4, 1), vec(1, 1, bad, 2), vec(4, 4, 4, 4)
    kernels.push(c, x, a, 0.5, u, 0.25)
    assert u.tolist() == [3, 1, 1, 0.5]
    assert c.tolist()[:3] == [4, 3, 4] and np.array_equal(c.numpy()[3:], [bad], equal_nan=True)
    assert x.tolist()[:3] == [4.75, 3.25, 4.25] and np.array_equal(x.numpy()[3:], [bad], equal_nan=True)
    assert_same({"anchor": a}, {"anchor": x}, "push")
    c, x, a = vec(1, 2, 3), vec(5, bad, 4), vec(1, 1, bad)
    kernels.push(c, x, a, 0.5)
    assert c.tolist() == x.tolist() == a.tolist() == [3, 2, 3]


@pytest.mark.parametrize("bad", SPECIAL)
def test_outer_by_hand(isa: str, bad: float) -> None:
    def vec(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    c, u, m = vec(4, bad, 4), vec(1, 1, 1), vec(2, 2, bad)
    kernels.outer(c, u, m, 0.5, 0.5)
    assert u.tolist() == [2.5, 0.5, 0.5]
    assert c.tolist() == [2.375, 1.875, 3.875]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_with_rate_1_is_the_mean(isa: str, dtype: torch.dtype) -> None:
    v = make(dtype, 5003, 0, start=1)
    kernels.outer(v["c"], v["v"], v["l"], 1.0, 0.0)
    assert_same({"c": v["c"]}, {"c": v["l"]}, "outer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_push_leaves_equal_vectors(isa: str, dtype: torch.dtype) -> None:
    """The worker must find what is stored: x at the centre, the anchor at x; also where the push overflows."""
    for velocity, momentum in ((False, 0.0), (True, 0.0), (True, 0.9)):
        v = make(dtype, 5003, 0, start=1)
        v["x"][::7] = torch.finfo(dtype).max
        v["l"][::14] = -torch.finfo(dtype).max
        kernels.push(v["c"], v["x"], v["l"], 0.3, v["v"] if velocity else None, momentum)
        assert_same({"anchor": v["l"]}, {"anchor": v["x"]}, "push")
        if not velocity:
            assert_same({"x": v["x"]}, {"x": v["c"]}, "push")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_value_is_converted_right(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    total = torch.empty(every.numel())
    kernels.total(total, [every])
    torch.testing.assert_close(total, torch.where(torch.isfinite(every), every.float(), 0.0), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(1)
    values = (
        torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32).view(torch.float32)
    )
    ties = (every[torch.isfinite(every)].float().unique()).double()
    values = torch.cat([values, ((ties[1:] + ties[:-1]) / 2).float()])
    rounded = torch.empty(values.numel(), dtype=dtype)
    kernels.assign([rounded], values, 1.0)
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_pulls_of_half_types_are_not_lost(isa: str, dtype: torch.dtype) -> None:
    """Far below half an ulp the moves are right in the mean: over the elements, and over the seeds of one element."""
    n, rate = 512, 1 / 64
    ulp = torch.finfo(dtype).eps
    leader, ups = (1 + torch.linspace(0.5, 1, n)).to(dtype), 0.0
    for seed in range(256):
        x, worker = torch.ones(n, dtype=dtype), torch.ones(n, dtype=dtype)
        kernels.pull(x, leader, rate * ulp, seed=seed)
        kernels.elastic(leader.clone(), [worker], rate * ulp, 0.0, seed=seed)
        assert set(x.double().unique().tolist()) <= {1.0, 1.0 + ulp} and torch.equal(x, worker)
        ups += float((x.double() - 1).mean() / ulp) / 256
    assert ups == pytest.approx(float(rate * (leader.double() - 1).mean()), rel=0.35)  # 5 standard deviations
    center = torch.ones(n, dtype=dtype)
    kernels.elastic(center, [torch.full_like(center, 1.5)], 0.0, rate * ulp, seed=7)
    assert (
        len(center.unique()) == 1
    )  # by the value alone: how the vector is cut, and by whom, does not matter


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_by_chance(isa: str, dtype: torch.dtype) -> None:
    """What the type holds stays; the rest goes to a neighbour, the same on every path; a seed makes another draw."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    for seed in (0, 1, 2**40 + 5, -1):
        x = every.clone()
        kernels.pull(x, x, 0.3, seed=seed)
        assert torch.equal(x, every)
        kernels.elastic(x, [every.clone()], 0.3, 0.3, seed=seed)
        assert torch.equal(x, every)
    results = []
    for seed in range(3):
        v = make(dtype, 5003, 3)
        w = clone(v)
        for f, u in ((kernels, v), (reference, w)):
            f.pull(u["x"], u["l"], 0.01, u["o"], 0.003, seed=seed)
            f.elastic(u["c"], [u["p0"], u["p1"]], 0.01, 0.02, gauss_seidel=True, seed=seed)
            f.elastic_sum(u["t"], u["c"], [u["p0"]], 0.01, seed=seed)
            f.elastic_apply(u["c"], [u["p2"]], u["t"], 0.01, 0.02, seed=seed)
        assert_same(v, w, f"seed {seed}")
        results.append(v)
        exact = make(dtype, 5003, 3)
        x, leader, other = (exact[key].float() for key in "xlo")
        exact_x = x - 0.01 * (x - leader) - 0.003 * (x - other)
        spacing = 2.0 ** torch.floor(torch.log2(exact_x.abs())) * torch.finfo(dtype).eps
        assert ((v["x"].float() - exact_x).abs() <= spacing).all()
    assert not torch.equal(results[0]["x"], results[1]["x"])
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    x = largest.clone()
    kernels.pull(x, largest * 0.5, -1e-5)  # an overflow is rounded to nearest
    assert torch.equal(x, largest)


def test_many_peers(threads: int) -> None:
    peers = [torch.full((50,), float(i), dtype=torch.float64) for i in range(201)]
    peers[150][3] = float("nan")
    moved = kernels.average(peers, stats=True)
    assert moved is not None and moved.bad_peers == (150,)
    assert peers[7].tolist()[:3] == [100.0] * 3 and peers[150][3] == (200 * 201 / 2 - 150) / 200


def test_calls_from_several_python_threads(threads: int) -> None:
    vectors = [torch.zeros(400_000) for _ in range(4)]
    leader = torch.ones(400_000)

    def pulls(x: torch.Tensor) -> None:
        for _ in range(20):
            kernels.pull(x, leader, 0.5)

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(pulls, vectors))
    for x in vectors:
        torch.testing.assert_close(x, torch.full_like(x, 1 - 0.5**20), rtol=0, atol=0)


def run_python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_memory_is_taken_and_a_fork_is_survived() -> None:
    """In a process of its own: the peak memory is that of the process."""
    script = """
import os, resource, torch
from mpilsgd import kernels as k
torch.set_num_threads(2)
n = 16_000_000
x, l, o, v, t = (torch.full((n,), float(i)) for i in range(5))
warm = [torch.ones(300_000) for _ in range(2)]
k.pull(*warm, 0.5, stats=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
k.pull(x, l, 0.1, o, 0.1, stats=True)
k.elastic(x, [l, o], 0.1, 0.1, stats=True)
k.elastic(x, [l, o], 0.1, 0.1, gauss_seidel=True)
k.elastic_sum(t, x, [l, o], 0.1)
k.elastic_apply(x, [l, o], t, 0.1, 0.1)
k.total(t, [x, l, o])
k.assign([x, l], t, 0.3)
k.average([x, l, o], stats=True)
k.msgd(x, l, v, 0.1, 0.9, leader=o, rate=0.1, stats=True)
k.iterate(x, v, 0.9, -1)
k.push(x, l, o, 0.1, v, 0.9)
k.outer(x, v, l, 0.7, 0.9)
k.check(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
x.zero_()
l.fill_(1.0)
child = os.fork()
k.pull(x, l, 0.5)
if child == 0:  # NumPy, because torch's own threads do not survive a fork
    os._exit(0 if x.numpy().min() == x.numpy().max() == 0.5 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    grown_by_mib = int(run_python("import warnings; warnings.simplefilter('ignore')\n" + script))
    assert grown_by_mib < 8  # a vector has 61


def test_without_the_extension() -> None:
    script = """
import sys, warnings
sys.modules["mpilsgd._core"] = None
import torch
from mpilsgd import kernels as k
x, l = torch.zeros(3), torch.ones(3)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    moved = k.pull(x, l, 0.5, stats=True)
    k.average([x, l])
assert [w.category for w in seen] == [k.FallbackWarning], seen
assert "pip install" in str(seen[0].message)
assert seen[0].filename == "<string>"
assert moved == (0.75, True, True, ()) and x.tolist() == [0.75] * 3
assert (k.backend(x), k.instruction_set()) == ("reference", "reference")
"""
    run_python(script)


def test_backend() -> None:
    assert kernels.backend(torch.zeros(3)) == "cpu"
    assert kernels.backend(torch.zeros(3, dtype=torch.int32)) == "reference"
    assert kernels.instruction_set() in ISAS == kernels._core.instruction_sets()
    with pytest.raises(ValueError, match="sse9"):
        kernels._core.select_instruction_set("sse9")


X, Y, Z = torch.zeros(4), torch.ones(4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.pull(X, torch.zeros(5), 0.1), "leader has length 5, but x has length 4"),
        (lambda: kernels.pull(X, Y.double(), 0.1), "leader is torch.float64, but x is torch.float32"),
        (lambda: kernels.pull(X, Y, 0.1, Z.to("meta"), 0.1), "other is on meta, but x is on cpu"),
        (lambda: kernels.pull(X.int(), Y.int(), 0.1), "x must be float32, float64"),
        (lambda: kernels.pull(X.view(2, 2), Y, 0.1), "x must be a contiguous 1-D vector"),
        (lambda: kernels.pull(X, torch.zeros(8)[::2], 0.1), "leader must be a contiguous 1-D vector"),
        (lambda: kernels.pull(X, Y, float("nan")), "rate must be a finite number"),
        (lambda: kernels.pull(X, Y, 0.1, Z, float("inf")), "other_rate must be a finite number"),
        (lambda: kernels.pull(X[:3], X[1:], 0.1), "leader overlaps x"),
        (lambda: kernels.pull([], Y, 0.1), "at least one"),
        (lambda: kernels.pull([X, Z], X, 0.1), "leader overlaps one"),
        (lambda: kernels.pull([X, X], Y, 0.1), "overlap"),
        (lambda: kernels.elastic(X, [], 0.1, 0.1), "at least one"),
        (lambda: kernels.elastic(X, Y, 0.1, 0.1), "sequence of vectors"),
        (lambda: kernels.elastic(X, [Y, torch.zeros(3)], 0.1, 0.1), r"peers\[1\] has length 3"),
        (lambda: kernels.elastic(X, [Y, Y], 0.1, 0.1), r"peers\[0\] and peers\[1\] overlap"),
        (lambda: kernels.elastic(X, [X], 0.1, 0.1), "overlap"),
        (lambda: kernels.elastic_sum(Y.double(), X, [Z], 0.1), "must be torch.float32"),
        (lambda: kernels.elastic_sum(Y, X, [Y], 0.1), "the total overlaps"),
        (lambda: kernels.total(torch.zeros(3), [Y]), "must have length 4"),
        (lambda: kernels.total(torch.zeros(4).half(), [Y.half()]), "must be torch.float32"),
        (lambda: kernels.average([]), "at least one"),
        (lambda: kernels.msgd(X, Y, None, 0.1, momentum=0.9), "needs a velocity"),
        (lambda: kernels.msgd(X, Y, torch.zeros(5), 0.1, 0.9), "velocity has length 5"),
        (lambda: kernels.msgd(X, Y, Z, float("nan")), "lr must be a finite number"),
        (lambda: kernels.push(X, Y, torch.zeros(5)), "anchor has length 5, but x has length 4"),
        (lambda: kernels.push(X.double(), Y, Z), "center is torch.float64, but x is torch.float32"),
        (lambda: kernels.push(X, Y, Z, 1.0, torch.zeros(3), 0.9), "velocity has length 3"),
        (lambda: kernels.push(X, Y, Y), "x and anchor overlap|anchor and x overlap"),
        (lambda: kernels.push(X, X, Z), "center and x overlap|x and center overlap"),
        (lambda: kernels.push(X, Y, Z, 1.0, Z, 0.9), "overlap"),
        (lambda: kernels.push(X, Y, Z, 1.0, X, 0.9), "overlap"),
        (lambda: kernels.push(X[:3], X[1:], Z[1:]), "center overlaps x"),
        (lambda: kernels.push(X, Y, Z, float("nan")), "rate must be a finite number"),
        (lambda: kernels.push(X, Y, Z, 1.0, torch.zeros(4), float("inf")), "momentum must be a finite"),
        (lambda: kernels.push(X, Y, Z, momentum=0.9), "needs a velocity"),
        (lambda: kernels.outer(X, Y, Y, 0.7, 0.9), "overlap"),
        (lambda: kernels.outer(X, Y, torch.zeros(5), 0.7, 0.9), "mean has length 5"),
        (lambda: kernels.outer(X, Y, Z, float("nan"), 0.9), "lr must be a finite number"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
