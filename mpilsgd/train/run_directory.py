"""The run directory: what a run leaves behind, written so that a kill at any moment leaves it usable."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mpilsgd.train import manifest
from mpilsgd.train.callables import InputError
from mpilsgd.train.files import Written, digest, named, replace, written
from mpilsgd.train.manifest import Manifest, file_name
from mpilsgd.train.plain import first_line, loadable, plain

METRICS = (
    *("step", "epoch", "wall_s", "grad_evals", "rounds", "bytes_group", "bytes_across"),
    *("train_loss", "test_loss", "test_error", "leader", "t_compute", "t_data", "t_comm", "t_wait"),
)
_PROBE_BYTES = 1 << 20
_FILES = ("config.yaml", "command", "metrics.jsonl", "leaders.jsonl", "ranks.json", "summary.json")
_LOGS = ("metrics.csv", "wandb-id")  # of --log


class RunDirectory:
    """config.yaml, command, metrics.jsonl, leaders.jsonl, ranks.json, summary.json and checkpoint/ of one run.

    Rank 0 writes all of them but the checkpoints, of which every rank writes its own file. A checkpoint counts once
    its manifest names its files; the manifest is written when all files are there, and every file is renamed into
    place whole, so that there is always either the old checkpoint or the new one. The file "interrupted" says
    that a signal has ended the run, until the next start.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoint = self.path / "checkpoint"
        self.manifest = self.checkpoint / "manifest.json"
        self.interrupted = self.path / "interrupted"

    # Rank 0, before training

    def claim(
        self,
        config_text: str,
        overwrite: bool = False,
        resume: bool = False,
        need: int = 0,
        command: str = "",
    ) -> None:
        """Makes the directory, and begins a new run.

        Args:
            need: bytes that the run's checkpoints will take; command: that started it.

        Raises:
            InputError: it holds a run already, cannot be written, or the disk is full.
        """
        if resume:
            self.check_config()
        if not (resume or overwrite) and self._holds_a_run():
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
                self.begin(config_text, command=command)
        except OSError as error:
            self._leave()
            raise InputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        except InputError:
            self._leave()
            raise

    def _holds_a_run(self) -> bool:
        return any((self.path / name).exists() for name in _FILES) or any(self.checkpoint.glob("step-*.pt"))

    def begin(self, config_text: str, resume: bool = False, command: str = "") -> None:
        """Writes config.yaml and a line of `command`: a run begins or is taken up, perhaps with other options.

        The manifest knows the new configuration before it is there, and the old one until the next checkpoint: whenever
        the job is killed, the two fit.
        """
        content = config_text.encode()
        now = Manifest([])
        if resume:
            now = manifest.read(self.manifest)
            now.config = [digest(self.config.read_bytes())]  # one of those it knows
        if digest(content) not in now.config:
            now.config.append(digest(content))
            now.write(self.manifest)
        replace(self.config, lambda file: file.write(content))
        if command:
            with named(self.path / "command"), open(self.path / "command", "a", encoding="utf-8") as file:
                file.write(command + "\n")

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
        for name in (*_FILES, *_LOGS):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self.manifest.unlink(missing_ok=True)  # first: without it the files count for nothing
        for pattern in ("step-*.pt*", "center.pt*", "best.pt*", ".probe-*"):
            for path in self.checkpoint.glob(pattern):
                path.unlink(missing_ok=True)

    # Rank 0, during training

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Adds lines to metrics.jsonl or leaders.jsonl."""
        lines = [json.dumps(plain(record), allow_nan=False) + "\n" for record in records]
        with named(self.path / name), open(self.path / name, "ab") as file:
            file.write("".join(lines).encode())

    def cut(self, step: float) -> None:
        """Drops the lines that lie after a step, and half a line at the end: they will be written again."""
        for name in ("metrics.jsonl", "leaders.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [
                    line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step
                ]
                replace(path, lambda file, kept=kept: file.write(b"".join(kept)))  # type: ignore[misc]

    def evaluated(self) -> float:
        """The step of the last line of metrics.jsonl; 0 without any."""
        path = self.path / "metrics.jsonl"
        written = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return _step_of(written[-1]) if written else 0

    def summarize(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, with what lies in the files of lines: `report` sees whether they were changed."""
        contents = {path.name: path.read_bytes() for path in self.path.glob("*.jsonl")}
        files = {name: Written(len(lines), digest(lines))._asdict() for name, lines in contents.items()}
        self.tell("summary.json", {**summary, "files": files})

    def tell(self, name: str, told: dict[str, Any]) -> None:
        """Writes a file of JSON."""
        text = json.dumps(plain(told), indent=2, allow_nan=False) + "\n"
        replace(self.path / name, lambda file: file.write(text.encode()))

    def save_center(self, state: dict[str, Any]) -> None:
        """Writes the centre's state_dict, the model that was trained: torch.load and load_state_dict take it."""
        replace(self.checkpoint / "center.pt", lambda file: torch.save(state, file))

    def save_best(self, state: dict[str, Any], found: dict[str, Any]) -> None:
        """Keeps the centre that was the best so far, under "model", with what was found of it: step and figure."""
        kept = {**loadable(plain(found)), "model": state}
        replace(self.checkpoint / "best.pt", lambda file: torch.save(kept, file))

    def best(self) -> dict[str, Any] | None:
        """What was found of the best centre so far; None before there is one.

        Raises:
            InputError: it cannot be read.
        """
        path = self.checkpoint / "best.pt"
        if not path.exists():
            return None
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return {key: value for key, value in kept.items() if key != "model"}
        except Exception as error:
            raise InputError(
                f"{path}: cannot be read (remove it to go on without): {first_line(error)}"
            ) from error

    # Checkpoints

    def save(self, rank: int, step: int, state: dict[str, Any]) -> Written:
        """Writes one rank's file of the checkpoint at a step. It counts after `seal`."""
        return replace(
            self.checkpoint / file_name(step, rank), lambda file: torch.save(loadable(state), file)
        )

    def seal(self, step: int, files: Sequence[Written]) -> None:
        """Rank 0, when all ranks' files are written: from now on this is the checkpoint.

        files: what `save` gave, on every rank.
        """
        config = manifest.read(self.manifest).config[-1:]
        Manifest(config, step, list(files)).write(self.manifest)

    def sweep(self, rank: int, step: int) -> None:
        """Removes this rank's files of other checkpoints than the sealed one."""
        for path in self.checkpoint.glob(f"step-*.rank{rank:05d}.pt*"):
            if path.name != file_name(step, rank):
                path.unlink(missing_ok=True)

    def sealed_step(self, world_size: int) -> int | None:
        """The step of the checkpoint, None if no checkpoint was finished.

        Raises:
            InputError: it is of another number of ranks, or damaged.
        """
        found = manifest.read(self.manifest)
        if found.step is not None and len(found.files) != world_size:
            raise InputError(
                f"{self.path}: is a run of {len(found.files)} rank(s); it cannot be resumed on {world_size}"
            )
        return found.step

    def load(self, rank: int, step: int) -> dict[str, Any]:
        """One rank's part of the checkpoint.

        Raises:
            InputError: it is not the file that was saved.
        """
        path = self.checkpoint / file_name(step, rank)
        expected = manifest.read(self.manifest).files[rank]
        try:
            with open(path, "rb") as file:
                found = written(file)
                if found.bytes != expected.bytes:
                    raise InputError(f"{path}: expected {expected.bytes} bytes, found {found.bytes}")
                if found.sha256 != expected.sha256:
                    raise InputError(
                        f"{path}: is not the file that this run saved, or was damaged: its SHA-256 begins with "
                        f"{found.sha256[:12]}, that in {self.manifest.name} with {expected.sha256[:12]}"
                    )
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise InputError(f"{path}: is missing") from None
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            told = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: is nothing that this version of torch can load: {told}") from error

    def saved_step(self) -> int | None:
        """Of the last checkpoint, if there is one."""
        return manifest.read(self.manifest).step if self.manifest.is_file() else None

    def check_config(self) -> None:
        """Whether config.yaml is what the run was told.

        Raises:
            InputError: it is not, or there is no run.
        """
        if not self.config.is_file():
            raise InputError(f"{self.path}: holds no run to resume (no config.yaml)")
        if digest(self.config.read_bytes()) not in manifest.read(self.manifest).config:
            raise InputError(
                f"{self.config}: is not the configuration that this run was started with (it was changed or damaged): "
                "put that back; options that may change are given on the command line"
            )


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
