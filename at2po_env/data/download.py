"""Public data into the cache: `get("hotpotqa")` is `at2po data get hotpotqa`."""

import os
from pathlib import Path

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from at2po_env.data.cache import cache_dir
from at2po_env.data.catalog import RemoteFile, RemoteFolder, files_of
from at2po_env.data.transfer import Report, fetch, locked
from at2po_env.data.unpack import unpack
from at2po_env.errors import DataError

HUB = "https://huggingface.co"


class _Linked(BaseModel):
    oid: str


class _Listed(BaseModel):
    """One entry of what the hub says a folder has; large files have their SHA-256 in `lfs`."""

    type: str
    path: str
    lfs: _Linked | None = None


def get(name: str, *, base_url: str | None = None, progress: Report | None = None) -> list[Path]:
    """Download a data set into the cache, or do nothing where it is there already.

    Args:
        name: A question set, "wiki-18", "wiki-18-e5", "wiki-18-bm25", or "all".
        base_url: The hub; `HF_ENDPOINT` by default, else https://huggingface.co.
        progress: Told about the bytes of each file; the default is a bar on standard error.

    Returns:
        The paths of the files and folders.

    Raises:
        DataError: unknown name, the server refuses or cannot be reached, or a checksum is wrong.
    """
    hub = (base_url or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    timeout = httpx.Timeout(60.0, connect=20.0)
    with httpx.Client(
        follow_redirects=True, timeout=timeout, headers={"Accept-Encoding": "identity"}
    ) as client:
        return [
            _get_folder(one, hub, client, progress)
            if isinstance(one, RemoteFolder)
            else _get_file(one, hub, client, progress)
            for one in files_of(name)
        ]


def _get_file(file: RemoteFile, hub: str, client: httpx.Client, progress: Report | None) -> Path:
    target = cache_dir() / file.target
    urls = [f"{hub}/datasets/{file.repo}/resolve/main/{part}" for part in file.parts]
    if not file.packed:
        return fetch(urls, target, client=client, sha256=file.sha256, progress=progress)
    with locked(target):
        if not target.exists():
            packed = target.with_name(f"{target.name}.gz")
            unpack(fetch(urls, packed, client=client, sha256=file.sha256, progress=progress), target)
            packed.unlink()
    return target


def _get_folder(folder: RemoteFolder, hub: str, client: httpx.Client, progress: Report | None) -> Path:
    """Get the files of a folder beside its final place, and move it there when it has all of them."""
    target = cache_dir() / folder.target
    with locked(target):
        if target.exists():
            return target
        work = target.with_name(f"{target.name}.partial")
        work.mkdir(exist_ok=True)
        listed = _list(folder, hub, client, progress, work)
        for name, sha256 in listed.items():
            url = f"{hub}/datasets/{folder.repo}/resolve/main/{folder.folder}/{name}"
            fetch([url], work / name, client=client, sha256=[sha256], progress=progress)
        for path in work.iterdir():
            if path.name not in listed:  # records of downloads
                path.unlink()
        work.rename(target)
    return target


def _list(
    folder: RemoteFolder, hub: str, client: httpx.Client, progress: Report | None, work: Path
) -> dict[str, str | None]:
    """Return the names of the files in a folder of the hub, with their digests where it says them.

    Raises:
        DataError: the hub cannot be reached, or its answer is not such a list.
    """
    listing, url = work / ".files", f"{hub}/api/datasets/{folder.repo}/tree/main/{folder.folder}"
    for old in work.glob(".files*"):
        old.unlink()
    fetch([url], listing, client=client, progress=progress)
    try:
        entries = TypeAdapter(list[_Listed]).validate_json(listing.read_bytes())
    except ValidationError as error:
        raise DataError(f"{url}: the hub's answer is not a list of files. Fix: try again later.") from error
    files = {entry.path.removeprefix(f"{folder.folder}/"): entry for entry in entries if entry.type == "file"}
    names = [name for name in files if name != "write.lock"]
    if not names or any("/" in name or "\\" in name or name.startswith(".") for name in names):
        raise DataError(f"{url}: the hub lists no files, or files in other folders. Fix: get it by hand.")
    return {name: linked.oid if (linked := files[name].lfs) else None for name in names}
