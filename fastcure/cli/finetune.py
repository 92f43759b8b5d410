"""`fastcure finetune`: train a network, fine-tune it with an objective, and measure its robustness."""

from __future__ import annotations

import argparse
from typing import Any

from fastcure._extras import need
from fastcure.cli._flags import add_flags

HELP = "train a network (or load one), fine-tune it with CURE or another objective, and measure its robustness"
DESCRIPTION = (
    "Train a network by standard training (or take --checkpoint), fine-tune it with --objective, and measure accuracy, "
    "clean and under PGD-10, before and after. Defaults: the preset's, then those shown."
)
EPILOG = """
schedules: a number; 4x10,8x5,12x5 (10 epochs at 4, then 5 at 8, then 5 at 12); 0:4x30%,4 (from 0 to 4 in the
first 30 % of the epochs, then 4); 1e-3:1e-5 (from one to the other throughout); onecycle:1e-2 (up to 1e-2 in 30 % of
the epochs, then down to nearly 0, as torch's OneCycleLR)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: those of the settings, --resume and --config."""
    from fastcure.training.settings import Settings

    add_flags(parser, Settings)
    words = (
        "Go on with the run in --out, or begin it; other settings need not be given again, and must be the same. More "
        "--epochs prolong a finished run."
    )
    parser.add_argument("--resume", action="store_true", help=words)
    words = "JSON file of settings, such as the config.json of a run; flags override them."
    parser.add_argument("--config", metavar="FILE", help=words)


def run(arguments: dict[str, Any]) -> None:
    """Run the command."""
    need("matplotlib", "safetensors", "tqdm", purpose="by finetune")
    from fastcure.training.finetune import finetune
    from fastcure.training.settings import make_settings

    resume, config = arguments.pop("resume", False), arguments.pop("config", None)
    finetune(make_settings(arguments, resume=resume, config=config), resume=resume)
