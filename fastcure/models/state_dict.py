"""State dicts as other tools save them: nested in what else they save, and with prefixes of their wrappers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fastcure._torch_compat import WRAPPER_ATTRIBUTES

AVERAGES = {"ema", "state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "averaged_model"}
"""Names of averaged weights: taken where there are no others."""

NESTINGS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params"),
    *sorted(AVERAGES),
)
"""Where training scripts, Lightning, timm and others put the state dict."""

WRAPPERS = tuple(f"{name}." for name in WRAPPER_ATTRIBUTES)
"""What torch.compile, FSDP and activation checkpointing put into names, wherever the wrapped module is."""


def find_state_dict(content: Any) -> tuple[dict[str, Any], list[str]]:
    """Find the state dict in what a file holds.

    Returns:
        The state dict, and what was done to find it, in words.

    Raises:
        ValueError: if there is none.
    """
    done: list[str] = []
    for _ in range(5):
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds an object of type {type(content).__name__}: save model.state_dict()")
        inner = [name for name in NESTINGS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        done.append(f"took {inner[0]!r}" + (f" and not {few(map(repr, inner[1:]))}" if inner[1:] else ""))
        content = content[inner[0]]
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"it holds no tensors, only {few(map(str, content)) or 'nothing'}: save model.state_dict()")
    return {str(key): value for key, value in content.items()}, done


def fit_names(state: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Give the tensors of a state dict the names that they have in `model`, as far as prefixes tell them apart.

    Returns:
        The state dict to load, and what was done to it, in words.

    Raises:
        ValueError: if several prefixes lead to equal names.
    """
    wanted = {_plain(name): name for name in model.state_dict()}
    found = {_plain(name): value for name, value in state.items()}
    if len(found) < len(state):  # two of its names became one
        found = dict(state)
    done = [f"took {name!r} out of the names" for name in WRAPPERS if any(name in key for key in state)]
    ours, theirs = _prefixes(wanted, found)
    if theirs:
        done.append(f"took the prefix {theirs!r} off the names")
        rest = [name for name in found if not name.startswith(theirs)]
        if rest:
            done.append(f"left out what has no such prefix ({few(rest)})")
    if ours:
        done.append(f"put the prefix {ours!r} before the names")
    names = {name: ours + name.removeprefix(theirs) for name in found if name.startswith(theirs)}
    return {wanted.get(new, new): found[name] for name, new in names.items()}, done


def misfit(state: Mapping[str, Any], model: nn.Module) -> str:
    """Say how the names and shapes of a state dict differ from those of a model; nothing if they do not."""
    wanted = model.state_dict()
    missing, unexpected = ([n for n in a if n not in b] for a, b in ((wanted, state), (state, wanted)))
    words = []
    if missing:
        words.append(f"it lacks {few(missing)}")
    if unexpected:
        words.append(f"the model has no {few(unexpected)}")
    shapes = [
        f"{name} is {tuple(value.shape)} in it and {tuple(wanted[name].shape)} in the model"
        for name, value in state.items()
        if name in wanted and isinstance(value, Tensor) and value.shape != getattr(wanted[name], "shape", value.shape)
    ]
    return "; ".join([*words, *shapes[:2], *([f"and {len(shapes) - 2} other shapes"] if len(shapes) > 2 else [])])


def few(names: Iterable[str]) -> str:
    """List at most three names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _prefixes(wanted: Collection[str], found: Collection[str]) -> tuple[str, str]:
    """Return the prefixes, of the model's names and of the file's, without which most names are equal."""
    votes = Counter({("", ""): sum(name in wanted for name in found)})
    for name in found:
        votes.update(("", prefix) for prefix in _beginnings(name) if name.removeprefix(prefix) in wanted)
    for name in wanted:
        votes.update((prefix, "") for prefix in _beginnings(name) if name.removeprefix(prefix) in found)
    best = [prefixes for prefixes, count in votes.items() if count == max(votes.values())]
    if ("", "") in best:
        return "", ""
    best = [(ours, theirs) for ours, theirs in best if AVERAGES.isdisjoint(theirs.split("."))] or best
    if len(best) > 1:
        prefixes = ", ".join(repr(ours or theirs) for ours, theirs in best)
        raise ValueError(f"its names fit the model's behind each of the prefixes {prefixes}: save one of them alone")
    return best[0]


def _beginnings(name: str) -> list[str]:
    return [name[: i + 1] for i, letter in enumerate(name) if letter == "."]
