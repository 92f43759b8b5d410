"""ReLUs of prepared networks fused with what is before them, as on a GPU: which are found, and that nothing changes."""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from networks import Case, relative
from odd import fused, relus
from operators import Operators
from prepared import STYLES, check_exact, check_under_autocast, gradients, relu, style
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature, explain, prepare
from fastcure._folding import layers
from fastcure._folding.pending import Pending

FUSED = {  # of the ReLUs that run
    "torchvision-resnet18": (17, 17),
    "torchvision-resnet50": (49, 49),
    "timm-resnet": (8, 9),  # squeeze-and-excite multiplies before the addition: one is left to the shortcut's norm
    "timm-norm-act": (6, 7),
    "sequential": (4, 4),
    "mlp": (2, 2),
    "volumes": (1, 1),
    "resnet8": (7, 7),
    "wide-resnet": (3, 7),  # as many as batch norms that can be folded
}

pytestmark = pytest.mark.usefixtures("kernels")


def operators(case: Case, backward: bool = False) -> Counter[str]:
    with Operators() as counted:
        out = curvature(*case, direction=torch.rand_like(case.x))
        if backward:
            (out.loss + out.penalty).sum().backward()
    return Counter(counted.calls)


@pytest.mark.parametrize(("name", "act"), [*((name, relu) for name in STYLES), ("resnet8", nn.ReLU), ("mlp", nn.ReLU)])
def test_n_of_n_are_fused_and_nothing_changes(name: str, act: Callable[[], nn.Module]) -> None:
    case = style(name, act)
    prepare(case.model, case.x)
    assert fused(case) == FUSED[name]
    before_relu = explain(case.model).count(", before ReLU")
    assert before_relu == STYLES[name].folded - sum("not that of" in line for line in relus(case))
    check_exact(case)


def test_fp32() -> None:
    errors = []
    for seed in range(3):
        case = style("torchvision-resnet18", relu, seed).copy(torch.float32)
        z = F.normalize(torch.randn_like(case.x).flatten(1)).view_as(case.x)
        ours, truths = (gradients(case, prepared, direction=z, h=3.0) for prepared in (True, False))
        values = [relative(value, truth) for value, truth in zip(ours[:3], truths[:3], strict=True)]
        errors.append(max(*values, relative(ours[3:], truths[3:])))
    assert sorted(errors)[1] < 1e-5  # the median: a kink of a ReLU may fall on the other side


@pytest.mark.parametrize("options", [{"batch_stats": "split"}, {"power": 1}], ids=str)
def test_split_statistics_and_power_one(options: dict[str, Any]) -> None:
    check_exact(style("torchvision-resnet18", relu), **options)


def test_every_relu_is_one_kernel_in_every_pass() -> None:
    case = style("torchvision-resnet18", relu)
    assert not {"gated_sum", "gated_sum_and_mask"} & operators(case).keys()
    prepare(case.model, case.x)
    calls = operators(case, backward=True)
    assert calls["gated_sum_and_mask"] == 17 * 2  # at two points
    assert calls["gated_sum"] == 17 * 2 * 3  # the forward's derivative, and that of both again
    assert not {"relu", "relu_", "threshold_backward", "native_batch_norm"} & calls.keys()


def test_no_bias_gradient_is_summed_for_the_direction() -> None:
    case = style("torchvision-resnet18", relu)
    prepare(case.model, case.x)
    assert operators(case).get("sum", 0) <= 2  # the losses


def test_where_no_kernel_runs_nothing_is_left_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", "auto")
    case = style("torchvision-resnet18", relu)
    prepare(case.model, case.x)
    assert fused(case) == (17, 17)
    monkeypatch.setattr(Pending, "of", lambda *args: pytest.fail("a sum was left pending"))
    curvature(*case)


def test_under_autocast() -> None:
    check_under_autocast(relu)


def test_channels_last() -> None:
    case = style("torchvision-resnet18", relu)
    model = case.model.to(memory_format=torch.channels_last)
    check_exact(Case(model, case.x.contiguous(memory_format=torch.channels_last), case.y))


# Hooks, wrappers, memory


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_around_a_batch_norm_fire_and_see_what_they_should(kind: str, when: str) -> None:
    case, seen = style("torchvision-resnet18", relu), []
    register: dict[str, Callable[[nn.Module], Any]] = {
        "forward": lambda m: m.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone())),
        "pre": lambda m: m.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone())),
        "backward": lambda m: m.register_full_backward_hook(lambda m, g_in, g_out: seen.append(g_out[0].detach())),
    }
    # The shortcut's convolution and norm, whose output is added to; or a ReLU, whose input is such a sum.
    watched = case.model.layers[1][0].act if kind == "pre" else case.model.layers[1][0].downsample

    def what_is_seen(engine: str) -> list[Tensor]:
        seen.clear()
        curvature(*case, engine=engine, direction=torch.ones_like(case.x))
        return list(seen)

    handle = register[kind](watched)
    truth = what_is_seen("eager")
    if when == "after":
        handle.remove()
    prepare(case.model, case.x)
    if when == "after":
        handle = register[kind](watched)
    ours = what_is_seen("eager")
    assert len(ours) == len(truth) >= 2
    assert {type(tensor) for tensor in ours} == {Tensor}
    assert all(relative(a, b) < 1e-10 for a, b in zip(ours, truth, strict=True))
    handle.remove()


def tensors() -> Sequence[Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def test_nothing_is_held_after_the_backward() -> None:
    case = style("torchvision-resnet18", relu)
    prepare(case.model, case.x)
    gc.collect()
    gc.disable()  # what is left is held by something, and not by itself alone
    try:
        for _ in range(2):
            (curvature(*case).penalty.sum()).backward()
            held = tensors()
            assert not [thing for thing in held if isinstance(thing, Pending)]
            counts = locals().setdefault("counts", [])
            counts.append(len(held))
            del held
        assert counts[0] == counts[1]
    finally:
        gc.enable()


def test_small_images_are_fused_only_where_a_launch_costs_the_host_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "use_triton", lambda x: True)
    monkeypatch.setenv("FASTCURE_BACKEND", "auto")
    small, large = torch.empty(8), torch.empty(layers.LARGE // 4, device="meta")
    assert [layers._is_worth_a_kernel(x) for x in (small, large)] == [False, True]
    with layers.replayed():
        assert layers._is_worth_a_kernel(small)
    assert not layers._is_worth_a_kernel(small)
