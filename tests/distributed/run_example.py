"""Runs an example on few images, under torchrun or alone: `run_example.py NAME WEIGHTS [OPTIONS AS JSON]`."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def weights(name: str, **options: Any) -> torch.Tensor:
    """Run an example's `main`; return the weights of the network that it returns."""
    sys.path.insert(0, str(EXAMPLES))
    model = importlib.import_module(name).main(images=64, epochs=2, batch_size=16, **options)
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = weights(sys.argv[1], **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"))
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # torch's threads sometimes abort a process that ends in the ordinary way
