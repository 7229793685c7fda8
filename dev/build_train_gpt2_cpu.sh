#!/bin/sh
# Builds the C++ program train_gpt2 and runs it in this folder, as llm.c's quick start does. Needs a C++20 compiler and CMake.
#
# It wants gpt2_124M.bin, gpt2_tokenizer.bin and dev/data/tinyshakespeare/*.bin in the current folder. Without a network:
#   python -m llmc.reference --model d12 --input_bin 'dev/data/tinyshakespeare/*_val.bin'   (random weights: gpt2_d12.bin)
#   dev/build_train_gpt2_cpu.sh -e gpt2_d12.bin
# Arguments go to train_gpt2.
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
build=${LLMC_BUILD_DIR:-$source/build/apps}
cmake -S "$source" -B "$build" -DLLMC_PYTHON=OFF -DLLMC_BUILD_APPS=ON
cmake --build "$build" --config Release --parallel "${LLMC_BUILD_JOBS:-4}" --target train_gpt2
exec "$build/train_gpt2" "$@"
