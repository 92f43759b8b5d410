"""The network and the images that a measurement is of, by the settings that name them; tried before it begins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastcure._functional import evaluation_mode, find_logits
from fastcure.data import Dataset, load
from fastcure.evaluation.settings import Measurement, known_of
from fastcure.models.loading import load_model, parse_arguments
from fastcure.models.placement import placed


def load_images(settings: Measurement) -> Dataset:
    """Load the dataset that `settings` name; its training images may be missing.

    Classes and channels are those of the run, if there is one: a dataset of its own need not show all of them.
    """
    assert settings.dataset is not None
    known = known_of(settings.run)
    data = load(
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        train=False,
        test_fraction=settings.val_fraction,
        classes=known.classes,
        channels=known.channels,
        workers=settings.workers or None,
    )
    return data._replace(num_classes=max(data.num_classes, known.num_classes))


def load_network(
    settings: Measurement,
    data: Dataset,
    checkpoint: str | None,
    device: torch.device,
    log: Callable[[str], object] | None = None,
) -> nn.Module:
    """Make the network that `settings` name, with the weights of `checkpoint`, for images of `data` on `device`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `load_model` and `check_network` say.
    """
    assert settings.model is not None
    channels = data.x_test.shape[1]
    model = load_model(
        *(settings.model, checkpoint, settings.mean, settings.std),
        arguments=parse_arguments(settings.model_arg),
        num_classes=data.num_classes,
        in_channels=channels,
        log=log,
    )
    model = placed(model, settings.model, data.x_test.shape[1:], device)
    check_network(model, settings.model, data, device)
    return model


def check_network(model: nn.Module, name: str, data: Dataset, device: torch.device) -> None:
    """Try a network on two images, so that what does not fit is reported before hours of work.

    Raises:
        ValueError: if the network fails, or does not return logits for all classes of the data.
    """
    images = data.x_test[:2].to(device).float() / 255
    try:
        with torch.no_grad(), evaluation_mode(model):
            logits = find_logits(model(images))
    except Exception as error:  # it is the user's code
        kind = "" if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"model {name} cannot take the images of {data.name}: {kind}{error}") from error
    if logits.shape[:1] != images.shape[:1] or logits.dim() != 2 or logits.shape[1] < data.num_classes:
        raise ValueError(
            f"model {name} must return logits (B, C) with C >= {data.num_classes}, the classes of {data.name}, "
            f"got {tuple(logits.shape)} for B = {len(images)}"
        )
