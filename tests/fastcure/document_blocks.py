"""Runs the Python blocks of a page in turn, in one namespace: `python tests/fastcure/document_blocks.py PAGE`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def blocks(page: Path) -> list[tuple[int, str]]:
    """Return the Python blocks of a page, each with the number of the line before it."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def given() -> dict[str, Any]:
    """Return what the pages assume: a trained model, a loader of two batches, the first of them, and an optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    images = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = next(iter(loader))
    return {
        "model": model.train(),
        "loader": loader,
        "optimizer": optimizer,
        "x": x,
        "y": y,
        "criterion": nn.CrossEntropyLoss(),
    }


def run(page: Path) -> int:
    """Run all blocks of a page, and return how many there are. A traceback names the page and its line."""
    namespace = given()
    found = blocks(page)
    for line, block in found:
        exec(compile("\n" * line + block, str(page), "exec"), namespace)
    return len(found)


if __name__ == "__main__":
    print(run(Path(sys.argv[1])))
