"""Emulated hosts and a Slurm of its own, started and taken down here."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("MPILSGD_TEST_SECONDS", "240"))  # a test's limit, as in conftest.py
EMULATED = ROOT / "jobs" / "emulated"
HOSTS = EMULATED / "hosts.sh"
MPIEXEC = os.environ.get("MPILSGD_MPIEXEC") or shutil.which("mpiexec") or "mpiexec"


def call(*command: object, seconds: float = 60, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )


@contextlib.contextmanager
def emulated_hosts(count: int, rate: str = "") -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Hosts node0, node1, ...; gives what runs Python on them: run(ranks a host, arguments..., seconds=)."""
    call(HOSTS, "up", count, *([rate] if rate else [])).check_returncode()

    def run(ranks: int, *arguments: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        hosts = ",".join(f"node{k}:{ranks}" for k in range(count))
        launch = (
            f"{MPIEXEC} -launcher rsh -launcher-exec {EMULATED / 'rsh'} -hosts {hosts} -n {count * ranks}"
        )
        command = f"cd {ROOT} && OMP_NUM_THREADS=1 {launch} {sys.executable} " + " ".join(map(str, arguments))
        return call(HOSTS, "sh", "node0", command, seconds=seconds)

    try:
        yield run
    finally:
        call(HOSTS, "down").check_returncode()


needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "nsenter", "unshare"))),
    reason="needs root, iproute2 and util-linux",
)
needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "srun", "munged"))),
    reason="needs root, slurm-wlm and munge",
)
