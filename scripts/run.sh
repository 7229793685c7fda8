#!/usr/bin/env bash
# Trains one of the configurations beside this file, and resumes it whenever it ends before its last step:
#   scripts/run.sh gpt2_124M [more flags of llmc-train]
# Ends when the run is done, was stopped by a signal, or cannot start (exit code 2).
set -u
name=${1:?which run: $(cd "$(dirname "$0")" && ls ./*.toml | sed 's|^\./||; s|\.toml$||' | tr '\n' ' ')}
shift
while true; do
    llmc-train --config "$(dirname "$0")/$name.toml" "$@"
    code=$?
    case $code in 0 | 2 | 130 | 143) exit $code ;; esac
    sleep 1
done
