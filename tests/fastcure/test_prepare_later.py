"""What becomes of a prepared network: changed, copied, wrapped, compiled, gone."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from networks import relative
from odd import Odd, pair
from prepared import case_of, count, relu, style
from torch import Tensor, nn

from fastcure import curvature, explain, prepare
from fastcure._folding.layers import FOLDS, Fold, _once

# `Odd` has a dropout, which few of its ways take.
pytestmark = pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")


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


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.square()


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def replaced(model: Odd, name: str, layer: nn.Module) -> None:
    setattr(model, name, layer.double().train())


def of_its_own(module: Any, name: str, function: Callable[[Tensor], Tensor]) -> None:
    setattr(module, name, function)


def wider(model: Odd, groups: int = 1) -> None:
    """Eight channels in place of five, in the modules that were prepared."""
    model.conv.weight = nn.Parameter(torch.randn(8, 2 // groups, 3, 3).double())
    model.conv.bias, model.conv.groups = nn.Parameter(torch.randn(8).double()), groups
    model.bn.weight, model.bn.bias = (nn.Parameter(torch.rand(8).double()) for _ in range(2))
    model.bn.running_mean, model.bn.running_var = torch.rand(8).double(), torch.rand(8).double() + 0.5
    replaced(model, "head", nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)))


def without(module: nn.Module, *names: str) -> None:
    for name in names:
        setattr(module, name, None)


def setting(module: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(module, name, value)


LATER: dict[str, Callable[[Odd], object]] = {
    "class of the convolution": lambda m: setattr(m.conv, "__class__", Doubled),
    "class of the batch norm": lambda m: setattr(m.bn, "__class__", Shifted),
    "forward of the convolution": lambda m: of_its_own(m.conv, "forward", lambda x: m.other(x).sin()),
    "inner forward of the convolution": lambda m: of_its_own(
        m.conv, "_conv_forward", lambda x, w, b: nn.functional.conv2d(x, w.sin(), b)
    ),
    "forward of the batch norm": lambda m: of_its_own(m.bn, "forward", torch.sin),
    "hook of the convolution": lambda m: m.conv.register_forward_hook(doubled),
    "hook of the batch norm": lambda m: m.bn.register_forward_hook(doubled),
    "hook before the convolution": lambda m: m.conv.register_forward_pre_hook(lambda module, args: (args[0].sin(),)),
    "hook before the batch norm": lambda m: m.bn.register_forward_pre_hook(lambda module, args: (args[0].sin(),)),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.conv.eval()),
    "orthogonal": lambda m: nn.utils.parametrizations.orthogonal(m.conv),
    "pruning": lambda m: nn.utils.prune.l1_unstructured(m.conv, "weight", 20),
    "no statistics": lambda m: without(m.bn, "running_mean", "running_var"),
    "eps": lambda m: setting(m.bn, eps=0.5),
    "no map": lambda m: without(m.bn, "weight", "bias"),
    "no weight": lambda m: without(m.bn, "weight"),
    "no bias of the convolution": lambda m: without(m.conv, "bias"),
    "statistics not tracked": lambda m: setting(m.bn, track_running_stats=False),
    "other statistics": lambda m: setting(m.bn, running_var=torch.rand(5).double() + 0.1),
    "more channels": wider,
    "stride": lambda m: setting(m.conv, stride=(2, 2)),
    "padding": lambda m: setting(m.conv, padding=(2, 1)),
    "padding by name": lambda m: setting(m.conv, padding="valid"),
    "dilation": lambda m: setting(m.conv, dilation=(2, 1)),
    "padding mode": lambda m: setting(m.conv, padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1]),
    "groups": lambda m: wider(m, groups=2),
    "flags": lambda m: m.eval(),
    "frozen": lambda m: m.conv.requires_grad_(False),
    "a convolution of a stride": lambda m: replaced(m, "conv", nn.Conv2d(2, 5, 3, stride=2)),
    "another kind of convolution": lambda m: replaced(m, "conv", nn.ConvTranspose2d(2, 5, 3)),
    "another kind of norm": lambda m: replaced(m, "bn", nn.GroupNorm(5, 5)),
    "no norm": lambda m: replaced(m, "bn", nn.Identity()),
    "weights shared with another": lambda m: setting(m.other, weight=m.conv.weight),
    "the way: twice": lambda m: setting(m, way=lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x.sin()))),
    "the way: both": lambda m: setting(m, way=lambda m, x: m.bn(m.conv(x)) * m.bn(m.other(x))),
    "the way: another norm": lambda m: setting(m, way=lambda m, x: m.later(m.other(x))),
    "the way: with something between": lambda m: setting(m, way=lambda m, x: m.bn(m.conv(x).sin())),
    "the way: another norm after it": lambda m: setting(m, way=lambda m, x: m.later(m.conv(x))),
    "the way: kept": lambda m: setting(m, way=lambda m, x: m.stored(x, torch.sin)),
}


@pytest.mark.parametrize("name", LATER)
def test_what_changes_on_a_prepared_network_is_right_or_one_error(name: str) -> None:
    case = case_of(Odd(pair), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LATER[name](case.model)
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    if name in ("the way: with something between", "the way: another norm after it", "the way: kept"):
        with pytest.raises(RuntimeError, match=r"call fastcure\.prepare again after a change"):
            curvature(*case, 0.7)
        return
    penalty, wanted = by_definition(*case, 0.7)
    ours = curvature(*case, 0.7).penalty
    found = torch.autograd.grad(ours.sum(), parameters, allow_unused=True, materialize_grads=True)
    assert relative(ours, penalty) < 1e-10
    assert relative(found, wanted) < 1e-10


def by_definition(model: nn.Module, x: Tensor, y: Tensor, h: float) -> tuple[Tensor, Sequence[Tensor]]:
    """The penalties and the parameter gradients of their sum, by plain double backpropagation."""
    flags = [module.training for module in model.modules()]
    model.eval()

    def g(point: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(point), y, reduction="sum")
        return torch.autograd.grad(loss, point, create_graph=True)[0]

    x = x.clone().requires_grad_()
    g_x = g(x)
    sign = g_x.detach().sign()
    d = g(x + h * sign / sign.flatten(1).norm(dim=1).view(-1, 1, 1, 1)) - g_x
    penalty = d.square().flatten(1).sum(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(penalty.sum(), parameters, allow_unused=True, materialize_grads=True)
    for module, training in zip(model.modules(), flags, strict=True):
        module.training = training
    return penalty.detach(), gradients


def test_a_forward_exchanged_in_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(Odd(pair), (2, 6, 6))
    prepare(case.model, case.x)
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        own = kind.forward
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda module, x, own=own: own(module, x).sin())
            penalty, _ = by_definition(*case, 0.7)
            assert relative(curvature(*case, 0.7).penalty, penalty) < 1e-10


def test_a_hook_of_all_modules_is_seen() -> None:
    case = case_of(Odd(pair), (2, 6, 6))
    prepare(case.model, case.x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output.sin() if isinstance(module, nn.Conv2d) else None
    )
    try:
        penalty, _ = by_definition(*case, 0.7)
        assert relative(curvature(*case, 0.7).penalty, penalty) < 1e-10
    finally:
        handle.remove()


@pytest.mark.parametrize("channels", [1, 4])
def test_a_norm_that_does_not_fit_is_an_error(channels: int) -> None:
    case = case_of(Odd(pair), (2, 6, 6))
    prepare(case.model, case.x)
    setting(case.model.bn, running_mean=torch.zeros(channels).double(), running_var=torch.ones(channels).double())
    setting(case.model.bn, weight=None, bias=None)
    with pytest.raises(RuntimeError, match=f"should contain 5 elements not {channels}"):
        curvature(*case)


def test_a_network_whose_child_refers_to_it_is_freed() -> None:
    case = case_of(Odd(pair), (2, 6, 6))
    case.model.conv.root = [case.model]
    case.model.bn.root = [case.model]
    prepare(case.model, case.x)
    assert count(case.model) == 1
    curvature(*case).penalty.sum().backward()
    alive = [weakref.ref(case.model), weakref.ref(case.model.conv), weakref.ref(case.model.conv.weight)]
    del case
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
