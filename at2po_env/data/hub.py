"""Lists and transfers files of a hub's data set repositories through the hub's library (extra `hub`).

The library gives the listing with sizes and digests, addresses, credentials and `http_get`, which continues
at a byte. `hf_hub_download` is not used because it deletes a broken download, and the index of wiki-18 has
64.5 GB.
"""

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

from at2po_env.data.catalog import RemoteFile, RemoteFolder
from at2po_env.data.progress import ProgressBar
from at2po_env.errors import DataError, require

TRIES = 6  # in a row without a single new byte
BACKOFF_S = 0.5
_CHUNK = 2**20
ResultT = TypeVar("ResultT")
_AGAIN = "Fix: run the same command again"


class Listed(NamedTuple):
    """A file as the hub lists it; the digest of large files is their SHA-256, of others git's SHA-1."""

    path: str
    size: int
    digest: str


class PassingError(Exception):
    """A try failed in a way that the next one need not."""


def keep_trying(url: str, ask: Callable[[], ResultT], done: Callable[[], int]) -> ResultT:
    """Call `ask` until it raises no `PassingError`, with growing pauses.

    Args:
        url: What is asked for.
        ask: One try.
        done: Returns how many bytes are here.

    Raises:
        DataError: `TRIES` calls in a row added nothing to `done`.
    """
    failures = 0
    while True:
        before = done()
        try:
            return ask()
        except PassingError as error:
            failures = 0 if done() > before else failures + 1
            if failures == TRIES:
                raise DataError(
                    f"{url}: gave up after {TRIES} tries without a new byte ({str(error).splitlines()[0]}); "
                    f"{done()} bytes are kept. {_AGAIN}, to go on from there."
                ) from error
            time.sleep(min(BACKOFF_S * 2**failures, 30.0))


