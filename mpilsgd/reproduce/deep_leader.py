"""The deep figures of Leader SGD: nodes of four GPUs on an Ethernet, here of 1 Gbit/s.

EAMSGD, beside them, is not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpilsgd.reproduce.curves import Check, all_lead, best, fastest, speed_up
from mpilsgd.reproduce.deep import CNN7, IMAGENET, Deep, nodes
from mpilsgd.reproduce.training import Training
from mpilsgd.train.judged import LOSS


def _leaders(model: str, seconds: float, sizes: Sequence[int], lr: float, pushed: float) -> list[Training]:
    """LSGD, EASGD and DOWNPOUR (learning rate `pushed` with 4 workers, a fifth with 16), EAMSGD, and SGD alone."""
    found = []
    for p in sizes:
        cluster = f"--nodes {nodes(p)} --bandwidth 125M --latency 5e-5 --compute {seconds:g}:0.1"
        one = "--global_pull 0 " if p == 4 else ""
        methods = {
            "LSGD": f"--method LSGD --pull 0.1 {one}--period 64 --global_period 128 --loss_window 10 --lr {lr:g}",
            "EASGD": f"--method EASGD --center_rate 0.43 --period 64 --lr {lr:g}",
            "DOWNPOUR": f"--method Downpour --period 1 --lr {pushed if p == 4 else pushed / 5:g}",
        }
        momentum = f"--optimizer MSGD --momentum 0.9 --lr {lr / 10:g}"
        methods["EAMSGD"] = f"--method EASGD --center_rate 0.9 --period 64 {momentum}"
        found += [
            Training(f"{name}, {p} workers", p, f"{method} {model}", cluster)
            for name, method in methods.items()
        ]
    return [
        *found,
        Training("SGD", 1, f"--method AllreduceSGD --lr {lr:g} {model}", f"--compute {seconds:g}:0.1"),
    ]


def _lsgd() -> list[Deep]:
    four, sixteen = ([f"{name}, {p} workers" for name in ("LSGD", "EASGD", "DOWNPOUR")] for p in (4, 16))
    residual = "--model resnet20 --data cifar10 --batch_size 128 --weight_decay 0.0001 --lr_drops [{half}]"
    vgg = "--model vgg16 --augment pad --data cifar10 --batch_size 128 --weight_decay 0.0001 --lr_drops [{half}]"
    resnet50 = "--model resnet50 --data FOLDER --batch_size 32 --weight_decay 0.0001 --lr_drops 30,60"
    trained = {
        "cnn7": _leaders(CNN7, 0.03, (4, 16), 0.1, 0.05),
        "vgg16": _leaders(vgg, 0.08, (4,), 0.1, 0.05),
        "resnet20": _leaders(residual, 0.05, (4, 16), 0.1, 0.05),
        "resnet50": [
            replace(one, options=one.options.replace("_window 10", "_window 64"), images=IMAGENET)
            for one in _leaders(resnet50, 0.25, (4,), 0.2, 0.1)[:3]
        ],
    }
    first = ("4 workers: first to an error", "LSGD", fastest(*four, "SGD"))
    first16 = ("16 workers: first to an error", "LSGD", fastest(*sixteen, "SGD"))
    least, least16 = (f"{p} workers: least test error" for p in (4, 16))

    def ratio(p: int, said: str, low: float, high: float) -> tuple[str, str, Check]:
        check = speed_up(f"EASGD, {p} workers", f"LSGD, {p} workers", low, high)
        return (f"EASGD's time over LSGD's, {p} workers", said, check)

    cnn7 = [first, first16, ratio(16, "1.5", 1.05, 1.95), (least16, "LSGD", best(*sixteen))]
    vgg16 = [
        ratio(4, "marginally more than 1", 1.0, 1.2),
        ("first to an error", "LSGD, before DOWNPOUR", fastest(four[0], four[2])),
    ]
    resnet20 = [
        ratio(4, "about 1", 0.8, 1.25),
        (least, "LSGD", best(*four)),
        first16,
        ratio(16, "2", 1.4, 2.6),
        (least16, "LSGD", best(*sixteen)),
    ]
    led = [("leads", "every worker", all_lead(four[0], 4))]
    loss = [("test loss", "as drawn", "the text states nothing of it")]
    imagenet = [("time", "as EASGD, before DOWNPOUR", "ImageNet")]
    return [
        Deep("fig2", "CNN7 on CIFAR-10", cnn7, trained["cnn7"]),
        Deep("fig3", "VGG16 on CIFAR-10", vgg16, trained["vgg16"]),
        Deep("fig4", "ResNet20 on CIFAR-10", resnet20, trained["resnet20"]),
        Deep("fig5", "who leads, ResNet20", led, trained["resnet20"][:1]),
        Deep("fig6", "ResNet50 on ImageNet", imagenet, trained["resnet50"], lacking="ImageNet"),
        Deep("fig9", "CNN7, test loss", loss, trained["cnn7"], figure=LOSS),
        Deep("fig10", "ResNet20, test loss", loss, trained["resnet20"], figure=LOSS),
        Deep("fig11", "VGG16, test loss", loss, trained["vgg16"], figure=LOSS),
        Deep("fig12", "ResNet50, test loss", loss, trained["resnet50"], lacking="ImageNet", figure=LOSS),
    ]


ENTRIES = [one.entry("lsgd", "LSGD") for one in _lsgd()]
