"""What users import and start: public names, type stubs, commands without MPI, methods closed or wrapped anew."""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mpilsgd
from mpilsgd import extension, methods

ROOT = Path(mpilsgd.__file__).parent
METHODS = [one for one in vars(methods).values() if inspect.isclass(one) and issubclass(one, mpilsgd.Method)]
METHODS.remove(mpilsgd.Method)


def sgd(model: torch.nn.Module | None = None) -> torch.optim.SGD:
    return torch.optim.SGD((model or torch.nn.Linear(3, 2)).parameters(), lr=0.1)


def step(opt: mpilsgd.Method, model: torch.nn.Module) -> None:
    opt.zero_grad()
    loss = model(torch.ones(1, 3)).square().sum()
    loss.backward()
    opt.step(loss=loss)


# Names and types


def test_public_names() -> None:
    """All are there, and type checkers see the same ones from the same modules."""
    (seen,) = [
        node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If)
    ]
    typed = {
        name.name: one.module for one in seen.body if isinstance(one, ast.ImportFrom) for name in one.names
    }
    assert typed.keys() | {"__version__"} == set(mpilsgd.__all__)
    for name, module in typed.items():
        assert getattr(mpilsgd, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="no attribute 'LSDG'"):
        mpilsgd.LSDG  # noqa: B018
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("name", [name for name in mpilsgd.__all__ if name != "__version__"])
def test_what_docstrings_mention_is_public(name: str) -> None:
    """`Names` of classes, and what "Raises:" lists."""
    text = inspect.getdoc(getattr(mpilsgd, name)) or ""
    raised = re.search(r"^Raises:\n((?: .*\n?)*)", text, re.MULTILINE)
    mentioned = set(re.findall(r"`([A-Z]\w*)[`(]", text))
    for line in re.findall(r"^    ([\w, ]+):", raised[1] if raised else "", re.MULTILINE):
        mentioned |= set(line.split(", "))
    assert [one for one in mentioned if not hasattr(mpilsgd, one) and not hasattr(builtins, one)] == []


def stub(node: ast.Module | ast.ClassDef) -> dict[str, Any]:
    """Name -> its parameters, or the names in a class."""
    found: dict[str, Any] = {}
    for one in node.body:
        if isinstance(one, ast.ClassDef):
            found[one.name] = stub(one)
        elif isinstance(one, ast.FunctionDef):
            given = [*one.args.posonlyargs, *one.args.args]
            fixed = any(
                isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in one.decorator_list
            )
            found[one.name] = len(given) - (isinstance(node, ast.ClassDef) and not fixed)
        elif isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            found[one.target.id] = None
    return {name: value for name, value in found.items() if name == "__init__" or not name.startswith("_")}


def real(thing: Any) -> dict[str, Any]:
    """The same of the module itself, by the signatures that pybind11 writes into docstrings."""
    found: dict[str, Any] = {}
    for name, value in vars(thing).items():
        if name.startswith("_") and name != "__init__":
            continue
        if inspect.isclass(value) or inspect.ismodule(value):
            found[name] = real(value)
        elif callable(getattr(value, "__func__", value)):
            first = (inspect.getdoc(getattr(thing, name)) or "").partition("\n")[0]
            signature = re.match(r"\w+\((.*)\)( -> |$)", first)
            if name == "__init__" and not signature:
                continue  # says that nobody but the extension makes one
            arguments = re.findall(r"(?:^|, )(\w+): ", signature[1]) if signature else []
            bound = inspect.isclass(thing) and not isinstance(value, staticmethod)
            found[name] = len(arguments) - bound  # self
        else:
            found[name] = None
    return found


@pytest.mark.skipif(extension.core is None, reason="needs the extension")
def test_stubs_of_the_extension() -> None:
    """Each name, and of each function how many arguments it takes."""
    told, there = stub(ast.parse((ROOT / "_core.pyi").read_text())), real(extension.core)
    there.pop("emulated", None)  # for tests alone
    enum = there.pop("DType")
    assert {"float32", "float64", "bfloat16", "float16"} <= enum.keys() & told.pop("DType").keys()
    if not extension.core.cuda:
        del told["Pending"], told["device"]
    for name, value in there.items():
        assert told.get(name, "missing in _core.pyi") == value, name
    assert told.keys() == there.keys()


