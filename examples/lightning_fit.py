"""Lightning: `python examples/lightning_fit.py`, or `torchrun --nproc-per-node 2` in place of `python`."""

import os

import lightning
import torch
from small_digits import EPS, H, datasets, report, trained_network
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import fastcure
from fastcure.integrations import LightningMixin


class Classifier(lightning.LightningModule):
    """An ordinary classifier, as yours may be."""

    def __init__(self, model: nn.Module) -> None:
        """Take the network."""
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Measure the accuracy under attack, in the inference mode in which Lightning validates."""
        x, y = batch
        adversarial = fastcure.attacks.pgd(self.model, x, y, eps=EPS, steps=10)
        correct = (self.model(adversarial).argmax(1) == y).float().mean()
        self.log("robust accuracy", correct, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.SGD(self.parameters(), lr=2e-2, momentum=0.9)


class Robust(LightningMixin, Classifier):
    """The same, trained with CURE: it has the checkpoints of `Classifier`."""

    schedules = {"gamma": "0:0.4x50%,0.4"}

    def make_objective(self) -> fastcure.CURE:
        """Return what a training step minimises."""
        return fastcure.CURE(self.model, h=H)


def main(images: int | None = None, epochs: int = 5, batch_size: int = 32, folder: str | None = None) -> nn.Module:
    """Fine-tune with batches of `batch_size` images in all processes together."""
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    train, test = datasets(images)
    module = Robust(trained_network(train))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        devices=processes if processes > 1 else 1,
        strategy="ddp" if processes > 1 else "auto",
        default_root_dir=folder,
        enable_checkpointing=folder is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(train, batch_size // processes, sampler=DistributedSampler(train, processes, rank))
    trainer.fit(module, loader, DataLoader(test, 64))
    if trainer.is_global_zero:
        print(f"robust accuracy in the last validation: {trainer.callback_metrics['robust accuracy']:.1%}")
        report(f"after CURE on {processes} processes", module.model.cpu(), test)
    return module.model


if __name__ == "__main__":
    main()
