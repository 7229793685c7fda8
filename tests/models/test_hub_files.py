"""Hugging Face folders as people have them, read and written without torch or transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import small_disk
from runs import tiny_settings

import llmc
from llmc.commands import import_
from llmc.data.roles import EOT, read_roles
from llmc.data.tokenizer import BYTE_LETTERS
from llmc.hub import writing
from llmc.hub.gguf import export_gguf
from llmc.hub.reading import import_model, open_hub_model
from llmc.hub.tokenizer import read_tokenizer, write_tokenizer
from llmc.hub.writing import export_model
from llmc.load import find_tokenizer, load_model

TEXT = "It's 1999: the naïve café costs 42€… [PAD] <s> 漢字 <|endoftext|>"
T, C = 16, 8


def make(vocab_size: int) -> llmc.GPT2:
    return llmc.GPT2(llmc.GPT2Config(T, vocab_size, 2, 2, C))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a model of 261 tokens as a Hugging Face folder, without a tokenizer and without a word about special tokens."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "hf"
    export_model(make(261), path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if not k.endswith("_token_id")}))
    return path


@pytest.fixture
def said() -> list[str]:
    return []


# ---- weights ----


def rename(folder: Path, to: Callable[[str], str]) -> dict[str, Any]:
    """Give the tensors of a folder other names; return them by their old ones."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({to(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    "to",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "_orig_mod.module._orig_mod." + name,
        lambda name: "model." + name.removeprefix("transformer."),
        lambda name: "module.model." + name,
        lambda name: name.replace("h.1.", "h.1._orig_mod.").replace("h.0.attn.", "h.0.attn._fsdp_wrapped_module."),
    ],
)
def test_names_of_modules_around_the_model(folder: Path, to: Callable[[str], str]) -> None:
    """Kind: a wrapper's name in those of the tensors. Any, anywhere, any number of times."""
    before = load_model(folder).parameters
    rename(folder, to)
    after = load_model(folder).parameters
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


def test_names_that_are_left_over(folder: Path, said: list[str], tmp_path: Path) -> None:
    """Kind: tensors that do not fit. They are named: in the error if one is missing, else in a note; masks are nothing to speak of."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, T, T), np.float32)}
    save_file({**tensors, **mask}, folder / "model.safetensors")
    assert open_hub_model(folder).notes == ()
    save_file({**tensors, **mask, "score.weight": np.zeros((2, C), np.float32)}, folder / "model.safetensors")
    import_model(folder, tmp_path / "m.bin", warn=said.append)
    assert "left out: 'score.weight'" in said[0]
    save_file({**tensors, "wte.weight": tensors["transformer.wte.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(llmc.Error, match=r"second tensor wte\.weight"):
        open_hub_model(folder)
    save_file(tensors, folder / "model.safetensors")
    rename(folder, lambda name: name.replace("c_fc", "c_fc.base_layer"))
    with pytest.raises(
        llmc.Error, match=r"no tensor 'h\.0\.mlp\.c_fc\.weight'.*meaning are 'h\.0\.mlp\.c_fc\.base_layer\.bias'"
    ):
        open_hub_model(folder).tensor("fcw")


def test_checkpoint_of_nanogpt(tmp_path: Path) -> None:
    """Kind: a training program's checkpoint. The model is under a key, its linear layers are (out, in), biases may be missing."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = make(261)
    state = {
        f"_orig_mod.transformer.{name}": torch.from_numpy(np.array(t))
        for name, t in open_names(model)
        if "bias" not in name
    }
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    args = {"n_layer": 2, "n_head": 2, "n_embd": C, "block_size": T, "bias": False, "vocab_size": 261, "dropout": 0.0}
    whole = {"model": state, "model_args": args, "iter_num": 3, "best_val_loss": torch.tensor(1.0), "config": {"a": 1}}
    torch.save(whole, tmp_path / "ckpt.pt")
    said: list[str] = []
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        import_model(source, tmp_path / "out" / "m.bin", warn=said.append)
        again = load_model(tmp_path / "out" / "m.bin")
        assert again.config == model.config and "GELU" in said[0] and "no tokenizer comes along" in said[1]
        for name, tensor in model.parameters.items():  # biases of a new model are 0
            np.testing.assert_array_equal(again.parameters[name], tensor)
    torch.save({"state_dict": {k.replace("_orig_mod", "module"): v for k, v in state.items()}}, tmp_path / "last.pt")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_hub_model(tmp_path / "last.pt")


