"""Stich's linear speed-up: the error of local SGD falls as 1/K with the workers K, whatever the period.

f is the sum over many values of mu x^2 / 2 + (1 - mu) log cosh x, with curvatures from mu to 1, and noise in every
value; the step sizes and the mean over time are the theorem's. (On a quadratic the period would change nothing at all:
the workers' mean is that of mini-batch SGD.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd import theory
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import follow

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_MU, _VALUES, _START = 0.2, 2000, 0.02


def speed_up(options: Options) -> Result:
    """f(x^) - f* after T steps with 1, 2, 4, 8 workers, H = 1 and 16."""
    steps, workers = (320, (1, 2, 4, 8)) if options.quick else (2000, (1, 2, 4, 8, 16))
    shift = float(theory.local_sgd_shift(16, convexity=_MU, smoothness=1.0))
    errors = {
        (k, period): _error(k, period, steps, shift, options.seed)
        for k in workers
        for period in (1, 16)
        if k > 1 or period == 16
    }
    of_16 = [errors[k, 16] for k in workers]
    slope = float(np.polyfit(np.log(workers), np.log(of_16), 1)[0])
    most = workers[-1]
    rows = [
        number("slope of log error over log K, H = 16", -1.0, slope, within=0.1),
        number(f"speed-up, {most} workers, H = 16", float(most), of_16[0] / of_16[-1], rel=0.15),
        number(
            f"error with H = 16 over that with H = 1, {most} workers",
            1.0,
            errors[most, 16] / errors[most, 1],
            within=0.1,
        ),
    ]
    bounds = []
    for k in workers:
        distance = _START * np.sqrt(_VALUES)
        parts = theory.local_sgd_bound(
            steps,
            k,
            16,
            convexity=_MU,
            smoothness=1.0,
            distance=distance,
            sigma=np.sqrt(_VALUES),
            gradient=np.sqrt(2 * _VALUES),
        )
        bounds.append(float(sum(parts)))
    rows.append(
        stated(
            "error below the bound of Theorem 2.2, every K",
            "yes",
            f"at most {max(e / b for e, b in zip(of_16, bounds, strict=True)):.2g} of it",
            all(e < b for e, b in zip(of_16, bounds, strict=True)),
        )
    )

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.loglog(workers, of_16, "o-", color=drawing.COLORS[0], label="H = 16")
        axis.loglog(
            workers[1:], [errors[k, 1] for k in workers[1:]], "s:", color=drawing.COLORS[1], label="H = 1"
        )
        axis.loglog(
            workers, of_16[0] / np.array(workers), "--", color=drawing.PAPER, label="linear speed-up, 1/K"
        )
        axis.set_xticks(workers, [str(k) for k in workers], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("workers K")
        axis.set_ylabel(f"f(x̂) - f* after {steps} steps")
        axis.legend()

    shortened = f"{steps} steps in place of 2000, up to {most} workers" if options.quick else ""
    return Result(rows, draw, shortened, (6.6, 4.4))


def _error(k: int, period: int, steps: int, shift: float, seed: int) -> float:
    import torch

    from mpilsgd import LocalSGD

    def make(x: Any, topology: Any) -> Any:
        optimizer = torch.optim.SGD(x, lr=1.0)
        return LocalSGD(optimizer, topology, period=period, average="quadratic", a=shift)

    def gradient(x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        slope = _MU * x + (1 - _MU) * torch.tanh(x)
        return slope + torch.randn(x.shape, generator=generator, dtype=x.dtype), 0.0

    course = follow(
        make,
        gradient,
        np.full((k, _VALUES), _START),
        steps,
        seed=seed,
        every=steps,
        rate=lambda t: float(theory.local_sgd_lr(t, shift, convexity=_MU)),
    )
    x = course.centre[-1]
    return float((_MU * x**2 / 2 + (1 - _MU) * np.log(np.cosh(x))).sum())


ENTRIES = [
    Reproduction("stich-speed-up", "Stich, Theorem 2.2", "local SGD's linear speed-up", speed_up),
]
