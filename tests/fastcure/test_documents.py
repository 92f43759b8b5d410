"""What the documents name is there."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import document_blocks
import pytest
from robustness_summary import overview, summary
from robustness_table import Table

from fastcure.attacks import ATTACKS
from fastcure.data import ADDRESSES, DATASETS
from fastcure.engines import ENGINES
from fastcure.models import MODELS
from fastcure.models.loading import FORMS
from fastcure.objectives import OBJECTIVES
from fastcure.training.optimizer import OPTIMIZERS
from fastcure.training.presets import PRESETS

TESTS = Path(__file__).parents[1]
RESULTS = TESTS.parent / "benchmarks" / "results"
STUDY = TESTS.parent / "docs" / "study.md"
BEHAVIOUR = TESTS.parent / "docs" / "behaviour.md"
PAGES = [TESTS.parent / "README.md", *sorted((TESTS.parent / "docs").rglob("*.md"))]
LONGEST_README = 120
FRAMEWORKS = {"trainers": ("lightning", "accelerate", "transformers")}
"""What a page needs that the tests do not install: it runs where that is there."""
WITH_BLOCKS = [
    page
    for page in PAGES
    if document_blocks.blocks(page) and page.stem != "tutorial" and all(map(find_spec, FRAMEWORKS.get(page.stem, ())))
]
"""`make tutorial` runs the tutorial, which trains a network."""


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


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.stem not in {"several-gpus", *FRAMEWORKS}:
        document_blocks.run(page)
        return
    # Process groups and frameworks stay out of pytest's process.
    path = os.pathsep.join(part for part in sys.path if part)
    torchrun = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    environment = {**os.environ, "PYTHONPATH": path, **(torchrun if page.stem == "several-gpus" else {})}
    command = [sys.executable, str(Path(document_blocks.__file__)), str(page)]
    subprocess.run(command, check=True, env=environment, timeout=240)


def test_the_tutorial_is_the_page_of_its_notebook_which_was_executed() -> None:
    cells = json.loads((TESTS.parent / "docs" / "tutorial.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    page = TESTS.parent / "docs" / "tutorial.md"
    assert [text.strip() for _, text in document_blocks.blocks(page)] == ["".join(cell["source"]) for cell in code]
    lines = page.read_text().splitlines()
    printed = [line for output in outputs for line in "".join(output.get("text", "")).splitlines()]
    assert len(printed) > 10
    assert not [line for line in printed if f"    {line}" not in lines]


CHOICES: dict[tuple[str, str], set[str]] = {
    ("commands", "`--objective`"): {*OBJECTIVES},
    ("commands", "`--dataset`"): {*DATASETS, *ADDRESSES},
    ("commands", "`--model`"): {*MODELS, *FORMS},
    ("commands", "`--attacks`"): {*ATTACKS},
    ("commands", "preset"): {*PRESETS},
    ("recipes/own-loop", "`engine=`"): {f'"{name}"' for name in ENGINES},
}
"""Page and head of a table -> what its first column names."""


@pytest.mark.parametrize(("page", "head"), CHOICES)
def test_tables_name_every_choice(page: str, head: str) -> None:
    """An entry in a registry needs its row."""
    text = (TESTS.parent / "docs" / f"{page}.md").read_text()
    (found,) = re.findall(rf"^\| {head} \| .*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = (row.split("|")[1] for row in found.splitlines())
    assert {name for row in rows for name in re.findall("`([^`]+)`", row)} == CHOICES[page, head]


def test_every_optimizer_is_named() -> None:
    names = ", ".join(f"`{name}`" for name in OPTIMIZERS).replace("`", "`--optimizer ", 1)
    assert f"| {names} |" in (TESTS.parent / "docs" / "commands.md").read_text()


def test_the_readme_is_short() -> None:
    lines = (TESTS.parent / "README.md").read_text().splitlines()
    assert len(lines) <= LONGEST_README
    assert {"make demo", "make test"} <= set(lines)


def test_the_site_lists_every_page() -> None:
    listed = re.findall(r"([\w/-]+\.md)$", (TESTS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(TESTS.parent / "docs")) for page in PAGES[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        if anchor and not anchor.startswith("fastcure."):
            assert anchor in _anchors(target), link


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_every_pattern_of_the_mutation_tests_matches_a_file() -> None:
    root = TESTS.parent
    parts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["mutate"]
    patterns = [pattern for part in parts.values() for pattern in (*part["sources"], *part["tests"])]
    assert len(patterns) > 30
    assert not [pattern for pattern in patterns if not list(root.glob(pattern))]


def test_every_equivalent_mutation_is_of_code_that_is_there() -> None:
    root = TESTS.parent
    entries = tomllib.loads((root / "tests/mutation/equivalents.toml").read_text())["equivalent"]
    assert len(entries) > 20
    texts = {entry["file"]: " ".join((root / entry["file"]).read_text().split()) for entry in entries}
    changes = [(entry["file"], change.split(" -> ")[0]) for entry in entries for change in entry["changes"]]
    assert not [change for change in changes if " ".join(change[1].split()) not in texts[change[0]]]
