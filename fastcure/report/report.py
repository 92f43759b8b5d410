"""The report of one run or several: measures, figures, tables and the page."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from tqdm import tqdm

from fastcure._environment import environment, pick_device
from fastcure._fields import check_whole_numbers
from fastcure._writing import csv_bytes, json_bytes, json_text, write_whole
from fastcure.data import limited, load, sampled
from fastcure.evaluation.checklist import verdict
from fastcure.models import build
from fastcure.models.placement import placed
from fastcure.models.weights import load_weights
from fastcure.objectives import OBJECTIVES
from fastcure.report import figures, measures
from fastcure.report.measures import Images, Row, Subject
from fastcure.report.page import Html, Section, figure, page, table
from fastcure.training.objective import step_lengths
from fastcure.training.settings import Settings, read_settings, refuse_code

PAPER = [
    ["paper, SVHN, ResNet-18: standard training", "96.3 %", "0.9 %"],
    ["paper, SVHN, ResNet-18: CURE", "91.1 %", "28.4 %"],
    ["paper, SVHN: adversarial training (Buckman et al.)", "93 %", "33 %"],
]
"""Clean, and under PGD(10) at eps = 12/255."""

FIGURES = ("figure1_profile", "figure2_surface", "figure3_evolution", "figure4_accuracy", "theorem1_bounds")
NAMES = {
    *(f"{name}.{kind}" for name in FIGURES for kind in ("csv", "png")),
    *("table1.csv", "norms.csv", "checklist.csv", "settings.json", "index.html"),
}
"""Files of a report."""

TRACK = ("epoch", "frobenius", "along_z", "clean", "pgd")
"""Columns of a run's track."""

Files = dict[str, bytes]


def report(
    runs: Sequence[str],
    out: str | None = None,
    *,
    data_dir: str | None = None,
    device: str = "auto",
    seed: int = 0,
    limit: int | None = 2000,
    say: Callable[[str], object] = print,
) -> Path:
    """Measure the networks of finished runs, and write the page with its figures and tables.

    Nothing is written before all is measured, and nothing is left where the report cannot be written as a whole.

    Args:
        runs: folders of `fastcure finetune`, of one dataset and network. That before fine-tuning is the first run's.
        out: folder of the report, new or empty; `report` inside the first run by default.
        data_dir: folder of the dataset's files, if they have moved.
        device: as in `fastcure finetune`.
        seed: of the attacks' starts, the probes and the random direction.
        limit: use so many test images, stratified by class.
        say: takes each line for the user.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError, OSError: if a setting is out of range, a run is not whole, runs do not belong together, or the
            folder cannot be written.
    """
    if not runs:
        raise ValueError("runs must be one folder of a finished run at least, got none")
    check_whole_numbers(SimpleNamespace(seed=seed, limit=limit), {"seed": 0, "limit": 1})
    folder = Path(out or Path(runs[0]) / "report")
    _check_free(folder)
    configs = [_config(Path(run)) for run in runs]
    first = configs[0]
    for run, config in zip(runs, configs, strict=True):
        for key in ("dataset", "model"):
            ours, theirs = getattr(first, key), getattr(config, key)
            if ours != theirs:
                raise ValueError(f"runs must agree in {key}, got {ours} in {runs[0]} and {theirs} in {run}")
    tracks = [_track(Path(run)) for run in runs]
    where = pick_device(device)
    whole = load(first.dataset, data_dir or first.data_dir)
    data = limited(whole, limit, seed)
    images = Images((data.x_test.float() / 255).to(where), data.y_test.to(where))

    def network(path: Path) -> torch.nn.Module:
        model = build(first.model, data.num_classes, data.x_test.shape[1])
        load_weights(model, path)
        return placed(model, first.model, data.x_test.shape[1:], where)

    title = OBJECTIVES[first.objective].title if len({config.objective for config in configs}) == 1 else "fine-tuning"
    names = [f"after {title}"] if len(runs) == 1 else _short_names(runs)
    subjects = [Subject(f"before {title}", network(Path(runs[0]) / "original.safetensors"))]
    subjects += [Subject(n, network(Path(run) / "model.safetensors")) for n, run in zip(names, runs, strict=True)]
    say(f"{data.name}: {sampled(data, whole)}, {len(subjects)} networks, on {where}")

    files: Files = {}
    evolution = [{"model": name, **row} for name, track in zip(names, tracks, strict=True) for row in track]
    sections = _measure(subjects, images, first, evolution, files, seed)
    about = environment(where)
    settings = {"runs": dict(zip(names, map(asdict, configs), strict=True)), "seed": seed, "environment": about}
    files["settings.json"] = json_bytes(settings)
    sections.append(Section("Settings", f"<pre>{escape(json_text(settings))}</pre>"))
    introduction = (
        f"{escape(first.model)} on {escape(data.name)}, {sampled(data, whole)}; device "
        f"{escape(str(about['device']))}. Every table and figure has its numbers as CSV beside this page."
    )
    files["index.html"] = page(f"{title[0].upper()}{title[1:]} on {data.name}", introduction, sections).encode(
        errors="xmlcharrefreplace"
    )
    _write(folder, files)
    say(f"report in {folder / 'index.html'}")
    return folder / "index.html"


