"""What shows a run: the page in a browser, the page in a terminal, the bar, the logs of other tools, the colours."""

from __future__ import annotations

import argparse
import csv
import html.parser
import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_report import made_up_run

from mpilsgd.colors import METHODS, PALETTE, colors_of
from mpilsgd.train import judged, logs, page, report, terminal, watch
from mpilsgd.train.callables import InputError
from mpilsgd.train.config import Config
from mpilsgd.train.display import Display
from mpilsgd.train.run_reader import read_runs

EVIL = "</script><script>alert(1)</script>{{data}}&<b>"


def call(module: Any, *arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args([str(argument) for argument in arguments])))


class Reader(html.parser.HTMLParser):
    """The elements of a page, and its text by the element that holds it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tags[-1] if self.tags else "", []).append(data)


def test_a_page_holds_all_that_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PICTURES", {name: report.PICTURES[name] for name in ("leaders", "time")})
    folders = [made_up_run(tmp_path / name, method) for name, method in (("a", "LSGD"), ("b", "EASGD"))]
    (folders[0] / "config.yaml").write_text("method: LSGD\nlr: 0.1\npull: 0.2\n")
    (folders[1] / "config.yaml").write_text("method: EASGD\nlr: 0.1\n")
    (folders[0] / "command").write_text("mpiexec -n 4 mpilsgd train --pull 0.2\n")
    assert call(report, *folders, "--html", "-o", tmp_path / "out") == 0
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text()
    read = Reader(text)
    assert all(link.startswith("data:image/png;base64,") for link in read.links) and len(read.links) == 2
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "mpiexec -n 4 mpilsgd train --pull 0.2" in read.texts["pre"]
    cells = " ".join(read.texts["td"])
    assert (
        "method LSGD EASGD" in cells and "pull 0.2" in cells
    )  # what differs, and only that: then what does not
    assert cells.index("pull 0.2") < cells.index("lr 0.1")
    data = json.loads(read.texts["script"][0])
    assert [run["color"] for run in data["runs"]] == [METHODS["LSGD"], METHODS["EASGD"]]
    assert [figure["key"] for figure in data["figures"]] == ["test_error", "test_loss", "train_loss"]
    assert len(data["runs"][0]["points"]["grad_evals"]) == 21


def test_text_of_run_directories_is_escaped(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "<img src=x onerror=alert(2)>{{body}}")
    (folder / "config.yaml").write_text(f"method: {json.dumps(EVIL)}\nmodel: {json.dumps(EVIL)}\n")
    (folder / "command").write_text(EVIL)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "method": EVIL}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "\n".join(json.dumps(line | {f"test_{EVIL}": 1.0}) for line in lines)
    )
    plain = tmp_path / "plain.html"
    runs = read_runs([made_up_run(tmp_path / "plain")])
    page.write_page(runs, report.rows_of(runs), [], plain)
    runs = read_runs([folder])
    read, same = (
        Reader(page.write_page(runs, report.rows_of(runs), [], tmp_path / "evil.html").read_text()),
        None,
    )
    same = Reader(plain.read_text())
    assert {tag: read.tags.count(tag) for tag in ("script", "img", "b")} == {
        tag: same.tags.count(tag) for tag in ("script", "img", "b")
    }
    data = json.loads(read.texts["script"][0])
    assert EVIL in data["runs"][0]["label"] and any(EVIL in figure["key"] for figure in data["figures"])
    assert EVIL in "".join(read.texts["pre"]) and EVIL in "".join(read.texts["td"])


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", points=3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1]["test_loss"], lines[2]["test_loss"] = None, float("nan")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    points = json.loads(page.data_of(read_runs([folder])))["runs"][0]["points"]["test_loss"]
    assert [value is None for value in points] == [False, True, True, False]


def test_the_figure_that_is_drawn() -> None:
    error, loss = (
        {"test_error": 0.1, "test_loss": 1.0},
        {"test_error": None, "test_loss": 2.0, "test_bleu": 3.0},
    )
    assert judged.figure_of([]) is judged.ERROR and judged.figure_of([error, loss]) is judged.ERROR
    assert judged.figure_of([loss]) is judged.LOSS and judged.figure_of([{"test_loss": 2.0}]) is judged.LOSS
    assert [one.name for one in judged.more_of([error, loss])] == ["test bleu"]
    assert judged.ERROR.text(0.0425) == "4.25 %" and judged.LOSS.text(None) == "-"


def test_runs_that_know_no_error_are_judged_by_their_loss(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PICTURES", {"curves": "draw_curves"})
    folder = made_up_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    more = {"test_error": None, "test_bits": 3.25}
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line | more) for line in lines))
    summary = json.loads((folder / "summary.json").read_text()) | {
        "best_worker": {"rank": 1, "test_loss": 0.5}
    }
    (folder / "summary.json").write_text(json.dumps({**summary, "test_error": None}))
    assert call(report, folder, "--html") == 0
    told = capsys.readouterr().out.splitlines()
    assert "test loss" in told[0] and "error" not in told[0]
    assert [figure["key"] for figure in json.loads(page.data_of(read_runs([folder])))["figures"]] == [
        *("test_loss", "train_loss", "test_bits")
    ]
    assert call(watch, folder, "--once") == 0
    assert "test loss" in capsys.readouterr().out


def test_a_method_has_one_colour() -> None:
    assert len(set(METHODS.values())) == len(METHODS) and set(METHODS.values()) == set(PALETTE)
    found = colors_of(["LSGD", "EASGD", "LSGD", "LSGD", "my.module:Own", "DistributedDataParallel"])
    assert found[0] == METHODS["LSGD"] and found[1] == METHODS["EASGD"]
    assert len(set(found)) == 6


def test_every_method_of_ours_has_a_colour() -> None:
    from mpilsgd.train.options import methods

    assert set(methods()) - {name for name in methods() if ":" in name} == set(METHODS)


# The page in a terminal

RANKS = {
    "step": 800,
    "workers": [1, 2, 3],
    "steps": [800, 801, 802, 803],
    "leads": [0, 10, 50, 40],
    "t_compute": [0.0, 100.0, 100.0, 70.0],
    "t_data": [0.0, 5.0, 5.0, 5.0],
    "t_comm": [0.0, 5.0, 5.0, 35.0],
    "t_wait": [0.0, 1.0, 1.0, 30.0],
}


def going_on(folder: Path) -> Path:
    made_up_run(folder)
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text("method: LSGD\nsteps: 1600\nmodel: mlp\ndata: digits\n")
    (folder / "ranks.json").write_text(json.dumps(RANKS))
    return folder


def test_watch_shows_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = going_on(tmp_path / "run")
    assert call(watch, folder, "--once") == 0
    told = capsys.readouterr().out
    for part in (
        *("run: LSGD on 4 rank(s)", "mlp on digits", "step 800 of 1600", "of training left; last heard"),
        *("test error [%]", "training loss", "test error 2.", "leads", "averages only", "27.3 %"),
    ):
        assert part in told, told
    assert re.search(r"3 +803 +40 ", told)


def test_watch_of_many_ranks_shows_the_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, many = going_on(tmp_path / "run"), 40
    ranks: dict[str, Any] = {
        "step": 1,
        "workers": list(range(many)),
        "steps": [9] * many,
        "leads": [0] * many,
    }
    ranks |= {"t_compute": [10.0] * many, "t_data": [0.0] * many, "t_comm": [5.0] * many}
    (folder / "ranks.json").write_text(json.dumps(ranks | {"t_wait": [5.0 * r / many for r in range(many)]}))
    assert call(watch, folder, "--once") == 0
    assert "not shown: ranks 6-33" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", '{"steps": [1], "leads": []}', '{"steps": [null]}'])
def test_watch_goes_without_damaged_ranks(tmp_path: Path, content: str, capsys: Any) -> None:
    folder = going_on(tmp_path / "run")
    (folder / "ranks.json").write_text(content)
    assert call(watch, folder, "--once") == 0
    assert "led by rank" in capsys.readouterr().out


def test_watch_knows_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = going_on(tmp_path / "run")
    for name, content, state in (
        ("nothing", "", False),
        ("interrupted", "", True),
        ("summary.json", json.dumps({"steps": 1600}), True),
        ("summary.json", json.dumps({"steps": 800}), False),  # it was resumed with more steps
    ):
        (folder / name).write_text(content)
        assert watch.ended(read_runs([folder])[0]) == state, (name, content)
        (folder / name).unlink()
    (folder / "interrupted").touch()
    assert call(watch, folder, "--once") == 0
    assert "interrupted; it can be resumed" in capsys.readouterr().out


def test_watch_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(watch, tmp_path / "nothing") == 2
    err = capsys.readouterr().err
    assert err == f"mpilsgd watch: {tmp_path / 'nothing'}: there is no such run directory\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: LSGD\n")
    assert call(watch, tmp_path / "run", "--once") == 0
    assert "no evaluation yet" in capsys.readouterr().out


def test_watch_follows_until_the_end(tmp_path: Path) -> None:
    """On a terminal: it goes on while the run does, and ends with it; q ends it before."""
    folder = going_on(tmp_path / "run")
    for quits in (True, False):
        child, screen = _on_a_terminal("-m", "mpilsgd.cli", "watch", str(folder))
        _until(screen, "last heard")
        assert child.poll() is None
        if quits:
            os.write(screen, b"q")
        else:
            (folder / "interrupted").touch()
        told = _until(screen, None)
        assert child.wait(10) == 0 and ("interrupted; it can" in told) == (not quits), told


def _on_a_terminal(*arguments: str, **variables: str) -> tuple[subprocess.Popen[bytes], int]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", **variables}
    child = subprocess.Popen(
        [sys.executable, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    return child, ours


def _until(screen: int, text: str | None) -> str:
    """What comes until a text does, or all of it."""
    told, start = "", time.monotonic()
    while text is None or text not in told:
        assert time.monotonic() - start < 30, told
        try:
            piece = os.read(screen, 65536)
        except OSError:  # the other end is closed
            piece = b""
        if not piece:
            assert text is None, told
            break
        told += piece.decode(errors="replace")
    return told


# The bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("PMI_RANK", raising=False)
    screen = Terminal()
    with Display(0, 100, 40, screen) as display:
        display.step(25, 0.5)
        display.say("a line")
        display.step(26, None)
    told = screen.getvalue()
    assert "25 % " in told and "25/100" in told and "loss 0.5000" in told and "epoch 0.62" in told
    assert "a line\n" in told and told.split("\r")[-1].strip() == ""  # and nothing is left of it


def test_a_log_is_told_that_the_run_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    log = io.StringIO()
    display = Display(0, 100, 40, log)
    for step in range(1, 100):
        now[0] += 7
        display.step(step, 0.25)
    lines = log.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "step 10/100 (10 %)  epoch 0.25  loss 0.2500  0.143 steps/s  10 min 30 s left"


def test_whose_terminal_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A launched rank goes by its launcher's output, wherever its own goes."""
    screen, launched = Terminal(), {"TERM": "xterm", "PMI_RANK": "0"}
    assert terminal.columns_of(screen, {"TERM": "xterm"})
    assert terminal.columns_of(screen, {"TERM": "dumb"}) is None
    assert terminal.columns_of(io.StringIO(), {"TERM": "xterm"}) is None
    monkeypatch.setattr(terminal, "_launchers", lambda pid: iter(()))
    assert terminal.columns_of(screen, launched) is None
    monkeypatch.setattr(terminal, "_launchers", lambda pid: iter([17]))
    monkeypatch.setattr(terminal, "_columns_of_process", {17: 90}.get)
    assert terminal.columns_of(screen, launched) == 90
    with open(tmp_path / "log", "w") as log:  # mpiexec -n 4 sh -c 'mpilsgd train > log'
        assert terminal.columns_of(log, launched) is None
    reading, writing = os.pipe()
    with open(reading), open(writing, "w") as piped:
        assert terminal.columns_of(piped, launched) == 90


