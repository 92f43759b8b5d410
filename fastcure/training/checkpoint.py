"""The state of an unfinished run as one safetensors file, so that it is replaced as a whole or not at all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastcure._extras import extra
from fastcure._fields import check_types, check_whole_numbers, shortened
from fastcure._writing import json_text
from fastcure.data.image_files import Images

Parts = dict[str, dict[str, Tensor]]


@dataclass
class Progress:
    """How far a run came: the part of its state that is not tensors. It travels as JSON in the file's header."""

    data: int
    """Checksum of the images and labels."""
    microbatch: int | None = None
    """As in `CURE`: what was set, or what memory sufficed for."""
    phase: Literal["pretrain", "finetune"] = "pretrain"
    epoch: int = 0
    """Epochs of the phase that are behind."""
    step: int = 0
    """Steps of the next epoch that are behind."""
    before: dict[str, Any] | None = None
    """Accuracies before fine-tuning, once measured."""
    history: list[dict[str, Any]] = field(default_factory=list)
    track: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent in each phase."""


def pack(progress: Progress, parts: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Return the file's content; the tensor `name` of `part` is called `part/name` there."""
    save = extra("safetensors.torch", "to write the state of a run").save
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    text = json_text(asdict(progress), indent=None)
    return save(tensors, {"fastcure": text, "crc32": str(_crc32(text, tensors))})


def unpack(path: Path) -> tuple[Progress, Parts]:
    """Read what `pack` made.

    Raises:
        ValueError: if the file is truncated or another's, or a bit of it is not as it was written.
    """
    safe_open = extra("safetensors", "to read the state of a run").safe_open
    parts: Parts = {}
    try:
        with safe_open(path, "pt") as file:
            text, checksum = (file.metadata()[name] for name in ("fastcure", "crc32"))
            # Copies, for the memory is the file's.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        if str(_crc32(text, tensors)) != checksum:
            raise ValueError("its checksum is not that of its content")
        progress = Progress(**json.loads(text))
        _check(progress)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as the state of a run ({reason}): is it whole? Restore it, or choose another --out"
        ) from error
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return progress, parts


def checksum(*parts: Images) -> int:
    """Return a number that other images or labels hardly share; of images in files, by the names and sizes of these."""
    value = 0
    for part in parts:
        value = zlib.crc32(part.contiguous().numpy().data if isinstance(part, Tensor) else part.identity(), value)
    return value


def _check(progress: Progress) -> None:
    """Check what a file says of its run: a checksum shows damage, not who wrote it.

    Raises:
        ValueError: naming the first value that does not fit.
    """
    check_types(progress)
    check_whole_numbers(progress, {"microbatch": 1, "epoch": 0, "step": 0})
    for name in ("history", "track"):
        rows = getattr(progress, name)
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError(f"{name} must have the same columns in each row")
        if not all(isinstance(value, str | int | float | None) for row in rows for value in row.values()):
            raise ValueError(f"{name} must hold numbers and words, in each row")
    if progress.before is not None or progress.phase == "finetune":
        robust = (progress.before or {}).get("pgd")
        numbers = [(progress.before or {}).get("clean"), *(robust.values() if isinstance(robust, dict) else [None])]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"before must hold accuracies, clean and pgd, got {shortened(progress.before)}")


def _crc32(text: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the checksum of a file's content: names, dtypes, shapes and bytes."""
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value
