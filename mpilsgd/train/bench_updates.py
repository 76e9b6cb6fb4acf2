"""The updates that `mpilsgd bench kernels` measures, ours and as torch has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from mpilsgd import kernels

RATE, OTHER_RATE = 0.1, 0.05
LR, MOMENTUM, DECAY = 1e-3, 0.9, 1e-4


class Contest(NamedTuple):
    """One update, ours and torch's, on the same vectors.

    vectors: how many vectors the update must at least move (each read and each write of one counts once).
    """

    name: str
    baseline: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    vectors: int
    target: str = ""


def contests(vectors: list[torch.Tensor]) -> Iterator[Contest]:
    """The updates over the same four vectors; they all draw the vectors together, so nothing overflows."""
    x, a, b, c = vectors

    def torch_elastic() -> None:
        d = x - c
        x.sub_(d, alpha=RATE)
        c.add_(d, alpha=RATE)

    def torch_moving_average() -> None:
        c.mul_(1.0 - 3 * RATE)
        for peer in (x, a, b):
            c.add_(peer, alpha=RATE)

    def torch_mean() -> None:
        mean = torch.stack(vectors).mean(0)
        for peer in vectors:
            peer.copy_(mean)

    def two_lerps() -> None:
        x.lerp_(a, RATE)
        x.lerp_(b, OTHER_RATE)

    yield Contest(
        "pull to one leader", "lerp_", lambda: kernels.pull(x, a, RATE), lambda: x.lerp_(a, RATE), 3
    )
    yield Contest(
        "pull to two leaders",
        "two lerp_",
        lambda: kernels.pull(x, a, RATE, b, OTHER_RATE),
        two_lerps,
        4,
        ">= 1.3",
    )
    yield Contest(
        "... with statistics",
        "two lerp_",
        lambda: kernels.pull(x, a, RATE, b, OTHER_RATE, stats=True),
        two_lerps,
        4,
    )
    yield Contest(
        "elastic pair",
        "3 operations",
        lambda: kernels.elastic(c, [x], RATE, RATE),
        torch_elastic,
        4,
        ">= 2.2",
    )
    yield Contest(
        "centre over 3 peers",
        "4 operations",
        lambda: kernels.elastic(c, [x, a, b], 0.0, RATE),
        torch_moving_average,
        5,
    )
    yield Contest("mean of 4 peers", "stack, mean, copy_", lambda: kernels.average(vectors), torch_mean, 8)
    yield Contest("running average", "lerp_", lambda: kernels.pull(c, x, 0.01), lambda: c.lerp_(x, 0.01), 3)
    for fused in (False, True):
        optimizer = _torch_sgd(x, a, b, fused)
        if optimizer is not None:
            yield Contest(
                "msgd (Nesterov)",
                "SGD fused=True" if fused else "SGD",
                lambda: kernels.msgd(x, a, b, LR, MOMENTUM, True, DECAY),
                optimizer.step,
                5,
            )
    plain = _torch_sgd(x, a, b, False)
    assert plain is not None
    step = plain.step

    def step_and_pull() -> None:
        step()
        x.lerp_(c, RATE)

    yield Contest(
        "msgd and pull",
        "SGD, lerp_",
        lambda: kernels.msgd(x, a, b, LR, MOMENTUM, True, DECAY, c, RATE),
        step_and_pull,
        6,
    )


def _torch_sgd(
    x: torch.Tensor, grad: torch.Tensor, velocity: torch.Tensor, fused: bool
) -> torch.optim.SGD | None:
    """torch's SGD on the memory of these; None where it has no such implementation."""
    parameter = torch.nn.Parameter(x)
    parameter.grad = grad
    try:
        optimizer = torch.optim.SGD(
            [parameter], LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY, fused=fused
        )
        optimizer.state[parameter]["momentum_buffer"] = velocity
        optimizer.step()
    except RuntimeError:
        return None
    return optimizer
