#!/usr/bin/env bash
# GPT-2 774M on 150B tokens of FineWeb, on all GPUs of this machine:
#   scripts/run_gpt2_774M.sh [--processes N] [more flags of llmc-train]
exec "$(dirname "$0")/run.sh" gpt2_774M "$@"
