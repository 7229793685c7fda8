"""Warnings about a busy or throttled machine, by made-up counts; what the system says is read for real."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import tiny_run

from llmc.system import cpu_time
from llmc.system.cpu_time import CpuTimes, usable_count
from llmc.training.slowness import Slowness


class Machine:
    """A machine of made-up load, on which a run makes steps."""

    def __init__(self, threads: int | None = 2, cpus: int = 2) -> None:
        self.wall = self.own = self.everyone = 0.0
        self.periods = self.throttled = 0
        self.says_everyone = True
        self.slowness = Slowness(threads, cpus, self.read)

    def read(self) -> CpuTimes:
        everyone = self.everyone if self.says_everyone else None
        return CpuTimes(self.wall, self.own, everyone, self.periods, self.throttled)

    def steps(
        self,
        count: int,
        left: int,
        seconds: float = 0.5,
        own: float = 1.9,
        others: float = 0.05,
        throttled: float = 0.0,
    ) -> list[str]:
        """Make steps; return what was said. own, others: CPUs at work; left: steps after these; throttled: of ten periods a second."""
        said = []
        for i in range(count):
            self.wall += seconds
            self.own += own * seconds
            self.everyone += (own + others) * seconds
            self.periods += round(1000 * seconds)
            self.throttled += round(1000 * seconds * throttled)
            said.append(self.slowness.update(seconds, left + count - 1 - i))
        return [line for line in said if line]


def test_a_quiet_machine() -> None:
    assert Machine().steps(1000, 1000) == []
    assert Machine().steps(1000, 1000, own=0.7) == []  # its threads sleep while they wait for each other
    assert Machine(threads=2, cpus=8).steps(1000, 1000, others=5.5) == []  # on CPUs that it does not need
    assert Machine(threads=None).steps(1000, 1000, own=1, others=1) == []  # it computes on a GPU
    blind = Machine()
    blind.says_everyone = False
    assert blind.steps(1000, 1000, own=0.4, others=1.6) == []


def test_a_shared_machine() -> None:
    machine = Machine()
    # The first step warms up, so these are less than two windows.
    assert machine.steps(40, 3040, own=0.5, others=1.5) == []
    assert machine.steps(1, 3039, own=0.5, others=1.5) == [
        "about 25 min left: the CPU is shared, other programs take 1.5 of its 2 cores"
    ]
    assert machine.steps(500, 2500, own=0.5, others=1.5) == []  # it was said
    (again,) = machine.steps(60, 2440, seconds=1.2, own=0.2, others=1.8)
    assert "1.8 of its 2 cores" in again
    assert machine.steps(500, 2000, seconds=1.2, own=0.2, others=1.8) == []
    (said,) = Machine(threads=2, cpus=8).steps(100, 10_000, others=6.5)
    assert said.startswith("about 84 min left") and "6.5 of its 8 cores" in said


def test_a_moment_is_not_a_load() -> None:
    machine = Machine()
    for _ in range(10):
        assert machine.steps(20, 1000, own=0.5, others=1.5) == [] and machine.steps(40, 1000) == []


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 20_000), (0.5, 40), (15.0, 2)])
def test_nothing_is_said_of_the_last_seconds(seconds: float, steps: int) -> None:
    """Runs of 20 seconds, and the end of longer ones."""
    assert Machine().steps(steps, 0, seconds=seconds, own=0.5, others=1.5) == []
    machine = Machine()
    machine.steps(4 * steps, 0, seconds=seconds)
    assert machine.steps(steps, 0, seconds=seconds, own=0.5, others=1.5) == []


def test_throttled() -> None:
    machine = Machine()
    assert machine.steps(61, 1000, throttled=0.4) == []
    (said,) = machine.steps(61, 1000, throttled=0.6)
    assert "limit of CPU time" in said
    machine = Machine()
    assert machine.steps(101, 4000) == [] and machine.steps(100, 4000, seconds=0.7) == []
    (said,) = machine.steps(100, 4000, seconds=0.9)
    assert "a step takes 1.8 times as long as before" in said
    # Few steps that take long are a window too.
    machine = Machine(threads=None)
    assert machine.steps(10, 100, seconds=15) == []
    (said,) = machine.steps(10, 100, seconds=30)
    assert said.startswith("about 54 min left: a step takes 2.0 times")


def test_what_the_system_says() -> None:
    before = CpuTimes.read()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    now = CpuTimes.read()
    own = now.own - before.own
    assert 0.1 <= own <= 1.0 and now.wall - before.wall >= 0.05 and usable_count() >= 1
    if before.everyone is not None and now.everyone is not None and now.everyone > 0:
        assert now.everyone - before.everyone >= own - 0.1  # the system counts in hundredths of a second or coarser
    assert 0 <= now.throttled <= now.periods or now.periods == 0


@pytest.mark.parametrize(
    ("groups", "where"),
    [
        ("0::/user/run.scope\n", "user/run.scope"),
        ("0::/user/run.scope\n", "user"),
        ("0::/\n", ""),
        ("3:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n", "cpu/docker/x"),
        ("2:cpuacct,cpu:/docker/x\n", "cpu"),  # that of the container, which does not see its own name
    ],
)
def test_control_groups(tmp_path: Path, groups: str, where: str) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    assert cpu_time._group(tmp_path) == (0, 0)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    assert cpu_time._group(tmp_path) == (0, 0)
    folder = tmp_path / "sys" / "fs" / "cgroup" / where
    folder.mkdir(parents=True)
    (folder / "cpu.stat").write_text("usage_usec 9\nnr_periods 70\nnr_throttled 30\nthrottled_usec 5\n")
    assert cpu_time._group(tmp_path) == (70, 30)


def test_a_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    update: Callable[..., str] = lambda self, seconds, left: f"{left} left" if seconds > 0 else ""  # noqa: E731
    monkeypatch.setattr(Slowness, "update", update)
    tiny_run(tmp_path, progress="lines", max_steps=2, output_dir=None)
    assert "\n1 left\n" in (out := capsys.readouterr().out) and "\n0 left\n" in out
