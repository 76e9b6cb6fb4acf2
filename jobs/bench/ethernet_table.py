"""The table of ethernet.sh: python ethernet_table.py FOLDER [ERROR]."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path, error: float | None) -> None:
    for speed in sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("report")
    ):
        runs = [read(path) for path in sorted(speed.iterdir()) if (path / "metrics.jsonl").is_file()]
        target = error or min(
            (run["best"] for run in runs if run["method"] in ("ddp", "AllreduceSGD")),
            default=min(run["best"] for run in runs),
        )
        best: dict[str, dict[str, Any]] = {}
        for run in runs:
            run["seconds"] = next((row["wall_s"] for row in run["rows"] if row["test_error"] <= target), None)
            rank = (run["seconds"] is None, run["seconds"] or 0.0, run["best"])
            if run["method"] not in best or rank < best[run["method"]]["rank"]:
                best[run["method"]] = {**run, "rank": rank}
        width = max(13, *map(len, best))
        print(f"\n{speed.name}: seconds to a test error of {100 * target:.1f} %")
        print(f"{'method':{width}}  rate  seconds  lowest error  s a step  communicating  MB sent a step")
        for name, run in sorted(best.items(), key=lambda item: item[1]["rank"]):
            last = run["rows"][-1]
            seconds = "never" if run["seconds"] is None else f"{run['seconds']:.0f}"
            comm = f"{last['t_comm'] / last['wall_s']:.1%}"
            print(
                f"{name:{width}}{run['rate']:>6}{seconds:>9}{run['best']:14.2%}{last['wall_s'] / last['step']:10.3f}"
                f"{comm:>15}{run['sent'] / last['step'] / 1e6:16.3f}"
            )


def read(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    interfaces = [line.split() for line in (path / "interfaces").read_text().splitlines()]
    method, _, rate = path.name.rpartition("-")
    best = min(row["test_error"] for row in rows)
    return {
        "method": method,
        "rate": rate,
        "rows": rows,
        "best": best,
        "sent": sum(int(line[2]) for line in interfaces),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else None)
