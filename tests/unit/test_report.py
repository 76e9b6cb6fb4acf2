"""`mpilsgd report` on run directories made up here: tables, figures, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpilsgd.train import report
from mpilsgd.train.run_reader import RunError, read_runs


def made_up_run(
    folder: Path,
    method: str = "LSGD",
    groups: tuple[int, ...] = (4,),
    speed: float = 1.0,
    seed: int = 0,
    points: int = 20,
) -> Path:
    """A run as `mpilsgd train` leaves it: `points` evaluations 40 steps apart, an election every 8 steps."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    workers, steps = sum(groups), 40 * points
    per_rank = {
        part: [base * (1 + 0.05 * rng.random()) for _ in range(workers)]
        for part, base in _seconds(method).items()
    }
    lines = []
    for i in range(points + 1):
        error = 0.9 * math.exp(-i * speed / 3) + 0.02 + 0.004 * rng.random()
        part = {f"t_{name}": values[0] * i / points for name, values in per_rank.items()}
        line = {
            "step": 40 * i,
            "epoch": i / 4,
            "wall_s": sum(part.values()),
            "grad_evals": 40 * i * workers,
            "rounds": 5 * i,
        }
        line |= {"bytes_group": 40_000_000 * 5 * i, "bytes_across": 8_000_000 * i * (len(groups) > 1)}
        lines.append(
            line
            | {"train_loss": 2 * error, "test_loss": 2.5 * error, "test_error": error, "leader": 0}
            | part
        )
    _write_lines(folder / "metrics.jsonl", lines)
    first = np.cumsum([0, *groups[:-1]])
    if method == "LSGD":
        held, elections = [int(rank) for rank in first], []
        for step in range(8, steps + 1, 8):
            held = [
                int(first[g] + rng.integers(size)) if rng.random() < 0.6 else held[g]
                for g, size in enumerate(groups)
            ]
            overall = held[int(rng.integers(len(groups)))] if step % 16 == 0 else None
            elections.append(
                {"step": step, "leaders": held, "leader": held[0] if len(groups) == 1 else overall}
            )
        _write_lines(folder / "leaders.jsonl", elections)
    summary = {
        "method": method,
        "world_size": workers,
        "group_size": groups[0],
        "test_error": lines[-1]["test_error"],
    }
    summary |= {
        "best_worker": {"rank": 1, "test_error": 0.03},
        "leads": [0] * workers,
        "wall_s": lines[-1]["wall_s"],
    }
    summary |= {f"t_{part}": values for part, values in per_rank.items()}
    summary |= {name: lines[-1][name] for name in ("bytes_group", "bytes_across", "rounds", "grad_evals")} | {
        "resets": [0] * workers
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f"method: {method}\nlr: 0.1\n")
    return folder


def _seconds(method: str) -> dict[str, float]:
    comm = {"LSGD": 0.9, "EASGD": 2.5, "LocalSGD": 1.7, "AllreduceSGD": 31.0}.get(method, 0.0)
    return {"compute": 120.0, "data": 9.0, "comm": comm}


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def call(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(argument) for argument in arguments]))


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_up_run(tmp_path / "lsgd")
    assert call(folder) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name in ("curves.png", "leaders.png", "time.png"):
        assert is_png(folder / "report" / name)
        assert str(folder / "report" / name) in out
    row = next(line for line in out.splitlines() if line.startswith("lsgd  "))
    assert "LSGD" in row and "4 GB" in row and " 100 " in row and "2:1" in row
    assert "lsgd: 100 elections" in out


def test_eight_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["LSGD", "LSGD", "EASGD", "LocalSGD", "AllreduceSGD", "LSGD", "EASGD", "AllreduceSGD"]
    shapes = [(4,), (2, 2), (4,), (4,), (4,), (2, 1), (2, 2), (1,)]
    folders = [
        made_up_run(tmp_path / f"run{i}", method, shape, speed=0.6 + 0.1 * i, seed=i)
        for i, (method, shape) in enumerate(zip(methods, shapes, strict=True))
    ]
    assert call(*folders, "-o", tmp_path / "pictures") == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "curves.png",
        "leaders.png",
        "time.png",
    }
    assert all(is_png(path) for path in (tmp_path / "pictures").iterdir())
    out = capsys.readouterr().out
    assert all(f"run{i}  " in out for i in range(8))
    assert "4 (2 groups)" in out and "led all" in out and "160 MB" in out


def test_the_legend_of_many_runs_leaves_the_curves_their_place(tmp_path: Path) -> None:
    name = "of-a-method-with-many-settings-that-stand-all-in-the-name-of-its-folder,lr=0.1,seed="
    folders = [made_up_run(tmp_path / f"{name}{i}", seed=i) for i in range(20)]
    assert call(*folders[:2], "-o", tmp_path / "few") == call(*folders, "-o", tmp_path / "many") == 0
    few, many = (
        struct.unpack(">II", (tmp_path / of / "curves.png").read_bytes()[16:24]) for of in ("few", "many")
    )
    assert few[0] == many[0] and many[1] - few[1] > 18 * 30  # pixels of a line of the legend


