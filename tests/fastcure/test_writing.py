"""Every file that is written: whole or not at all, where it was asked for, and JSON that strict readers take."""

import ast
import errno
import functools
import json
import math
import os
from pathlib import Path

import pytest
from small_runs import files_of_at_most, finetune, write_npz

import fastcure
from fastcure._writing import csv_bytes, json_bytes, write_whole

SOURCES = [Path(fastcure.__file__).parent, Path(__file__).parents[2] / "benchmarks"]


@pytest.mark.parametrize("before", [None, b"before"])
def test_where_a_file_cannot_be_written_nothing_changes(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "a.json"
    if before is not None:
        path.write_bytes(before)
    with files_of_at_most(10), pytest.raises(OSError, match=r"a.json cannot be written \(File too large\)"):
        write_whole(path, bytes(11))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"] * (before is not None)
    assert before is None or path.read_bytes() == before
    write_whole(path, b"after")
    assert path.read_bytes() == b"after"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left on device")])
def test_whatever_stops_a_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def fail(_: int) -> None:
        raise stop

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(stop)):
        write_whole(tmp_path / "a.json", b"after")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 255, "x" + "\u00e9" * 127, "x" * 240])
def test_long_names(tmp_path: Path, name: str) -> None:
    write_whole(tmp_path / name, b"after")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_a_crash_has_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".a.json.partial").write_bytes(b"half of")
    write_whole(tmp_path / "a.json", b"after")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["a.json", ".a.json.partial"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_planted_link_is_not_followed(tmp_path: Path, name: str, exists: bool) -> None:
    folder, victim = tmp_path / "out", tmp_path / "victim"
    folder.mkdir()
    if exists:
        victim.write_bytes(b"kept")
    (folder / name).symlink_to(victim)
    write_whole(folder / "a.json", b"after")
    assert victim.exists() == exists
    assert not exists or victim.read_bytes() == b"kept"
    assert [(entry.name, entry.is_symlink()) for entry in folder.iterdir()] == [("a.json", False)]
    assert (folder / "a.json").read_bytes() == b"after"


def test_a_link_planted_in_the_meantime_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, partial, unlink = tmp_path / "victim", tmp_path / ".a.json.partial", Path.unlink

    def plant(path: Path) -> None:
        if partial.is_symlink():
            unlink(path)
        else:
            partial.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", plant)
    with pytest.raises(OSError, match=r"a.json cannot be written \(File exists\)"):
        write_whole(tmp_path / "a.json", b"after")
    assert not list(tmp_path.iterdir())


def test_a_link_planted_in_the_folder_of_a_run_is_not_followed(tmp_path: Path) -> None:
    npz, out, victim = write_npz(tmp_path / "a.npz"), tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    for name in ("config.json", "checkpoint.safetensors", "curves.png"):
        (out / f".{name}.partial").symlink_to(victim)
    assert finetune(npz, out, "--resume") == 0
    assert not victim.exists()
    assert not [entry for entry in out.iterdir() if entry.is_symlink()]


def test_files_have_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_holds_no_nan() -> None:
    content = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": None, "d": True, "e": 2**70}

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(json_bytes(content), parse_constant=refuse)
    assert found == {"a": [1.5, None, [None, {"b": None}]], "c": None, "d": True, "e": 2**70}


def test_a_table_is_read_as_it_was_written() -> None:
    assert csv_bytes([{"a": 1, "b": "x,y"}, {"a": 0.5, "b": None}]) == b'a,b\r\n1,"x,y"\r\n0.5,\r\n'


@functools.cache
def all_calls() -> list[tuple[Path, ast.Call]]:
    paths = [path for folder in SOURCES for path in sorted(folder.rglob("*.py"))]
    trees = [(path, ast.walk(ast.parse(path.read_text()))) for path in paths]
    return [(path, node) for path, nodes in trees for node in nodes if isinstance(node, ast.Call)]


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    return [(path, call) for path, call in all_calls() if ast.unparse(call.func).split(".")[-1] == name]


def test_no_other_code_writes_json_or_files() -> None:
    """What would leave half a file, or NaN, is in no source: a new one goes through `fastcure._writing`."""
    found = [
        f"{path.name}:{call.lineno}"
        for name in ("dump", "dumps")
        for path, call in calls(name)
        if not any(word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in call.keywords)
    ]
    assert not found
    for name in ("write_text", "write_bytes", "savez", "savez_compressed", "save_file", "savetxt", "to_csv"):
        found += [f"{path.name}:{call.lineno} {name}" for path, call in calls(name)]
    for path, call in calls("open"):
        modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        if path.name not in ("_writing.py", "_process.py") and any(set(str(mode)) & set("wax") for mode in modes):
            found.append(f"{path.name}:{call.lineno} open")
    for name, place in (("torch.save", 1), ("np.save", 0), ("savefig", 0)):  # to memory alone
        found += [
            f"{path.name}:{call.lineno} {name}"
            for path, call in calls(name.split(".")[-1])
            if ast.unparse(call.func).endswith(name)
            and ast.unparse(call.args[place]) not in ("picture", "file", "content")
        ]
    assert not found
