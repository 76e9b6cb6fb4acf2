"""Thesis 5.2.3, multiplicative noise: EASGD on Gamma inputs, over workers and over alpha (Fig. 5.15 to 5.19)."""

from __future__ import annotations

from functools import partial
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

_BETA = 0.9


def _easgd_map(options: Options, case: tuple[float, float, int, float, float, float | None]) -> Result:
    """Fig. 5.15 to 5.18: over eta and the number of workers, alpha = beta / p."""
    gamma, radius, p, eta, most, momentum = case
    points = 1001
    lr, workers = np.linspace(0, most, points)[1:, None], np.arange(1, 65)
    values = theory.spectral_radius(
        theory.gamma_easgd_moments(lr, None, _BETA, workers, shape=gamma, rate=gamma)
    )
    i, j = np.unravel_index(values.argmin(), values.shape)
    rows = [
        number("least spectral radius", radius, float(values[i, j]), within=6e-5),
        number("... at p", p, float(workers[j]), within=0),
        number("... at eta", eta, float(lr[i, 0]), within=most / (points - 1)),
    ]
    if momentum is not None:
        rows.append(
            stated(
                "against momentum SGD's best",
                f"below {momentum}",
                float(values[i, j]),
                values[i, j] < momentum,
            )
        )
    edge = float(lr[np.argmax(values[:, -1] >= 1), 0])
    limit = 2 * gamma / (gamma + 1)
    if limit < most:
        rows.append(number("stable up to eta, p = 64, against p to infinity", limit, edge, rel=0.05))
    steps = 4
    matrix = theory.gamma_easgd_moments(eta, None, _BETA, p, shape=gamma, rate=gamma)
    expected = float((np.linalg.matrix_power(matrix, steps) @ np.ones(4))[0])
    rows.append(
        number(
            f"E x~^2 after {steps} steps from 1, the real EASGD there",
            expected,
            _measured(eta, p, gamma, steps, options),
            rel=0.05,
        )
    )

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawing.radius_map(figure, axis, workers, lr[:, 0], values)
        drawing.mark(axis, p, eta, f"{radius} at p = {p}, η = {eta}")
        axis.set_xlabel("workers p")
        axis.set_ylabel("learning rate η")

    shortened = "the real EASGD on 40000 samples" if options.quick else ""
    return Result(rows, draw, shortened, (7.0, 4.8))


def _measured(eta: float, p: int, gamma: float, steps: int, options: Options) -> float:
    import torch

    from mpilsgd import EASGD

    values = 40_000 if options.quick else 400_000

    def make(x: Any, topology: Any) -> Any:
        return EASGD(torch.optim.SGD(x, lr=eta), topology, center_rate=_BETA, period=1)

    generators = [np.random.default_rng([options.seed, rank]) for rank in range(p)]

    def gradient(x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        return x * torch.from_numpy(generators[rank].gamma(gamma, 1 / gamma, len(x))), 0.0

    course = follow(make, gradient, np.ones((p, values)), steps, seed=options.seed, every=steps)
    return float((course.centre[-1] ** 2).mean())


def fig_5_19(options: Options) -> Result:
    """Over eta and alpha, p = 100: a positive alpha is best, and widens the range of stable eta."""
    points = 400 if options.quick else 1200
    lr, alpha = np.linspace(0, 1, points + 1)[1:], np.linspace(-1, 1, points + 2)[1:-1]
    values = theory.spectral_radius(theory.gamma_easgd_moments(lr, alpha[:, None], _BETA, 100))
    i, j = np.unravel_index(values.argmin(), values.shape)
    fine, eta = np.linspace(0.2, 0.4, 81), np.linspace(0.69, 0.72, 1501)
    stable = theory.spectral_radius(theory.gamma_easgd_moments(eta, fine[:, None], _BETA, 100)) < 1
    widest = np.where(stable, eta, 0.0).max(axis=1)
    there = float(np.interp(1 - np.sqrt(0.5), fine, widest))
    rows = [
        number("least spectral radius", 0.5024, float(values[i, j]), within=2e-4),
        number("... at eta", 0.4343, float(lr[j]), within=0.004),
        number("... at alpha", 0.2525, float(alpha[i]), within=0.006),
        number(
            "alpha with the widest range of eta", 1 - np.sqrt(0.5), float(fine[widest.argmax()]), within=0.03
        ),
        number("its end at alpha = 1 - sqrt(.5), p = 100 against infinity", np.sqrt(0.5), there, rel=0.01),
        number("... against the widest at p = 100", float(widest.max()), there, rel=2e-3),
    ]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        drawing.radius_map(figure, axis, lr, alpha, values)
        drawing.mark(axis, 0.4343, 0.2525, "0.5024")
        drawing.mark(axis, float(np.sqrt(0.5)), float(1 - np.sqrt(0.5)), "widest range")
        axis.set_xlabel("learning rate η")
        axis.set_ylabel("moving rate α")

    return Result(rows, draw, f"a grid of {points} x {points} points" if options.quick else "", (7.0, 4.8))


_LEAST = {  # figure: lambda = omega, the least radius, at p, at eta, of eta in (0, most), momentum SGD's
    "15": (0.5, 0.5742, 6, 0.3814, 1.0, 0.6667),
    "16": (1.0, 0.4317, 7, 0.5225, 1.0, 0.5),
    "17": (2.0, 0.2945, 9, 0.6647, 1.0, 0.3333),
    "18": (10.0, 0.0868, 29, 0.8929, 2.0, None),
}
ENTRIES = [
    *(
        Reproduction(
            f"thesis-fig5.{figure}",
            f"thesis, Fig. 5.{figure}",
            f"EASGD, lambda = omega = {case[0]:g}",
            partial(_easgd_map, case=case),
        )
        for figure, case in _LEAST.items()
    ),
    Reproduction("thesis-fig5.19", "thesis, Fig. 5.19", "EASGD over alpha, p = 100", fig_5_19),
]
