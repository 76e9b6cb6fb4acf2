"""The deep figures of Zhang and Li."""

from __future__ import annotations

from mpilsgd.reproduce.curves import rising
from mpilsgd.reproduce.deep import Deep
from mpilsgd.reproduce.training import Training
from mpilsgd.train.judged import LOSS


def _zhang_li() -> list[Deep]:
    lenet = "--model lenet --data mnist --batch_size 128 --lr 0.1"
    # equal rounds: a hundredth of the steps for T = 1
    periods = [
        Training(
            f"m = {m}, T = {t}",
            m,
            f"--method LocalSGD --period {t} {lenet}",
            "--compute 0.01",
            60_000,
            t / 100,
        )
        for m in (5, 10)
        for t in (1, 10, 100)
    ]
    names = [one.label for one in periods]
    better = [
        (
            f"least test loss after the same rounds, m = {m}",
            "better with larger T",
            rising(*of[::-1], of=LOSS),
        )
        for m, of in ((5, names[:3]), (10, names[3:]))
    ]
    resnet = "--method LocalSGD --period 100 --model resnet18 --data cifar10 --batch_size 100 --lr 0.1"
    ten = Training("m = 10, T = 100", 10, resnet, "--compute 0.1")
    whole = "whole gradients of 1000 images"
    return [
        Deep(
            "fig4b", "ResNet-18 on CIFAR-10", [("loss", "faster for larger T", whole)], [ten], lacking=whole
        ),
        Deep("fig8", "LeNet on all of MNIST", better, periods, "mnist", figure=LOSS),
    ]


ENTRIES = [one.entry("zhang-li", "Zhang and Li") for one in _zhang_li()]
