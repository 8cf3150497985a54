"""Downloads against a server on loopback that misbehaves in every way that a hub or a network does."""

import gzip
import hashlib
import io
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from helpers.fake_hub import HALF, PATH, QUESTIONS, Hub, serving

from at2po_env.data import Corpus, load_qa, resolve_dataset
from at2po_env.data import hub as transfers
from at2po_env.data.cache import SAMPLE, resolve_corpus
from at2po_env.data.download import get, unpack
from at2po_env.errors import DataError, MissingExtraError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfers, "BACKOFF_S", 0.001)
    monkeypatch.setattr(
        huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1
    )  # what a broken connection may lose
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    with serving(monkeypatch) as hub:
        yield hub


def part_of(file: Path) -> Path:
    (part,) = file.parent.glob(f"{file.name}.*.part")
    return part


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
    hub.faults = ["drops", *["500"] * (transfers.TRIES + 1)]
    with pytest.raises(
        DataError, match=r"gave up after 6 tries .*HTTP 500.*Fix: run the same command again"
    ) as error:
        get("bamboogle", base_url=hub.url)
    assert hub.url in str(error.value)
    assert part_of(folder(tmp_path) / "test.jsonl").stat().st_size == HALF
    hub.ranges.clear()
    (path,) = get("bamboogle", base_url=hub.url)
    assert hub.ranges == [f"bytes={HALF}-"]
    assert path.read_bytes() == QUESTIONS


def test_killed_after_the_last_byte_is_finished_without_a_download(hub: Hub, tmp_path: Path) -> None:
    hub.faults = ["drops", *["500"] * (transfers.TRIES + 1)]
    with pytest.raises(DataError):
        get("bamboogle", base_url=hub.url)
    part_of(folder(tmp_path) / "test.jsonl").write_bytes(QUESTIONS)
    hub.ranges.clear()
    (path,) = get("bamboogle", base_url=hub.url)
    assert hub.ranges == []
    assert path.read_bytes() == QUESTIONS


