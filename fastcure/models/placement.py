"""Where a network lies in memory: on its device, in the layout that is fastest there, and prepared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastcure._folding.prepare import prepare
from fastcure.models import MODELS


def placed(model: nn.Module, name: str, shape: Sequence[int], device: torch.device) -> nn.Module:
    """Move the network called `name` to `device`, and prepare a bundled one for images of this `shape` (C, H, W).

    On a CPU resnet8's weights lie channels last: its steps of CURE are 1.1 to 1.3 times faster for that. Wider networks
    gain nothing, and lose where the images are small.
    """
    model = model.to(device)
    if name == "resnet8" and device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return prepare(model, torch.zeros(1, *shape, device=device)) if name in MODELS else model
