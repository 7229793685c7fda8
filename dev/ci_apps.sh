#!/bin/sh
# Builds the C++ programs with plain CMake, without Python, and tests them. Usage: dev/ci_apps.sh [python] [build folder]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
build=${2:-build/apps}
cmake -S . -B "$build" -DLLMC_PYTHON=OFF -DLLMC_BUILD_APPS=ON
cmake --build "$build" --config Release --parallel "${LLMC_BUILD_JOBS:-2}" --target train_gpt2 test_gpt2
bin=$build
[ -x "$build/Release/train_gpt2" ] && bin=$build/Release # generators with several configurations
LLMC_APPS=$bin "$python" -m pytest -q tests/test_apps.py tests/test_gpt2_program.py
