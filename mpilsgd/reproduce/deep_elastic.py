"""The deep figures of the thesis, chapter 4: nodes of four GPUs on an InfiniBand; 0.03 s a step of CNN7 (Table 4.4)."""

from __future__ import annotations

from mpilsgd.reproduce.curves import (
    alike,
    best,
    both,
    communicates,
    fastest,
    keeps_up,
    rising,
    speed_up,
    trapped,
)
from mpilsgd.reproduce.deep import CNN7, ELASTIC, IMAGENET, Deep, nodes
from mpilsgd.reproduce.training import Training

_NESTEROV = "--optimizer MSGD --momentum 0.99"


def _easgd(p: int, period: int, lr: float = 0.05, label: str = "EASGD") -> Training:
    return _thesis(label, p, f"{ELASTIC} --period {period} --lr {lr:g}")


def _eamsgd(p: int, period: int, lr: float = 0.005, label: str = "EAMSGD") -> Training:
    return _thesis(label, p, f"{ELASTIC} --period {period} {_NESTEROV} --lr {lr:g}")


def _mdownpour(p: int) -> Training:
    return _thesis("MDOWNPOUR", p, "--method Downpour --period 1 --method_momentum 0.99 --lr 0.00005")


def _downpour(p: int, period: int = 1, label: str = "DOWNPOUR") -> Training:
    return _thesis(label, p, f"--method Downpour --period {period} --lr 0.005")


def _thesis(label: str, p: int, options: str) -> Training:
    cluster = f"--nodes {nodes(p)} --bandwidth 5G --latency 2e-6 --compute 0.03:0.1"
    return Training(label, p, f"{options} {CNN7}", cluster)


def _alone() -> list[Training]:
    one = "--method AllreduceSGD"
    return [
        _thesis("SGD", 1, f"{one} --lr 0.05"),
        _thesis("ASGD", 1, f"{one} --lr 0.05 --running_average running"),
        _thesis("MVASGD", 1, f"{one} --lr 0.05 --running_average 0.001"),
        _thesis("MSGD", 1, f"{one} --lr 0.001 {_NESTEROV}"),
    ]


def _periods(period: int) -> list[Training]:
    """All methods of Fig. 4.1 to 4.4."""
    pushing = f"--method Downpour --period {period} --lr 0.005"
    found = [
        _easgd(4, period),
        _eamsgd(4, period),
        _downpour(4, period),
        _thesis("ADOWNPOUR", 4, f"{pushing} --average running"),
        _thesis("MVADOWNPOUR", 4, f"{pushing} --average 0.001"),
    ]
    if period == 1:
        found.append(_mdownpour(4))
    return [*found, *_alone()]


