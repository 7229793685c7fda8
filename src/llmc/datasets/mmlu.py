"""MMLU (Hendrycks et al. 2021): 14,042 questions of 57 subjects with four answers each."""

from __future__ import annotations

import csv
from pathlib import Path

from llmc.data.tokenizer import Tokenizer
from llmc.datasets.archive import unpacked
from llmc.datasets.download import Remote, fetch
from llmc.formats.eval_file import Example, eval_tokens, write_eval_file

REMOTE = Remote(
    "https://people.eecs.berkeley.edu/~hendrycks/data.tar",
    "mmlu/data.tar",
    "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
    166184960,
)


def prepare(output: str | Path, *, source: str | Path | None = None, tokenizer: str = "gpt2") -> Path:
    """Write mmlu_test.bin, an eval file of the test questions: "Question: ...\\n\\nAnswer:" and the four answers as completions.

    Subjects are in sorted order. (llm.c has no such file, and reads the questions in the order of the directory.)

    Args:
        output: the folder to write.
        source: data.tar, or the folder of the test's CSV files, if you have it already; None takes data.tar from the output folder, or
            else downloads it.
        tokenizer: as of Tokenizer.from_spec.

    Returns:
        The path of the file.

    Raises:
        ConnectionError: if the questions cannot be downloaded.
        FileNotFoundError: if the source does not exist, or has no CSV files of the test.
        ValueError: if a row is not a question of MMLU, or the archive is damaged.
    """
    encoder = Tokenizer.from_spec(tokenizer)
    folder = _questions(Path(source) if source is not None else fetch(REMOTE, at_hand=[Path(output) / "data.tar"]))
    files = sorted(folder.glob("*_test.csv"))
    if not files:
        raise FileNotFoundError(f"folder '{folder}' has no *_test.csv")
    examples = []
    for path in files:
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                for row in csv.reader(file):
                    question, *answers, letter = row
                    if len(answers) != 4 or letter not in ("A", "B", "C", "D"):
                        raise ValueError(
                            f"{len(row)} fields ending in '{letter}', expected question, 4 answers, A to D"
                        )
                    tokens = [eval_tokens(encoder.encode(" " + answer)) for answer in answers]
                    context = eval_tokens(encoder.encode(f"Question: {question}\n\nAnswer:"))
                    examples.append(Example("ABCD".index(letter), context, tokens))
            except (csv.Error, ValueError) as e:
                raise ValueError(f"{path}: question {len(examples)}: {e}") from e
    target = Path(output) / "mmlu_test.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_eval_file(target, examples)
    return target


def _questions(source: Path) -> Path:
    """Find the folder with the test's CSV files, unpacking an archive if need be."""
    if source.is_dir():
        return source / "test" if (source / "test").is_dir() else source
    if not source.is_file():
        raise FileNotFoundError(f"'{source}' does not exist: expected data.tar, or a folder of CSV files")
    return unpacked(source, "mmlu", "_test.csv")
