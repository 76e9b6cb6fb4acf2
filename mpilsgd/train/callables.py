"""Objects that a configuration names as `package.module:callable`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used; the text says what, and what would be right."""


def is_path(name: object) -> bool:
    """Whether a configuration value has the form `package.module:callable`."""
    return isinstance(name, str) and name.count(":") == 1 and all(name.split(":"))


def resolve(path: str) -> Any:
    """The callable `package.module:callable`; modules of the current directory are found too.

    Raises:
        InputError: it cannot be imported or called; the text says why, and where was looked.
    """
    module_name, _, attributes = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = None
    try:
        found = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module raises when it is imported
        told = f"cannot import {path!r}: {type(error).__name__}: {error}"
        raise InputError(f"{told}{_where(module_name, found, error)}") from error
    if not callable(found):
        raise InputError(f"{path!r} is a {type(found).__name__}, not something to call")
    return found


def _where(module_name: str, found: Any, error: BaseException) -> str:
    """Where was looked for what is missing; nothing if the module itself raises."""
    if isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name)):
        folders = [folder or os.getcwd() for folder in sys.path if not folder.endswith(".zip")]
        return f"; looked in {', '.join(dict.fromkeys(folders))}"
    if isinstance(error, AttributeError) and found is not None:
        close = difflib.get_close_matches(str(error.name), dir(found), 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"; looked in {getattr(found, '__file__', None) or repr(found)}{meant}"
    return ""


def call(path: str, given: dict[str, Any], offered: dict[str, Any] | None = None) -> Any:
    """What `package.module:callable` returns.

    Args:
        given: arguments by position; the names are for the error alone.
        offered: further arguments; those are passed that it takes by name.

    Raises:
        InputError: it cannot be imported, or not be called so.
    """
    function = resolve(path)
    named = accepted(function, offered or {})
    check_call(path, function, list(given), named, offered)
    return function(*given.values(), **named)


def check_call(
    path: str,
    function: Callable[..., Any],
    given: list[str],
    named: dict[str, Any] | None = None,
    offered: dict[str, Any] | None = None,
) -> None:
    """An InputError, if the function cannot be called with these arguments. given: names, by position."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-ins without a signature
        return
    try:
        signature.bind(*given, **(named or {}))
    except TypeError as error:
        by_name = f", and by name, if it takes them, with {', '.join(offered)}" if offered else ""
        with_what = f"with ({', '.join(given)})" if given else "without arguments"
        raise InputError(
            f"{path}: is called {with_what}{by_name}; it is defined with {signature}: {error}"
        ) from None


def accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keyword arguments that the function takes by name (all, if it has **kwargs)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-ins without a signature
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in names}


def names_all(function: Callable[..., Any], *names: str) -> bool:
    """Whether the function has parameters of all these names."""
    return set(names) <= _names(function)


def names_any(function: Callable[..., Any], *names: str) -> bool:
    """Whether it has one of any."""
    return bool(set(names) & _names(function))


def _names(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built-ins without a signature
        return set()
