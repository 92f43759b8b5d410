"""CIFAR-10: both official archives, packed and extracted, and what is refused (nothing is ever executed)."""

import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastcure.data import cifar10, load

ROWS = 3
Members = dict[str, bytes]


def python2_string(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text


def python2_pickle(pixels: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    """Protocol 2 as Python 2 and its numpy wrote the official files, opcode by opcode."""
    rows, columns = pixels.shape
    dtype = (
        b"cnumpy\ndtype\nq\x01U\x02u1q\x02K\x00K\x01\x87Rq\x03"
        b"(K\x03U\x01|q\x04NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01bq\x07\x87Rq\x08"
        b"(K\x01M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86"
    )
    array += dtype + b"\x89" + python2_string(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + b"".join(b"U\x05a.png" for _ in labels) + b"e"
    pairs = [(b"batch_label", python2_string(b"batch")), (b"labels", listed), (b"data", array)]
    pairs.append((b"filenames", names))
    return b"\x80\x02}(" + b"".join(python2_string(key) + value for key, value in pairs) + b"u."


def python3_pickle(pixels: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    return pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2)


def binary_records(pixels: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


def batch(index: int, rows: int = ROWS) -> tuple[np.ndarray[Any, Any], list[int]]:
    pixels = np.random.default_rng(index).integers(0, 256, (rows, 3072), np.uint8)
    return pixels, [(index + row) % 10 for row in range(rows)]


def members(encode: Callable[..., bytes], suffix: str = "") -> Members:
    return {name + suffix: encode(*batch(i)) for i, name in enumerate(cifar10.BATCHES)}


def write_archive(path: Path, folder: str, contents: Members, *, extra: list[tarfile.TarInfo] | None = None) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra or []:
            tar.addfile(info)


def write_folder(path: Path, contents: Members) -> None:
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)


PYTHON, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
FORMS = {
    "python 2": (PYTHON, "cifar-10-python.tar.gz", members(python2_pickle)),
    "python 3": (PYTHON, "cifar-10-python.tar.gz", members(python3_pickle)),
    "binary": (BINARY, "cifar-10-binary.tar.gz", members(binary_records, ".bin")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", [".", "cifar10"])
def test_reads_the_official_files(tmp_path: Path, form: str, packed: bool, place: str) -> None:
    folder, archive, contents = FORMS[form]
    (tmp_path / place).mkdir(exist_ok=True)
    if packed:
        shuffled = {"readme.html": b"<p>", **dict(reversed(contents.items())), "batches.meta": b"not read"}
        write_archive(tmp_path / place / archive, folder, shuffled)
    else:
        write_folder(tmp_path / place / folder, contents)
    data = load("cifar10", tmp_path)
    assert data.x_train.shape == (5 * ROWS, 3, 32, 32)
    assert data.x_test.shape == (ROWS, 3, 32, 32)
    pixels, labels = zip(*map(batch, range(6)), strict=True)
    assert (data.x_train.numpy().reshape(-1, 3072) == np.concatenate(pixels[:5])).all()
    assert (data.x_test.numpy().reshape(-1, 3072) == pixels[5]).all()
    assert data.y_train.tolist() == [label for part in labels[:5] for label in part]
    assert data.y_test.tolist() == labels[5]
    assert (data.num_classes, data.name) == (10, "cifar10")
    left = {path.name for path in tmp_path.rglob("*")} - {place}
    assert left == ({archive} if packed else {folder, *contents})


@pytest.mark.filterwarnings("ignore")  # of numpy, for the old module's name
def test_an_ordinary_unpickler_reads_the_python2_fixture() -> None:
    content = pickle.loads(members(python2_pickle)["data_batch_1"], encoding="bytes")
    assert (content[b"data"] == batch(0)[0]).all()
    assert content[b"labels"] == batch(0)[1]


def test_missing_files_say_where_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python.tar.gz or .*cs.toronto.edu/~kriz"):
        load("cifar10", tmp_path)
    write_folder(tmp_path / PYTHON, dict(list(members(python2_pickle).items())[:-1]))
    with pytest.raises(FileNotFoundError, match=rf"test_batch not found in {tmp_path / PYTHON}; .*kriz"):
        load("cifar10", tmp_path)


def global_call(module: str, name: str, arguments: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("numpy", "fromfile"),
        ("numpy.core.multiarray", "fromstring"),
        ("_codecs", "lookup"),
        ("fastcure.data.cifar10", "read"),
    ],
)
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, packed: bool, module: str, name: str) -> None:
    touched = tmp_path / "executed"
    order = f"touch {touched}" if name == "system" else f"open({str(touched)!r}, 'w')"
    contents = members(python2_pickle)
    contents["data_batch_3"] = global_call(module, name, python2_string(order.encode()) + b"\x85")
    if packed:
        write_archive(tmp_path / "cifar-10-python.tar.gz", PYTHON, contents)
    else:
        write_folder(tmp_path / PYTHON, contents)
    with pytest.raises(ValueError, match=f"the pickle asks for {module}.{name}: refused"):
        load("cifar10", tmp_path)
    assert not touched.exists()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_restricted(tmp_path: Path, protocol: int) -> None:
    touched = tmp_path / "executed"
    contents = members(python2_pickle)
    contents["data_batch_1"] = pickle.dumps({b"data": Touch(touched)}, protocol=protocol)
    write_folder(tmp_path / PYTHON, contents)
    with pytest.raises(ValueError, match=r"the pickle asks for .*: refused"):
        load("cifar10", tmp_path)
    assert not touched.exists()
    pickle.loads(contents["data_batch_1"])  # it was dangerous
    assert touched.exists()


KEPT = b"cnumpy\nndarray\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}.",
        b"\x80\x02N.",
        b"\x80\x02](" + KEPT + b"e.",
        b"\x80\x02" + KEPT + b"}U\x0c__setstate__Nsb.",  # sets an attribute of the class itself
        b"\x80\x02" + KEPT + b"N}U\x0c__setstate__Ns\x86b.",
        b"\x80\x02c_codecs\nencode\n}U\x01aNsb.",
        b"\x80\x02}r\xff\xff\xff\xff.",  # memo entry 2^32 - 1 would take 64 GiB
        b"\x80\x02}p4294967295\n.",
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"\x80\x02Pfile\n.",
        b"",
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, "a"]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3000), np.uint8), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((3072, 2), np.uint8).T, b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.array([[None] * 3072] * 2), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2**70]}, protocol=2),
        members(python2_pickle)["data_batch_1"].replace(b"M\x00\x0c", b"M\x00\x0d"),
        members(python2_pickle)["data_batch_1"][:-9],
        members(python2_pickle)["data_batch_1"][:500],
    ],
)
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path / PYTHON, {**members(python2_pickle), "data_batch_2": content})
    kept = dict(vars(cifar10._Kept))
    with pytest.raises(ValueError, match=f"{tmp_path / PYTHON / 'data_batch_2'}: ") as error:
        load("cifar10", tmp_path)
    assert "\n" not in str(error.value)
    assert dict(vars(cifar10._Kept)) == kept


