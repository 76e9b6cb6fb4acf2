"""Leader SGD: the workers are pulled toward the best of their group and the best of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mpilsgd.exchange import (
    ROUND_COST,
    SHARE,
    AdaptiveTwo,
    Method,
    Published,
    Together,
    TwoPeriods,
    choice,
    code,
    flag,
    number,
    pacing,
    whole,
)


class LSGD(Method):
    """Leader SGD with one leader (one group) or a local leader a group and a global one.

        x^{j,i} <- x^{j,i} - pull (x^{j,i} - x~^j) - global_pull (x^{j,i} - x^)

    x~^j, the local leader, is the worker of group j with the least mean training loss over its last
    `loss_window` batches, x^ the best of all; ties go to the lowest rank, and a loss that is not finite never
    leads. The first term is due every `period` steps, the second every `global_period`; when both are, it is one
    simultaneous update. With one group both leaders are one and the rates add: give `global_pull=0` for the
    papers' single-leader LSGD.

    Nothing is copied in a node: all read the leader where it lies, in one pass, then a local leader moves to the
    global one. The centre is the mean of all workers. Momentum is not exchanged. A worker found non-finite is set
    back to the leader. The rates are those of Eq. 3 (the theory's are eta times its lambda).

    `when`: "after_step" (Algorithm 1): the pull follows the gradient step that makes t a multiple of the period.
    "with_step" (section 3.1.2): at the steps whose t, from 0 before the step, is a multiple of the period,
    x_{t+1} = x_t - eta g(x_t) - lambda (x_t - x~_t) - ..., from time-t values. "every_step" (Eq. 3): so at every step,
    toward the leaders as they were at the last multiple of the periods (one vector a leader and node more).

    `period="adaptive"` (workers that meet): the shortest period at which rounds take at most `share` of the time, as
    `EASGD` has it, with the distance to the leaders; set at the rounds of all, which come every `global_period`-th.

    `asynchronous`: True (Algorithm 1): the steps of all workers are counted together; when they reach a multiple of
    p tau (p tau_G), a round is due, and each joins it at its next step, with its own number of steps: nobody waits
    longer than for the slowest worker's one step. "wait-free": nobody waits at all. By its own clock each worker
    publishes its score and parameters and is pulled to the last published ones of the leader (three vectors more a
    worker, four with two leaders). In round robin Algorithm 1 is the synchronous form.

    Source: LSGD, Algorithm 1 and (3).
    """

    pull: float = number(0.1, 0, 1, help="rate of the pull toward the leader of the group")
    global_pull: float | None = number(
        None, 0, 1, help="rate of the pull toward the leader of all (null: as pull)"
    )
    period: int | str = whole(
        64,
        word="adaptive",
        help="steps between pulls toward the leader of the group; adaptive: as few as keep pulls under a share of the "
        "time",
    )
    global_period: int | None = whole(
        None,
        help="steps between pulls toward the leader of all (null: 2 period); with an adaptive period: so many periods",
    )
    share: float = SHARE
    round_cost: float | None = ROUND_COST
    loss_window: int = whole(10, help="batches over whose mean training loss leaders are elected")
    when: str = choice(
        "after_step",
        "with_step",
        "every_step",
        help="after_step, with_step (pull and gradient at the same point) or every_step (pull at every step, toward "
        "the leaders as they last were)",
    )
    sequential: bool = flag(False, help="where both pulls are due: the local one first, then the global one")
    score: Callable[[], float] | None = code(
        arguments="without arguments", help="this worker's score now, less is better, in place of the losses"
    )
    asynchronous: bool | str = choice(
        False,
        True,
        "wait-free",
        help="true: rounds go by the steps of all together; wait-free: nobody waits at all, each pulls to what the "
        "leader last published",
    )

    exchanges = {False: Together, True: Together, "wait-free": Published}  # noqa: RUF012
    guard = ""

    def declare(self) -> Iterable[str | None]:
        self.global_pull = self.pull if self.global_pull is None else self.global_pull
        yield pacing(self)
        if self.global_period is None:
            self.global_period = 2 if isinstance(self.period, str) else 2 * self.period
        self.window("losses", self.loss_window)
        if self.when == "every_step":
            self.near = self.vector("near", per="group")
            self.far = self.vector("far", per="all")
            self.known: list[bool]  # whether they hold a leader yet
            self.value("known", [False, False])
        if self.asynchronous == "wait-free" and self.when != "after_step":
            yield 'asynchronous="wait-free" goes with when="after_step"'

    def clock_of(self) -> TwoPeriods:
        by_total = self.asynchronous is True and self.order == "free"
        first = self.when != "after_step"
        assert self.global_period is not None
        if isinstance(self.period, str):
            return AdaptiveTwo(self, self.global_period, first)
        return TwoPeriods(self.period, self.global_period, first, self.p if by_total else None)

    def observe(self, loss: Any) -> None:
        if self.score is None and loss is None:
            raise ValueError(
                "LSGD elects its leader by the training loss: step(loss=loss), step(closure) or score="
            )
        if self.score is None:
            self.losses.append(loss.detach() if torch.is_tensor(loss) else float(loss))

    def measure(self) -> float:
        if self.score is not None:
            value = float(self.score())
        else:
            value = sum(map(float, self.losses)) / len(self.losses) if self.losses else math.inf
        return value if math.isfinite(value) else math.inf

    def exchange(self, r: Any) -> None:
        if self.when == "every_step":
            kept = r.keep(self.near, self.far)
            self.known = [old or new for old, new in zip(self.known, kept, strict=True)]
        else:
            r.pull(self.pull, self.global_pull, self.sequential)

    def before_step(self) -> None:
        if self.when == "every_step":
            terms = ((self.near, self.pull), (self.far, self.global_pull))
            self.toward = [term for term, known in zip(terms, self.known, strict=True) if known and term[1]]
