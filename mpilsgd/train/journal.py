"""What a run tells of itself in its directory: the lines of metrics.jsonl and leaders.jsonl."""

from __future__ import annotations

from typing import Any

from mpilsgd.comm import Topology
from mpilsgd.methods import Method
from mpilsgd.train.elections import Election, merged, on_common_clock
from mpilsgd.train.progress import Progress, mean
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.together import FAILED, on_first


class Journal:
    """Collects on every rank, and writes on rank 0. Args: as of `Trainer`."""

    def __init__(self, topology: Topology, opt: Method, directory: RunDirectory):
        self._topology, self._opt, self._directory = topology, opt, directory
        self._elections: list[Election] = []
        self._written: tuple[int, float] = (0, 0)  # own and mean step when it last wrote

    def note_leaders(self, at: Progress) -> None:
        """The step that was just taken had a round with leaders."""
        found, group = self._opt.metrics, self._topology.group_index
        at.leader = found.leader if found.leader >= 0 else at.leader
        at.leads += found.leaders[group] == self._topology.world.rank
        if self._topology.group.rank == 0:
            # groups of an asynchronous run come to the leader of all at different steps: the first one's counts
            overall = found.leader if group == 0 or not self._opt.asynchronous else -1
            self._elections.append(Election(at.step, group, found.leaders[group], overall))

    def write(self, step: int, line: dict[str, Any] | None = None) -> None:
        """Writes the leaders since the last time, and a line of metrics; step: this rank's own. Collective."""
        rows = self._topology.allgather((self._written, step, self._elections))
        now = mean((step for _, step, _ in rows), len(self._opt.workers))
        elections = [on_common_clock(found, (t, step), (then, now)) for (t, then), step, found in rows]
        leaders = merged(elections, self._topology.n_groups)
        self._written, self._elections = (step, now), []
        on_first(self._topology, self._append, line, leaders, status=FAILED)

    def _append(self, line: dict[str, Any] | None, leaders: list[dict[str, Any]]) -> None:
        self._directory.append("leaders.jsonl", leaders)
        self._directory.append("metrics.jsonl", [] if line is None else [line])

    def resume(self, step: int) -> None:
        """Drops what was written after the checkpoint; step: this rank's own there. Collective."""
        self._written = (step, mean(self._topology.allgather(step), len(self._opt.workers)))
        on_first(self._topology, self._directory.cut, self._written[1])
