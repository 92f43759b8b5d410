"""The command line: `fastcure finetune`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

EPILOG = """
schedules: a number; 4x10,8x5,12x5 (10 epochs at 4, then 5 at 8, then 5 at 12); 0:4x30%%,4 (from 0 to 4 in the
first 30 %% of the epochs, then 4); 1e-3:1e-5 (from one to the other throughout)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if training failed, 2 for bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="fastcure", description="CURE: curvature regularisation for robust classifiers"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_finetune(commands)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("command")
    try:
        return _finetune(arguments)
    except FloatingPointError as error:
        return _fail(error, 1)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if "FASTCURE_DEBUG" in os.environ:
            raise
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("fastcure: interrupted", file=sys.stderr)
        return 130


def _fail(error: BaseException, status: int) -> int:
    print(f"fastcure: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _add_finetune(commands: Any) -> None:
    from dataclasses import fields

    from fastcure.training.settings import PRESETS, Settings

    parser = commands.add_parser(
        "finetune",
        help="train a network (or load one), fine-tune it with CURE, and measure its robustness",
        description="Train a network normally (or take --checkpoint), fine-tune it with CURE, and measure accuracy, "
        "clean and under PGD-10, before and after. Defaults: the preset's, then those shown.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    kinds: dict[str, Any] = {"eps": _radii}
    for field in fields(Settings):
        name, default, words = field.name, field.default, field.metadata["help"]
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=words)
            continue
        kind = kinds.get(name, int if isinstance(default, int) or name == "limit" else str)
        shown = ",".join(f"{v:.3g}" for v in default) if isinstance(default, tuple) else default
        if name == "preset":
            words += f" ({', '.join(PRESETS)})"
        if shown is not None:
            words += f" ({shown})"
        parser.add_argument(flag, type=kind, metavar=name.upper(), help=words.replace("%", "%%"))


def _radii(text: str) -> tuple[float, ...]:
    """Read `8/255,0.1`."""
    try:
        return tuple(float(Fraction(part)) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"radii such as 8/255,0.1, got {text!r}") from None


def _finetune(arguments: dict[str, Any]) -> int:
    from fastcure.training.finetune import finetune
    from fastcure.training.settings import make_settings

    finetune(make_settings(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
