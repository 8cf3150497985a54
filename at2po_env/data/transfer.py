"""A file over HTTP: resumed where it broke off, checked, moved into place whole.

A file in progress is `NAME.part`, with what is known of it in `NAME.part.json`; a later call, or another
process that waited for the lock, goes on from there. A finished file has a record `NAME.json` with its
size and checksums.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from at2po_env.data.progress import LateBar, progress_bar
from at2po_env.errors import DataError

TRIES = 6  # in a row without a single new byte
BACKOFF_S = 0.5
_CHUNK = 2**20

Report = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes done and the bytes in all (`None` while unknown)."""


class Part(BaseModel):
    """A finished part of a file: what was got from one URL."""

    model_config = ConfigDict(extra="forbid")

    url: str
    bytes: int
    sha256: str


class _Record(BaseModel):
    """The finished parts of a file and, while it is in progress, the validator of the part under way."""

    model_config = ConfigDict(extra="forbid")

    parts: list[Part] = []
    etag: str | None = None


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    client: httpx.Client,
    sha256: Sequence[str | None] = (),
    progress: Report | None = None,
) -> Path:
    """Download `urls` one after the other into one file, going on where an earlier call stopped.

    Args:
        urls: Where the parts of the file are.
        target: The file to make; it appears when it is whole and checked.
        client: Follows redirects.
        sha256: The digest of each part; where it is missing or `None`, the one that the hub names, else
            the one recorded when the file was first downloaded.
        progress: Told about the bytes done; the default is a bar on standard error.

    Raises:
        DataError: the server refuses or cannot be reached, a checksum is wrong, or there is no room.
    """
    with locked(target):
        record = _read(_beside(target, ".json"))
        if target.exists():
            return _present(target, record)
        known = {part.url: part.sha256 for part in record.parts} if record else {}
        given = dict(zip(urls, sha256, strict=False))
        with LateBar(f"Downloading {target.name}", None) as bar:
            show = progress or (lambda _, done, total: bar.show(done, total))
            partial = _Partial(target, urls, client, show)
            for url in urls[len(partial.state.parts) :]:
                partial.finish(url, given.get(url), known.get(url))
        partial.release()
    return target


def _present(target: Path, record: _Record | None) -> Path:
    expected = sum(part.bytes for part in record.parts) if record else None
    size = target.stat().st_size
    if expected is not None and size != expected:
        fix = "delete the file and get it again"
        raise DataError(f"{target} has {size} bytes, {expected} were downloaded. Fix: {fix}.")
    return target


class _Again(Exception):
    """The server may do better next time."""


