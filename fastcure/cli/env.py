"""`fastcure env`: print versions and devices."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "print versions and devices, for a bug report"
DESCRIPTION = "Print versions and devices, for a bug report."
EPILOG = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no flags."""


def run(arguments: dict[str, Any]) -> None:
    """Run the command."""
    import torch

    from fastcure._environment import environment, pick_device

    for name, value in environment(pick_device("auto")).items():
        print(f"{name}: {value}")
    print(f"cuda: {torch.version.cuda}, devices: {torch.cuda.device_count()}")
