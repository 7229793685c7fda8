"""Downloaded archives, unpacked into the cache."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path

from tqdm import tqdm

from llmc.system.cache import cache_directory
from llmc.system.fs import SYSTEM, named_errors


def unpacked(archive: Path, name: str, suffix: str) -> Path:
    """Unpack an archive into a folder of the cache, unless that has been done already.

    Only plain files are taken, under the last part of their names, so that nothing in an archive reaches outside of the folder.

    Args:
        archive: a tar file, compressed or not.
        name: the cache's subfolder for the data set.
        suffix: what the names of the wanted files end with.

    Returns:
        The folder that has the files.

    Raises:
        ValueError: if the archive is damaged.
    """
    stat = archive.stat()
    folder = cache_directory() / name / f"{archive.name}-{stat.st_size}-{stat.st_mtime_ns}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".part")  # renamed once it has all files
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=f"unpack {archive.name}", unit="file"):
                file_name = Path(member.name).name
                wanted = member.isfile() and file_name.endswith(suffix) and not file_name.startswith(".")
                if wanted and (stream := tar.extractfile(member)) is not None:
                    with (
                        named_errors(folder / file_name, partial / file_name, member.size),
                        open(partial / file_name, "wb") as out,
                    ):
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
    """Check that an archive that has been read does end where tarfile stopped, for tarfile also stops at a damaged header.

    From there on a whole archive has zeros to its last byte. Reading these also makes gzip compare its checksum.

    Raises:
        tarfile.ReadError: if something else follows, or nothing.
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
