#!/usr/bin/env bash
# Everything that wants a GPU, in one command, without a network: builds for the card that is here, then
#   --part a  (3 minutes and the build): does it work, how fast is it, and where does the time go
#   --part b  (5 minutes): parity with PyTorch, the first steps beside the CPU's, compute-sanitizer, other sizes, each option's
#             worth, the speed of PyTorch and llm.c
# Each result is written the moment it is known; a stage that fails or hangs loses itself alone. A table comes last.
#
#   dev/gpu_check.sh [--part a|b|all] [--out DIR] [--build-dir DIR]
#   dev/gpu_check.sh --dry-run    # a rehearsal on the emulated device, without a GPU
#
# PYTHON=... chooses the interpreter: it needs numpy, ml_dtypes, pytest, torch, pybind11 and cmake; pytest-xdist and ninja help.
# LLM_C=... names llm.c's train_gpt2cu, to be measured too.
# CUDNN_PATH=... names a folder with cuDNN frontend's headers in include/; without them attention=cudnn is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" dev/ci/gpu_check.py "$@"
