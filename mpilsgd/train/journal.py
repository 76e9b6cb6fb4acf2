"""What a run tells of itself in its directory: its lines, where its ranks are, its best centre, and the user's log."""

from __future__ import annotations

import sys
from typing import Any

from mpilsgd.comm import Topology
from mpilsgd.methods import Method
from mpilsgd.train.elections import Election, merged, on_common_clock
from mpilsgd.train.judged import figure_of, is_finite
from mpilsgd.train.logs import Log, open_log
from mpilsgd.train.progress import Progress, mean
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.summary import ranks_of
from mpilsgd.train.together import FAILED, on_first


class Journal:
    """Collects on every rank, and writes on rank 0. Args: as of `Trainer`.

    best: of the best evaluation so far its step and its figure, {} before there is one; on rank 0.
    """

    def __init__(self, topology: Topology, opt: Method, directory: RunDirectory):
        self._topology, self._opt, self._directory = topology, opt, directory
        self._elections: list[Election] = []
        self._written: tuple[int, float] = (0, 0)  # own and mean step when it last wrote
        self.best: dict[str, Any] = {}
        self._log: Log | None = None

    def open_log(self, kind: str | None) -> None:
        """Where the lines of metrics.jsonl go besides. Collective; all ranks are `Stopped` where that cannot be."""
        if kind is not None:
            on_first(self._topology, self._open_log, kind)

    def _open_log(self, kind: str) -> None:
        self._log = open_log(kind, self._directory.path)

    def note_leaders(self, at: Progress) -> None:
        """The step that was just taken had a round with leaders."""
        found, group = self._opt.metrics, self._topology.group_index
        at.leader = found.leader if found.leader >= 0 else at.leader
        at.leads += found.leaders[group] == self._topology.world.rank
        if self._topology.group.rank == 0:
            # groups of an asynchronous run come to the leader of all at different steps: the first one's counts
            overall = found.leader if group == 0 or not self._opt.asynchronous else -1
            self._elections.append(Election(at.step, group, found.leaders[group], overall))

    def write(self, step: int) -> None:
        """Writes the leaders since the last time; step: this rank's own. Collective."""
        on_first(self._topology, self._append, [], self._leaders(step), status=FAILED)

    def evaluated(
        self, step: int, line: dict[str, Any], rows: list[dict[str, Any]], centre: dict[str, Any] | None
    ) -> None:
        """Writes a line of metrics.jsonl and all that goes with it. Collective.

        step: this rank's own; rows: `measured` of every rank; centre: the state of what was evaluated, on rank 0, if it
        `improves`.
        """
        leaders, ranks = self._leaders(step), ranks_of(rows, self._opt.workers, line["step"])
        on_first(self._topology, self._evaluated, line, leaders, ranks, centre, status=FAILED)

    def improves(self, found: dict[str, Any]) -> bool:
        """Whether these figures of the centre are better than all before them. On rank 0."""
        key = figure_of([found]).key
        return is_finite(found[key]) and not found[key] >= self.best.get(key, float("inf"))

    def _leaders(self, step: int) -> list[dict[str, Any]]:
        rows = self._topology.allgather((self._written, step, self._elections))
        now = mean((step for _, step, _ in rows), len(self._opt.workers))
        elections = [on_common_clock(found, (t, step), (then, now)) for (t, then), step, found in rows]
        self._written, self._elections = (step, now), []
        return merged(elections, self._topology.n_groups)

    def _append(self, lines: list[dict[str, Any]], leaders: list[dict[str, Any]]) -> None:
        self._directory.append("leaders.jsonl", leaders)
        self._directory.append("metrics.jsonl", lines)

    def _evaluated(
        self,
        line: dict[str, Any],
        leaders: list[dict[str, Any]],
        ranks: dict[str, Any],
        centre: dict[str, Any] | None,
    ) -> None:
        self._append([line], leaders)
        self._directory.tell("ranks.json", ranks)
        if centre is not None and self.improves(line):
            self.best = {key: line[key] for key in ("step", figure_of([line]).key)}
            try:
                self._directory.save_best(centre, self.best)
            except OSError as error:
                print(f"mpilsgd train: the best centre cannot be kept: {error}", file=sys.stderr)
        try:
            if self._log is not None:
                self._log.write(line)
        except Exception as error:  # whatever the other tool's library raises: training goes on
            print(f"mpilsgd train: --log is left out from now on: {error}", file=sys.stderr)
            self._log = None

    def resume(self, step: int) -> None:
        """Drops what was written after the checkpoint; step: this rank's own there. Collective."""
        self._written = (step, mean(self._topology.allgather(step), len(self._opt.workers)))
        on_first(self._topology, self._resume, self._written[1])

    def _resume(self, step: float) -> None:
        self._directory.cut(step)
        self.best = self._directory.best() or {}
        if self.best.get("step", 0) > step:  # of an evaluation that is yet to come
            self.best = {}
            (self._directory.checkpoint / "best.pt").unlink()
