"""Prints one table of evaluations, with their mean, as llm.c's dev/eval/summarize_eval.py: a column for each folder of results.

    python dev/eval/summarize_eval.py results/124M results/350M

A folder has what dev/eval/run_eval.py writes, or any results of the lm-evaluation-harness and of `llmc eval --json`, in folders of its own
if need be. Of several files with the same task and number of examples in the prompt, the last one counts.

Scores are percentages: acc_norm if the task has it, else acc (of truthfulqa_mc: mc2), else exact_match. A group counts as one task, and so
do the 57 tasks of MMLU in older harnesses. What has none of these, as a perplexity, is left out and named. The means are over the tasks
that all folders have: those of the harness, and those of `llmc eval`, which has its own prompts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HARNESS, OURS = "lm-evaluation-harness", "llmc eval"
METRICS = ("mc2", "acc_norm", "acc", "exact_match")
OLD_MMLU = "hendrycksTest-"


@dataclass(frozen=True, order=True)
class Task:
    """What was evaluated. shots: examples in the prompt, if the file says so."""

    source: str
    name: str
    shots: int | None
    metric: str


def scores_of(path: Path) -> tuple[dict[Task, float], list[str]]:
    """Read a file of results.

    Returns:
        The scores, as fractions, and the names of tasks that have none; nothing of a file that has no results.
    """
    data: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        return {}, []
    if "checkpoint" in data:
        ours = {name: data[name] for name in ("hellaswag", "mmlu") if name in data}
        return {Task(OURS, name, 0, "acc_norm"): float(result["acc_norm"]) for name, result in ours.items()}, []
    results = data.get("results")
    if not isinstance(results, dict):
        return {}, []
    named = re.search(r"_(\d+)shot", path.name)
    parts = {part for group, members in data.get("group_subtasks", {}).items() if group in results for part in members}
    scores: dict[Task, float] = {}
    mmlu, left_out = [], []
    for name, values in results.items():
        if name in parts:
            continue
        # As "acc,none": the second word is how answers were taken out of what was generated. Of several the first is the strict one.
        by_metric: dict[str, float] = {}
        for key, value in values.items():
            by_metric.setdefault(key.split(",")[0], value)
        if name.startswith(OLD_MMLU):
            mmlu.append(float(by_metric["acc"]))
            continue
        metric = next((m for m in METRICS if m in by_metric), None)
        if metric is None:
            left_out.append(name)
            continue
        shots = data.get("n-shot", {}).get(name, int(named[1]) if named else None)
        scores[Task(HARNESS, name, shots, metric)] = float(by_metric[metric])
    if mmlu:
        scores[Task(HARNESS, "mmlu", int(named[1]) if named else None, "acc")] = statistics.fmean(mmlu)
    return scores, left_out


def scores_in(folder: Path) -> dict[Task, float]:
    """Read all results in a folder, the oldest first. What is left out is named on the standard error.

    Raises:
        ValueError: if a file is not JSON, or if there are no results.
        FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    scores: dict[Task, float] = {}
    for path in sorted(folder.rglob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p)):
        try:
            found, left_out = scores_of(path)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is not a file of results: {type(e).__name__}: {e}") from e
        scores.update(found)
        if left_out:
            print(f"left out of {path}, because they have no accuracy: {', '.join(left_out)}", file=sys.stderr)
    if not scores:
        raise ValueError(f"there are no results in {folder}")
    return scores


def table(columns: dict[str, dict[Task, float]]) -> list[list[str]]:
    """Return the lines of the table. columns: the scores of each folder."""
    lines = [["task", "shots", "metric", *columns]]
    for source in (HARNESS, OURS):
        tasks = sorted(
            {t for scores in columns.values() for t in scores if t.source == source},
            key=lambda t: (t.name, t.shots or 0),
        )
        if not tasks:
            continue
        for t in tasks:
            cells = [f"{100 * scores[t]:.2f}" if t in scores else "-" for scores in columns.values()]
            lines.append([t.name, "" if t.shots is None else str(t.shots), t.metric, *cells])
        common = [t for t in tasks if all(t in scores for scores in columns.values())]
        means = [
            f"{100 * statistics.fmean(scores[t] for t in common):.2f}" if common else "-" for scores in columns.values()
        ]
        lines.append([f"mean of {len(common)}, {source}", "", "", *means])
    return lines


def summarize(folders: Sequence[Path]) -> None:
    """Print the table of the results in some folders."""
    lines = table({str(folder): scores_in(folder) for folder in folders})
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    for i, line in enumerate(lines):
        if i == 0 or line[0].startswith("mean of"):
            print(rule)
        print("  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]))
        if i == 0 or line[0].startswith("mean of"):
            print(rule)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    try:
        summarize(parser.parse_args().folders)
    except (OSError, ValueError) as e:
        parser.exit(2, f"{parser.prog}: error: {e}\n")


if __name__ == "__main__":
    main()
