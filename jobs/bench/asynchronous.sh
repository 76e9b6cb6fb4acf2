#!/usr/bin/env bash
# EAMSGD and DOWNPOUR, asynchronous, with periods 1 and 16, CNN7 on CIFAR-10 (thesis, Fig. 4.3): the second picture of docs/measurements.md.
#   bash jobs/bench/asynchronous.sh --data_dir FOLDER [OPTIONS OF mpilsgd train, e.g. --epochs 10]
#
#   MPILSGD_RANKS   how many ranks (4)
#   OUTPUT          the folder of the runs (runs/asynchronous)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

ranks=${MPILSGD_RANKS:-4} output=${OUTPUT:-$ROOT/runs/asynchronous}
set_up report
find_mpi
mkdir -p "$output"
options=("$@") names=()

train() { # train NAME OPTIONS...
  local name=$1
  shift
  say "$name"
  names+=("$output/$name")
  LIMIT=36000 run_ranks "$ranks" mpilsgd train "$ROOT/jobs/eamsgd-cifar10.yaml" --seed 1 --epochs 3 --eval_every 0.5 \
    --checkpoint_every null --output "$output/$name" --overwrite true "$@" ${options[@]+"${options[@]}"} >"$output/$name.log" 2>&1 ||
    grep -q diverged "$output/$name.log" || { tail -n 20 "$output/$name.log" >&2; die "$name failed"; }
  grep -E 'test error of the centre|diverged' "$output/$name.log"
}

for tau in 1 16; do
  train "EAMSGD-0.99-tau$tau" --period "$tau" --momentum 0.99 --lr 0.005
  train "EAMSGD-0.9-tau$tau" --period "$tau" --momentum 0.9 --lr 0.01
  train "DOWNPOUR-0.005-tau$tau" --method Downpour --optimizer SGD --momentum 0 --period "$tau" --lr 0.005
  train "DOWNPOUR-0.05-tau$tau" --method Downpour --optimizer SGD --momentum 0 --period "$tau" --lr 0.05
done
mpilsgd report "${names[@]}" --output "$output/report"
