"""The run directory: what a run leaves behind, written so that a kill at any moment leaves it usable."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mpilsgd.train.callables import InputError

METRICS = (
    *("step", "epoch", "wall_s", "grad_evals", "rounds", "bytes_group", "bytes_across"),
    *("train_loss", "test_loss", "test_error", "leader", "t_compute", "t_data", "t_comm"),
)
_PROBE_BYTES = 1 << 20
_FILES = ("config.yaml", "metrics.jsonl", "leaders.jsonl", "summary.json")


class RunDirectory:
    """config.yaml, metrics.jsonl, leaders.jsonl, summary.json and checkpoint/ of one run.

    Rank 0 writes all of them but the checkpoints, of which every rank writes its own file. A checkpoint counts once
    its manifest names its files; the manifest is written when all files are there, and every file is renamed into
    place whole, so that there is always either the old checkpoint or the new one. The file "interrupted" says
    that a signal has ended the run, until the next start.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint"
        self.manifest = self.checkpoint / "manifest.json"
        self.interrupted = self.path / "interrupted"

    # Rank 0, before training

    def claim(self, config_text: str, overwrite: bool = False, resume: bool = False, need: int = 0) -> None:
        """Makes the directory, and begins a new run.

        Args:
            need: bytes that the run's checkpoints will take.

        Raises:
            InputError: it holds a run already, cannot be written, or the disk is full.
        """
        if resume and not (self.path / "config.yaml").is_file():
            raise InputError(f"{self.path}: holds no run to resume (no config.yaml)")
        if not (resume or overwrite) and any((self.path / name).exists() for name in _FILES):
            raise InputError(
                f"{self.path}: holds a run already; choose another --output, continue it with "
                f"--resume {self.path}, or replace it with --overwrite"
            )
        try:
            self.checkpoint.mkdir(parents=True, exist_ok=True)
            self.interrupted.unlink(missing_ok=True)
            self.probe(_PROBE_BYTES)
            if overwrite and not resume:
                self._clear()
            self._make_room(need)
            if not resume:
                self.begin(config_text)
        except OSError as error:
            self._leave()
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        except InputError:
            self._leave()
            raise

    def begin(self, config_text: str) -> None:
        """Writes config.yaml: a run begins or has been taken up."""
        _replace(self.path / "config.yaml", lambda file: file.write(config_text.encode()))

    def probe(self, size: int = 1) -> None:
        """Writes and removes a file, to find out before training what would fail after it."""
        path = self.checkpoint / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with open(path, "wb") as file:
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)

    def _make_room(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise InputError(
                f"{self.path}: the disk has {free / 1e6:.1f} MB left, the checkpoints of this run need "
                f"{nbytes / 1e6:.1f} MB"
            )

    def _leave(self) -> None:
        """Takes back the empty folders of a run that will not be."""
        with contextlib.suppress(OSError):
            self.checkpoint.rmdir()
            self.path.rmdir()

    def _clear(self) -> None:
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        self.manifest.unlink(missing_ok=True)  # first: without it the files count for nothing
        for pattern in ("step-*.pt*", "center.pt*", ".probe-*"):
            for path in self.checkpoint.glob(pattern):
                path.unlink(missing_ok=True)

    # Rank 0, during training

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Adds lines to metrics.jsonl or leaders.jsonl."""
        lines = [json.dumps(_plain(record), allow_nan=False) + "\n" for record in records]
        with _named(self.path / name), open(self.path / name, "ab") as file:
            file.write("".join(lines).encode())

    def cut(self, step: float) -> None:
        """Drops the lines that lie after a step, and half a line at the end: they will be written again."""
        for name in ("metrics.jsonl", "leaders.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [
                    line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step
                ]
                _replace(path, lambda file, kept=kept: file.writelines(kept))  # type: ignore[misc]

    def evaluated(self) -> float:
        """The step of the last line of metrics.jsonl; 0 without any."""
        path = self.path / "metrics.jsonl"
        written = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return _step_of(written[-1]) if written else 0

    def summarize(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        text = json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n"
        _replace(self.path / "summary.json", lambda file: file.write(text.encode()))

    def save_center(self, state: dict[str, Any]) -> None:
        """Writes the centre's state_dict, the model that was trained: torch.load and load_state_dict take it."""
        _replace(self.checkpoint / "center.pt", lambda file: torch.save(state, file))

    # Checkpoints

    def save(self, rank: int, step: int, state: dict[str, Any]) -> None:
        """Writes one rank's file of the checkpoint at a step. It counts after `seal`."""
        _replace(self.checkpoint / _file_name(step, rank), lambda file: torch.save(_loadable(state), file))

    def seal(self, step: int, world_size: int) -> None:
        """Rank 0, when all ranks' files are written: from now on this is the checkpoint."""
        files = {
            name: (self.checkpoint / name).stat().st_size
            for name in (_file_name(step, r) for r in range(world_size))
        }
        text = json.dumps({"step": step, "world_size": world_size, "files": files}, indent=2) + "\n"
        _replace(self.manifest, lambda file: file.write(text.encode()))

    def sweep(self, rank: int, step: int) -> None:
        """Removes this rank's files of other checkpoints than the sealed one."""
        for path in self.checkpoint.glob(f"step-*.rank{rank:05d}.pt*"):
            if path.name != _file_name(step, rank):
                path.unlink(missing_ok=True)

    def sealed_step(self, world_size: int) -> int | None:
        """The step of the checkpoint, None if no checkpoint was finished.

        Raises:
            InputError: it is of another number of ranks, or damaged.
        """
        if not self.manifest.exists():
            return None
        try:
            manifest = json.loads(self.manifest.read_text())
            step, ranks, files = int(manifest["step"]), int(manifest["world_size"]), dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.manifest}: cannot be read: {error!r}") from error
        if ranks != world_size:
            raise InputError(
                f"{self.path}: is a run of {ranks} rank(s); it cannot be resumed on {world_size}"
            )
        for name, size in files.items():
            path = self.checkpoint / name
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise InputError(
                    f"{path}: expected {size} bytes, found {'no file' if found is None else found}"
                )
        return step

    def load(self, rank: int, step: int) -> dict[str, Any]:
        """One rank's part of the checkpoint."""
        path = self.checkpoint / _file_name(step, rank)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise InputError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from error


def _file_name(step: int, rank: int) -> str:
    return f"step-{step:010d}.rank{rank:05d}.pt"


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file beside `path` and renames it into place when it is safely on the disk."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with _named(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk is reported without the file's name, and by torch as a RuntimeError."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
    except RuntimeError as error:
        raise OSError(errno.EIO, f"cannot be written: {str(error).splitlines()[0]}", str(path)) from error


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    """The value for strict JSON: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _loadable(value: Any) -> Any:
    """The value with Python's numbers for NumPy's, which a loader that runs no code refuses."""
    if isinstance(value, dict):
        return {key: _loadable(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_loadable(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value
