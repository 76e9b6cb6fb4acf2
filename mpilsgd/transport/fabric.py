"""The levels over which a method exchanges: read in place within an island, sent once an island between islands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mpilsgd.comm import Channel, Topology, complete, reads
from mpilsgd.comm.channel import cuts, pass_along, sums
from mpilsgd.comm.meeting import Meeting, MpiMeeting
from mpilsgd.devices import on_host
from mpilsgd.transport.devices import DeviceWindows
from mpilsgd.transport.messages import Messages
from mpilsgd.transport.probe import takes_devices
from mpilsgd.transport.sharing import stage, way
from mpilsgd.transport.staged import Stage
from mpilsgd.transport.windows import SharedWindows
from mpilsgd.transport.wire import Stream, Streams, Wire, wire_of


@dataclasses.dataclass
class Traffic:
    """Bytes that this rank read from other workers' memory or received from them."""

    group: int = 0
    across: int = 0


class Fabric:
    """Where one method's vectors lie, and its levels.

    Args:
        nbytes: shared memory that this rank will ask for; where a node has less than the sum, its ranks become islands
            of one and a `SharedMemoryWarning` says so.
        device: where the vectors lie; devices of a node that cannot reach each other are islands of one, too.
        own: the levels get communicators of their own, as a thread that talks beside other methods needs them.
        hosted: what of nbytes lies in the host's memory wherever the vectors lie.

    Attributes: world and group (`Level`), traffic; on_host: whether that is where the vectors lie; reaches: whether
    messages are sent from and into their devices' memory. Rounds of a level on one node need none where its devices
    have a `Stage`. Collective over the world, as is `free`.
    """

    _by_mpi = False

    def __init__(
        self, topology: Topology, nbytes: int, device: torch.device, own: bool = False, hosted: int = 0
    ):
        self.topology, self._own, self.traffic = topology, own, Traffic()
        self._across_dtype = topology.across_dtype
        self.on_host = on_host(device)
        how = way(topology, nbytes, device, hosted)
        islands = topology.islands(how == "windows")
        world, group = topology.channels(islands, own)
        self.place: Any = Messages(device)
        if len(world.local_ranks) > 1:
            self.place = SharedWindows(world) if self.on_host else DeviceWindows(world, device)
        seats = [islands[:r].count(name) for r, name in enumerate(islands)]
        mates = topology.groups[topology.group_index]
        some_on_host = any(topology.allgather(self.on_host))
        self.reaches = world.n_islands > 1 and not some_on_host and takes_devices(topology, device)
        self.world = Level(self, world, range(topology.world.size), seats, mates)
        self.group = Level(self, group, mates, seats, mates)
        for level in (self.world, self.group) if how == "staged" else ():
            level.stage = stage(topology, level, device)

    def wire(self, dtype: torch.dtype) -> Wire:
        """How a vector of this type travels between islands."""
        return wire_of(dtype, self._across_dtype)

    def message(self, dtype: torch.dtype, exact: bool = False) -> Wire:
        """The same for what is sent and received, and not fetched; exact: in its own type."""
        return wire_of(dtype, None if exact else self._across_dtype, self.reaches)

    def state(self) -> dict[str, Any]:
        """What is kept of vectors that travel in few bits, and by whom."""
        kept = [level.streams.state() for level in (self.world, self.group)]
        return {"islands": self.world.channel.island_of, "kept": kept}

    def misfit(self, state: dict[str, Any]) -> str | None:
        """Why a saved state cannot be taken up here."""
        if not any(state["kept"]) or state["islands"] == self.world.channel.island_of:
            return None
        return (
            "the state was saved by ranks that lay otherwise on nodes: it holds what each had still to send"
        )

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        for level, kept in zip((self.world, self.group), state["kept"], strict=True):
            level.streams.load(kept, device)

    def meet_by_mpi(self) -> None:
        """From now on, on all ranks, in all methods that meet where the topology does: one-sided operations and
        messages that are under way need those who wait to be inside MPI."""
        self._by_mpi = self.topology.waits_in_mpi = True

    @property
    def by_mpi(self) -> bool:
        return self._by_mpi or (self.topology.waits_in_mpi and not self._own)

    def free(self) -> None:
        for level in (self.group, self.world):
            if level.stage is not None:
                level.stage.free()
        self.place.free()
        for level in (self.group, self.world) if self._own else ():
            level.channel.free()


