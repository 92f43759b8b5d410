"""Batch norms folded in front of the compiled region, which then sees convolutions whose weights are what they are.

`fastcure._folding.layers` does this for the eager engine in ways that cannot be traced. Here the channel maps are
computed before the region, with autograd, so that gradients come back through them; inductor would compute
`sqrt(var + eps)` for every pixel. What `fastcure.prepare` found is folded; any other batch norm becomes one product and
one sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fastcure._folding.layers import NORMS, channel_map_of, folds_of, has_statistics, plain
from fastcure.rules.plain_operators import hardsigmoid

PARTS = ("weight", "bias", "running_mean", "running_var")
Forwards = dict[ref[nn.Module], Callable[[Tensor], Tensor]]


class Folding:
    """What is folded of a model, found when its region is compiled.

    Args:
        model: the network.
        norms: whether batch norms that are not folded take part; under autocast they compute in the wider type.
    """

    def __init__(self, model: nn.Module, *, norms: bool) -> None:
        names = {module: name for name, module in model.named_modules()}
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        uses += Counter(id(b) for _, b in model.named_buffers(remove_duplicate=False))

        def own(*modules: nn.Module) -> bool:
            """What another module has too must stay what it is."""
            return all(uses[id(t)] == 1 for module in modules for t in (*module.parameters(), *module.buffers()))

        pairs = [(fold.layer, fold.norm) for fold in folds_of(model) if _by_given_statistics(fold.norm)]
        folds = [(layer, norm) for layer, norm in pairs if own(layer, norm)]
        self.folds = [(names[layer], names[norm]) for layer, norm in folds]
        taken = {norm for _, norm in folds}
        others = [m for m in names if norms and type(m) in NORMS and m not in taken and plain(m)]
        left = [norm for norm in others if _by_given_statistics(norm) and own(norm)]
        self.norms = [names[norm] for norm in left]
        # By weak references: this is kept for as long as the model lives, and any module may refer to its root.
        self.forwards: Forwards = {ref(norm): _shifted(ref(norm), layer.bias is not None) for layer, norm in folds}
        self.forwards |= {ref(norm): _affine(ref(norm)) for norm in left}
        # Of this one the compiler has no second derivative; of hardswish it has.
        hard = [module for module in names if type(module) is nn.Hardsigmoid and "forward" not in vars(module)]
        self.forwards |= {ref(module): partial(hardsigmoid, inplace=module.inplace) for module in hard}

    @property
    def key(self) -> tuple[Any, ...]:
        """What a compilation depends on."""
        return (*self.folds, *self.norms, *self.forwards)

    def state(self, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state with which the forwards below compute the same; differentiable in `state`."""
        new = dict(state)
        for layer, norm in [*self.folds, *((None, norm) for norm in self.norms)]:
            module: Any = model.get_submodule(norm)
            weight, bias, mean, var = (state[f"{norm}.{part}"] for part in PARTS)
            s, t = channel_map_of(weight, bias, mean, var, module.eps)
            if layer is None:
                new[f"{norm}.weight"], new[f"{norm}.bias"] = s, t
                continue
            weight = state[f"{layer}.weight"]
            new[f"{layer}.weight"] = (weight * s.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
            old = state.get(f"{layer}.bias")
            if old is None:
                new[f"{norm}.bias"] = t
            else:
                new[f"{layer}.bias"] = (t + s * old).to(old.dtype)
        return new

    def disturbed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state with other running statistics: where nothing but the norms reads them, it shows."""
        new = dict(state)
        for norm in (*(norm for _, norm in self.folds), *self.norms):
            new[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] + 0.3
            new[f"{norm}.running_var"] = state[f"{norm}.running_var"] * 3
        return new


@contextmanager
def applied(forwards: Forwards) -> Iterator[None]:
    """Give modules other forwards."""
    living = [(module, forward) for reference, forward in forwards.items() if (module := reference()) is not None]
    try:
        for module, forward in living:
            module.forward = forward
        yield
    finally:
        for module, _ in living:
            vars(module).pop("forward", None)


def _by_given_statistics(norm: Any) -> bool:
    return not norm.training and has_statistics(norm) and norm.bias is not None


def _shifted(reference: ref[Any], biased: bool) -> Callable[[Tensor], Tensor]:
    """What is left of a folded batch norm: the shift, where the layer has no bias to take it."""

    def forward(input: Tensor) -> Tensor:  # noqa: A002
        norm: Any = reference()
        return input if biased else input + norm.bias.to(input.dtype).reshape(-1, *[1] * (input.dim() - 2))

    return forward


def _affine(reference: ref[Any]) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:  # noqa: A002
        norm: Any = reference()
        shape = (-1, *[1] * (input.dim() - 2))
        return torch.addcmul(norm.bias.reshape(shape), input, norm.weight.reshape(shape))

    return forward