@pytest.mark.parametrize("large", [True, False])
def test_file_that_changed_meanwhile_is_not_mixed(hub: Hub, large: bool) -> None:
    hub.large = large
    hub.faults = ["drops", *["500"] * (transfers.TRIES + 1)]
    with pytest.raises(DataError):
        get("bamboogle", base_url=hub.url)
    changed = QUESTIONS.replace(b"Rome", b"Oslo")
    hub.files[PATH] = changed
    hub.faults = ["drops"]
    (path,) = get("bamboogle", base_url=hub.url)
    assert path.read_bytes() == changed
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(("large", "kind"), [(True, 256), (False, 1)])
def test_checksum_of_the_hub_is_checked(hub: Hub, tmp_path: Path, large: bool, kind: int) -> None:
    hub.large = large
    hub.lies[PATH] = lie = QUESTIONS.replace(b"Rome", b"Oslo")
    match = rf"checksum is wrong: got SHA-{kind} .*expected .*Fix: "
    with pytest.raises(DataError, match=match) as error:
        get("bamboogle", base_url=hub.url)
    if large:
        assert hashlib.sha256(lie).hexdigest() in str(error.value)
        assert hashlib.sha256(QUESTIONS).hexdigest() in str(error.value)
    assert part_of(folder(tmp_path) / "test.jsonl").stat().st_size == 0
    assert not (folder(tmp_path) / "test.jsonl").exists()
    hub.lies.clear()
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

    monkeypatch.setattr(transfers._Bounded, "write", full)
    with pytest.raises(
        DataError, match=r"test.jsonl.*.part: cannot write \(No space left on device\). Fix: make"
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
    hub.faults = ["", "drops", *["500"] * (transfers.TRIES + 1)]
    with pytest.raises(DataError, match="part_ab: gave up"):
        get("wiki-18-e5", base_url=hub.url)
    hub.ranges.clear()
    (path,) = get("wiki-18-e5", base_url=hub.url)
    assert path.read_bytes() == b"first " * 3000 + b"second" * 3000
    assert hub.ranges == [f"bytes={HALF}-"]
    assert names(path.parent) == {"e5_Flat.index", "e5_Flat.index.json"}


LUCENE = "PeterJinGo/wiki-18-bm25-index"


def lucene_on(hub: Hub, files: dict[str, bytes]) -> None:
    """Put a folder on the hub."""
    for name, content in files.items():
        hub.files[f"/datasets/{LUCENE}/resolve/main/bm25/{name}"] = content


def test_a_folder_appears_whole_and_is_gone_on_with(hub: Hub) -> None:
    files = {"_0.fdt": b"text " * 3000, "segments_1": b"seg", "_0.si": b"info"}
    lucene_on(hub, {**files, "write.lock": b"lock"})
    hub.faults = ["", "500", "500", "500", "500", "500", "500"]
    with pytest.raises(DataError, match="segments_1: gave up"):
        get("wiki-18-bm25", base_url=hub.url)
    (partial,) = resolve_cache().glob("corpora/wiki-18/bm25*")
    assert partial.name.endswith(".partial")
    hub.ranges.clear()
    (path,) = get("wiki-18-bm25", base_url=hub.url)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files
    assert len(hub.ranges) == 2  # the first was there
    assert get("wiki-18-bm25", base_url=hub.url) == [path]
    assert len(hub.ranges) == 2
    assert names(path.parent) == {"bm25"}


def resolve_cache() -> Path:
    return Path(os.environ["AT2PO_CACHE"])


def test_digests_of_a_folder_are_checked(hub: Hub) -> None:
    lucene_on(hub, {"_0.fdt": b"text", "segments_1": b"seg"})
    hub.lies[f"/datasets/{LUCENE}/resolve/main/bm25/_0.fdt"] = b"test"
    with pytest.raises(DataError, match="checksum is wrong"):
        get("wiki-18-bm25", base_url=hub.url)


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>",
        b"{}",
        b"[]",
        b'[{"type": "file", "path": "bm25/../../../x"}]',
        b'[{"type": "file"}]',
        b"[3]",
    ],
)
@pytest.mark.parametrize("name", ["wiki-18-bm25", "bamboogle"])
def test_a_listing_that_is_none_or_leads_elsewhere_is_refused(hub: Hub, listing: bytes, name: str) -> None:
    hub.answer = listing
    with pytest.raises(DataError, match=r"the hub.*Fix: "):
        get(name, base_url=hub.url)
    assert not list(resolve_cache().parent.rglob("x"))


@pytest.mark.parametrize("listed", [{"size": "9"}, {"size": -1}, {"size": 0}, {"oid": "x"}, {"oid": None}])
def test_a_listing_without_size_or_digest_is_refused(hub: Hub, listed: dict[str, object]) -> None:
    hub.listed = listed
    with pytest.raises(DataError, match=r"the hub.*Fix: "):
        get("bamboogle", base_url=hub.url)


@pytest.mark.parametrize(
    "names", [["a", "A"], ["a\0b"], ["../x"], ["sub/x"], ["a\\b"], [".hidden"], ["a\nb"]]
)
def test_names_that_collide_or_lead_elsewhere_are_refused(hub: Hub, names: list[str]) -> None:
    lucene_on(hub, dict.fromkeys(["segments_1", *names], b"text"))
    with pytest.raises(DataError, match=r"the hub lists .*Fix: get it by hand"):
        get("wiki-18-bm25", base_url=hub.url)
    assert hub.ranges == []


