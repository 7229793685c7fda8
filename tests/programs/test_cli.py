"""The commands as a user types them: exit codes, one-line errors, and the files that they write."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs import VOCAB, called, tiny_data

import llmc
from llmc.cli import main, report_errors, train_main
from llmc.commands.train import parse
from llmc.distributed.world import World
from llmc.formats.metrics import follow_rows
from llmc.training.settings import SETTINGS, TrainConfig, load_toml


def run(*argv: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `llmc` with these arguments. options: of subprocess.run()."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "llmc", *argv]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120, **options
    )


TINY = "--layers 1 --heads 2 --channels 16 --max-seq-len 16 -t 16 -b 2 -x 4 -v 2 -m 1 -s 0 --vocab-size 61 --no-plot".split()


def call(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `llmc` as run() does, but within this process: for errors that need none of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        return called(main, *argv)


def fails(result: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """Assert that a program failed with this exit code and one line of error that matches message."""
    assert result.returncode == code, result
    assert "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_version_and_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--version", cwd=tmp_path).stdout == f"llmc {llmc.__version__}\n"
    monkeypatch.setenv("LLMC_TOKEN", "my secret")
    monkeypatch.setenv("LLMC_CACHES", "32K,512K,16M")
    shown = run("info", cwd=tmp_path).stdout
    rows = {line.split(":")[0]: line.split(":", 1)[1] for line in shown.splitlines()}
    assert list(rows) == [
        "llmc", "Python", "system", "compiler", "CPU", "caches", "memory", "kernel sets", "bf16", "threads", "CUDA",
        "packages", "variables",
    ]  # fmt: skip
    assert all(value.strip() for value in rows.values())
    assert "LLMC_CACHES=32K,512K,16M" in rows["variables"] and "OMP_NUM_THREADS=1" in rows["variables"]
    assert "LLMC_TOKEN=(set)" in rows["variables"] and "my secret" not in shown
    assert f"numpy {np.__version__}" in rows["packages"] or "not installed by pip" in rows["packages"]


def test_help_lists_every_command_and_setting(tmp_path: Path) -> None:
    shown = run("--help", cwd=tmp_path).stdout
    assert all(
        name in shown for name in ("train", "generate", "info", "check", "data", "eval", "plot", "watch", "sweep")
    )
    shown = run("train", "-h", cwd=tmp_path).stdout
    assert shown == run("train", "--help", cwd=tmp_path).stdout
    for name, setting in SETTINGS.items():
        assert "--" + name.replace("_", "-") in shown
        if setting.flag:
            assert re.search(rf"(^|\s|,){setting.flag}[ ,]", shown), name


def test_small_default_run_on_own_text_then_generate(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 400)
    options = "--layers 2 --channels 64 --tokenizer bpe:300 -x 30 -v 10 -t 32 -b 8 -l 1e-2".split()
    result = run("train", "--data", "my.txt", *options, "--temperature", "0", "-g", "12", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shown = result.stdout.splitlines()
    assert (
        shown[0].startswith("GPT-2 of ") and shown[0].endswith(" on my.txt") and shown[1].startswith("30 steps of 256 ")
    )
    told = [line for line in shown if line.startswith("step ")]
    assert [line[:23] for line in told] == ["step  0/30: val loss 5.", *(f"step {n}0/30: train loss " for n in "123")]
    (folder,) = (tmp_path / "runs").iterdir()
    names = {p.name for p in folder.iterdir()}
    assert {"main.log", "metrics.jsonl", "config.toml", "tokenizer.bin", "loss.png", "DONE_00000030"} <= names
    text = run("generate", str(folder), "the cat", "-n", "20", "--temperature", "0", "--past-eot", cwd=tmp_path)
    assert text.returncode == 0 and text.stdout.startswith("the cat sat on the")
    several = run("generate", str(folder), "the", "-n", "5", "--samples", "3", "--past-eot", cwd=tmp_path)
    assert several.stdout.count("---") == 3
    watched = run("watch", "--once", str(folder), cwd=tmp_path)
    assert watched.returncode == 0 and not watched.stderr and "\r" not in watched.stdout
    watched_lines = watched.stdout.splitlines()
    assert told[0] in watched_lines and "the run ended on" in watched_lines[-1]
    assert [line for line in watched_lines if line.startswith("step 30/30: train loss ")]


def test_resume_by_run_directory(tmp_path: Path) -> None:
    train, val = tiny_data(tmp_path / "data")
    first = run("train", "-i", train, "-j", val, "-o", "log", "-n", "2", *TINY, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "log" / "DONE_00000004").unlink()
    again = run("train", "--resume", "log", cwd=tmp_path)
    assert again.returncode == 0 and "continuing log from step 2" in again.stdout
    assert (tmp_path / "log" / "DONE_00000004").is_file()


def test_rows_are_read_as_they_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "start"}\n{"kind": "tr')
    rows = follow_rows(path, interval=0)
    assert [next(rows), next(rows), next(rows)] == [{"kind": "start"}, None, None]
    with open(path, "a", encoding="utf-8") as file:
        file.write('ain", "step": 0}\nnot JSON\n{"kind": "end"}\n')
    assert [next(rows), next(rows), next(rows)] == [{"kind": "train", "step": 0}, {"kind": "end"}, None]


def test_watch_follows_a_run_to_its_end(tmp_path: Path) -> None:
    train, val = tiny_data(tmp_path / "data")
    flags = [*TINY, "-i", train, "-j", val, *"-o log -x 300 -v 100 -n 300 --threads 1 --progress none".split()]
    child = subprocess.Popen([sys.executable, "-m", "llmc", "train", *flags], cwd=tmp_path)
    metrics = tmp_path / "log" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (metrics.is_file() and b'"train"' in metrics.read_bytes()):
        assert child.poll() in (None, 0) and time.monotonic() < end
        time.sleep(0.01)
    watched = run("watch", "log", "--interval", "0.05", cwd=tmp_path)  # does not return before the run ends
    assert watched.returncode == 0, watched.stderr
    assert re.search(r"step 300/300: train loss .*, val loss \d\.\d{4}, .* tokens/s, in ", watched.stdout)
    assert watched.stdout.splitlines()[-1].endswith("after step 300 of 300")
    assert '"end"' in metrics.read_text().splitlines()[-1]
    assert child.wait(60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "code", "called"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_signals(tmp_path: Path, number: int, code: int, called: str) -> None:
    train, val = tiny_data(tmp_path / "data")
    options = [*TINY, "-i", train, "-j", val, "-o", "log", "--progress", "lines"]
    options[options.index("-x") + 1] = "100000000"
    command = [sys.executable, "-m", "llmc", "train", *options]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step"):
            break
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert re.search(rf"stopped by {called} after step \d+, saved; continue with:\n  llmc train --resume log\n", out)
    assert list((tmp_path / "log").glob("DONE_*"))


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The same one at once is an echo: launchers pass a Ctrl-C on that the terminal has sent to everybody."""
    code = (
        "import os, signal, time\nfrom llmc.system.signals import ECHO, StopSignals\n"
        "with StopSignals():\n    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', flush=True)\n    time.sleep(ECHO + 0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n"
    )
    if sys.platform == "win32":
        pytest.skip("os.kill ends the process there")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "first\n") and time.monotonic() - start < 25


