"""Two EASGD workers in a double well: when the penalty is too weak to bring them together.

    (1 - x^2)^2 / 4 + (1 - y^2)^2 / 4 + rho / 2 (x - z)^2 + rho / 2 (y - z)^2

z is the centre, rho `rho` the penalty. Source: thesis 5.3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mpilsgd.theory.ranges import Array, floats, need, stacked


def double_well_hessian(rho: ArrayLike, x: ArrayLike, y: ArrayLike) -> Array:
    """The Hessian of the objective in (x, y, z).

            | 3 x^2 - 1 + rho   0                 -rho  |
        H = | 0                 3 y^2 - 1 + rho   -rho  |
            | -rho              -rho              2 rho |

    Arguments (they broadcast): `rho`, `x`, `y` any.

    Source: thesis (5.38). At 0 each f has a local maximum, not a saddle point as the text says.
    """
    rho, x, y = floats(rho, x, y)
    return stacked(
        [
            [3 * x * x - 1 + rho, 0.0, -rho],
            [0.0, 3 * y * y - 1 + rho, -rho],
            [-rho, -rho, 2 * rho],
        ]
    )


def double_well_split(rho: ArrayLike) -> Array:
    """The place x = -y of the critical point with the workers in different wells and the centre at 0.

        x = sqrt(1 - rho)

    Arguments: `rho` in [0, 1]. ValueError: outside it. Source: thesis 5.3, after (5.37).
    """
    (rho,) = floats(rho)
    need("0 <= rho <= 1", (rho >= 0) & (rho <= 1), rho=rho)
    return np.sqrt(1 - rho)


def double_well_least_eigenvalue(rho: ArrayLike) -> Array:
    """The least eigenvalue of the Hessian at the split point: above 0 the workers stay in different wells.

        1 - sqrt(1 - 4 rho + 6 rho^2), positive for 0 < rho < 2/3

    Arguments: `rho` in [0, 1]. ValueError: outside it. Source: thesis 5.3 and Fig. 5.20; the closed form is ours.
    """
    (rho,) = floats(rho)
    need("0 <= rho <= 1", (rho >= 0) & (rho <= 1), rho=rho)
    return 1 - np.sqrt(1 - 4 * rho + 6 * rho**2)
