"""What a notebook shows of the first things that one does in it.

The cells run in IPython's shell, in a process of its own, and results are formatted as for a front end. A kernel behind nbclient shows
the same and takes seconds to start.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("IPython", reason="IPython is not installed")

# Cells, and what each shows: N stands for a number, and what is no text is named in brackets.
NOTEBOOK = [
    ("import llmc", ""),
    (
        """\
losses = []
llmc.train(
    data="tale.txt", tokenizer="bytes", layers=1, heads=2, channels=16, seq_len=16, batch_size=2, max_steps=4, warmup_steps=1,
    val_every=2, sample_every=0, output_dir="run", plot=False, device="cpu", threads=1,
    callbacks=[lambda trainer, info: losses.append(info.loss)],
)""",
        """\
GPT-N of N parameters (N layer, N heads, N channels, vocabulary N) on tale.txt
[the machine]
run keeps checkpoints, logs and the loss curve
step N/N: val loss N (N bits/byte)
step N/N: train loss N, val loss N (N bits/byte), N tokens/s, N:N left
step N/N: train loss N, val loss N (N bits/byte), N tokens/s, in N:N
[what the run came to]
TrainResult(step=N, train_loss=N, val_loss=N, val_bits_per_byte=N, run_dir='run')
[the same, and a picture]""",
    ),
    (
        "result = _\nlen(losses), result.model, result.tokenizer",
        """\
(N,
 GPT2(layers=N, heads=N, channels=N, max_seq_len=N, vocab_size=N, N parameters, f32, cpu),
 Tokenizer('bytes', N tokens, eot_token=N))""",
    ),
    (
        """result.model.generate("Once", 8)""",
        "TypeError: token ids must be integers, got text: a tokenizer's encode(text) makes them of it",
    ),
    ("len(result.model.generate(result.tokenizer.encode('Once'), 8))", "N"),
    ("result.plot()", "<Figure size NxN with N Axes>\n[a picture]"),
]

SHELL = """
import json, sys, types
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

shell = InteractiveShell(user_module=types.ModuleType("notebook"))
outputs = []
for cell in json.load(sys.stdin):
    with capture_output() as printed:
        done = shell.run_cell(cell)
    formats = {} if done.result is None else shell.display_formatter.format(done.result)[0]
    error = done.error_before_exec or done.error_in_exec
    outputs.append({
        "printed": "" if error else printed.stdout.split("Out[")[0],
        "text": formats.get("text/plain", ""),
        "html": formats.get("text/html", ""),
        "picture": formats.get("image/png", b"")[:4].hex(),
        "error": f"{type(error).__name__}: {error}" if error else "",
    })
json.dump(outputs, sys.stdout)
"""


def shown(output: dict[str, str]) -> str:
    """Return what a front end shows of a cell's output, numbers masked."""
    # The end of a run has a test of its own: tests/training/test_summary.py.
    printed = re.sub(r"^trained [\s\S]*", "[what the run came to]", output["printed"], flags=re.M)
    printed = re.sub(r"^\d+ steps of .*", "[the machine]", printed, flags=re.M)
    parts = [printed, output["text"], output["error"]]
    if output["html"]:
        assert output["text"].splitlines()[0][:20] in output["html"]
        parts.append(
            "[the same, and a picture]" if 'src="data:image/png;base64,iVBORw0KGgo' in output["html"] else "[html]"
        )
    if output["picture"]:
        assert bytes.fromhex(output["picture"]) == b"\x89PNG"
        parts.append("[a picture]")
    return re.sub(r"(?<![A-Za-wyz\d])\d+([.,]\d+)*", "N", "\n".join(filter(None, parts)))


def test_first_notebook(tmp_path: Path) -> None:
    (tmp_path / "tale.txt").write_text("Once upon a time there was a loss, and it fell. " * 40)
    done = subprocess.run(
        [sys.executable, "-c", SHELL],
        input=json.dumps([cell for cell, _ in NOTEBOOK]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert [shown(output) for output in json.loads(done.stdout)] == [text for _, text in NOTEBOOK]
