"""Vectors of more than 2^31 bytes, by messages. Run by name: bash tests/run.sh mpi --slow counts, with MPILSGD_RANKS=2.

Two ranks take 14 GB, those of the tree 21.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from harness import WORLD, check_together

from mpilsgd import EASGD, LSGD, AllreduceSGD, Downpour, EASGDTree, LocalSGD, Topology

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.slow]

MANY = (1 << 29) + 1000  # float32: more bytes than an int counts
METHODS: list[tuple[Any, dict[str, Any]]] = [
    (LSGD, {"period": 1, "global_period": 1}),
    (LocalSGD, {"period": 1}),
    (EASGD, {"period": 1}),
    (EASGD, {"period": 1, "asynchronous": True, "order": "round-robin"}),
    (Downpour, {"period": 1, "order": "round-robin"}),
    (AllreduceSGD, {}),
]


def moved(method: Any, options: dict[str, Any], numel: int) -> tuple[float, float]:
    """The least and the largest element after some steps, of a vector whose elements are all the same."""
    topology = Topology(shared=False)
    parameter = torch.nn.Parameter(torch.full((numel,), 1.0 + WORLD.rank))
    opt = method(torch.optim.SGD([parameter], lr=0.5), topology, init="different", **options)
    for k in range(2):
        if opt.computes:
            parameter.grad = torch.full_like(parameter, 0.25 * (WORLD.rank + 1))
        opt.step(loss=float(WORLD.rank + k))
        parameter.grad = None
    found = float(parameter.detach().min()), float(parameter.detach().max())
    opt.close()
    topology.free()
    return found


@pytest.mark.parametrize(
    ("method", "options"), METHODS, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v)
)
def test_counts_beyond_an_int(method: Any, options: dict[str, Any]) -> None:
    few = moved(method, options, 1000)
    many = moved(method, options, MANY)
    gc.collect()
    check_together([] if many == few and few[0] == few[1] else [f"{many} instead of {few}"])


def test_a_tree_of_many() -> None:
    """In free order, where an edge holds one message: a leaf of 1 and a root of 0 come together, all elements alike."""
    topology = Topology(shared=False)
    parameter = torch.nn.Parameter(torch.ones(MANY))
    opt = EASGDTree(torch.optim.SGD([parameter], lr=0.5), topology, degree=2, period=1, moving_rate=0.5)
    if not opt.computes:
        parameter.detach().zero_()
    deadline = time.monotonic() + 200
    while min(WORLD.allgather(opt.metrics.rounds if time.monotonic() < deadline else 3)) < 3:
        opt.step()  # no gradient: the leaf stays but for what it takes
    low, high = (float(v) for v in parameter.detach().aminmax())
    errors = [] if low == high and 0 < low < 1 else [f"between {low} and {high}"]
    errors += [] if opt.metrics.rounds >= 3 else [f"only {opt.metrics.rounds} messages came"]
    opt.close()
    topology.free()
    gc.collect()
    check_together(errors)
