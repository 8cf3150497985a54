"""Downloads of single files from a server on loopback that lists nothing and misbehaves."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.fake_hub import HALF, Hub, serving

from at2po_env.data import catalog, web
from at2po_env.data import hub as transfers
from at2po_env.data.catalog import RemoteArchive, RemoteUrl
from at2po_env.data.download import get
from at2po_env.errors import DataError

CONTENT = b"[" + b'{"asin": "B0SAMPLE01"}, ' * 400 + b"{}]\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("AT2PO_CACHE", str(tmp_path))
    monkeypatch.setattr(transfers, "BACKOFF_S", 0.001)
    monkeypatch.setattr(web, "_CHUNK", 64)
    with serving(monkeypatch) as hub:
        files = tuple(
            RemoteUrl(f"{hub.url}/download?id={n}", f"shop/{n}.json", 20_000) for n in ("one", "two")
        )
        monkeypatch.setattr(catalog, "WORLDS", {"webshop": files})
        hub.files = {"/download?id=one": CONTENT, "/download?id=two": b'{"a": 1}'}
        yield hub


def test_the_files_arrive_with_a_record_of_where_they_came_from(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    one, two = get("webshop", progress=lambda *now: seen.append(now))
    assert (one, one.read_bytes(), two.read_bytes()) == (tmp_path / "shop/one.json", CONTENT, b'{"a": 1}')
    assert ("one.json", len(CONTENT), len(CONTENT)) in seen
    record = json.loads((tmp_path / "shop/one.json.json").read_text())
    (part,) = record["parts"]
    assert part == {
        "url": f"{hub.url}/download?id=one",
        "bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    hub.files.clear()
    assert get("webshop") == [one, two]  # nothing is asked for again


@pytest.mark.parametrize("fault", ["500", "503", "429", "drops", "ignores range", "wrong range"])
def test_a_fault_between_two_halves_is_overcome(hub: Hub, fault: str) -> None:
    hub.faults = ["drops", fault]
    assert get("webshop")[0].read_bytes() == CONTENT
    first, second, *_ = hub.ranges
    assert first is None
    # Chunks that were not complete when the connection broke are asked for again.
    assert second is not None
    assert HALF - 64 <= int(second.removeprefix("bytes=").removesuffix("-")) <= HALF


def test_a_broken_off_download_is_resumed_by_the_next_call(hub: Hub, tmp_path: Path) -> None:
    hub.faults = ["drops", *["500"] * (transfers.TRIES + 1)]
    with pytest.raises(DataError, match=r"gave up after 6 tries .*HTTP 500.*bytes are kept"):
        get("webshop")
    kept = (tmp_path / "shop/one.json.part").stat().st_size
    assert 0 < kept <= HALF
    hub.faults.clear()
    hub.ranges.clear()
    assert get("webshop")[0].read_bytes() == CONTENT
    assert hub.ranges[0] == f"bytes={kept}-"


@pytest.mark.usefixtures("hub")
def test_a_longer_file_than_the_server_has_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/one.json.part").write_bytes(b"x" * (len(CONTENT) + 1))
    assert get("webshop")[0].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "fault", "kept"),
    [
        (b"<html>Quota exceeded</html>", "is no JSON file", False),
        (CONTENT[:-2], "is no JSON file", False),
        (b"", "is no JSON file", False),
        (CONTENT * 3, "more than 20,000 bytes", True),
    ],
)
def test_what_is_not_the_file_is_thrown_away(
    hub: Hub, tmp_path: Path, content: bytes, fault: str, kept: bool
) -> None:
    hub.files["/download?id=one"] = content
    with pytest.raises(DataError, match=fault):
        get("webshop")
    assert not (tmp_path / "shop/one.json").exists()
    partial = tmp_path / "shop/one.json.part"
    assert partial.exists() == kept
    assert not kept or partial.stat().st_size == 0


def test_a_missing_file_is_one_clear_error(hub: Hub) -> None:
    del hub.files["/download?id=one"]
    with pytest.raises(DataError, match=r"download\?id=one: the server answered HTTP 404"):
        get("webshop")


def test_a_page_in_the_place_of_the_file_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "send_file", send_page)
    with pytest.raises(DataError, match="sent a page and not the file"):
        get("webshop")


@pytest.fixture
def archive(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    wanted = RemoteArchive(f"{hub.url}/games.zip", "datasets/games", 20_000, 5_000, "game.json")
    monkeypatch.setattr(catalog, "WORLDS", {"games": (wanted,)})
    return hub


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return packed.getvalue()


def test_a_zip_file_becomes_a_folder_of_the_files_that_are_wanted(archive: Hub, tmp_path: Path) -> None:
    archive.files["/games.zip"] = zipped(
        {"v1/train/a/game.json": b"1", "v1/eval/b/game.json": b"2", "v1/train/a/photo.png": b"3"}
    )
    archive.faults = ["drops", "500"]
    (folder,) = get("games")
    assert folder == tmp_path / "datasets/games"
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    assert found == {"v1/train/a/game.json": b"1", "v1/eval/b/game.json": b"2"}
    assert not (tmp_path / "datasets/games.zip").exists()
    archive.files.clear()
    assert get("games") == [folder]  # nothing is asked for again


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{}", "is no zip file; it was thrown away"),
        (zipped({"a/game.json": b"1"})[:-9], "is no zip file; it was thrown away"),
        (zipped({"a/other.json": b"1"}), "holds no game.json"),
        (zipped({"../game.json": b"1"}), "leads out of its folder"),
        (zipped({"/etc/game.json": b"1"}), "leads out of its folder"),
        (zipped({"a/game.json": b"0" * 5_001}), "unpacks to more than 5,000 bytes"),
        (zipped({"a/game.json": b"1" * 999}).replace(b"PK\x03\x04", b"PK\x03\x05", 1), "is damaged"),
    ],
)
def test_a_zip_file_that_is_none_or_hostile_leaves_no_folder(
    archive: Hub, tmp_path: Path, content: bytes, fault: str
) -> None:
    archive.files["/games.zip"] = content
    with pytest.raises(DataError, match=fault):
        get("games")
    assert not (tmp_path / "datasets/games").exists()
    assert not (tmp_path / "datasets/games.partial").exists()
    assert not list(tmp_path.parent.glob("game.json"))


def send_page(request: object) -> None:
    request.send_response(200)  # type: ignore[attr-defined]
    request.send_header("Content-Type", "text/html; charset=utf-8")  # type: ignore[attr-defined]
    request.send_header("Content-Length", "0")  # type: ignore[attr-defined]
    request.end_headers()  # type: ignore[attr-defined]
