"""Reads run directories back: what `mpilsgd report` knows about a run is what stands in its files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpilsgd.train import run_files
from mpilsgd.train.run_files import are_numbers, number


class RunError(ValueError):
    """A path that is no run directory, or one that cannot be read; the text says which one and why."""


@dataclass
class Run:
    """One run directory, read.

    Attributes:
        path, name: the directory, and the shortest ending of its path that tells the runs of a report apart.
        metrics: the lines of metrics.jsonl, by rising step (empty where a run ended before its first evaluation).
        leaders: the lines of leaders.jsonl, by rising step (empty where no method elects one).
        summary, config: summary.json and config.yaml (empty where a run was ended before it wrote them).
        notices: what was odd in the files, for the reader of the report.
    """

    path: Path
    name: str
    metrics: list[dict[str, Any]]
    leaders: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def column(self, key: str) -> np.ndarray:
        """One value of each line of metrics.jsonl as float64; NaN where it is absent, null or not finite."""
        values = np.array([number(line.get(key)) for line in self.metrics])
        return np.where(np.isfinite(values), values, math.nan)

    def curve(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """The evaluations as points; other lines are left out, a value that is not finite stays as a gap."""
        kept = [line for line in self.metrics if line.get(y) is not None and line.get(x) is not None]
        points = np.array([[number(line[x]), number(line[y])] for line in kept]).reshape(-1, 2)
        points[~np.isfinite(points)] = math.nan
        return points[:, 0], points[:, 1]

    def last(self, key: str) -> float:
        """The last finite value of a column, NaN if there is none."""
        values = self.column(key)
        values = values[np.isfinite(values)]
        return float(values[-1]) if values.size else math.nan

    def total(self, key: str) -> float:
        """A figure of the whole run: the summary's, else the last line's."""
        value = number(self.summary.get(key))
        return value if math.isfinite(value) else self.last(key)

    @property
    def method(self) -> str:
        return str(self.summary.get("method") or self.config.get("method") or "?")

    @property
    def label(self) -> str:
        """The name in figures: with the method, where the directory's name does not tell it."""
        waits = {None: "", False: "", True: "asynchronous"}
        kind = self.config.get("asynchronous")
        words = [self.method, waits[kind] if isinstance(kind, bool | None) else str(kind)]
        told = [word for word in words if word not in ("", "?") and _plain(word)[:5] not in _plain(self.name)]
        return self.name + (f" ({' '.join(told)})" if told else "")

    @property
    def worker_steps(self) -> list[int]:
        """The steps of each worker of an asynchronous run; empty for others."""
        steps = self.summary.get("worker_steps")
        return [int(step) for step in steps] if are_numbers(steps) else []

    @property
    def periods(self) -> list[tuple[int, int]]:
        """From which step on the period was how long, where it was adaptive; else empty."""
        found = self.summary.get("periods")
        listed = found if isinstance(found, list) else []
        fits = all(are_numbers(pair) and len(pair) == 2 and pair[1] > 0 for pair in listed)
        return [(int(step), int(period)) for step, period in listed] if fits else []

    @property
    def staleness(self) -> dict[int, int]:
        """How often so many updates of the centre lay between a worker's read and its write; empty without one."""
        found = self.summary.get("staleness")
        if not (isinstance(found, dict) and are_numbers(list(found.values()))):
            return {}
        if not all(str(key).isdecimal() for key in found):
            return {}
        return {int(key): int(found[key]) for key in sorted(found, key=int) if found[key] > 0}

    @property
    def world_size(self) -> int:
        """The number of ranks: the summary's, or one more than the highest rank that ever led."""
        named = [
            rank
            for line in self.leaders
            for rank in [*line["leaders"], line.get("leader")]
            if rank is not None
        ]
        return max(self.summary.get("world_size", 1), 1 + max(named, default=0))

    @property
    def workers(self) -> list[int]:
        """The ranks that compute; the summary names them where not all do."""
        named = self.summary.get("workers")
        return [int(rank) for rank in named] if are_numbers(named) else list(range(self.world_size))

    def ranks(self, count: int) -> list[int]:
        """The ranks of a list with a value a worker; 0, 1, ... where it is longer or shorter than it should be."""
        return self.workers if len(self.workers) == count else list(range(count))

    @property
    def n_groups(self) -> int:
        groups = self.summary.get("groups")
        named = len(groups) if isinstance(groups, list) else 1
        return max([named, *(len(line["leaders"]) for line in self.leaders)])

    def elections(self, group: int | None) -> list[tuple[float, int]]:
        """(step, rank) of each election of a group's leader; with None, of the leader of all.

        A line without a rank is of a step at which others were elected: this leader stays.
        """
        if group is None:
            found = [(line["step"], line.get("leader")) for line in self.leaders]
        else:
            found = [
                (line["step"], line["leaders"][group])
                for line in self.leaders
                if group < len(line["leaders"])
            ]
        return [(step, rank) for step, rank in found if rank is not None]

    def leads(self) -> tuple[list[int], list[int]]:
        """How often each rank led its group, and how often it led all of them."""
        local, overall = [0] * self.world_size, [0] * self.world_size
        for group in range(self.n_groups):
            for _, rank in self.elections(group):
                local[rank] += 1
        for _, rank in self.elections(None):
            overall[rank] += 1
        return local, overall

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of computing, loading, communication: a value a worker (without a summary rank 0's alone)."""
        parts = {}
        for part in ("compute", "data", "comm"):
            per_rank = self.summary.get(f"t_{part}")
            if per_rank is None:
                per_rank = [self.last(f"t_{part}")]
            elif not isinstance(per_rank, list):
                per_rank = [per_rank]
            parts[part] = [value if math.isfinite(value) else 0.0 for value in map(number, per_rank)]
        return parts

    def waiting(self) -> list[float]:
        """Of the seconds of communication, those in which each worker waited for others; empty if it is not known."""
        waits = self.summary.get("t_wait")
        return [float(value) for value in waits] if are_numbers(waits) else []


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Reads several run directories; a run that ended before its first evaluation has no `metrics`, and a notice.

    Raises:
        RunError: for all paths at once that are missing, no run directories, or cannot be read.
    """
    runs, errors = [], []
    folders = list(dict.fromkeys(Path(path) for path in paths))
    for folder, name in zip(folders, _short_names(folders), strict=True):
        try:
            runs.append(_read_run(folder, name))
        except RunError as error:
            errors.append(str(error))
    if errors:
        raise RunError("\n".join(errors))
    return runs


def _read_run(folder: Path, name: str) -> Run:
    if not folder.exists():
        raise RunError(f"{folder}: there is no such run directory")
    if not folder.is_dir():
        raise RunError(f"{folder}: is a file; give the run directory that holds metrics.jsonl")
    notices: list[str] = []
    try:
        summary = run_files.summary(folder / "summary.json", notices)
        metrics = run_files.lines(folder / "metrics.jsonl", summary, notices)
        leaders = run_files.lines(folder / "leaders.jsonl", summary, notices)
        config = run_files.configuration(folder / "config.yaml", notices)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror or error}: {error.filename}") from error
    if not any((folder / file).exists() for file in ("config.yaml", "metrics.jsonl")):
        raise RunError(f"{folder}: holds no metrics.jsonl; is it a run directory (`mpilsgd train --output`)?")
    if not metrics:
        notices.append(
            "left out: no readable line in metrics.jsonl: it holds no evaluation yet, or was cut off"
        )
    elif not summary:
        notices.append("no summary.json: the run is not finished; figures are those of its last line")
    return Run(folder, name, metrics, leaders, summary, config, [f"{name}: {notice}" for notice in notices])


def _plain(name: str) -> str:
    """A name as it is compared."""
    return re.sub("[^a-z0-9]", "", name.casefold())


def _short_names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
