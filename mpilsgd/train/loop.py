"""The training loop: steps, measurements, evaluations of the centre, checkpoints."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mpilsgd.comm import Bell, Topology
from mpilsgd.methods import Diverged, Method
from mpilsgd.train.config import Config, parse_every
from mpilsgd.train.data import Dataset
from mpilsgd.train.display import Display
from mpilsgd.train.elections import Election, merged, on_common_clock
from mpilsgd.train.evaluation import Result, evaluate
from mpilsgd.train.run_directory import METRICS, RunDirectory
from mpilsgd.train.sampling import Sampler, generator, random_state, restore_random_state
from mpilsgd.train.schedule import Schedule
from mpilsgd.train.stragglers import parse_slow
from mpilsgd.train.together import FAILED, TO_BE_RESUMED, Stopped, on_first, stop_if, together

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_CALIBRATION_BATCHES = 20  # per rank, for buffers="recalibrate"


@dataclasses.dataclass
class Progress:
    """How far a worker is, and what it measured; saved with every checkpoint.

    Attributes:
        step: its own steps; with the sampler's batches an epoch it gives the position in the data.
        wall: seconds of training, without evaluations and checkpoints, but with the wait for the last to come to them.
        compute, data, comm: seconds of it, by what was done.
        wait: seconds of comm in which this worker waited: for the others to come, or for its turn.
        loss_sum, loss_count: of the batches since the last evaluation.
        evaluated: the workers' mean step at the last evaluation.
        leader: the last known leader of all.
        leads: how often this worker led its group.
    """

    step: int = 0
    wall: float = 0.0
    compute: float = 0.0
    data: float = 0.0
    comm: float = 0.0
    wait: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    evaluated: float = 0
    leader: int = -1
    leads: int = 0


class Event(NamedTuple):
    """What all workers do together once they have taken `step` steps on the mean."""

    step: int
    what: str  # "evaluate" or "save", in this order at one step


class Trainer:
    """Trains one worker's model together with the others.

    The run ends, evaluates and saves by the sum of all workers' steps: in an asynchronous run the fast ones take more
    than `total_steps` of their own. Every worker comes to the same evaluations and checkpoints, in the same order.

    Args:
        model, opt: the model, and the method that holds its parameters.
        train, test: the data sets; sampler: this worker's batches.
        directory: where rank 0 writes; display: where it tells.
        total_steps: of a worker, on the mean.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        model: torch.nn.Module,
        opt: Method,
        train: Dataset,
        test: Dataset,
        sampler: Sampler,
        directory: RunDirectory,
        display: Display,
        total_steps: int,
    ):
        self.config, self.topology, self.model, self.opt = config, topology, model, opt
        self.train_set, self.test_set, self.sampler = train, test, sampler
        self.directory, self.display, self.total = directory, display, total_steps
        self.schedule = Schedule(config.lr_drops, config.lr_drop_factor, config.lr_gamma)
        self.slowdown = parse_slow(config.slow)
        self.progress = Progress()
        self.rank, self.size = topology.world.rank, topology.world.size
        self.asynchronous = opt.asynchronous
        self._elections: list[Election] = []
        self._flushed: tuple[int, float] = (0, 0)  # own and mean step when they were last written
        self._sealed: int | None = None  # the name of the last checkpoint
        self._last_loss = 0.0
        self._signalled = False
        # in lock-step nobody may leave the others alone between the common events
        self._prompt = getattr(opt, "order", "free") != "lock-step"

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary. Collective."""
        self.model.train()
        if not self._sealed:
            self._save(0)  # a run that is killed at any moment can be resumed, on as many ranks
        events = collections.deque(self._events())
        with self._signals():
            self._train(events)
            self._bell.free()
            return self._finish()

    def _train(self, events: collections.deque[Event]) -> None:
        at, opt = self.progress, self.opt
        order, epoch = torch.empty(0), -1
        while not opt.reached(self.total * len(opt.workers)):
            if at.step // self.sampler.batches != epoch:
                epoch = at.step // self.sampler.batches
                order = self.sampler.epoch(epoch)
            if opt.computes:
                self._step(order[at.step % self.sampler.batches], epoch)
            else:
                self._pass_on()
            self.display.step(at.step if opt.computes else opt.t, self._last_loss if opt.computes else None)
            while events and opt.reached(events[0].step * len(opt.workers)):
                self._do(events)
            if self._signalled and self._prompt:
                self._bell.ring()
            if self._bell.listen():
                self._meet(events)
        while events:  # others brought the total there since this worker last asked
            self._do(events)
        self._meet(events)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """USR1 and TERM, to any rank, end the run on all with a checkpoint, or come too late to. Collective."""
        self._bell = Bell(self.topology.world)

        def note(*_: Any) -> None:
            self._signalled = True

        before = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _meet(self, events: collections.deque[Event]) -> None:
        """All meet, whatever each has come for; if any was told to end the run, all do. Collective.

        events: those still to come, the same on every rank: they come after the run is taken up again.
        """
        at, start = self.progress, time.perf_counter()
        self.opt.settle()  # an exchange behind the last steps is a part of training
        waited = time.perf_counter() - start
        at.wall, at.comm, at.wait = at.wall + waited, at.comm + waited, at.wait + waited
        with self._centre():
            stops = any(self.topology.allgather(self._signalled or self._bell.listen()))
        if not stops:
            return
        if not self.asynchronous:
            self.progress.step = self.opt.t  # with the steps in which it followed the others
        name = int(self._mean(self.topology.allgather(self.progress.step)))
        if events:
            name = min(name, events[0].step - 1)
        if name != self._sealed:
            self._save(name)
        on_first(self.topology, self.directory.interrupted.touch, status=FAILED)
        self._bell.free()
        again = "mpilsgd train" if self.size == 1 else f"mpiexec -n {self.size} mpilsgd train"
        raise Stopped(
            f"ended by a signal at step {name}; it goes on with: {again} --resume {self.directory.path}",
            TO_BE_RESUMED,
        )

    def _events(self) -> list[Event]:
        batches, done = self.sampler.batches, self.progress.evaluated
        intervals = (
            steps_of(every, batches) for every in (self.config.eval_every, self.config.checkpoint_every)
        )
        events = events_between(self._sealed or 0, self.total, *intervals)
        return [event for event in events if event.what == "save" or event.step > done]

    def _do(self, events: collections.deque[Event]) -> None:
        self._meet(events)
        event = events.popleft()
        if event.what == "evaluate":
            self.evaluate()
        else:
            self._save(event.step)

    def _step(self, indices: torch.Tensor, epoch: int) -> None:
        at, opt, measured = self.progress, self.opt, self.opt.metrics
        rounds, comm, wait = measured.rounds, measured.t_comm, measured.t_wait
        measured.leader, measured.leaders = (
            -1,
            [-1] * len(measured.leaders),
        )  # to see who is elected in this step
        self.schedule.apply(opt.param_groups, at.step, at.step / self.sampler.batches)

        start = time.perf_counter()
        batch = at.step % self.sampler.batches
        inputs, targets = self.train_set.batch(indices, self.sampler.augmentation(epoch, batch))
        loaded = time.perf_counter()
        opt.zero_grad()
        loss = functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        value = loss.item()
        self.slowdown.sleep(time.perf_counter() - loaded, self.config.seed, self.rank, at.step)
        if at.step == 0:
            self._refuse_first(value)
        with self._divergence():
            opt.step(loss=value)
        end = time.perf_counter()

        at.step += 1
        comm = measured.t_comm - comm
        at.wall += end - start
        at.data += loaded - start
        at.comm += comm
        at.wait += measured.t_wait - wait
        at.compute += end - loaded - comm
        at.loss_sum += value
        at.loss_count += 1
        self._last_loss = value
        if measured.rounds > rounds and measured.leaders:
            at.leader = measured.leader if measured.leader >= 0 else at.leader
            group = self.topology.group_index
            at.leads += measured.leaders[group] == self.rank
            if self.topology.group.rank == 0:
                # groups of an asynchronous run come to the leader of all at different steps: the first one's counts
                overall = measured.leader if group == 0 or not self.asynchronous else -1
                self._elections.append(Election(at.step, group, measured.leaders[group], overall))

    def _pass_on(self) -> None:
        """A step of a rank that only averages."""
        if self.opt.t == 0:
            self._refuse_first(0.0)
        start = time.perf_counter()
        self.opt.step()
        self.progress.wall += time.perf_counter() - start

    def _refuse_first(self, loss: float) -> None:
        """A first loss that is not finite never becomes finite. Collective."""
        wrong = f"the loss is {loss} at the first step: check the data's values and the model's initial ones"
        stop_if(self.topology, None if math.isfinite(loss) else wrong, FAILED)

    @contextlib.contextmanager
    def _divergence(self) -> Iterator[None]:
        """A method that finds every worker non-finite says so on all ranks: no trace is needed."""
        try:
            yield
        except Diverged as error:
            raise Stopped(str(error), FAILED) from None

    # Evaluation

    def evaluate(self, last: bool = False) -> tuple[Result, dict[str, Any] | None]:
        """Evaluates the centre and writes a line; the last time it also returns the centre's state. Collective."""
        at = self.progress
        state = None
        traffic = dataclasses.replace(self.opt.fabric.traffic)
        with self._centre():
            result = evaluate(self.model, self.test_set, self.topology)
            if last and self.rank == 0:
                state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.opt.fabric.traffic.group, self.opt.fabric.traffic.across = traffic.group, traffic.across
        self._count_waiting()
        rows = self.topology.allgather((at.step, at.loss_sum, at.loss_count, self._measured()))
        steps, losses, counts, measured = zip(*rows, strict=True)
        step = self._mean(steps)
        if at.evaluated != step:  # else it is of a finished run that was resumed
            at.loss_sum, at.loss_count, at.evaluated = 0.0, 0, step
            totals = {key: sum(row[key] for row in measured) for key in measured[0]}
            row = {
                "step": step,
                "epoch": step / self.sampler.batches,
                "wall_s": totals["wall"] / self.size,
                "grad_evals": sum(steps),
                "rounds": max(row["rounds"] for row in measured),
                "bytes_group": totals["bytes_group"],
                "bytes_across": totals["bytes_across"],
                "train_loss": sum(losses) / max(sum(counts), 1),
                "test_loss": result.loss,
                "test_error": result.error,
                "leader": at.leader if at.leader >= 0 else None,
                **{f"t_{key}": totals[key] / len(self.opt.workers) for key in ("compute", "data", "comm")},
            }
            assert tuple(row) == METRICS
            self._write(row)
            self.display.evaluation(row)
        self._refuse_diverged(step)
        return result, state

    def _diverged(self) -> bool:
        """Whether no worker's last loss is finite. Collective."""
        losses = self.topology.allgather(self._last_loss)
        return not any(math.isfinite(losses[rank]) for rank in self.opt.workers)

    def _refuse_diverged(self, step: float) -> None:
        if self._diverged():
            reason = f"the loss of every worker is non-finite at step {step:g}: the run has diverged; try a smaller lr"
            raise Stopped(reason, FAILED)

    def _count_waiting(self) -> None:
        """Who came early has waited for the last one: training has lasted as long for all. Collective."""
        at = self.progress
        latest = max(self.topology.allgather(at.wall))
        waited, at.wall = latest - at.wall, latest
        if self.opt.computes:
            at.comm += waited
            at.wait += waited

    def _mean(self, steps: Iterable[int]) -> float:
        """The workers' mean of the ranks' own steps."""
        return mean(steps, len(self.opt.workers))

    @contextlib.contextmanager
    def _centre(self) -> Iterator[None]:
        recalibrates = self.opt.buffers == "recalibrate" and bool(self.opt.flat.buffers)
        with self._divergence(), self.opt.center(self._calibration() if recalibrates else None):
            yield

    def _calibration(self) -> Iterator[torch.Tensor]:
        """Training inputs of this worker's part."""
        epoch = self.progress.step // self.sampler.batches
        for batch, indices in enumerate(self.sampler.epoch(epoch)[:_CALIBRATION_BATCHES]):
            yield self.train_set.batch(indices, generator(self.config.seed, "calibration", self.rank, batch))[
                0
            ]

    def _write(self, row: dict[str, Any] | None = None) -> None:
        """Writes the leaders since the last time, and a line of metrics. Collective."""
        at = self.progress
        rows = self.topology.allgather((self._flushed, at.step, self._elections))
        now = self._mean(step for _, step, _ in rows)
        elections = [on_common_clock(found, (t, step), (then, now)) for (t, then), step, found in rows]
        lines = merged(elections, self.topology.n_groups)
        self._flushed, self._elections = (at.step, now), []
        on_first(self.topology, self._append, row, lines, status=FAILED)

    def _append(self, row: dict[str, Any] | None, lines: list[dict[str, Any]]) -> None:
        self.directory.append("leaders.jsonl", lines)
        self.directory.append("metrics.jsonl", [] if row is None else [row])

    def _measured(self) -> dict[str, float]:
        at, measured = self.progress, self.opt.metrics
        own = {key: getattr(at, key) for key in ("wall", "compute", "data", "comm")}
        return {**own, **{key: getattr(measured, key) for key in ("rounds", "bytes_group", "bytes_across")}}

    # The end

    def _finish(self) -> dict[str, Any]:
        name = max(self.total, self._sealed or 0)
        if name != self._sealed and not self._diverged():  # else the evaluation says so
            self._save(name)  # before the evaluations, which may take long
        result, state = self.evaluate(last=True)
        on_first(self.topology, self.directory.save_center, state, status=FAILED)
        with getattr(self.opt.optimizer, "iterate", contextlib.nullcontext)():
            own = evaluate(self.model, self.test_set)
        measured = dataclasses.asdict(self.opt.metrics)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        everything = {**measured, **dataclasses.asdict(self.progress), "error": own.error, "peak": peak}
        rows = self.topology.allgather(everything)
        columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
        workers = self.opt.workers
        best = min(workers, key=lambda r: (columns["error"][r], r))
        summary = {
            "method": self.config.method,
            "world_size": self.size,
            "group_size": max(map(len, self.topology.groups)),
            "groups": self.topology.groups,
            "steps": self._mean(columns["step"]),
            "epochs": self._mean(columns["step"]) / self.sampler.batches,
            "grad_evals": sum(columns["step"]),
            "test_error": result.error,
            "test_loss": result.loss,
            "best_worker": {"rank": best, "test_error": columns["error"][best]},
            "worker_test_errors": [columns["error"][r] for r in workers],
            "leads": columns["leads"],
            "resets": columns["resets"],
            "rounds": max(columns["rounds"]),
            "bytes_group": sum(columns["bytes_group"]),
            "bytes_across": sum(columns["bytes_across"]),
            "wall_s": sum(columns["wall"]) / self.size,
            "peak_memory": columns["peak"],
            **{f"t_{key}": [columns[key][r] for r in workers] for key in ("compute", "data", "comm", "wait")},
        }
        if self.asynchronous:
            summary["worker_steps"] = [columns["step"][r] for r in workers]
        if len(workers) < self.size:
            summary["workers"] = workers
        if any(columns["skipped"]):
            summary["skipped"] = columns["skipped"]
        if any(columns["staleness"]):
            summary["staleness"] = histogram(columns["staleness"])
        on_first(self.topology, self.directory.summarize, summary, status=FAILED)
        return summary

    # Checkpoints

    def _save(self, name: int) -> None:
        """Writes a checkpoint that counts when all of it is there; its name is a step that no other has. Collective."""
        self._refuse_diverged(name)  # and keeps the last checkpoint
        self._count_waiting()
        self._write()
        together(self.topology, self.directory.save, self.rank, name, self._state(), status=FAILED)
        on_first(self.topology, self.directory.seal, name, self.size, status=FAILED)
        together(self.topology, self.directory.sweep, self.rank, name, status=FAILED)
        self._sealed = name

    def restore(self, state: dict[str, Any], name: int) -> None:
        """Takes up the state that a checkpoint holds of this rank."""
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self._last_loss = state["last_loss"]
        for key, value in state["metrics"].items():
            setattr(self.opt.metrics, key, value)
        traffic = self.opt.fabric.traffic
        traffic.group, traffic.across = self.opt.metrics.bytes_group, self.opt.metrics.bytes_across
        restore_random_state(state["random"])
        self._sealed = name

    def note_evaluated(self, step: float) -> None:
        """The run directory holds an evaluation at this step: the last one may have been made after the checkpoint."""
        at = self.progress
        if step > at.evaluated:
            at.loss_sum, at.loss_count, at.evaluated = 0.0, 0, step

    def mean_step(self) -> float:
        """How far the workers are after `restore`, on the mean. Collective."""
        own = self.progress.step
        self._flushed = (own, self._mean(self.topology.allgather(own)))
        return self._flushed[1]

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "last_loss": self._last_loss,
            "metrics": dataclasses.asdict(self.opt.metrics),
            "random": random_state(),
        }


def steps_of(every: float | str | None, batches: int) -> int:
    """An interval of the configuration in steps; 0 for none."""
    interval = parse_every(every)
    if interval is None:
        return 0
    number, unit = interval
    return int(number) if unit == "steps" else max(1, round(number * batches))


def events_between(start: int, end: int, evaluations: int, saves: int) -> list[Event]:
    """The evaluations and checkpoints after `start` and before `end`, by their intervals (0: none)."""
    events = [
        Event(step, what)
        for what, interval in (("evaluate", evaluations), ("save", saves))
        if interval
        for step in range(start // interval * interval + interval, end, interval)
    ]
    return sorted(events)


def histogram(parts: Iterable[dict[int, int]]) -> dict[str, int]:
    """The sum of the workers' histograms, as JSON has it: by rising key."""
    total: collections.Counter[int] = collections.Counter()
    for part in parts:
        total.update(part)
    return {str(key): total[key] for key in sorted(total)}


def mean(steps: Iterable[int], workers: int) -> float:
    """The steps a worker, of those who took any; a whole number where it is one."""
    total = sum(steps)
    return total / workers if total % workers else total // workers
