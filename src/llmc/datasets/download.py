"""Downloads: into a cache, resumable, and checked by SHA-256 before anything reads them.

What has been received is kept in NAME.part, and the next attempt or run asks for the rest (HTTP Range). An error page that a server
sends instead of a file is recognised by its status, or at the latest by its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmc.system.cache import cache_directory
from llmc.system.fs import SYSTEM, named_errors, write_all, write_atomically
from llmc.system.network import reason
from llmc.values import decimal_bytes

_CHUNK = 1 << 16  # bytes written at a time; if the connection breaks, an unfinished chunk is lost
_ATTEMPTS = 4  # attempts in a row without a new byte, after which to give up
_TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
_PAUSE = 1.0  # seconds before another attempt, doubled each time


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: its address.
        name: its path within the cache.
        sha256: its checksum, in hexadecimal digits.
        size: its length in bytes, if that is known.
    """

    url: str
    name: str
    sha256: str
    size: int | None = None


def fetch(remote: Remote, directory: Path | None = None, at_hand: Sequence[Path] = ()) -> Path:
    """Return the path of a file, downloading it unless it is on this machine.

    Args:
        remote: the file.
        directory: the folder to put it into, under remote.name; None for the cache.
        at_hand: where other programs may have put the same file. One that has its checksum is taken.

    Raises:
        ConnectionError: if it cannot be downloaded. The next call continues after the part that was received.
    """
    path = (directory or cache_directory()) / remote.name
    for found in (path, *at_hand):
        if found.is_file() and _sha256(found) == remote.sha256:
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _transfer(remote.url, path, remote.size)
    if _sha256(part) != remote.sha256:
        part.unlink()
        raise ConnectionError(_another_file(remote.url, f"SHA-256 {remote.sha256[:12]}...", path))
    SYSTEM.rename(part, path)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _another_file(url: str, expected: str, path: Path) -> str:
    return (
        f"{url}: what came is not the file expected ({expected}): something may have answered in its place, or the file has "
        f"changed. Try again, or {_by_hand(path)}"
    )


def _by_hand(path: Path) -> str:
    return f"get it in another way and put it at {path}, or name it with --source"


def _transfer(url: str, path: Path, size: int | None) -> Path:
    """Download url into path's .part file, continuing at its end, and return the file once it is complete.

    Raises:
        ConnectionError: if the server refuses, or several attempts in a row bring nothing.
    """
    import requests

    part = path.with_name(path.name + ".part")
    attempts = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if size is not None and have >= size:
            if have == size:
                return part
            part.unlink()  # it is of another version of the file
            have = 0
        try:
            if _receive(url, path, part, have, size):
                return part
            problem = "the connection ended early"
        except requests.HTTPError as e:
            assert e.response is not None
            status = e.response.status_code
            if status not in (408, 425, 429, 500, 502, 503, 504):
                raise ConnectionError(
                    f"{url}: the server answered {status} {e.response.reason}: is the address still right? You can "
                    + _by_hand(path)
                ) from e
            problem = f"the server answered {status}"
        except requests.RequestException as e:
            problem = reason(e)
        gained = (part.stat().st_size if part.exists() else 0) - have
        attempts = 0 if gained > 0 else attempts + 1
        if attempts == _ATTEMPTS:
            kept = f"The {decimal_bytes(have)} that came are kept, and continued by the same command. " if have else ""
            raise ConnectionError(
                f"{url} could not be downloaded ({problem}). {kept}Connect and try again, or {_by_hand(path)}"
            )
        time.sleep(_PAUSE * 2**attempts / 2)


def _receive(url: str, path: Path, part: Path, have: int, size: int | None) -> bool:
    """Send one request, append what comes to the .part file, and return whether the file is complete.

    Args:
        have: bytes that the .part file has already.
        size: bytes of the whole file, if known.

    Raises:
        requests.RequestException: if the request fails, or the connection breaks.
        ConnectionError: if the server has another file than the one expected.
    """
    import requests

    headers = {"Accept-Encoding": "identity", **_authorization(url)}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 416:  # nothing follows: the part is of another version of the file, or complete
            part.unlink()
            return False
        response.raise_for_status()
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:  # the server does not know Range, and sends the whole file again
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        if size is not None and total != size:  # checked before anything is written, so that the .part file stays good
            raise ConnectionError(_another_file(url, f"{size} bytes, not {total}", path))
        with (
            named_errors(path, part, total),  # what came is kept
            open(part, "ab" if resumed else "wb", buffering=0) as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name.removesuffix(".part")) as bar,
        ):
            for chunk in response.iter_content(_CHUNK):
                write_all(file.fileno(), chunk)
                have += len(chunk)
                bar.update(len(chunk))
    return total is None or have >= total


# ---- the Hugging Face Hub ----


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _authorization(url: str) -> dict[str, str]:
    """Return the header with the user's token, which only the Hub itself is sent."""
    token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token and url.startswith(_endpoint() + "/") else {}


def hub_files(repository: str, folder: str = "") -> list[Remote]:
    """List the large files (those in LFS) of a folder of a data set on the Hugging Face Hub.

    The listing is kept in the cache, and used if there is no connection.

    Args:
        repository: owner/name of the data set.
        folder: path of the folder within it.

    Returns:
        The files sorted by name, with the checksums that the Hub states.

    Raises:
        ConnectionError: if there is neither a connection nor a kept listing, or the folder has no such files.
    """
    import requests

    remembered = cache_directory() / "hub" / repository / folder / "listing.json"
    url: str | None = f"{_endpoint()}/api/datasets/{repository}/tree/main/{folder}".rstrip("/")
    rows: list[dict[str, Any]] = []
    try:
        while url:
            response = requests.get(url, headers=_authorization(url), timeout=_TIMEOUT)
            response.raise_for_status()
            rows += response.json()
            url = response.links.get("next", {}).get("url")
        files = sorted((row["path"], row["lfs"]["oid"], int(row["lfs"]["size"])) for row in rows if row.get("lfs"))
    except (requests.RequestException, ValueError, KeyError, TypeError) as e:
        if not remembered.is_file():
            raise ConnectionError(
                f"{repository} on {_endpoint()} could not be listed ({reason(e)}). Connect and try again, set "
                "HF_ENDPOINT to a mirror, or name downloaded files with --source"
            ) from e
        files = [tuple(row) for row in json.loads(remembered.read_text(encoding="utf-8"))]
    else:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(remembered, [json.dumps(files).encode()])
    if not files:
        raise ConnectionError(f"{_endpoint()}/datasets/{repository}: folder '{folder}' has no data files")
    base = f"{_endpoint()}/datasets/{repository}/resolve/main"
    return [Remote(f"{base}/{path}", f"hub/{repository}/{path}", oid, size) for path, oid, size in files]
