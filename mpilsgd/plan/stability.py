"""What theory says against a method's rates: on a quadratic of the largest curvature they would diverge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpilsgd import theory
from mpilsgd.exchange import Method
from mpilsgd.methods import ADMM, EASGD, LSGD, Downpour, EASGDTree

_MANY = 32  # workers whose round of turns is multiplied out


def problems(
    method: type[Method],
    settings: Mapping[str, Any],
    workers: int,
    lr_curvature: float,
    momentum: float = 0.0,
) -> list[str]:
    """What is wrong, in words; nothing where all is well or nothing is known.

    Args:
        method, settings: those that are planned; what is not set has its default.
        workers: p >= 1. lr_curvature: eta h > 0, learning rate times the largest curvature. momentum: of each worker.
    """
    eta = lr_curvature
    if not theory.msgd_stable(eta, momentum, nesterov=False):
        edge = 2 * (1 + momentum)
        return [f"a worker alone diverges: lr times curvature is {eta:g} and must be below {edge:g}"]
    if method is EASGD:
        return _elastic(settings, workers, eta)
    if method is Downpour and workers > 1 and not eta < 2 / workers:
        return [
            f"DOWNPOUR adds up the steps of {workers} workers (alpha=1, beta={workers}; so large a beta is stable near "
            f"this alpha alone): lr times curvature must be below 2/{workers} = {2 / workers:g}, not {eta:g}"
        ]
    if method is ADMM and workers <= _MANY:
        radius = float(
            theory.spectral_radius(theory.round_robin_admm(eta, settings.get("rho", 1.0), workers))
        )
        if radius > 1 + 1e-12:
            return [f"ADMM in turns grows by {radius:.7g} a round with rho={settings.get('rho', 1.0):g}"]
    if method is LSGD:
        rate = settings.get("pull", 0.1)
        if not eta + rate < 2:
            return [f"lr times curvature plus pull is {eta + rate:g}, and must be below 2"]
    if method is EASGDTree and (rate := settings.get("moving_rate")) is not None:
        children = settings.get("degree", 16) + 1
        if not rate * children < 2:
            return [
                f"a tree node with {children} neighbours moves by {rate:g} to each: together less than 2 is stable"
            ]
    return []


def _elastic(settings: Mapping[str, Any], workers: int, eta: float) -> list[str]:
    beta = settings.get("center_rate", 0.9)
    alpha = settings.get("moving_rate")
    alpha = beta / workers if alpha is None else alpha
    rates = f"moving_rate={alpha:g} and center_rate={beta:g} at lr times curvature {eta:g}"
    if settings.get("asynchronous"):
        edge = float(theory.round_robin_easgd_edge(min(eta, 2.0)))
        if alpha > edge:
            return [f"workers in turn are known to be stable up to moving_rate={edge:.4g}, not at {alpha:g}"]
        return []
    if settings.get("form") == "gauss-seidel":
        if theory.gauss_seidel_stable(eta, alpha, beta, workers):
            return []
        low, high = (float(end) for end in theory.gauss_seidel_moving_rates(eta, beta, workers))
        where = f"stable from {low:.4g} to {high:.4g}" if low < high else "no moving_rate is stable there"
        return [f"the Gauss-Seidel form diverges with {rates}: {where}"]
    radius = float(theory.easgd_radius(eta, alpha, beta, workers))
    if radius > 1 + 1e-12:
        return [f"the Jacobi form diverges with {rates}: what is off grows by {radius:.4g} a round"]
    return []