def asynchronous_run(folder: Path, steps: list[int], staleness: dict[str, int], **config: Any) -> Path:
    """A made-up run whose summary has what asynchronous runs have more."""
    made_up_run(folder, "EASGD", (len(steps),))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"worker_steps": steps, "t_wait": [0.5] * len(steps)}
    summary |= {"staleness": staleness} if staleness else {}
    (folder / "summary.json").write_text(json.dumps(summary))
    told = {"method": "EASGD", "asynchronous": True, **config}
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(told[key])}\n" for key in told))
    return folder


def test_asynchronous_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        made_up_run(tmp_path / "lsgd"),
        asynchronous_run(tmp_path / "free", [790, 420, 1010, 980], {"0": 10, "3": 70, "12": 1}),
        asynchronous_run(tmp_path / "no-centre", [800, 800], {}),
    ]
    assert call(*folders, "-o", tmp_path / "out") == 0
    assert is_png(tmp_path / "out" / "asynchrony.png")
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[:1].islower()}
    assert rows["run"].split()[-2:] == ["waiting", "staleness"]
    assert "420..1010" in rows["free"] and rows["free"].endswith("2.74, most 12") and "0.37 %" in rows["free"]
    assert " 800 " in rows["no-centre"] and rows["no-centre"].endswith("-")
    assert rows["lsgd"].endswith("-")


def test_one_asynchronous_run(tmp_path: Path) -> None:
    folder = asynchronous_run(tmp_path / "run", list(range(100, 120)), {str(k): 1 + k for k in range(40)})
    assert call(folder) == 0
    assert is_png(folder / "report" / "asynchrony.png")
    (run,) = read_runs([folder])
    assert run.worker_steps == list(range(100, 120)) and run.staleness[39] == 40


def drawn(draw: Any, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that is drawn of some runs."""
    kept: list[Any] = []
    monkeypatch.setattr("mpilsgd.train.figure_time.save", lambda figure, path: kept.append(figure))
    draw(read_runs(folders), Path())
    return kept[0]


def test_ranks_that_only_average(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tree of five ranks the leaves 2, 3, 4 compute: the summary's lists of workers are theirs."""
    from mpilsgd.train.figures import draw_asynchrony, draw_time

    folder = asynchronous_run(tmp_path / "tree", [700, 800, 900], {}, method="EASGDTree")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"world_size": 5, "workers": [2, 3, 4]}))
    assert call(folder) == 0
    assert "  3 of 5  " in capsys.readouterr().out
    steps = drawn(draw_asynchrony, [folder], monkeypatch).axes[0]
    assert [label.get_text() for label in steps.get_yticklabels()] == ["2", "3", "4"]
    time = drawn(draw_time, [folder], monkeypatch).axes[0]
    assert [label.get_text() for label in time.get_yticklabels()] == ["rank 2", "rank 3", "rank 4"]


def test_the_last_histogram_of_a_column_has_the_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpilsgd.train.figures import draw_asynchrony

    runs = {"first": {"1": 7}, "second": {"0": 3}, "no-centre": {}}
    folders = [asynchronous_run(tmp_path / name, [3, 4], found) for name, found in runs.items()]
    labels = [axis.get_xlabel() for axis in drawn(draw_asynchrony, folders, monkeypatch).axes]
    assert [bool(label) for label in labels] == [False, False, False, True, True, False]


def test_synchronous_runs_have_no_picture_of_asynchrony(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "asynchrony.png").write_bytes(b"of an earlier report")
    assert call(made_up_run(tmp_path / "lsgd"), "-o", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "asynchrony.png").exists()
    assert "staleness" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [{"staleness": [1]}, {"staleness": {"x": 1}}, {"worker_steps": [None]}, {"workers": [1]}, {"workers": 2}],
)
def test_damaged_figures_of_an_asynchronous_run(tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = asynchronous_run(tmp_path / "run", [3, 4], {"1": 7})
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | damage))
    assert call(folder) == 0


@pytest.mark.parametrize(
    ("folder", "config", "label"),
    [
        ("easgd-cnn7", {"asynchronous": False}, "easgd-cnn7"),
        ("easgd-cnn7", {}, "easgd-cnn7 (asynchronous)"),
        ("async", {}, "async (EASGD)"),
        ("third", {}, "third (EASGD asynchronous)"),
        ("third", {"asynchronous": None}, "third (EASGD)"),
        ("best", {"asynchronous": "wait-free"}, "best (EASGD wait-free)"),
        ("EASGD-wait_free", {"asynchronous": "wait-free"}, "EASGD-wait_free"),
    ],
)
def test_a_label_names_the_method(tmp_path: Path, folder: str, config: dict[str, Any], label: str) -> None:
    (run,) = read_runs([asynchronous_run(tmp_path / folder, [3, 4], {"1": 7}, **config)])
    assert run.label == label


