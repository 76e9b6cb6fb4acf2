"""The method classes as the command line sees them: their options are their fields."""

from __future__ import annotations

import difflib
import functools
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mpilsgd.methods
from mpilsgd.exchange import REQUIRED
from mpilsgd.methods import Method
from mpilsgd.train.callables import InputError, is_path, resolve

NO_DEFAULT = REQUIRED
_SIMPLE = (int, float, bool, str, type(None))
_users: dict[str, type[Method]] = {}  # by package.module:Class


@dataclass
class MethodOption:
    """One field: its type, and the help and the default of each class that has it."""

    name: str
    type: Any
    defaults: dict[str, Any] = field(default_factory=dict)
    helps: dict[str, list[str]] = field(default_factory=dict)  # by the text, whose it is

    @property
    def takes_code(self) -> bool:
        """Whether `package.module:callable` may name the value."""
        return self.type is Any

    @property
    def help(self) -> str:
        if len(self.helps) == 1:
            return next(iter(self.helps))
        return "; ".join(f"{', '.join(who)}: {text}" for text, who in self.helps.items())


def methods() -> dict[str, type[Method]]:
    """All method classes by name, and those of the user's that were `enlist`ed."""
    public = vars(mpilsgd.methods).values()
    own = {c.__name__: c for c in public if isinstance(c, type) and issubclass(c, Method) and c is not Method}
    return {**own, **_users}


def enlist(name: Any) -> None:
    """Makes a method of the user's known by its package.module:Class. An InputError says what is wrong with it."""
    if not is_path(name) or name in _users:
        return
    cls = resolve(name)
    if not (isinstance(cls, type) and issubclass(cls, Method) and cls is not Method):
        raise InputError(f"method: {name} is no subclass of mpilsgd.methods.Method")
    _users[name] = cls


def method_options(reserved: Iterable[str] = (), only: str | None = None) -> dict[str, MethodOption]:
    """Every option of any method, or of one, by its name on the command line; reserved names begin with `method_`."""
    reserved = set(reserved)
    options: dict[str, MethodOption] = {}
    for known_as, cls in ((name, cls) for name, cls in methods().items() if only in (None, name)):
        for name, one in cls.fields.items():
            if _is_code(one.type):
                continue
            key = f"method_{name}" if name in reserved else name
            kind = _parser_type(one.type)
            option = options.setdefault(key, MethodOption(name, kind))
            option.type = _either(option.type, kind)
            option.defaults[known_as] = one.default
            option.helps.setdefault(one.help, []).append(known_as)
    return options


def names_of(name: str, options: dict[str, MethodOption]) -> list[str]:
    """The command line names of the options that one method has."""
    return [key for key, option in options.items() if name in option.defaults]


def required(name: str, options: dict[str, MethodOption]) -> list[str]:
    """Those of them without which the method cannot be made."""
    return [key for key in names_of(name, options) if options[key].defaults[name] is NO_DEFAULT]


def keyword_arguments(given: dict[str, Any], options: dict[str, MethodOption]) -> dict[str, Any]:
    """The constructor's arguments for the options that were set: lists of steps become sets, paths become callables."""
    arguments = {}
    for key, value in given.items():
        if options[key].takes_code and is_path(value):
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


def describe(hint: Any) -> str:
    """A type in a user's words."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }
    if hint in words:
        return words[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(hint) is list:
        return "a list such as [30, 40]"
    return " or ".join(describe(argument) for argument in arguments) or "another value"


def shown(default: Any) -> str:
    """A default, in the help."""
    if default is NO_DEFAULT:
        return "has to be given"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"{default:g}" if isinstance(default, float) else "none" if default == [] else str(default)


def _parser_type(hint: Any) -> Any:
    """The hint, if the command line can parse it strictly; else anything, and the field itself checks the value."""
    return hint if all(member in _SIMPLE for member in _members(hint)) else Any


def _either(one: Any, other: Any) -> Any:
    """The union of two types; a text comes last, which everything on a command line is."""
    if Any in (one, other):
        return Any
    members = dict.fromkeys([*_members(one), *_members(other)])
    ordered = sorted(members, key=lambda member: (member is str, member is type(None)))
    return functools.reduce(operator.or_, ordered)


def _is_code(hint: Any) -> bool:
    """Whether only a function of the program's will do, which no configuration can name."""
    kinds = [typing.get_origin(member) or member for member in _members(hint) if member is not type(None)]
    return bool(kinds) and all(kind in (Callable, typing.Callable) for kind in kinds)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
