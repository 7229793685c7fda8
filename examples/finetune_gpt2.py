"""Fine-tune GPT-2 on a text of your own, and compare what it writes before and after.

    python examples/finetune_gpt2.py --data my.txt                    # GPT-2 124M from the Hugging Face Hub
    python examples/finetune_gpt2.py --data my.txt --model ./gpt2     # or a local folder of Hugging Face's files

The first command downloads 0.5 GB, once. Both need `pip install ".[hub]"`, typed in a clone; a local folder works offline. 100 updates
of 1,024 tokens are 102,400 tokens: about 7 minutes on two CPU cores with AVX-512. The run's folder is then a model like any other:
`llmc generate runs/finetuned "Once upon"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import llmc
from llmc.hub.reading import import_model


def continuation(model: llmc.Model, tokenizer: llmc.Tokenizer, prompt: str, tokens: int) -> str:
    """Return the prompt as the model goes on with it; the same random numbers each time."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot_token]
    new = model.generate(ids, tokens, temperature=0.8, top_k=50, stop_token=tokenizer.eot_token)
    return prompt + tokenizer.decode(new)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text file, or a folder of them")
    parser.add_argument("--model", default="openai-community/gpt2", help="a name on the Hub, or a folder [%(default)s]")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/finetuned"), help="the run's folder, a new one [%(default)s]"
    )
    parser.add_argument("--prompt", default="", help="what both samples begin with; default: end-of-text")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument(
        "--learning-rate", type=float, default=5e-5, help="a tenth of what pretraining has [%(default)s]"
    )
    parser.add_argument("--sample-tokens", type=int, default=100)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto [%(default)s]")
    args = parser.parse_args(argv)

    # llm.c's file, from which runs begin, and the model's own tokenizer beside it, which the run then takes as well.
    weights = args.output.with_name(args.output.name + "_from") / "model.bin"
    import_model(args.model, weights)
    tokenizer = llmc.Tokenizer.beside(weights.parent)
    if tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer that llmc can use")
    before = continuation(llmc.GPT2.from_checkpoint(weights), tokenizer, args.prompt, args.sample_tokens)

    # Small steps, because the weights are good already, and a short warm-up, because the optimizer's moments begin at zero.
    # Validation is on the last tenth of the text: if its loss rises while the training loss falls, there were too many steps.
    result = llmc.train(
        data=args.data,
        model=str(weights),
        output_dir=str(args.output),
        device=args.device,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        schedule="cosine",
        warmup_steps=args.max_steps // 10,
        final_lr_frac=0.0,
        val_every=max(1, args.max_steps // 5),
        sample_every=0,
    )
    after = continuation(result.model, tokenizer, args.prompt, args.sample_tokens)
    losses = result.history["val_loss"]
    print(f"\nbefore:\n{before}\n\nafter {result.step} updates:\n{after}\n")
    if losses:
        print(f"validation loss {losses[0]:.4f} -> {losses[-1]:.4f} nats per token")
    print(f"{args.output} has the model; plot its losses by: llmc plot {args.output}")


if __name__ == "__main__":
    main()
