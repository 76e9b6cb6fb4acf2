"""The deep figures of the thesis, chapter 6: a tree of 256 leaves and 17 inner nodes, on machines of 16 cores."""

from __future__ import annotations

from mpilsgd.reproduce.curves import Check, best, diverges, error
from mpilsgd.reproduce.deep import ELASTIC, Deep
from mpilsgd.reproduce.training import Training


def _tree(scheme: str, periods: tuple[int, int], momentum: float, lr: float, batch: int = 16) -> Training:
    names = ("--period", "--upper_period") if scheme == "multi-scale" else ("--up_period", "--down_period")
    often = " ".join(f"{name} {period}" for name, period in zip(names, periods, strict=True))
    method = (
        f"--method EASGDTree --degree 16 --scheme {scheme} {often} --optimizer MSGD --momentum {momentum:g}"
    )
    which = "first" if scheme == "multi-scale" else "second"
    return _lowrank(f"EASGD Tree, {which} scheme, {momentum:g}", 273, f"{method} --lr {lr:g}", batch)


def _lowrank(label: str, workers: int, method: str, batch: int = 16) -> Training:
    data = f"--data cifar10 --augment none --sampling replacement --batch_size {batch} --weight_decay 0.0001"
    seconds = 0.01 if batch == 1 else 0.13  # the thesis' CPUs
    cluster = f"--nodes {-(-workers // 18)} --bandwidth 1.25G --compute {seconds}:0.1"
    return Training(label, workers, f"{method} --model cifar_lowrank {data}", cluster)


def _thesis_6() -> list[Deep]:
    short, up_down = ("multi-scale", (1, 10)), ("up-down", (1, 10))
    rates = {0.0: 0.05, 0.9: 0.005, 0.99: 0.0005}
    first = [_tree(*short, momentum, lr) for momentum, lr in rates.items()]
    second = [_tree(*up_down, momentum, lr) for momentum, lr in rates.items()]
    alone1 = _tree("multi-scale", (10, 100), 0.0, 0.005, 1)
    alone2 = _tree("up-down", (8, 80), 0.0, 0.005, 1)

    def least(of: Training, paper: float) -> tuple[str, str, Check]:
        return ("least test error, %", f"{paper:g}", error(of.label, paper))

    def unstable(of: Training, paper: str) -> tuple[str, str, Check]:
        return ("runs that diverge", paper, diverges(of.label))

    labels = [one.label for one in (*first, *second)]
    schemes = [("second scheme against first", "better test error", best(labels[4], labels[1]))]
    rest = [
        _lowrank("DOWNPOUR, p = 16", 16, "--method Downpour --period 1 --lr 0.005"),
        _lowrank("EASGD, p = 16", 16, f"{ELASTIC} --period 10 --lr 0.05"),
    ]
    compared = [("best test error", "EASGD Tree", best(labels[3], *(one.label for one in rest)))]
    cases: list[tuple[str, str, list[tuple[str, str, Check]], list[Training]]] = [
        ("3", "first scheme, 10 and 100", [least(alone1, 16.86), unstable(alone1, "5 of 6")], [alone1]),
        ("4", "second scheme, 8 and 80", [least(alone2, 15.32), unstable(alone2, "1 of 6")], [alone2]),
        ("5", "first scheme, momentum 0", [unstable(first[0], "3 of 6")], first[:1]),
        ("6", "first scheme, momentum .9", [unstable(first[1], "none")], first[1:2]),
        ("7", "first scheme, momentum .99", [unstable(first[2], "none")], first[2:]),
        (
            "8",
            "second scheme, momentum 0",
            [least(second[0], 15.4), unstable(second[0], "2 of 6")],
            second[:1],
        ),
        ("9", "second scheme, momentum .9", [least(second[1], 14.91)], second[1:2]),
        ("10", "second scheme, momentum .99", [least(second[2], 14.91)], second[2:]),
        ("11", "both schemes", schemes, [*first, *second]),
        ("12", "DOWNPOUR, EASGD, EASGD Tree", compared, [second[0], *rest]),
    ]
    return [Deep(f"fig6.{k}", f"EASGD Tree, {title}", says, runs) for k, title, says, runs in cases]


ENTRIES = [one.entry("thesis", "thesis") for one in _thesis_6()]
