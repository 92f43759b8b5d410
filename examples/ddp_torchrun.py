"""Several processes: `torchrun --nproc-per-node 2 examples/ddp_torchrun.py` (or one, without torchrun)."""

import os

import torch
import torch.distributed as dist
from small_digits import H, datasets, report, trained_network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fastcure


def main(images: int | None = None, epochs: int = 5, batch_size: int = 32) -> nn.Module:
    """Fine-tune with batches of `batch_size` images in all processes together."""
    started = dist.is_torchelastic_launched() and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]) if started else 0) if torch.cuda.is_available() else "cpu"
    )

    train, test = datasets(images)
    model = trained_network(train).to(device)
    cure = fastcure.CURE(model, h=H, gamma=0.4)
    step = DistributedDataParallel(cure) if processes > 1 else cure  # around the objective, not around the model
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2, momentum=0.9)
    sampler: DistributedSampler[Tensor] = DistributedSampler(train, processes, rank)
    loader = DataLoader(train, batch_size // processes, sampler=sampler, drop_last=True)
    for epoch in range(epochs):
        cure.gamma = 0.4 * min(1.0, 2 * epoch / epochs)  # on the objective, not on the wrapper
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            step(x.to(device), y.to(device)).total.backward()
            optimizer.step()

    if rank == 0:
        report(f"after CURE on {processes} processes", model.cpu(), test)
    del step  # before its process group
    if started:
        dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
