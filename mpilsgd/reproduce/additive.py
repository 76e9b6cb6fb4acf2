"""Thesis 5.1, additive noise: spectral radii of MSGD, EASGD and EAMSGD over their rates."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpilsgd import theory
from mpilsgd.reproduce import drawing
from mpilsgd.reproduce.judge import Row, number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BETA, _DELTA = 0.9, 0.99


def _grid(options: Options) -> tuple[np.ndarray, np.ndarray, str]:
    """eta in (0, 2), the other rate in (-1, 1)."""
    points = 100 if options.quick else 400
    return (
        np.linspace(0, 2, points + 1)[1:],
        np.linspace(-1, 1, points + 2)[1:-1],
        f"a grid of {points} x {points} points" if options.quick else "",
    )


def fig_5_1(options: Options) -> Result:
    """Momentum SGD, (5.6): the best momentum has delta_h = (1 - sqrt(eta_h))^2, the radius is the same."""
    lr, delta, shortened = _grid(options)
    radius = theory.spectral_radius(theory.msgd_moments(lr, delta[:, None]))
    rows: list[Row] = []
    fine = np.linspace(-0.999, 0.999, 2001)
    for eta in (0.1, 0.5, 1.5):
        at = theory.spectral_radius(theory.msgd_moments(eta, fine))
        rows += [
            number(f"least radius at eta = {eta}", (np.sqrt(eta) - 1) ** 2, float(at.min()), within=0.004),
            number(
                "... at the momentum",
                float((np.sqrt(eta) - 1) ** 2 / (1 - eta)),
                float(fine[at.argmin()]),
                within=0.003,
            ),
        ]
    rows.append(
        number(
            "variance as the momentum tends to 1, eta = .5",
            (2 - 0.5) / (4 - 3 * 0.5),
            float(theory.msgd_variance(0.5, 1 - 1e-9)[2]),
            rel=1e-6,
        )
    )
    rows.append(
        number(
            "variance, real MSGD, eta = .5, delta = .6",
            float(theory.msgd_variance(0.5, 0.6)[2]),
            _msgd_variance(0.5, 0.6, options),
            rel=0.03,
        )
    )

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawing.radius_map(figure, axis, lr, delta, radius)
        best = theory.msgd_best_momentum(lr)
        axis.plot(lr, best, color=drawing.PAPER, linestyle="--", linewidth=1.2)
        axis.annotate(
            "the thesis' best momentum", (0.25, 0.42), color=drawing.PAPER, fontsize=9, bbox=drawing.BOX
        )
        axis.set_xlabel("learning rate η")
        axis.set_ylabel("momentum δ")

    return Result(rows, draw, shortened, (7.0, 4.8))


def _msgd_variance(lr: float, momentum: float, options: Options) -> float:
    """Of x in the end, over many values that each have their own noise."""
    import torch

    from mpilsgd import MSGD

    generator = torch.Generator().manual_seed(options.seed)
    x = torch.nn.Parameter(torch.zeros(20_000 if options.quick else 200_000, dtype=torch.float64))
    optimizer = MSGD([x], lr=lr, momentum=momentum)
    for _ in range(100):
        with torch.no_grad():
            x.grad = x.detach() - torch.randn(x.shape, generator=generator, dtype=x.dtype)
        optimizer.step()
    with optimizer.iterate():
        return float(x.detach().var())


def fig_5_2(options: Options) -> Result:
    """The reduced EASGD, (5.12): the best alpha is -(sqrt(beta) - sqrt(eta_h))^2."""
    lr, alpha, shortened = _grid(options)
    radius = theory.spectral_radius(theory.easgd_moments(lr, alpha[:, None], _BETA))
    fine = np.linspace(-0.999, 0.999, 4001)
    rows: list[Row] = []
    for eta in (0.1, 0.5, 1.5):
        at = theory.spectral_radius(theory.easgd_moments(eta, fine, _BETA))
        best = -float((np.sqrt(_BETA) - np.sqrt(eta)) ** 2)
        rows += [
            number(
                f"best alpha of the reduced system, eta = {eta}", best, float(fine[at.argmin()]), within=0.002
            ),
            number("... its radius", float((np.sqrt(_BETA * eta) - 1) ** 2), float(at.min()), within=0.004),
        ]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawing.radius_map(figure, axis, lr, alpha, radius)
        axis.plot(
            lr, -((np.sqrt(_BETA) - np.sqrt(lr)) ** 2), color=drawing.PAPER, linestyle="--", linewidth=1.2
        )
        axis.annotate("(5.17)", (0.13, -0.45), color=drawing.PAPER, fontsize=9, bbox=drawing.BOX)
        axis.set_xlabel("learning rate η")
        axis.set_ylabel("moving rate α")

    return Result(rows, draw, shortened, (7.0, 4.8))


def fig_5_6(options: Options) -> Result:
    """The radius of EASGD's drift, (5.18), over eta and alpha."""
    lr, alpha, shortened = _grid(options)
    radius = theory.easgd_radius(lr, alpha[:, None], _BETA, 2)
    some = (lr[::9], alpha[::9, None])
    others = [theory.spectral_radius(theory.easgd_drift(*some, _BETA, p)) for p in (2, 3, 5)]
    gap = max(float(np.abs(one - others[0]).max()) for one in others[1:])
    rows = [number("largest difference between p = 2, 3, 5", 0.0, gap, within=1e-4)]
    fine = np.linspace(-1, 1, 20_001)
    for eta in (0.5, 0.95, 1.2):
        printed = 0.0 if eta < _BETA else -float((np.sqrt(_BETA) - np.sqrt(eta)) ** 2)
        found = float(fine[theory.easgd_radius(eta, fine, _BETA, 2).argmin()])
        rows.append(
            number(
                f"best alpha at eta = {eta}",
                printed,
                found,
                within=2e-4,
                why="|z_1| dominates at the printed alpha",
            )
        )

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawing.radius_map(figure, axis, lr, alpha, radius)
        printed = np.where(lr < _BETA, 0.0, -((np.sqrt(_BETA) - np.sqrt(lr)) ** 2))
        axis.plot(lr, printed, color=drawing.PAPER, linestyle="--", linewidth=1.2, label="best α, the thesis")
        axis.plot(
            lr, theory.best_moving_rate(lr, _BETA, 2), color="white", linewidth=1.2, label="best α, here"
        )
        legend = axis.legend(loc="upper right")
        legend.set_frame_on(True)
        legend.get_frame().set_facecolor("#888888")
        axis.set_xlabel("learning rate η")
        axis.set_ylabel("moving rate α")

    return Result(rows, draw, shortened, (7.0, 4.8))


