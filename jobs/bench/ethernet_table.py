"""The table and the picture of ethernet.sh: python ethernet_table.py FOLDER [METRIC [VALUE]].

METRIC is a number of metrics.jsonl that is to become small, test_error if it is not given. VALUE is what to come to.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mpilsgd.colors import FAINT, METHODS, colors_of
from mpilsgd.train.figure_style import DASHES, STYLE, scale_y

PEERS = {
    "ddp": "DistributedDataParallel",
    "postlocal": "PostLocalSGDOptimizer",
    "torchft": "torchft's DiLoCo",
}
NEVER = float("inf")


def main(folder: Path, metric: str, value: float | None) -> None:
    speeds = {}
    for path in sorted(folder.iterdir()):
        runs = [read(run) for run in sorted(path.iterdir())] if path.is_dir() else []
        if means := over_seeds([run for run in runs if run is not None], path.name, metric):
            speeds[path.name] = best_of(means, value)
    if not speeds:
        sys.exit(f"no run in {folder} has come to its end")
    for speed, (target, runs) in speeds.items():
        print_table(speed, metric, target, runs)
    draw(speeds, metric, folder / "ethernet.png")
    print(f"\n{folder / 'ethernet.png'}")


def words(metric: str) -> str:
    return metric.replace("_", " ")


def scale(metric: str) -> float:
    """Errors are shown in percent."""
    return 100 if metric == "test_error" else 1


def read(path: Path) -> dict[str, Any] | None:
    named = re.fullmatch("(.*),lr=(.*),seed=.*", path.name)
    diverged = (path / "diverged").is_file()
    if named is None or not (diverged or (path / "interfaces").is_file()):
        return None
    method, *options = named[1].split(":")
    label = ", ".join([PEERS.get(method, method), *(option.removesuffix("=true") for option in options)])
    run = {"label": label, "method": method, "rate": named[2], "diverged": diverged}
    if not diverged:
        run["rows"] = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        run["sent"] = sum(int(line.split()[2]) for line in (path / "interfaces").read_text().splitlines())
    return run


def over_seeds(runs: list[dict[str, Any]], speed: str, metric: str) -> list[dict[str, Any]]:
    """The runs of one method and rate as one: the means over its seeds. Where a seed diverged, that is said instead."""
    keys = {"step": "step", "wall_s": "wall_s", "t_comm": "t_comm", "value": metric}
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if not run["diverged"] and any(row.get(metric) is None for row in run["rows"]):
            print(f"{speed}, {run['label']}: its rows have no {metric}")
        else:
            kinds.setdefault((run["label"], run["rate"]), []).append(run)
    means = []
    for same in kinds.values():
        if lost := sum(run["diverged"] for run in same):
            print(
                f"{speed}, {same[0]['label']}, rate {same[0]['rate']}: {lost} of {len(same)} seeds diverged"
            )
            continue
        rows = [
            {key: mean(row[of] for row in every) for key, of in keys.items()}
            for every in zip(*(run["rows"] for run in same), strict=True)
        ]
        lowest, sent = min(row["value"] for row in rows), mean(run["sent"] for run in same)
        means.append({**same[0], "seeds": len(same), "rows": rows, "lowest": lowest, "sent": sent})
    return means


def best_of(runs: list[dict[str, Any]], value: float | None) -> tuple[float, list[dict[str, Any]]]:
    """The value to come to (DistributedDataParallel's lowest, if none is given), and each method at its best rate."""
    reference = [run for run in runs if run["label"] == PEERS["ddp"]] or runs
    target = value if value is not None else min(run["lowest"] for run in reference)
    for run in runs:
        run["seconds"] = seconds_to(target, run["rows"])
    runs.sort(key=lambda run: (run["seconds"], run["lowest"]))
    best = {run["label"]: run for run in reversed(runs)}
    return target, [run for run in runs if best[run["label"]] is run]


def seconds_to(target: float, rows: list[dict[str, float]]) -> float:
    """When the curve first comes down to the target; between two evaluations it is a straight line."""
    times, values = [row["wall_s"] for row in rows], [row["value"] for row in rows]
    k = next((k for k, value in enumerate(values) if value <= target), None)
    if k is None:
        return NEVER
    if k == 0:
        return times[0]
    share = (values[k - 1] - target) / (values[k - 1] - values[k])
    return times[k - 1] + share * (times[k] - times[k - 1])


def print_table(speed: str, metric: str, target: float, runs: list[dict[str, Any]]) -> None:
    width = max(len(run["label"]) for run in runs)
    unit = " %" if metric == "test_error" else ""
    print(f"\n{speed}: seconds to {words(metric)} {scale(metric) * target:.4g}{unit}")
    print(f"{'method':{width}}  rate  seeds  seconds        lowest  s a step  communicating  MB sent a step")
    for run in runs:
        last = run["rows"][-1]
        step, wall = last["step"], last["wall_s"]
        seconds = "never" if run["seconds"] == NEVER else f"{run['seconds']:.1f}"
        print(
            f"{run['label']:{width}}{run['rate']:>6}{run['seeds']:>7}{seconds:>9}{scale(metric) * run['lowest']:14.4g}"
            f"{wall / step:10.3f}{last['t_comm'] / wall:15.1%}{run['sent'] / step / 1e6:16.3f}"
        )


def draw(speeds: dict[str, tuple[float, list[dict[str, Any]]]], metric: str, path: Path) -> None:
    shown = [run for _, runs in speeds.values() for run in runs]
    methods = dict(sorted((run["label"], run["method"]) for run in shown))
    labels, seen, styles = list(methods), Counter[str](), {}
    for label, color in zip(labels, colors_of(list(methods.values())), strict=True):
        hue = METHODS.get(methods[label], "")  # the peers share one
        styles[label] = {"color": color, "linestyle": DASHES[seen[hue] % len(DASHES)]}
        seen[hue] += 1
    with rc_context(STYLE):
        columns = len(speeds) if max(map(len, labels)) < 50 else 1  # of the legend
        tall = 0.22 * -(-len(labels) // columns)
        figure = Figure(figsize=(5.6 * len(speeds), 4.2 + tall), layout="constrained")
        axes = figure.subplots(1, len(speeds), sharey=True, squeeze=False)[0]
        lines: dict[str, Any] = {}
        for axis, (speed, (target, runs)) in zip(axes, speeds.items(), strict=True):
            axis.axhline(scale(metric) * target, color=FAINT, linewidth=1.2)
            for run in runs:
                seconds = [row["wall_s"] for row in run["rows"]]
                values = [scale(metric) * row["value"] for row in run["rows"]]
                lines[run["label"]] = axis.plot(seconds, values, **styles[run["label"]])[0]
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.xaxis.set_minor_formatter(
                FuncFormatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else "")
            )
            axis.grid(color=FAINT, linewidth=0.6, which="both")
            axis.set_title(speed.replace("gbit", " Gbit/s").replace("mbit", " Mbit/s"))
            axis.set_xlabel("training time [s]")
        scale_y(list(axes), np.array([scale(metric) * row["value"] for run in shown for row in run["rows"]]))
        axes[0].set_ylabel("test error [%]" if metric == "test_error" else words(metric))
        figure.legend([lines[label] for label in labels], labels, loc="outside upper center", ncols=columns)
        figure.savefig(path, bbox_inches="tight")  # long labels are wider than the axes


if __name__ == "__main__":
    _, folder, *rest = sys.argv
    main(Path(folder), rest[0] if rest else "test_error", float(rest[1]) if rest[1:] else None)
