"""What a checkpoint holds of a rank, and the writing of all of them."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from mpilsgd.comm import Topology
from mpilsgd.methods import Method
from mpilsgd.train import devices, saved
from mpilsgd.train.files import Written
from mpilsgd.train.precision import Precision
from mpilsgd.train.progress import Progress
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.sampling import restore_random_state
from mpilsgd.train.together import FAILED, on_first, together


def state_of(
    model: torch.nn.Module, opt: Method, at: Progress, precision: Precision, random: dict[str, Any]
) -> dict[str, Any]:
    """All that this rank needs to go on from here. random: as of `sampling.random_state`."""
    return {
        "model": model.state_dict(),
        "optimizer": opt.state_dict(),
        "progress": dataclasses.asdict(at),
        "metrics": dataclasses.asdict(opt.metrics),
        "scaler": precision.state(),
        "centre": saved.told(model, opt),
        "random": random,
    }


def restore(state: dict[str, Any], model: torch.nn.Module, opt: Method, precision: Precision) -> Progress:
    """Takes up what `state_of` gave. Collective.

    Raises: ValueError on every rank if it is of another model, method or version.
    """
    opt.topology.agree(None if _fits(state) else "the checkpoint is of another version of mpilsgd")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of another model: {' '.join(str(error).split())}") from None
    opt.load_state_dict(state["optimizer"])
    for key, value in state["metrics"].items():
        setattr(opt.metrics, key, value)
    traffic = opt.fabric.traffic
    traffic.group, traffic.across = opt.metrics.bytes_group, opt.metrics.bytes_across
    precision.load(state.get("scaler"))
    restore_random_state(state["random"])
    return Progress(**state["progress"])


def _fits(state: Any) -> bool:
    needed = {"model", "optimizer", "progress", "metrics", "random"}
    if not isinstance(state, dict) or not needed <= state.keys():
        return False
    known = {field.name for field in dataclasses.fields(Progress)}
    return isinstance(state["progress"], dict) and state["progress"].keys() <= known


class Checkpoints:
    """Writes the checkpoints of a run; each counts when all of it is there. All functions are collective.

    behind: with `write` the state is only copied to the host, in the order of the GPU's stream, and a thread writes the
    file when the copy is there; the checkpoint counts from `finish` on, which comes before the next `write`.
    """

    def __init__(self, topology: Topology, directory: RunDirectory, behind: bool):
        self._topology, self._directory, self._rank = topology, directory, topology.world.rank
        self._thread = ThreadPoolExecutor(1, "mpilsgd checkpoint") if behind else None
        self._begun: tuple[int, Future[Written]] | None = None

    def write(self, name: int, state: dict[str, Any], others_write: bool) -> None:
        """Writes a checkpoint; its name is a step that no other has.

        others_write: whether other workers may write into this one's vectors when they go on.
        """
        if self._thread is None:
            written = together(self._topology, self._directory.save, self._rank, name, state, status=FAILED)
            self._seal(name, written)
            return
        copy, copied = devices.on_host(state), devices.event()
        copied.record()
        if others_write:
            copied.synchronize()
        self._topology.barrier()
        self._begun = name, self._thread.submit(self._write, name, copy, copied)

    def _write(self, name: int, state: dict[str, Any], copied: Any) -> Written:
        copied.synchronize()
        return self._directory.save(self._rank, name, state)

    def finish(self) -> None:
        """The last checkpoint counts from now on."""
        if self._begun is not None:
            (name, file), self._begun = self._begun, None
            self._seal(name, together(self._topology, file.result, status=FAILED))

    def _seal(self, name: int, written: Written) -> None:
        everyone = self._topology.allgather(written)
        on_first(self._topology, self._directory.seal, name, everyone, status=FAILED)
        together(self._topology, self._directory.sweep, self._rank, name, status=FAILED)
