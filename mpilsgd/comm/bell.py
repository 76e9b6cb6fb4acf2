"""A bell that any rank can ring and all ranks hear, without meeting."""

from __future__ import annotations

from mpilsgd.comm.mpi import MPI


class Bell:
    """Whoever rings tells rank 0, which tells all; each hears of it when it next listens.

    Collective: creation and `free`.
    """

    def __init__(self, comm: MPI.Comm):
        self._comm = comm.Dup()
        self._sent: list[MPI.Request] = []
        self._rung = False

    def ring(self) -> None:
        """Rings; once is enough."""
        if not self._rung:
            self._rung = True
            self._tell([0] if self._comm.rank else range(1, self._comm.size))

    def listen(self) -> bool:
        """Whether it has been rung, as far as is known here."""
        if not self._rung and self._take():
            self._rung = True
            if self._comm.rank == 0:
                self._tell(range(1, self._comm.size))
        return self._rung

    def _tell(self, ranks: range | list[int]) -> None:
        self._sent += [self._comm.Issend([None, 0, MPI.BYTE], rank) for rank in ranks]

    def _take(self) -> bool:
        """Takes a message, if one is there."""
        message = self._comm.Improbe(MPI.ANY_SOURCE)
        if message is not None:
            message.Recv([None, 0, MPI.BYTE])
        return message is not None

    def free(self) -> None:
        """Takes what is still under way."""
        self._comm.Barrier()
        while self._comm.allreduce(self._pending(), MPI.LOR):
            pass
        self._comm.Free()

    def _pending(self) -> bool:
        while self._take():
            pass
        return not MPI.Request.Testall(self._sent)
