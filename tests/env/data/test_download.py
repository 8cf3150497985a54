"""Downloads against a server on loopback that misbehaves in every way that a hub or a network does."""

import gzip
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from at2po_env.data import Corpus, load_qa, resolve_dataset, transfer
from at2po_env.data.cache import SAMPLE, resolve_corpus
from at2po_env.data.catalog import FLASHRAG
from at2po_env.data.download import get
from at2po_env.data.unpack import unpack
from at2po_env.errors import DataError

QUESTIONS = (SAMPLE / "bamboogle.jsonl").read_bytes()
PATH = f"/datasets/{FLASHRAG}/resolve/main/bamboogle/test.jsonl"
HALF = len(QUESTIONS) // 2


class Hub:
    """A small hub: files, faults (one is used up per request) and the requests that came."""

    def __init__(self) -> None:
        self.files = {PATH: QUESTIONS}
        self.faults: list[str] = []
        self.ranges: list[str | None] = []
        self.linked: str | None = None
        self.etag: str | None = '"1"'
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.path.startswith("/datasets") and self.linked:  # as the hub does for large files
            request.send_response(302)
            request.send_header("Location", f"/storage{request.path}")
            request.send_header("X-Linked-ETag", f'"{self.linked}"')
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = self.files.get(request.path.removeprefix("/storage"))
        self.ranges.append(request.headers["Range"])
        fault = self.faults.pop(0) if self.faults else ""
        if content is None or fault.isdigit():
            request.send_error(int(fault or 404))
            return
        start = 0
        if request.headers["Range"] and fault != "ignores range":
            fits = request.headers["If-Range"] == self.etag
            start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-")) if fits else 0
        if start and start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        self.send(request, content, start, fault)

    def send(self, request: BaseHTTPRequestHandler, content: bytes, start: int, fault: str) -> None:
        request.send_response(206 if start else 200)
        if start:
            shown = 0 if fault == "wrong range" else start
            request.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        if self.etag:
            request.send_header("ETag", self.etag)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        drops = fault == "drops"
        request.wfile.write(content[start : start + HALF] if drops else content[start:])
        if drops:
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.001)
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache/datasets/bamboogle"


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir() if not file.name.endswith(".lock")}


