"""What the benchmarks run on: networks, batches and precisions, chosen by the device that is there."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import models, prepare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Workload(NamedTuple):
    """A network and a batch size; `amp` is the dtype of autocast."""

    model: str
    batch: int
    amp: torch.dtype = torch.float32
    channels_last: bool = True
    size: int = 32
    """Pixels a side."""

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        side = f", {self.size} pixels" * (self.size != 32)
        return f"{self.model}, batch {self.batch}, {str(self.amp).removeprefix('torch.')}, {layout}{side}"

    def build(self, prepared: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
        """A network with initial weights, prepared or not, and a batch of noise, which cost what any others do."""
        torch.manual_seed(0)
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        model = network(self.model).to(DEVICE).to(memory_format=form)  # type: ignore[call-overload]
        x = torch.rand(self.batch, 3, self.size, self.size, device=DEVICE).contiguous(memory_format=form)
        if prepared:
            prepare(model, x)
        return model, x, torch.arange(self.batch, device=DEVICE) % 10

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast, where the dtype is not float32; convolutions in TF32, as torch has them by default."""
        with torch.autocast(DEVICE.type, self.amp, enabled=self.amp != torch.float32):
            yield


def network(name: str) -> nn.Module:
    """The network called `name`: one of the package's, "vit", or "resnet50" of timm or torchvision."""
    if name == "vit":
        return ViT()
    if name == "resnet50":
        library = "timm" if find_spec("timm") else "torchvision"
        make = importlib.import_module(f"{library}.models.resnet").resnet50
        return make(num_classes=10)  # type: ignore[no-any-return]
    return models.build(name)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions in full float32: the rounding of TF32 moves so many kinks that no two ways agree."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


CPU = [Workload("resnet8", 128), Workload("resnet18", 16), Workload("vit", 32)]
CUDA = [
    Workload(model, batch, amp)
    for model, batches in (
        ("resnet8", (32, 128, 512, 1024)),
        ("resnet18", (32, 128, 512, 1024)),
        ("wide_resnet28_10", (32, 128)),
        ("vit", (32, 128, 512)),
    )
    for batch in batches
    for amp in (torch.float32, torch.bfloat16)
]
WORKLOADS = CPU if DEVICE.type == "cpu" else CUDA


class ViT(nn.Module):
    """A small vision transformer on 32 x 32 images: patches of 4, 6 blocks of width 192, 2.7 million parameters."""

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 3, 32, 32)` to logits `(B, classes)`."""
        x = self.patches(x - 0.5).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm(x).mean(1))


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, tokens, width)` to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def rounds_for(seconds: float, budget: float = 30.0) -> int:
    """How many rounds of `seconds` to run within `budget` seconds: at least 5, at most 50, an odd number.

    The environment variable BENCH_SECONDS is a smaller budget, for a machine that is there for minutes only.
    """
    budget = min(budget, float(os.environ.get("BENCH_SECONDS", budget)))
    return 2 * (min(50, max(5, math.floor(budget / max(seconds, 1e-6)))) // 2) + 1
