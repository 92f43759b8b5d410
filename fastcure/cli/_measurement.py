"""The frame of the commands that measure networks: their flags are settings, and their work is a function of these."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastcure._extras import need
from fastcure.cli._flags import add_flags

SUBJECT = "of a finetune run (--run), or of any other network (--model, --checkpoint, --dataset)"


def flags_of(settings: str) -> Callable[[argparse.ArgumentParser], None]:
    """Return the `add_arguments` of a command: a flag for each of its settings, `package.module:class`."""
    return lambda parser: add_flags(parser, imported(settings))


def measure_with(settings: str, function: str, *packages: str) -> Callable[[dict[str, Any]], None]:
    """Return the `run` of a command: it makes settings of what the user set, and measures what they describe.

    Args:
        settings: `package.module:class` of the settings, whose `of` combines what the user set with what a run says.
        function: `package.module:function` that takes them.
        packages: of extras, without which the function's module cannot be imported.
    """

    def run(arguments: dict[str, Any]) -> None:
        need(*packages, purpose=f"by {function.rpartition(':')[2]}")
        made = imported(settings).of(arguments)
        imported(function)(made)

    return run


def imported(name: str) -> Any:
    """Return what `package.module:name` names; it is imported now."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