def test_download_fills_the_cache_that_the_environments_read(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    (path,) = get("bamboogle", base_url=hub.url, progress=lambda *now: seen.append(now))
    assert path.read_bytes() == QUESTIONS
    assert seen[-1] == ("test.jsonl", len(QUESTIONS), len(QUESTIONS))
    assert resolve_dataset("bamboogle") == path
    assert len(load_qa(path)) == 12
    assert names(folder(tmp_path)) == {"test.jsonl", "test.jsonl.json"}


def test_what_is_there_is_not_asked_for_again(hub: Hub) -> None:
    first = get("Bamboogle", base_url=hub.url)
    hub.files.clear()
    assert get("bamboogle", base_url=hub.url) == first
    assert len(hub.ranges) == 1


@pytest.mark.parametrize("fault", ["500", "503", "429", "drops", "ignores range", "wrong range"])
def test_fault_between_two_halves_is_overcome(hub: Hub, fault: str) -> None:
    hub.faults = ["drops", fault]
    (path,) = get("bamboogle", base_url=hub.url)
    assert path.read_bytes() == QUESTIONS
    assert hub.ranges[:2] == [None, f"bytes={HALF}-"]


def test_only_the_missing_bytes_are_asked_for(hub: Hub) -> None:
    hub.faults = ["drops"]
    get("bamboogle", base_url=hub.url)
    assert hub.ranges == [None, f"bytes={HALF}-"]


def test_broken_off_download_is_resumed_by_the_next_call(hub: Hub, tmp_path: Path) -> None:
    hub.faults = ["drops", *["500"] * transfer.TRIES]
    with pytest.raises(
        DataError, match=r"gave up after 6 tries .*HTTP 500.*Fix: run the same command again"
    ) as error:
        get("bamboogle", base_url=hub.url)
    assert hub.url in str(error.value)
    assert (folder(tmp_path) / "test.jsonl.part").stat().st_size == HALF
    hub.ranges.clear()
    (path,) = get("bamboogle", base_url=hub.url)
    assert hub.ranges == [f"bytes={HALF}-"]
    assert path.read_bytes() == QUESTIONS


def test_killed_after_the_last_byte_is_finished_without_a_download(hub: Hub, tmp_path: Path) -> None:
    hub.faults = ["drops", *["500"] * transfer.TRIES]
    with pytest.raises(DataError):
        get("bamboogle", base_url=hub.url)
    (folder(tmp_path) / "test.jsonl.part").write_bytes(QUESTIONS)
    (path,) = get("bamboogle", base_url=hub.url)
    assert hub.ranges[-1] == f"bytes={len(QUESTIONS)}-"
    assert path.read_bytes() == QUESTIONS


@pytest.mark.parametrize("etag", ['"2"', None, 'W/"1"'])
def test_file_that_may_have_changed_meanwhile_is_not_mixed(hub: Hub, etag: str | None) -> None:
    hub.faults = ["drops", *["500"] * transfer.TRIES]
    with pytest.raises(DataError):
        get("bamboogle", base_url=hub.url)
    changed = bytes(reversed(QUESTIONS))
    hub.files[PATH], hub.etag = changed, etag
    hub.faults = ["drops"]
    (path,) = get("bamboogle", base_url=hub.url)
    assert path.read_bytes() == changed


def test_checksum_of_the_hub_is_checked(hub: Hub, tmp_path: Path) -> None:
    hub.linked = "0" * 64
    with pytest.raises(DataError, match=r"checksum is wrong: got SHA-256 .*expected 0000.*Fix: ") as error:
        get("bamboogle", base_url=hub.url)
    assert hashlib.sha256(QUESTIONS).hexdigest() in str(error.value)
    assert (folder(tmp_path) / "test.jsonl.part").stat().st_size == 0
    assert not (folder(tmp_path) / "test.jsonl").exists()
    hub.linked = hashlib.sha256(QUESTIONS).hexdigest()
    (path,) = get("bamboogle", base_url=hub.url)
    assert path.read_bytes() == QUESTIONS


def test_checksum_of_the_first_download_is_checked_at_the_second(hub: Hub) -> None:
    (path,) = get("bamboogle", base_url=hub.url)
    path.unlink()
    hub.files[PATH] = QUESTIONS.replace(b"Rome", b"Oslo")
    with pytest.raises(DataError, match=r"checksum is wrong.*delete .*test.jsonl.json first"):
        get("bamboogle", base_url=hub.url)
    path.with_name("test.jsonl.json").unlink()
    assert get("bamboogle", base_url=hub.url)[0].read_bytes() == hub.files[PATH]


def test_file_that_changed_on_disk_is_not_overwritten(hub: Hub) -> None:
    (path,) = get("bamboogle", base_url=hub.url)
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"has 4 bytes, .* were downloaded. Fix: delete"):
        get("bamboogle", base_url=hub.url)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("status", ["401", "404", "410"])
def test_refusal_is_an_error_at_once(hub: Hub, status: str) -> None:
    hub.faults = [status]
    with pytest.raises(DataError, match=rf"HTTP {status}. Fix: "):
        get("bamboogle", base_url=hub.url)
    assert len(hub.ranges) == 1


@pytest.mark.usefixtures("hub")
def test_unreachable_hub_is_an_error() -> None:
    with pytest.raises(DataError, match="gave up after 6 tries"):
        get("bamboogle", base_url="http://127.0.0.1:9")
    with pytest.raises(DataError, match="is no address"):
        get("bamboogle", base_url="http://host:port")


def test_full_disk_is_an_error_that_names_the_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer._Partial, "_accept", full)
    with pytest.raises(
        DataError, match=r"test.jsonl.part: cannot write \(No space left on device\). Fix: make"
    ):
        get("bamboogle", base_url=hub.url)


def test_two_that_want_the_same_file_download_it_once(hub: Hub) -> None:
    hub.faults = ["drops", "500", "drops"]
    got: list[bytes] = []

    def want() -> None:
        got.append(get("bamboogle", base_url=hub.url)[0].read_bytes())

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [QUESTIONS] * 4
    assert hub.ranges[0] is None
    assert None not in hub.ranges[1:]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"no data set 'hotpot'.*hotpotqa.*wiki-18.*all"):
        get("hotpot")


def test_hub_comes_from_the_environment_variable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    assert get("bamboogle")[0].read_bytes() == QUESTIONS


# ---- several parts, packed files


INDEX = "/datasets/PeterJinGo/wiki-18-e5-index/resolve/main/part_"


def test_parts_become_one_file_and_finished_parts_are_not_asked_for_again(hub: Hub) -> None:
    hub.files |= {f"{INDEX}aa": b"first " * 3000, f"{INDEX}ab": b"second" * 3000}
    hub.faults = ["", "drops", *["500"] * transfer.TRIES]
    with pytest.raises(DataError, match="part_ab: gave up"):
        get("wiki-18-e5", base_url=hub.url)
    hub.ranges.clear()
    (path,) = get("wiki-18-e5", base_url=hub.url)
    assert path.read_bytes() == b"first " * 3000 + b"second" * 3000
    assert hub.ranges == [f"bytes={HALF}-"]
    assert names(path.parent) == {"e5_Flat.index", "e5_Flat.index.json"}


