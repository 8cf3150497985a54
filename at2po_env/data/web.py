"""Downloads single files from addresses that give no listing, such as shared files of Google Drive.

There is no digest to compare with. A file counts as whole when the server has sent as many bytes as it
announced and the text begins and ends as JSON does; whoever reads it checks the rest.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from at2po_env.data.catalog import RemoteUrl
from at2po_env.data.hub import BACKOFF_S, TRIES
from at2po_env.errors import DataError

TIMEOUT_S = 60.0
_CHUNK = 2**20
_BRACKETS = {b"[": b"]", b"{": b"}"}


def fetch_url(wanted: RemoteUrl, target: Path, report: Callable[[int, int | None], None]) -> None:
    """Download a JSON file, going on where an earlier call stopped.

    Args:
        wanted: The address and the most bytes that it may send.
        target: Appears when it is whole, with a record beside it.
        report: Told the bytes done and in all.

    Raises:
        DataError: the server refuses, sends something else, or sends nothing new in `TRIES` tries in a row.
        OSError: there is no room.
    """
    partial = target.with_name(f"{target.name}.part")
    partial.touch()
    failures = 0
    while True:
        before = partial.stat().st_size
        try:
            _append(wanted, partial, report)
            break
        except httpx.TransportError as error:
            failures = 0 if partial.stat().st_size > before else failures + 1
            if failures == TRIES:
                raise DataError(
                    f"{wanted.url}: gave up after {TRIES} tries without a new byte ({error!r}); "
                    f"{partial.stat().st_size} bytes are kept. Fix: run the command again, to go on there."
                ) from error
            time.sleep(min(BACKOFF_S * 2**failures, 30.0))
    _check_ends(wanted.url, partial)
    with partial.open("rb") as file:
        part = {
            "url": wanted.url,
            "bytes": partial.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
    target.with_name(f"{target.name}.json").write_text(json.dumps({"parts": [part]}, indent=1), "utf-8")
    os.replace(partial, target)


def _append(wanted: RemoteUrl, partial: Path, report: Callable[[int, int | None], None]) -> None:
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
