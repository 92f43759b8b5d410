"""From a folder of images of any size and a network of one's own to a robust network, and its measurement."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import SMALL
from torch import nn

from fastcure.cli import main
from fastcure.data import image_files
from fastcure.models.loading import load_model, parse_arguments
from fastcure.models.normalize import Normalized

OWN = """
from torch import nn

def net(width, classes=2, *, bias=False):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.Softplus(), nn.Flatten(), nn.Linear(9 * width, classes, bias))
"""
NETWORK = ["--model", "own:net", "--model-arg", "width=4", "--model-arg", "bias=True"]
NUMBERS = ["--mean", "0.5", "--std", "0.25,0.25,0.5"]
MEASURED = ["--eps", "0.1", "--device", "cpu", "--workers", "1"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark cats and bright dogs, 30 of each, from 8 x 8 to 12 x 11."""
    root, rng = tmp_path_factory.mktemp("folder") / "pets", np.random.default_rng(0)
    for label, kind in enumerate(("cat", "dog")):
        (root / kind).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 200, (8 + i % 4, 8 + i % 5, 3)) + 55 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / kind / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own", None)


def finetune(pets: Path, out: str, *flags: str) -> int:
    data = ["--dataset", f"folder:{pets}", "--image-size", "8", "--val-fraction", "0.2", "--workers", "0"]
    return main(["finetune", *data, "--out", out, *SMALL, *flags])


def read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def test_a_folder_and_a_network_of_ones_own(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(pets, "held", *NETWORK, *NUMBERS) == 0
    assert "38 training, 10 validation, 12 test images of 3 x 8 x 8" in capsys.readouterr().out
    about = read("held/environment.json")
    assert (about["classes"], about["num_classes"], about["channels"]) == (["cat", "dog"], 2, 3)
    assert set(load_file("held/model.safetensors")) == {"0.weight", "0.bias", "3.weight", "3.bias"}  # without Normalize
    monkeypatch.setattr(image_files, "IN_MEMORY", 0)
    assert finetune(pets, "streamed", *NETWORK, *NUMBERS) == 0
    for name in ("model.safetensors", "metrics.json", "history.csv"):
        assert Path("held", name).read_bytes() == Path("streamed", name).read_bytes(), name

    capsys.readouterr()
    measure = ["evaluate", "--run", "held", "--attacks", "pgd", *MEASURED]
    assert main([*measure, *NETWORK, "--out", "found.json"]) == 0
    printed, found = capsys.readouterr().out, read("found.json")
    assert "12 test images" in printed
    metrics = read("held/metrics.json")["after"]
    assert (found["clean"], found["pgd"]) == (metrics["clean"], metrics["pgd"])
    assert sum(each["clean"] * 6 for each in found["classes"].values()) / 12 == pytest.approx(found["clean"])
    assert [line.split()[:2] for line in printed.splitlines()[-4:-1]] == [
        ["class", "images"],
        ["cat", "6"],
        ["dog", "6"],
    ]

    assert main([*measure, *NETWORK[:2]]) == 2
    assert "give --model-arg 'width=4' --model-arg 'bias=True' again" in capsys.readouterr().err
    assert main([*measure, *NETWORK[:2], "--model-arg", "wide=4"]) == 2
    assert "model own:net cannot be made: TypeError" in capsys.readouterr().err
    assert main(["analyze", "--run", "held", *NETWORK, "--limit", "2", "--extremes", "1", "--device", "cpu"]) == 0

    shutil.copytree(pets / "dog", "new/dog")  # and no cat
    assert main([*measure, *NETWORK, "--dataset", "folder:new", "--out", "new.json"]) == 0
    assert (read("new.json")["images"], list(read("new.json")["classes"])) == (30, ["cat", "dog"])
    assert read("new.json")["classes"]["cat"] == {}


def test_an_archive_of_test_images_alone_is_measured(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a bundled network, whose classes are those of its run, though the images show one of them."""
    assert finetune(pets, "out") == 0
    x = np.stack([np.asarray(Image.open(pets / "cat" / f"{i}.png"))[:8, :8] for i in range(5)])
    np.savez("test.npz", x_test=x, y_test=np.zeros(5, int))
    assert main(["evaluate", "--run", "out", "--dataset", "npz:test.npz", "--attacks", "fgsm", *MEASURED]) == 0
    assert "5 test images of 3 x 8 x 8" in capsys.readouterr().out
    assert main(["finetune", "--dataset", "npz:test.npz", "--out", "other"]) == 2
    assert "lacks x_train; it must hold" in capsys.readouterr().err


def test_networks_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the package: what it is asked for, and what is put in front of what it returns."""
    asked = {}

    def create_model(model_name: str, **options: Any) -> nn.Module:
        asked.update(options, model_name=model_name)
        model = nn.Flatten()
        model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.8)}
        return model

    timm: Any = ModuleType("timm")
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    said: list[str] = []
    model = load_model("timm:vit_tiny", arguments={"drop_rate": 0.1}, num_classes=7, in_channels=3, log=said.append)
    assert asked == {"model_name": "vit_tiny", "num_classes": 7, "in_chans": 3, "drop_rate": 0.1}
    assert isinstance(model, Normalized)
    expected = (0.5 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.5, 0.8])
    torch.testing.assert_close(model(torch.full((1, 3, 1, 1), 0.5))[0], expected)
    assert said == ["timm:vit_tiny takes pixels normalised by mean 0.1,0.2,0.3 and std 0.5,0.5,0.8 (--mean, --std)"]
    grey = load_model("timm:vit_tiny", in_channels=1)
    torch.testing.assert_close(grey(torch.full((1, 1, 1, 1), 0.5)), torch.tensor([[0.5]]))
    ours = load_model("timm:vit_tiny", None, (0.5,), (0.1,))
    assert ours(torch.full((1, 3, 1, 1), 0.6))[0].tolist() == pytest.approx([1.0] * 3, rel=1e-6)


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="the package timm is needed by --model timm:vit: pip install timm"):
        load_model("timm:vit")


@pytest.mark.parametrize(
    ("text", "words"),
    [("depth", "must be name=value, such as depth=18, got 'depth'"), ("1=2", "got '1=2'"), ("=2", "got '=2'")],
)
def test_arguments_that_cannot_be_read_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_arguments([text])
    with pytest.raises(ValueError, match="must give each name once, got a twice: 1 and 2"):
        parse_arguments(["a=1", "a=2"])
