"""`fastcure evaluate`, run as a user runs it, on a run's folder and on networks from outside."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.attacks import ATTACKS, autoattack, pgd
from fastcure.cli import main
from fastcure.data import stratified
from fastcure.evaluation.accuracy import batches
from fastcure.models import Normalize, build, resnet8
from fastcure.models.loading import load_model
from fastcure.models.placement import placed

OUTSIDE = """
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))

class Network(nn.Sequential):
    def __init__(self):
        super().__init__(*network())

number = 3

def broken():
    raise RuntimeError("no such layer")

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * x.new_empty(x.shape).normal_()

def noisy():
    return nn.Sequential(nn.Flatten(), Noise(), nn.Linear(192, 3))

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
"""
EPS = (8 / 255, 0.1)


class Place:
    """A folder with a dataset, a run and a module of networks, and the commands run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rng = np.random.default_rng(0)
        y = rng.integers(0, 3, 70)
        x = (rng.integers(0, 128, (70, 8, 8, 3)) + 60 * y[:, None, None, None]).astype(np.uint8)
        np.savez(path / "data.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
        self.x = torch.from_numpy(x[40:]).permute(0, 3, 1, 2).float() / 255
        self.y = torch.from_numpy(y[40:])

        torch.manual_seed(0)
        self.model, surrogate = self.train(resnet8(num_classes=3)), resnet8(num_classes=3)
        (path / "run").mkdir()
        save_file(self.model.state_dict(), path / "run" / "model.safetensors")
        save_file(surrogate.state_dict(), path / "run" / "original.safetensors")
        config = {"model": "resnet8", "dataset": "npz:data.npz", "data_dir": "data", "eps": EPS, "gamma": "1"}
        (path / "run" / "config.json").write_text(json.dumps(config))

        (path / "outside_networks.py").write_text(OUTSIDE)
        self.outside = self.train(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3)))
        torch.save(self.outside.state_dict(), path / "outside.pt")

    def train(self, model: nn.Module) -> nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(self.x), self.y).backward()
            optimizer.step()
        return model.eval()

    def results(self, *flags: str, name: str = "results.json") -> dict:
        out = self.path / name
        assert main(["evaluate", *flags, "--out", str(out)]) == 0
        found = json.loads(out.read_text())
        out.unlink()
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(autouse=True)
def _inside(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.path)


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def plain_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
    return (x + eps * g.sign()).clamp(0, 1)


