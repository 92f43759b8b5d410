"""The report of one run or several: measures, figures, tables and the page."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastcure.checklist import verdict
from fastcure.data import load
from fastcure.models import build
from fastcure.placement import placed
from fastcure.report import figures, measures
from fastcure.report.measures import Images, Row, Subject
from fastcure.report.page import Html, Section, figure, page, table
from fastcure.training.finetune import environment, limited, pick_device
from fastcure.training.run_folder import RunFolder, load_weights
from fastcure.training.settings import step_lengths

PAPER = [
    ["paper, SVHN, ResNet-18: normal training", "96.3 %", "0.9 %"],
    ["paper, SVHN, ResNet-18: CURE", "91.1 %", "28.4 %"],
    ["paper, SVHN: adversarial training (Buckman et al.)", "93 %", "33 %"],
]
"""Clean, and under PGD(10) at eps = 12/255."""


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

    Args:
        runs: folders of `fastcure finetune`, of one dataset and network. The network before CURE is the first run's.
        out: folder of the report, new or empty; `report` inside the first run by default.
        data_dir: folder of the dataset's files, if they have moved.
        device: as in `fastcure finetune`.
        seed: of the attacks' starts, the probes and the random direction.
        limit: use the first so many test images.
        say: takes each line for the user.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError, OSError: before anything is written, if a run is not whole, or runs do not belong together.
    """
    folder = RunFolder(out or Path(runs[0]) / "report")
    configs = [_config(Path(run)) for run in runs]
    first = configs[0]
    for run, config in zip(runs, configs, strict=True):
        for key in ("dataset", "model"):
            if config[key] != first[key]:
                raise ValueError(f"runs must agree in {key}, got {first[key]} in {runs[0]} and {config[key]} in {run}")
    where = pick_device(device)
    data = limited(load(first["dataset"], data_dir or first["data_dir"]), limit)
    images = Images((data.x_test.float() / 255).to(where), data.y_test.to(where))

    def network(path: Path) -> torch.nn.Module:
        model = build(first["model"], data.classes, data.x_test.shape[1])
        load_weights(model, path)
        return placed(model, first["model"], data.x_test.shape[1:], where)

    names = ["after CURE"] if len(runs) == 1 else _short_names(runs)
    subjects = [Subject("before CURE", network(Path(runs[0]) / "original.safetensors"))]
    subjects += [Subject(n, network(Path(run) / "model.safetensors")) for n, run in zip(names, runs, strict=True)]
    say(f"{data.name}: {len(images.x):,} test images, {len(subjects)} networks, on {where}")

    sections = _measure(subjects, images, first, list(zip(names, runs, strict=True)), folder, seed)
    about = environment(where)
    settings = {"runs": dict(zip(names, configs, strict=True)), "seed": seed, "environment": about}
    folder.write_json("settings.json", settings)
    sections.append(Section("Settings", f"<pre>{escape(json.dumps(settings, indent=2))}</pre>"))
    introduction = (
        f"{escape(first['model'])} on {escape(data.name)}, {len(images.x):,} test images; device "
        f"{escape(str(about['device']))}. Every table and figure has its numbers as CSV beside this page."
    )
    folder.write("index.html", page(f"CURE on {data.name}", introduction, sections).encode())
    say(f"report in {folder.path / 'index.html'}")
    return folder.path / "index.html"