def open_names(model: llmc.GPT2) -> list[tuple[str, Any]]:
    """List a model's tensors as nanoGPT names them, in llm.c's layout, which is nanoGPT's."""
    out = []
    for name, tensor in writing.gpt2.hub_tensors(model.config).items():
        for layer, hub_name in enumerate(tensor.names):
            array = model.parameters[name][layer] if tensor.in_blocks else model.parameters[name]
            out.append((hub_name, array[: tensor.shape[0]]))
    return out


def test_formats_that_are_not_read(folder: Path) -> None:
    """Kind: weights of another program. The file is named, and nothing is guessed."""
    (folder / "model.safetensors").rename(folder / "model.gguf")
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors.*'model\.gguf'"):
        open_hub_model(folder)
    with pytest.raises(llmc.Error, match=r"model\.gguf: no model: neither"):
        open_hub_model(folder / "model.gguf")


# ---- tokenizers ----


def gpt2_like(path: Path, special: dict[str, int], merges: tuple[str, ...] = ("a b", "ab c"), **roles: str) -> None:
    """Write a tokenizer.json with GPT-2's rules: bytes and merges have the ids that special tokens leave free."""
    free = (i for i in range(400) if i not in special.values())
    vocab = {token: next(free) for token in (*BYTE_LETTERS, *(m.replace(" ", "") for m in merges))}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special.items()],
        "pre_tokenizer": split,
        "decoder": split,
        "model": {"type": "BPE", "vocab": {**vocab, **special}, "merges": [m.split(" ") for m in merges]},
    }
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({f"{role}_token": token for role, token in roles.items()}))


@pytest.mark.parametrize("slow", [False, True])
def test_added_tokens_and_roles_go_round(folder: Path, tmp_path: Path, slow: bool) -> None:
    """Kind: special tokens besides <|endoftext|>. They and their roles are kept: import, a run's folder, export, import."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    gpt2_like(folder, {EOT: 258, "[PAD]": 259, "<s>": 260}, eos=EOT, pad="[PAD]")
    if slow:  # as transformers writes a tokenizer that is written in Python
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = {token: whole["model"]["vocab"].pop(token) for token in ("[PAD]", "<s>")}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in whole["model"]["merges"])
        )
        (folder / "tokenizer.json").unlink()
    import_model(folder, tmp_path / "m" / "m.bin", warn=pytest.fail)
    found = find_tokenizer(tmp_path / "m" / "m.bin")
    assert found is not None and (found.eot_token, found.vocab_size, found.roles) == (258, 261, {"pad": 259})
    found.save(tmp_path / "tokenizer.json")  # as a run does
    export_model(load_model(tmp_path / "m" / "m.bin"), tmp_path / "out", tokenizer=find_tokenizer(tmp_path))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (258, 258, 259)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["unk_token"], config["pad_token"]) == (EOT, EOT, "[PAD]")
    again, reference = (
        find_tokenizer(tmp_path / "out"),
        tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")),
    )
    assert again is not None and again.roles == {"pad": 259} and again.tokens == found.tokens
    assert reference.get_vocab_size() == 261 and reference.encode("abcab[PAD]").ids == [257, 256, 259]
    assert again.encode(TEXT) == found.encode(TEXT) and again.decode(again.encode(TEXT)) == TEXT


def test_the_role_that_end_of_text_has(folder: Path, tmp_path: Path) -> None:
    """Kind: roles of a tokenizer that llm.c's table holds: `pad_token = eos_token`, as everyone does with GPT-2."""
    gpt2_like(folder, {EOT: 258}, bos=EOT, eos=EOT, unk=EOT, pad=EOT)
    import_model(folder, tmp_path / "m" / "m.bin", warn=pytest.fail)
    found = find_tokenizer(tmp_path / "m")
    assert found is not None and found.file_name == "tokenizer.bin" and found.roles == {"pad": 258}
    write_tokenizer(found, tmp_path, T)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert [config[f"{role}_token"] for role in ("bos", "eos", "unk", "pad")] == [EOT] * 4


