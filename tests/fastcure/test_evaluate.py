"""`fastcure evaluate`, run as a user runs it, on a run's folder and on networks from outside."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import Place
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.attacks import ATTACKS, autoattack, pgd
from fastcure.cli import main
from fastcure.data import stratified
from fastcure.evaluation.accuracy import batches
from fastcure.models import Normalize, build
from fastcure.models.loading import load_model
from fastcure.models.placement import placed


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