def _check_free(folder: Path) -> None:
    """Check that a report can be written to `folder`: what a killed one has left there is no hindrance.

    Raises:
        ValueError: if the folder holds something else, or a whole report.
        OSError: if nothing can be written there.
    """
    held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    left = NAMES | {f".{name}.partial" for name in NAMES}
    if (os.path.lexists(folder) and not folder.is_dir()) or held - left or "index.html" in held:
        raise ValueError(f"out must be a new or an empty folder, got {folder}, which holds something: choose another")
    with tempfile.TemporaryFile(dir=next(place for place in (folder, *folder.absolute().parents) if place.is_dir())):
        pass


def _write(folder: Path, files: Files) -> None:
    """Write the files of a report, the page last, or none of them."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    except (Exception, KeyboardInterrupt):
        for name in files:
            with suppress(OSError):
                (folder / name).unlink()
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _measure(
    subjects: list[Subject],
    images: Images,
    config: Settings,
    tracks: list[Row],
    files: Files,
    seed: int,
) -> list[Section]:
    last = max(config.eps)
    radii = sorted({0.0, *config.eps, *(last * i / 8 for i in range(1, 11))})
    sections = []

    accuracies = measures.accuracies(subjects, images, radii, seed, _bar)
    at = {(row["model"], row["eps"]): row["accuracy"] for row in accuracies}
    rows = [[name, _percent(at[name, 0.0]), _percent(at[name, last])] for name, _ in subjects]
    heads = ["network", "clean", f"PGD-10, eps {last:.4g}"]
    files["table1.csv"] = csv_bytes([dict(zip(heads, row, strict=True)) for row in [*rows, *PAPER]])
    note = '<p class="note">Rows in italics are the paper\'s own, at PGD(10) and eps 12/255, for orientation.</p>'
    sections.append(Section("Table 1: accuracy", table(heads, [*rows, *PAPER], paper=len(PAPER)) + note))

    norms = measures.norms(subjects, images, seed, _bar)
    files["norms.csv"] = csv_bytes(norms)
    norm_rows = [
        [row["model"], *(f"{row[key]:.3g} ± {row[f'{key}_standard_error']:.2g}" for key in ("frobenius", "along_z"))]
        for row in norms
    ]
    profiles = measures.profiles(subjects, images, _last_h(config, images.x[0].numel()), _bar)
    sections.append(
        Section(
            "Figure 1: curvature",
            _drawn(files, "figure1_profile", profiles, figures.draw_profiles, PROFILE_CAPTION)
            + table(["network", "||H||_F", "||H z||"], norm_rows),
        )
    )

    planes = measures.surfaces(subjects, images, seed)
    if planes:
        files["figure2_surface.csv"] = csv_bytes(_surface_rows(planes))
        drawn = _png(files, "figure2_surface", figures.draw_surfaces, planes, SURFACE_CAPTION)
        sections.append(Section("Figure 2: loss surfaces", drawn))

    missing = '<p class="note">Not tracked: <code>fastcure finetune --track</code> records it.</p>'
    drawn = _drawn(files, "figure3_evolution", tracks, figures.draw_evolution, TRACK_CAPTION) if tracks else missing
    sections.append(Section("Figure 3: evolution", drawn))

    drawn = _drawn(files, "figure4_accuracy", accuracies, figures.draw_accuracies, CURVE_CAPTION)
    sections.append(Section("Figure 4: accuracy against eps", drawn))

    bounds = measures.bounds(subjects, images, _bar)
    if bounds:
        drawn = _drawn(files, "theorem1_bounds", bounds, figures.draw_bounds, BOUND_CAPTION)
        sections.append(Section("Theorem 1", drawn))

    checked = measures.checklists(subjects[1:], subjects[0].model, images, last, seed, _bar)
    marks = {True: Html('<span class="pass">pass</span>'), False: Html('<span class="fail">FAIL</span>'), None: "skip"}
    body = ""
    for name, items in checked:
        head = verdict(items).splitlines()[0]
        rows = [[marks[item.passed], item.name, item.words] for item in items]
        body += f"<p>{escape(name)}: {escape(head)}</p>" + table(
            ["", "what holds of useful gradients", "evidence"], rows
        )
    items_rows = [
        {"model": name, "item": item.name, "passed": item.passed, "evidence": item.words}
        for name, items in checked
        for item in items
    ]
    if items_rows:
        files["checklist.csv"] = csv_bytes(items_rows)
    sections.append(Section("Gradient masking", body or "<p>Nothing to examine.</p>"))
    return sections


PROFILE_CAPTION = (
    "Eigenvalues of the Hessian of the loss in its input, in ascending order, averaged over images. Of a network with "
    "kinks, at most classes - 1 exact ones are not zero: the curvature that matters is in the kinks, which a finite "
    "step sees."
)
SURFACE_CAPTION = (
    "Minus the loss on the plane of the decision boundary's normal and a random direction orthogonal to it, around one "
    "image; one scale for all."
)
TRACK_CAPTION = "Curvature and robustness on images held out of training, epoch by epoch."
CURVE_CAPTION = "Accuracy under PGD-10 at each radius; the radius 0 is clean accuracy."
BOUND_CAPTION = (
    "L2 distance to the decision boundary that DeepFool and PGD-20 find, beside the bounds that gradient and curvature "
    "at the image give, if the margin between the two likeliest classes were quadratic. Where it is not, what is found "
    "lies outside of them. Of a network with kinks the margin's exact curvature is zero, and the bounds meet."
)


def _drawn(files: Files, name: str, rows: list[Row], draw: Callable[[list[Row], IO[bytes]], None], caption: str) -> str:
    files[f"{name}.csv"] = csv_bytes(rows)
    return _png(files, name, draw, rows, caption)


def _png(files: Files, name: str, draw: Callable[[Any, IO[bytes]], None], subject: Any, caption: str) -> str:
    """Draw a figure; one that cannot be drawn is a note in the page, and its numbers are there all the same."""
    file = io.BytesIO()
    try:
        draw(subject, file)
    except Exception as error:
        reason = escape(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return f'<p class="note">{name}.png could not be drawn ({reason}); its numbers are in {name}.csv.</p>'
    files[f"{name}.png"] = file.getvalue()
    return figure(files[f"{name}.png"], caption)


def _surface_rows(planes: list[tuple[str, Any]]) -> list[Row]:
    return [
        {"model": name, "normal": float(a), "random": float(b), "minus_loss": float(value)}
        for name, plane in planes
        for a, line in zip(plane.a, plane.values[0], strict=True)
        for b, value in zip(plane.b, line, strict=True)
    ]


def _track(run: Path) -> list[Row]:
    """Read the track of a run, if it has one.

    Raises:
        ValueError: if a row does not have a number in each of its columns.
    """
    path = run / "track.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            rows = [{name: row[name] for name in TRACK} for row in csv.DictReader(file)]
        [float(value) for row in rows for value in row.values()]
        return rows
    except (ValueError, KeyError, TypeError, csv.Error) as error:  # of a short row, the last columns are None
        raise ValueError(f"{path} must have a number in each of {', '.join(TRACK)}, in each row: {error}") from error


def _config(run: Path) -> Settings:
    for name in ("config.json", "metrics.json", "original.safetensors", "model.safetensors"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is not a finished run of fastcure finetune: {run / name} does not exist")
    config = read_settings(run / "config.json", resume=False)
    refuse_code(config.model, run / "config.json")
    return config


def _last_h(config: Settings, values: int) -> float:
    """Return the L2 length of the finite step that fine-tuning ended with, on images of so many values."""
    return step_lengths(config, values).at(config.epochs)


def _short_names(runs: Sequence[str]) -> list[str]:
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bar(title: str, work: Iterable[Any]) -> Iterable[Any]:
    return tqdm(work, title, leave=False, dynamic_ncols=True, disable=None)
