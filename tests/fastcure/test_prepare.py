"""Batch norms folded while the penalty is evaluated: which are found, that nothing changes, and no silent mistake."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from networks import Case, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcure import CURE, curvature, explain, prepare
from fastcure.layers import FOLDS, NORMS, folds_of
from fastcure.models import WideResNet, resnet8

Activation = Callable[[], nn.Module]


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


# Networks as torchvision writes them


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None, act: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = act()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.act(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None, act: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.act = act()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.act(out)


Block = type[Basic] | type[Bottleneck]


class TorchvisionStyle(nn.Module):
    """A 7 x 7 stem with pooling, four stages, shortcuts that are a Sequential of convolution and norm."""

    def __init__(self, block: Block, layers: tuple[int, ...], act: Activation) -> None:
        super().__init__()
        self.inputs = 4
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.act = act()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(
            *[self.stage(block, 4 << i, n, 1 if i == 0 else 2, act) for i, n in enumerate(layers)]
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inputs, 5)

    def stage(
        self, block: type[Basic] | type[Bottleneck], width: int, n: int, stride: int, act: Activation
    ) -> nn.Module:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or self.inputs != outputs:
            downsample = nn.Sequential(nn.Conv2d(self.inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        blocks = [block(self.inputs, width, stride, downsample, act)]
        blocks += [block(outputs, width, 1, None, act) for _ in range(n - 1)]
        self.inputs = outputs
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


# Networks as timm writes them


class BlurPool(nn.Module):
    """Anti-aliased downsampling by a fixed kernel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (kernel[:, None] * kernel / 16).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel, stride=2, groups=x.shape[1])


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), 1, 1, 1).bernoulli_(0.8) / 0.8 if self.training else x


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, act: Activation) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, channels, 1)
        self.act, self.gate = act(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))))


