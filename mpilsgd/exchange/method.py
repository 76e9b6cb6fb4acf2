"""The worker: a torch optimizer around another one, whose rule is its subclass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn, TypeVar

import torch

from mpilsgd.comm import Refused, Topology, here, inquiry
from mpilsgd.devices import capturing
from mpilsgd.exchange import centre, leaving, setup, state
from mpilsgd.exchange.base import Exchange, without_grad
from mpilsgd.exchange.clocks import Every
from mpilsgd.exchange.rows import CLOSE, ROUND
from mpilsgd.exchange.rules import check_arguments, check_free_name, check_rule, complete
from mpilsgd.exchange.together import Together
from mpilsgd.exchange.vectors import Vector
from mpilsgd.exchange.worker import Diverged, Worker
from mpilsgd.exchange.wrapped import local_step
from mpilsgd.fields import Field, choice, fields_of
from mpilsgd.optimizers.wrapped import gradient_at_x, known

_M = TypeVar("_M", bound="Method")


class Method(Worker):
    """A torch optimizer that wraps another one and exchanges parameters with the other workers.

    A method of a paper is a subclass, a *rule*: fields (its settings) and some of eight functions, `rules.HOOKS`. See
    docs/adding-a-method.md. Its constructor takes

        optimizer: the worker's own optimizer, any of torch's; its parameters are moved, in place, into one flat
            vector a dtype, which lies in a shared window where the node's memory allows.
        topology: the workers; default `Topology()`.
        model: the module whose float buffers are meant; by default those living modules are found whose trainable
            parameters all belong to the optimizer.

    and its fields. Between rounds no worker waits for another. A round is collective; a worker that has run out of data
    and enters `center()`, `close()` or the end of its program goes on taking part in the others' rounds with the
    parameters it has, so nobody waits for it in vain.

    Raises:
        ValueError: on every rank, if any rank's arguments or model are wrong or differ from the others'.
        Diverged: on every rank, if all workers' parameters have become non-finite (a RuntimeError).
    """

    fields: ClassVar[dict[str, Field]] = {}
    exchanges: ClassVar[dict[Any, type[Exchange]]] = {False: Together}  # by the value of `asynchronous`
    # what a worker looks through before a round: "x", "g" (gradients), or "" where the verb does
    guard: ClassVar[str] = "x"
    asynchronous: Any = False

    init: str = choice(
        "same",
        "different",
        help="same: all start from rank 0's parameters; different: each from its own",
    )
    buffers: str = choice(
        "average",
        "keep",
        "recalibrate",
        help="BatchNorm statistics and other float buffers: average (they follow the exchange of the parameters, by "
        "convex rates), keep (each worker its own) or recalibrate (recomputed on training data in center(batches))",
    )

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        complete(cls, Method)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology | None = None,
        *,
        model: torch.nn.Module | None = None,
        **given: Any,
    ):
        self._open = self._lent = False
        check_rule(type(self), Method)
        super().__setstate__({})  # step hooks, without a copy of the parameter groups
        check_arguments(type(self), topology, given)
        inquiry.warn_if_apart()
        self.topology = Topology() if topology is None else topology
        self._owns_topology = topology is None
        self.optimizer, self.p = optimizer, self.topology.world.size
        self.vectors: dict[str, Vector] = {}
        self.values: list[str] = []
        self.course: Any = None
        self.t, self.behind, self.toward = 0, False, ()  # type: tuple[int, bool, Any]
        try:
            setup.build(self, model, given)
        except (Refused, Diverged):  # on every rank
            setup.release(self)
            raise
        leaving.enter(self)

    # What a rule may define

    def declare(self) -> Iterable[str | None]:
        """Declares vectors and values, fills in settings that follow from others, and gives what is wrong with them."""
        return ()

    def clock_of(self) -> Every:
        """When exchanges are due. Every rule defines it."""
        return Every(1)

    def start(self, r: Any) -> None:
        """After all vectors have their start."""

    def before_step(self) -> None:
        """Before each local step; what is held is x."""

    def observe(self, loss: Any) -> None:
        """The loss of each step's batch, before an exchange that goes by it."""

    def measure(self) -> float:
        """What the others learn of this worker in a meeting; the least leads."""
        return 0.0

    def exchange(self, r: Any) -> None:
        """One exchange, in verbs of r. Every rule defines it."""

    def shown_centre(self) -> Vector | None:
        """What `center()` shows: a vector (its mean over the workers, if each has one); None: the mean of x."""
        return None

    # What a rule declares

    def value(self, name: str, start: Any) -> None:
        """A value that this worker keeps, as an attribute of this name: saved and loaded like the vectors."""
        check_free_name(type(self), name, Method)
        setattr(self, name, start)
        self.values.append(name)

    # The life of a step

    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One step of this worker's optimizer, and the exchange if one is due.

        Args:
            closure: reevaluates the model and returns the loss, as torch's optimizers take it.
            loss: the loss of this step's batch (number or tensor); `LSGD` elects its leader by it.

        Returns: the loss.
        """
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return _with_hooks(self, closure, loss=loss)
        return self._one_step(closure, loss=loss)

    step.hooked = True  # type: ignore[attr-defined]  # torch's own, for profilers and all optimizers, runs in the one inside

    def _one_step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        if self._lent or not self._open:
            self._refuse()
        if capturing(self.device) and self.r.comes():
            self._refuse_capture()
        self._members.check(self.optimizer)
        clock, r, rounds = self.clock, self.r, self.metrics.rounds
        if not self._computes:
            without_grad(r.idle)
            self.t += 1
            return loss
        early = clock.first or clock.looks or clock.sees
        inside = closure is not None and not early  # it computes in the local step
        if closure is not None and early:
            with torch.enable_grad():
                evaluated = closure()
            loss = evaluated if loss is None else loss
            closure = known(closure, evaluated, self.guard == "g")
        if not inside:
            here.rank.computed()
        if clock.first:
            result = self._exchange_and_step(closure, loss)
        elif clock.looks and clock.gives_way([p.grad for p in self.flat.parameters if p.grad is not None]):
            result = None
            without_grad(r.exchange, ROUND)
            clock.broken = False
        else:
            if self._hooked:
                without_grad(self.before_step)
            result = local_step(self, closure)
            if inside:
                here.rank.computed()
        loss = result if loss is None else loss
        self.t += 1
        if self._observes and not clock.first:
            without_grad(self.observe, loss)
        r.stepped()
        if self.metrics.rounds != rounds:
            self.flat.touched()
        return loss

    def _exchange_and_step(self, closure: Callable[[], Any] | None, loss: Any) -> Any:
        """The exchange, then the local step with the gradient as it was before it."""
        if self._observes:
            without_grad(self.observe, loss)
        due = self.r.is_due()
        if not due and not self._hooked:
            return local_step(self, closure)
        with contextlib.nullcontext() if self.guard == "g" else gradient_at_x(self.optimizer):
            if due:
                without_grad(self.r.run)
            if self._hooked:
                without_grad(self.before_step)
            return local_step(self, closure)

    def _refuse(self) -> NoReturn:
        self.refuse_if_closed()
        raise RuntimeError("step() inside center(): the parameters there are the centre, and go back")

    def _refuse_capture(self) -> NoReturn:
        raise RuntimeError(
            f"a round of {type(self).__name__} cannot be captured in a CUDA graph, as the workers meet on the host: "
            "capture steps that bring none"
        )

    def reached(self, total_steps: int) -> bool:
        """Whether all workers together have taken so many steps. Loops over a total of steps end by it.

        Not collective. Where workers keep step it is judged by this worker's own clock; an asynchronous run counts.
        Once True it stays so.
        """
        if self.course is not None:
            return self.course.reached(total_steps, self.t)
        return self.t * len(self.workers) >= total_steps

    @property
    def computes(self) -> bool:
        """Whether this rank takes gradients; where it does not, `step()` goes without."""
        return self._computes

    def settle(self) -> None:
        """Waits for this worker's own exchange, if one is under way (`EASGD(overlap=True)`)."""
        self.r.settle()

    def center(self, batches: Iterable[Any] | None = None) -> contextlib.AbstractContextManager[None]:
        """The model holds the centre inside, this worker's own parameters again afterwards. Collective.

        Args:
            batches: for `buffers="recalibrate"`: model inputs (or tuples that begin with them) over which the
                BatchNorm statistics of the centre are computed, each worker over its own, then averaged.
        """
        self.refuse_if_closed()
        if batches is not None and self.buffers != "recalibrate":
            raise ValueError('center(batches) goes with buffers="recalibrate"')
        if batches is None and self.buffers == "recalibrate" and self.flat.buffers:
            raise ValueError('buffers="recalibrate" needs center(batches): inputs to take statistics from')
        return centre.shown(self, batches or ())

    def close(self) -> None:
        """Ends the exchanges and frees windows and communicators; the model stays usable. Collective."""
        if self._open:
            with torch.no_grad():
                centre.rest(self, CLOSE)
                with self.iterates():
                    self.r.land()
                try:
                    if self.course is not None:
                        self.course.finish()
                finally:
                    leaving.forget(self)
                    setup.release(self)

    def __enter__(self: _M) -> _M:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Closes it; not after an exception, as `close` would wait until the other ranks have trained to their end."""
        if kind is None:
            self.close()

    # State

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "mpilsgd", this worker's clock, metrics and the method's own.

        Each rank saves its own; what a node keeps once, its first rank saves. Where workers take turns at a centre
        (asynchronous methods, ADMM) nobody may step meanwhile: `settle()` and a barrier come first.
        """
        self.refuse_if_closed()
        self.settle()
        return {**self.optimizer.state_dict(), "mpilsgd": state.of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` of the same method gave; the parameters are the model's to load. Collective.

        A ValueError on every rank refuses the state of another method or model, or of ranks that lay otherwise.
        """
        state.load(self, dict(state_dict))

    def __del__(self) -> None:
        leaving.abandon(self)


Method.fields = fields_of(Method)
_with_hooks = torch.optim.Optimizer.profile_hook_step(Method._one_step)
