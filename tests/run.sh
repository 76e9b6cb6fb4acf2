#!/usr/bin/env bash
# Sets everything up and runs the tests:  bash tests/run.sh [unit] [mpi] [cluster] [--all] [--slow NAME] [-- PYTEST OPTIONS]
#
#   unit          the tests of one process, and those of methods with ranks that are tasks of one; the CUDA kernels on
#                 an emulated device
#   mpi           the tests of several ranks: 1 (without whole jobs) and 2 on one node; equality with the simulations also
#                 with 3 and 4 on two emulated nodes (MPICH), and 2 on a second MPI where one can be had; 2 ranks whose
#                 vectors lie on an emulated device
#   cluster       MPICH on several hosts with TCP between them (needs root, iproute2 and util-linux), and batch jobs on a
#                 Slurm that is started for them (needs root, slurm-wlm and munge)
#   --all         also what is left out for time, as it says little that is new: the tests that are marked `brief` with
#                 no number of ranks; what goes by nodes with 4 ranks on two emulated ones; 3 ranks on one node;
#                 life cycles at 4 ranks; asynchrony and faults on the second MPI; trees of 5 and 7 ranks,
#                 and of 21 tasks; 4 tasks on two nodes in place of 2, and the identities with them; every method on
#                 the emulated device, some of them with 4 ranks on two nodes
#   --slow NAME   instead of these, the long tests whose name contains NAME (as pytest's -k), at MPILSGD_RANKS (4) ranks
#
# The last line is "N passed, N failed, N skipped" over all runs; the status is not 0 if any test failed, hung, died or
# was skipped for a reason that tests/tally.py does not list. See jobs/setup.sh for what is set up, and how to change it.
set -euo pipefail

usage() {
  sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'
  exit "$1"
}

parts=() slow="" all="" options=()
while (($#)); do
  case $1 in
    unit | mpi | cluster) parts+=("$1") ;;
    --all) all=1 ;;
    --slow)
      [[ $# -ge 2 ]] || usage 2 >&2
      slow=$2
      shift
      ;;
    --)
      shift
      options=("$@")
      break
      ;;
    -h | --help) usage 0 ;;
    *) usage 2 >&2 ;;
  esac
  shift