class Hub:
    """One data set repository on a hub."""

    def __init__(self, endpoint: str, repo: str) -> None:
        try:
            httpx.URL(endpoint)
        except httpx.InvalidURL as error:
            raise DataError(f"{endpoint} is no address ({error}). Fix: check HF_ENDPOINT.") from error
        self._hub = require("huggingface_hub", "hub")
        self._errors = require("huggingface_hub.errors", "hub")
        self._endpoint, self._repo = endpoint, repo
        self._api = self._hub.HfApi(endpoint=endpoint)

    def list_files(self, wanted: RemoteFile | RemoteFolder) -> list[Listed]:
        """Return what the hub knows of the wanted files: the parts in their order, or those of a folder.

        Raises:
            DataError: the hub refuses or cannot be reached, or lists something that cannot be true, or more
                bytes than the catalog allows.
        """
        where = f"{self._endpoint}, {self._repo}"
        if isinstance(wanted, RemoteFolder):
            where += f"/{wanted.folder}"
            ask = partial(self._api.list_repo_tree, self._repo, wanted.folder, repo_type="dataset")
        else:
            ask = partial(self._api.get_paths_info, self._repo, list(wanted.parts), repo_type="dataset")
        try:
            found = self._try(where, lambda: list(ask()), lambda: 0)
            files = [
                Listed(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
                for file in found
                if hasattr(file, "size")  # folders have none
            ]
            digests = [re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.digest) for file in files]
            if not all(digests) or any(type(file.size) is not int or file.size < 1 for file in files):
                raise DataError(f"{where}: the hub lists a file without a size or a digest. {_AGAIN} later.")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: the hub's answer is not a list of files. {_AGAIN} later.") from error
        if isinstance(wanted, RemoteFolder):
            files = [file for file in files if file.path != f"{wanted.folder}/write.lock"]
            # A name becomes a path on this machine, which may take "A" and "a" for the same.
            names = [file.path.removeprefix(f"{wanted.folder}/") for file in files]
            strange = [name for name in names if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII)]
            if not names or strange or len({name.lower() for name in names}) < len(names):
                what = f"lists {strange[0]!r}" if strange else "lists no files, or one name twice"
                raise DataError(f"{where}: the hub {what}. Fix: get it by hand.")
        else:
            by_path = {file.path: file for file in files}
            if missing := [path for path in wanted.parts if path not in by_path]:
                raise DataError(
                    f"{where}: the hub has no file {missing[0]!r}. Fix: check HF_ENDPOINT, or get it by hand."
                )
            files = [by_path[path] for path in wanted.parts]
        if (total := sum(file.size for file in files)) > wanted.limit:
            raise DataError(
                f"{where}: the hub lists {total:,} bytes, expected at most {wanted.limit:,}. Fix: check "
                "HF_ENDPOINT."
            )
        return files

    def append(self, files: Sequence[Listed], partial: Path, report: Callable[[int, int], None]) -> None:
        """Append to `partial` the bytes that it lacks of some files, one after the other.

        Raises:
            DataError: the hub refuses or cannot be reached, or sends too much.
            OSError: there is no room.
        """
        utils = require("huggingface_hub.utils", "hub")
        http_get = require("huggingface_hub.file_download", "hub").http_get
        headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
        total, start = sum(file.size for file in files), 0
        for file in files:
            url = self._url(file)

            def append(url: str = url, start: int = start, size: int = file.size) -> None:
                with _Bounded(partial, start + size, lambda done: report(done, total)) as out:
                    have = out.tell() - start
                    try:
                        http_get(url, out, resume_size=have, headers=headers, expected_size=size)
                    except (self._errors.HTTPError, _TooLongError) as error:
                        # What is here is not the beginning of the server's file, which ends before it or
                        # went beyond what was listed.
                        if isinstance(error, _TooLongError) or _status(error) == 416:
                            out.seek(start)
                            out.truncate()
                        raise

            bars = "huggingface_hub.http_get"  # the hub's own progress bar, beside which ours would stand
            utils.disable_progress_bars(bars)
            try:
                while partial.stat().st_size < start + file.size:
                    self._try(url, append, lambda: partial.stat().st_size)
            finally:
                utils.enable_progress_bars(bars)
            start += file.size

    def check(self, files: Sequence[Listed], partial: Path, record: Path) -> list[dict[str, Any]]:
        """Compare `partial` with the listing and with the record of an earlier download.

        Returns:
            url, bytes and sha256 of each file.

        Raises:
            DataError: one differs; it and all after it are cut off.
        """
        known = {part["url"]: part["sha256"] for part in recorded(record)}
        parts: list[dict[str, Any]] = []
        with (
            partial.open("rb+") as whole,
            ProgressBar(f"Checking {record.stem}", sum(file.size for file in files)) as advance,
        ):
            for file in files:
                sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
                left = file.size
                while chunk := whole.read(min(left, _CHUNK)):
                    for sha in (sha256, git):
                        sha.update(chunk)
                    left -= len(chunk)
                    advance(len(chunk))
                part: dict[str, Any] = {
                    "url": self._url(file),
                    "bytes": file.size,
                    "sha256": sha256.hexdigest(),
                }
                got = part["sha256"] if len(file.digest) == 64 else git.hexdigest()
                expected = file.digest
                if got == expected:  # then also what an earlier download of the same address had
                    got, expected = part["sha256"], known.get(part["url"], part["sha256"])
                if got != expected:
                    whole.truncate(whole.tell() - file.size)
                    kind = 256 if len(got) == 64 else 1
                    raise DataError(
                        f"{part['url']}: the checksum is wrong: got SHA-{kind} {got}, expected {expected}; "
                        f"what came was thrown away. {_AGAIN}; if the hub has a new version of the file, "
                        f"delete {record} first."
                    )
                parts.append(part)
        return parts

    def _try(self, url: str, ask: Callable[[], Any], done: Callable[[], int]) -> Any:
        """Ask the hub with `keep_trying`.

        Raises:
            DataError: the hub refuses or cannot be reached.
        """

        def attempt() -> Any:
            try:
                return ask()
            except self._errors.OfflineModeIsEnabled as error:
                raise DataError(f"{url}: HF_HUB_OFFLINE is set. Fix: unset it to download.") from error
            # The library shows the errors of its HTTP client as they are; its own derive from the same base.
            # An OSError without a number is its complaint that a file came shorter than listed.
            except (self._errors.HTTPError, OSError) as error:
                status = _status(error)
                if isinstance(error, OSError) and error.errno is not None and status is None:
                    raise
                if status == 416:
                    raise DataError(
                        f"{url}: the server has fewer bytes than the hub lists. {_AGAIN} later."
                    ) from error
                if status is not None and status < 500 and status not in (408, 425, 429):
                    fix = "check the name and the address; HF_ENDPOINT sets another hub"
                    raise DataError(f"{url}: the server answered HTTP {status}. Fix: {fix}.") from error
                raise PassingError(f"HTTP {status}" if status else str(error) or repr(error)) from error

        return keep_trying(url, attempt, done)

    def _url(self, file: Listed) -> str:
        url: str = self._hub.hf_hub_url(self._repo, file.path, repo_type="dataset", endpoint=self._endpoint)
        return url


def _status(error: Exception) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


class _TooLongError(OSError):
    """The server sends more bytes than the hub lists."""


class _Bounded(io.BufferedWriter):
    """Appends to a file up to `end` bytes and reports its length."""

    def __init__(self, path: Path, end: int, report: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._end, self._report = end, report

    def write(self, data: Any) -> int:
        """Write, or raise where that would make the file longer than `end`."""
        if self.tell() + len(data) > self._end:
            raise _TooLongError("the server sends more bytes than the hub lists")
        written = super().write(data)
        self._report(self.tell())
        return written


def recorded(path: Path) -> list[dict[str, Any]]:
    """Return url, bytes and sha256 of each part of a finished download; nothing where there is no record."""
    try:
        record = json.loads(path.read_bytes())
        return [
            {"url": part["url"], "bytes": int(part["bytes"]), "sha256": part["sha256"]}
            for part in record["parts"]
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []
