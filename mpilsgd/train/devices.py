"""Which GPU a rank takes, and how tensors come to a GPU and from it while nobody waits."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mpilsgd.comm import Topology
from mpilsgd.train.callables import InputError

_TOLD = 8  # ranks in a message


class Seen(NamedTuple):
    """What a rank sees: its number on its node, and its GPUs, each by a name that no other GPU has."""

    number: int
    gpus: tuple[str, ...]


def pick(wanted: str, topology: Topology) -> tuple[torch.device, str | None]:
    """This rank's device, and a line for the reader where ranks share GPUs. Collective.

    Raises: InputError on every rank, as of `choose`.
    """
    seen = topology.allgather(Seen(topology.node.rank, () if wanted == "cpu" else _visible()))
    chosen = choose(wanted, seen)
    index = chosen[topology.world.rank]
    if index is None:
        return torch.device("cpu"), None
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device, sharing([one.gpus[i or 0] for one, i in zip(seen, chosen, strict=True)])


def choose(wanted: str, seen: Sequence[Seen]) -> list[int | None]:
    """Which of the GPUs that it sees each rank takes; None: all take the CPU.

    A launcher may show all ranks of a node the same GPUs, or each rank one of its own: that one is number 0 then.

    Raises:
        InputError: a GPU is asked for and there is none, or some ranks have one and others have not.
    """
    having = [rank for rank, one in enumerate(seen) if one.gpus and wanted != "cpu"]
    if not having:
        if wanted == "cuda":
            raise InputError("device=cuda: torch finds no GPU here")
        return [None] * len(seen)
    if len(having) < len(seen):
        without = [rank for rank, one in enumerate(seen) if not one.gpus]
        raise InputError(
            f"device={wanted}: torch finds a GPU on {_ranks(having)}, but none on {_ranks(without)}: "
            "give every rank one, or take --device cpu"
        )
    return [one.number % len(one.gpus) for one in seen]


def sharing(taken: Sequence[str]) -> str | None:
    """A line for the reader, if the same GPU is named by several ranks."""
    users = collections.Counter(taken)
    most = max(users.values())
    if most == 1:
        return None
    return f"{len(taken)} ranks share {len(users)} GPU(s) in turn: up to {most} ranks on one"


def _ranks(ranks: Sequence[int]) -> str:
    told = ", ".join(map(str, ranks[:_TOLD])) + (", ..." if len(ranks) > _TOLD else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {told}"


def _visible() -> tuple[str, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this rank."""
    if not torch.cuda.is_available():
        return ()
    mine = f"{os.uname().nodename} {os.environ.get('CUDA_VISIBLE_DEVICES')}"  # torch before 2.4 tells no uuid
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(str(getattr(one, "uuid", f"{mine} {index}")) for index, one in enumerate(properties))


# What a GPU does is queued on a stream


def queued(device: torch.device) -> bool:
    """Whether work is queued there: whoever asks for a number waits for all that was queued before it."""
    return device.type == "cuda"


def event(timed: bool = False) -> Any:
    """To be recorded behind what is queued on the current stream: passed when that is done."""
    return torch.cuda.Event(enable_timing=timed, blocking=not timed)


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there; to a GPU through pinned memory, in the order of the stream."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_host(value: Any) -> Any:
    """A copy of a nested state in the host's memory; of what is on a GPU it is there when the stream has come to it."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return copy.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(on_host, value))
    return value
