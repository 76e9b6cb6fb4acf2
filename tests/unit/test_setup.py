"""jobs/setup.sh: which torch it installs, what it builds, and that one sees it go on. Pip and Python are stand-ins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "jobs" / "setup.sh"
HAS_GPU = bool(list(Path("/dev").glob("nvidia[0-9]*")))
STAND_IN = """#!/usr/bin/env bash
if [[ $1 == -m ]]; then echo "${*:2}" >>"$LOG"; elif [[ $2 == *urlopen* ]]; then [[ -n ${REACHED:-} ]]; fi
"""
CPU = "--extra-index-url https://download.pytorch.org/whl/cpu"


def bash(folder: Path, script: str, **environment: str) -> str:
    """What a script prints that has sourced setup.sh and whose Python is the stand-in."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MPILSGD_"))}
    own = {"LOG": str(folder / "log"), "MPILSGD_VENV": str(folder), **environment}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source '{SETUP}'; PY='{python}'; {script}"],
        env={**kept, **own},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without GPU")
@pytest.mark.skipif(sys.platform != "linux", reason="needs a machine without GPU")
@pytest.mark.parametrize(
    ("environment", "installed", "told"),
    [
        ({"REACHED": "1"}, f"pip install {CPU} torch==2.13.0+cpu numpy", "without CUDA, as no NVIDIA GPU"),
        ({}, "pip install torch==2.13.0 numpy", "cannot be reached"),
        ({"REACHED": "1", "PIP_FIND_LINKS": "/x"}, "pip install torch==2.13.0 numpy", "torch==2.13.0 ("),
        ({"REACHED": "1", "MPILSGD_TORCH": "torch==2.5"}, "pip install torch==2.5 numpy", "torch==2.5 ("),
    ],
    ids=["CPU", "not reached", "pip was told where", "the user's"],
)
def test_which_torch(tmp_path: Path, environment: dict[str, str], installed: str, told: str) -> None:
    out, log = bash(tmp_path, "install_torch", **environment), tmp_path / "log"
    assert log.read_text() == f"{installed}\n" and told in out
    assert bash(tmp_path, "install_torch", **environment) == "" and log.read_text() == f"{installed}\n"
    bash(tmp_path, "install_torch", MPILSGD_TORCH="torch==2.13.0+cu130")
    assert log.read_text().splitlines()[1:] == [
        "pip uninstall -y torch",
        "pip install torch==2.13.0+cu130 numpy",
    ]


def test_a_torch_without_cuda_is_not_used_where_a_gpu_is(tmp_path: Path) -> None:
    """Set up on a login node, used on another: torch would take the processor without a word."""
    (tmp_path / "torch").write_text("torch==2.13.0+cpu")
    told = bash(tmp_path, "gpu_here() { true; }; (install_torch) || echo refused")
    assert "without CUDA" in told and "MPILSGD_TORCH=torch==2.13.0" in told and told.endswith("refused\n")
    assert bash(tmp_path, "gpu_here() { false; }; install_torch") == ""


def test_the_torch_of_a_python_is_found(tmp_path: Path) -> None:
    import torch

    ask = f"'{sys.executable}' -c \"$FIND_TORCH\""
    assert bash(tmp_path, ask) == f"{Path(torch.__file__).parents[1]}\n"
    (tmp_path / "torch-1.13.dist-info").mkdir()
    (tmp_path / "torch-1.13.dist-info" / "METADATA").write_text("Name: torch\nVersion: 1.13.0\n")
    assert bash(tmp_path, f"PYTHONPATH='{tmp_path}' {ask}") == ""  # too old


def test_nothing_is_built_twice(tmp_path: Path) -> None:
    """Extras that are new: their packages alone. Other sources: with all extras so far."""
    log = tmp_path / "log"

    def asked(sources: str, extras: str) -> list[str]:
        log.write_text("")
        bash(tmp_path, f"source_hash() {{ echo {sources}; }}; install_package {extras}")
        return log.read_text().splitlines()

    assert asked("a", "report") == [f"pip install -e {SETUP.parents[1]}[report]"]
    assert asked("a", "report") == []
    assert asked("a", "dev,report") == ["pip install mpilsgd[dev,report]"]
    assert asked("a", "dev") == asked("a", "report") == []
    assert asked("b", "report") == [f"pip install -e {SETUP.parents[1]}[dev,report]"]


def test_a_long_step_shows_that_it_goes_on(tmp_path: Path) -> None:
    """And where its log is; its output only if it fails."""
    slow = "read() { sleep 0.1; (( ++n < 3 )) && return 142; }; n=0; show_seconds 'a step' /x/log"
    assert re.fullmatch(r"(   a step: \d+ s so far \(log: /x/log\)\n){2}", bash(tmp_path, slow))
    out = bash(tmp_path, "quietly 'a step' echo well; (quietly 'a step' ls /nowhere) || echo \"status $?\"")
    assert re.fullmatch(
        rf"ls: .*/nowhere.*\nerror: a step failed \(the whole log: {tmp_path}/setup.log\)\nstatus 1\n", out
    )
