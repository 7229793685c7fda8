"""Two "hosts" on one machine, joined by a cable: Linux namespaces, made without privileges.

    import pytest
    from namespaces import two_hosts, why_not

    @pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
    def test_something(tmp_path: Path) -> None:
        with two_hosts(tmp_path) as (a, b):
            first = a.start([sys.executable, "-m", "llmc", "train", "-pn", "2", "-pr", "0", "-pi", "tcp", "-ps", a.address])
            second = b.start([sys.executable, "-m", "llmc", "train", "-pn", "2", "-pr", "1", "-pi", "tcp", "-ps", a.address])
            print(first.communicate(timeout=60), second.communicate(timeout=60))

Each host has a name (`hosta`, `hostb`, which both resolve), an address, its own loopback interface and ports, and its own /dev/shm, so
that nothing but the network leads from one to the other. They share the files, the processes' numbers and the cores of the machine; the
outside world cannot be reached from them. `a.cut()` pulls the cable out, `a.mend()` puts it back.

mpiexec starts processes on both through `a.remote_shell`, a program that takes ssh's arguments. With MPICH:

    a.run(["mpiexec", "-launcher", "ssh", "-launcher-exec", str(a.remote_shell), "-hosts", "hosta,hostb", "-n", "2", ...])

with Open MPI: `--allow-run-as-root --mca plm_rsh_agent PATH --host hosta,hostb --map-by node`. What still runs on a host at the end is
killed.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Run in the new namespaces: they are ready when the line is printed, and last until standard input is closed.
HOLD = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
exec cat
"""
REMOTE_SHELL = """#!/bin/sh
# ssh's arguments: options, host, command
while case $1 in -*) true ;; *) false ;; esac; do shift; done
host=$1
shift
case $host in {cases} *) echo "$host: unknown host" >&2; exit 255 ;; esac
exec nsenter --target $pid --net --uts --mount -- sh -c "$*"
"""


@dataclass
class Host:
    """One of two hosts."""

    name: str
    address: str
    pid: int  # of a process in its namespaces
    remote_shell: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, argv: Sequence[str], cwd: Path | None = None) -> list[str]:
        """Return the command that runs argv on this host, in the folder cwd. It becomes argv: signals reach it, its pid is the same."""
        enter = ["nsenter", "--target", str(self.pid), "--user", "--preserve-credentials", "--net", "--uts", "--mount"]
        # Another mount namespace begins in the root folder.
        return [*enter, "--", "sh", "-c", 'cd "$0" && exec "$@"', str(cwd or Path.cwd()), *argv]

    def start(
        self, argv: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start argv on this host, with pipes for its output unless options of Popen say otherwise."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        process = subprocess.Popen(self.command(argv, cwd), env=env, **options)
        self.started.append(process)
        return process

    def run(
        self, argv: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run argv on this host to its end, with its output captured."""
        return subprocess.run(self.command(argv, cwd), env=env, capture_output=True, text=True, **options)

    def cut(self) -> None:
        """Take the cable out: packets are lost without a word, in both directions."""
        self._cable("down")

    def mend(self) -> None:
        """Put the cable back."""
        self._cable("up")

    def _cable(self, state: str) -> None:
        self.run(["ip", "link", "set", "cable", state], check=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts; folder: for the few files that this takes."""
    names, addresses = ("hosta", "hostb"), ("10.77.0.1", "10.77.0.2")
    table, remote_shell = folder / "hosts", folder / "remote_shell"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(addresses, names)))
    with ExitStack() as stack:
        first = stack.enter_context(_namespaces(["unshare", "--user", "--map-root-user"], names[0], table))
        within_its_user = ["nsenter", "--target", str(first), "--user", "--preserve-credentials", "unshare"]
        second = stack.enter_context(_namespaces(within_its_user, names[1], table))
        hosts = Host(names[0], addresses[0], first, remote_shell), Host(names[1], addresses[1], second, remote_shell)
        cases = " ".join(f"{h.name}|{h.address}) pid={h.pid} ;;" for h in hosts)
        remote_shell.write_text(REMOTE_SHELL.format(cases=cases))
        remote_shell.chmod(0o755)
        # The two ends are a device each in namespaces of their own, so they may have one name.
        hosts[0].run(
            ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(second)], check=True
        )
        for host in hosts:
            host.run(["ip", "address", "add", f"{host.address}/24", "dev", "cable"], check=True)
            host.mend()
        stack.callback(_end_all, hosts)
        yield hosts


@contextmanager
def _namespaces(unshare: Sequence[str], name: str, table: Path) -> Iterator[int]:
    """Hold new namespaces; yield the number of the process that is in them."""
    command = [*unshare, "--net", "--uts", "--mount", "sh", "-c", HOLD, "sh", name, str(table)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout and process.stderr
        if process.stdout.readline() != "ready\n":
            raise OSError(process.stderr.read().strip())
        yield process.pid


def _end_all(hosts: Sequence[Host]) -> None:
    """Kill what was started on the hosts, and then what else runs there."""
    started = [process for host in hosts for process in host.started]
    for process in started:
        process.kill()  # by its number, because it may not have come to the namespaces yet
    places = {os.stat(f"/proc/{host.pid}/ns/net").st_ino for host in hosts}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.stat(entry / "ns" / "net").st_ino in places:
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended meanwhile, or is another user's
    for process in started:
        process.communicate()


@functools.cache
def why_not() -> str | None:
    """Return why two hosts cannot be made on this machine, or None if they can."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    import tempfile

    try:
        with tempfile.TemporaryDirectory() as folder, two_hosts(Path(folder)):
            return None
    except (OSError, subprocess.CalledProcessError) as e:
        text = e.stderr if isinstance(e, subprocess.CalledProcessError) else str(e)
        return f"two hosts cannot be made here: {text.strip()}"
