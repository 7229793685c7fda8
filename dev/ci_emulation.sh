#!/usr/bin/env bash
# Builds the CUDA and AMX kernels over their emulations, in a folder of its own, and runs tests on them: what has neither a
# GPU nor a CPU with AMX. The emulated tiles want AVX-512. Needs g++, cmake, ninja, and the test extra of llmc.
#
#   PYTHON=.venv/bin/python dev/ci_emulation.sh           # what .ci/run runs: every op, each kind of test
#   PYTHON=.venv/bin/python dev/ci_emulation.sh --all     # every test that has a device or a kernel set
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=build/ci_emulation

mkdir -p "$build"
"$python" -m cmake --version >/dev/null 2>&1 && cmake=("$python" -m cmake) || cmake=(cmake)
"${cmake[@]}" -S . -B "$build" -G Ninja -DLLMC_CUDA_EMULATION=ON -DLLMC_AMX_EMULATION=ON \
  "-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')" \
  "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" >"$build/log"
"${cmake[@]}" --build "$build" --parallel "${LLMC_BUILD_JOBS:-2}" >>"$build/log" 2>&1 || { tail -40 "$build/log"; exit 1; }

rm -rf "$build/site" && mkdir -p "$build/site"
cp -r src/llmc "$build/site/llmc"
rm -f "$build"/site/llmc/_llmc*.so
cp "$build"/_llmc*.so "$build/site/llmc/"
cat >"$build/site/sitecustomize.py" <<'PY'
# An editable llmc would be found before this one.
import sys

sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
PY
export PYTHONPATH="$PWD/$build/site${PYTHONPATH:+:$PYTHONPATH}"
echo "built in $SECONDS s"