@pytest.mark.parametrize("store", [lambda index: b"r" + struct.pack("<I", index), lambda index: b"p%d\n" % index])
def test_the_memo_is_no_larger_than_the_file(tmp_path: Path, store: Callable[[int], bytes]) -> None:
    """The unpickler's memo is an array up to the largest index: 8 bytes an entry, for which a file needs 5."""
    whole = members(python2_pickle)["data_batch_2"]
    length = len(whole) + len(store(len(whole) + 8))
    write_folder(tmp_path / PYTHON, members(python2_pickle))
    path = tmp_path / PYTHON / "data_batch_2"
    for index, fits in ((length, True), (length + 1, False), (10_000_000, False), (2**32 - 1, False)):
        content = whole[:3] + store(index) + whole[3:]
        path.write_bytes(content + b"." * (length - len(content)) if index > length + 1 else content)
        assert index > length + 1 or len(content) == length
        if fits:
            assert load("cifar10", tmp_path).x_train.shape == (5 * ROWS, 3, 32, 32)
        else:
            with pytest.raises(ValueError, match=f"data_batch_2: the pickle asks for memo entry {index:,}: refused"):
                load("cifar10", tmp_path)


def test_damaged_records(tmp_path: Path) -> None:
    contents = members(binary_records, ".bin")
    contents["data_batch_2.bin"] = contents["data_batch_2.bin"][:-1]
    write_folder(tmp_path / BINARY, contents)
    with pytest.raises(ValueError, match=r"data_batch_2.bin: a batch of 9,218 bytes is not a whole number"):
        load("cifar10", tmp_path)


def test_labels_out_of_range(tmp_path: Path) -> None:
    contents = members(binary_records, ".bin")
    contents["data_batch_2.bin"] = b"\x0a" + contents["data_batch_2.bin"][1:]
    write_folder(tmp_path / BINARY, contents)
    with pytest.raises(ValueError, match=r"train labels must lie in 0\.\.9, got 0\.\.10"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -200])
def test_truncated_archive(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    write_archive(path, PYTHON, members(python2_pickle))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path}: ") as error:
        load("cifar10", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(binary_records(*batch(5)))
    contents = members(binary_records, ".bin")
    contents["other.bin"] = contents.pop("test_batch.bin")
    link = tarfile.TarInfo(f"{BINARY}/test_batch.bin")
    link.type = kind
    link.linkname = str(secret) if kind == tarfile.SYMTYPE else f"{BINARY}/other.bin"
    write_archive(tmp_path / "cifar-10-binary.tar.gz", BINARY, contents, extra=[link])
    with pytest.raises(ValueError, match=f"{BINARY}/test_batch.bin is not a regular file"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("folder", ["..", f"../{BINARY}", f"/{BINARY}", f"./{BINARY}", f"{BINARY}/../{BINARY}"])
def test_other_paths_are_ignored_and_nothing_is_extracted(tmp_path: Path, folder: str) -> None:
    archive = tmp_path / "data" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    write_archive(archive, folder, members(binary_records, ".bin"))
    with pytest.raises(ValueError, match=f"{archive}: lacks {BINARY}/data_batch_1.bin, "):
        load("cifar10", archive.parent)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [archive.name]


def test_large_members_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    info = tarfile.TarInfo(f"{BINARY}/data_batch_1.bin")
    info.size = 1 << 40
    path.write_bytes(gzip.compress(info.tobuf()))
    with pytest.raises(ValueError, match="a batch of 1,099,511,627,776 bytes, more than the 33,554,432"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_gzip_bomb_is_not_inflated(tmp_path: Path, kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """tarfile reads extended headers into memory whole, whatever size they announce."""
    path = tmp_path / "cifar-10-binary.tar.gz"
    info = tarfile.TarInfo("anything")
    info.size, info.type = 1 << 26, kind
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 26))
    monkeypatch.setattr(cifar10._CappedGzip, "left", 1 << 22)
    tracemalloc.start()
    with pytest.raises(ValueError, match="inflates to more than six batches"):
        load("cifar10", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24
