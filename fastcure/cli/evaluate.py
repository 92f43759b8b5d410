"""`fastcure evaluate`: measure a network's accuracy, clean and under attack."""

from __future__ import annotations

import argparse

from fastcure.cli._flags import add_flags
from fastcure.cli._measurement import SUBJECT, imported, measure_with

HELP = "measure a network's accuracy, clean and under attack"
DESCRIPTION = f"Measure accuracy, clean and under attack, {SUBJECT}."
EPILOG = ""
SETTINGS = "fastcure.evaluation.settings:EvaluationSettings"

run = measure_with(SETTINGS, "fastcure.evaluation.evaluate:evaluate", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_flags(parser, imported(SETTINGS))
