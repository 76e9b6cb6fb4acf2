"""Every optimizer and setting of torch's own table, wrapped: on ranks with equal data it is what it is alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import WORLD, check_together
from torch import nn

from mpilsgd import EASGD, LSGD, LocalSGD, Topology

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import optim_db

pytestmark = [pytest.mark.mpi, pytest.mark.ranks(2), pytest.mark.brief()]
STEPS = 6
ALONE: dict[str, torch.Tensor] = {}  # what torch alone comes to, once for all methods


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 3, sparse=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.table((inputs[:, 0].abs() * 4).long() % 12)
        return found


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "SparseAdam":
        return Sparse().double()
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def trained(info: Any, settings: dict[str, Any], wrap: Callable[[Any], Any]) -> torch.Tensor:
    name = info.optim_cls.__name__
    model = network(name)
    parameters = [p for p in model.parameters() if name != "Muon" or p.ndim == 2]
    opt = wrap(info.optim_cls(parameters, **copy.deepcopy(settings)))
    wrapped = hasattr(opt, "metrics")
    try:
        for t in range(STEPS):
            inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(t)).double()

            def closure(inputs: torch.Tensor = inputs) -> torch.Tensor:
                opt.zero_grad()
                loss: torch.Tensor = (model(inputs) - inputs[:, :3]).square().mean()
                loss.backward()
                return loss

            if info.step_requires_closure:
                opt.step(closure)
            else:
                loss = closure()
                opt.step(**({"loss": loss} if wrapped else {}))
    finally:
        if wrapped:
            opt.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(  # by messages one is enough: how they go is no optimizer's affair
    ("method", "options", "shared"),
    [(LocalSGD, {}, True), (LSGD, {}, True), (EASGD, {"moving_rate": 0.0}, True), (LSGD, {}, False)],
    ids=["LocalSGD", "LSGD", "EASGD", "LSGD-messages"],
)
def test_torch_s_own_table(
    method: Any, options: dict[str, Any], shared: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal to torch alone, or refused with the reason when it is wrapped. (EASGD's centre lags behind, and pulls.)"""
    topo = Topology(shared=shared)
    equal, refused, errors = 0, [], []
    for info in optim_db:
        for setting in info.optim_inputs_func(device="cpu"):
            label = f"{info.optim_cls.__name__}, {setting.desc}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's about its own settings
                if label not in ALONE:
                    ALONE[label] = trained(info, setting.kwargs, lambda inner: inner)
                expected = ALONE[label]
                try:
                    found = trained(
                        info, setting.kwargs, lambda inner: method(inner, topo, period=2, **options)
                    )
                except ValueError as refusal:
                    refused.append(f"{label}: {refusal}")
                    continue
                except (TypeError, RuntimeError) as error:
                    errors.append(f"{label}: {type(error).__name__}: {error}")
                    continue
            if torch.allclose(found, expected, rtol=1e-9, atol=1e-12):
                equal += 1
            else:
                errors.append(f"{label}: differs by {float((found - expected).abs().max()):.1e}")
    topo.free()
    if WORLD.rank == 0:
        with capsys.disabled():
            total = equal + len(refused) + len(errors)
            print(f"\n{method.__name__}: {equal} of {total} settings as torch alone, {len(refused)} refused")
            print("".join(f"  refused: {line}\n" for line in refused), end="")
    check_together(errors)
