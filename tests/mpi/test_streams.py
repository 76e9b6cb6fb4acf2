"""The order of streams beside each other: of a thread's exchange and the steps, and of the ranks' turns at a centre."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from harness import CORE, LAYOUTS, WORLD, Case, check_together, distance, running
from method_cases import BY_NAME, in_turns
from problems import TanhNet
from simulation import Local

import mpilsgd
from mpilsgd import EASGD, devices
from mpilsgd.comm import Background
from mpilsgd.exchange.behind import BehindInTurn
from mpilsgd.extension import core, device_of, emulated_current
from mpilsgd.transport.devices import TurnOrder

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.brief(2),
    pytest.mark.skipif(not CORE, reason="needs an emulated device"),
]
LAYOUT = LAYOUTS[0]
# without weight decay, which torch adds to the gradients: it would wait for what the stream was given before
MSGD = Local("msgd", lr=0.05, momentum=0.7, nesterov=True)
OVERLAPS = ["EASGD-overlap", "EASGD-turns-overlap-3", "DiLoCo-overlap"]
TURNS = [
    "EASGD-turns-3",
    "EASGD-turns-gauss-seidel-3",
    "EASGD-turns-overlap-3",
    "Downpour-turns-3",
    "Downpour-turns-momentum",
    "Downpour-turns-momentum-running",
    "Downpour-turns-moving",
    "DiLoCo-turns-3",
    "ADMM-turns",
    "ADMM-synchronous",
]


def losses(rank: int, t: int) -> float:
    return float((rank + t) % 3)


def is_wrong(case: Case, seed: int, steps: int) -> bool:
    """Whether a run on late streams, one rank later than the other, comes to something else than the simulation."""
    core.emulated.seed(seed)
    late, wrong = seed % 2 == WORLD.rank, 0
    core.emulated.delay(0.05 if late else 0.005)
    try:
        topo = mpilsgd.Topology()
        with running(case, TanhNet(), MSGD, LAYOUT, device="cuda", topo=topo, losses=losses) as run:
            simulated = case.simulate(TanhNet(), MSGD, LAYOUT, losses=losses)
            for _ in range(steps):
                run.step()
                simulated.step()
                time.sleep(0.02 * late)
            core.emulated.drain()
            wrong += distance(run.x(), simulated.x[run.rank]) > 1e-12
            wrong += distance(run.center(), simulated.center()) > 1e-12
        topo.free()
    finally:
        core.emulated.delay(1e-4)
    return sum(WORLD.allgather(wrong)) > 0


def nothing(*_: Any) -> None: ...


@pytest.mark.parametrize("name", [*OVERLAPS, *TURNS])
def test_late_streams_change_nothing(name: str) -> None:
    assert not is_wrong(BY_NAME[name], len(name), 9)


@pytest.mark.parametrize("lacks", ["follows", "awaited"])
@pytest.mark.parametrize("name", OVERLAPS)
def test_the_side_stream_and_the_steps_have_to_wait_for_each_other(
    name: str, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one of the two waits the results are others."""
    monkeypatch.setattr(devices.Side, lacks, nothing)
    assert any(is_wrong(BY_NAME[name], seed, 9) for seed in range(12))


@pytest.mark.parametrize("lacks", ["begins", "ends"])
@pytest.mark.parametrize("name", ["EASGD-turns-1", "Downpour-turns-momentum"])
def test_turns_have_to_be_ordered(name: str, lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TurnOrder, lacks, nothing)
    assert any(is_wrong(BY_NAME[name], seed, 9) for seed in range(12))


