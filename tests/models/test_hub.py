"""Hugging Face interchange: transformers itself is the oracle."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import llmc
from llmc.commands import export, import_
from llmc.data.tokenizer import BYTE_OF_LETTER
from llmc.hub.reading import import_model, open_hub_model
from llmc.hub.tokenizer import read_tokenizer, write_tokenizer
from llmc.hub.writing import export_model
from llmc.load import find_tokenizer, load_model, tokenizer_for

torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)  # PyTorch's matmuls are so small here that threads cost more than they save
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")

V, T, L, NH, C = 301, 24, 3, 3, 36


@pytest.fixture(scope="module")
def hf_model() -> Any:
    """Make a GPT-2 of transformers with random weights, biases and layernorms included."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_layer=L, n_head=NH, n_embd=C, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=V - 1, eos_token_id=V - 1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return model


@pytest.fixture(scope="module")
def folder(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    hf_model.save_pretrained(path)
    return path


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (2, T)).astype(np.int32)


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out: np.ndarray = model(torch.from_numpy(tokens).long()).logits.float().numpy()
    return out


def test_import_logits_equal(hf_model: Any, folder: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    import_model(folder, tmp_path / "m.bin")
    model = llmc.GPT2.from_checkpoint(tmp_path / "m.bin")
    assert model.config == llmc.GPT2Config(T, V, L, NH, C)
    assert np.abs(logits_of(hf_model, tokens)).max() > 1  # the logits are not all near 0
    np.testing.assert_allclose(model.logits(tokens), logits_of(hf_model, tokens), atol=1e-4, rtol=0)
    assert not np.any(model.parameters["wte"][V:])


def test_round_trip_is_exact(hf_model: Any, folder: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    model = load_model(folder)
    export_model(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    before, after = hf_model.state_dict(), again.state_dict()
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    np.testing.assert_allclose(logits_of(again, tokens), model.logits(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["bare names", "tied head", "f16", "bf16", "shards", "pytorch", "pytorch shards"])
def test_what_can_be_imported(hf_model: Any, folder: Path, tokens: np.ndarray, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = {k: v.clone() for k, v in hf_model.state_dict().items() if k != "lm_head.weight"}
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    if kind == "bare names":  # named as in OpenAI's files on the Hub, with the mask that old versions saved
        state = {k.removeprefix("transformer."): v for k, v in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, T, T, dtype=torch.bool)
        save_file(state, tmp_path / "model.safetensors")
    elif kind == "shards":
        hf_model.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    elif kind == "pytorch":
        torch.save(hf_model.state_dict(), tmp_path / "pytorch_model.bin")
    elif kind == "pytorch shards":
        names = sorted(state)
        halves = {"pytorch_model-1.bin": names[:20], "pytorch_model-2.bin": names[20:]}
        for file, members in halves.items():
            torch.save({k: state[k] for k in members}, tmp_path / file)
        index = {"weight_map": {k: file for file, members in halves.items() for k in members}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        if kind == "tied head":
            state["lm_head.weight"] = state["transformer.wte.weight"].clone()
        save_file({k: v.to(dtype) for k, v in state.items()}, tmp_path / "model.safetensors")
    got = load_model(tmp_path).parameters
    wte = state.get("transformer.wte.weight", state.get("wte.weight"))
    np.testing.assert_array_equal(got["wte"][:V], wte.to(dtype).float().numpy())
    np.testing.assert_array_equal(
        got["qkvw"][1], hf_model.state_dict()["transformer.h.1.attn.c_attn.weight"].to(dtype).float().numpy().T
    )
    if dtype == torch.float32:
        np.testing.assert_allclose(load_model(tmp_path).logits(tokens), logits_of(hf_model, tokens), atol=1e-4, rtol=0)


def test_bf16(hf_model: Any, folder: Path, tmp_path: Path) -> None:
    """Writing a bf16 file and reading one round f32 weights to the nearest bf16."""
    import_model(folder, tmp_path / "m.bin", dtype="bf16")
    model = llmc.GPT2.from_checkpoint(tmp_path / "m.bin")
    assert model.dtype == "bf16"
    rounded = hf_model.state_dict()["transformer.h.2.mlp.c_fc.weight"].bfloat16()
    np.testing.assert_array_equal(model.parameters["fcw"][2].astype(np.float32), rounded.float().numpy().T)
    export_model(load_model(tmp_path / "m.bin"), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.state_dict()["transformer.h.2.mlp.c_fc.weight"], rounded)


def test_another_family_is_not_exported(tmp_path: Path) -> None:
    class Other(llmc.Model):
        family = "Mamba"

    with pytest.raises(ValueError, match="the model is a Mamba: only a GPT-2 can be exported"):
        export_model(Other.__new__(Other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_in_shards(folder: Path, tokens: np.ndarray, tmp_path: Path) -> None:
    from safetensors import safe_open

    model = load_model(folder)
    export_model(model, tmp_path, max_shard_bytes=60_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    for file in files:
        with safe_open(file, "np") as f:  # the library that defines the format reads what is written
            assert sum(f.get_tensor(k).nbytes for k in f.keys()) <= 60_000
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(logits_of(again, tokens), model.logits(tokens), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(load_model(tmp_path).parameters["fcprojw"], model.parameters["fcprojw"])
    export_model(model, tmp_path)  # the same folder again, now as one file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_ten_steps_of_fine_tuning(folder: Path) -> None:
    """Ten steps with the same batches, AdamW and clipping give the same losses as transformers and torch."""
    # Few different tokens, so that there is something to learn.
    data = np.random.default_rng(3).integers(0, 4, (10, 4, T + 1))
    model = load_model(folder)
    optimizer = llmc.AdamW(model, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0)
    other = transformers.GPT2LMHeadModel.from_pretrained(folder).train()
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses, hf_losses = [], []
    for batch in data:
        model.zero_grad()
        model.forward(batch[:, :-1])
        model.backward(batch[:, 1:])
        losses.append(model.mean_loss)
        optimizer.step(1e-3)
        adamw.zero_grad()
        logits = other(torch.from_numpy(batch[:, :-1])).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch[:, 1:]).flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        adamw.step()
        hf_losses.append(loss.item())
        assert optimizer.norm == pytest.approx(norm.item(), rel=1e-4)
    assert hf_losses[0] - hf_losses[-1] > 0.5
    np.testing.assert_allclose(losses, hf_losses, rtol=2e-5)


# ---- tokenizers ----

TEXT = "It's 1999: the naïve café costs 42€…\n\n  def f(x):\n\treturn x ** 2  # 漢字 <|x|> \x00\x7f"


@pytest.fixture(scope="module")
def bpe() -> llmc.Tokenizer:
    return llmc.Tokenizer.train_bpe(TEXT * 3 + Path(__file__).read_text(encoding="utf-8"), 420)


@pytest.mark.parametrize("kind", ["bpe", "bytes", "gpt2"])
def test_tokenizer_out_and_in(bpe: llmc.Tokenizer, tmp_path: Path, kind: str) -> None:
    if kind == "gpt2":
        try:
            tokenizer = llmc.Tokenizer.gpt2()
        except ConnectionError:
            pytest.skip("GPT-2's tokenizer is not cached on this machine")
    else:
        tokenizer = bpe if kind == "bpe" else llmc.Tokenizer.byte_level()
    write_tokenizer(tokenizer, tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert other.decode(tokenizer.encode(TEXT), clean_up_tokenization_spaces=False) == TEXT
    assert other.eos_token_id == tokenizer.eot_token and len(other) == tokenizer.vocab_size
    again = read_tokenizer(tmp_path)
    assert again is not None and again.tokens == tokenizer.tokens and again.eot_token == tokenizer.eot_token
    other.save_pretrained(tmp_path / "json")  # writes tokenizer.json
    assert (tmp_path / "json" / "tokenizer.json").is_file()
    from_json = read_tokenizer(tmp_path / "json")
    assert from_json is not None and from_json.tokens == tokenizer.tokens


@pytest.fixture
def json_run(hf_model: Any, tmp_path: Path) -> Path:
    """Train a run whose tokenizer.json is not GPT-2's: it splits words, merges and ends texts in its own way."""
    import tokenizers

    folder = tmp_path / "run"
    hf_model.save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", folder / "model_00000001.bin")
    (folder / "DONE_00000001").touch()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end_of_text|>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_run_with_a_tokenizer_json(json_run: Path, tmp_path: Path) -> None:
    """Evaluation, generation and export use the tokenizer that the run was trained with."""
    trained_with = llmc.Tokenizer.beside(json_run)
    assert trained_with is not None and trained_with.file_name == "tokenizer.json"
    for found in (find_tokenizer(json_run), tokenizer_for(json_run / "model_00000001.bin", V)):
        assert found is not None and found.encode(TEXT) == trained_with.encode(TEXT)
        assert (found.eot_token, found.tokens) == (0, trained_with.tokens)
    out = tmp_path / "exported"
    # The second export removes the first one's vocab.json and merges.txt.
    export_model(load_model(json_run), out, tokenizer=llmc.Tokenizer.byte_level())
    export_model(load_model(json_run), out, tokenizer=find_tokenizer(json_run))
    assert (out / "tokenizer.json").read_bytes() == (json_run / "tokenizer.json").read_bytes()
    assert not (out / "vocab.json").exists()
    other = transformers.AutoTokenizer.from_pretrained(out)
    assert other.encode(TEXT, add_special_tokens=False) == trained_with.encode(TEXT) and other.eos_token_id == 0
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    found = find_tokenizer(out)
    assert found is not None and found.encode(TEXT) == trained_with.encode(TEXT)
    import_model(out, tmp_path / "again" / "m.bin")  # and imported again
    found = find_tokenizer(tmp_path / "again" / "m.bin")
    assert found is not None and found.encode(TEXT) == trained_with.encode(TEXT)


def test_the_hubs_gpt2_folder_becomes_llm_c_table(bpe: llmc.Tokenizer, tmp_path: Path) -> None:
    """It has vocab.json, merges.txt and tokenizer.json, which agree, so llm.c's table holds all of it."""
    write_tokenizer(bpe, tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "json")
    (tmp_path / "json" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    found = find_tokenizer(tmp_path)
    assert found is not None and found.file_name == "tokenizer.bin" and found.encode(TEXT) == bpe.encode(TEXT)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None


def test_tokenizer_of_another_kind(tmp_path: Path) -> None:
    """A file that is no byte-level BPE is refused; one that a table cannot hold is kept as tokenizer.json."""
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    letters = dict(BYTE_OF_LETTER)
    good = {**letters, "ab": 256, "abc": 257, "<|endoftext|>": 258}
    for vocab, message in (
        ({**good, "abc": "257"}, "an id is not a number"),
        ({**{k: v for k, v in good.items() if k != "ab"}, "xy": 256}, "not a byte-level BPE"),
        ({**{k: v for k, v in good.items() if k != "!"}, "漢": good["!"]}, "not a byte-level BPE"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        with pytest.raises(llmc.Error, match=message):
            read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({k: v for k, v in good.items() if k != "<|endoftext|>"}))
    with pytest.raises(ValueError, match="which token ends a text"):
        read_tokenizer(tmp_path)
    for vocab in ({**good, "abc": 300}, {**good, "ab": 257, "abc": 256}):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        found = read_tokenizer(tmp_path)
        assert found is not None and found.file_name == "tokenizer.json" and found.eot_token == 258
        assert found.encode("abcab") == [vocab["abc"], vocab["ab"]] and found.tokens[vocab["abc"]] == b"abc"
    (tmp_path / "vocab.json").write_text(json.dumps(good))
    found = read_tokenizer(tmp_path)
    assert found is not None and found.file_name == "tokenizer.bin"


# ---- the commands, and where models come from ----


def test_commands(hf_model: Any, folder: Path, bpe: llmc.Tokenizer, tokens: np.ndarray, tmp_path: Path) -> None:
    source = tmp_path / "source"
    hf_model.save_pretrained(source)
    write_tokenizer(llmc.Tokenizer.byte_level(), source, T)

    def call(module: Any, *arguments: str) -> int:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args(arguments))
        return code

    out = tmp_path / "new" / "model.bin"
    assert call(import_, str(source), str(out), "--dtype", "bfloat16") == 0
    assert llmc.Tokenizer.load(out.with_name("tokenizer.bin")).vocab_size == 257
    assert call(export, str(out), str(tmp_path / "exported"), "--dtype", "f32") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert again.dtype == torch.float32 and again.config.eos_token_id == 256
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "exported").encode("ab") == [97, 98]
    with pytest.raises(ValueError, match="420 tokens.*301"):
        export_model(load_model(out), tmp_path / "x", tokenizer=bpe)


def test_load_model_from_a_run_directory(folder: Path, tmp_path: Path) -> None:
    for step in (5, 10):
        model = llmc.GPT2(llmc.GPT2Config(8, 17, 1, 1, 4), seed=step)
        model.save(tmp_path / f"model_{step:08d}.bin")
        (tmp_path / f"DONE_{step:08d}").touch()
    np.testing.assert_array_equal(load_model(tmp_path).parameters["wpe"], model.parameters["wpe"])
    assert load_model(folder / "model.safetensors", dtype="bf16").dtype == "bf16"


# ---- bad input ----


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran_a_pickle",)


def test_no_pickle_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"wte.weight": _Evil()}, "pytorch_model.bin")
    with pytest.raises(llmc.Error, match="plain tensors"):
        open_hub_model(tmp_path)
    Path("pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": _Evil()}))
    with pytest.raises(llmc.Error, match="plain tensors"):
        open_hub_model(tmp_path)
    assert not Path("ran_a_pickle").exists()


def test_config_of_another_architecture(folder: Path, tmp_path: Path) -> None:
    good = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for change, message in (
        ({"model_type": "llama"}, "type 'llama'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_inner": 7}, "n_inner is 7"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_head": 5}, "not divisible"),
        ({"n_layer": -1}, "num_layers is -1"),
        ({"n_embd": "36"}, "channels is '36'"),
        ({"n_layer": 4}, "there is no tensor 'h.3"),
        ({"vocab_size": 300}, "config.json makes it"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(llmc.Error, match=message):
            load_model(tmp_path)
    for text in ("[]", "{", "[" * 100_000, ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(llmc.Error, match="config.json"):
            load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(tmp_path)


def test_untied_head_and_wrong_dtype(hf_model: Any, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = {k: v.clone() for k, v in hf_model.state_dict().items()}
    save_file({**state, "lm_head.weight": torch.zeros(V, C)}, tmp_path / "model.safetensors")
    with pytest.raises(llmc.Error, match="lm_head"):
        load_model(tmp_path)
    save_file({**state, "transformer.wpe.weight": torch.zeros(T, C, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(llmc.Error, match="int32"):
        load_model(tmp_path)


def test_shard_outside_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    for name, error in (
        ("../secret.safetensors", llmc.Error),
        ("gone.safetensors", FileNotFoundError),
        (3, llmc.Error),
    ):
        index.write_text(json.dumps({"weight_map": {"wte.weight": name}}))
        with pytest.raises(error):
            open_hub_model(tmp_path)


def test_mutated_safetensors(folder: Path, tmp_path: Path) -> None:
    """Whatever a file holds, reading it returns a model or raises an llmc.Error or a ValueError."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    good = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(7)
    refused = 0
    for i in range(300):
        data = bytearray(good)
        if i % 3 == 0:
            del data[rng.choice((rng.randrange(header), rng.randrange(len(data)))) :]
        for _ in range(rng.randrange(1, 8)):
            if i % 3 and data:
                data[rng.randrange(min(8 if i % 5 == 0 else header, len(data)))] = rng.randrange(256)
        (tmp_path / "model.safetensors").write_bytes(data)
        try:
            model = open_hub_model(tmp_path)
            for _ in model.pieces(np.dtype(ml_dtypes.bfloat16)):
                pass
        except llmc.Error as e:
            assert str(tmp_path) in str(e)
            refused += 1
    assert refused > 200
