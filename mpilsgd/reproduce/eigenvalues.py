"""Thesis Fig. 5.4 and 5.5: the three eigenvalues of EASGD's drift over alpha, and the alpha with the least radius."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpilsgd import theory
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import number
from mpilsgd.reproduce.registry import Options, Reproduction, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BETA = 0.9


def _eigenvalues(alpha: np.ndarray, eta: float) -> list[np.ndarray]:
    """|z_1|, |z_2|, |z_3| of (5.19)."""
    b, c = (2 - _BETA - eta - alpha) / 2, (1 - eta) * (1 - _BETA) - alpha
    root = np.sqrt((b * b - c).astype(complex))
    return [np.abs(1 - alpha - eta), np.abs(b - root), np.abs(b + root)]


def _fig_of_eigenvalues(eta: float, printed: float, why: str) -> Result:
    alpha = np.linspace(-1, 1, 20_001)
    z = _eigenvalues(alpha, eta)
    worst = np.max(z, axis=0)
    drift = theory.spectral_radius(theory.easgd_drift(eta, alpha[::500], _BETA, 2))
    at = float(np.max([one[np.abs(alpha - printed).argmin()] for one in z]))
    best = float(theory.best_moving_rate(eta, _BETA, 2))
    rows = [
        number(
            "the three are all eigenvalues of (5.18)",
            0.0,
            float(np.abs(drift - worst[::500]).max()),
            within=1e-6,
        ),
        number("best alpha", printed, float(alpha[worst.argmin()]), within=2e-4, why=why),
        number("least radius", at, float(worst.min()), within=2e-4, why=why),
    ]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for k, (one, dash) in enumerate(zip(z, ("-", "--", ":"), strict=True)):
            axis.plot(alpha, one, dash, color=drawing.COLORS[k], label=f"$|z_{k + 1}|$")
        axis.plot([best], [worst.min()], "o", color=drawing.INK, zorder=6, label="least radius, found here")
        drawing.mark(axis, printed, at, f"the thesis: α = {printed:.4g}", offset=(10, 12))
        axis.axhline(1, color=drawing.INK, linewidth=0.8)
        axis.set_xlabel("moving rate α")
        axis.set_ylabel(f"absolute value, η = {eta}, β = {_BETA}")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return Result(rows, draw, "", (7.6, 4.4))


def fig_5_4(options: Options) -> Result:
    """beta > eta_h: the best alpha is 0."""
    return _fig_of_eigenvalues(0.1, 0.0, "")


def fig_5_5(options: Options) -> Result:
    """beta < eta_h: the thesis takes (5.17), which fails once sqrt(beta eta_h) > (2 + beta) / 3."""
    return _fig_of_eigenvalues(
        1.5, -float((np.sqrt(_BETA) - np.sqrt(1.5)) ** 2), "|z_1| dominates at the printed alpha (erratum)"
    )


ENTRIES = [
    Reproduction("thesis-fig5.4", "thesis, Fig. 5.4", "EASGD's eigenvalues, eta = .1", fig_5_4),
    Reproduction("thesis-fig5.5", "thesis, Fig. 5.5", "EASGD's eigenvalues, eta = 1.5", fig_5_5),
]
