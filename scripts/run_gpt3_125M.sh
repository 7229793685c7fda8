#!/usr/bin/env bash
# GPT-3 125M on 300B tokens of FineWeb, on all GPUs of this machine:
#   scripts/run_gpt3_125M.sh [--processes N] [more flags of llmc-train]
exec "$(dirname "$0")/run.sh" gpt3_125M "$@"
