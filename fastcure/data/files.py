"""Files made elsewhere: found by their official names, read within bounds, refused in one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path
from typing import Protocol

MAX_BYTES = 2 << 30  # of one array: nine times the largest official one
_CHUNK = 1 << 20


def expansion_limit(size: int) -> int:
    """Return how many bytes a compressed file of ``size`` bytes may inflate to.

    Images and labels shrink to a tenth at best; zeros, of which bombs are made, to a thousandth.
    """
    return min(MAX_BYTES, max(64 << 20, 100 * size))


class Readable(Protocol):
    """The one method that a bounded read needs."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102


def find(folders: Sequence[Path], wanted: Sequence[Sequence[str]], source: str) -> list[Path]:
    """Find every wanted file in ONE of the folders, the first that holds any of them.

    Args:
        folders: where to look.
        wanted: for each file its possible names, the first being the official one.
        source: where the files come from, for the error.

    Raises:
        FileNotFoundError: naming the first missing file, the folders and the source.
    """
    for folder in folders:
        found = [next((folder / n for n in names if (folder / n).is_file()), None) for names in wanted]
        if any(found):
            folders = [folder]  # never half a dataset from here and half from there
            break
    paths = [path for path in found if path]
    if len(paths) < len(wanted):
        name = next(names[0] for names, path in zip(wanted, found, strict=True) if not path)
        raise missing(name, folders, source)
    return paths


def missing(name: str, folders: Sequence[Path], source: str) -> FileNotFoundError:
    """The error for a file that is in none of the folders."""
    return FileNotFoundError(f"{name} not found in {', '.join(map(str, folders))}; get it from {source}")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes into a one-line ValueError naming the file."""
    try:
        yield
    except Exception as error:  # zlib, gzip, tarfile, zipfile and pickle each raise their own
        if isinstance(error, OSError) and error.errno not in (None, EINVAL):
            raise  # the system's word (permissions, input/output); EINVAL comes of lying offsets
        if isinstance(error, FileNotFoundError | ConnectionError | ModuleNotFoundError):
            raise  # says what is not there
        text = " ".join(str(error).split())
        if type(error) is not ValueError:
            text = f"damaged, or not what its name says ({type(error).__name__}: {text})"
        raise ValueError(f"{path}: {text}") from error


def read_exactly(file: Readable, size: int, most: int = MAX_BYTES) -> bytearray:
    """Read a payload of ``size`` bytes, and never more than one byte beyond it.

    Memory grows with what the file really holds, not with what it announces.

    Raises:
        ValueError: ``size`` exceeds ``most``, or the file goes on for longer or stops before.
    """
    if not 0 <= size <= most:
        raise ValueError(f"announces {size:,} bytes; allowed are 0..{most:,}")
    data = bytearray()
    while chunk := file.read(min(_CHUNK, size + 1 - len(data))):
        data += chunk
    if len(data) != size:
        found = f"only {len(data):,}" if len(data) < size else "more"
        raise ValueError(f"announces {size:,} bytes and holds {found}")
    return data
