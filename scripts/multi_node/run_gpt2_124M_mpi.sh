#!/usr/bin/env bash
# GPT-2 124M on several machines, started by the mpirun of any MPI; each name with the number of its GPUs:
#   scripts/multi_node/run_gpt2_124M_mpi.sh node1:8,node2:8 [more flags of llmc-train]
# The machines share this folder, or each has it at the same path; mpirun reaches them by ssh without a password.
set -u
hosts=${1:?which machines? node1:8,node2:8}
shift
count=0
for host in ${hosts//,/ }; do
    case $host in
    *:*) count=$((count + ${host##*:})) ;;
    *) count=$((count + 1)) ;;
    esac
done
export LAUNCH="mpirun -np $count --host $hosts"
exec "$(dirname "$0")/../run.sh" gpt2_124M --output-dir log_gpt2_124M_multi --total-batch-size 2097152 "$@"
