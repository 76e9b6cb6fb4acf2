"""`mpilsgd plan`: what exchanges will cost, and which periods keep them cheap."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mpilsgd.comm import NoMPI, Topology, in_process, inquiry
from mpilsgd.plan.advice import METHODS, Advice, advise, at
from mpilsgd.plan.costs import Sizes
from mpilsgd.plan.machine import Machine, measure
from mpilsgd.train.callables import InputError
from mpilsgd.train.numbers import count, not_negative, positive
from mpilsgd.train.options import enlist, methods
from mpilsgd.train.table import columns, in_bytes, in_ms

_ASSUMED = Machine((1,))
_GIVEN = ("bandwidth", "latency", "memory", "meeting")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd plan`."""
    parser.description = (
        "Says for each method what a round costs on a cluster, and the shortest periods that keep exchanges under a "
        "share of the time. Under a launcher with several ranks it first measures the machine for some seconds: "
        "mpiexec -n 4 mpilsgd plan --parameters 25e6 --step_s 0.2"
    )
    add = parser.add_argument
    add("--parameters", type=count, required=True, metavar="N", help="values in the model, as 25e6")
    add(
        "--step_s",
        "--step-s",
        type=not_negative,
        required=True,
        metavar="S",
        help="seconds of a worker's step alone",
    )
    add(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="(default: float32)",
    )
    add("--ranks", type=count, metavar="P", help="ranks to plan for (default: those that are here)")
    add("--nodes", type=count, metavar="N", help="nodes on which they lie (default: as here)")
    network = parser.add_argument_group("the machine, where it is not measured, or is another one")
    network.add_argument(
        "--bandwidth", type=positive, metavar="B", help="bytes a second of a node's link, each way"
    )
    network.add_argument(
        "--latency", type=not_negative, metavar="S", help="seconds of a small message between nodes"
    )
    network.add_argument(
        "--memory", type=positive, metavar="B", help="bytes a second of a node's memory, all ranks together"
    )
    network.add_argument(
        "--meeting", type=not_negative, metavar="S", help="seconds of a meeting of a node's ranks"
    )
    network.add_argument(
        "--seconds", type=positive, default=10.0, metavar="S", help="to measure for (default: 10)"
    )
    add(
        "--across_dtype",
        "--across-dtype",
        choices=("bfloat16", "int8", "int4"),
        help="how vectors travel between nodes",
    )
    add("--share", type=float, default=0.1, metavar="F", help="of the time, for exchanges (default: 0.1)")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"(default: all) {', '.join(METHODS)}")
    add(
        "--try",
        dest="tried",
        action="append",
        default=[],
        metavar="'METHOD KEY=VALUE ...'",
        help="settings of yours, as they are; may be given several times",
    )
    theory = parser.add_argument_group("rates, for warnings of what theory finds unstable")
    theory.add_argument("--lr", type=positive, metavar="R", help="learning rate of a worker")
    theory.add_argument(
        "--curvature", type=positive, metavar="H", help="largest curvature (eigenvalue of the Hessian)"
    )
    theory.add_argument(
        "--momentum", type=float, default=0.0, metavar="D", help="of each worker (default: 0)"
    )
    add("--picture", metavar="FILE", help="draw the time of a step over the number of nodes into this file")


def run(args: argparse.Namespace) -> int:
    """Measures where several ranks are; rank 0 plans and prints. Exit status 2: an argument is wrong; 1: it failed."""
    try:
        topology = Topology()
    except NoMPI:
        if inquiry.launched_processes(os.environ) is not None:
            raise
        return in_process(lambda: run(args), 1)[0]  # for one rank there is nothing to measure
    status = _refused(args, topology)
    if not status:
        here = None
        if topology.world.size > 1:
            here = measure(topology, args.parameters * getattr(torch, args.dtype).itemsize, args.seconds)
        if topology.world.rank == 0:
            try:
                _plan(args, here)
            except ValueError as error:
                status = _told(str(error), 2)
            except Exception as error:  # the other ranks wait for the status
                status = _told(f"{type(error).__name__}: {error}", 1)
        status = int(topology.broadcast(status))
    topology.free()
    return status


def _refused(args: argparse.Namespace, topology: Topology) -> int:
    """What can be seen to be wrong before anything is measured, on all ranks alike."""
    problem = None
    if not 0 < args.share < 1:
        problem = f"share must lie between 0 and 1, ends excluded, not {args.share}"
    elif (args.lr is None) != (args.curvature is None):
        problem = "--lr and --curvature go together"
    elif args.ranks and not args.nodes and len(topology.nodes) > 1:
        problem = f"--ranks {args.ranks} needs --nodes: on how many nodes they lie"
    else:
        try:
            for text in args.tried:
                _settings(text)
        except ValueError as error:
            problem = str(error)
    if problem is None:
        return 0
    return _told(problem, 2) if topology.world.rank == 0 else 2


def _told(problem: str, status: int) -> int:
    print(f"mpilsgd plan: {problem}", file=sys.stderr)
    return status