@pytest.mark.parametrize(
    ("special", "roles", "config", "eot"),
    [
        ({"<s>": 0, "<pad>": 1, "</s>": 2}, {}, {}, 2),
        ({"<s>": 0, "<pad>": 1, "</s>": 2}, {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}, {}, 2),
        ({"<s>": 0, "[END]": 2}, {"eos": "[END]"}, {}, 2),
        ({"<s>": 0, "[END]": 2}, {}, {"eos_token_id": 2}, 2),
        ({"<s>": 0, "</s>": 2}, {}, {"eos_token_id": 256}, 2),  # transformers' default, which is no special token here
        ({EOT: 258, "<|im_end|>": 259}, {"eos": "<|im_end|>"}, {}, 258),  # the end of a turn is not that of a text
    ],
)
def test_which_token_ends_a_text(
    folder: Path, tmp_path: Path, special: dict[str, int], roles: dict[str, str], config: dict[str, int], eot: int
) -> None:
    """Kind: vocabularies without <|endoftext|>. Its name, or the role that a file beside it gives, tells; the role is kept."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    gpt2_like(folder, special, **roles)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    import_model(folder, tmp_path / "m" / "m.bin", warn=pytest.fail)
    found = find_tokenizer(tmp_path / "m" / "m.bin")
    assert found is not None and found.eot_token == eot
    assert {role: found.tokens[i].decode() for role, i in found.roles.items() if role != "eos"} == {
        role: token for role, token in roles.items() if role != "eos"
    }


def test_no_tokenizer_comes_along(folder: Path, tmp_path: Path, said: list[str]) -> None:
    """Kind: tokenizers that llmc does not have. The weights come; why the tokenizer does not is said."""

    def reason() -> str:
        said.clear()
        import_model(folder, tmp_path / "m" / "m.bin", warn=said.append)
        assert not any(p.name.startswith(("tok", "special")) for p in (tmp_path / "m").iterdir())
        assert len(said) == 1 and "no tokenizer comes along" in said[0] and "--tokenizer" in said[0]
        return said[0]

    assert "has none" in reason()
    for file, kind in (("vocab.txt", "WordPiece"), ("tokenizer.model", "SentencePiece"), ("vocab.json", "merges.txt")):
        (folder / file).write_bytes(b"\x00")
        assert kind in reason()
        (folder / file).unlink()
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    word_piece = {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}  # fmt: skip  # noqa: E501
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": word_piece}))
    assert "not a byte-level" in reason()
    gpt2_like(folder, {"[MASK]": 258})
    assert "which token ends a text" in reason()
    gpt2_like(folder, {EOT: 258, "[PAD]": 259, "<a>": 260, "<b>": 261})  # added without resizing the embedding
    assert "262 tokens, the model a vocabulary of 261" in reason()


def test_nothing_is_written_if_the_import_fails(folder: Path, tmp_path: Path) -> None:
    """Kind: a damaged part that is read late."""
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(llmc.Error, match=r"tokenizer\.json"):
        import_model(folder, tmp_path / "m" / "m.bin")
    assert not (tmp_path / "m").exists()


def test_a_folder_has_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Kind: two models in one folder. The first one's tokenizer is not replaced; the same one again is nothing new."""
    write_tokenizer(llmc.Tokenizer.byte_level(), folder, T)
    import_model(folder, tmp_path / "m" / "a.bin")
    import_model(folder, tmp_path / "m" / "b.bin")
    gpt2_like(folder, {EOT: 258})
    with pytest.raises(ValueError, match="tokenizer of another model"):
        import_model(folder, tmp_path / "m" / "c.bin")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["a.bin", "b.bin", "tokenizer.bin"]