def test_launchers_are_found_among_the_ancestors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for pid, name, parent in (
        (30, "python", 20),
        (20, "hydra_pmi_proxy", 10),
        (10, "mpiexec.hydra) (", 5),
        (5, "sh", 1),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 0 0")
    monkeypatch.setattr(terminal, "_PROC", tmp_path)
    assert list(terminal._launchers(30)) == [10]
    assert list(terminal._launchers(31)) == []


def test_the_width_of_a_launchers_terminal() -> None:
    child, screen = _on_a_terminal("-c", "import time; print('up', flush=True); time.sleep(30)")
    try:
        _until(screen, "up")
        assert terminal._columns_of_process(child.pid)
    finally:
        child.kill()
        child.wait()
        os.close(screen)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, stdout=-1) as piped:
        assert terminal._columns_of_process(piped.pid) is None
        piped.communicate(b"\n")
    assert terminal._columns_of_process(2**22 + 1) is None


# Logs of other tools

LINE = {"step": 20, "epoch": 0.5, "train_loss": 0.75, "test_loss": None, "test_error": 0.25, "t_comm": 1.5}


def started(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("method: LSGD\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_log_in_csv_goes_on_where_the_run_does(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    log = logs.open_log("csv", folder)
    for step in (20, 40, 60):
        log.write({**LINE, "step": step})
    log = logs.open_log("csv", started(folder, LINE))  # resumed after step 20
    log.write({**LINE, "step": 40})
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["20", "40"] and rows[0]["test_loss"] == ""
    assert rows[1]["train_loss"] == "0.75"


def test_a_log_of_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = started(tmp_path / "run")
    log = logs.open_log("tensorboard", folder)
    log.write(LINE)
    log.write({**LINE, "step": 40, "test_error": 0.125})
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("test/error")] == [(20, 0.25), (40, 0.125)]
    assert {"train/loss", "seconds/comm", "epoch"} <= set(read.Tags()["scalars"])
    assert "test/loss" not in read.Tags()["scalars"]


def test_a_log_of_wandb_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is asked of the library, which is none of those that tests need."""
    begun: list[dict[str, Any]] = []
    told: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(log=lambda values, **where: told.append((values, where)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    folder = started(tmp_path / "run")
    logs.open_log("wandb", folder).write(LINE)
    logs.open_log("wandb", started(folder, LINE))  # resumed
    logs.open_log("wandb", started(folder))  # begun anew
    first, resumed, anew = (options["id"] for options in begun)
    assert first == resumed != anew
    assert begun[0]["name"] == "run" and begun[0]["config"] == {"method": "LSGD"}
    ((values, where),) = told
    assert values["test/error"] == 0.25 and "test/loss" not in values and where["step"] == 20


def test_a_missing_library_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("tensorboard", "wandb"):
        assert (
            f"log: {kind} is not installed: pip install 'mpilsgd[{kind}]'"
            in Config(log=kind, epochs=1).mistakes()
        )  # type: ignore[arg-type]
    assert Config(log="csv", epochs=1).mistakes() == []


def test_what_a_library_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("no key\nin many words")

    monkeypatch.setattr(logs, "_Wandb", refuses)
    with pytest.raises(InputError, match=r"^log: wandb: no key$"):
        logs.open_log("wandb", started(tmp_path / "run"))
