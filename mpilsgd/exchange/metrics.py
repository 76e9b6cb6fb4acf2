"""What a worker measures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Metrics:
    """What one worker measured so far (bytes: read from other workers' memory or received)."""

    rounds: int = 0
    bytes_group: int = 0
    bytes_across: int = 0
    t_comm: float = 0.0  # seconds in rounds, waiting included
    t_wait: float = 0.0  # ... of these, waiting for the others to come, or for a turn at the centre
    leader: int = -1  # world rank of the last global (or only) leader
    leaders: list[int] = dataclasses.field(default_factory=list)  # ... of each group's last known leader
    # of the workers to their leaders before the last pull (root mean square); EASGD: to the centre, at the last
    # center(), or before the last exchange where the period is adaptive
    distance: float = 0.0
    resets: int = 0  # times this worker was set back after a non-finite state
    skipped: int = 0  # EASGDTree: messages left out because the one before was not taken yet
    period: int = 0  # steps to the next round, where the period is adaptive
    # ... so far: [from which step on, period]
    periods: list[list[int]] = dataclasses.field(default_factory=list)
    leads: int = 0  # rounds that this worker led its group
    # asynchronous centres: {n: how often n updates by others lay between this worker's reading it and its writing}
    staleness: dict[int, int] = dataclasses.field(default_factory=dict)

    def note_period(self, step: int, before: int, period: int) -> None:
        """From this step on periods are so long, before it they were as long as that."""
        if not self.periods:
            self.period = before
            self.periods.append([0, before])
        if period != self.period:
            self.period = period
            self.periods.append([step, period])
            if len(self.periods) > 1000:
                del self.periods[1:-1:2]
