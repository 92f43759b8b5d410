"""What the trainer brings to every objective: optimisers, clipping, averaged weights, resuming."""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import Killed, contents, finetune, history, kill_after, share_of, write_npz
from torch import nn

from fastcure.cli import main
from fastcure.models import resnet8
from fastcure.objectives import FGSM, OBJECTIVES, Standard
from fastcure.schedules import schedule
from fastcure.training.average import WeightAverage
from fastcure.training.epoch import train_steps
from fastcure.training.optimizer import OPTIMIZERS, load_scaler, make_optimizer, scaler_tensors
from fastcure.training.ranks import Ranks, Share
from fastcure.training.tally import Tally

CPU = torch.device("cpu")
RATE = 1e-2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count: int = 4) -> list[tuple[int, float, Share]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 6, 3, 2, 2, generator=generator, dtype=torch.float64)
    return [(step, 0.0, share_of(Ranks(CPU), x[step], torch.arange(6) % 3)) for step in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, work: Any, **options: Any) -> None:
    schedules = {"lr": schedule(str(RATE), 1, "lr")}
    list(train_steps(Standard(model), work, optimizer, schedules, Tally(CPU), Ranks(CPU), **options))


PLAIN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, RATE, weight_decay=0.1, fused=False),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, RATE, weight_decay=0.1, fused=False),
    "sgd": lambda parameters: torch.optim.SGD(
        parameters, RATE, momentum=0.8, nesterov=True, weight_decay=0.1, fused=False
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torchs_optimizer(name: str) -> None:
    model = network()
    plain = copy.deepcopy(model)
    train(model, make_optimizer(model.parameters(), name, 0.8, 0.1), batches())
    optimizer = PLAIN[name](plain.parameters())
    for _, _, (x, y, *_) in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for found, wanted in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(name: str, bad: int) -> None:
    """Not in the weights, nor in the optimiser, nor in the average."""
    found = []
    for skip in (False, True):
        model, work = network(), batches()
        work[bad] = (bad, 0.0, work[bad][2]._replace(x=work[bad][2].x * torch.nan))
        optimizer, average = make_optimizer(model.parameters(), name), WeightAverage(model, 0.9)
        train(model, optimizer, [each for each in work if not (skip and each[0] == bad)], clip=0.5, average=average)
        states = [value for state in optimizer.state.values() for value in state.values()]
        found.append([*model.state_dict().values(), *states, *average.tensors().values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_a_long_gradient_is_scaled_down(clip: float) -> None:
    model = network()
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    (work,) = batches(1)
    nn.functional.cross_entropy(plain(work[2][0]), work[2][1]).backward()
    norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
    train(model, make_optimizer(model.parameters(), "sgd", momentum=0.0), [work], clip=clip)
    for found, old, other in zip(model.parameters(), before.parameters(), plain.parameters(), strict=True):
        assert other.grad is not None
        wanted = old - RATE * other.grad * min(1.0, clip / norm)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)  # torch adds 1e-6 to the norm


def test_the_average_is_its_definition() -> None:
    model = network()
    average, optimizer = WeightAverage(model, 0.3), make_optimizer(model.parameters())
    wanted = [parameter.detach().clone() for parameter in model.parameters()]
    for step, work in enumerate(batches(6), 1):
        train(model, optimizer, [work], average=average)
        decay = min(0.3, (1 + step) / (10 + step))
        wanted = [decay * old + (1 - decay) * new for old, new in zip(wanted, model.parameters(), strict=True)]
    for found, each in zip(average.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(*pair) for pair in zip(average.model.buffers(), model.buffers(), strict=True))


def test_recalibrated_statistics_are_those_of_the_averaged_weights() -> None:
    average = WeightAverage(network(), 0.9)
    images = [batch[0] for _, _, batch in batches(3)]
    before = torch.get_rng_state()
    average.recalibrate(images)
    inside = [average.model[1](x.flatten(1)) for x in images]  # type: ignore[index]
    norm: Any = average.model[2]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in inside]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in inside]).mean(0))
    assert torch.equal(before, torch.get_rng_state())


