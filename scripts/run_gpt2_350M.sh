#!/usr/bin/env bash
# GPT-2 350M on 31.5B tokens of FineWeb, on all GPUs of this machine:
#   scripts/run_gpt2_350M.sh [--processes N] [more flags of llmc-train]
exec "$(dirname "$0")/run.sh" gpt2_350M "$@"
