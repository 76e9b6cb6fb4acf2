"""The papers' larger networks for images: each takes (channels, height, width) and the number of classes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mpilsgd.train.callables import InputError

Shape = tuple[int, ...]
_SMALL = 64  # images of fewer pixels a side keep their size in the first layer


def image(input_shape: Shape, model: str, least: int) -> tuple[int, int, int]:
    """Channels, height and width; an InputError, if they are no image of that size."""
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        shape = " x ".join(map(str, input_shape))
        raise InputError(f"{model} needs images of at least {least} x {least} pixels; the data has {shape}")
    channels, height, width = input_shape
    return channels, height, width


def vgg16(input_shape: Shape, classes: int) -> nn.Sequential:
    """VGG16 with batch normalisation. Small images get linear layers of 512 in place of 4096 units.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, 2015, configuration D; LSGD 4.2 trains it on
    CIFAR-10, for which neither paper gives the linear layers.
    """
    channels, height, width = image(input_shape, "vgg16", least=32)
    layers: list[nn.Module] = []
    for convolutions, outputs in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    units = 512 if min(height, width) < _SMALL else 4096
    features = 512 * (height // 32) * (width // 32)
    hidden = [
        *(nn.Flatten(), nn.Linear(features, units), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(units, units), nn.ReLU(), nn.Dropout(0.5)),
    ]
    return _he(nn.Sequential(*layers, *hidden, nn.Linear(units, classes)))


def imagenet11(input_shape: Shape, classes: int) -> nn.Sequential:
    """The 11-layer network of the EASGD thesis for ImageNet, 4.1.

    (3,221,221) -C,R 7x7/2-> (96,108,108) -P 3/3-> (96,36,36) -C,R 5x5-> (256,32,32) -P-> (256,16,16)
    -C,R 3x3-> (384,14,14) -C,R 2x2-> (384,13,13) -C,R 2x2-> (256,12,12) -P-> (256,6,6) -L,R,D-> 4096 -L,R,D-> 4096
    -L,S-> 1000. Images of 224 x 224 lead to the same sizes from (96,36,36) on.
    """
    channels, height, width = image(input_shape, "imagenet11", least=64)
    edges = [((((n - 7) // 2 + 1) // 3 - 4) // 2 - 4) // 2 for n in (height, width)]
    return nn.Sequential(
        *(nn.Conv2d(channels, 96, 7, stride=2), nn.MaxPool2d(3), nn.ReLU()),
        *(nn.Conv2d(96, 256, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(256, 384, 3), nn.ReLU()),
        *(nn.Conv2d(384, 384, 2), nn.ReLU(), nn.Conv2d(384, 256, 2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256 * edges[0] * edges[1], 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4096, classes)),
    )


def cifar_lowrank(input_shape: Shape, classes: int) -> nn.Sequential:
    """The network of the EASGD thesis, 6.3: every 5 x 5 convolution is one of 5 x 1 and one of 1 x 5.

    (3,32,32) -C-> (10,32,32) -C,R-> (96,32,32) -P-> (96,16,16) -C-> (51,16,16) -C,R-> (128,16,16) -P-> (128,8,8)
    -C-> (51,8,8) -C,R-> (256,8,8) -P-> (256,4,4) -C,R 1x1-> (64,4,4) -D,L,R-> 256 -D,L,S-> 10

    Source: Tai, Xiao, Wang and E, Convolutional neural networks with low-rank regularization, 2016.
    """
    channels, height, width = image(input_shape, "cifar_lowrank", least=8)
    layers: list[nn.Module] = []
    for rank, outputs in ((10, 96), (51, 128), (51, 256)):
        layers += [
            *(
                nn.Conv2d(channels, rank, (5, 1), padding=(2, 0)),
                nn.Conv2d(rank, outputs, (1, 5), padding=(0, 2)),
            ),
            *(nn.MaxPool2d(2), nn.ReLU()),
        ]
        channels = outputs
    features = 64 * (height // 8) * (width // 8)
    return nn.Sequential(
        *(*layers, nn.Conv2d(256, 64, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(features, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes)),
    )


def resnet18(input_shape: Shape, classes: int) -> nn.Sequential:
    """ResNet-18. Small images are not made smaller by the first layers: 3 x 3 filters, no pooling.

    Source: He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, 2015, Table 1, option B.
    """
    return _resnet(image(input_shape, "resnet18", least=8), classes, (2, 2, 2, 2), narrow=1)


def resnet50(input_shape: Shape, classes: int) -> nn.Sequential:
    """ResNet-50, whose blocks are 1 x 1, 3 x 3 and 1 x 1 convolutions; otherwise as `resnet18`."""
    return _resnet(image(input_shape, "resnet50", least=8), classes, (3, 4, 6, 3), narrow=4)


def _resnet(shape: tuple[int, int, int], classes: int, counts: tuple[int, ...], narrow: int) -> nn.Sequential:
    channels, height, width = shape
    if min(height, width) < _SMALL:
        first: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1, bias=False)]
    else:
        first = [nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)]
    first += [nn.BatchNorm2d(64), nn.ReLU()]
    first += [] if min(height, width) < _SMALL else [nn.MaxPool2d(3, 2, 1)]
    blocks, inputs = [], 64
    for stage, count in enumerate(counts):
        for block in range(count):
            outputs = 64 * 2**stage * narrow
            blocks.append(_Block(inputs, outputs, narrow, 2 if stage and not block else 1))
            inputs = outputs
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
    return _he(nn.Sequential(*first, *blocks, *head))


class _Block(nn.Module):
    """x + its convolutions; x goes through one of 1 x 1 where the shape changes.

    narrow: 1: two of 3 x 3; 4: 1 x 1, 3 x 3 and 1 x 1, those inside a quarter as wide.
    """

    def __init__(self, inputs: int, outputs: int, narrow: int, stride: int):
        super().__init__()
        inner = outputs // narrow
        parts = [(inputs, inner, 3, stride), (inner, outputs, 3, 1)]
        if narrow > 1:
            parts = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)]
        layers = [layer for part in parts for layer in (*_normed(*part), nn.ReLU())]
        self.convolutions = nn.Sequential(*layers[:-1])
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Sequential(*_normed(inputs, outputs, 1, stride)) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.shortcut(x) + self.convolutions(x))


def _normed(inputs: int, outputs: int, edge: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, edge, stride, edge // 2, bias=False), nn.BatchNorm2d(outputs)


def _he(model: nn.Sequential) -> nn.Sequential:
    """Convolutions begin as He et al., Delving Deep into Rectifiers, 2015, have them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
