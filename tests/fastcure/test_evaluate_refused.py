"""What `fastcure evaluate` refuses: one line, status two or one, and nothing written."""

import pytest
import torch
from evaluated import Place
from small_runs import Bomb
from torch import Tensor

from fastcure.attacks import ATTACKS
from fastcure.cli import main

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


def test_a_pickle_in_a_checkpoint_is_not_executed(place: Place) -> None:
    torch.save({"state_dict": Bomb(place.path / "exploded")}, "bomb.pt")
    assert main(["evaluate", *OUT, "--checkpoint", "bomb.pt"]) == 2
    assert not (place.path / "exploded").exists()
