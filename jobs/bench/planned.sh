#!/usr/bin/env bash
# How far `mpilsgd plan` and `mpilsgd simulate` can be trusted: their seconds and bytes beside those of emulated hosts.
#   bash jobs/bench/planned.sh [METHOD ...]
# Needs root, iproute2, util-linux and cores that do nothing else.
#
#   SPEEDS   of every host's link, as tc writes them, with the bytes of a model for each ("1gbit:16e6 100mbit:4e6")
#   HOSTS    how many, with the ranks of each ("2x1 4x1 2x2")
#   STEP     seconds that a worker sleeps for its gradient (0.02)
#   OUTPUT   the file that holds the results (runs/planned.jsonl); it is added to
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

output=${OUTPUT:-$ROOT/runs/planned.jsonl}
read -ra speeds <<<"${SPEEDS:-1gbit:16e6 100mbit:4e6}"
read -ra layouts <<<"${HOSTS:-2x1 4x1 2x2}"
set_up report
find_mpi MPICH
mkdir -p "$(dirname "$output")"
emulated=$ROOT/jobs/emulated
trap '"$emulated/hosts.sh" down' EXIT

for speed in "${speeds[@]}"; do
  for layout in "${layouts[@]}"; do
    hosts=${layout%x*} ranks=${layout#*x}
    list=$(for ((i = 0; i < hosts; ++i)); do printf 'node%d:%d,' "$i" "$ranks"; done)
    say "${speed%:*}, $hosts hosts with $ranks rank(s)"
    "$emulated/hosts.sh" up "$hosts" "${speed%:*}"
    command=$(printf '%q ' env OMP_NUM_THREADS=1 "$MPIEXEC" -launcher rsh -launcher-exec "$emulated/rsh" -hosts "${list%,}" \
      -n $((hosts * ranks)) "$PY" -m mpi4py "$ROOT/jobs/bench/planned.py" measure "$output" "${speed#*:}" "${STEP:-0.02}" "$@")
    timeout 3600 "$emulated/hosts.sh" sh node0 "cd $(printf %q "$PWD") && $command" </dev/null
  done
done
"$PY" "$ROOT/jobs/bench/planned.py" table "$output"
