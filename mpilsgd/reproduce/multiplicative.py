"""Thesis 5.2, multiplicative noise: Gamma inputs, and momentum SGD on them (Fig. 5.9 to 5.14)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpilsgd import theory
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import Row, number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAMMAS = (0.5, 1.0, 2.0)  # shape and rate: the standard Gaussian's squares, in mini-batches of 1, 2 and 4


def fig_5_9(options: Options) -> Result:
    """The density of the Gamma distribution: a pole at zero for a shape below one, concentration for larger ones."""
    from scipy.stats import gamma

    rng = np.random.default_rng(options.seed)
    squares = rng.standard_normal((4, 200_000)) ** 2
    rows: list[Row] = []
    for shape, p in zip(_GAMMAS, (1, 2, 4), strict=True):
        batch = squares[:p].mean(axis=0)
        rows.append(number(f"variance of a mini-batch of {p}", 1 / shape, float(batch.var()), rel=0.03))
        near = gamma.pdf([1e-6, 1e-3], shape, scale=1 / shape)
        rows.append(
            stated(
                f"pole at zero, lambda = {shape}",
                "yes" if shape < 1 else "no",
                f"density {near[0]:.3g} at 1e-6",
                bool(near[0] > 10 * near[1]) == (shape < 1),
            )
        )

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        x = np.geomspace(1e-3, 20, 400)
        for shape, color in zip(_GAMMAS, drawing.COLORS, strict=False):
            axis.loglog(x, gamma.pdf(x, shape, scale=1 / shape), color=color, label=f"λ = ω = {shape}")
        axis.set_ylim(1e-6, 50)
        axis.set_xlabel("ξ")
        axis.set_ylabel("density")
        axis.legend()

    return Result(rows, draw)


def _msgd_map(options: Options, gamma: float) -> Result:
    points = 100 if options.quick else 300
    lr, delta = np.linspace(0, 1, points + 1)[1:], np.linspace(-1, 1, points + 2)[1:-1]
    radius = theory.spectral_radius(theory.gamma_msgd_moments(lr, delta[:, None], shape=gamma, rate=gamma))
    eta = float(theory.gamma_sgd_best_lr(shape=gamma, rate=gamma))
    at, least = float(theory.gamma_sgd_rate(eta, shape=gamma, rate=gamma)), float(radius.min())
    rows = [
        stated(
            f"least radius of the map, against {at:.4f} at delta = 0 and eta of (5.27)",
            "nearly the same",
            least,
            at <= 1.1 * least,
        ),
        _best_momentum(gamma),
    ]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawing.radius_map(figure, axis, lr, delta, radius)
        drawing.mark(axis, eta, 0.0, f"(5.27): {at:.4f}")
        axis.set_xlabel("learning rate η")
        axis.set_ylabel("momentum δ")

    return Result(rows, draw, f"a grid of {points} x {points} points" if options.quick else "", (7.0, 4.8))


def _best_momentum(gamma: float) -> Row:
    delta = np.linspace(-0.999, 0.999, 4001)
    eta = theory.gamma_sgd_best_lr(shape=gamma, rate=gamma)
    radius = theory.spectral_radius(theory.gamma_msgd_moments(eta, delta, shape=gamma, rate=gamma))
    return number("best momentum at that eta", 0.0, float(delta[radius.argmin()]), within=0.01)


def fig_5_13(options: Options) -> Result:
    """The radius over the momentum at the best learning rate: .6667, .5, .3333 at momentum 0."""
    delta = np.linspace(-0.999, 0.999, 2001)
    curves, rows = {}, []
    for gamma, printed in zip(_GAMMAS, (0.6667, 0.5, 0.3333), strict=True):
        eta = theory.gamma_sgd_best_lr(shape=gamma, rate=gamma)
        curves[gamma] = theory.spectral_radius(theory.gamma_msgd_moments(eta, delta, shape=gamma, rate=gamma))
        rows.append(
            number(
                f"least radius, lambda = omega = {gamma}", printed, float(curves[gamma].min()), within=5e-5
            )
        )
        rows.append(_best_momentum(gamma))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for (gamma, curve), color in zip(curves.items(), drawing.COLORS, strict=False):
            axis.plot(delta, curve, color=color, label=f"λ = ω = {gamma}")
        for printed in (0.6667, 0.5, 0.3333):
            drawing.mark(axis, 0.0, printed, f"{printed}", offset=(8, -11))
        axis.set_ylim(0.2, 1.1)
        axis.set_xlabel("momentum δ")
        axis.set_ylabel("spectral radius")
        axis.legend(loc="lower left")

    return Result(rows, draw)


def fig_5_14(options: Options) -> Result:
    """Over the distribution: with eta = .1, momentum helps where the slope lambda / omega is small."""
    points = 80 if options.quick else 250
    side = np.linspace(0, 100, points + 1)[1:]
    shape, rate = side[:, None], side
    settings = ((1.0, 0.0), (0.1, 0.0), (0.1, 0.9))
    maps = {
        pair: theory.spectral_radius(theory.gamma_msgd_moments(*pair, shape=shape, rate=rate))
        for pair in settings
    }
    helps = maps[0.1, 0.9] < np.minimum(maps[0.1, 0.0], 1)
    slope = np.broadcast_to(shape / rate, helps.shape)
    threshold = float(np.quantile(slope[helps], 0.95))
    inside = float(helps[slope <= threshold].mean())
    rows = [
        stated(
            "where momentum .9 helps at eta = .1",
            "at small slopes lambda / omega",
            f"95 % of it below slope {threshold:.3g}, and it helps at {100 * inside:.0f} % of those",
            threshold < 10 and inside > 0.9,
        )
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (pair, radius) in zip(axes, maps.items(), strict=True):
            drawing.radius_map(figure, axis, side, side, radius, bar=pair == settings[-1])
            axis.set_title(f"η = {pair[0]}, δ = {pair[1]}", loc="left")
            axis.set_xlabel("ω")
        axes[2].contour(side, side, helps.astype(float), levels=[0.5], colors=drawing.PAPER, linewidths=1.2)
        axes[2].annotate("below: momentum helps", (25, 12), color="white", fontsize=9)
        axes[0].set_ylabel("λ")

    return Result(rows, draw, f"a grid of {points} x {points} points" if options.quick else "", (11.0, 4.0))


def _entry(number: str, title: str, run: Callable[[Options], Result]) -> Reproduction:
    return Reproduction(f"thesis-fig5.{number}", f"thesis, Fig. 5.{number}", title, run)


ENTRIES = [
    _entry("9", "Gamma densities", fig_5_9),
    *(
        _entry(str(10 + k), f"momentum SGD, lambda = omega = {gamma:g}", partial(_msgd_map, gamma=gamma))
        for k, gamma in enumerate(_GAMMAS)
    ),
    _entry("13", "momentum SGD at the best learning rate", fig_5_13),
    _entry("14", "momentum SGD over the input's distribution", fig_5_14),
]
