"""What the values of a configuration may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mpilsgd.train import logs
from mpilsgd.train.callables import InputError, is_path, resolve
from mpilsgd.train.data import DATASETS, is_file
from mpilsgd.train.events import parse_every
from mpilsgd.train.models import MODELS
from mpilsgd.train.options import match, method_options, methods, names_of, required, suggestion
from mpilsgd.train.stragglers import parse_slow

OPTIMIZERS = ("SGD", "MSGD", "Adam", "AdamW")
LOSSES = ("auto", "cross_entropy", "mse")
SHAPES = ("step", "cosine", "linear")
PATH = "package.module:callable"


def mistakes(config: Any, fields: Sequence[str]) -> Iterator[str]:
    """Everything that is wrong with the values of a Config; corrects the spelling of names. fields: its own options."""
    yield from _name(config, "method", methods(), users=False)
    yield from _name(config, "optimizer", OPTIMIZERS)
    yield from _name(config, "model", MODELS)
    yield from _name(config, "data", DATASETS)
    yield from _name(config, "loss", LOSSES)
    yield from _name(config, "schedule", SHAPES)
    for name in ("task", "metrics"):
        path = getattr(config, name)
        if path is not None and not is_path(path):
            yield f"{name}: must be {PATH}, not {path!r}"
        elif path is not None:
            yield from _unresolved(name, path)
    if config.task is not None:
        for name in ("loss", "metrics"):
            if getattr(config, name) not in (None, "auto"):
                yield f"{name}, task: a task brings its own; give one of them"
    if config.method in methods():
        options = method_options(fields)
        own = names_of(config.method, options)
        for key in [k for k in config.method_options if k not in own]:
            yield f"{key}: not an option of {config.method}, which has {', '.join(own)}"
        for key in required(config.method, options):
            if key not in config.method_options:
                yield f"{key}: {config.method} needs it: {options[key].help}"
        for key, value in config.method_options.items():
            if key in options and options[key].takes_code and is_path(value):
                yield from _unresolved(key, value)
    for name, good, rule in _rules(config):
        if not good:
            yield f"{name}: must be {rule}, not {getattr(config, name)!r}"
    if config.epochs is not None and config.steps is not None:
        yield "epochs, steps: give one of them"
    if config.optimizer in ("Adam", "AdamW") and (config.momentum or config.nesterov is not None):
        yield f"momentum, nesterov: {config.optimizer} has neither; they are options of SGD and MSGD"
    if config.optimizer == "SGD" and config.nesterov and not config.momentum:
        yield "nesterov: needs a momentum above 0"
    if config.amp == "fp16" and config.method_options.get("until_grad_norm") is not None:
        yield "amp, until_grad_norm: a gradient that overflows in fp16 has no norm to judge by; take bf16"
    if is_path(config.schedule) and (config.lr_drops or config.lr_gamma or config.warmup is not None):
        yield "schedule: lr_drops, lr_gamma and warmup go with step, cosine and linear, not with a scheduler of yours"
    for name in ("eval_every", "checkpoint_every", "warmup"):
        try:
            parse_every(getattr(config, name))
        except ValueError as error:
            yield f"{name}: {error}"
    try:
        config.slow = str(parse_slow(config.slow)) or None
    except ValueError as error:
        yield f"slow: {error}"
    if (lacking := logs.problem(config.log)) is not None:
        yield f"log: {lacking}"


def _rules(config: Any) -> list[tuple[str, bool, str]]:
    count = "a whole number of at least 1"
    counts = [
        (name, value is None or value >= 1, count)
        for name in ("group_size", "batch_size", "accumulate", "epochs", "steps", "threads", "classes")
        for value in [getattr(config, name)]
    ]
    return [
        *counts,
        ("workers", config.workers >= 0, "a whole number of at least 0"),
        ("clip_norm", config.clip_norm is None or 0 < config.clip_norm < math.inf, "above 0"),
        ("lr", 0 < config.lr < math.inf, "above 0"),
        ("patience", 3 <= config.patience < math.inf, "at least 3 seconds"),
        (
            "momentum",
            0 <= config.momentum < 1 or (config.optimizer == "MSGD" and -1 < config.momentum < 0),
            "in [0, 1)",
        ),
        ("weight_decay", 0 <= config.weight_decay < math.inf, "at least 0"),
        ("lr_drops", all(drop > 0 for drop in config.lr_drops), "epochs above 0"),
        ("lr_drop_factor", 0 < config.lr_drop_factor <= 1, "in (0, 1]"),
        ("lr_gamma", 0 <= config.lr_gamma < math.inf, "at least 0"),
        ("seed", 0 <= config.seed < 2**63, "a whole number of at least 0, below 2^63"),
        ("running_average", _is_rate(config.running_average), "running or in (0, 1]"),
    ]


def _name(config: Any, field: str, names: Any, users: bool = True) -> Iterator[str]:
    name = getattr(config, field)
    known = match(name, names)
    if known is not None:
        setattr(config, field, known)
    elif field == "data" and is_file(name):
        return
    elif users and is_path(name):
        yield from _unresolved(field, name)
    else:
        files = ", a file (.csv, .npz, .txt), a folder of images" if field == "data" else ""
        more = f"{files} or {PATH}" if users else ""
        yield f"{field}: {name!r} is not one of {', '.join(names)}{more}{suggestion(name, names)}"


def _unresolved(name: str, path: str) -> Iterator[str]:
    try:
        resolve(path)
    except InputError as error:
        yield f"{name}: {error}"


def _is_rate(value: Any) -> bool:
    return value is None or value == "running" or (isinstance(value, float) and 0 < value <= 1)
