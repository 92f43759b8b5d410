"""The optimiser, and its state as tensors with names."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser: fused, so that a step can be left out without asking the device."""
    return torch.optim.Adam(model.parameters(), fused=True)


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
