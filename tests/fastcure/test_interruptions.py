"""Whatever stops a run, nothing that was saved is lost: kills in the midst of a write, full disks, signals."""

import errno
import os
import random
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from kill_and_resume import kill_and_resume
from small_runs import SMALL, Killed, check_equal, contents, finetune
from torch import Tensor, nn

import fastcure.training.run as run_module
from fastcure.training.interrupt import Interrupted, Interruption
from fastcure.training.run import Run


def fail_at(patch: pytest.MonkeyPatch, syncs: int, fail: Callable[[], None]) -> None:
    """Fail while the `syncs`-th file or folder is written, with a random part of a file on the disk."""
    sync, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == syncs:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                os.ftruncate(descriptor, random.randint(0, status.st_size))
            fail()
        sync(descriptor)

    patch.setattr(os, "fsync", failing)


def die() -> None:
    raise Killed


def run_out_of_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_byte_of_any_write(
    npz: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random.seed(seed)
    kills, status = 0, None
    while status is None and kills < 500:  # far more than it takes
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "SAVE_EVERY", -1.0)  # after every step
            fail_at(patch, random.randint(1, 20), die)
            try:
                status = finetune(npz, tmp_path / "out", "--resume")
            except Killed:
                kills += 1
    assert status == 0
    assert kills >= 3
    check_equal(tmp_path / "out", whole)


def test_a_full_disk_loses_nothing(
    npz: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random.seed(0)
    faults, status = 0, 2
    while status and faults < 500:  # far more than it takes
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "SAVE_EVERY", -1.0)
            fail_at(patch, random.randint(1, 20), run_out_of_space)
            status = finetune(npz, tmp_path / "out", "--resume")
        error = capsys.readouterr().err
        if status:
            faults += 1
            assert status == 2
            assert error.count("\n") == 1
            assert "cannot be written (No space left on device)" in error
            assert "what was saved before is whole" in error
            assert not [name for name in contents(tmp_path / "out") if name.endswith(".partial")]
    assert faults >= 3
    check_equal(tmp_path / "out", whole)


def test_a_file_that_may_not_grow(npz: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No mock: the system refuses what is beyond 100 kB, which is in the midst of the first checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert finetune(npz, tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint.safetensors cannot be written (File too large)" in capsys.readouterr().err
    assert list(contents(tmp_path / "out")) == ["config.json"]
    assert finetune(npz, tmp_path / "out", "--resume") == 0
    check_equal(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 5), (signal.SIGTERM, 143, 9)],
)
def test_a_signal_in_training(
    npz: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
    step: int,
) -> None:
    pause, taken = Run._pause, []

    def signalled(run: Run) -> None:
        taken.append(1)
        if len(taken) == step:
            signal.raise_signal(number)
        pause(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_pause", signalled)
        assert finetune(npz, tmp_path / "out") == status
    assert len(taken) == step  # that step was the last
    error = capsys.readouterr().err
    assert error == f"fastcure: stopped by {number.name}: the same command with --resume goes on\n"
    monkeypatch.setattr(Run, "_pause", lambda run: (taken.append(1), pause(run)))
    assert finetune(npz, tmp_path / "out", "--resume") == 0
    assert len(taken) == 9  # none was taken twice
    check_equal(tmp_path / "out", whole)


def test_a_signal_in_any_epoch_leaves_the_track_as_it_would_be(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune(npz, tmp_path / "whole", "--track", "8") == 0
    pause = Run._pause
    for step in (4, 6):  # the first and the last of the first epoch of CURE
        taken: list[int] = []

        def signalled(run: Run, step: int = step, taken: list[int] = taken) -> None:
            taken.append(1)
            if len(taken) == step:
                signal.raise_signal(signal.SIGTERM)
            pause(run)

        out = tmp_path / f"stopped-{step}"
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_pause", signalled)
            assert finetune(npz, out, "--track", "8") == 143
        assert finetune(npz, out, "--resume") == 0
        assert contents(out).keys() == contents(tmp_path / "whole").keys()
        for name in ("track.csv", "history.csv"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        epochs = [line.split(",")[0] for line in (out / "track.csv").read_text().splitlines()]
        assert epochs == ["epoch", "0", "1", "2"]


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_signal_in_an_evaluation(
    npz: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    attack, calls = run_module.pgd, []

    def signalled(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return attack(model, x, y, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "pgd", signalled)
        assert finetune(npz, tmp_path / "out") == 143
    assert finetune(npz, tmp_path / "out", "--resume") == 0
    check_equal(tmp_path / "out", whole)


def test_the_second_signal_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(patient=False) as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.value.status == 130
        with pytest.raises(Interrupted) as stop:
            interruption.check()
        assert stop.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with Interruption(patient=True) as interruption:  # under torchrun, which repeats itself
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal == signal.SIGINT


@pytest.mark.slow
def test_sigkill_at_random_moments(npz: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    runs, equal = kill_and_resume(tmp_path, ["--dataset", f"npz:{npz}", *SMALL], kills=1, seed=0, say=lines.append)
    assert equal == runs >= 1
    assert lines[-1] == f"1 kills in {runs} runs: {runs} of {runs} equal"
