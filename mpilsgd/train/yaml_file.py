"""Configurations as YAML: lines of the form `option: value`."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

_LONGEST = 1 << 18  # bytes
_DEEP = 10  # levels; the time that yaml takes grows with their square
_FAR = 2**63  # beyond it numbers are no counts


def options_in(file: str | None) -> tuple[dict[str, Any], str | None]:
    """What stands in a configuration file, and what is wrong with it, in one line."""
    if file is None:
        return {}, "config: needs a file"
    try:
        with open(file, "rb") as opened:
            text = opened.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            return {}, f"{file}: has more than {_LONGEST} bytes, which no configuration does"
        content = yaml.load(text.decode(), _Loader)
    except OSError as error:
        return {}, f"{file}: cannot be read: {error.strerror or error}"
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        return {}, f"{file}, line {line}: {textwrap.shorten(str(error.problem), 200)}"
    except Exception as error:  # dates and numbers that are none, deep nesting: yaml raises what it meets
        return {}, f"{file}: not a YAML file: {textwrap.shorten(str(error), 200)}"
    if content is None:
        return {}, None
    if not isinstance(content, dict):
        return {}, f"{file}: must hold lines of the form `option: value`"
    return content, None


class _Loader(yaml.SafeLoader):
    """Refuses what YAML takes without a word: an option given twice, values by reference, endless whole numbers."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _error("a value by reference (*) is not taken", self.peek_event())
        if self._depth == _DEEP:
            raise _error("nested too deeply", self.peek_event())
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[str]()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise _error(f"{name!r} stands twice", key)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= _FAR:
            raise _error("a whole number beyond 2^63", node)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
