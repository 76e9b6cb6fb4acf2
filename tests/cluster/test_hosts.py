"""Several hosts with real TCP between them: what crosses the interfaces, and training."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from emulation import call, emulated_hosts, needs_hosts

pytestmark = needs_hosts
HERE = Path(__file__).parent


@pytest.mark.parametrize("hosts", [pytest.param(2, marks=pytest.mark.brief()), 3])
def test_one_copy_a_host_crosses(hosts: int) -> None:
    """Bytes on the interfaces a round, and those counted, against the theory: nothing for the second rank of a host."""
    with emulated_hosts(hosts) as run:
        done = run(2, "-m", "mpi4py", HERE / "rounds.py", "eth0", 8_000_000, 4, seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 24, done.stdout
    for name, across, *numbers in rows:
        measured, _, counted, theory = map(float, numbers)
        assert 0.97 < measured / theory < 1.05, (name, across, measured, theory)
        assert 0.97 < counted / theory < 1.03, (name, across, counted, theory)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--method LSGD --period 8", marks=pytest.mark.brief()),  # as on Slurm's nodes
        "--method EASGD --asynchronous true --period 4",
        "--method EASGDTree --period 2 --degree 2",
    ],
)
def test_trains(options: str, tmp_path: Path) -> None:
    with emulated_hosts(2) as run:
        done = run(
            2,
            "-m",
            "mpi4py",
            "-m",
            "mpilsgd.cli",
            "train",
            *options.split(),
            "--epochs",
            15,
            "--output",
            tmp_path / "run",
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_error"] < 0.2


def test_a_node_that_vanishes_ends_the_job_with_its_name(tmp_path: Path) -> None:
    """Its network goes: nothing closes a connection, MPI waits for ever."""
    with emulated_hosts(2) as run:
        rows = tmp_path / "run" / "metrics.jsonl"

        def vanish() -> None:
            while not rows.is_file():
                time.sleep(0.5)
            call("ip", "-n", "mpilsgd-node1", "link", "set", "eth0", "down")

        cut = threading.Thread(target=vanish, daemon=True)
        cut.start()
        train = ["-m", "mpi4py", "-m", "mpilsgd.cli", "train", "--epochs", 100000, "--patience", 10]
        train += ["--output", rows.parent]
        done = run(2, *train)
    cut.join(1)
    assert done.returncode != 0
    assert "node node1 (ranks 2 to 3) has not been heard of" in done.stderr, done.stdout + done.stderr
