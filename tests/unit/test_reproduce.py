"""`mpilsgd reproduce`: every figure has an entry, verdicts are computed, the quick theory agrees with the papers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from mpilsgd import cli
from mpilsgd.reproduce import MissingData, Options, Result, Row, command, entries, judge, named
from mpilsgd.reproduce.deep import Deep

QUICK = Options(quick=True, data_dir=Path("nowhere"))
ASKED = [
    *(f"lsgd-fig{k}" for k in (*range(1, 8), *range(9, 13))),
    "lsgd-table1",
    *(f"thesis-fig3.{k}" for k in (1, 2, 3)),
    *(f"thesis-fig4.{k}" for k in range(1, 16)),
    "thesis-table4.4",
    *(f"thesis-fig5.{k}" for k in range(1, 21)),
    *(f"thesis-fig6.{k}" for k in range(3, 13)),
    "stich-speed-up",
    *(f"zhang-li-fig{k}" for k in ("2a", "2b", "3", "4a", "4b", "5", "6", "7", "8")),
    "zhang-li-tstar",
]
# quick entries without a method's run, and the rows that contradict the papers
THEORY: dict[str, int] = {
    "thesis-fig3.2": 1,
    "thesis-fig5.1": 0,
    "thesis-fig5.2": 0,
    "thesis-fig5.4": 0,
    "thesis-fig5.5": 2,
    "thesis-fig5.6": 1,
    "thesis-fig5.8": 0,
    "thesis-fig5.9": 0,
    "thesis-fig5.10": 0,
    "thesis-fig5.11": 0,
    "thesis-fig5.12": 0,
    "thesis-fig5.13": 0,
    "thesis-fig5.14": 0,
    "zhang-li-tstar": 3,
}


def test_every_figure_that_was_asked_for_has_an_entry() -> None:
    known = entries()
    assert set(ASKED) <= set(known)
    assert set(known) - set(ASKED) == {"zhang-li-theorem3"}
    assert all(one.title and one.paper for one in known.values())
    thesis = [name for name in known if name.startswith("thesis-fig5")]
    assert thesis == sorted(thesis, key=lambda name: int(name.split(".")[1]))


def test_the_page_names_the_jobs_that_are_too_large() -> None:
    page = (Path(__file__).parents[2] / "docs" / "papers.md").read_text()
    deep = [one for one in entries().values() if isinstance(getattr(one.run, "__self__", None), Deep)]
    assert len(deep) == 37
    rows = command.markdown([(one, one.run(Options())) for one in deep]).splitlines()[2:]
    assert [row for row in rows if row not in page] == []


@pytest.mark.parametrize("name", THEORY)
def test_the_quick_theory_agrees_but_where_the_paper_is_wrong(name: str) -> None:
    rows = entries()[name].run(QUICK).rows
    differing = [row for row in rows if row.outcome == judge.DIFFERS]
    assert len(differing) == THEORY[name], command.table(Result(rows))
    assert all(row.why for row in differing)
    assert all(row.outcome in (judge.AGREES, judge.DIFFERS) for row in rows)


def test_the_optima_of_leader_sgd_are_those_of_table_1() -> None:
    rows = entries()["lsgd-table1"].run(QUICK).rows
    assert [(row.paper, row.outcome) for row in rows] == [("-0.0912", "agrees"), ("-0.2172", "agrees")]


@pytest.mark.parametrize(
    ("paper", "here", "tolerance", "outcome"),
    [
        (1.0, 1.05, {"rel": 0.1}, judge.AGREES),
        (1.0, 1.15, {"rel": 0.1}, judge.DIFFERS),
        (-2.0, -2.1, {"rel": 0.1}, judge.AGREES),
        (0.0, 1e-9, {"within": 1e-8}, judge.AGREES),
        (0.0, 1e-9, {"rel": 0.5}, judge.DIFFERS),
        (5.0, 5.0, {}, judge.AGREES),
        (1.0, math.nan, {"rel": 0.5}, judge.DIFFERS),
        (1.0, math.inf, {"rel": 0.5, "within": 3}, judge.DIFFERS),
    ],
)
def test_the_verdict_on_numbers(paper: float, here: float, tolerance: dict[str, float], outcome: str) -> None:
    assert judge.number("a", paper, here, **tolerance).outcome == outcome


def test_a_reason_is_given_only_where_it_differs() -> None:
    assert judge.number("a", 1, 1, why="wrong formula").verdict == "agrees"
    assert judge.number("a", 2, 1, why="wrong formula").verdict == "differs: by 1 (50 %); wrong formula"
    assert judge.number("a", 2, 1).verdict == "differs: by 1 (50 %)"
    assert judge.stated("a", "rises", 3.0, True, why="no").verdict == "agrees"
    assert judge.stated("a", "rises", 3.0, False, why="no").verdict == "differs: no"
    assert judge.larger("a", "14.9", "mpiexec").verdict == "too large here: mpiexec"


def _reproduce(*argv: str) -> int:
    return cli.main(["reproduce", *argv])


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert _reproduce("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(entries())


def test_a_name_that_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert _reproduce("thesis-fig5.42") == 2
    assert "no reproduction 'thesis-fig5.42'; did you mean thesis-fig5" in capsys.readouterr().err
    assert _reproduce() == 2
    assert "--list" in capsys.readouterr().err


def test_patterns_and_all() -> None:
    assert [one.name for one in named(["lsgd-table*"])] == ["lsgd-table1"]
    assert [one.name for one in named(["all"])] == list(entries())
    assert len(named(["lsgd-fig1", "lsgd-fig1*"])) == 4


@pytest.mark.parametrize(
    ("name", "file", "where", "checksum"),
    [
        ("zhang-li-fig5", "colon-cancer", "libsvmtools", "647eb57da9d5df27"),
        ("zhang-li-fig3", "train-images-idx3-ubyte", "https://", "f68b3c2dcbeaaa9f"),
    ],
)
def test_missing_data_are_named(
    name: str, file: str, where: str, checksum: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingData, match=file):
        entries()[name].run(QUICK)
    assert _reproduce(name, "--data_dir", str(tmp_path), "--output", str(tmp_path)) == 1
    told = re.sub(r"\s+", "", capsys.readouterr().out)
    assert "notrun:" in told
    assert all(re.sub(r"\s+", "", part) in told for part in (file, where, checksum, str(tmp_path)))


def test_what_was_shortened_is_said_in_table_picture_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    argv = ["thesis-fig5.14", "--quick", "--output", str(tmp_path), "--markdown", str(page)]
    assert _reproduce(*argv) == 0
    out = capsys.readouterr().out
    assert "shortened: a grid of 80 x 80 points" in out and "1 numbers and properties: 1 agrees" in out
    assert (tmp_path / "thesis-fig5.14.png").stat().st_size > 10_000
    assert "thesis-fig5.14 (shortened: a grid" in page.read_text()


def test_the_picture_says_what_was_shortened(tmp_path: Path) -> None:
    figures: list[Any] = []
    from mpilsgd.reproduce.drawing import save

    save(lambda figure: figures.append(figure), tmp_path / "a.png", "A title", "half the steps", (4, 3))
    assert [text.get_text() for text in figures[0].texts] == ["A title", "shortened: half the steps"]


def test_markdown_is_one_table() -> None:
    one = entries()["lsgd-table1"]
    rows = [Row("|x|", "1", "2", "differs", "why"), Row("y", "1", "1", "agrees")]
    lines = command.markdown([(one, Result(rows))]).splitlines()
    assert lines[2:] == ["| lsgd-table1 | \\|x\\| | 1 | 2 | differs: why |", "|  | y | 1 | 1 | agrees |"]
