"""The figures that train deep networks on whole data sets: each names the job that does it.

The numbers are those of the papers' text. `--passes` sets how long the jobs train. The pictures of these figures are
what `mpilsgd report RUN...` draws of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpilsgd.reproduce.judge import larger
from mpilsgd.reproduce.registry import Options, Reproduction, Result

_CNN7 = "jobs/cnn7-cifar10.yaml"
_RESNET20 = "jobs/resnet20-cifar10.yaml"
_EAMSGD = "jobs/eamsgd-cifar10.yaml"
_LENET = "jobs/lenet-mnist.yaml"
_IMAGES = "--data FOLDER"  # ImageNet's, with train/CLASS/ and val/CLASS/


@dataclass(frozen=True)
class _Deep:
    """One figure: what the text says of it, and the jobs; {} in a job stands for --epochs N --data_dir DIR."""

    name: str
    title: str
    says: Sequence[tuple[str, str]]  # quantity, the paper's
    jobs: str
    needs: str = ""  # what is not in this package


def _job(file: str, ranks: int, *more: str) -> str:
    return " ".join([f"mpiexec -n {ranks} mpilsgd train {file}", *more, "{}"])


_BESIDE_LSGD = (
    "; and with --method EASGD --center_rate 0.43, with --method Downpour --period 1, and on one rank with --method "
    "AllreduceSGD"
)
_THESIS = (
    "; and with --optimizer SGD --momentum 0, with --method Downpour --period 1, with --method_momentum 0.99, "
    "--average running or 0.001 beside it"
)
_ERROR = [("test error of the centre over time", "LSGD ahead of EASGD, DOWNPOUR, SGD")]
_LOSS = [("test loss of the centre over time", "as the test error")]
_16 = "; and on 16 ranks with --group_size 4 --global_period 128"
_VGG = _job(_RESNET20, 4, "--model vgg16", "--augment pad", "--lr_drops [80,120]") + _BESIDE_LSGD
_IMAGENET = _job(_RESNET20, 4, "--model resnet50", _IMAGES, "--batch_size 32 --lr 0.2 --loss_window 64")
_ELEVEN = _job(_EAMSGD, 8, "--model imagenet11", _IMAGES, "--period 10 --lr 0.001") + _THESIS


def _lsgd() -> list[_Deep]:
    cnn7 = _job(_CNN7, 4) + _16 + _BESIDE_LSGD
    resnet = _job(_RESNET20, 4) + _16 + _BESIDE_LSGD
    imagenet = "ImageNet"
    return [
        _Deep("fig2", "CNN7 on CIFAR-10", [*_ERROR, ("EASGD's time over LSGD's, 16 workers", "1.5")], cnn7),
        _Deep("fig3", "VGG16 on CIFAR-10", [("time over EASGD's", "marginally faster")], _VGG),
        _Deep(
            "fig4", "ResNet20 on CIFAR-10", [*_ERROR, ("EASGD's time over LSGD's, 16 workers", "2")], resnet
        ),
        _Deep("fig5", "who leads, ResNet20", [("workers that lead", "all of them")], _job(_RESNET20, 4)),
        _Deep(
            "fig6", "ResNet50 on ImageNet", [("time", "as EASGD, faster than DOWNPOUR")], _IMAGENET, imagenet
        ),
        _Deep("fig9", "CNN7, test loss", _LOSS, cnn7),
        _Deep("fig10", "ResNet20, test loss", _LOSS, resnet),
        _Deep("fig11", "VGG16, test loss", _LOSS, _VGG),
        _Deep("fig12", "ResNet50, test loss", _LOSS, _IMAGENET, imagenet),
    ]


def _thesis_4() -> list[_Deep]:
    eleven = "ImageNet"
    found = [
        _Deep(
            f"fig4.{k}",
            f"CNN7 on CIFAR-10, period {period}",
            [
                ("EAMSGD", "fastest, best test error"),
                ("DOWNPOUR and its kin", "best for small periods" if period < 16 else "unstable"),
            ],
            _job(_EAMSGD, 4, f"--period {period}") + _THESIS,
        )
        for k, period in ((1, 1), (2, 4), (3, 16), (4, 64))
    ]
    for k, workers in ((5, 4), (6, 8), (7, 16)):
        says = [("least test error of EASGD, EAMSGD", "falls with p")]
        says += [("EAMSGD's speed-up over MSGD to 21 %", "11.1")] if workers == 16 else []
        job = _job(_EAMSGD, workers, "--period 10") + _THESIS
        found.append(_Deep(f"fig4.{k}", f"CNN7 on CIFAR-10, {workers} workers", says, job))
    for k, workers in ((8, 4), (9, 8)):
        says = (
            [("EAMSGD's speed-up over DOWNPOUR to 49 %", "1.8")] if workers == 8 else [("EAMSGD", "fastest")]
        )
        found.append(
            _Deep(f"fig4.{k}", f"11-layer network on ImageNet, {workers} workers", says, _ELEVEN, eleven)
        )
    alone = _job(_EAMSGD, 1, "--method AllreduceSGD") + "; and with --running_average where it is set"
    sweep = _job(_EAMSGD, 16, "--period 10 --lr 0.01") + "; and with --lr 0.005, 0.001, and --optimizer SGD"
    periods = (
        _job(_EAMSGD, 16, "--period 100 --lr 0.01") + "; and with --period 1, 10, 1000, and --optimizer SGD"
    )
    times = _job(_EAMSGD, 16, "--period 10") + " on 4, 8, 16 ranks, then mpilsgd report"
    return [
        *found,
        _Deep(
            "fig4.10", "SGD, ASGD, MVASGD, MSGD alone on CIFAR-10", [("ASGD against MSGD", "close")], alone
        ),
        _Deep(
            "fig4.11", "the same on ImageNet", [("ASGD against MVASGD", "striking difference")], alone, eleven
        ),
        _Deep("fig4.12", "learning rates, 16 workers", [("larger rates", "help EAMSGD, hurt EASGD")], sweep),
        _Deep(
            "fig4.13",
            "periods, 16 workers",
            [("EAMSGD at period 100", "trapped"), ("EASGD", "alike")],
            periods,
        ),
        _Deep("fig4.14", "time to 21, 20, 19, 18 %", [("EAMSGD", "fastest at all levels")], times),
        _Deep(
            "fig4.15", "time to 49, 47, 45, 43 % on ImageNet", [("all", "faster than MSGD")], _ELEVEN, eleven
        ),
        _Deep(
            "table4.4",
            "time computing, loading, communicating",
            [
                ("DOWNPOUR, period 1, p = 16, CIFAR, s", "11 / 2 / 9"),
                ("EASGD, period 10, p = 16, CIFAR, s", "12 / 2 / 1"),
            ],
            _job(_EAMSGD, 16, "--period 10")
            + " and with --method Downpour --period 1, then mpilsgd report (its time.png)",
        ),
    ]


def _thesis_6() -> list[_Deep]:
    first, second = "--scheme multi-scale", "--scheme up-down"
    cases = [
        (
            "3",
            "first scheme, 10 and 100",
            f"{first} --period 10 --upper_period 100 --lr 0.005",
            "16.86",
            "5 of 6",
        ),
        (
            "4",
            "second scheme, 8 and 80",
            f"{second} --up_period 8 --down_period 80 --lr 0.005",
            "15.32",
            "1 of 6",
        ),
        ("5", "first scheme, momentum 0", f"{first} --period 1 --upper_period 10 --lr 0.05", "", "3 of 6"),
        ("6", "first scheme, momentum .9", f"{first} --period 1 --upper_period 10 --lr 0.005", "", "none"),
        ("7", "first scheme, momentum .99", f"{first} --period 1 --upper_period 10 --lr 0.0005", "", "none"),
        (
            "8",
            "second scheme, momentum 0",
            f"{second} --up_period 1 --down_period 10 --lr 0.05",
            "15.4",
            "2 of 6",
        ),
        (
            "9",
            "second scheme, momentum .9",
            f"{second} --up_period 1 --down_period 10 --lr 0.005",
            "14.91",
            "",
        ),
        (
            "10",
            "second scheme, momentum .99",
            f"{second} --up_period 1 --down_period 10 --lr 0.0005",
            "14.91",
            "",
        ),
        ("11", "both schemes", f"{second} --up_period 1 --down_period 10 --lr 0.005", "", ""),
        ("12", "DOWNPOUR, EASGD, EASGD Tree", f"{second} --up_period 8 --down_period 80 --lr 0.005", "", ""),
    ]
    found = []
    for k, title, options, error, diverged in cases:
        momentum = next((m for m in ("0.99", "0.9") if title.endswith(m[1:])), "0")
        says = [("least test error, %", error)] if error else []
        says += [("runs that diverge", diverged)] if diverged else []
        says = says or [("first scheme against second", "better training, worse test error")]
        data = f"--augment none --sampling replacement --batch_size {1 if k in '34' else 16}"
        method = f"--method EASGDTree --degree 16 {options} --optimizer MSGD --momentum {momentum}"
        job = _job(_CNN7, 273, "--model cifar_lowrank", data, method)
        found.append(_Deep(f"fig6.{k}", f"EASGD Tree, {title}", says, job))
    return found


def _zhang_li() -> list[_Deep]:
    resnet = _job(_RESNET20, 10, "--model resnet18 --method LocalSGD --period 100 --momentum 0")
    lenet = (
        _job(_LENET, 5, "--method LocalSGD --period 100 --momentum 0")
        + "; and on 10 ranks, and with other periods"
    )
    faster = [("loss over rounds", "falls faster for larger T")]
    return [
        _Deep("fig4b", "ResNet-18 on CIFAR-10", faster, resnet, "whole gradients of 1000 images"),
        _Deep("fig8", "LeNet on all of MNIST", [*faster, ("test loss", "better with larger T")], lenet),
    ]


def _reproduction(prefix: str, paper: str, one: _Deep) -> Reproduction:
    shown = f"{paper}, {one.name.replace('fig', 'Fig. ').replace('table', 'Table ')}"
    return Reproduction(f"{prefix}-{one.name}", shown, one.title, _run(one))


def _run(one: _Deep) -> Callable[[Options], Result]:
    def run(options: Options) -> Result:
        job = one.jobs.replace("{}", f"--epochs {options.passes:g} --data_dir {options.data_dir}")
        lacking = f" (not in this package, give your own: {one.needs})" if one.needs else ""
        whys = [job + lacking, *["the same job"] * (len(one.says) - 1)]
        return Result([larger(what, paper, why) for (what, paper), why in zip(one.says, whys, strict=True)])

    return run


ENTRIES = [
    *(_reproduction("lsgd", "LSGD", one) for one in _lsgd()),
    *(_reproduction("thesis", "thesis", one) for one in [*_thesis_4(), *_thesis_6()]),
    *(_reproduction("zhang-li", "Zhang and Li", one) for one in _zhang_li()),
]