def fig_5_8(options: Options) -> Result:
    """EAMSGD's drift, (5.20), at momentum .99: the best alpha rises as eta falls."""
    lr, alpha, shortened = _grid(options)
    radius = theory.spectral_radius(theory.eamsgd_drift(lr, _DELTA, alpha[:, None], _BETA, 2))
    some = (lr[::9], _DELTA, alpha[::9, None], _BETA)
    others = [theory.spectral_radius(theory.eamsgd_drift(*some, p)) for p in (2, 3)]
    fine, etas = np.linspace(-1, 1, 2001), (0.05, 0.1, 0.2, 0.5, 0.9)
    best = [
        float(fine[theory.spectral_radius(theory.eamsgd_drift(eta, _DELTA, fine, _BETA, 2)).argmin()])
        for eta in etas
    ]
    rows = [
        number(
            "largest difference between p = 2 and 3",
            0.0,
            float(np.abs(others[1] - others[0]).max()),
            within=1e-4,
        ),
        stated(
            f"best alpha at eta = {', '.join(map(str, etas))}",
            "rises as eta falls",
            ", ".join(f"{one:.3f}" for one in best),
            all(a >= b for a, b in pairwise(best)),
        ),
        stated("the best alpha can be positive", "yes", f"{max(best):.3f}", max(best) > 0),
    ]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawing.radius_map(figure, axis, lr, alpha, radius)
        axis.plot(etas, best, "o", color="white", markeredgecolor=drawing.INK, label="best α, here")
        axis.legend(loc="lower right", frameon=True)
        axis.set_xlabel("learning rate η")
        axis.set_ylabel("moving rate α")

    return Result(rows, draw, shortened, (7.0, 4.8))


ENTRIES = [
    Reproduction("thesis-fig5.1", "thesis, Fig. 5.1", "spectral radius of momentum SGD", fig_5_1),
    Reproduction("thesis-fig5.2", "thesis, Fig. 5.2", "spectral radius of the reduced EASGD", fig_5_2),
    Reproduction("thesis-fig5.6", "thesis, Fig. 5.6", "spectral radius of EASGD's drift", fig_5_6),
    Reproduction("thesis-fig5.8", "thesis, Fig. 5.8", "spectral radius of EAMSGD's drift", fig_5_8),
]
