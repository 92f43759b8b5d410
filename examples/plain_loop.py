"""A training loop of your own: `python examples/plain_loop.py`."""

import torch
from small_digits import H, datasets, report, trained_network
from torch import nn
from torch.utils.data import DataLoader

import fastcure


def main(images: int | None = None, epochs: int = 6) -> nn.Module:
    """Fine-tune a trained network with CURE."""
    train, test = datasets(images)
    model = trained_network(train)
    report("standard training", model, test)

    cure = fastcure.CURE(model, h=H, gamma=0.4, batch_stats="train")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        model.train()
        for x, y in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            cure(x, y).total.backward()
            optimizer.step()

    report("after CURE", model, test)
    return model


if __name__ == "__main__":
    main()
