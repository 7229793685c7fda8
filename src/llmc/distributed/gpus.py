"""Which GPU a process computes on, so that two ranks on one are refused by name: NCCL would fail later, with less to say."""

from __future__ import annotations

import ctypes
import os
import sys


def gpu_id(index: int) -> str:
    """Return what tells one GPU (or a part of one, MIG) of a host from the others.

    Args:
        index: its number, as CUDA counts in this process.

    Returns:
        "uuid ..." by CUDA's driver; without one (the emulated device) "GPU n", where CUDA_VISIBLE_DEVICES is looked through.
    """
    uuid = _uuid(index)
    if uuid is not None:
        return f"uuid {uuid}"
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    return f"GPU {visible[index] if index < len(visible) else index}"


def _uuid(index: int) -> str | None:
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        name = (ctypes.c_ubyte * 16)()
        device = ctypes.c_int()
        ask = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid  # v2 tells the parts of a GPU apart
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index) or ask(name, device):
            return None
    except (OSError, AttributeError):
        return None
    return bytes(name).hex()
