"""Downloads public data into the cache: `get("hotpotqa")` does what `at2po data get hotpotqa` does.

1. The hub lists size and digest of each file; a listing beyond the catalog's limit is refused.
2. The bytes are appended to `NAME.KEY.part`. KEY stands for the listed sizes and digests, so a file in
   progress only ever holds bytes of one version, and its length says where to go on. A later call, or another
   process that waited for the lock, continues there.
3. Length and digest must be those of the listing, and JSON lines must begin and end with a row of their kind.
4. The file moves into its place, with a record `NAME.json` of where it came from.

Files of worlds come from addresses that list nothing; see `web`.
"""

import gzip
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, cast

from filelock import FileLock

from at2po_env.data.cache import cache_dir
from at2po_env.data.catalog import RemoteArchive, RemoteFile, RemoteFolder, RemoteUrl, files_of
from at2po_env.data.corpus import CorpusRow
from at2po_env.data.hub import Hub, Listed, recorded
from at2po_env.data.jsonl import check_ends
from at2po_env.data.progress import ProgressBar
from at2po_env.data.qa import QaRow
from at2po_env.data.web import fetch_url, unzip
from at2po_env.errors import DataError

HUB = "https://huggingface.co"
_CHUNK = 2**20

Report = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes done and the bytes in all."""


def get(name: str, *, base_url: str | None = None, progress: Report | None = None) -> list[Path]:
    """Download a data set into the cache, or do nothing where it is there already.

    Args:
        name: A question set, "wiki-18", "wiki-18-e5", "wiki-18-bm25", "webshop" (1,000 products),
            "webshop-full", "alfworld", or "all".
        base_url: The hub; `HF_ENDPOINT` by default, else https://huggingface.co.
        progress: Told about the bytes of each file; the default is a bar on standard error.

    Returns:
        The paths of the files and folders.

    Raises:
        DataError: unknown name, the hub refuses or cannot be reached, its files are not what it lists or not
            data, or there is no room.
        MissingExtraError: something has to be downloaded and huggingface_hub is not installed.
    """
    endpoint = (base_url or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    paths = []
    for wanted in files_of(name):
        target = cache_dir() / wanted.target
        with _locked(target):
            if target.is_file():
                parts = recorded(target.with_name(f"{target.name}.json"))
                expected, size = sum(part["bytes"] for part in parts), target.stat().st_size
                if parts and size != expected:
                    raise DataError(
                        f"{target} has {size} bytes, {expected} were downloaded. Fix: delete the file and "
                        "get it again."
                    )
            elif not target.exists():
                if isinstance(wanted, RemoteUrl | RemoteArchive):
                    _get_url(wanted, target, progress)
                elif isinstance(wanted, RemoteFolder):
                    _get_folder(Hub(endpoint, wanted.repo), wanted, target, progress)
                else:
                    _get_file(Hub(endpoint, wanted.repo), wanted, target, progress)
        paths.append(target)
    return paths


def _get_url(wanted: RemoteUrl | RemoteArchive, target: Path, progress: Report | None) -> None:
    file = target.with_name(f"{target.name}.zip") if isinstance(wanted, RemoteArchive) else target
    with _writing(target):
        if not file.exists():
            with _reporting(file.name, progress) as report:
                fetch_url(wanted, file, report)
        if isinstance(wanted, RemoteArchive):
            unzip(file, wanted, target)
            file.unlink()


def _get_file(hub: Hub, wanted: RemoteFile, target: Path, progress: Report | None) -> None:
    archive = target.with_name(f"{target.name}.gz") if wanted.packed else target
    if not archive.exists():
        _fetch(hub, hub.list_files(wanted), archive, progress)
    if wanted.packed:
        unpack(archive, target, limit=wanted.limit)
        archive.unlink()


def _get_folder(hub: Hub, wanted: RemoteFolder, target: Path, progress: Report | None) -> None:
    """Get the files of a folder beside its final place, and move it there when it has all of them."""
    files = hub.list_files(wanted)
    work = target.with_name(f"{target.name}.{_key(files)}.partial")
    for old in target.parent.glob(f"{target.name}.*partial"):
        if old != work:
            shutil.rmtree(old)
    work.mkdir(exist_ok=True)
    names = {file.path.removeprefix(f"{wanted.folder}/"): file for file in files}
    for name, file in names.items():
        if not (work / name).exists():
            _fetch(hub, [file], work / name, progress)
    for path in work.iterdir():
        if path.name not in names:  # records of downloads
            path.unlink()
    work.rename(target)


def _fetch(hub: Hub, files: Sequence[Listed], target: Path, progress: Report | None) -> None:
    """Download files one after the other into `target`, going on where an earlier call stopped.

    Raises:
        DataError: the hub refuses or cannot be reached, a file is not what was listed, or there is no room.
    """
    partial, record = (target.with_name(f"{target.name}.{end}") for end in (f"{_key(files)}.part", "json"))
    with _writing(partial):
        partial.touch()
        with _reporting(target.name, progress) as report:
            hub.append(files, partial, report)
        parts = hub.check(files, partial, record)
        if target.suffix == ".jsonl":
            _check_rows(partial, target, "run the same command again later; what came was thrown away")
        record.write_text(json.dumps({"parts": parts}, indent=1), "utf-8")
        os.replace(partial, target)
        for old in target.parent.iterdir():  # of versions that the hub no longer has
            if old.name.startswith(f"{target.name}.") and old.name.endswith((".part", ".part.json")):
                old.unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Report that `path` cannot be written, where the block fails for that, as a `DataError`."""
    try:
        yield
    except OSError as error:
        fix = "make room, or set AT2PO_CACHE to a folder with room, and run the same command again"
        raise DataError(f"{path}: cannot write ({error.strerror}). Fix: {fix}.") from error


