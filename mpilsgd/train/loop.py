"""The training loop: steps, measurements, evaluations of the centre, checkpoints."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mpilsgd.comm import Place, Topology, seconds
from mpilsgd.methods import Method
from mpilsgd.train import checkpoint, devices, diverging
from mpilsgd.train.batches import Batches
from mpilsgd.train.callables import InputError
from mpilsgd.train.config import Config
from mpilsgd.train.display import Display, command_of
from mpilsgd.train.evaluation import Result, evaluate
from mpilsgd.train.events import Event, events_between, steps_of
from mpilsgd.train.gradient import Gradient
from mpilsgd.train.journal import Journal
from mpilsgd.train.precision import Precision
from mpilsgd.train.progress import Progress, mean
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.samples import Dataset
from mpilsgd.train.sampling import other_random_numbers, random_state
from mpilsgd.train.schedule import scheduled
from mpilsgd.train.scored import scored
from mpilsgd.train.stopping import Signals, Stop, stop_of
from mpilsgd.train.stragglers import parse_slow
from mpilsgd.train.summary import figures_of, measured, metrics_line, summary_of
from mpilsgd.train.task import Task
from mpilsgd.train.timing import level, timer_of
from mpilsgd.train.together import FAILED, TO_BE_RESUMED, Stopped, on_first


class Trainer:
    """Trains one worker's model together with the others.

    The run ends, evaluates and saves by the sum of all workers' steps: in an asynchronous run the fast ones take more
    than `total_steps` of their own. Every worker comes to the same evaluations and checkpoints, in the same order.

    Args:
        task, model, opt: what is trained, the model, and the method that holds its parameters.
        train, test: the data sets; sampler: this worker's batches.
        directory: where rank 0 writes; display: where it tells.
        total_steps: of a worker, on the mean.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        task: Task,
        model: torch.nn.Module,
        opt: Method,
        train: Dataset,
        test: Dataset,
        sampler: Any,
        directory: RunDirectory,
        display: Display,
        total_steps: int,
    ):
        self.config, self.topology, self.model, self.opt, self.sampler = config, topology, model, opt, sampler
        self.queued = devices.queued(opt.device)  # numbers are read at evaluations and checkpoints only
        self.precision, self.timer = Precision(config.amp, opt.device, opt), timer_of(opt.device)
        self.judged = functools.partial(evaluate, model, test, autocast=self.precision.autocast, task=task)
        self.gradient = Gradient(task, model, self.precision, config.clip_norm)
        self.batches = Batches(train, sampler, ahead=self.queued and train.on_host)
        self.directory, self.display, self.total = directory, display, total_steps
        self.schedule = scheduled(config, opt, total_steps, sampler.batches)
        self.slowdown = parse_slow(config.slow)
        self.progress = Progress()
        self.rank, self.size = topology.world.rank, topology.world.size
        self.journal = Journal(topology, opt, directory)
        self.checkpoints = checkpoint.Checkpoints(topology, directory, behind=self.queued)
        self.tell: Callable[[int, Place], None] = lambda step, place: None  # where this rank stands
        self._sealed: int | None = None  # the name of the last checkpoint

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the summary. Collective."""
        self.model.train()
        if self._sealed is None:
            self._save(0)  # a run that is killed at any moment can be resumed, on as many ranks
            self.checkpoints.finish()
        with Signals() as self._signals, self.display:
            self._stop: Stop = stop_of(self.opt, self.topology, self._signals, self.progress.step)
            self._train(collections.deque(self._events()))
            self._stop.free()
            return self._finish()

    def _train(self, events: collections.deque[Event]) -> None:
        at, opt = self.progress, self.opt
        while True:
            while events and opt.reached(events[0].step * len(opt.workers)):
                self._do(events)
            if opt.reached(self.total * len(opt.workers)):
                break
            if opt.computes:
                self._step()
            else:
                self._pass_on()
            self.display.step(at.step if opt.computes else opt.t, at.last_loss if opt.computes else None)
            with self.timer.waiting(at):
                due = self._stop.due(at.step)
            if due:
                self._meet(events)
        while events:  # others brought the total there since this worker last asked
            self._do(events)
        self._meet(events)

    def _do(self, events: collections.deque[Event]) -> None:
        if self._stop.apart:
            self._meet(events)
        event = events.popleft()
        if event.what == "evaluate":
            self.evaluate()
        else:
            self._save(event.step)

    def _meet(self, events: collections.deque[Event]) -> None:
        """All meet, whatever each has come for; if any was told to end the run, all do. Collective.

        events: those still to come, the same on every rank: they come when the run is taken up again.
        """
        self._settle()
        with self._centre() if self._stop.apart else contextlib.nullcontext():
            stops = any(self.topology.allgather(self._signals.came))
        if not stops:
            return
        name = int(mean(self.topology.allgather(self.progress.step), len(self.opt.workers)))
        name = min(name, events[0].step) if events else name
        if name != self._sealed:
            self._save(name)
        self.checkpoints.finish()
        on_first(self.topology, self.directory.interrupted.touch, status=FAILED)
        self._stop.free()
        again = command_of(["--resume", str(self.directory.path)], self.size)
        raise Stopped(f"ended by a signal at step {name}; it goes on with: {again}", TO_BE_RESUMED)

    def _settle(self) -> None:
        """An exchange behind the last steps is a part of training."""
        with self.timer.waiting(self.progress):
            self.opt.settle()

    def _events(self) -> list[Event]:
        """What is still to come, from the last checkpoint on: an evaluation at its step may be left to do."""
        batches, done, saved = self.sampler.batches, self.progress.evaluated, self._sealed or 0
        intervals = (
            steps_of(every, batches) for every in (self.config.eval_every, self.config.checkpoint_every)
        )
        events = events_between(saved - 1, self.total, *intervals)
        return [event for event in events if event.step > (done if event.what == "evaluate" else saved)]

    def _step(self) -> None:
        at, opt, counts, timer = self.progress, self.opt, self.opt.metrics, self.timer
        rounds, comm, wait = counts.rounds, counts.t_comm, counts.t_wait
        self.tell(at.step, Place.BATCH)
        counts.leader, counts.leaders = -1, [-1] * len(counts.leaders)  # to see who is elected in this step
        self.schedule.apply(opt.param_groups, at.step, at.step / self.sampler.batches)

        timer.begin()
        first = at.step * self.config.accumulate
        try:
            batches = [self.batches.take(first + k) for k in range(self.config.accumulate)]
        except InputError as error:
            raise InputError(f"rank {self.rank}: {error}") from None
        timer.loaded()
        opt.zero_grad()
        loss = self.gradient.of(batches)
        value = loss if self.queued else loss.item()
        if self.slowdown:
            self.slowdown.sleep(timer.computing(), self.config.seed, self.rank, at.step)
        timer.computed()
        self.batches.look_ahead(first + len(batches))
        timer.fetched()
        at.overflows += not self.gradient.settle()
        if at.step == 0:
            diverging.refuse_first(self.topology, float(value))
        self.tell(at.step, Place.EXCHANGE)
        with diverging.stopping():
            opt.step(loss=value)
        timer.end(at, counts.t_comm - comm, counts.t_wait - wait)

        at.stepped(value)
        self.schedule.stepped(at.step)
        if counts.rounds > rounds and counts.leaders:
            self.journal.note_leaders(at)

    def _pass_on(self) -> None:
        """A step of a rank that only averages."""
        if self.opt.t == 0:
            diverging.refuse_first(self.topology, 0.0)
        self.tell(self.opt.t, Place.EXCHANGE)
        start = seconds()
        self.opt.step()
        self.progress.wall += seconds() - start

    # Evaluation

    def evaluate(self, last: bool = False) -> tuple[Result, dict[str, Any] | None]:
        """Evaluates the centre and writes a line; the last time it also returns the centre's state. Collective."""
        at = self.progress
        state = None
        self.tell(at.step, Place.MEETING)
        self.checkpoints.finish()
        self._settle()
        at.read()
        traffic = dataclasses.replace(self.opt.fabric.traffic)
        with self._centre():
            result = self.judged(topology=self.topology)
            if self.rank == 0 and (last or self.journal.improves(figures_of(result))):
                state = {n: v.detach().to("cpu", copy=True) for n, v in self.model.state_dict().items()}
        self.opt.fabric.traffic.group, self.opt.fabric.traffic.across = traffic.group, traffic.across
        level(self.timer, at, self.topology, self.opt.computes)
        rows = self.topology.allgather(measured(at, self.opt))
        line = metrics_line(rows, len(self.opt.workers), self.sampler.batches, at.leader, result)
        if at.evaluated != line["step"]:  # else it is of a finished run that was resumed
            at.evaluated_at(line["step"])
            self.journal.evaluated(at.step, line, rows, state)
            self.display.evaluation(line)
        diverging.refuse(self.topology, self.opt, at.last_loss, line["step"])
        return result, state

    @contextlib.contextmanager
    def _centre(self) -> Iterator[None]:
        """The model holds the centre inside. What is drawn there is not drawn from what training goes on with."""
        recalibrates = self.opt.buffers == "recalibrate" and bool(self.opt.flat.buffers)
        with (
            other_random_numbers(self.config.seed, "evaluation", self.rank),
            diverging.stopping(),
            contextlib.ExitStack() as stack,
        ):
            with self.precision.autocast() if recalibrates else contextlib.nullcontext():
                inputs = self.batches.calibration(self.progress.step, self.rank) if recalibrates else None
                stack.enter_context(self.opt.center(inputs))
            yield

    # The end

    def _finish(self) -> dict[str, Any]:
        self.progress.read()
        name = max(self.total, self._sealed or 0)
        if name != self._sealed and not diverging.diverged(self.topology, self.opt, self.progress.last_loss):
            # before the evaluations, which may take long; of what diverged the first one tells
            self._save(name)
        result, state = self.evaluate(last=True)
        on_first(self.topology, self.directory.save_center, state, status=FAILED)
        with getattr(self.opt.optimizer, "iterate", contextlib.nullcontext)():
            own = self.judged()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        everything = {**dataclasses.asdict(self.opt.metrics), **dataclasses.asdict(self.progress)}
        rows = self.topology.allgather({**everything, "own": own, "peak": peak})
        summary = summary_of(rows, self.config, self.topology, self.opt, self.sampler.batches, result)
        summary = self._summary(summary | {"best": self.journal.best or None})
        for more in (dict, lambda: scored(self.topology, self.opt, rows)):  # at first without the forecast
            summary |= more()
            on_first(self.topology, self.directory.summarize, summary, status=FAILED)
        return summary

    def _summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """What is written of it."""
        return summary

    # Checkpoints

    def _save(self, name: int) -> None:
        """Writes a checkpoint of this name; what has diverged leaves the last one in its place. Collective."""
        at = self.progress
        self.tell(at.step, Place.MEETING)
        self.checkpoints.finish()
        at.read()
        diverging.refuse(self.topology, self.opt, at.last_loss, name)
        self._settle()
        level(self.timer, at, self.topology, self.opt.computes)
        self.journal.write(at.step)
        state = checkpoint.state_of(self.model, self.opt, at, self.precision, random_state())
        state["schedule"] = self.schedule.state_dict()
        self.checkpoints.write(name, state, others_write=bool(self.opt.asynchronous))
        self._sealed = name

    def restore(self, state: dict[str, Any], name: int) -> None:
        """Takes up the state that a checkpoint holds of this rank. Collective."""
        self.progress = checkpoint.restore(state, self.model, self.opt, self.precision)
        self.schedule.load_state_dict(state.get("schedule", {}))
        self._sealed = name

    def resume(self) -> None:
        """The run directory goes on from where this run is, after `restore` or from the start. Collective."""
        self.journal.resume(self.progress.step)
        evaluated = on_first(self.topology, self.directory.evaluated)
        if evaluated > self.progress.evaluated:  # in an evaluation that came after the checkpoint
            self.progress.evaluated_at(evaluated)
