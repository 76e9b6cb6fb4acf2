"""LocalSGD(period="adaptive") against the best fixed period: the cost C_c a round and C_g a step until a goal is met.

    OMP_NUM_THREADS=1 python jobs/bench/adaptive.py quadratic|quartic|lenet DATA [COST...]

DATA: a folder with libsvm/colon-cancer, or mnist/. COST: of a round, in steps (10 100 1000; lenet: 10 100). Two workers, as
tasks of one process, whole-batch gradients (Zhang and Li, sections 2.3, 3 and 4): colon-cancer with an intercept, until
|grad f|^2 is at most 1e-4 (quadratic loss), 1e-3 (quartic); LeNet on the first 1000 images of MNIST, until the loss of
the average is at most 0.1. A fixed period is run once for all costs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mpilsgd import LocalSGD, Topology, in_process
from mpilsgd.train.formats import read_mnist
from mpilsgd.train.models import MODELS

WORKERS = 2
Task = tuple[
    torch.nn.Module, Callable[[], torch.Tensor], float, float, bool
]  # model, loss, lr, goal, of the gradient


def colon_cancer(path: Path, power: int) -> Callable[[int], Task]:
    rows, labels = [], []
    for line in path.read_text().split("\n"):
        if line:
            label, *entries = line.split()
            row = np.zeros(2001)
            row[2000] = 1.0  # the intercept, without which no line fits all labels
            for entry in entries:
                k, value = entry.split(":")
                row[int(k) - 1] = float(value)
            rows.append(row)
            labels.append(float(label))
    order = np.random.default_rng(0).permutation(len(rows))
    u, s, _ = np.linalg.svd(np.array(rows)[order], full_matrices=False)
    a, b = torch.tensor(u * s), torch.tensor(np.array(labels)[order])  # in the space that the rows span

    def task(rank: int) -> Task:
        mine = slice(rank * len(b) // WORKERS, (rank + 1) * len(b) // WORKERS)
        x = torch.nn.Parameter(torch.zeros(a.shape[1], dtype=a.dtype))
        model = torch.nn.ParameterList([x])
        lr, goal = (1e-3, 1e-4) if power == 2 else (5e-4, 1e-3)
        return model, lambda: ((a[mine] @ x - b[mine]) ** power).mean(), lr, goal, True

    return task


def lenet(folder: Path) -> Callable[[int], Task]:
    (images, labels), _ = read_mnist([folder])
    inputs = (torch.tensor(images[:1000]).float() / 255 - 0.1307) / 0.3081
    targets = torch.tensor(labels[:1000].astype(np.int64))

    def task(rank: int) -> Task:
        torch.manual_seed(0)
        model = MODELS["lenet"]((1, 28, 28), 10)
        mine = slice(rank * 1000 // WORKERS, (rank + 1) * 1000 // WORKERS)
        return model, lambda: functional.cross_entropy(model(inputs[mine]), targets[mine]), 0.05, 0.1, False

    return task


def trained(make: Callable[[int], Task], period: Any, cost: float, most: float) -> tuple[int, int, list[Any]]:
    """Rounds and steps until the average meets the goal, and the periods; none within `most` of cost: no rounds."""

    def worker() -> tuple[int, int, list[Any]]:
        topology = Topology()
        world = topology.world
        model, loss, lr, goal, by_gradient = make(world.rank)
        opt = LocalSGD(torch.optim.SGD(model.parameters(), lr=lr), topology, period=period, cost_ratio=cost)
        rounds = -1
        while cost * opt.metrics.rounds + opt.t < most:
            opt.zero_grad()
            value = loss()
            value.backward()
            if opt.metrics.rounds != rounds:
                rounds = opt.metrics.rounds
                own = (
                    torch.cat([p.grad.flatten() for p in opt.flat.parameters if p.grad is not None]).numpy()
                    if by_gradient
                    else value.item()
                )
                mean = sum(world.allgather(own)) / WORKERS
                if float(np.square(mean).sum() if by_gradient else mean) <= goal:
                    return rounds, opt.t, opt.metrics.periods
            opt.step(loss=value.item())
        return 0, opt.t, opt.metrics.periods

    return in_process(worker, WORKERS)[0]


def main(what: str, data: Path, costs: list[float]) -> None:
    make = (
        lenet(data / "mnist")
        if what == "lenet"
        else colon_cancer(data / "libsvm/colon-cancer", 2 if what == "quadratic" else 4)
    )
    limit = 3000 if what == "lenet" else 40_000
    fixed, start = {}, time.perf_counter()
    for period in (
        (1, 2, 5, 10, 20, 40, 80, 160, 320)
        if what == "lenet"
        else (3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160)
    ):
        rounds, steps, _ = trained(make, period, 1e-9, limit)
        if rounds:
            fixed[period] = rounds, steps
        print(
            f"  period {period}: {rounds} rounds, {steps} steps, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    print(
        f"\n| {what}: C_c/C_g | best fixed T | its cost | adaptive | rounds, steps | ratio | periods |\n|---|---|---|---|---|---|---|"
    )
    for cost in costs:
        spent = {period: cost * rounds + steps for period, (rounds, steps) in fixed.items()}
        best = min(spent, key=spent.__getitem__)
        rounds, steps, periods = trained(make, "adaptive", cost, 3 * spent[best])
        total = cost * rounds + steps if rounds else math.nan
        told = " ".join(str(period) for _, period in periods[:: max(1, len(periods) // 8)])
        print(
            f"| {cost:g} | {best} | {spent[best]:.0f} | {total:.0f} | {rounds}, {steps} | {total / spent[best]:.3f} | {told} |",
            flush=True,
        )


if __name__ == "__main__":
    given = [float(cost) for cost in sys.argv[3:]]
    main(sys.argv[1], Path(sys.argv[2]), given or ([10, 100] if sys.argv[1] == "lenet" else [10, 100, 1000]))
