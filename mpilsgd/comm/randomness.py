"""The random generators that every process has, as tasks of one process need them once each."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch


class Generators(NamedTuple):
    """The states of Python's, numpy's and torch's; cuda: of the current device (None: not in use yet)."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: torch.Tensor | None


def taken() -> Generators:
    """As they are now."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return Generators(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)


def put(states: Generators) -> None:
    """As they were."""
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch)
    if torch.cuda.is_initialized():
        fresh = states.cuda if states.cuda is not None else torch.Generator("cuda").get_state()
        torch.cuda.set_rng_state(fresh)


def fresh(seed: int) -> Generators:
    """As a new process has them; the seed stands for what Python's and numpy's take from the system."""
    numpy = np.random.RandomState(seed).get_state(legacy=False)
    return Generators(random.Random(seed).getstate(), numpy, torch.Generator().get_state(), None)
