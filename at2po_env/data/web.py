"""Downloads single files from addresses that give no listing, such as shared files of Google Drive.

There is no digest to compare with. A file counts as whole when the server has sent as many bytes as it
announced and it begins and ends as JSON does, or is a zip file; whoever reads it checks the rest.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import httpx

from at2po_env.data.catalog import RemoteArchive, RemoteUrl
from at2po_env.data.hub import PassingError, keep_trying
from at2po_env.errors import DataError

TIMEOUT_S = 60.0
_CHUNK = 2**20
_BRACKETS = {b"[": b"]", b"{": b"}"}


def fetch_url(
    wanted: RemoteUrl | RemoteArchive, target: Path, report: Callable[[int, int | None], None]
) -> None:
    """Download a JSON or a zip file, going on where an earlier call stopped.

    Args:
        wanted: The address and the most bytes that it may send.
        target: Appears when it is whole, with a record beside it.
        report: Told the bytes done and in all.

    Raises:
        DataError: the server refuses, sends something else, or sends nothing new however often it is asked.
        OSError: there is no room.
    """
    partial = target.with_name(f"{target.name}.part")
    partial.touch()

    def attempt() -> None:
        try:
            _append(wanted, partial, report)
        except httpx.TransportError as error:
            raise PassingError(str(error) or repr(error)) from error

    keep_trying(wanted.url, attempt, lambda: partial.stat().st_size)
    if isinstance(wanted, RemoteUrl):
        _check_ends(wanted.url, partial)
    elif not zipfile.is_zipfile(partial):
        partial.unlink()
        raise DataError(
            f"{wanted.url}: what came is no zip file; it was thrown away. Fix: run the same command again."
        )
    with partial.open("rb") as file:
        part = {
            "url": wanted.url,
            "bytes": partial.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
    target.with_name(f"{target.name}.json").write_text(json.dumps({"parts": [part]}, indent=1), "utf-8")
    os.replace(partial, target)


def unzip(archive: Path, wanted: RemoteArchive, target: Path) -> None:
    """Unpack the files of a zip archive that are wanted into a folder.

    Args:
        archive: The zip file.
        wanted: What is kept of it, and the most bytes that it may unpack to.
        target: The folder, which appears when it is whole.

    Raises:
        DataError: The archive is damaged, leads out of the folder, holds too much or nothing that is wanted.
        OSError: There is no room.
    """
    new = target.with_name(f"{target.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    fix = f"Fix: delete {archive} and {archive}.json, and run the same command again."
    left = wanted.unpacked
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                path = PurePosixPath(member.filename)
                if path.name != wanted.kept or member.is_dir():
                    continue
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                    raise zipfile.BadZipFile(f"{member.filename!r} leads out of its folder")
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, (new / path).open("wb") as out:
                    while chunk := source.read(_CHUNK):
                        left -= len(chunk)
                        if left < 0:
                            raise zipfile.BadZipFile(f"it unpacks to more than {wanted.unpacked:,} bytes")
                        out.write(chunk)
        if not new.is_dir():
            raise zipfile.BadZipFile(f"it holds no {wanted.kept}")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise DataError(f"{archive} is damaged ({error}). {fix}") from error
    new.rename(target)


def _append(
    wanted: RemoteUrl | RemoteArchive, partial: Path, report: Callable[[int, int | None], None]
) -> None:
    """Ask for the bytes that `partial` lacks and append them; a server that sends all of them is believed."""
    have = partial.stat().st_size
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with (
        httpx.stream("GET", wanted.url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as answer,
        partial.open("ab") as out,
    ):
        status = answer.status_code
        if status >= 500 or status in (408, 425, 429):
            raise httpx.RemoteProtocolError(f"HTTP {status}", request=answer.request)
        sent = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if status == 200 or (status == 206 and sent and int(sent[1]) < have):
            have = int(sent[1]) if status == 206 and sent else 0
            out.truncate(have)
        elif status == 416:  # what is here is not the beginning of the server's file
            out.truncate(0)
            raise httpx.RemoteProtocolError("the server has fewer bytes", request=answer.request)
        elif status != 206 or not sent or int(sent[1]) > have:
            fix = "get the file by hand, or try again later"
            raise DataError(f"{wanted.url}: the server answered HTTP {status}. Fix: {fix}.")
        if "html" in answer.headers.get("Content-Type", ""):
            raise DataError(
                f"{wanted.url}: the server sent a page and not the file; shared files have a daily limit. "
                "Fix: try again tomorrow, or open the address in a browser and put the file in place by hand."
            )
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        for chunk in answer.iter_raw(_CHUNK):
            have += len(chunk)
            if have > wanted.limit:
                out.truncate(0)
                raise DataError(
                    f"{wanted.url}: the server sends more than {wanted.limit:,} bytes. Fix: get the file by "
                    "hand."
                )
            out.write(chunk)
            report(have, total)


def _check_ends(url: str, partial: Path) -> None:
    """Check that a file begins with a bracket and ends with its counterpart; throw it away otherwise."""
    with partial.open("rb") as file:
        first = file.read(64).lstrip()[:1]
        file.seek(max(0, partial.stat().st_size - 64))
        last = file.read().rstrip()[-1:]
    if not last or _BRACKETS.get(first) != last:
        partial.unlink()
        raise DataError(
            f"{url}: what came is no JSON file; it was thrown away. Fix: run the same command again."
        )
