"""A run whose memory does not suffice: steps are repeated on fewer images at a time."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Killed, check_equal, finetune, kill_after, share_of
from torch import Tensor, nn

import fastcure.training.run as run_module
from fastcure import CURE
from fastcure.objectives import Standard
from fastcure.objectives.cure import CUREOutput
from fastcure.schedules import schedule
from fastcure.training.epoch import train_steps
from fastcure.training.optimizer import make_optimizer
from fastcure.training.ranks import Ranks
from fastcure.training.tally import Tally

ALONE = Ranks(torch.device("cpu"))


def allocate() -> None:
    torch.empty(2**55)  # the CPU's own error


def run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")


def limit_memory(patch: pytest.MonkeyPatch, images: int, fail: Callable[[], None] = run_out) -> None:
    """Let a step of CURE fail, after its work, unless it takes at most `images` at a time."""
    forward = CURE.forward

    def limited(cure: CURE, x: Tensor, y: Tensor, index: Tensor) -> CUREOutput:
        out = forward(cure, x, y, index)
        torch.rand(1)
        if min(cure.microbatch or len(x), len(x)) > images:
            fail()
        return out

    patch.setattr(CURE, "forward", limited)


def test_the_step_is_repeated_on_fewer_images_at_a_time(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 6, allocate)
    assert finetune(npz, tmp_path / "found") == 0
    printed = capsys.readouterr().out
    assert printed.count("memory ran out in step 1 of epoch 1 of finetune") == printed.count("memory ran out") == 1
    assert "(--microbatch 5)" in printed  # 20, 10, 5
    assert finetune(npz, tmp_path / "given", "--microbatch", "5") == 0
    for name in ("original.safetensors", "model.safetensors"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    assert "memory" not in capsys.readouterr().out


def test_a_repeated_step_leaves_no_trace_of_the_first_try(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.ReLU(), nn.Linear(9, 3))
    x, y = torch.rand(3, 8, 3, 2, 2), torch.randint(3, (3, 8))
    schedules = {"lr": schedule("1e-2", 1, "lr")}
    limit_memory(monkeypatch, 3)
    found = []
    for microbatch in (None, 2):
        model = copy.deepcopy(first)
        cure, optimizer = CURE(model, batch_stats="split", microbatch=microbatch), make_optimizer(model.parameters())
        torch.manual_seed(1)  # of dropout
        work = [(i, 0.0, share_of(ALONE, x[i], y[i])) for i in range(3)]
        list(train_steps(cure, work, optimizer, schedules, Tally(torch.device("cpu")), Ranks(torch.device("cpu"))))
        assert cure.microbatch == 2  # 8, 4, 2
        found.append([*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_resumed_run_remembers_how_many(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        limit_memory(patch, 6)
        assert finetune(npz, tmp_path / "whole") == 0
        kill_after(patch, 5)
        with pytest.raises(Killed):
            finetune(npz, tmp_path / "out")
    capsys.readouterr()
    assert finetune(npz, tmp_path / "out", "--resume") == 0  # with memory for all
    assert "memory" not in capsys.readouterr().out
    check_equal(tmp_path / "out", tmp_path / "whole")


def test_microbatches_of_a_run_are_exact_up_to_rounding(npz: Path, whole: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert finetune(npz, tmp_path / "out", "--microbatch", "7") == 0
    one, two = (load_file(out / "model.safetensors") for out in (whole, tmp_path / "out"))
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-3) for name in one)


@pytest.mark.parametrize("fail", [run_out, allocate])
def test_without_memory_for_one_image_it_is_an_error(
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fail: Callable[[], None],
) -> None:
    limit_memory(monkeypatch, 0, fail)
    assert finetune(npz, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a step of CURE, even with the penalty on one image at a time: lower --batch-size" in error


def test_standard_training_needs_the_whole_batch(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Standard, "forward", lambda *_: run_out())
    assert finetune(npz, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a step of standard training on 20 images, which it takes together" in error
    assert "lower --batch-size" in error


def test_memory_that_runs_out_elsewhere_is_one_line_too(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "make_optimizer", lambda *_: run_out())
    assert finetune(npz, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "CUDA out of memory" in error
    assert "lower --batch-size, or take a smaller --model" in error


def test_other_errors_are_not_taken_for_want_of_memory(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(CURE, "forward", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        finetune(npz, tmp_path / "out")


def test_an_evaluation_takes_no_more_at_a_time_than_training(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, sizes = run_module.pgd, []

    def counted(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        sizes.append(len(x))
        return attack(model, x, y, **options)

    monkeypatch.setattr(run_module, "pgd", counted)
    assert finetune(npz, tmp_path / "out", "--microbatch", "7") == 0
    assert max(sizes) == 7
