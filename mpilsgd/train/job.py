"""`mpilsgd train`: everything before and after the training loop, on all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from mpilsgd.comm import Heartbeat, Topology, end_job, inquiry
from mpilsgd.methods import EASGDTree, Method
from mpilsgd.train import devices, optimizers, problem
from mpilsgd.train.callables import InputError
from mpilsgd.train.command_line import ConfigError, parse
from mpilsgd.train.config import FIELDS, Config, default_output
from mpilsgd.train.display import Display, after_interrupt, closing, command_of, opening
from mpilsgd.train.loop import Trainer
from mpilsgd.train.options import enlist, keyword_arguments, method_options, methods, names_of, required
from mpilsgd.train.outlet import lasting_output
from mpilsgd.train.prepare import prepared, sampler_of
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.sampling import derived_seed
from mpilsgd.train.stopping import no_silent_exit
from mpilsgd.train.stragglers import parse_slow
from mpilsgd.train.together import FAILED, TO_BE_RESUMED, Stopped, all_here, on_first, together
from mpilsgd.train.tree_text import summary_line

_TO_SAY = 2.0  # seconds for rank 0 before another rank ends the job


@lasting_output()
@no_silent_exit()
def main(argv: Sequence[str]) -> int:
    """Runs `mpilsgd train` with these arguments on all ranks; returns the exit status, the same on every rank."""
    base = Topology()
    try:
        status = _main(argv, base)
    except Stopped as stop:
        everyone, status = all_here(base), stop.status
        if base.world.rank == 0 or not everyone:
            sys.stdout.flush()
            sys.stderr.write(f"mpilsgd train: {'' if status == TO_BE_RESUMED else 'error: '}{stop}\n")
            sys.stderr.flush()
        if not everyone:
            base.world.Abort(status)
    except SystemExit as exit:  # of the user's code, perhaps on this rank alone
        end_job(type(exit), exit, exit.__traceback__)
    base.free()
    return status


def _main(argv: Sequence[str], base: Topology) -> int:
    _refuse_singletons(base)
    config, status = _configure(argv, base)
    if config is None:
        return status
    left = _leave_recordings(config)
    topology = Topology(
        group_size=config.group_size,
        shared=config.shared,
        across_dtype=config.across_dtype,
        cuda_aware=config.cuda_aware,
    )
    _set_threads(config.threads, topology)
    size, rank = topology.world.size, topology.world.rank
    task, train, test = together(topology, problem.load, config, rank, size)
    device, shared = _device(config, topology)
    model = together(topology, prepared, config, task, train, test, topology, device)
    try:
        opt = make_method(config, topology, optimizers.build(config, model.parameters()), model)
    except ValueError as error:  # raised on every rank
        raise Stopped(str(error)) from None
    sampler = together(topology, sampler_of, config, train, opt, topology)
    command = command_of(argv, size)
    directory = _directory(config, topology, model, command)
    torch.manual_seed(derived_seed(config.seed, "dropout", rank))
    total = config.steps if config.steps is not None else (config.epochs or 0) * sampler.batches
    display = Display(rank, total, sampler.batches)
    trainer = together(
        topology, Trainer, config, topology, task, model, opt, train, test, sampler, directory, display, total
    )
    parameters = sum(p.numel() for p in model.parameters())
    display.say(opening(config, size, topology.groups, torch.get_num_threads(), train.samples, parameters))
    if shared is not None:
        display.say(shared)
    if isinstance(opt, EASGDTree):
        display.say(f"tree: {summary_line(opt.tree)}, moving_rate={opt.moving_rate:.3g}")
    if config.resume:
        _resume(config, trainer, directory, topology, display, command)
    trainer.journal.open_log(config.log)
    if left:
        display.say(f"resumed without {' and '.join(left)}, which are of whole runs")
    heartbeat = Heartbeat(topology, config.patience)
    trainer.tell = heartbeat.at
    try:
        summary = trainer.run()
    except Stopped as stop:
        if stop.status == TO_BE_RESUMED:  # on every rank
            heartbeat.free()
            opt.close()
            topology.free()
        raise
    except InputError as error:  # of data that are read as they are needed; perhaps on this rank alone
        raise Stopped(str(error)) from None
    except KeyboardInterrupt:
        with contextlib.suppress(Exception):  # an output that is closed, for one
            if rank:
                time.sleep(_TO_SAY)
            elif (step := directory.saved_step()) is not None:
                sys.stderr.write(after_interrupt(str(directory.path), step, size))
        raise
    finally:
        heartbeat.stop()
    heartbeat.free()
    display.say(closing(summary, str(directory.path)))
    try:
        opt.close()
    except ValueError as error:  # raised on every rank: a recording that cannot be written, for one
        raise Stopped(str(error), FAILED) from None
    topology.free()
    return 0


def _refuse_singletons(base: Topology) -> None:
    """A launcher that is not the MPI's: every process believes to be alone."""
    told = inquiry.apart(base.world.size)
    if told is not None:
        raise Stopped(told)


