"""Pretrain a GPT-2 of 51 million parameters on TinyStories (Eldan & Li 2023), on one GPU.

    python examples/tinystories.py                                    # downloads the stories, tokenises, trains
    python examples/tinystories.py --device cpu --layers 4 --channels 128 --batch-size 16 --seq-len 128 --max-steps 500

10,000 updates of 65,536 tokens are 655 million tokens. An H100 trains GPT-2 124M, more than twice as large, at 586,000 tokens/s
(README.md), so this takes less than 20 minutes there; on a CPU choose a small model, as in the second command. The data are
tokenised once, by GPT-2's vocabulary; `--source` takes an archive or a folder of JSON files that you have already.
Ctrl-C saves a checkpoint, and the same command goes on from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import llmc
from llmc.datasets.tinystories import prepare


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/tinystories"), help="for token files [%(default)s]")
    parser.add_argument("--source", help="the archive, or a folder of its JSON files; default: it is downloaded")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or a tokenizer file [%(default)s]")
    parser.add_argument("--output", default="runs/tinystories", help="the run's folder [%(default)s]")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--channels", type=int, default=512, help="width; a head has 64 channels [%(default)s]")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-steps", type=int, default=10_000)
    parser.add_argument("--prompt", default="Once upon a time", help="what samples begin with [%(default)s]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto [%(default)s]")
    args = parser.parse_args(argv)

    if not (args.data / "TinyStories_val.bin").exists() or not (args.data / "TinyStories_train.bin").exists():
        files = prepare(args.data, source=args.source, tokenizer=args.tokenizer)
        print(f"{files.train_tokens:,} tokens to train on, {files.val_tokens:,} for validation")

    every = max(1, args.max_steps // 20)
    result = llmc.train(
        data=str(args.data / "TinyStories_train.bin"),
        val_data=str(args.data / "TinyStories_val.bin"),
        layers=args.layers,
        heads=max(1, args.channels // 64),
        channels=args.channels,
        seq_len=args.seq_len,
        position_init="normal",
        batch_size=args.batch_size,
        max_steps=args.max_steps,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.1,
        schedule="cosine",
        warmup_steps=args.max_steps // 20,
        final_lr_frac=0.1,
        device=args.device,
        output_dir=args.output,
        resume=True,
        checkpoint_every=10 * every,
        val_every=every,
        sample_every=5 * every,
        prompt=args.prompt,
    )
    if result.tokenizer is not None:
        ids = result.tokenizer.encode(args.prompt)
        for seed in (1, 2, 3):
            story = result.model.generate(ids, 200, temperature=0.8, seed=seed, stop_token=result.tokenizer.eot_token)
            print(f"\n--- story {seed}\n{args.prompt}{result.tokenizer.decode(story)}")


if __name__ == "__main__":
    main()
