"""JSON lines as bytes: streamed, numbered, and refused with the file, the line and the fix in the message."""

import codecs
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from at2po_env.errors import DataError

Model = TypeVar("Model", bound=BaseModel)


def bad_line(path: Path, number: int, what: str, fix: str) -> DataError:
    """Describe a line that cannot be used; number -1 is the last one."""
    return DataError(f"{path}, {f'line {number}' if number > 0 else 'last line'}: {what}. Fix: {fix}.")


def require_regular(path: Path, *, kind: str) -> None:
    """Refuse a FIFO, device, socket or folder: opening one could wait for ever, and it cannot be read twice.

    Raises:
        DataError: `path` is one of these.
        OSError: there is nothing at `path`.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}
    what = next((name for matches, name in kinds.items() if matches(mode)), "a device")
    fix = "give the path of a JSON lines file" if what == "a folder" else "write the data to a file first"
    raise DataError(f"{path}: this {kind} is {what}, expected a regular file. Fix: {fix}.")


def open_lines(path: Path, *, kind: str) -> int:
    """Check that `path` is a readable file with something in it, and return its size in bytes."""
    try:
        require_regular(path, kind=kind)
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(len(codecs.BOM_UTF8))
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{path}: cannot read this {kind} ({reason}). Fix: give the path of a JSON lines file."
        ) from error
    if not size:
        raise DataError(f"{path}, line 1: the {kind} is empty. Fix: delete the file and get it again.")
    if head == codecs.BOM_UTF8:
        fix = "save the file as UTF-8 without a byte order mark (sed -i '1s/^\\xEF\\xBB\\xBF//' FILE)"
        raise bad_line(path, 1, "the file starts with a byte order mark", fix)
    return size


def read_lines(path: Path, *, kind: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, bytes with the line end) of each line; memory is that of the longest line.

    Raises:
        DataError: unreadable or empty file, byte order mark.
    """
    open_lines(path, kind=kind)
    with path.open("rb") as file:
        yield from enumerate(file, start=1)


def check_ends(path: Path, model: type[BaseModel], *, kind: str) -> None:
    """Check that the first and the last line of a file are rows, which tells a page or a torso from data.

    Raises:
        DataError: one is not, or the file is empty.
    """
    size, longest = open_lines(path, kind=kind), 64 * 2**20
    with path.open("rb") as file:
        parse_line(model, file.readline(longest), path, 1)
        # The last line begins after the last line end but that of the file itself; look further back until it
        # shows.
        step = 2**16
        while True:
            file.seek(max(size - step, 0))
            tail = file.read().removesuffix(b"\n")
            if b"\n" in tail or step >= min(size, longest):
                break
            step *= 2
    parse_line(model, tail.rpartition(b"\n")[2], path, -1)


def parse_line(model: type[Model], line: bytes, path: Path, number: int) -> Model:
    """Parse one line as `model`.

    Raises:
        DataError: blank line, Windows line end, invalid UTF-8 or JSON, missing key, wrong type.
    """
    if line.endswith((b"\r\n", b"\r")):
        raise bad_line(
            path, number, "the line ends in CR LF", "convert the file to LF line ends (dos2unix FILE)"
        )
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        if not line.strip():
            raise bad_line(path, number, "the line is blank", "remove the blank line") from error
        form = model.model_config.get("title")
        fix = f"make it one JSON object {form} on one line, in UTF-8, or remove it"
        raise bad_line(path, number, _explain(error, line), fix) from error


def _explain(error: ValidationError, line: bytes) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] != "json_invalid":
        where = [str(part) for at, part in enumerate(first["loc"]) if at == 0 or isinstance(part, int)]
        field = ".".join(where) or "the row"
        return f"{field}: {first['msg']} (got {_short(first['input'])})"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"invalid UTF-8 at byte {bad.start} of the line ({bad.reason})"
    return f"{first['msg']} (got {_short(line.decode('utf-8'))})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
