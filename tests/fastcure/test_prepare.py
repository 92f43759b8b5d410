"""Batch norms folded while the penalty is evaluated: n of n are found, and nothing that a user can see changes."""

from collections import Counter
from typing import Any

import pytest
import torch
from networks import Case, relative
from operators import Operators
from prepared import STYLES, Activation, case_of, check_exact, count, every_style, gradients, relu, style
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature, explain, prepare
from fastcure._folding.layers import NORMS


@every_style
@pytest.mark.parametrize("act", [relu, nn.GELU])
def test_n_of_n_are_found_and_nothing_changes(name: str, act: Activation) -> None:
    case = style(name, act)
    prepare(case.model, case.x)
    assert (count(case.model), sum(isinstance(m, NORMS) for m in case.model.modules())) == STYLES[name][2:]
    assert f"batch norms folded into the layer before: {STYLES[name].folded} of {STYLES[name].norms}" in explain(
        case.model
    )
    check_exact(case)


@every_style
@pytest.mark.parametrize("act", [relu, nn.GELU])
def test_fp32(name: str, act: Activation) -> None:
    errors = []
    for seed in range(3 if act is relu else 1):
        case = style(name, act, seed).copy(torch.float32)
        # Given: a sign may flip where the gradient is nearly zero. Long: a short step leaves few digits of d.
        z = F.normalize(torch.randn_like(case.x).flatten(1)).view_as(case.x)
        ours, truths = (gradients(case, prepared, direction=z, h=3.0) for prepared in (True, False))
        values = [relative(value, truth) for value, truth in zip(ours[:3], truths[:3], strict=True)]
        errors.append(max(*values, relative(ours[3:], truths[3:])))
    assert sorted(errors)[len(errors) // 2] < 1e-5  # the median: a kink of a ReLU may fall on the other side


def operators(case: Case) -> Counter[str]:
    with Operators() as counted:
        curvature(*case, direction=torch.rand_like(case.x))
    return Counter(counted.calls)


def test_a_prepared_network_runs_no_batch_norm() -> None:
    case = style("torchvision-resnet18", relu)
    before = operators(case)
    assert before["addcmul"] == 2 * 20 + 1  # both points; and x + h z
    prepare(case.model, case.x)
    after = operators(case)
    assert after["addcmul"] == 1
    assert after["rsqrt"] == 20  # folded once for both points
    assert after["convolution"] == before["convolution"] == 2 * 20
    assert not {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"} & set(after)


# Nothing is changed that a user can see


def test_preparing_changes_nothing() -> None:
    case = style("timm-resnet", relu)
    model = case.model
    model[3].eval()
    model[0][0][0].weight.grad = torch.ones_like(model[0][0][0].weight)
    model[0][0][0].weight.requires_grad_(False)

    def everything() -> list[Any]:
        return [
            [(key, value.clone()) for key, value in model.state_dict().items()],
            [(module, type(module), module.training, sorted(vars(module))) for module in model.modules()],
            [(p, p.requires_grad, p.grad, p._version) for p in model.parameters()],
            [(buffer, buffer._version) for buffer in model.buffers()],
        ]

    before = everything()
    assert prepare(model, case.x) is model
    curvature(*case)
    for old, new in zip(before, everything(), strict=True):
        for a, b in zip(old, new, strict=True):
            assert all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in zip(a, b, strict=True))
    assert case.x.grad is None
    assert not case.x.requires_grad


def test_an_ordinary_training_step_is_ordinary_after_it() -> None:
    case = style("torchvision-resnet18", relu)
    twin = case.copy()
    curvature(prepare(case.model, case.x), case.x, case.y)
    for each in (case, twin):
        F.cross_entropy(each.model(each.x), each.y).backward()
    for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(case.model.buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(p, q)


def test_a_training_forward_before_the_backward_changes_nothing() -> None:
    wanted = gradients(style("sequential", nn.GELU), True)
    case = style("sequential", nn.GELU)
    prepare(case.model, case.x)
    out = curvature(*case, h=0.7)
    case.model(5 * torch.randn_like(case.x))  # overwrites the running statistics in place
    total = out.loss @ torch.linspace(1, 2, 2).double() + 3 * out.penalty.sum()
    for value, truth in zip(torch.autograd.grad(total, list(case.model.parameters())), wanted[3:], strict=True):
        assert torch.equal(value, truth)


def test_the_weights_of_the_day_are_folded_not_those_of_preparation() -> None:
    case = style("sequential", nn.GELU)
    prepare(case.model, case.x)
    with torch.no_grad():
        for tensor in [*case.model.parameters(), *case.model.buffers()]:
            tensor += 0.1 * torch.rand_like(tensor) if tensor.is_floating_point() else 0
    out, truth = curvature(*case), curvature(*case.copy(), engine="reference")
    assert relative(out.penalty, truth.penalty) < 1e-10


def test_split_statistics_and_power_one() -> None:
    for options in ({"batch_stats": "split"}, {"power": 1}):
        check_exact(style("torchvision-resnet18", nn.GELU), **options)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_exclude_their_pair_and_still_fire(which: int, when: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip
    case, seen = case_of(model, (3, 6, 6)), []
    if when == "after":
        prepare(model, case.x)
    handle = model[which].register_forward_hook(lambda module, args, out: seen.append(out) or out.sin())
    if when == "before":
        prepare(model, case.x)
        why = ["its input is not the output of a plain convolution", "it is of a subclass, or has hooks"][which]
        assert f"1 not: {why}" in explain(model, case.x)
    assert count(model) == 1
    assert "folded into the layer before: 1 of 2\n  4 into 3" in explain(model)
    seen.clear()
    out, truth = curvature(*case), curvature(*case, engine="reference")
    assert len(seen) >= 2
    assert type(seen[0]) is Tensor
    assert relative(out.penalty, truth.penalty) < 1e-10
    handle.remove()
    assert relative(curvature(*case).penalty, curvature(*case, engine="reference").penalty) < 1e-10


def test_hooks_on_other_modules_fire_with_ordinary_tensors() -> None:
    case, seen = style("torchvision-resnet18", nn.GELU), []
    block = case.model.layers[1]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.register_forward_hook(lambda module, args, out: seen.append(out))
    block.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    prepare(case.model, case.x)
    assert count(case.model) == 20
    seen.clear()
    curvature(*case)
    assert len(seen) == 6
    assert {type(tensor) for tensor in seen} == {Tensor}


def test_a_hook_that_takes_the_layers_output_from_around_it() -> None:
    inner, seen = nn.Sequential(nn.Conv2d(3, 4, 3)), []
    model = nn.Sequential(inner, nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    case = case_of(model, (3, 6, 6))
    inner.register_forward_hook(lambda module, args, out: seen.append(out.mean()))
    prepare(model, case.x)
    assert count(model) == 0
    assert "1 not: the output of 0.0 is used elsewhere too" in explain(model, case.x)
    check_exact(case)


def test_a_hook_on_all_modules_turns_folding_off() -> None:
    case, seen = style("mlp", nn.GELU), {}
    prepare(case.model, case.x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.update({module: out}))
    try:
        curvature(*case)
    finally:
        handle.remove()
    linear, norm = case.model[1:3]
    assert type(seen[linear]) is Tensor
    torch.testing.assert_close(seen[norm], norm.eval()(seen[linear]))  # and not a norm's output under the layer's name
    assert count(case.model) == 2
