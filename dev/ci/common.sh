# Sourced by emulation.sh, cuda.sh and sanitizers.sh. The first two build in one folder, one after the other: what they have in common,
# which is all but the device, is compiled once. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(command -v "${PYTHON:-python3}")
build=build/ci

"$python" -c "import pybind11, scikit_build_core, cmake, ninja" 2>/dev/null ||
  "$python" -m pip install --quiet pybind11 "scikit-build-core>=0.11" cmake ninja

# build_extension -D...: builds in $build (its output goes to $build/log), and puts an `llmc` with the extension first on PYTHONPATH.
build_extension() {
  mkdir -p "$build"
  "$python" -m cmake -S . -B "$build" -G Ninja "-DCMAKE_MAKE_PROGRAM=$("$python" -c 'import os, ninja; print(os.path.join(ninja.BIN_DIR, "ninja"))')" \
    "-DPython_EXECUTABLE=$python" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" "$@" >"$build/log" 2>&1 &&
    "$python" -m cmake --build "$build" --parallel "${LLMC_BUILD_JOBS:-2}" >>"$build/log" 2>&1 ||
    { tail -40 "$build/log"; exit 1; }
  local site
  site=$("$python" dev/ci/make_site.py "$build")
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  "$python" -c "from importlib.util import find_spec; found = find_spec('llmc').origin; assert found.startswith('$site/'), found"
  echo "built in $SECONDS s"
}
