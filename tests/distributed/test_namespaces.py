"""The two hosts of namespaces.py are two: by name, by address, and by what they share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from namespaces import two_hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

SERVE = """
import socket
with socket.create_server((socket.gethostname(), 12345)) as server:
    print("listening", flush=True)
    with server.accept()[0] as client:
        print(client.getpeername()[0], client.recv(100).decode())
"""
SAY = "import socket, sys; socket.create_connection((sys.argv[1], 12345), timeout=5).sendall(socket.gethostname().encode())"


def test_two_hosts_speak_by_the_network_alone(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (a, b):
        server = a.start([sys.executable, "-c", SERVE], cwd=tmp_path)
        assert server.stdout and server.stdout.readline() == "listening\n"
        assert "refused" in b.run([sys.executable, "-c", SAY, "localhost"]).stderr  # that is hostb's own
        assert b.run([sys.executable, "-c", SAY, "hosta"]).returncode == 0
        assert server.communicate(timeout=10)[0] == "10.77.0.2 hostb\n"
        assert a.run(["touch", "/dev/shm/file"]).returncode == 0
        assert b.run(["ls", "/dev/shm"]).stdout == ""
        assert a.run(["pwd"], cwd=tmp_path).stdout == f"{tmp_path}\n"
        assert a.run([str(a.remote_shell), "-x", "hostb", "hostname;", "exit", "3"]).stdout == "hostb\n"


def test_the_cable_and_the_end(tmp_path: Path) -> None:
    knock = "import socket; socket.create_connection(('hosta', 1), timeout={})"
    with two_hosts(tmp_path) as (a, b):
        assert "refused" in b.run([sys.executable, "-c", knock.format(10)]).stderr  # so hosta answers
        a.cut()
        said = b.run([sys.executable, "-c", knock.format(0.3)]).stderr
        assert "timed out" in said or "No route" in said
        a.mend()
        assert "refused" in b.run([sys.executable, "-c", knock.format(10)]).stderr
        left = b.start(["sleep", "1000"])
    assert left.returncode == -9
    assert not Path(f"/proc/{a.pid}").exists()
