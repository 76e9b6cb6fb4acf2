"""Small training problems, each written twice: as a torch model and with its gradient by hand in NumPy.

A worker's batch at a step depends only on (worker, step), so a run over MPI and a sequential simulation see the
same data. Vectors are the parameters of the torch model, flattened row-major in the order of `parameters()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Arrays = list[NDArray[np.float64]]


def flatten(tensors: Sequence[torch.Tensor]) -> Vector:
    """The values of `tensors` as one float64 vector."""
    return np.concatenate([tensor.detach().to(torch.float64).cpu().numpy().ravel() for tensor in tensors])


@torch.no_grad()
def fill(tensors: Sequence[torch.Tensor], vector: Vector) -> None:
    """Write `vector` into `tensors`, in place."""
    start = 0
    for tensor in tensors:
        piece = vector[start : start + tensor.numel()].reshape(tuple(tensor.shape))
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(piece)))
        start += tensor.numel()
    assert start == vector.size


class Problem:
    """What the simulation and the tests ask of a problem."""

    shapes: tuple[tuple[int, ...], ...]

    def model(self) -> torch.nn.Module:
        raise TypeError("a problem has a model")

    def loss(self, model: torch.nn.Module, worker: int, step: int) -> torch.Tensor:
        """The torch loss of `model` on the worker's batch."""
        raise TypeError("a problem has a loss")

    def gradient(self, x: Vector, worker: int, step: int) -> tuple[float, Vector]:
        """Loss and gradient of the same batch at x, by hand."""
        raise TypeError("a problem has a gradient")

    def visit(self, x: Vector, worker: int, step: int) -> Vector:
        """What a forward pass does to the state itself (float buffers); nothing here."""
        return x

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def start(self, worker: int) -> Vector:
        """A worker's own starting point (worker 0's is the common one), exact in every precision."""
        values = np.random.default_rng([7, worker]).normal(scale=0.5, size=self.size)
        return np.round(values * 64) / 64

    def build(self, dtype: torch.dtype, start: Vector) -> torch.nn.Module:
        """The torch model in `dtype`, its parameters (then its float buffers) set to `start`."""
        model = self.model().to(dtype)
        fill(state_of(model), start)
        return model


def state_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, then float buffers."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


class Regression(Problem):
    """Half the mean squared error on data of which every worker has its own part (`equal`: all the same).

    full: every step sees the worker's whole data (gradient descent), else a batch of 6 of its 24 samples.
    """

    inputs = 5
    outputs = 3
    samples = 24
    batch_size = 6

    def __init__(self, *, equal: bool = False, full: bool = False) -> None:
        self.equal = equal
        self.full = full
        self._data: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def data(self, worker: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        worker = 0 if self.equal else worker
        if worker not in self._data:
            random = np.random.default_rng([11, worker])
            inputs = random.normal(size=(self.samples, self.inputs))
            truth = np.random.default_rng(13).normal(size=(self.inputs, self.outputs))
            # The noise makes the workers disagree about the best W, and the lead change hands.
            noise = random.normal(scale=0.4, size=(self.samples, self.outputs))
            targets = np.tanh(inputs @ truth) + noise
            self._data[worker] = (np.round(inputs * 64) / 64, np.round(targets * 64) / 64)
        return self._data[worker]

    def batch(self, worker: int, step: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        inputs, targets = self.data(worker)
        if self.full:
            return inputs, targets
        index = (step * self.batch_size + np.arange(self.batch_size)) % self.samples
        return inputs[index], targets[index]

    def loss(self, model: torch.nn.Module, worker: int, step: int) -> torch.Tensor:
        like = next(model.parameters())
        inputs, targets = (torch.from_numpy(array).to(like) for array in self.batch(worker, step))
        return 0.5 * (model(inputs) - targets).square().sum() / len(inputs)

    def pieces(self, x: Vector) -> Arrays:
        """The vector cut into the model's tensors."""
        cuts = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]
        return [piece.reshape(shape) for piece, shape in zip(np.split(x, cuts), self.shapes, strict=True)]


class LeastSquares(Regression):
    """Convex: prediction = W u + b."""

    shapes: tuple[tuple[int, ...], ...] = ((3, 5), (3,))

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(self.inputs, self.outputs)

    def gradient(self, x: Vector, worker: int, step: int) -> tuple[float, Vector]:
        weight, bias = self.pieces(x)
        inputs, targets = self.batch(worker, step)
        error = inputs @ weight.T + bias - targets
        loss = 0.5 * float((error**2).sum()) / len(inputs)
        error = error / len(inputs)
        return loss, np.concatenate([(error.T @ inputs).ravel(), error.sum(0)])


class TanhNet(Regression):
    """Non-convex: prediction = W2 tanh(W1 u + b1) + b2."""

    shapes = ((6, 5), (6,), (3, 6), (3,))

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(self.inputs, 6), torch.nn.Tanh(), torch.nn.Linear(6, self.outputs)
        )

    def gradient(self, x: Vector, worker: int, step: int) -> tuple[float, Vector]:
        first, first_bias, second, second_bias = self.pieces(x)
        inputs, targets = self.batch(worker, step)
        hidden = np.tanh(inputs @ first.T + first_bias)
        error = hidden @ second.T + second_bias - targets
        loss = 0.5 * float((error**2).sum()) / len(inputs)
        error = error / len(inputs)
        back = (error @ second) * (1 - hidden**2)
        gradients = [back.T @ inputs, back.sum(0), error.T @ hidden, error.sum(0)]
        return loss, np.concatenate([gradient.ravel() for gradient in gradients])