def test_damaged_roles(folder: Path) -> None:
    gpt2_like(folder, {EOT: 258})
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(llmc.Error, match=r"tokenizer_config\.json: damaged"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(
        '{"pad_token": ["a"], "eos_token": {"content": 3}, "unk_token": "absent"}'
    )
    assert read_roles(folder, {EOT: 258}) == {}


# ---- where it is written ----


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_export_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: an export that fails half way. There is no folder then, or the old one is as it was."""

    class Unwritable(llmc.Tokenizer):
        def __init__(self) -> None:
            super().__init__([*(bytes([b]) for b in range(256)), b"[PAD]", EOT.encode()], 257, "mine")

    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not a merge"):
        export_model(make(261), out, tokenizer=Unwritable())
    assert names(tmp_path) == []
    export_model(make(261), out, tokenizer=llmc.Tokenizer.byte_level(), max_shard_bytes=4000)
    (out / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            export_model(make(261), out)
        with pytest.raises(OSError, match="No space"):
            export_model(make(261), tmp_path / "new")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and names(tmp_path) == ["out"]
    export_model(make(261), out)  # the tokenizer stays if there is none to write
    assert names(out) == [
        "README.md",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.json",
    ]
    with pytest.raises(NotADirectoryError, match="is a file"):
        export_model(make(261), out / "README.md")


def test_import_into_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: a folder in the place of a file. The error gives a file's name, before anything is read."""
    with pytest.raises(IsADirectoryError, match=r"is a folder: give the file to write, as '.*model\.bin'"):
        import_model("no/such/source", tmp_path)
    parser = __import__("argparse").ArgumentParser()
    import_.add_arguments(parser)
    assert import_.run(parser.parse_args([str(folder), str(tmp_path / "m.bin")])) == 0
    out, err = capsys.readouterr()
    assert f"from {folder}" in out and "no tokenizer comes along" in err  # a folder goes before a name on the Hub


def test_hub_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "offline":
            raise OSError("no route to host")
        return str(folder if name == "some/one" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_hub_model("some/one").config.channels == C
    assert len(asked) == 1 and "model*.safetensors*" in asked[0][1]
    with pytest.raises(ConnectionError, match="offline.*no route to host"):
        open_hub_model("offline")
    with pytest.raises(FileNotFoundError, match="no GPT-2 weights"):
        open_hub_model("someone/empty")
    with pytest.raises(FileNotFoundError, match="no name on the Hugging Face Hub"):
        open_hub_model("no/such/folder")
    with pytest.raises(FileNotFoundError, match="no model file"):
        load_model("absent.bin")


# ---- GGUF ----


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a GGUF file with the package gguf; return the values of its metadata and its tensors, by name."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    copy = path.with_name(f"copy {len(names(path.parent))}.gguf")  # it stays mapped, and Windows replaces no such file
    shutil.copy(path, copy)
    reader = gguf.GGUFReader(copy)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: tensor for tensor in reader.tensors}


def beside(folder: Path) -> llmc.Tokenizer:
    found = find_tokenizer(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gguf_is_read_back(tmp_path: Path, dtype: str) -> None:
    """Every tensor has the model's bits, under the name and with the shape that the package gguf has for GPT-2's."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tokenizer = llmc.Tokenizer.train_bpe(TEXT * 3 + "the cat sat on the mat. " * 9, 290)
    model = llmc.GPT2(llmc.GPT2Config(T, 300, 2, 2, C), dtype=dtype, seed=3)
    for array in model.parameters.values():  # biases and layernorms begin as 0 and 1
        array += np.linspace(-1, 1, array.size).reshape(array.shape).astype(array.dtype)
    export_gguf(model, tmp_path / "new" / "m.gguf", tokenizer)
    values, tensors = read_gguf(tmp_path / "new" / "m.gguf")

    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]} - {"output"}  # tied: left out
    whole = {name for name in known if "{" not in name}
    blocks = {name.format(bid=l) for name in known - whole for l in range(2)}
    assert tensors.keys() == {f"{name}.{part}" for name in whole | blocks for part in ("weight", "bias")} - {
        "token_embd.bias",
        "position_embd.bias",
    }
    sizes = {"attn_qkv": "qkv", "attn_output": "attproj", "ffn_up": "fc", "ffn_down": "fcproj", "attn_norm": "ln1", "ffn_norm": "ln2"}  # fmt: skip  # noqa: E501
    for name, tensor in tensors.items():
        *block, module, kind = name.split(".")
        if block:
            array = model.parameters[sizes[module] + kind[0]][int(block[1])]
        else:
            own = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "lnf" + kind[0]}[module]
            array = model.parameters[own][:300]
        if array.ndim == 1 or module == "position_embd":
            array = array.astype(np.float32)
        assert tensor.tensor_type.name == {"float32": "F32", "bfloat16": "BF16"}[array.dtype.name], name
        assert tuple(reversed(tensor.shape.tolist())) == array.shape, name
        assert tensor.data.tobytes() == array.tobytes(), name

    shape = {name.removeprefix("gpt2."): value for name, value in values.items() if name.startswith("gpt2.")}
    assert shape == {
        "block_count": 2,
        "context_length": T,
        "embedding_length": C,
        "feed_forward_length": 4 * C,
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
        "vocab_size": 300,
    }
    assert values["general.architecture"] == "gpt2"
    assert values["general.file_type"] == (gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bf16" else 0)

    # Its tokens and merges, as Hugging Face's files, are the same tokenizer.
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in values.items() if "tokenizer" in name}
    assert (own["model"], own["pre"], own["bos_token_id"], own["eos_token_id"]) == ("gpt2", "gpt-2", 289, 289)
    assert own["add_bos_token"] is False and own["tokens"][290:] == [f"[PAD{i}]" for i in range(290, 300)]
    assert own["token_type"] == [1] * 289 + [3] + [5] * 10
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(own["tokens"][:290])}))
    (tmp_path / "merges.txt").write_text("\n".join(own["merges"]), encoding="utf-8")
    again = read_tokenizer(tmp_path)
    assert again is not None and again.tokens == tokenizer.tokens and again.encode(TEXT) == tokenizer.encode(TEXT)


def test_tokenizers_in_gguf(folder: Path, tmp_path: Path) -> None:
    """GPT-2's rules can be written, with special and added tokens; other rules are refused before anything is written."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    out = tmp_path / "m.gguf"
    export_gguf(make(261), out, llmc.Tokenizer.byte_level())
    values, _ = read_gguf(out)
    assert values["tokenizer.ggml.tokens"][:256] == BYTE_LETTERS and len(values["tokenizer.ggml.merges"]) == 1

    gpt2_like(folder, {EOT: 258, "[PAD]": 259, "<s>": 260}, eos=EOT, pad="[PAD]")
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    (row,) = [row for row in whole["added_tokens"] if row["content"] == "<s>"]
    row["special"] = False
    path.write_text(json.dumps(whole), encoding="utf-8")
    export_gguf(make(261), out, beside(folder))  # replaces the file
    values, _ = read_gguf(out)
    assert values["tokenizer.ggml.tokens"][258:] == [EOT, "[PAD]", "<s>"]
    assert values["tokenizer.ggml.token_type"][256:] == [1, 1, 3, 3, 4]
    assert (values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.padding_token_id"]) == (258, 259)
    before = out.read_bytes()
    for change in ({"lstrip": True}, None):
        if change is None:
            whole["pre_tokenizer"]["add_prefix_space"] = True
        else:
            row.update(change)
        path.write_text(json.dumps(whole), encoding="utf-8")
        with pytest.raises(ValueError, match=r"in another way than GPT-2's, so GGUF cannot hold it\. Export a folder"):
            export_gguf(make(261), out, beside(folder))  # replaces the file
        row["lstrip"] = False
    with pytest.raises(ValueError, match="not a pair"):
        export_gguf(make(100), out, llmc.Tokenizer.byte_level())
    with pytest.raises(IsADirectoryError, match=r"is a folder: give the file to write, as '.*model\.gguf'"):
        export_gguf(make(261), folder, llmc.Tokenizer.byte_level())
    assert out.read_bytes() == before


def test_a_gguf_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    small_disk(monkeypatch, 8000)
    with pytest.raises(OSError, match=r"No space left on device after 8\.0 kB: .*m\.gguf"):
        export_gguf(make(261), tmp_path / "m.gguf", llmc.Tokenizer.byte_level())
    assert names(tmp_path) == []


# ---- llmc-train -e ----


def test_training_goes_on_from_a_run(tmp_path: Path) -> None:
    """Kind: what people give for a model. A run's newest checkpoint and its tokenizer are taken."""
    text = tmp_path / "text.txt"
    text.write_text("a quick brown fox jumps over the lazy dog. " * 60)
    settings = {**tiny_settings(tmp_path), "val_data": (), "val_every": 0, "data": (str(text),), "vocab_size": None, "tokenizer": "bpe:270", "max_steps": 2}  # fmt: skip  # noqa: E501
    first = llmc.train(**settings)
    again = {k: v for k, v in settings.items() if k not in ("layers", "heads", "channels", "max_seq_len", "tokenizer")}
    again.update(output_dir=str(tmp_path / "next"), model=str(tmp_path / "run"), learning_rate=0.0)
    second = llmc.train(**again)
    assert second.tokenizer is not None and first.tokenizer is not None
    assert second.tokenizer.tokens == first.tokenizer.tokens
    for name, tensor in first.model.parameters.items():
        np.testing.assert_array_equal(second.model.parameters[name], tensor)


def test_models_that_training_does_not_read(tmp_path: Path) -> None:
    """Kind: as before. For those of Hugging Face's the error gives the command that converts them."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    for model, command in (
        (str(folder), r"llmc import \S*hf hf-llmc\.bin"),
        (str(tmp_path / "ckpt.pt"), r"llmc import \S*ckpt\.pt ckpt-llmc\.bin"),
        ("gpt2", r"llmc import gpt2 gpt2-llmc\.bin"),
        ("gpt2-xl", r"llmc import gpt2-xl gpt2-xl-llmc\.bin"),
        ("owner/model", r"llmc import owner/model model-llmc\.bin"),
        ("d13x", "unknown model descriptor"),
    ):
        with pytest.raises(ValueError, match=command):
            llmc.train(**{**tiny_settings(tmp_path), "model": model})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").touch()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        llmc.train(**{**tiny_settings(tmp_path), "model": str(tmp_path / "empty")})
