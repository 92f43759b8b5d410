"""Random architectures from a small grammar."""

from typing import Any

import torch
from hypothesis import strategies as st
from networks import Residual
from torch import Tensor, nn
from torch.nn import functional as F

SMOOTH = [nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh]
KINKED = [nn.ReLU, nn.LeakyReLU]


class Attention(nn.Module):
    """Self-attention between pixels, added to them."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT  # (B, HW, C)
        q, k, v = self.qkv(tokens).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed).mT.reshape(x.shape)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def activation(draw: Any, smooth: bool) -> nn.Module:
    return draw(st.sampled_from(SMOOTH if smooth else SMOOTH + KINKED))()


def convolution(draw: Any, shape: torch.Size) -> nn.Module:
    channels, *size = shape
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding, dilation = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    if dilation * (kernel - 1) >= min(size) + 2 * padding:
        kernel = 1
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", *(["circular", "reflect"] if padding < min(size) else [])]))
    width, bias = groups * draw(st.integers(1, 3)), draw(st.booleans())
    return nn.Conv2d(channels, width, kernel, stride, padding, dilation, groups, bias, mode)


def norm(draw: Any, shape: torch.Size) -> nn.Module:
    """A normalisation over four values or more: of two it is a sign."""
    channels, count = shape[0], shape.numel()
    choices = [lambda: nn.BatchNorm2d(channels) if len(shape) > 1 else nn.BatchNorm1d(channels)]
    if count >= 4:
        choices += [lambda: nn.GroupNorm(1, channels), lambda: nn.LayerNorm(list(shape))]
    if count // channels >= 4:
        choices += [lambda: nn.InstanceNorm2d(channels, affine=True), lambda: nn.GroupNorm(channels, channels)]
        choices += [lambda: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)]
    return draw(st.sampled_from(choices))()


def pool(draw: Any, shape: torch.Size, smooth: bool) -> nn.Module:
    size = draw(st.integers(1, min(3, *shape[1:])))
    kinds = [nn.AvgPool2d, nn.AdaptiveAvgPool2d] + ([] if smooth else [nn.MaxPool2d, nn.AdaptiveMaxPool2d])
    return draw(st.sampled_from(kinds))(size)


def block(draw: Any, shape: torch.Size, smooth: bool) -> list[nn.Module]:
    """Layers that take a sample of this shape."""
    channels = shape[0]
    kind = draw(st.sampled_from(["layer", "residual", "norm", "activation", "pool", "attention", "dropout"]))
    if kind == "dropout":
        return [nn.Dropout(0.5)]
    if kind == "activation" or (len(shape) == 1 and kind in ("pool", "attention")):
        return [activation(draw, smooth)]
    if kind == "norm":
        return [norm(draw, shape)]
    if kind == "pool":
        return [pool(draw, shape, smooth)]
    if kind == "attention":
        return [Attention(channels, draw(st.sampled_from([h for h in (1, 2) if channels % h == 0])))]
    if kind == "residual":
        inner = nn.Conv2d(channels, channels, 3, padding=1) if len(shape) > 1 else nn.Linear(channels, channels)
        return [Residual(nn.Sequential(inner, norm(draw, shape), activation(draw, smooth)))]
    layer = convolution(draw, shape) if len(shape) > 1 else nn.Linear(channels, draw(st.integers(2, 6)))
    with torch.no_grad():
        after = layer.eval()(torch.zeros(1, *shape)).shape[1:]
    return [layer, *([norm(draw, after)] if draw(st.booleans()) else []), activation(draw, smooth)]


@st.composite
def networks(draw: Any, smooth: bool = False) -> tuple[nn.Module, torch.Size]:
    """A network in training mode with statistics that are not trivial, and the shape of a sample."""
    image = draw(st.integers(0, 3)) > 0
    start = (
        [draw(st.integers(1, 3)), *(draw(st.integers(4, 9)) for _ in range(2))] if image else [draw(st.integers(4, 9))]
    )
    shape = sample = torch.Size(start)
    torch.manual_seed(draw(st.integers(0, 2**20)))
    layers: list[nn.Module] = []

    def add(*more: nn.Module) -> None:
        nonlocal shape
        layers.extend(more)
        with torch.no_grad():
            shape = nn.Sequential(*more).eval()(torch.zeros(1, *shape)).shape[1:]

    for _ in range(draw(st.integers(1, 4))):
        add(*block(draw, shape, smooth))
    if len(shape) > 1:
        add(draw(st.sampled_from([nn.Flatten, Mean]))())
    add(nn.Linear(shape[0], draw(st.integers(2, 5))))
    model = nn.Sequential(*layers).train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.2)
    return model, sample
