"""Thousands of workers of a small problem at once: their parameters are the rows of one array.

The updates are those of `reference`, which are the specification of the kernels too: what is a row there for a worker
is the whole array here.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpilsgd import reference
from mpilsgd.simulation.objectives import Objective, noise_of


@dataclasses.dataclass
class Crowd:
    """What `many` gives. x: (workers, dim); centre: (dim); seen: what `watch` gave."""

    x: Tensor
    centre: Tensor
    seen: list[Any]


def many(
    method: Any,
    objective: Objective,
    workers: int = 10_000,
    steps: int = 10_000,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    seed: int = 0,
    start: Tensor | None = None,
    watch: Callable[[int, Tensor, Tensor], Any] | None = None,
    every: int = 1,
    **options: Any,
) -> Crowd:
    """Steps all workers of a method `steps` times, each with its own noise.

    Args:
        method: EASGD (also asynchronous: in the order of round robin), LSGD, LocalSGD, Downpour (synchronous) or
            AllreduceSGD, the class or its name.
        objective: see `objectives`.
        lr, momentum: of each worker's own steps; Nesterov's momentum as `MSGD` has it (EASGD: EAMSGD).
        seed: of the noise. start: (workers, dim) or (dim); by default the objective's.
        watch: called after every `every` steps with their number, x and the centre.
        options: the method's, by its names: EASGD: center_rate, moving_rate, period, form, asynchronous. LSGD: pull,
            global_pull, period, global_period, loss_window, and groups, a number of equal ones. LocalSGD, Downpour:
            period.
    """
    name = getattr(method, "__name__", method)
    if name not in RULES:
        raise ValueError(f"method must be one of {', '.join(RULES)}, not {name!r}")
    x = objective.start(workers, seed) if start is None else torch.as_tensor(start, dtype=torch.float64)
    x = x.expand(workers, objective.dim).clone()
    velocity = torch.zeros_like(x) if momentum else None
    try:
        rule = RULES[name](x, **options)
    except TypeError as error:
        raise ValueError(f"{name}: {str(error).split(') ')[-1]}") from None
    seen = []
    for t in range(steps):
        point = x if velocity is None else x.add(velocity, alpha=momentum)
        noise = objective.draw(noise_of(seed, t), workers)
        gradient = rule.gradient(objective.gradient(point, noise))
        if rule.scores:
            rule.observe(objective.loss(point, noise))
        rule.before(t)
        if velocity is None:
            x.sub_(gradient, alpha=lr)  # which may be x itself
        else:
            reference.msgd(
                x, gradient, velocity, lr, momentum, nesterov=False
            )  # the gradient's point was ahead
        rule.after(t + 1)
        if watch is not None and (t + 1) % every == 0:
            seen.append(watch(t + 1, x, rule.centre()))
    return Crowd(x, rule.centre(), seen)


class Rows:
    """A method's exchanges among the rows of x."""

    scores = False  # whether it goes by the workers' losses

    def __init__(self, x: Tensor):
        self.x, self.p = x, len(x)

    def gradient(self, gradients: Tensor) -> Tensor:
        return gradients

    def observe(self, losses: Tensor) -> None:
        """Those of this step."""

    def before(self, t: int) -> None:
        """The exchange before the t-th step, from 0 on."""

    def after(self, t: int) -> None:
        """That after t steps."""

    def centre(self) -> Tensor:
        return self.x.mean(0)


class AllreduceSGD(Rows):
    def gradient(self, gradients: Tensor) -> Tensor:
        return gradients.mean(0).expand(self.x.shape).clone()


class LocalSGD(Rows):
    """x_i <- mean x"""

    def __init__(self, x: Tensor, period: int = 64):
        super().__init__(x)
        self.period = period

    def after(self, t: int) -> None:
        if t % self.period == 0:
            reference.assign([self.x], self.x.sum(0), 1 / self.p)


