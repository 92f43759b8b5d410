"""What the examples share: handwritten digits, and a small network after standard training on them."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastcure
from fastcure.evaluation.accuracy import accuracy

EPS = 0.1
H = fastcure.eps_to_h(EPS, 16 * 16)


def datasets(images: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test images (N, 1, 16, 16) in [0, 1] and labels, at most `images` of each."""
    data = fastcure.data.load("digits")
    train = TensorDataset(data.x_train[:images] / 255, data.y_train[:images])
    return train, TensorDataset(data.x_test[:images] / 255, data.y_test[:images])


def trained_network(train: TensorDataset, epochs: int = 5) -> nn.Module:
    """Return a network after standard training: replace it by yours, with the normalisation inside."""
    torch.manual_seed(0)
    model = nn.Sequential(
        fastcure.models.Normalize(1, [0.3], [0.35]),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    fit(fastcure.objectives.Standard(model), train, epochs, lr=3e-3)
    return model


def fit(objective: fastcure.objectives.Objective, images: TensorDataset, epochs: int, lr: float) -> None:
    """Train the network of an objective, by the loop of `plain_loop.py`."""
    optimizer = torch.optim.Adam(objective.parameters(), lr=lr)
    for _ in range(epochs):
        objective.model.train()
        for x, y in DataLoader(images, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            objective(x, y).total.backward()
            optimizer.step()


def report(name: str, model: nn.Module, test: TensorDataset) -> None:
    """Print the accuracy on test images, clean and under PGD-10."""
    x, y = test.tensors
    attack = partial(fastcure.attacks.pgd, eps=EPS, steps=10)
    clean, robust = accuracy(model, x, y), accuracy(model, x, y, attack, seed=0)
    print(f"{name}: clean {clean:.1%}, PGD-10 at eps {EPS}: {robust:.1%}")
