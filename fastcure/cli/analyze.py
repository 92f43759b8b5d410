"""`fastcure analyze`: measure the curvature of a network's loss in its input."""

from __future__ import annotations

from fastcure.cli._measurement import SUBJECT, flags_of, measure_with

HELP = "measure the curvature of a network's loss"
DESCRIPTION = f"Measure the curvature of the loss in its input, {SUBJECT}."
EPILOG = ""
SETTINGS = "fastcure.evaluation.settings:AnalysisSettings"

add_arguments = flags_of(SETTINGS)
run = measure_with(SETTINGS, "fastcure.evaluation.curvature:analyze", "tqdm")
