"""Weights from a file into a network: read without executing anything and within bounds of memory."""

from __future__ import annotations

import argparse
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcure._extras import extra
from fastcure.models.state_dict import find_state_dict, fit_names, misfit


def load_weights(model: nn.Module, path: str | os.PathLike[str], log: Callable[[str], object] | None = None) -> None:
    """Load a state dict from `.safetensors`, or from a `.pt` or `.pth` file that holds tensors and nothing else.

    It may be nested in what a training script saved, and its names may have prefixes (`module.`, `_orig_mod.`, ...).

    Args:
        model: takes the weights.
        path: of the file.
        log: takes one line that says what was done to find the state dict and fit its names, if anything was.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or does not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: give a .safetensors, .pt or .pth file")
    content = read_weights(path)
    try:
        state, done = find_state_dict(content)
        state, fitted = fit_names(state, model)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} does not fit the model: {error}") from error
    done += fitted
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = misfit(state, model) or " ".join(str(error).split())[:300]
        after = f" (after what fastcure did: {'; '.join(done)})" if done else ""
        raise ValueError(f"checkpoint {path} does not fit the model: {reason}{after}") from error
    if done and log is not None:
        log(f"checkpoint {path}: {'; '.join(done)}")


def read_weights(path: Path) -> Any:
    """Return what a `.safetensors` file holds, or a `.pt` or `.pth` file, of which nothing but data is read.

    Raises:
        ValueError: if the file cannot be read, is not what its name says, asks for more than data, or takes more memory
            than its own size.
        ModuleNotFoundError: if the package safetensors is missing.
    """
    try:
        if path.suffix == ".safetensors":
            return extra("safetensors.torch", "to read weights").load_file(path)
        _refuse_bombs(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's and torchvision's scripts
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch proposes to execute everything
            asked = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it asks for {asked[1]}, which is no data" if asked else "it is not a file of torch.save"
        raise ValueError(
            f"checkpoint {path} cannot be read as weights ({reason}): give a whole file that holds a state dict"
        ) from error


def _refuse_bombs(path: Path) -> None:
    """Refuse a file that takes more memory than its own size; `torch.save` compresses nothing.

    Raises:
        ValueError: if members of the archive announce more bytes than the file has, or its pickle builds a `bytearray`,
            which can be of any length.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":  # else the older format, which announces nothing
            with zipfile.ZipFile(path) as archive:
                announced = sum(member.file_size for member in archive.infolist())
            size = os.path.getsize(path)
            if announced > size:
                raise ValueError(f"its members announce {announced:,} bytes, more than the {size:,} of the whole file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"\nbytearray\n") >= 0:
                raise ValueError("its pickle asks for a bytearray, which is no part of weights")
