"""What the documents name is there."""

import re
from pathlib import Path

from robustness_summary import overview, summary
from robustness_table import Table

TESTS = Path(__file__).parents[1]
RESULTS = TESTS.parent / "benchmarks" / "results"
STUDY = TESTS.parent / "docs" / "study.md"
BEHAVIOUR = TESTS.parent / "docs" / "behaviour.md"


def test_the_table_of_the_study_is_that_of_its_rows() -> None:
    rows = Table(RESULTS / "robustness.csv").rows
    assert overview(rows) in STUDY.read_text()
    assert overview(rows) in summary(rows)


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)::(test_\w+)`", BEHAVIOUR.read_text()))
    assert len(named) > 80
    texts = {path.stem: path.read_text() for path in TESTS.rglob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in sorted(named) if f"def {test}(" not in texts.get(file, "")]
    assert not missing