def _thesis_4() -> list[Deep]:
    found = []
    for k, period in ((1, 1), (2, 4), (3, 16), (4, 64)):
        trainings = _periods(period)
        others = [one.label for one in trainings if one.label != "EAMSGD"]
        ahead = both(fastest("EAMSGD", *others), best("EAMSGD", *others))
        kin = ("DOWNPOUR", "ADOWNPOUR", "MVADOWNPOUR")
        calm = ("DOWNPOUR and its kin", "unstable", trapped("EASGD", *kin))
        if period < 16:
            calm = ("DOWNPOUR and its kin", "at their best", keeps_up("EASGD", *kin))
        says = [("EAMSGD", "fastest, best test error", ahead), calm]
        found.append(Deep(f"fig4.{k}", f"CNN7 on CIFAR-10, period {period}", says, trainings))
    for k, p in ((5, 4), (6, 8), (7, 16)):
        trainings = [_easgd(p, 10), _eamsgd(p, 10), _downpour(p), _mdownpour(p), *_alone()]
        others = [one.label for one in trainings if one.label != "EAMSGD"]
        says = [("EAMSGD", "fastest", fastest("EAMSGD", *others))]
        if p == 16:
            says += [
                ("EAMSGD's speed-up over MSGD to 21 %", "11.1", speed_up("MSGD", "EAMSGD", 7.8, 14.4, 0.21))
            ]
        found.append(Deep(f"fig4.{k}", f"CNN7 on CIFAR-10, {p} workers", says, trainings))
    rates = [_eamsgd(16, 10, lr, f"EAMSGD, {lr:g}") for lr in (0.01, 0.005, 0.001)]
    rates += [_easgd(16, 10, lr, f"EASGD, {lr:g}") for lr in (0.05, 0.01, 0.005)]
    names = [one.label for one in rates]
    larger_help = [
        ("EAMSGD: larger rates", "help", rising(*names[:3])),
        ("EASGD: larger rates", "hurt", rising(*reversed(names[3:]))),
    ]
    taus = (1, 10, 100, 1000)
    long = [_eamsgd(16, t, 0.01, f"EAMSGD, {t}") for t in taus[:3]] + [
        _easgd(16, t, 0.01, f"EASGD, {t}") for t in taus
    ]
    stuck = [
        ("EAMSGD at period 100", "trapped", trapped("EAMSGD, 10", "EAMSGD, 100")),
        ("EASGD, periods 1 to 1000", "alike", alike(*(f"EASGD, {t}" for t in taus))),
    ]
    ps = (4, 8, 16)
    makes = {"EASGD": _easgd, "EAMSGD": _eamsgd}
    times = [make(p, 10, label=f"{name}, p = {p}") for p in ps for name, make in makes.items()]
    times += [_downpour(p, label=f"DOWNPOUR, p = {p}") for p in ps]
    each = [fastest(f"EAMSGD, p = {p}", f"EASGD, p = {p}", f"DOWNPOUR, p = {p}") for p in ps]
    falls = rising(*(f"EAMSGD, p = {p}" for p in reversed(ps)))
    levels = [
        ("EAMSGD, 4, 8 and 16 workers", "fastest", both(*each)),
        ("EAMSGD's least test error", "falls with p", falls),
    ]
    seconds = [
        ("communication, DOWNPOUR, period 1", "9", communicates("DOWNPOUR", 9)),
        ("communication, EASGD, period 10", "1", communicates("EASGD", 1)),
    ]
    close = ("ASGD against MSGD", "close", alike("ASGD", "MSGD"))
    return [
        *found,
        *_imagenet_4(),
        Deep("fig4.10", "SGD, ASGD, MVASGD, MSGD alone on CIFAR-10", [close], _alone()),
        Deep("fig4.12", "learning rates, 16 workers", larger_help, rates),
        Deep("fig4.13", "periods, 16 workers", stuck, long),
        Deep("fig4.14", "time to a test error", levels, times),
        Deep("table4.4", "seconds of 400 steps, p = 16", seconds, [_downpour(16), _easgd(16, 10)]),
    ]


def _imagenet_4() -> list[Deep]:
    model = "--model imagenet11 --data FOLDER --batch_size 128 --weight_decay 0.00001"

    def trainings(p: int) -> list[Training]:
        cluster = f"--nodes {nodes(p)} --bandwidth 5G --latency 2e-6 --compute 1.2"
        options = {
            "EAMSGD": f"{ELASTIC} --period 10 {_NESTEROV} --lr 0.001",
            "EASGD": f"{ELASTIC} --period 10 --lr 0.1",
            "DOWNPOUR": f"--method Downpour --period 1 --lr {0.08 / p:g}",
        }
        found = [Training(name, p, f"{own} {model}", cluster, IMAGENET) for name, own in options.items()]
        alone = f"--method AllreduceSGD --lr 0.0005 {_NESTEROV} {model}"
        return [*found, Training("MSGD", 1, alone, "--compute 1.2", IMAGENET)]

    def figure(k: int, title: str, what: str, paper: str, trained: list[Training]) -> Deep:
        return Deep(f"fig4.{k}", title, [(what, paper, "ImageNet")], trained, lacking="ImageNet")

    eleven, alone = "11-layer network on ImageNet", "SGD, ASGD, MVASGD, MSGD alone on ImageNet"
    return [
        figure(8, f"{eleven}, 4 workers", "EAMSGD", "fastest", trainings(4)),
        figure(9, f"{eleven}, 8 workers", "EAMSGD's speed-up over DOWNPOUR to 49 %", "1.8", trainings(8)),
        figure(11, alone, "ASGD against MVASGD", "striking difference", trainings(4)[3:]),
        figure(15, "time to 49, 47, 45, 43 % on ImageNet", "all", "faster than MSGD", trainings(8)),
    ]


ENTRIES = [one.entry("thesis", "thesis") for one in _thesis_4()]
