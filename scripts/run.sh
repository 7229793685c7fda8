#!/usr/bin/env bash
# Trains one of the configurations beside this file, and resumes it whenever it ends before its last step:
#   scripts/run.sh gpt2_124M [more flags of llmc-train]
# By llmc-train, or by the Python that PYTHON names (python3) if that is set or there is no llmc-train on the PATH.
# Ends with the run's exit code when it is done (0), when a setting or file name is wrong (2), when a signal stopped it (130, 143),
# and when it ended otherwise (1: an error; 137: killed; ...) without one new checkpoint since it was started: it would again.
set -u
scripts=$(dirname "$0")
name=${1:-}
file=$scripts/$name.toml
case $name in "" | sweep_*) file= ;; esac
if [ ! -f "$file" ]; then
    echo "run.sh: which run? $(ls "$scripts" | sed -n '/^sweep_/d; s/\.toml$//p' | tr '\n' ' ')" >&2
    exit 2
fi
shift

folder=$(sed -n 's/^output_dir = "\(.*\)"$/\1/p' "$file")
before=
for flag in "$@"; do
    case $before in -o | --output-dir) folder=$flag ;; esac
    case $flag in --output-dir=*) folder=${flag#*=} ;; esac
    before=$flag
done
newest() { ls "$folder" 2>/dev/null | grep '^DONE_' | sort | tail -n 1; }

train=(llmc-train)
if [ -n "${PYTHON:-}" ] || ! command -v llmc-train >/dev/null; then
    train=("${PYTHON:-python3}" -m llmc train)
fi

while true; do
    checkpoint=$(newest)
    "${train[@]}" --config "$file" "$@"
    code=$?
    case $code in 0 | 2 | 130 | 143) exit $code ;; esac
    if [ "$(newest)" = "$checkpoint" ]; then
        echo "run.sh: ended with $code and no new checkpoint in $folder: not started again" >&2
        exit $code
    fi
    sleep 1
done
