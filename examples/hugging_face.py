"""Hugging Face Trainer: `python examples/hugging_face.py`, or `torchrun --nproc-per-node 2` in place of `python`."""

import os
import tempfile
from typing import Any

import torch
import transformers
from small_digits import EPS, datasets, fit, report
from torch import nn
from torch.utils.data import TensorDataset

import fastcure
from fastcure.integrations import TrainerMixin


class RobustTrainer(TrainerMixin, transformers.Trainer):
    """Trains with CURE."""

    schedules = {"gamma": "0:0.4x50%,0.4"}

    def make_objective(self) -> fastcure.CURE:
        """Return what a training step minimises."""
        return fastcure.CURE(self.model, h=fastcure.eps_to_h(EPS, 16 * 16))


def network(train: TensorDataset) -> nn.Module:
    """Return a small ResNet of the library after standard training, for 16 x 16 images with one channel."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
        downsample_in_first_stage=False,
    )
    model = transformers.ResNetForImageClassification(config)
    fit(fastcure.objectives.Standard(model), train, epochs=5, lr=3e-3)
    return model


def examples(data: TensorDataset) -> list[dict[str, Any]]:
    """Return images and labels under the names that the Trainer knows."""
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(*data.tensors, strict=True)]


def main(images: int | None = None, epochs: int = 5, batch_size: int = 32, **options: Any) -> nn.Module:
    """Fine-tune with batches of `batch_size` images in all processes together."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    train, test = datasets(images)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size // processes // options.get("gradient_accumulation_steps", 1),
            learning_rate=5e-2,
            optim="sgd",
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            logging_steps=20,
            disable_tqdm=True,
            **options,
        )
        trainer = RobustTrainer(network(train), arguments, train_dataset=examples(train), eval_dataset=examples(test))
        trainer.train()
        found = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"loss on the test images: {found['eval_loss']:.3f}")
        report(f"after CURE on {processes} processes", trainer.model.cpu(), test)
    return trainer.model


if __name__ == "__main__":
    main()
