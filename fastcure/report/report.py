"""The report of runs, or of any other network: measures, figures, tables and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from fastcure._environment import environment, pick_device
from fastcure._inference_mode import outside_inference_mode
from fastcure._writing import csv_bytes, json_bytes, json_text, write_whole
from fastcure.data import limited, sampled
from fastcure.evaluation.checklist import verdict
from fastcure.evaluation.network import load_images, load_network
from fastcure.objectives import OBJECTIVES
from fastcure.report import figures, measures
from fastcure.report.measures import Images, Row, Subject
from fastcure.report.page import Html, Section, figure, page, table
from fastcure.report.settings import ReportSettings, read_runs, short_names
from fastcure.training.objective import step_lengths
from fastcure.training.settings import Settings

PAPER = [
    ["paper, SVHN, ResNet-18: standard training", "96.3 %", "0.9 %"],
    ["paper, SVHN, ResNet-18: CURE", "91.1 %", "28.4 %"],
    ["paper, SVHN: adversarial training (Buckman et al.)", "93 %", "33 %"],
]
"""Clean, and under PGD(10) at eps = 12/255."""

TRACK = ("epoch", "frobenius", "along_z", "clean", "pgd")
"""Columns of a run's track."""

Files = dict[str, bytes]


@outside_inference_mode
def report(settings: ReportSettings, say: Callable[[str], object] = print) -> Path:
    """Measure networks, and write the page with its figures and tables.

    Nothing is written before all is measured, and nothing is left where the report cannot be written as a whole.

    Args:
        settings: of the report.
        say: takes each line for the user.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: if a run, the data or a network is not as it must be, or the folder
            cannot be written.
    """
    runs = read_runs(settings.runs)
    tracks = [_track(Path(run)) for run in settings.runs]
    where = pick_device(settings.device)
    whole = load_images(settings)
    data = limited(whole, settings.limit, settings.seed)
    images = Images((data.x_test.float() / 255).to(where), data.y_test.to(where))
    title, weights = _networks(settings, runs)
    before = next(iter(weights)) if settings.surrogate is not None else None
    subjects = [Subject(name, load_network(settings, data, path, where, say)) for name, path in weights.items()]
    say(f"{data.name}: {sampled(data, whole)}, {len(subjects)} networks, on {where}")

    files: Files = {}
    names = list(weights)[len(weights) - len(runs) :]
    evolution = [{"model": name, **row} for name, track in zip(names, tracks, strict=True) for row in track]
    h = settings.h or (_last_h(runs[0], images.x[0].numel()) if runs else 1.25)
    sections = _measure(subjects, before, images, settings, h, evolution, files)
    about = environment(where)
    configs = {"runs": dict(zip(names, map(asdict, runs), strict=True))} if runs else {}
    content = {"settings": asdict(settings), **configs, "environment": about}
    files["settings.json"] = json_bytes(content)
    sections.append(Section("Settings", f"<pre>{escape(json_text(content))}</pre>"))
    introduction = (
        f"{escape(str(settings.model))} on {escape(data.name)}, {sampled(data, whole)}; device "
        f"{escape(str(about['device']))}. Every table and figure has its numbers as CSV beside this page."
    )
    heading = f"{title[0].upper()}{title[1:]} on {data.name}" if runs else f"{title} on {data.name}"
    files["index.html"] = page(heading, introduction, sections).encode(errors="xmlcharrefreplace")
    _write(settings.folder, files)
    say(f"report in {settings.folder / 'index.html'}")
    return settings.folder / "index.html"


def _networks(settings: ReportSettings, runs: Sequence[Settings]) -> tuple[str, dict[str, str | None]]:
    """Return the title of the report, and the weights of each network by its name, those before fine-tuning first."""
    if not runs:
        name = str(settings.model)
        compared = {"surrogate": settings.surrogate} if settings.surrogate is not None else {}
        return name, {**compared, name: settings.checkpoint}
    objectives = {config.objective for config in runs}
    title = OBJECTIVES[runs[0].objective].title if len(objectives) == 1 else "fine-tuning"
    names = [f"after {title}"] if len(runs) == 1 else short_names(settings.runs)
    after = {name: str(Path(run) / "model.safetensors") for name, run in zip(names, settings.runs, strict=True)}
    return title, {f"before {title}": settings.surrogate, **after}


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
    before: str | None,
    images: Images,
    settings: ReportSettings,
    h: float,
    tracks: list[Row],
    files: Files,
) -> list[Section]:
    last, seed = max(settings.eps), settings.seed
    radii = sorted({0.0, *settings.eps, *(last * i / 8 for i in range(1, 11))})
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
    profiles = measures.profiles(subjects, images, h, _bar)
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

    surrogate = next((model for name, model in subjects if name == before), None)
    examined = [subject for subject in subjects if subject.name != before]
    checked = measures.checklists(examined, surrogate, images, last, seed, _bar)
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


def _last_h(config: Settings, values: int) -> float:
    """Return the L2 length of the finite step that fine-tuning ended with, on images of so many values."""
    return step_lengths(config, values).at(config.epochs)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bar(title: str, work: Iterable[Any]) -> Iterable[Any]:
    return tqdm(work, title, leave=False, dynamic_ncols=True, disable=None)
