"""Schedules of gamma and of the learning rate in a loop of your own: `python examples/schedules.py`."""

import torch
from small_digits import H, datasets, report, trained_network
from torch import nn
from torch.utils.data import DataLoader

import fastcure


def main(images: int | None = None, epochs: int = 6) -> nn.Module:
    """Let gamma climb over half of the run, and the learning rate fall after a short warm-up."""
    train, test = datasets(images)
    model = trained_network(train)

    cure = fastcure.CURE(model, h=H, batch_stats="train")
    optimizer = torch.optim.Adam(model.parameters())
    gamma = fastcure.schedule("0:0.4x50%,0.4", epochs)
    lr = fastcure.schedule("0:5e-3x10%,5e-3:1e-5", epochs)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    for epoch in range(epochs):
        model.train()
        for step, (x, y) in enumerate(loader):
            now = epoch + step / len(loader)
            cure.gamma = gamma.at(now)
            optimizer.param_groups[0]["lr"] = lr.at(now)
            out = cure(x, y)
            optimizer.zero_grad()
            out.total.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: gamma {cure.gamma:.2f}, loss {out.loss:.3f}, penalty {out.penalty:.3f}")

    report("after CURE", model, test)
    return model


if __name__ == "__main__":
    main()
