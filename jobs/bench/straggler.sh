#!/usr/bin/env bash
# What one slow worker costs each method: the same total of steps with and without one rank SLOW times as slow as the
# others, and the throughput that is kept:  bash jobs/bench/straggler.sh [OPTIONS OF mpilsgd train]
#
#   MPILSGD_RANKS   how many ranks (4)
#   SLOW            how many times as slow the last rank is (3)
#   BASE            all ranks are slowed down by this first, by sleeping, so that ranks that share cores do not
#                   compete for them: the ranks a core has, and some more (3)
#   STEPS           steps of a worker on average (64)
#   OUTPUT          the folder of the runs (runs/straggler)
#
# Without options it trains the mlp on digits; the table of docs/measurements.md is
#   bash jobs/bench/straggler.sh --model cnn7 --data cifar10 --data_dir DIR --batch_size 32 --lr 0.05
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

ranks=${MPILSGD_RANKS:-4} slow=${SLOW:-3} base=${BASE:-3} steps=${STEPS:-64}
output=${OUTPUT:-$ROOT/runs/straggler}
set_up report
find_mpi
mkdir -p "$output"

even=$(for ((r = 0; r < ranks; ++r)); do printf '%s%d:%s' "${comma-}" "$r" "$base"; comma=,; done)
uneven=${even%:*}:$("$PY" -c "print($base * $slow)")

train() { # train NAME OPTIONS...: once with equal ranks, once with a straggler
  local name=$1 which
  shift
  for which in even uneven; do
    say "$name, $which ranks"
    LIMIT=3600 run_ranks "$ranks" mpilsgd train --steps "$steps" --eval_every "$steps steps" --checkpoint_every null \
      --output "$output/$name-$which" --overwrite true --slow "${!which}" "$@" >"$output/$name-$which.log" 2>&1 ||
      { tail -n 20 "$output/$name-$which.log" >&2; die "$name failed"; }
  done
}

train AllreduceSGD --method AllreduceSGD "$@"
train LSGD --method LSGD --global_pull 0 --period 8 "$@"
train LSGD-asynchronous --method LSGD --global_pull 0 --period 8 --asynchronous true "$@"
train LSGD-wait-free --method LSGD --global_pull 0 --period 8 --asynchronous wait-free "$@"
train EASGD --method EASGD --period 8 "$@"
train EASGD-asynchronous --method EASGD --period 8 --asynchronous true "$@"
train Downpour --method Downpour --period 8 "$@"

"$PY" - "$output" "$ranks" "$slow" <<'END'
import json, pathlib, sys

output, ranks, slow = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
share = (ranks - 1 + 1 / slow) / ranks
print(f"\n{ranks} ranks, the last {slow:g} times as slow: a method that never waits keeps {share:.3f} of the throughput, "
      f"one that always waits {1 / slow:.3f}\n")
print(f"{'method':20}{'steps/s':>9}{'with straggler':>16}{'kept':>7}{'of what is possible':>21}{'waiting':>9}  steps of each")
for even in sorted(output.glob("*-even")):
    rows = [json.loads((folder / "summary.json").read_text()) for folder in (even, output / even.name.replace("-even", "-uneven"))]
    speed, slowed = (row["grad_evals"] / row["wall_s"] for row in rows)
    waiting = sum(rows[1]["t_wait"]) / ranks / rows[1]["wall_s"]
    each = rows[1].get("worker_steps", rows[1]["steps"])
    print(f"{even.name.removesuffix('-even'):20}{speed:9.2f}{slowed:16.2f}{slowed / speed:7.3f}{slowed / speed / share:21.3f}{waiting:9.0%}  {each}")
END
