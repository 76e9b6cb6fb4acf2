"""From the command line and configuration files to a configuration, with all mistakes at once."""

from __future__ import annotations

import argparse
import dataclasses
import reprlib
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from mpilsgd.train.callables import InputError
from mpilsgd.train.config import DEFAULT_EPOCHS, FIELDS, RESUMABLE, Config
from mpilsgd.train.options import (
    MethodOption,
    describe,
    enlist,
    match,
    method_options,
    methods,
    shown,
    suggestion,
)
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.yaml_file import options_in


class ConfigError(InputError):
    """All mistakes of a configuration, and what can be understood of it."""

    def __init__(self, mistakes: Sequence[str], config: Config):
        super().__init__("\n".join(mistakes))
        self.mistakes, self.config = list(mistakes), config


def parse(argv: Sequence[str]) -> Config:
    """The configuration that the command line and the files it names describe.

    Raises:
        ConfigError: with all mistakes.
        SystemExit: after --help and --print_config.
    """
    try:
        for name in _named_methods(argv):
            enlist(name)
    except InputError as error:
        raise ConfigError([str(error)], Config()) from None
    options = method_options(FIELDS)
    hints = {**_hints(), **{key: option.type for key, option in options.items()}}
    argv = _regular(argv, hints)
    if {"-h", "--help"} & set(argv):
        named = [match(str(name), methods()) for name in _named_methods(argv) if name]
        _parser(method_options(FIELDS, *named[-1:])).print_help()
        raise SystemExit(0)
    values, from_files, mistakes = _collect(argv, hints)
    own = {key: values.pop(key) for key in list(values) if key in options}
    _drop_foreign(own, from_files, values.get("method"), options)
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


def _hints() -> dict[str, Any]:
    """The types of the options that are not a method's."""
    hints = typing.get_type_hints(Config)
    return {name: hints[name] for name in FIELDS}


def _named_methods(argv: Sequence[str]) -> list[Any]:
    """What the command line and its files say the method is: a class of the user's brings options of its own."""
    items, loose = _items([a for a in argv])
    files = [value for key, value in items if key == "config"] + [a for a in loose if Path(a).is_file()]
    files += [str(Path(value) / "config.yaml") for key, value in items if key == "resume" and value]
    return [options_in(file)[0].get("method") for file in files] + [v for key, v in items if key == "method"]


def _parser(options: dict[str, MethodOption]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="mpilsgd train",
        usage="mpilsgd train [CONFIG.yaml] [--option value ...]",
        description="Trains a model on all ranks: mpiexec -n 4 mpilsgd train jobs/lenet-mnist.yaml --data_dir FOLDER. "
        "One rank works too. The command line overrides the file. Defaults are in [brackets]; null means: not set.",
        exit_on_error=False,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="the same as CONFIG.yaml: lines `option: value`"
    )
    hints = _hints()
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
        text = field.metadata["help"].replace("{methods}", ", ".join(methods())) + f" [{shown(default)}]"
        groups[title].add_argument(
            f"--{field.name}",
            type=hints[field.name],
            default=default,
            metavar=_placeholder(field.name, hints[field.name]),
            help=text.replace("%", "%%"),
        )
    return parser


