"""What `mpilsgd plan` forecasts and `mpilsgd.simulate` simulates, beside what a network of emulated hosts takes.

    python -m mpi4py planned.py measure FILE BYTES STEP_S [METHOD ...]    on the ranks that are there; adds to FILE
    python planned.py table FILE                                          simulates the same, prints the table

Workers compute by sleeping, as if each had a device of its own. planned.sh runs both on several networks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mpilsgd
from mpilsgd.methods import EASGDTree
from mpilsgd.plan import Machine, Sizes, forecast, look, measure
from mpilsgd.plan.advice import FORMS
from mpilsgd.simulation import Network, clock
from mpilsgd.train.table import columns

PERIOD, ROUNDS = 6, 6
FORMS_HERE: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (method, {key: PERIOD if key.endswith("period") else value for key, value in settings.items()})
    for name, (method, settings) in FORMS.items()
}
# a full link leaves a tree's messages out, and 100 Mbit/s carries all of these
FORMS_HERE["EASGDTree"] = (EASGDTree, {"period": 60, "upper_period": 60})
FORMS_HERE["ADMM"] = (mpilsgd.ADMM, {"rho": 1.0})
FORMS_HERE["DiLoCo overlap"] = (mpilsgd.DiLoCo, {"period": PERIOD, "overlap": PERIOD - 1})


def train(name: str, numel: int, step_s: float, across: str | None) -> dict[str, float]:
    """One worker: seconds of a step and of a round, and bytes a step, after what happens only at first."""
    method, settings = FORMS_HERE[name]
    topology = mpilsgd.Topology(across_dtype=across)
    weight = torch.nn.Parameter(torch.zeros(numel))
    model = torch.nn.ParameterList([weight])
    opt = method(torch.optim.SGD([weight], lr=0.0), topology, model=model, **settings)
    weight.grad = torch.zeros(numel)

    def up_to(step: int) -> float:
        begin = clock()
        while opt.t < step if opt.computes else not opt.reached(step * len(opt.workers)):
            if opt.computes and not SIMULATED:
                time.sleep(step_s)
            opt.step(loss=float(topology.world.rank))
        return clock() - begin

    period = settings.get("period", 2)
    # what goes on behind the steps takes many rounds, beside which the first and the last one's waiting is little
    behind = method is EASGDTree or "overlap" in settings
    warm, count = 2 * period, (40 if behind else ROUNDS) * period
    up_to(warm)
    opt.settle()
    topology.barrier()
    before = dataclasses.replace(opt.metrics)
    taken = up_to(warm + count)
    opt.settle()  # what overlaps is counted when it has ended
    after = opt.metrics
    result = {
        "step_s": taken / count,
        "spent": after.t_comm - before.t_comm - (after.t_wait - before.t_wait),
        "rounds": after.rounds - before.rounds,
        "group": (after.bytes_group - before.bytes_group) / count,
        "across": (after.bytes_across - before.bytes_across) / count,
        "computes": float(opt.computes),
    }
    opt.close()
    topology.free()
    return result


def alone(topology: mpilsgd.Topology, numel: int, step_s: float) -> float:
    """Seconds of a step without a method, of all ranks at once; the median of the slowest."""
    weight = torch.nn.Parameter(torch.zeros(numel))
    weight.grad = torch.zeros(numel)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    taken = []
    for _ in range(20):
        begin = time.perf_counter()
        time.sleep(step_s)
        optimizer.step()
        taken.append(time.perf_counter() - begin)
    return max(topology.allgather(median(taken)))


def summed(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of all ranks: the median step, a round of a rank that holds rounds, all bytes."""
    rounds = sum(row["rounds"] for row in rows)
    return {
        "step_s": median(row["step_s"] for row in rows if row["computes"]),
        "round_s": sum(row["spent"] for row in rows) / max(rounds, 1),
        "group": sum(row["group"] for row in rows),
        "across": sum(row["across"] for row in rows),
    }


