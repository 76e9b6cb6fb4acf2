"""Leader SGD: the workers are pulled toward the best of their group and the best of all."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Level, Topology, Window, exhaust
from mpilsgd.methods.anchors import Anchors
from mpilsgd.methods.arguments import choice, number, whole
from mpilsgd.methods.averaging import share
from mpilsgd.methods.base import ROUND, Method
from mpilsgd.methods.course import course_problems, course_settings
from mpilsgd.methods.msgd import MSGD
from mpilsgd.methods.waitfree import WaitFree
from mpilsgd.methods.wrapped import gradient_at_x


class LSGD(Method):
    """Leader SGD with one leader (one group) or a local leader a group and a global one.

        x^{j,i} <- x^{j,i} - pull (x^{j,i} - x~^j) - global_pull (x^{j,i} - x^)

    x~^j, the local leader, is the worker of group j with the least mean training loss over its last
    `loss_window` batches, x^ the best of all; ties go to the lowest rank, and a loss that is not finite never
    leads. The first term is due every `period` steps, the second every `global_period`; when both are, it is one
    simultaneous update. With one group both leaders are one and the rates add: give `global_pull=0` for the
    papers' single-leader LSGD.

    Args:
        pull, global_pull: lambda, lambda_G in [0, 1], the rates of Eq. 3 (the theory's are eta times its lambda).
            Default of global_pull: pull.
        period, global_period: tau, tau_G >= 1 in steps. Default of global_period: 2 period.
        loss_window: batches, >= 1.
        when: "after_step" (Algorithm 1): the pull follows the gradient step that makes t a multiple of the period.
            "with_step" (section 3.1.2): at the steps whose t, from 0 before the step, is a multiple of the period,
            x_{t+1} = x_t - eta g(x_t) - lambda (x_t - x~_t) - ..., from time-t values.
            "every_step" (Eq. 3): so at every step, toward the leaders as they were at the last multiple of the periods
            (one vector a leader and node more).
        sequential: when both pulls are due, the local one first, then the global, as Algorithm 1 prints them: the
            simultaneous update with rates lambda (1 - lambda_G) and lambda_G.
        score: a callable without arguments, this worker's score now, less is better, in place of the loss
            window.
        asynchronous: True (Algorithm 1): the steps of all workers are counted together; when they reach a multiple
            of p tau (p tau_G), a round is due, and each joins it at its next step, with its own number of steps:
            nobody waits longer than for the slowest worker's one step. "wait-free": nobody waits at all. By its own
            clock each worker publishes its score and parameters and is pulled to the last published ones of the
            leader (three vectors more a worker, four with two leaders).
        order, record, replay: as for `EASGD`. In round robin Algorithm 1 is the synchronous form.
        optimizer, topology, init, buffers, model and errors: see `Method`.

    Nothing is copied in a node: all read the leader where it lies, in one pass, then a local leader moves to the
    global one. The centre is the mean of all workers. Momentum is not exchanged. A worker found non-finite is set
    back to the leader. Source: LSGD, Algorithm 1 and (3).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        pull: float = 0.1,
        global_pull: float | None = None,
        period: int = 64,
        global_period: int | None = None,
        loss_window: int = 10,
        when: str = "after_step",
        sequential: bool = False,
        score: Callable[[], float] | None = None,
        asynchronous: bool | str = False,
        order: str = "free",
        record: str | None = None,
        replay: str | None = None,
        init: str = "same",
        buffers: str = "average",
        model: torch.nn.Module | None = None,
    ):
        topology, made = (Topology(), True) if topology is None else (topology, False)
        problems = [
            number("pull", pull, 0.0, 1.0),
            whole("period", period),
            whole("loss_window", loss_window),
        ]
        problems.append(choice("when", when, ("after_step", "with_step", "every_step")))
        if global_pull is not None:
            problems.append(number("global_pull", global_pull, 0.0, 1.0))
        if global_period is not None:
            problems.append(whole("global_period", global_period))
        if score is not None and not callable(score):
            problems.append(f"score must be a callable without arguments, not {score!r}")
        problems.append(choice("asynchronous", asynchronous, (False, True, "wait-free")))
        if asynchronous == "wait-free" and when != "after_step":
            problems.append('asynchronous="wait-free" goes with when="after_step"')
        problems += course_problems(asynchronous, order, record, replay)
        self.asynchronous = asynchronous
        self.pull = pull
        self.global_pull = pull if global_pull is None else global_pull
        self.period = period
        self.global_period = (
            global_period if global_period is not None else 2 * period if not problems[1] else 1
        )
        self.when, self.sequential, self.score = when, sequential, score
        self._losses: deque[Any] = deque(maxlen=loss_window if not problems[2] else 1)
        self._now = math.inf
        super().__init__(
            optimizer,
            topology,
            init=init,
            buffers=buffers,
            model=model,
            problems=problems,
            settings=dict(
                pull=pull,
                global_pull=self.global_pull,
                period=period,
                global_period=self.global_period,
                loss_window=loss_window,
                when=when,
                sequential=sequential,
                asynchronous=asynchronous,
                score=score is not None,
                **course_settings(order, record, replay),
            ),
            vectors=2.0 * topology.node.size
            if asynchronous == "wait-free"
            else 1.0 + topology.n_groups
            if when == "every_step"
            else 0.0,
            course=(order, record, replay) if asynchronous else None,
        )
        self._owns_topology = made
        self.metrics.leaders = [-1] * self.topology.n_groups
        group, world = self.fabric.group, self.fabric.world
        device = self.flat.parameters[0].device
        # Where a leader's vector arrives (from another island) or stays ("every_step")
        stays = when == "every_step"
        self._local: dict[torch.dtype, Window] = {}
        self._global: dict[torch.dtype, Window] = {}
        for d, w in self._x.items():
            if stays or group.n_islands > 1:
                self._local[d] = self.fabric.common(group, d, w.mine.numel(), device)
            if stays:
                self._global[d] = self.fabric.common(world, d, w.mine.numel(), device)
            elif d in self._scratch:
                self._global[d] = self._scratch[d]
        self._anchors: Anchors | None = None
        if stays:
            kept = [(group, self._local, self.pull), (world, self._global, self.global_pull)]
            self._anchors = Anchors(self._x, self._n, kept)
        # Rounds by the total of steps: the total at which the last one was due
        self._joined = 0 if when == "after_step" else -1
        self._by_total = asynchronous is True and order == "free"
        self._waitfree: WaitFree | None = None
        if self._course is not None:
            every = self.topology.world.size * math.gcd(self.period, self.global_period)
            self._course.open(self.fabric, every if self._by_total else None)
            if asynchronous == "wait-free":
                two = self.global_pull > 0
                self._waitfree = WaitFree(self.topology, self.fabric, self._course, self._x, self._n, two)

    # When

    def _acts_on_gradient(self) -> bool:
        return self.when != "after_step"

    def _due(self, t: int) -> tuple[bool, bool]:
        """Whether the local and the global pull are due at a clock: one worker's, or the total of all."""
        unit = self.topology.world.size if self._by_total else 1
        return t % (unit * self.period) == 0, t % (unit * self.global_period) == 0

    def _stamp(self) -> int:
        return self._joined if self._by_total else self.t

    def _exchange_if_due(self) -> None:
        if self._waitfree is not None:
            self._exchange_alone(self._waitfree)
        elif not self._by_total:
            if any(self._due(self.t)):
                self._exchange()
        else:
            while self._total_is_due():
                self._exchange()

    def _total_is_due(self) -> bool:
        """Whether the total of steps has passed the next multiple; if so, this worker joins that round."""
        assert self._course is not None
        units = (self.topology.world.size * period for period in (self.period, self.global_period))
        due = min((self._joined // unit + 1) * unit for unit in units)
        if self._course.replays:
            if self._course.upcoming() != [self.t, due]:
                return False
            self._course.repeat()
        elif self._course.total() < due:
            return False
        self._course.note([self.t, due])
        self._joined = due
        return True

    def _exchange_alone(self, waitfree: WaitFree) -> None:
        local, global_ = self._due(self.t)
        if not (local or global_):
            return
        with self._iterates():
            fit = Method._is_finite(self, ROUND)
            score = self._measure()
            if not fit:
                self._set_back({self.fabric.world.rank})
                self._losses.clear()
            rate, global_rate = self.pull * local, self.global_pull * global_
            if self.sequential:
                rate *= 1.0 - global_rate
            waitfree.exchange(score, fit, (rate, global_rate), self.metrics)

    def _record(self, loss: Any) -> None:
        if self.score is not None:
            return
        if loss is None:
            raise ValueError(
                "LSGD elects its leader by the training loss: step(loss=loss), step(closure) or score="
            )
        self._losses.append(loss.detach() if torch.is_tensor(loss) else float(loss))

    def _before(self, loss: Any) -> None:
        if self.when != "after_step":
            self._record(loss)

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        if self.when == "after_step":
            return super()._local_step(closure)
        with torch.no_grad(), gradient_at_x(self.optimizer):
            self._exchange_if_due()
            if not self._anchors:
                return super()._local_step(closure)
            if isinstance(self.optimizer, MSGD) and all(p.grad is not None for p in self.flat.parameters):
                return self._anchors.step(self.optimizer, self.flat)
            with self._shown():
                self._anchors.pull(dict.fromkeys(self._x, 0))
            return super()._local_step(closure)

    def _after(self, loss: Any) -> None:
        if self._course is not None:
            self._course.count(self.t)
        if self.when == "after_step":
            self._record(loss)
            self._exchange_if_due()

    def _catch_up(self, table: np.ndarray) -> None:
        if self._by_total:
            self._joined = int(table[:, 1].max())
        elif self._waitfree is None:
            super()._catch_up(table)

    def _rests(self) -> None:
        if self._waitfree is not None:
            self._waitfree.rest()

    def _wakes(self) -> None:
        if self._waitfree is not None:
            self._waitfree.wake()

    def _is_finite(self, purpose: float) -> bool:
        return (
            True  # found out by the pull, in the same pass; a leader's values that are not finite pull nobody
        )

    # Who

    def _score(self) -> float:
        return self._now

    def _measure(self) -> float:
        if self.score is not None:
            value = float(self.score())
        elif not self._losses:
            value = math.inf
        else:
            value = sum(float(loss) for loss in self._losses) / len(self._losses)
        return value if math.isfinite(value) else math.inf

    def _meet(self, purpose: float) -> np.ndarray | None:
        self._now = self._measure()
        mates = None
        if self.topology.n_groups > 1:
            mates = self._gate(self.fabric.group, self._row(purpose))
            stamp = _stamp_of_round(mates)
            if stamp is not None:
                self._joined = stamp
                world = self._gate(self.fabric.world, self._row(purpose)) if self._due(stamp)[1] else None
                self._lead(mates if self._due(stamp)[0] else None, world)
                return None
        everyone = self._gate(self.fabric.world, self._row(purpose))
        stamp = _stamp_of_round(everyone)
        if stamp is None:
            return everyone
        self._joined = stamp
        local, global_ = self._due(stamp)
        # a group at rest takes part in a global round, but has no business of its own
        self._lead(everyone if local and mates is None else None, everyone if global_ else None)
        return None

    # The round

    def _lead(self, mates: np.ndarray | None, everyone: np.ndarray | None) -> None:
        """Finds the leaders in the tables of scores (None: that pull is not due) and pulls to them."""
        group, world = self.fabric.group, self.fabric.world
        g = _best(mates)
        w = _best(everyone)
        self.metrics.rounds += 1
        if g is not None:
            self.metrics.leads += g == group.rank
            self.metrics.leaders[self.topology.group_index] = group.world_ranks[g]
        if w is not None:
            assert everyone is not None
            for j, ranks in enumerate(self.topology.groups):
                self.metrics.leaders[j] = min(ranks, key=lambda r: (everyone[r, 2], r))
            self.metrics.leader = w
        elif self.topology.n_groups == 1 and g is not None:
            self.metrics.leader = group.world_ranks[g]
        if g is None and w == world.rank:
            self.metrics.leads += 1
        level, table = (world, everyone) if everyone is not None else (group, mates)
        assert table is not None
        # who is not finite, and at the end the squared distance moved, and by how many vectors
        found = np.zeros(level.size + 2)
        if self._anchors is None:
            self._pull(g, w, level, found)
        else:
            self._anchors.keep((g, w))
            found[level.rank] = not Method._is_finite(self, ROUND)
        level.combine(found)
        rate = self.pull * (g is not None) + self.global_pull * (w is not None)
        if found[-1] and rate:
            self.metrics.distance = math.sqrt(found[-2] / found[-1]) / rate
        bad = {r for r in range(level.size) if found[r]}
        if bad:
            self._repair(level, table, bad)

    def _pull(self, g: int | None, w: int | None, level: Level, found: np.ndarray) -> None:
        """Pulls the workers of this island's part of the group, each rank its slice of all their vectors.

        So a leader is read from memory once for all of them, and nobody idles. A local leader that moves to the
        global one does so last, piece by piece behind the others.
        """
        group, world = self.fabric.group, self.fabric.world
        rate, global_rate = self.pull, self.global_pull
        if self.sequential and g is not None and w is not None:
            rate *= 1.0 - global_rate
        leaders = ({group.world_ranks[g]} if g is not None else set()) | ({w} if w is not None else set())
        # an only leader stays; one of two moves to the other, behind its followers
        movers = [r for r in group.local_ranks if {group.world_ranks[r]} != leaders]
        movers.sort(key=lambda r: r == g)
        for d, window in self._x.items():
            terms: list[tuple[torch.Tensor, float]] = []
            parts: Iterable[tuple[int, int]] = ()
            if g is not None:
                vector, parts = group.coming(window, g, self._local.get(d))
                terms.append((vector, rate))
            if w is not None:
                exhaust(parts)
                vector, parts = world.coming(window, w, self._global.get(d))
                terms.append((vector, global_rate))
            if not movers or not terms:
                exhaust(parts)
                found[level.rank] += not kernels.check(window.mine[: self._n[d]])
                continue
            for start, stop in parts:  # while the next one comes
                a, b = share(group, min(start, self._n[d]), min(stop, self._n[d]))
                pulls = [(vector[a:b], r) for vector, r in terms]
                (leader, r), (other, s) = pulls[0], pulls[1] if len(pulls) > 1 else (None, 0.0)
                vectors = [window.views[group.seats[m]][a:b] for m in movers]
                moved = kernels.pull(vectors, leader, r, other, s, stats=True)
                assert moved is not None
                bad = {group.world_ranks[movers[i]] for i in moved.bad_peers}
                if (
                    len(leaders) == 1 and not moved.source_finite
                ):  # one of two is seen where it moves or leads alone
                    bad |= leaders
                for world_rank in bad:
                    found[level.world_ranks.index(world_rank)] += 1
                found[-2] += moved.squared_distance
        found[-1] = len(movers) / len(group.local_ranks)

    def _repair(self, level: Level, table: np.ndarray, bad: set[int]) -> None:
        """Non-finite workers take the place of the best finite one. Collective over the level."""
        if len(bad) == level.size:
            if level is self.fabric.world or self.topology.n_groups == 1:
                self._refuse_if_all(set(range(self.fabric.world.size)))
            return  # a whole group: the next global round sets it back
        source = min((r for r in range(level.size) if r not in bad), key=lambda r: (table[r, 2], r))
        for d, window in self._x.items():
            vector = level.bring(window, source, self._scratch.get(d))
            if level.rank in bad:
                window.mine.copy_(vector)
        if level.rank in bad:
            self._losses.clear()
            self._set_back({self.fabric.world.rank})
        level.table([0.0])

    # State

    def _extra(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "losses": [float(loss) for loss in self._losses],
            "joined": self._joined,
        }
        if self._waitfree is not None:
            own["snapshot"] = self._waitfree.state()
        if self._anchors is not None:
            own["anchors"] = self._anchors.state()
        return own

    def _load_extra(self, own: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(own["losses"])
        self._joined = own["joined"]
        if self._waitfree is not None:
            self._waitfree.load(own["snapshot"])
        if self._course is not None:
            self._course.load(self.t)
        if self._anchors is not None:
            self._anchors.load(own["anchors"])

    def _free(self) -> None:
        if self._waitfree is not None:
            self._waitfree.free()
        self._local, self._global, self._anchors = {}, {}, None


def _stamp_of_round(table: np.ndarray) -> int | None:
    """The step at which a round is held; None if nobody came for one."""
    rows = table[table[:, 0] == ROUND]
    return int(rows[0, 1]) if len(rows) else None


def _best(table: np.ndarray | None) -> int | None:
    """The rank with the least score, the lowest among equals; None if no score is finite or no pull is due."""
    if table is None or not np.isfinite(table[:, 2]).any():
        return None
    return int(np.argmin(table[:, 2]))
