#!/usr/bin/env bash
# The sweep of periods.py, measured on four emulated hosts of 100 Mbit/s:
#   bash jobs/bench/periods.sh DATA OUTPUT [METHOD ...]
# Needs root, iproute2, util-linux and cores that do nothing else.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

data=$(readlink -f "${1:?no folder with mnist/}")
output=$(readlink -m "${2:?no folder for the runs}")
shift 2
set_up report
find_mpi MPICH
emulated=$ROOT/jobs/emulated
trap '"$emulated/hosts.sh" down' EXIT
"$emulated/hosts.sh" up 4 100mbit
command=$(printf '%q ' env OMP_NUM_THREADS=1 "$MPIEXEC" -launcher rsh -launcher-exec "$emulated/rsh" \
  -hosts node0:1,node1:1,node2:1,node3:1 -n 4 "$PY" -m mpi4py -m mpilsgd.cli)
MPILSGD_LAUNCH=$(printf '%q ' "$emulated/hosts.sh" sh node0 "cd $(printf %q "$PWD") && $command") \
  "$PY" "$ROOT/jobs/bench/periods.py" "$data" "$output" "$@" </dev/null
