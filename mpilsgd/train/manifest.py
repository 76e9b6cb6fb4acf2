"""checkpoint/manifest.json: which files are the run's checkpoint, and what lies in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mpilsgd import sealed
from mpilsgd.train.callables import InputError
from mpilsgd.train.files import Written, replace


@dataclasses.dataclass
class Manifest:
    """What belongs together.

    Attributes:
        config: digests of config.yaml; two while it is being replaced.
        step: the name of the checkpoint, None before there is one.
        files: of every rank, in order.
    """

    config: list[str]
    step: int | None = None
    files: list[Written] = dataclasses.field(default_factory=list)

    def write(self, path: Path) -> None:
        named = (
            {}
            if self.step is None
            else {file_name(self.step, r): f._asdict() for r, f in enumerate(self.files)}
        )
        text = sealed.text({"step": self.step, "files": named, "config": self.config}, indent=2)
        replace(path, lambda file: file.write(text.encode()))


def read(path: Path) -> Manifest:
    """What `write` wrote.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        found = sealed.content(path.read_bytes())
        step, files = found["step"], found["files"]
        names = [] if step is None else [file_name(step, rank) for rank in range(len(files))]
        if list(files) != names:
            raise ValueError("its files are not those of its step")
        return Manifest(list(found["config"]), step, [Written(**file) for file in files.values()])
    except FileNotFoundError:
        raise InputError(
            f"{path}: is missing, so nothing says which files belong to the run: put it back, or start anew with "
            "--overwrite"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def file_name(step: int, rank: int) -> str:
    """Of a rank's part of a checkpoint."""
    return f"step-{step:010d}.rank{rank:05d}.pt"
