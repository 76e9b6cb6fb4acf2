"""`--log`: the lines of metrics.jsonl in the format of another tool, by that tool's own library."""

from __future__ import annotations

import csv
import importlib.util
import json
import uuid
from pathlib import Path
from typing import Any, Protocol

import yaml

from mpilsgd.train.callables import InputError

KINDS = ("tensorboard", "wandb", "csv")
# Which module each needs, and which of its scalars stand together in a picture
_LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb"}
_PARTS = {"train": "train", "test": "test", "t": "seconds", "bytes": "bytes"}


class Log(Protocol):
    """Takes the lines of metrics.jsonl as they are written. On rank 0."""

    def write(self, line: dict[str, Any]) -> None:
        """A line; what is null in it is left out."""


def problem(kind: str | None) -> str | None:
    """Why there can be no such log here, before training."""
    if kind not in _LIBRARIES or importlib.util.find_spec(_LIBRARIES[kind]) is not None:
        return None
    return f"{kind} is not installed: pip install 'mpilsgd[{kind}]'"


def open_log(kind: str, directory: Path) -> Log:
    """The log of a run that begins, or goes on behind the lines that are there.

    Raises:
        InputError: the library refuses; the text says why.
    """
    lines = directory / "metrics.jsonl"
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    if kind == "csv":
        return _Csv(directory / "metrics.csv", known)
    make: Any = {"tensorboard": _Tensorboard, "wandb": _Wandb}[kind]
    try:
        made: Log = make(directory, known)
        return made
    except OSError:
        raise
    except Exception as error:  # of the library, which has many
        raise InputError(f"log: {kind}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


class _Csv:
    """metrics.csv, a column a key of the first line."""

    def __init__(self, path: Path, known: list[dict[str, Any]]):
        self._path, self._names = path, list[str]()
        path.unlink(missing_ok=True)
        for line in known:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            if not self._names:
                self._names = list(line)
                csv.writer(file).writerow(self._names)
            csv.DictWriter(file, self._names, extrasaction="ignore").writerow(line)


class _Tensorboard:
    """tensorboard/ in the run directory: `tensorboard --logdir RUN`."""

    def __init__(self, directory: Path, known: list[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        behind = int(known[-1]["step"]) + 1 if known else 0
        # what a resumed run had written after its checkpoint is hidden
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=behind)
        self._writer.add_text("config", "```\n" + (directory / "config.yaml").read_text() + "```", behind)

    def write(self, line: dict[str, Any]) -> None:
        step = round(line["step"])
        for key, value in line.items():
            if value is not None and key != "step":
                self._writer.add_scalar(_titled(key), value, step)
        self._writer.flush()


class _Wandb:
    """A run of Weights & Biases, which has the name of the run directory; resumed runs go on in it."""

    def __init__(self, directory: Path, known: list[dict[str, Any]]):
        import wandb

        remembered = directory / "wandb-id"
        if not known:
            remembered.unlink(missing_ok=True)
        name = remembered.read_text() if remembered.exists() else uuid.uuid4().hex[:8]
        remembered.write_text(name)
        self._run = wandb.init(
            project="mpilsgd",
            name=directory.resolve().name,
            id=name,
            resume="allow",
            dir=str(directory),
            config=yaml.safe_load((directory / "config.yaml").read_text()),
        )

    def write(self, line: dict[str, Any]) -> None:
        told = {_titled(key): value for key, value in line.items() if value is not None}
        self._run.log(told, step=round(line["step"]), commit=True)  # else it waits for the next


def _titled(key: str) -> str:
    """test_error as test/error: what has one beginning stands together in a picture."""
    head, _, tail = key.partition("_")
    return f"{_PARTS[head]}/{tail}" if tail and head in _PARTS else key