done
[[ ${#parts[@]} -gt 0 ]] || parts=(unit mpi cluster)

source "$(dirname "${BASH_SOURCE[0]}")/../jobs/setup.sh"
set_up dev,report
find_mpi
cd "$ROOT"
say "MPI: $MPI, started by $MPIEXEC${MPI4PY_LIBMPI:+, library $MPI4PY_LIBMPI}"

# Shared memory that killed ranks leave behind: ours, from this run, and mapped by nobody.
sweep() {
  local file
  find /dev/shm -maxdepth 1 \( -name 'mpich_shm_*' -o -name 'sm_segment.*' \) -user "$(id -u)" -newer "$scratch/start" 2>/dev/null | while read -r file; do
    grep -qsF "$file" /proc/[0-9]*/maps || rm -f "$file"
  done
}
lanes=()     # process groups in the background
end_lanes() { # an interrupt: they take down what they have set up
  local one
  trap '' INT TERM
  for one in ${lanes[@]+"${lanes[@]}"}; do kill -INT -- "-$one" 2>/dev/null || true; done
  for one in ${lanes[@]+"${lanes[@]}"}; do wait "$one" || true; done
}
scratch=$(mktemp -d)
touch "$scratch/start"
trap 'end_lanes; sweep; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
record=$scratch/record
mkdir "$record"

export OMP_NUM_THREADS=1 MPILSGD_TEST_RECORD=$record MPILSGD_MPIEXEC=$MPIEXEC MPILSGD_TEST_ALL=$all
select_tests=(-m "not slow")
[[ -t 1 ]] || select_tests+=(--color=no) # Open MPI's ranks always see a terminal
[[ -z $slow ]] || select_tests+=(-m slow -k "$slow")

# run NAME COMMAND...: one line before, the seconds after, the status for the tally.
run() {
  local name=$1 status=0 started=$SECONDS tmp
  shift
  say "$name"
  tmp=$(mktemp -d "$scratch/XXXXXX")
  MPILSGD_TEST_RUN=$name PYTEST_DEBUG_TEMPROOT=$tmp "$@" || status=$?
  echo "$status" >"$record/$name.status"
  rm -rf "$tmp"
  ((status == 0)) || sweep
  echo "   $((SECONDS - started)) s"
}

unit() { # unit [rest]: without those that run beside, or these
  local one paths=() name="unit" ignored=()
  for one in tests/unit/test_{in_process,many,plan,reproduce,simulate*,theory*}.py; do
    paths+=("$one") ignored+=("--ignore=$one")
  done
  if [[ -n ${1:-} ]]; then name="unit, simulations"; else paths=("${ignored[@]}" tests/unit); fi
  run "$name" "$PY" -m pytest -q -p no:cacheprovider "${select_tests[@]}" ${options[@]+"${options[@]}"} "${paths[@]}"
}

device() { # builds what has the CUDA part as C++, on a device that is emulated (csrc/emulated), where it is not there
  local folder=$VENV/emulated sources
  echo 1 >"$record/emulated device.status" # if it cannot be built
  sources=$(source_hash)
  if [[ $(cat "$folder/built" 2>/dev/null || true) != "$sources" ]]; then
    say "building the extension with an emulated device (up to some minutes)"
    rm -rf "$folder"
    CMAKE_ARGS="${CMAKE_ARGS:-} -DMPILSGD_CUDA=EMULATED" quietly "building the extension with an emulated device" \
      "$PY" -m pip install --no-deps --target "$folder" "$ROOT"
    printf '%s' "$sources" >"$folder/built"
  fi
  echo 0 >"$record/emulated device.status"
}

emulated() { # its kernels
  MPILSGD_TEST_CORE=$(echo "$VENV"/emulated/mpilsgd/_core*.so) run "emulated device" "$PY" -m pytest -q \
    -p no:cacheprovider "${select_tests[@]}" ${options[@]+"${options[@]}"} tests/unit/test_emulated_*.py \
    tests/unit/test_package.py::test_stubs_of_the_extension
}

emulated_ranks() { # emulated_ranks RANKS [NODES]: methods whose vectors lie there
  local select_tests=(-m "gpu and not slow") paths="tests/mpi/test_devices.py tests/mpi/test_launches.py tests/mpi/test_streams.py tests/mpi/test_staged.py $paths"
  export MPILSGD_TEST_CORE
  MPILSGD_TEST_CORE=$(echo "$VENV"/emulated/mpilsgd/_core*.so)
  [[ -z ${2:-} ]] || export MPIR_CVAR_NUM_CLIQUES=$2 MPIR_CVAR_CLIQUES_BY_BLOCK=1
  mpi "$1 ranks on an emulated device${2:+, $2 nodes}" "$1" "${2:-0}"
  unset MPILSGD_TEST_CORE MPIR_CVAR_NUM_CLIQUES MPIR_CVAR_CLIQUES_BY_BLOCK
}

tasks() { # tasks RANKS[xNODES] [PATH]: what tests methods at several ranks, with ranks that are tasks of one process
  local paths=() one chosen=(-k "$equalities or few_bits${all:+ or identities}")
  for one in every_method identities tree across_dtype few_bits; do paths+=("tests/mpi/test_$one.py"); done
  [[ -z ${2:-} ]] || paths=("$2") chosen=()
  export MPILSGD_TEST_TASKS=$1
  run "$1 tasks" "$PY" -m pytest -q -p no:cacheprovider -p no:pytest_mpi "${select_tests[@]}" \
    ${chosen[@]+"${chosen[@]}"} ${options[@]+"${options[@]}"} "${paths[@]}"
  unset MPILSGD_TEST_TASKS
}

mpi() { # mpi NAME RANKS [NODES]
  local ignored=() one
  for one in $without; do ignored+=("--ignore-glob=*/test_$one*"); done
  export MPILSGD_TEST_RANKS=$2 MPILSGD_TEST_NODES=${3:-0}
  run "$1" run_ranks "$2" "$PY" -m mpi4py -m pytest --with-mpi -x -q --no-summary -p no:cacheprovider \
    "${select_tests[@]}" ${only:+-k} ${only:+"$only"} ${ignored[@]+"${ignored[@]}"} ${options[@]+"${options[@]}"} $paths
}

cliques() { # cliques RANKS NODES: MPICH makes blocks of the ranks take each other for other nodes
  export MPIR_CVAR_NUM_CLIQUES=$2 MPIR_CVAR_CLIQUES_BY_BLOCK=1
  mpi "$1 ranks on $2 nodes, $MPI" "$1" "$2"
  unset MPIR_CVAR_NUM_CLIQUES MPIR_CVAR_CLIQUES_BY_BLOCK
}

all_ranks() { # all_ranks COUNT...
  local n
  for n in "$@"; do mpi "$n ranks, $MPI" "$n"; done
}

lock_step=tests/mpi/test_tree.py::test_lock_step_equals_the_oracle
trees() { # the larger ones
  paths=tests/mpi/test_tree.py all_ranks 5
  paths=$lock_step all_ranks 7
}

# What a run leaves out for time: the tests of jobs, asynchrony and life cycles need not run on every layout.
emulated_nodes() {
  local only=$equalities
  without="train asynchronous" cliques 3 2
  only=$equal
  # one rank a node is also what every run does by messages
  [[ -z $all ]] || without="" paths=tests/mpi/test_tree.py cliques 3 3
  without="train life_cycle $alike" cliques 4 2
}
without="" paths=tests/mpi only=""
# what one MPI, and two ranks, show as well as any others
alike="jobs optimizers real_inputs arguments info_bench heartbeat identities adding_a_method life_cycle"
equalities="simulation or oracle or uninterrupted or replay"
equal=$([[ -n $all || -n $slow ]] || echo "$equalities")

LIMIT=1200
lane() { # lane COMMAND, in the background: it takes one core and waits much. Its output comes after the foreground's
  set -m
  {
    trap 'exit 130' INT TERM # what it runs catches a signal and ends by itself
    "$1"
  } >"$scratch/$1.lane" 2>&1 </dev/null &
  lanes+=("$!")
  set +m
}
one_process() { # but for the unit tests
  [[ " ${parts[*]} " == " cluster " || $(uname) != Linux ]] || device
  [[ " ${parts[*]} " != *" mpi "* ]] || without=train all_ranks 1
  [[ " ${parts[*]} " == *" unit "* ]] || return 0
  unit rest
  [[ $(uname) != Linux ]] || emulated
}
cluster() {
  if [[ $MPI == MPICH ]] || find_mpi MPICH; then
    export MPILSGD_MPIEXEC=$MPIEXEC
    unset MPILSGD_TEST_RANKS MPILSGD_TEST_NODES
    run "cluster" "$PY" -m pytest -q -p no:cacheprovider "${select_tests[@]}" ${options[@]+"${options[@]}"} tests/cluster
  else
    say "MPICH: none here and none to be had, so several hosts and Slurm are not tested"
  fi
}
hosts_and_tasks() {
  [[ " ${parts[*]} " != *" cluster "* ]] || cluster
  [[ " ${parts[*]} " == *" unit "* ]] || return 0
  tasks "${all:+4x}2"
  [[ -z $all ]] || tasks 21 "$lock_step"
}
if [[ -z $slow ]]; then
  lane one_process
  lane hosts_and_tasks
fi
if [[ " ${parts[*]} " == *" unit "* ]]; then
  unit
  [[ -z $slow ]] || unit rest
fi
for one in ${lanes[@]+"${lanes[@]}"}; do
  wait "$one" || echo "$?" >"$record/the part beside with process $one.status"
done
lanes=()
for one in "$scratch"/*.lane; do [[ ! -f $one ]] || cat "$one"; done
if [[ " ${parts[*]} " == *" mpi "* && -n $slow ]]; then
  LIMIT=14400 all_ranks "${MPILSGD_RANKS:-4}"
elif [[ " ${parts[*]} " == *" mpi "* ]]; then
  all_ranks 2
  if [[ -n $all ]]; then
    without="train asynchronous life_cycle" only=$equalities all_ranks 3
    paths=tests/mpi/test_life_cycle.py all_ranks 4
    trees
  fi
  [[ $MPI != MPICH ]] || emulated_nodes
  if [[ $(uname) == Linux && $MPI == MPICH ]]; then
    paths=${all:+tests/mpi/test_every_method.py} emulated_ranks 2
    [[ -z $all ]] || only="simulation and (after-step or every-step or jacobi or LocalSGD-period or turns-3)" \
      paths=tests/mpi/test_every_method.py emulated_ranks 4 2
  fi
  other=MPICH
  [[ $MPI != MPICH ]] || other="Open MPI"
  if find_mpi "$other"; then
    say "now $MPI, started by $MPIEXEC"
    export MPILSGD_MPIEXEC=$MPIEXEC
    without="$alike train" only=$equal all_ranks 2
    [[ $MPI != MPICH ]] || emulated_nodes
  else
    say "$other: none here and none to be had, so not tested"
  fi
fi

"$PY" tests/tally.py "$record" "${parts[@]}"
