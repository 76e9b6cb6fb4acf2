"""Fixtures of the tests of several ranks."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated
import pytest
import torch
from harness import CORE, TASKS, WORLD, on_every_rank

from mpilsgd.comm import waiting
from mpilsgd.extension import core


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Where ranks are tasks, every test makes them, in an order of its own. On an emulated device torch knows it."""
    if not (TASKS or CORE):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    seed = zlib.crc32(pyfuncitem.nodeid.encode())
    do = lambda: pyfuncitem.obj(**given)  # noqa: E731
    if CORE:
        core.emulated.seed(seed)
        do = emulated.emulating(do)
    on_every_rank(do, seed)
    return True


@pytest.fixture(autouse=bool(CORE))
def threads_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the package starts."""
    start = waiting.start_thread
    monkeypatch.setattr(waiting, "start_thread", lambda do, name: start(emulated.emulating(do), name))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that all ranks see; user modules in it can be imported."""
    name = WORLD.bcast(tempfile.mkdtemp(prefix="mpilsgd-train-") if WORLD.rank == 0 else None)
    monkeypatch.syspath_prepend(name)
    threads = torch.get_num_threads()
    yield Path(name)
    torch.set_num_threads(threads)
    WORLD.Barrier()
    if WORLD.rank == 0:
        shutil.rmtree(name, ignore_errors=True)


@pytest.fixture
def module(folder: Path) -> Callable[[str], str]:
    """Writes a module of the user's; gives its name."""
    count = iter(range(100))

    def make(text: str) -> str:
        name = f"{folder.name.replace('-', '_')}_{next(count)}"
        if WORLD.rank == 0:
            (folder / f"{name}.py").write_text(f"import torch\n{text}")
        WORLD.Barrier()
        return name

    return make