# ---- errors ----


def test_usage_errors(tmp_path: Path) -> None:
    train, _ = tiny_data(tmp_path / "data")
    fails(call("train", "--no-such-thing", cwd=tmp_path), 2, "unrecognized arguments: --no-such-thing")
    fails(run("fly", cwd=tmp_path), 2, "invalid choice: 'fly'")
    fails(call("train", "-i", "nothing-*.bin", cwd=tmp_path), 2, r"no files match 'nothing-\*.bin'")
    fails(call("train", "-i", train, "-e", "d13x", cwd=tmp_path), 2, "d13x")
    fails(
        call("train", "-i", train, *TINY, "-t", "64", cwd=tmp_path),
        2,
        "seq_len is 64, but the model's max_seq_len is 16",
    )
    fails(call("train", "-i", train, *TINY, "-k", "step", cwd=tmp_path), 2, "invalid choice: 'step'")
    fails(call("train", "--resume", "nowhere", cwd=tmp_path), 2, "'nowhere' is not a run directory")
    fails(call("generate", "nowhere", cwd=tmp_path), 2, "'nowhere' is neither a run directory nor a checkpoint file")
    fails(call("watch", "nowhere", cwd=tmp_path), 2, "'nowhere' is no run directory")
    (tmp_path / "bad.toml").write_text("learning_rte = 1\n")
    fails(
        call("train", "--config", "bad.toml", cwd=tmp_path), 2, "bad.toml: unknown setting 'learning_rte'; did you mean"
    )
    (tmp_path / "bad.toml").write_text("x = = 1\n")
    fails(call("train", "--config", "bad.toml", cwd=tmp_path), 2, "bad.toml: not TOML")