def test_no_leader_leads_beyond_the_end(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from mpilsgd.train.figure_leaders import _draw_lanes

    (run,) = read_runs([made_up_run(tmp_path / "run", points=2)])
    for elections, last, end in ((10, 80, 80), (7, 80, 80), (10, 40, 80)):
        run.leaders = [{"step": 8 * (i + 1), "leaders": [i % 2], "leader": None} for i in range(elections)]
        run.metrics = [{"step": last}]
        axis = Figure().subplots()
        _draw_lanes(axis, run)
        assert axis.get_xlim() == (0, end)
        ends = [path.vertices[:, 0].max() for bars in axis.collections for path in bars.get_paths()]
        assert max(ends) == end


def test_no_leaders_no_leader_picture(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "easgd", "EASGD")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "leaders.png").write_bytes(b"of an earlier report")
    assert call(folder, "-o", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "leaders.png").exists()


def test_counts_of_a_multi_leader_run(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", groups=(2, 1))
    elections = [
        {"step": 2, "leaders": [0, 2], "leader": None},
        {"step": 4, "leaders": [1, 2], "leader": 2},
        {"step": 6, "leaders": [None, 2], "leader": 2},
    ]
    _write_lines(folder / "leaders.jsonl", elections)
    (run,) = read_runs([folder])
    assert run.n_groups == 2 and run.world_size == 3
    assert run.leads() == ([1, 1, 3], [0, 0, 2])
    assert call(folder) == 0


@pytest.mark.parametrize("damage", ["half a line", "not utf-8", "not an object"])
def test_damaged_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    folder = made_up_run(tmp_path / "run")
    tail = {"half a line": b'{"step": 840, "wall_', "not utf-8": b"\xff\xfe\x00", "not an object": b"[1, 2]"}[
        damage
    ]
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert call(folder) == 0
    assert "run: metrics.jsonl: line 22 is damaged and left out" in capsys.readouterr().err
    assert len(read_runs([folder])[0].metrics) == 21


def test_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_up_run(tmp_path / "run", points=1)
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text("method: [LSGD\n")
    assert call(folder) == 0
    err = capsys.readouterr().err
    assert "no summary.json: the run is not finished" in err and "config.yaml cannot be read" in err


def test_resumed_run_keeps_the_later_lines(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", points=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 80, "wall_s": 1.0, "test_error": 0.25}) + "\n")
    (run,) = read_runs([folder])
    assert [line["step"] for line in run.metrics] == [0, 40, 80]
    assert run.column("test_error")[-1] == 0.25


def test_diverged_run(tmp_path: Path) -> None:
    good, bad = made_up_run(tmp_path / "good"), made_up_run(tmp_path / "bad", "EASGD")
    lines = [json.loads(line) for line in (bad / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines[4:]):
        line["test_loss"] = 10.0**i if i < 6 else [math.nan, math.inf, None][i % 3]
        line["test_error"] = 0.9
    _write_lines(bad / "metrics.jsonl", lines)
    assert call(good, bad, "-o", tmp_path / "out") == 0


def test_lines_without_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_up_run(tmp_path / "run", points=3)
    lines = [
        json.loads(line) | {"test_error": None, "test_loss": None}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    _write_lines(folder / "metrics.jsonl", lines)
    (folder / "summary.json").unlink()
    assert call(folder) == 0
    assert "LSGD" in capsys.readouterr().out


def test_bad_directories_are_named_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    reasons = {
        "missing": "no such run directory",
        "file": "is a file",
        "empty": "holds no metrics.jsonl",
    }
    assert call(made_up_run(tmp_path / "good"), *(tmp_path / name for name in reasons)) == 2
    err = capsys.readouterr().err
    for name, reason in reasons.items():
        assert any(f"{tmp_path / name}:" in line and reason in line for line in err.splitlines())


@pytest.mark.parametrize("metrics", [None, "", '{"step": 40, "wal'], ids=["missing", "empty", "half a line"])
def test_a_run_without_an_evaluation_is_left_out(tmp_path: Path, capsys: Any, metrics: str | None) -> None:
    bad, good = tmp_path / "bad", made_up_run(tmp_path / "good")
    bad.mkdir()
    (bad / "config.yaml").write_text("method: EASGD\n")
    if metrics is not None:
        (bad / "metrics.jsonl").write_text(metrics)
    assert call(bad, good, "-o", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert "mpilsgd report: bad: left out: " in err and "good: left out" not in err
    assert "\ngood  " in out and "\nbad  " not in out
    assert is_png(tmp_path / "out" / "curves.png")

    assert call(bad, "-o", tmp_path / "none") == 2
    out, err = capsys.readouterr()
    assert "mpilsgd report: bad: left out: " in err and out == ""
    assert not (tmp_path / "none").exists()


def test_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_up_run(tmp_path / "run", points=2)
    (tmp_path / "taken").write_text("")
    assert call(folder, "-o", tmp_path / "taken") == 2
    assert "the folder for the figures cannot be made" in capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [made_up_run(tmp_path / name / "run", points=2) for name in ("a", "b")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run"]


def test_a_missing_run_raises(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        read_runs([tmp_path / "nothing"])
