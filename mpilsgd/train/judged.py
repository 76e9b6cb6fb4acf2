"""By which figure runs are judged and drawn, as what they have measured allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """What is drawn and told of an evaluation: its key in metrics.jsonl, its name, and what it is multiplied by."""

    key: str
    name: str
    unit: str = ""
    scale: float = 1.0

    @property
    def label(self) -> str:
        return self.name + (f" [{self.unit}]" if self.unit else "")

    def text(self, value: Any) -> str:
        """A value of it for a reader; "-" where there is none."""
        if not is_finite(value):
            return "-"
        return f"{self.scale * value:.2f} %" if self.unit == "%" else f"{value:.4g}"


ERROR = Figure("test_error", "test error", "%", 100.0)
LOSS = Figure("test_loss", "test loss")
TRAIN = Figure("train_loss", "training loss")


def figure_of(lines: Iterable[Mapping[str, Any]]) -> Figure:
    """By which runs are judged, the least is the best: the test error, or the test loss where one knows no error.

    lines: of metrics.jsonl, or summaries.
    """
    found = list(lines)
    errors, losses = (any(line.get(key) is not None for line in found) for key in (ERROR.key, LOSS.key))
    return LOSS if losses and not errors else ERROR


def more_of(lines: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """The further metrics of an evaluation, which are the user's own: test_NAME."""
    keys = dict.fromkeys(key for line in lines for key in line if str(key).startswith("test_"))
    return [Figure(key, key.replace("_", " ")) for key in keys if key not in (ERROR.key, LOSS.key)]


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
