"""The configuration of a training job: options with types and defaults, a file, and the command line over both."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shutil
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from mpilsgd.train.callables import InputError, is_path, resolve
from mpilsgd.train.data import AUGMENTATIONS, DATASETS
from mpilsgd.train.models import MODELS
from mpilsgd.train.options import MethodOption, match, method_options, methods, names_of, suggestion

OPTIMIZERS = ("SGD", "MSGD", "Adam", "AdamW")
PATH = "package.module:callable"
DEFAULT_EPOCHS = 20
# What may change when a run is resumed: nothing that the state of its checkpoint depends on.
RESUMABLE = ("epochs", "steps", "eval_every", "checkpoint_every", "threads", "data_dir", "resume", "device")


class ConfigError(InputError):
    """All mistakes of a configuration, and what can be understood of it."""

    def __init__(self, mistakes: Sequence[str], config: Config):
        super().__init__("\n".join(mistakes))
        self.mistakes, self.config = list(mistakes), config


def _option(default: Any, group: str, help: str) -> Any:
    metadata = {"group": group, "help": help}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """A training job. Options of the method that were set are in `method_options`."""

    data: str = _option("digits", "Task", f"{', '.join(DATASETS)} or {PATH} (returns training set, test set)")
    data_dir: str = _option("data", "Task", "folder of the data set's files (digits needs none)")
    augment: Literal["auto", "none", "crop", "pad"] = _option(
        "auto", "Task", "crop: random 28x28 squares, half of them mirrored; pad: 4 pixels around first; auto: crop for cifar10"
    )
    model: str = _option("mlp", "Task", f"{', '.join(MODELS)} or {PATH} (given input_shape, classes)")

    method: str = _option("LSGD", "Method", "how the workers are kept together: {methods}")
    group_size: int | None = _option(None, "Method", "ranks in a group (null: all ranks of a node)")
    shared: bool = _option(True, "Method", "exchange parameters through shared memory in a node (false: by messages)")

    optimizer: str = _option("SGD", "Optimizer of each worker", f"{', '.join(OPTIMIZERS)} or {PATH} (given parameters, lr)")
    lr: float = _option(0.1, "Optimizer of each worker", "learning rate")
    momentum: float = _option(0.0, "Optimizer of each worker", "momentum rate of SGD and MSGD, in [0, 1)")
    nesterov: bool | None = _option(
        None, "Optimizer of each worker", "Nesterov's momentum instead of the heavy ball (null: the optimizer's own default)"
    )
    weight_decay: float = _option(0.0, "Optimizer of each worker", "l2 regularisation")
    lr_drops: list[float] = _option([], "Optimizer of each worker", "epochs at which lr is multiplied by lr_drop_factor: [30,40]")
    lr_drop_factor: float = _option(0.1, "Optimizer of each worker", "see lr_drops")
    lr_gamma: float = _option(0.0, "Optimizer of each worker", "decay of lr with the steps t: lr / (1 + lr_gamma t)^0.5")
    running_average: float | Literal["running"] | None = _option(
        None, "Optimizer of each worker", "evaluate the running average of the iterates: running (the mean of all) or a moving rate"
    )

    sampling: Literal["partition", "shuffle", "replacement"] = _option(
        "partition",
        "Course of the training",
        "partition: each worker its own part of a fresh permutation every epoch; shuffle: each the whole set in its own "
        "order; replacement: independent draws",
    )
    batch_size: int = _option(32, "Course of the training", "samples a batch and worker")
    epochs: int | None = _option(
        None,
        "Course of the training",
        f"passes over the training set, by all workers together (by each, if sampling is shuffle); {DEFAULT_EPOCHS} unless steps is given",
    )
    steps: int | None = _option(None, "Course of the training", "steps of each worker, instead of epochs")
    eval_every: float | str = _option(1.0, "Course of the training", "epochs between evaluations of the centre (0.5, too), or '200 steps'")
    seed: int = _option(0, "Course of the training", "of parameters, sampling and dropout")

    output: str | None = _option(None, "Run", "run directory (null: runs/METHOD-MODEL-DATA, with a number if that exists)")
    overwrite: bool = _option(False, "Run", "replace the run that the output directory holds")
    resume: str | None = _option(None, "Run", f"continue the run of this directory; may come with {', '.join(RESUMABLE[:6])}")
    checkpoint_every: float | str | None = _option(None, "Run", "epochs between checkpoints, or '200 steps' (null: one, at the end)")
    threads: int | None = _option(None, "Run", "threads a rank (null: OMP_NUM_THREADS, or a fair share of the cores)")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "Run", "auto: a GPU if there is one")

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
            own = names_of(methods()[self.method], options)
            for key in [k for k in self.method_options if k not in own]:
                yield f"{key}: not an option of {self.method}, which has {', '.join(own)}"
        for key, value in self.method_options.items():
            if is_path(value):
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
        for name in ("eval_every", "checkpoint_every"):
            try:
                parse_every(getattr(self, name))
            except ValueError as error:
                yield f"{name}: {error}"

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
            ("momentum", 0 <= self.momentum < 1 or (self.optimizer == "MSGD" and -1 < self.momentum < 0), "in [0, 1)"),
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


def parse(argv: Sequence[str]) -> Config:
    """The configuration that the command line and the files it names describe.

    Raises:
        ConfigError: with all mistakes.
        SystemExit: after --help and --print_config.
    """
    options = method_options(FIELDS)
    parser = _parser(options)
    argv = _regular(argv, parser)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    values, mistakes = _collect(argv, parser)
    own = {key: values.pop(key) for key in list(values) if key in options}
    config = Config(**values, method_options=own)
    if config.epochs is None and config.steps is None:
        config.epochs = DEFAULT_EPOCHS
    mistakes += config.mistakes()
    if mistakes:
        raise ConfigError(mistakes, config)
    if any(argument.startswith("--print_config") for argument in argv):
        sys.stdout.write(config.text())
        raise SystemExit(0)
    return config


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


def _parser(options: dict[str, MethodOption]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="mpilsgd train",
        usage="mpilsgd train [CONFIG.yaml] [--option value ...]",
        description="Trains a model on all ranks: mpiexec -n 4 mpilsgd train jobs/lenet.yaml --data_dir FOLDER. "
        "One rank works too. The command line goes before the file. Defaults are in [brackets]; null means: not set.",
        exit_on_error=False,
        formatter_class=_Help,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="the same as CONFIG.yaml: lines `option: value`")
    hints = typing.get_type_hints(Config)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        title = field.metadata.get("group")
        if title is None:
            continue
        if title not in groups:
            if title == "Optimizer of each worker":
                _add_method_options(parser, options)
            groups[title] = parser.add_argument_group(title)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = field.metadata["help"].replace("{methods}", ", ".join(methods())) + f" [{_shown(default)}]"
        groups[title].add_argument(
            f"--{field.name}",
            type=hints[field.name],
            default=default,
            metavar=_placeholder(field.name, hints[field.name]),
            help=text.replace("%", "%%"),
        )
    return parser


def _add_method_options(parser: ArgumentParser, options: dict[str, MethodOption]) -> None:
    group = parser.add_argument_group("Options of the method")
    for key, option in options.items():
        defaults: dict[str, list[str]] = {}
        for cls, default in option.defaults.items():
            defaults.setdefault(_shown(default), []).append(cls)
        owners = "all" if len(option.defaults) == len(methods()) else ", ".join(option.defaults)
        told = "; ".join(value if len(defaults) == 1 else f"{', '.join(who)}: {value}" for value, who in defaults.items())
        group.add_argument(
            f"--{key}",
            type=option.type,
            default=argparse.SUPPRESS,
            metavar=_placeholder(key, option.type),
            help=f"{owners}: {option.help} [{told}]".replace("%", "%%"),
        )


class _Help(DefaultHelpFormatter):
    """Says what each help text says, without Python's types."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(110, shutil.get_terminal_size().columns))

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest == "print_config":
            return "show the configuration with all defaults, and exit"
        return action.help or ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return "-h, --help"
        return " ".join(filter(None, (action.option_strings[0], None if action.dest == "print_config" else action.metavar)))


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"{default:g}" if isinstance(default, float) else "none" if default == [] else str(default)


