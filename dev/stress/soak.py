"""Watches the memory of a long run with restarts, which must not grow.

    python dev/stress/soak.py --minutes 30

Trains a small model with checkpoints, validation and samples, stops it with SIGTERM every few minutes and resumes it. Prints the
resident memory of each stretch, early and late; the exit code is 1 if it grew by more than 2 %. POSIX only.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

FLAGS = (
    "--tokenizer bytes --layers 2 --heads 4 --channels 128 --max-seq-len 64 -t 64 -b 4 -x 100000000 -n 100 -nk 2 -v 200 -m 2 -s 500 -g 40 "
    "--progress lines --no-plot --threads 1 -y 1"
).split()


def stretch(folder: str, seconds: float) -> tuple[float, float]:
    """Run for some seconds, and return the median resident memory in MB of the second and of the last fifth of that time."""
    command = [sys.executable, "-m", "llmc", "train", *FLAGS, "-o", folder]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    process, samples = psutil.Process(child.pid), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.5)
        if child.poll() is not None:
            raise SystemExit(f"the run ended by itself with exit code {child.returncode}")
        samples.append(process.memory_info().rss / 1e6)
    child.send_signal(signal.SIGTERM)
    if child.wait(120) != 143:
        raise SystemExit(f"SIGTERM ended the run with exit code {child.returncode}, expected 143")
    fifth = max(1, len(samples) // 5)
    return statistics.median(samples[fifth : 2 * fifth]), statistics.median(samples[-fifth:])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--stretches", type=int, default=5)
    args = parser.parse_args()
    grew = False
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.stretches):
            early, late = stretch(folder, 60 * args.minutes / args.stretches)
            grew |= late > 1.02 * early
            print(
                f"stretch {i + 1}: {early:.1f} MB early, {late:.1f} MB late ({100 * (late / early - 1):+.2f} %)",
                flush=True,
            )
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
