"""accelerate: `python examples/accelerate_loop.py`, or `torchrun --nproc-per-node 2` in place of `python`."""

import torch
from accelerate import Accelerator
from small_digits import H, datasets, report, trained_network
from torch import nn
from torch.utils.data import DataLoader

import fastcure


def main(images: int | None = None, epochs: int = 5, batch_size: int = 32) -> nn.Module:
    """Fine-tune with batches of `batch_size` images in all processes together."""
    accelerator = Accelerator()
    train, test = datasets(images)
    model = trained_network(train)
    loader = DataLoader(train, batch_size // accelerator.num_processes, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2, momentum=0.9)
    # The objective is prepared, not the model: accelerate then wraps it for several processes.
    cure, optimizer, loader = accelerator.prepare(fastcure.CURE(model, h=H), optimizer, loader)
    gamma = fastcure.schedule("0:0.4x50%,0.4", epochs)
    for epoch in range(epochs):
        accelerator.unwrap_model(cure).gamma = gamma.at(epoch)  # on the objective, not on the wrapper
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(cure(x, y).total)
            optimizer.step()

    accelerator.wait_for_everyone()
    model = accelerator.unwrap_model(cure).model.cpu()
    if accelerator.is_main_process:
        report(f"after CURE on {accelerator.num_processes} processes", model, test)
    accelerator.free_memory(cure)
    del cure
    accelerator.end_training()
    return model


if __name__ == "__main__":
    main()
