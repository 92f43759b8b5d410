"""What an install has: one version, a command that completes, and weights that are whole."""

import json
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch

import fastcure
from fastcure.attacks import pgd
from fastcure.cli import COMMANDS, main, make_parser
from fastcure.evaluation.accuracy import accuracy
from fastcure.models import PRETRAINED, pretrained, pretrained_figures, resnet8
from fastcure.models.weights import load_weights

ROOT = Path(__file__).parents[2]
LARGEST = 400_000


def test_there_is_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "fastcure/__init__.py"
    assert f"\nversion: {fastcure.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {fastcure.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastcure {fastcure.__version__}\n"


def test_a_shell_completes_every_command() -> None:
    shtab = pytest.importorskip("shtab")
    script = shtab.complete(make_parser(), "bash")
    assert all(f"_{name}" in script for name in COMMANDS)
    assert "--batch-size" in script


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_networks_have_the_figures_that_are_told(name: str) -> None:
    figures, data = pretrained_figures(name), fastcure.data.load(name.split("-")[1])
    model = pretrained(name)
    assert not any(part.training for part in model.modules())
    x, y = data.x_test, data.y_test
    assert accuracy(model, x, y) == pytest.approx(figures["clean"], abs=1.5 / len(x))
    eps = max(figures["pgd"], key=float)
    # Random starts and the processor's rounding: three standard errors of a difference on so many images.
    found = accuracy(model, x[:150], y[:150], partial(pgd, eps=float(eps), steps=10), seed=0)
    assert found == pytest.approx(figures["pgd"][eps], abs=3 * (0.25 / 150) ** 0.5)
    assert found > 0.5


def test_the_weights_are_small_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = PRETRAINED
    package = ROOT / "fastcure" / "models" / "pretrained_weights"
    content = bytearray((package / f"{name}.pt").read_bytes())
    assert len(content) < LARGEST
    content[len(content) // 2] ^= 1
    (tmp_path / "pretrained_weights").mkdir()
    (tmp_path / "pretrained_weights" / f"{name}.pt").write_bytes(content)
    (tmp_path / "pretrained_weights" / f"{name}.json").write_text(json.dumps(pretrained_figures(name)))
    monkeypatch.setattr("fastcure.models._pretrained.files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"the weights of resnet8-digits are damaged: SHA-256 must be .* reinstall"):
        pretrained(name)
    with pytest.raises(ValueError, match="pretrained must be one of resnet8-digits, got 'resnet9'"):
        pretrained("resnet9")


def test_the_state_dict_of_an_objective_loads_into_either(tmp_path: Path) -> None:
    cure = fastcure.CURE(resnet8())
    torch.save(cure.state_dict(), tmp_path / "cure.pt")
    network, other = resnet8(), fastcure.CURE(resnet8())
    load_weights(network, tmp_path / "cure.pt")
    other.load_state_dict(torch.load(tmp_path / "cure.pt"))
    for name, value in cure.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)
        assert torch.equal(other.model.state_dict()[name], value)
