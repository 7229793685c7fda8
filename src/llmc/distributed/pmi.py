"""MPI between processes that no mpiexec has started: ranks that met by TCP or by a file, on hosts where they were started by hand.

An mpiexec does two things: it starts processes, and it answers their PMI, the protocol by which MPI's processes learn who they are and
where the others listen: everybody puts values, comes to a barrier, and then gets what the others have put. Here each process answers its
own PMI, over a pair of sockets, and the barrier is World.gather(). So nothing more listens on the network than the World and MPI itself.

It serves MPICH (run with PyPI's mpich 5.0.2), whose PMI-1 client takes the number of a file descriptor from the environment. Intel
MPI and other descendants of MPICH were not tried and are refused, and so is Open MPI, which speaks PMIx.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

from llmc.distributed.rendezvous import node_id

# What a launcher of MPI leaves in the environment of its processes.
LAUNCHED = "PMI_FD", "PMI_PORT", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"


class World(Protocol):
    """What is asked of a World here: llmc.distributed.world."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""

    def before_close(self, action: Callable[[], None]) -> None:
        """Have the world's end begin with a call of action."""


def initialize(world: World) -> None:
    """Initialise MPI with the world's ranks, unless a launcher or somebody else has done so. All ranks call it.

    Raises:
        ValueError: if this MPI cannot be initialised so.
    """
    if any(name in os.environ for name in LAUNCHED):
        return
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    if MPI.Is_initialized():
        return
    library = MPI.Get_library_version().partition("\n")[0]
    if not library.startswith("MPICH"):
        raise ValueError(
            f"the MPI here is {library[:60]}, and only MPICH's processes can meet without its launcher (pip install mpich): start them "
            f"by mpiexec -n {world.size} llmc-train ..."
        )
    met = world.gather([node_id(), secrets.token_hex(8)])
    nodes, job = [node for node, _ in met], met[0][1]  # MPICH names its shared memory after the job
    mapping = ",".join(f"({nodes.index(node)},1,1)" for node in nodes)  # by rank: its node, one node, one process there
    ours, theirs = socket.socketpair()
    environment = {"PMI_FD": str(theirs.detach()), "PMI_RANK": str(world.rank), "PMI_SIZE": str(world.size)}
    arguments = (ours, world, f"llmc_{job}", f"(vector,{mapping})")
    threading.Thread(target=_answer, args=arguments, name="llmc PMI", daemon=True).start()
    # By ctypes, which does not hold the GIL meanwhile, as mpi4py would: other threads must answer, and hear of lost ranks.
    functions = ctypes.CDLL(MPI.__file__)
    os.environ.update(environment)
    error = functions.MPI_Init_thread(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))
    for name in environment:  # they are not for this process's children
        del os.environ[name]
    if error:
        raise ValueError(f"MPI_Init_thread of {library} failed with code {error}")

    def finalize() -> None:
        functions.MPI_Finalize()
        # MPICH 5 says goodbye when the process ends, and reads the answer, which no thread of Python can give then.
        ours.sendall(b"cmd=finalize_ack rc=0\n")

    world.before_close(finalize)  # MPI_Finalize has a barrier


def _answer(link: socket.socket, world: World, job: str, mapping: str) -> None:
    """Answer this process's PMI."""
    put: dict[str, str] = {}
    known = {"PMI_process_mapping": mapping}
    with link, link.makefile("rw", encoding="ascii", newline="\n") as lines:
        for line in lines:
            words = dict(word.split("=", 1) for word in line.split() if "=" in word)
            command = words.get("cmd")
            if command == "init":
                answer = "response_to_init rc=0 pmi_version=1 pmi_subversion=1"
            elif command == "get_maxes":
                answer = "maxes rc=0 kvsname_max=256 keylen_max=64 vallen_max=1024"
            elif command == "get_appnum":
                answer = "appnum rc=0 appnum=0"
            elif command == "get_universe_size":
                answer = f"universe_size rc=0 size={world.size}"
            elif command == "get_my_kvsname":
                answer = f"my_kvsname rc=0 kvsname={job}"
            elif command == "put":
                put[words["key"]] = words["value"]
                answer = "put_result rc=0 msg=success"
            elif command == "get":
                value = known.get(words["key"])
                found = "rc=-1 msg=key_not_found value=unknown" if value is None else f"rc=0 msg=success value={value}"
                answer = f"get_result {found}"
            elif command == "barrier_in":
                for theirs in world.gather(put):
                    known.update(theirs)
                put.clear()
                answer = "barrier_out rc=0"
            elif command == "finalize":
                answer = "finalize_ack rc=0"
            else:  # starting more processes, publishing names, aborting: MPI gets an error, and ends this process
                return
            lines.write(f"cmd={answer}\n")
            lines.flush()
