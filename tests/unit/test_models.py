"""The models: shapes as published, sizes, initial values; the user's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpilsgd.train import networks
from mpilsgd.train.callables import InputError
from mpilsgd.train.models import build


def shapes(
    model: nn.Module, inputs: torch.Tensor, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[int, ...]]:
    """The output shape of every layer of these kinds, without the batch."""
    found: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda _m, _i, output: found.append(tuple(output.shape[1:])))
    model(inputs)
    return found


def test_cnn7_is_the_thesis_network() -> None:
    model = build("cnn7", (3, 28, 28), 10)
    layers = shapes(model, torch.zeros(2, 3, 28, 28), (nn.Conv2d, nn.MaxPool2d, nn.Linear))
    assert layers == [(64, 24, 24), (64, 12, 12), (128, 8, 8), (128, 4, 4), (64, 2, 2), (256,), (10,)]
    assert [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)] == [(5, 5), (5, 5), (3, 3)]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5]
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("weight"))


def test_resnet20_is_he_s() -> None:
    model = build("resnet20", (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    layers = shapes(model, torch.zeros(2, 3, 32, 32), (nn.Conv2d,))
    assert len(layers) == 19 and layers[0] == (16, 32, 32) and layers[-1] == (64, 8, 8)


def test_the_low_rank_network_is_the_thesis_s() -> None:
    model = build("cifar_lowrank", (3, 32, 32), 10)
    layers = shapes(model, torch.zeros(2, 3, 32, 32), (nn.Conv2d, nn.MaxPool2d, nn.Linear))
    assert layers[:5] == [(10, 32, 32), (96, 32, 32), (96, 16, 16), (51, 16, 16), (128, 16, 16)]
    assert layers[5:] == [(128, 8, 8), (51, 8, 8), (256, 8, 8), (256, 4, 4), (64, 4, 4), (256,), (10,)]


def test_the_11_layer_network_is_the_thesis_s() -> None:
    with torch.device("meta"):  # shapes alone
        model = networks.imagenet11((3, 221, 221), 1000)
        layers = shapes(model, torch.zeros(2, 3, 221, 221), (nn.Conv2d, nn.MaxPool2d, nn.Linear))
    assert layers[:4] == [(96, 108, 108), (96, 36, 36), (256, 32, 32), (256, 16, 16)] and len(layers) == 11
    assert layers[4:] == [(384, 14, 14), (384, 13, 13), (256, 12, 12), (256, 6, 6), (4096,), (4096,), (1000,)]


@pytest.mark.parametrize(
    ("make", "shape", "classes", "parameters"),
    [
        (networks.resnet18, (3, 224, 224), 1000, 11_689_512),
        (networks.resnet50, (3, 224, 224), 1000, 25_557_032),
        (networks.vgg16, (3, 224, 224), 1000, 138_365_992),
        (networks.vgg16, (3, 32, 32), 10, 15_253_578),
        (networks.resnet18, (3, 32, 32), 10, 11_173_962),
    ],
)
def test_networks_are_as_large_as_is_known(
    make: Any, shape: tuple[int, ...], classes: int, parameters: int
) -> None:
    with torch.device("meta"):
        model = make(shape, classes)
        assert model(torch.zeros(2, *shape)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_gpt_looks_at_what_comes_before_alone() -> None:
    model = build("gpt", (128,), 97)
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 0.9e6
    tokens = torch.randint(97, (2, 128))
    scores = model(tokens).detach()
    tokens[:, 50] = (tokens[:, 50] + 1) % 97
    changed = (model(tokens) - scores).abs().amax((0, 1))
    assert scores.shape == (2, 97, 128) and changed[:50].max() == 0 and changed[50:].min() > 0
    assert float(torch.nn.functional.cross_entropy(scores, tokens)) == pytest.approx(math.log(97), abs=0.3)


def test_lenet() -> None:
    model = build("lenet", (1, 28, 28), 10)
    layers = shapes(model, torch.zeros(2, 1, 28, 28), (nn.Conv2d, nn.MaxPool2d, nn.Linear))
    assert layers == [(20, 24, 24), (20, 12, 12), (50, 8, 8), (50, 4, 4), (500,), (10,)]
    assert sum(p.numel() for p in model.parameters()) == 431_080


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn7", "resnet20", "cifar_lowrank", "resnet18"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28), (3, 32, 32), (2, 24, 40)])
def test_models_fit_images(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 7)
    scores = model(torch.randn(2, *shape))
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["lenet", "cnn7"])
def test_pooling_and_rectifying_commute(name: str) -> None:
    """The published order, rectified first, is the same function with the same gradients, bit for bit."""
    model = build(name, (3, 28, 28), 10).eval()
    layers = list(model.children())
    for i, layer in enumerate(layers[:-1]):
        if isinstance(layer, nn.MaxPool2d):
            layers[i : i + 2] = reversed(layers[i : i + 2])
    found = []
    for variant in (model, nn.Sequential(*layers)):
        model.zero_grad()
        scores = variant(torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(1)))
        scores.logsumexp(1).sum().backward()
        found.append([scores, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_mlp_takes_any_shape() -> None:
    assert build("mlp", (5,), 3)(torch.zeros(2, 5)).shape == (2, 3)
    assert build("mlp", (1, 8, 8), 3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("name", ["lenet", "cnn7"])
def test_models_that_do_not_fit(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} needs images of at least .* the data has 1 x 8 x 8"):
        build(name, (1, 8, 8), 10)
    with pytest.raises(InputError, match="the data has 64"):
        build(name, (64,), 10)


def test_the_seed_fixes_the_parameters() -> None:
    one, same, other = (
        torch.cat([p.flatten() for p in build("lenet", (1, 28, 28), 10, s).parameters()]) for s in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"users_models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "def named(input_shape, classes, width=4): return torch.nn.Linear(input_shape[0], classes)\n"
        "def torch_style(num_classes): return torch.nn.Linear(5, num_classes)\n"
        "def positional(shape, k): return torch.nn.Linear(shape[0], k)\n"
        "def anything(**options): return torch.nn.Linear(options['input_shape'][0], options['classes'])\n"
        "def nothing(): return torch.nn.Linear(5, 3)\n"
        "def wrong(): return 'a model'\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, input_shape, classes): super().__init__(input_shape[0], classes)\n"
    )
    return name


@pytest.mark.parametrize("function", ["named", "torch_style", "positional", "anything", "nothing", "Net"])
def test_a_user_s_model(module: str, function: str) -> None:
    model = build(f"{module}:{function}", (5,), 3)
    assert model(torch.zeros(2, 5)).shape == (2, 3)


def test_a_user_s_mistakes(module: str) -> None:
    with pytest.raises(InputError, match=r"must return a torch.nn.Module, not str"):
        build(f"{module}:wrong", (5,), 3)
    with pytest.raises(InputError, match=r"cannot import .*AttributeError"):
        build(f"{module}:missing", (5,), 3)
    with pytest.raises(InputError, match=r"cannot import .*ModuleNotFoundError"):
        build("no_such_module:net", (5,), 3)
