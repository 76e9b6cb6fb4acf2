#!/usr/bin/env bash
# Sets everything up in the checkout, trains a small network on handwritten digits with Leader SGD on four ranks, and
# draws the report:  bash jobs/quickstart.sh [OPTIONS OF mpilsgd train]
#
#   MPILSGD_RANKS     how many ranks (4)
#   See jobs/setup.sh for what is set up, and how to change it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ranks=${MPILSGD_RANKS:-4}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "MPILSGD_RANKS=$ranks: should be a number of ranks, 1 or more"
run=$ROOT/runs/quickstart

set_up report
find_mpi
say "training on $ranks ranks ($MPI, $MPIEXEC): mpilsgd train jobs/quickstart.yaml"
LIMIT=1200 run_ranks "$ranks" mpilsgd train "$ROOT/jobs/quickstart.yaml" --output "$run" --overwrite true "$@"
say "drawing the report"
mpilsgd report "$run"

# What the launcher needs on this machine, for the commands to copy.
needs=""
[[ -z ${MPI4PY_LIBMPI:-} ]] || needs+="
  export MPI4PY_LIBMPI='$MPI4PY_LIBMPI'"
[[ $MPI != "Open MPI" ]] || needs+="
  export ${OPENMPI[*]}"
start=$(printf '%q' "$MPIEXEC")
[[ $MPIEXEC != "$VENV/bin/mpiexec" ]] || start=mpiexec
cat <<END

The run is in $run, its figures in $run/report.
To try next, another method and both in one picture:

  cd '$ROOT'; source '$VENV/bin/activate'$needs
  $start -n $ranks mpilsgd train jobs/quickstart.yaml --method EASGD --output runs/easgd
  mpilsgd report runs/quickstart runs/easgd --output runs/report
  mpilsgd train --help
END
