"""Small files that would take gigabytes: refused before they are inflated. Foreign and hostile weights and images."""

import gzip
import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import finetune, write_npz
from torch import nn

from fastcure.data import load
from fastcure.data.files import expansion_limit, read_exactly
from fastcure.models.weights import load_weights
from fastcure.training.checkpoint import Progress, pack, unpack
from fastcure.training.run import Run


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))


def deflated(path: Path, size: int) -> Path:
    """Weights whose members are compressed, as torch.save never does, with a storage of `size` zeros."""
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            content = source.read(member)
            target.writestr(member.filename, bytes(size) if member.filename.endswith("data/0") else content)
    return path


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where torch gets to read a checkpoint."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "load", fail)


@pytest.mark.usefixtures("unread")
def test_a_deflated_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    path = deflated(tmp_path / "bomb.pt", 1 << 27)
    assert path.stat().st_size < 1 << 18
    with pytest.raises(ValueError, match=r"its members announce 134,2.* bytes, more than the .* of the whole file"):
        load_weights(nn.Linear(2, 2), path)


def test_a_checkpoint_of_one_member_under_many_names_is_refused(tmp_path: Path) -> None:
    """Without compression, entries of the directory that share their bytes."""
    path = tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(1 << 18)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        at, count = archive.start_dir, len(archive.infolist())
    end = content.rindex(b"PK\x05\x06")
    directory = content[at:end]
    if b"PK\x06\x06" in directory:
        directory = directory[: directory.index(b"PK\x06\x06")]
    many = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count * 50, count * 50, len(directory) * 50, at, 0)
    path.write_bytes(content[:at] + directory * 50 + many)
    with pytest.raises(ValueError, match="its members announce 52,4"):
        load_weights(nn.Linear(2, 2), path)


@pytest.mark.parametrize("new", [True, False])
def test_a_bytearray_in_a_pickle_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool) -> None:
    class Long:
        def __reduce__(self) -> tuple[Any, ...]:
            return bytearray, (1 << 40,)

    torch.save({"weight": Long()}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match="its pickle asks for a bytearray"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.pt")


def test_what_is_no_weights_gets_no_dangerous_advice(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"weight": Path("x")}, path)
    with pytest.raises(ValueError, match=r"it asks for pathlib\S*, which is no data\): give a whole file") as error:
        load_weights(nn.Linear(2, 2), path)
    assert "weights_only" not in str(error.value)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"it is not a file of torch\.save") as error:
        load_weights(nn.Linear(2, 2), path)
    assert "weights_only" not in str(error.value)


def npz_bomb(path: Path) -> str:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4096, 32, 1024, 1), }"
    with zipfile.ZipFile(path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x_train.npy", "w") as file:
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
            for _ in range(128):
                file.write(bytes(1 << 20))
        for name in ("y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", b"")
    return f"npz:{path / 'bomb.npz'}"


def idx_bomb(path: Path) -> str:
    from fastcure.data.fashion_mnist import FILES

    with gzip.open(path / f"{FILES[0]}.gz", "wb", 1) as file:
        file.write(struct.pack(">4I", 0x0803, 175_000, 28, 28))
        for _ in range(125):
            file.write(bytes(784 * 1400))
    for name in FILES[1:]:
        (path / f"{name}.gz").write_bytes(gzip.compress(b""))
    return "fashion-mnist"


def mat_bomb(path: Path) -> str:
    packer = zlib.compressobj(1)
    bomb = packer.compress(struct.pack("<2I", 14, 1 << 27))
    for _ in range(128):
        bomb += packer.compress(bytes(1 << 20))
    bomb += packer.flush()
    head = bytes(124) + b"\x00\x01IM"
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (path / name).write_bytes(head + struct.pack("<2I", 15, len(bomb)) + bomb)
    return "svhn"


@pytest.mark.parametrize("make", [npz_bomb, idx_bomb, mat_bomb])
def test_a_bomb_takes_no_more_than_its_size_allows(tmp_path: Path, make: Any) -> None:
    """A file of half a megabyte that inflates to 128: it may take 64."""
    name = make(tmp_path)
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 640 << 10
    tracemalloc.start()
    with pytest.raises(ValueError, match="announces"):
        load(name, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 140 << 20  # zlib has its parts and their whole


def test_a_payload_may_be_as_long_as_the_limit_and_no_longer() -> None:
    assert read_exactly(io.BytesIO(b"1234"), 4, most=4) == b"1234"
    with pytest.raises(ValueError, match=r"announces 5 bytes; allowed are 0\.\.4"):
        read_exactly(io.BytesIO(b"12345"), 5, most=4)


def test_the_limit_follows_the_file() -> None:
    assert expansion_limit(0) == expansion_limit(1000) == 64 << 20
    assert expansion_limit(1 << 20) == 100 << 20
    assert expansion_limit(1 << 40) == 2 << 30


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt does not fit the model: it holds no tensors"):
        load_weights(network(), tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": "1"}, "epoch must be a whole number, got '1'"),
        ({"epoch": -1}, "epoch must be >= 0, got -1"),
        ({"step": 1.5}, "step must be a whole number, got 1.5"),
        ({"phase": "coffee"}, "phase must be one of pretrain, finetune, got 'coffee'"),
        ({"phase": None}, "phase must be text, got None"),
        ({"data": []}, "data must be a whole number"),
        ({"before": []}, "before must be a table of names and values or nothing, got []"),
        ({"history": {"a": 1}}, "history must be a list"),
        ({"history": [1]}, "history must be a list"),
        ({"history": [{"a": 1}, {"b": 1}]}, "history must have the same columns in each row"),
        ({"track": [{"a": 1}, {}]}, "track must have the same columns in each row"),
        ({"seconds": {"finetune": "long"}}, "seconds must be a table"),
        ({"history": [{"a": [1]}]}, "history must hold numbers and words, in each row"),
        ({"phase": "finetune"}, "before must hold accuracies, clean and pgd, got None"),
        (
            {"before": {"clean": "x", "pgd": 3}},
            "before must hold accuracies, clean and pgd, got {'clean': 'x', 'pgd': 3}",
        ),
        ({"microbatch": 0}, "microbatch must be >= 1, got 0"),
    ],
)
def test_a_run_state_of_wrong_types(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(pack(Progress(**{"data": 1, **changes}), {"model": {"a": torch.zeros(2)}}))
    with pytest.raises(ValueError, match="cannot be read as the state of a run") as error:
        unpack(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("random", "loader", torch.zeros(5056)),
        ("random", "torch", torch.zeros(10, dtype=torch.uint8)),
        ("tally", "numbers", torch.zeros(3)),
        ("optimizer", "x.y", torch.zeros(1)),
        ("optimizer", "99.exp_avg", torch.zeros(1)),
        ("objective", "more", torch.zeros(1)),
        ("progress", "epoch", 100),
        ("progress", "step", 4),
    ],
)
def test_a_run_state_that_does_not_fit_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    name: str,
    value: Any,
) -> None:
    def stop(_: Run) -> None:
        raise KeyboardInterrupt

    npz, out = write_npz(tmp_path / "a.npz"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_pause", stop)
        assert finetune(npz, out) == 130
    capsys.readouterr()
    progress, parts = unpack(out / "checkpoint.safetensors")
    if part == "progress":
        setattr(progress, name, value)
    else:
        parts.setdefault(part, {})[name] = value
    (out / "checkpoint.safetensors").write_bytes(pack(progress, parts))
    assert finetune(npz, out, "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastcure: error: {out / 'checkpoint.safetensors'} does not fit this run: ")
    assert error.count("\n") == 1