class _Partial:
    """A file in progress, kept on disk so that another process can go on."""

    def __init__(self, target: Path, urls: Sequence[str], client: httpx.Client, show: Report) -> None:
        self.target, self._client, self._show = target, client, show
        self._path, self._state_path = _beside(target, ".part"), _beside(target, ".part.json")
        self.state = _read(self._state_path) or _Record()
        size = self._path.stat().st_size if self._path.exists() else 0
        done = [part.url for part in self.state.parts]
        if done != list(urls[: len(done)]) or size < self._base:
            self.state = _Record()
        if not self.state.parts and self.state.etag is None:
            self._path.unlink(missing_ok=True)
        self._path.touch()

    @property
    def _base(self) -> int:
        """Where the part under way begins."""
        return sum(part.bytes for part in self.state.parts)

    @property
    def _have(self) -> int:
        return self._path.stat().st_size - self._base

    def finish(self, url: str, given: str | None, known: str | None) -> None:
        """Get the rest of `url`, check it and count it as done."""
        named = self._persist(url)
        part = Part(url=url, bytes=self._have, sha256=_sha256(self._path, self._base))
        expected = given or named or known
        if expected not in (None, part.sha256):
            self._restart()
            raise DataError(
                f"{url}: the checksum is wrong: got SHA-256 {part.sha256}, expected {expected}; what came "
                "was thrown away. Fix: run the same command again; if the hub has a new version of the file, "
                f"delete {_beside(self.target, '.json')} first."
            )
        self._save(_Record(parts=[*self.state.parts, part]))

    def _persist(self, url: str) -> str | None:
        """Try until the part is there or nothing new comes; return the SHA-256 that the hub names."""
        failures = 0
        while True:
            before = self._have
            try:
                return self._stream(url)
            except (_Again, httpx.HTTPError) as error:
                failures = 0 if self._have > before else failures + 1
                if failures == TRIES:
                    raise DataError(
                        f"{url}: gave up after {TRIES} tries without a new byte ({error or error!r}); "
                        f"{self._have} bytes are kept. Fix: run the same command again, to go on from there."
                    ) from error
                time.sleep(min(BACKOFF_S * 2**failures, 30.0))
            except httpx.InvalidURL as error:
                raise DataError(f"{url} is no address ({error}). Fix: check HF_ENDPOINT.") from error
            except OSError as error:
                fix = "make room, or set AT2PO_CACHE to a folder with room, and run the same command again"
                raise DataError(f"{self._path}: cannot write ({error.strerror}). Fix: {fix}.") from error

    def _stream(self, url: str) -> str | None:
        """Append what is missing of `url`; return the SHA-256 that the hub names for it, if it does."""
        if self._have and not self.state.etag:  # nothing tells whether the rest would belong to the same file
            self._restart()
        have = self._have
        headers = {"Range": f"bytes={have}-", "If-Range": self.state.etag or ""} if have else {}
        with self._client.stream("GET", url, headers=headers) as response:
            named = _named_sha256(response)
            if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{have}":
                return named
            self._accept(response, have)
            total = response.headers.get("Content-Length")
            expected = self._path.stat().st_size + int(total) if total else None
            with self._path.open("ab") as file:
                for chunk in response.iter_raw():  # a chunk size would hold back, and lose, the last bytes
                    file.write(chunk)
                    self._show(self.target.name, file.tell(), expected)
        return named

    def _accept(self, response: httpx.Response, have: int) -> None:
        """Check the answer and make the file end where its body begins."""
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise _Again(f"HTTP {status}")
        continues = status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status in (206, 416) and not continues:
            self._restart()
            raise _Again(f"HTTP {status} with another range than asked for")
        if status not in (200, 206):
            fix = "check the name and the address; HF_ENDPOINT sets another hub"
            raise DataError(f"{response.url}: the server answered HTTP {status}. Fix: {fix}.")
        if status == 200:
            self._restart()
        etag = response.headers.get("ETag", "")
        self._save(_Record(parts=self.state.parts, etag=etag if etag.startswith('"') else None))

    def _restart(self) -> None:
        """Forget what there is of the part under way."""
        os.truncate(self._path, self._base)
        self._save(_Record(parts=self.state.parts))

    def _save(self, state: _Record) -> None:
        _write(state, self._state_path)
        self.state = state

    def release(self) -> None:
        """Record the finished file and move it to its place."""
        _write(self.state, _beside(self.target, ".json"))
        os.replace(self._path, self.target)
        self._state_path.unlink()


def _named_sha256(response: httpx.Response) -> str | None:
    """Return the digest in the hub's header for large files, which comes with the redirect to the storage."""
    for one in (*response.history, response):
        value = one.headers.get("X-Linked-ETag", "").strip('"')
        if len(value) == 64:
            return str(value)
    return None


def _sha256(path: Path, start: int) -> str:
    sha = hashlib.sha256()
    with (
        path.open("rb") as file,
        progress_bar(f"Checking {path.name}", path.stat().st_size - start) as advance,
    ):
        file.seek(start)
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            advance(len(chunk))
    return sha.hexdigest()


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _read(path: Path) -> _Record | None:
    try:
        return _Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(record: _Record, path: Path) -> None:
    new = _beside(path, ".tmp")
    new.write_text(record.model_dump_json(indent=1), "utf-8")
    os.replace(new, path)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from making `target` meanwhile; makes its folder.

    Raises:
        DataError: the folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    except OSError as error:
        fix = "set AT2PO_CACHE to a folder that can be written to"
        raise DataError(f"{target.parent}: cannot write there ({error.strerror}). Fix: {fix}.") from error
    try:
        yield
    finally:
        lock.release()
