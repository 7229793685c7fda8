"""Hand a trained model to transformers: write it in Hugging Face's format, load it there, and check that it is the same.

    pip install ".[hub]" transformers torch      # in a clone
    python examples/serve_transformers.py --model runs/finetuned --output exported --prompt "Once upon"

The folder that is written (config.json, model.safetensors, the tokenizer) is an ordinary GPT-2: whatever loads those from a folder
takes it, as `transformers.pipeline("text-generation", "exported")`, and huggingface_hub uploads it. It takes seconds. For llama.cpp
there is `llmc export RUN out.gguf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from llmc.hub.writing import export_model
from llmc.load import load_model, tokenizer_for


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run directory, or model file of llm.c's")
    parser.add_argument("--output", default="exported", help="the folder to write [%(default)s]")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=50)
    args = parser.parse_args(argv)

    model = load_model(args.model, dtype="f32")
    tokenizer = tokenizer_for(args.model, model.config.vocab_size)
    export_model(model, args.output, tokenizer=tokenizer)

    import torch  # after what does not need them, as they take seconds to import
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(args.output).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(args.output)

    ids = tokenizer.encode(args.prompt)[: model.config.max_seq_len]
    if not ids:
        raise SystemExit("--prompt is empty")
    if their_tokenizer(args.prompt)["input_ids"][: model.config.max_seq_len] != ids:
        raise SystemExit("the tokenizers do not agree")
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0].numpy()
    ours = model.logits([ids])[0]
    # Both compute in float32 and sum in different orders: equal but for rounding.
    error = float(np.abs(logits - ours).max() / np.abs(ours).max())
    print(f"{ours.size:,} logits: they differ by {error:.1e} of the largest at most")
    if not error < 1e-4:
        raise SystemExit("the logits do not agree")

    new = min(args.tokens, model.config.max_seq_len - len(ids))
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.eot_token)
    print(f"transformers writes: {their_tokenizer.decode(out[0], skip_special_tokens=True)}")
    greedy = model.generate(ids, new, temperature=0, stop_token=tokenizer.eot_token)
    print(f"llmc writes:         {tokenizer.decode([*ids, *greedy])}")
    print(f"{args.output} has the model; serve it as any GPT-2")


if __name__ == "__main__":
    main()
