"""Evaluates a model on the six tasks of Hugging Face's first LLM leaderboard, as llm.c's dev/eval/run_eval.sh, and prints the table.

    pip install lm-eval                                                # the lm-evaluation-harness, once
    python dev/eval/run_eval.py log_gpt2_124M results/124M --device cuda
    python dev/eval/run_eval.py gpt2_124M.bin results/quick --tasks hellaswag:10 --limit 200

MODEL is a model file, a run directory, a Hugging Face folder or name. It is evaluated as it is: nothing need be exported. (`llmc export`
does what llm.c's dev/eval/export_hf.py does.) RESULTS is the folder for the results. A task that has results there is not run again, so
the command can be repeated after an interruption; all six take hours.

Before the harness, `llmc eval` runs HellaSwag and MMLU by llm.c's eval files, if they are there: `llmc data hellaswag`, `llmc data mmlu`.
That needs no harness, so without it these two are all. dev/eval/summarize_eval.py prints the table again, and several models side by side.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from summarize_eval import summarize

ROOT = Path(__file__).parents[2]
# The tasks in the names of the harness, and how many examples a prompt has.
LEADERBOARD = ["arc_challenge:25", "gsm8k:5", "hellaswag:10", "mmlu:5", "truthfulqa_mc2:0", "winogrande:5"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL")
    add("results", type=Path, metavar="RESULTS")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    add("--dtype", help="f32 or bf16 [the model's]")
    add("--batch-size", type=int, default=4, help="rows at a time [4]")
    add("--limit", type=int, help="only the first N examples of each task; such scores are for a try")
    add(
        "--tasks",
        nargs="*",
        default=LEADERBOARD,
        metavar="TASK:SHOTS",
        help=f"of the harness [{' '.join(LEADERBOARD)}]",
    )
    add(
        "--hellaswag",
        type=Path,
        default=ROOT / "dev/data/hellaswag/hellaswag_val.bin",
        metavar="FILE",
        help="[dev/data/hellaswag/...]",
    )
    add("--mmlu", type=Path, default=ROOT / "dev/data/mmlu/mmlu_test.bin", metavar="FILE", help="[dev/data/mmlu/...]")
    args = parser.parse_args()
    if wrong := [task for task in args.tasks if not task.partition(":")[2].isdigit()]:
        parser.error(f"--tasks: {wrong[0]} is not a task with its number of examples, as hellaswag:10")
    return args


def commands(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """Return what there is to run: where its results go, and the command. What has results already is left out."""
    python = [sys.executable, "-m"]
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    common = ["--device", args.device, "--batch_size", str(args.batch_size), *limit]
    todo = []
    files = [
        word
        for name in ("hellaswag", "mmlu")
        if getattr(args, name).is_file()
        for word in (f"--{name}", str(getattr(args, name)))
    ]
    ours = args.results / "llmc_eval.json"
    if files and not ours.is_file():
        dtype = ["--dtype", args.dtype] if args.dtype else []
        ours_common = [word.replace("batch_size", "batch-size") for word in common]
        todo.append((ours, [*python, "llmc", "eval", args.model, *files, *dtype, *ours_common, "--json", str(ours)]))
    if importlib.util.find_spec("lm_eval") is None:
        return todo
    model = f"pretrained={args.model}" + (f",dtype={args.dtype}" if args.dtype else "")
    for task in args.tasks:
        name, _, shots = task.partition(":")
        path = args.results / f"{name}_{shots}shot.json"  # to whose name the harness adds the date
        if not list(args.results.glob(f"{path.stem}*.json")):
            todo.append((path, [*python, "llmc.lm_eval", "--model", "llmc", "--model_args", model, "--tasks", name,
                                "--num_fewshot", shots, *common, "--output_path", str(path)]))  # fmt: skip
    return todo


def run(todo: Sequence[tuple[Path, list[str]]]) -> None:
    """Run the commands, which print how far they are.

    Raises:
        RuntimeError: if one fails, or writes no results.
    """
    for path, command in todo:
        print(f"==== {path.stem}", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code != 0 or not list(path.parent.glob(f"{path.stem}*.json")):
            raise RuntimeError(f"{path.stem} has failed ({code}); the others' results are kept")


def main() -> int:
    """Run the program and return its exit code."""
    args = parse_arguments()
    args.results.mkdir(parents=True, exist_ok=True)
    try:
        run(commands(args))
        if importlib.util.find_spec("lm_eval") is None and args.tasks:
            print(
                "Without the lm-evaluation-harness (pip install lm-eval), only what `llmc eval` knows:", file=sys.stderr
            )
        summarize([args.results])
    except (OSError, ValueError, RuntimeError) as e:
        print(f"run_eval.py: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
