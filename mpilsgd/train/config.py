"""The configuration of a training job: its options, their defaults, and what their values may be."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from mpilsgd.train import logs
from mpilsgd.train.callables import InputError, is_path, resolve
from mpilsgd.train.data import DATASETS
from mpilsgd.train.models import MODELS
from mpilsgd.train.options import match, method_options, methods, names_of, required, suggestion
from mpilsgd.train.stragglers import parse_slow

OPTIMIZERS = ("SGD", "MSGD", "Adam", "AdamW")
PATH = "package.module:callable"
DEFAULT_EPOCHS = 20
# What may change when a run is resumed: nothing that the state of its checkpoint depends on.
RESUMABLE = (
    "epochs",
    "steps",
    "eval_every",
    "checkpoint_every",
    "threads",
    "data_dir",
    "patience",
    "compile",
    "resume",
    "device",
    "log",
)


_OPTIMIZER, _COURSE = "Optimizer of each worker", "Course of the training"  # titles in the help


def _option(default: Any, group: str, help: str) -> Any:
    metadata = {"group": group, "help": help}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """A training job. Options of the method that were set are in `method_options`."""

    data: str = _option("digits", "Task", f"{', '.join(DATASETS)} or {PATH} (returns training set, test set)")
    data_dir: str = _option("data", "Task", "folder of the data set's files (digits needs none)")
    augment: Literal["auto", "none", "crop", "pad"] = _option(
        "auto",
        "Task",
        "crop: random 28x28 squares, half of them mirrored; pad: 4 pixels around first; auto: crop for cifar10",
    )
    model: str = _option("mlp", "Task", f"{', '.join(MODELS)} or {PATH} (given input_shape, classes)")

    method: str = _option("LSGD", "Method", "how the workers are kept together: {methods}")
    group_size: int | None = _option(None, "Method", "ranks in a group (null: all ranks of a node)")
    across_dtype: Literal["bfloat16", "int8", "int4"] | None = _option(
        None,
        "Method",
        "type in which parameters travel between nodes (null: their own): bfloat16 (half the bytes, rounded), int8 or "
        "int4 (a quarter, an eighth; what is rounded away follows later)",
    )
    shared: bool = _option(
        True, "Method", "exchange parameters through shared memory in a node (false: by messages)"
    )
    cuda_aware: bool | None = _option(
        None,
        "Method",
        "give MPI the GPUs' memory between nodes (null: where it says that it takes it, and a trial agrees)",
    )

    optimizer: str = _option("SGD", _OPTIMIZER, f"{', '.join(OPTIMIZERS)} or {PATH} (given parameters, lr)")
    lr: float = _option(0.1, _OPTIMIZER, "learning rate")
    momentum: float = _option(0.0, _OPTIMIZER, "momentum rate of SGD and MSGD, in [0, 1)")
    nesterov: bool | None = _option(
        None,
        _OPTIMIZER,
        "Nesterov's momentum instead of the heavy ball (null: the optimizer's own default)",
    )
    weight_decay: float = _option(0.0, _OPTIMIZER, "l2 regularisation")
    lr_drops: list[float] = dataclasses.field(
        default_factory=list,
        metadata={"group": _OPTIMIZER, "help": "epochs at which lr is multiplied by lr_drop_factor: 30,40"},
    )
    lr_drop_factor: float = _option(0.1, _OPTIMIZER, "see lr_drops")
    lr_gamma: float = _option(0.0, _OPTIMIZER, "decay of lr with the steps t: lr / (1 + lr_gamma t)^0.5")
    running_average: float | Literal["running"] | None = _option(
        None,
        _OPTIMIZER,
        "evaluate the running average of the iterates: running (the mean of all) or a moving rate",
    )

    sampling: Literal["partition", "shuffle", "replacement"] = _option(
        "partition",
        _COURSE,
        "partition: each worker its own part of a fresh permutation every epoch; shuffle: each the whole set "
        "in its own order; replacement: independent draws",
    )
    batch_size: int = _option(32, _COURSE, "samples a batch and worker")
    epochs: int | None = _option(
        None,
        _COURSE,
        "passes over the training set, by all workers together (by each, if sampling is shuffle); "
        f"{DEFAULT_EPOCHS} unless steps is given",
    )
    steps: int | None = _option(None, _COURSE, "steps of each worker, instead of epochs")
    eval_every: float | str = _option(
        1.0, _COURSE, "epochs between evaluations of the centre (0.5, too), or '200 steps'"
    )
    seed: int = _option(0, _COURSE, "of parameters, sampling and dropout")

    output: str | None = _option(
        None, "Run", "run directory (null: runs/METHOD-MODEL-DATA, with a number if that exists)"
    )
    overwrite: bool = _option(False, "Run", "replace the run that the output directory holds")
    resume: str | None = _option(
        None, "Run", f"continue the run of this directory; may come with {', '.join(RESUMABLE[:8])}"
    )
    checkpoint_every: float | str | None = _option(
        1, "Run", "epochs between checkpoints, or '200 steps' (null: at the start and the end)"
    )
    log: Literal["tensorboard", "wandb", "csv"] | None = _option(
        None, "Run", "write the evaluations in the format of another tool, too (null: to metrics.jsonl alone)"
    )
    threads: int | None = _option(
        None, "Run", "threads a rank (null: OMP_NUM_THREADS, or a fair share of the cores)"
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "Run", "auto: a GPU if there is one")
    amp: Literal["bf16", "fp16"] | None = _option(
        None,
        "Run",
        "forward pass and loss in half precision where torch finds that safe (null: as the parameters are); fp16 "
        "scales the gradients: where one overflows the worker's own step is left out, its exchanges are held",
    )
    channels_last: bool = _option(False, "Run", "lay images and the weights of convolutions channels last")
    compile: bool = _option(False, "Run", "compile the model with torch.compile")
    patience: float = _option(
        300.0,
        "Run",
        "seconds after which a node that nothing is heard of ends the run with its name, and a rank that stands still "
        "while others are further is named",
    )
    slow: str | list[str | int | float] | int | float | None = dataclasses.field(
        default=None,
        metadata={
            "group": "Run",
            "help": "slow ranks down on purpose, by sleeping: 2:3 (rank 2 takes 3 times as long for each gradient), "
            "0:2,2:3 or random:1.5 (every step of every rank by a random factor of this mean)",
        },
    )

    method_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """The configuration as a YAML file that `mpilsgd train` takes."""
        values = dataclasses.asdict(self)
        for key in ("method_options", "resume", "overwrite"):
            values.pop(key)
        return yaml.safe_dump({**values, **self.method_options}, sort_keys=False)

    def mistakes(self) -> list[str]:
        """Everything that is wrong with the values, and corrects the spelling of names."""
        return list(self._mistakes())

    def _mistakes(self) -> Iterator[str]:
        yield from self._name("method", methods(), users=False)
        yield from self._name("optimizer", OPTIMIZERS)
        yield from self._name("model", MODELS)
        yield from self._name("data", DATASETS)
        if self.method in methods():
            options = method_options(FIELDS)
            own = names_of(self.method, options)
            for key in [k for k in self.method_options if k not in own]:
                yield f"{key}: not an option of {self.method}, which has {', '.join(own)}"
            for key in required(self.method, options):
                if key not in self.method_options:
                    yield f"{key}: {self.method} needs it: {options[key].help}"
            for key, value in self.method_options.items():
                if key in options and options[key].takes_code and is_path(value):
                    yield from _unresolved(key, value)
        for name, good, rule in self._rules():
            if not good:
                yield f"{name}: must be {rule}, not {getattr(self, name)!r}"
        if self.epochs is not None and self.steps is not None:
            yield "epochs, steps: give one of them"
        if self.optimizer in ("Adam", "AdamW") and (self.momentum or self.nesterov is not None):
            yield f"momentum, nesterov: {self.optimizer} has neither; they are options of SGD and MSGD"
        if self.optimizer == "SGD" and self.nesterov and not self.momentum:
            yield "nesterov: needs a momentum above 0"
        if self.amp == "fp16" and self.method_options.get("until_grad_norm") is not None:
            yield "amp, until_grad_norm: a gradient that overflows in fp16 has no norm to judge by; take bf16"
        for name in ("eval_every", "checkpoint_every"):
            try:
                parse_every(getattr(self, name))
            except ValueError as error:
                yield f"{name}: {error}"
        if (lacking := logs.problem(self.log)) is not None:
            yield f"log: {lacking}"
        try:
            self.slow = str(parse_slow(self.slow)) or None
        except ValueError as error:
            yield f"slow: {error}"

    def _rules(self) -> list[tuple[str, bool, str]]:
        count = "a whole number of at least 1"
        counts = [
            (name, value is None or value >= 1, count)
            for name in ("group_size", "batch_size", "epochs", "steps", "threads")
            for value in [getattr(self, name)]
        ]
        return [
            *counts,
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("patience", 3 <= self.patience < math.inf, "at least 3 seconds"),
            (
                "momentum",
                0 <= self.momentum < 1 or (self.optimizer == "MSGD" and -1 < self.momentum < 0),
                "in [0, 1)",
            ),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("lr_drops", all(drop > 0 for drop in self.lr_drops), "epochs above 0"),
            ("lr_drop_factor", 0 < self.lr_drop_factor <= 1, "in (0, 1]"),
            ("lr_gamma", 0 <= self.lr_gamma < math.inf, "at least 0"),
            ("seed", 0 <= self.seed < 2**63, "a whole number of at least 0, below 2^63"),
            ("running_average", _is_rate(self.running_average), "running or in (0, 1]"),
        ]

    def _name(self, field: str, names: Any, users: bool = True) -> Iterator[str]:
        name = getattr(self, field)
        known = match(name, names)
        if known is not None:
            setattr(self, field, known)
        elif users and is_path(name):
            yield from _unresolved(field, name)
        else:
            more = f" or {PATH}" if users else ""
            yield f"{field}: {name!r} is not one of {', '.join(names)}{more}{suggestion(name, names)}"


FIELDS = tuple(field.name for field in dataclasses.fields(Config) if "group" in field.metadata)


def parse_every(value: float | str | None) -> tuple[float, str] | None:
    """An interval: "2" or "0.5" are epochs, "200 steps" are steps."""
    if value is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(epochs?|steps?)?\s*", str(value))
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    unit = "steps" if found and (found[2] or "").startswith("step") else "epochs"
    if number <= 0 or not math.isfinite(number) or (unit == "steps" and number % 1):
        raise ValueError(f"must be a number of epochs above 0 or 'N steps', not {value!r}")
    return number, unit


def _unresolved(name: str, path: str) -> Iterator[str]:
    try:
        resolve(path)
    except InputError as error:
        yield f"{name}: {error}"


def _is_rate(value: Any) -> bool:
    return value is None or value == "running" or (isinstance(value, float) and 0 < value <= 1)


def default_output(config: Config) -> str:
    """runs/METHOD-MODEL-DATA, with the first number that is free."""
    parts = [re.sub(r"[^\w.-]+", "_", name) for name in (config.method, config.model, config.data)]
    base = os.path.join("runs", "-".join(parts).lower())
    number = 1
    while os.path.exists(base if number == 1 else f"{base}-{number}"):
        number += 1
    return base if number == 1 else f"{base}-{number}"
