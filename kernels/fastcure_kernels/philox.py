"""Philox4x32-10 in PyTorch integers: the random numbers of `tl.rand` and `tl.randn`, on any device.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A 64-bit seed is the key; a
64-bit counter, one for each number of a call, is the low half of the block, so it does not repeat before 2^64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def draw_seed(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A (1,) int64 seed on the device of `x`, drawn without a sync; None is the default generator there."""
    device = x.device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
    return seed.to(x.device, non_blocking=True)


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of the four 32-bit words of each counter, as signed integers.

    Args:
        seed: (1,) int64.
        counter: Any shape, int64.

    Returns:
        Two int32 tensors of the shape of `counter`.
    """
    c0, c1 = counter & _MASK, counter >> 32 & _MASK
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        # The products wrap modulo 2^64, which leaves both of their 32-bit halves right.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return _signed(c0), _signed(c1)


def _signed(word: Tensor) -> Tensor:
    return (word - (word >> 31 << 32)).to(torch.int32)


def _unit(word: Tensor) -> Tensor:
    # The factor is the largest whose product with 2^31 - 1 rounds to less than 1 in fp32.
    return torch.where(word < 0, ~word, word).to(torch.float32) * 4.6566127342e-10


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Uniform in [0, 1), float32, bit for bit `tl.rand(seed, counter)`."""
    return _unit(philox(seed, counter)[0])


def normal(seed: Tensor, counter: Tensor) -> Tensor:
    """Standard normal (Box and Muller), float32, `tl.randn(seed, counter)` up to rounding."""
    u, v = (_unit(word) for word in philox(seed, counter))
    return (-2 * u.clamp(min=1e-7).log()).sqrt() * (2 * math.pi * v).cos()


def counters(x: Tensor, strides: list[int]) -> Tensor:
    """The counter of each element of `x`: its place in memory laid out by these strides."""
    return torch.arange(x.numel(), device=x.device).as_strided(x.shape, strides)
