"""The one private name of torch's that the kernels use."""

from __future__ import annotations

from typing import Any

import torch


def engine_will_execute(node: Any) -> bool:
    """Tell whether the backward that runs now goes through `node`; `needs_input_grad` knows the forward alone."""
    return torch._C._will_engine_execute_node(node)
