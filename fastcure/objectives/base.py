"""The interface between an objective, which says what a training step minimises, and whoever trains with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, overload
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from fastcure._augmentation import Transform
from fastcure._diagnostics.modes import regularisation_left_out
from fastcure._functional import LossFn, cross_entropy, evaluation_mode, unwrap
from fastcure._torch_compat import FSDP_ATTRIBUTE
from fastcure._validation import check_positive

_wrappers: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""The modules that have each objective as their `module`, as wrappers do."""


class ObjectiveOutput(NamedTuple):
    """What a step returns; `total` is 0-dim and differentiable in the parameters."""

    total: Tensor
    """What the step minimises: loss + gamma * penalty."""
    loss: Tensor
    """0-dim, mean loss of the batch, at the images where the objective takes it."""
    penalty: Tensor
    """0-dim, mean penalty of the batch, or of the part of it that has one; 0 for an objective without penalty."""
    logits: Tensor
    """(B, C), detached."""


class Positive:
    """A setting that is a number, or a 0-dim tensor, `> 0`; checked where it is set.

    Args:
        zero: whether it may be 0.
        per_sample: whether it may be a tensor `(B,)`, a number for each sample of the batch.
    """

    def __init__(self, *, zero: bool = False, per_sample: bool = False) -> None:
        self.zero, self.per_sample = zero, per_sample

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, objective: None, owner: type) -> Positive: ...
    @overload
    def __get__(self, objective: nn.Module, owner: type) -> Any: ...
    def __get__(self, objective: nn.Module | None, owner: type) -> Any:
        return self if objective is None else vars(objective)[self.name]

    def __set__(self, objective: nn.Module, value: float | Tensor) -> None:
        check_positive(self.name, value, zero=self.zero)
        if isinstance(value, Tensor) and value.dim() and not self.per_sample:
            raise ValueError(f"{self.name} must be a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        vars(objective)[self.name] = value


class Objective(nn.Module):
    """What a training step minimises: `objective(x, y).total.backward()`.

    Its parameters are those of the model (and of a `loss_fn` that is a module), so that
    `DistributedDataParallel(objective)` works. Save `model.state_dict()`, which knows nothing of the objective.

    A subclass defines `forward` and `cost`, and declares the attributes below; a trainer asks for nothing else.
    Settings are attributes of the objective itself: set on a wrapper around it (`ddp.gamma` in place of
    `ddp.module.gamma`), they raise an error in the next call.

    An objective may keep something of each training sample, such as its last perturbation or its mean loss: in buffers
    that `per_sample` names and `allocate` makes. A step reads and writes their rows at `index`, and leaves the others
    as they are. `fastcure finetune` does the rest. It puts the rows back where a step is repeated for want of memory or
    left out; it gives every process the rows of the others after each step; and it saves them, so that a resumed run
    has them bit for bit. Other buffers are those of the main process, as the statistics of batch norms are.
    `transform` takes what is kept in the coordinates of the images into those of the augmented ones, and back. A loop
    of your own passes `index` itself; around such an objective, a `DistributedDataParallel` needs
    `broadcast_buffers=False`, and the loop gathers the rows.

    Args:
        model: the network, its normalisation inside.
        loss_fn: `(logits, y) -> (B,)`.
        batch_stats: "train" runs the passes of the loss with the modules' flags as they stand; "frozen" runs them in
            evaluation mode and changes no buffer.

    Raises:
        TypeError: if `model` is not a module, or is one that averages gradients by itself.
        ValueError: if `batch_stats` is unknown.
        AttributeError: when an attribute is set whose name nearly is that of a setting.
    """

    title: ClassVar[str] = ""
    """Of the method, for output: "after TITLE"."""
    settings: ClassVar[tuple[str, ...]] = ("loss_fn", "batch_stats")
    """Keyword arguments of the constructor, each an attribute that may be set between steps."""
    scheduled: ClassVar[tuple[str, ...]] = ()
    """Those of the settings that are numbers, which a trainer may have follow a schedule."""
    modes: ClassVar[tuple[str, ...]] = ("train", "frozen")
    """Known values of `batch_stats`."""
    per_sample: ClassVar[tuple[str, ...]] = ()
    """Buffers with a row for each training sample, `(N, ...)`."""
    transform: Transform = Transform()
    """How the images of the batch were augmented; a trainer sets it before each step."""
    microbatch: int | None = None
    """Samples that are evaluated at a time; None for the whole batch."""
    generator: torch.Generator | None = None
    """Source of the objective's random numbers; torch's default generator if None."""

    def __init__(self, model: nn.Module, loss_fn: LossFn = cross_entropy, batch_stats: str = "train") -> None:
        super().__init__()
        unwrap(model)
        self.model = model
        self.loss_fn = loss_fn
        self.batch_stats = self._known(batch_stats)

    @property
    def cost(self) -> float:
        """Forward passes per sample that a step costs, its backward included; a standard step costs 3."""
        raise NotImplementedError

    @property
    def updates_buffers(self) -> bool:
        """Whether a step changes the running statistics of batch norms."""
        return self.batch_stats != "frozen"

    @property
    def can_microbatch(self) -> bool:
        """Whether `microbatch` may be set, which leaves the numbers as they are and takes less memory."""
        return False

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        """Evaluate the objective.

        Args:
            x: `(B, ...)`, images.
            y: class indices `(B,)` or probabilities `(B, C)`; whatever `loss_fn` takes.
            index: int64 `(B,)`, the places of the samples among those that are trained on, the same in each epoch; for
                objectives that keep something of each.
        """
        raise NotImplementedError

    def allocate(self, count: int, shape: torch.Size) -> None:
        """Register the buffers that are `per_sample`; a trainer calls it once, and moves them to its device.

        Args:
            count: N, how many samples are trained on.
            shape: `(C, H, W)`, of an image.
        """

    @contextmanager
    def passes(self) -> Iterator[None]:
        """The context of the passes of the loss, by `batch_stats`; it warns once of dropout that is left out."""
        if self._known(self.batch_stats) != "frozen":
            yield
            return
        left_out = regularisation_left_out(self.model, self.loss_fn, "eager", self.batch_stats, instead="train")
        with left_out, evaluation_mode(self.model):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, unless a setting was set where it has no effect."""
        for wrapper in _wrappers.get(self, ()):
            refuse_settings_on(wrapper, self)
        return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a misspelt setting would have no effect, and is an error."""
        if not (name in self.settings or name.startswith("_") or hasattr(self, name)):
            near = get_close_matches(name.lower(), self.settings, n=1, cutoff=0.75)
            if near and not name.startswith(near[0]):
                raise AttributeError(f"{type(self).__name__} has no setting {name!r}: did you mean {near[0]!r}?")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Show the settings in `print(objective)`."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings if name != "loss_fn")

    def _known(self, batch_stats: str) -> str:
        if batch_stats not in self.modes:
            modes = ", ".join(map(repr, self.modes[:-1])) + f" or {self.modes[-1]!r}"
            raise ValueError(f"batch_stats must be {modes} for {type(self).__name__}, got {batch_stats!r}")
        return batch_stats


def refuse_parameters_beside(trained: nn.Module, objective: Objective) -> None:
    """Raise if `objective` has parameters that would stay as they are, since those of `trained` alone are trained.

    Raises:
        ValueError: if so, unless they require no grad.
    """
    known = {id(parameter) for parameter in trained.parameters()}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise ValueError(
                f"{type(objective).__name__} has the parameter {name}, which would not be trained, as it is none of "
                "the network's: make it one of them, or freeze it by requires_grad_(False)"
            )


def refuse_settings_on(wrapper: nn.Module, objective: Objective) -> None:
    """Raise if settings of `objective` were set on a module around it, where nothing reads them.

    Raises:
        ValueError: if so, unless the value is that of `objective`.
    """
    found = vars(wrapper) | {**dict(wrapper.named_children()), **dict(wrapper.named_parameters(recurse=False))}
    for name in objective.settings:
        if name in found and found[name] is not (own := getattr(objective, name)):
            value, kind = found[name], type(objective).__name__
            if isinstance(value, (int, float, str)) and value == own:
                continue
            raise ValueError(
                f"{name} was set to {value!r} on the {type(wrapper).__name__} around {kind}, where it has no effect; "
                f"{kind} has {own!r}: set it on {kind} itself, wrapper.module.{name} = ..., and del wrapper.{name}"
            )


def _remember(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
    if name in ("module", FSDP_ATTRIBUTE) and isinstance(module, Objective):
        _wrappers.setdefault(module, WeakSet()).add(wrapper)


register_module_module_registration_hook(_remember)
