"""What a step with a round gives to the device: so many kernels, no copies, and nothing that the host waits in."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from harness import CORE, MESSAGES, WORLD, check_together, running
from method_cases import BY_NAME, MSGD, SGD
from problems import TanhNet

from mpilsgd import EASGD, LSGD, AllreduceSGD, DiLoCo, LocalSGD, Topology
from mpilsgd.extension import core

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.brief(2),
    pytest.mark.skipif(not CORE, reason="needs an emulated device"),
]


def parameters() -> list[torch.nn.Parameter]:
    """100 tensors in float32 and 3 in float64: two vectors, of which each of two ranks has a slice."""
    dtypes = [torch.float32] * 100 + [torch.float64] * 3
    tensors = [torch.full((5, i % 4 + 1), i / 64, dtype=d) for i, d in enumerate(dtypes)]
    return [torch.nn.Parameter(t.to(emulated.DEVICE)) for t in tensors]


# Two dtypes, so two launches of each kernel: on this rank's slice of all the vectors of the node, or on its own ones.
ROUNDS: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    # the pull says who is not finite, and no vector is looked through before it
    "LSGD": (LSGD, {"period": 1, "global_period": 1}, {"PullBody": 2}),
    # t = 4: of the group and of all at once
    "LSGD, two periods": (LSGD, {"period": 2, "global_period": 4}, {"PullBody": 2}),
    # each looks through its own vectors first: one that is not finite takes no part
    "EASGD": (EASGD, {"period": 1}, {"CheckBody": 2, "ElasticBody": 2}),
    "LocalSGD": (LocalSGD, {"period": 1}, {"CheckBody": 2, "AverageBody": 2}),
    # the gradients' vectors, and the loss
    "AllreduceSGD": (AllreduceSGD, {}, {"CheckBody": 3, "AverageBody": 2}),
    "DiLoCo": (DiLoCo, {"period": 1}, {"CheckBody": 2, "AverageBody": 2, "OuterBody": 2}),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_is_one_launch_of_a_kernel_a_dtype_and_slice(name: str) -> None:
    method, options, expected = ROUNDS[name]
    topo, own = Topology(), parameters()
    opt = method(torch.optim.SGD(own, 0.1), topo, **options)
    for _ in range(4):
        for p in own:
            p.grad = torch.full_like(p, 1.0 + WORLD.rank)
        loss: Any = float(WORLD.rank)
        if method is AllreduceSGD:  # one that lies on the device is looked at there
            loss = torch.full((), loss).to(emulated.DEVICE)
        core.emulated.drain()
        core.emulated.clear()
        emulated.waits.clear()
        opt.step(loss=loss)
    calls, waits = core.emulated.log(), dict(emulated.waits)
    kernels = [kernel for kernel, *_ in core.emulated.launches()]
    found = {body: sum(body in kernel for kernel in kernels) for body in expected}
    wrong = [call for call in calls if call.startswith(("cudaMem", "cudaHost")) or "Synchronize" in call]
    errors = [f"{found}, not {expected}"] if found != expected or len(kernels) != sum(found.values()) else []
    errors += [f"calls {wrong}"] if wrong else []
    errors += [f"waits {waits}"] if waits else []
    errors += [f"{opt.metrics.rounds} rounds"] if opt.metrics.rounds != (2 if "two" in name else 4) else []
    opt.close()
    topo.free()
    check_together([f"{name}: {error}" for error in errors])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_on_the_device_that_is_not_finite_is_seen_in_its_step(bad: float) -> None:
    """So that parameters that are not finite are found though all gradients are."""
    with running(BY_NAME["AllreduceSGD"], TanhNet(), SGD, MESSAGES, device="cuda") as run:
        run.run(2)
        start = run.x()
        if run.rank == run.size - 1:
            with torch.no_grad():
                next(run.model.parameters()).fill_(bad)
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss = torch.tensor(bad if run.rank == run.size - 1 else 1.0, dtype=torch.float64)
        run.opt.step(loss=loss.to(emulated.DEVICE))
        errors = [] if abs(run.x() - start).max() < 0.1 else ["they were not set back"]
        errors += [] if run.opt.metrics.resets == (run.rank == run.size - 1) else [f"{run.opt.metrics}"]
    check_together(errors)


@pytest.mark.parametrize(
    "name",
    [
        "LSGD-after-step",
        "EASGD-jacobi",
        "EASGD-turns-3",
        "DiLoCo-overlap",
        "LSGD-wait-free-1",
        "AllreduceSGD",
    ],
)
def test_a_round_cannot_be_captured_in_a_graph_but_the_steps_before_it_can(name: str) -> None:
    """And after it was refused, by name, all is as before it was tried."""
    case, errors = BY_NAME[name], []
    with running(case, TanhNet(), MSGD, MESSAGES, device="cuda") as run:
        every = case.options.get("period", 1) // case.options.get("fragments", 1)
        for t in range(2 * every):
            due = (t + (not run.opt.clock.first)) % every == 0
            due |= name == "DiLoCo-overlap" and t == 4  # when the round lands
            for parameter in run.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            core.emulated.capture(0, True)
            try:
                run.opt.step(loss=1.0)
                errors += [f"t={t}: it went through"] if due else []
            except RuntimeError as error:
                told = f"a round of {case.method.__name__} cannot be captured in a CUDA graph"
                errors += [] if due and told in str(error) else [f"t={t}: {error}"]
                core.emulated.capture(0, False)
                run.opt.step(loss=1.0)
            finally:
                core.emulated.capture(0, False)
            errors += [] if run.opt.t == t + 1 else [f"t={t}: its clock says {run.opt.t}"]
        run.center()
    check_together(errors)
