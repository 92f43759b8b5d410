"""Results of benchmarks: a part of them, measured again, leaves the others."""

import csv
from pathlib import Path

import pytest
import record
import torch

CPU = torch.device("cpu")


def rows(model: str, *milliseconds: float) -> list[dict[str, object]]:
    return [{"model": model, "step": f"step {i}", "milliseconds": value} for i, value in enumerate(milliseconds)]


def read(path: Path) -> list[tuple[str, ...]]:
    with path.open(newline="") as file:
        return [(row["model"], row["step"], row["milliseconds"]) for row in csv.DictReader(file)]


def test_a_part_measured_again_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    record.write("step", [*rows("a", 1.0, 2.0), *rows("b", 3.0)], CPU, by="step")
    path = record.write("step", rows("a", 4.0), CPU, by="step")
    assert read(path) == [("b", "step 0", "3.0"), ("a", "step 0", "4.0")]
    record.write("step", rows("c", 5.0), CPU)
    assert read(path) == [("c", "step 0", "5.0")]


def test_rows_of_other_columns_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    (tmp_path / "step.csv").write_text("model,step\na,b\n")
    assert read(record.write("step", rows("c", 5.0), CPU, by="step")) == [("c", "step 0", "5.0")]
