"""Clocks whose period follows what all workers measure."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpilsgd.comm import seconds
from mpilsgd.exchange.clocks import ALL, NOTHING, Due, Every, TwoPeriods
from mpilsgd.exchange.decay import best_period, fitted
from mpilsgd.fields import number

if TYPE_CHECKING:
    from mpilsgd.exchange.method import Method

# What a method with such a clock is given beside the period
SHARE = number(
    0.1, 0, 0.99, above=True, help="with an adaptive period: the share of the time that exchanges may take"
)
ROUND_COST = number(
    None, 0, above=True, help="with an adaptive period: what a round costs, in steps (null: as measured)"
)
START = 8  # the first period
_POINTS = 24  # of a period at which gradients are looked at, at most
_PROBE, _ROUNDS = 4, 16  # a period too short for a fit is so long after so many rounds
_HISTORY = 5  # rounds whose median seconds count; over which a distance grows


class Paced(Every):
    """What both clocks have. All that is saved of one is the method's value `pace`, which `pacing` declares.

    Numbers go through a meeting, and what the first of those who came makes of them is the period of all: rounding may
    differ between their processors. `metrics.distance` is that of this worker to where it is pulled.
    """

    def __init__(self, method: Method, first: bool = False):
        self._m, self.first = method, first
        self._began = 0.0
        self._since: tuple[float, int] | None = None  # the end of the last round: when, and at which step
        self._took: list[float] = []  # seconds of the rounds since the period was last set

    @staticmethod
    def fresh() -> dict[str, Any]:
        return {
            "period": START,
            "last": 0,  # the step of the last round of all
            "wanted": float(START),  # what the period is rounded of
            "rounds": 0,
            "seconds": [],  # of the last rounds: of a step, and of a round
            "squares": torch.zeros(_POINTS, dtype=torch.float64),  # |grad f|^2 in this period, by its points
            "limit": math.inf,  # what keeps consensus
            "distances": [],  # relative to x and to the steps of the period, of the last rounds
        }

    @property
    def period(self) -> int:  # type: ignore[override]
        return int(self._m.pace["period"])

    def due(self, t: int) -> Due:
        return NOTHING if (t - self._m.pace["last"]) % self.period else ALL

    def begins(self) -> None:
        self._began = seconds()

    def held(self, r: Any) -> None:
        """After a round of all, the period of the next ones is set."""
        m, pace, fits = self._m, self._m.pace, isinstance(self, Adaptive) and self.fits
        if r.due.world:
            step, own = math.nan, [seconds() - self._began]
            if self._since is not None and r.joined > self._since[1]:
                step = (self._began - self._since[0] - sum(self._took)) / (r.joined - self._since[1])
            squares = pace["squares"][: len(points(self.period))].tolist() if fits else []
            took = self._took or own
            table = r.learn([step, sum(took) / len(took), math.nan if fits else _apart(m), *squares])
            (wanted, limit), *_ = r.learn(self._decided(table, r.joined - pace["last"])).tolist()
            pace["rounds"] += 1
            pace["last"], pace["wanted"], pace["limit"] = r.joined, wanted, limit
            period = max(1, round(min(wanted, limit)))
            if fits and period < _PROBE and pace["rounds"] % _ROUNDS == 0:
                period = _PROBE
            m.metrics.note_period(r.joined, self.period, period)
            pace["period"] = period
            pace["squares"].zero_()
            self._took, self._since = [], (0.0, r.joined)
        now = seconds()
        self._took.append(now - self._began)
        if r.due.world:
            self._since = now, r.joined

    def _cost(self, table: np.ndarray) -> float | None:
        """Of a round in steps: given, or the median of the last rounds. None: not known yet.

        Of a round the least seconds of any worker count: those of the last to come, which waits for nobody.
        """
        seconds = self._m.pace["seconds"]
        known = table[np.isfinite(table[:, 0])]
        if len(known):
            seconds.append([float(known[:, 0].mean()), float(table[:, 1].min())])
            del seconds[:-_HISTORY]
        if self._m.round_cost is not None:
            return float(self._m.round_cost)
        if not seconds:
            return None
        step, a_round = (statistics.median(of) for of in zip(*seconds, strict=True))
        return a_round / max(step, 1e-9)

    def _decided(self, table: np.ndarray, steps: int) -> list[float]:
        """The period that is wanted now (a real number), and the limit to it; steps: since the last round of all."""
        pace, cost = self._m.pace, self._cost(table)
        if cost is None or not steps:
            return [pace["wanted"], pace["limit"]]
        longest = max(1.0, cost * (1 / self._m.share - 1))
        if isinstance(self, Adaptive) and self.fits:
            return [self._fitted(table[:, 3:], cost, longest), math.inf]
        limit = self._limit(table[:, 2], steps)
        return [min(longest, 2.0 * min(pace["wanted"], limit)), limit]

    def _fitted(self, squares: np.ndarray, cost: float, longest: float) -> float:
        """The root of the last period times the best one by the decay of the mean of the workers' |grad f_i|^2.

        At most twice the last one: gradients that do not decay yet ask for the longest, which is too long once they do.
        """
        wanted, at = self._m.pace["wanted"], points(self.period)
        finite = squares[np.isfinite(squares).all(1)]
        mean = finite.mean(0) if len(finite) else np.zeros(len(at))
        seen = mean > 0
        if seen.sum() < 2:  # converged, broken, or a period of one step
            return float(min(wanted, longest))
        best = best_period(fitted(at[seen], mean[seen]), cost, longest)
        return math.sqrt(wanted * min(best, 4.0 * self.period))

    def _limit(self, distances: np.ndarray, steps: int) -> float:
        """Halves the period if the workers have gone apart in each of the last rounds; else the limit rises slowly."""
        pace = self._m.pace
        finite = distances[np.isfinite(distances)]
        if not len(finite):
            return float(pace["limit"])
        last = pace["distances"]
        last.append(float(finite.mean()) / steps)
        del last[:-_HISTORY]
        grew = all(b > a for a, b in itertools.pairwise(last)) and last[-1] > 1.1 * last[0] > 0
        if len(last) == _HISTORY and grew:
            last.clear()
            return max(1.0, self.period / 2)
        return float(pace["limit"]) * 1.1


class Adaptive(Paced):
    """So many steps after the last round, one number for all.

    fits: it is the optimum for the decay of the gradients, which the rule shows in `before_step`; else the shortest
    period that keeps rounds under the share, and not longer than keeps the distances from growing.
    """

    def __init__(self, method: Method, first: bool = False, fits: bool = False):
        super().__init__(method, first)
        self.fits = self.sees = fits

    def see(self, gradients: list[torch.Tensor]) -> None:
        """The gradients of the coming step. Nothing is read off the device."""
        pace = self._m.pace
        k = int(np.searchsorted(at := points(self.period), now := self._m.t - pace["last"]))
        if k == len(at) or at[k] != now or not gradients:
            return
        if pace["squares"].device != gradients[0].device:
            pace["squares"] = pace["squares"].to(gradients[0].device)
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(gradients)])
        pace["squares"][k] = norms.square().sum()


class AdaptiveTwo(Paced, TwoPeriods):
    """Within the groups at every period, among all at every `multiple` of it, counted from the last round of all."""

    def __init__(self, method: Method, multiple: int, first: bool = False):
        Paced.__init__(self, method, first)
        self._multiple, self._workers = multiple, 1

    @property
    def global_period(self) -> int:  # type: ignore[override]
        return self.period * self._multiple

    def due(self, t: int) -> Due:
        steps = t - self._m.pace["last"]
        group, world = steps % self.period == 0, steps % self.global_period == 0
        return Due(group, world) if group else NOTHING


def points(period: int) -> np.ndarray:
    """The steps of a period, from 0, at which gradients are looked at: the same on every rank."""
    if period <= _POINTS:
        return np.arange(period)
    return np.round(np.linspace(0, period - 1, _POINTS)).astype(int)


def _apart(m: Method) -> float:
    """The distance to where this worker is pulled, relative to the norm of x."""
    norm = math.hypot(*(float(w.mine[: m.edge[d]].norm()) for d, w in m.x.items()))
    return m.metrics.distance / max(norm, 1e-30)


def pacing(m: Any) -> str | None:
    """Declares what a method keeps whose period is adaptive (`adaptive`); why that does not go with other settings."""
    m.adaptive = m.period == "adaptive"
    if not m.adaptive:
        return None
    m.value("pace", Paced.fresh())
    if getattr(m, "asynchronous", False) or getattr(m, "overlap", False):
        return 'period="adaptive" goes with workers that meet: not with asynchronous or overlap'
    if getattr(m, "until_grad_norm", None) is not None:
        return 'period="adaptive" and until_grad_norm both say when to average: give one'
    return None
