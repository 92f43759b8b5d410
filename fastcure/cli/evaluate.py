"""`fastcure evaluate`: measure a network's accuracy, clean and under attack."""

from __future__ import annotations

import argparse
from typing import Any

from fastcure._extras import need
from fastcure.cli._flags import add_flags

HELP = "measure a network's accuracy, clean and under attack"
DESCRIPTION = (
    "Measure a network's accuracy, clean and under attack: one of a finetune run (--run), or any other (--model, "
    "--checkpoint, --dataset)."
)
EPILOG = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    from fastcure.evaluation.settings import EvaluationSettings

    add_flags(parser, EvaluationSettings)


def run(arguments: dict[str, Any]) -> None:
    """Run the command."""
    need("tqdm", purpose="by evaluate")
    from fastcure.evaluation.evaluate import evaluate
    from fastcure.evaluation.settings import make_evaluation_settings

    evaluate(make_evaluation_settings(arguments))
