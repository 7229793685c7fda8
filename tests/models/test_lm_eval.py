"""llmc in the lm-evaluation-harness, against the harness's own Hugging Face model on the exported weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.hub.writing import export_model

lm_eval = pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed: pip install lm-eval")
torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)

from llmc import lm_eval as adapter  # noqa: E402

CONTEXT = 48
TASK = """
task: llmc_{kind}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {output}
doc_to_text: "{{{{question}}}}"
{rest}
"""
TASKS = {
    "choice": (
        "multiple_choice",
        'doc_to_choice: "{{choices}}"\ndoc_to_target: label\nmetric_list: [{metric: acc}, {metric: acc_norm}]',
    ),
    "rolling": ("loglikelihood_rolling", 'doc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}]'),
    "last": ("loglikelihood", 'doc_to_target: "{{answer}}"\nmetric_list: [{metric: perplexity}, {metric: acc}]'),
    "generate": (
        "generate_until",
        'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["e"], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]',
    ),
}
WORDS = "the cat sat on a mat and went to see its friend on the far hill by noon".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a briefly trained byte-level model as llm.c's file and as a Hugging Face folder, and four tasks."""
    path = tmp_path_factory.mktemp("lm_eval")
    tokenizer = llmc.Tokenizer.byte_level()
    model = llmc.GPT2(llmc.GPT2Config(CONTEXT, 257, 2, 2, 32))
    optimizer = llmc.AdamW(model)
    ids = np.array(tokenizer.encode(" ".join(WORDS * 40)), np.int32)
    rng = np.random.default_rng(0)
    for _ in range(100):
        starts = rng.integers(0, len(ids) - CONTEXT - 1, 8)
        rows = np.stack([ids[s : s + CONTEXT + 1] for s in starts])
        model.zero_grad()
        model.forward(rows[:, :-1])
        model.backward(rows[:, 1:])
        optimizer.step(5e-3)
    (path / "llmc").mkdir()
    model.save(path / "llmc" / "model.bin")
    tokenizer.save(path / "llmc" / "tokenizer.bin")
    export_model(model, path / "hf", tokenizer=tokenizer)
    documents = []
    for i in range(12):
        words = [str(w) for w in rng.choice(WORDS, 16 if i % 4 == 0 else 4)]  # some are longer than the context
        choices = [" " + " ".join(rng.choice(WORDS, 2)) for _ in range(3)]
        documents.append({"question": " ".join(words), "choices": choices, "label": i % 3, "answer": choices[0]})
    documents[1].update(question="the cat sat on a mat and wen", answer="t")
    documents[2].update(question="a mat and went to see its frien", answer="d")
    (path / "data.json").write_text("\n".join(json.dumps(d) for d in documents))
    tasks = path / "tasks"
    tasks.mkdir()
    for kind, (output, rest) in TASKS.items():
        text = TASK.format(kind=kind, output=output, rest=rest, file=json.dumps(str(path / "data.json")))
        (tasks / f"{kind}.yaml").write_text(text)
    return path


def evaluate(folder: Path, model: str, model_args: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    names = [f"llmc_{kind}" for kind in TASKS]
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=names,
        task_manager=manager,
        device="cpu",
        batch_size=5,
        bootstrap_iters=0,
    )
    return results


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_equals_the_harness_own_model(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate: pip install 'lm-eval[hf]'")
    llmc_out = evaluate(folder, "llmc", {"pretrained": str(folder / "llmc" / "model.bin")})
    hf_out = evaluate(folder, "hf", {"pretrained": str(folder / "hf"), "dtype": "float32"})
    for kind in TASKS:
        name = f"llmc_{kind}"
        for metric, value in hf_out["results"][name].items():
            if isinstance(value, float):
                assert llmc_out["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
        for a, b in zip(llmc_out["samples"][name], hf_out["samples"][name]):
            if kind == "generate":
                assert a["resps"] == b["resps"]
            else:
                flat_a, flat_b = (np.array(x["resps"], dtype=object).reshape(-1) for x in (a, b))
                np.testing.assert_allclose(flat_a.astype(float), flat_b.astype(float), rtol=1e-4, atol=1e-5)
    assert llmc_out["results"]["llmc_last"]["acc,none"] > 0  # some continuations are the greedy ones, but not all
    assert llmc_out["results"]["llmc_last"]["acc,none"] < 1
    assert any(sample["resps"][0][0] for sample in llmc_out["samples"]["llmc_generate"])


def test_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "lm_eval",
        "--model",
        "llmc",
        "--model_args",
        f"pretrained={folder / 'llmc'},dtype=bf16",
        "--tasks",
        "llmc_choice",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--include_path", str(folder / "tasks"), "--batch_size", "auto"])
    # A folder is a model if it has a checkpoint.
    (folder / "llmc" / "DONE_00000001").touch()
    (folder / "llmc" / "model_00000001.bin").write_bytes((folder / "llmc" / "model.bin").read_bytes())
    adapter.main()
    assert "llmc_choice" in capsys.readouterr().out


def test_devices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: the default of another program. cuda:0 is what the harness says if its user does not, so the CPU does where there is no GPU."""
    try:
        llmc.GPT2(llmc.GPT2Config(8, 17, 1, 1, 4), device="cuda:0")
        name = "cuda"
    except llmc.Error:
        name = "cpu"
    lm = adapter.LlmcLM(folder / "llmc" / "model.bin", device="cuda:0")
    assert lm.model.backend.info().name == name
    assert ("the CPU computes" in capsys.readouterr().err) == (name == "cpu")
    assert adapter.LlmcLM(folder / "llmc" / "model.bin").model.backend.info().name == "cpu"
    assert not capsys.readouterr().err
    for device in ("mps", "cuda:99"):  # what somebody chose is not replaced
        with pytest.raises((ValueError, llmc.Error)):
            adapter.LlmcLM(folder / "llmc" / "model.bin", device=device)


def test_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.bin").write_bytes((folder / "llmc" / "model.bin").read_bytes())
    with pytest.raises(ValueError, match="there is no tokenizer beside"):
        adapter.LlmcLM(tmp_path / "alone.bin")
    lm = adapter.LlmcLM(tmp_path / "alone.bin", tokenizer="bytes", max_length=8)
    with pytest.raises(ValueError, match="9 tokens"):
        lm._loglikelihood_tokens([(None, [1], [2] * 9)], disable_tqdm=True)


def test_no_room_for_the_prompt(folder: Path) -> None:
    """The prompt is refused, as the harness's own model does by an assert."""
    from lm_eval.api.instance import Instance

    lm = adapter.LlmcLM(folder / "llmc" / "model.bin", max_length=8)

    def ask(**options: Any) -> list[str]:
        return lm.generate_until([Instance("generate_until", {}, ("the cat", options), 0)], disable_tqdm=True)

    with pytest.raises(ValueError, match="256 tokens are to be generated.*context of 8.*max_gen_toks"):
        ask()
    with pytest.raises(ValueError, match="8 tokens"):
        ask(max_gen_toks=8)
    assert len(ask(max_gen_toks=3)) == 1
