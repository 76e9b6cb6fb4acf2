"""What arguments may be: each function gives a message that says what is wrong, or None."""

from __future__ import annotations

import math
import numbers
from typing import Any


def number(name: str, value: Any, low: float, high: float = math.inf) -> str | None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= float(value) <= high or math.isinf(value):
        span = f"in [{low:g}, {high:g}]" if high < math.inf else f"of at least {low:g}"
        return f"{name} must be a number {span}, not {value!r}"
    return None


def whole(name: str, value: Any, low: int = 1) -> str | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        return f"{name} must be a whole number of at least {low}, not {value!r}"
    return None


def choice(name: str, value: Any, among: tuple[Any, ...]) -> str | None:
    if not any(type(value) is type(one) and value == one for one in among):
        return f"{name} must be one of {', '.join(map(repr, among))}, not {value!r}"
    return None
