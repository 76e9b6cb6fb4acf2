"""What must be alike on all ranks before the first step."""

from __future__ import annotations

from typing import Any

import torch

from mpilsgd.comm import Topology
from mpilsgd.comm.mpi import here
from mpilsgd.flat import FlatParameters, check_free
from mpilsgd.layout import Plan, canonical, first_difference


def laid_out(
    topology: Topology,
    parameters: list[torch.Tensor],
    buffers: list[torch.Tensor],
    modules: list[torch.nn.Module],
) -> Plan:
    """Where the tensors will lie, the same on every rank, whatever the order of the optimizer's groups. Collective.

    Raises a ValueError on every rank if any rank's model cannot be laid out, or differs from rank 0's.
    """
    error, plan = None, None
    try:
        ordered, names = canonical(parameters, modules)
        plan = Plan(ordered, buffers, names)
        check_free(plan)
    except ValueError as wrong:
        error = str(wrong)
    topology.agree(error)
    assert plan is not None
    if not here.rank.is_process:
        every = [own for ids in topology.allgather({id(p) for p in parameters}) for own in ids]
        if len(set(every)) < len(every):
            topology.agree(
                "the workers share parameters: make the model inside the worker function, for each its own"
            )
    models = topology.allgather(plan.digest())
    if len(set(models)) > 1:
        every = topology.allgather(plan.described())
        other = next(r for r, model in enumerate(models) if model != models[0])
        topology.agree(f"the models differ: {first_difference(every[0], every[other], other)}")
    return plan


def agreed(topology: Topology, method: str, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Raises a ValueError on every rank if the ranks' settings differ. Collective.

    Returns: method, settings, number of workers and a digest of the model: what makes a run of the method another.
    """
    told = {k: "a callable" if callable(v) else v for k, v in settings.items()}
    rows = topology.allgather({"method": method, **told})
    for r, row in enumerate(rows):
        unequal = [
            f"{k} is {rows[0].get(k)!r} on rank 0 and {row.get(k)!r} on rank {r}"
            for k in {**rows[0], **row}
            if rows[0].get(k) != row.get(k)
        ]
        if unequal:
            topology.agree("the settings differ: " + ", ".join(unequal))
    layout = {
        "nodes": topology.allgather(topology.node.rank),
        "groups": topology.groups,
        "shared": topology.shared,
    }
    return {
        "method": method,
        "workers": len(rows),
        "layout": layout,
        "model": plan.digest(),
        "settings": told,
    }


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
