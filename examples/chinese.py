"""Train a small model on Chinese text, with a byte-pair encoding that is learnt from it.

    python examples/chinese.py --data 红楼梦.txt

GPT-2's vocabulary is made for English: a Chinese character costs it about two tokens. One that is trained on the text has tokens for
characters, and for words of several. Any UTF-8 text will do, or a folder of texts; a few megabytes and more are worth training on, as
a novel from Project Gutenberg (紅樓夢), or articles of the Chinese Wikipedia (dumps.wikimedia.org). The defaults, a
model of 1.3 million parameters and 900 updates of 2,048 tokens, take two to three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import llmc


def describe(tokenizer: llmc.Tokenizer, text: str) -> None:
    """Print what a tokenizer makes of a text, and the longest words that it has learnt."""
    ids = tokenizer.encode(text)
    print(
        f"\n{tokenizer.name} makes {len(ids):,} tokens of {len(text):,} characters ({len(text.encode()):,} bytes) of held-out text:"
    )
    print("|".join(tokenizer.decode([i]) for i in ids[:40]).replace("\n", "\\n"))
    words = {token.decode(errors="replace") for token in tokenizer.tokens}
    print("its longest words: " + " ".join(sorted(filter(str.isalpha, words), key=lambda w: (-len(w), w))[:20]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a UTF-8 text file, or a folder of them")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the vocabulary [%(default)s]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=900)
    parser.add_argument("--output", default="runs/chinese", help="the run's folder, a new one [%(default)s]")
    parser.add_argument("--prompt", default="", help="what the text at the end begins with")
    args = parser.parse_args(argv)

    # "bpe:N" is trained on what the run trains on, without the tenth that is held out. Words are split as GPT-2's are, at changes
    # between letters and punctuation: in Chinese that is a clause, inside of which frequent neighbours are joined.
    result = llmc.train(
        data=args.data,
        tokenizer=f"bpe:{args.vocab_size}",
        holdout="spread",
        layers=args.layers,
        heads=max(1, args.channels // 64),
        channels=args.channels,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        max_steps=args.max_steps,
        val_every=max(1, args.max_steps // 10),
        output_dir=args.output,
        prompt=args.prompt,
    )
    tokenizer = result.tokenizer
    assert tokenizer is not None  # the data are text
    held_out = llmc.DataLoader(Path(args.output, "data", "val.bin"), 1, args.seq_len).next_batch()[0][0]
    describe(tokenizer, tokenizer.decode(t for t in held_out if t != tokenizer.eot_token))
    ids = tokenizer.encode(args.prompt) or [tokenizer.eot_token]
    new = result.model.generate(ids, 300, temperature=0.8, stop_token=tokenizer.eot_token)
    # Bytes of characters that the model has not put together rightly are shown as U+FFFD.
    print(f"\nafter {result.step} updates the model writes:\n{args.prompt}{tokenizer.decode(new)}")
    # Bits per byte compare with models of any vocabulary; a character of Chinese has three bytes.
    if bits := result.history["val_bits_per_byte"]:
        print(f"\nvalidation: {bits[-1]:.4f} bits per byte")


if __name__ == "__main__":
    main()
