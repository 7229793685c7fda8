#!/usr/bin/env bash
# Everything that wants a GPU, in one command and at most 8 minutes: builds for the card that is here, runs the cuda tests,
# compute-sanitizer, parity with PyTorch, 40 training steps beside the CPU's, and the short benchmark. Prints one table last
# and writes build/gpu_check/results.json. A stage that fails does not stop the others.
#
#   dev/gpu_check.sh              # PYTHON=... chooses the interpreter: it needs numpy, pytest, torch, pybind11 and cmake
#   dev/gpu_check.sh --dry-run    # a rehearsal on the emulated device, without a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" dev/gpu_check.py "$@"
