"""A long test, run by name: bash tests/run.sh mpi --slow trees. Seconds: MPILSGD_SOAK_SECONDS (900)."""

from __future__ import annotations

import os
import random
import resource
import time
from typing import Any

import numpy as np
import pytest
import torch
from harness import WORLD, check_together
from internals import lost_messages

from mpilsgd import MSGD, EASGDTree, Topology

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.slow]

SECONDS = float(os.environ.get("MPILSGD_SOAK_SECONDS", "900"))


def test_trees_of_all_kinds_start_train_and_stop() -> None:
    """No hang, no lost message, no growth of memory or of open files."""
    choose = random.Random(3)
    start, errors, runs, first = time.monotonic(), [], 0, (0, 0)
    while not errors and WORLD.bcast(time.monotonic() - start < SECONDS):
        runs += 1
        up = choose.randint(1, 5)
        options: dict[str, Any] = {
            "degree": choose.randint(2, 5),
            "inner": choose.choice(["ranks", "hosted"]),
            "order": choose.choice(["free", "free", "lock-step"]),
        }
        if choose.random() < 0.5:
            options |= {"period": choose.randint(1, 6), "upper_period": choose.randint(1, 12)}
        else:
            options |= {"scheme": "up-down", "up_period": up, "down_period": up + choose.randint(0, 9)}
        numel, steps, pause = (
            choose.choice([1, 1000, 300_000]),
            choose.randint(1, 40),
            choose.choice([0, 0, 3e-3]),
        )
        topology = Topology(shared=choose.random() < 0.7)
        parameter = torch.nn.Parameter(torch.zeros(numel))
        opt = EASGDTree(MSGD([parameter], 0.1, 0.5), topology, **options)
        free = options["order"] == "free"
        while not opt.reached(steps * len(opt.workers)) if free else opt.t < steps:
            if opt.computes:
                parameter.grad = torch.full_like(parameter, WORLD.rank - 1.0)
                time.sleep(pause * random.random())
            opt.step()
        with opt.center():
            finite = bool(torch.isfinite(parameter).all())
        lost = lost_messages(opt, WORLD)
        opt.close()
        topology.free()
        errors += [f"run {runs} {options}: lost {lost}, finite {finite}"] if lost or not finite else []
        errors = [e for own in WORLD.allgather(errors) for e in own]
        now = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, len(os.listdir("/proc/self/fd")))
        if runs == 60:
            first = now
    grown = np.subtract(now, first)
    if runs > 120 and (grown[0] > 40 or grown[1] > 4):
        errors.append(f"memory grew by {grown[0]} MB, open files by {grown[1]} in {runs} runs")
    if WORLD.rank == 0:
        print(f"{runs} runs")
    check_together(errors)
