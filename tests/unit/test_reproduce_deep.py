"""Figures that train deep networks: their jobs are accepted, `--passes` trains them, and verdicts go by the curves."""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpilsgd import cli
from mpilsgd.reproduce import MissingData, Options, command, curves, entries, judge
from mpilsgd.reproduce.deep import Deep
from mpilsgd.reproduce.registry import Failed
from mpilsgd.reproduce.training import Found, Training, train
from mpilsgd.train import command_line, simulate
from mpilsgd.train.judged import LOSS
from mpilsgd.train.run_reader import Run

FIGURES = {
    name: one.run.__self__
    for name, one in entries().items()
    if isinstance(getattr(one.run, "__self__", None), Deep)
}
DIGITS = "--model mlp --data digits --batch_size 16"


@pytest.mark.parametrize("name", FIGURES)
def test_every_training_is_a_job_and_a_simulation(name: str) -> None:
    for one in FIGURES[name].trainings:
        job = shlex.split(one.job(2, Path("some")).replace("--data FOLDER", "--data cifar10"))
        assert job[:5] == ["mpiexec", "-n", str(one.workers), "mpilsgd", "train"]
        config = command_line.parse(job[5:])
        assert config.steps == round(2 * one.share * one.images / config.batch_size)
        assert config.data_dir == "some"
        call = [word.replace("FOLDER", "cifar10") for word in one.simulation(2, Path("some"), 3)]
        own, rest = simulate._parser().parse_known_args(call[1:])
        assert call[0] == "simulate" and own.workers == one.workers >= own.nodes
        assert command_line.parse(rest).seed == 3


@pytest.mark.parametrize("name", FIGURES)
def test_without_passes_the_job_is_named(name: str) -> None:
    rows = entries()[name].run(Options(data_dir=Path("some"))).rows
    assert rows and all(row.outcome == judge.TOO_LARGE for row in rows)
    assert "mpiexec -n" in rows[0].why and "{" not in rows[0].why and "--data_dir some" in rows[0].why
    assert all(row.why == "the same" for row in rows[1:])


def test_labels_tell_the_trainings_of_a_figure_apart() -> None:
    for name, figure in FIGURES.items():
        labels = [one.label for one in figure.trainings]
        assert len(set(labels)) == len(labels), name
        assert len({(one.workers, one.options) for one in figure.trainings}) == len(labels), name


@pytest.mark.parametrize("name", FIGURES)
def test_checks_name_curves_that_are_there(name: str) -> None:
    """Of runs that learn everything is judged, of runs that have not begun to, no error is."""
    figure = FIGURES[name]
    for errors, outcomes in (([0.5, 0.15], {True, False}), ([0.9, 0.9], {"too few passes"})):
        runs = Found({one.label: _run(errors, figure.figure.key) for one in figure.trainings})
        for what, _, check in figure.says:
            if isinstance(check, str) or what.startswith(("runs that", "communication", "leads")):
                continue
            if errors[0] < curves.LEARNS or figure.figure is not LOSS:
                assert check(runs)[1] in outcomes, what


def test_half_of_the_training_in_epochs_of_all_workers() -> None:
    words = Training("a", 4, "--lr_drops [{half}] --batch_size 100", images=1000).words(3)
    assert words == shlex.split("--lr_drops [6] --batch_size 100 --steps 30 --eval_every '2 steps'")


def test_missing_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingData, match=r"cifar-10-binary\.tar\.gz, unpacked; md5 c32a1d4ab5d03f12"):
        entries()["lsgd-fig2"].run(Options(passes=1, data_dir=tmp_path))
    argv = [
        "reproduce",
        "zhang-li-fig8",
        "--passes",
        "1",
        "--data_dir",
        str(tmp_path),
        "--output",
        str(tmp_path),
    ]
    assert cli.main(argv) == 1
    assert "train-images-idx3-ubyte" in capsys.readouterr().out


