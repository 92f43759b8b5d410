"""Takes the network of a finished run into the library: `python benchmarks/pack_pretrained.py RUN resnet8-digits`.

`make pretrained` makes the run, and calls this. It writes the weights, and beside them their SHA-256, the accuracies
that the run measured, its command, and where it ran.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import torch

from fastcure._writing import json_bytes, write_whole
from fastcure.models import resnet8
from fastcure.models._pretrained import PRETRAINED
from fastcure.models.weights import load_weights

FOLDER = Path(__file__).parents[1] / "fastcure" / "models" / "pretrained_weights"
LARGEST = 400_000
"""Bytes."""


def main(run: Path, name: str) -> None:
    """Write the two files of a network.

    Raises:
        ValueError: for a name that `fastcure.models.pretrained` does not know, or if the file is too large.
    """
    if name not in PRETRAINED:
        raise ValueError(f"the name must be in PRETRAINED, {', '.join(PRETRAINED)}, got {name!r}")
    model = resnet8(num_classes=10, in_channels=1)
    load_weights(model, run / "model.safetensors")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    content = file.getvalue()
    if len(content) > LARGEST:
        raise ValueError(f"the file must have at most {LARGEST:,} bytes, got {len(content):,}")
    settings, environment = (json.loads((run / f"{file}.json").read_text()) for file in ("config", "environment"))
    about = {
        "command": f"fastcure finetune --preset {settings['preset']} --seed {settings['seed']}",
        "sha256": hashlib.sha256(content).hexdigest(),
        **json.loads((run / "metrics.json").read_text())["after"],
        "environment": {key: environment[key] for key in ("fastcure", "torch", "python", "device", "threads")},
    }
    FOLDER.mkdir(exist_ok=True)
    write_whole(FOLDER / f"{name}.pt", content)
    write_whole(FOLDER / f"{name}.json", json_bytes(about))
    print(f"written: {FOLDER / name}.pt, {len(content):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
