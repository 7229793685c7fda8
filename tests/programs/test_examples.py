"""The programs of examples/, each at small size: what it prints, draws and writes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from runs import called

import llmc
from llmc.hub.writing import export_model

EXAMPLES = Path(__file__).parents[2] / "examples"
STORY = "Once upon a time a cat sat on a mat. The dog sat on a log.\nThey saw a bird, and the bird sang.\n"
# The first lines of the Thousand Character Classic.
CHINESE = "天地玄黃、宇宙洪荒。日月盈昃、辰宿列張。寒來暑往、秋收冬藏。閏餘成歲、律呂調陽。\n"
SMALL = ["--layers", "1", "--channels", "16", "--seq-len", "16", "--batch-size", "2", "--max-steps", "4"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(name: str, *arguments: str) -> str:
    """Run an example within this process; return what it shows."""
    result = called(example(name).main, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that has a text, and in hf a small GPT-2 as Hugging Face's folders have it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_text(STORY * 20, encoding="utf-8")
    tokenizer = llmc.Tokenizer.train_bpe(STORY, 280)
    model = llmc.GPT2(llmc.GPT2Config(32, tokenizer.vocab_size, num_layers=2, num_heads=2, channels=16))
    export_model(model, folder / "hf", tokenizer=tokenizer)
    return folder


def test_every_example_is_tested_and_explained() -> None:
    """In this file and in README.md; and the commands of its docstring have options that there are."""
    tested = Path(__file__).read_text(encoding="utf-8")
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tested and f"({path.name})" in readme, path.name
        text = example(path.stem).__doc__ or ""
        commands = re.findall(r"^ {4}python examples/(\S+)(.*)", text, re.MULTILINE)
        assert {name for name, _ in commands} == {path.name}
        options = {word for _, line in commands for word in re.findall(r" (--[a-z-]+)", line)}
        assert options <= set(re.findall(r'add_argument\("(--[a-z-]+)"', path.read_text(encoding="utf-8"))), path.name


def test_finetuning_begins_at_the_models_weights_and_lowers_the_loss(folder: Path) -> None:
    run = folder / "finetuned"
    arguments = [
        "--data",
        str(folder / "text.txt"),
        "--model",
        str(folder / "hf"),
        "--output",
        str(run),
        "--device",
        "cpu",
    ]
    arguments += ["--max-steps", "10", "--learning-rate", "1e-2", "--seq-len", "16", "--sample-tokens", "4"]
    text = shown("finetune_gpt2", *arguments, "--prompt", "Once")
    first, last = map(float, re.findall(r"validation loss (\S+) -> (\S+) nats", text)[0])
    assert last < first - 0.5
    assert text.count("Once") >= 2
    start = llmc.GPT2.from_checkpoint(folder / "finetuned_from" / "model.bin")
    assert start.config.channels == 16
    assert llmc.Tokenizer.beside(run).tokens == llmc.Tokenizer.beside(folder / "finetuned_from").tokens  # type: ignore[union-attr]


def test_tinystories_is_tokenised_once_and_resumed(folder: Path) -> None:
    source = folder / "stories"
    source.mkdir()
    for i in range(2):
        (source / f"{i}.json").write_text('[{"story": "' + STORY.replace("\n", " ") * 10 + '"}]', encoding="utf-8")
    arguments = ["--data", str(folder / "tokens"), "--source", str(source), "--tokenizer", "bytes", "--device", "cpu"]
    arguments += ["--output", str(folder / "tinystories"), *SMALL]
    assert "tokens to train on" in shown("tinystories", *arguments)
    again = shown("tinystories", *arguments[:-1], "6")  # max-steps
    assert "tokens to train on" not in again
    assert "--- story 3" in again and "step 6" in again


def test_the_loop_has_its_own_schedule_and_leaves_a_model(folder: Path) -> None:
    rate = example("training_loop").warm_restarts
    assert [rate(step, 1.0, 2) for step in (0, 2, 6)] == [1.0] * 3  # cycles of 2, 4, 8 steps
    assert rate(1, 1.0, 2) == pytest.approx(0.5) and rate(5, 1.0, 2) < 0.2
    out = folder / "loop"
    text = shown(
        "training_loop", "--data", str(folder / "text.txt"), "--output", str(out), "--tokenizer", "bytes", *SMALL
    )
    assert re.search(r"step 4: loss \S+, lr \S+, norm \S+, of whose square \d+% is \w+'s", text)
    assert llmc.GPT2.from_checkpoint(out / "model.bin").config.channels == 16
    assert llmc.Tokenizer.beside(out) is not None


def test_attention_is_drawn_from_kept_queries_and_keys(folder: Path) -> None:
    model = llmc.GPT2(llmc.GPT2Config(16, 61, num_layers=2, num_heads=3, channels=24))
    for values in model.parameters.values():
        values *= 8  # attention is not uniform
    model.forward([[5, 7, 11, 13, 17, 19]])
    maps = example("attention_maps").attention(model, 1)
    assert maps.shape == (3, 6, 6) and np.ptp(maps) > 0.1
    np.testing.assert_allclose(maps.sum(axis=2), 1, rtol=1e-5)
    assert not np.triu(maps, 1).any()
    # What the layer's attention gave: the mean of the values by these weights.
    v = model.activations["qkv"][1, 0, :, 48:].reshape(6, 3, 8).transpose(1, 0, 2)
    out = (maps @ v).transpose(1, 0, 2).reshape(6, 24)
    np.testing.assert_allclose(out, model.activations["atty"][1, 0], rtol=1e-4, atol=1e-6)

    picture = folder / "attention.png"
    arguments = ["--model", str(folder / "hf"), "--text", "a cat sat on $x$", "--output", str(picture)]
    assert "of 2 heads over" in shown("attention_maps", *arguments, "--layer", "-1")
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = called(example("attention_maps").main, *arguments, "--layer", "2")
    assert wrong.returncode == "--layer is 2, but the model has 2 layers"


def test_losses_of_a_page_are_those_of_the_model(folder: Path) -> None:
    module = example("token_loss")
    model = llmc.GPT2(llmc.GPT2Config(16, 61, num_layers=1, num_heads=2, channels=16))
    ids = list(range(60))
    tokens = list(module.token_losses(model, ids, 3))
    assert [t.id for t in tokens] == ids[1:]
    first = model.token_losses([ids[:16]], [ids[1:17]])[0]
    np.testing.assert_allclose([t.loss for t in tokens[:16]], first, rtol=1e-5)
    later = model.token_losses([ids[8:24]], [ids[9:25]])[0]  # the second window, of which the first half is known
    np.testing.assert_allclose([t.loss for t in tokens[16:24]], later[8:], rtol=1e-5)
    for token in tokens:
        probabilities = [p for _, p in token.likely]
        assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
        assert np.exp(-token.loss) <= probabilities[0] * (1 + 1e-9)

    text, page = folder / "page.txt", folder / "page.html"
    text.write_text("a <b> & 天地\nlog", encoding="utf-8")
    assert "bits per byte" in shown(
        "token_loss", "--model", str(folder / "hf"), "--data", str(text), "--output", str(page)
    )
    html = page.read_text(encoding="utf-8")
    shown_text = re.sub(r"<i>.*?</i>|</?span[^>]*>", "", html.partition("<pre>")[2].partition("</pre>")[0])
    assert shown_text == "a &lt;b&gt; &amp; 天地\u23ce\nlog"


def test_a_bpe_of_chinese_joins_characters(folder: Path) -> None:
    (folder / "chinese.txt").write_text(CHINESE * 40, encoding="utf-8")
    arguments = ["--data", str(folder / "chinese.txt"), "--output", str(folder / "chinese"), "--vocab-size", "400"]
    text = shown("chinese", *arguments, *SMALL, "--prompt", "天地玄黃")
    assert "after 4 updates" in text and "bits per byte" in text
    tokenizer = llmc.Tokenizer.beside(folder / "chinese")
    assert tokenizer is not None and len(tokenizer.encode("天地玄黃")) == 1


def test_a_sweep_is_drawn_over_the_learning_rate(folder: Path) -> None:
    out = folder / "sweep"
    arguments = ["--data", str(folder / "text.txt"), "--output", str(out), "--tokenizer", "bytes", *SMALL]
    text = shown("lr_sweep", *arguments, "--rates", "1e-3", "1e-2", "--optimizers", "adamw")
    assert text.count(": done") == 2 and "* the best: optimizer=adamw,learning_rate=" in text
    assert (out / "learning_rate.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_computes_the_same_with_an_exported_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [
        "--model",
        str(folder / "hf"),
        "--output",
        str(folder / "exported"),
        "--prompt",
        "the cat",
        "--tokens",
        "5",
    ]
    text = shown("serve_transformers", *arguments)
    assert float(re.findall(r"differ by (\S+) of", text)[0]) < 1e-5
    theirs, ours = re.findall(r"writes: +(.*)", text)
    assert theirs == ours and len(theirs) > len("the cat")
