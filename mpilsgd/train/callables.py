"""Objects that a configuration names as `package.module:callable`."""

from __future__ import annotations

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
        InputError: it cannot be imported or called; the text says why.
    """
    module_name, _, attributes = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module raises when it is imported
        raise InputError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"{path!r} is a {type(found).__name__}, not something to call")
    return found


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
