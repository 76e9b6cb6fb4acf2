#!/usr/bin/env bash
# Training over an Ethernet, emulated between hosts on this machine: seconds to a test error and bytes over the wire, for
# mpilsgd's methods and for torch's DistributedDataParallel and PostLocalSGDOptimizer, on one model, data, seeds and rates;
# `torchft`, where it is installed, is its DiLoCo.
#   bash jobs/bench/ethernet.sh [OPTIONS OF mpilsgd train]
# Needs root, iproute2, util-linux and cores that do nothing else. Prints a table, draws OUTPUT/ethernet.png.
#
#   HOSTS    how many (4), RANKS each (1)
#   SPEEDS   of every host's link, as tc writes them ("1gbit 100mbit")
#   RATES    learning rates; the best of each method counts ("0.1 0.05")
#   SEEDS    a run for each ("1"); the mean of their curves counts
#   METHODS  which ("LSGD:across_dtype=bfloat16 EASGD:overlap=true:period=12 LocalSGD AllreduceSGD ddp postlocal");
#            options of their own, as many as wanted, stand behind colons
#   STEPS    a worker takes (600) and EVERY how many it is evaluated (24): AllreduceSGD and ddp, which talk at every step
#   LOCAL    the other methods take so many times as many of both (3)
#   PERIOD   of the other methods: steps between two rounds (72). Where EVERY times LOCAL is a multiple of it, workers
#            that have just met for a round need not wait for each other once more to be evaluated.
#   METRIC   of metrics.jsonl, to become small (test_error)
#   VALUE    of it, to come to (the lowest of ddp, or of all if it is left out); between evaluations curves are straight
#   OUTPUT   the folder of the runs (runs/ethernet); runs that lie there already are shown, too
#
# Without options the mlp trains on digits, some seconds a run; a row of docs/measurements.md took three minutes a seed and rate:
#   SEEDS="11 12 13 14" RATES=0.1 SPEEDS=100mbit bash jobs/bench/ethernet.sh --model cnn7 --data cifar10 --data_dir DIR --batch_size 32
#   LOCAL=2 EVERY=36 SEEDS=11 RATES=0.1 SPEEDS=1gbit bash jobs/bench/ethernet.sh --model cnn7 --data cifar10 --data_dir DIR --batch_size 32
# --lr, --seed and --output are RATES, SEEDS and OUTPUT here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

hosts=${HOSTS:-4} ranks=${RANKS:-1} output=${OUTPUT:-$ROOT/runs/ethernet} steps=${STEPS:-600} every=${EVERY:-24}
local=${LOCAL:-3} period=${PERIOD:-72}
read -ra speeds <<<"${SPEEDS:-1gbit 100mbit}"
read -ra rates <<<"${RATES:-0.1 0.05}"
read -ra seeds <<<"${SEEDS:-1}"
methods=(LSGD:across_dtype=bfloat16 EASGD:overlap=true:period=12 LocalSGD AllreduceSGD ddp postlocal)
[[ -z ${METHODS:-} ]] || read -ra methods <<<"$METHODS"
set_up report
find_mpi MPICH
mkdir -p "$output"
emulated=$ROOT/jobs/emulated
trap '"$emulated/hosts.sh" down' EXIT
list=$(for ((i = 0; i < hosts; ++i)); do printf '%snode%d:%d' "${comma-}" "$i" "$ranks"; comma=,; done)

on_hosts() { # on_hosts COMMAND...: on all ranks of all hosts
  local command
  command=$(printf '%q ' env OMP_NUM_THREADS=1 PEERS_INTERFACE=eth0 "$MPIEXEC" -launcher rsh -launcher-exec "$emulated/rsh" \
    -hosts "$list" -n $((hosts * ranks)) "$@")
  timeout 36000 "$emulated/hosts.sh" sh node0 "cd $(printf %q "$PWD") && $command" </dev/null
}

for speed in "${speeds[@]}"; do
  for entry in "${methods[@]}"; do
    IFS=: read -ra parts <<<"$entry"
    method=${parts[0]} own=() factor=$local
    for part in "${parts[@]:1}"; do own+=("--${part%%=*}" "${part#*=}"); done
    case $method in
      LSGD) own=(--method LSGD --pull 0.1 --period "$period" --global_period "$period" "${own[@]}") ;;
      EASGD) own=(--method EASGD --center_rate 0.9 --period "$period" "${own[@]}") ;;
      AllreduceSGD) own=(--method AllreduceSGD "${own[@]}") factor=1 ;;
      ddp) factor=1 ;;
      postlocal | torchft) own=(--period "$period" "${own[@]}") ;;
      *) own=(--method "$method" --period "$period" "${own[@]}") ;;
    esac
    common=(--steps $((steps * factor)) --eval_every "$((every * factor)) steps")
    for rate in "${rates[@]}"; do
      for seed in "${seeds[@]}"; do
        run=$output/$speed/$entry,lr=$rate,seed=$seed
        mkdir -p "$output/$speed"
        say "$speed, $entry, learning rate $rate, seed $seed"
        command=(mpilsgd train --checkpoint_every null --overwrite true)
        case $method in ddp | postlocal | torchft) command=(python -m mpi4py "$ROOT/jobs/bench/peers.py" "$method") ;; esac
        "$emulated/hosts.sh" up "$hosts" "$speed"
        options=("${own[@]}" "${common[@]}" "$@" --output "$run" --lr "$rate" --seed "$seed")
        rm -f "$run/interfaces" "$run/diverged"
        if on_hosts "${command[@]}" "${options[@]}" >"$run.log" 2>&1; then
          "$emulated/hosts.sh" bytes >"$run/interfaces"
        elif grep -q diverged "$run.log"; then
          mkdir -p "$run"
          touch "$run/diverged"
        else
          tail -n 20 "$run.log" >&2
          die "$run failed"
        fi
      done
    done
  done
done
"$PY" "$ROOT/jobs/bench/ethernet_table.py" "$output" "${METRIC:-test_error}" ${VALUE:+"$VALUE"}
for speed in "${speeds[@]}"; do mpilsgd report "$output/$speed"/*/ --output "$output/report-$speed"; done
