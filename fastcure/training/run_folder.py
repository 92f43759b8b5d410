"""The folder of a run: what is in it, written whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn


class RunFolder:
    """Results of one run.

    `config.json` the settings; `environment.json` versions, device and seconds; `history.csv` a row an epoch;
    `metrics.json` accuracies before and after; `original.safetensors` and `model.safetensors` the weights before and
    after CURE; `curves.png`.

    Args:
        path: a folder that does not exist, or is empty.

    Raises:
        ValueError: if it holds something already.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(
                f"out must be a new or an empty folder, got {self.path}, which holds something: choose another"
            )

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `name` with keys in the order given."""
        self._replace(name, (json.dumps(content, indent=2) + "\n").encode())

    def write_csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write `name`, one line a row; all rows have the keys of the first."""
        path = self._temporary(name)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        path.replace(self.path / name)

    def write_weights(self, name: str, model: nn.Module) -> None:
        """Write the model's state dict as safetensors: no path or time in it, so equal weights are equal bytes."""
        from safetensors.torch import save

        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        self._replace(name, save(tensors))

    def _replace(self, name: str, content: bytes) -> None:
        path = self._temporary(name)
        path.write_bytes(content)
        path.replace(self.path / name)

    def _temporary(self, name: str) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
        os.close(handle)
        os.chmod(path, 0o644)
        return Path(path)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict from `.safetensors`, or from a `.pt` or `.pth` file that holds tensors and nothing else.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or does not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: give a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read as weights ({reason}): is it whole?") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path} does not fit the model: {reason}") from error
