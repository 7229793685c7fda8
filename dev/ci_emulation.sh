#!/usr/bin/env bash
# Builds the CUDA and AMX kernels over their emulations, in a folder of its own, and runs on them every test that has a device
# or a kernel set: for machines with neither a GPU nor AMX. Says what it leaves out. (.ci/run runs it.)
#
#   PYTHON=.venv/bin/python dev/ci_emulation.sh       # the interpreter needs the test extra; 3 minutes on two cores
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=build/ci_emulation

"$python" -c "import pybind11" 2>/dev/null || "$python" -m pip install --quiet pybind11
command -v ninja >/dev/null || "$python" -m pip install --quiet ninja
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

"$python" -m pytest -q -p no:cacheprovider -m cuda tests
if "$python" -c "from llmc import _llmc; raise SystemExit('amx' not in _llmc.isa()['usable'])"; then
  "$python" -m pytest -q -p no:cacheprovider -k amx tests/test_ops.py tests/test_optim.py tests/test_isa.py tests/test_bindings.py
else
  echo "left out: the emulated AMX tiles need AVX-512 and AVX512-BF16, which this CPU lacks"
fi
