"""The engine "auto": the fastest that takes every model at once. `fastcure.explain` names what would be faster."""

from __future__ import annotations

from fastcure.engines.eager import Eager


class Auto(Eager):
    """The eager engine."""
