"""The model as it is trained: on its device, in its memory format, compiled, and seen to give class scores."""

from __future__ import annotations

import textwrap

import torch

from mpilsgd.comm import Topology
from mpilsgd.train import models, precision
from mpilsgd.train.callables import InputError
from mpilsgd.train.config import Config
from mpilsgd.train.data import Dataset
from mpilsgd.train.evaluation import evaluating
from mpilsgd.train.sampling import derived_seed, other_random_numbers


def prepared(
    config: Config, train: Dataset, test: Dataset, topology: Topology, device: torch.device
) -> torch.nn.Module:
    """The model, with the data sets on its device.

    Raises:
        InputError: the model does not fit the data, the device or the options.
    """
    alike = config.method_options.get("init") != "different"
    seed = config.seed if alike else derived_seed(config.seed, "parameters", topology.world.rank)
    model = models.build(config.model, train.input_shape, train.classes, seed)
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
    with evaluating(model), torch.no_grad(), precision.autocast(config.amp, device):
        _check_scores(config, model, train)
        if config.compile:
            with other_random_numbers(config.seed, "compile", topology.world.rank):
                _compile(config, model, train)
    return model


def refuse_channels_last(config: Config, train: Dataset) -> None:
    """An InputError, unless the data are images."""
    if len(train.input_shape) != 3:
        shape = " x ".join(map(str, train.input_shape))
        raise InputError(
            f"channels_last: is for images (channels x height x width); {config.model} is given inputs of {shape} "
            f"from {config.data}"
        )


def _check_scores(config: Config, model: torch.nn.Module, train: Dataset) -> None:
    inputs, _ = train.batch(torch.arange(min(2, len(train))))
    scores = model(inputs)
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(inputs), train.classes):
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise InputError(
            f"{config.model}: must give scores of shape (batch, classes) = {(len(inputs), train.classes)}, gave {found}"
        )


def _compile(config: Config, model: torch.nn.Module, train: Dataset) -> None:
    """In place: the module stays the same object, with the same names in its state.

    Module.compile() would do nothing here to a torch.nn.Sequential (torch 2.13), and say nothing.
    """
    inputs, _ = train.batch(torch.arange(min(config.batch_size, len(train))))  # the shape of training
    try:
        model.forward = torch.compile(model.forward)
        model(inputs)
    except Exception as error:  # of the compiler, which has many kinds
        told = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise InputError(f"compile: torch cannot compile {config.model} here: {told}") from None
