#!/usr/bin/env bash
# The package as users get it: an sdist, a wheel made from that alone, and in an empty environment two ranks that train.
# bash tests/wheel.sh. torch is not installed again, but linked from the environment of jobs/setup.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../jobs/setup.sh"
set_up dev,report

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
empty=$scratch/venv

say "an sdist, and a wheel from it"
CMAKE_ARGS="${CMAKE_ARGS:-} -DMPILSGD_CUDA=OFF" quietly "python -m build" "$PY" -m build --outdir "$scratch/dist" "$ROOT"
"$PY" - "$scratch"/dist/*.tar.gz "$scratch"/dist/*.whl <<'END'
import sys, tarfile, zipfile

sdist = [name.partition("/")[2] for name in tarfile.open(sys.argv[1]).getnames()]
wheel = zipfile.ZipFile(sys.argv[2]).namelist()
for names, wanted in (
    (sdist, ["csrc/module.cpp", "mpilsgd/_core.pyi", "tests/run.sh", "jobs/setup.sh", "LICENSE"]),
    (wheel, ["mpilsgd/py.typed", "mpilsgd/_core.pyi", "mpilsgd/train/digits.npz"]),
):
    lacking = [name for name in wanted if name not in names]
    # what another build has left in the checkout is not this package's
    foreign = [name for name in names if name.endswith((".pyc", ".o")) or (names is sdist and name.endswith(".so"))]
    if lacking or foreign:
        sys.exit(f"{'sdist' if names is sdist else 'wheel'}: lacks {lacking}, holds {foreign}")
if sum(name.endswith(".so") for name in wheel) != 1 or any(name.startswith(("csrc/", "tests/")) for name in wheel):
    sys.exit(f"the wheel should hold the package and one extension: {wheel}")
END

say "an empty environment: pip install mpilsgd-*.whl[mpi,report]"
"${MPILSGD_PYTHON:-python3}" -m venv "$empty"
"$PY" - "$empty"/lib/python3*/site-packages <<'END'
import pathlib, sys, torch

home = pathlib.Path(torch.__file__).parents[1]
for pattern in ("torch", "torch-*.dist-info", "torchgen", "functorch", "nvidia*", "triton*"):
    for part in home.glob(pattern):
        (pathlib.Path(sys.argv[1]) / part.name).symlink_to(part)
END
quietly "pip install *.whl[mpi,report]" "$empty/bin/python" -m pip install "$(echo "$scratch"/dist/*.whl)[mpi,report]"

# Neither MPI, which is found when it runs, nor torch, whose every version will do.
core=$(echo "$empty"/lib/python3*/site-packages/mpilsgd/_core*.so)
! ldd "$core" | grep -E 'torch|c10|mpi|not found' || die "$core is linked with more than the system's libraries"

say "two ranks there"
unset MPI4PY_LIBMPI MPI4PY_MPIABI PYTHONPATH
export PATH=$empty/bin:$PATH OMP_NUM_THREADS=1 MPIEXEC_TIMEOUT=300
cp "$ROOT/tests/installed.py" "$scratch"
cd "$scratch"
mpiexec -n 2 python -m mpi4py installed.py
mpiexec -n 2 mpilsgd train --epochs 1 --output run </dev/null >train.log 2>&1 || { cat train.log && die "mpilsgd train failed"; }
mpilsgd report run >report.log 2>&1 || { cat report.log && die "mpilsgd report failed"; }
say "the wheel is well"
