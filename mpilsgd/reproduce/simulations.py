"""Thesis Fig. 5.3 and 5.7: EASGD with alpha = beta/p and with the alpha of (5.17), three runs of the real method each.

Three of many values that each have their own noise are drawn; means are taken over all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd import theory
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import Course, follow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BETA, _P, _SIGMA = 0.9, 4, 1e-2


def _run(lr: float, alpha: float, steps: int, values: int, seed: int) -> Course:
    import torch

    from mpilsgd import EASGD

    def make(x: Any, topology: Any) -> Any:
        return EASGD(torch.optim.SGD(x, lr=lr), topology, center_rate=_BETA, moving_rate=alpha, period=1)

    def gradient(x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        return x - _SIGMA * torch.randn(x.shape, generator=generator, dtype=x.dtype), 0.0

    return follow(make, gradient, np.ones((_P, values)), steps, seed=seed)


def _draw(figure: Figure, courses: dict[str, Course], title: str) -> None:
    axes = figure.subplots(1, len(courses), sharey=True)
    for axis, (name, course) in zip(axes, courses.items(), strict=True):
        for k in range(3):
            axis.semilogy(np.maximum(course.centre[:, k] ** 2, 1e-16), linewidth=1, color=drawing.COLORS[k])
        axis.set_title(name, loc="left")
        axis.set_xlabel("time step t")
    axes[0].set_ylabel(f"squared distance of the centre\n{title}")


def fig_5_3(options: Options) -> Result:
    """eta = .1 < beta: (5.17) makes the workers diverge."""
    lr, steps = 0.1, 200
    printed = -float((np.sqrt(_BETA) - np.sqrt(lr)) ** 2)
    elastic = _run(lr, _BETA / _P, steps, 100, options.seed)
    optimal = _run(lr, printed, steps, 100, options.seed)
    apart = optimal.x.std(axis=1).mean(axis=1)
    growth = float((apart[100] / apart[50]) ** (1 / 50))
    square = (optimal.centre**2).mean(axis=1)
    calm = float((optimal.centre[60:100] ** 2).mean())
    floor = float(theory.easgd_variance(lr, printed, _BETA, _P, sigma=_SIGMA)[2])
    eigen = np.linalg.eig(theory.easgd_drift(lr, printed, _BETA, _P))
    unstable = np.abs(eigen.eigenvalues) > 1
    seen = float(np.abs(eigen.eigenvectors[-1, unstable]).max())
    rows = [
        number(
            "growth a step of what workers differ by, (5.17)",
            float(theory.spectral_radius(theory.easgd_drift(lr, printed, _BETA, _P))),
            growth,
            rel=1e-2,
        ),
        stated(
            "the centre with (5.17)", "unstable", f"x~^2 = {square[-1]:.2g} at step {steps}", square[-1] > 1
        ),
        stated(
            "the centre's part in the unstable directions",
            "not 0",
            f"{seen:.1g}",
            seen > 1e-9,
            why="they are (v, 0) with sum v = 0: in exact arithmetic only the workers diverge, the centre's blow-up is "
            "rounding",
        ),
        number("mean x~^2 in steps 60 to 99, as of a stable centre", floor, calm, rel=0.1),
        stated(
            "the centre with alpha = beta/p",
            "stable",
            float((elastic.centre[-1] ** 2).mean()),
            bool((elastic.centre[-1] ** 2).mean() < 1e-3),
        ),
    ]
    courses = {"α = β/p": elastic, f"α = {printed:.3g}, (5.17)": optimal}
    return Result(rows, lambda figure: _draw(figure, courses, "η = 0.1, β = 0.9, p = 4"), "", (9.0, 4.0))


def fig_5_7(options: Options) -> Result:
    """eta = 1.5 > beta: (5.17) is stable and faster, and not yet the best."""
    lr, steps, values = 1.5, 120, 4000 if options.quick else 40_000
    printed = -float((np.sqrt(_BETA) - np.sqrt(lr)) ** 2)
    best = float(theory.best_moving_rate(lr, _BETA, _P))
    alphas = {
        "α = β/p": _BETA / _P,
        f"α = {printed:.3g}, (5.17)": printed,
        f"α = {best:.3g}, best here": best,
    }
    courses = {name: _run(lr, alpha, steps, values, options.seed) for name, alpha in alphas.items()}
    rows = []
    reached = []
    for name, alpha in alphas.items():
        square = (courses[name].centre ** 2).mean(axis=1)
        floor = float(theory.easgd_variance(lr, alpha, _BETA, _P, sigma=_SIGMA)[2])
        rows.append(number(f"mean x~^2 in the end, {name}", floor, float(square[90:].mean()), rel=0.05))
        reached.append(int(np.argmax(square < 2 * floor)))
    rows.append(
        stated(
            "steps to twice that, beta/p and (5.17)",
            "fewer with (5.17)",
            f"{reached[0]} and {reached[1]}",
            reached[1] < reached[0],
        )
    )
    radii = [float(theory.easgd_radius(lr, alpha, _BETA, _P)) for alpha in alphas.values()]
    rows.append(
        stated(
            "(5.17) is the best alpha",
            "yes",
            f"radii {radii[0]:.4f}, {radii[1]:.4f}, best {radii[2]:.4f}",
            radii[1] <= radii[2] + 1e-9,
            why="the workers' differences, |z_1|, dominate there (erratum)",
        )
    )
    shortened = f"means over {values} runs" if options.quick else ""
    return Result(
        rows, lambda figure: _draw(figure, courses, "η = 1.5, β = 0.9, p = 4"), shortened, (11.0, 4.0)
    )


ENTRIES = [
    Reproduction("thesis-fig5.3", "thesis, Fig. 5.3", "EASGD with the alpha of (5.17), eta = .1", fig_5_3),
    Reproduction("thesis-fig5.7", "thesis, Fig. 5.7", "EASGD with the alpha of (5.17), eta = 1.5", fig_5_7),
]
