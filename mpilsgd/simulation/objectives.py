"""Small problems whose gradients thousands of workers take at once. Row i of x is worker i's.

The noise of a step is drawn for all workers together, and a function of the seed and the step alone: so a single worker
can be given the row that is its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def noise_of(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one step."""
    return np.random.Generator(np.random.Philox(key=[seed, step]))


class Objective:
    """f(x), seen by each worker through noise of its own at each step.

    Attributes: dim: values of x.
    """

    dim: int = 1

    def draw(self, random: np.random.Generator, workers: int) -> Any:
        """The noise of one step: tensors (or None) whose rows are the workers'."""
        raise NotImplementedError

    def gradient(self, x: Tensor, noise: Any) -> Tensor:
        """(workers, dim), of x of the same shape."""
        raise NotImplementedError

    def loss(self, x: Tensor, noise: Any) -> Tensor:
        """(workers,): what each sees of f; its gradient is `gradient`."""
        raise NotImplementedError

    def start(self, workers: int, seed: int) -> Tensor:
        """The same for all."""
        return torch.ones(workers, self.dim, dtype=torch.float64)


class _Noise(NamedTuple):
    additive: Tensor | None
    factor: Tensor | None


class _Plain(Objective):
    """With noise z in the gradient: deviation `noise` of each value."""

    noise: float

    def draw(self, random: np.random.Generator, workers: int) -> _Noise:
        z = random.standard_normal((workers, self.dim)) if self.noise else None
        return _Noise(None if z is None else torch.from_numpy(z).mul_(self.noise), None)


class Quadratic(_Plain):
    """f(x) = sum h x^2 / 2;  the gradient that is seen: s h x + z.

    Args: curvature: h, a number or one of each value; dim: how many, if it is a number; noise: the deviation of z,
    normal; multiplicative: that of s, Gamma-distributed with mean 1, one for each worker.
    """

    def __init__(self, curvature: Any = 1.0, dim: int = 1, noise: float = 0.0, multiplicative: float = 0.0):
        self.curvature = torch.as_tensor(curvature, dtype=torch.float64).expand(
            dim if isinstance(curvature, int | float) else len(curvature)
        )
        self.dim, self.noise, self.multiplicative = len(self.curvature), noise, multiplicative

    def draw(self, random: np.random.Generator, workers: int) -> _Noise:
        additive, spread = super().draw(random, workers).additive, self.multiplicative**2
        factor = torch.from_numpy(random.gamma(1 / spread, spread, (workers, 1))) if spread else None
        return _Noise(additive, factor)

    def gradient(self, x: Tensor, noise: _Noise) -> Tensor:
        gradient = x * self.curvature
        if noise.factor is not None:
            gradient *= noise.factor
        return gradient if noise.additive is None else gradient.add_(noise.additive)

    def loss(self, x: Tensor, noise: _Noise) -> Tensor:
        loss = (self.curvature * x * x).sum(1) / 2
        if noise.factor is not None:
            loss *= noise.factor[:, 0]
        return loss if noise.additive is None else loss.add_((noise.additive * x).sum(1))


class DoubleWell(_Plain):
    """f(x) = sum (x^2 - 1)^2 / 4: minima at 1 and -1, a hill of 1/4 between them;  the gradient: x^3 - x + z."""

    def __init__(self, dim: int = 1, noise: float = 0.0):
        self.dim, self.noise = dim, noise

    def gradient(self, x: Tensor, noise: _Noise) -> Tensor:
        gradient = (x * x - 1) * x
        return gradient if noise.additive is None else gradient.add_(noise.additive)

    def loss(self, x: Tensor, noise: _Noise) -> Tensor:
        loss = ((x * x - 1) ** 2).sum(1) / 4
        return loss if noise.additive is None else loss.add_((noise.additive * x).sum(1))


class _Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


class SmallNet(Objective):
    """A network of one hidden layer learns another one: f = mean over a batch of (b tanh(A u) - teacher(u))^2 / 2.

    x: A (hidden, inputs), then b (hidden). Every worker draws normal inputs u at every step.
    """

    def __init__(self, inputs: int = 4, hidden: int = 8, batch: int = 8, teacher: int = 0):
        self.inputs, self.hidden, self.batch = inputs, hidden, batch
        self.dim = hidden * (inputs + 1)
        drawn = np.random.default_rng(teacher).standard_normal((1, self.dim))
        self.teacher = torch.from_numpy(drawn)

    def start(self, workers: int, seed: int) -> Tensor:
        drawn = np.random.default_rng([seed, self.dim]).standard_normal((1, self.dim)) / self.inputs**0.5
        return torch.from_numpy(drawn).repeat(workers, 1)

    def draw(self, random: np.random.Generator, workers: int) -> _Batch:
        inputs = torch.from_numpy(random.standard_normal((workers, self.batch, self.inputs)))
        return _Batch(inputs, self._output(self.teacher, inputs)[1])

    def _output(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        cut = self.hidden * self.inputs
        first = x[:, :cut].view(-1, self.hidden, self.inputs)
        hidden = torch.tanh(inputs @ first.mT)
        return hidden, (hidden @ x[:, cut:, None])[..., 0]

    def gradient(self, x: Tensor, noise: _Batch) -> Tensor:
        hidden, output = self._output(x, noise.inputs)
        error = ((output - noise.targets) / self.batch)[..., None]  # (workers, batch, 1)
        back = error * x[:, None, self.hidden * self.inputs :] * (1 - hidden * hidden)
        first, second = back.mT @ noise.inputs, (error.mT @ hidden)[:, 0]
        return torch.cat([first.flatten(1), second], 1)

    def loss(self, x: Tensor, noise: _Batch) -> Tensor:
        return ((self._output(x, noise.inputs)[1] - noise.targets) ** 2).mean(1) / 2
