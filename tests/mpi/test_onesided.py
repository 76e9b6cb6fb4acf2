"""The one-sided building blocks: words, turns, the counter, shards and snapshots, in a node and by messages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from harness import WORLD, check_together
from method_cases import several

from mpilsgd import Topology
from mpilsgd.comm import Counter, Progress, Shards, Snapshots, Turns
from mpilsgd.comm.onesided import Board
from mpilsgd.transport import Fabric

pytestmark = pytest.mark.mpi
by_transport = pytest.mark.parametrize("shared", [True, False], ids=["windows", "messages"])
CPU = torch.device("cpu")


@contextlib.contextmanager
def fabric(shared: bool) -> Iterator[Fabric]:
    """Islands, with a polling thread where there are several: the tests below compute, too."""
    topology = Topology(shared=shared)
    made = Fabric(topology, 1 << 20, CPU)
    progress = Progress(made.world.comm) if made.world.n_islands > 1 else None
    yield made
    made.world.barrier()
    if progress is not None:
        progress.free()
    made.free()
    topology.free()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes of a count is never known before someone waits for it."""
    begin = Board.begin_to_add

    def unknown(self: Board, *given: int) -> Callable[[bool], int | None]:
        told = begin(self, *given)
        return lambda wait: told(True) if wait else None

    monkeypatch.setattr(Board, "begin_to_add", unknown)


@pytest.mark.usefixtures("late")
def test_counts_of_a_worker_that_waits_come_to_all() -> None:
    """None is kept back until one before is known to have come: who waits for the others counts no more."""
    total = 10 * (WORLD.size - 1)
    errors = []
    with fabric(False) as made:
        counter = Counter(made.world)
        if WORLD.rank:
            for _ in range(10):
                counter.add()
        else:
            end = time.monotonic() + 30
            while counter.read(total) < total and time.monotonic() < end:
                time.sleep(1e-3)
            errors += [] if counter.read(total) == total else [f"{counter.read(total)} of {total} are known"]
        WORLD.Barrier()
        counter.free()
    check_together(errors)


