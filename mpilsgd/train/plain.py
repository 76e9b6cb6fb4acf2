"""Values as the files of a run hold them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def first_line(error: Exception) -> str:
    """What torch says of a file takes many lines."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def plain(value: Any) -> Any:
    """The value for strict JSON: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loadable(value: Any) -> Any:
    """The value with Python's numbers for NumPy's, which a loader that runs no code refuses."""
    if isinstance(value, dict):
        return {key: loadable(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(loadable(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value