@contextmanager
def _reporting(name: str, progress: Report | None) -> Iterator[Callable[[int, int | None], None]]:
    """Yield what takes the bytes of a file, done and in all, to `progress` or to a bar."""
    with ProgressBar(f"Downloading {name}", None) as bar:
        yield bar.show if progress is None else lambda done, total: progress(name, done, total)


def _key(files: Sequence[Listed]) -> str:
    return hashlib.sha256(repr(files).encode()).hexdigest()[:8]


def _check_rows(path: Path, target: Path, fix: str) -> None:
    """Check the first and last row of a file that is to become `target`; delete it where they are none."""
    model, kind = (CorpusRow, "corpus") if "corpora" in target.parts else (QaRow, "question file")
    try:
        check_ends(path, model, kind=kind)
    except DataError as error:
        path.unlink()
        raise DataError(f"{target}: what came is no {kind} ({error}). Fix: {fix}.") from error


def unpack(archive: Path, target: Path, *, limit: int) -> None:
    """Write the one file in a gzip, or in a tar archive in a gzip, to `target`, in bounded memory.

    Args:
        archive: The corpus of wiki-18 comes as a gzip of a tar archive.
        target: Appears when it is whole and checked.
        limit: The most bytes that it may have.

    Raises:
        DataError: the archive is damaged, holds no rows or too many bytes, or there is no room.
    """
    new = target.with_name(f"{target.name}.tmp")
    try:
        with (
            archive.open("rb") as raw,
            gzip.GzipFile(fileobj=raw) as packed,
            new.open("wb") as out,
            ProgressBar(f"Unpacking {archive.name}", None) as bar,
        ):
            source: IO[bytes] | None = cast(IO[bytes], packed)
            is_tar = packed.read(512)[257:262] == b"ustar"
            packed.seek(0)
            if is_tar:
                tar = tarfile.open(fileobj=packed, mode="r|")  # noqa: SIM115 - `packed` is what has to be closed
                source = next(filter(None, map(tar.extractfile, tar)), None)
            if source is None:
                raise tarfile.TarError("it holds no file")
            while chunk := source.read(_CHUNK):
                out.write(chunk)
                bar.show(raw.tell(), archive.stat().st_size)
                if out.tell() > limit:
                    raise tarfile.TarError(f"it unpacks to more than {limit:,} bytes")
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        new.unlink(missing_ok=True)
        raise DataError(f"{archive} is damaged ({error}). Fix: delete it and get it again.") from error
    except OSError as error:
        new.unlink(missing_ok=True)
        fix = "make room, or set AT2PO_CACHE to a folder with room"
        raise DataError(f"{target}: cannot unpack {archive.name} ({error.strerror}). Fix: {fix}.") from error
    _check_rows(new, target, f"delete {archive} and {archive}.json, and get them again")
    os.replace(new, target)


def _locked(target: Path) -> AbstractContextManager[object]:
    """Make the folder of `target`, and keep other processes from making `target` meanwhile.

    Raises:
        DataError: the folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(target.parent / f".{target.name}.lock").acquire()
    except OSError as error:
        fix = "set AT2PO_CACHE to a folder that can be written to"
        raise DataError(f"{target.parent}: cannot write there ({error.strerror}). Fix: {fix}.") from error