# Wrong arguments


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [64, 0.1, "adaptive", torch.nn.Linear(1, 1)], ids=str)
def test_what_is_no_topology_is_refused(method: Any, wrong: Any) -> None:
    given = {"rho": 1.0} if method is mpilsgd.ADMM else {}
    with pytest.raises(TypeError, match=rf"^{method.__name__}: topology must be a Topology, not .*by name"):
        method(sgd(), wrong, **given)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, not 3"):
        mpilsgd.LSGD(sgd(), model=3)


# Closing, and wrapping anew


def test_with_closes() -> None:
    model = torch.nn.Linear(3, 2)
    with mpilsgd.LSGD(sgd(model)) as opt:
        step(opt, model)
    with pytest.raises(RuntimeError, match=r"this LSGD is closed$"):
        step(opt, model)


def test_with_does_not_close_after_an_exception() -> None:
    """Other ranks may go on, and would be waited for."""
    model = torch.nn.Linear(3, 2)
    with pytest.raises(KeyError), mpilsgd.LSGD(sgd(model)) as opt:
        raise KeyError
    step(opt, model)
    opt.close()


def test_a_cell_that_is_run_again() -> None:
    """The model stays, the optimizer and the topology are made anew, whatever became of those before."""
    model, seen = torch.nn.Linear(3, 2), []

    def cell() -> None:
        opt = mpilsgd.LSGD(sgd(model), mpilsgd.Topology(), period=2)
        seen.append(opt)
        for _ in range(3):
            step(opt, model)
        if len(seen) == 2:
            raise KeyError
        with opt.center():
            assert torch.isfinite(model.weight).all()

    cell()
    with pytest.raises(KeyError):
        cell()
    cell()
    with pytest.raises(RuntimeError, match="closed, as its parameters were wrapped anew"):
        step(seen[0], model)
    step(seen[-1], model)
    seen[-1].close()


def test_a_cell_with_workers_in_process_that_is_run_again() -> None:
    fails = [False, True, False]

    def worker() -> float:
        model = torch.nn.Linear(3, 2)
        with mpilsgd.LSGD(sgd(model), period=2) as opt:
            for _ in range(3):
                step(opt, model)
            if fails[0] and opt.topology.world.rank == 1:
                raise KeyError
        return float(model.weight.detach().sum())

    first = mpilsgd.in_process(worker, 2)
    del fails[0]
    with pytest.raises(mpilsgd.WorkerFailed):
        mpilsgd.in_process(worker, 2)
    del fails[0]
    assert mpilsgd.in_process(worker, 2) == first


# Without an MPI library

WITHOUT = """
import contextlib, io, sys
import torch
from mpilsgd import LSGD, NoMPI, Topology
from mpilsgd.cli import main

for line in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(line.split())
        except SystemExit as end:
            status = end.code
    print(f"<{line}> {status} {len(out.getvalue())} {err.getvalue()!r}")
    if line == "info":
        print([part for part in out.getvalue().splitlines() if part.startswith("MPI ")])
try:
    LSGD(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1))
except NoMPI as error:
    print("script:", error)
assert "mpi4py.MPI" not in sys.modules
"""
NEED_NONE = (
    "--version",
    "--help",
    *(f"{name} --help" for name in ("train", "simulate", "report", "info", "bench", "plan", "reproduce")),
    "train --print_config",
    "info",
    "plan --parameters 1e6 --step_s 0.1 --ranks 8 --nodes 2 --methods LSGD",
    "simulate --workers 2 --steps 2 --output {tmp}/run",
    "report {tmp}/run",
    "reproduce --list",
    "bench kernels --size 1e3 --repetitions 1",
)
NEED_ONE = ("train", "bench exchange", "info --tree")


def test_without_an_mpi_library(tmp_path: Path) -> None:
    lines = [line.format(tmp=tmp_path) for line in (*NEED_NONE, *NEED_ONE)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *lines],
        env={**os.environ, "MPI4PY_LIBMPI": "/nowhere", "MPLBACKEND": "agg"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    advice = r'no MPI library can be loaded \(MPI4PY_LIBMPI=/nowhere\): pip install "mpilsgd\[mpi\]"'
    for line in lines[: len(NEED_NONE)]:
        assert re.search(rf"^<{re.escape(line)}> 0 [1-9]\d* ''$", done.stdout, re.MULTILINE), done.stdout
    for line in NEED_ONE:
        told = rf"^<{line}> 2 0 'mpilsgd {line.split()[0]}: error: {advice}[^\n]*\\n'$"
        assert re.search(told, done.stdout, re.MULTILINE), (line, done.stdout)
    assert re.search(rf"^\['MPI +none: {advice}.*'\]$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(rf"^script: {advice}", done.stdout, re.MULTILINE), done.stdout
