#!/usr/bin/env bash
# Trains one of the configurations beside this file, and resumes it whenever it ends before its last step:
#   scripts/run.sh gpt2_124M [--processes N] [more flags of llmc-train]
# In N processes on this machine; without --processes in one for each of its GPUs. LAUNCH has the command that starts them elsewhere:
#   LAUNCH="mpirun -np 16 --host node1:8,node2:8" scripts/run.sh gpt2_124M
# By llmc-train, or by the Python that PYTHON names (python3) if that is set or there is no llmc-train on the PATH.
# Ends with the run's exit code when it is done (0), when a setting or file name is wrong (2), when a signal stopped it (130, 143),
# and when it ended otherwise (1: an error; 75: a process was lost; 137: killed; ...) without one new checkpoint since it was started: it
# would again.
set -u
scripts=$(dirname "$0")
name=${1:-}
file=$scripts/$name.toml
case $name in "" | sweep_*) file= ;; esac
if [ ! -f "$file" ]; then
    names=("$scripts"/g*.toml)
    names=("${names[@]##*/}")
    echo "run.sh: which run? ${names[*]%.toml}" >&2
    exit 2
fi
shift

folder=$(sed -n 's/^output_dir = "\(.*\)"$/\1/p' "$file")
processes=
before=
for flag in "$@"; do
    case $before in -o | --output-dir) folder=$flag ;; esac
    case $flag in
    --output-dir=*) folder=${flag#*=} ;;
    -pn | --processes | --processes=*) processes=given ;;
    esac
    before=$flag
done
newest() { find "$folder" -maxdepth 1 -name 'DONE_*' 2>/dev/null | sort | tail -n 1; }

gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU '
    fi
}

read -ra train <<<"${LAUNCH:-}"
if [ -z "${PYTHON:-}" ] && program=$(command -v llmc-train); then
    train+=("$program") # by its whole path, which other machines need not have on their PATH
else
    train+=("${PYTHON:-python3}" -m llmc train)
fi
train+=(--config "$file")
if [ -z "${LAUNCH:-}$processes" ] && count=$(gpus) && [ "$count" -gt 1 ]; then
    train+=(--processes "$count")
fi

while true; do
    checkpoint=$(newest)
    "${train[@]}" "$@"
    code=$?
    case $code in 0 | 2 | 130 | 143) exit $code ;; esac
    if [ "$(newest)" = "$checkpoint" ]; then
        echo "run.sh: ended with $code and no new checkpoint in $folder: not started again" >&2
        exit $code
    fi
    sleep 1
done
