"""A key of all that decides which operators a step runs, but for values of tensors: what a capture of it holds fast.

Modules (their classes, flags, hooks and attributes), what a loss function closes over, and torch's settings. Global
variables of Python and the contents of foreign extension types are not seen.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from types import CellType, FunctionType, MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from fastcure._torch_compat import version

PLAIN = frozenset((NoneType, bool, int, float, complex, str, bytes))
PLAIN |= {torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout}
EMPTY = frozenset((dict, OrderedDict, set, list, tuple))
ORDINARY = frozenset((Tensor, nn.Parameter))
DEPTH = 4
"""How far attributes of attributes are followed."""
LIMIT = 20_000
"""How many values are read: a larger thing is like no other, not even itself."""


def fingerprint(root: object, device: torch.device) -> Hashable:
    """Return the key of a module or function that runs on `device`; it keeps no tensor and no module alive.

    Two equal keys of one object at two times tell that its Python code would do the same.
    """
    reader = _Reader(device)
    if isinstance(root, nn.Module):
        found = tuple(reader.module(module) for module in root.modules())
    else:
        found = (reader.value(root),)
    return found if reader.count < LIMIT else object()


def settings_of_torch(device: torch.device) -> Hashable:
    """Return the settings of torch and of this library on which the operators of a step on `device` depend."""
    kind, cudnn = device.type, torch.backends.cudnn
    return (
        *(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.get_default_dtype()),
        *(torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        *(cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision),  # type: ignore[attr-defined]
        os.environ.get("FASTCURE_BACKEND"),
        torch.cuda.current_stream(device).cuda_stream if kind == "cuda" else None,
    )


class _Reader:
    def __init__(self, device: torch.device) -> None:
        self.device, self.count = device, 0

    def module(self, module: nn.Module) -> Hashable:
        state = vars(module)
        self.count += len(state)
        found: list[Any] = [type(module), type(module).forward]
        for name, value in state.items():
            if type(value) in PLAIN:
                found.append(value)
            elif type(value) in EMPTY and not value:
                continue  # most of a module's dictionaries, which it has for ever
            elif name in ("_parameters", "_buffers"):
                found += [None if tensor is None else self.tensor(tensor) for tensor in value.values()]
            elif name == "_modules":
                found += map(id, value.values())
            else:
                found.append(self.value(value))
            found.append(name)
        return tuple(found)

    def value(self, value: Any, depth: int = DEPTH) -> Hashable:
        kind = type(value)
        if kind in PLAIN:
            return value
        self.count += 1
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, nn.Module) or not depth or self.count > LIMIT:
            return kind, id(value)
        inner = partial(self.value, depth=depth - 1)
        if isinstance(value, (list, tuple)):
            return kind, *map(inner, value)
        if isinstance(value, dict):
            return kind, *((name if type(name) in PLAIN else id(name), inner(of)) for name, of in value.items())
        if isinstance(value, (set, frozenset)):
            return kind, frozenset(map(inner, value))
        if isinstance(value, FunctionType):
            cells = [inner(cell.cell_contents) if cell != CellType() else () for cell in value.__closure__ or ()]
            return id(value.__code__), *cells, inner(value.__defaults__), inner(value.__kwdefaults__)
        if isinstance(value, MethodType):
            return inner(value.__func__), inner(value.__self__)
        if isinstance(value, partial):
            return inner(value.func), inner(value.args), inner(value.keywords)
        if isinstance(value, type) or not hasattr(value, "__dict__"):
            scalar = getattr(value, "shape", None) == () and hasattr(value, "item")  # of numpy
            return kind, value.item() if scalar else id(value)
        return kind, id(value), inner(vars(value))

    def tensor(self, tensor: Tensor) -> Hashable:
        found = (id(tensor), tensor.requires_grad)
        if type(tensor) not in ORDINARY or tensor.layout is not torch.strided:
            return found
        # A replay reads the memory of its own device anew; what lies elsewhere was read by Python.
        elsewhere = version(tensor) if tensor.device != self.device else None
        return *found, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, elsewhere
