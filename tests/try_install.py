"""Tries an install of the library alone, without extras: `make package` runs it in a fresh environment."""

import sys
from importlib.metadata import version

import fastcure_kernels
import torch

import fastcure

assert "site-packages" in fastcure.__file__
assert version("fastcure") == fastcure.__version__
assert fastcure_kernels.direction(torch.ones(1, 4)).shape == (1, 4)
model = fastcure.models.pretrained("resnet8-digits")
x = torch.rand(4, 1, 16, 16)
y = model(x).argmax(1)
adversarial = fastcure.attacks.pgd(model, x, y, eps=0.1, steps=3)
assert (adversarial - x).abs().max() <= 0.1 + 1e-6
for name, objective in fastcure.objectives.OBJECTIVES.items():
    options = {"eps": 0.1} if "eps" in objective.settings else {}
    objective(model, **options)(x, y).total.backward()
    print(name, end=" ")
extras = {"matplotlib", "safetensors", "sklearn", "tqdm", "datasets"} & set(sys.modules)
assert not extras, extras
print("ok:", fastcure.__file__)
