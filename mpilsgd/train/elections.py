"""Who was elected when: from what the workers noted to the lines of leaders.jsonl."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Election(NamedTuple):
    """What the first rank of a group noted.

    Attributes:
        step: by the group's clock.
        group, local, overall: the group, its leader, the leader of all (-1: none elected).
    """

    step: float
    group: int
    local: int
    overall: int


def on_common_clock(
    elections: Sequence[Election], own: tuple[float, float], common: tuple[float, float]
) -> list[Election]:
    """Elections by the common clock, which went from common[0] to common[1] while the worker's own did from own[0]."""
    if own == common:
        return list(elections)
    rate = (common[1] - common[0]) / max(own[1] - own[0], 1)
    steps = (common[0] + (e.step - own[0]) * rate for e in elections)
    return [e._replace(step=min(round(step, 3), common[1])) for e, step in zip(elections, steps, strict=True)]


def merged(elections: Iterable[Iterable[Election]], n_groups: int) -> list[dict[str, Any]]:
    """The lines of leaders.jsonl: what belongs to one step is one line."""
    lines: dict[float, dict[str, Any]] = {}
    for step, group, local, overall in itertools.chain.from_iterable(elections):
        line = lines.setdefault(step, {"step": step, "leaders": [None] * n_groups, "leader": None})
        line["leaders"][group] = local if local >= 0 else None
        if overall >= 0:
            line["leader"] = overall
    return [lines[step] for step in sorted(lines)]
