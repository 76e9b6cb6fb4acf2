"""Who the workers are: the world, the nodes and the groups."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from mpilsgd.comm.channel import Channel
from mpilsgd.comm.ending import Refused, abort_on_exception
from mpilsgd.comm.mpi import MPI, here

ACROSS: dict[Any, torch.dtype | str] = {
    torch.bfloat16: torch.bfloat16,
    "bfloat16": torch.bfloat16,
    torch.int8: "int8",
    "int8": "int8",
    "int4": "int4",
}


class Topology:
    """The world of p workers, cut into nodes (shared memory) and n groups of l workers.

    Worker i of group j (x^{j,i} in the papers) is rank `group.rank` = i of the group `group_index` = j.

    Args:
        comm: an mpi4py communicator, duplicated here (default: COMM_WORLD).
        group_size: None makes one group of each node; an integer l >= 1 cuts each node into consecutive
            blocks of l ranks, of which the last may be smaller.
        shared: False exchanges parameters by messages instead of through shared windows.
        across_dtype: how vectors travel between nodes (between all ranks that do not share memory). "bfloat16" (or
            torch.bfloat16): wider ones so, half the bytes, each value rounded on its way (by 2^-9 of it); float16 would
            overflow. "int8", "int4": 8.25 or 4.25 bits a value (of float64 half a bit more), blocks of 128 values with
            a scale each. What the code of a sum or a change lacks is sent with the next one, and whole vectors travel
            as their change since the last one, so that nothing is lost for good.
        cuda_aware: whether MPI is given GPUs' memory where vectors travel between nodes. None: where it says that it
            takes it, and a trial agrees (`mpilsgd info` tells); True: untried; False: they go through the host's.

    Attributes:
        world: communicator of all workers.
        node: the workers that share this worker's memory.
        group: the workers of this worker's group; all in one node.
        across: the workers of the other groups with the same rank in theirs, ordered by group;
            on `group.rank == 0` it has one worker of every group.
        group_index, n_groups: j and n.
        groups, nodes: the world ranks of every group, and of every node.

    Raises:
        ValueError: on every rank, if `group_size` is not a whole number from 1 to the size of the smallest node, or
            `across_dtype` none of these, or if ranks run different versions of mpilsgd or of MPI.

    Collective over `comm`, as are `free` and the helpers below.
    """

    def __init__(
        self,
        comm: MPI.Comm | None = None,
        group_size: int | None = None,
        shared: bool = True,
        across_dtype: torch.dtype | str | None = None,
        cuda_aware: bool | None = None,
    ):
        if not MPI.Is_initialized():
            raise RuntimeError(
                "MPI is not started in a process that multiprocessing started, as it is none of the ranks: make the "
                "Topology in the program's main process"
            )
        if not (comm is None or isinstance(comm, MPI.Intracomm)):
            raise TypeError(f"comm must be an mpi4py communicator of these ranks, not {comm!r}")
        self.world = (MPI.COMM_WORLD if comm is None else comm).Dup()
        if self.world.size > 1 and here.rank.is_process:
            abort_on_exception()
        self.shared, self._rank = shared, here.rank
        self.node = self.world.Split_type(MPI.COMM_TYPE_SHARED, key=self.world.rank)
        try:
            self.agree(_version_error(self.allgather(_versions())))
            self.agree(_group_size_error(group_size, self.node.size))
            known = across_dtype is None or across_dtype in list(ACROSS)
            told = "across_dtype must be bfloat16, int8, int4 or None"
            self.agree(None if known else f"{told}, not {across_dtype!r}")
            self.across_dtype = None if across_dtype is None else ACROSS[across_dtype]
            known = cuda_aware is None or isinstance(cuda_aware, bool)
            self.agree(None if known else f"cuda_aware must be None, True or False, not {cuda_aware!r}")
            self.cuda_aware = cuda_aware
            settings = self.allgather((group_size, shared, str(self.across_dtype), cuda_aware))
            if len(set(settings)) > 1:
                names = "(group_size, shared, across_dtype, cuda_aware)"
                raise ValueError(f"{names} must be the same on every rank, not {settings}")
        except ValueError:
            self.node.Free()
            self.world.Free()
            raise
        block = 0 if group_size is None else self.node.rank // group_size
        self.group = self.node.Split(block, key=self.node.rank)
        first = self.group.bcast(self.world.rank)  # names the group
        self.groups = _together(self.world.allgather(first))
        self.nodes = _together(self.world.allgather(self.node.bcast(self.world.rank)))
        self.n_groups = len(self.groups)
        self.group_index = next(j for j, ranks in enumerate(self.groups) if self.world.rank in ranks)
        self.across = self.world.Split(self.group.rank, key=self.group_index)
        self._channels: dict[tuple[int, ...], tuple[Channel, Channel]] = {}
        self._users, self._unwanted = 0, False
        self.made = 0  # methods
        self.waits_in_mpi = False  # as one of them needs: who waits for another rank does so inside MPI

    def islands(self, shared: bool) -> list[int]:
        """Of every rank the name of its island: its node's where all its ranks say `shared`, else its own."""
        return self.allgather(self.node.bcast(self.world.rank) if shared else self.world.rank)

    def channels(self, islands: list[int], own: bool = False) -> tuple[Channel, Channel]:
        """The communicators of the world and of the group, made once for all methods; own: for the caller alone."""
        mates = self.groups[self.group_index]

        def make() -> tuple[Channel, Channel]:
            me = self.world.rank
            return Channel(self.world, islands, me), Channel(self.group, [islands[r] for r in mates], me)

        if own:
            return make()
        if tuple(islands) not in self._channels:
            self._channels[tuple(islands)] = make()
        return self._channels[tuple(islands)]

    def node_sum(self, number: int) -> int:
        """Over the ranks of this node. Collective there, as the next one."""
        return self.node.allreduce(number)

    def node_first(self, item: Any) -> Any:
        """What the first rank of this node has."""
        return self.node.bcast(item)

    def agree(self, error: str | None) -> None:
        """Raises the same ValueError on every rank if any rank brings an error: no rank is left behind."""
        errors = self.world.allgather(error)
        told = {e for e in errors if e is not None}
        if told:
            alike = len(told) == 1 and None not in errors
            every = "; ".join(f"rank {r}: {e}" for r, e in enumerate(errors) if e is not None)
            raise Refused(told.pop() if alike else every, quiet=self.world.rank > 0)

    def gather(self, item: Any) -> list[Any] | None:
        """Every rank's item, in rank order, on rank 0; None elsewhere."""
        return self.world.gather(item)

    def allgather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""
        return self.world.allgather(item)

    def broadcast(self, item: Any, root: int = 0) -> Any:
        """The item of rank `root`, on every rank."""
        return self.world.bcast(item, root)

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Rank 0's values, into a tensor of the same shape and type on every rank."""
        if tensor.layout is not torch.strided or tensor.is_quantized:  # there is more to it than its bytes
            tensor.detach().copy_(self.broadcast(tensor.detach().cpu()))
            return
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = values.view(-1).view(torch.uint8).numpy()
        for start in range(0, data.size, _PIECE):  # MPI counts are C ints
            self.world.Bcast(data[start : start + _PIECE])
        if self.world.rank != 0 and values.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(values)

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.world.Barrier()

    def hold(self) -> None:
        """A method uses the communicators."""
        if self._rank is not here.rank:
            raise RuntimeError(
                "this topology is another worker's, or of another run: make the Topology in the worker"
            )
        self._users += 1

    def leave(self) -> None:
        """It does so no more."""
        self._users -= 1
        if self._unwanted:
            self.free()

    def free(self) -> None:
        """Frees the communicators, as soon as no method uses them; the topology is of no use afterwards."""
        self._unwanted = True
        if self._users:
            return
        for channel in (channel for pair in self._channels.values() for channel in pair):
            channel.free()
        for comm in (self.across, self.group, self.node, self.world):
            comm.Free()


_PIECE = 1 << 30  # bytes


def _together(firsts: list[int]) -> list[list[int]]:
    """The ranks that name the same first one."""
    return [[r for r, f in enumerate(firsts) if f == g] for g in sorted(set(firsts))]


def _versions() -> tuple[str, str]:
    """Of mpilsgd and of MPI, without where it was built."""
    try:
        own = importlib.metadata.version("mpilsgd")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        own = "of a checkout"
    return f"mpilsgd {own}", MPI.Get_library_version().splitlines()[0].split(",")[0].strip()


def _version_error(every: list[tuple[str, str]]) -> str | None:
    """What differs between the ranks, which all have to run the same."""
    for versions in zip(*every, strict=True):
        if len(set(versions)) > 1:
            told = "; ".join(f"rank {versions.index(v)} runs {v}" for v in dict.fromkeys(versions))
            return f"{told}: install the same on every node"
    return None


def _group_size_error(group_size: int | None, node_size: int) -> str | None:
    if group_size is None:
        return None
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        return f"group_size must be None or a whole number of at least 1, not {group_size!r}"
    if group_size > node_size:
        return f"group_size={group_size} does not fit: this node has {node_size} rank(s) and a group lies within a node"
    return None
