"""Under a virtual clock: what every order keeps, with stragglers, and the deaths of ranks."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
from simulated import FREE, SLOW, SYNCHRONOUS, trains
from test_in_process import KEPT, P, Worker, by_method

from mpilsgd import EASGD, LSGD, LocalSGD, Topology, simulate
from mpilsgd.comm import Deadlock, WorkerFailed
from mpilsgd.simulation import Died, Network, lognormal, stragglers


def cluster(seed: int) -> dict[str, Any]:
    """Of a seed: nodes, a network, stragglers."""
    r = random.Random(seed)
    slow = {rank: r.choice([1.0, 1.0, 3.0, 10.0]) for rank in range(P)}
    return {
        "seed": seed,
        "nodes": r.randint(1, P),
        "network": Network(10 ** r.uniform(4, 9), 10 ** r.uniform(-6, -2), 10 ** r.uniform(5, 10)),
        "compute": stragglers(slow, lognormal(0.01, r.uniform(0, 1.5))),
    }


def in_many_orders(name: str, seeds: range) -> None:
    for seed in seeds:
        gaps = simulate(lambda seed=seed: KEPT[name](seed), P, **cluster(seed)).results
        assert max(gaps) < 1e-12, f"seed {seed}: {gaps}"


def with_deaths(name: str, seeds: range) -> None:
    """Always `Died`, or the whole run where it ends before."""
    threads = threading.active_count()
    for seed in seeds:
        r = random.Random(-seed)
        rank, when, notice = r.randrange(P), 10 ** r.uniform(-5, 0), r.choice([0.0, 0.02, 1.0])
        try:
            found = simulate(
                lambda seed=seed: KEPT[name](seed), P, deaths={rank: when}, notice=notice, **cluster(seed)
            )
        except Died as died:
            assert (died.rank, died.seconds) == (rank, when) and when <= died.ended <= when + notice + 1e-9
            assert died.simulated.results[rank] is None and died.simulated.seconds[rank] == when
            assert f"rank {rank} died at {when:g} s" in str(died)
        else:
            assert max(found.results) < 1e-12
            assert found.seconds[rank] <= when or max(found.seconds) < when + 1e-2
    assert threading.active_count() <= threads + 1


@by_method
def test_what_every_order_keeps(name: str) -> None:
    in_many_orders(name, range(3))


@by_method
def test_a_death_ends_the_run(name: str) -> None:
    with_deaths(name, range(3))


@pytest.mark.slow
@by_method
def test_what_a_thousand_orders_keep(name: str) -> None:
    in_many_orders(name, range(1000))


@pytest.mark.slow
@by_method
def test_a_thousand_deaths(name: str) -> None:
    with_deaths(name, range(1000))


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_a_death_in_a_synchronous_run(name: str) -> None:
    method, options = SYNCHRONOUS[name]
    for when, nodes in ((1e-4, 3), (0.035, 1), (0.061, 3)):
        with pytest.raises(Died, match=f"rank 1 died at {when:g} s, and the job ended at"):
            simulate(
                trains(method, **options),
                P,
                nodes=nodes,
                deaths={1: when},
                compute=0.01,
                network=SLOW,
                notice=60.0,
            )


def test_the_others_go_on_until_it_is_noticed() -> None:
    told = []

    def worker() -> None:
        w = Worker(EASGD, {"asynchronous": True, "period": 2}, np.zeros(3))
        while not w.opt.reached(10**6):
            w.step(np.ones(3))
            told.append(w.world.rank)

    with pytest.raises(Died, match=r"rank 2 died at 0\.105 s, and the job ended at 0\.505 s") as died:
        simulate(worker, P, deaths={2: 0.105}, notice=0.4, compute=0.01, network=FREE)
    assert [told.count(rank) for rank in range(P)] == [50, 50, 10]
    found = died.value.simulated
    assert found.seconds == pytest.approx([0.505, 0.505, 0.105])
    totals = np.add(np.add(found.compute, found.communication), found.waiting)
    assert totals == pytest.approx(np.array(found.seconds))


def test_who_dies_in_its_turn_keeps_it() -> None:
    """The others wait in vain, and as nobody can go on it is over before it would be noticed."""
    network = Network(bandwidth=1e6, latency=1e-3, memory=1e3)

    def worker() -> None:
        w = Worker(EASGD, {"asynchronous": True, "period": 1}, np.zeros(1000))
        for _ in range(100):
            w.step(np.ones(1000))

    for rank in range(P):
        with pytest.raises(Died) as died:
            simulate(worker, P, deaths={rank: 4.0}, notice=1e6, compute=0.001, network=network)
        assert 4.0 <= died.value.ended < 30.0


def test_deaths_after_the_end_do_nothing() -> None:
    found = simulate(trains(LocalSGD, period=2), 2, deaths={1: 100.0}, network=FREE)
    assert max(found.seconds) < 1.0 and None not in found.results


def test_other_failures_are_told_as_in_process() -> None:
    def fails() -> None:
        w = Worker(LSGD, {"period": 1}, np.zeros(2))
        w.step(np.zeros(2))
        if w.world.rank == 1:
            raise KeyError("here")
        w.step(np.zeros(2))

    def hangs() -> None:
        world = Topology().world
        if world.rank:
            world.Barrier()

    with pytest.raises(WorkerFailed, match="rank 1 failed: KeyError: 'here'"):
        simulate(fails, 2)
    with pytest.raises(Deadlock, match="Barrier, to which rank"):
        simulate(hangs, 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": 0}, "workers must be a whole number of at least 1, not 0"),
        ({"compute": -1.0}, "compute must be seconds, a function"),
        ({"compute": "fast"}, "compute must be seconds, a function"),
        ({"compute": stragglers({9: 2.0}, 0.01)}, "stragglers: there is no rank 9; the ranks are 0 to 3"),
        ({"compute": stragglers({1: -2.0}, 0.01)}, "the factor of rank 1 must be"),
        ({"network": Network(bandwidth=0.0)}, "bandwidth must be greater than 0 bytes a second"),
        ({"network": Network(latency=-1.0)}, "latency must be at least 0 seconds"),
        ({"network": 3}, "network must be a Network, not 3"),
        ({"deaths": {7: 1.0}}, "deaths: there is no rank 7; the ranks are 0 to 3"),
        ({"deaths": {0: -1.0}}, "deaths: rank 0 must die at a number of seconds"),
        ({"notice": -1.0}, "notice must be a number of seconds"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        simulate(**{"worker": lambda: None, **options})


def test_a_negative_number_of_seconds_ends_the_run() -> None:
    with pytest.raises(WorkerFailed, match=r"compute gives -1\.0 seconds for step 0 of rank"):
        simulate(trains(LocalSGD), 2, compute=lambda rank, step, random: -1.0)


def test_simulations_are_not_nested() -> None:
    with pytest.raises(WorkerFailed, match="a worker of another in_process"):
        simulate(lambda: simulate(lambda: None, 2), 2)
