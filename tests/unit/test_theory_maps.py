"""Maps of the theory against maps that simulation draws: dimensions of a quadratic are points of the map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mpilsgd import theory
from mpilsgd.simulation import Quadratic, many

P, LR = 4, 0.1
COPIES = 60_000  # dimensions of each point, whose values are independent
APART, LOOKS, START = 15, 10, 60  # steps between two looks, and before the first


def moments(curvatures: np.ndarray, method: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean squares of the workers' mean and the centre, under noise of deviation 1 for each worker."""
    repeated = np.repeat(curvatures, COPIES)

    def squares(t: int, x: torch.Tensor, centre: torch.Tensor) -> tuple[Any, Any]:
        return x.mean(0).square(), centre.square()

    crowd = many(
        method,
        Quadratic(torch.from_numpy(repeated), noise=1.0),
        P,
        START + APART * LOOKS,
        lr=LR,
        start=torch.zeros(len(repeated)),
        watch=squares,
        every=APART,
        **options,
    )
    looks = crowd.seen[START // APART :]
    means = [torch.stack([look[k] for look in looks]).mean(0).view(-1, COPIES).mean(1) for k in (0, 1)]
    return means[0].numpy(), means[1].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("center_rate", [0.3, 1.2])
def test_variances_of_easgd(center_rate: float) -> None:
    """Thesis (3.3) for beta = p alpha, and (5.13)."""
    curvatures = np.array([2.0, 4.0, 10.0])
    mean, centre = moments(curvatures, "EASGD", center_rate=center_rate, period=1)
    told = theory.center_variance(np.inf, LR, center_rate, P, curvatures)
    assert centre == pytest.approx(told, rel=0.01)
    square, _, of_centre = theory.easgd_variance(LR, center_rate / P, center_rate, P, curvatures)
    assert mean == pytest.approx(square, rel=0.01)
    assert centre == pytest.approx(of_centre, rel=0.01)


@pytest.mark.slow
def test_variances_of_easgd_with_a_moving_rate_of_its_own() -> None:
    curvatures = np.array([2.0, 4.0, 10.0])
    mean, centre = moments(curvatures, "EASGD", center_rate=0.6, moving_rate=0.4, period=1)
    square, _, of_centre = theory.easgd_variance(LR, 0.4, 0.6, P, curvatures)
    assert mean == pytest.approx(square, rel=0.01)
    assert centre == pytest.approx(of_centre, rel=0.01)


@pytest.mark.slow
def test_variance_of_sgd() -> None:
    curvatures = np.array([2.0, 4.0, 10.0])
    _, centre = moments(curvatures, "AllreduceSGD")
    assert centre == pytest.approx(theory.sgd_variance(LR, curvatures) / P, rel=0.01)


# Without noise the slowest mode is left after some steps, and shrinks by the spectral radius

CURVATURES = np.linspace(0.5, 21, 50)
STEPS = 300


def radii(method: str = "EASGD", momentum: float = 0.0, **options: Any) -> np.ndarray:
    """By which the whole state shrinks in a step, a dimension each; workers begin apart."""
    sizes: list[torch.Tensor] = []

    def note(t: int, x: torch.Tensor, centre: torch.Tensor) -> None:
        sizes.append(torch.cat([x, centre[None]]).square().sum(0).log() / 2)

    rows = torch.linspace(-1, 1, P, dtype=torch.float64)[:, None] + 0.3
    objective = Quadratic(torch.from_numpy(CURVATURES))
    start = rows.expand(P, len(CURVATURES))
    many(method, objective, P, STEPS, lr=LR, momentum=momentum, start=start, watch=note, **options)
    k = 2 * STEPS // 3  # complex modes turn: over many steps their mean counts
    return ((sizes[-1] - sizes[-1 - k]) / k).exp().numpy()


@pytest.mark.parametrize("moving_rate", [0.1, 0.225, 0.8])
@pytest.mark.parametrize("center_rate", [0.5, 0.9])
def test_radii_of_easgd(moving_rate: float, center_rate: float) -> None:
    """Thesis (5.18): stable and unstable points."""
    told = theory.spectral_radius(theory.easgd_drift(LR, moving_rate, center_rate, P, CURVATURES))
    found = radii(moving_rate=moving_rate, center_rate=center_rate, period=1)
    assert found == pytest.approx(told, rel=0.01)
    assert told.min() < 1 < told.max()


def test_radii_of_gauss_seidel() -> None:
    """Thesis (6.5), with the differences between the workers."""
    a, b, eta = 0.3, 0.9, LR * CURVATURES
    reduced = theory.spectral_radius(theory.gauss_seidel_drift(eta, a, b))
    told = np.maximum(reduced, np.abs((1 - eta) * (1 - a)))
    found = radii(moving_rate=a, center_rate=b, period=1, form="gauss-seidel")
    lasts = told > 0.4  # the rest is 0 after so many steps
    assert lasts.sum() >= 30 and found[lasts] == pytest.approx(told[lasts], rel=0.01)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_radii_of_eamsgd(momentum: float) -> None:
    """Thesis (5.20)."""
    told = theory.spectral_radius(theory.eamsgd_drift(LR, momentum, 0.225, 0.9, P, CURVATURES))
    found = radii(momentum=momentum, moving_rate=0.225, center_rate=0.9, period=1)
    lasts = told > 0.4
    assert lasts.sum() >= 30 and found[lasts] == pytest.approx(told[lasts], rel=0.01)
