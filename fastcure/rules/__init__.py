"""Second-order rules by operator: what `fastcure.double_backward()` applies, one operator a file."""

from fastcure.rules.context import double_backward

__all__ = ["double_backward"]
