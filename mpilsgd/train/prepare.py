"""The model as it is trained: on its device, compiled, and seen to fit the task; and which batches it is given."""

from __future__ import annotations

import re
import textwrap
import traceback

import torch

from mpilsgd.comm import Topology
from mpilsgd.methods import Method
from mpilsgd.train import precision
from mpilsgd.train.callables import InputError
from mpilsgd.train.config import Config
from mpilsgd.train.evaluation import evaluating
from mpilsgd.train.samples import Batch, Dataset, moved
from mpilsgd.train.sampling import Sampler, StreamSampler, derived_seed, other_random_numbers
from mpilsgd.train.task import Task

_OURS = re.compile(r"[/\\](torch|mpilsgd)[/\\]")  # code that is not the user's


def prepared(
    config: Config, task: Task, train: Dataset, test: Dataset, topology: Topology, device: torch.device
) -> torch.nn.Module:
    """The model, with the data sets on its device.

    Raises:
        InputError: the model does not fit the data, the task, the device or the options.
    """
    alike = config.method_options.get("init") != "different"
    seed = config.seed if alike else derived_seed(config.seed, "parameters", topology.world.rank)
    with other_random_numbers(config.seed, "trial", topology.world.rank):
        first = train.first()
        task.check(first, None)
    model = task.model(config, train, first, seed)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"{config.model}: has no trainable parameter")
    wrong = precision.unfit(config.amp, device, model)
    if wrong is not None:
        raise InputError(wrong)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for data in (train, test):
        data.to(device)
    with (
        other_random_numbers(config.seed, "trial", topology.world.rank),
        evaluating(model),
        precision.autocast(config.amp, device),
    ):
        _try(config, task, model, moved(first, device))
        if config.compile:
            with torch.no_grad():
                _compile(config, model, train, first)
    return model


def _try(config: Config, task: Task, model: torch.nn.Module, batch: Batch) -> None:
    """The task's trial. What the user's code raises there is of the same kind."""
    try:
        task.trial(config, model, batch)
    except InputError:
        raise
    except Exception as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if not _OURS.search(f.filename)]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        told = textwrap.shorten(str(error) or "no reason given", 300)
        raise InputError(
            f"{config.task or config.model}: model, data and loss do not fit: {type(error).__name__}: {told}{where}"
        ) from None


def sampler_of(config: Config, train: Dataset, opt: Method, topology: Topology) -> Sampler | StreamSampler:
    """Which batches this worker takes. An InputError says why there are none. Collective."""
    seat = opt.workers.index(topology.world.rank) if opt.computes else 0
    workers = len(opt.workers)
    if not train.streamed:
        return Sampler(
            config.sampling, len(train), config.batch_size, seat, workers, config.seed, config.accumulate
        )
    offset, stride = (seat, workers) if train.whole else (0, 1)
    lengths = topology.allgather(train.samples)
    if opt.buffers == "recalibrate":
        raise InputError("buffers=recalibrate: needs a data set with __getitem__; this one is iterable")
    if not train.whole and workers < topology.world.size:
        raise InputError(
            "the training set gives every rank its own part, and some ranks do not compute: let it be the whole set"
        )
    if config.sampling != "partition":
        raise InputError(f"sampling={config.sampling}: an iterable data set is partitioned")
    if None in lengths:
        if config.steps is None:
            raise InputError("epochs: the training set is iterable and has no len(): give --steps instead")
        batches = config.steps
    else:
        batches = min(lengths) // stride // (config.batch_size * config.accumulate)
    if batches < 1:
        raise InputError(
            f"batch_size={config.batch_size} cannot be filled: the set has {min(lengths)} samples"
        )
    return StreamSampler(batches, config.batch_size, seat, offset, stride, config.seed, config.accumulate)


def _compile(config: Config, model: torch.nn.Module, train: Dataset, first: Batch) -> None:
    """In place: the module stays the same object, with the same names in its state.

    Module.compile() would do nothing here to a torch.nn.Sequential (torch 2.13), and say nothing.
    """
    try:
        model.forward = torch.compile(model.forward)
        if not train.streamed and isinstance(first, tuple | list):
            inputs = train.batch(torch.arange(min(config.batch_size, len(train))))[0]  # the shape of training
            model(inputs)
    except Exception as error:  # of the compiler, which has many kinds
        told = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise InputError(f"compile: torch cannot compile {config.model} here: {told}") from None
