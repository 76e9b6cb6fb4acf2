"""How far a worker is, what it measured, and how the workers' numbers become those of the run."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass
class Progress:
    """How far a worker is, and what it measured; saved with every checkpoint.

    Attributes:
        step: its own steps; with the sampler's batches an epoch it gives the position in the data.
        wall: seconds of training, without evaluations and checkpoints, but with the wait for the last to come to them.
        compute, data, comm: seconds of it, by what was done.
        wait: seconds of comm in which this worker waited: for the others to come, or for its turn.
        loss_sum, loss_count: of the batches since the last evaluation.
        last_loss: of the last batch.
        evaluated: the workers' mean step at the last evaluation.
        leader: the last known leader of all.
        leads: how often this worker led its group.
        overflows: steps whose gradient overflowed in fp16 and was left out.
    """

    step: int = 0
    wall: float = 0.0
    compute: float = 0.0
    data: float = 0.0
    comm: float = 0.0
    wait: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    last_loss: float = 0.0
    evaluated: float = 0
    leader: int = -1
    leads: int = 0
    overflows: int = 0

    def stepped(self, loss: Any) -> None:
        """A batch is done. loss: a number, or a tensor on a GPU, and then so are `loss_sum` and `last_loss` until
        `read`."""
        self.step += 1
        self.loss_sum += loss if isinstance(loss, float) else loss.double()
        self.loss_count += 1
        self.last_loss = loss

    def read(self) -> None:
        """The losses as numbers: on a GPU this waits for the last step."""
        self.loss_sum, self.last_loss = float(self.loss_sum), float(self.last_loss)

    def spent(self, wall: float, data: float, comm: float, wait: float) -> None:
        """Seconds of training; what is neither data nor comm was computing."""
        self.wall += wall
        self.data += data
        self.comm += comm
        self.wait += wait
        self.compute += wall - data - comm

    def waited(self, seconds: float) -> None:
        """Seconds of training in which this worker waited for others."""
        self.spent(seconds, 0.0, seconds, seconds)

    def evaluated_at(self, step: float) -> None:
        """An evaluation took the losses so far."""
        self.loss_sum, self.loss_count, self.evaluated = 0.0, 0, step


def mean(steps: Iterable[int], workers: int) -> float:
    """The steps a worker, of those who took any; a whole number where it is one."""
    total = sum(steps)
    return total / workers if total % workers else total // workers


def histogram(parts: Iterable[dict[int, int]]) -> dict[str, int]:
    """The sum of the workers' histograms, as JSON has it: by rising key."""
    total: collections.Counter[int] = collections.Counter()
    for part in parts:
        total.update(part)
    return {str(key): total[key] for key in sorted(total)}