class Level:
    """The workers of one kind of exchange: those of a group, or of the world.

    Attributes:
        world_ranks: their ranks in the world; seats: the index of each in `views` of its island's vectors.
        stage: by which vectors go from island to island, if not by messages.
        patient: what waits in MPI leaves the core to others, as a thread beside the computing should; the same on all
            ranks, as MPI does not match blocking and nonblocking collectives.
    """

    patient = False

    def __init__(
        self, fabric: Fabric, channel: Channel, ranks: Sequence[int], seats: list[int], mates: Sequence[int]
    ):
        self._fabric, self.channel, self._mates = fabric, channel, set(mates)
        self.world_ranks = list(ranks)
        self.seats = [seats[r] for r in ranks]
        self.comm, self.rank, self.size = channel.comm, channel.comm.rank, channel.comm.size
        self.local_ranks, self.n_islands = channel.local_ranks, channel.n_islands
        self.is_head = channel.is_head
        self._by_mpi = MpiMeeting(channel.comm, channel.local)
        others = [self.world_ranks[r] for r in self.local_ranks if r != self.rank]
        self._near = sum(r in self._mates for r in others)
        self._far = len(others) - self._near
        self.streams = Streams(self.is_head)
        self._order = fabric.place.order(channel)
        self.stage: Stage | None = None

    @property
    def meeting(self) -> Meeting:
        """Where the level meets."""
        return self._by_mpi if self._fabric.by_mpi else self.channel.meeting

    def table(self, row: Sequence[float]) -> np.ndarray:
        """Every rank's row of numbers, the same (size, len(row)) table on every rank.

        Doubles as the barrier between accesses to each other's vectors. Numbers are compared after they have been
        gathered, by the same code on every rank: MPI's MIN and MINLOC disagree about a NaN.
        """
        meeting = self.meeting
        self._order.before(meeting.through_mpi)
        table = meeting.table(row, self.patient)
        self._order.after(meeting.through_mpi)
        return table

    def barrier(self) -> None:
        """All of the level have come here; what they stored before it is seen after it."""
        meeting = self.meeting
        self._order.before(meeting.through_mpi)
        meeting.barrier(self.patient)
        self._order.after(meeting.through_mpi)

    def fence(self) -> None:
        """Barrier among those of the level on this island; their stores before it are seen after it."""
        meeting = self.meeting
        self._order.before(meeting.through_mpi)
        meeting.fence(self.patient)
        self._order.after(meeting.through_mpi)

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's slice of a vector on which the ranks of its island work together."""
        n, i = len(self.local_ranks), self.local_ranks.index(self.rank)
        step = -(-(stop - start) // n)
        step = -(-step // 16) * 16  # whole cache lines
        return min(start + i * step, stop), min(start + (i + 1) * step, stop)

    def bring(
        self, window: Any, owner: int, landing: Any, exact: bool = False, name: str = ""
    ) -> torch.Tensor:
        """The whole vector of rank `owner`, readable here; see `coming`. Collective over the level."""
        vector, parts = self.coming(window, owner, landing, exact, name)
        exhaust(parts)
        return vector

    def coming(
        self, window: Any, owner: int, landing: Any, exact: bool = False, name: str = ""
    ) -> tuple[torch.Tensor, Iterator[tuple[int, int]]]:
        """The vector of rank `owner` (where it lies on its own island, in `landing` elsewhere), and its parts, (start,
        stop), each as soon as it can be read here, while the next ones are under way. exact: in its own type.
        name: of vectors that come one after the other; in few bits each is sent as its change from the last.

        Collective over the level, to the end of the parts; the owner must not change its vector before the next
        barrier. One copy travels to each island, not one to each rank.
        """
        home = self.channel.island_of[owner]
        here = self.channel.island == home
        if here:
            vector = window.views[0 if window.common else self.seats[owner]]
        else:
            vector = landing.views[0][: window.mine.numel()]
        if self.n_islands == 1:
            nbytes = vector.numel() * vector.element_size() if owner != self.rank else 0
            self._count(owner, nbytes)
            reads(nbytes)
            return vector, iter([(0, vector.numel())])
        own = self._fabric.message(vector.dtype, exact=True)
        wire, kept = self._fabric.message(vector.dtype, exact or self.stage is not None), None
        if wire.coded:
            kept, known = self.streams.of(name, vector, base=True) if name else (None, False)
            wire = wire if known else own
        received = owner != self.rank and (here or self.is_head)
        self._count(owner, (own if here else wire).nbytes(vector.numel()) if received else 0)
        mapped = here and owner != self.rank
        reads(own.nbytes(vector.numel()) if mapped else 0)
        if self.stage is not None:
            return vector, self.stage.passed(vector, owner)
        return vector, self._parts(vector, home, wire, None if kept is None else kept.base, mapped)

    def _parts(
        self, vector: torch.Tensor, home: int, wire: Wire, base: torch.Tensor | None, mapped: bool
    ) -> Iterator[tuple[int, int]]:
        chunks = cuts(vector.numel(), wire, 1)
        if self.is_head:
            chunks = pass_along(self.channel.heads, vector, home, wire, chunks, base, mapped)
        for part in chunks:
            if self.channel.island != home:
                self.fence()
            yield part

    def allreduce(
        self, vector: torch.Tensor, start: int, stop: int, stream: Stream | None = None
    ) -> Iterator[tuple[int, int]]:
        """Sums several islands' common vectors from `start` to `stop`; gives the parts, (start, stop), each when its
        sum can be read here, while the next ones are summed. Collective over the level, to the end of the parts.

        stream: of sums that follow each other; without one few bits would lose too much, and it goes in its own type.
        """
        self.fence()
        n, vector, change = self.n_islands, vector[start:stop], None
        wire = self._fabric.message(vector.dtype, exact=self.stage is not None)
        if wire.coded:
            known = False
            if stream is not None:
                change, known = self.streams.change(stream, (start, stop), vector)
            wire = wire if known else self._fabric.message(vector.dtype, exact=True)
        parts: Iterator[tuple[int, int]] = cuts(stop - start, wire, n)
        if self.is_head:
            outside = next((k for k, r in enumerate(self.world_ranks) if r not in self._mates), self.rank)
            nbytes = wire.nbytes(stop - start)
            self._count(outside, 2 * (n - 1) * nbytes // n)
            if self.stage is None:
                parts = sums(self.channel.heads, vector, wire, parts, self._wait, change)
            else:
                parts = self.stage.sums(vector)
        for a, b in parts:
            self.fence()
            yield start + a, start + b

    def _wait(self, request: Any) -> None:
        if self.patient:
            complete(request)
        else:
            request.Wait()

    def count_local(self, nbytes: int) -> None:
        """Notes that this rank read `nbytes` of every other vector of the level on this island."""
        reads((self._near + self._far) * nbytes)
        self._fabric.traffic.group += self._near * nbytes
        self._fabric.traffic.across += self._far * nbytes

    def _count(self, owner: int, nbytes: int) -> None:
        if self.world_ranks[owner] in self._mates:
            self._fabric.traffic.group += nbytes
        else:
            self._fabric.traffic.across += nbytes


def exhaust(parts: Iterable[Any]) -> None:
    """To the end."""
    for _ in parts:
        pass
