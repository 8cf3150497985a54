"""Public data into the cache: `get("hotpotqa")` is `at2po data get hotpotqa`."""

import os
from pathlib import Path

import httpx

from at2po_env.data.cache import cache_dir
from at2po_env.data.catalog import RemoteFile, files_of
from at2po_env.data.transfer import Report, fetch, locked
from at2po_env.data.unpack import unpack

HUB = "https://huggingface.co"


def get(name: str, *, base_url: str | None = None, progress: Report | None = None) -> list[Path]:
    """Download a data set into the cache, or do nothing where it is there already.

    Args:
        name: A question set, "wiki-18", "wiki-18-e5", or "all".
        base_url: The hub; `HF_ENDPOINT` by default, else https://huggingface.co.
        progress: Told about the bytes of each file; the default is a bar on standard error.

    Returns:
        The paths of the files.

    Raises:
        DataError: unknown name, the server refuses or cannot be reached, or a checksum is wrong.
    """
    hub = (base_url or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    timeout = httpx.Timeout(60.0, connect=20.0)
    with httpx.Client(
        follow_redirects=True, timeout=timeout, headers={"Accept-Encoding": "identity"}
    ) as client:
        return [_get_file(file, hub, client, progress) for file in files_of(name)]


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