PAGE = b"<!DOCTYPE html><html><title>Please log in</title></html>\n"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (PAGE, "gave up after 6 tries|the server has fewer bytes"),
        (b"", "gave up after 6 tries|the server has fewer bytes"),
        (QUESTIONS[:HALF], "the server has fewer bytes than the hub lists"),
        (QUESTIONS + b"\n", "more bytes than the hub lists"),
        (QUESTIONS * 1000, "more bytes than the hub lists"),
        (PAGE * (len(QUESTIONS) // len(PAGE)) + b" " * (len(QUESTIONS) % len(PAGE)), "checksum is wrong"),
        (gzip.compress(QUESTIONS), "the server has fewer bytes|gave up"),
    ],
    ids=["page", "empty", "cut", "longer", "much longer", "page of the same length", "gzip"],
)
def test_a_body_that_is_not_what_was_listed_is_refused(
    hub: Hub, tmp_path: Path, body: bytes, what: str
) -> None:
    hub.lies[PATH] = body
    with pytest.raises(DataError, match=rf"({what}).*Fix: "):
        get("bamboogle", base_url=hub.url)
    assert not (folder(tmp_path) / "test.jsonl").exists()
    hub.lies.clear()
    assert get("bamboogle", base_url=hub.url)[0].read_bytes() == QUESTIONS


def test_a_transfer_in_gzip_is_unpacked(hub: Hub) -> None:
    hub.faults = ["gzip"]
    assert get("bamboogle", base_url=hub.url)[0].read_bytes() == QUESTIONS


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (PAGE, "line 1: Invalid JSON"),
        (QUESTIONS[:HALF], "last line: Invalid JSON"),
        (QUESTIONS[: QUESTIONS.index(b"\n") + 1] + b"\0" * 200_000, "last line: "),
        (gzip.compress(QUESTIONS), "line 1: "),
        (b"{}\n", "line 1: .*Field required"),
        (b"\xef\xbb\xbf" + QUESTIONS, "byte order mark"),
    ],
    ids=["page", "cut", "holes", "gzip", "rows of another kind", "byte order mark"],
)
def test_a_listed_file_that_is_no_data_is_refused(hub: Hub, tmp_path: Path, body: bytes, what: str) -> None:
    hub.files[PATH] = body
    with pytest.raises(
        DataError, match=rf"test.jsonl: what came is no question file .*{what}.*Fix: run.*thrown away"
    ):
        get("bamboogle", base_url=hub.url)
    assert names(folder(tmp_path)) == set()


def test_more_than_the_catalog_expects_is_refused_before_it_is_transferred(hub: Hub) -> None:
    hub.listed = {"size": 5 * 10**9}
    with pytest.raises(DataError, match=r"lists 5,000,000,000 bytes, expected at most 4,000,000,000. Fix: "):
        get("bamboogle", base_url=hub.url)
    assert hub.ranges == []


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
        unpack(tmp_path / "file.gz", tmp_path / "file", limit=10**9)
    assert names(tmp_path) == {"file.gz"}


def test_no_room_to_unpack_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(CORPUS))
    with pytest.raises(DataError, match=r"cannot unpack file.gz .*Fix: make room"):
        unpack(tmp_path / "file.gz", tmp_path / "no folder" / "file", limit=10**9)


@pytest.mark.parametrize("content", [bytes(10**7), in_tar(bytes(10**7))], ids=["gzip", "tar in gzip"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(content))
    with pytest.raises(
        DataError, match=r"damaged \(it unpacks to more than 3,000,000 bytes\). Fix: delete it"
    ):
        unpack(tmp_path / "file.gz", tmp_path / "file", limit=3 * 10**6)
    assert names(tmp_path) == {"file.gz"}


def test_a_packed_corpus_without_rows_is_refused(hub: Hub) -> None:
    hub.files[PACKED] = gzip.compress(PAGE)
    with pytest.raises(
        DataError, match=r"wiki-18.jsonl: what came is no corpus .*Invalid JSON.*Fix: delete .*gz"
    ):
        get("wiki-18", base_url=hub.url)
    hub.files[PACKED] = gzip.compress(CORPUS)
    resolve_cache().joinpath("corpora/wiki-18/wiki-18.jsonl.gz").unlink()
    resolve_cache().joinpath("corpora/wiki-18/wiki-18.jsonl.gz.json").unlink()
    assert get("wiki-18", base_url=hub.url)[0].read_bytes() == CORPUS


@pytest.mark.usefixtures("hub")
def test_without_the_hubs_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'at2po\[hub\]'"):
        get("bamboogle", base_url="http://127.0.0.1:9")
