"""What must be alike on all ranks before the first step."""

from __future__ import annotations

from typing import Any

import torch

from mpilsgd.comm import Topology
from mpilsgd.flat import FlatParameters, digest


def check_equal(
    topology: Topology, method: str, parameters: list[Any], buffers: list[Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Raises a ValueError on every rank if the ranks' models or settings differ. Collective.

    Returns: method, settings, number of workers and a digest of the model: what makes a run of the method another.
    """
    error, model = None, ""
    try:
        model = digest(parameters, buffers)
    except ValueError as wrong:
        error = str(wrong)
    topology.agree(error)
    told = {k: "a callable" if callable(v) else v for k, v in settings.items()}
    rows = topology.allgather((model, str(sum(p.numel() for p in parameters)), method, told))
    for r, row in enumerate(rows):
        if row[0] != rows[0][0]:
            raise ValueError(
                f"the models differ: rank {r} has {row[1]} parameters in another number, shape, dtype or "
                f"order than rank 0 with {rows[0][1]}"
            )
        if row[2:] != rows[0][2:]:
            raise ValueError(f"the settings differ: rank 0 has {rows[0][2:]}, rank {r} has {row[2:]}")
    layout = {
        "nodes": topology.allgather(topology.node.rank),
        "groups": topology.groups,
        "shared": topology.shared,
    }
    return {"method": method, "workers": len(rows), "layout": layout, "model": model, "settings": told}


def broadcast_rest(topology: Topology, modules: list[torch.nn.Module], flat: FlatParameters) -> None:
    """Rank 0's frozen parameters and other buffers of the modules, which no round exchanges. Collective."""
    exchanged = {id(t) for t in [*flat.parameters, *flat.buffers]}
    rest = [t for m in modules for t in [*m.parameters(), *m.buffers()] if id(t) not in exchanged]
    values = topology.broadcast([t.detach().cpu() for t in rest])
    fits = [t.shape for t in rest] == [v.shape for v in values]
    topology.agree(None if fits else "the frozen parameters or buffers have other shapes than on rank 0")
    for t, value in zip(rest, values, strict=True):
        t.detach().copy_(value)
