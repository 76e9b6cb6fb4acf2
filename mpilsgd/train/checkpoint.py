"""What a checkpoint holds of a rank, and the writing of all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mpilsgd.comm import Topology
from mpilsgd.methods import Method
from mpilsgd.train.progress import Progress
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.sampling import random_state, restore_random_state
from mpilsgd.train.together import FAILED, on_first, together


def state_of(model: torch.nn.Module, opt: Method, at: Progress) -> dict[str, Any]:
    """All that this rank needs to go on from here."""
    return {
        "model": model.state_dict(),
        "optimizer": opt.state_dict(),
        "progress": dataclasses.asdict(at),
        "metrics": dataclasses.asdict(opt.metrics),
        "random": random_state(),
    }


def restore(state: dict[str, Any], model: torch.nn.Module, opt: Method) -> Progress:
    """Takes up what `state_of` gave. Collective.

    Raises: ValueError on every rank if it is of another model or method.
    """
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of another model: {' '.join(str(error).split())}") from None
    opt.load_state_dict(state["optimizer"])
    for key, value in state["metrics"].items():
        setattr(opt.metrics, key, value)
    traffic = opt.fabric.traffic
    traffic.group, traffic.across = opt.metrics.bytes_group, opt.metrics.bytes_across
    restore_random_state(state["random"])
    return Progress(**state["progress"])


def write(topology: Topology, directory: RunDirectory, name: int, state: dict[str, Any]) -> None:
    """Writes a checkpoint, which counts when all of it is there; its name is a step that no other has. Collective."""
    rank = topology.world.rank
    written = together(topology, directory.save, rank, name, state, status=FAILED)
    on_first(topology, directory.seal, name, topology.allgather(written), status=FAILED)
    together(topology, directory.sweep, rank, name, status=FAILED)
