"""The configuration of a training job: its options, their defaults, and what their values may be."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Literal

import yaml

from mpilsgd.train import checks
from mpilsgd.train.checks import LOSSES, OPTIMIZERS, PATH, SHAPES
from mpilsgd.train.data import DATASETS
from mpilsgd.train.events import parse_every
from mpilsgd.train.models import MODELS
from mpilsgd.train.options import NO_DEFAULT, method_options, names_of

__all__ = ["DEFAULT_EPOCHS", "FIELDS", "RESUMABLE", "Config", "default_output", "parse_every"]

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
    "workers",
)


_OPTIMIZER, _COURSE = "Optimizer of each worker", "Course of the training"  # titles in the help


def _option(default: Any, group: str, help: str) -> Any:
    metadata = {"group": group, "help": help}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """A training job. Options of the method that were set are in `method_options`."""

    data: str = _option(
        "digits",
        "Task",
        f"{', '.join(DATASETS)}; a .csv, .npz or .txt file; a folder of images (train/CLASS/, test/CLASS/); or {PATH} "
        "(returns training set, test set)",
    )
    data_dir: str = _option("data", "Task", "folder of the data set's files (digits needs none)")
    augment: Literal["auto", "none", "crop", "pad"] = _option(
        "auto",
        "Task",
        "crop: random 28x28 squares, half of them mirrored; pad: 4 pixels around first; auto: crop for cifar10",
    )
    workers: int = _option(
        0, "Task", "processes of each rank that read a data set of yours ahead (0: the rank reads it itself)"
    )
    model: str = _option("mlp", "Task", f"{', '.join(MODELS)} or {PATH} (given input_shape, classes)")
    classes: int | None = _option(None, "Task", "how many classes there are (null: the data tell)")
    loss: str = _option(
        "auto",
        "Task",
        f"{', '.join(LOSSES)} or {PATH} (given outputs, targets); auto: mse for targets in memory with a "
        "fraction, else cross_entropy",
    )
    metrics: str | None = _option(
        None,
        "Task",
        f"further figures of the test set: {PATH} (given outputs, targets; returns a dict of means)",
    )
    task: str | None = _option(
        None,
        "Task",
        f"what does not fit the above: {PATH} (returns an object with loss(model, batch); docs/job.md)",
    )

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
    schedule: str = _option(
        "step",
        _OPTIMIZER,
        f"{', '.join(SHAPES)} or {PATH} (given the optimizer; returns a torch scheduler); step: as lr_drops and "
        "lr_gamma say; cosine and linear fall to 0 at the end",
    )
    warmup: float | str | None = _option(
        None, _OPTIMIZER, "epochs in which lr rises to its value at the start, or '200 steps'"
    )
    clip_norm: float | None = _option(
        None, _OPTIMIZER, "shorten each worker's gradient to this length where it is longer"
    )
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
    accumulate: int = _option(1, _COURSE, "batches a step, whose mean gradient it takes")
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
        1.0, "Run", "epochs between checkpoints, or '200 steps' (null: at the start and the end)"
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
        return yaml.safe_dump({**values, **self._defaults(), **self.method_options}, sort_keys=False)

    @property
    def set_options(self) -> dict[str, Any]:
        """Those of the method's options that have another value than their default."""
        usual = self._defaults()
        return {k: v for k, v in self.method_options.items() if k not in usual or v != usual[k]}

    @property
    def shown_options(self) -> dict[str, Any]:
        """These, and the period where nothing else says when exchanges come."""
        found, period = self.set_options, self._defaults().get("period")
        return found if period is None or "until_grad_norm" in found else {"period": period, **found}

    def _defaults(self) -> dict[str, Any]:
        """The method's options with their defaults; without those that have none."""
        options = method_options(FIELDS)
        own = names_of(self.method, options)
        found = {key: options[key].defaults[self.method] for key in own}
        return {key: value for key, value in found.items() if value is not NO_DEFAULT}

    def mistakes(self) -> list[str]:
        """Everything that is wrong with the values, and corrects the spelling of names."""
        return list(checks.mistakes(self, FIELDS))


FIELDS = tuple(field.name for field in dataclasses.fields(Config) if "group" in field.metadata)


def default_output(config: Config) -> str:
    """runs/METHOD-MODEL-DATA or runs/METHOD-TASK, with the first number that is free."""
    names = (config.method, config.task) if config.task else (config.method, config.model, config.data)
    parts = [re.sub(r"[^\w.-]+", "_", name).strip("_") for name in names]
    base = os.path.join("runs", "-".join(parts).lower())
    number = 1
    while os.path.exists(base if number == 1 else f"{base}-{number}"):
        number += 1
    return base if number == 1 else f"{base}-{number}"
