"""The table of the robustness study: one row a run, in a CSV file that is replaced as a whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path

from robustness_recipe import Recipe, Setting

from fastcure._writing import csv_bytes, write_whole

Row = dict[str, str]

KEY = [*Recipe.__dataclass_fields__, *Setting.__dataclass_fields__, "seed"]
"""What determines a run."""

FOUND = [
    *("cost", "compute", "seconds", "milliseconds_an_image", "followed", "penalties", "val_clean", "val_pgd10"),
    *("clean", "pgd20x5", "pgd20x5_subset", "margin20x5_subset", "autoattack", "checklist"),
    *(f"{name}_{when}" for when in ("before", "after") for name in ("hz_exact", "hz", "frobenius")),
]
"""What came of it. cost: F a sample; compute: F in all; followed: PGD-10 on validation images after each epoch.
margin20x5_subset: PGD on the margin in place of cross-entropy, which AutoAttack's members attack as well."""

ABOUT = ["stage", "device", "threads", "torch", "python", "commit"]
COLUMNS = KEY + FOUND + ABOUT
MAY_DIFFER = {"seconds", "milliseconds_an_image", *ABOUT}
"""Columns in which the same run, done again, may differ."""


class Table:
    """Rows in the order in which they came.

    Args:
        path: of the file; it need not exist.

    Raises:
        ValueError: if the file has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = list(reader)
            if list(reader.fieldnames or []) != COLUMNS:
                raise ValueError(
                    f"{path} must have the columns {', '.join(COLUMNS)}: move it away, or give another --out"
                )

    def find(self, key: Row) -> Row | None:
        """Return the row of a run, if it is there."""
        return next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)

    def put(self, row: Row) -> Row:
        """Add a row, or what it has to the one of the same run."""
        old = self.find({name: row[name] for name in KEY})
        if old is None:
            old = dict.fromkeys(COLUMNS, "")
            self.rows.append(old)
        old.update(row)
        self._write()
        return old

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, csv_bytes(self.rows))
