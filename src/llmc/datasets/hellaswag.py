"""HellaSwag (Zellers et al. 2019): which of four endings continues a scene."""

from __future__ import annotations

import json
from pathlib import Path

from llmc.data.tokenizer import Tokenizer
from llmc.datasets.download import Remote, fetch
from llmc.formats.eval_file import Example, eval_tokens, write_eval_file

REMOTE = Remote(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "hellaswag/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    12246618,
)


def prepare(output: str | Path, *, source: str | Path | None = None, tokenizer: str = "gpt2") -> Path:
    """Write hellaswag_val.bin, llm.c's eval file. (llm.c runs a model to write it; this needs none.)

    Args:
        output: the folder to write.
        source: hellaswag_val.jsonl, if you have it already; None takes it from the output folder, or else downloads it.
        tokenizer: as of Tokenizer.from_spec.

    Returns:
        The path of the file.

    Raises:
        ConnectionError: if the examples cannot be downloaded.
        ValueError: if a line is not an example of HellaSwag.
    """
    encoder = Tokenizer.from_spec(tokenizer)
    path = Path(source) if source is not None else fetch(REMOTE, at_hand=[Path(output) / "hellaswag_val.jsonl"])
    examples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                context, label, endings = row["ctx"], row["label"], row["endings"]
                # An ending begins with a blank, because GPT-2's words have the blank before them.
                tokens = [eval_tokens(encoder.encode(" " + ending)) for ending in endings]
                examples.append(Example(int(label), eval_tokens(encoder.encode(context)), tokens))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise ValueError(f"{path}:{number}: not an example of HellaSwag: {type(e).__name__}: {e}") from e
    target = Path(output) / "hellaswag_val.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_eval_file(target, examples)
    return target
