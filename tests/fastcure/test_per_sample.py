"""What objectives keep of each training sample: places, augmentation, steps that are repeated or left out, resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from keeping import Keeping
from small_runs import SMALL, Killed, write_npz
from torch import Tensor, nn

import fastcure.training.run as run_module
from fastcure.cli import main
from fastcure.data import Augment, Batch, Transform, hold_out, limited, load
from fastcure.objectives import OBJECTIVES, ObjectiveOutput
from fastcure.schedules import schedule
from fastcure.training.checkpoint import unpack
from fastcure.training.epoch import train_steps
from fastcure.training.optimizer import make_optimizer
from fastcure.training.ranks import Ranks
from fastcure.training.run import Run
from fastcure.training.tally import Tally

MOVED = Augment(pad=2, flip=True)


@pytest.fixture
def npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(OBJECTIVES, "keeping", Keeping)
    monkeypatch.setattr(run_module, "default_augmentation", lambda _: MOVED)
    (tmp_path / "kept_rows_of_its_own.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return write_npz(tmp_path / "bright.npz")


def fine_tune(npz: Path, out: Path, *flags: str) -> int:
    small = [flag for flag in SMALL if flag not in ("--gamma", "0.1")]
    small[small.index("--eps") + 1 : small.index("--eps") + 1] = ["0.1"]
    own = ["--model", "kept_rows_of_its_own:net", "--objective", "keeping"]
    return main(["finetune", "--dataset", f"npz:{npz}", "--out", str(out), *small, *own, *flags])


@pytest.mark.parametrize("flags", [[], ["--no-augment", "--limit", "40"]])
def test_the_samples_are_those_at_index_augmented_by_the_transform(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    made: list[Keeping] = []
    monkeypatch.setitem(OBJECTIVES, "keeping", type("Made", (Keeping,), {"allocate": lambda o, *a: kept(o, *a)}))

    def kept(objective: Keeping, *arguments: Any) -> None:
        made.append(objective)
        Keeping.allocate(objective, *arguments)

    assert fine_tune(npz, tmp_path / "out", *flags) == 0
    x_train = hold_out(limited(load(f"npz:{npz}"), 40 if flags else None, 0), None, 0)[0].x_train
    assert isinstance(x_train, Tensor)
    seen = made[-1].seen
    for x, index, transform in seen:
        if flags:
            assert torch.equal(x, x_train[index].float() / 255)
        assert torch.equal(x, transform(x_train[index]).float() / 255)
    half = seen[: len(seen) // 2]
    for epoch in (half, seen[len(half) :]):
        assert sorted(torch.cat([index for _, index, _ in epoch]).tolist()) == list(range(len(x_train)))


def test_what_is_taken_back_is_where_it_was() -> None:
    """Each pixel has a number of its own; those that the augmented image does not show are those of `onto`."""
    B, H, W = 50, 6, 5
    draws = torch.stack([torch.randint(n, (B,), generator=torch.Generator().manual_seed(n)) for n in (5, 5, 2)])
    ids = torch.arange(1, B * 2 * H * W + 1).view(B, 2, H, W)
    transform = Transform(MOVED, (H, W), draws)
    moved = transform(ids)
    shown = torch.isin(ids, moved)
    assert 0 < int((~shown).sum()) < ids.numel() // 2
    assert torch.equal(transform.inverse(moved), torch.where(shown, ids, 0))
    assert torch.equal(transform.inverse(moved, onto=-ids), torch.where(shown, ids, -ids))
    assert torch.equal(Transform()(ids), ids)
    assert torch.equal(Transform().inverse(ids, onto=-ids), ids)


@pytest.mark.parametrize("shape", [(3, 1, 6, 5), (2, 1, 5, 6), (2, 6, 5)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    transform, kept = Transform(MOVED, (6, 5), torch.zeros(3, 2, dtype=torch.int64)), torch.zeros(2, 1, 6, 5)
    message = r"x must be \(2, C, 6, 5\) as the images of the batch, got "
    for call in (transform, transform.inverse):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))
    with pytest.raises(ValueError, match="onto must be"):
        transform.inverse(kept, onto=torch.zeros(shape))


def state(out: Path) -> dict[str, Tensor]:
    return unpack(out / "state.safetensors")[1]["objective"]


def test_killed_after_any_step_it_keeps_the_same(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fine_tune(npz, tmp_path / "whole") == 0
    pause, kills, status = Run._pause, 0, None

    def killing(run: Run) -> None:
        taken.append(1)
        if len(taken) > 2:
            raise Killed
        pause(run)

    while status is None:
        with monkeypatch.context() as patch:
            taken: list[int] = []
            patch.setattr(run_module, "SAVE_EVERY", -1.0)
            patch.setattr(Run, "_pause", killing)
            try:
                status = fine_tune(npz, tmp_path / "out", "--resume")
            except Killed:
                kills += 1
    assert (status, kills >= 3) == (0, True)
    found, wanted = state(tmp_path / "out"), state(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert set(found["uses"].tolist()) == {2}
    assert int(found["steps"]) == 2 * -(-len(found["uses"]) // 20)
    assert torch.count_nonzero(found["last"]) > found["last"].numel() / 2


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (-1, Keeping.per_sample, r"Wrong.uses must be \(43, ...\), a row for each training sample, got \(42,\)"),
        (0, ("lost",), "Wrong.per_sample must name buffers that are saved, got 'lost': call self.register_buffer"),
    ],
)
def test_rows_that_do_not_fit_are_one_line_before_anything_is_written(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    rows: int, names: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    class Wrong(Keeping):
        per_sample = names

        def allocate(self, count: int, shape: torch.Size) -> None:
            super().allocate(count, shape)
            self.register_buffer("uses", torch.zeros(count + rows))

    monkeypatch.setitem(OBJECTIVES, "keeping", Wrong)
    assert fine_tune(npz, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_repeated_or_left_out_leaves_no_trace() -> None:
    """Neither in the rows nor in the buffer that all samples share."""
    torch.manual_seed(0)
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    x[:3] = torch.nan
    fails = [True, False, True, False]

    class Failing(Keeping):
        def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
            out = super().forward(x, y, index)
            if fails.pop():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return out

    objective = Failing(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 0.1)
    objective.allocate(6, x.shape[1:])
    fails.reverse()
    ranks, schedules = Ranks(torch.device("cpu")), {"lr": schedule("0.1", 1, "lr")}
    work = []
    for step, index in enumerate((torch.arange(3), torch.arange(3, 6))):
        work.append((step, 0.0, ranks.counted(Batch(x[index], y[index], index, Transform()), 3)))
    optimizer = make_optimizer(objective.model.parameters())
    list(train_steps(objective, work, optimizer, schedules, Tally(ranks.device), ranks))
    assert not fails
    assert objective.uses.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(objective.last[:3], torch.zeros(3, 1, 4, 4))
    assert torch.count_nonzero(objective.last[3:]) == 48
    assert int(objective.get_buffer("steps")) == 1
