"""The optimisers and the scaler of the loss, and their state as tensors with names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Parameters = Iterable[nn.Parameter]


def _sgd(parameters: Parameters, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum.

    Its momentum starts at 0, which gives the steps that torch's own start gives. Torch's would be undefined after a
    first step that is left out because it is not finite.
    """
    nesterov = momentum > 0
    sgd = torch.optim.SGD(
        parameters, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True, lr=1e-3
    )
    for parameter in sgd.param_groups[0]["params"] if nesterov else ():
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


OPTIMIZERS: dict[str, Callable[[Parameters, float, float], torch.optim.Optimizer]] = {
    "adam": lambda parameters, _, decay: torch.optim.Adam(parameters, weight_decay=decay, fused=True),
    "adamw": lambda parameters, _, decay: torch.optim.AdamW(parameters, weight_decay=decay, fused=True),
    "sgd": _sgd,
}
"""Each takes parameters, momentum and weight decay; fused, so that a step is left out without asking the device."""


def make_optimizer(
    parameters: Parameters, name: str = "adam", momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return an optimiser of these parameters, whose learning rate is to be set before each step.

    Args:
        parameters: to train.
        name: one of `OPTIMIZERS`.
        momentum: Nesterov's, of "sgd" alone.
        weight_decay: of every parameter: decoupled in "adamw", added to the gradient in the others.
    """
    return OPTIMIZERS[name](parameters, momentum, weight_decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of each parameter, by its place and name: `3.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned; options such as the learning rate stay as they are.

    Raises:
        ValueError: if it is that of another optimiser.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        like = parameters[int(index)]  # a fused step takes the elements in the order of the memory
        state.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(tensor) if tensor.dim() else tensor
    if len(state) not in (0, len(parameters)):  # torch would start the others anew
        raise ValueError(f"the optimiser's state must be of {len(parameters)} parameters, got {len(state)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """Return the state of a scaler of the loss, for `load_scaler`."""
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in scaler.state_dict().items()}


def load_scaler(scaler: torch.amp.GradScaler, tensors: dict[str, Tensor]) -> None:
    """Load what `scaler_tensors` returned.

    Raises:
        KeyError: if a part is missing.
    """
    state = {name: float(tensors[name]) for name in scaler.state_dict()}
    scaler.load_state_dict(
        {**state, "growth_interval": int(state["growth_interval"]), "_growth_tracker": int(state["_growth_tracker"])}
    )
