"""A `torch.optim.Optimizer` around another one, and what the methods do to the one inside."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from mpilsgd import kernels
from mpilsgd.flat import FlatParameters

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

# Those of torch's that add weight_decay x to the gradient; of ours, those that fuse pulls into their step do, too.
_ADDS_L2 = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


class Wrapper(torch.optim.Optimizer):
    """Shows the wrapped optimizer's parameter groups and state, so that schedulers work around either."""

    optimizer: torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults if hasattr(self, "optimizer") else {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the parameters lie in flat vectors already."""
        raise RuntimeError("give the wrapped optimizer all its parameter groups before wrapping it")


class Members:
    """Which parameters are exchanged: one that comes to be trained later would silently not be."""

    def __init__(self, optimizer: torch.optim.Optimizer, flat: FlatParameters):
        self._flat = flat
        everyone = [p for group in optimizer.param_groups for p in group["params"]]
        self._count = len(everyone)
        self._frozen = [p for p in everyone if not p.requires_grad]

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """A ValueError names a parameter that has become trainable, or was added to the optimizer."""
        several = _points_problem(optimizer)
        if several is not None:
            raise ValueError(several)
        same = sum(len(group["params"]) for group in optimizer.param_groups) == self._count
        if same and not any(p.requires_grad for p in self._frozen):
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and FlatParameters.of(p) is not self._flat:
                    raise ValueError(
                        f"{self._flat.name(p)} is trained now and was not when the optimizer was wrapped, so it would "
                        "not be exchanged: close() the method and wrap the optimizer anew"
                    )


def unfit_problem(optimizer: Any, method: str, gradients: bool) -> str | None:
    """Why a method cannot wrap this optimizer."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"optimizer must be a torch.optim.Optimizer, not {name}"
    if isinstance(optimizer, Wrapper):
        return f"optimizer is a {name} already: wrap the optimizer inside"
    several = _points_problem(optimizer)
    if several is not None:
        return several
    if gradients and _needs_closure(optimizer):
        return (
            f"{name} evaluates its closure as often as it likes, and {method} takes the mean of one gradient a step: "
            "take LocalSGD, LSGD or EASGD"
        )
    return None


def _points_problem(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer that is not torch's or ours cannot be exchanged: it keeps more points than x."""
    if not _is_foreign(optimizer):
        return None
    modes = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if not modes and not any("z" in kept for kept in list(optimizer.state.values())[:1]):
        return None
    return (
        f"{type(optimizer).__name__} keeps several points of parameter space ("
        + ("it has train() and eval()" if modes else 'its state has "z"')
        + "): only the one that the parameters hold would be exchanged"
    )


def _is_foreign(optimizer: Any) -> bool:
    inner = getattr(optimizer, "optimizer", optimizer)  # RunningAverage's
    return type(inner).__module__.partition(".")[0] not in ("torch", "mpilsgd")


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def known(closure: Callable[[], Any], value: Any, once: bool) -> Callable[[], Any]:
    """The closure, whose first evaluation was made already: its gradient is there. once: no other may follow."""
    first = True

    def evaluate() -> Any:
        nonlocal first
        if first:
            first = False
            return value
        if once:
            raise RuntimeError(
                "the optimizer evaluates its closure a second time in a step, whose gradient would not be averaged: "
                "take LocalSGD, LSGD or EASGD"
            )
        with torch.enable_grad():
            return closure()

    return evaluate


@contextlib.contextmanager
def gradient_at_x(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Adds the optimizer's L2 term to the gradients now, at the present x, instead of in its step.

    x_{t+1} = x_t - eta (g(x_t) + wd x_t) - pull: when torch adds wd x, x has been pulled already.
    Decoupled weight decay (AdamW, Muon, ...) is no part of the gradient and stays in the step.
    """
    kept = []
    inner = getattr(optimizer, "optimizer", optimizer)  # RunningAverage's
    adds = isinstance(inner, _ADDS_L2) or _fuses(inner)
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0.0)
        if decay and adds and not group.get("decoupled_weight_decay", False):
            sign = -1.0 if group.get("maximize") else 1.0
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p.detach(), alpha=sign * decay)
            kept.append((group, decay))
            group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in kept:
            group["weight_decay"] = decay


def step_toward(m: Method, toward: Any, closure: Callable[[], Any] | None) -> Any:
    """The local step and x <- x - sum of rate (x - vector), from the same x; of MSGD in one pass."""
    inner: Any = m.optimizer
    fused = _fuses(inner) and all(p.grad is not None for p in m.flat.parameters)
    with torch.no_grad(), contextlib.nullcontext() if fused else m.iterates():
        for d, window in m.x.items():
            most = max(1.0, sum(rate for _, rate in toward))  # buffers are pulled by convex rates
            spans = [(m.edge[d], m.n[d], most)] + ([] if fused else [(0, m.edge[d], 1.0)])
            for a, b, scale in spans:
                pulls = [(v[d][a:b], rate / scale) for v, rate in toward]
                (one, r), (other, s) = pulls[0], pulls[1] if len(pulls) > 1 else (None, 0.0)
                kernels.pull(window.mine[a:b], one, r, other, s, seed=m.t)
    m.flat.touched()
    if fused:
        terms = [(dict(v), rate) for v, rate in toward]
        return inner.step(closure, pulls=lambda p: [(m.flat.view(p, flats), rate) for flats, rate in terms])
    return inner.step() if closure is None else inner.step(closure)


def _fuses(optimizer: Any) -> bool:
    """Whether its step takes pulls: MSGD's."""
    return getattr(optimizer, "fuses_pulls", False)


def described(optimizer: torch.optim.Optimizer) -> str:
    """Its kind and its settings, for a reader and to be compared."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Sets the optimizer's memory (momentum, the moments and step numbers of Adam) back to its start.

    In place where the start is known; the state of an optimizer that is not torch's or ours is dropped, so that it
    makes it anew: it may be a point of parameter space, of which 0 is no start.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # RunningAverage's
    if _is_foreign(inner):
        inner.state.clear()
        return
    for group in optimizer.param_groups:
        start = {
            "mu_product": 1.0,  # NAdam
            "step_size": group.get("lr", 0.0),  # Rprop
            "sum": group.get("initial_accumulator_value", 0.0),  # Adagrad
            "eta": group.get("lr", 0.0),  # ASGD
            "mu": 1.0,
        }
        for p in group["params"]:
            for name, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value) and value.is_floating_point():
                    value.fill_(start.get(name, 0.0))
