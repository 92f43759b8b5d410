"""What `explain` says is what happens: of engines, of batch norms in each mode, of a CURE."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from prepared import case_of
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE, curvature, explain, prepare
from fastcure._folding.layers import FOLDS
from fastcure.engines import ENGINES

X, Y = torch.rand(4, 3, 8, 8), torch.arange(4) % 3


class _Cubed(torch.autograd.Function):
    """Its backward is opaque: torch says so when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _CubedBackward.apply(g, *ctx.saved_tensors)


class _CubedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("cubed_backward has no derivative")


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Cubed.apply(x)


def network(activation: nn.Module) -> nn.Sequential:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(64, 3)),
    )
    model(X)
    return model


def engines(text: str) -> dict[str, str]:
    lines = [line.removeprefix("  engine ") for line in text.splitlines() if line.startswith("  engine ")]
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus(), Cubed()], ids=["relu", "softplus", "no derivative"])
@pytest.mark.parametrize("batch_stats", ["frozen", "train"])
@pytest.mark.filterwarnings("ignore:.*kinks")
def test_engines_run_or_fail_as_it_says(activation: nn.Module, batch_stats: Any) -> None:
    model = network(activation).train()
    said = engines(explain(model, X, batch_stats=batch_stats))
    assert set(said) == set(ENGINES) - {"auto"}
    for engine, words in said.items():
        if words == "not tried":
            continue
        try:
            curvature(model, X, Y, 0.1, engine=engine, batch_stats=batch_stats).penalty.sum().backward()
        except (NotImplementedError, RuntimeError, ValueError):
            assert words.startswith("fails"), engine
        else:
            assert words.startswith("runs"), engine


def test_an_operator_without_a_second_derivative_is_named() -> None:
    text = explain(network(Cubed()), X)
    assert text.startswith("engine: eager, which fails here")
    assert "NotImplementedError: cubed_backward has no derivative" in text.splitlines()[0]
    assert engines(text)["first_order"] == "runs, an estimate"


def test_kinks_are_named() -> None:
    assert engines(explain(network(nn.ReLU()), X))["first_order"] == "runs, an estimate that misses kinks (Relu)"


def test_norms_in_training_mode_are_not_folded() -> None:
    model = prepare(network(nn.ReLU()), X)
    cure = CURE(model, batch_stats="train")
    model.train()
    assert "folded into the layer before: 2 of 2" in explain(model)
    for text in (explain(cure), explain(model, batch_stats="train")):
        assert "folded into the layer before: 0 of 2\n  2 in training mode, where batch_stats='train'" in text
        assert "1 into 0" not in text
    model[1].eval()
    assert "folded into the layer before: 1 of 2\n  1 in training mode" in explain(cure)
    assert "1 into 0" in explain(cure)
    model.eval()
    assert "all are in evaluation mode: batch_stats='train' is then 'frozen'; call model.train()" in explain(cure)


def test_of_a_cure_its_settings_count() -> None:
    model = network(nn.Softplus())

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(logits, y, reduction="none").sum(1)

    cure = CURE(model, loss_fn=loss_fn, engine="reference")
    assert explain(cure).startswith("engine: reference, as asked")
    assert engines(explain(cure, X, torch.rand(4, 3)))["eager"] == "runs"
    assert engines(explain(cure, X))["eager"] == "runs"
    assert "RuntimeError" in engines(explain(cure, X, torch.rand(4, 5)))["eager"]
    with pytest.raises(ValueError, match="batch_stats must be"):
        explain(model, batch_stats="test")  # type: ignore[arg-type]


def test_a_cure_is_prepared_as_its_model() -> None:
    model = network(nn.ReLU())
    cure = CURE(model)
    assert prepare(cure, X) is cure
    assert "folded into the layer before: 2 of 2" in explain(model)
    assert explain(cure) == explain(model)


def test_it_leaves_no_trace() -> None:
    model = network(nn.ReLU()).train()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    random = torch.get_rng_state()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        explain(model, 255 * X, batch_stats="train")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    with pytest.warns(UserWarning, match="pixels should be"):  # still to be told
        curvature(model, 255 * X, Y)


def of_norms(text: str) -> list[str]:
    """What is said of anything but engines."""
    return [line for line in text.splitlines() if not line.strip().startswith("engine")]


def test_explain_before_and_after() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)]
    case = case_of(nn.Sequential(*layers), (3, 5, 5))
    lines = explain(case.model).splitlines()
    assert lines[0].startswith("engine: eager (")
    assert lines[1:] == ["batch norms folded: 0 of 2; fastcure.prepare(model, x) has not been called"]
    reason = "  2 not: its input is not the output of a plain convolution or linear layer that runs once"
    relus = ["ReLUs that can take the sum before them in one pass, on a GPU: 0 of 0"]
    relus += ["  not that of 1: batch_norm takes its output"]
    assert of_norms(explain(case.model, case.x)) == [*lines[1:], reason, *relus]
    assert case.model not in FOLDS
    prepare(case.model, case.x)
    found = ["batch norms folded into the layer before: 1 of 2", "  1 into 0"]
    assert explain(case.model).splitlines()[1:] == found
    assert of_norms(explain(case.model, case.x)) == [*found, reason, *relus]
    assert "folded into the layer before: 0 of 0" in explain(prepare(nn.Linear(3, 2), torch.rand(1, 3)))
