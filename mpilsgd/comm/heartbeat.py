"""A node that vanishes, or its network, leaves the others waiting in MPI for ever: here they notice."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time

import numpy as np
from mpi4py import MPI

from mpilsgd.comm.onesided import thread_problem
from mpilsgd.comm.topology import Topology

_EVERY = 1.0  # seconds between two beats
PATIENCE = 20.0  # seconds without one after which a node is given up
_BEAT, _LAST = 0, 1  # what a message holds


class Heartbeat:
    """A thread on every rank: the first of each node hears the first of all, and all the others of their node.

    Where nothing comes from a node for `patience` seconds, its name is told and the job ends, there as well as here.
    With one node, or an MPI without threads, it does nothing.

    Args: topology: the nodes; patience: seconds. Collective: creation and `free`.
    """

    def __init__(self, topology: Topology, patience: float = PATIENCE):
        self._comm = topology.world.Dup()
        self._names = topology.allgather(socket.gethostname())
        self._nodes, self._patience = topology.nodes, patience
        self._end = threading.Event()
        self._unfinished: list[int] = []  # whose last message has not come
        self._thread: threading.Thread | None = None
        if len(self._nodes) > 1 and topology.world.allreduce(thread_problem() is None, MPI.LAND):
            self._thread = threading.Thread(target=self._beat, name="mpilsgd heartbeat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        comm = self._comm
        others = neighbours(self._nodes, comm.rank)
        buffers = {k: np.zeros(1, np.uint8) for k in others}
        coming = {k: comm.Irecv([buffers[k], MPI.BYTE], k) for k in others}
        going: dict[int, MPI.Request] = {}
        beat, last = (np.full(1, what, np.uint8) for what in (_BEAT, _LAST))
        heard = dict.fromkeys(others, time.monotonic())
        looked = time.monotonic()
        while not self._end.wait(_EVERY):
            now = time.monotonic()
            if now - looked > self._patience / 2:  # this rank itself was stopped for a while
                heard = dict.fromkeys(heard, now)
            looked = now
            for k in others:
                try:
                    if k not in going or going[k].Test():
                        going[k] = comm.Isend([beat, MPI.BYTE], k)
                    while k in heard and coming[k].Test():
                        heard[k] = now
                        if buffers[k][0] == _LAST:
                            del heard[k]
                        else:
                            coming[k] = comm.Irecv([buffers[k], MPI.BYTE], k)
                except MPI.Exception:  # a connection was lost
                    self._give_up(k)
                if now - heard.get(k, now) > self._patience:
                    self._give_up(k)
        ends = [comm.Isend([last, MPI.BYTE], k) for k in others]
        deadline = time.monotonic() + self._patience
        while not MPI.Request.Testall(ends) and time.monotonic() < deadline:
            time.sleep(0.001)
        for k in heard:
            coming[k].Cancel()
            status = MPI.Status()
            coming[k].Wait(status)
            if status.Is_cancelled() or buffers[k][0] != _LAST:
                self._unfinished.append(k)

    def _give_up(self, k: int) -> None:
        ranks = next(ranks for ranks in self._nodes if k in ranks)
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        with contextlib.suppress(Exception):
            sys.stderr.write(
                f"node {self._names[k]} ({which}) has not been heard of for {self._patience:.0f} s: it has vanished, "
                "or its network; the job ends\n"
            )
            sys.stderr.flush()
            time.sleep(_EVERY)
        signal.alarm(5)  # a launcher that cannot be reached leaves Abort waiting, or lets it return
        MPI.COMM_WORLD.Abort(1)
        os._exit(1)

    def stop(self) -> None:
        """Nobody waits for this node's beats any more."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def free(self) -> None:
        """Waits for the last beats of the others, as patiently as before."""
        self.stop()
        buffer = np.zeros(1, np.uint8)
        for k in self._unfinished:
            while buffer[0] != _LAST:
                coming, waited = self._comm.Irecv([buffer, MPI.BYTE], k), 0.0
                while not coming.Test():
                    if waited > self._patience:
                        self._give_up(k)
                    time.sleep(0.01)
                    waited += 0.01  # not the clock: this rank itself may be stopped for a while
            buffer[0] = _BEAT
        self._comm.Free()


def neighbours(nodes: list[list[int]], rank: int) -> list[int]:
    """The ranks that this one hears, and that hear it."""
    firsts = [ranks[0] for ranks in nodes]
    here = next(ranks for ranks in nodes if rank in ranks)
    if rank != here[0]:
        return here[:1]
    return here[1:] + (firsts[1:] if rank == firsts[0] else firsts[:1])
