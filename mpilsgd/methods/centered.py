"""Methods with a centre variable that each worker visits on its own, in its turn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Shard, Shards
from mpilsgd.methods.averaging import accumulation_dtype
from mpilsgd.methods.base import Diverged, Method


class Part(NamedTuple):
    """A piece of a dtype's vectors: this worker's x, elements low to high of it; the centre's c and others by name."""

    dtype: torch.dtype
    low: int
    high: int
    x: torch.Tensor
    c: torch.Tensor
    vectors: dict[str, torch.Tensor]


class Centered(Method):
    """A method whose asynchronous form keeps a centre in shards, one an island, without a server.

    A worker visits all shards in its turns; a visit is one exchange, atomic a shard. Workers that are not finite write
    nothing: they start anew from the centre.
    """

    _shards: Shards | None = None

    def _open_centre(
        self,
        init: str,
        also: Sequence[str] = (),
        wide: Sequence[str] = (),
    ) -> None:
        """Makes the shards: "c", which starts at the workers' mean, and others, which start at 0. Collective.

        also: other vectors of the workers' types; wide: of their accumulation types.
        """
        assert self._course is not None
        self._course.open(self.fabric)
        kinds = {name: {d: d for d in self._x} for name in ("c", *also)}
        kinds |= {name: {d: accumulation_dtype(d) for d in self._x} for name in wide}
        sizes = {d: w.mine.numel() for d, w in self._x.items()}
        device = self.flat.parameters[0].device
        self._shards = Shards(self.fabric, sizes, kinds, device)
        # of each shard: its updates when this worker last read it
        self._last_update = [0] * self._shards.count
        with torch.no_grad(), self._iterates():
            own = {d: w.mine.clone() for d, w in self._x.items()} if init == "different" else {}
            if own:
                self.fabric.world.table([0.0])
                self._average(
                    [(w, 0, w.mine.numel()) for w in self._x.values()], np.ones(self.fabric.world.size)
                )
            self._put_centre()
            for d, x in own.items():
                self._x[d].mine.copy_(x)
        self.fabric.traffic.group = self.fabric.traffic.across = 0

    def _put_centre(self) -> None:
        """The shards take what this island's first worker holds. Collective."""
        assert self._shards is not None
        self.fabric.world.table([0.0])
        if self.fabric.world.local.rank == 0:
            for d, w in self._x.items():
                a, b = self._shards.span(d)
                self._shards.own["c"][d].mine.copy_(w.mine[a:b])
        self.fabric.world.table([0.0])

    # A visit

    @contextlib.contextmanager
    def _visiting(self, timed: bool = True) -> Iterator[Iterator[Shard]]:
        """The shards, each in this worker's turn; time and bytes are counted, the order noted or repeated."""
        assert self._course is not None and self._shards is not None
        course, shards = self._course, self._shards
        start, waited, moved = time.perf_counter(), shards.waited, shards.moved
        seen: list[int] = [0] * shards.count

        def turns() -> Generator[Shard, None, None]:
            with contextlib.closing(shards.visit(course.repeat(), course.round_robin)) as visit:
                for shard in visit:
                    seen[shard.index] = shard.ticket
                    yield shard

        iterator = turns()
        try:
            yield iterator
        finally:
            iterator.close()
        course.note(seen)
        m = self.metrics
        m.rounds += 1
        if timed:
            m.t_comm += time.perf_counter() - start
            m.t_wait += shards.waited - waited
        self.fabric.traffic.across += shards.moved - moved
        for d, n in self._n.items():
            first, last = shards.span(d)
            self.fabric.traffic.group += max(0, min(last, n) - first) * d.itemsize
        m.bytes_group, m.bytes_across = self.fabric.traffic.group, self.fabric.traffic.across

    def _updates(self, shard: Shard) -> int:
        """Counts this update of the shard's centre, and how many others were since this worker read it."""
        assert self._shards is not None
        before = self._shards.turns.tick(shard.index)
        if shard.index == 0:
            stale = before - self._last_update[0]
            self.metrics.staleness[stale] = self.metrics.staleness.get(stale, 0) + 1
        self._last_update[shard.index] = before + 1
        return before

    def _parts(self, shard: Shard, which: str = "all") -> Iterator[Part]:
        """What is exchanged of each dtype and lies in the shard: "parameters", "buffers" (BatchNorm's) or both."""
        for d, window in self._x.items():
            first, last = shard.spans[d]
            edge = self.flat.n_parameters[d]
            low = max(first, edge if which == "buffers" else 0)
            high = min(last, edge if which == "parameters" else self._n[d])
            if low < high:
                vectors = {name: of[d][low - first : high - first] for name, of in shard.vectors.items()}
                yield Part(d, low, high, window.mine[low:high], vectors["c"], vectors)

    def _fit(self) -> bool:
        """Whether this worker may write into the centre; if not, its optimizer forgets."""
        if Method._is_finite(self, 0.0):
            return True
        self._begin_anew()
        return False

    def _start_anew(self, shard: Shard) -> None:
        """This worker takes the shard's values."""
        assert self._shards is not None
        for d, window in self._x.items():
            a, b = shard.spans[d]
            window.mine[a:b].copy_(shard.vectors["c"][d])
            self._refuse_broken(window.mine[a:b])
        self._last_update[shard.index] = self._shards.turns.ticks(shard.index)

    def _refuse_broken(self, taken: torch.Tensor) -> None:
        """What a worker starts anew from must be finite."""
        if not kernels.check(taken):
            raise Diverged(
                f"this worker's parameters and the centre are non-finite at step {self.t}: the run has diverged; "
                "a smaller learning rate may help"
            )

    # The life of the method

    def step(self, closure: Any = None, *, loss: Any = None) -> Any:
        loss = super().step(closure, loss=loss)
        if self._course is not None:
            self._course.count(self.t)
        return loss

    def _rests(self) -> None:
        if self._course is not None and self._shards is not None and self._course.round_robin:
            self._shards.turns.rest()

    def _wakes(self) -> None:
        if self._course is not None and self._shards is not None and self._course.round_robin:
            self._shards.turns.wake(True)
            self.fabric.world.barrier()

    def _catch_up(self, table: np.ndarray) -> None:
        if self._course is None:
            super()._catch_up(table)

    def _collected(self, name: str = "c") -> Iterator[tuple[torch.dtype, torch.Tensor]]:
        """The whole of a vector of the shards. Collective; nobody is in a turn."""
        assert self._shards is not None
        for d in self._x:
            whole = self._scratch.get(self._shards.kinds[name][d])
            vector = self._shards.collect(name, d, whole)
            yield d, vector
            self.fabric.world.barrier()  # dtypes take turns in the scratch

    def _set_centre(self) -> None:
        if self._shards is None:
            super()._set_centre()
            return
        square = 0.0
        for d, c in self._collected(self._shown_centre()):
            x = self._x[d].mine[: self._n[d]]
            square += float(torch.dist(x, c[: self._n[d]].to(x.device, x.dtype))) ** 2
            x.copy_(c[: self._n[d]])
        self.metrics.distance = square**0.5

    def _shown_centre(self) -> str:
        """The vector that is evaluated."""
        return "c"

    def _extra(self) -> dict[str, Any]:
        if self._shards is None:
            return {}
        residuals = {key: vector.clone() for key, vector in self._shards.residuals.items()}
        last = {"last_update": list(self._last_update), "residuals": residuals}
        if self.fabric.world.local.rank:
            return last
        own = {name: {str(d): w.mine.clone() for d, w in of.items()} for name, of in self._shards.own.items()}
        return {**last, "shards": own, "ticks": self._shards.turns.ticks(self.fabric.world.island)}

    def _load_extra(self, own: dict[str, Any]) -> None:
        if self._shards is None:
            return
        self.fabric.world.table([0.0])  # nobody is in a turn
        self.topology.agree(self._misfit(own))
        self._last_update = list(own["last_update"])
        for key, residual in own["residuals"].items():
            self._shards.residuals[key].copy_(residual)
        if self.fabric.world.local.rank == 0:
            for name, of in self._shards.own.items():
                for d, w in of.items():
                    w.mine.copy_(own["shards"][name][str(d)])
                    w.sync()
            self._shards.turns.set_ticks(self.fabric.world.island, own["ticks"])
        if self._course is not None:
            self._course.load(self.t)
        self.fabric.world.table([0.0])

    def _misfit(self, own: dict[str, Any]) -> str | None:
        """Why a saved part of the centre cannot be this rank's."""
        assert self._shards is not None
        head = self.fabric.world.local.rank == 0
        wanted = {n: {str(d): w.mine.numel() for d, w in of.items()} for n, of in self._shards.own.items()}
        saved = {n: {d: v.numel() for d, v in of.items()} for n, of in own.get("shards", {}).items()}
        if saved == (wanted if head else {}) and len(own["last_update"]) == self._shards.count:
            return None
        return "the state was saved by ranks that lay otherwise on nodes: the parts of the centre do not fit"

    def _free(self) -> None:
        if self._shards is not None:
            self._shards.free()
        self._shards = None