SIMULATED = False


def measured(path: Path, nbytes: int, step_s: float, names: list[str], across: str | None = None) -> None:
    """Runs every method on the ranks that are there, and forecasts it from a measurement of the network."""
    topology = mpilsgd.Topology()
    numel = nbytes // 4
    machine = measure(topology, nbytes, 8.0)
    own = alone(topology, numel, step_s)
    if not topology.world.rank:
        print(f"a step alone {own:.4f} s, {machine}", flush=True)
    for name in names or FORMS_HERE:
        rows = topology.allgather(train(name, numel, step_s, across))
        if topology.world.rank:
            continue
        method, settings = FORMS_HERE[name]
        seen = look(method, settings, 1 if method is EASGDTree else 2)
        sizes = Sizes({torch.float32: numel}, across)
        found = forecast(seen, sizes, machine, own)
        line = {
            "method": name,
            "across": across,
            "ranks": topology.world.size,
            "nodes": len(topology.nodes),
            "bytes": nbytes,
            "compute": own,
            "machine": dataclasses.asdict(machine),
            "measured": summed(rows),
            "planned": {
                "step_s": found.step_s,
                "round_s": found.mean_round_s,
                "group": found.group,
                "across": found.across,
            },
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: step {line['measured']['step_s']:.4f} s, planned {found.step_s:.4f} s", flush=True)
    topology.free()


def simulated(line: dict[str, Any]) -> dict[str, float]:
    """The same under a virtual clock."""
    machine = Machine(**line["machine"])
    network = Network(machine.bandwidth, machine.latency, machine.memory, machine.meeting, shared_memory=True)
    found = mpilsgd.simulate(
        lambda: train(line["method"], line["bytes"] // 4, line["compute"], line["across"]),
        line["ranks"],
        nodes=line["nodes"],
        compute=line["compute"],
        network=network,
    )
    return summed(found.results)


def table(path: Path) -> None:
    """Each method and network: measured, and what was planned and simulated as a ratio to it."""
    global SIMULATED
    SIMULATED = True
    rows = [
        ["network MB/s", "ranks x nodes", "MB", "method", "step ms", "plan", "simulated", "round ms", "plan"]
    ]
    rows[0] += ["simulated", "bytes"]
    for text in path.read_text().splitlines():
        line = json.loads(text)
        here, plan, simulation = line["measured"], line["planned"], simulated(line)
        sent, told = (one["across"] + one["group"] for one in (here, plan))
        # a tree's rounds are messages, and what overlaps goes on behind the steps: no round takes time of its own
        hidden = line["method"] == "EASGDTree" or line["method"].endswith("overlap")
        rows.append(
            [
                f"{line['machine']['bandwidth'] / 1e6:.1f}",
                f"{line['ranks']} x {line['nodes']}",
                f"{line['bytes'] / 1e6:g}",
                line["method"] + (f" {line['across']}" if line["across"] else ""),
                f"{1e3 * here['step_s']:.1f}",
                f"{plan['step_s'] / here['step_s']:.2f}",
                f"{simulation['step_s'] / here['step_s']:.2f}",
                "-" if hidden else f"{1e3 * here['round_s']:.1f}",
                "-" if hidden or not here["round_s"] else f"{plan['round_s'] / here['round_s']:.2f}",
                "-" if hidden or not here["round_s"] else f"{simulation['round_s'] / here['round_s']:.2f}",
                f"{told / sent:.3f}" if sent else "-",
            ]
        )
        print(columns(rows).splitlines()[-1], file=sys.stderr, flush=True)
    print(columns(rows))


if __name__ == "__main__":
    what, file, *rest = sys.argv[1:]
    if what == "table":
        table(Path(file))
    else:
        across = None
        if rest[2:] and rest[2] in ("bfloat16", "int8"):
            across = rest.pop(2)
        measured(Path(file), int(float(rest[0])), float(rest[1]), rest[2:], across)
