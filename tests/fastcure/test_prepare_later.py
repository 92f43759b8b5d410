"""What becomes of a prepared network: changed, copied, wrapped, compiled, gone; and what is said of it."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from networks import relative
from odd import Odd, pair
from prepared import case_of, count, relu, style
from torch import Tensor, nn

from fastcure import curvature, explain, prepare
from fastcure.layers import FOLDS, Fold, _once


@pytest.mark.parametrize("replaced", ["conv", "bn"])
def test_a_layer_replaced_since(replaced: str) -> None:
    case = case_of(Odd(pair), (2, 6, 6))
    prepare(case.model, case.x)
    setattr(case.model, replaced, copy.deepcopy(getattr(case.model, replaced)))
    out, truth = curvature(*case), curvature(*case, engine="reference")
    assert relative(out.penalty, truth.penalty) < 1e-10
    assert "folded into the layer before: 0 of 2" in explain(case.model)
    prepare(case.model, case.x)
    assert "folded into the layer before: 1 of 2\n  bn into conv" in explain(case.model)


def test_folding_is_done_once_and_again_after_a_change() -> None:
    layer, norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
    folded = _once(Fold(layer, norm))

    def change(tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.add_(1)

    changes = [
        *(lambda tensor=tensor: change(tensor) for tensor in (layer.weight, layer.bias, norm.weight, norm.running_var)),
        lambda: setattr(norm, "bias", nn.Parameter(torch.ones(3))),
        lambda: setattr(layer, "bias", None),
    ]
    for alter in changes:
        before = folded()
        assert all(a is b for a, b in zip(folded(), before, strict=True))
        alter()
        weight, bias = folded()
        x = torch.rand(2, 2, 4, 4)
        torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm.eval()(layer(x)))
    with torch.no_grad():
        assert not folded()[0].requires_grad
    assert folded()[0].requires_grad


def test_prepared_twice_is_as_prepared_once() -> None:
    case = style("torchvision-resnet18", nn.GELU)
    once = explain(prepare(case.model, case.x))
    assert explain(prepare(case.model, case.x)) == once
    assert count(case.model) == 20


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_right_and_not_prepared(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    case = style("torchvision-resnet18", nn.GELU)
    prepare(case.model, case.x)
    twin = duplicate(case.model)
    assert twin.state_dict().keys() == case.model.state_dict().keys()
    assert "fastcure.prepare(model, x) has not been called" in explain(twin)
    values = [curvature(model, case.x, case.y).penalty for model in (case.model, twin)]
    assert relative(*values) < 1e-10


def test_a_network_that_is_gone_leaves_nothing_behind() -> None:
    gc.collect()
    before = len(FOLDS)
    case = style("resnet8", relu)
    prepare(case.model, case.x)
    (curvature(*case).penalty.sum()).backward()
    alive = [weakref.ref(case.model), weakref.ref(case.model.conv1), weakref.ref(case.model.conv1.weight)]
    assert len(FOLDS) == before + 1
    del case
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert len(FOLDS) == before


def test_a_prepared_network_within_another() -> None:
    case = style("resnet8", nn.GELU)
    prepare(case.model, case.x)
    outer = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 2, bias=False), nn.BatchNorm2d(3), case.model)
    whole = case_of(outer, (3, 6, 6))
    for _ in range(2):
        out, truth = curvature(*whole), curvature(*whole, engine="reference")
        assert relative(out.penalty, truth.penalty) < 1e-10
        prepare(outer, whole.x)
    assert count(outer) == 10
    assert count(case.model) == 9


def test_a_compiled_network_is_prepared_as_what_is_in_it() -> None:
    case = style("resnet8", relu)
    compiled = torch.compile(case.model, backend="eager")
    assert prepare(compiled, case.x) is compiled
    assert count(case.model) == 9
    assert explain(compiled) == explain(case.model)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.fails:
            raise KeyError("from the network")
        return out


@pytest.mark.parametrize("prepared", [False, True])
def test_an_exception_leaves_nothing_behind(prepared: bool) -> None:
    case = case_of(Fails(), (3, 5, 5))
    if prepared:
        prepare(case.model, case.x)
    wanted = curvature(*case).penalty
    state = [(module.training, sorted(vars(module)), len(module._forward_hooks)) for module in case.model.modules()]
    case.model.fails = True
    for call in (curvature, lambda model, x, y: prepare(model, x), lambda model, x, y: explain(model, x)):
        with pytest.raises(KeyError, match="from the network"):
            call(*case)
        assert [(m.training, sorted(vars(m)), len(m._forward_hooks)) for m in case.model.modules()] == state
    assert count(case.model) == prepared
    case.model.fails = False
    assert torch.equal(curvature(*case).penalty, wanted)


def test_explain_before_and_after() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)]
    case = case_of(nn.Sequential(*layers), (3, 5, 5))
    lines = explain(case.model).splitlines()
    assert lines[0].startswith("engine: eager (")
    assert lines[1:] == ["batch norms folded: 0 of 2; fastcure.prepare(model, x) has not been called"]
    reason = "  2 not: its input is not the output of a plain convolution or linear layer that runs once"
    relus = ["ReLUs that can take the sum before them in one pass, on a GPU: 0 of 0"]
    relus += ["  not that of 1: addcmul takes its output"]
    assert explain(case.model, case.x).splitlines()[1:] == [*lines[1:], reason, *relus]
    assert case.model not in FOLDS
    prepare(case.model, case.x)
    found = ["batch norms folded into the layer before: 1 of 2", "  1 into 0"]
    assert explain(case.model).splitlines()[1:] == found
    assert explain(case.model, case.x).splitlines()[1:] == [*found, reason, *relus]
    assert "folded into the layer before: 0 of 0" in explain(prepare(nn.Linear(3, 2), torch.rand(1, 3)))


def test_one_image_is_enough_and_its_gradients_are_nobodys() -> None:
    case = style("sequential", relu)
    x = case.x[:1].requires_grad_()
    prepare(case.model, x)
    assert count(case.model) == 4
    assert x.grad is None
    assert all(p.grad is None for p in case.model.parameters())


def test_preparing_under_no_grad_finds_the_same() -> None:
    case = style("resnet8", relu)
    with torch.no_grad():
        prepare(case.model, case.x)
    assert count(case.model) == 9


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
        prepare(relu, torch.rand(1, 3))
