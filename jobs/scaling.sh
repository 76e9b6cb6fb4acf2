#!/usr/bin/env bash
# How training scales: the same number of steps a worker on 2, 4, 8, ... ranks, a table and one report.
#   bash jobs/scaling.sh [CONFIG.yaml] [--option value ...]                 on this machine, by mpiexec
#   sbatch -N 4 --ntasks-per-node 8 jobs/scaling.sh --method EASGDTree      on Slurm: up to all ranks of the job
#
#   MPILSGD_RANKS   how many ranks at most (on Slurm those of the job, else the cores of this machine)
#   STEPS           of a worker (200)
#   OUTPUT          the folder of the runs (runs/scaling, or runs/scaling-JOBID)
#SBATCH --job-name=mpilsgd-scaling
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  cd "$SLURM_SUBMIT_DIR"
  if [[ -f jobs/setup.sh ]]; then source jobs/setup.sh && set_up report && any_mpi; fi
  ranks=${MPILSGD_RANKS:-$SLURM_NTASKS} output=${OUTPUT:-runs/scaling-$SLURM_JOB_ID}
  start() { srun --mpi="${MPILSGD_SRUN_MPI:-pmi2}" --kill-on-bad-exit=1 -n "$1" "${@:2}"; }
else
  source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
  set_up report
  find_mpi
  ranks=${MPILSGD_RANKS:-$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)} output=${OUTPUT:-$ROOT/runs/scaling}
  start() { LIMIT=36000 run_ranks "$@"; }
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # the same for few ranks and many
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
steps=${STEPS:-200}
mkdir -p "$output"
names=()
for ((n = 2; n <= ranks; n *= 2)); do
  echo "== $n ranks"
  start "$n" mpilsgd train "$@" --steps "$steps" --eval_every "$steps steps" --checkpoint_every null \
    --output "$output/ranks-$n" --overwrite true >"$output/ranks-$n.log" 2>&1 || { tail -n 20 "$output/ranks-$n.log" >&2; exit 1; }
  names+=("$output/ranks-$n")
done
((${#names[@]})) || { echo "error: it takes 2 ranks at least, not $ranks: see MPILSGD_RANKS" >&2; exit 2; }
python3 - "${names[@]}" <<'END'
import json, pathlib, sys

print(f"\n{'ranks':>6}{'workers':>9}{'steps/s':>10}{'a worker':>10}{'efficiency':>12}{'communicating':>15}{'test error':>12}")
first = None
for folder in map(pathlib.Path, sys.argv[1:]):
    run = json.loads((folder / "summary.json").read_text())
    workers = len(run["t_comm"])
    speed = run["grad_evals"] / run["wall_s"]
    own = speed / workers
    first = first or own
    share = sum(run["t_comm"]) / workers / run["wall_s"]
    print(f"{run['world_size']:6}{workers:9}{speed:10.1f}{own:10.1f}{own / first:12.0%}{share:15.1%}{run['test_error']:12.2%}")
END
mpilsgd report "${names[@]}" --output "$output/report"
