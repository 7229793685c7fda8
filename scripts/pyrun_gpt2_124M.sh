#!/usr/bin/env bash
# The run of run_gpt2_124M.sh in PyTorch, by the reference (python -m llmc.reference), one process for each GPU of this machine:
#   scripts/pyrun_gpt2_124M.sh [more flags of python -m llmc.reference, which win over those below]
# PROCESSES has another number of processes. They train one model together (DistributedDataParallel), by NCCL on GPUs and by gloo on
# CPUs. Without torchrun, in one process: python -m llmc.reference with the same flags. By the Python that PYTHON names (python3).
# It writes main.log with the losses, but no checkpoints, and cannot be resumed.
if [ -z "${PROCESSES:-}" ] && ! nvidia-smi -L >/dev/null 2>&1; then
    echo "pyrun_gpt2_124M.sh: there is no GPU; PROCESSES=N starts N processes on the CPU, with --device cpu --compile 0 --dtype float32" >&2
    exit 2
fi
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node="${PROCESSES:-gpu}" -m llmc.reference \
    --input_bin "dev/data/fineweb10B/fineweb_train_*.bin" \
    --input_val_bin "dev/data/fineweb10B/fineweb_val_*.bin" \
    --val_loss_every 250 \
    --sample_every 0 \
    --output_dir pylog_gpt2_124M \
    --write_tensors 0 \
    --model d12 \
    --batch_size 32 \
    --sequence_length 1024 \
    --total_batch_size 524288 \
    --dtype bfloat16 \
    --compile 1 \
    --tensorcores 1 \
    --flash 1 \
    --num_iterations 18865 \
    --weight_decay 0.1 \
    --zero_stage 1 \
    --learning_rate 0.0006 \
    --warmup_iters 700 \
    --learning_rate_decay_frac 0.0 \
    --overfit_single_batch 0 \
    "$@"
