"""What README and docs show: every Python block runs, every command is understood, every link leads somewhere."""

from __future__ import annotations

import argparse
import ast
import builtins
import functools
import importlib
import math
import re
import shlex
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mpilsgd
from mpilsgd.cli import _MODULES, COMMANDS
from mpilsgd.methods import Method
from mpilsgd.train import simulate
from mpilsgd.train.command_line import parse

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "jobs" / "README.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
WORKERS = {"trees.md": 3}  # others: 2
ELSEWHERE = (
    "job.md",
    "jobs/README.md",
    "CHANGELOG.md",
)  # what their commands do others test, or they are history
MAKES_WORKERS = ("in_process(", "simulate(")
SHORTER = {"100_000": "100"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    found = FENCE.findall(page.read_text())
    return [textwrap.dedent(code) for _, language, code in found if language in languages]


def with_blocks(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


# Python


def preamble() -> dict[str, Any]:
    """What a fragment may take for granted: a model, data, the ranks."""
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    dataset = torch.utils.data.TensorDataset(x, (x.norm(dim=1) > 1.18).long())
    loader = torch.utils.data.DataLoader(dataset, batch_size=20)

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    return {
        "mpilsgd": mpilsgd,
        "torch": torch,
        "dataset": dataset,
        "loader": loader,
        "batches": forever(),
        "model": torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)),
        "criterion": torch.nn.functional.cross_entropy,
        "evaluate": lambda model: None,
    }


def run(code: str, names: dict[str, Any]) -> None:
    """Statement by statement: one whose comment is an error raises it, one whose comment is a number or truth is it."""
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        assert statement.end_lineno is not None
        comment = lines[statement.end_lineno - 1].partition("  # ")[2].strip()
        text = ast.unparse(statement)
        error = re.match(r"(\w+Error)\b", comment)
        if error:
            with pytest.raises(getattr(builtins, error[1])):
                exec(text, names)
        elif isinstance(statement, ast.Expr):
            value = eval(text, names)
            said = re.match(r"(True|False|-?\d+(?:\.\d+)?)(?![\w:%])", comment)
            if said and isinstance(value, bool | float | int):
                told = ast.literal_eval(said[1])
                assert math.isclose(value, told, rel_tol=2e-3), f"{text} is {value}, the page says {told}"
        else:
            exec(text, names)


def run_blocks(codes: list[str], in_tasks: bool) -> None:
    names: dict[str, Any] = {}
    for code in codes:
        for method in [value for value in names.values() if isinstance(value, Method)]:
            method.close()
        names |= preamble()
        if in_tasks:
            names["topo"] = mpilsgd.Topology()
        run(code, names)
        if in_tasks:
            names["topo"].barrier()  # what one rank writes the others read


@pytest.mark.parametrize("page", with_blocks("python", "py")[1:], ids=name_of)  # README's: test_examples.py
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/first/checkpoint").mkdir(parents=True)  # of a run that some pages load
    torch.save(preamble()["model"].state_dict(), "runs/first/checkpoint/center.pt")
    codes = blocks(page, "python", "py")
    if any(word in code for code in codes for word in MAKES_WORKERS):
        run_blocks(codes, in_tasks=False)
    else:
        mpilsgd.in_process(lambda: run_blocks(codes, in_tasks=True), workers=WORKERS.get(page.name, 2))


def sides(diff: str) -> tuple[str, str]:
    """Before and after."""
    lines = diff.splitlines()
    before, after = ([line[1:] for line in lines if not line.startswith(sign)] for sign in "+-")
    return "\n".join(before), "\n".join(after)


@pytest.mark.parametrize("page", with_blocks("diff"), ids=name_of)
def test_what_comes_in_place_of_others_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for diff in blocks(page, "diff"):
        before, after = sides(diff)
        compile(before, name_of(page), "exec")
        mpilsgd.in_process(functools.partial(run_blocks, [after], in_tasks=True), workers=2)
        if "torch.distributed" in before:
            with socket.socket() as one:
                one.bind(("localhost", 0))
                port = one.getsockname()[1]
            for name, value in (
                ("MASTER_ADDR", "localhost"),
                ("MASTER_PORT", port),
                ("RANK", 0),
                ("WORLD_SIZE", 1),
            ):
                monkeypatch.setenv(name, str(value))
            run(before, preamble())


def test_the_readme_is_short_and_shows_the_example() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    (script,) = blocks(ROOT / "README.md", "python")
    assert script == (ROOT / "examples" / "train.py").read_text()
    assert sum(bool(line.strip()) for line in script.splitlines()) <= 20
    rows = re.findall(r"^\| `(\w+)`", text.partition("## The methods")[2].partition("\n## ")[0], re.MULTILINE)
    kinds = {name: kind for name, kind in vars(mpilsgd.methods).items() if isinstance(kind, type)}
    known = {name for name, kind in kinds.items() if issubclass(kind, Method)}
    assert known - {"Method"} | {"RunningAverage"} == set(rows)


