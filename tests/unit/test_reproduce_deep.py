"""Figures that train deep networks: their jobs are accepted, `--passes` trains them, and verdicts go by the curves."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpilsgd import cli
from mpilsgd.reproduce import MissingData, Options, Reproduction, command, curves, deep, entries, judge, registry
from mpilsgd.reproduce.deep import Deep
from mpilsgd.reproduce.training import Training, train
from mpilsgd.train import command_line, simulate
from mpilsgd.train.judged import ERROR, LOSS
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
        assert config.steps == round(2 * one.images / config.batch_size) and config.data_dir == "some"
        call = [word.replace("FOLDER", "cifar10") for word in one.simulation(2, Path("some"), 3)]
        own, rest = simulate._parser().parse_known_args(call[1:])
        assert call[0] == "simulate" and own.workers == one.workers and own.workers % own.nodes in (0, 1)
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


def test_checks_name_curves_that_are_there() -> None:
    for name, figure in FIGURES.items():
        runs = {one.label: _run([0.5, 0.4]) for one in figure.trainings}
        for _, _, check in figure.says:
            assert check is None or figure.lacking or isinstance(check(runs)[1], bool | int), name


def test_half_of_the_training_in_epochs_of_all_workers() -> None:
    words = Training("a", 4, "--lr_drops [{half}] --batch_size 100", images=1000).words(3)
    assert words == shlex.split("--lr_drops [6] --batch_size 100 --steps 30 --eval_every '2 steps'")


def test_missing_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingData, match="cifar-10-binary.tar.gz, unpacked; md5 c32a1d4ab5d03f12"):
        entries()["lsgd-fig2"].run(Options(passes=1, data_dir=tmp_path))
    argv = ["reproduce", "zhang-li-fig8", "--passes", "1", "--data_dir", str(tmp_path), "--output", str(tmp_path)]
    assert cli.main(argv) == 1
    assert "train-images-idx3-ubyte" in capsys.readouterr().out


def _digits(*says: Any, trainings: Any, monkeypatch: pytest.MonkeyPatch, figure: Any = ERROR) -> Reproduction:
    one = Deep("fig1", "digits", says, trainings, "digits", figure=figure)
    monkeypatch.setattr(registry, "entries", lambda: {"test-fig1": one.entry("test", "A test")})
    return one.entry("test", "A test")


TWO = [
    Training("LocalSGD, 2", 2, f"--method LocalSGD --period 4 --lr 0.1 {DIGITS}", "--nodes 2 --compute 0.5", 1437),
    Training("one, large", 1, f"--method AllreduceSGD --lr 1e30 {DIGITS}", images=1437),
]


def test_passes_train_judge_and_draw_and_what_is_complete_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = [
        ("first", "LocalSGD", curves.fastest("LocalSGD, 2", "one, large")),
        ("large", "diverges", curves.trapped("LocalSGD, 2", "one, large")),
        ("least", "the large one", curves.best("one, large", "LocalSGD, 2")),
        ("seeds", "several", None),
    ]
    _digits(*says, trainings=TWO, monkeypatch=monkeypatch)
    argv = ["reproduce", "test-fig1", "--passes", "0.5", "--output", str(tmp_path)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "4 numbers and properties: 2 agrees, 1 differs, 1 not run" in out
    assert "one, large diverges" in out and "shortened: 0.5 passes a worker" in out
    assert (tmp_path / "test-fig1.png").stat().st_size > 10_000
    summary = next((tmp_path / "runs").glob("localsgd-2-*/summary.json"))
    metrics = (summary.parent / "metrics.jsonl").read_text().splitlines()
    assert '"step": 45' in metrics[-1] and len(metrics) == 15
    written = summary.stat().st_mtime_ns
    assert cli.main(argv) == 0
    assert summary.stat().st_mtime_ns == written and "s here" not in capsys.readouterr().out
    assert cli.main([*argv, "--seed", "1"]) == 0
    assert len(list((tmp_path / "runs").glob("localsgd-2-*/summary.json"))) == 2


def test_a_training_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [Training("wrong", 1, f"--method AllreduceSGD --period 3 {DIGITS}", images=100)]
    _digits(("a", "b", None), trainings=wrong, monkeypatch=monkeypatch)
    assert cli.main(["reproduce", "test-fig1", "--passes", "1", "--output", str(tmp_path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "training - - not run: wrong: status 2 of" in out and "period" in out


def _run(errors: list[float], key: str = "test_error", leaders: list[Any] | None = None) -> Run:
    lines = [{"step": 10 * k, "wall_s": 1.0 * k, key: error} for k, error in enumerate(errors, 1)]
    return Run(Path("a"), "a", lines, leaders or [], {"world_size": 2})


def test_a_level_that_all_reach_which_learn() -> None:
    a, b, c = _run([0.5, 0.3]), _run([0.6, 0.4, 0.5]), _run([0.9, 0.9])
    assert curves.level([a, b, c]) == 0.4
    assert curves.seconds_to(a, 0.4) == 1.5 and curves.seconds_to(b, 0.4) == 2
    assert curves.seconds_to(c, 0.4) == math.inf and curves.seconds_to(_run([0.2]), 0.4) == 1
    assert math.isnan(curves.level([c])) and curves.lowest(_run([])) == math.inf


ONES = {
    "a": _run([0.5, 0.3]),
    "b": _run([0.6, 0.4]),
    "c": _run([0.9, 0.9]),
    "led": _run([0.5], leaders=[{"step": 1, "leaders": [0]}, {"step": 2, "leaders": [1]}]),
}


@pytest.mark.parametrize(
    ("check", "told", "holds"),
    [
        (curves.fastest("a", "b", "c"), "to 40.0 %: 1.5 s, b 2 s; to 30.0 %: 2 s, c never", True),
        (curves.fastest("b", "a"), "to 40.0 %: 2 s, a 1.5 s", False),
        (curves.fastest("c", "c"), "to nan %: never, c never", False),
        (curves.best("a", "b"), "a 30.00 %, b 40.00 %", True),
        (curves.best("b", "a"), "b 40.00 %, a 30.00 %", False),
        (curves.rising("a", "b", "c"), "a 30.00 %, b 40.00 %, c 90.00 %", True),
        (curves.rising("b", "a"), "b 40.00 %, a 30.00 %", False),
        (curves.alike("a", "b"), "a 30.00 %, b 40.00 %", False),
        (curves.alike("a", "b", within=0.4), "a 30.00 %, b 40.00 %", True),
        (curves.trapped("a", "c"), "a 30.00 %, c 90.00 %", True),
        (curves.trapped("a", "b", "c"), "a 30.00 %, b 40.00 %, c 90.00 %", False),
        (curves.keeps_up("a", "b"), "a 30.00 %, b 40.00 %", True),
        (curves.keeps_up("a", "c"), "a 30.00 %, c 90.00 %", False),
        (curves.speed_up("b", "a", 1.3), "1.33 (to 40.0 %)", True),
        (curves.speed_up("b", "a", 3.0), "1.33 (to 40.0 %)", False),
        (curves.speed_up("b", "a", 1.3, 0.3), "30 % not reached by both", False),
        (curves.error("a", 31), "30.00", True),
        (curves.error("b", 31), "40.00", False),
        (curves.all_lead("led"), "1, 1 times", True),
        (curves.best("a", "b", of=LOSS), "a diverges, b diverges", False),
        (curves.both(curves.best("a", "b"), curves.error("b", 31)), "a 30.00 %, b 40.00 %; 40.00", False),
    ],
)
def test_checks(check: Callable[[Any], tuple[str, bool]], told: str, holds: bool) -> None:
    assert check(ONES) == (told, holds)


def test_seconds_of_the_parts() -> None:
    run = _run([0.5, 0.4])
    run.summary |= {"t_compute": [0.6, 0.6], "t_data": [0.0, 0.0], "t_comm": [0.4, 0.5]}
    assert curves.parts("a", (12, 2, 9))({"a": run}) == ("12 / 0 / 9", True)
    assert curves.parts("a", (12, 2, 1))({"a": run})[1] is False