def _configure(argv: Sequence[str], base: Topology) -> tuple[Config | None, int]:
    """Rank 0 reads the configuration, all check what depends on the ranks. (None, status): the job ends here, well."""
    config: Config | None = None
    mistakes: list[str] = []
    status = 0
    if base.world.rank == 0:
        try:
            config = parse(argv)
            config.output = config.output or default_output(config)
        except ConfigError as error:
            config, mistakes = error.config, error.mistakes
        except SystemExit as exit:
            status = int(exit.code or 0)
    config, mistakes, status = base.broadcast((config, mistakes, status))
    if config is not None:
        together(base, enlist, config.method)
        mistakes += _mistakes_of_ranks(config, base)
    if mistakes:
        raise Stopped("\n  ".join(["the configuration is refused:", *mistakes, "(mpilsgd train --help)"]))
    return config, status


def _mistakes_of_ranks(config: Config, base: Topology) -> list[str]:
    """What the topology and the method have against their arguments, tried on a small model. Collective."""
    mistakes = []
    if config.group_size is None or config.group_size >= 1:
        try:
            Topology(group_size=config.group_size).free()
        except ValueError as error:
            mistakes.append(str(error))
    with contextlib.suppress(ValueError):  # which is told already
        absent = [rank for rank in parse_slow(config.slow).ranks if rank >= base.world.size]
        mistakes += [
            f"slow: there is no rank {rank}; the ranks are 0 to {base.world.size - 1}" for rank in absent
        ]
    if config.method in methods() and _is_complete(config):
        fragments = config.method_options.get("fragments") or 1
        trial = torch.nn.Linear(1, max(1, min(fragments, 1 << 16)))  # one parameter each at least
        unrecorded = dataclasses.replace(
            config, method_options={**config.method_options, **dict.fromkeys(_recordings(config))}
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the real one will say it
                make_method(unrecorded, base, torch.optim.SGD(trial.parameters(), lr=0.1), trial).close()
        except ValueError as error:
            mistakes += str(error).split("; ")
    return mistakes


def _is_complete(config: Config) -> bool:
    needed = required(config.method, method_options(FIELDS))
    return all(key in config.method_options for key in needed)


def _recordings(config: Config) -> list[str]:
    return [key for key in ("record", "replay") if config.method_options.get(key) is not None]


def _leave_recordings(config: Config) -> list[str]:
    """A run that is resumed is neither recorded nor replayed: a recording is of a whole run."""
    left = _recordings(config) if config.resume else []
    for key in left:
        del config.method_options[key]
    return left


def make_method(
    config: Config, topology: Topology, optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> Method:
    """Collective; ValueError on every rank if an argument is wrong on any."""
    options = method_options(FIELDS)
    own = names_of(config.method, options)
    given = {key: value for key, value in config.method_options.items() if key in own}
    arguments = together(topology, keyword_arguments, given, options)
    make: Any = methods()[config.method]
    return make(optimizer, topology, model=model, **arguments)


def _set_threads(threads: int | None, topology: Topology) -> None:
    """Gives this rank its threads: those asked for, those of OMP_NUM_THREADS, or its share of the node's cores."""
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    everyone = topology.node.allgather(cores)
    if threads is not None:
        torch.set_num_threads(threads)
    elif not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(fair_share(cores, everyone))


def fair_share(cores: Sequence[int], everyone: Sequence[Sequence[int]]) -> int:
    """This rank's part of the cores it may run on, each divided among all the ranks that may; at least 1."""
    parts = sum(1 / max(1, sum(core in others for others in everyone)) for core in cores)
    return max(1, int(parts + 1e-9))


def _device(config: Config, topology: Topology) -> tuple[torch.device, str | None]:
    try:
        return devices.pick(config.device, topology)
    except InputError as error:  # raised on every rank
        raise Stopped(str(error)) from None


def _directory(config: Config, topology: Topology, model: torch.nn.Module, command: str) -> RunDirectory:
    """The run directory, seen to be writable from every rank and to have room for the checkpoints."""
    assert config.output is not None
    directory = RunDirectory(config.output)
    nbytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())

    vectors = 3 if config.optimizer in ("Adam", "AdamW") else 2 if config.momentum else 1
    if config.across_dtype in ("int8", "int4") and (len(topology.nodes) > 1 or not config.shared):
        vectors += 2  # what is kept of what travels
    copies = 1 if config.resume else 2  # old and new files are both there for a while
    need = (
        copies * vectors * nbytes * topology.world.size + 3 * nbytes
    )  # and the centre; the best one, old and new
    on_first(topology, directory.claim, config.text(), config.overwrite, bool(config.resume), need, command)
    together(topology, directory.probe)
    return directory


def _resume(
    config: Config,
    trainer: Trainer,
    directory: RunDirectory,
    topology: Topology,
    display: Display,
    command: str,
) -> None:
    """Goes back to the last finished checkpoint, or to the start if there is none."""
    step = together(topology, directory.sealed_step, topology.world.size)
    if step is not None:
        state = together(topology, directory.load, topology.world.rank, step)
        try:
            trainer.restore(state, step)
        except ValueError as error:  # raised on every rank
            raise Stopped(f"{directory.path}: {error}") from None
    trainer.resume()
    on_first(topology, directory.begin, config.text(), True, command)
    done = step is not None and step >= trainer.total
    left = ", which is its end: nothing is left to do" if done else ""
    display.say(
        f"resumed at step {step}{left}" if step is not None else "no finished checkpoint: starting anew"
    )
