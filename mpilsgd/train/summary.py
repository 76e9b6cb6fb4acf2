"""From what all ranks measured to a line of metrics.jsonl and to summary.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpilsgd.comm import Topology
from mpilsgd.methods import Method
from mpilsgd.train.config import Config
from mpilsgd.train.evaluation import Result
from mpilsgd.train.judged import figure_of
from mpilsgd.train.progress import Progress, histogram, mean
from mpilsgd.train.run_directory import METRICS

_OF_PROGRESS = ("step", "wall", "compute", "data", "comm", "wait", "loss_sum", "loss_count", "leads")
_OF_METHOD = ("rounds", "bytes_group", "bytes_across")


def measured(at: Progress, opt: Method) -> dict[str, Any]:
    """What this rank brings to `metrics_line`."""
    return {
        key: getattr(of, key) for of, keys in ((at, _OF_PROGRESS), (opt.metrics, _OF_METHOD)) for key in keys
    }


def figures_of(result: Result) -> dict[str, float | None]:
    """What an evaluation found, as it stands in metrics.jsonl and summary.json."""
    return {"test_loss": result.loss, "test_error": result.error}


def metrics_line(
    rows: Sequence[dict[str, Any]], workers: int, batches: int, leader: int, result: Result
) -> dict[str, Any]:
    """A line of metrics.jsonl.

    Args:
        rows: `measured` of every rank; workers: how many of them train; batches: in an epoch.
        leader: the last known leader of all, -1 for none; result: of the centre.
    """
    totals = {key: sum(row[key] for row in rows) for key in rows[0]}
    step = mean((row["step"] for row in rows), workers)
    line = {
        "step": step,
        "epoch": step / batches,
        "wall_s": totals["wall"] / len(rows),
        "grad_evals": totals["step"],
        "rounds": max(row["rounds"] for row in rows),
        "bytes_group": totals["bytes_group"],
        "bytes_across": totals["bytes_across"],
        "train_loss": totals["loss_sum"] / max(totals["loss_count"], 1),
        **figures_of(result),
        "leader": leader if leader >= 0 else None,
        **{f"t_{key}": totals[key] / workers for key in ("compute", "data", "comm", "wait")},
    }
    assert tuple(line) == METRICS
    return line | named(result)


def named(result: Result) -> dict[str, float]:
    """The further figures as they stand in the files."""
    return {f"test_{name}": value for name, value in result.more.items()}


def ranks_of(rows: Sequence[dict[str, Any]], workers: Sequence[int], step: float) -> dict[str, Any]:
    """What ranks.json holds: where each rank is at an evaluation. rows: `measured` of every rank."""
    seconds = {f"t_{key}": [row[key] for row in rows] for key in ("compute", "data", "comm", "wait")}
    steps, leads = ([row[key] for row in rows] for key in ("step", "leads"))
    return {"step": step, "workers": list(workers), "steps": steps, "leads": leads, **seconds}


def summary_of(
    rows: Sequence[dict[str, Any]],
    config: Config,
    topology: Topology,
    opt: Method,
    batches: int,
    result: Result,
) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        rows: of every rank its progress, its method's metrics, what its "own" model is worth and its "peak" memory.
        batches: in an epoch; result: of the centre.
    """
    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
    workers, size = opt.workers, len(rows)
    own: list[Result] = columns["own"]
    judged = [one.judged for one in own]
    best = min(workers, key=lambda r: (math.isnan(judged[r]), judged[r], r))
    name = figure_of([figures_of(result)]).key
    steps = mean(columns["step"], len(workers))
    summary = {
        "method": config.method,
        "world_size": size,
        "group_size": max(map(len, topology.groups)),
        "groups": topology.groups,
        "steps": steps,
        "epochs": steps / batches,
        "grad_evals": sum(columns["step"]),
        "test_error": result.error,
        "test_loss": result.loss,
        **named(result),
        "best_worker": {"rank": best, name: judged[best]},
        {"test_error": "worker_test_errors", "test_loss": "worker_test_losses"}[name]: [
            judged[r] for r in workers
        ],
        "leads": columns["leads"],
        "resets": columns["resets"],
        "rounds": max(columns["rounds"]),
        "bytes_group": sum(columns["bytes_group"]),
        "bytes_across": sum(columns["bytes_across"]),
        "wall_s": sum(columns["wall"]) / size,
        "peak_memory": columns["peak"],
        **{f"t_{key}": [columns[key][r] for r in workers] for key in ("compute", "data", "comm", "wait")},
    }
    if opt.asynchronous:
        summary["worker_steps"] = [columns["step"][r] for r in workers]
    if len(workers) < size:
        summary["workers"] = workers
    if any(columns["overflows"]):
        summary["overflows"] = [columns["overflows"][r] for r in workers]
    if any(columns["skipped"]):
        summary["skipped"] = columns["skipped"]
    if columns["periods"][workers[0]]:
        summary["periods"] = columns["periods"][workers[0]]  # the same on all
    if any(columns["staleness"]):
        summary["staleness"] = histogram(columns["staleness"])
    return summary
