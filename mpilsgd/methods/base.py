"""What all methods share: the wrapped optimizer, flat parameters in windows, rounds, the centre, faults."""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mpilsgd import kernels
from mpilsgd.comm import Fabric, Level, Topology, Window, end_job, exit_status, inquiry
from mpilsgd.flat import FlatParameters, find_modules, float_buffers
from mpilsgd.methods.arguments import choice
from mpilsgd.methods.averaging import Span, accumulation_dtype, average, recalibrate
from mpilsgd.methods.course import Course
from mpilsgd.methods.equality import broadcast_rest, check_equal
from mpilsgd.methods.metrics import Metrics
from mpilsgd.methods.wrapped import described, forget
from mpilsgd.methods.wrapper import Wrapper

# What a worker has come to a meeting for; the least number present decides what happens.
ROUND, CENTER, CLOSE = 0.0, 1.0, 2.0


class Diverged(RuntimeError):
    """Every worker's state is non-finite; raised on every rank."""


class Method(Wrapper):
    """A torch optimizer that wraps another one and exchanges parameters with the other workers.

    Args:
        optimizer: the worker's own optimizer, any of torch's; its parameters are moved, in place, into
            one flat vector a dtype, which lies in a shared window where the node's memory allows.
        topology: the workers; default `Topology()`.
        init: "same" (everyone starts from rank 0's parameters) or "different" (from its own).
        buffers: what becomes of float buffers (BatchNorm statistics): "average" (they follow the exchange of the
            parameters), "keep" (each worker its own) or "recalibrate" (as "keep", and recomputed in `center(batches)`).
        model: the module whose buffers are meant; by default those living modules are found whose
            trainable parameters all belong to the optimizer.

    Between rounds no worker waits for another. A round is collective; a worker that has run out of data and
    enters `center()`, `close()` or the end of its program goes on taking part in the others' rounds
    with the parameters it has, so nobody waits for it in vain.

    Raises:
        ValueError: on every rank, if any rank's arguments or model are wrong or differ from the others'.
        Diverged: on every rank, if all workers' parameters have become non-finite (a RuntimeError).
    """

    asynchronous: bool | str = False  # whether workers come to exchanges at steps of their own

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None,
        *,
        init: str,
        buffers: str,
        model: torch.nn.Module | None,
        problems: Iterable[str | None],
        settings: dict[str, Any],
        vectors: float = 0.0,
        wide: int = 0,
        gradients: bool = False,
        course: tuple[str, Any, Any] | None = None,
    ):
        super().__setstate__({})  # step hooks, without a copy of the parameter groups
        inquiry.warn_if_apart()
        self.topology = Topology() if topology is None else topology
        self._owns_topology = topology is None
        found = list(problems)
        if not isinstance(optimizer, torch.optim.Optimizer):
            found.append(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        found += [choice("init", init, ("same", "different")), choice("buffers", buffers, _BUFFERS)]
        self.topology.agree("; ".join(f for f in found if f) or None)
        self.optimizer = optimizer
        self.buffers_policy = buffers
        self.t = 0
        # the ranks that train: all but those of an EASGDTree that only average
        self.workers = list(range(self.topology.world.size))
        self.metrics = Metrics()
        self._open = self._lent = False
        self._course: Course | None = None
        self._waited = 0.0
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._modules = [model] if model is not None else find_modules(parameters)
        # constants such as a mask of -inf are not statistics
        held = [b for b in float_buffers(self._modules) if bool(torch.isfinite(b).all())]
        self._about = check_equal(
            self.topology,
            type(self).__name__,
            parameters,
            held,
            {**settings, "init": init, "buffers": buffers},
        )
        if course is not None:  # order, record, replay of an asynchronous run
            self._course = Course(self.topology, *course, {**self._about, "optimizer": described(optimizer)})
        device = parameters[0].device
        # of a vector, and of one in the types that sums are taken in
        nbytes, wide_nbytes = (
            sum(-(-t.numel() * kind(t.dtype).itemsize // 64) * 64 for t in [*parameters, *held])
            for kind in (lambda dtype: dtype, accumulation_dtype)
        )
        node = self.topology.node
        shared = int(nbytes * (1 + gradients + vectors / node.size)) + wide * wide_nbytes + 4096
        if node.size < self.topology.world.size:  # the scratch below
            shared += (nbytes + (wide_nbytes if wide_nbytes > nbytes else 0)) // node.size
        self.fabric = Fabric(self.topology, shared, shareable=device.type == "cpu")
        self._x: dict[torch.dtype, Window] = {}
        self._g: dict[torch.dtype, Window] = {}
        self.flat = FlatParameters(parameters, held, allocate=self._allocator(self._x, device))
        if gradients:
            self.flat.attach_grads(self._allocator(self._g, device))
        whole = buffers == "average"
        # the part of every vector that is exchanged
        self._n = {d: w.mine.numel() if whole else self.flat.n_parameters[d] for d, w in self._x.items()}
        self._scratch: dict[torch.dtype, Window] = {}  # a vector an island: what arrives, and sums
        if self.fabric.world.n_islands > 1:
            sizes: dict[torch.dtype, int] = {}
            for dtype, window in self._x.items():
                for kind in (dtype, accumulation_dtype(dtype)):
                    sizes[kind] = max(sizes.get(kind, 0), window.mine.numel())
            for kind, numel in sizes.items():
                self._scratch[kind] = self.fabric.common(self.fabric.world, kind, numel, device)
        if init == "same":
            self._copy_from(0)
            broadcast_rest(self.topology, self._modules, self.flat)
        self.fabric.traffic.group = self.fabric.traffic.across = 0  # counts rounds
        self._open = True
        _living.append(self)

    # The life of a step. Subclasses say what is due before and after the wrapped optimizer's step.

    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One step of this worker's optimizer, and the exchange if one is due.

        Args:
            closure: reevaluates the model and returns the loss, as torch's optimizers take it.
            loss: the loss of this step's batch (number or tensor); `LSGD` elects its leader by it.

        Returns: the loss.
        """
        self._refuse_if_unfit()
        if closure is not None and self._acts_on_gradient():
            with torch.enable_grad():
                loss = closure()
            closure = None
        with torch.no_grad():
            self._before(loss)
        result = self._local_step(closure)
        loss = result if loss is None else loss
        self.t += 1
        with torch.no_grad():
            self._after(loss)
        return loss

    def _refuse_if_unfit(self) -> None:
        self._refuse_if_closed()
        if self._lent:
            raise RuntimeError(
                "step() inside center(): the parameters there are the centre, and go back afterwards"
            )

    def reached(self, total_steps: int) -> bool:
        """Whether all workers together have taken so many steps. Loops over a total of steps end by it.

        Not collective. Where workers keep step it is judged by this worker's own clock; an asynchronous run counts.
        Once True it stays so.
        """
        if self._course is not None:
            return self._course.reached(total_steps, self.t)
        return self.t * self.topology.world.size >= total_steps

    @property
    def computes(self) -> bool:
        """Whether this rank takes gradients; where it does not, `step()` goes without."""
        return self.topology.world.rank in self.workers

    def _acts_on_gradient(self) -> bool:
        """Whether something must happen between the gradient and the wrapped optimizer's step."""
        return False

    def _before(self, loss: Any) -> None: ...

    def _local_step(self, closure: Callable[[], Any] | None) -> Any:
        return self.optimizer.step(closure)

    def _after(self, loss: Any) -> None: ...

    # Rounds

    def _score(self) -> float:
        return 0.0

    def _meet(self, purpose: float) -> np.ndarray | None:
        """Meets the other workers; runs the round if any came for one, else returns the table of rows.

        A row is (purpose, stamp, score, own note, whether what is exchanged is finite). Collective over the world.
        """
        table = self._gate(self.fabric.world, self._row(purpose))
        if not _wants_round(table):
            return table
        self._round(table)
        return None

    def _row(self, purpose: float) -> list[float]:
        return [purpose, self._stamp(), self._score(), self._note(), self._is_finite(purpose)]

    def _gate(self, level: Level, row: Sequence[float]) -> np.ndarray:
        start = time.perf_counter()
        table = level.table(row)
        self._waited += time.perf_counter() - start
        stamps = {int(row[1]) for row in table if row[0] == ROUND}
        if len(stamps) > 1:
            raise RuntimeError(
                f"workers came to one round at different steps {sorted(stamps)}: are their periods equal?"
            )
        return table

    def _stamp(self) -> int:
        return self.t

    def _note(self) -> float:
        return 0.0

    def _is_finite(self, purpose: float) -> bool:
        """Whether what this worker brings to the exchange is finite: one pass over it, before anyone reads it."""
        return all([kernels.check(w.mine[: self._n[d]]) for d, w in self._x.items()])

    def _round(self, table: np.ndarray) -> None:
        raise AssertionError("a method without rounds was asked for one")

    def _followed(self) -> None:
        """After a round in which this worker only took part for the others' sake."""

    def _exchange(self, purpose: float = ROUND) -> np.ndarray | None:
        start, self._waited = time.perf_counter(), 0.0
        with self._shown():
            table = self._meet(purpose)
        m, traffic = self.metrics, self.fabric.traffic
        m.t_comm += time.perf_counter() - start
        m.t_wait += self._waited
        m.bytes_group, m.bytes_across = traffic.group, traffic.across
        return table

    def _rest(self, purpose: float) -> None:
        """Takes part in the others' rounds until all workers rest, and for `purpose`."""
        self.settle()
        if self._course is not None:
            self._course.meet("center" if purpose == CENTER else "close", self.t)
        while True:
            self._rests()
            table = self._exchange(purpose)
            if table is None:
                self._followed()
                continue
            self._wakes()
            self._catch_up(table)
            if table[:, 0].min() == purpose:
                return
            with self._held_centre(()):  # this worker closes, others want the centre: it helps
                pass

    def _rests(self) -> None:
        """This worker takes no part until all have met, but in the others' rounds."""

    def _wakes(self) -> None:
        """All have met. Collective."""

    def _catch_up(self, table: np.ndarray) -> None:
        """All rest: the clocks of those who ran out of data go on from the furthest."""
        self.t = int(table[:, 1].max())

    def _shown(self) -> contextlib.AbstractContextManager[Any]:
        """The parameters as the others shall see them in a round."""
        return self._iterates()

    def _iterates(self) -> contextlib.AbstractContextManager[Any]:
        """The parameters hold x, which is what is exchanged: between steps MSGD's hold the look-ahead."""
        self.flat.reseat()  # RNN.flatten_parameters, for one, moves parameters
        return getattr(self.optimizer, "iterate", contextlib.nullcontext)()

    # The centre

    @contextlib.contextmanager
    def center(self, batches: Iterable[Any] | None = None) -> Iterator[None]:
        """The model holds the centre inside, this worker's own parameters again afterwards. Collective.

        Args:
            batches: for `buffers="recalibrate"`: model inputs (or tuples that begin with them) over which the
                BatchNorm statistics of the centre are computed, each worker over its own, then averaged.
        """
        self._refuse_if_closed()
        if batches is not None and self.buffers_policy != "recalibrate":
            raise ValueError('center(batches) goes with buffers="recalibrate"')
        if batches is None and self.buffers_policy == "recalibrate" and self.flat.buffers:
            raise ValueError(
                'buffers="recalibrate" needs center(batches): inputs to recompute the statistics from'
            )
        grad = torch.is_grad_enabled()
        with torch.no_grad():
            self._rest(CENTER)
            with self._held_centre(batches or ()), torch.set_grad_enabled(grad):
                yield

    @contextlib.contextmanager
    def _held_centre(self, batches: Iterable[Any]) -> Iterator[None]:
        self.flat.reseat()
        traffic = dataclasses.replace(self.fabric.traffic)  # counts rounds
        own = {d: w.mine.clone() for d, w in self._x.items()}  # as it lies there: it comes back exactly
        try:
            with self._iterates():
                self._set_centre()
                if self.buffers_policy == "recalibrate" and self.flat.buffers:
                    self._recalibrate(batches)
                self._lent = True
                yield
        finally:
            self._lent = False
            self.fabric.traffic.group, self.fabric.traffic.across = traffic.group, traffic.across
            for d, w in self._x.items():
                w.mine.copy_(own[d])

    def _set_centre(self) -> None:
        """Puts the centre into every worker's parameters: the mean of the workers. Collective."""
        running = getattr(self.optimizer, "center", None)  # RunningAverage: the mean of the workers' averages
        with running() if running else contextlib.nullcontext():
            fit = self.fabric.world.table([Method._is_finite(self, CENTER)])[:, 0]
            self._refuse_if_all({r for r, f in enumerate(fit) if not f})
            self._average(self._spans(), fit)
            means = {d: w.mine.clone() for d, w in self._x.items()} if running else {}
        for d, mean in means.items():
            self._x[d].mine.copy_(mean)

    def _recalibrate(self, batches: Iterable[Any]) -> None:
        """BatchNorm statistics of the centre over each worker's batches, averaged over those that had any."""
        seen = recalibrate(self._modules, batches)
        had = self.fabric.world.table([float(seen)])[:, 0]
        spans = [(w, self.flat.n_parameters[d], w.mine.numel()) for d, w in self._x.items()]
        if not had.any():
            raise ValueError("center(batches): no worker had any batch to recompute the statistics from")
        self._average(spans, had)

    # Building blocks for the methods

    def _spans(self) -> list[Span]:
        return [(w, 0, self._n[d]) for d, w in self._x.items()]

    def _average(self, spans: list[Span], counts: np.ndarray) -> None:
        """The mean over the world ranks that count, to all. Collective, after a barrier."""
        average(self.fabric.world, self._scratch, spans, {r for r, c in enumerate(counts) if c})

    def _copy_from(self, source: int, takers: set[int] | None = None) -> None:
        """The takers (default: all) get the whole vectors of world rank `source`, to the bit. Collective."""
        level = self.fabric.world
        level.table([0.0])
        for dtype, window in self._x.items():
            vector = level.bring(window, source, self._scratch.get(dtype), exact=True)[: window.mine.numel()]
            if level.rank != source and (takers is None or level.rank in takers):
                window.mine.copy_(vector)
        level.table([0.0])

    def _refuse_if_all(self, bad: set[int]) -> None:
        if bad.issuperset(self.workers):
            raise Diverged(
                f"every worker's parameters are non-finite at step {self.t}: the run has diverged; "
                "a smaller learning rate may help"
            )

    def _set_back(self, bad: set[int]) -> None:
        """Ends the job if all are bad; if this worker is, counts it and clears its momentum and its gradient."""
        self._refuse_if_all(bad)
        if self.fabric.world.rank in bad:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self.metrics.resets += 1
        forget(self.optimizer)
        for p in self.flat.parameters:
            if p.grad is not None:  # taken at the parameters that were not finite
                p.grad.zero_()

    def _allocator(
        self, windows: dict[torch.dtype, Window], device: torch.device
    ) -> Callable[..., torch.Tensor]:
        def allocate(dtype: torch.dtype, numel: int) -> torch.Tensor:
            windows[dtype] = self.fabric.window(dtype, numel, device)
            return windows[dtype].mine

        return allocate

    # State

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "mpilsgd", this worker's clock, metrics and the method's own.

        Each rank saves its own. In an asynchronous run the first of each node also saves its part of the centre, so
        nobody may step meanwhile: `settle()` and a barrier come first.
        """
        self._refuse_if_closed()
        self.settle()
        metrics = dataclasses.asdict(self.metrics)
        del metrics["t_comm"], metrics["t_wait"]  # this process's
        own = {"method": type(self).__name__, "model": self._about["model"], "t": self.t, "metrics": metrics}
        return {**self.optimizer.state_dict(), "mpilsgd": {**own, **self._extra()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` of the same method gave; the parameters are the model's to load.

        Collective if the method is asynchronous. A ValueError refuses the state of another method or model.
        """
        state_dict = dict(state_dict)
        own = state_dict.pop("mpilsgd", None)
        unfit = None
        if own is None or own.get("method") != type(self).__name__:
            of = "another optimizer" if own is None else own.get("method")
            unfit = f"this is the state of {of}, not of {type(self).__name__}"
        elif own.get("model") != self._about["model"]:  # its vectors are laid out otherwise
            unfit = "this is the state of other parameters (shapes, types, order, memory formats)"
        if self.asynchronous:
            self.topology.agree(unfit)
        elif unfit:
            raise ValueError(unfit)
        self.settle()
        self.optimizer.load_state_dict(state_dict)
        self.t = int(own["t"])
        self.metrics = Metrics(
            **copy.deepcopy(own["metrics"]), t_comm=self.metrics.t_comm, t_wait=self.metrics.t_wait
        )
        self.fabric.traffic.group, self.fabric.traffic.across = (
            self.metrics.bytes_group,
            self.metrics.bytes_across,
        )
        self._load_extra(own)

    def settle(self) -> None:
        """Waits for this worker's own exchange, if one is under way (`EASGD(overlap=True)`)."""

    def _extra(self) -> dict[str, Any]:
        """What a subclass keeps beside the clock and the metrics."""
        return {}

    def _load_extra(self, own: dict[str, Any]) -> None: ...

    def _refuse_if_closed(self) -> None:
        if not self._open:
            raise RuntimeError(f"this {type(self).__name__} is closed")

    def close(self) -> None:
        """Ends the exchanges and frees windows and communicators; the model stays usable. Collective."""
        if not self._open:
            return
        with torch.no_grad():
            self._rest(CLOSE)
            try:
                if self._course is not None:
                    self._course.finish()
            finally:
                self._release()

    def _release(self) -> None:
        self._open = False
        _living.remove(self)
        try:
            self._free()  # before the parameters need memory of their own
        finally:
            self.flat.release()
        self._x, self._g, self._scratch = {}, {}, {}
        if self._course is not None:
            self._course.free()
        self.fabric.free()
        if self._owns_topology:
            self.topology.free()

    def _free(self) -> None:
        """Drops a subclass' references into windows."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


_BUFFERS = ("average", "keep", "recalibrate")
_living: list[Method] = []
_process = os.getpid()


@atexit.register
def _rest_at_exit() -> None:
    """The program ends on this rank: serve the others' rounds to their end, unless the job is being aborted."""
    if os.getpid() != _process:  # a fork's end is not the rank's
        return
    try:
        for method in list(_living):
            if not exit_status():
                method.close()
    except Exception as failure:
        end_job(type(failure), failure, failure.__traceback__)


def _wants_round(table: np.ndarray) -> bool:
    return bool((table[:, 0] == ROUND).any())
