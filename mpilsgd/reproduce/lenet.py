"""Zhang and Li Fig. 4a, 6 and 7: LeNet on the first digits of MNIST, whole gradients, by the real LocalSGD."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mpilsgd.reproduce import datasets, drawing
from mpilsgd.reproduce.judge import stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LR = 0.1


def _losses(options: Options, m: int, period: int, rounds: int, count: int) -> list[float]:
    """The loss of all samples at the average after each round."""
    import torch

    from mpilsgd import LocalSGD, Topology, in_process
    from mpilsgd.train.models import build

    pixels, classes = datasets.mnist(options.data_dir, count)
    images, labels = torch.from_numpy(pixels[:, None]).float(), torch.from_numpy(classes)
    criterion = torch.nn.CrossEntropyLoss()

    def worker() -> list[float]:
        topology = Topology()
        model = build("lenet", (1, 28, 28), 10, seed=options.seed)
        opt = LocalSGD(torch.optim.SGD(model.parameters(), lr=_LR), topology, period=period)
        mine = images[topology.world.rank :: m], labels[topology.world.rank :: m]
        found = []

        def record() -> None:
            if topology.world.rank == 0:
                with torch.no_grad():
                    found.append(float(criterion(model(images), labels)))

        record()
        for t in range(rounds * period):
            opt.zero_grad()
            criterion(model(mine[0]), mine[1]).backward()
            opt.step()
            if (t + 1) % period == 0:
                record()
        return found

    return in_process(worker, m, seed=options.seed, patience=600)[0]


def _plan(options: Options) -> tuple[tuple[int, ...], int, int, str]:
    """Periods, rounds, samples, and what was shortened."""
    if options.quick:
        return (1, 10, 30), 4, 150, "150 of 1000 images, 4 rounds, T up to 30, no threshold"
    return (1, 10, 100), 40, 1000, "no threshold"


def _periods(options: Options, workers: tuple[int, ...]) -> Result:
    periods, rounds, count, shortened = _plan(options)
    curves = {(m, t): _losses(options, m, t, rounds, count) for m in workers for t in periods}
    rows = []
    for m in workers:
        last = [curves[m, t][-1] for t in periods]
        rows.append(
            stated(
                f"loss after {rounds} rounds, m = {m}, T = {', '.join(map(str, periods))}",
                "falls faster for larger T",
                ", ".join(f"{one:.3g}" for one in last),
                all(a > b for a, b in pairwise(last)),
            )
        )

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(workers), sharey=True, squeeze=False)[0]
        for axis, m in zip(axes, workers, strict=True):
            for t, color in zip(periods, drawing.COLORS, strict=False):
                axis.semilogy(curves[m, t], "o-", markersize=3, color=color, label=f"T = {t}")
            axis.set_title(f"m = {m}", loc="left")
            axis.set_xlabel("round n")
        axes[0].set_ylabel("loss of all samples")
        axes[0].legend()

    return Result(rows, draw, shortened, (5.0 * len(workers), 4.0))


def fig_4a(options: Options) -> Result:
    """Ten nodes."""
    return _periods(options, (10,))


def fig_6(options: Options) -> Result:
    """Two and five nodes."""
    return _periods(options, (2, 5))


def fig_7(options: Options) -> Result:
    """The same T, more nodes: slower."""
    periods, rounds, count, shortened = _plan(options)
    workers = (1, 2, 5, 10)
    curves = {m: _losses(options, m, periods[-1], rounds, count) for m in workers}
    last = [curves[m][-1] for m in workers]
    rows = [
        stated(
            f"loss after {rounds} rounds of T = {periods[-1]}, m = 1, 2, 5, 10",
            "falls more slowly with more nodes",
            ", ".join(f"{one:.3g}" for one in last),
            bool((np.diff(last) > 0).all()),
        )
    ]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for m, color in zip(workers, drawing.COLORS, strict=False):
            axis.semilogy(curves[m], "o-", markersize=3, color=color, label=f"m = {m}")
        axis.set_xlabel("round n")
        axis.set_ylabel("loss of all samples")
        axis.legend()

    return Result(rows, draw, shortened, (6.0, 4.0))


ENTRIES = [
    Reproduction("zhang-li-fig4a", "Zhang and Li, Fig. 4a", "LeNet on MNIST, 10 nodes", fig_4a),
    Reproduction("zhang-li-fig6", "Zhang and Li, Fig. 6", "LeNet on MNIST, 2 and 5 nodes", fig_6),
    Reproduction("zhang-li-fig7", "Zhang and Li, Fig. 7", "LeNet on MNIST, 1 to 10 nodes", fig_7),
]
