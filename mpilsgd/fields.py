"""The settings of a method: each stands once, with its type, default, range and help.

    class Mine(Method):
        period: int = whole(10, help="steps between exchanges")

The annotation is the type; `int | None` allows None. From these fields follow the constructor's signature and its
checks, the docstring's list of arguments, and the options of `mpilsgd train`.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Field:
    """One setting. problem(name, value): what is wrong with a value that is not None, or None."""

    default: Any
    help: str
    range: str  # in words, for the docstring
    problem: Callable[[str, Any], str | None]
    name: str = ""
    type: Any = Any

    @property
    def optional(self) -> bool:
        return self.type is Any or type(None) in typing.get_args(self.type)

    def check(self, value: Any) -> str | None:
        """What is wrong with a value."""
        return None if value is None and self.optional else self.problem(self.name, value)

    def describe(self) -> str:
        default = "required" if self.default is REQUIRED else f"default {self.default!r}"
        return f"{self.name} ({', '.join(filter(None, (self.range, default)))}): {self.help}."


def number(
    default: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False, help: str
) -> Any:
    """A finite real number in [low, high]; above: low itself is excluded."""
    span = _span(low, high, above)
    return Field(default, help, span, lambda name, v: number_problem(name, v, low, high, above))


def number_problem(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> str | None:
    """Why a value is no finite number in [low, high]; above: in (low, high]."""
    real = (
        isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool) and math.isfinite(value)
    )
    if real and low <= value <= high and not (above and value == low):
        return None
    return f"{name} must be a number {_span(low, high, above) or 'that is finite'}, not {value!r}"


def _span(low: float, high: float, above: bool) -> str:
    if high < math.inf:
        return f"in {'(' if above else '['}{low:g}, {high:g}]"
    return f"{'above' if above else 'of at least'} {low:g}" if low > -math.inf else ""


def whole(default: Any, low: int = 1, *, word: str | None = None, help: str) -> Any:
    """A whole number of at least `low`, or a word."""
    span = f"a whole number of at least {low}" + (f" or {word!r}" if word else "")

    def problem(name: str, value: Any) -> str | None:
        if word and isinstance(value, str):
            return None if value == word else f"{name} must be {span}, not {value!r}"
        return whole_problem(name, value, low)

    return Field(default, help, span, problem)


def whole_problem(name: str, value: Any, low: int = 1) -> str | None:
    """Why a value is no whole number of at least `low`."""
    if isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool) and int(value) >= low:
        return None
    return f"{name} must be a whole number of at least {low}, not {value!r}"


def choice(default: Any, *others: Any, help: str) -> Any:
    """One of several values."""
    among = (default, *others)

    def problem(name: str, value: Any) -> str | None:
        if any(type(value) is type(one) and value == one for one in among):
            return None
        return f"{name} must be one of {', '.join(map(repr, among))}, not {value!r}"

    return Field(default, help, "one of " + ", ".join(map(repr, among)), problem)


def flag(default: bool, *, help: str) -> Any:
    """True or False."""
    return choice(default, not default, help=help)


def path(default: str | None = None, *, help: str) -> Any:
    """The path of a file."""

    def problem(name: str, value: Any) -> str | None:
        fits = isinstance(value, (str, os.PathLike))
        return None if fits else f"{name} must be the path of a file, not {value!r}"

    return Field(default, help, "", problem)


def code(default: Any = None, *, arguments: str, help: str) -> Any:
    """A callable of the program's own."""

    def problem(name: str, value: Any) -> str | None:
        return None if callable(value) else f"{name} must be a callable {arguments}, not {value!r}"

    return Field(default, help, f"a callable {arguments}", problem)


def anything(default: Any, problem: Callable[[str, Any], str | None], range: str, *, help: str) -> Any:
    """What a function of one's own judges."""
    return Field(default, help, range, problem)


def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a class and of those it is made of, those of its own first."""
    found: dict[str, Field] = {}
    for part in cls.__mro__:
        own = {name: value for name, value in vars(part).items() if isinstance(value, Field)}
        hints = typing.get_type_hints(part) if own else {}
        for name, value in own.items():
            filled = Field(
                value.default, value.help, value.range, value.problem, name, hints.get(name, value.type)
            )
            found.setdefault(name, filled)
    return found


def documented(text: str | None, fields: dict[str, Field]) -> str:
    """A docstring with its list of arguments, before the line that begins with "Source:"."""
    body = inspect.cleandoc(text or "")
    rows = [
        textwrap.fill(f.describe(), 112, initial_indent="    ", subsequent_indent=" " * 8)
        for f in fields.values()
    ]
    head, mark, source = body.partition("\nSource:")
    return head.rstrip() + "\n\nArgs:\n" + "\n".join(rows) + ("\n" + mark + source if mark else "\n")


def signature(fields: dict[str, Field]) -> inspect.Signature:
    """(optimizer, topology=None, *, fields)."""
    both = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in fields.values()
    ]
    first = [inspect.Parameter("optimizer", both), inspect.Parameter("topology", both, default=None)]
    return inspect.Signature([*first, *own])
