"""DiLoCo: local steps, then a step of an outer optimizer toward where the workers went."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mpilsgd.exchange import (
    Every,
    InTurn,
    Method,
    Together,
    Vector,
    code,
    flag,
    number,
    outer_step,
    thread_problem,
    whole,
)


class DiLoCo(Method):
    """DiLoCo around any optimizer: after the steps that make t a multiple of H = `period`,

        g = c - (1/p) sum_i x^i;    u <- mu u + g;    c <- c - lr (g + mu u);    x^i <- m x^i + (1 - m) c

    lr: `outer_lr`, mu: `outer_momentum` (torch's Nesterov form), m: `mixing`. With lr = 1, mu = 0 it is model averaging
    to the last bit. `outer` puts another optimizer in place of the two: its gradient is g.

    `fragments` = P (Streaming DiLoCo): a P-th of the parameters every H/P steps, in turn; buffers go with the last.

    `overlap` = o: the exchange of x_t goes on while the worker computes, and x takes c over after step t + o; what it
    moved in these o steps is lost but for `mixing`, for which 0.5 is the paper's choice.

    `asynchronous` (delayed Nesterov): worker i comes alone, with g = a - x^i, where a is what it last received:

        s <- s + g;    c <- c - lr g/p;    x^i, a <- c;    at every p-th arrival, before x^i takes c:
        u <- mu u + s/p;    c <- c - lr mu u;    s <- 0

    SlowMo (its beta, alpha and gamma, as long as gamma stays) is outer=lambda c: torch.optim.SGD(c, alpha, beta).

    c, u and s lie once on each node (asynchronous: once in all), in float32 where x is of a half type. `mixing` takes a
    copy of x in a round, `overlap` always, `asynchronous` one vector more a worker. A worker found non-finite takes c.
    `outer` is given flat parts of c, so it has to go element by element, as Adam does; not to be used after `close()`.

    Source: DiLoCo (arXiv:2311.08105), Algorithm 1; Streaming DiLoCo (arXiv:2501.18512), Algorithm 2; asynchronous Local
    SGD (arXiv:2401.09135), Algorithm 3 with c = 0.
    """

    outer_lr: float = number(0.7, 0, help="lr: learning rate of the outer optimizer")
    outer_momentum: float = number(0.9, 0, 1, help="mu: its Nesterov momentum")
    outer: Callable[[Any], Any] | None = code(
        arguments="of a list of parameters", help="gives an outer optimizer of them, in place of the two"
    )
    period: int = whole(100, help="H: steps between two exchanges of a parameter")
    fragments: int = whole(1, help="P: parts of the parameters; one is exchanged every period / P steps")
    overlap: int = whole(
        0,
        0,
        help="steps that x goes on for while a fragment is exchanged, before it takes c over (0: it waits)",
    )
    mixing: float = number(0.0, 0, 1, help="m: how much of its own parameters a worker keeps")
    asynchronous: bool = flag(False, help="true: each worker comes alone, and none waits for the others")

    exchanges = {False: Together, True: InTurn}  # noqa: RUF012

    def declare(self) -> Iterable[str | None]:
        self.c = self.vector("c", per="all", start="mean", wide=True)
        self.u = self.c if self.outer is not None else self.vector("u", per="all", wide=True)
        self.made: dict[tuple[int, int], Any] = {}  # the outer optimizers of this rank's parts
        self.value("memory", {})  # and their states
        self.known = self.memory
        if self.asynchronous:
            self.s, self.a = self.vector("s", per="all", wide=True), self.vector("a", wide=True)
            if self.outer is not None or self.mixing or self.overlap or self.fragments > 1:
                yield "outer, mixing, overlap and fragments go with asynchronous=False"
        if self.outer is not None:
            yield _outer_problem(self.outer)
        numel = sum(p.numel() for group in self.param_groups for p in group["params"])
        if self.fragments > numel:
            yield f"fragments={self.fragments} is more than the {numel} parameters"
        if self.period % self.fragments:
            yield f"period={self.period} must be a multiple of fragments={self.fragments}"
        elif self.overlap >= self.period // self.fragments:
            yield f"overlap={self.overlap} must be less than period / fragments = {self.period // self.fragments}"
        if self.overlap:
            yield thread_problem()

    def clock_of(self) -> Every:
        return Every(self.period // self.fragments)

    def start(self, r: Any) -> None:
        r.take(self.c)
        for d, a in self.a.items() if self.asynchronous else ():
            a.copy_(self.x[d].mine[: len(a)])

    def exchange(self, r: Any) -> None:
        if self.asynchronous:
            self._arrive(r)
            return
        fragment = (r.t * self.fragments // self.period - 1) % self.fragments
        r.only(fragment, self.fragments)
        r.mean(keep=self.mixing > 0, about=self.c)
        for k, (c, u, x) in enumerate(r.each(self.c, self.u, self.x)):
            if self.outer is not None:
                self._step((fragment, k), c, x)
                continue
            outer_step(c, u, x, self.outer_lr, self.outer_momentum)
        r.copy(self.c, self.mixing)

    def _step(self, part: tuple[int, int], c: torch.Tensor, x: torch.Tensor) -> None:
        """One of the outer optimizer over this rank's part of c, by fragment and dtype."""
        assert self.outer is not None
        if self.memory is not self.known:  # a state was loaded
            self.made, self.known = {}, self.memory
        if part not in self.made:
            self.made[part] = self.outer([torch.nn.Parameter(c)])
            if part in self.memory:
                self.made[part].load_state_dict(self.memory[part])
        (p,) = self.made[part].param_groups[0]["params"]
        p.grad = c - x
        self.made[part].step()
        self.memory[part] = self.made[part].state_dict()

    def _arrive(self, r: Any) -> None:
        """One worker's turn."""
        turn = r.updates % self.p == self.p - 1
        for c, u, s, a, x in r.each(self.c, self.u, self.s, self.a, self.x):
            g = a - x
            s.add_(g)
            c.sub_(g, alpha=self.outer_lr / self.p)
            if turn:
                u.mul_(self.outer_momentum).add_(s, alpha=1 / self.p)
                c.sub_(u, alpha=self.outer_lr * self.outer_momentum)
                s.zero_()
        r.statistics(self.c)
        r.copy(self.c)
        for a, x in r.each(self.a, self.x, broken=True):
            a.copy_(x)

    def shown_centre(self) -> Vector:
        return self.c


def _outer_problem(outer: Callable[[Any], Any]) -> str | None:
    given = torch.nn.Parameter(torch.zeros(1))
    given.grad = torch.zeros(1)
    try:
        made = outer([given])
        held = [p for group in getattr(made, "param_groups", ()) for p in group["params"]]
        if isinstance(made, torch.optim.Optimizer) and len(held) == 1 and held[0] is given:
            with torch.no_grad():
                made.step()
            return None
    except Exception as wrong:
        return f"outer failed: {type(wrong).__name__}: {wrong}"
    return "outer must give a torch optimizer of just the parameters that it is given"