def _add_method_options(parser: ArgumentParser, options: dict[str, MethodOption]) -> None:
    every = {cls for option in options.values() for cls in option.defaults}
    group = parser.add_argument_group("Options of the method")
    for key, option in sorted(options.items(), key=lambda item: -len(item[1].defaults)):
        defaults: dict[str, list[str]] = {}
        for cls, default in option.defaults.items():
            defaults.setdefault(shown(default), []).append(cls)
        owners = "all" if len(option.defaults) == len(every) else ", ".join(option.defaults)
        one = len(defaults) == 1
        told = "; ".join(value if one else f"{', '.join(who)}: {value}" for value, who in defaults.items())
        group.add_argument(
            f"--{key}",
            type=option.type,
            default=argparse.SUPPRESS,
            metavar=_placeholder(key, option.type),
            help=f"{owners if len(option.helps) == 1 < len(every) else ''}: {option.help} [{told}]".lstrip(
                ": "
            ).replace("%", "%%"),
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
        value = "" if action.dest in ("help", "print_config") else f" {action.metavar}"
        return "-h, --help" if action.dest == "help" else f"{action.option_strings[0]}{value}"


def _placeholder(name: str, hint: Any) -> str:
    """What stands for the value in the help."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    special = {
        "data_dir": "DIR",
        "output": "DIR",
        "resume": "DIR",
        "lr_drops": "E,E,..",
        "eval_every": "E",
        "checkpoint_every": "E",
        "slow": "RANK:X,..",
        "asynchronous": "true|false|wait-free",
        "record": "FILE",
        "replay": "FILE",
    }
    members = [member for member in (typing.get_args(hint) or (hint,)) if member is not type(None)]
    words = {int: "N", float: "X", bool: "true|false", str: "NAME"}
    return special.get(name) or words.get(members[0], "VALUE")


def _regular(argv: Sequence[str], kinds: dict[str, Any]) -> list[str]:
    """The arguments in one form.

    Leading files become --config, - in names becomes _, a bare true-or-false option means true, 30,40 is a list.
    """
    regular, files = list[str](), True
    for i, argument in enumerate(argv):
        if not argument.startswith("--"):
            files = files and not argument.startswith("-")
            regular += ["--config", argument] if files else [argument]
            continue
        files = False
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        follows = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else None
        if bool in (kinds.get(name), *typing.get_args(kinds.get(name))) and not equals and follows is None:
            equals, value = "=", "true"
        regular.append(f"--{name}{equals}{value}")
    for i, argument in enumerate(regular[:-1]):
        if kinds.get(argument[2:]) == list[float] and not regular[i + 1].startswith(("[", "--")):
            regular[i + 1] = f"[{regular[i + 1]}]"
    return regular


def _drop_foreign(
    own: dict[str, Any], from_files: dict[str, Any], method: str | None, options: dict[str, MethodOption]
) -> None:
    """Another method on the command line than in the file: what the file said of its own method alone is void."""
    before, now = (match(str(name), methods()) for name in (from_files.get("method"), method))
    if before is None or now is None or before == now:
        return
    for key in [key for key in own if key in from_files and own[key] == from_files[key]]:
        if before in options[key].defaults and now not in options[key].defaults:
            del own[key]


def _collect(argv: Sequence[str], known: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The values that were given, those of the files, and all mistakes. known: the types of all options.

    Each is parsed by itself, so that one mistake does not hide the next.
    """
    values: dict[str, Any] = {}
    mistakes: list[str] = []

    def take(key: str, value: Any, is_text: bool, where: str = "") -> None:
        if key not in known:
            name = key if key.isprintable() and len(key) < 50 else reprlib.repr(key)
            mistakes.append(f"{where}{name}: unknown option{suggestion(name, known)}")
            return
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{key}", type=known[key])
        try:
            parsed = parser.parse_args([f"--{key}={value}"]) if is_text else parser.parse_object({key: value})
            nullable = known[key] is Any or type(None) in typing.get_args(known[key])
            if parsed[key] is None and not nullable:
                raise argparse.ArgumentError(None, "null")
        except argparse.ArgumentError:
            mistakes.append(f"{where}{key}: expected {describe(known[key])}, found {reprlib.repr(value)}")
            return
        found, far = parsed[key], 2**63 if key == "seed" else 2**31
        if (isinstance(found, int) and abs(found) >= far) or (isinstance(found, str) and len(found) > 1000):
            mistakes.append(f"{where}{key}: {reprlib.repr(found)} is too large")
        else:
            values[key] = found

    items, loose = _items(argv)
    mistakes += [f"{argument}: not understood; options are written --option value" for argument in loose]
    resumed = next((value for key, value in items if key == "resume" and value), None)
    if resumed is not None:
        forbidden = [key for key, _ in items if key in known and key not in RESUMABLE]
        mistakes += [
            f"{key}: cannot change when a run is resumed; {', '.join(RESUMABLE[:8])} can" for key in forbidden
        ]
        try:
            RunDirectory(resumed).check_config()
            items = [("config", str(Path(resumed) / "config.yaml")), *items]
        except InputError as unfit:
            mistakes.append(str(unfit))
    for file in [value for key, value in items if key == "config"]:
        content, error = options_in(file)
        mistakes += [error] if error else []
        for key, value in content.items():
            take(str(key), value, False, f"{file}: ")
    from_files = dict(values)
    for key, text in items:
        if key not in ("config", "print_config"):
            if text is None:
                wrong = "needs a value" if key in known else f"unknown option{suggestion(key, known)}"
                mistakes.append(f"{key}: {wrong}")
            else:
                take(key, text, True)
    if resumed is not None:
        values["output"] = resumed
        given = {key for key, _ in items}
        for key, other in (("steps", "epochs"), ("epochs", "steps")):
            if key in given and other not in given:
                values[other] = None
    return values, from_files, mistakes


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
