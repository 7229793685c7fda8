"""Ctrl-C while a kernel loop runs: KeyboardInterrupt within a step, and the process in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
import numpy as np
import llmc

model = llmc.GPT2(llmc.GPT2Config(max_seq_len=256, vocab_size=500, num_layers=4, num_heads=4, channels=128), threads=2)
optimizer = llmc.AdamW(model)
x = np.zeros((8, 256), np.int32)
started = longest = 0.0
try:
    for step in range(1_000_000):
        started = time.perf_counter()
        {body}
        longest = max(longest, time.perf_counter() - started)
        if step == 2:
            print("going", flush=True)
except KeyboardInterrupt:
    print("interrupted after", time.perf_counter() - started, "of", longest)
    model.zero_grad()
    model.forward(x)
    model.backward(x)
    print("loss", model.mean_loss)
"""
TRAIN = "model.zero_grad(); model.forward(x); model.backward(x); optimizer.step(1e-3)"
EVALUATE = "model.evaluate(x, x)"
GENERATE = "model.generate([1, 2, 3], 40)"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no kill with SIGINT for a child")
@pytest.mark.parametrize("body", [TRAIN, EVALUATE, GENERATE])
def test_interrupt_within_a_step(body):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(body=body)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "going\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, out
    words = out.split()
    assert words[:2] == ["interrupted", "after"] and words[-2] == "loss" and 0 < float(words[-1]) < 20
    after, longest = float(words[2]), float(words[4])
    assert after <= 2 * longest + 0.1  # the step that was under way, however slow the machine
