"""`mpilsgd simulate`, and what docs/simulation.md shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpilsgd.cli import main
from mpilsgd.train.simulate import compute_of
from mpilsgd.train.stragglers import parse_slow

PAGE = Path(__file__).parents[2] / "docs" / "simulation.md"
QUICK = ["--workers", "4", "--nodes", "2", "--steps", "20", "--eval_every", "10 steps", "--batch_size", "16"]


def run(folder: Path, *more: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    assert main(["simulate", *QUICK, "--output", str(folder), *more]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "summary.json").read_text())


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 3
    assert "rank 2 died at 0.35 s, and the job ended at 0.45 s" in capsys.readouterr().out


@pytest.mark.parametrize("method", [["LSGD"], ["EASGDTree", "--degree", "2"]])
def test_a_run_directory_with_the_seconds_of_the_cluster(tmp_path: Path, method: list[str]) -> None:
    more = ["--method", *method, "--slow", "1:3", "--compute", "0.02"]
    lines, summary = run(tmp_path / "run", *more)
    assert [line["step"] for line in lines] == pytest.approx([10, 20], abs=1.5)
    assert 0 < lines[0]["wall_s"] < lines[1]["wall_s"] and lines[1]["test_error"] < 0.9
    assert summary["simulated"]["nodes"] == 2 and summary["wall_s"] == pytest.approx(lines[1]["wall_s"])
    if method == ["LSGD"]:
        assert summary["t_compute"] == pytest.approx([0.4, 1.2, 0.4, 0.4], rel=1e-3)
        assert summary["wall_s"] == pytest.approx(1.2, rel=0.05)
        return
    assert run(tmp_path / "again", *more)[0] == lines
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report" / "curves.png").is_file()


def test_a_slower_network_takes_longer_and_trains_the_same(tmp_path: Path) -> None:
    fast, slow = (
        run(tmp_path / rate, "--method", "LocalSGD", "--period", "5", "--bandwidth", rate)[0]
        for rate in ("1G", "1M")
    )
    assert [line["test_loss"] for line in fast] == [line["test_loss"] for line in slow]
    assert slow[1]["wall_s"] > 2 * fast[1]["wall_s"]


@pytest.mark.parametrize(
    ("options", "status", "match"),
    [
        (["--metod", "LSGD"], 2, "metod: unknown option"),
        (["--compute", "fast"], 2, "compute must be S, MEAN:SIGMA or measured"),
        (["--slow", "7:2"], 2, "slow: there is no rank 7"),
        (["--nodes", "9"], 2, "nodes must be a whole number from 1"),
        (["--die", "soon"], 2, "die must be RANK:SECONDS"),
        (["--die", "1:0.05"], 1, "rank 1 died at 0.05 s"),
        (["--device", "cuda"], 2, "neither --resume nor --device cuda"),
        (["--method", "LSGD", "--pull", "-3"], 2, "pull"),
    ],
)
def test_what_goes_wrong_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, match: str
) -> None:
    assert main(["simulate", *QUICK, "--output", str(tmp_path / "run"), *options]) == status
    assert match in capsys.readouterr().err
    assert (tmp_path / "run").exists() == (status == 1)


def test_a_run_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run")
    assert main(["simulate", *QUICK, "--output", str(tmp_path / "run")]) == 2
    assert "holds a run already" in capsys.readouterr().err
    run(tmp_path / "run", "--overwrite")


def test_the_seconds_of_a_step() -> None:
    plain = parse_slow(None)
    assert compute_of("measured", plain, 0) == "measured" and compute_of("0.5", plain, 0) == 0.5
    assert callable(compute_of("0.5:0.1", plain, 0))
    slow = compute_of("0.5", parse_slow("2:3"), 0)
    assert (slow.factor(2, 0), slow.factor(1, 0)) == (3.0, 1.0)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    told = capsys.readouterr().out
    assert "--bandwidth" in told and "mpilsgd train" in told
