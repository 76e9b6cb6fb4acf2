"""Zhang and Li Fig. 3: a linear classifier on 500 digits, whose local optima meet (784 inputs) or do not (49 inputs).

The real LocalSGD runs some rounds; a plain loop over all nodes at once goes on, after the two were compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpilsgd.reproduce import datasets, drawing
from mpilsgd.reproduce.judge import number, stated
from mpilsgd.reproduce.registry import Options, Reproduction, Result
from mpilsgd.reproduce.workers import follow

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_T, _NODES = 100, 10


class _Classifier:
    """Softmax regression; the inputs are pixels and a one, or the largest of every 4 x 4 pixels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, meets: bool):
        count = len(images)
        pooled = images.reshape(count, 7, 4, 7, 4).max(axis=(2, 4)).reshape(count, 49)
        self.inputs = np.hstack([images.reshape(count, -1), np.ones((count, 1))]) if meets else pooled
        self.targets, self.lr = np.eye(10)[labels], 0.1 if meets else 0.5

    def nodes(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """(m, samples, ...), every m-th sample to a node."""
        inputs, targets = (np.stack([one[i::m] for i in range(m)]) for one in (self.inputs, self.targets))
        return inputs, targets

    def residuals(self, x: np.ndarray) -> tuple[float, float]:
        """|grad f|^2 and f."""
        scores = self.inputs @ x
        scores -= scores.max(axis=1, keepdims=True)
        logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        slope = self.inputs.T @ (np.exp(logs) - self.targets) / len(self.inputs)
        return float((slope**2).sum()), float(-(logs * self.targets).sum(axis=1).mean())


def _slope(inputs: np.ndarray, targets: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The gradients of all nodes: x is (m, inputs, classes)."""
    scores = inputs @ x
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    chances = scores / scores.sum(axis=-1, keepdims=True)
    return np.swapaxes(inputs, -1, -2) @ (chances - targets) / inputs.shape[-2]


def _plain(problem: _Classifier, m: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared gradient and loss over the rounds, and x after the first."""
    inputs, targets = problem.nodes(m)
    x = np.zeros((problem.inputs.shape[1], 10))
    found, first = [problem.residuals(x)], x
    for n in range(rounds):
        local = np.repeat(x[None], m, axis=0)
        for _ in range(_T):
            local -= problem.lr * _slope(inputs, targets, local)
        x = local.mean(axis=0)
        first = x if n == 0 else first
        found.append(problem.residuals(x))
    return np.array(found), first


def _separable(problem: _Classifier) -> bool:
    """Whether some x puts every sample's own class ahead of all others by 1, so that the loss can come to 0.

    A linear program; then the loss of each node can, too, by the same x, and the optimal sets meet (at infinity).
    """
    from scipy.optimize import linprog

    size, rows = problem.inputs.shape[1], []
    for sample, target in zip(problem.inputs, problem.targets, strict=True):
        own = int(target.argmax())
        for other in set(range(10)) - {own}:
            row = np.zeros((10, size))
            row[other], row[own] = sample, -sample
            rows.append(row.ravel())
    found = linprog(np.zeros(10 * size), A_ub=np.array(rows), b_ub=-np.ones(len(rows)), bounds=(None, None))
    return found.status == 0


def _real(problem: _Classifier, m: int) -> np.ndarray:
    """x after one round of the real method."""
    import torch

    from mpilsgd import LocalSGD

    inputs, targets = problem.nodes(m)
    shape = (problem.inputs.shape[1], 10)

    def gradient(x: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, float]:
        slope = _slope(inputs[rank], targets[rank], x.numpy().reshape(shape))
        return torch.from_numpy(slope.reshape(-1)), 0.0

    def make(x: Any, topology: Any) -> Any:
        return LocalSGD(torch.optim.SGD(x, lr=problem.lr), topology, period=_T)

    size = shape[0] * shape[1]
    return follow(make, gradient, np.zeros((m, size)), _T, every=_T).centre[-1].reshape(shape)


def fig_3(options: Options) -> Result:
    """One node and ten: residuals vanish together only where the optima meet."""
    images, labels = datasets.mnist(options.data_dir, 500)
    rounds = {True: 20, False: 300} if options.quick else {True: 300, False: 3000}
    rows, curves, why = [], {}, ""
    for meets, word in ((False, "not intersected"), (True, "intersected")):
        problem = _Classifier(images, labels, meets)
        for m in (1, _NODES):
            curves[meets, m], first = _plain(problem, m, rounds[meets])
            if m > 1:
                gap = float(np.abs(_real(problem, m) - first).max())
                rows.append(
                    number(f"{word}: a round of the real LocalSGD against a plain loop", 0, gap, within=1e-9)
                )
        if not meets:
            fits = _separable(problem)
            rows.append(
                stated(
                    "49 inputs: one x fits all 500 samples",
                    "no, for 490 parameters are fewer",
                    "yes" if fits else "no",
                    not fits,
                    why="they are linearly separable, as a linear program finds: the optima meet at infinity",
                )
            )
            why = "as they are separable (above), it vanishes in the end" if fits else ""
        one, ten = curves[meets, 1], curves[meets, _NODES]
        half = len(ten) // 2
        slope = float(np.log(ten[-1, 0] / ten[half, 0]) / np.log((len(ten) - 1) / half))
        alone = float(np.log(one[-1, 0] / one[half, 0]) / np.log((len(one) - 1) / half))
        closer = bool(ten[-1, 1] - one[-1, 1] < ten[half, 1] - one[half, 1])
        rows.append(
            stated(
                f"{word}: |grad f|^2 on 10 nodes",
                "vanishes" if meets else "may not vanish",
                f"{ten[-1, 0]:.2g} after {len(ten) - 1} rounds, as n^{slope:.2f} "
                f"(1 node: {one[-1, 0]:.2g}, n^{alone:.2f})",
                slope < -1 if meets else slope > -0.5,
                why=why,
            )
        )
        rows.append(
            stated(
                f"{word}: loss on 10 nodes and on 1",
                "similar" if meets else "different in the end",
                f"{ten[-1, 1]:.3g} and {one[-1, 1]:.3g}, the gap {'falls' if closer else 'grows'}",
                closer == meets,
                why=why,
            )
        )

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 4)
        for axis, (meets, k) in zip(axes, ((False, 0), (False, 1), (True, 0), (True, 1)), strict=True):
            for m, color in ((1, drawing.COLORS[0]), (_NODES, drawing.COLORS[1])):
                axis.loglog(
                    1 + np.arange(len(curves[meets, m])),
                    curves[meets, m][:, k],
                    color=color,
                    label=f"{m} node(s)",
                )
            axis.set_title("intersected" if meets else "not intersected", loc="left", fontsize=10)
            axis.set_xlabel("round n")
            axis.set_ylabel("loss" if k else "squared gradient")
        axes[0].legend()

    shortened = (
        f"the real method runs one round, a plain loop {rounds[True]} (intersected) and {rounds[False]}"
        if options.quick
        else ""
    )
    return Result(rows, draw, shortened, (13.0, 3.8))


ENTRIES = [
    Reproduction(
        "zhang-li-fig3", "Zhang and Li, Fig. 3", "a linear classifier, optima that meet or not", fig_3
    ),
]