def _digits(*says: Any, trainings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Deep("fig1", "digits", says, trainings, "digits")
    monkeypatch.setattr(command, "named", lambda patterns: [one.entry("test", "A test")])


TWO = [
    Training(
        "LocalSGD, 2", 2, f"--method LocalSGD --period 4 --lr 0.1 {DIGITS}", "--nodes 2 --compute 0.5", 1437
    ),
    Training("one, large", 1, f"--method AllreduceSGD --lr 1e30 {DIGITS}", images=1437),
]


def test_passes_train_judge_and_draw_and_what_is_complete_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = [
        ("first", "LocalSGD", curves.fastest("LocalSGD, 2", "one, large")),
        ("large", "diverges", curves.trapped("LocalSGD, 2", "one, large")),
        ("least", "the large one", curves.best("one, large", "LocalSGD, 2")),
        ("seeds", "several", "takes several seeds"),
    ]
    _digits(*says, trainings=TWO, monkeypatch=monkeypatch)
    argv = ["reproduce", "test-fig1", "--passes", "0.5", "--output", str(tmp_path)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "4 numbers and properties: 2 agrees, 1 differs, 1 not run" in out
    assert "one, large -, then diverges" in " ".join(out.split()) and "shortened: 0.5 passes a worker" in out
    assert (tmp_path / "test-fig1.png").stat().st_size > 10_000
    summary = next((tmp_path / "runs").glob("localsgd-2-*/summary.json"))
    metrics = (summary.parent / "metrics.jsonl").read_text().splitlines()
    assert '"step": 45' in metrics[-1] and len(metrics) == 15
    written = summary.stat().st_mtime_ns

    other = [replace(TWO[0], label="another name"), TWO[1]]
    _digits(("a", "b", curves.best("another name")), trainings=other, monkeypatch=monkeypatch)
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.count(", kept") == 2 and summary.stat().st_mtime_ns == written
    assert cli.main([*argv, "--seed", "1"]) == 0
    assert len(list((tmp_path / "runs").glob("localsgd-2-*/summary.json"))) == 2
    (summary.parent / "complete").unlink()  # as where it was killed
    assert cli.main(argv) == 0
    assert summary.stat().st_mtime_ns > written


def test_trainings_of_more_workers_are_left_out_and_what_needs_them_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Training("one", 1, f"--method AllreduceSGD --lr 0.1 {DIGITS}", images=1437)
    says = [("two", "a", curves.fastest("LocalSGD, 2", "one")), ("one", "b", curves.alike("one"))]
    _digits(*says, trainings=[TWO[0], alone], monkeypatch=monkeypatch)
    argv = ["reproduce", "test-fig1", "--passes", "1", "--output", str(tmp_path), "--amp", "bf16"]
    assert cli.main([*argv, "--workers", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not run: needs LocalSGD, 2, which --workers leaves out" in out and "1 agrees, 1 not run" in out
    assert (
        "shortened: 1 passes a worker, one learning rate each, trainings of more workers than 1 left out, in bf16"
        in out
    )
    config = next((tmp_path / "runs").glob("*/config.yaml")).read_text()
    assert "amp: bf16" in config and not list((tmp_path / "runs").glob("localsgd*"))

    says = [says[0], ("two", "b", curves.alike("LocalSGD, 2"))]
    _digits(*says, trainings=TWO[:1], monkeypatch=monkeypatch)
    assert cli.main([*argv, "--workers", "1"]) == 0
    assert "2 numbers and properties: 0 agrees, 2 not run" in capsys.readouterr().out
    assert cli.main([*argv[:2], "--workers", "1"]) == 2 == cli.main([*argv[:2], "--amp", "bf16"])
    assert "which --passes N trains" in capsys.readouterr().err
    with pytest.raises(KeyError):  # no training of the figure
        curves.best("a", "other")(ONES)


def test_a_training_that_fails_or_is_under_way_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [Training("wrong", 1, f"--method AllreduceSGD --period 3 {DIGITS}", images=100)]
    _digits(("a", "b", ""), trainings=wrong, monkeypatch=monkeypatch)
    argv = ["reproduce", "test-fig1", "--passes", "1", "--output", str(tmp_path)]
    assert cli.main(argv) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "training - - not run: wrong: status 2 of" in out and "period" in out
    with open(next((tmp_path / "runs").glob("*.log"))) as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert cli.main(argv) == 1
    assert "not run: wrong: another process trains" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "file").touch()
    assert cli.main([*argv[:-1], str(tmp_path / "file")]) == 1
    assert "Not a directory" in " ".join(capsys.readouterr().out.split())


def test_a_training_that_fails_ends_the_others(tmp_path: Path) -> None:
    long = Training("long", 2, f"--method LocalSGD {DIGITS}", images=10**8)
    wrong = Training("wrong", 1, f"--method AllreduceSGD --period 3 {DIGITS}")
    began = time.perf_counter()
    with pytest.raises(Failed, match="status 2"):
        train([long, wrong], Options(passes=1, data_dir=tmp_path, output=tmp_path))
    assert time.perf_counter() - began < 120 and not list(tmp_path.glob("runs/*/complete"))


def test_a_signal_ends_the_trainings_too(tmp_path: Path) -> None:
    long = Training("long", 2, f"--method LocalSGD {DIGITS}", images=10**8)
    before = signal.getsignal(signal.SIGTERM)

    def when_it_trains() -> None:
        while not any(log.stat().st_size for log in tmp_path.glob("runs/*.log")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=when_it_trains, daemon=True).start()
    with pytest.raises(SystemExit, match="143"):
        train([long], Options(passes=1, data_dir=tmp_path, output=tmp_path))
    with open(next(tmp_path.glob("runs/*.log"))) as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever trains holds it
    assert signal.getsignal(signal.SIGTERM) is before


def _run(
    errors: list[float], key: str = "test_error", leaders: Any = (), ends: bool = True, rounds: int = 9
) -> Run:
    lines = [{"step": 10 * k, "wall_s": 1.0 * k, key: error} for k, error in enumerate(errors, 1)]
    return Run(Path("a"), "a", lines, list(leaders), {"world_size": 2, "rounds": rounds} if ends else {})


ONES = Found(
    a=_run([0.5, 0.3]),
    b=_run([0.6, 0.4, 0.5]),
    c=_run([0.9, 0.9]),
    d=_run([0.5, 0.35], ends=False),
    e=_run([], ends=False),
    late=_run([0.6, 0.4], rounds=2),
    loss=_run([2.0, 1.0], "test_loss"),
    led=_run([0.5], leaders=[{"step": 1, "leaders": [0]}, {"step": 2, "leaders": [1]}]),
)
FEW = "too few passes"


def test_seconds_to_an_error() -> None:
    a, b, c = ONES["a"], ONES["b"], ONES["c"]
    assert curves.seconds_to(a, 0.4) == 1.5 and curves.seconds_to(b, 0.4) == 2
    assert curves.seconds_to(c, 0.4) == curves.seconds_to(ONES["e"], 0.4) == math.inf
    assert curves.seconds_to(a, 0.7) == pytest.approx(0.5) and curves.seconds_to(a, 0.95) == 0
    assert curves.seconds_to(_run([math.nan, 0.3]), 0.4) == 1  # after what is not finite nothing is known


@pytest.mark.parametrize(
    ("check", "told", "holds"),
    [
        (curves.fastest("a", "b", "c"), "to 40.0 %: 1.5 s, b 2 s; to 30.0 %: 2 s, c never", True),
        (curves.fastest("b", "a"), "to 40.0 %: 2 s, a 1.5 s", False),
        (curves.fastest("a", "e"), "to 30.0 %: 2 s, e never", True),
        (curves.fastest("c", "a"), "c 90.00 %", FEW),
        (curves.best("a", "b"), "a 30.00 %, b 40.00 %", True),
        (curves.best("b", "a"), "b 40.00 %, a 30.00 %", False),
        (curves.best("c", "e"), "c 90.00 %, e -, then diverges", FEW),
        (curves.rising("a", "b", "c"), "a 30.00 %, b 40.00 %, c 90.00 %", True),
        (curves.rising("b", "a"), "b 40.00 %, a 30.00 %", False),
        (curves.rising("loss", "a", of=LOSS), "loss 1, a -", True),
        (curves.rising("b", "a", of=LOSS), "b -, a -", FEW),
        (curves.alike("a", "b"), "a 30.00 %, b 40.00 %", False),
        (curves.alike("a", "b", within=0.4), "a 30.00 %, b 40.00 %", True),
        (curves.alike("b", "late"), "b 40.00 %, late 40.00 %", f"{FEW} for late"),
        (curves.alike("e", "c"), "e -, then diverges, c 90.00 %", FEW),
        (curves.trapped("a", "c", "d"), "a 30.00 %, c 90.00 %, d 35.00 %, then diverges", True),
        (curves.trapped("a", "b", "c"), "a 30.00 %, b 40.00 %, c 90.00 %", False),
        (curves.trapped("c", "e"), "c 90.00 %, e -, then diverges", FEW),
        (curves.keeps_up("a", "b"), "a 30.00 %, b 40.00 %", True),
        (curves.keeps_up("a", "c"), "a 30.00 %, c 90.00 %", False),
        (curves.keeps_up("a", "d"), "a 30.00 %, d 35.00 %, then diverges", False),
        (curves.keeps_up("e", "a"), "e -, then diverges, a 30.00 %", FEW),
        (curves.speed_up("b", "a", 1.3, 1.4), "1.33 (to 40.0 %)", True),
        (curves.speed_up("b", "a", 1.4, 2), "1.33 (to 40.0 %)", False),
        (curves.speed_up("b", "a", 1, 2, 0.3), "b 40.00 %, a 30.00 %", FEW),
        (curves.speed_up("c", "a", 1, 2), "c 90.00 %, a 30.00 %", FEW),
        (curves.error("a", 31), "a 30.00 %", True),
        (curves.error("b", 31), "b 40.00 %", False),
        (curves.diverges("d"), "it diverges", "one seed; the paper has six"),
        (curves.all_lead("led", 2), "1, 1 times", True),
        (curves.all_lead("led", 3), "1, 1, 0 times", False),
        (curves.both(curves.best("a", "b"), curves.error("b", 31)), "a 30.00 %, b 40.00 %; b 40.00 %", False),
        (curves.both(curves.best("a", "b"), curves.best("c")), "a 30.00 %, b 40.00 %; c 90.00 %", FEW),
    ],
)
def test_checks(check: Callable[[Any], tuple[str, bool | str]], told: str, holds: bool | str) -> None:
    assert check(ONES) == (told, holds)


def test_seconds_of_communication() -> None:
    run = _run([0.5, 0.4])
    run.summary |= {"t_compute": [0.6, 0.6], "t_comm": [0.4, 0.5]}
    assert curves.communicates("a", 9)({"a": run}) == ("9", True)
    assert curves.communicates("a", 1)({"a": run})[1] is False
