"""`mpilsgd simulate`: the training job on workers of one process, under a virtual clock."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mpilsgd.comm import Topology, WorkerFailed
from mpilsgd.simulation import Died, Network, Simulated, lognormal, simulate, stragglers
from mpilsgd.train import optimizers, problem
from mpilsgd.train.callables import InputError
from mpilsgd.train.command_line import ConfigError, parse
from mpilsgd.train.config import Config, default_output
from mpilsgd.train.display import Display, closing, duration, opening, size
from mpilsgd.train.job import make_method
from mpilsgd.train.loop import Trainer
from mpilsgd.train.prepare import prepared, sampler_of
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.samples import Dataset
from mpilsgd.train.sampling import derived_seed
from mpilsgd.train.stopping import AtEvents, Signals
from mpilsgd.train.stragglers import Slowdown, parse_slow
from mpilsgd.train.task import Task
from mpilsgd.train.together import BAD_INPUT, FAILED, Stopped, on_first

_UNIT = {"k": 1e3, "M": 1e6, "G": 1e9, "": 1.0}


def main(argv: Sequence[str]) -> int:
    """Runs `mpilsgd simulate` with these arguments; returns the exit status."""
    own, rest = _parser().parse_known_args(list(argv))
    try:
        config = parse(rest)
        _check(config, own.workers)
        return _run(own, config, shlex.join(["mpilsgd", "simulate", *argv]))
    except ConfigError as error:
        reason, status = "\n  ".join(["the configuration is refused:", *error.mistakes]), BAD_INPUT
    except (InputError, ValueError) as error:
        reason, status = str(error), BAD_INPUT
    except Died as died:
        cause = f" (then {died.__cause__})" if died.__cause__ is not None else ""
        reason, status = f"{died}{cause}; its run directory holds the evaluations before", FAILED
    except WorkerFailed as failure:
        if not isinstance(failure.__cause__, Stopped | ValueError):
            raise
        reason, status = str(failure.__cause__), getattr(failure.__cause__, "status", BAD_INPUT)
    sys.stdout.flush()
    print(f"mpilsgd simulate: error: {reason}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpilsgd simulate",
        usage="mpilsgd simulate [CONFIG.yaml] [--workers N] [--nodes N] [--option value ...]",
        allow_abbrev=False,
        description="Trains as `mpiexec -n WORKERS mpilsgd train` would, with all workers in this one process and "
        "without MPI. What is computed is real; time is not: it passes as it would on the cluster that the options "
        "below describe. The run directory is that of `mpilsgd train`, with the cluster's seconds, and `mpilsgd "
        "report` draws it. The same options give the same run. Defaults are in [brackets].",
        epilog="All options of `mpilsgd train` may follow (--method, --lr, --steps, --slow, --output, ...; see "
        "`mpilsgd train --help`), but --resume, and the workers compute on the CPU. --slow 2:3 makes rank 2 "
        "three times as slow. Example: mpilsgd simulate --workers 8 --nodes 4 --bandwidth 125M --method EASGD "
        "--asynchronous --period 10 --epochs 5",
    )
    add = parser.add_argument
    add("--workers", type=int, default=4, metavar="N", help="ranks [4]")
    add("--nodes", type=int, default=1, metavar="N", help="they lie on so many nodes, in blocks [1]")
    add(
        "--bandwidth",
        type=_bytes,
        default=1.25e9,
        metavar="B",
        help="bytes a second of a node's link, each way: 125M [1.25G]",
    )
    add("--latency", type=float, default=2e-5, metavar="S", help="seconds from node to node [2e-5]")
    add(
        "--memory",
        type=_bytes,
        default=1e10,
        metavar="B",
        help="bytes a second at which a rank reads on its node [10G]",
    )
    add(
        "--compute",
        default="0.01",
        metavar="S",
        help="seconds of a step: a number; MEAN:SIGMA, drawn anew for each (log-normal); or measured: what it takes "
        "here, which is never twice the same [0.01]",
    )
    add(
        "--die",
        action="append",
        default=[],
        metavar="RANK:S",
        help="the rank dies at this second; may be repeated",
    )
    return parser


def _bytes(text: str) -> float:
    unit = text[-1:] if text[-1:] in _UNIT else ""
    return float(text.removesuffix(unit)) * _UNIT[unit]


def _check(config: Config, workers: int) -> None:
    if config.resume or config.device == "cuda":
        raise InputError("neither --resume nor --device cuda goes with mpilsgd simulate")
    absent = [rank for rank in parse_slow(config.slow).ranks if rank >= workers]
    if absent:
        raise InputError(f"slow: there is no rank {absent[0]}; the ranks are 0 to {workers - 1}")


def compute_of(text: str, slowdown: Slowdown, seed: int) -> Any:
    """What the options say of the seconds of a step."""
    compute: Any = text
    if text != "measured":
        mean, _, sigma = text.partition(":")
        try:
            compute = lognormal(float(mean), float(sigma)) if sigma else float(mean)
        except ValueError:
            raise InputError(f"compute must be S, MEAN:SIGMA or measured, not {text!r}") from None
    if not slowdown:
        return compute
    return stragglers(lambda rank, step: slowdown.factor(seed, rank, step), compute)


def _deaths(texts: Sequence[str]) -> dict[int, float]:
    try:
        return {int(rank): float(when) for rank, _, when in (text.partition(":") for text in texts)}
    except ValueError:
        raise InputError(f"die must be RANK:SECONDS, not {', '.join(texts)}") from None


def _run(own: argparse.Namespace, config: Config, command: str) -> int:
    config.output = config.output or default_output(config)
    compute = compute_of(own.compute, parse_slow(config.slow), config.seed)
    network = Network(own.bandwidth, own.latency, own.memory)
    deaths = _deaths(own.die)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # the tasks share the sets, and with them their readers: none beside this process
    task, train_set, test_set = problem.load(dataclasses.replace(config, workers=0))
    directory = RunDirectory(config.output)
    cluster = {"nodes": own.nodes, "compute": own.compute, **dataclasses.asdict(network)}
    found = simulate(
        lambda: train(config, task, train_set, test_set, directory, cluster, command),
        own.workers,
        seed=config.seed,
        nodes=own.nodes,
        compute=compute,
        network=network,
        deaths=deaths,
        patience=600.0,
    )
    print(_told(found, str(directory.path)))
    return 0


def _told(found: Simulated[Any], directory: str) -> str:
    busiest = f"{size(max(found.sent))} out, {size(max(found.received))} in"
    lines = [
        closing(found.results[0] or {}, directory),
        "",
        f"on this cluster  {duration(max(found.seconds))} from start to end; evaluations take no time",
        f"busiest link     {busiest}",
        "",
        str(found),
    ]
    return "\n".join(lines)


def train(
    config: Config,
    task: Task,
    train_set: Dataset,
    test_set: Dataset,
    directory: RunDirectory,
    cluster: dict[str, Any],
    command: str = "",
) -> dict[str, Any]:
    """The job of one worker: `job` without what belongs to processes. Gives the summary. Collective."""
    topology = Topology(group_size=config.group_size, shared=config.shared, across_dtype=config.across_dtype)
    size, rank = topology.world.size, topology.world.rank
    model = prepared(config, task, train_set, test_set, topology, torch.device("cpu"))
    opt = make_method(config, topology, optimizers.build(config, model.parameters()), model)
    sampler = sampler_of(config, train_set, opt, topology)
    on_first(topology, directory.claim, config.text(), config.overwrite, False, 0, command)
    torch.manual_seed(derived_seed(config.seed, "dropout", rank))
    total = config.steps if config.steps is not None else (config.epochs or 0) * sampler.batches
    display = Display(rank, total, sampler.batches)
    parameters = sum(p.numel() for p in model.parameters())
    threads = torch.get_num_threads()
    display.say(opening(config, size, topology.groups, threads, train_set.samples, parameters))
    trainer = _Trainer(
        config, topology, task, model, opt, train_set, test_set, sampler, directory, display, total
    )
    trainer.cluster = cluster
    trainer.journal.open_log(config.log)
    summary = trainer.run()
    opt.close()
    topology.free()
    return summary


class _Trainer(Trainer):
    """Without signals and checkpoints; ranks are slow by the clock, and do not sleep."""

    cluster: dict[str, Any]

    def run(self) -> dict[str, Any]:
        self.slowdown = Slowdown()
        self.display.close()  # a bar goes by seconds that pass here
        self.model.train()
        self._signals, self._stop = Signals(), AtEvents()
        self._train(collections.deque(self._events()))
        return self._finish()

    def _save(self, name: int) -> None:
        self._sealed = name

    def _summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        peak = [nbytes // self.size for nbytes in summary["peak_memory"]]  # of one process
        return {**summary, "peak_memory": peak, "simulated": self.cluster}
