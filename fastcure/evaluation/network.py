"""The network that is measured, tried before the measurement."""

from __future__ import annotations

import torch
from torch import nn

from fastcure._functional import evaluation_mode, find_logits
from fastcure.data import Dataset


def check_network(model: nn.Module, name: str, data: Dataset, device: torch.device) -> None:
    """Try a network on two images, so that what does not fit is reported before hours of work.

    Raises:
        ValueError: if the network fails, or does not return logits for all classes of the data.
    """
    images = data.x_test[:2].to(device).float() / 255
    try:
        with torch.no_grad(), evaluation_mode(model):
            logits = find_logits(model(images))
    except Exception as error:  # it is the user's code
        kind = "" if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"model {name} cannot take the images of {data.name}: {kind}{error}") from error
    if logits.shape[:1] != images.shape[:1] or logits.dim() != 2 or logits.shape[1] < data.num_classes:
        raise ValueError(
            f"model {name} must return logits (B, C) with C >= {data.num_classes}, the classes of {data.name}, "
            f"got {tuple(logits.shape)} for B = {len(images)}"
        )
