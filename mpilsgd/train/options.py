"""The method classes as the command line sees them: their options are their constructors' keyword arguments."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mpilsgd.methods
from mpilsgd.methods import Method
from mpilsgd.train.callables import is_path, resolve

_NOT_OPTIONS = ("self", "optimizer", "topology", "model")
_SIMPLE = (int, float, bool, str, type(None))


@dataclass
class MethodOption:
    """One keyword argument: its type, and the help and the default of each class that has it."""

    name: str
    type: Any
    defaults: dict[str, Any]
    help: str


def methods() -> dict[str, type[Method]]:
    """All method classes by name."""
    public = vars(mpilsgd.methods).values()
    return {c.__name__: c for c in public if isinstance(c, type) and issubclass(c, Method) and c is not Method}


def method_options(reserved: Iterable[str] = ()) -> dict[str, MethodOption]:
    """Every option of any method, by its name on the command line; reserved names get the prefix `method_`."""
    reserved = set(reserved)
    options: dict[str, MethodOption] = {}
    for class_name, cls in methods().items():
        hints, texts = _hints(cls), _argument_texts(cls)
        for parameter in _parameters(cls):
            key = f"method_{parameter.name}" if parameter.name in reserved else parameter.name
            kind = _parser_type(hints.get(parameter.name, Any))
            option = options.setdefault(key, MethodOption(parameter.name, kind, {}, ""))
            if option.type != kind:
                option.type = Any if Any in (option.type, kind) else option.type | kind
            option.defaults[class_name] = parameter.default
            option.help = option.help or texts.get(parameter.name, "")
    return options


def names_of(cls: type[Method], options: dict[str, MethodOption]) -> list[str]:
    """The command line names of the options that one method has."""
    return [key for key, option in options.items() if cls.__name__ in option.defaults]


def keyword_arguments(given: dict[str, Any], options: dict[str, MethodOption]) -> dict[str, Any]:
    """The constructor's arguments for the options that were set: lists of steps become sets, paths become callables."""
    arguments = {}
    for key, value in given.items():
        if is_path(value):
            value = resolve(value)
        arguments[options[key].name] = set(value) if isinstance(value, list) else value
    return arguments


def plain(name: str) -> str:
    """A name as it is compared: case and - _ do not matter."""
    return re.sub("[-_ ]", "", name).casefold()


def match(name: str, names: Iterable[str]) -> str | None:
    """The one of the names that is meant, or None."""
    return next((known for known in names if plain(known) == plain(name)), None)


def suggestion(name: str, names: Iterable[str]) -> str:
    """A did-you-mean, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _parameters(cls: type[Method]) -> list[inspect.Parameter]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p for p in named if p.name not in _NOT_OPTIONS]


def _hints(cls: type[Method]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except NameError:  # names that are imported for the type checker alone
        return {}


def _parser_type(hint: Any) -> Any:
    """The hint, if the command line can parse it strictly; else anything, and the class itself checks the value."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return hint if all(member in _SIMPLE for member in members) else Any


def _argument_texts(cls: type[Method]) -> dict[str, str]:
    """What the class says about each argument in the `Args:` part of its docstring."""
    document = inspect.cleandoc(f"{cls.__doc__ or ''}\n\n{inspect.getdoc(cls.__init__) or ''}")
    section = re.search(r"^Args:\n((?:[ \t]+.*\n|\s*\n)+)", document + "\n\n", re.MULTILINE)
    if section is None:
        return {}
    texts = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section[1])):
        names, colon, text = entry.partition(":")
        if colon:
            found = re.sub(r"\s+", " ", text).strip()
            texts.update({name.strip(" `*"): found for name in re.sub(r"\(.*?\)", "", names).split(",")})
    return texts
