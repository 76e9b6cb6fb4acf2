"""Leader SGD's examples: low-rank matrices (Fig. 1), and sin(pi r) / (pi r) in two dimensions (Table 1, Fig. 7).

EAGD and LGD are EASGD and LSGD without noise, of period 1 and in the Jacobi form.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd.colors import METHODS
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import Row, beyond, number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import Course, Make, follow

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_STARTS = np.array([(-6.0, -4.0), (-15.0, -18.0), (20.0, 11.0), (17.0, 8.0)])
_PAPER = {"EAGD": -0.0912, "LGD": -0.2172}


def _eagd(lr: float, center_rate: float) -> Make:
    import torch

    from mpilsgd import EASGD

    return lambda x, topology: EASGD(
        torch.optim.SGD(x, lr=lr), topology, center_rate=center_rate, period=1, init="different"
    )


def _lgd(lr: float, pull: float) -> Make:
    import torch

    from mpilsgd import LSGD

    return lambda x, topology: LSGD(
        torch.optim.SGD(x, lr=lr),
        topology,
        pull=pull,
        global_pull=0.0,
        period=1,
        loss_window=1,
        when="with_step",
        init="different",
    )


def _sinc(x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    r = float(x.norm())
    value = math.sin(math.pi * r) / (math.pi * r)
    return x * ((math.cos(math.pi * r) - value) / r**2), value


def _sinc_courses(options: Options) -> dict[str, Course]:
    makes = {"EAGD": _eagd(0.1, 0.43), "LGD": _lgd(0.1, 0.1)}
    return {name: follow(make, _sinc, _STARTS, 100, seed=options.seed) for name, make in makes.items()}


def _value(x: np.ndarray) -> np.ndarray:
    return np.sinc(np.linalg.norm(x, axis=-1))


def table_1(options: Options) -> Result:
    """The optima after 100 steps: EAGD's centre, LGD's leader."""
    courses = _sinc_courses(options)
    found = {
        "EAGD": float(_value(courses["EAGD"].centre[-1])),
        "LGD": float(_value(courses["LGD"].x[-1]).min()),
    }
    rows = [number(f"L(x*, y*), {name}", _PAPER[name], found[name], within=6e-5) for name in _PAPER]
    return Result(rows, lambda figure: _draw_sinc(figure, courses), "", (11.0, 4.6))


def fig_7(options: Options) -> Result:
    """Where the four workers go, and the objective at each."""
    courses = _sinc_courses(options)
    least = float(_value(np.array([1.4303, 0.0])))
    last = _value(courses["LGD"].x[-1])
    first = int(np.argmax((np.abs(_value(courses["LGD"].x) - least) < 1e-3).all(axis=1)))
    stuck = _value(courses["EAGD"].x[-1])
    rows = [
        stated(
            "LGD's workers at the global optimum, -.2172",
            "close to it",
            f"all four within .001 from step {first} on",
            bool(np.abs(last - least).max() < 1e-3),
        ),
        stated(
            "EAGD's workers",
            "suffer from averaging",
            f"best {stuck.min():.4f}, worst {stuck.max():.4f}",
            bool(stuck.min() > least + 0.05),
        ),
    ]
    return Result(rows, lambda figure: _draw_sinc(figure, courses), "", (11.0, 4.6))


def _draw_sinc(figure: Figure, courses: dict[str, Course]) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
    side = np.linspace(-22, 22, 300)
    for axis, (name, course) in zip((left, middle), courses.items(), strict=True):
        radius = np.hypot(side[:, None], side)
        axis.contour(
            side, side, np.sinc(radius), levels=[-0.05, 0.0, 0.05], colors=drawing.FAINT, linewidths=0.6
        )
        for k in range(4):
            axis.plot(*course.x[:, k].T, color=drawing.COLORS[k], linewidth=1.4)
            axis.plot(*course.x[0, k], "o", color=drawing.COLORS[k], markersize=5)
            axis.plot(*course.x[-1, k], "s", color=drawing.COLORS[k], markersize=5)
        axis.set_title(f"{name} (circle: start, square: end)", loc="left", fontsize=10)
        axis.set_aspect("equal")
    for (name, course), dash in zip(courses.items(), ("--", "-"), strict=True):
        for k in range(4):
            label = name if k == 0 else None
            right.plot(_value(course.x[:, k]), dash, color=drawing.COLORS[k], linewidth=1.2, label=label)
    for name, value in _PAPER.items():
        drawing.paper_line(right, value, f"the paper: {name} {value}")
    right.set_xlabel("step")
    right.set_ylabel("objective of each worker")
    right.legend(loc="upper right")


def fig_1(options: Options) -> Result:
    """Best objective of 8 workers on M = U U', X of 1000 x r: EAGD stalls, LGD goes to zero."""
    lr, pull, p, d = 5e-4, 0.2 * 5e-4, 8, 1000
    ranks, steps, trials = ((1, 10), 160, 1) if options.quick else ((1, 10, 50, 100), 400, 10)
    makes = {
        "EAGD": _eagd(lr, p * pull),
        "LGD": _lgd(lr, pull),
        "uncoupled": _lgd(lr, 0.0),
    }
    best: dict[tuple[str, int], np.ndarray] = {}
    for r in ranks:
        for name, make in makes.items():
            runs = []
            for trial in range(trials):
                rng = np.random.default_rng([options.seed, r, trial])
                u, starts = rng.standard_normal((d, r)), rng.standard_normal((p, d * r))
                course = follow(make, _completion(u), starts, steps, seed=trial, every=steps, keep=1)
                runs.append(course.loss.min(axis=1))
            best[name, r] = np.array(runs)
    rows: list[Row] = []
    for r in ranks:
        last = {name: float(np.median(best[name, r][:, -1])) for name in makes}
        slowing = float(np.median(best["EAGD", r][:, -1] / best["EAGD", r][:, -steps // 4]))
        rows += [
            stated(
                f"r = {r}: EAGD slows down near a minimizer",
                "significantly",
                f"{last['EAGD']:.2g}; the last quarter of the steps brings a factor of {slowing:.2g}",
                last["EAGD"] > 1e-4 and slowing > 0.3,
            ),
            stated(f"r = {r}: LGD does not", "to high accuracy", f"{last['LGD']:.2g}", last["LGD"] < 1e-12),
            beyond(
                f"r = {r}: uncoupled gradient descent",
                f"{last['uncoupled']:.2g}",
                "it does as well as LGD"
                if last["uncoupled"] < 1e3 * max(last["LGD"], 1e-22)
                else "it does worse than LGD",
            ),
        ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
        colors = (METHODS["EASGD"], METHODS["LSGD"], drawing.INK)
        for axis, r in zip(axes, ranks, strict=True):
            for name, color, dash in zip(makes, colors, ("-", "-", ":"), strict=True):
                for k, run in enumerate(best[name, r]):
                    axis.semilogy(run, dash, color=color, linewidth=1.3, label=None if k else name)
            axis.set_title(f"r = {r}", loc="left")
            axis.set_xlabel("step")
        axes[0].set_ylabel("best objective of the 8 workers")
        axes[0].legend(loc="lower left")

    shortened = (
        f"ranks 1 and 10 of 1, 10, 50, 100; {trials} of 10 instances; {steps} steps" if options.quick else ""
    )
    return Result(rows, draw, shortened, (4.4 * len(ranks), 4.2))


def _completion(u: np.ndarray) -> Any:
    """(X X' - M) X and |M - X X'|^2 / 4, M = U U', without d x d matrices.

    The norm is that of R diag(1, -1) R' with (U, X) = Q R: nothing large is squared before it cancels.
    """
    import torch

    target = torch.tensor(u)
    r = u.shape[1]

    def gradient(x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        now = x.view(-1, r)
        slope = now @ (now.T @ now) - target @ (target.T @ now)
        factor = torch.linalg.qr(torch.cat([target, now], dim=1)).R
        gap = factor[:, :r] @ factor[:, :r].T - factor[:, r:] @ factor[:, r:].T
        return slope.flatten(), float((gap * gap).sum()) / 4

    return gradient


ENTRIES = [
    Reproduction("lsgd-fig1", "LSGD, Fig. 1", "low-rank matrices, EAGD and LGD", fig_1),
    Reproduction("lsgd-table1", "LSGD, Table 1", "optima that EAGD and LGD find", table_1),
    Reproduction("lsgd-fig7", "LSGD, Fig. 7", "four workers on sin(pi r) / (pi r)", fig_7),
]
