#!/usr/bin/env bash
# GPT-2 124M on 10B tokens of FineWeb, on all GPUs of this machine:
#   scripts/run_gpt2_124M.sh [--processes N] [more flags of llmc-train]
exec "$(dirname "$0")/run.sh" gpt2_124M "$@"