def _plan(args: argparse.Namespace, here: Machine | None) -> None:
    machine, told = _machine(args, here)
    sizes = Sizes({getattr(torch, args.dtype): args.parameters}, args.across_dtype)
    print(told)
    found = [_tried(text, sizes, machine, args.step_s) for text in args.tried]
    found += advise(sizes, machine, args.step_s, args.share, args.methods)
    print(_table(found, args.step_s))
    late = [one.name for one in found if one.found is None]
    if late:
        print(f"\nno period keeps exchanges under {args.share:.0%} of the time: {', '.join(late)}")
    held = [one for one in found if one.found and one.found.limit and one.found.share > args.share]
    for one in held:
        assert one.found is not None
        why = (
            "one worker at a time uses a shard" if one.found.limit == "turns" else "the nodes' links are full"
        )
        print(f"{one.name}: held up, as {why}")
    for line in _warnings(args, found, machine):
        print(f"warning: {line}")
    if args.picture:
        from mpilsgd.plan.picture import draw

        print(f"picture: {draw(found, sizes, machine, args.step_s, Path(args.picture))}")


def _warnings(args: argparse.Namespace, found: Sequence[Advice], machine: Machine) -> list[str]:
    if args.lr is None:
        return []
    from mpilsgd.plan.stability import problems

    told = []
    for one in found:
        computing = machine.size if one.found is None else one.found.workers
        wrong = problems(one.method, one.settings, computing, args.lr * args.curvature, args.momentum)
        told += [f"{one.name}: {problem}" for problem in wrong]
    return told


def _machine(args: argparse.Namespace, here: Machine | None) -> tuple[Machine, str]:
    """That for which to plan, and where its numbers are from."""
    given = {name: getattr(args, name) for name in _GIVEN if getattr(args, name) is not None}
    ranks = args.ranks or (here.size if here else 1)
    nodes = args.nodes or (here.nodes if here else 1)
    same = here is not None and (ranks, nodes) == (here.size, here.nodes)
    machine = dataclasses.replace(
        here or _ASSUMED, ranks=here.ranks if here and same else Machine.of(ranks, nodes).ranks, **given
    )
    network = "measured" if here and here.nodes > 1 else "assumed"
    local = "measured" if here else "assumed"
    source = {"bandwidth": network, "latency": network, "memory": local, "meeting": local}
    source |= dict.fromkeys(given, "given")
    if "latency" in given:
        machine = dataclasses.replace(machine, one_sided=None)
    lines = [f"{ranks} ranks on {nodes} node(s)"]
    if nodes > 1:
        lines.append(
            f"link of a node: {in_bytes(machine.bandwidth)}/s ({source['bandwidth']}), {in_ms(machine.latency)} ms a "
            f"message ({source['latency']})"
        )
        if "assumed" in (source["bandwidth"], source["latency"]):
            lines.append(
                "the network is not measured: start this with a launcher on several nodes, or give --bandwidth and "
                "--latency"
            )
    lines.append(
        f"memory of a node: {in_bytes(machine.memory)}/s ({source['memory']}), {in_ms(machine.meeting)} ms a meeting "
        f"of its ranks ({source['meeting']})"
    )
    return machine, "\n".join(lines) + "\n"


def _tried(text: str, sizes: Sizes, machine: Machine, step_s: float) -> Advice:
    """One that the user wrote."""
    name, settings = _settings(text)
    try:
        return at(f"{name} (yours)", methods()[name], settings, sizes, machine, step_s)
    except ValueError as error:
        raise ValueError(f"--try {text!r}: {error}") from None


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    """METHOD KEY=VALUE ..., where the method may be package.module:Class."""
    name, *rest = shlex.split(text) or [""]
    try:
        enlist(name)
    except InputError as error:
        raise ValueError(f"--try {text!r}: {error}") from None
    if name not in methods():
        raise ValueError(f"--try {text!r}: there is no method {name!r}; there are {', '.join(methods())}")
    settings = {}
    for item in rest:
        key, sign, value = item.partition("=")
        if not sign:
            raise ValueError(f"--try {text!r}: {item!r} must be KEY=VALUE")
        settings[key] = yaml.safe_load(value)
    return name, settings


def _table(found: Sequence[Advice], step_s: float) -> str:
    rows = [
        [
            "method",
            "settings",
            "round ms",
            "step ms",
            "exchanges %",
            "a node's link a step",
            "memory a rank",
            "grad/s",
        ]
    ]
    for one in found:
        row = [one.name, _text(one.settings)]
        if one.found is None:
            rows.append([*row, *["-"] * 6])
            continue
        f = one.found
        rows.append(
            [
                *row,
                in_ms(f.round_s),
                in_ms(f.step_s),
                f"{100 * f.share:.1f}",
                in_bytes(f.link),
                in_bytes(f.memory),
                f"{f.workers / f.step_s:.4g}" if f.step_s else "-",
            ]
        )
    return columns(rows)


def _text(settings: dict[str, Any]) -> str:
    hidden = {"asynchronous", "overlap", "rho", "scheme"}
    return " ".join(f"{key}={value}" for key, value in settings.items() if key not in hidden) or "-"