# Commands

COMMAND = re.compile(r"(?<![\w./-])mpilsgd (?:" + "|".join(COMMANDS) + r")\b[^`\n|;&]*")
STAND_INS: dict[str, str | None] = {"PACKAGE.MODULE:CALLABLE": "mlp", "N": "3", "RUN...": "runs/x"}
NEEDED = {"report": ["x"], "watch": ["x"], "export": ["x", "-o", "x.pt"], "bench": ["kernels"]}
NEEDED["plan"] = ["--parameters", "1", "--step_s", "1"]
STAND_INS |= dict.fromkeys(("--option", "value", "..."))  # left out


def commands(page: Path) -> Iterator[list[str]]:
    """What follows `mpilsgd`, in code blocks and in code within the text."""
    text = page.read_text().replace("\\\n", " ")
    text = text.partition("\n## What came out")[0]  # of papers.md: test_reproduce.py looks at these
    for found in COMMAND.findall(text):
        said = re.split(r" +# | \(| and | on \d", found)[0].strip().rstrip(":,.")
        words = [STAND_INS.get(word, word) for word in shlex.split(said)[1:]]
        yield [word for word in words if word is not None]


def without(words: list[str], option: str) -> list[str]:
    """It and its value."""
    if option not in words:
        return words
    at = words.index(option)
    return words[:at] + words[at + 2 :]


def check(words: list[str]) -> None:
    command, rest = words[0], words[1:]
    if command in ("train", "simulate"):
        rest = [
            word for word in without(rest, "--resume") if not re.match(r"(CONFIG|config|runs/.*)\.yaml", word)
        ]
        if command == "simulate":
            _, rest = simulate._parser().parse_known_args(rest)
        rest = ["mlp" if word == "package.module:callable" else word for word in rest]
        try:
            parse(rest)
        except SystemExit as end:  # --help
            assert not end.code
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(_MODULES.get(command, f"mpilsgd.train.{command}")).add_arguments(parser)
    if not rest or command == "plan":
        rest = [*NEEDED.get(command, ()), *rest]
    parser.parse_args(rest)


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if name_of(page).removeprefix("docs/") not in ELSEWHERE and COMMAND.search(page.read_text())
    ],
    ids=name_of,
)
def test_commands_are_understood(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    wrong = []
    for words in dict.fromkeys(map(tuple, commands(page))):
        try:
            check(list(words))
        except (Exception, SystemExit) as error:
            if "is not installed" in str(error):  # an extra
                continue
            wrong.append(f"mpilsgd {shlex.join(words)}: {error} {capsys.readouterr().err}")
    assert not wrong, "\n".join(wrong)


# Links

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def headings(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return set(re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE))


def on_github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def on_the_site(heading: str) -> str:
    text = re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """On the site and where the repository is browsed."""
    wrong = []
    for path, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            wrong.append(f"{path}: is not there")
        elif anchor:
            known = {on_github(heading) for heading in headings(target)}
            known &= {on_the_site(heading) for heading in headings(target)}
            if anchor not in known:
                wrong.append(f"{path}#{anchor}: no such heading, or one with another anchor on the site")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", page.read_text())
    named = set(re.findall(r"(?<![\w./-])(?:jobs|tests|examples|docs|csrc|mpilsgd)/[\w./-]*\w", text))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> Iterator[str]:
        for one in entry if isinstance(entry, list) else entry.values():
            yield from [one] if isinstance(one, str) else pages(one)

    shown = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(shown) == sorted(["index.md", *(page.name for page in DOCS)])


# Messages


@functools.cache
def texts_of_the_source() -> str:
    """All that stands in strings of the package, one a line: an f-string's parts are lines of their own."""
    found = []
    for path in (ROOT / "mpilsgd").rglob("*.py"):
        found += [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    return "\n".join(text for text in found if isinstance(text, str))


OF_OTHERS = ("cannot load MPI library", "libmpi.so.40", "not enough slots", "run as root", "MASTER_ADDR")


def test_the_messages_to_search_for_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 50
    parts = [
        part.strip(" …")
        for row in rows
        for message in re.findall(r"`([^`]+)`", row)
        if not any(word in message for word in OF_OTHERS)
        for part in message.split("…")
    ]
    missing = [part for part in parts if len(part) > 3 and part not in texts_of_the_source()]
    assert not missing, "\n".join(missing)