def test_a_run_is_enough(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    found = place.results("--run", "run", "--batch-size", "7")
    assert found["clean"] == right(place.model, place.x, place.y)
    assert found["clean"] > 0.4
    assert list(found["fgsm"]) == list(found["pgd"]) == ["0.0313725", "0.1"]
    for eps, accuracy in found["fgsm"].items():
        assert accuracy == right(place.model, plain_fgsm(place.model, place.x, place.y, float(eps)), place.y)
    assert found["pgd"]["0.1"] <= found["pgd"]["0.0313725"] <= found["clean"]
    assert found["deepfool"]["found"] == 1
    assert 0 < found["deepfool"]["mean"] < 2
    assert found["images"] == 30
    assert found["settings"]["checkpoint"] == str(Path("run") / "model.safetensors")
    assert {"fastcure", "torch", "device"} <= set(found["environment"])
    assert not {"spsa", "autoattack", "checklist"} & set(found)
    shown = capsys.readouterr().out
    low, high = binomtest(round(30 * found["clean"]), 30).proportion_ci(0.95, method="wilson")
    assert found["intervals"]["clean"] == pytest.approx([low, high], abs=1e-12)
    assert found["intervals"]["pgd"].keys() == found["pgd"].keys()
    assert f"{found['clean']:.1%} [{100 * low:.1f}, {100 * high:.1f}]" in shown
    for title in ("of 30 images", "eps 0.0314", "FGSM", "PGD-10", "DeepFool: L2 distance", "results in"):
        assert title in shown


def test_the_run_before_cure_is_its_other_checkpoint(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    found = place.results("--run", "run", "--checkpoint", "run/original.safetensors", "--limit", "9", "--eps", "1/255")
    surrogate = load_model("resnet8", "run/original.safetensors", num_classes=3).eval()
    chosen = stratified(place.y, 9, seed=0)
    assert found["clean"] == right(surrogate, place.x[chosen], place.y[chosen])
    assert (found["images"], found["test_set"]) == (9, 30)
    assert "9 test images (a sample of 30, stratified by class)" in capsys.readouterr().out
    assert list(found["pgd"]) == ["0.00392157"]


def test_all_attacks(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(ATTACKS, "autoattack", functools.partial(autoattack, attacks=("apgd-ce",)))
    flags = [
        "--attacks",
        "pgd,spsa,autoattack",
        "--checklist",
        "--eps",
        "8/255",
        "--steps",
        "3",
        "--restarts",
        "2",
        "--limit",
        "12",
    ]
    found = place.results("--run", "run", *flags)
    assert found["autoattack"]["0.0313725"] <= found["pgd"]["0.0313725"] <= found["spsa"]["0.0313725"]
    assert [item["passed"] is None for item in found["checklist"]] == [False] * 7
    assert found["checklist"][-1]["evidence"]["images"] == 12
    assert found["checklist"][-1]["evidence"]["autoattack"] == found["autoattack"]["0.0313725"]
    assert found["checklist"][0]["evidence"]["margin"] == 0.02
    shown = capsys.readouterr().out
    assert "fgsm" not in found
    for title in ("PGD-3 x 2", "SPSA", "AutoAttack", "gradient masking: ", "an unbounded attack"):
        assert title in shown


def test_l2_radii(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    longest: dict[str, list[float]] = {"linf": [], "l2": []}

    def recorded(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        adv = pgd(model, x, y, **options)
        longest[options.get("norm", "linf")].append(float((adv - x).flatten(1).norm(dim=1).max()))
        return adv

    monkeypatch.setitem(ATTACKS, "pgd", recorded)
    found = place.results("--run", "run", "--eps", "0.1", "--steps", "4", "--eps-l2", "0.05,0.5", "--limit", "12")
    assert list(found["pgd_l2"]) == list(found["intervals"]["pgd_l2"]) == ["0.05", "0.5"]
    assert found["pgd_l2"]["0.5"] <= found["pgd_l2"]["0.05"] <= found["clean"]
    assert longest["l2"] == pytest.approx([0.05, 0.5], rel=1e-5)
    assert longest["linf"][0] > 0.5  # 0.1 in each of 192 numbers
    assert not any(name.startswith("fgsm_l2") for name in found)
    assert "L2 " in capsys.readouterr().out


def test_pgd_far_above_autoattack_is_warned_of(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def strong(model: nn.Module, x: Tensor, y: Tensor, **_: object) -> Tensor:
        wrong = [place.x[(place.model(place.x).argmax(1) != label).nonzero()[0, 0]] for label in y]
        return torch.stack(wrong)

    monkeypatch.setitem(ATTACKS, "autoattack", strong)
    found = place.results("--run", "run", "--eps", "1/255", "--attacks", "pgd,autoattack", "--steps", "1")
    assert found["autoattack"] == {"0.00392157": 0.0}
    (warning,) = found["warnings"]
    assert (
        f"PGD-1 leaves {found['pgd']['0.00392157']:.1%}, AutoAttack 0.0% [0.0, 11.4] of the same 30 images" in warning
    )
    assert f"warning: {warning}" in capsys.readouterr().out


def test_a_network_that_is_random_on_purpose(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model outside_networks:noisy --dataset npz:data.npz --eps 0.02 --limit 6 --eot 3".split()
    found = place.results(*flags, "--steps", "2")
    assert found["settings"]["eot"] == 3
    assert "deepfool" not in found  # of a random network there is no boundary
    assert "DeepFool" not in capsys.readouterr().out


def test_a_seed_repeats_and_another_differs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []

    def recorded(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        adv = pgd(model, x, y, **options)
        starts.append(adv)
        return adv

    monkeypatch.setitem(ATTACKS, "pgd", recorded)
    found = {}
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        starts.clear()
        results = place.results("--run", "run", "--eps", "0.05", "--steps", "1", "--seed", seed)
        found[name] = results, torch.cat(starts)
    assert found["first"][0] == found["again"][0]
    assert torch.equal(found["first"][1], found["again"][1])
    assert found["first"][1].shape == found["other"][1].shape
    assert not torch.equal(found["first"][1], found["other"][1])


@pytest.mark.parametrize("name", ["outside_networks:network", "outside_networks:Network"])
def test_a_network_from_outside(place: Place, name: str) -> None:
    flags = ["--model", name, "--checkpoint", "outside.pt", "--dataset", "npz:data.npz", "--eps", "0.02"]
    found = place.results(*flags)
    assert found["clean"] == right(place.outside, place.x, place.y)
    attacked = plain_fgsm(place.outside, place.x, place.y, 0.02)
    assert found["fgsm"]["0.02"] == right(place.outside, attacked, place.y)


def test_a_checkpoint_of_another_tool(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"module." + name: value for name, value in place.outside.state_dict().items()}
    torch.save({"model": state}, "foreign.pt")
    flags = ["--model", "outside_networks:network", "--checkpoint", "foreign.pt", "--dataset", "npz:data.npz"]
    found = place.results(*flags, "--eps", "0.02")
    assert found["clean"] == right(place.outside, place.x, place.y)
    words = "checkpoint foreign.pt: took 'model'; took the prefix 'module.' off the names"
    assert capsys.readouterr().out.count(words) == 1


@pytest.mark.parametrize("command", ["evaluate", "analyze", "report", "finetune"])
def test_a_run_s_folder_runs_no_code(place: Place, capsys: pytest.CaptureFixture[str], command: str) -> None:
    run = place.path / f"hostile-{command}"
    shutil.copytree(place.path / "run", run)
    config = json.loads((run / "config.json").read_text())
    config |= {"model": "hostile_networks:build", "h": "1", "epochs": 1}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.json").write_text("{}")
    code = "from pathlib import Path\nPath('ran').touch()\nfrom outside_networks import network as build\n"
    (place.path / "hostile_networks.py").write_text(code)
    flags = {"report": [str(run)], "finetune": ["--resume", "--out", str(run)]}.get(command, ["--run", str(run)])
    assert main([command, *flags]) == 2
    assert not (place.path / "ran").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "hostile_networks:build" in error
    if command in ("evaluate", "analyze"):
        assert "give it again as --model" in error


def test_a_network_of_ones_own_for_a_run_is_the_user_s_word(place: Place) -> None:
    flags = ["--run", "run", "--model", "outside_networks:network", "--checkpoint", "outside.pt", "--eps", "0.02"]
    assert place.results(*flags)["clean"] == right(place.outside, place.x, place.y)


def test_mean_and_std_stand_in_front_of_a_network_from_outside(place: Place) -> None:
    numbers = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    normalized = nn.Sequential(Normalize(3, *numbers), place.outside)
    flags = [
        "--model",
        "outside_networks:network",
        "--checkpoint",
        "outside.pt",
        "--dataset",
        "npz:data.npz",
        "--eps",
        "0.02",
    ]
    found = place.results(*flags, "--mean", "0.5,0.4,0.3", "--std", "1/4,0.2,0.3")
    assert found["clean"] == right(normalized, place.x, place.y)
    assert found["fgsm"]["0.02"] == right(normalized, plain_fgsm(normalized, place.x, place.y, 0.02), place.y)
    assert found["clean"] != right(place.outside, place.x, place.y)


def test_what_cannot_be_attacked_has_no_distance(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
    for parameter in flat.parameters():
        nn.init.zeros_(parameter)
    torch.save(flat.state_dict(), "flat.pt")
    flags = ["--model", "outside_networks:network", "--checkpoint", "flat.pt", "--dataset", "npz:data.npz"]
    found = place.results(*flags)
    assert found["deepfool"] == {"mean": None, "median": None, "found": 0.0}
    assert "DeepFool: L2 distance -, median -, found for 0.0%" in capsys.readouterr().out


def test_weights_lie_where_they_are_fast_and_compute_the_same() -> None:
    x = torch.rand(3, 1, 8, 8)
    for name, last in (("resnet8", True), ("resnet18", False)):
        model = build(name, in_channels=1).eval()
        before = model(x)
        assert placed(model, name, x.shape[1:], torch.device("cpu")) is model
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)][1:]
        assert [weight.is_contiguous() for weight in weights] == [
            not last or weight.shape[2] == 1 for weight in weights
        ]
        assert torch.allclose(model(x), before, atol=1e-5)


OUT = ["--model", "outside_networks:network", "--dataset", "npz:data.npz"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --run, or --model and --dataset"),
        (["--model", "outside_networks:network"], "give --run, or --model and --dataset"),
        (["--run", "nowhere"], "must be the folder of a finetune run"),
        (["--run", "damaged"], "config.json cannot be read as JSON (Expecting property name"),
        (["--run", "older"], "config.json does not hold the settings of a run: it lacks dataset"),
        (["--run", "run", "--checkpoint", "nowhere.pt"], "checkpoint nowhere.pt does not exist"),
        (["--run", "run", "--surrogate", "nowhere.pt", "--checklist"], "checkpoint nowhere.pt does not exist"),
        (["--run", "run", "--mean", "0.5", "--std", "0.5"], "resnet8 has its mean and std in the checkpoint"),
        (["--run", "run", "--eps", "2"], "eps must be radii in (0, 1]"),
        (["--run", "run", "--steps", "0"], "steps must be >= 1, got 0"),
        (["--run", "run", "--limit", "0"], "limit must be >= 1, got 0"),
        (["--run", "run", "--device", "abacus"], "device must be auto, cpu, cuda"),
        (["--run", "run", "--dataset", "mnist"], "dataset must be one of digits"),
        (["--model", "resnet8", "--dataset", "npz:data.npz"], "resnet8 has random weights without --checkpoint"),
        ([*OUT[2:], "--model", "vgg"], "wide_resnet28_10, package.module:function, timm:NAME, got 'vgg'"),
        ([*OUT[2:], "--model", "outside_networks:"], "package.module:function, timm:NAME, got 'outside_networks:'"),
        ([*OUT[2:], "--model", "nowhere:network"], "model nowhere:network cannot be made: ModuleNotFoundError"),
        ([*OUT[2:], "--model", "outside_networks:vgg"], "cannot be made: AttributeError"),
        ([*OUT[2:], "--model", "outside_networks:broken"], "cannot be made: RuntimeError: no such layer"),
        ([*OUT[2:], "--model", "outside_networks:number"], "cannot be made: TypeError"),
        ([*OUT[2:], "--model", "builtins:dict"], "must make a torch.nn.Module, got dict"),
        ([*OUT[2:], "--model", "outside_networks:small"], "must return logits (B, C) with C >= 3"),
        ([*OUT, "--checkpoint", "run/model.safetensors"], "does not fit the model"),
        ([*OUT, "--mean", "0.5"], "mean and std must be given together"),
        ([*OUT, "--mean", "0.5,0.5", "--std", "0.5"], "mean must have 1 or 3 values"),
        (["--model", "outside_networks:network", "--dataset", "digits"], "cannot take the images of digits"),
    ],
)
def test_bad_input_is_one_line_status_two_and_nothing_written(
    place: Place, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    for name, text in (("damaged", "{"), ("older", '{"model": "resnet8"}')):
        (place.path / name).mkdir(exist_ok=True)
        (place.path / name / "config.json").write_text(text)
    assert main(["evaluate", *flags, "--out", "out.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcure: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (place.path / "out.json").exists()


def test_a_file_that_exists_is_not_overwritten(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.path / "kept.json").write_text("kept")
    assert main(["evaluate", "--run", "run", "--out", "kept.json"]) == 2
    assert "kept.json, which exists: choose another" in capsys.readouterr().err
    assert (place.path / "kept.json").read_text() == "kept"
    assert main(["evaluate", "--run", "run", "--out", "nowhere/out.json"]) == 2
    assert "out must be in a folder that exists" in capsys.readouterr().err


def test_numbers_that_are_none_are_argparse_s_business(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--mean", "dark"])
    assert stop.value.code == 2
    assert "numbers such as 8/255,0.1, got 'dark'" in capsys.readouterr().err


def test_a_network_of_nan_is_status_one(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    state = {key: torch.full_like(value, torch.nan) for key, value in place.outside.state_dict().items()}
    torch.save(state, "nan.pt")
    assert main(["evaluate", *OUT, "--checkpoint", "nan.pt", "--out", "out.json"]) == 1
    assert "samples is NaN" in capsys.readouterr().err
    assert not (place.path / "out.json").exists()


def test_without_memory_the_batch_size_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        return torch.empty(2**55)

    monkeypatch.setitem(ATTACKS, "pgd", fail)
    assert main(["evaluate", "--run", "run", "--out", "out.json"]) == 2
    error = capsys.readouterr().err
    assert error == "fastcure: error: memory does not suffice for 256 images at a time: lower --batch-size\n"
    assert not (place.path / "out.json").exists()


def test_a_batch_finds_the_same_whoever_takes_it(place: Place) -> None:
    """Every second batch on its own, as one of two processes has it."""
    x, y, found = place.x, place.y, []
    for mine in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        rows = [pgd(place.model, a, b, eps=0.05, steps=2, generator=g) for a, b, g in batches(x, y, 7, seed=3)[mine]]
        found.append(rows)
    whole, even, odd = found
    assert len(whole) == 5
    assert all(torch.equal(*pair) for pair in zip(whole[::2] + whole[1::2], even + odd, strict=True))
    assert not torch.equal(whole[0] - x[:7], whole[1] - x[7:14])


def test_a_pickle_in_a_checkpoint_is_not_executed(place: Place) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (place.path / "exploded",))

    torch.save({"state_dict": Bomb()}, "bomb.pt")
    assert main(["evaluate", *OUT, "--checkpoint", "bomb.pt"]) == 2
    assert not (place.path / "exploded").exists()


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in (
        "--run --model --checkpoint --mean --std --dataset --data-dir --eps --eps-l2 --steps --restarts --attacks "
        "--eot --checklist --surrogate --limit --batch-size --device --seed --out"
    ).split():
        assert flag in shown
