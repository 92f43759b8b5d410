"""Networks by name: the bundled ones, and any `nn.Module` that a function of the user's makes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from fastcure.models import MODELS, Normalize, build
from fastcure.models.weights import load_weights

FUNCTION = "package.module:function"
"""The form of the name of a network that is not bundled."""


def load_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    log: Callable[[str], object] | None = None,
) -> nn.Module:
    """Make the network called `name` and load its weights.

    Args:
        name: one of `fastcure.models.MODELS`, or `package.module:function`: what is called, without arguments, to
            make the network (a class will do). Modules are sought in the working directory too.
        checkpoint: state dict, as in `load_weights`: nothing of it but tensors is read. A function of the user's
            may load its own.
        mean, std: of each channel (or one for all), in pixels in [0, 1]; put in front of a network that does not
            normalise its input itself. Bundled networks do, by numbers in their checkpoint.
        num_classes, in_channels: of a bundled network.
        log: as in `load_weights`.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the name leads to no network, the checkpoint does not fit, or mean and std do not.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean} and std={std}")
    if name in MODELS:
        if checkpoint is not None and mean is not None:
            raise ValueError(f"{name} has its mean and std in the checkpoint: leave out those given")
        numbers = {} if mean is None or std is None else {"mean": mean, "std": std}
        model = build(name, num_classes, in_channels, **numbers)
    else:
        model = _call(name)
    if checkpoint is not None:
        load_weights(model, checkpoint, log)
    if name in MODELS or mean is None or std is None:
        return model
    return nn.Sequential(Normalize(in_channels, mean, std), model)


def _call(name: str) -> nn.Module:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"model must be one of {', '.join([*MODELS, FUNCTION])}, got {name!r}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:  # whatever goes wrong in the user's code, its name comes first
        factory: Callable[[], Any] = getattr(import_module(module), function)
        model = factory()
    except Exception as error:
        raise ValueError(f"model {name} cannot be made: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name} must make a torch.nn.Module, got {type(model).__name__}")
    return model
