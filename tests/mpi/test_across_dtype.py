"""What crosses nodes in a half type: half the bytes, a small error, nothing lost for good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import WORLD, check_together, distance, on_every_rank
from internals import small_pieces
from problems import TanhNet, flatten, state_of

from mpilsgd import ADMM, EASGD, LSGD, AllreduceSGD, DiLoCo, Downpour, EASGDTree, LocalSGD, Topology
from mpilsgd.comm import MPI

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.brief(2, "3x2", "4x2")]


def alone() -> bool:
    """Whether every rank has a node of its own."""
    node = WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    largest = WORLD.allreduce(node.size, MPI.MAX)
    node.Free()
    return largest == 1


ALONE = on_every_rank(alone)
TURNS = {"asynchronous": True, "order": "round-robin"}
METHODS: list[tuple[Any, dict[str, Any]]] = [
    (AllreduceSGD, {}),
    (LocalSGD, {"period": 2}),
    (DiLoCo, {"period": 2}),
    (DiLoCo, {"period": 2, "fragments": 2, "mixing": 0.3}),
    (DiLoCo, {"period": 2, **TURNS}),
    (LSGD, {"period": 2, "global_period": 4}),
    (LSGD, {"period": 2, "global_period": 4, "when": "every_step"}),
    (LSGD, {"period": 2, "global_pull": 0.0, "asynchronous": "wait-free", "order": "round-robin"}),
    (EASGD, {"period": 2}),
    (EASGD, {"period": 2, "overlap": True}),
    (EASGD, {"period": 2, **TURNS}),
    (Downpour, {"period": 2, "asynchronous": False}),
    (Downpour, {"period": 2, "order": "round-robin"}),
    (ADMM, {"rho": 1.0, **TURNS}),
    (EASGDTree, {"degree": 2, "period": 1, "upper_period": 2, "order": "lock-step"}),
]
by_method = pytest.mark.parametrize(
    ("method", "options"),
    METHODS,
    ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(map(str, v.values())),
)


def trained(
    method: Any, options: dict[str, Any], across: Any, steps: int = 12, shared: bool = False
) -> tuple[np.ndarray, int]:
    """The centre after some steps, and the bytes that came to this rank."""
    topology = Topology(shared=shared, across_dtype=across)
    problem = TanhNet()
    model = problem.build(torch.float32, problem.start(0))
    opt = method(torch.optim.SGD(model.parameters(), lr=0.05), topology, **options)
    for t in range(steps):
        if opt.computes:
            opt.zero_grad()
            loss = problem.loss(model, WORLD.rank, t)
            loss.backward()
            opt.step(loss=loss)
        else:
            opt.step()
    nbytes = opt.metrics.bytes_across or opt.metrics.bytes_group  # on one node most are in the group
    with opt.center():
        center = flatten(state_of(model))
    opt.close()
    topology.free()
    return center, nbytes


@by_method
@pytest.mark.parametrize("across", [None, torch.bfloat16, "int8", "int4"], ids=str)
def test_pieces_change_nothing(
    method: Any, options: dict[str, Any], across: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector that comes in many parts, each of many messages, and is used part by part: the same bits."""
    whole = [trained(method, options, across, shared=shared)[0] for shared in (True, False)]
    small_pieces(monkeypatch)
    pieces = [trained(method, options, across, shared=shared)[0] for shared in (True, False)]
    same = [np.array_equal(*pair) for pair in zip(whole, pieces, strict=True)]
    check_together([] if all(same) else [f"shared, messages: equal {same}"])


@by_method
@pytest.mark.parametrize("across", [torch.bfloat16, "bfloat16"], ids=str)
def test_half_the_bytes_and_a_small_error(method: Any, options: dict[str, Any], across: Any) -> None:
    exact, whole = trained(method, options, None)
    rounded, half = trained(method, options, across)
    gap = distance(rounded, exact)
    total = [sum(WORLD.allgather(n)) for n in (whole, half)]
    if options.get("global_pull") == 0 and ALONE:
        return check_together([] if total == [0, 0] and gap < 3e-2 else [f"{gap}, {total}"])  # groups of one
    errors = [] if 0 < gap < 3e-2 else [f"differs by {gap:.1e}"]
    errors += (
        [] if total[0] and abs(total[1] / total[0] - 0.5) < 0.01 else [f"{total[1]} of {total[0]} bytes"]
    )
    check_together(errors)


def test_what_is_rounded_away_comes_back() -> None:
    """EASGD, asynchronous, in bfloat16: the sum of x and centre stays as it was but for what is still to be sent.

    Less what the workers' own steps add. 300 roundings would add up to some ten times as much as the last one of each.
    """
    topology = Topology(shared=False, across_dtype="bfloat16")
    random = torch.Generator().manual_seed(WORLD.rank)
    parameter = torch.nn.Parameter(torch.randn(1000, generator=random))
    opt = EASGD(
        torch.optim.SGD([parameter], lr=0.1),
        topology,
        period=1,
        center_rate=0.5 * WORLD.size,
        moving_rate=0.5,
        asynchronous=True,
        init="different",
    )

    def total() -> np.ndarray:
        own = parameter.detach().double().numpy().copy()
        with opt.center():
            centre = parameter.detach().double().numpy().copy()
        return np.sum(WORLD.allgather(own), 0) + centre

    before = total()
    moved = np.zeros_like(before)
    for _ in range(300):
        parameter.grad = torch.randn(1000, generator=random)
        moved -= 0.1 * parameter.grad.double().numpy()
        opt.step(loss=1.0)
    gap = np.abs(total() - before - np.sum(WORLD.allgather(moved), 0))
    opt.close()
    topology.free()
    largest, mean = float(gap.max()), float(gap.mean())
    check_together([f"the sum moved by {largest:.1e}, on average by {mean:.1e}"] if mean > 0.008 else [])


@pytest.mark.parametrize("across", ["float32", "int2", torch.float64, 16, [8]])
def test_other_types_are_refused(across: Any) -> None:
    with pytest.raises(ValueError, match="across_dtype must be bfloat16, int8, int4 or None"):
        Topology(across_dtype=across)


@pytest.mark.parametrize("method", [EASGD, EASGDTree])
@pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
def test_all_start_alike_and_a_trees_centre_is_its_root(method: Any, shared: bool) -> None:
    """Rank 0's start and a root come to all in their own type."""
    options: dict[str, Any] = {"degree": 2} if method is EASGDTree else {}
    topology = Topology(shared=shared, across_dtype="bfloat16")
    problem = TanhNet()
    model = problem.build(torch.float32, problem.start(WORLD.rank) * 1.001)
    opt = method(torch.optim.SGD(model.parameters(), lr=0.05), topology, **options)
    start = flatten(state_of(model)).astype(np.float32)
    with opt.center():
        center = flatten(state_of(model)).astype(np.float32)
    opt.close()
    topology.free()
    expected = (problem.start(0) * 1.001).astype(np.float32)
    check_together(
        [
            f"the {name} is off by {np.abs(found - expected).max()}"
            for name, found in (("start", start), ("centre", center))
            if not np.array_equal(found, expected)
        ]
    )
