# shellcheck shell=bash
# What the Slurm jobs beside this file have in common. They set `meet`, the flags by which the processes find each other. Slurm runs a copy
# of the job's script, in the folder in which sbatch was called, so this file is named from there.
#
# The job is queued again, and resumes from its newest checkpoint, if a process was lost, or if it was stopped because its time is
# nearly over; at most $requeues times. It is not if it is done, has an error of its own, or was cancelled.
set -u
requeues=20

# Before the time is over Slurm sends USR1 to this shell, as --signal says. TERM from scancel reaches the processes alone, which finish
# their step and save.
near_the_end=
trap 'near_the_end=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# --kill-on-bad-exit=0: the processes themselves see to it that none outlives another, and one that was stopped may still be saving.
# shellcheck disable=SC2154 # meet is set by who includes this file
srun --kill-on-bad-exit=0 --mpi=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    llmc-train --config scripts/gpt2_124M.toml --output-dir log_gpt2_124M_multi --total-batch-size 2097152 "${meet[@]}" "$@" &
wait $!
code=$?
if [ -n "$near_the_end" ]; then # the signal ended the wait, not srun
    wait $!
    code=$?
fi

# srun ends with the highest code of all processes: 75 of those that lost another, or 128 + the signal that killed one.
again=
case $code in
75 | 134 | 135 | 136 | 137 | 139) again=yes ;;
143) again=$near_the_end ;;
esac
if [ -n "$again" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$requeues" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
