"""The method classes as the command line sees them: their options are their constructors' keyword arguments."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mpilsgd.methods
from mpilsgd.methods import Method
from mpilsgd.train.callables import is_path, resolve

NO_DEFAULT = inspect.Parameter.empty
_NOT_OPTIONS = ("self", "optimizer", "topology", "model")
_SIMPLE = (int, float, bool, str, type(None))
# In a newcomer's words; an option that is not listed is explained by its class' docstring.
_HELP = {
    "init": "same: all start from rank 0's parameters; different: each from its own",
    "buffers": "BatchNorm statistics: average (exchanged like parameters), keep (each worker its own) or recalibrate "
    "(recomputed on training data before each evaluation)",
    "period": "steps between exchanges; LocalSGD also takes a list of steps ([1,10,100]), null (only at the end) or "
    "package.module:callable (step -> true or false)",
    "pull": "rate of the pull toward the leader of the group, in [0, 1]",
    "global_pull": "rate of the pull toward the leader of all, in [0, 1] (null: as pull)",
    "global_period": "steps between pulls toward the leader of all (null: 2 period)",
    "loss_window": "batches over whose mean training loss leaders are elected",
    "when": "after_step, with_step (pull and gradient at the same point) or every_step (pull at every step, toward the "
    "leaders as they last were)",
    "sequential": "where both pulls are due: the local one first, then the global one",
    "center_rate": "rate at which the centre moves to the mean of the workers",
    "moving_rate": "rate at which a worker moves to the centre (null: center_rate / ranks), or a tree's node to "
    "its neighbours (null: 0.9 / (1 + the most children of a node))",
    "form": "jacobi: workers and centre move at once; gauss-seidel: the centre moves first",
    "until_grad_norm": "each worker steps until its squared gradient norm is at most this, in place of period",
    "average": "what is evaluated; LocalSGD: last (the mean of the workers) or quadratic (their mean over time, "
    "weights (a+t)^2); Downpour: null (the centre), running (its mean over time) or the rate of a moving average",
    "a": "see average (null: the period)",
    "asynchronous": "true: nobody waits for others to take as many steps (LSGD: rounds go by the steps of all "
    "together); wait-free (LSGD): nobody waits at all, each pulls to what the leader last published; ADMM, false: "
    "the workers take turns",
    "overlap": "go on computing while the exchange with the centre is under way (form jacobi)",
    "order": "of an asynchronous run: free (as it comes) or the same every time: round-robin (rank 0's step, then rank "
    "1's, ...), of a tree lock-step (all nodes at once)",
    "record": "file for the order of events of an asynchronous run, to replay it",
    "replay": "file that record wrote: the same run again, bit for bit, with the same other options",
    "momentum": "momentum of the centre, in [0, 1); above 0 it needs period 1",
    "degree": "children of a tree node, at most",
    "scheme": "multi-scale: leaves and their parents talk every period steps, inner nodes every upper_period; up-down: "
    "to the parent every up_period, to the children every down_period",
    "upper_period": "multi-scale: steps between messages of inner nodes (null: 100)",
    "up_period": "up-down: steps between messages to the parent (null: 8)",
    "down_period": "up-down: steps between messages to the children, at least up_period (null: 80)",
    "inner": "inner nodes of the tree: ranks (have ranks of their own, which compute nothing) or hosted (by leaves)",
    "rho": "penalty on the distance to the centre, above 0",
}


@dataclass
class MethodOption:
    """One keyword argument: its type, and the help and the default of each class that has it."""

    name: str
    type: Any
    defaults: dict[str, Any]
    help: str

    @property
    def takes_code(self) -> bool:
        """Whether `package.module:callable` may name the value."""
        return self.type is Any


def methods() -> dict[str, type[Method]]:
    """All method classes by name."""
    public = vars(mpilsgd.methods).values()
    return {
        c.__name__: c for c in public if isinstance(c, type) and issubclass(c, Method) and c is not Method
    }


def method_options(reserved: Iterable[str] = ()) -> dict[str, MethodOption]:
    """Every option of any method, by its name on the command line; reserved names get the prefix `method_`."""
    reserved = set(reserved)
    options: dict[str, MethodOption] = {}
    for class_name, cls in methods().items():
        hints, texts = _hints(cls), _argument_texts(cls)
        for parameter in _parameters(cls):
            if _is_code(hints.get(parameter.name)):
                continue
            key = f"method_{parameter.name}" if parameter.name in reserved else parameter.name
            kind = _parser_type(hints.get(parameter.name, Any))
            option = options.setdefault(key, MethodOption(parameter.name, kind, {}, ""))
            option.type = _either(option.type, kind)
            option.defaults[class_name] = parameter.default
            option.help = option.help or _HELP.get(parameter.name) or texts.get(parameter.name, "")
    return options


def names_of(cls: type[Method], options: dict[str, MethodOption]) -> list[str]:
    """The command line names of the options that one method has."""
    return [key for key, option in options.items() if cls.__name__ in option.defaults]


def required(cls: type[Method], options: dict[str, MethodOption]) -> list[str]:
    """Those of them without which the method cannot be made."""
    return [key for key in names_of(cls, options) if options[key].defaults[cls.__name__] is NO_DEFAULT]


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


def _argument_texts(cls: type[Method]) -> dict[str, str]:
    """What the class says about each argument in the `Args:` part of its docstring."""
    document = inspect.cleandoc(cls.__doc__ or "")
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
