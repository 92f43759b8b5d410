"""A run that goes on is the run that was not stopped; what is not a run is left alone."""

import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import Killed, check_equal, contents, finetune, kill_after, write_npz

from fastcure.cli import main
from fastcure.training.checkpoint import Progress, pack, unpack
from fastcure.training.run_folder import RunFolder, reserved
from fastcure.training.settings import make_settings


@pytest.fixture(scope="module")
def killed(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in fine-tuning."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 8)
        with pytest.raises(Killed):
            finetune(npz, out)
    return out


@pytest.fixture
def half(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be resumed or damaged."""
    return shutil.copytree(killed, tmp_path / "half")


@pytest.mark.parametrize("flags", [[], ["--batch-stats", "split"]], ids=["frozen", "split"])
def test_killed_after_any_step_it_ends_the_same(
    npz: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    if flags:
        whole = tmp_path / "whole"
        assert finetune(npz, whole, *flags) == 0
    random.seed(0)
    out, kills = tmp_path / "out", 0
    while True:
        with monkeypatch.context() as patch:
            kill_after(patch, random.randint(1, 3))
            try:
                status = finetune(npz, out, *flags, "--resume")
            except Killed:
                kills += 1
                continue
        break
    assert status == 0
    assert kills >= 3
    check_equal(out, whole)


def test_resume_begins_a_run_where_there_is_none(npz: Path, whole: Path, tmp_path: Path) -> None:
    assert finetune(npz, tmp_path / "out", "--resume") == 0
    check_equal(tmp_path / "out", whole)


def test_a_finished_run_stays_as_it_is(npz: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, times = contents(whole), [path.stat().st_mtime_ns for path in sorted(whole.iterdir())]
    assert finetune(npz, whole, "--resume") == 0
    assert "is finished" in capsys.readouterr().out
    assert contents(whole) == before
    assert [path.stat().st_mtime_ns for path in sorted(whole.iterdir())] == times


def test_settings_need_not_be_given_again(half: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--out", str(half), "--resume"]) == 0
    assert "resuming after 1 epochs and 2 steps of finetune" in capsys.readouterr().out
    check_equal(half, whole)


def test_without_resume_it_is_refused_and_resume_is_named(
    half: Path, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(half)
    assert finetune(npz, half) == 2
    assert "go on with the run in it by --resume" in capsys.readouterr().err
    assert contents(half) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gamma", "3"], "gamma must be '0.1' as in the run"),
        (["--epochs", "3"], "epochs must be 2 as in the run"),
        (["--seed", "1"], "seed must be 0 as in the run"),
        (["--eps", "0.1,0.2"], "eps must be [0.1] as in the run"),
        (["--no-augment"], "augment must be True as in the run"),
        (["--preset", "svhn-paper"], "preset must be None as in the run"),
        (["--limit", "10"], "got 10: leave it out, or choose another --out"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    half: Path, npz: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    before = contents(half)
    assert finetune(npz, half, "--resume", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(half) == before


def test_where_things_are_may_change(half: Path, whole: Path, tmp_path: Path) -> None:
    moved = half.rename(tmp_path / "moved")
    assert main(["finetune", "--resume", "--out", str(moved), "--device", "auto", "--data-dir", str(tmp_path)]) == 0
    check_equal(moved, whole) if not torch.cuda.is_available() else None


def test_other_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    npz, out = write_npz(tmp_path / "data.npz"), tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            finetune(npz, out)
    before = contents(out)
    write_npz(npz, seed=1)
    assert finetune(npz, out, "--resume") == 2
    assert "other images or labels" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_a_truncated_checkpoint_is_refused(
    half: Path, npz: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    path = half / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(half, npz, capsys, "cannot be read as the state of a run")


def test_a_bit_flipped_anywhere_in_a_checkpoint_is_noticed(
    half: Path, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = half / "checkpoint.safetensors"
    whole = path.read_bytes()
    unpack(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    random.seed(0)
    for end, count in ((8, 8), (header, 150), (len(whole), 50)):
        for _ in range(count):
            damaged = bytearray(whole)
            damaged[random.randrange(end)] ^= 1 << random.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="cannot be read as the state of a run"):
                unpack(path)
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    refused(half, npz, capsys, "its checksum is not that of its content): is it whole?")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (torch.arange(6, dtype=torch.int32), torch.arange(6, dtype=torch.int32).view(torch.float32)),
        (torch.arange(6), torch.arange(6).view(2, 3)),
        (torch.arange(6).view(2, 3), torch.arange(6).view(3, 2)),
    ],
    ids=["dtype", "dimensions", "shape"],
)
def test_the_same_bytes_as_another_dtype_or_shape_are_noticed(
    tmp_path: Path, written: torch.Tensor, found: torch.Tensor
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack(Progress(data=0), {"model": {"a": written}}))
    unpack(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"model/a": found}, path, metadata)
    with pytest.raises(ValueError, match="its checksum is not that of its content"):
        unpack(path)


def test_what_was_read_stays_when_the_file_changes(tmp_path: Path) -> None:
    path, value = tmp_path / "a.safetensors", torch.rand(1000)
    path.write_bytes(pack(Progress(data=0), {"model": {"a": value}}))
    _, parts = unpack(path)
    with path.open("r+b") as file:  # in place: the memory of a mapped file changes with it
        file.write(bytes(path.stat().st_size))
    assert torch.equal(parts["model"]["a"], value)


@pytest.mark.parametrize("kind", ["not safetensors", "weights", "another model's", "no optimiser", "no json"])
def test_a_foreign_checkpoint_is_refused(
    half: Path, npz: Path, whole: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = half / "checkpoint.safetensors"
    message = "cannot be read as the state of a run"
    if kind == "not safetensors":
        path.write_bytes(b"\x00" * 100)
    elif kind == "weights":
        shutil.copy(whole / "model.safetensors", path)
    elif kind == "no json":
        save_file({"model/a": torch.zeros(1)}, path, {"fastcure": "{"})
    else:
        state, parts = unpack(path)
        if kind == "no optimiser":
            parts["optimizer"] = {key: value for key, value in parts["optimizer"].items() if not key.startswith("3.")}
        else:
            parts["objective"]["model.fc.weight"] = torch.zeros(7, 7)
        path.write_bytes(pack(state, parts))
        message = "does not fit this run"
    refused(half, npz, capsys, message)


def test_a_run_without_its_state_is_refused(half: Path, npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (half / "checkpoint.safetensors").unlink()
    refused(half, npz, capsys, "checkpoint.safetensors is missing")


def test_a_run_that_was_killed_before_its_first_state_begins_again(half: Path) -> None:
    for path in half.iterdir():
        if path.name != "config.json":
            path.unlink()
    folder = RunFolder(half, resume=True)
    assert folder.begun
    assert not folder.finished


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"eps": 3}', '{"eps": [0.1], "flavour": "sweet"}'])
def test_a_config_that_is_none_is_refused(
    half: Path, npz: Path, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    (half / "config.json").write_text(config)
    refused(half, npz, capsys, "config.json")


def test_a_folder_of_other_things_is_refused(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    refused(tmp_path, npz, capsys, "without config.json: choose another")


def test_a_folder_in_use_is_refused(
    half: Path, npz: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (half, tmp_path / "new"):
        with reserved(out):
            before = contents(out)
            assert finetune(npz, out, "--resume") == 2
            error = capsys.readouterr().err
            assert error == f"fastcure: error: out must be a folder of its own, got {out}, which another run uses: " \
                "wait for it, or choose another\n"  # fmt: skip
            assert contents(out) == before
    assert not (tmp_path / "new").exists()
    assert finetune(npz, half, "--resume") == 0
    check_equal(half, whole)


def test_the_lock_of_a_folder_dies_with_its_process(tmp_path: Path) -> None:
    code = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
    code += "print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with reserved(tmp_path) as free:
            assert not free
        holder.kill()
        holder.wait()
        with reserved(tmp_path) as free:
            assert free


def test_where_folders_cannot_be_locked_none_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # NFS

    monkeypatch.setattr(fcntl, "flock", fail)
    with reserved(tmp_path / "out") as free:
        assert free
    assert not (tmp_path / "out").exists()


def refused(out: Path, npz: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    before = contents(out)
    capsys.readouterr()
    assert finetune(npz, out, "--resume") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(out) == before


CONSTANT = ["--lr", "1e-3", "--ema", "0.9", "--track", "2"]


def test_a_finished_run_that_is_prolonged_is_that_of_more_epochs(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, where no schedule depends on the number of epochs."""
    out, longer = tmp_path / "out", tmp_path / "longer"
    assert finetune(npz, out, *CONSTANT, "--epochs", "1") == 0
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", str(out), "--epochs", "2", "--seed", "1"]) == 2
    assert "seed must be 0 as in the run to be resumed" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--out", str(out), "--epochs", "2"]) == 0
    assert "prolonged to 2 epochs; its schedules are read as those of so many" in capsys.readouterr().out
    assert finetune(npz, longer, *CONSTANT) == 0
    for name in ("model.safetensors", "ema.safetensors", "original.safetensors", "history.csv", "track.csv"):
        assert (out / name).read_bytes() == (longer / name).read_bytes(), name
    assert (out / "metrics.json").read_bytes() == (longer / "metrics.json").read_bytes()
    assert make_settings({"out": str(out)}, resume=True).epochs == 2
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "is finished: nothing is left to do" in capsys.readouterr().out
    (out / "state.safetensors").unlink()
    assert main(["finetune", "--resume", "--out", str(out), "--epochs", "3"]) == 2
    assert "state.safetensors is missing" in capsys.readouterr().err


def test_a_file_of_settings_is_what_flags_override(whole: Path, tmp_path: Path) -> None:
    config = str(whole / "config.json")
    began = make_settings({"out": str(whole)}, resume=True)
    assert make_settings({}, config=config) == began
    assert make_settings({"out": "new", "gamma": "3"}, config=config) == replace(began, out="new", gamma="3")
    path = tmp_path / "some.json"
    path.write_text('{"preset": "fast", "dataset": "npz:a", "eps": [0.2], "gamma": "2"}')
    found = make_settings({"epochs": 3}, config=str(path))
    assert (found.loss_at, found.gamma, found.epochs, found.eps) == ("step", "2", 3, (0.2,))
    for text, words in (
        ('{"gama": 1}', "has 'gama', which is no setting: remove it"),
        ('{"model": "os:system"}', "names the model 'os:system', and only resnet8"),
        ('{"model": "timm:vit", "model_arg": ["checkpoint_path=a.pt"]}', "names the model 'timm:vit'"),
        ("[]", "must hold a JSON object"),
        ('{"epochs": "many"}', "epochs must be a whole number, got 'many'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            make_settings({}, config=str(path))
    with pytest.raises(FileNotFoundError, match=r"none\.json not found; give a JSON file of settings"):
        make_settings({}, config=str(tmp_path / "none.json"))
