"""`fastcure analyze`: measure the curvature of a network's loss in its input."""

from __future__ import annotations

import argparse

from fastcure.cli._flags import add_flags
from fastcure.cli._measurement import SUBJECT, imported, measure_with

HELP = "measure the curvature of a network's loss"
DESCRIPTION = f"Measure the curvature of the loss in its input, {SUBJECT}."
EPILOG = ""
SETTINGS = "fastcure.evaluation.settings:AnalysisSettings"

run = measure_with(SETTINGS, "fastcure.evaluation.curvature:analyze", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_flags(parser, imported(SETTINGS))
