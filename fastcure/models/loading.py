"""Networks by name: the bundled ones, timm's, and any `nn.Module` that a function of the user's makes."""

from __future__ import annotations

import os
import sys
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from fastcure._extras import extra
from fastcure._fields import shortened
from fastcure.models import MODELS, build
from fastcure.models.normalize import Normalized
from fastcure.models.weights import load_weights

FUNCTION, TIMM = "package.module:function", "timm:NAME"
FORMS = (FUNCTION, TIMM)
"""The forms of the names of networks that are not bundled."""


def load_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    log: Callable[[str], object] | None = None,
) -> nn.Module:
    """Make the network called `name` and load its weights.

    Args:
        name: one of `fastcure.models.MODELS`; `package.module:function`: what is called to make the network (a class
            will do); or `timm:NAME`, a network of timm's. Modules are sought in the working directory too.
        checkpoint: state dict, as in `load_weights`: nothing of it but tensors is read. A function of the user's
            may load its own.
        mean, std: of each channel (or one for all), in pixels in [0, 1]; put in front of a network that does not
            normalise its input itself. Bundled networks do, by numbers in their checkpoint; those of timm do not, and
            have the numbers of their weights if none are given.
        arguments: keyword arguments for what makes the network.
        num_classes, in_channels: of a bundled network, or one of timm's.
        log: takes a line about numbers that were not given; and as in `load_weights`.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ModuleNotFoundError: if timm is needed and not installed.
        ValueError: if the name leads to no network, the checkpoint does not fit, or mean and std do not.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean} and std={std}")
    arguments = arguments or {}
    if name in MODELS:
        if checkpoint is not None and mean is not None:
            raise ValueError(f"{name} has its mean and std in the checkpoint: leave out those given")
        numbers = {} if mean is None or std is None else {"mean": mean, "std": std}
        sizes = {"num_classes": num_classes, "in_channels": in_channels}
        model = _made(name, build, {"name": name, **sizes, **numbers, **arguments})
    elif name.partition(":")[::2] == ("timm", name[5:]) and name[5:]:
        create = extra("timm", f"by --model {name}").create_model
        in_channels = arguments.get("in_chans", in_channels)
        options = {"num_classes": num_classes, "in_chans": in_channels, **arguments}
        model = _made(name, create, {"model_name": name[5:], **options})
        if mean is None or std is None:
            mean, std = _numbers_of(model, in_channels)
            if log is not None:
                log(f"{name} takes pixels normalised by mean {_shown(mean)} and std {_shown(std)} (--mean, --std)")
    else:
        model = _made(name, _function(name), arguments)
    if checkpoint is not None:
        load_weights(model, checkpoint, log)
    if name in MODELS or mean is None or std is None:
        return model
    return Normalized(model, in_channels, mean, std)


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Read keyword arguments written as `depth=18`: literals of Python, or else text.

    Raises:
        ValueError: for one that is not `name=value`, or is there twice.

    Examples:
        >>> from fastcure.models.loading import parse_arguments
        >>> parse_arguments(["depth=18", "widths=(8, 16)", "norm=batch", "pretrained=True"])
        {'depth': 18, 'widths': (8, 16), 'norm': 'batch', 'pretrained': True}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"model_arg must be name=value, such as depth=18, got {shortened(text)}")
        if name in found:
            raise ValueError(f"model_arg must give each name once, got {name} twice: {found[name]!r} and {value}")
        try:
            found[name] = literal_eval(value)
        except Exception:  # whatever is no literal is text
            found[name] = value
    return found


def _numbers_of(model: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    """The mean and deviation that a network of timm's was trained with; their means, for other channels."""
    about = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (list(about.get(name) or (0.5,)) for name in ("mean", "std"))
    return (mean, std) if len(mean) in (1, channels) else ([sum(mean) / len(mean)], [sum(std) / len(std)])


def _shown(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:.4g}" for number in numbers)


def _function(name: str) -> Callable[..., Any]:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"model must be one of {', '.join([*MODELS, *FORMS])}, got {name!r}")

    def call(**arguments: Any) -> Any:
        here = os.getcwd()
        sys.path.insert(0, here)
        try:
            return getattr(import_module(module), function)(**arguments)
        finally:
            sys.path.remove(here)

    return call


def _made(name: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    try:  # whatever goes wrong in the user's code, its name comes first
        model = make(**arguments)
    except Exception as error:
        raise ValueError(f"model {name} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name} must make a torch.nn.Module, got {type(model).__name__}")
    return model
