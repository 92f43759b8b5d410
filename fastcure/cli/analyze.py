"""`fastcure analyze`: measure the curvature of a network's loss in its input."""

from __future__ import annotations

import argparse
from typing import Any

from fastcure._extras import need
from fastcure.cli._flags import add_flags

HELP = "measure the curvature of a network's loss"
DESCRIPTION = (
    "Measure the curvature of a network's loss in its input: of a finetune run, before and after (--run), or of any "
    "other network (--model, --checkpoint, --dataset)."
)
EPILOG = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    from fastcure.evaluation.settings import AnalysisSettings

    add_flags(parser, AnalysisSettings)


def run(arguments: dict[str, Any]) -> None:
    """Run the command."""
    need("tqdm", purpose="by analyze")
    from fastcure.evaluation.curvature import analyze
    from fastcure.evaluation.settings import make_analysis_settings

    analyze(make_analysis_settings(arguments))
