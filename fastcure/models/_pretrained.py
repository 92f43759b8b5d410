"""Robust networks that come with the library; `make pretrained` trains them."""

from __future__ import annotations

import hashlib
import io
import json
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from fastcure.models.resnet import resnet8

PRETRAINED = ("resnet8-digits",)
"""Names that `pretrained` knows."""


def pretrained(name: str) -> nn.Module:
    """Return a robust network that comes with the library, in evaluation mode, on the CPU.

    `resnet8-digits` takes handwritten digits `(B, 1, 16, 16)` in [0, 1], as `fastcure.data.load("digits")` has them,
    and returns 10 logits; `pretrained_figures` has its accuracies.

    Args:
        name: one of `PRETRAINED`.

    Raises:
        ValueError: for another name, or if the file of the weights is damaged.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.pretrained("resnet8-digits")
        >>> model(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """
    figures = pretrained_figures(name)
    content = (files("fastcure.models") / "pretrained_weights" / f"{name}.pt").read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != figures["sha256"]:
        raise ValueError(
            f"the weights of {name} are damaged: SHA-256 must be {figures['sha256']}, got {found}; reinstall fastcure"
        )
    model = resnet8(num_classes=10, in_channels=1)
    model.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return model.eval()


def pretrained_figures(name: str) -> dict[str, Any]:
    """Return what is known of a network that comes with the library: its accuracies, and how it was made.

    Args:
        name: one of `PRETRAINED`.

    Returns:
        `clean`, a fraction of the test images; `pgd`, the same under PGD-10, by eps; `command`, `environment` and
        `sha256`.

    Raises:
        ValueError: for another name.

    Examples:
        >>> import fastcure
        >>> fastcure.models.pretrained_figures("resnet8-digits")["pgd"]["0.1"] > 0.7
        True
    """
    if name not in PRETRAINED:
        raise ValueError(f"pretrained must be one of {', '.join(PRETRAINED)}, got {name!r}")
    found: dict[str, Any] = json.loads((files("fastcure.models") / "pretrained_weights" / f"{name}.json").read_text())
    return found
