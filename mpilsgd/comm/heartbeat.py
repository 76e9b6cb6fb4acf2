"""A node that vanishes leaves the others waiting in MPI for ever, and so does a rank that stands still: it is said."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from os import _exit  # now: a job has a function of its own there, which tells of the user's code

import numpy as np
import torch

from mpilsgd.comm.beats import Beats, beats
from mpilsgd.comm.counting import thread_problem
from mpilsgd.comm.mpi import MPI
from mpilsgd.comm.standstill import ENDED, Place, Sign, Standstill, position
from mpilsgd.comm.topology import Topology
from mpilsgd.comm.windows import Window

_EVERY = 1.0  # seconds between two beats, and between two looks
_FLUSH = 5.0  # seconds for small messages to leave at the end
_BEAT, _LAST = 0, 1  # the first word of a message; the others are what the ranks of the sender's node show
_MOST = 8  # ranks that are named


class Heartbeat:
    """Every rank writes where it stands into its node's memory, from where it goes to the first rank of all, and back:
    between the first ranks of the nodes, every second and without the interpreter's lock.

    Where nothing comes from a node for `patience` seconds, its name is told and the job ends, there as well as here.
    Where a rank is stopped for so long, or stands still while others are further, it is told where; the job goes on.
    With one rank, or where MPI has no threads between nodes, it does nothing.

    Args: topology: the nodes; patience: seconds. Collective: creation and `free`.
    """

    def __init__(self, topology: Topology, patience: float):
        self._comm = topology.world.Dup()
        self._names = topology.allgather(socket.gethostname())
        self._nodes, self._patience = topology.nodes, patience
        self._home = next(ranks for ranks in self._nodes if self._comm.rank in ranks)
        n, seat = len(self._home), self._home.index(self._comm.rank)
        self._window = Window(topology.node, torch.int64, 1 + 2 * n, common=True)
        # whether the job ends; the position of every rank of the node; its pulse
        self._table = self._window.views[0].numpy()
        self._own = self._table[1 + seat :: n]
        threads = topology.world.allreduce(thread_problem() is None, MPI.LAND)
        self._others = neighbours(self._nodes, self._comm.rank) if threads else []
        self._incoming = {k: np.zeros(1 + 2 * len(self._node(k)), np.int64) for k in self._others}
        self._coming = {k: self._receive(k) for k in self._others}
        self._unheard: list[int] = []  # whose last message has not come
        self._end = threading.Event()
        self._beats: Beats | None = None
        self._thread: threading.Thread | None = None
        if self._others:
            self._beats = beats(self._comm, self._others, self._table[1:], _EVERY)
        if self._comm.size > 1 and (threads or len(self._nodes) == 1):
            self._thread = threading.Thread(target=self._watch, name="mpilsgd heartbeat", daemon=True)
            self._thread.start()

    def at(self, step: int, place: Place) -> None:
        """This rank stands there, having taken so many steps."""
        self._own[0] = position(step, place)

    def _receive(self, k: int) -> MPI.Request:
        return self._comm.Irecv([self._incoming[k].view(np.uint8), MPI.BYTE], k)

    def _watch(self) -> None:
        heard = dict.fromkeys(self._others, time.monotonic())
        known = {k: of[1:].copy() for k, of in self._incoming.items()}
        still = Standstill(self._watched(), self._patience)
        looked = time.monotonic()
        while not self._end.wait(_EVERY):
            now = time.monotonic()
            if now - looked > self._patience / 2:  # this rank itself was stopped for a while
                heard = dict.fromkeys(heard, now)
                still.forget()
            looked = now
            self._own[1] += 1
            if self._table[0]:  # the first of this node has given up
                _end_job()
            for k in list(heard):
                try:
                    while k in heard and self._coming[k].Test():
                        heard[k] = now
                        known[k][:] = self._incoming[k][1:]  # the last one, too: all have ended
                        if self._incoming[k][0] == _LAST:
                            del heard[k]
                        else:
                            self._coming[k] = self._receive(k)
                except MPI.Exception:  # a connection was lost
                    self._give_up(k)
                if now - heard.get(k, now) > self._patience:
                    self._give_up(k)
            signs = _signs(self._home, self._table[1:])
            for k, words in known.items():
                signs |= _signs(self._node(k), words)
            self._tell(still.look(signs, now))
        for k in heard:
            self._coming[k].Cancel()
            status = MPI.Status()
            self._coming[k].Wait(status)
            if status.Is_cancelled() or self._incoming[k][0] != _LAST:
                self._unheard.append(k)

    def _watched(self) -> list[int]:
        """The ranks of which this one says so if they stand still: rank 0 looks at all, and at rank 0 its neighbour."""
        first = self._nodes[0]
        if self._comm.rank == first[0]:
            return list(range(1 if len(first) > 1 else 0, self._comm.size))
        return [0] if self._comm.rank in first[1:2] else []

    def _node(self, k: int) -> list[int]:
        return next(ranks for ranks in self._nodes if k in ranks)

    def _tell(self, late: dict[int, str]) -> None:
        for r, text in list(late.items())[:_MOST]:
            _say(f"rank {r} (on {self._names[r]}) has not moved on for {self._patience:.0f} s: {text}")
        if len(late) > _MOST:
            _say(f"and so do {len(late) - _MOST} more ranks")

    def _give_up(self, k: int) -> None:
        ranks = self._node(k)
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        _say(
            f"node {self._names[k]} ({which}) has not been heard of for {self._patience:.0f} s: it has vanished, or "
            "its network; the job ends"
        )
        self._table[0] = 1
        _end_job()

    def stop(self) -> None:
        """Nobody waits for this node's beats any more."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._own[1] = ENDED
        if self._beats is not None:
            self._beats.stop(_FLUSH)
            self._beats = None
            words = np.full(self._table.size, ENDED, np.int64)
            words[0] = _LAST
            last = {k: words.copy() for k in self._others}
            ends = [self._comm.Isend([m.view(np.uint8), MPI.BYTE], k) for k, m in last.items()]
            deadline = time.monotonic() + _FLUSH
            while not MPI.Request.Testall(ends) and time.monotonic() < deadline:
                time.sleep(0.001)

    def free(self) -> None:
        """Waits for the last beats of the others, as patiently as before."""
        self.stop()
        for k in self._unheard:
            self._incoming[k][0] = _BEAT
            while self._incoming[k][0] != _LAST:
                coming, waited = self._receive(k), 0.0
                while not coming.Test():
                    if waited > self._patience:
                        self._give_up(k)
                    time.sleep(0.01)
                    waited += 0.01  # not the clock: this rank itself may be stopped for a while
        self._comm.Free()
        self._window.free()


def _signs(ranks: list[int], words: np.ndarray) -> dict[int, Sign]:
    return {r: Sign(*pair) for r, pair in zip(ranks, words.reshape(2, -1).T.tolist(), strict=True)}


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        sys.stderr.write(f"mpilsgd: {text}\n")
        sys.stderr.flush()


def _end_job() -> None:
    time.sleep(_EVERY)  # for what was said to be passed on
    signal.alarm(5)  # a launcher that cannot be reached leaves Abort waiting, or lets it return
    MPI.COMM_WORLD.Abort(1)
    _exit(1)


def neighbours(nodes: list[list[int]], rank: int) -> list[int]:
    """The ranks of other nodes that this one hears, and that hear it: the first of all and the first of each."""
    firsts = [ranks[0] for ranks in nodes]
    if rank not in firsts:
        return []
    return firsts[1:] if rank == firsts[0] else firsts[:1]