LUCENE = "PeterJinGo/wiki-18-bm25-index"
LISTING = f"/api/datasets/{LUCENE}/tree/main/bm25"


def lucene_on(hub: Hub, files: dict[str, bytes]) -> None:
    """Put a folder on the hub; the first file is one of those that it knows the digest of."""
    entries: list[dict[str, object]] = [
        {"type": "file", "path": f"bm25/{name}", "oid": "0", "size": len(content)}
        for name, content in files.items()
    ]
    entries[0]["lfs"] = {"oid": hashlib.sha256(next(iter(files.values()))).hexdigest(), "size": 0}
    hub.files[LISTING] = json.dumps([*entries, {"type": "directory", "path": "bm25/old"}]).encode()
    for name, content in files.items():
        hub.files[f"/datasets/{LUCENE}/resolve/main/bm25/{name}"] = content


def test_a_folder_appears_whole_and_is_gone_on_with(hub: Hub) -> None:
    files = {"_0.fdt": b"text " * 3000, "segments_1": b"seg", "_0.si": b"info"}
    lucene_on(hub, {**files, "write.lock": b""})
    hub.faults = ["", "", "500", "500", "500", "500", "500", "500"]
    with pytest.raises(DataError, match="segments_1: gave up"):
        get("wiki-18-bm25", base_url=hub.url)
    (partial,) = resolve_cache().glob("corpora/wiki-18/bm25*")
    assert partial.name == "bm25.partial"
    hub.ranges.clear()
    (path,) = get("wiki-18-bm25", base_url=hub.url)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files
    assert len(hub.ranges) == 3  # the list and two files: the first was there
    assert get("wiki-18-bm25", base_url=hub.url) == [path]
    assert len(hub.ranges) == 3


def resolve_cache() -> Path:
    return Path(os.environ["AT2PO_CACHE"])


def test_digests_of_a_folder_are_checked(hub: Hub) -> None:
    lucene_on(hub, {"_0.fdt": b"text", "segments_1": b"seg"})
    hub.files[f"/datasets/{LUCENE}/resolve/main/bm25/_0.fdt"] = b"test"
    with pytest.raises(DataError, match="checksum is wrong"):
        get("wiki-18-bm25", base_url=hub.url)


@pytest.mark.parametrize(
    "listing",
    [b"<html>", b"{}", b"[]", b'[{"type": "file", "path": "bm25/../../../x"}]', b'[{"type": "file"}]'],
)
def test_a_listing_that_is_none_or_leads_elsewhere_is_refused(hub: Hub, listing: bytes) -> None:
    hub.files[LISTING] = listing
    with pytest.raises(DataError, match=r"the hub.*Fix: "):
        get("wiki-18-bm25", base_url=hub.url)
    assert not list(resolve_cache().parent.rglob("x"))


CORPUS = (SAMPLE / "corpus.jsonl").read_bytes()
PACKED = "/datasets/PeterJinGo/wiki-18-corpus/resolve/main/wiki-18.jsonl.gz"


def in_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("some/folder/wiki_dump.jsonl")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("content", [CORPUS, in_tar(CORPUS)], ids=["gzip", "tar in gzip"])
def test_packed_corpus_is_unpacked_once(hub: Hub, content: bytes) -> None:
    hub.files[PACKED] = gzip.compress(content)
    (path,) = get("wiki-18", base_url=hub.url)
    assert path.read_bytes() == CORPUS
    assert names(path.parent) == {"wiki-18.jsonl", "wiki-18.jsonl.gz.json"}
    assert get("wiki-18", base_url=hub.url) == [path]
    assert len(hub.ranges) == 1
    assert len(Corpus(resolve_corpus("hotpotqa"))) == 268


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(CORPUS)[:-20],
        gzip.compress(in_tar(CORPUS))[:-900],
        b"no gzip",
        gzip.compress(in_tar(b""))[:40],
    ],
    ids=["cut gzip", "cut tar", "no gzip", "cut empty tar"],
)
def test_damaged_archive_is_an_error_and_leaves_no_target(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"file.gz is damaged .*Fix: delete it and get it again"):
        unpack(tmp_path / "file.gz", tmp_path / "file")
    assert names(tmp_path) == {"file.gz"}


def test_no_room_to_unpack_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(CORPUS))
    with pytest.raises(DataError, match=r"cannot unpack file.gz .*Fix: make room"):
        unpack(tmp_path / "file.gz", tmp_path / "no folder" / "file")
