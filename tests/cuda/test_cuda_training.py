"""Training on the CUDA backend beside the CPU's, from the same seed; and checkpoints that go from one to the other.

On a GPU or on the emulated device (doc/cuda.md).
"""

from __future__ import annotations

import pydoc_data.topics

import numpy as np
import pytest

import llmc

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]

CONFIG = llmc.GPT2Config(max_seq_len=32, vocab_size=128, num_layers=2, num_heads=1, channels=64)


@pytest.fixture(scope="module")
def text():
    """Return an English text that every Python has, as bytes of ASCII."""
    topics = pydoc_data.topics.topics
    return np.frombuffer("".join(topics[k] for k in sorted(topics)[:20]).encode("ascii", "replace"), np.uint8).astype(
        np.int32
    )


def batch(text, step, B=1, T=32):
    at = (step * 7919) % (len(text) - B * T - 1)
    x = text[at : at + B * T + 1]
    return x[:-1].reshape(B, T), x[1:].reshape(B, T)


def losses(device, text, dtype, grad_dtype, steps, attention="simple", micro=1, lr=3e-4, change=None):
    """Train on text and return the losses. change: (name, relative), of the largest weight of a tensor before the first step."""
    model = llmc.GPT2(CONFIG, device=device, dtype=dtype, grad_dtype=grad_dtype, seed=1)
    if device == "cuda":
        model.backend.set_option("attention", attention)
    if change:
        name, relative = change
        w = np.array(model.parameters[name]).astype(np.float32)
        w[np.unravel_index(np.abs(w).argmax(), w.shape)] *= 1 + relative
        model.parameters[name] = w
    optimizer = llmc.AdamW(model, weight_decay=0.1)
    history = []
    for step in range(steps):
        model.zero_grad()
        for i in range(micro):
            inputs, targets = batch(text, step * micro + i)
            model.forward(inputs)
            model.backward(targets, scale=1 / micro)
        optimizer.step(lr)
        history.append(model.mean_loss)
    return np.array(history)


def apart(a, b):
    return np.abs(a / b - 1).max()


# The least by which a weight can be changed, and what the losses' own rounding comes to.
CHANGES = {"f32": (1e-6, 1e-5, 1e-4), "bf16": (2.0**-7, -(2.0**-7))}
ROUNDING = {"f32": 2.0**-22, "bf16": 0.0}


@pytest.mark.parametrize(
    "dtype,grad_dtype,attentions",
    [("f32", "f32", ["simple"]), ("bf16", "bf16", ["simple"]), ("bf16", "f32", ["simple", "flash", "auto"])],
)
def test_ten_steps_as_on_the_cpu(text, dtype, grad_dtype, attentions):
    """Training is chaotic, so the limit is measured: 4 times what the CPU's own losses move when one weight changes by its smallest
    part. A learning rate that is 2 % off exceeds it."""
    kind = text, dtype, grad_dtype, 10
    base = losses("cpu", *kind)
    moved = [apart(losses("cpu", *kind, change=(w, c)), base) for w in ("wte", "qkvw", "fcw") for c in CHANGES[dtype]]
    limit = 4 * max(*moved, ROUNDING[dtype])
    assert apart(losses("cpu", *kind, lr=1.02 * 3e-4), base) > limit
    for attention in attentions:
        assert apart(losses("cuda", *kind, attention), base) <= limit, attention


def test_micro_batches_add_up(text):
    np.testing.assert_allclose(
        losses("cuda", text, "f32", "f32", 3, micro=3), losses("cpu", text, "f32", "f32", 3, micro=3), rtol=2e-5
    )


@pytest.mark.parametrize("source,target", [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_checkpoint_moves(tmp_path, text, source, target, dtype):
    model = llmc.GPT2(CONFIG, device=source, dtype=dtype, seed=3)
    model.save(tmp_path / "model.bin")
    moved = llmc.GPT2.from_checkpoint(tmp_path / "model.bin", device=target)
    assert moved.dtype == dtype
    for name in model.parameters:
        np.testing.assert_array_equal(
            moved.parameter_tensors()[name].to_host(), model.parameter_tensors()[name].to_host()
        )
    inputs, targets = batch(text, 0)
    assert moved.evaluate(inputs, targets) == pytest.approx(
        model.evaluate(inputs, targets), rel=1e-5 if dtype == "f32" else 1e-2
    )


@pytest.mark.parametrize("first,second", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_moves(tmp_path, text, first, second):
    """Four steps on one device and four on the other are eight on the CPU: moments, step and data position are carried over."""
    data = tmp_path / "text.txt"
    data.write_bytes(bytes(text[:4000].astype(np.uint8)))
    tiny = {
        "data": str(data), "layers": 1, "heads": 2, "channels": 32, "max_seq_len": 16, "seq_len": 16, "batch_size": 2,
        "dtype": "f32", "tf32": False, "val_every": 0, "sample_every": 0, "plot": False, "progress": "none",
    }  # fmt: skip
    whole = llmc.train(**tiny, device="cpu", max_steps=8, output_dir=str(tmp_path / "whole"))
    run = {**tiny, "output_dir": str(tmp_path / "run"), "checkpoint_every": 4, "max_steps": 8, "async_save": False}
    with pytest.raises(Stop):
        llmc.train(**run, device=first, callbacks=[StopAt(6)])
    rest = llmc.train(**run, device=second, resume=True)
    assert rest.history["step"][0] == 4
    np.testing.assert_allclose(rest.history["train_loss"], whole.history["train_loss"][4:], rtol=1e-5)


def test_what_memory_chose_is_kept(tmp_path, text):
    """A run chooses how to compute by the memory that is free, and keeps its choice when it is resumed."""
    data = tmp_path / "text.txt"
    data.write_bytes(bytes(text[:4000].astype(np.uint8)))
    tiny = {
        "data": str(data), "layers": 1, "heads": 2, "channels": 32, "max_seq_len": 16, "seq_len": 16, "batch_size": 2,
        "max_steps": 2, "val_every": 0, "sample_every": 0, "plot": False, "progress": "none", "device": "cuda",
    }  # fmt: skip

    def run(folder, **settings):
        config = llmc.TrainConfig(**tiny, **settings, output_dir=str(tmp_path / folder))
        trainer = llmc.Trainer(config)
        trainer.fit()
        model = trainer.model
        return model.recompute, model.classifier_rows, model.dtype, model.grad_dtype

    assert run("free") == (0, 16384, "bf16", "f32")
    assert run("given", recompute=2, classifier_rows=7, grad_dtype="bf16") == (2, 7, "bf16", "bf16")
    assert run("given", resume=True) == (2, 7, "bf16", "f32")
    assert run("given", resume=True, recompute=1) == (1, 7, "bf16", "f32")


class Stop(Exception):
    pass


class StopAt(llmc.Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, info):
        if info.step == self.step:
            raise Stop
