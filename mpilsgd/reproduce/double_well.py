"""Thesis 5.3 and Fig. 5.20: two EASGD workers in a double well stay apart where the penalty is below 2/3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd import theory
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import follow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LR = 0.1


def fig_5_20(options: Options) -> Result:
    """The least eigenvalue of the Hessian, and where the real EASGD ends from starts in different wells."""
    rho = np.linspace(0, 1, 401)
    split = theory.double_well_split(rho)
    least = np.linalg.eigvalsh(theory.double_well_hessian(rho, split, -split))[:, 0]
    positive = rho[least > 1e-12]
    ends = {r: _ends(r, 300 if options.quick else 1000, options.seed) for r in (0.2, 0.5, 0.6, 0.8)}
    rows = [
        number("positive up to rho", 2 / 3, float(positive.max()), within=0.003),
        number("positive from rho", 0.0, float(positive.min()), within=0.003),
    ]
    for r, (x, y) in ends.items():
        if r < 2 / 3:
            rows.append(
                number(f"|x| of the real EASGD, rho = {r}", float(np.sqrt(1 - r)), abs(x), within=1e-3)
            )
            rows.append(stated("... its workers", "in different wells", f"{x:.4f}, {y:.4f}", x * y < 0))
        else:
            rows.append(
                stated(f"workers of the real EASGD, rho = {r}", "together", f"{x:.4f}, {y:.4f}", x * y > 0)
            )

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(rho, least, color=drawing.COLORS[0])
        left.axhline(0, color=drawing.INK, linewidth=0.8)
        drawing.mark(left, 2 / 3, 0.0, "2/3", offset=(6, 8))
        left.set_xlabel("penalty ρ")
        left.set_ylabel("least eigenvalue of the Hessian")
        right.plot(rho, split, color=drawing.PAPER, linestyle="--", label="the thesis: ±√(1-ρ)")
        right.plot(rho, -split, color=drawing.PAPER, linestyle="--")
        for r, pair in ends.items():
            right.plot([r, r], pair, "o", color=drawing.INK, label="real EASGD" if r == 0.2 else None)
        right.set_xlabel("penalty ρ")
        right.set_ylabel("where the two workers end")
        right.legend(loc="center left")

    return Result(rows, draw, "300 steps in place of 1000" if options.quick else "", (9.5, 4.0))


def _ends(rho: float, steps: int, seed: int) -> tuple[float, float]:
    import torch

    from mpilsgd import EASGD

    def make(x: Any, topology: Any) -> Any:
        alpha = _LR * rho
        return EASGD(
            torch.optim.SGD(x, lr=_LR),
            topology,
            center_rate=2 * alpha,
            moving_rate=alpha,
            period=1,
            init="different",
        )

    starts = np.array([[1.0], [-0.9]])
    course = follow(make, lambda x, rank, g: ((x * x - 1) * x, 0.0), starts, steps, seed=seed, every=steps)
    return float(course.x[-1, 0, 0]), float(course.x[-1, 1, 0])


ENTRIES = [
    Reproduction("thesis-fig5.20", "thesis, Fig. 5.20", "two workers in a double well", fig_5_20),
]