def damaged(raw: bytes, kind: str) -> bytes:
    """Return the bytes of a file of 4,000 uint16 tokens with a damage of this kind."""
    header = np.frombuffer(raw[:1024], dtype="<i4").copy()

    def with_header(index: int, value: int) -> bytes:
        changed = header.copy()
        changed[index] = value
        return changed.tobytes() + raw[1024:]

    return {
        "magic": with_header(0, 7),
        "version": with_header(1, 9),
        "truncated": raw[:-2],
        "longer": raw + b"\0\0",
        "empty": with_header(2, 0)[:1024],
        "short": with_header(2, 10)[: 1024 + 20],
        "vocabulary": raw[:2000] + np.uint16(VOCAB + 500).tobytes() + raw[2002:],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("magic", "bad magic 7 in token file, expected 20240520"),
        ("version", "bad version 9 in token file, expected 1"),
        ("truncated", "truncated by 2 bytes: .*4000 tokens of 2 bytes, that is 9024 bytes, but the file has 9022"),
        ("longer", "too long by 2 bytes: .*4000 tokens of 2 bytes, that is 9024 bytes, but the file has 9026"),
        ("empty", "the header says 0 tokens, expected at least 1"),
        ("short", r"10 tokens are too few for one batch: .*1 \* 16 \+ 1 = 17 are needed"),
        ("vocabulary", "token 561 at position 488 is outside of the model's vocabulary of 61"),
    ],
)
def test_damaged_token_files(tmp_path: Path, kind: str, message: str) -> None:
    train, val = tiny_data(tmp_path / "data")
    Path(train).write_bytes(damaged(Path(train).read_bytes(), kind))
    result = call("train", "-i", train, "-j", val, *TINY, "-x", "-1", "--no-shuffle", cwd=tmp_path)
    fails(result, 1, rf"train\.bin: {message}")


def test_damaged_model_file(tmp_path: Path) -> None:
    train, val = tiny_data(tmp_path / "data")
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=16, vocab_size=VOCAB)
    path = tmp_path / "model.bin"
    llmc.GPT2(config).save(path)
    whole = path.read_bytes()
    for raw, message in ((whole[:-1], "bytes"), (whole + b"\0", "bytes"), (b"\0" * 4 + whole[4:], "magic"), (b"", "")):
        path.write_bytes(raw)
        result = call("train", "-i", train, "-j", val, "-e", "model.bin", "-t", "16", "-b", "2", cwd=tmp_path)
        fails(result, 1, f"model.bin.*{message}")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("train", "--debug", "-i", "nothing.bin", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_tokenizers_of_data_text_in_its_help(tmp_path: Path) -> None:
    shown = run("data", "text", "--help", cwd=tmp_path).stdout
    assert "bpe:N" in shown and "--debug" in shown


def test_debug_of_a_data_set_before_or_after_its_name(tmp_path: Path) -> None:
    for argv in (("--debug", "tinystories"), ("tinystories", "--debug")):
        result = run("data", *argv, "--source", "absent", "-tk", "bytes", cwd=tmp_path)
        assert result.returncode == 1 and "Traceback" in result.stderr and "'absent' does not exist" in result.stderr
    fails(run("data", "tinystories", "--source", "absent", "-tk", "bytes", cwd=tmp_path), 2, "'absent' does not exist")


def test_generate_with_another_tokenizer(tmp_path: Path) -> None:
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=16, vocab_size=2000)
    llmc.GPT2(config).save(tmp_path / "model.bin")
    # Few of the ids have a token.
    done = run("generate", "model.bin", "-n", "8", "--tokenizer", "bytes", "a", cwd=tmp_path)
    assert done.returncode == 0 and "\ufffd" in done.stdout, done.stderr


