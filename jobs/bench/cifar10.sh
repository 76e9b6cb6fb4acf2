#!/usr/bin/env bash
# CNN7 on CIFAR-10 with every synchronous method and with plain SGD: a picture and a table of docs/measurements.md.
#   bash jobs/bench/cifar10.sh --data_dir FOLDER [OPTIONS OF mpilsgd train, e.g. --epochs 2]
#
#   MPILSGD_RANKS   how many ranks (4)
#   RATE            a learning rate for all, to compare some (without it each method's best of 0.05, 0.1, 0.2 over two passes)
#   OUTPUT          the folder of the runs (runs/cifar10, runs/cifar10-RATE)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

ranks=${MPILSGD_RANKS:-4} output=${OUTPUT:-$ROOT/runs/cifar10${RATE:+-$RATE}}
set_up report
find_mpi
mkdir -p "$output"
options=("$@") names=()

train() { # train NAME RANKS RATE OPTIONS...
  local name=$1 n=$2 rate=${RATE:-$3}
  shift 3
  say "$name, learning rate $rate"
  names+=("$output/$name")
  LIMIT=36000 run_ranks "$n" mpilsgd train "$ROOT/jobs/cnn7-cifar10.yaml" --seed 1 --lr "$rate" --output "$output/$name" \
    --overwrite true "$@" ${options[@]+"${options[@]}"} >"$output/$name.log" 2>&1 || { tail -n 20 "$output/$name.log" >&2; die "$name failed"; }
  grep 'test error of the centre' "$output/$name.log"
}

train LSGD "$ranks" 0.1 --method LSGD --global_pull 0
train LSGD-groups-of-2 "$ranks" 0.1 --method LSGD --group_size 2 --global_period 128
train EASGD "$ranks" 0.1 --method EASGD --center_rate 0.43
train LocalSGD "$ranks" 0.1 --method LocalSGD
train AllreduceSGD "$ranks" 0.2 --method AllreduceSGD
train SGD 1 0.1 --method AllreduceSGD
mpilsgd report "${names[@]}" --output "$output/report"
