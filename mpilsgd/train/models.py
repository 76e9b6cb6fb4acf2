"""The models of the command line. Each takes (channels, height, width) and the number of classes.

`build` lays convolutional weights, and so the images between layers, channels last: processors are fastest with that.
Pooling comes before rectifying: the two commute, gradients too, and a quarter of the values is left to rectify.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from mpilsgd.train import networks
from mpilsgd.train.callables import InputError, accepted, check_call, is_path, names_any, resolve
from mpilsgd.train.networks import Shape, image

CLASSES_UNKNOWN = (
    "how many classes are there? Give --classes N, or the training set an attribute `classes`, or (inputs, labels) "
    "tensors in its place"
)


def mlp(input_shape: Shape, classes: int) -> nn.Sequential:
    """Two hidden layers of 256 rectified units; any input shape."""
    inputs = math.prod(input_shape)
    hidden = [nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, classes))


def lenet(input_shape: Shape, classes: int) -> nn.Sequential:
    """LeNet in the size usual for MNIST: convolutions of 20 and 50 5 x 5 filters, each pooled, and 500 hidden units."""
    channels, height, width = image(input_shape, "lenet", least=16)
    features = 50 * _pooled(height, 5, 5) * _pooled(width, 5, 5)
    return nn.Sequential(
        *(nn.Conv2d(channels, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(features, 500), nn.ReLU(), nn.Linear(500, classes)),
    )


def cnn7(input_shape: Shape, classes: int) -> nn.Sequential:
    """The seven-layer network of the EASGD thesis, 4.1, and of LSGD's experiments; biases start at zero.

    (3,28,28) -C,R 5x5-> (64,24,24) -P-> (64,12,12) -C,R 5x5-> (128,8,8) -P-> (128,4,4) -C,R 3x3-> (64,2,2)
    -L,R,D-> 256 -L,S-> 10 (the softmax is in the loss). Other input sizes change the first linear layer only.
    """
    channels, height, width = image(input_shape, "cnn7", least=24)
    features = 64 * (_pooled(height, 5, 5) - 2) * (_pooled(width, 5, 5) - 2)
    model = nn.Sequential(
        *(nn.Conv2d(channels, 64, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(64, 128, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(128, 64, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(features, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes)),
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


class ResNet20(nn.Module):
    """The 20-layer residual network for CIFAR-10 with parameter-free shortcuts.

    Source: He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, 2015, 4.2 (n = 3, option A).
    """

    def __init__(self, input_shape: Shape, classes: int):
        super().__init__()
        channels, _, _ = image(input_shape, "resnet20", least=8)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        widths = [(16, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in widths))
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class _Block(nn.Module):
    """x + two convolutions of x; where the width doubles, x is subsampled and filled up with zero channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stride = outputs // inputs
        self.added = outputs - inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.added:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return functional.relu(x + y)


class GPT(nn.Module):
    """A small language model: 4 layers of 4 heads and width 128, about 0.8 million parameters.

    (batch, length) tokens -> (batch, classes, length) scores of the token that follows each. Any length to that of the
    input shape.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (layer norms before each part).
    """

    def __init__(self, input_shape: Shape, classes: int, width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        if len(input_shape) != 1:
            shape = " x ".join(map(str, input_shape))
            raise InputError(f"gpt reads texts (--data charlm or FILE.txt); the data has inputs of {shape}")
        self.token = nn.Embedding(classes, width)
        self.place = nn.Embedding(input_shape[0], width)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:  # what is added to the stream of all layers begins smaller
                out = name.endswith(("joined.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if out else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.layers(self.token(tokens) + self.place(places))
        return self.head(self.norm(x)).transpose(1, 2)


class _Layer(nn.Module):
    """x + attention of x to what comes before, then x + two linear layers of x."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.queries(self.first(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.joined(found.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.second(x))))


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": mlp,
    "lenet": lenet,
    "cnn7": cnn7,
    "resnet20": ResNet20,
    "vgg16": networks.vgg16,
    "resnet18": networks.resnet18,
    "resnet50": networks.resnet50,
    "cifar_lowrank": networks.cifar_lowrank,
    "imagenet11": networks.imagenet11,
    "gpt": GPT,
}


def build(name: str, input_shape: Shape | None, classes: int | None, seed: int = 0) -> nn.Module:
    """A model of `MODELS`, or of the user's `package.module:callable`; the seed fixes its initial parameters.

    The user's callable is given `input_shape` and `classes` (or `num_classes`) if it takes arguments of these names,
    or both by position if it takes two others.

    Args:
        input_shape: of a sample; None: it is no tensor.
        classes: numbers that it is to give a sample; None: not known, which only some models mind.

    Raises:
        InputError: the model does not fit the data, or the callable does not return a Module.
    """
    torch.manual_seed(seed)
    if not is_path(name):
        if input_shape is None:
            raise InputError(f"{name} needs inputs that are tensors; for others give a model of your own")
        if classes is None:
            raise InputError(f"{name}: {CLASSES_UNKNOWN}")
        return convert_conv2d_weight_memory_format(MODELS[name](input_shape, classes), torch.channels_last)
    function = resolve(name)
    offered = {"input_shape": input_shape, "classes": classes, "num_classes": classes}
    named = accepted(function, offered)
    if len(named) == len(offered):  # **kwargs: one name for a thing
        named.pop("num_classes")
    by_position = () if named else _positional(function, (input_shape, classes))
    if classes is None and (by_position or names_any(function, "classes", "num_classes")):
        raise InputError(f"{name}: {CLASSES_UNKNOWN}")
    told = ["input_shape", "classes"] if by_position else []
    check_call(name, function, told, named, offered)
    model = function(*by_position, **named)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must return a torch.nn.Module, not {type(model).__name__}")
    return model


def _positional(function: Callable[..., nn.Module], offered: tuple[Any, Any]) -> tuple[Any, ...]:
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return (
        offered
        if len([p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) == 2
        else ()
    )


def _pooled(size: int, *kernels: int) -> int:
    """The edge that is left after a convolution and 2 x 2 pooling for each kernel size."""
    for kernel in kernels:
        size = (size - kernel + 1) // 2
    return size
