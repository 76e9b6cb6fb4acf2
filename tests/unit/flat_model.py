"""A small model with everything that makes laying flat hard, and how it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Convolutions, BatchNorm, a tied pair, a frozen weight, and parameters of no and of zero dimensions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.first = nn.Linear(5, 7, bias=False)
        self.second = nn.Linear(7, 5)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("offset", torch.full((5,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3)) * self.scale + self.offset
        x = self.second(torch.tanh(self.first(x)))
        return self.tied(torch.tanh(self.frozen(x))) + self.empty.sum()


def batch(i: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(4, 3, 6, 6, generator=generator).to(dtype)
    return x, torch.randn(4, 7, generator=generator).to(dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6, start: int = 0, **zero: bool
) -> None:
    for i in range(start, start + steps):
        optimizer.zero_grad(**zero)
        x, y = batch(i, next(model.parameters()).dtype)
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()


def sgd(model: nn.Module, **kwargs: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, **kwargs)


def assert_same(one: nn.Module, two: nn.Module) -> None:
    a, b = one.state_dict(), two.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def inside(tensor: Tensor, vector: Tensor) -> bool:
    end = vector.data_ptr() + vector.numel() * vector.element_size()
    return vector.data_ptr() <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end


def plain_trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
