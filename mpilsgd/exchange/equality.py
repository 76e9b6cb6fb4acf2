"""What must be alike on all ranks before the first step."""

from __future__ import annotations

from collections.abc import Sequence
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
    rows = topology.allgather((model, {"method": method, **told}))
    models = [row[0] for row in rows]
    if len(set(models)) > 1:
        every = topology.allgather((_listed("parameter", parameters), _listed("buffer", buffers)))
        other = next(r for r, model in enumerate(models) if model != models[0])
        raise ValueError(f"the models differ: {_first_difference(every[0], every[other], other)}")
    first = rows[0][1]
    for r, (_, settings) in enumerate(rows):
        if settings != first:
            unequal = [
                f"{k} is {first.get(k)!r} on rank 0 and {settings.get(k)!r} on rank {r}"
                for k in {**first, **settings}
                if first.get(k) != settings.get(k)
            ]
            raise ValueError("the settings differ: " + ", ".join(unequal))
    layout = {
        "nodes": topology.allgather(topology.node.rank),
        "groups": topology.groups,
        "shared": topology.shared,
    }
    return {"method": method, "workers": len(rows), "layout": layout, "model": model, "settings": told}


def _listed(kind: str, tensors: list[Any]) -> dict[str, str]:
    """Shape and dtype of each, and its strides where they are not the usual ones."""
    return {
        f"{kind} {i}": f"{tuple(t.shape)} {t.dtype}" + ("" if t.is_contiguous() else f" strides {t.stride()}")
        for i, t in enumerate(tensors)
    }


def _first_difference(here: Sequence[dict[str, str]], there: Sequence[dict[str, str]], rank: int) -> str:
    for a, b in zip(here, there, strict=True):
        for name in {**a, **b}:
            if a.get(name) != b.get(name):
                return f"{name} is {a.get(name, 'missing')} on rank 0 and {b.get(name, 'missing')} on rank {rank}"
    return f"other tensors share their memory on rank {rank} than on rank 0"


def broadcast_rest(topology: Topology, modules: list[torch.nn.Module], flat: FlatParameters) -> None:
    """Rank 0's frozen parameters and other buffers of the modules, which no round exchanges. Collective."""
    exchanged = {id(t) for t in [*flat.parameters, *flat.buffers]}
    rest = [t for m in modules for t in [*m.parameters(), *m.buffers()] if id(t) not in exchanged]
    own = [(t.shape, t.dtype) for t in rest]
    fits = own == topology.broadcast(own)
    topology.agree(
        None if fits else "the frozen parameters or buffers are of other shapes or types than rank 0's"
    )
    for t in rest:
        topology.broadcast_tensor(t)
