"""EASGD Tree in lock-step, sequentially and in NumPy, written from the thesis (Algorithm 6): the oracle.

In one tick every node makes one pass: send up, send down, take the parent's message, take the children's in order, and
at a leaf the gradient step, with the gradient at the x after what it has taken. A message sent in tick s is seen from
tick s + 1 on; each direction of an edge holds one, the newest, and it is taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from problems import Problem
from simulation import Local

Matrix = NDArray[np.float64]
Every = Callable[[bool], tuple[int, int]]  # whether below a leaf hangs on the edge -> tau up, tau down


class Tree:
    """parent: of every tree node its parent, -1 at the root; leaf i takes worker i's batches."""

    def __init__(
        self,
        problem: Problem,
        parent: Sequence[int],
        local: Local,
        alpha: float,
        every: Every,
        *,
        same: bool = True,
    ):
        self.problem, self.parent, self.local, self.alpha = problem, list(parent), local, alpha
        nodes = range(len(parent))
        self.children = [[c for c in nodes if parent[c] == i] for i in nodes]
        self.leaves = [i for i in nodes if not self.children[i]]
        self.root = self.parent.index(-1)
        self.every = [every(not self.children[i]) for i in nodes]
        self.x: Matrix = np.stack([problem.start(0 if same else i) for i in nodes])
        if not same:
            mean = self.x[self.leaves].mean(0)
            self.x = np.stack([self.x[i] if i in self.leaves else mean for i in nodes])
        self.v: Matrix = np.zeros_like(self.x)
        self.messages: dict[tuple[int, int], Matrix] = {}  # (from, to) -> x as it was
        self.t = 0

    def step(self) -> None:
        sent: dict[tuple[int, int], Matrix] = {}
        for i, parent in enumerate(self.parent):
            if parent >= 0 and self.t % self.every[i][0] == 0:
                sent[i, parent] = self.x[i].copy()
            for child in self.children[i]:
                if self.t % self.every[child][1] == 0:
                    sent[i, child] = self.x[i].copy()
            for other in [parent, *self.children[i]]:
                if (other, i) in self.messages:
                    self.x[i] += self.alpha * (self.messages.pop((other, i)) - self.x[i])
            if not self.children[i]:
                self._gradient_step(i)
        self.messages.update(sent)
        self.t += 1

    def _gradient_step(self, i: int) -> None:
        local, ahead = self.local, self.local.lookahead()
        point = self.x[i] + ahead * self.v[i]
        gradient = self.problem.gradient(point, i, self.t)[1] + local.weight_decay * point
        self.v[i] = local.momentum * self.v[i] - local.rate(self.t) * gradient
        self.x[i] = self.x[i] + self.v[i]
