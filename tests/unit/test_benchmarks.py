"""The scripts of the benchmarks: what they import is there, and the table of training over an Ethernet."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "jobs" / "bench"


@pytest.mark.parametrize("script", sorted(path.name for path in BENCH.glob("*.py")))
def test_what_a_script_imports_is_there(script: str) -> None:
    found = [
        node for node in ast.walk(ast.parse((BENCH / script).read_text())) if isinstance(node, ast.ImportFrom)
    ]
    own = [node for node in found if (node.module or "").partition(".")[0] == "mpilsgd"]
    assert own
    for node in own:
        exec(ast.unparse(node), {})


def test_the_table_of_an_ethernet(tmp_path: Path) -> None:
    """Seconds to what the best run comes to, between two evaluations by a straight line; errors in percent."""
    for method, values in {"LSGD": (4.0, 3.0, 2.0), "ddp": (4.0, 3.5, 2.5)}.items():
        run = tmp_path / "100mbit" / f"{method},lr=0.1,seed=1"
        run.mkdir(parents=True)
        rows = [
            {"step": k, "wall_s": 10.0 * k, "t_comm": k, "test_bits": value, "test_error": value / 10}
            for k, value in enumerate(values)
        ]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (run / "interfaces").write_text("eth0 1000 4000000\n")
    for more, seconds, first in (
        ([], ("15.0", "20.0"), "25 %"),
        (["test_bits", "3"], ("10.0", "15.0"), "bits 3"),
    ):
        command = [sys.executable, BENCH / "ethernet_table.py", tmp_path, *more]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
        assert told[0].startswith("100mbit: ") and told[0].endswith(first)
        table = {line.split()[0]: line.split() for line in told if line.startswith(("LSGD", "Distributed"))}
        assert (table["LSGD"][3], table["DistributedDataParallel"][3]) == seconds
    assert (tmp_path / "ethernet.png").stat().st_size > 10_000