class Point(torch.nn.Module):
    """A model that is nothing but one parameter vector x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(size))


class Quadratic(Problem):
    """f(x) = h/2 ‖x − x*‖²; h = 0: no gradient at all."""

    def __init__(self, curvature: float = 1.0, size: int = 4, optimum: float = 0.0) -> None:
        self.curvature = curvature
        self.optimum = optimum
        self.shapes = ((size,),)

    def model(self) -> torch.nn.Module:
        return Point(self.size)

    def loss(self, model: torch.nn.Module, worker: int, step: int) -> torch.Tensor:
        (x,) = model.parameters()
        return 0.5 * self.curvature * (x - self.optimum).square().sum()

    def gradient(self, x: Vector, worker: int, step: int) -> tuple[float, Vector]:
        error = x - self.optimum
        return 0.5 * self.curvature * float(error @ error), self.curvature * error


class Sinc(Problem):
    """The example of the Leader SGD paper, section 6: L(x, y) = sin(πr)/(πr), r = ‖(x, y)‖, four workers."""

    shapes = ((2,),)
    starts = ((-6.0, -4.0), (-15.0, -18.0), (20.0, 11.0), (17.0, 8.0))

    def model(self) -> torch.nn.Module:
        return Point(2)

    def start(self, worker: int) -> Vector:
        return np.array(self.starts[worker])

    def loss(self, model: torch.nn.Module, worker: int, step: int) -> torch.Tensor:
        (x,) = model.parameters()
        angle = torch.pi * x.square().sum().sqrt()
        return torch.sin(angle) / angle

    def gradient(self, x: Vector, worker: int, step: int) -> tuple[float, Vector]:
        radius = float(np.sqrt(x @ x))
        angle = np.pi * radius
        slope = np.cos(angle) / radius - np.sin(angle) / (angle * radius)
        return float(np.sin(angle) / angle), slope * x / radius

    def value(self, x: Vector) -> float:
        return self.gradient(x, 0, 0)[0]


class Counting(torch.nn.Module):
    """A linear model with a float buffer that every forward pass in training moves, as a BatchNorm's statistics."""

    buffer: torch.Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(inputs, outputs)
        self.register_buffer("buffer", torch.zeros(outputs))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.buffer.lerp_(inputs.mean(0)[: len(self.buffer)], 0.25)
        output: torch.Tensor = self.linear(inputs)
        return output


class Buffered(LeastSquares):
    """`LeastSquares` whose state ends with a float buffer: b ← b + (mean of the inputs − b)/4 at each forward pass."""

    shapes = ((3, 5), (3,), (3,))

    def model(self) -> torch.nn.Module:
        return Counting(self.inputs, self.outputs)

    def gradient(self, x: Vector, worker: int, step: int) -> tuple[float, Vector]:
        weight, bias, buffer = self.pieces(x)
        inputs, targets = self.batch(worker, step)
        error = (inputs @ weight.T + bias - targets) / len(inputs)
        loss = 0.5 * float((error**2).sum()) * len(inputs)
        return loss, np.concatenate([(error.T @ inputs).ravel(), error.sum(0), np.zeros_like(buffer)])

    def visit(self, x: Vector, worker: int, step: int) -> Vector:
        x = x.copy()
        mean = self.batch(worker, step)[0].mean(0)[:3]
        x[-3:] += 0.25 * (mean - x[-3:])
        return x


class Accumulated(Problem):
    """Gradient accumulation: each step adds up the gradients of `times` batches of another problem."""

    def __init__(self, problem: Problem, times: int) -> None:
        self.problem = problem
        self.times = times
        self.shapes = problem.shapes

    def model(self) -> torch.nn.Module:
        return self.problem.model()

    def loss(self, model: torch.nn.Module, worker: int, step: int) -> torch.Tensor:
        losses = [self.problem.loss(model, worker, step * self.times + part) for part in range(self.times)]
        return torch.stack(losses).sum()

    def gradient(self, x: Vector, worker: int, step: int) -> tuple[float, Vector]:
        parts = [self.problem.gradient(x, worker, step * self.times + part) for part in range(self.times)]
        return sum(loss for loss, _ in parts), np.sum([gradient for _, gradient in parts], axis=0)
