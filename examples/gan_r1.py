"""A GAN with the R1 penalty, which uses `fastcure.double_backward()` alone: `python examples/gan_r1.py`."""

import torch
from small_digits import datasets
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fastcure


def main(images: int | None = None, epochs: int = 3) -> nn.Module:
    """Train a generator of 16 x 16 digits; return the discriminator."""
    torch.manual_seed(0)
    train, _ = datasets(images)
    discriminator = nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1),
    )
    generator = nn.Sequential(
        nn.Linear(16, 64 * 4 * 4),
        nn.Unflatten(1, (64, 4, 4)),
        nn.SiLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )
    of_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.99))
    of_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.0, 0.99))
    for epoch in range(epochs):
        for x, _ in DataLoader(train, batch_size=32, shuffle=True):
            fake = generator(torch.randn(len(x), 16))
            real = x.requires_grad_()
            with fastcure.double_backward():
                scores = discriminator(real)
                (g,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
            r1 = g.square().flatten(1).sum(1).mean()
            of_d.zero_grad()
            loss = F.softplus(-scores).mean() + F.softplus(discriminator(fake.detach())).mean()
            (loss + 5.0 * r1).backward()
            of_d.step()

            of_g.zero_grad()
            F.softplus(-discriminator(fake)).mean().backward()
            of_g.step()
        print(f"epoch {epoch + 1}: loss of the discriminator {loss:.3f}, R1 {r1:.4f}")
    return discriminator


if __name__ == "__main__":
    main()
