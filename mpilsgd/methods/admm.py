"""ADMM: the alternating direction method of multipliers, one worker after the other or as they come."""

from __future__ import annotations

from typing import Any

import torch

from mpilsgd import kernels
from mpilsgd.comm import Shard, Topology
from mpilsgd.methods.arguments import choice, number
from mpilsgd.methods.centered import Centered
from mpilsgd.methods.course import course_problems, course_settings


class ADMM(Centered):
    """ADMM with the gradient step linearised, each worker with multipliers lambda^i (scaled by 1/rho).

    Every step of worker i, one exchange with the centre c:

        lambda <- lambda - (x - c)
        x' = (x - eta g(x) + eta rho (lambda + c)) / (1 + eta rho)
        c  <- c + ((x' - lambda) - (x - lambda_old)) / p,  so that c = (1/p) sum_i (x^i - lambda^i)

    Args:
        rho: the penalty, > 0. It may be unstable where EASGD is not (thesis 3.3).
        asynchronous: False: in round robin, as the thesis has it; True: as the workers come.
        order, record, replay: as for `EASGD`; with asynchronous.
        optimizer: gives x - eta g(x); eta is its lr, one for all parameters.
        topology, init, buffers, model and errors: see `Method`.

    Two vectors more a worker (lambda, and what x - lambda was when it last wrote) and one in all (c). BatchNorm
    statistics have no multipliers: c <- c + (x - c)/p, x <- c. A worker found non-finite writes nothing: x <- c and
    lambda <- x - (what it last wrote), so that c stays the mean.

    Source: thesis (3.51)-(3.54).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        rho: float,
        asynchronous: bool = False,
        order: str = "free",
        record: str | None = None,
        replay: str | None = None,
        init: str = "same",
        buffers: str = "average",
        model: torch.nn.Module | None = None,
    ):
        problems = [number("rho", rho, 0.0), choice("asynchronous", asynchronous, (False, True))]
        if problems[0] is None and rho == 0:
            problems.append("rho must be above 0")
        problems += course_problems(asynchronous, order, record, replay)
        groups = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else []
        if any("lr" not in group for group in groups):
            problems.append("the optimizer needs a learning rate lr: ADMM's eta")
        else:
            problems.append(_one_rate(groups))
        self.rho, self.asynchronous = rho, asynchronous
        super().__init__(
            optimizer,
            topology,
            init=init,
            buffers=buffers,
            model=model,
            problems=problems,
            settings=dict(rho=rho, asynchronous=asynchronous, **course_settings(order, record, replay)),
            vectors=1.0,
            course=(order if asynchronous else "round-robin", record, replay),
        )
        self._open_centre(init)
        with self._iterates():
            own = {d: w.mine[: self.flat.n_parameters[d]] for d, w in self._x.items()}
            self._multipliers = {d: torch.zeros_like(x) for d, x in own.items()}
            self._written = {d: x.clone() for d, x in own.items()}  # x - lambda, as the centre knows it

    def _eta(self) -> float:
        wrong = _one_rate(self.param_groups)  # a schedule may have changed it
        if wrong is not None:
            raise ValueError(wrong)
        return float(self.param_groups[0]["lr"])

    def _acts_on_gradient(self) -> bool:
        return True

    def _local_step(self, closure: Any) -> Any:
        eta, result = self._eta(), None
        with torch.no_grad(), self._iterates():
            fit = self._fit()
            before = {d: w.mine[: self._n[d]].clone() for d, w in self._x.items()}
        if fit:
            result = super()._local_step(closure)
        with torch.no_grad(), self._iterates():
            fit = fit and self._fit()
            with self._visiting() as shards:
                for shard in shards:
                    if fit:
                        self._move(shard, before, eta * self.rho)
                    else:
                        self._start_anew(shard)
            if not fit:
                for d, multipliers in self._multipliers.items():
                    torch.sub(self._x[d].mine[: multipliers.numel()], self._written[d], out=multipliers)
        return result

    def _move(self, shard: Shard, before: dict[torch.dtype, torch.Tensor], weight: float) -> None:
        p = self.topology.world.size
        for d, low, high, y, c, _ in self._parts(shard, "parameters"):
            x, multipliers = before[d][low:high], self._multipliers[d][low:high]
            written = self._written[d][low:high]
            multipliers.sub_(x).add_(c)
            y.add_(multipliers + c, alpha=weight).div_(1 + weight)
            now = y - multipliers
            c.add_(now - written, alpha=1 / p)
            written.copy_(now)
        for *_, x, c, _ in self._parts(shard, "buffers"):
            kernels.elastic(c, [x], 0.0, 1 / p)
            x.copy_(c)
        self._updates(shard)

    def _extra(self) -> dict[str, Any]:
        own = {"multipliers": self._multipliers, "written": self._written}
        vectors = {name: {str(d): v.clone() for d, v in of.items()} for name, of in own.items()}
        return {**super()._extra(), **vectors}

    def _load_extra(self, own: dict[str, Any]) -> None:
        super()._load_extra(own)
        for d, v in self._multipliers.items():
            v.copy_(own["multipliers"][str(d)])
            self._written[d].copy_(own["written"][str(d)])

    def _free(self) -> None:
        super()._free()
        self._multipliers, self._written = {}, {}


def _one_rate(groups: list[dict[str, Any]]) -> str | None:
    rates = {float(group["lr"]) for group in groups}
    return f"ADMM takes one lr for all parameters, not {sorted(rates)}" if len(rates) > 1 else None
