"""Downloads from a server on this machine, which answers with the file, an error, a part of the file, or another page."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import small_disk

from llmc.data.tokenizer import Tokenizer
from llmc.datasets import download, fineweb, hellaswag, tinyshakespeare, tinystories
from llmc.datasets.download import Remote, fetch, hub_files
from llmc.formats.shards import read_shard, write_shard
from llmc.system.cache import cache_directory

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>Sign in to the hotel's network</body></html>"


class Server(http.server.ThreadingHTTPServer):
    """files: by path. behaviour: what to do with each request in turn, then "ok" for ever."""

    files: dict[str, bytes]
    behaviour: list[str]
    next_page: dict[str, str]
    requests: list[tuple[str, str | None]]  # path, Range


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        how = self.server.behaviour.pop(0) if self.server.behaviour else "ok"
        content = self.server.files.get(self.path)
        if how == "page":
            return self._send(200, PAGE)
        if how == "busy":
            return self._send(503, PAGE)
        if content is None:
            return self._send(404, PAGE)
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and how != "no range" else 0
        if wanted and begin >= len(content):
            return self._send(416, b"")
        body = content[begin:]
        headers = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        if self.path in self.server.next_page:
            headers["Link"] = f'<{address(self.server)}{self.server.next_page[self.path]}>; rel="next"'
        self._send(206 if begin else 200, body, body[: len(body) // 2] if how == "half" else body, headers)

    def _send(self, status: int, body: bytes, sent: bytes | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if sent is None else sent)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download, "_PAUSE", 0.001)
    monkeypatch.setattr(download, "_CHUNK", 1000)
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.behaviour, server.requests, server.next_page = {"/data": CONTENT}, [], [], {}
    monkeypatch.setenv("HF_ENDPOINT", address(server))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def remote(server: Server, path: str = "/data", size: int | None = None) -> Remote:
    return Remote(address(server) + path, "folder/data.bin", SHA256, size)


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_it_comes_once(server: Server, tmp_path: Path, size: int | None) -> None:
    for _ in range(2):
        path = fetch(remote(server, size=size))
        assert path == tmp_path / "cache" / "folder" / "data.bin" and path.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]


def test_a_damaged_copy_is_fetched_anew(server: Server) -> None:
    path = fetch(remote(server))
    path.write_bytes(CONTENT[:-1] + b"x")
    assert fetch(remote(server)).read_bytes() == CONTENT and len(server.requests) == 2


def test_an_error_page_is_no_data_set(server: Server) -> None:
    with pytest.raises(ConnectionError, match=r"404 .*--source"):
        fetch(remote(server, "/moved"))
    assert len(server.requests) == 1 and not (cache_directory() / "folder" / "data.bin").exists()


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_page_that_claims_to_be_the_file(server: Server, size: int | None) -> None:
    server.behaviour = ["page"] * 10
    with pytest.raises(ConnectionError, match="not the file expected|could not be downloaded"):
        fetch(remote(server, size=size))
    assert not (cache_directory() / "folder" / "data.bin").exists()
    server.behaviour = []
    # Nothing of the page is left that would prevent the next download.
    assert fetch(remote(server, size=size)).read_bytes() == CONTENT


def test_a_broken_connection_is_resumed(server: Server) -> None:
    server.behaviour = ["half", "half", "busy", "half"]
    assert fetch(remote(server)).read_bytes() == CONTENT
    n = len(CONTENT)
    assert [r for _, r in server.requests] == [None, *(f"bytes={n - n // k}-" for k in (2, 4, 4, 8))]


def test_a_download_is_continued_by_the_next_run(server: Server) -> None:
    server.behaviour = ["half", *["busy"] * 4]
    with pytest.raises(ConnectionError, match=r"503\)\. The 512\.0 kB that came are kept"):
        fetch(remote(server))
    server.requests.clear()
    assert fetch(remote(server)).read_bytes() == CONTENT
    assert [r for _, r in server.requests] == [f"bytes={len(CONTENT) // 2}-"]


def test_a_full_disk_keeps_what_came(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        small_disk(full, 300_000)
        with pytest.raises(OSError, match=r"No space left on device after 300\.0 kB of 1\.0 MB: .*data\.bin'"):
            fetch(remote(server, size=len(CONTENT)))
    server.requests.clear()
    assert fetch(remote(server, size=len(CONTENT))).read_bytes() == CONTENT
    assert [r for _, r in server.requests] == ["bytes=300000-"]


def test_a_server_that_knows_no_range_sends_all_again(server: Server) -> None:
    server.behaviour = ["half", "no range"]
    assert fetch(remote(server)).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(server: Server) -> None:
    part = cache_directory() / "folder" / "data.bin.part"
    part.parent.mkdir(parents=True)
    for size in (None, len(CONTENT)):
        part.write_bytes(CONTENT + b"more")
        assert fetch(remote(server, size=size)).read_bytes() == CONTENT
        (part.parent / "data.bin").unlink()


@pytest.mark.parametrize("left", [CONTENT[:1000][::-1], b"x" * len(CONTENT)])
def test_a_part_of_another_version_does_not_stay(server: Server, left: bytes) -> None:
    part = cache_directory() / "folder" / "data.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    with pytest.raises(ConnectionError, match="not the file expected"):  # only the checksum shows it
        fetch(remote(server, size=len(CONTENT)))
    assert fetch(remote(server, size=len(CONTENT))).read_bytes() == CONTENT


def test_offline(server: Server) -> None:
    nowhere = Remote("http://127.0.0.1:9/x", "x.bin", SHA256)  # port 9: nothing listens
    with pytest.raises(
        ConnectionError, match=r"could not be downloaded .*Connect and try again, or .*x\.bin.*--source"
    ):
        fetch(nowhere)


def test_a_data_set_says_where_it_may_be_put(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hellaswag, "REMOTE", Remote(address(server) + "/gone", "hellaswag/hellaswag_val.jsonl", SHA256))
    with pytest.raises(ConnectionError, match="hellaswag_val.jsonl, or name it with --source"):
        hellaswag.prepare(tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


# ---- the Hub ----


def publish(server: Server, repository: str, folder: str, files: dict[str, bytes]) -> None:
    """Serve the two addresses of the Hub that llmc uses: the list of a folder, and its files."""
    rows: list[dict[str, object]] = [{"type": "file", "path": "README.md", "size": 3, "oid": "x"}]
    for name, content in files.items():
        server.files[f"/datasets/{repository}/resolve/main/{name}"] = content
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        rows.append({"type": "file", "path": name, "size": len(content), "oid": "x", "lfs": lfs})
    server.files[f"/api/datasets/{repository}/tree/main/{folder}".rstrip("/")] = json.dumps(rows).encode()


def parquet(documents: list[str]) -> bytes:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), out)
    return out.getvalue()


def test_fineweb_from_the_hub(server: Server, tmp_path: Path) -> None:
    files = {f"sample/10BT/{i:03d}_00000.parquet": parquet([f"document {i}"] * 5) for i in (2, 0, 1)}
    publish(server, "HuggingFaceFW/fineweb", "sample/10BT", files)
    written = fineweb.prepare(tmp_path / "out", tokenizer="bytes", shard_size=10**6)
    text = bytes(t for t in read_shard(written.val[0]) if t < 256).decode()
    assert text == "document 0" * 5 + "document 1" * 5 + "document 2" * 5
    server.files.clear()  # the second time without a connection
    again = fineweb.prepare(tmp_path / "again", tokenizer="bytes", shard_size=10**6)
    assert again.val[0].read_bytes() == written.val[0].read_bytes()


def test_only_what_is_needed_is_fetched(server: Server, tmp_path: Path) -> None:
    files = {f"sample/10BT/{i:03d}_00000.parquet": parquet(["a" * 99] * 5000) for i in range(3)}
    publish(server, "HuggingFaceFW/fineweb-edu", "sample/10BT", files)
    fineweb.prepare(tmp_path / "out", kind="edu", tokenizer="bytes", shard_size=100, shards=2, workers=1)
    assert sum(path.endswith(".parquet") for path, _ in server.requests) < 3


def test_shards_that_are_tokenised_already(server: Server, tmp_path: Path) -> None:
    files = {}
    for i, split in enumerate(("val", "train", "train", "train")):
        write_shard(tmp_path / "x.bin", [i] * 10, vocab_size=257)
        files[f"fineweb_{split}_{i:06d}.bin"] = (tmp_path / "x.bin").read_bytes()
    publish(server, "chrisdryden/FineWebTokenizedGPT2", "", files)
    written = fineweb.prepare_mirror(tmp_path / "out", shards=2)
    assert [p.name for p in written.val + written.train] == list(files)[:3]
    assert (written.train_tokens, written.val_tokens) == (20, 10)
    assert all((tmp_path / "out" / name).read_bytes() == files[name] for name in list(files)[:3])


def test_a_long_listing_has_pages(server: Server) -> None:
    publish(server, "a/b", "first", {"2.bin": b"2"})
    publish(server, "a/b", "rest", {"1.bin": b"1"})
    server.next_page["/api/datasets/a/b/tree/main/first"] = "/api/datasets/a/b/tree/main/rest"
    assert [(f.name, f.size) for f in hub_files("a/b", "first")] == [("hub/a/b/1.bin", 1), ("hub/a/b/2.bin", 1)]


def test_tinystories_from_the_hub(server: Server, tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for i in range(3):
            content = json.dumps([{"story": f" Story {i}. "}]).encode()
            info = tarfile.TarInfo(f"./data{i:02d}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    publish(
        server, "roneneldan/TinyStories", "", {"TinyStories_all_data.tar.gz": archive.getvalue(), "other.bin": b"x"}
    )
    written = tinystories.prepare(tmp_path / "out", tokenizer="bytes")
    text = bytes(t for t in read_shard(written.train[0]) if t < 256).decode()
    assert text == "Story 1.Story 2." and written.val_tokens == len("Story 0.") + 1


def test_the_hub_off_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="could not be listed .*HF_ENDPOINT.*--source"):
        hub_files("some/thing")
    monkeypatch.setenv("HF_ENDPOINT", address(server))
    server.behaviour = ["page"]
    with pytest.raises(ConnectionError, match="could not be listed"):
        hub_files("some/thing")


# ---- what is on the machine already ----


def test_a_text_at_hand_is_not_downloaded(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm.c's script leaves tiny_shakespeare.txt in the output folder; only the checksum says whether it is the text."""
    text = ("Speak, speak.\n\n" * 12000).encode()
    server.files["/input.txt"] = text
    there = Remote(address(server) + "/input.txt", "tinyshakespeare/input.txt", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(tinyshakespeare, "REMOTE", there)
    out = tmp_path / "out"
    out.mkdir()
    (out / "tiny_shakespeare.txt").write_bytes(text)
    written = tinyshakespeare.prepare(out, tokenizer="bpe:300")
    assert not server.requests and Tokenizer.beside(out).vocab_size <= 300  # type: ignore[union-attr]
    (out / "tiny_shakespeare.txt").write_bytes(text[:-1])
    assert tinyshakespeare.prepare(out, tokenizer="bpe:300") == written and len(server.requests) == 1
