"""Ctrl-C while a kernel loop runs: KeyboardInterrupt is raised within a step, and the process works on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Another thread sends the signal, which is possible because kernels run without Python's global lock.
SCRIPT = """
import os, signal, threading, time
import numpy as np
import llmc

signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background passes on that it is ignored
model = llmc.GPT2(llmc.GPT2Config(max_seq_len=256, vocab_size=500, num_layers=4, num_heads=4, channels=128), threads=2)
optimizer = llmc.AdamW(model)
x = np.zeros((8, 256), np.int32)
step, sent = 0, []

def press():
    while step < 2:
        time.sleep(0.001)
    time.sleep(0.01)
    sent.append(step)
    os.kill(os.getpid(), signal.SIGINT)
    sent.append(step)  # it came between these two

presser = threading.Thread(target=press)
presser.start()
try:
    while step < 1_000_000:
        {body}
        step += 1
except KeyboardInterrupt:
    presser.join()
    model.zero_grad()
    model.forward(x)
    model.backward(x)
    print(*sent, step, model.mean_loss)
"""
TRAIN = "model.zero_grad(); model.forward(x); model.backward(x); optimizer.step(1e-3)"
EVALUATE = "model.evaluate(x, x)"
GENERATE = "model.generate([1, 2, 3], 40)"


@pytest.mark.skipif(os.name == "nt", reason="on Windows a process cannot send itself Ctrl-C alone")
@pytest.mark.parametrize("body", [TRAIN, EVALUATE, GENERATE])
def test_interrupt_within_a_step(body):
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after, stopped, loss = done.stdout.split()
    assert 2 <= int(before) <= int(stopped) <= int(after) + 1
    assert 0 < float(loss) < 20  # the model still trains