class EASGD(Rows):
    """d_i = x_i - c;  x_i <- x_i - alpha d_i;  c <- c + (beta/p) sum d_i"""

    def __init__(
        self,
        x: Tensor,
        center_rate: float = 0.9,
        moving_rate: float | None = None,
        period: int = 10,
        form: str = "jacobi",
        asynchronous: bool = False,
    ):
        super().__init__(x)
        self.period, self.first, self.asynchronous = period, form == "jacobi", asynchronous
        self.alpha = center_rate / self.p if moving_rate is None else moving_rate
        self.rate = center_rate / self.p
        self.c = x.mean(0)
        self.terms = torch.empty_like(x)
        if form not in ("jacobi", "gauss-seidel") or (asynchronous and not self.first):
            raise TypeError("__init__() form must be jacobi or, synchronous, gauss-seidel")
        if asynchronous and not 0 <= self.rate < 1:
            raise TypeError(f"__init__() center_rate must be from 0 to {self.p}, the number of workers")
        if not self.first:
            reference.pull(x, self.c, self.alpha)

    def before(self, t: int) -> None:
        if self.first and t % self.period == 0:
            if self.asynchronous:
                self._in_turn()
                return
            reference.elastic_sum(self.terms, self.c, [self.x], self.alpha)
            reference.elastic_apply(self.c, [], self.terms.sum(0), 0.0, self.rate)

    def after(self, t: int) -> None:
        if not self.first and t % self.period == 0:
            reference.elastic_sum(self.terms, self.c, [self.x], 0.0)
            reference.elastic_apply(self.c, [self.x], self.terms.sum(0), self.alpha, self.rate)

    def _in_turn(self) -> None:
        """One worker after the other: the i-th sees c_i, and c_{i+1} = c_i + r (x_i - c_i).

        With q = 1 - r, c_i = q^i (c_0 + r sum_{j<i} q^{-j-1} x_j): in parts in which q^-j stays small.
        """
        q = 1 - self.rate
        length = self.p if q == 1 else max(1, int(math.log(1e3) / -math.log(q)))
        for x in self.x.split(length):
            powers = q ** torch.arange(len(x) + 1, dtype=x.dtype)[:, None]
            sums = torch.cat([torch.zeros_like(x[:1]), (x / powers[1:]).cumsum(0)])
            seen = powers * (self.c + self.rate * sums)
            reference.pull(x, seen[:-1], self.alpha)
            self.c = seen[-1].clone()

    def centre(self) -> Tensor:
        return self.c


class Downpour(Rows):
    """c <- c + sum_i (x_i - c);  x_i <- c"""

    def __init__(self, x: Tensor, period: int = 1):
        super().__init__(x)
        self.period, self.c = period, x.mean(0)
        self.terms = torch.empty_like(x)

    def after(self, t: int) -> None:
        if t % self.period == 0:
            reference.elastic_sum(self.terms, self.c, [self.x], 0.0)
            reference.elastic_apply(self.c, [], self.terms.sum(0), 0.0, 1.0)
            self.x.copy_(self.c)

    def centre(self) -> Tensor:
        return self.c


class LSGD(Rows):
    """x_i <- x_i - pull (x_i - leader of the group) - global_pull (x_i - leader of all)"""

    scores = True

    def __init__(
        self,
        x: Tensor,
        groups: int = 1,
        pull: float = 0.1,
        global_pull: float | None = None,
        period: int = 64,
        global_period: int | None = None,
        loss_window: int = 10,
    ):
        super().__init__(x)
        if groups < 1 or self.p % groups:
            raise TypeError(f"__init__() groups={groups} must divide the number of workers, {self.p}")
        self.groups, self.pull, self.period = groups, pull, period
        self.global_pull = pull if global_pull is None else global_pull
        self.global_period = 2 * period if global_period is None else global_period
        self.losses: deque[Tensor] = deque(maxlen=loss_window)

    def observe(self, losses: Tensor) -> None:
        self.losses.append(losses)

    def after(self, t: int) -> None:
        near, far = (t % every == 0 for every in (self.period, self.global_period))
        if not (near or far):
            return
        scores = torch.stack(list(self.losses)).mean(0)
        scores = scores.where(torch.isfinite(scores), math.inf)
        of_all = self.x[scores.argmin()]
        size = self.p // self.groups
        best = scores.view(self.groups, size).argmin(1) + size * torch.arange(self.groups)
        of_group = self.x[best].repeat_interleave(size, 0)
        rates = self.pull * near, self.global_pull * far
        reference.pull(self.x, of_group, rates[0], of_all, rates[1])


RULES: dict[str, Callable[..., Rows]] = {
    cls.__name__: cls for cls in (EASGD, LSGD, LocalSGD, Downpour, AllreduceSGD)
}
