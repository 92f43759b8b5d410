"""A folder with a dataset, a run and a module of networks, for `fastcure evaluate`."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from fastcure.cli import main
from fastcure.models import resnet8

OUTSIDE = """
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))

class Network(nn.Sequential):
    def __init__(self):
        super().__init__(*network())

number = 3

def broken():
    raise RuntimeError("no such layer")

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * x.new_empty(x.shape).normal_()

def noisy():
    return nn.Sequential(nn.Flatten(), Noise(), nn.Linear(192, 3))

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
"""
EPS = (8 / 255, 0.1)


class Place:
    """A folder with a dataset, a run and a module of networks, and the commands run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rng = np.random.default_rng(0)
        y = rng.integers(0, 3, 70)
        x = (rng.integers(0, 128, (70, 8, 8, 3)) + 60 * y[:, None, None, None]).astype(np.uint8)
        np.savez(path / "data.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
        self.x = torch.from_numpy(x[40:]).permute(0, 3, 1, 2).float() / 255
        self.y = torch.from_numpy(y[40:])

        torch.manual_seed(0)
        self.model, surrogate = self.train(resnet8(num_classes=3)), resnet8(num_classes=3)
        (path / "run").mkdir()
        save_file(self.model.state_dict(), path / "run" / "model.safetensors")
        save_file(surrogate.state_dict(), path / "run" / "original.safetensors")
        config = {"model": "resnet8", "dataset": "npz:data.npz", "data_dir": "data", "eps": EPS, "gamma": "1"}
        (path / "run" / "config.json").write_text(json.dumps(config))

        (path / "outside_networks.py").write_text(OUTSIDE)
        self.outside = self.train(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3)))
        torch.save(self.outside.state_dict(), path / "outside.pt")

    def train(self, model: nn.Module) -> nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(12):
            optimizer.zero_grad()
            F.cross_entropy(model(self.x), self.y).backward()
            optimizer.step()
        return model.eval()

    def results(self, *flags: str, name: str = "results.json") -> dict:
        out = self.path / name
        assert main(["evaluate", *flags, "--out", str(out)]) == 0
        found = json.loads(out.read_text())
        out.unlink()
        return found
