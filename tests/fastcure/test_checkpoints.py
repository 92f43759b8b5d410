"""Checkpoints of other tools: nested, with the prefixes of their wrappers, or one error that says what differs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_runs import Bomb
from torch import Tensor, nn

from fastcure.models.weights import load_weights

State = dict[str, Any]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.fc = nn.Linear(2, classes)


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def compiled_inside(state: State) -> State:
    return {name.replace("stem.", "stem._orig_mod."): value for name, value in state.items()}


NOTHING: State = {"": torch.zeros(())}
FOREIGN: dict[str, tuple[Callable[[State], Any], str]] = {
    "module.": (prefixed("module."), "took the prefix 'module.' off the names"),
    "model.": (prefixed("model."), "took the prefix 'model.' off the names"),
    "_orig_mod.": (prefixed("_orig_mod."), "took '_orig_mod.' out of the names"),
    "one of its own": (prefixed("some.encoder."), "took the prefix 'some.encoder.' off the names"),
    "all": (prefixed("model.module._orig_mod."), "took the prefix 'model.module.' off the names"),
    "a compiled part": (compiled_inside, "took '_orig_mod.' out of the names"),
    "fsdp": (prefixed("_fsdp_wrapped_module.module."), "took '_fsdp_wrapped_module.' out of the names"),
    **{
        name: ((lambda state, name=name: {"epoch": 3, "loss": torch.ones(()), name: state}), f"took '{name}'")
        for name in ("model", "state_dict", "model_state_dict", "net", "ema", "state_dict_ema")
    },
    "nested twice": (lambda state: {"state_dict": {"model": prefixed("module.")(state)}}, "took 'model'"),
    "lightning": (
        lambda state: {"state_dict": {**prefixed("model.")(state), "loss.weight": torch.ones(3)}, "epoch": 1},
        "left out what has no such prefix (loss.weight)",
    ),
    "raw and averaged": (
        lambda state: {"ema": {name: 2 * value for name, value in state.items()}, "model": state},
        "took 'model' and not 'ema'",
    ),
    "raw and averaged by prefix": (
        lambda state: {"ema." + name: 2 * value for name, value in state.items()} | prefixed("net.")(state),
        "took the prefix 'net.' off the names",
    ),
    "arguments": (lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)}, "took 'model'"),
}


def random_state(model: nn.Module) -> State:
    return {name: torch.rand_like(v) if v.is_floating_point() else v + 7 for name, v in model.state_dict().items()}


def check_equal(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


FLAT = [kind for kind in FOREIGN if all(isinstance(value, Tensor) for value in FOREIGN[kind][0](NOTHING).values())]


@pytest.mark.parametrize(
    ("suffix", "kind"), [*((".pt", kind) for kind in FOREIGN), *((".safetensors", kind) for kind in FLAT)]
)
def test_what_other_tools_save_is_understood_and_said_once(tmp_path: Path, kind: str, suffix: str) -> None:
    make, words = FOREIGN[kind]
    model, path, said = Net(), tmp_path / f"weights{suffix}", []
    state = random_state(model)
    content = make(state)
    if suffix == ".pt":
        torch.save(content, path)
    else:
        save_file(content, path)
    load_weights(model, path, said.append)
    check_equal(model, state)
    assert len(said) == 1
    assert str(path) in said[0]
    assert words in said[0]


def test_what_fits_is_loaded_in_silence(tmp_path: Path) -> None:
    model, said = Net(), []
    state = random_state(model)
    torch.save(state, tmp_path / "a.pt")
    load_weights(model, tmp_path / "a.pt", said.append)
    check_equal(model, state)
    assert not said


@pytest.mark.parametrize("name", ["module.", "_orig_mod."])
def test_a_wrapped_model_takes_bare_weights(tmp_path: Path, name: str) -> None:
    wrapped, said = nn.Module(), []
    wrapped.add_module(name[:-1], Net())
    state = random_state(Net())
    torch.save(state, tmp_path / "a.pt")
    load_weights(wrapped, tmp_path / "a.pt", said.append)
    check_equal(next(wrapped.children()), state)
    assert len(said) == (name == "module.")


def other_names(state: State) -> State:
    return {"backbone." + name.replace("stem", "root"): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda state: {k: v for k, v in state.items() if "fc" not in k}, ["it lacks fc.weight, fc.bias"]),
        (lambda state: {**state, "head.weight": torch.ones(1)}, ["the model has no head.weight"]),
        (other_names, ["took the prefix 'backbone.'", "it lacks stem.0.weight", "the model has no root.0.weight"]),
        (lambda state: {f"{k}.x": v for k, v in state.items()}, ["it lacks", "and 6 more", "the model has no"]),
        (lambda state: {**state, "fc.weight": torch.ones(5, 2)}, ["fc.weight is (5, 2) in it and (3, 2) in the model"]),
        (
            lambda state: prefixed("a.")(state) | prefixed("b.")(state),
            ["behind each of the prefixes 'a.', 'b.': save one of them alone"],
        ),
        (lambda _: {"epoch": 3, "optimizer": {"lr": 1}}, ["holds no tensors, only epoch, optimizer"]),
        (lambda _: {}, ["holds no tensors, only nothing"]),
        (lambda _: [1, 2], ["holds an object of type list: save model.state_dict()"]),
        (lambda _: {"model": {"model": {"model": {"model": {"model": {"model": {}}}}}}}, ["holds no tensors"]),
    ],
)
def test_what_does_not_fit_is_one_short_error(tmp_path: Path, make: Callable[[State], Any], words: list[str]) -> None:
    model = Net()
    torch.save(make(random_state(model)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit the model: ") as error:
        load_weights(model, tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    for part in words:
        assert part in str(error.value)


def test_a_pickle_within_arguments_is_not_executed(tmp_path: Path) -> None:
    torch.save(
        {"model": Net().state_dict(), "args": argparse.Namespace(a=Bomb(tmp_path / "exploded"))}, tmp_path / "a.pt"
    )
    with pytest.raises(ValueError, match=r"cannot be read as weights \(it asks for getattr"):
        load_weights(Net(), tmp_path / "a.pt")
    assert not (tmp_path / "exploded").exists()
