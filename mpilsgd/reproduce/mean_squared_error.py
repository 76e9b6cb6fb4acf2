"""Thesis Fig. 3.1: the mean squared error of EASGD's centre on a noisy quadratic, and the real EASGD beside it.

A vector of many values, each with its own noise, is as many independent runs: one run of the method gives the mean
squared error over all of them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd import theory
from mpilsgd.reproduce.judge import number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import follow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORKERS, _STEPS, _SIGMA = (1, 10, 100, 1000, 10_000), (1, 2, 10, 100, np.inf), 10.0


def fig_3_1(options: Options) -> Result:
    """Five by five maps over eta and beta; sigma = 10, everything starts at 1."""
    points = 40 if options.quick else 120
    lr, beta = np.linspace(0, 2, points + 1)[1:], np.linspace(0, 2, points + 1)[1:]
    p = np.array(_WORKERS, float)[:, None, None, None]
    t = np.array(_STEPS)[:, None, None]
    mse = theory.center_mse(t, lr, beta[:, None], p, sigma=_SIGMA)  # workers, steps, beta, eta
    stable = theory.easgd_stable(lr, beta[:, None], p[:, 0])  # workers, beta, eta
    limit = mse[:, -1]

    def fall(few: int, many: int) -> np.ndarray:
        """By how many powers of ten the limit falls from p = _WORKERS[few] to [many], where both are stable."""
        both = stable[few] & stable[many]
        return np.log10(limit[few][both] / limit[many][both])

    falls = [fall(k, k + 1) for k in range(4)]
    spread = [float(np.subtract(*np.quantile(one, (0.9, 0.1)))) for one in falls]
    diverging = ~stable[0]
    low = (lr + beta[:, None])[diverging].min()
    rows = [
        stated(
            "diverges for p = 1 and t = infinity",
            "in the upper right corner",
            f"where eta + beta >= {low:.2f} only",
            bool(diverging[-1, -1] and not diverging[: points // 4, : points // 4].any() and low > 1),
        ),
        number(
            "fall of the limit from p = 1000 to 10000, median",
            10.0,
            float(10 ** np.median(falls[3])),
            rel=0.02,
        ),
        stated(
            "falls from each p to the next are less sensitive to beta and eta for large p",
            "yes",
            "spread (10 to 90 %) " + ", ".join(f"{s:.2g}" for s in spread) + " powers of ten",
            all(a > b for a, b in pairwise(spread)),
        ),
        number(
            "p MSE, p = 10000 against Corollary 3.1.1, eta = beta = .5",
            float(theory.many_workers_mse(0.5, 0.5, sigma=_SIGMA)),
            1e4 * float(theory.center_mse(np.inf, 0.5, 0.5, 10_000, sigma=_SIGMA)),
            rel=1e-3,
        ),
    ]
    values = 20_000 if options.quick else 200_000
    for eta, rate, workers, steps in ((0.1, 0.9, 4, 10), (1.0, 0.5, 4, 10), (0.5, 0.2, 10, 20)):
        rows.append(
            number(
                f"MSE, real EASGD, eta = {eta}, beta = {rate}, p = {workers}, t = {steps}",
                float(theory.center_mse(steps, eta, rate, workers, sigma=_SIGMA)),
                _measured(eta, rate, workers, steps, values, options.seed),
                rel=0.04,
            )
        )

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps

        axes = figure.subplots(5, 5, sharex=True, sharey=True)
        colors = colormaps["turbo"].with_extremes(bad="#5A0010")
        for i, row in enumerate(axes):
            for j, axis in enumerate(row):
                shown = np.ma.masked_where(~stable[i], np.log10(np.maximum(mse[i, j], 1e-30)))
                picture = axis.imshow(
                    shown,
                    cmap=colors,
                    vmin=-3,
                    vmax=3,
                    origin="lower",
                    extent=(0, 2, 0, 2),
                    interpolation="nearest",
                )
                if i == 0:
                    axis.set_title("t = ∞" if np.isinf(_STEPS[j]) else f"t = {_STEPS[j]}", fontsize=10)
                if j == 0:
                    axis.set_ylabel(f"p = {_WORKERS[i]}\nβ")
        for axis in axes[-1]:
            axis.set_xlabel("η")
        bar = figure.colorbar(picture, ax=axes, label="mean squared error of the centre (dark: diverges)")
        bar.set_ticks(range(-3, 4), labels=[f"$10^{{{k}}}$" for k in range(-3, 4)])

    shortened = f"{points} x {points} points a map, {values} samples" if options.quick else ""
    return Result(rows, draw, shortened, (9.5, 8.5))


def _measured(lr: float, center_rate: float, workers: int, steps: int, values: int, seed: int) -> float:
    import torch

    from mpilsgd import EASGD

    def make(x: Any, topology: Any) -> Any:
        return EASGD(torch.optim.SGD(x, lr=lr), topology, center_rate=center_rate, period=1)

    def gradient(x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        return x - _SIGMA * torch.randn(x.shape, generator=generator, dtype=x.dtype), 0.0

    course = follow(make, gradient, np.ones((workers, values)), steps, seed=seed, every=steps)
    return float((course.centre[-1] ** 2).mean())


ENTRIES = [
    Reproduction("thesis-fig3.1", "thesis, Fig. 3.1", "mean squared error of EASGD's centre", fig_3_1),
]
