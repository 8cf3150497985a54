"""The items of a JSON array, one at a time, from a file of any size."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from at2po_env.errors import DataError

_CHUNK = 2**20
_SKIP = re.compile(r"[\s,]*")
_FOLLOWS = re.compile(r"\s*[,\]]")
_decode = json.JSONDecoder().raw_decode


def read_array(path: Path, key: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, item) of the array in `path`, or of the array under `key` of the object in it.

    Memory is that of a few items. What stands before and after the array is not looked at.

    Raises:
        DataError: no array, or one that is damaged or cut short; names the item.
    """
    start = re.compile(rf'"{key}"\s*:\s*\[' if key else r"\s*\[")
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHUNK)
            found = start.search(text) if key else start.match(text)
            if not found:
                raise DataError(f"{path}: no JSON array{f' {key!r}' if key else ''} at its beginning. {_FIX}")
            for item in _items(file, text[found.end() :]):
                number += 1
                yield number, item
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}, item {number + 1}: cannot be read ({error}). {_FIX}") from error


def _items(file: IO[str], text: str) -> Iterator[Any]:
    at = 0
    while True:
        skipped = _SKIP.match(text, at)
        at = skipped.end() if skipped else at
        if text[at : at + 1] == "]":
            return
        try:
            item, end = _decode(text, at)
            whole = _FOLLOWS.match(text, end)  # else a number at the end of the text may go on
        except json.JSONDecodeError:
            whole = None
        if whole:
            yield item
            at = end
            continue
        more = file.read(max(_CHUNK, len(text) - at))  # doubling, so that a huge item costs linear time
        if not more:
            _decode(text, at)  # raises, unless only what follows is missing
            raise json.JSONDecodeError("no comma or closing bracket follows", text, len(text))
        text, at = text[at:] + more, 0


_FIX = "Fix: get the original file again."
