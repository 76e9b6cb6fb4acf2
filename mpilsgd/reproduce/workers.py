"""A method's workers in one process, each stepping a vector by gradients that a function gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

Make = Callable[[Any, Any], Any]  # (parameters, topology) -> the method around its optimizer
# (x, rank, the worker's generator) -> gradient, loss
Gradient = Callable[["torch.Tensor", int, "torch.Generator"], tuple["torch.Tensor", float]]


class Course(NamedTuple):
    """x: (records, workers, values); centre: (records, values); loss: (steps, workers), before each step."""

    x: np.ndarray
    centre: np.ndarray
    loss: np.ndarray


def follow(
    make: Make,
    gradient: Gradient,
    starts: np.ndarray,
    steps: int,
    *,
    seed: int = 0,
    every: int = 1,
    keep: int | None = None,
    rate: Callable[[int], float] | None = None,
) -> Course:
    """Runs the real method and records where its workers and its centre are, at the start and every so many steps.

    Args:
        make: wraps an optimizer, as the user's program would.
        gradient: of one worker at x; its noise comes from the generator.
        starts: (workers, values), each worker's own start.
        keep: how many values are recorded (None: all).
        rate: the learning rate of step t, from 0 (None: as `make` has set it).
    """
    import torch

    from mpilsgd import Topology, in_process

    def worker() -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
        topology = Topology()
        rank = topology.world.rank
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + rank)
        x = torch.nn.Parameter(torch.tensor(starts[rank], dtype=torch.float64))
        opt = make([x], topology)
        xs, centres, losses = [], [], []

        def record() -> None:
            with opt.center():
                centres.append(x.detach().numpy()[:keep].copy())
            with iterate(opt.optimizer):
                xs.append(x.detach().numpy()[:keep].copy())

        record()
        for t in range(steps):
            if rate is not None:
                opt.param_groups[0]["lr"] = rate(t)
            with torch.no_grad():
                x.grad, loss = gradient(x.detach(), rank, generator)
            losses.append(loss)
            opt.step(loss=loss)
            if (t + 1) % every == 0:
                record()
        return xs, centres, losses

    rows = in_process(worker, len(starts), seed=seed, patience=600)
    xs, centres, losses = zip(*rows, strict=True)
    return Course(np.stack(xs, axis=1), np.stack(centres[0]), np.array(losses).T)


def iterate(optimizer: Any) -> Any:
    """x itself, where the optimizer holds a look-ahead."""
    import contextlib

    return optimizer.iterate() if hasattr(optimizer, "iterate") else contextlib.nullcontext()
