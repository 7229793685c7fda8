"""How ranks find rank 0's server and show each other that they know the token: by MPI, by an address that all know, by a file.

The token is LLMC_TOKEN (tcp), or a fresh one that travels by MPI or in the file. It is never sent over a connection: each side
answers the other's nonce (HMAC-SHA256). What is sent later is neither secret nor signed: networks are trusted not to change it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from llmc.distributed.frames import Decoder, FrameError, Message, encode
from llmc.distributed.place import Place
from llmc.distributed.server import Member, proof
from llmc.system.fs import Fs, temporary_name, write_atomically

Address = tuple[str, int]
_ATTEMPT = 5.0  # seconds for one try to reach rank 0
_PAUSE = 0.2  # seconds between tries


class StartError(Exception):
    """Ranks that did not find together.

    Attributes:
        code: the exit code that it means.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def node_id() -> str:
    """Return what tells this host from others, even if their names are equal: a digest of its name and of what is its alone."""
    try:
        own = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        own = str(uuid.getnode())
    return hashlib.sha256(f"{socket.gethostname()} {own}".encode()).hexdigest()[:32]


def own_addresses() -> list[str]:
    """Return the addresses of this host by which others may reach it, IPv4 first; 127.0.0.1 if there are none."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [a.address for name, them in psutil.net_if_addrs().items() if name in up for a in them if _is_ip(a.family)]
    useful = [a for a in found if not (ip := ipaddress.ip_address(a)).is_loopback and not ip.is_link_local]
    return sorted(useful, key=lambda a: ":" in a) or ["127.0.0.1"]


def _is_ip(family: int) -> bool:
    return family in (socket.AF_INET, socket.AF_INET6)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at one address of this host. port 0 takes a free one."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        # On Windows SO_REUSEADDR would let another program listen at the same port; elsewhere it only ends the wait after a restart.
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if exclusive is None else exclusive, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def is_loopback(host: str) -> bool:
    """Whether only processes of this host can reach a name or address."""
    return ipaddress.ip_address(resolve(host)).is_loopback


def resolve(host: str) -> str:
    """Return the address of a name.

    Raises:
        ValueError: if it has none.
    """
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as e:
        raise ValueError(f"the host of rank 0, '{host}', has no address: {e}") from e


# ---- rank 0: where it listens ----


def listen_at(host: str, port: int, other_hosts: bool = True) -> list[socket.socket]:
    """Return sockets that listen at the address that all ranks know. other_hosts: whether ranks of those may come.

    Raises:
        ValueError: if this host cannot listen there, and why.
    """
    address = resolve(host)
    hosts = [address]
    if other_hosts and ipaddress.ip_address(address).is_loopback and not _names_loopback(host):
        hosts += (
            own_addresses()
        )  # a host whose own name is 127.0.1.1 to itself, as Debian does; the others know a real address
    sockets: list[socket.socket] = []
    try:
        for one in hosts:
            sockets.append(listen(one, port))
    except OSError as e:
        for sock in sockets:
            sock.close()
        own = ", ".join(["127.0.0.1", *own_addresses()])
        hint = f"this host has {own}; rank 0 must run on the host that dist_host names"
        if _in_use(e):
            hint = "another program, or another run, listens there: choose another port (--dist-port, or LLMC_PORT)"
        raise ValueError(f"rank 0 cannot listen at {host}:{port}: {e.strerror or e} ({hint})") from e
    return sockets


def _names_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_use(error: OSError) -> bool:
    import errno

    return error.errno in (errno.EADDRINUSE, errno.EACCES) or getattr(error, "winerror", 0) in (10048, 10013)


def listen_anywhere(host: str = "") -> list[socket.socket]:
    """Return sockets that listen at free ports of the addresses by which others may reach this host, or of one that is given.

    Raises:
        ValueError: if there is none.
    """
    sockets, error = [], ""
    for address in [host] if host else own_addresses():
        try:
            sockets.append(listen(address, 0))
        except OSError as e:
            error = f"{address}: {e.strerror or e}"
    if not sockets:
        raise ValueError(f"rank 0 cannot listen at any address of its host ({error})")
    return sockets


def addresses_of(sockets: list[socket.socket]) -> list[Address]:
    """Return where sockets listen."""
    return [sock.getsockname()[:2] for sock in sockets]


# ---- the other ranks: reaching it ----


def join(
    candidates: Callable[[], tuple[list[Address], bytes] | str],
    member: Member,
    timeout: float,
    *,
    persist: bool,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> tuple[socket.socket, Decoder]:
    """Connect to rank 0's server, trying until it is there.

    Args:
        candidates: where it may be and the token, or in words why that is not known yet.
        member: who comes.
        timeout: seconds to try.
        persist: whether to go on if a server is there that does not let this rank in: it may be another run's.
        say: prints a line.

    Returns:
        The connection, and a decoder with what has come since.

    Raises:
        StartError: if it does not work, and why.
    """
    begin = time.monotonic()
    notice, why = begin + 5, ""
    while True:
        now = time.monotonic()
        left = begin + timeout - now
        if left <= 0:
            raise StartError(f"rank 0 could not be reached within {timeout:g} s: {why}", 75)
        if now >= notice:
            notice = now + 10
            say(f"rank {member.rank} waits for rank 0 ({why}), {left:.0f} s left")
        where = candidates()
        if isinstance(where, str):
            why = where
        else:
            addresses, token = where
            for address in addresses:
                try:
                    return _knock(address, token, member, min(_ATTEMPT, left))
                except StartError as e:
                    if not persist:
                        raise
                    why = str(e)
                except OSError as e:
                    why = f"{_shown(address)}: {e.strerror or e}"
                except (FrameError, KeyError, TypeError) as e:
                    why = f"{_shown(address)}: what listens there is not llmc ({e})"
        time.sleep(min(_PAUSE, max(0.0, left)))


def _shown(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _knock(address: Address, token: bytes, member: Member, seconds: float) -> tuple[socket.socket, Decoder]:
    """Connect to one address and show that this rank knows the token, and ask the same of the server."""
    sock = socket.create_connection(address, timeout=seconds)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        decoder = Decoder()
        challenge = _next(sock, decoder)
        if challenge is None:
            raise OSError(None, "it closed the connection")
        nonce = secrets.token_hex(32)
        said = {**vars(member), "nonce": nonce}
        sock.sendall(encode({**said, "mac": proof(token, "client", str(challenge["llmc"]), said)}))
        answer = _next(sock, decoder)
        there = f"rank 0 at {_shown(address)}"
        if answer is None:
            raise StartError(f"{there} did not let this rank in: LLMC_TOKEN is not the same on both", 2)
        refused = str(answer["refused"])
        expected = {**vars(member), "nonce": challenge["llmc"], "refused": refused}
        if not hmac.compare_digest(proof(token, "server", nonce, expected), str(answer["mac"])):
            raise StartError(f"{there} does not know LLMC_TOKEN", 2)
        if refused:
            raise StartError(f"{there} belongs to another run than this rank's, which is '{member.job}'", 2)
        sock.settimeout(None)
        return sock, decoder
    except BaseException:
        sock.close()
        raise


def _next(sock: socket.socket, decoder: Decoder) -> Message | None:
    """Return the next message, or None if the connection ends before it."""
    while (message := decoder.next()) is None:
        try:
            data = sock.recv(4096)
        except ConnectionError:
            data = b""
        if not data:
            return None
        decoder.feed(data)
    return message


# ---- carriers of address and token ----


class SharedFile:
    """The file in which rank 0 tells where it listens, in a folder that all hosts share. Only its owner can read it.

    Args:
        directory: the folder.
        job, size: of this start; a file of another is not taken.

    Raises:
        ValueError: if there is no such folder.
    """

    def __init__(self, directory: str, job: str, size: int) -> None:
        if not Path(directory).is_dir():
            raise ValueError(f"dist_dir is '{directory}', which is no folder on {socket.gethostname()}")
        self.path = Path(directory) / f"llmc-{re.sub(r'[^A-Za-z0-9._-]', '_', job)}.json"
        self._job, self._size = job, size

    def write(self, addresses: list[Address], token: bytes) -> None:
        """Write the file, in place of one that an earlier run left."""
        told = {"addresses": addresses, "token": token.hex(), "job": self._job, "size": self._size, "time": time.time()}
        temporary_name(self.path).unlink(missing_ok=True)
        write_atomically(self.path, [json.dumps(told).encode()], fs=_PrivateFs())
        self._token = token

    def read(self) -> tuple[list[Address], bytes] | str:
        """Return rank 0's addresses and token, or in words why there are none yet. It may be of a run that has ended."""
        try:
            told: dict[str, Any] = json.loads(self.path.read_bytes())
            if told["job"] != self._job or told["size"] != self._size:
                return f"{self.path} is of another run"
            return [(str(host), int(port)) for host, port in told["addresses"]], bytes.fromhex(told["token"])
        except FileNotFoundError:
            return f"{self.path} is not there yet"
        except OSError as e:
            return f"{self.path}: {e.strerror or e}"
        except (ValueError, KeyError, TypeError):
            return f"{self.path} is damaged"

    def remove(self) -> None:
        """Remove the file, unless another run has replaced it."""
        told = self.read()
        if not isinstance(told, str) and told[1] == self._token:
            self.path.unlink(missing_ok=True)


