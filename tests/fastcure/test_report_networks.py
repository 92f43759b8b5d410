"""`fastcure report` on networks that are not bundled: of no run, and of a run whose network is named again."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from scipy.stats import binomtest
from small_runs import write_run
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.attacks import ATTACKS, autoattack
from fastcure.cli import main
from fastcure.data import load
from fastcure.evaluation.network import load_images
from fastcure.evaluation.settings import EvaluationSettings
from fastcure.report.report import _networks
from fastcure.report.settings import ReportSettings, read_runs

MODULE = """
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 3))
"""
WHOLE = ["table1.csv", "norms.csv", "checklist.csv", "settings.json", "index.html"]


class Place:
    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        y = np.arange(60) % 3
        x = (rng.integers(0, 90, (60, 6, 6)) + 70 * y[:, None, None]).astype(np.uint8)
        np.savez(path / "data.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
        np.savez(path / "test.npz", x_test=x[30:], y_test=y[30:])
        (path / "report_networks.py").write_text(MODULE)
        self.x, self.y = torch.from_numpy(x[30:, None]).float() / 255, torch.from_numpy(y[30:])
        self.networks = []
        for seed, name in enumerate(("before.pt", "after.pt")):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 3))
            optimizer = torch.optim.Adam(model.parameters(), 1e-2)
            for _ in range(30):
                optimizer.zero_grad()
                F.cross_entropy(model((self.x - 0.4) / 0.3), self.y).backward()
                optimizer.step()
            torch.save(model.state_dict(), path / name)
            self.networks.append(model)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ATTACKS, "autoattack", partial(autoattack, attacks=("apgd-ce",)))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # figures are tested elsewhere
    return Place(tmp_path)


def clean(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model((x - 0.4) / 0.3).argmax(1) == y).double().mean())


OUTSIDE = (
    "--model report_networks:network --dataset npz:data.npz --mean 0.4 --std 0.3 --eps 0.05,0.1 --device cpu".split()
)


AUTO = ["--autoattack-images", "20"]


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_any_network_beside_other_weights_of_it(place: Place) -> None:
    assert main(["report", *OUTSIDE, "--checkpoint", "after.pt", "--surrogate", "before.pt", "--h", "0.7", *AUTO]) == 0
    curve = rows("report/figure4_accuracy.csv")
    found = {(row["model"], float(row["eps"])): float(row["accuracy"]) for row in curve if row["norm"] == "linf"}
    assert [float(row["eps"]) for row in curve if row["norm"] == "l2"] == [0.25, 0.5, 1.0] * 2
    for name, model in zip(("surrogate", "report_networks:network"), place.networks, strict=True):
        assert found[name, 0.0] == pytest.approx(clean(model, place.x, place.y), abs=1e-9)
        assert found[name, 0.1] <= found[name, 0.05] <= found[name, 0.0]
    checked = {row["model"]: row for row in rows("report/checklist.csv") if "black-box" in row["item"]}
    assert list(checked) == ["report_networks:network"]
    assert checked["report_networks:network"]["passed"] != ""  # the surrogate was attacked
    table = {row["network"]: row for row in rows("report/table1.csv")}
    mine = table["report_networks:network"]
    low, high = binomtest(round(30 * found["surrogate", 0.0]), 30).proportion_ci(0.95, method="wilson")
    assert table["surrogate"]["clean"].endswith(f"% [{100 * low:.1f}, {100 * high:.1f}]")
    assert mine["images"] == "30"
    assert mine["AutoAttack, eps 0.1"].endswith("], of 20")
    assert table["surrogate"]["AutoAttack, eps 0.1"] == "-"
    assert json.loads(Path("report/settings.json").read_text())["settings"]["h"] == 0.7
    assert "<h1>report_networks:network on npz:data.npz</h1>" in Path("report/index.html").read_text()


def test_a_network_alone_on_a_sample_of_test_images_without_others(place: Place) -> None:
    few = ["--limit", "6", "--autoattack-images", "0", "--dataset", "npz:test.npz"]
    assert main(["report", *OUTSIDE, "--checkpoint", "after.pt", "--out", "alone", *few]) == 0
    assert {row["model"] for row in rows("alone/figure4_accuracy.csv")} == {"report_networks:network"}
    skipped = [row for row in rows("alone/checklist.csv") if row["passed"] == ""]
    assert "no surrogate" in next(row["evidence"] for row in skipped if "black-box" in row["item"])
    assert all(Path("alone", name).is_file() for name in WHOLE)


def test_a_run_of_a_network_of_ones_own_wants_its_name_again(place: Place) -> None:
    run = write_run(Path("run"))
    config = json.loads((run / "config.json").read_text())
    config |= {"model": "report_networks:network", "mean": [0.4], "std": [0.3], "dataset": "npz:data.npz"}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give it again as --model"):
        ReportSettings.of({"runs": ("run",)})
    found = ReportSettings.of({"runs": ("run",), "model": "report_networks:network"})
    assert (found.model, found.mean, found.std, found.eps) == ("report_networks:network", (0.4,), (0.3,), (0.1,))
    assert (found.checkpoint, found.folder) == (str(Path("run", "model.safetensors")), Path("run", "report"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give folders of finished runs, or --model and --dataset"),
        (["--model", "resnet8", "--dataset", "digits"], "resnet8 has random weights without --checkpoint"),
        ([*OUTSIDE, "--checkpoint", "none.pt"], "checkpoint none.pt does not exist"),
        (["run", "--checkpoint", "after.pt"], "run is not a finished run of fastcure finetune"),
        ([*OUTSIDE, "--eps", "2"], "eps must be radii in (0, 1]"),
        ([*OUTSIDE, "--h", "-1"], "h must be > 0, got -1.0"),
    ],
)
def test_bad_input_is_one_line(
    place: Place, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("report").exists()


def write_own_run(name: str, **settings: object) -> str:
    config = json.loads((write_run(Path(name)) / "config.json").read_text())
    Path(name, "config.json").write_text(json.dumps(config | {"model": "report_networks:network"} | settings))
    return name


def test_runs_of_other_normalisations_do_not_share_one(place: Place) -> None:
    """The numbers of a network that is not bundled are in the settings of its run, and not in its weights."""
    runs = tuple(write_own_run(name, mean=[mean], std=[0.3]) for name, mean in (("a", 0.4), ("b", 0.5)))
    explicit = {"runs": runs, "model": "report_networks:network"}
    with pytest.raises(ValueError, match=r"runs must agree in mean, got \(0.4,\) in a and \(0.5,\) in b"):
        ReportSettings.of(explicit)
    assert ReportSettings.of({**explicit, "runs": runs[:1]}).mean == (0.4,)


def test_no_run_is_measured_on_images_that_it_was_trained_on(place: Place) -> None:
    """Of a folder that each run divided in its own way."""
    for i in range(20):
        path = Path("pets", "cat" if i % 2 else "dog", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6), np.uint8)).save(path)
    shares = {"a": 0.3, "b": None, "c": 0.2}
    runs = tuple(write_own_run(name, dataset="folder:pets", val_fraction=share) for name, share in shares.items())
    found = ReportSettings.of({"runs": runs, "model": "report_networks:network"})
    measured = {bytes(image.numpy()) for image in load_images(found).x_test}
    assert len(measured) == 2
    for share in shares.values():
        trained = load("folder:pets", test_fraction=share).x_train
        assert isinstance(trained, Tensor)
        assert measured.isdisjoint(bytes(image.numpy()) for image in trained)
    explicit = {"runs": runs, "model": "report_networks:network", "val_fraction": 0.5}
    assert ReportSettings.of(explicit).val_fraction == 0.5


def test_a_folder_that_a_run_has_divided_is_known_by_any_path(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write_own_run("run", dataset="folder:pets", val_fraction=0.3)

    def share(path: str) -> float | None:
        explicit = {"run": run, "model": "report_networks:network", "dataset": f"folder:{path}"}
        return EvaluationSettings.of(explicit).val_fraction

    run = "run"
    for path in ("pets", "other/pets", "deep/er"):
        Path(path).mkdir(parents=True)
    assert [share(path) for path in ("pets", "./pets/", str(Path("pets").resolve()))] == [0.3] * 3
    assert [share(path) for path in ("other/pets", "deep")] == [None, None]  # of another all is measured
    monkeypatch.chdir("deep")
    run = "../run"
    assert [share(path) for path in ("../pets", "er")] == [0.3, None]


def test_a_run_of_an_objective_of_ones_own_is_measured_without_it(place: Place) -> None:
    own = {"objective": "atta", "microbatch": 4, "batch_stats": "train", "dataset": "npz:data.npz"}
    run = write_own_run("run", mean=[0.4], std=[0.3], **own)
    Path(run, "model.safetensors").write_bytes(save(place.networks[1].state_dict()))
    named = ["--model", "report_networks:network", "--device", "cpu"]
    assert main(["evaluate", "--run", run, *named, "--attacks", "fgsm", "--out", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    assert found["clean"] == pytest.approx(clean(place.networks[1], place.x, place.y), abs=1e-9)
    (config,) = read_runs([run])
    assert config.objective == "atta"
    title, weights = _networks(ReportSettings.of({"runs": (run,), "model": "report_networks:network"}), [config])
    assert (title, list(weights)) == ("fine-tuning", ["before fine-tuning", "after fine-tuning"])
