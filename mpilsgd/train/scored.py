"""The forecast that a run is given at its end, beside what was measured: how far `mpilsgd plan` can be trusted here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpilsgd.comm import Topology, here
from mpilsgd.devices import on_host
from mpilsgd.methods import Method
from mpilsgd.plan import Machine, Seen, Sizes, forecast, look, measure

_SECONDS = 0.1  # to measure for


def scored(
    topology: Topology, opt: Method, rows: Sequence[dict[str, Any]]
) -> dict[str, dict[str, list[float]]]:
    """Under "forecast", by name: what follows from the machine as it is now and the steps' own seconds, and what the
    run measured.

    step_s: seconds of a step, all included; round_s: of an exchange without waiting for others; bytes_group,
    bytes_across: of the whole run. Nothing where ranks do not talk, are no processes, compute on
    GPUs or in groups that are no nodes, or where a setting is code.
    rows: of every rank its progress and metrics. Collective.
    """
    computing = [row for row in rows if row["step"]]
    rounds = sum(row["rounds"] for row in rows)
    alone = topology.world.size == 1 or not here.rank.is_process or topology.groups != topology.nodes
    settings = {name: getattr(opt, name) for name in opt.fields if name != "score"}
    code = any(map(callable, settings.values()))  # the user's own, which may do anything
    if alone or code or not rounds or not computing or not on_host(opt.device):
        return {}
    sizes = Sizes(opt.n, topology.across_dtype)
    machine = measure(topology, sizes.stored(), _SECONDS)
    if topology.world.rank:
        return {}
    try:
        return _scored(look(type(opt), settings, min(machine.nodes, 2)), opt, sizes, machine, rows)
    except Exception:  # of a rule that goes by what it finds in a real run
        return {}


def _scored(
    seen: Seen, opt: Method, sizes: Sizes, machine: Machine, rows: Sequence[dict[str, Any]]
) -> dict[str, dict[str, list[float]]]:
    computing, rounds = [row for row in rows if row["step"]], sum(row["rounds"] for row in rows)
    steps = sum(row["step"] for row in computing) / len(computing)
    own = sum(row["compute"] + row["data"] for row in computing) / sum(row["step"] for row in computing)
    found = forecast(seen, sizes, machine, own)
    told = {
        "step_s": [found.step_s, sum(row["wall"] for row in computing) / steps / len(computing)],
        "bytes_group": [found.group * steps, sum(row["bytes_group"] for row in rows)],
        "bytes_across": [found.across * steps, sum(row["bytes_across"] for row in rows)],
    }
    if seen.kind != "edges":  # whose rounds are messages
        spent = sum(row["comm"] - row["wait"] for row in rows)
        told["round_s"] = [found.mean_round_s, spent / rounds]
    return {"forecast": told}
