"""The files of a run directory, read back: what is damaged is left out, and a notice says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from mpilsgd.train.files import digest
from mpilsgd.train.yaml_file import options_in

_FAR = 2**53  # steps: up to here every whole number is a float64
_MANY = 1 << 16  # ranks


def lines(path: Path, summary: dict[str, Any], notices: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of metrics.jsonl or leaders.jsonl, a line each.

    A run that was killed may end in half a line; a run resumed from an older checkpoint may write a step
    twice: the later line counts. A run that was finished told in summary.json what lay in the file.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    told = summary.get("files", {}).get(path.name)
    if told is not None and digest(content[: told["bytes"]]) != told["sha256"]:
        notices.append(f"{path.name}: was changed since the run wrote it (its SHA-256 is not summary.json's)")
    valid = _is_election if path.name == "leaders.jsonl" else _has_step
    kept: list[dict[str, Any]] = []
    damaged = []
    for place, line in enumerate(content.decode("utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        record = _parsed(line)
        if not valid(record):
            damaged.append(place)
            continue
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    if damaged:
        one = f"line {damaged[0]} is"
        which = one if len(damaged) == 1 else f"{len(damaged)} lines, the first {damaged[0]}, are"
        notices.append(f"{path.name}: {which} damaged and left out")
    return kept


def summary(path: Path, notices: list[str]) -> dict[str, Any]:
    """summary.json; entries that are not what they should be are left out."""
    if not path.exists():
        return {}
    found = _parsed(path.read_bytes())
    if not isinstance(found, dict):
        notices.append(f"{path.name} cannot be read and is left out")
        return {}
    wrong = [key for key, fits in _ENTRIES.items() if key in found and not fits(found[key])]
    notices += [f"{path.name}: {key} is damaged and left out" for key in wrong]
    return {key: value for key, value in found.items() if key not in wrong}


def configuration(path: Path, notices: list[str]) -> dict[str, Any]:
    """config.yaml."""
    if not path.exists():
        return {}
    found, error = options_in(str(path))
    if error is not None or not found:
        notices.append(f"{path.name} cannot be read and is left out")
    return found


def number(value: Any) -> float:
    """NaN for what is no number, or larger than a float64 can be."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def are_numbers(values: Any) -> TypeGuard[list[float]]:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(map(_is_finite, values))


def _is_finite(value: Any) -> bool:
    return math.isfinite(number(value))


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < _MANY


def _has_step(record: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(record, dict) and 0 <= number(record.get("step")) < _FAR


def _is_election(record: Any) -> TypeGuard[dict[str, Any]]:
    if not _has_step(record) or not isinstance(record.get("leaders"), list):
        return False
    return all(rank is None or _is_rank(rank) for rank in [*record["leaders"], record.get("leader")])


def _are_digests(files: Any) -> bool:
    fit = isinstance(files, dict) and all(isinstance(told, dict) for told in files.values())
    return fit and all(isinstance(told.get("bytes"), int) and "sha256" in told for told in files.values())


def _is_worker(best: Any) -> bool:
    return isinstance(best, dict) and all(value is None or _is_finite(value) for value in best.values())


def _a_worker(seconds: Any) -> bool:
    return (are_numbers(seconds) and bool(seconds)) or _is_finite(seconds)


# Entries of summary.json that are more than a number or a text to show.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "world_size": lambda size: _is_rank(size) and size > 0,
    "best_worker": _is_worker,
    "files": _are_digests,
    **dict.fromkeys(("t_compute", "t_data", "t_comm"), _a_worker),
    **dict.fromkeys(("worker_steps", "workers", "resets", "t_wait"), are_numbers),
}


def _parsed(text: str | bytes) -> Any:
    """What JSON holds, None if it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
