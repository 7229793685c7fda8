"""What a run tells about itself before its first step: llm.c's table, row for row, and how its memory is used."""

from __future__ import annotations

from tqdm.utils import disp_len

from llmc.training.memory import largest_batch
from llmc.training.setup import Run
from llmc.values import counted

_RULE = "+-----------------------+----------------------------------------------------+"
_WIDTH = 50  # of a value
_MIB = 1 << 20


def _row(name: str, value: object) -> str:
    text = _shortened(str(value))
    return f"| {name:21} | {text}{' ' * (_WIDTH - disp_len(text))} |"


def _shortened(text: str) -> str:
    """Return a text that fits into the table's column: of a longer one the beginning and, as a path tells more by it, most of the end."""
    if disp_len(text) <= _WIDTH:
        return text
    begin, end = text[: _WIDTH // 3], text[_WIDTH // 3 :]
    while disp_len(begin) > _WIDTH // 3:
        begin = begin[:-1]
    while disp_len(f"{begin}...{end}") > _WIDTH:
        end = end[1:]
    return f"{begin}...{end}"


def _mib(size: int) -> str:
    """Return a number of bytes in llm.c's unit, MiB, with a decimal if there are few of them, or in KiB."""
    if size >= 10 * _MIB or size == 0:
        return f"{size // _MIB} MiB"
    return f"{size / _MIB:.1f} MiB" if size >= _MIB // 10 else f"{-(-size // 1024)} KiB"


def startup_report(run: Run, total_steps: int) -> str:
    """Return llm.c's table of parameters and the lines that follow it."""
    c, model = run.config, run.model
    shape, plan = model.config, run.memory
    peak = "unknown" if run.peak_flops is None else f"{run.peak_flops / 1e12:.1f}"
    # What llm.c does not have is said only if it is asked for.
    muon = f"Muon, momentum {c.muon_momentum:g}, LR ratio {c.muon_lr_ratio:g}"
    optimizer = [("optimizer", muon)] if c.optimizer == "muon" else []
    grows = f"from {c.first_batch_size}, {counted(c.batch_warmup_steps, 'step')}"
    warmup = [("batch warm-up", grows)] if c.batch_warmup_steps else []
    groups: list[list[tuple[str, object]]] = [
        [("Parameter", "Value")],
        [
            ("train data pattern", " ".join(c.data) or run.sources.description),
            ("val data pattern", " ".join(c.val_data) or ("of the train data" if run.sources.val else "NULL")),
            ("output log dir", c.output_dir or "NULL"),
            ("checkpoint_every", c.checkpoint_every),
            ("resume", int(c.resume)),
            ("micro batch size B", c.batch_size),
            ("sequence length T", c.seq_len),
            ("total batch size", c.total_batch_size),
            *warmup,
            *optimizer,
            ("LR scheduler", c.schedule),
            ("learning rate (LR)", f"{c.learning_rate:e}"),
            ("warmup iterations", c.warmup_steps),
            ("final LR fraction", f"{c.final_lr_frac:e}"),
            ("weight decay", f"{c.weight_decay:e}"),
            *([("average of weights", f"{c.ema_decay:g}")] if c.ema_decay else []),
            ("skip update lossz", f"{c.skip_loss_z:f}"),
            ("skip update gradz", f"{c.skip_grad_z:f}"),
            ("max_steps", c.max_steps),
            ("val_loss_every", c.val_every),
            ("val_max_steps", c.val_steps),
            ("sample_every", c.sample_every),
            ("genT", c.sample_tokens),
            ("overfit_single_batch", int(c.overfit)),
            ("use_master_weights", "enabled" if c.master_weights else "disabled"),
            ("gelu_fusion", c.gelu_fusion),
            ("recompute", c.recompute),
        ],
        [
            ("device", model.backend.info().description),
            ("peak TFlops", peak),
            ("precision", model.dtype.upper().replace("F32", "FP32")),
        ],
        [
            ("weight init method", run.weight_origin),
            ("max_sequence_length T", shape.max_seq_len),
            ("vocab_size V", shape.vocab_size),
            ("padded_vocab_size Vp", shape.padded_vocab_size),
            ("num_layers L", shape.num_layers),
            ("num_heads NH", shape.num_heads),
            ("channels C", shape.channels),
            ("num_parameters", model.num_parameters),
        ],
        [("train_num_batches", total_steps), ("val_num_batches", run.num_val_batches)],
        [("run hellaswag", "yes" if run.hellaswag_examples else "no")],
        [("num_processes", run.world.size), ("zero_stage", c.zero_stage)],
    ]
    lines = [_RULE]
    for group in groups:
        lines += [*(_row(name, value) for name, value in group), _RULE]
    kept = run.optimizer.bytes
    average = "" if run.average is None else f"average {_mib(run.average.bytes)}, "
    now, full = (run.grad_accum(step) for step in (0 if run.state is None else run.state.step, c.batch_warmup_steps))
    largest = largest_batch(model.backend, plan, c.batch_size, run.world.local_size, run.rows)
    lines += [
        f"num_parameters: {model.num_parameters} => bytes: {plan.parameters}",
        f"memory: parameters {_mib(plan.parameters)}, gradients {_mib(plan.gradients)}, optimizer {_mib(kept)}, "
        f"{average}activations {_mib(plan.activations)}",
        *_memory_by_rank(run),
        f"memory per sequence: {_mib(plan.activations // c.batch_size)}",
        f" -> estimated maximum batch size: {largest}{f' (of the {run.rows} rows of an update)' if run.rows else ''}",
        f"batch_size B={c.batch_size} * seq_len T={c.seq_len} * num_processes={run.world.size} and total_batch_size={c.total_batch_size}",
        f"=> setting grad_accum_steps={full}" + (f" (growing from {now})" if now < full else ""),
    ]
    if c.seq_len < shape.max_seq_len:
        lines.append(
            f"note: seq_len is {c.seq_len}, the model's max_seq_len {shape.max_seq_len}: positions from {c.seq_len} on are not learned"
        )
    return "\n".join(lines)


def _memory_by_rank(run: Run) -> list[str]:
    """Return a line with the memory of each rank, if there are several."""
    hosts, each = run.world.hosts, run.memory_by_rank
    if len(each) == 1:
        return []
    if max(each) - min(each) < _MIB:
        return [f"memory of all {len(each)} ranks: {_mib(sum(each))}, of each the same"]
    by_rank = ", ".join(f"{rank} on {host} {_mib(size)}" for rank, (host, size) in enumerate(zip(hosts, each)))
    return [f"memory of all {len(each)} ranks: {_mib(sum(each))}; of rank {by_rank}"]


def short_report(run: Run, total_steps: int) -> str:
    """Return the most important facts in three lines, of which a console makes more if they are too long for it."""
    c, model, shape = run.config, run.model, run.model.config
    info = model.backend.info()
    device = f"{info.description}, {info.isa}" + (f", {counted(info.threads, 'thread')}" if info.name == "cpu" else "")
    if run.world.size > 1:
        hosts = len(set(run.world.hosts))
        device = f"{run.world.size} ranks on {counted(hosts, 'host')}, each: {device}"
    output = f"\n{c.output_dir} keeps checkpoints, logs and the loss curve" if c.output_dir else ""
    steps = run.batch.warmup_steps
    grows = f" (growing from {run.batch.first:,} over {counted(steps, 'step')})" if steps else ""
    optimizer = "Muon, " if c.optimizer == "muon" else ""
    layers, heads = counted(shape.num_layers, "layer"), counted(shape.num_heads, "head")
    return (
        f"{model.family} of {model.num_parameters:,} parameters ({layers}, {heads}, {shape.channels} channels, vocabulary "
        f"{shape.vocab_size}) on {run.sources.description}\n"
        f"{counted(total_steps, 'step')} of {c.total_batch_size:,} tokens{grows}, {optimizer}{model.dtype}, {device}{output}"
    )
