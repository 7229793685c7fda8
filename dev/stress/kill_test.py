"""Kills a training run with SIGKILL again and again, half of the time while it saves, and resumes it each time. The weights at the
end must be, bit for bit, those of a run that was never killed.

    python dev/stress/kill_test.py --kills 200

Prints what happened; the exit code is 1 if a bit differs or a resume fails. POSIX only.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 1500
FLAGS = (
    f"--tokenizer bytes --layers 2 --heads 4 --channels 128 --max-seq-len 64 -t 64 -b 4 -x {STEPS} -n 25 -nk 2 -v 0 -s 0 "
    "--progress none --no-plot --threads 1 -y 1"
).split()


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llmc", "train", *FLAGS, "-o", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_once(folder: Path, rng: random.Random, while_saving: bool) -> tuple[bool, bool]:
    """Start the run and kill it; return whether it was killed before its end, and whether a save was under way."""
    child = start(folder)
    while child.poll() is None and (len(list(folder.glob("DONE_*"))) == 0 or not (folder / "metrics.jsonl").exists()):
        time.sleep(0.005)
    deadline = time.monotonic() + 0.6 + rng.random()
    saving = False
    while child.poll() is None:
        saving = any(folder.glob(".tmp-*"))
        if (
            while_saving and saving and time.monotonic() > deadline - 0.5
        ) or time.monotonic() > deadline + 2 * while_saving:
            break
        time.sleep(0 if while_saving else 0.002)
    child.kill()
    output, _ = child.communicate()
    if child.returncode == 0:
        return False, False
    if child.returncode != -9:
        raise SystemExit(f"the run ended with exit code {child.returncode}:\n{output.decode(errors='replace')}")
    return True, saving


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        count = during_saves = runs = 0
        expected: bytes | None = None
        last = f"{STEPS:08d}"
        while count < args.kills:
            runs += 1
            for path in killed.glob("*") if killed.exists() else ():
                if path.is_file():
                    path.unlink()
            while True:
                was_killed, saving = (
                    kill_once(killed, rng, while_saving=count % 2 == 1) if count < args.kills else (False, False)
                )
                count += was_killed
                during_saves += saving
                if not was_killed:
                    break
            final = start(killed)
            output, _ = final.communicate()
            if final.returncode != 0:
                raise SystemExit(f"resuming failed:\n{output.decode(errors='replace')}")
            if expected is None:
                if start(whole).wait() != 0:
                    raise SystemExit("the run that is not killed failed")
                expected = (whole / f"model_{last}.bin").read_bytes() + (whole / f"state_{last}_00000.bin").read_bytes()
            got = (killed / f"model_{last}.bin").read_bytes() + (killed / f"state_{last}_00000.bin").read_bytes()
            same = got == expected
            print(
                f"run {runs}: {count} kills so far, {during_saves} during saves; final weights and state identical: {same}",
                flush=True,
            )
            if not same:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