def test_lm_eval_without_its_package(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['lm_eval'] = None; sys.argv[1:] = ['--help'];"
        "runpy.run_module('llmc.lm_eval', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    fails(done, 1, "^python -m llmc.lm_eval: error: .*pip install lm-eval")


EXTRAS = (
    "backports.zstd gguf huggingface_hub lm_eval mpi4py pyarrow pynvml safetensors tensorboardX tokenizers torch wandb"
)

# Runs each command line of a JSON file in one process, as if no package were there that `pip install .` does not bring.
WITHOUT_EXTRAS = """
import contextlib, hashlib, io, json, pathlib, runpy, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
from llmc.datasets import download, tinyshakespeare
text = pathlib.Path("out/input.txt").read_bytes()
tinyshakespeare.REMOTE = download.Remote("http://127.0.0.1:9/x", "x", hashlib.sha256(text).hexdigest())
results = []
for module, *arguments in json.loads(pathlib.Path("commands.json").read_text()):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):
                code = print(code, file=err) or 1
    results.append([code or 0, err.getvalue()])
print(json.dumps(results))
"""


def test_every_program_without_the_extras(tmp_path: Path) -> None:
    """It works, or one line names the package that it lacks."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "input.txt").write_text("Speak, speak.\n\n" * 3000, encoding="utf-8")
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=64, vocab_size=257)
    llmc.GPT2(config).save(tmp_path / "model.bin")
    llmc.Tokenizer.byte_level().save(tmp_path / "gpt2_tokenizer.bin")
    (tmp_path / "hf").mkdir()
    for name in ("hf/model.safetensors", "a.parquet", "ckpt.pt"):
        (tmp_path / name).write_bytes(b"PK")
    for name in ("hf/config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    small = "train --data out/input.txt --tokenizer bytes --layers 1 --heads 2 --channels 16 -t 16 -b 2 -x 1 -v 0 -s 0 --no-plot"
    lacks = {
        "llmc data tinyshakespeare -o out --tokenizer bytes": None,
        "llmc.train_gpt2 --model model.bin --data out": None,
        "llmc.test_gpt2": "python -m llmc.reference",
        f"llmc {small} -o run": None,
        "llmc eval run --data out/tiny_shakespeare_val.bin --seq-len 16": None,
        "llmc generate run Speak -n 4": None,
        "llmc watch --once run": None,
        "llmc export run folder": None,
        "llmc export run model.gguf": "pip install gguf",
        "llmc import hf x.bin": "pip install safetensors",
        "llmc import ckpt.pt x.bin": "pip install torch",
        "llmc import gpt2 x.bin": "pip install huggingface_hub safetensors",
        f"llmc {small} --tensorboard": "pip install tensorboardX",
        f"llmc {small} --wandb project": "pip install wandb",
        f"llmc {small} --processes 2": "pip install mpi4py",
        "llmc data text a.parquet -o out2 --tokenizer bytes": "pip install pyarrow",
        "llmc data text out/input.txt --tokenizer tokenizer.json -o out2": "pip install tokenizers",
        "llmc.reference": "pip install torch",
        "llmc.lm_eval --tasks hellaswag": "pip install lm-eval",
    }
    (tmp_path / "commands.json").write_text(json.dumps([line.split() for line in lacks]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, EXTRAS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for (line, lack), (code, err) in zip(lacks.items(), json.loads(done.stdout)):
        if lack is None:
            assert code == 0, (line, err)
        else:
            assert code in (1, 2) and "Traceback" not in err, (line, code, err)
            assert re.search(rf"^\S.*error: .*{lack}.*\Z", err.strip(), re.MULTILINE), (line, err)


def test_a_run_that_is_refused_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was named stays."""
    monkeypatch.chdir(tmp_path)
    assert train_main(["-t", "100000000"]) == 2 and not list(tmp_path.glob("runs/*"))
    assert train_main(["-t", "100000000", "-o", "named"]) == 2 and (tmp_path / "named").is_dir()


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("a shell pipe of POSIX")
    config = llmc.GPT2Config(num_layers=1, num_heads=2, channels=16, max_seq_len=16, vocab_size=257)
    llmc.GPT2(config).save(tmp_path / "model.bin")
    for argv in ("train --help", "generate model.bin --tokenizer bytes --past-eot -n 1000000"):
        command = [sys.executable, "-m", "llmc", *argv.split()]
        child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout is not None and child.stderr is not None
        if argv.startswith("generate"):
            child.stdout.read(1)
        child.stdout.close()  # for a short text, before the program has written it
        assert child.stderr.read() == b""
        assert child.wait(60) in ((0, 141) if "--help" in argv else (141,))  # argparse passes over what it cannot write
        child.stderr.close()


def test_how_an_action_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C, bugs and exits of argparse; warnings are a line each, without the source's."""

    def raises(error: BaseException) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("checkpoint of step 4 is damaged", stacklevel=2)
        raise error

    before = warnings.showwarning
    for error, code, line in (
        (KeyboardInterrupt(), 130, "\nllmc x: interrupted\n"),
        (ValueError("wrong"), 2, "llmc x: error: wrong\n"),
        (OSError(28, "No space left on device", "f"), 1, "llmc x: error: f: No space left on device\n"),
        (MemoryError(), 1, "llmc x: error: MemoryError\n"),
    ):
        assert report_errors("llmc x", lambda error=error: raises(error)) == code
        assert capsys.readouterr().err == f"llmc x: warning: checkpoint of step 4 is damaged\n{line}"
    for error in (SystemExit(2), ZeroDivisionError()):
        with pytest.raises(type(error)):
            report_errors("llmc x", lambda error=error: raises(error))
    assert warnings.showwarning is before


# ---- settings ----


def test_llm_c_flags_and_long_names_are_the_same() -> None:
    short = parse(
        "-i a.bin b.bin -j c.bin -e d12 -o log -n 5 -nk 2 -nm 10 -y 1 -b 8 -t 128 -d 2048 -x 7 -k wsd -l 0.1 -u 3 -q 0.5".split()
    )
    names = (
        "--data a.bin b.bin --val-data c.bin --model d12 --output-dir log --checkpoint-every 5 --keep-checkpoints 2 "
        "--major-every 10 --resume --batch-size 8 --seq-len 128 --total-batch-size 2048 --max-steps 7 --schedule wsd "
        "--learning-rate 0.1 --warmup-steps 3 --final-lr-frac 0.5"
    )
    assert short == parse(names.split())
    short = parse(
        (
            "-c 0.2 -sl 3 -sg 4 -v 0 -m -1 -s 9 -g 77 -h 1 -a 1 -f 0 -w 0 -ge 2 -r 2 -z 1 -pn 1 -pr 0 -pg 4 -pi tcp -ps host -pf dir "
            "-lg 6 -e d6"
        ).split()
    )
    names = (
        "--weight-decay 0.2 --skip-loss-z 3 --skip-grad-z 4 --val-every 0 --val-steps -1 --sample-every 9 --sample-tokens 77 --hellaswag "
        "--overfit --no-tf32 --no-master-weights --gelu-fusion 2 --recompute 2 --zero-stage 1 --processes 1 --rank 0 --gpus-per-node 4 "
        "--dist-init tcp --dist-host host --dist-dir dir --gpu-info-every 6 --model d6"
    )
    assert short == parse(names.split())


def test_toml_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "d6"\nlearning_rate = 1e-3\nbatch_size = 2\n')
    config = parse(["--config", str(path), "-b", "16"])
    assert (config.model, config.learning_rate, config.batch_size) == ("d6", 1e-3, 16)


def test_toml_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(
        data=("ä.txt", 'quo"te\\'), learning_rate=1e-4, prompt="line\nbreak\t", resume=True, val_every=0
    )
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert TrainConfig(**load_toml(tmp_path / "c.toml")) == config


@pytest.mark.parametrize("own", [[], ["-o", "mine"]])
def test_a_rank_has_the_run_directory_of_rank_0(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.alone()
    monkeypatch.setattr(world, "share_value", lambda value: "of rank 0")

    class Trainer:
        def __init__(self, config: TrainConfig) -> None:
            assert config.output_dir == "of rank 0"

        def fit(self, pass_on_signal: bool) -> SimpleNamespace:
            return SimpleNamespace(stopped_by=0)

    monkeypatch.setattr("llmc.commands.train.open_world", lambda config: world)
    monkeypatch.setattr("llmc.training.trainer.Trainer", Trainer)
    assert train_main(own) == 0
