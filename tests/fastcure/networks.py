"""Networks of every kind that the penalty must be right on, and the measure of being right."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastcure.models import resnet8


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """of one sample"""
    smooth: bool


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Checkpointed(nn.Module):
    """Recomputes `inner` in the backward."""

    def __init__(self, inner: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Temperature(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.tensor(0.3))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.logarithm.exp(), y, reduction="none")


class Shared(nn.Module):
    """One layer used twice, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


class TinyViT(nn.Module):
    """Patches, two blocks of attention, a mean: `scaled_dot_product_attention` and GELU."""

    def __init__(self, classes: int = 6, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 9, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position  # (B, T, W)
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


def convolutional(norm: Callable[[int], nn.Module], activation: type[nn.Module], pool: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        norm(8),
        activation(),
        Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), norm(8), activation())),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        activation(),
        pool,
        nn.Flatten(),
        nn.LazyLinear(7),
    )


def pooled(norm: Callable[[int], nn.Module], activation: type[nn.Module], pool: nn.Module) -> Callable[[], nn.Module]:
    return lambda: convolutional(norm, activation, pool)


def layer_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


NETWORKS = {
    "batch_norm-relu-max": Network(pooled(nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d(2)), (3, 11, 9), False),
    "group_norm-relu-average": Network(
        pooled(lambda c: nn.GroupNorm(4, c), nn.ReLU, nn.AvgPool2d(3)), (3, 11, 9), False
    ),
    "batch_norm-gelu-average": Network(pooled(nn.BatchNorm2d, nn.GELU, nn.AvgPool2d(2)), (3, 10, 7), True),
    "layer_norm-gelu-adaptive": Network(pooled(layer_norm, nn.GELU, nn.AdaptiveAvgPool2d(2)), (3, 9, 9), True),
    "mlp-relu": Network(
        lambda: nn.Sequential(nn.Linear(13, 17), nn.LayerNorm(17), nn.ReLU(), nn.Linear(17, 5)), (13,), False
    ),
    "mlp-softplus": Network(lambda: nn.Sequential(nn.Linear(13, 17), nn.Softplus(), nn.Linear(17, 5)), (13,), True),
    "attention": Network(TinyViT, (3, 12, 12), True),
    "shared": Network(Shared, (6,), True),
    "resnet8": Network(lambda: resnet8(num_classes=5, in_channels=2), (2, 8, 12), False),
}


class Case(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor

    def copy(self, dtype: torch.dtype | None = None) -> "Case":
        """The same network, twice; in another dtype if one is given."""
        model = copy.deepcopy(self.model)
        return Case(model.to(dtype), self.x.to(dtype or self.x.dtype), self.y)


def make(network: Network, batch: int, seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """A network with batch statistics that are not trivial, in training mode, and a batch of random images."""
    torch.manual_seed(seed)
    model = network.build()
    x = torch.rand(batch, *network.shape)
    model(torch.rand(16, *network.shape))  # running statistics; lazy layers
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        classes = model(x[:1].expand(2, *network.shape)).shape[1]
    return Case(model.to(dtype), x.to(dtype), torch.randint(classes, (batch,)))


def relative(value: Tensor | Sequence[Tensor], truth: Tensor | Sequence[Tensor]) -> float:
    """||value - truth|| / ||truth|| over all tensors together."""
    values = [value] if isinstance(value, Tensor) else value
    truths = [truth] if isinstance(truth, Tensor) else truth
    a = torch.cat([v.detach().double().flatten() for v in values])
    b = torch.cat([t.detach().double().flatten() for t in truths])
    return float((a - b).norm() / b.norm())


def rounding(dtype: torch.dtype, length: int, condition: float = 1.0) -> float:
    """How far rounding can take a result from the truth, relative to it, on any processor.

    Errors of a sum of `length` terms are independent and grow as its root; four passes (forward and backward, and both
    differentiated) each add eps; a badly conditioned result multiplies them. Where a half precision accumulates in
    float32, only the ends are rounded: a length of 1.
    """
    return 4 * condition * length**0.5 * torch.finfo(dtype).eps


IN_FLOAT64 = rounding(torch.float64, 10_000, condition=10)
"""Of two ways to one result of a small network: none of its sums is longer, and what cancels costs a digit."""


def cancellation(case: Case, penalty: Tensor) -> float:
    """||g|| / ||d|| over the batch: by how much the difference d of two gradients g magnifies their rounding."""
    x = case.x.clone().requires_grad_()
    model = copy.deepcopy(case.model).eval()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), case.y, reduction="sum"), x)
    return max(1.0, float((g.square().sum() / penalty.detach().sum()).sqrt()))
