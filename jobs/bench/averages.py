"""An average of all parameters by LocalSGD, torch's PeriodicModelAverager and accelerate's LocalSGD, side by side.

    OMP_NUM_THREADS=1 mpiexec -n 4 python -m mpi4py jobs/bench/averages.py [BYTES]

The peers talk by gloo; accelerate is left out where it is not installed. Medians of the slowest rank.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from peers import join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from mpilsgd import LocalSGD, Topology
from mpilsgd.train.bench_exchange import Still
from mpilsgd.train.bench_memory import Model

REPETITIONS = 15


def main(nbytes: int) -> None:
    topology = Topology()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // topology.node.size))
    join(topology)
    models = [Model(nbytes // 4) for _ in range(3)]
    method = LocalSGD(Still(models[0].parameters()), topology, period=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a period of 1 is no use but for a measurement
        averager = PeriodicModelAverager(period=1)
    calls: dict[str, Callable[[], object]] = {
        "LocalSGD": method.step,
        "PeriodicModelAverager": lambda: averager.average_parameters(models[1].parameters()),
    }
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("accelerate"):
            from accelerate import Accelerator
            from accelerate.local_sgd import LocalSGD as Theirs

            accelerator = Accelerator(cpu=True)
            model = accelerator.prepare(models[2])
            theirs = stack.enter_context(Theirs(accelerator, model, local_sgd_steps=1, enabled=True))
            calls["accelerate's LocalSGD"] = theirs.step
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(REPETITIONS):
            for name, call in calls.items():
                topology.barrier()
                start = time.perf_counter()
                call()
                times[name].append(max(topology.allgather(time.perf_counter() - start)))
    medians = {name: 1e3 * statistics.median(taken[2:]) for name, taken in times.items()}
    for name, taken in medians.items() if topology.world.rank == 0 else ():
        print(f"{name}: {taken:.2f} ms, {taken / medians['LocalSGD']:.1f} times LocalSGD's")
    method.close()
    torch.distributed.destroy_process_group()
    topology.free()


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 40_000_000)