FLAGS = {
    "cure": ["--gamma", "0.1"],
    "standard": ["--label-smoothing", "0.1"],
    "input-gradient": ["--gamma", "0.1"],
    "fgsm": ["--train-eps", "0:0.05x50%,0.05"],
    "fgsm-rs": ["--batch-stats", "train"],
    "pgd": ["--steps", "2", "--lr", "onecycle:1e-3"],
    "trades": ["--gamma", "0:0.1", "--steps", "1", "--batch-stats", "train"],
}


def fine_tune(npz: Path, out: Path, objective: str, *flags: str) -> int:
    """As `finetune`, without its gamma."""
    few = "--pretrain-epochs 1 --epochs 2 --batch-size 20 --eps 0.1 --device cpu".split()
    given = [*few, "--objective", objective, *FLAGS[objective], *flags]
    return main(["finetune", "--dataset", f"npz:{npz}", "--out", str(out), *given])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_trained(name: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fine_tune(npz, tmp_path / "out", name) == 0
    assert f"after {OBJECTIVES[name].title}" in capsys.readouterr().out
    last = history(tmp_path / "out")[-1]
    assert {"lr", *OBJECTIVES[name].scheduled} <= last.keys()
    if name == "fgsm":
        assert float(last["eps"]) == 0.05
    if name == "fgsm-rs":
        assert float(last["eps"]) == 0.1  # the largest --eps
    weights = [load_file(tmp_path / "out" / f"{each}.safetensors") for each in ("original", "model")]
    assert not torch.equal(*(state["conv1.weight"] for state in weights))
    moved = not torch.equal(*(state["bn1.running_mean"] for state in weights))
    assert moved == ("train" in FLAGS[name])


OPTIONS = (
    "--optimizer sgd --momentum 0.8 --weight-decay 1e-4 --label-smoothing 0.1 --clip 1 --ema 0.9 --lr 1e-2".split()
)


def test_killed_after_any_step_it_ends_the_same(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random starts, momentum and averaged weights go on where they were."""
    name = "trades"
    assert fine_tune(npz, tmp_path / "whole", name, *OPTIONS) == 0
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            kill_after(patch, 2)
            try:
                status = fine_tune(npz, tmp_path / "out", name, *OPTIONS, "--resume")
            except Killed:
                kills += 1
                continue
        break
    assert (status, kills > 3) == (0, True)
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert one.keys() == two.keys()
    for file in ("model.safetensors", "ema.safetensors", "history.csv", "metrics.json"):
        assert one[file] == two[file], file


def test_averaged_weights_are_measured_beside_the_others(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "out", ["--ema", "0.9", "--batch-stats", "train", "--epochs", "3"]
    assert finetune(npz, out, *flags) == 0
    assert "averaged" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["before", "after", "ema"]
    model = resnet8(num_classes=2).eval()
    model.load_state_dict(load_file(out / "ema.safetensors"))
    assert finetune(npz, tmp_path / "plain", *flags[2:]) == 0
    for file in ("model.safetensors", "original.safetensors"):
        assert (out / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    rows = history(out)
    assert [bool(row["ema_clean"]) for row in rows] == [False, True, True, True]
    assert "ema_clean" not in history(tmp_path / "plain")[0]


def test_an_attack_takes_a_batch_as_a_whole(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FGSM, "forward", run_out)
    assert fine_tune(npz, tmp_path / "out", "fgsm") == 2
    assert "a step of FGSM training on 20 images, which it takes together: lower" in capsys.readouterr().err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_npz(tmp_path / "a.npz")
    code = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, {}))\n"
    (tmp_path / "own.py").write_text(code.format(2) + "def small():\n    return nn.Linear(3, 2)\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)


def test_a_network_of_ones_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, npz = place / "out", place / "a.npz"
    assert finetune(npz, out, "--model", "own:net", "--objective", "fgsm", "--gamma", "1") == 2
    assert "gamma is no setting of the objective fgsm" in capsys.readouterr().err
    assert finetune(npz, out, "--model", "own:net") == 0
    assert set(load_file(out / "model.safetensors")) == {"1.weight", "1.bias"}
    capsys.readouterr()
    assert main(["finetune", "--resume", "--out", "out"]) == 2
    assert "names the model 'own:net', and only resnet8" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--out", "out", "--model", "own:net"]) == 0
    assert "is finished" in capsys.readouterr().out
    measured = ["--eps", "0.1", "--limit", "8", "--device", "cpu"]
    assert main(["evaluate", "--run", "out", "--model", "own:net", *measured]) == 0
    assert main(["evaluate", "--run", "out", *measured]) == 2


def test_a_network_that_does_not_fit_the_data_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(place / "a.npz", place / "out", "--model", "own:small") == 2
    assert "model own:small" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_gradient_that_overflows_float16_lowers_the_scale_and_leaves_its_step_out() -> None:
    """It is no step that is not finite, unless the scale has come down to 1; the scale is saved and restored."""
    model, work = network().float(), [(i, 0.0, share._replace(x=share.x.float())) for i, _, share in batches(4)]
    expected = copy.deepcopy(model)
    scaler, tally = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-126), Tally(CPU)
    optimizer, options = make_optimizer(model.parameters(), "sgd"), {"autocast": torch.float16, "scaler": scaler}
    steps = train_steps(Standard(model), work, optimizer, {"lr": schedule(str(RATE), 1)}, tally, Ranks(CPU), **options)
    next(steps)
    for left, weight in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(left, weight)
    assert (scaler.get_scale(), tally.first_bad()) == (2.0, None)
    other = torch.amp.GradScaler("cpu")
    load_scaler(other, scaler_tensors(scaler))
    assert other.state_dict() == scaler.state_dict()
    list(steps)
    train(expected, make_optimizer(expected.parameters(), "sgd"), work[1:])
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=2e-3)

    work[0] = (0, 0.0, work[0][2]._replace(x=work[0][2].x * torch.nan))
    list(
        train_steps(Standard(model), work[:1], optimizer, {"lr": schedule(str(RATE), 1)}, tally, Ranks(CPU), **options)
    )
    assert tally.first_bad() is not None


def test_a_run_in_float16_ends_like_one_in_float32(place: Path) -> None:
    ends = []
    for amp in ("none", "fp16"):
        assert finetune(place / "a.npz", place / amp, "--model", "own:net", "--amp", amp) == 0
        ends.append(load_file(place / amp / "model.safetensors")["1.weight"])
    assert 0 < float((ends[1] - ends[0]).norm() / ends[0].norm()) < 0.01


def test_numbers_go_to_trackers_through_accelerate(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By stand-ins for the packages; whatever is missing is named before anything is trained."""
    assert finetune(place / "a.npz", place / "out", "--model", "own:net", "--log-to", "tensorboard,wandb") == 2
    assert "is needed by --log-to: pip install" in capsys.readouterr().err
    assert not (place / "out").exists()
    seen: list[Any] = []

    class Tracker:
        requires_logging_directory = False

        def __init__(self, *arguments: str) -> None:
            seen.append(arguments)

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            seen.append((values["gamma"], values["eps"]))

        def log(self, values: dict[str, float], step: int) -> None:
            seen.append((step, values))

        def finish(self) -> None:
            seen.append("finished")

    class InFiles(Tracker):
        requires_logging_directory = True

    for name in ("accelerate", "accelerate.tracking", "tensorboard", "wandb"):
        stand_in: Any = ModuleType(name)
        stand_in.__spec__ = ModuleSpec(name, None)
        stand_in.LOGGER_TYPE_TO_CLASS = {"tensorboard": InFiles, "wandb": Tracker}
        monkeypatch.setitem(sys.modules, name, stand_in)
    flags = ["--model", "own:net", "--log-to", "tensorboard", "--track", "2"]
    assert finetune(place / "a.npz", place / "out", *flags) == 0
    assert seen[:2] == [("tensorboard", str(place / "out")), ("0.1", "(0.1,)")]
    rows = history(place / "out")
    sent = [(step, values) for step, values in seen[2:-1]]
    followed = [(step, values) for step, values in sent if {"pretrain/clean", "finetune/clean"} & values.keys()]
    assert [step for step, _ in followed] == [1, 2, 3]
    assert [values[f"{row['phase']}/pgd"] for (_, values), row in zip(followed, rows, strict=True)] == [
        float(row["pgd"]) for row in rows
    ]
    assert sum("track/frobenius" in values for _, values in sent) == 2
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    tested = {"test after CURE/clean": metrics["after"]["clean"], "test after CURE/0.1": metrics["after"]["pgd"]["0.1"]}
    assert sent[-1] == (3, tested)
    assert seen[-1] == "finished"
