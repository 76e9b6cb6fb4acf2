"""A run that has diverged ends on all ranks, and says so without a trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from mpilsgd.comm import Topology
from mpilsgd.methods import Diverged, Method
from mpilsgd.train.together import FAILED, Stopped, stop_if


def refuse_first(topology: Topology, loss: float) -> None:
    """A first loss that is not finite never becomes finite. Collective."""
    wrong = f"the loss is {loss} at the first step: check the data's values and the model's initial ones"
    stop_if(topology, None if math.isfinite(loss) else wrong, FAILED)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """A method that finds every worker non-finite says so on all ranks."""
    try:
        yield
    except Diverged as error:
        raise Stopped(str(error), FAILED) from None


def diverged(topology: Topology, opt: Method, loss: float) -> bool:
    """Whether no worker's last loss is finite. Collective."""
    losses = topology.allgather(loss)
    return not any(math.isfinite(losses[rank]) for rank in opt.workers)


def refuse(topology: Topology, opt: Method, loss: float, step: float) -> None:
    """Ends the run where no worker's last loss is finite. Collective."""
    if diverged(topology, opt, loss):
        reason = (
            f"the loss of every worker is non-finite at step {step:g}: the run has diverged; try a smaller lr"
        )
        raise Stopped(reason, FAILED)