@pytest.mark.parametrize("mutant", [False, True])
def test_what_was_sent_is_kept_until_the_streams_have_met(
    mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that the thread gives up is given again to the steps' stream, while its own still reads it."""
    visit, join = BehindInTurn._visit_behind, Background.join

    def gives_up(self: Any, given: Any) -> None:
        visit(self, given)
        self._sent = {}

    def joins_later(self: Background) -> None:
        made = [torch.empty(512 * k, dtype=torch.uint8, device=emulated.DEVICE) for k in range(1, 9)]
        join(self)
        del made

    monkeypatch.setattr(Background, "join", joins_later)
    if mutant:
        monkeypatch.setattr(BehindInTurn, "_visit_behind", gives_up)
    seeds = range(12 if mutant else 2)
    assert any(is_wrong(BY_NAME["EASGD-turns-overlap-3"], seed, 9) for seed in seeds) == mutant


@pytest.mark.parametrize("name", OVERLAPS)
def test_an_exchange_behind_has_a_stream_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no host waits for it but where it asks whether a vector is finite."""
    seen: set[int] = set()
    made: list[int] = []
    new: Callable[[int], int] = core.device.new_stream
    monkeypatch.setattr(core.device, "new_stream", lambda index: made.append(new(index)) or made[-1])
    with running(BY_NAME[name], TanhNet(), MSGD, LAYOUT, device="cuda", losses=losses) as run:
        thread = run.opt.r._thread
        submit = thread.submit

        def noted(do: Callable[[Any], None], given: Any) -> Any:
            return submit(lambda g: do((seen.add(emulated_current.stream), g)[1]), given)

        monkeypatch.setattr(thread, "submit", noted)
        run.run(3)
        core.emulated.drain()
        core.emulated.clear()
        run.run(6)
        calls = core.emulated.log()
        errors = [f"{call}" for call in calls if "Synchronize" in call or call.startswith("cudaMemcpy")]
        errors += [] if seen == set(made) and len(made) == 1 else [f"exchanges on {seen}, not {made}"]
        errors += [] if emulated_current.stream == 0 else ["the steps go there, too"]
    check_together(errors)


@pytest.mark.parametrize("name", TURNS)
def test_a_turns_work_stays_on_the_device(name: str) -> None:
    """The centre lies there; nothing is copied to the host, and the host waits but to see whether x is finite."""
    case = BY_NAME[name]
    with running(case, TanhNet(), MSGD, LAYOUT, device="cuda", losses=losses) as run:
        shards = run.opt.r._shards
        centres = [w.mine for of in shards.own.values() for w in of.values()]
        errors = [] if all(device_of(c) >= 0 for c in centres) and not shards.copies else ["it is elsewhere"]
        run.run(3)
        core.emulated.drain()
        core.emulated.clear()
        emulated.waits.clear()
        for _ in range(6):
            for parameter in run.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            run.opt.step(loss=1.0)
        calls, waits = core.emulated.log(), dict(emulated.waits)
        errors += [call for call in calls if "Synchronize" in call or call.startswith("cudaMemcpy")]
        errors += [f"waits {waits}"] if waits else []
    check_together(errors)


def test_the_last_ones_turn_is_seen_whoever_comes_next() -> None:
    """Free order: sums of what all workers moved are kept, on late streams."""
    case = in_turns(EASGD, "", period=1, center_rate=float(WORLD.size), moving_rate=1.0, order="free")
    with running(case, TanhNet(), Local(lr=0.1), LAYOUT, device="cuda", same=False) as run:
        core.emulated.delay(2e-3)
        start = sum(WORLD.allgather(run.x())) + run.center()
        for _ in range(20):
            for parameter in run.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            run.opt.step(loss=1.0)
        run.opt.center()
        end = sum(WORLD.allgather(run.x())) + run.center()
        core.emulated.delay(1e-4)
    assert distance(end, start) < 1e-12


def test_the_centre_asks_for_no_room_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose /dev/shm is full has it on its devices all the same."""
    monkeypatch.setattr("mpilsgd.transport.sharing.free_shared_memory", lambda: 0)
    topo = mpilsgd.Topology()
    with running(
        BY_NAME["Downpour-turns-momentum"], TanhNet(), MSGD, LAYOUT, device="cuda", topo=topo
    ) as run:
        islands, hosted = run.opt.fabric.world.n_islands, run.opt.r.hosted(1000, 1000)
    topo.free()
    assert (islands, hosted) == (1, 0.0)
