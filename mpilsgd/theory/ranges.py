"""What every formula needs: numbers as arrays, the check of a range, stacked matrices and their radius."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


def floats(*values: ArrayLike) -> list[Array]:
    """The values as float64 arrays; a formula on them broadcasts."""
    return [np.asarray(value, dtype=np.float64) for value in values]


def need(condition: str, holds: ArrayLike, **values: ArrayLike) -> None:
    """Raise a ValueError that names the range and the first values outside it; NaN is outside every range."""
    inside = np.asarray(holds)
    if inside.all():
        return
    first = np.unravel_index(int(np.argmin(inside)), inside.shape)
    shown = ", ".join(
        f"{name} = {float(np.broadcast_to(np.asarray(value, float), inside.shape)[first]):g}"
        for name, value in values.items()
    )
    raise ValueError(f"needs {condition}, not {shown}")


def whole_workers(workers: int) -> int:
    """A number of workers that sets the size of a matrix: one int, not an array."""
    if isinstance(workers, bool) or not isinstance(workers, int | np.integer) or workers < 1:
        raise ValueError(f"needs workers, one whole number >= 1, not {workers!r}")
    return int(workers)


def stacked(rows: list[list[ArrayLike]]) -> Array:
    """Matrices in the last two axes, from entries that broadcast."""
    entries = np.broadcast_arrays(*floats(*(entry for row in rows for entry in row)))
    return np.stack(entries, axis=-1).reshape(*entries[0].shape, len(rows), len(rows[0]))


def spectral_radius(matrices: ArrayLike) -> Array:
    """The largest absolute eigenvalue of each matrix in the last two axes.

    A linear update is stable where it is below 1. Lemma 3.1.4 and section 3.3 of the thesis write it ||M||_2; the
    spectral radius is meant.

    ValueError: no square matrices in the last two axes.
    """
    (m,) = floats(matrices)
    need("square matrices in the last two axes", m.ndim >= 2 and m.shape[-1] == m.shape[-2], axes=m.ndim)
    return np.abs(np.linalg.eigvals(m)).max(axis=-1)


def roots_of_quadratic(b: ArrayLike, c: ArrayLike) -> Array:
    """The two roots of z^2 - 2 b z + c, complex, in a new last axis."""
    b, c = floats(b, c)
    root = np.sqrt((b * b - c).astype(np.complex128))
    return np.stack([b - root, b + root], axis=-1)
