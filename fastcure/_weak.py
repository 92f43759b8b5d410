"""Keys of caches that keep nothing alive: what a cache holds for a model must not lead back to it."""

from __future__ import annotations

from collections.abc import Hashable
from inspect import ismethod
from typing import Any
from weakref import WeakMethod, ref


def weakly(thing: Any) -> Hashable:
    """Return a key that equals that of the same living `thing`, and does not keep it alive where that can be had.

    A loss function may be a method of the model, and any module may refer to its root.
    """
    try:
        return WeakMethod(thing) if ismethod(thing) else ref(thing)
    except TypeError:
        return thing
