"""A model is changed by one thread at a time: passes of the penalty exchange its parameters, and set its flags.

Settings of the whole process are shared by the threads that work on other models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn

_owners: dict[nn.Module, int] = {}
"""The thread that changes a module now."""
_lock = threading.Lock()


@contextmanager
def one_thread(*roots: object, changes: Callable[[nn.Module], bool] = lambda _: True) -> Iterator[None]:
    """Keep other threads from the modules of `roots` within; what is not an `nn.Module` is passed over.

    Args:
        roots: the modules, with all their submodules.
        changes: tells whether a module is changed within; others may be used by several threads.

    Raises:
        RuntimeError: if another thread changes one of them now.
    """
    me = threading.get_ident()
    modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
    with _lock:
        for module in modules:
            if _owners.get(module, me) != me:
                raise RuntimeError(
                    f"another thread uses this model (its {type(module).__name__}) in fastcure now, which changes it "
                    "for the time of a pass: use it in one thread at a time, or give each thread a copy.deepcopy of it"
                )
        mine = [module for module in modules if module not in _owners and changes(module)]
        _owners.update(dict.fromkeys(mine, me))
    try:
        yield
    finally:
        with _lock:
            for module in mine:
                _owners.pop(module, None)  # a module may have two names


class Shared:
    """A context that changes a setting of the whole process: the first thread enters it, and the last one leaves it.

    Each restoring what it met, two threads that overlap would leave the setting changed for good.

    Args:
        make: makes the context.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make, self._users, self._stack = make, 0, ExitStack()

    def __enter__(self) -> None:
        with _lock:
            if not self._users:
                self._stack.enter_context(self._make())
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._users -= 1
            if not self._users:
                self._stack.close()
