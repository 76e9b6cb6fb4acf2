"""Which period costs least, by how local steps shrink the gradient: Zhang and Li's optimum of the fitted decay."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_SCALES = np.logspace(-6, 3, 109)  # of a power law, in 1 / steps
_BETTER = 0.9  # of the squared errors that a power law must leave, which has a parameter more
_SURE, _MANY = 3.0, 8  # standard errors from which on a slope is taken for one, with so many points


class Decay(NamedTuple):
    """What t local steps leave of |grad f|^2: exp(-rate t), or (1 + scale t)^-rate where scale is not 0.

    rate 0: nothing that goes beyond the noise.
    """

    rate: float
    scale: float = 0.0


def fitted(at: np.ndarray, squares: np.ndarray) -> Decay:
    """The better one of both models, by least squares of log |grad f|^2 against t and against log(1 + a t).

    Arguments: `at`, local steps t (from 0, increasing); `squares`, |grad f|^2 > 0 there; two at least.

    The power law needs four points, an exponent above 1 (as the theory does), and a tenth less of squared errors.
    """
    logs = np.log(squares)
    (rate,), (error,), (spread,) = _lines(at[None], logs)
    found = Decay(rate)
    if len(at) >= 4:
        rates, errors, spreads = _lines(np.log1p(_SCALES[:, None] * at), logs)
        k = int(np.argmin(errors))
        if errors[k] < _BETTER * error and rates[k] > 1.01:
            found, error, spread = Decay(rates[k], float(_SCALES[k])), errors[k], spreads[k]
    if len(at) >= _MANY and found.rate <= _SURE * np.sqrt(error / (len(at) - 2) / spread):
        return Decay(0.0)
    return Decay(max(float(found.rate), 0.0), found.scale)


def _lines(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of y = c - rate x, for each row of x: the rate, the sum of squared errors, that of x about its mean."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean()
    spread = (x * x).sum(1)
    rate = -(x @ y) / spread
    return rate, ((y + rate[:, None] * x) ** 2).sum(1), spread


def best_period(decay: Decay, cost: float, longest: float) -> float:
    """The T of the least (cost + T) / (h(0) + ... + h(T - 1)), a real number from 1 to `longest`.

    cost: of a round, in steps: C_c / C_g, so 1 / r of the theory.
    """
    from mpilsgd.theory import linear_best_period, power_best_period

    if decay.rate * longest < 1e-6:  # the optimum is further than that
        best = longest
    elif decay.scale:
        best = float(power_best_period(1 / cost, decay.scale, decay.rate))
    else:
        best = float(linear_best_period(1 / cost, np.exp(-min(decay.rate, 50.0))))
    return min(max(best, 1.0), max(longest, 1.0))
