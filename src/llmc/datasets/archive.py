"""Unpacking downloaded archives into the cache."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm

from llmc.datasets.download import cache_directory
from llmc.system.fs import SYSTEM


def unpacked(archive: Path, name: str, suffix: str) -> Path:
    """A folder of the cache with the archive's files of that suffix. ValueError where the archive is damaged.

    Only plain files are taken, and only their last names: nothing in an archive reaches outside of the folder.
    """
    stat = archive.stat()
    folder = cache_directory() / name / f"{archive.name}-{stat.st_size}-{stat.st_mtime_ns}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".part")  # a folder half unpacked has another name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f"unpack {archive.name}", unit="file"):
                file_name = Path(member.name).name
                wanted = member.isfile() and file_name.endswith(suffix) and not file_name.startswith(".")
                if wanted and (stream := tar.extractfile(member)) is not None:
                    with open(partial / file_name, "wb") as out:
                        shutil.copyfileobj(stream, out)
            _check_end(tar)
        SYSTEM.rename(partial, folder)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, (tarfile.TarError, EOFError, zlib.error)) or (isinstance(e, OSError) and e.errno is None):
            raise ValueError(f"{archive}: not a whole archive: {e}") from e
        raise
    return folder


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end. There, a whole archive has zeros to its last byte; reading up to it also makes gzip
    compare its checksum.
    """
    stream = tar.fileobj
    assert stream is not None
    stream.seek(tar.offset)
    size, zeros = 0, True
    while chunk := stream.read(1 << 20):
        size += len(chunk)
        zeros &= not any(chunk)
    if size < tarfile.BLOCKSIZE or not zeros:
        raise tarfile.ReadError(f"its list of files breaks off at byte {tar.offset}")
