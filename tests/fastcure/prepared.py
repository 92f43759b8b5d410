"""Networks as users write them, whose batch norms can be folded, and the check that folding changes nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from networks import Case, relative
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature, prepare
from fastcure._folding.layers import folds_of
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
    "resnet8": Style(lambda act: resnet8(num_classes=5), 8, 9, 9),
    # Norm before convolution: only the second of each block, between its convolutions, has one to itself.
    "wide-resnet": Style(lambda act: WideResNet(10, 1, num_classes=5), 8, 3, 7),
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


def check_exact(case: Case, tolerance: float = 1e-10, **options: Any) -> None:
    """Each value and gradient of the prepared network is that of the unprepared one and of the reference."""
    ours = gradients(case, True, **options)
    for truths in (gradients(case, False, **options), gradients(case, False, engine="reference", **options)):
        scale = max(float(truth.norm()) for truth in truths[3:])
        for value, truth in zip(ours, truths, strict=True):
            # What is zero but for rounding (a bias under a norm that uses the batch) is compared with the others.
            assert float((value - truth).norm()) <= tolerance * max(float(truth.norm()), 1e-4 * scale)


def check_under_autocast(act: Activation) -> None:
    case = style("torchvision-resnet18", act).copy(torch.float32)
    z = F.normalize(torch.randn_like(case.x).flatten(1)).view_as(case.x)
    truth = gradients(case, False, direction=z)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(case, False, direction=z)
        ours = gradients(case, True, direction=z)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert relative(ours[1], truth[1]) < 0.02
    assert relative(ours[3:], truth[3:]) < 2 * relative(plain[3:], truth[3:])  # no worse than unprepared


def count(model: nn.Module) -> int:
    return len(folds_of(model))