class _PrivateFs(Fs):
    def open_new(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)


def _load_mpi(place: Place) -> Any:
    """Return mpi4py's module, without starting MPI yet if it has not been."""
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except RuntimeError as e:
        raise ImportError(
            f"mpi4py finds no MPI: put that of {place.launcher} on its path, or pip install mpich ({e})"
        ) from e
    return MPI


def meet_by_mpi(place: Place, node: str) -> tuple[int, list[socket.socket], list[Address], bytes]:
    """Meet by MPI's COMM_WORLD.

    Args:
        place: what the launcher says.
        node: node_id().

    Returns:
        This process's rank; the sockets on which rank 0 listens, none elsewhere; where they listen; a fresh token.

    Raises:
        ValueError: if MPI sees another number of processes than the launcher, or rank 0 cannot listen.
        ImportError: if mpi4py finds no MPI.
    """
    MPI = _load_mpi(place)
    library = " ".join(MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip("\0").split())
    advice = f"start them with the mpiexec of that MPI, or install mpi4py for the MPI of {place.launcher}"
    if place.launcher.startswith("Open MPI") and library.startswith(("MPICH", "Intel")):  # whose start would abort
        raise ValueError(f"{place.launcher} started {place.size} processes, but mpi4py uses {library}: {advice}")
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    world = MPI.COMM_WORLD
    if world.size != place.size:
        raise ValueError(
            f"{place.launcher} started {place.size} processes, but mpi4py uses {library}, which sees {world.size}: {advice}"
        )
    nodes = bytearray(32 * place.size)
    world.Allgather([node.encode(), MPI.BYTE], [nodes, MPI.BYTE])
    one_host = nodes == node.encode() * place.size
    told = bytearray(16384)  # a buffer, since mpi4py's methods for objects unpickle
    sockets: list[socket.socket] = []
    if world.rank == 0:
        try:
            sockets = listen_anywhere(place.host or ("127.0.0.1" if one_host else ""))
            text = json.dumps({"addresses": addresses_of(sockets), "token": secrets.token_hex(32)})
        except ValueError as e:
            text = json.dumps({"error": str(e)})
        told[: len(text)] = text.encode()
    world.Bcast([told, MPI.BYTE], 0)
    message = json.loads(told.rstrip(b"\0"))
    if "error" in message:
        raise ValueError(message["error"])
    addresses = [(str(host), int(port)) for host, port in message["addresses"]]
    return world.rank, sockets, addresses, bytes.fromhex(message["token"])
