"""A run whose steps are not finite."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import COMPARED, Killed, check_equal, contents, finetune, history, kill_after, share_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcure.training.run as run_module
from fastcure import CURE
from fastcure.models import resnet8
from fastcure.objectives import Standard
from fastcure.objectives.cure import CUREOutput
from fastcure.schedules import schedule
from fastcure.training.epoch import train_steps
from fastcure.training.optimizer import make_optimizer
from fastcure.training.ranks import Ranks
from fastcure.training.tally import Tally

Forward = Callable[[CURE, Tensor, Tensor], CUREOutput]
ALONE = Ranks(torch.device("cpu"))


def lost_gradient(out: CUREOutput, cure: CURE) -> CUREOutput:
    """Loss and penalty are finite; the gradient is not."""
    weight = next(cure.parameters())
    return out._replace(total=out.total + (weight * 0).sqrt().sum())


POISONS: dict[str, Callable[[CUREOutput, CURE], CUREOutput]] = {
    "loss": lambda out, _: out._replace(total=out.total * torch.nan, loss=out.loss * torch.nan),
    "penalty": lambda out, _: out._replace(total=out.total + torch.inf, penalty=out.penalty + torch.inf),
    "gradient": lost_gradient,
}


def poison(patch: pytest.MonkeyPatch, where: Callable[[int, Tensor], bool], kind: str = "loss") -> None:
    """Spoil the steps of CURE for which `where(how many there were, x)`."""
    forward, steps = CURE.forward, []

    def poisoned(cure: CURE, x: Tensor, y: Tensor, index: Tensor) -> CUREOutput:
        steps.append(1)
        out = forward(cure, x, y, index)
        return POISONS[kind](out, cure) if where(len(steps), x) else out

    patch.setattr(CURE, "forward", poisoned)


def every_third(_: int, x: Tensor) -> bool:
    """A property of the batch itself, which a resumed run meets again."""
    return int(x.double().sum() * 1000) % 3 == 0


@pytest.mark.parametrize(
    ("kind", "values", "look"),
    [("loss", "loss nan, penalty ", 1), ("penalty", "penalty inf ", 50), ("gradient", "a gradient of norm nan", 50)],
)
def test_the_first_step_that_is_not_finite_stops_the_run(
    npz: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    values: str,
    look: int,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "LOOK_EVERY", {"cpu": look})  # 50: as on a GPU, at the end of the epoch
        poison(patch, lambda step, _: step in (5, 6), kind)
        assert finetune(npz, out) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastcure: error: batch 2 of 3 in epoch 2 of finetune had loss ")
    assert values in error
    assert error.endswith("lower --lr or --gamma, or let gamma climb from 0; or leave such batches out, by --resume "
                          "--non-finite skip\n")  # fmt: skip
    assert finetune(npz, out, "--resume") == 0  # what was saved is from before it
    check_equal(out, whole)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_they_are_skipped_and_counted(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    poison(monkeypatch, lambda step, _: step in (4, 6), kind)
    assert finetune(npz, tmp_path / "out", "--non-finite", "skip") == 0
    rows = history(tmp_path / "out")
    assert [row["skipped"] for row in rows] == ["0", "0", "2"]
    assert all(torch.tensor([float(row["loss"]), float(row["penalty"])]).isfinite().all() for row in rows)
    assert capsys.readouterr().out.count("skipped 2 of 3 steps") == 1


def test_with_skipped_steps_a_killed_run_ends_the_same(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, every_third)
    assert finetune(npz, tmp_path / "whole", "--non-finite", "skip") == 0
    assert sum(int(row["skipped"]) for row in history(tmp_path / "whole")) in range(1, 5)
    random.seed(0)
    kills, status = 0, None
    while status is None and kills < 100:
        with monkeypatch.context() as patch:
            kill_after(patch, random.randint(1, 3))
            try:
                status = finetune(npz, tmp_path / "out", "--non-finite", "skip", "--resume")
            except Killed:
                kills += 1
    assert status == 0
    assert kills >= 3
    check_equal(tmp_path / "out", tmp_path / "whole")


def test_a_run_that_stopped_may_go_on_with_skipping(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, every_third)
    assert finetune(npz, tmp_path / "whole", "--non-finite", "skip") == 0
    assert finetune(npz, tmp_path / "out") == 1
    assert finetune(npz, tmp_path / "out", "--resume", "--non-finite", "skip") == 0
    check_equal(tmp_path / "out", tmp_path / "whole")


def test_an_epoch_of_nothing_else_stops_the_run(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda step, _: step > 3)
    assert finetune(npz, tmp_path / "out", "--non-finite", "skip") == 1
    error = capsys.readouterr().err
    assert "batch 1 of 3 in epoch 2 of finetune had loss nan" in error
    assert "and all others of the epoch were skipped like it" in error


@pytest.mark.parametrize("objective", [Standard, CURE, "split"])
def test_a_skipped_step_leaves_no_trace(objective: Any) -> None:
    torch.manual_seed(0)
    first = resnet8(num_classes=3)
    x, y = torch.rand(3, 6, 3, 8, 8), torch.randint(3, (3, 6))
    schedules = {"lr": schedule("1e-2", 1, "lr")}
    found = []
    for batches in ([0, 1, 2], [0, 2]):
        model = copy.deepcopy(first)
        wrapped = CURE(model, batch_stats="split") if objective == "split" else objective(model)
        optimizer, tally = make_optimizer(model.parameters()), Tally(torch.device("cpu"))
        work = [(i, 0.0, share_of(ALONE, x[i] * (torch.nan if i == 1 else 1), y[i])) for i in batches]
        list(train_steps(wrapped, work, optimizer, schedules, tally, Ranks(torch.device("cpu"))))
        found.append([*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())])
        bad = tally.first_bad()
        assert (bad and bad.step) == (1 if 1 in batches else None)
        assert tally.numbers[3] == 12
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class Reads(TorchDispatchMode):
    """Counts the numbers that Python takes out of tensors: each would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Plain(Standard):
    """Without the look at the labels, which is for the CPU alone."""

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> CUREOutput:
        logits = self.model(x)
        loss = nn.functional.cross_entropy(logits, y)
        return CUREOutput(loss, loss, torch.zeros(()), logits)


def test_no_step_reads_a_value() -> None:
    x, y = torch.rand(3, 6, 3, 8, 8), torch.randint(3, (3, 6))
    x[1] = torch.nan
    model, tally, cpu = resnet8(num_classes=3), Tally(torch.device("cpu")), torch.device("cpu")
    with Reads() as reads:
        work = [(i, 0.0, share_of(ALONE, x[i], y[i])) for i in range(3)]
        list(
            train_steps(
                Plain(model),
                work,
                make_optimizer(model.parameters()),
                {"lr": schedule("1", 1, "lr")},
                tally,
                Ranks(cpu),
            )
        )
        assert reads.count == 0
        assert bool(tally.numbers[4] == 1)
        assert reads.count == 1


def test_bad_choices_are_refused(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--non-finite", "ignore"], "non_finite must be one of stop, skip, got 'ignore'"),
        (["--microbatch", "0"], "microbatch must be >= 1, got 0"),
    ):
        assert finetune(npz, tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert set(COMPARED) & set(contents(tmp_path)) == set()
