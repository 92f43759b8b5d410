"""Files of results, written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, then give it that name.

    After an error or Ctrl-C `path` is as it was before, and the temporary file is removed. A crash or power failure can
    leave `.NAME.partial`, which the next call replaces. No link is followed, neither at `path` nor at the temporary.

    Raises:
        OSError: if the file cannot be written: the disk is full, or the folder does not exist or is read-only.
    """
    path = Path(path)
    partial = path.with_name(os.fsdecode(os.fsencode(f".{path.name}")[:240]) + ".partial")  # names have 255 bytes
    try:
        with suppress(FileNotFoundError):
            partial.unlink()
        # Exclusive: whatever another process puts there in between, a link for instance, is an error.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(partial, flags, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
        raise


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make renamed and removed names of a folder survive a power failure, where the system allows it."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def json_text(content: Any, indent: int | None = 2) -> str:
    """Return `content` as JSON, with null for a number that is not finite: JSON has none, and strict readers fail."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def json_bytes(content: Any) -> bytes:
    """Return the content of a JSON file."""
    return (json_text(content) + "\n").encode()


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the content of a CSV file with a header; all rows have the keys of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # names of folders need not be UTF-8


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