@several
@pytest.mark.processes
@pytest.mark.usefixtures("late")
def test_a_worker_that_paused_looks_at_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows a total from before its pause; how far the others may have come since, it knows from their rate."""
    total, now = 0, 0.0
    monkeypatch.setattr("mpilsgd.comm.counting.clock", lambda: now)
    errors = []
    with fabric(False) as made:
        counter = Counter(made.world)
        for first, looks in [(20, False), (20, False), (1, True), (0, True), (1, True)]:
            now += 1.0
            for _ in range(20 if WORLD.rank else 0):
                counter.add()
            counter.hand_on(True)
            made.world.barrier()
            for _ in range(0 if WORLD.rank else first):
                counter.add()
            total += 20 * (WORLD.size - 1) + first
            if WORLD.rank == 0 and looks:
                seen = counter.read(near=total)
                errors += [] if seen == total else [f"after {now} s {seen} of {total} are known"]
            elif WORLD.rank == 0:
                counter.hand_on(True)
            made.world.barrier()
        counter.free()
    check_together(errors)


@by_transport
def test_words(shared: bool) -> None:
    """No addition is lost; only one rank wins an exchange; the largest value stays."""
    rank, size = WORLD.rank, WORLD.size
    errors = []
    with fabric(shared) as made:
        board = Board(made.world.comm, 3, made.world.n_islands == 1)
        seen = [board.add(size - 1, 0, 1) for _ in range(200)]
        won = board.exchange(0, 1, 0, rank + 1)
        board.raise_to(0, 2, 10 * rank)
        board.raise_to(0, 2, -1)
        made.world.barrier()
        if board.read(size - 1, 0) != 200 * size or seen != sorted(set(seen)):
            errors.append(f"{board.read(size - 1, 0)} of {200 * size} additions")
        winners = WORLD.allgather(won)
        if sum(winners) != 1 or board.read(0, 1) != winners.index(True) + 1:
            errors.append(f"winners {winners}, word {board.read(0, 1)}")
        if board.read(0, 2) != 10 * (size - 1):
            errors.append(f"the largest is {board.read(0, 2)}")
        made.world.barrier()
        board.write(rank, 0, -7 - rank)
        if (board.read(rank, 0), board.peek(0)) != (-7 - rank, -7 - rank):
            errors.append("a rank does not see its own word")
        made.world.barrier()
        board.free()
    check_together(errors)


@by_transport
@pytest.mark.parametrize("order", ["free", "round-robin"])
def test_turns_exclude_each_other(order: str, shared: bool) -> None:
    """What one rank reads, changes and writes back in its turn is not disturbed; round robin comes in order."""
    rank, size, visits = WORLD.rank, WORLD.size, 40
    errors = []
    with fabric(shared) as made:
        d = torch.float64
        shards = Shards(made, {d: 100}, {"c": {d: d}}, CPU)
        for visit in range(visits):
            for shard in shards.visit(None, order == "round-robin"):
                c = shard.vectors["c"][d]
                before = c.clone()
                if rank == visit % size:
                    time.sleep(1e-4)
                c += 1
                if not torch.equal(c, before + 1):
                    errors.append("another rank wrote in this rank's turn")
                if order == "round-robin" and c.numel() and float(c[0]) != visit * size + rank + 1:
                    errors.append(f"turn {float(c[0]):g} instead of {visit * size + rank + 1}")
        made.world.barrier()
        whole = made.place.common(made.world.channel, d, 100)
        total = shards.collect("c", d, whole)
        if not torch.equal(total, torch.full((100,), float(visits * size), dtype=d)):
            errors.append(f"{total} is not {visits * size}")
        made.world.barrier()
        shards.free()
    check_together(errors)


def test_round_robin_passes_over_those_that_rest() -> None:
    """Unequal numbers of turns end; after all have met it begins anew with rank 0."""
    rank, size = WORLD.rank, WORLD.size
    errors = []
    with fabric(True) as made:
        turns = Turns(made.world, made.world.channel.heads_ranks)
        for again in range(2):
            for _ in range(3 + 4 * ((rank + again) % 2)):
                for place in range(len(made.world.channel.heads_ranks)):
                    turns.pass_on(place, turns.take(place, None, True)[0], True)
            turns.rest()
            made.world.barrier()
            turns.wake(True)
            made.world.barrier()
            ticket, _ = turns.take(0, None, True)
            if ticket != rank:
                errors.append(f"rank {rank} of {size} begins with turn {ticket}")
            turns.pass_on(0, ticket, True)
            turns.rest()
            made.world.barrier()
            turns.wake(True)
            made.world.barrier()
        turns.free()
    check_together(errors)


@by_transport
def test_counter(shared: bool) -> None:
    """All steps are counted, but those that an island has not handed on yet; a crossing is told to all."""
    size, steps = WORLD.size, 50
    errors = []
    with fabric(shared) as made:
        counter = Counter(made.world, every=10 * size)
        for _ in range(steps):
            counter.add()
        made.world.barrier()
        if not steps * size - size < counter.read(near=steps * size) <= steps * size:
            errors.append(f"{counter.read()} of {steps * size}")
        if counter.read() < 10 * size:
            errors.append(f"no crossing was seen, the total is {counter.read()}")
        made.world.barrier()
        counter.shift(-30)  # an older state is loaded
        total = counter.read(near=20 * size)
        made.world.barrier()
        if not 20 * size - size < total <= 20 * size:
            errors.append(f"{total} of {20 * size} after going back")
        for _ in range(15):
            counter.add()
        made.world.barrier()
        if counter.read() < 30 * size:
            errors.append(f"no crossing was seen after going back, the total is {counter.read()}")
        made.world.barrier()
        counter.free()
    check_together(errors)


@by_transport
def test_snapshots_are_whole(shared: bool) -> None:
    """Every copy holds one version, whatever its owner does meanwhile; its number belongs to it."""
    rank, size = WORLD.rank, WORLD.size
    errors = []
    with fabric(shared) as made:
        d = torch.float64
        n = 20_000
        snapshots = Snapshots(made, {d: n})
        into = {d: torch.empty(n, dtype=d)}
        if any(snapshots.newest(r)[0] for r in range(size)):
            errors.append("a version before any was published")
        made.world.barrier()
        copied = 0
        for k in range(1, 61):
            value = torch.full((n,), 1000.0 * rank + k, dtype=d)
            version = snapshots.publish({d: value}, float(k), lambda _: True)
            if version != k:
                errors.append(f"version {version} instead of {k}")
            other = (rank + 1 + k) % size
            newest, number = snapshots.newest(other)
            if newest and snapshots.copy(other, newest, into):
                copied += 1
                if not torch.equal(into[d], torch.full_like(into[d], 1000.0 * other + newest)):
                    errors.append(f"version {newest} of rank {other} is torn: {into[d].unique()}")
                if number < newest:
                    errors.append(f"number {number} with version {newest}")
        if not copied:
            errors.append("no version could be copied")
        made.world.barrier()
        snapshots.free()
    check_together(errors)
