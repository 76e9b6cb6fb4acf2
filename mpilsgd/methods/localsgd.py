"""Local SGD (Stich) and model averaging (Zhang & Li): local steps, then the mean of all workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpilsgd.exchange import (
    ROUND_COST,
    SHARE,
    Adaptive,
    Every,
    EverySo,
    Method,
    UntilGradient,
    Vector,
    anything,
    choice,
    follow,
    number,
    pacing,
    whole_problem,
)


def _period_problem(name: str, value: Any) -> str | None:
    if callable(value) or value == "adaptive":
        return None
    if isinstance(value, (set, frozenset, list, tuple, range)):
        return next((p for p in (whole_problem(f"a step number in {name}", s) for s in value) if p), None)
    if isinstance(value, int):
        return whole_problem(name, value)
    expected = "a whole number of at least 1, a set of them, a callable, 'adaptive' or None"
    return f"{name} must be {expected}, not {value!r}"


class LocalSGD(Method):
    """Local SGD: every worker steps alone and all take their mean after the steps in I_T.

        x^k_{t+1} = x^k_t - eta g^k(x^k_t);    if t+1 in I_T:  x^k_{t+1} <- (1/K) sum_k x^k_{t+1}

    I_T: the multiples of `period` (1 is mini-batch SGD), a collection of step numbers t+1, or those for which a
    callable says so; None is one-shot averaging, only `center()` at the end takes the mean.

    With `until_grad_norm` (T = infinity) each worker steps until its squared gradient norm is at or below it, then
    waits for the others; a worker that is below already takes no step. `converged` says that no worker took a step
    between the last two rounds. A gradient that is not finite is a broken worker's.

    `period="adaptive"`: the optimum for the decay of the local gradients, after each round anew. The workers' mean
    |grad f_i|^2 over a period is fitted by beta^t and by (1 + a t)^-beta, and T goes half way (of its logarithm) to
    the T* of the better fit, from [1, 10 T]. What a round costs in steps is measured, or `round_cost` (1 / r of the
    theory). T is no longer than where rounds take `share` of the time, as no longer one saves more than that: so long
    are periods whose gradients do not decay beyond their noise, as those of small batches.

    `average="quadratic"`: the centre is the mean over workers and time, (1/(K S_T)) sum_k sum_t w_t x^k_t with
    w_t = (a+t)^2 (one more vector a worker). The theory wants a >= max(16 kappa, H).

    Source: Stich, Algorithm 1 (line 8 averages x_{t+1}: see its (4)), Theorem 2.2; Zhang & Li, Algorithm 1, section 4.
    """

    period: Any = anything(
        64,
        _period_problem,
        "a whole number of at least 1, a collection of them, a callable (step -> bool), 'adaptive' or None",
        help="steps between averages; also a list of steps ([1,10,100]), null (only at the end), "
        "adaptive (the best one for the decay of the gradients, as measured) or package.module:callable "
        "(step -> true or false)",
    )
    until_grad_norm: float | None = number(
        None, 0, help="each worker steps until its squared gradient norm is at most this, in place of period"
    )
    average: str = choice(
        "last",
        "quadratic",
        help="what is evaluated: last (the mean of the workers) or quadratic (their mean over time, weights (a+t)^2)",
    )
    a: float | None = number(None, 0, above=True, help="see average (null: the period)")
    share: float = SHARE
    round_cost: float | None = ROUND_COST

    def declare(self) -> Iterable[str | None]:
        if isinstance(self.period, (set, list, tuple, range)):
            self.period = frozenset(self.period)
        self.value("converged", False)
        self.value("moved", False)  # a step since the last round
        self.value("weight", 0.0)  # S_t
        yield pacing(self)
        self.z: Vector | None = None
        if self.average == "quadratic":
            self.z = self.vector("z", wide=True)
            self.a = float(self.period) if self.a is None and isinstance(self.period, int) else self.a
            if self.a is None:
                yield 'average="quadratic" needs a number a > 0 (at least 16 kappa and the period)'

    def clock_of(self) -> Every:
        if self.until_grad_norm is not None:
            return UntilGradient(self.until_grad_norm)
        if self.adaptive:
            return Adaptive(self, fits=True)
        return Every(self.period) if isinstance(self.period, int) else EverySo(self.period)

    def before_step(self) -> None:
        self.moved = True
        if self.adaptive:
            self.clock.see([p.grad for p in self.flat.parameters if p.grad is not None])
        if self.z is not None:  # z <- z + w_t / S_{t+1} (x_t - z)
            w = (self.a + self.t) ** 2  # type: ignore[operator]
            self.weight += w
            with self.iterates():
                for d, z in self.z.items():
                    follow(z, self.x[d].mine[: len(z)], w / self.weight)

    def measure(self) -> float:
        return float(self.moved)

    def exchange(self, r: Any) -> None:
        r.mean()
        self.converged = self.until_grad_norm is not None and not any(r.came.score)
        self.moved = False

    def shown_centre(self) -> Vector | None:
        return self.z if self.weight else None
