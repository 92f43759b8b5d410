"""The report of runs, or of any other network: measures, figures, tables and the page."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastcure._environment import environment, pick_device
from fastcure._inference_mode import outside_inference_mode
from fastcure._writing import json_bytes, json_text, write_whole
from fastcure.data import limited, sampled
from fastcure.evaluation.network import load_images, load_network
from fastcure.objectives import OBJECTIVES
from fastcure.report import measures, sections
from fastcure.report.measures import Images, Row, Subject
from fastcure.report.page import Section, page
from fastcure.report.sections import Files
from fastcure.report.settings import ReportSettings, read_runs, short_names
from fastcure.training.objective import step_lengths
from fastcure.training.settings import Settings

TRACK = ("epoch", "images", "frobenius", "along_z", "clean", "eps", "pgd", "pgd_paper")
"""Columns of a run's track."""


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
    begins = _beginning(title, runs)
    evolution = [
        {"model": name, **row, "begins": begins} for name, track in zip(names, tracks, strict=True) for row in track
    ]
    h = settings.h or (_last_h(runs[0], images.x[0].numel()) if runs else 1.25)
    parts = _measure(subjects, before, images, settings, h, evolution, files)
    about = environment(where)
    configs = {"runs": dict(zip(names, map(asdict, runs), strict=True))} if runs else {}
    content = {"settings": asdict(settings), **configs, "environment": about}
    files["settings.json"] = json_bytes(content)
    parts.append(Section("Settings", f"<pre>{escape(json_text(content))}</pre>"))
    introduction = (
        f"{escape(str(settings.model))} on {escape(data.name)}, {sampled(data, whole)}; device "
        f"{escape(str(about['device']))}. Every table and figure has its numbers as CSV beside this page."
    )
    heading = f"{title[0].upper()}{title[1:]} on {data.name}" if runs else f"{title} on {data.name}"
    files["index.html"] = page(heading, introduction, parts).encode(errors="xmlcharrefreplace")
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
    known = OBJECTIVES.get(runs[0].objective) if len(objectives) == 1 else None  # it may be of the user's own
    title = known.title if known is not None else "fine-tuning"
    names = [f"after {title}"] if len(runs) == 1 else short_names(settings.runs)
    after = {name: str(Path(run) / "model.safetensors") for name, run in zip(names, settings.runs, strict=True)}
    return title, {f"before {title}": settings.surrogate, **after}


def _beginning(title: str, runs: Sequence[Settings]) -> str:
    """Say where fine-tuning begins in figure 3."""
    before = sorted({config.pretrain_epochs if config.checkpoint is None else 0 for config in runs})
    epochs = " or ".join(map(str, before))
    whence = f"after {epochs} epochs of standard training" if before != [0] else "from the checkpoint"
    return f"Epoch 0: {title} begins, {whence}"


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
    last, seed, count = max(settings.eps), settings.seed, len(images.x)
    radii = sorted({0.0, sections.TABLE_EPS, *settings.eps, *(last * i / 8 for i in range(1, 11))})
    accuracies = measures.accuracies(subjects, images, {"linf": radii, "l2": list(settings.eps_l2)}, seed, _bar)
    norms = measures.norms(subjects, images, seed, _bar)
    profiles = measures.profiles(subjects, images, h, _bar)
    planes = measures.surfaces(subjects, images, seed)
    bounds = measures.bounds(subjects, images, _bar)
    surrogate = next((model for name, model in subjects if name == before), None)
    examined = [subject for subject in subjects if subject.name != before]
    checked = measures.checklists(examined, surrogate, images, last, settings.autoattack_images, seed, _bar)
    return [
        sections.accuracy_section(accuracies, last, checked, files),
        sections.curvature_section(profiles, norms, count, h, files),
        *([sections.surface_section(planes, files)] if planes else []),
        sections.evolution_section(tracks, files),
        sections.radius_section(accuracies, count, files),
        *([sections.bounds_section(bounds, files)] if bounds else []),
        sections.masking_section(checked, last, min(measures.CHECKED_IMAGES, count), files),
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


def _bar(title: str, work: Iterable[Any]) -> Iterable[Any]:
    return tqdm(work, title, leave=False, dynamic_ncols=True, disable=None)
