"""Zhang and Li Fig. 2b and 5: linear regression on the colon-cancer data, two nodes, quadratic and quartic loss.

An intercept is added: the columns are centred and the labels are not, so without one the optimal sets do not meet.
The text gives no learning rates. A share of 1/L is used, L the larger curvature at the start.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd.reproduce import datasets, drawing
from mpilsgd.reproduce.judge import Row, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import follow

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_THRESHOLD = 1e-8


class _Problem:
    """f_i(x) = mean of (a x - b)^power over the node's half of the rows."""

    def __init__(self, folder: Any, power: int, share: float):
        rows, labels = datasets.colon_cancer(folder)
        self.power = power
        self.parts = [(rows[:31], labels[:31]), (rows[31:], labels[31:])]
        curvature = max(np.linalg.norm(a, 2) ** 2 * power * (power - 1) / 31 for a, _ in self.parts)
        self.lr = share / float(curvature)
        # all rows at once: the nearest point of S, for distances
        self.rows, self.labels = rows, labels
        self.back = np.linalg.pinv(rows)

    def slope(self, x: np.ndarray, rank: int) -> np.ndarray:
        a, b = self.parts[rank]
        return self.power * a.T @ (a @ x - b) ** (self.power - 1) / len(b)

    def gradient(self, x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        import torch

        return torch.from_numpy(self.slope(x.numpy(), rank)), 0.0

    def square(self, x: np.ndarray) -> float:
        mean = (self.slope(x, 0) + self.slope(x, 1)) / 2
        return float(mean @ mean)

    def factor(self, period: int | None) -> float:
        """By which a round shrinks the distance to S in the end, quadratic loss: a linear map's spectral radius.

        Of the mean of the (1 - lr H_i)^T, H_i the nodes' Hessians, in the space of the rows; None: of projections.
        """
        basis = np.linalg.qr(self.rows.T)[0]
        maps = []
        for a, b in self.parts:
            inside = a @ basis
            if period is None:
                maps.append(np.eye(len(self.rows)) - np.linalg.pinv(inside) @ inside)
            else:
                step = np.eye(len(self.rows)) - self.lr * 2 * inside.T @ inside / len(b)
                maps.append(np.linalg.matrix_power(step, period))
        return float(np.linalg.eigvalsh(sum(maps) / len(maps))[-1])

    def distance(self, x: np.ndarray) -> float:
        return float(np.linalg.norm(self.back @ (self.rows @ x - self.labels)))


def _averages(problem: _Problem, period: int | None, rounds: int) -> np.ndarray:
    """x_n by the real LocalSGD; a period of None: until the local squared gradient is at most 1e-8."""
    import torch

    from mpilsgd import LocalSGD, Topology, in_process

    if period is not None:

        def make(x: Any, topology: Any) -> Any:
            return LocalSGD(torch.optim.SGD(x, lr=problem.lr), topology, period=period)

        return follow(make, problem.gradient, np.zeros((2, 2001)), rounds * period, every=period).centre

    def worker() -> list[np.ndarray]:
        topology = Topology()
        x = torch.nn.Parameter(torch.zeros(2001, dtype=torch.float64))
        opt = LocalSGD(torch.optim.SGD([x], lr=problem.lr), topology, until_grad_norm=_THRESHOLD)
        found = [x.detach().numpy().copy()]
        while len(found) <= rounds:
            before = opt.metrics.rounds
            x.grad = problem.gradient(x.detach(), topology.world.rank, None)[0]  # type: ignore[arg-type]
            opt.step()
            if opt.metrics.rounds > before:
                found.append(x.detach().numpy().copy())
        return found

    return np.array(in_process(worker, 2, patience=600)[0])


def _curves(problem: _Problem, rounds: dict[int | None, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Squared gradients and distances to S over the rounds, by the name of the period."""
    found = {}
    for period, count in rounds.items():
        xs = _averages(problem, period, count)
        name = f"T = {period}" if period else f"until {_THRESHOLD:g}"
        found[name] = np.array([problem.square(x) for x in xs]), np.array([problem.distance(x) for x in xs])
    return found


def _falls(values: np.ndarray) -> float:
    """The factor a round over the last third of the rounds."""
    k = max(2, len(values) // 3)
    return float((values[-1] / values[-k]) ** (1 / (k - 1)))


def fig_2b(options: Options) -> Result:
    """Quadratic loss, twice: with small steps larger T is better, with steps of 1/L not in the first rounds."""
    rounds = {1: 30, 10: 30, 100: 15, None: 6} if options.quick else {1: 400, 10: 400, 100: 400, None: 100}
    small = _curves(
        _Problem(options.data_dir, 2, 0.02), {1: 30, 10: 30, 100: rounds[100]} if options.quick else rounds
    )
    large = _curves(_Problem(options.data_dir, 2, 1.0), rounds)
    factors = [_Problem(options.data_dir, 2, 1.0).factor(period) for period in rounds]
    n = min(len(one[0]) for one in large.values()) - 1
    rows: list[Row] = [
        stated(
            f"linear convergence, {name}",
            "yes",
            f"a factor of {factor:.5f} a round in the limit, {_falls(distance):.3f} at the end here",
            factor < 1 and _falls(distance) < factor + 1e-4,
        )
        for (name, (_, distance)), factor in zip(large.items(), factors, strict=True)
    ]
    shown = 15 if options.quick else 100
    for title, curves, at in (("steps of .02 / L", small, shown), ("steps of 1 / L", large, n)):
        squares = [float(square[at]) for square, _ in curves.values()]
        gaps = [float(distance[at]) for _, distance in curves.values()]
        rows.append(
            stated(
                f"{title}: |grad f|^2 after {at} rounds, T = 1, 10, 100{', inf' if len(squares) > 3 else ''}",
                "falls faster for larger T",
                ", ".join(f"{s:.3g}" for s in squares),
                all(a >= 0.98 * b for a, b in pairwise(squares)),
                why="with large steps not in early rounds; the distance to S does (next row)",
            )
        )
        rows.append(
            stated(
                f"{title}: distance to S after {at} rounds",
                "falls faster for larger T",
                ", ".join(f"{d:.4g}" for d in gaps),
                all(a >= b - 1e-9 for a, b in pairwise(gaps)),
            )
        )

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        for axis, curves, k, title in zip(
            axes,
            (small, large, large),
            (0, 0, 1),
            ("steps of 0.02 / L", "steps of 1 / L", "steps of 1 / L"),
            strict=True,
        ):
            _draw(axis, {name: both[k] for name, both in curves.items()}, title)
        axes[0].set_ylabel("squared gradient of f")
        axes[2].set_ylabel("distance to S")
        axes[1].legend(fontsize=9)

    shortened = f"{max(rounds.values())} rounds at most in place of 400" if options.quick else ""
    return Result(rows, draw, shortened, (11.5, 4.0))


def fig_5(options: Options) -> Result:
    """Quartic loss: the local decay is slow, so that a large T is needed."""
    rounds = {1: 30, 10: 30, 100: 15} if options.quick else {1: 150, 10: 150, 100: 150, 1000: 60}
    curves = _curves(_Problem(options.data_dir, 4, 1.0), rounds)  # type: ignore[arg-type]
    at = 15 if options.quick else 60
    squares = [float(square[at]) for square, _ in curves.values()]
    rows = [
        stated(
            f"|grad f|^2 after {at} rounds, {', '.join(curves)}",
            "falls faster for larger T",
            ", ".join(f"{s:.3g}" for s in squares),
            all(a > b for a, b in pairwise(squares)),
        ),
        stated(
            "a sufficiently large T is required to reduce rounds: T = 1 over T = 100",
            "yes",
            f"{squares[0] / squares[2]:.3g} times the squared gradient",
            squares[0] > 3 * squares[2],
        ),
    ]
    local = _local(options)
    rows.append(
        stated(
            "local |grad f_1|^2 in 1000 steps",
            "quadratic: exponential, quartic: sub-linear",
            f"falls to {local[2][-1] / local[2][0]:.2g} and {local[4][-1] / local[4][0]:.2g}",
            bool(local[2][-1] / local[2][0] < 1e-3 * local[4][-1] / local[4][0]),
        )
    )

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _draw(left, {name: both[0] for name, both in curves.items()}, "quartic loss, steps of 1 / L")
        left.set_ylabel("squared gradient of f")
        left.legend()
        for power, color in zip((2, 4), drawing.COLORS, strict=False):
            right.loglog(1 + np.arange(len(local[power])), local[power], color=color, label=f"power {power}")
        right.set_xlabel("local step from x = 0")
        right.set_ylabel("squared gradient of $f_1$")
        right.legend()

    shortened = (
        f"{max(rounds.values())} rounds at most in place of 150, no T = infinity"
        if options.quick
        else "T = 1000 for infinity"
    )
    return Result(rows, draw, shortened, (9.5, 4.0))


def _local(options: Options) -> dict[int, np.ndarray]:
    """Squared gradients of the first node alone."""
    found = {}
    for power in (2, 4):
        problem, x, squares = _Problem(options.data_dir, power, 1.0), np.zeros(2001), []
        for _ in range(1000):
            slope = problem.slope(x, 0)
            squares.append(float(slope @ slope))
            x -= problem.lr * slope
        found[power] = np.array(squares)
    return found


def _draw(axis: Any, curves: dict[str, np.ndarray], title: str) -> None:
    for (name, values), color, dash in zip(
        curves.items(), drawing.COLORS, ("-", "--", "-.", ":"), strict=False
    ):
        axis.semilogy(values, dash, color=color, label=name)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("round n")


ENTRIES = [
    Reproduction("zhang-li-fig2b", "Zhang and Li, Fig. 2b", "colon-cancer, quadratic loss", fig_2b),
    Reproduction("zhang-li-fig5", "Zhang and Li, Fig. 5", "colon-cancer, quartic loss", fig_5),
]
