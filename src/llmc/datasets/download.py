"""Downloads: into a cache, resumable, and checked by SHA-256 before anything reads them.

pooch keeps the cache and compares checksums; the transfer itself is here, because pooch begins anew where a connection breaks. What
has come is kept in NAME.part, and the next attempt or run asks for the rest (HTTP Range). A page that says "error" is no data set:
its status, or at the latest its checksum, gives it away.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmc.system.fs import write_atomically

_CHUNK = 1 << 16  # bytes; what a broken connection leaves of one is lost
_ATTEMPTS = 4  # in a row that bring nothing
_TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
_PAUSE = 1.0  # seconds before another attempt, doubled each time


@dataclass(frozen=True)
class Remote:
    """A file somewhere: where, what it is called in the cache, and its SHA-256."""

    url: str
    name: str
    sha256: str
    size: int | None = None


def cache_directory() -> Path:
    """LLMC_CACHE, or the system's place for caches."""
    if configured := os.environ.get("LLMC_CACHE"):
        return Path(configured)
    return Path(_import("platformdirs").user_cache_dir("llmc", appauthor=False))


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ImportError(f"downloading data sets needs {name}: pip install pooch platformdirs") from e


def fetch(remote: Remote, directory: Path | None = None) -> Path:
    """The file, from the cache where it is there in full, else from the net.

    ConnectionError where it cannot be had; what has come so far is kept and continued the next time.
    """
    pooch = _import("pooch")
    pooch.get_logger().setLevel(logging.WARNING)
    folder = directory or cache_directory()
    path = folder / remote.name
    try:
        return Path(
            pooch.retrieve(
                remote.url,
                known_hash=f"sha256:{remote.sha256}",
                fname=path.name,
                path=path.parent,
                downloader=lambda url, temporary, _: os.replace(_transfer(url, path, remote.size), temporary),
            )
        )
    except ValueError as e:
        raise ConnectionError(_another_file(remote.url, f"SHA-256 {remote.sha256[:12]}...", path)) from e


def _another_file(url: str, expected: str, path: Path) -> str:
    return (
        f"{url}: what came is not the file expected ({expected}): something may have answered in its place, or the file has "
        f"changed. Try again, or {_by_hand(path)}"
    )


def _reason(error: Exception) -> str:
    """What went wrong at the bottom, without the names of the layers above it."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    return str(inner).rpartition("): ")[2] if inner is not None else f"{type(error).__name__}: {error}"


def _by_hand(path: Path) -> str:
    return f"get it in another way and put it at {path}, or name it with --source"


def _transfer(url: str, path: Path, size: int | None) -> Path:
    """Downloads url to path's .part, from where that ends; returns it when it is complete."""
    import requests

    part = path.with_name(path.name + ".part")
    attempts = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if size is not None and have >= size:
            if have == size:
                return part
            part.unlink()  # of another version of the file
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
            problem = _reason(e)
        gained = (part.stat().st_size if part.exists() else 0) - have
        attempts = 0 if gained > 0 else attempts + 1
        if attempts == _ATTEMPTS:
            kept = f"The {have / 1e6:.1f} MB that came are kept, and continued by the same command. " if have else ""
            raise ConnectionError(
                f"{url} could not be downloaded ({problem}). {kept}Connect and try again, or {_by_hand(path)}"
            )
        time.sleep(_PAUSE * 2**attempts / 2)


def _receive(url: str, path: Path, part: Path, have: int, size: int | None) -> bool:
    """One request; whether the file is complete after it."""
    import requests

    headers = {"Accept-Encoding": "identity", **_authorization(url)}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == 416:  # beyond the end: of another version of the file, or complete
            part.unlink()
            return False
        response.raise_for_status()
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:  # a server that knows no Range sends all of it again
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        if size is not None and total != size:  # seen before anything is written: what has come stays good
            raise ConnectionError(_another_file(url, f"{size} bytes, not {total}", path))
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name.removesuffix(".part")) as bar,
        ):
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    return total is None or have >= total


# ---- the Hugging Face Hub ----


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _authorization(url: str) -> dict[str, str]:
    token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token and url.startswith(_endpoint() + "/") else {}


def hub_files(repository: str, folder: str = "") -> list[Remote]:
    """The large files of a folder of a data set on the Hub, sorted by name, with the checksums that the Hub states.

    A listing is kept in the cache, and serves where there is no connection.
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
                f"{repository} on {_endpoint()} could not be listed ({_reason(e)}). Connect and try again, set "
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
