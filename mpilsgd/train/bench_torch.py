"""torch.distributed beside MPI, for benchmarks: gloo on the host, NCCL on GPUs."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mpilsgd.comm import Topology

_PATIENCE = datetime.timedelta(seconds=60)


@contextmanager
def process_group(topology: Topology, backend: str, trouble: str = "") -> Iterator[tuple[bool, str]]:
    """Starts it with "gloo" or "nccl"; (whether it started, why not). Collective.

    trouble: why it need not be tried, the same on all ranks.
    """
    one_node = topology.node.size == topology.world.size
    trouble = trouble or _missing(backend)
    store: Any = None
    port = 0
    host = "127.0.0.1" if one_node else topology.broadcast(socket.gethostname())
    if one_node:  # a host name that does not resolve stops gloo
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if topology.world.rank == 0 and not trouble:
        try:
            store = torch.distributed.TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE
            )
            port = store.port
        except RuntimeError as error:
            trouble = _first_line(error)
    common, port = topology.broadcast((trouble, port))
    started, trouble = False, ""
    if not common:
        try:
            if store is None:
                store = torch.distributed.TCPStore(host, port, is_master=False, timeout=_PATIENCE)
            torch.distributed.init_process_group(
                backend,
                store=store,
                rank=topology.world.rank,
                world_size=topology.world.size,
                timeout=_PATIENCE,
            )
            started = True
            if backend == "nccl":  # which connects when it is used
                torch.distributed.all_reduce(torch.zeros(1, device="cuda"))
        except RuntimeError as error:
            trouble = _first_line(error)
    told = topology.allgather(trouble)
    trouble = common or next((f"rank {rank}: {text}" for rank, text in enumerate(told) if text), "")
    try:
        yield started and not trouble, trouble
    finally:
        topology.barrier()
        if started:
            torch.distributed.destroy_process_group()


def _missing(backend: str) -> str:
    if not torch.distributed.is_available() or not getattr(torch.distributed, f"is_{backend}_available")():
        return f"this torch has no {backend}"
    return "torch.distributed is in use" if torch.distributed.is_initialized() else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
