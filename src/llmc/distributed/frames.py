"""Messages between ranks: JSON with its length before it. Nothing is unpickled, and a length beyond the limit ends the connection."""

from __future__ import annotations

import json
import struct
from typing import Any

_HEADER = struct.Struct(">I")
MAX_BYTES = 1 << 29
MAX_BYTES_OF_A_STRANGER = 4096

Message = dict[str, Any]


class FrameError(ValueError):
    """Bytes that are no message."""


def encode(message: Message) -> bytes:
    """Return the bytes of a message.

    Raises:
        ValueError: if it is too long, or has values that JSON cannot say.
    """
    try:
        body = json.dumps(message).encode()
    except TypeError as e:
        raise ValueError(f"a value that JSON cannot say: {e}") from e
    if len(body) > MAX_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is too long, the limit is {MAX_BYTES}")
    return _HEADER.pack(len(body)) + body


class Decoder:
    """Makes messages of the bytes of a connection.

    Attributes:
        limit: the longest message that is taken.
    """

    def __init__(self, limit: int = MAX_BYTES_OF_A_STRANGER) -> None:
        self.limit = limit
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes in."""
        self._bytes += data

    def next(self) -> Message | None:
        """Return the next whole message, or None if it has not come yet.

        Raises:
            FrameError: if it is too long or no JSON object.
        """
        if len(self._bytes) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._bytes)
        if length > self.limit:
            raise FrameError(f"a message of {length} bytes, the limit is {self.limit}")
        end = _HEADER.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_HEADER.size : end])
        del self._bytes[:end]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as e:
            raise FrameError("no JSON") from e
        if not isinstance(message, dict):
            raise FrameError("no JSON object")
        return message
