"""Momentum SGD by the thesis' (2.5) and (2.6) in NumPy, on a non-convex problem, and a small network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mpilsgd.flat import FlatParameters

STEPS = 120
CURVATURE = np.linspace(0.2, 3.0, 12).reshape(3, 4)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def noise(t: int) -> np.ndarray:
    return np.random.default_rng(t).normal(size=(3, 4)) * 0.3


def gradient(x: np.ndarray, t: int) -> np.ndarray:
    """Of a non-convex function, with noise: a tilted double well in each coordinate."""
    return CURVATURE * (x**3 - x) / (1 + x * x) + 0.2 + noise(t)


def torch_gradient(x: Tensor, t: int) -> Tensor:
    h, e = (torch.from_numpy(a).to(x.dtype) for a in (CURVATURE, noise(t)))
    return h * (x**3 - x) / (1 + x * x) + 0.2 + e


def start() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(3, 4))


Schedule = Callable[[int], tuple[float, float]]


def simulate(
    schedule: Schedule,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    pulls: Callable[[int], list[tuple[np.ndarray, float]]] = lambda t: [],
    steps: int = STEPS,
) -> list[np.ndarray]:
    """x_0, x_1, ... by (2.5) or (2.6): the state is x and v, nothing else."""
    x, v, before = start(), np.zeros((3, 4)), 0.0
    out = [x]
    for t in range(steps):
        eta, delta = schedule(t)
        # The loop has taken the gradient before it is known that the momentum changes.
        point = x + before * v if nesterov else x
        v = delta * v - eta * (gradient(point, t) + weight_decay * shifted(x, v, delta, nesterov))
        x = x + v - sum(rate * (x - leader) for leader, rate in pulls(t))
        before = delta
        out.append(x)
    return out


def shifted(x: np.ndarray, v: np.ndarray, delta: float, nesterov: bool) -> np.ndarray:
    return x + delta * v if nesterov else x


def constant(eta: float, delta: float) -> Schedule:
    return lambda t: (eta, delta)


def drops(t: int) -> tuple[float, float]:
    return (0.1 if t < 40 else 0.03), (0.9 if t < 30 else 0.5 if t < 70 else -0.2)


def run(
    optimizer: torch.optim.Optimizer,
    p: Tensor,
    schedule: Schedule,
    steps: range = range(STEPS),
    **options: Callable[[int], object],
) -> list[np.ndarray]:
    out = []
    for t in steps:
        p.grad = torch_gradient(p.detach(), t)
        flat = FlatParameters.of(p)
        if flat is not None and flat.grads:
            flat.fill_missing_grads()
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = schedule(t)
        optimizer.step(**{name: make(t) for name, make in options.items()})
        with optimizer.iterate():
            out.append(p.detach().double().numpy().copy())
    return out


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def parameter(dtype: torch.dtype = torch.float64, layout: str = "plain") -> nn.Parameter:
    value = torch.from_numpy(start()).to(dtype)
    if layout == "transposed":
        value = value.t().contiguous().t()
    elif layout == "gaps":
        wide = torch.zeros(3, 8, dtype=dtype)
        wide[:, ::2] = value
        value = wide[:, ::2]
    return nn.Parameter(value)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.PReLU())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for t in range(start, start + steps):
        g = torch.Generator().manual_seed(t)
        x, y = (torch.randn(8, k, generator=g).to(dtype) for k in (5, 3))
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()


def close(one: nn.Module, two: nn.Module, atol: float = 1e-6) -> None:
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-6)
