"""The reproductions by name, and what one gives: rows of numbers and a picture."""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpilsgd.reproduce.judge import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# a file a theme; each has a list ENTRIES
_THEMES = (
    "round_robin",
    "mean_squared_error",
    "additive",
    "eigenvalues",
    "simulations",
    "multiplicative",
    "multiplicative_easgd",
    "double_well",
    "leader",
    "periods",
    "averaging",
    "speed_up",
    "cancer",
    "intersection",
    "lenet",
    "deep_leader",
    "deep_elastic",
    "deep_tree",
    "deep_local",
)


class MissingData(Exception):
    """A data set that is not there; the text names the file, where it is published and its checksum."""


class Failed(Exception):
    """A training that ended with an error; the text has its last words."""


@dataclass(frozen=True)
class Options:
    """How to reproduce.

    quick: shorter, for a machine of two cores; what was shortened is said.
    passes: of the training data by each worker of a deep network; None: those are not trained.
    seed: of noise and starts.
    data_dir: folder of the data sets.
    output: folder of the pictures and, below it, of the deep networks' runs.
    workers: of deep networks, trainings of more are left out; None: none are.
    amp: of deep networks, what `mpilsgd train --amp` takes.
    """

    quick: bool = False
    passes: float | None = None
    seed: int = 0
    data_dir: Path = Path("data")
    output: Path = Path("reproduced")
    workers: int | None = None
    amp: str | None = None


@dataclass
class Result:
    """What came out. `shortened` says what was left out against the paper, "" if nothing."""

    rows: Sequence[Row]
    draw: Callable[[Figure], None] | None = None
    shortened: str = ""
    size: tuple[float, float] = (8.0, 4.6)


@dataclass(frozen=True)
class Reproduction:
    """One figure or table of a paper."""

    name: str
    paper: str
    title: str
    run: Callable[[Options], Result]


def entries() -> dict[str, Reproduction]:
    """All, by name, in the papers' order."""
    found: list[Reproduction] = []
    for theme in _THEMES:
        found += importlib.import_module(f"mpilsgd.reproduce.{theme}").ENTRIES
    return {one.name: one for one in sorted(found, key=_order)}


def named(patterns: Sequence[str]) -> list[Reproduction]:
    """Those that are asked for by name, by "all" or by a pattern such as 'thesis-fig5*'. A ValueError names others."""
    known = entries()
    chosen: dict[str, Reproduction] = {}
    for pattern in patterns:
        hits = fnmatch.filter(known, "*" if pattern == "all" else pattern.lower())
        if not hits:
            import difflib

            close = difflib.get_close_matches(pattern.lower(), known, 3, 0.5)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"there is no reproduction {pattern!r}{hint} (mpilsgd reproduce --list)")
        chosen |= {name: known[name] for name in hits}
    return list(chosen.values())


def _order(one: Reproduction) -> list[tuple[int, str]]:
    """fig5.2 before fig5.10: numbers count as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", one.name)]
