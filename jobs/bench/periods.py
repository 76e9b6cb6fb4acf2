"""The period that `mpilsgd plan` chooses beside a sweep: seconds to a test error.

    OMP_NUM_THREADS=1 python jobs/bench/periods.py DATA OUTPUT [METHOD...]     under the virtual clock, 0.03 s a step
    bash jobs/bench/periods.sh DATA OUTPUT [METHOD...]                         measured on emulated hosts

Four nodes of one worker on 100 Mbit/s train LeNet on MNIST. Each METHOD (LocalSGD LSGD EASGD) runs with the periods
at which rounds take 5 % and 10 % of the time, and with parts and the double of the first. DATA: a folder with mnist/.
OUTPUT: for the run directories; a run that is there is read, so take another one after a change.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from mpilsgd import cli
from mpilsgd.plan import Machine, Sizes
from mpilsgd.plan.advice import advise
from mpilsgd.reproduce.curves import lowest, seconds_to
from mpilsgd.train.models import MODELS
from mpilsgd.train.run_reader import Run, read_runs

BANDWIDTH, LATENCY, STEP_S = 12.5e6, 5e-5, 0.03
# from periods.sh: runs mpilsgd on the hosts; its last argument is the whole command, as rsh takes it
LAUNCH = shlex.split(os.environ.get("MPILSGD_LAUNCH", ""))
SHARES = 0.05, 0.1
ERRORS = (0.05, 0.03, 0.02, 0.017)
CLUSTER = f"--workers 4 --nodes 4 --bandwidth {BANDWIDTH:g} --latency {LATENCY:g} --compute {STEP_S:g}:0.1"
TRAIN = "--model lenet --data mnist --batch_size 32 --lr 0.1 --checkpoint_every null --threads 1"
OWN = {"EASGD": "--center_rate 0.9"}


def planned(method: str, share: float, step_s: float) -> int:
    """The period of all nodes."""
    numel = sum(p.numel() for p in MODELS["lenet"]((1, 28, 28), 10).parameters())
    machine = Machine((1, 1, 1, 1), bandwidth=BANDWIDTH, latency=LATENCY)
    settings = advise(Sizes({torch.float32: numel}), machine, step_s, share, [method])[0].settings
    return int(settings.get("global_period", settings["period"]))


def trained(folder: Path, data: Path, options: str) -> Run:
    if not (folder / "summary.json").exists():
        words = shlex.split(f"{'train' if LAUNCH else f'simulate {CLUSTER}'} {TRAIN} {options}")
        words += ["--data_dir", str(data / "mnist"), "--output", str(folder), "--overwrite", "true"]
        status = subprocess.call([*LAUNCH, shlex.join(words)]) if LAUNCH else cli.main(words)
        if status:
            sys.exit(status)
    return read_runs([folder])[0]


def run(method: str, period: int, data: Path, output: Path) -> Run:
    """Evaluated after rounds, every 48 steps or so; EASGD, whose rounds are before a step, some steps after them."""
    every = period * max(1, round(48 / period)) + (method == "EASGD")
    both = f"--global_period {period}" if method == "LSGD" else ""
    own = f"--method {method} --period {period} {both} {OWN.get(method, '')}"
    return trained(output / f"{method}-{period}", data, f"--steps 1440 --eval_every '{every} steps' {own}")


def step_seconds(data: Path, output: Path) -> float:
    """What a worker's step takes on the hosts: there are no rounds in these."""
    options = "--steps 200 --eval_every '200 steps' --method LocalSGD --period 1000"
    alone = trained(output / "alone", data, options)
    return float(np.mean(alone.summary["t_compute"]) + np.mean(alone.summary["t_data"])) / 200


def main(data: Path, output: Path, methods: list[str]) -> None:
    output /= "measured" if LAUNCH else "virtual"
    step_s = step_seconds(data, output) if LAUNCH else STEP_S
    print(f"a step takes {step_s:.4f} s")
    for method in methods:
        chosen = [planned(method, share, step_s) for share in SHARES]
        periods = sorted({*chosen, *(max(1, round(chosen[0] * 2.0**k)) for k in range(-5, 2))})
        runs = {period: run(method, period, data, output) for period in periods}
        told = " and ".join(f"{n} ({share:.0%})" for n, share in zip(chosen, SHARES, strict=True))
        print(f"\n{method}, planned: {told}; seconds to a test error, and over the least")
        print("period  comm  " + "  ".join(f"{100 * error:>6.1f} %       " for error in ERRORS) + "lowest")
        seconds = {period: [seconds_to(one, error) for error in ERRORS] for period, one in runs.items()}
        least = [min(column) for column in zip(*seconds.values(), strict=True)]
        for period, row in seconds.items():
            cells = [
                f"{s:8.2f} {s / b:5.2f}" if math.isfinite(s) else f"{'never':>14}"
                for s, b in zip(row, least, strict=True)
            ]
            summary = runs[period].summary
            share = float(np.mean(summary["t_comm"])) / summary["wall_s"]
            print(
                f"{period:6d}  {share:4.0%}  " + "  ".join(cells) + f"  {100 * lowest(runs[period]):.2f} %",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or ["LocalSGD", "LSGD", "EASGD"])
