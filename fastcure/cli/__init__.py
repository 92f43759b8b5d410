"""The command line: `fastcure finetune | evaluate | analyze | report | env`, a file a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from fastcure import __version__
from fastcure.cli import analyze, env, evaluate, finetune, report
from fastcure.cli._process import CLOSED_PIPE, entry, fail

COMMANDS: dict[str, ModuleType] = {
    "finetune": finetune,
    "evaluate": evaluate,
    "analyze": analyze,
    "report": report,
    "env": env,
}
"""The file of each command: HELP, DESCRIPTION and EPILOG, `add_arguments(parser)` and `run(arguments)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    It is 0, 1 if it met a NaN, 2 for bad input, 130 or 143 when stopped, 141 when nobody reads its output.
    """
    parser = make_parser()
    try:
        arguments = vars(parser.parse_args(argv))
    except BrokenPipeError:  # of --help; newer versions of argparse pass over it
        return CLOSED_PIPE
    except OSError as error:
        return fail(error, 2)
    of_command: argparse.ArgumentParser = arguments.pop("parser")
    for name, value in arguments.items():
        if value == []:  # of Python 3.11 and `--name=--`
            of_command.error(f"argument --{name.replace('_', '-')}: expected one argument")
    try:
        COMMANDS[arguments.pop("command")].run(arguments)
        return 0
    except FloatingPointError as error:
        return fail(error, 1)
    except BrokenPipeError:
        return CLOSED_PIPE
    except SystemExit as stop:
        code = f"the code of --model called sys.exit({stop.code!r}), at import or when it was used: remove that call"
        return fail(ValueError(code), 2)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        if "FASTCURE_DEBUG" in os.environ:
            raise
        return fail(error, 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(MemoryError(f"{error}: lower --batch-size, or take a smaller --model"), 2)
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # one line, not one from each process of torchrun
            with suppress(OSError, ValueError):
                print(f"fastcure: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "status", 130)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; shtab makes the completion of a shell from it."""
    parser = argparse.ArgumentParser(
        prog="fastcure", description="CURE: curvature regularisation for robust classifiers"
    )
    parser.add_argument("--version", action="version", version=f"fastcure {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        options: dict[str, Any] = {"help": command.HELP, "description": command.DESCRIPTION, "epilog": command.EPILOG}
        added = commands.add_parser(name, argument_default=argparse.SUPPRESS, **options)
        added.set_defaults(parser=added)
        command.add_arguments(added)
    return parser


__all__ = ["COMMANDS", "entry", "main", "make_parser"]


if __name__ == "__main__":
    entry()
