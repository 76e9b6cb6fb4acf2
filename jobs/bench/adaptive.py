"""LocalSGD(period="adaptive") against the best fixed period: the cost C_c a round and C_g a step until a goal is met.

    OMP_NUM_THREADS=1 python jobs/bench/adaptive.py quadratic|quartic|lenet DATA [COST...]

DATA: a folder with libsvm/colon-cancer, or mnist/. COST: of a round, in steps (10 100 1000; lenet: 3 10 30). Two
workers, as tasks of one process, with gradients of all their data (Zhang and Li, sections 2.3, 3 and 4): colon-cancer
with an intercept, until |grad f|^2 is at most 1e-4 (quadratic loss), 1e-3 (quartic); LeNet on the first IMAGES (1000,
from the environment) images of MNIST, until the loss is at most GOAL (0.05). A fixed period is run once for all costs.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from mpilsgd import LocalSGD, Topology, in_process
from mpilsgd.train.formats import read_mnist
from mpilsgd.train.models import MODELS

WORKERS = 2
PERIODS = {
    "quadratic": (3, 5, 7, 10, 14, 20, 28, 40, 56, 80),
    "quartic": (5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224),
    "lenet": (1, 2, 4, 7, 12, 20, 35, 60, 100, 150),
}


class Task(NamedTuple):
    model: torch.nn.Module
    loss: Callable[[], torch.Tensor]
    lr: float
    goal: float
    by_gradient: bool  # whether the goal is one of |grad f|^2


def colon_cancer(path: Path, power: int) -> Callable[[int], Task]:
    rows, labels = [], []
    for line in path.read_text().splitlines():
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
        lr, goal = (1e-3, 1e-4) if power == 2 else (5e-4, 1e-3)
        return Task(
            torch.nn.ParameterList([x]), lambda: ((a[mine] @ x - b[mine]) ** power).mean(), lr, goal, True
        )

    return task


def lenet(folder: Path) -> Callable[[int], Task]:
    (images, labels), _ = read_mnist([folder])
    count = int(os.environ.get("IMAGES", "1000"))
    inputs = (torch.tensor(images[:count]).float() / 255 - 0.1307) / 0.3081
    targets = torch.tensor(labels[:count].astype(np.int64))
    goal = float(os.environ.get("GOAL", "0.05"))

    def task(rank: int) -> Task:
        torch.manual_seed(0)
        model = MODELS["lenet"]((1, 28, 28), 10)
        mine = slice(rank * count // WORKERS, (rank + 1) * count // WORKERS)
        return Task(
            model, lambda: functional.cross_entropy(model(inputs[mine]), targets[mine]), 0.05, goal, False
        )

    return task


def trained(make: Callable[[int], Task], period: Any, cost: float, most: float) -> tuple[int, int, list[Any]]:
    """Rounds and steps until the average meets the goal, and the periods; if not within `most` of cost: no rounds."""

    def worker() -> tuple[int, int, list[Any]]:
        world = (topology := Topology()).world
        task = make(world.rank)
        optimizer = torch.optim.SGD(task.model.parameters(), lr=task.lr)
        opt = LocalSGD(optimizer, topology, period=period, round_cost=cost)
        rounds = -1
        while cost * opt.metrics.rounds + opt.t < most:
            opt.zero_grad()
            loss = task.loss()
            loss.backward()
            if opt.metrics.rounds != rounds:
                rounds = opt.metrics.rounds
                gradient = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
                own = torch.cat(gradient).numpy() if task.by_gradient else loss.item()
                mean = sum(world.allgather(own)) / WORKERS
                if (np.square(mean).sum() if task.by_gradient else mean) <= task.goal:
                    return rounds, opt.t, opt.metrics.periods
            opt.step(loss=loss.item())
        return 0, opt.t, opt.metrics.periods

    return in_process(worker, WORKERS)[0]


def main(what: str, data: Path, costs: list[float]) -> None:
    power = {"quadratic": 2, "quartic": 4}.get(what)
    make = lenet(data / "mnist") if power is None else colon_cancer(data / "libsvm/colon-cancer", power)
    fixed, start = {}, time.perf_counter()
    for period in PERIODS[what]:
        rounds, steps, _ = trained(make, period, 1e-9, 50_000 if power else 2000)
        if rounds:
            fixed[period] = rounds, steps
        print(
            f"T = {period}: {rounds} rounds, {steps} steps; {time.perf_counter() - start:.0f} s", flush=True
        )
    for cost in costs:
        spent = {period: cost * rounds + steps for period, (rounds, steps) in fixed.items()}
        best = min(spent, key=spent.__getitem__)
        rounds, steps, periods = trained(make, "adaptive", cost, 3 * spent[best])
        total = cost * rounds + steps if rounds else math.nan
        told = " ".join(str(period) for _, period in periods[:: max(1, len(periods) // 8)])
        print(
            f"C_c/C_g = {cost:g}: best fixed T {best}, cost {spent[best]:.0f}; adaptive {total:.0f} ({rounds} rounds, "
            f"{steps} steps), {total / spent[best]:.3f} times; its T {told}",
            flush=True,
        )


if __name__ == "__main__":
    given = [float(cost) for cost in sys.argv[3:]]
    main(
        sys.argv[1], Path(sys.argv[2]), given or ([3, 10, 30] if sys.argv[1] == "lenet" else [10, 100, 1000])
    )