class NormAct(nn.BatchNorm2d):
    """Norm and activation in one layer, a subclass: left alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class TimmBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, act: Activation, norm_act: bool) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return NormAct(channels) if norm_act else nn.BatchNorm2d(channels)

        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = norm(width)
        self.drop_block = nn.Identity()
        self.act1 = nn.Identity() if norm_act else act()
        self.aa = BlurPool(width) if stride == 2 else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcite(width, act)
        self.drop_path = DropPath()
        self.act2 = act()
        self.downsample = nn.Identity()
        if stride == 2 or inputs != width:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.drop_path(self.se(self.bn2(self.conv2(x))))
        x = x + self.downsample(shortcut)
        return self.act2(x)


def timm_style(act: Activation, norm_act: bool = False) -> nn.Module:
    """A deep stem, anti-aliasing, drop path, squeeze-and-excite and pooled shortcuts."""
    return nn.Sequential(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), act()),
            nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), act()),
            nn.Conv2d(4, 6, 3, 1, 1, bias=False),
        ),
        nn.BatchNorm2d(6),
        act(),
        TimmBlock(6, 6, 1, act, norm_act),
        TimmBlock(6, 8, 2, act, norm_act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def stack(act: Activation) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(6, 1e-3),
        act(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.BatchNorm2d(8, affine=False),
        act(),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 3, dilation=2, bias=False),
        nn.BatchNorm1d(6, momentum=None),
        act(),
        nn.Flatten(),
        nn.LazyLinear(9, bias=False),
        nn.SyncBatchNorm(9),
        act(),
        nn.Linear(9, 5),
    )


def mlp(act: Activation) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, 16), nn.BatchNorm1d(16), act(), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8),
        act(), nn.Linear(8, 5),
    )  # fmt: skip


def volumes(act: Activation) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(2, (4, 2)), nn.Conv3d(3, 4, (3, 2, 3)), nn.BatchNorm3d(4), act(), nn.Flatten(), nn.LazyLinear(5)
    )


class Style(NamedTuple):
    build: Callable[[Activation], nn.Module]
    size: int
    """of an image, in pixels"""
    folded: int
    norms: int


STYLES = {
    "torchvision-resnet18": Style(lambda act: TorchvisionStyle(Basic, (2, 2, 2, 2), act), 32, 20, 20),
    "torchvision-resnet50": Style(lambda act: TorchvisionStyle(Bottleneck, (3, 4, 6, 3), act), 32, 53, 53),
    "timm-resnet": Style(timm_style, 16, 10, 10),
    "timm-norm-act": Style(lambda act: timm_style(act, norm_act=True), 16, 8, 10),
    "sequential": Style(stack, 8, 4, 4),
    "mlp": Style(mlp, 8, 2, 2),
    "volumes": Style(volumes, 8, 1, 1),
    "resnet8": Style(lambda act: resnet8(classes=5), 8, 9, 9),
    # Norm before convolution: only the second of each block, between its convolutions, has one to itself.
    "wide-resnet": Style(lambda act: WideResNet(10, 1, classes=5), 8, 3, 7),
}
every_style = pytest.mark.parametrize("name", STYLES)


def case_of(model: nn.Module, shape: tuple[int, ...], batch: int = 4, seed: int = 0) -> Case:
    """The network in fp64, its batch norms with statistics and maps that are not trivial, and images."""
    torch.manual_seed(seed)
    x = torch.rand(batch, *shape)
    model.eval()(x)  # lazy layers
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                None if tensor is None else nn.init.normal_(tensor, std=0.3)
            for tensor in (module.running_var, module.weight):
                None if tensor is None else nn.init.uniform_(tensor, 0.5, 1.5)
    return Case(model.double().train(), x.double(), torch.arange(batch) % 3)


def style(name: str, act: Activation, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    return case_of(STYLES[name].build(act), (3, STYLES[name].size, STYLES[name].size), 2, seed)


def gradients(case: Case, prepared: bool, **options: Any) -> list[Tensor]:
    """Logits, loss, penalty and parameter gradients, on a copy that is prepared or not."""
    case = case.copy()
    if prepared:
        prepare(case.model, case.x)
    parameters = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    out = curvature(*case, **{"h": 0.7, **options})
    total = out.loss @ torch.linspace(1, 2, len(case.x)).to(out.loss) + 3 * out.penalty.sum()
    return [
        out.logits,
        out.loss.detach(),
        out.penalty.detach(),
        *torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True),
    ]


def check_exact(case: Case, tolerance: float = 1e-10) -> None:
    """Each value and gradient of the prepared network is that of the unprepared one and of the oracle."""
    ours = gradients(case, True)
    for truths in (gradients(case, False), gradients(case, False, engine="reference")):
        scale = max(float(truth.norm()) for truth in truths[3:])
        for value, truth in zip(ours, truths, strict=True):
            # What is zero but for rounding (a bias under a norm that uses the batch) is compared with the others.
            assert float((value - truth).norm()) <= tolerance * max(float(truth.norm()), 1e-4 * scale)


def count(model: nn.Module) -> int:
    return len(folds_of(model))


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
    for seed in range(5):
        case = style(name, act, seed).copy(torch.float32)
        # Given: a sign may flip where the gradient is nearly zero. Long: a short step leaves few digits of d.
        z = F.normalize(torch.randn_like(case.x).flatten(1)).view_as(case.x)
        ours, truths = (gradients(case, prepared, direction=z, h=3.0) for prepared in (True, False))
        values = [relative(value, truth) for value, truth in zip(ours[:3], truths[:3], strict=True)]
        errors.append(max(*values, relative(ours[3:], truths[3:])))
    assert sorted(errors)[2] < 1e-5  # the median: a kink of a ReLU may fall on the other side


class Operators(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def operators(case: Case) -> dict[str, int]:
    with Operators() as counted:
        curvature(*case, direction=torch.rand_like(case.x))
    return counted.calls


def test_a_prepared_network_runs_no_batch_norm() -> None:
    case = style("torchvision-resnet18", relu)
    before = operators(case)
    assert before["addcmul"] == 2 * 20 + 1  # both points; and x + h z
    prepare(case.model, case.x)
    after = operators(case)
    assert after["addcmul"] == 1
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


def test_statistics_that_change_in_the_forward_come_back() -> None:
    model = case_of(Odd(norm_in_training), (2, 6, 6)).model
    before = [buffer.clone() for buffer in model.buffers()]
    prepare(model, torch.rand(2, 2, 6, 6).double())
    assert all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True))


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
    case = style("timm-resnet", nn.GELU)
    for options in ({"batch_stats": "split"}, {"power": 1}):
        ours = gradients(case, True, **options)
        truths = gradients(case, False, engine="reference", **options)
        assert all(relative(value, truth) < 1e-9 for value, truth in zip(ours, truths, strict=True))


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


def test_cure_under_distributed_data_parallel(tmp_path: object) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[operator]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        case = style("resnet8", relu)
        twin = case.copy()
        prepare(case.model, case.x)
        wrapped = nn.parallel.DistributedDataParallel(CURE(case.model))
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(case.x, case.y).total.backward()
        assert count(case.model) == 9
        CURE(twin.model, engine="reference")(twin.x, twin.y).total.backward()
        for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
            assert relative(p.grad, q.grad) < 1e-10
    finally:
        torch.distributed.destroy_process_group()


# Networks that are odd


class Odd(nn.Module):
    """A convolution, a batch norm, and a way between them."""

    def __init__(self, way: Callable[["Odd", Tensor], Any], **norm_options: Any) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(2, 5, 3)
        self.other = nn.Conv2d(2, 5, 3)
        self.bn = nn.BatchNorm2d(5, **norm_options)
        self.later = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.identity, self.dropout = nn.Identity(), nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Any:
        out = self.way(self, x)
        return (self.head(out[0]), *out[1:]) if isinstance(out, tuple) else self.head(out)

    def stored(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        self.kept = change(self.conv(x))
        return self.bn(self.kept)


def in_place(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += x.mean()
    return m.bn(y)


def changed_as_data(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.data.mul_(2)
    return m.bn(y)


def by_index(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 0] = 0
    return m.bn(y)


def with_gate(gate: Callable[[Tensor], Tensor]) -> Callable[[Odd, Tensor], Tensor]:
    def way(m: Odd, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) * gate(y)

    return way


def stored_and_used(m: Odd, x: Tensor) -> Tensor:
    out = m.stored(x, lambda y: y)
    return out + m.kept.detach().cos()


def stored_for_the_user(m: Odd, x: Tensor) -> Tensor:
    return m.stored(x, lambda y: y)


def hooked_gradient(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.register_hook(lambda grad: 2 * grad)
    return m.bn(y)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def norm_in_training(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.bn.train()
    return m.bn(y)


ELSEWHERE = "the output of conv is used elsewhere too"

# How it runs, how many of its two batch norms can be folded, and what is said of that called bn
ODD: dict[str, tuple[Callable[[Odd, Tensor], Any], int, str]] = {
    "a pair": (lambda m, x: m.bn(m.conv(x)), 1, ""),
    "identity between": (lambda m, x: m.bn(m.identity(m.conv(x))), 1, ""),
    "arguments by name": (lambda m, x: m.bn(input=m.conv(input=x)), 1, ""),
    "shape looked at": (lambda m, x: m.bn((y := m.conv(x)).reshape(y.shape)), 0, "its input is not the output of a"),
    "second output": (lambda m, x: (m.bn(y := m.conv(x)), y), 1, ""),
    "relu between": (lambda m, x: m.bn(F.relu(m.conv(x))), 0, "its input is not the output of a plain"),
    "relu in place between": (lambda m, x: m.bn(m.relu(m.conv(x))), 0, ELSEWHERE),
    "changed in place": (in_place, 0, ELSEWHERE),
    "changed as data": (changed_as_data, 0, ELSEWHERE),
    "changed by index": (by_index, 0, ELSEWHERE),
    "used twice": (with_gate(torch.sigmoid), 0, ELSEWHERE),
    "used detached": (with_gate(lambda y: y.detach().sigmoid()), 0, ELSEWHERE),
    "used as data": (with_gate(lambda y: y.data.sigmoid()), 0, ELSEWHERE),
    "used in a list": (with_gate(lambda y: torch.cat([y, y], 1)[:, :5]), 0, ELSEWHERE),
    "used as a number": (
        with_gate(lambda y: 1 + float(y.detach().mean())),
        0,
        "the output of conv is used elsewhere too",
    ),
    "used by a function of one's own": (with_gate(Doubled.apply), 0, ELSEWHERE),
    "used to decide": (with_gate(lambda y: 2 if y.sum() > 0 else 3), 0, ELSEWHERE),
    "gradient hooked": (hooked_gradient, 0, ELSEWHERE),
    "stored and used": (stored_and_used, 0, ELSEWHERE),
    "stored for the user": (stored_for_the_user, 0, ELSEWHERE),
    "two norms": (lambda m, x: m.bn(y := m.conv(x)) + m.later(y), 0, ELSEWHERE),
    "norm of a norm": (lambda m, x: m.later(m.bn(m.conv(x))), 1, ""),
    "shared norm": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), 0, "it runs 2 times a forward"),
    "layer twice": (lambda m, x: m.bn(m.conv(x)) + m.conv(x.flip(2)), 0, "its input is not the output of a plain"),
    "layer once by its forward": (
        lambda m, x: m.bn(m.conv(x)) + m.conv.forward(x),
        0,
        "the output of conv is used elsewhere too",
    ),
    "norm first": (lambda m, x: m.conv(m.bn(x.repeat(1, 3, 1, 1)[:, :5])[:, :2]), 0, "its input is not the output"),
    "norm unused": (lambda m, x: m.later(m.conv(x)), 1, "it runs 0 times a forward"),
    "norm in training": (norm_in_training, 0, ELSEWHERE),
    "no gradient": (lambda m, x: torch.no_grad()(lambda: m.bn(m.conv(x)))() + m.other(x), 1, ""),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_networks(name: str) -> None:
    way, folded, why = ODD[name]
    case = case_of(Odd(way), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == folded
    if why:
        assert f"bn not: {why}" in explain(case.model, case.x)
    else:
        assert "bn into conv" in explain(case.model)
    vars(case.model).pop("kept", None)  # what has a history cannot be copied
    ours, truth = (gradients(case, prepared) for prepared in (True, False))
    assert all(relative(value, other) < 1e-10 for value, other in zip(ours[:3], truth[:3], strict=True))
    if name != "gradient hooked":  # plain double backpropagation goes through the hook at other times
        check_exact(case)


@pytest.mark.parametrize(
    ("options", "folded"),
    [({"affine": False}, 1), ({"momentum": None}, 1), ({"eps": 0.3}, 1), ({"track_running_stats": False}, 0)],
)
def test_batch_norms_of_every_kind(options: dict[str, Any], folded: int) -> None:
    case = case_of(Odd(ODD["a pair"][0], **options), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == folded
    assert folded or "bn not: it keeps no running statistics" in explain(case.model, case.x)
    check_exact(case)


def test_without_statistics_one_value_a_channel() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 3))
    case = case_of(model, (4,))
    prepare(case.model, case.x)  # would refuse a single image
    check_exact(case)


def test_a_linear_layer_whose_channels_are_not_those_of_the_norm() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten(), nn.Linear(25, 3))
    case = case_of(model, (5, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 0
    assert "1 not: its channels are not those of 0" in explain(case.model, case.x)
    check_exact(case)


@pytest.mark.parametrize("frozen", ["conv.weight", "conv", "bn.weight", "bn", "conv bn", "bn.bias conv.bias"])
def test_a_pair_that_is_partly_frozen(frozen: str) -> None:
    case = case_of(Odd(ODD["a pair"][0]), (2, 6, 6))
    for name, parameter in case.model.named_parameters():
        if any(name.startswith(prefix) for prefix in frozen.split()):
            parameter.requires_grad_(False)
    check_exact(case)


def test_convolutions_that_share_a_weight() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    model[3].weight, model[4].weight = model[0].weight, model[1].weight
    case = case_of(model, (4, 7, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 2
    check_exact(case)


def test_norms_wider_than_their_layers() -> None:
    model = Odd(ODD["a pair"][0])
    case = case_of(model, (2, 6, 6)).copy(torch.bfloat16)
    case.model.bn.float()
    plain = curvature(*case)
    prepare(case.model, case.x)
    assert count(case.model) == 1
    out = curvature(*case)
    assert out.logits.dtype == torch.bfloat16
    assert relative(out.loss, plain.loss) < 0.02


def test_under_autocast() -> None:
    case = style("torchvision-resnet18", nn.GELU).copy(torch.float32)
    z = F.normalize(torch.randn_like(case.x).flatten(1)).view_as(case.x)
    truth = gradients(case, False, direction=z)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(case, False, direction=z)
        ours = gradients(case, True, direction=z)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert relative(ours[1], truth[1]) < 0.02
    assert relative(ours[3:], truth[3:]) < 2 * relative(plain[3:], truth[3:])  # no worse than unprepared


# A network whose path depends on its input, or that has changed since


@pytest.mark.parametrize(
    "path",
    [
        lambda m, x: m.bn(y := m.conv(x)) + (y if len(x) > 2 else 0),
        lambda m, x: m.bn(y := m.conv(x)) * (y.detach().sigmoid() if len(x) > 2 else 1),
        lambda m, x: m.bn(m.conv(x)) + (m.conv(x.flip(2)) if len(x) > 2 else 0),
        lambda m, x: (z := m.conv(x.flip(2)), m.bn(m.conv(x)) + z)[1] if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.conv(x) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.later(m.conv(x)) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.bn(m.relu(m.conv(x))) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: (m.bn(m.other(x)) + m.conv(x)) if len(x) > 2 else m.bn(m.conv(x)),
    ],
)
def test_another_path_that_breaks_a_pair_is_an_error(path: Callable[[Odd, Tensor], Tensor]) -> None:
    case = case_of(Odd(path), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 1
    with pytest.raises(RuntimeError, match=r"output of Conv2d.* went to its batch norm alone.*fastcure.prepare again"):
        curvature(*case)
    assert not any("forward" in vars(module) for module in case.model.modules())
    assert curvature(case.model, case.x[:2], case.y[:2]).penalty.isfinite().all()


@pytest.mark.parametrize(
    "path",
    [
        lambda m, x: m.bn(m.other(x) if len(x) > 2 else m.conv(x)),
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x.flip(2))) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.bn(x.repeat(1, 3, 1, 1)[:, :5] if len(x) > 2 else m.conv(x)),
        lambda m, x: (m.conv(x), m.bn(m.other(x)))[1] if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.bn(m.later(m.other(x)) if len(x) > 2 else m.conv(x)),
        lambda m, x: m.bn(torch.stack([m.conv(image) for image in x]) if len(x) > 2 else m.conv(x)),
    ],
)
def test_another_path_that_leaves_the_pair_whole_is_right(path: Callable[[Odd, Tensor], Tensor]) -> None:
    case = case_of(Odd(path), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 1
    check_exact(case)


def test_an_output_that_a_loss_takes_from_the_network_is_an_error() -> None:
    def path(m: Odd, x: Tensor) -> Tensor:
        y = m.conv(x)
        m.kept = y if len(x) > 2 else None
        return m.bn(y)

    case = case_of(Odd(path), (2, 6, 6))
    prepare(case.model, case.x)

    def with_activity(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none") + case.model.kept.square().flatten(1).sum(1)

    with pytest.raises(RuntimeError, match=r"fastcure\.prepare again"):
        curvature(*case, loss_fn=with_activity)


def test_what_a_network_stores_is_ordinary_after_preparing() -> None:
    case = case_of(Odd(stored_for_the_user), (2, 6, 6))
    prepare(case.model, case.x)
    assert type(case.model.kept) is Tensor
    curvature(*case)
    assert type(case.model.kept) is Tensor
    assert case.model.kept.shape == (4, 5, 4, 4)


@pytest.mark.parametrize("replaced", ["conv", "bn"])
def test_a_layer_replaced_since(replaced: str) -> None:
    case = case_of(Odd(ODD["a pair"][0]), (2, 6, 6))
    prepare(case.model, case.x)
    setattr(case.model, replaced, copy.deepcopy(getattr(case.model, replaced)))
    out, truth = curvature(*case), curvature(*case, engine="reference")
    assert relative(out.penalty, truth.penalty) < 1e-10
    assert "folded into the layer before: 0 of 2" in explain(case.model)
    prepare(case.model, case.x)
    assert "folded into the layer before: 1 of 2\n  bn into conv" in explain(case.model)


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
    assert explain(case.model, case.x).splitlines()[1:] == [*lines[1:], reason]
    assert case.model not in FOLDS
    prepare(case.model, case.x)
    found = ["batch norms folded into the layer before: 1 of 2", "  1 into 0"]
    assert explain(case.model).splitlines()[1:] == found
    assert explain(case.model, case.x).splitlines()[1:] == [*found, reason]
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
