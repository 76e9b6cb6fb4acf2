"""What a rule is: a class with fields and hooks, complete and checked when Python reads it."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from mpilsgd.comm import Topology
from mpilsgd.exchange.course import COURSE
from mpilsgd.fields import REQUIRED, documented, fields_of, signature

# What a rule may define; everything else of `Method` is the mechanism's.
HOOKS = ("declare", "clock_of", "start", "before_step", "observe", "measure", "exchange", "shown_centre")
_SETTINGS = ("fields", "exchanges", "guard", "asynchronous", "init", "buffers")
# attributes of a worker, which a setting would hide
_WORKERS = """t p r x g n edge flat model optimizer topology metrics vectors values clock course workers device number
fabric windows scratch landing fresh modules about behind toward serial before"""
_TAKEN = frozenset(_WORKERS.split())


def complete(cls: Any, base: Any) -> None:
    """Gives a rule its fields, signature and list of arguments; a TypeError where it defines what is not a rule's."""
    own = [name for name in vars(cls) if name not in (*HOOKS, *_SETTINGS) and name[:2] != "__"]
    wrong = [name for name in own if hasattr(base, name) or name in _TAKEN]
    if wrong:
        raise TypeError(
            f"{cls.__name__} defines {', '.join(wrong)}, which are the mechanism's; "
            f"a rule may define {', '.join(HOOKS)}"
        )
    if "asynchronous" in fields_of(cls):
        for name, field in COURSE.items():
            if name not in fields_of(cls):
                setattr(cls, name, field)
    cls.fields = fields_of(cls)
    cls.__doc__ = documented(cls.__doc__, cls.fields)
    cls.__signature__ = signature(cls.fields)


def check_free_name(cls: Any, name: str, base: Any) -> None:
    if hasattr(base, name) or name in _TAKEN:
        raise TypeError(f"{cls.__name__}: the name {name!r} is the mechanism's")


def check_rule(cls: Any, base: Any) -> None:
    """A TypeError where a rule lacks what every rule defines."""
    for hook in ("clock_of", "exchange"):
        if getattr(cls, hook) is getattr(base, hook):
            raise TypeError(f"{cls.__name__} must define {hook}: see docs/adding-a-method.md")


def check_verbs(
    cls: Any, kind: Any, allowed: frozenset[str], others: Iterable[Any], every: Iterable[Any]
) -> None:
    """A TypeError where a rule's `exchange` asks for a verb that its exchange does not have: not in the tenth round.

    A verb of the other exchanges that the rule may have is let pass: it may stand in another branch.
    """
    known, elsewhere = (
        frozenset[str]().union(*(exchange.verbs for exchange in of)) for of in (every, others)
    )
    asked, name = _asked(cls.exchange), kind.__name__
    if missing := sorted((asked & known) - allowed - elsewhere):
        raise TypeError(
            f"{cls.__name__}.exchange asks for {', '.join(missing)}; {name} has {', '.join(sorted(allowed))}"
        )
    if asked and (lacking := sorted(kind.needs - asked)):
        raise TypeError(f"{cls.__name__}.exchange must ask for {', '.join(lacking)}: {name} goes by it")


def _asked(exchange: Any) -> frozenset[str]:
    """The attributes of r that `exchange(self, r)` names; none where there is no source to read."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(exchange))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return frozenset()
    r = [argument.arg for argument in function.args.args][1:2]  # type: ignore[attr-defined]
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return frozenset(node.attr for node in nodes if isinstance(node.value, ast.Name) and [node.value.id] == r)


def check_arguments(cls: Any, topology: Any, given: dict[str, Any]) -> None:
    """A TypeError as Python raises it for a function: a setting without its name, a wrong name, one that is missing."""
    if not isinstance(topology, Topology | None):
        raise TypeError(
            f"{cls.__name__}: topology must be a Topology, not {topology!r}; settings are given by name, as in "
            f"{cls.__name__}(optimizer, {', '.join(f'{name}=...' for name in list(cls.fields)[:1])})"
        )
    for name in given:
        if name not in cls.fields:
            close = difflib.get_close_matches(name, cls.fields, 1)
            hint = f". Did you mean '{close[0]}'?" if close else ""
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument '{name}'{hint}")
    missing = [f.name for f in cls.fields.values() if f.default is REQUIRED and f.name not in given]
    if missing:
        raise TypeError(f"{cls.__name__}() missing required keyword-only argument(s): {', '.join(missing)}")
