"""What communication among tasks costs: nothing, unless their time is simulated (`mpilsgd.simulation`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Costs:
    """When something that begins now is complete, in seconds of the tasks' clock. Ranks are those of the world."""

    def message(self, source: int, dest: int, nbytes: int) -> tuple[float, float]:
        """When a message has left its sender, and when it has come."""
        return 0.0, 0.0

    def collective(self, name: str, ranks: Sequence[int], sizes: Mapping[int, int]) -> float:
        """Of a collective operation to which those have come who are needed.

        name: mpi4py's; sizes: the bytes that each of them brings.
        """
        return 0.0

    def access(self, rank: int, target: int, there: int, back: int) -> float:
        """Of a one-sided operation that takes so many bytes to the target and back."""
        return 0.0