def _placeholder(name: str, hint: Any) -> str:
    """What stands for the value in the help."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    special = {"data_dir": "DIR", "output": "DIR", "resume": "DIR", "lr_drops": "E,E,..", "eval_every": "E", "checkpoint_every": "E"}
    members = [member for member in (typing.get_args(hint) or (hint,)) if member is not type(None)]
    words = {int: "N", float: "X", bool: "true|false", str: "NAME"}
    return special.get(name) or words.get(members[0], "VALUE")


def _regular(argv: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Leading files become --config; - in names becomes _; a bare true-or-false option means true; 30,40 becomes a list."""
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    regular: list[str] = []
    files = True
    for i, argument in enumerate(argv):
        if not argument.startswith("--"):
            files = files and not argument.startswith("-")
            regular += ["--config", argument] if files else [argument]
            continue
        files = False
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        follows = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else None
        if kinds.get(name) in (bool, bool | None) and not equals and follows is None:
            equals, value = "=", "true"
        regular.append(f"--{name}{equals}{value}")
    for i, argument in enumerate(regular[:-1]):
        if kinds.get(argument[2:]) == list[float] and not regular[i + 1].startswith(("[", "--")):
            regular[i + 1] = f"[{regular[i + 1]}]"
    return regular


def _collect(argv: Sequence[str], parser: ArgumentParser) -> tuple[dict[str, Any], list[str]]:
    """The values that were given, each parsed by itself so that one mistake does not hide the next."""
    known = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    known = {key: hint for key, hint in known.items() if key not in ("help", "config", "print_config")}
    values: dict[str, Any] = {}
    mistakes: list[str] = []

    def take(key: str, value: Any, is_text: bool, where: str = "") -> None:
        if key not in known:
            mistakes.append(f"{where}{key}: unknown option{suggestion(key, known)}")
            return
        try:
            parsed = parser.parse_args([f"--{key}={value}"]) if is_text else parser.parse_object({key: value})
            values[key] = parsed[key]
        except argparse.ArgumentError:
            mistakes.append(f"{where}{key}: expected {describe(known[key])}, found {value!r}")

    items, loose = _items(argv)
    mistakes += [f"{argument}: not understood; options are written --option value" for argument in loose]
    resumed = next((value for key, value in items if key == "resume" and value), None)
    if resumed is not None:
        forbidden = [key for key, _ in items if key in known and key not in RESUMABLE]
        mistakes += [f"{key}: cannot change when a run is resumed; {', '.join(RESUMABLE[:6])} can" for key in forbidden]
        items = [("config", str(Path(resumed) / "config.yaml")), *items]
    for file in [value for key, value in items if key == "config"]:
        content, error = _read(file)
        mistakes += [error] if error else []
        for key, value in content.items():
            take(str(key), value, False, f"{file}: ")
    for key, text in items:
        if key not in ("config", "print_config"):
            if text is None:
                mistakes.append(f"{key}: " + ("needs a value" if key in known else f"unknown option{suggestion(key, known)}"))
            else:
                take(key, text, True)
    if resumed is not None:
        values["output"] = resumed
        given = {key for key, _ in items}
        for key, other in (("steps", "epochs"), ("epochs", "steps")):
            if key in given and other not in given:
                values[other] = None
    return values, mistakes


def _items(argv: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """(option, its text) pairs, and what belongs to none."""
    items: list[tuple[str, str | None]] = []
    loose: list[str] = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            items.append((name, value if equals else None))
        elif items and items[-1][1] is None:
            items[-1] = (items[-1][0], argument)
        else:
            loose.append(argument)
    return items, loose


def _read(file: str | None) -> tuple[dict[str, Any], str | None]:
    if file is None:
        return {}, "config: needs a file"
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        return {}, f"{file}: cannot be read: {error.strerror or error}"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return {}, f"{file}: not a YAML file: {' '.join(str(error).split())}"
    if content is None:
        return {}, None
    if not isinstance(content, dict):
        return {}, f"{file}: must hold lines of the form `option: value`"
    return content, None


def describe(hint: Any) -> str:
    """A type in a user's words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if hint in words:
        return words[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(hint) is list:
        return "a list such as [30, 40]"
    return " or ".join(describe(argument) for argument in arguments) or "another value"


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