def _measure(
    subjects: list[Subject],
    images: Images,
    config: dict[str, Any],
    runs: list[tuple[str, str]],
    folder: RunFolder,
    seed: int,
) -> list[Section]:
    last = max(config["eps"])
    radii = sorted({0.0, *config["eps"], *(last * i / 8 for i in range(1, 11))})
    sections = []

    accuracies = measures.accuracies(subjects, images, radii, seed, _bar)
    folder.write_csv("figure4_accuracy.csv", accuracies)
    at = {(row["model"], row["eps"]): row["accuracy"] for row in accuracies}
    rows = [[name, _percent(at[name, 0.0]), _percent(at[name, last])] for name, _ in subjects]
    heads = ["network", "clean", f"PGD-10, eps {last:.4g}"]
    folder.write_csv("table1.csv", [dict(zip(heads, row, strict=True)) for row in [*rows, *PAPER]])
    note = '<p class="note">Rows in italics are the paper\'s own, at PGD(10) and eps 12/255, for orientation.</p>'
    sections.append(Section("Table 1: accuracy", table(heads, [*rows, *PAPER], paper=len(PAPER)) + note))

    norms = measures.norms(subjects, images, seed, _bar)
    folder.write_csv("norms.csv", norms)
    norm_rows = [
        [row["model"], *(f"{row[key]:.3g} ± {row[f'{key}_standard_error']:.2g}" for key in ("frobenius", "along_z"))]
        for row in norms
    ]
    profiles = measures.profiles(subjects, images, _last_h(config, images.x[0].numel()), _bar)
    sections.append(
        Section(
            "Figure 1: curvature",
            _drawn(folder, "figure1_profile", profiles, figures.draw_profiles, PROFILE_CAPTION)
            + table(["network", "||H||_F", "||H z||"], norm_rows),
        )
    )

    planes = measures.surfaces(subjects, images, seed)
    if planes:
        folder.write_csv("figure2_surface.csv", _surface_rows(planes))
        figures.draw_surfaces(planes, folder.path / "figure2_surface.png")
        sections.append(
            Section("Figure 2: loss surfaces", figure(folder.path / "figure2_surface.png", SURFACE_CAPTION))
        )

    tracks = [{"model": name, **row} for name, run in runs for row in _track(Path(run))]
    missing = '<p class="note">Not tracked: <code>fastcure finetune --track</code> records it.</p>'
    drawn = _drawn(folder, "figure3_evolution", tracks, figures.draw_evolution, TRACK_CAPTION) if tracks else missing
    sections.append(Section("Figure 3: evolution", drawn))

    sections.append(
        Section(
            "Figure 4: accuracy against eps",
            figure(_draw(folder, "figure4_accuracy", accuracies, figures.draw_accuracies), CURVE_CAPTION),
        )
    )

    bounds = measures.bounds(subjects, images, _bar)
    if bounds:
        sections.append(
            Section("Theorem 1", _drawn(folder, "theorem1_bounds", bounds, figures.draw_bounds, BOUND_CAPTION))
        )

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
        folder.write_csv("checklist.csv", items_rows)
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
TRACK_CAPTION = "Curvature and robustness on a fixed set of images, epoch by epoch."
CURVE_CAPTION = "Accuracy under PGD-10 at each radius; the radius 0 is clean accuracy."
BOUND_CAPTION = (
    "L2 distance to the decision boundary that DeepFool and PGD-20 find, beside the bounds that gradient and curvature "
    "at the image give, if the margin between the two likeliest classes were quadratic. Where it is not, what is found "
    "lies outside of them. Of a network with kinks the margin's exact curvature is zero, and the bounds meet."
)


def _drawn(folder: RunFolder, name: str, rows: list[Row], draw: Callable[[list[Row], Path], None], caption: str) -> str:
    folder.write_csv(f"{name}.csv", rows)
    return figure(_draw(folder, name, rows, draw), caption)


def _draw(folder: RunFolder, name: str, rows: list[Row], draw: Callable[[list[Row], Path], None]) -> Path:
    path = folder.path / f"{name}.png"
    draw(rows, path)
    return path


def _surface_rows(planes: list[tuple[str, Any]]) -> list[Row]:
    return [
        {"model": name, "normal": float(a), "random": float(b), "minus_loss": float(value)}
        for name, plane in planes
        for a, line in zip(plane.a, plane.values[0], strict=True)
        for b, value in zip(plane.b, line, strict=True)
    ]


def _track(run: Path) -> list[Row]:
    path = run / "track.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _config(run: Path) -> dict[str, Any]:
    for name in ("config.json", "metrics.json", "original.safetensors", "model.safetensors"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is not a finished run of fastcure finetune: {run / name} does not exist")
    try:
        config = json.loads((run / "config.json").read_text())
        {key: config[key] for key in ("dataset", "data_dir", "model", "eps", "h", "epochs")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'config.json'} cannot be read as the settings of a run: {error!r}") from error
    return dict(config)


def _last_h(config: dict[str, Any], values: int) -> float:
    """Return the L2 length of the finite step that fine-tuning ended with, on images of so many values."""
    unit, epochs = config.get("h_unit", "l2"), config["epochs"]
    return step_lengths(config["h"], unit, epochs, config["eps"], values).at(epochs)


def _short_names(runs: Sequence[str]) -> list[str]:
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bar(title: str, work: Iterable[Any]) -> Iterable[Any]:
    return tqdm(work, title, leave=False, dynamic_ncols=True, disable=None)
