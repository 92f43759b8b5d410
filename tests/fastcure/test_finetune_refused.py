"""What `fastcure finetune` refuses: one line, status two, and nothing written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import Bomb, finetune

from fastcure.data import ADDRESSES, DATASETS
from fastcure.models import MODELS, resnet8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--h", "0"], "h must be > 0, got 0"),
        (["--h", "-1"], "h must be"),
        (["--gamma", "4x9"], "gamma must last the run's 2 epochs, got 9"),
        (["--lr", "fast"], "lr must be a number or a schedule"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
        (["--batch-size", "0"], "batch_size must be >= 1"),
        (["--validation", "0"], "validation must be >= 1, got 0"),
        (["--validation", "48"], "validation must leave images to train on, got 48 of the 48 training images"),
        (
            ["--model", "vgg"],
            f"model must be one of {', '.join(MODELS)}, package.module:function, timm:NAME, got 'vgg'",
        ),
        (["--engine", "fast"], "engine must be one of auto"),
        (
            ["--engine", "cuda_graph", "--device", "cpu"],
            "--engine cuda_graph wants a CUDA device, got cpu: leave it out",
        ),
        (["--batch-stats", "batch"], "batch_stats must be one of frozen, split, train"),
        (["--loss-at", "fgsm"], "loss_at must be one of x, step, got 'fgsm'"),
        (["--loss-at", "step", "--batch-stats", "split"], "loss_at='step' must have batch_stats 'frozen' or 'train'"),
        (["--fraction", "0"], "fraction must be in (0, 1], 1 for a penalty on every sample, got 0"),
        (["--h-unit", "px"], "h_unit must be one of eps, l2, got 'px'"),
        (["--batch-stats", "train", "--microbatch", "8"], "microbatch must be None with batch_stats='train'"),
        (["--batch-stats", "train", "--engine", "first_order"], "batch_stats='train' must have an engine among"),
        (["--eps", "2"], "eps must be radii in (0, 1]"),
        (
            ["--objective", "trade"],
            "objective must be one of cure, standard, input-gradient, fgsm, fgsm-rs, pgd, trades",
        ),
        (["--optimizer", "lion"], "optimizer must be one of adam, adamw, sgd, got 'lion'"),
        (["--momentum", "1"], "momentum must be in [0, 1), got 1"),
        (["--weight-decay", "-1"], "weight_decay must be >= 0, got -1"),
        (["--label-smoothing", "1"], "label smoothing must be in [0, 1), got 1"),
        (["--clip", "0"], "clip must be > 0, got 0"),
        (["--ema", "1"], "ema must be in (0, 1), such as 0.999, got 1"),
        (["--objective", "pgd", "--gamma", "1"], "gamma is no setting of the objective pgd, but of cure, input-grad"),
        (["--train-eps", "0.1"], "train_eps is no setting of the objective cure, but of fgsm, fgsm-rs, pgd, trades"),
        (["--objective", "pgd", "--train-eps", "0:2"], "train_eps must be <= 1, got 0:2"),
        (["--objective", "pgd", "--steps", "0"], "steps must be >= 1, got 0"),
        (["--objective", "standard", "--batch-stats", "split"], "batch_stats must be 'train' or 'frozen' for Standard"),
        (["--lr", "onecycle:-1"], "lr must be onecycle:PEAK with a peak > 0, such as onecycle:1e-2"),
        (["--preset", "best"], "preset must be one of digits, fast, strong, svhn-paper, got 'best'"),
        (["--device", "abacus"], "device must be auto, cpu, cuda"),
        (["--checkpoint", "nowhere.safetensors"], "checkpoint nowhere.safetensors does not exist"),
        (
            ["--dataset", "mnist"],
            f"dataset must be one of {', '.join([*DATASETS, *ADDRESSES])}, got 'mnist'",
        ),
        (["--dataset", "svhn", "--data-dir", "nowhere"], "train_32x32.mat"),
        (["--dataset", "npz:nowhere.npz"], "nowhere.npz"),
    ],
)
def test_bad_input_is_one_line_status_two_and_nothing_written(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert finetune(npz, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcure: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other shape"])
def test_a_bad_checkpoint_is_refused(
    whole: Path, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path = tmp_path / "weights.safetensors"
    weights = (whole / "model.safetensors").read_bytes()
    if damage == "truncated":
        path.write_bytes(weights[:1000])
    elif damage == "foreign":
        path.write_bytes(b"not weights at all")
    else:
        save_file(resnet8(num_classes=3).state_dict(), path)
    assert finetune(npz, tmp_path / "out", "--checkpoint", str(path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("does not fit the model" if damage == "other shape" else "cannot be read as weights") in error
    assert not (tmp_path / "out").exists()


def test_a_pickle_in_a_checkpoint_is_not_executed(npz: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    assert finetune(npz, tmp_path / "out", "--checkpoint", str(tmp_path / "bomb.pt")) == 2
    assert not (tmp_path / "exploded").exists()


def test_divergence_stops_with_what_to_try(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(npz, tmp_path / "out", "--gamma", "1e30", "--lr", "1e10") == 1
    assert "lower --lr or --gamma" in capsys.readouterr().err
