"""JSON that carries its own digest, so that what was changed or damaged since it was written is refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_DIGEST = "sha256"  # of the rest


class Foreign(ValueError):
    """What was read is nothing that `text` has written."""


def text(content: dict[str, Any], indent: int | None = None) -> str:
    """The content as JSON, with its digest as the last entry. indent: spaces a level, None for one line."""
    return json.dumps({**content, _DIGEST: _digest(content)}, indent=indent) + "\n"


def content(written: bytes) -> dict[str, Any]:
    """What was given to `text`.

    Raises:
        Foreign: it is of another form.
        ValueError: it was changed or damaged.
    """
    try:
        found = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise Foreign(f"it is not JSON ({error})") from None
    if not isinstance(found, dict) or _DIGEST not in found:
        raise Foreign("it has no digest")
    told = found.pop(_DIGEST)
    if told != _digest(found):
        raise ValueError("it was changed or damaged since it was written (its SHA-256 is another)")
    return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
