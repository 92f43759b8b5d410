"""`fastcure evaluate`: measure a network's accuracy, clean and under attack."""

from __future__ import annotations

from fastcure.cli._measurement import SUBJECT, flags_of, measure_with

HELP = "measure a network's accuracy, clean and under attack"
DESCRIPTION = f"Measure accuracy, clean and under attack, {SUBJECT}."
EPILOG = ""
SETTINGS = "fastcure.evaluation.settings:EvaluationSettings"

add_arguments = flags_of(SETTINGS)
run = measure_with(SETTINGS, "fastcure.evaluation.evaluate:evaluate", "tqdm")
