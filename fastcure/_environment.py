"""The device that is computed on, and what a reader of results needs to know of machine and versions."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fastcure import __version__


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU where there is one.

    Raises:
        ValueError: for a name that is none, or a device that is not there or holds no numbers, such as "meta".
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"device must be auto, cpu, cuda, cuda:0, ... and present, got {name!r}: {reason}") from error
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and device, for a reader of the results."""
    return {
        "fastcure": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
    }
