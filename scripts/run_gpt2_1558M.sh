#!/usr/bin/env bash
# GPT-2 1558M on 33.6B tokens of FineWeb-Edu, on all GPUs of this machine:
#   scripts/run_gpt2_1558M.sh [--processes N] [more flags of llmc-train]
exec "$(dirname "$0")/run.sh" gpt2_1558M "$@"
