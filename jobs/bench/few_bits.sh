#!/usr/bin/env bash
# What few bits between nodes cost in accuracy: the test error and the bytes across of each method with each across_dtype, on
# one model, data and seeds:  bash jobs/bench/few_bits.sh [OPTIONS OF mpilsgd train]
# MPICH emulates the nodes on this machine.
#
#   MPILSGD_RANKS   how many ranks (4) on NODES nodes (2)
#   METHODS         which, options of their own behind colons ("LSGD EASGD LocalSGD DiLoCo:outer_momentum=0.5")
#   TYPES           of across_dtype ("null bfloat16 int8 int4")
#   SEEDS           a run for each ("1"); the table has the means
#   PERIOD          steps between two rounds (8)
#   OUTPUT          the folder of the runs (runs/few-bits); runs that are there already are not repeated
#
# Without options the mlp trains on digits, 10 passes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

ranks=${MPILSGD_RANKS:-4} nodes=${NODES:-2} period=${PERIOD:-8} output=${OUTPUT:-$ROOT/runs/few-bits}
read -ra methods <<<"${METHODS:-LSGD EASGD LocalSGD DiLoCo:outer_momentum=0.5}"
read -ra types <<<"${TYPES:-null bfloat16 int8 int4}"
read -ra seeds <<<"${SEEDS:-1}"
set_up report
find_mpi MPICH
mkdir -p "$output"
export MPIR_CVAR_NUM_CLIQUES=$nodes MPIR_CVAR_CLIQUES_BY_BLOCK=1

for entry in "${methods[@]}"; do
  IFS=: read -ra parts <<<"$entry"
  own=(--method "${parts[0]}")
  case ${parts[0]} in
    AllreduceSGD | ADMM) ;;
    LSGD) own+=(--period "$period" --global_period "$period") ;;
    *) own+=(--period "$period") ;;
  esac
  for part in "${parts[@]:1}"; do own+=("--${part%%=*}" "${part#*=}"); done
  for type in "${types[@]}"; do
    for seed in "${seeds[@]}"; do
      run=$output/$entry,$type,$seed
      [[ ! -f $run/summary.json ]] || continue
      say "$entry, $type, seed $seed"
      LIMIT=36000 run_ranks "$ranks" mpilsgd train --epochs 10 --eval_every 10 --checkpoint_every null --batch_size 8 \
        --output "$run" --overwrite true --across_dtype "$type" --seed "$seed" "${own[@]}" "$@" >"$run.log" 2>&1 ||
        { tail -n 20 "$run.log" >&2; die "$run failed"; }
    done
  done
done
"$PY" - "$output" <<'END'
import collections, json, pathlib, statistics, sys

rows = collections.defaultdict(list)
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/summary.json")):
    entry, across, _ = path.parent.name.rsplit(",", 2)
    rows[entry, across].append(json.loads(path.read_text()))
print("method | across_dtype | test error, % | test loss | MB across | seeds")
for (entry, across), runs in rows.items():
    mean = {name: statistics.mean(run[name] for run in runs) for name in ("test_error", "test_loss", "bytes_across")}
    numbers = f"{100 * mean['test_error']:.2f} | {mean['test_loss']:.4f} | {mean['bytes_across'] / 1e6:.2f}"
    print(f"{entry} | {across} | {numbers} | {len(runs)}")
END
