"""Model code of every style: blocks that keep the shape `(B, C, H, W)`, smooth, each with what makes it hard."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Cube(torch.autograd.Function):
    """x^3, whose backward is differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


class OnceOnly(Cube):
    """x^3, marked as differentiable once."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


class Detached(Cube):
    """x^3, whose backward leaves no graph, without a word."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return 3 * g * x**2


class Hyper(nn.Module):
    """A convolution whose weight depends on the images."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.c, self.made = c, nn.Linear(c, c * c * 9)

    def forward(self, x: Tensor) -> Tensor:
        weight = 0.1 * self.made(x.mean((0, 2, 3))).view(self.c, self.c, 3, 3)
        return x + F.conv2d(x, weight, padding=1)


class Fast(nn.Module):
    """`functional_call` of a part with weights that a gradient step has moved."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.part, self.rate = nn.Conv2d(c, c, 3, padding=1), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        moved = {name: p * (1 + self.rate) for name, p in self.part.named_parameters()}
        return torch.tanh(functional_call(self.part, moved, (x,)))


class PerSample(nn.Module):
    """`vmap` over the samples."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c, c, 3, 3) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return vmap(lambda one: F.softplus(F.conv2d(one[None], self.weight, padding=1)[0]))(x)


class Mixed(nn.Module):
    """One sample's filters are mixed for it out of two, as grouped convolutions of one image."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gate, self.filters = nn.Linear(c, 2), nn.Parameter(torch.randn(2, c, c, 3, 3) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        share = self.gate(x.mean((2, 3))).softmax(1)
        weight = torch.einsum("bk,koihw->boihw", share, self.filters).reshape(b * c, c, 3, 3)
        return x + F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b).view(b, c, h, w)


class Twice(nn.Module):
    """A module that is used two times."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(F.gelu(self.norm(self.conv(x))))))


class InPlace(nn.Module):
    """Sums and activations in place, and a view that is written to."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x
        y[:, 0].mul_(0.5)
        return y.sigmoid_()


class Spectral(nn.Module):
    """A filter in frequency: complex numbers inside."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(c, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft2(x) * torch.complex(self.gain, 0.3 * self.gain)
        return x + torch.fft.irfft2(found, s=x.shape[-2:])


class Own(nn.Module):
    """An own Function between a scale and a bias."""

    def __init__(self, c: int, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.rand(c, 1, 1) * 0.5 + 0.5), function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function.apply(self.scale * x.tanh())


class Gate(nn.Module):
    """What `torch.jit` makes of this has no second derivative that is to be relied on."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) + torch.tanh(x)


class Script(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.gate = torch.jit.script(Gate())

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


class Recomputed(nn.Module):
    """Activation checkpointing."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class SelfGradient(nn.Module):
    """A model that differentiates itself: its output is moved along the gradient of an energy of its own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.energy = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.energy(point).tanh().square().sum(), point, create_graph=True)
        return x - 0.1 * g


class Resampled(nn.Module):
    """Interpolation and a grid that depends on the image."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.shift = nn.Linear(c, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(F.avg_pool2d(x, 2, ceil_mode=True), x.shape[-2:], mode="bilinear") * self.shift(
            x.mean((2, 3))
        ).tanh().mean(1).view(-1, 1, 1, 1)


class Heads(nn.Module):
    """`nn.MultiheadAttention` between pixels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(c, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return x + self.mix(tokens, tokens, tokens, need_weights=False)[0].mT.reshape(x.shape)


def weight_norm(c: int) -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(c, c, 3, padding=1)), nn.Softplus())


def hooked(c: int) -> nn.Module:
    block = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.GELU())
    block.register_forward_hook(lambda module, inputs, output: output * 1.5)
    block[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    return block


def transposed(c: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(c, c, 3, padding=1), nn.GroupNorm(1, c), nn.SiLU())


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "hyper-network": Hyper,
    "functional_call": Fast,
    "vmap": PerSample,
    "mixed filters": Mixed,
    "re-used module": Twice,
    "in-place": InPlace,
    "complex": Spectral,
    "own Function": lambda c: Own(c, Cube),
    "once differentiable": lambda c: Own(c, OnceOnly),
    "backward without a graph": lambda c: Own(c, Detached),
    "scripted": Script,
    "checkpointed": Recomputed,
    "differentiates itself": SelfGradient,
    "resampled": Resampled,
    "attention": Heads,
    "weight norm": weight_norm,
    "hooks": hooked,
    "transposed, group norm": transposed,
}
"""Name -> block of so many channels."""

NO_SECOND_DERIVATIVE = {"once differentiable", "backward without a graph"}
"""Blocks that must be an error of exact engines: any number would be wrong."""


class Foreign(nn.Module):
    """A classifier of images `(B, 2, H, W)` that chains blocks of one width."""

    def __init__(self, names: list[str], channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(BLOCKS[name](channels) for name in names))
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, 3)`."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
