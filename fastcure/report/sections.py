"""The sections of the report: figures and tables, each with its own number of images and radius."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from typing import IO, Any

from fastcure._writing import csv_bytes
from fastcure.evaluation.checklist import Item, verdict
from fastcure.evaluation.interval import weaker_than_autoattack, with_interval
from fastcure.report import figures
from fastcure.report.measures import NORM_IMAGES, PROBES, PROFILE_IMAGES, Row
from fastcure.report.page import Html, Section, figure, table
from fastcure.training.track import PAPER_EPS

Files = dict[str, bytes]
Checked = list[tuple[str, list[Item]]]

TABLE_EPS = 12 / 255
"""Radius of the paper's table."""

PAPER = [
    ["paper, SVHN, ResNet-18: standard training", "96.3 %", "0.9 %"],
    ["paper, SVHN, ResNet-18: CURE", "91.1 %", "28.4 %"],
    ["paper, SVHN: adversarial training (Buckman et al.)", "93 %", "33 %"],
]
"""Clean, and under PGD(10) at eps = 12/255."""


def accuracy_section(accuracies: list[Row], eps: float, checked: Checked, files: Files) -> Section:
    """Table 1: clean accuracy, under PGD-10 at the run's radius and at the paper's, and under AutoAttack."""
    at = {(row["model"], row["eps"]): row for row in accuracies if row["norm"] == "linf"}
    evidence = {name: item.evidence for name, items in checked for item in items if "autoattack" in item.evidence}
    radii = {eps: f"PGD-10, eps {eps:.4g}", TABLE_EPS: "PGD-10, eps 12/255"}
    heads = ["network", "images", "clean", *radii.values()]
    heads += [f"AutoAttack, eps {eps:.4g}"] if evidence else []
    rows: list[list[Any]] = []
    for name in dict.fromkeys(row["model"] for row in accuracies):
        images = at[name, 0.0]["images"]
        cells = [with_interval(at[name, radius]["accuracy"], images) for radius in (0.0, *radii)]
        found = evidence.get(name)
        strong = f"{with_interval(found['autoattack'], found['images'])}, of {found['images']:,}" if found else "-"
        rows.append([name, f"{images:,}", *cells, *([strong] if evidence else [])])
    empty = ["-"] if evidence else []
    paper = [[name, "-", clean, *(["-"] if len(radii) > 1 else []), robust, *empty] for name, clean, robust in PAPER]
    files["table1.csv"] = csv_bytes([dict(zip(heads, row, strict=True)) for row in [*rows, *paper]])
    note = (
        '<p class="note">In brackets: 95 % intervals (Wilson), in percent. Rows in italics are the paper\'s own, for '
        "orientation.</p>"
    )
    warnings = [
        f'<p class="fail">{escape(name)}, eps {eps:.4g}: {escape(words)}.</p>'
        for name, found in evidence.items()
        if (words := weaker_than_autoattack("PGD-10", found["weaker_pgd"], found["autoattack"], found["images"]))
    ]
    body = table(heads, [*rows, *paper], paper=len(paper)) + note + "".join(warnings)
    return Section("Table 1: accuracy", body)


def curvature_section(profiles: list[Row], norms: list[Row], images: int, h: float, files: Files) -> Section:
    """Figure 1: the eigenvalues, and the norms of the Hessian."""
    files["norms.csv"] = csv_bytes(norms)
    of, count = min(PROFILE_IMAGES, images), min(NORM_IMAGES, images)
    caption = (
        f"Eigenvalues of the Hessian H of the loss in its input, in ascending order, averaged over {of} images: by a "
        f"finite step of L2 length {h:.3g}, and exact ones. Of a network with kinks, at most classes - 1 exact ones "
        "are not zero: the curvature that matters is in the kinks, which a finite step sees."
    )
    rows = [
        [row["model"], *(f"{row[key]:.3g} ± {row[f'{key}_standard_error']:.2g}" for key in ("frobenius", "along_z"))]
        for row in norms
    ]
    note = (
        f'<p class="note">Exact, means over {count} images ± their standard errors; the Frobenius norm by {PROBES} '
        "probes an image.</p>"
    )
    body = drawn(files, "figure1_profile", profiles, figures.draw_profiles, caption)
    return Section("Figure 1: curvature", body + table(["network", "||H||_F", "||H z||"], rows) + note)


def surface_section(planes: list[tuple[str, Any]], files: Files) -> Section:
    """Figure 2: the loss around one image."""
    files["figure2_surface.csv"] = csv_bytes(_surface_rows(planes))
    caption = (
        "Minus the loss around one image, the first that every network classifies rightly, on the plane of each "
        f"network's boundary normal and a random direction orthogonal to it, up to {float(planes[0][1].a.max()):.3g} "
        "in L2; one scale for all."
    )
    return Section("Figure 2: loss surfaces", _png(files, "figure2_surface", figures.draw_surfaces, planes, caption))


def evolution_section(tracks: list[Row], files: Files) -> Section:
    """Figure 3: the course of fine-tuning, if it was tracked."""
    if not tracks:
        missing = '<p class="note">Not tracked: <code>fastcure finetune --track</code> records it.</p>'
        return Section("Figure 3: evolution", missing)
    counts = sorted({int(float(row["images"])) for row in tracks})
    own = ", ".join(f"{eps:.4g}" for eps in sorted({float(row["eps"]) for row in tracks} - {PAPER_EPS}))
    radii = f"the run's eps {own}, and at the paper's, 8/255" if own else "eps 8/255, which is the paper's, too"
    caption = (
        f"Curvature and robustness on {' or '.join(map(str, counts))} images held out of training, epoch by epoch. "
        f"{tracks[0]['begins']}. H is the Hessian of the loss in the image, z the unit vector along the sign of its "
        f"gradient; both as means over the images. PGD-10 at {radii}."
    )
    return Section("Figure 3: evolution", drawn(files, "figure3_evolution", tracks, figures.draw_evolution, caption))


def radius_section(accuracies: list[Row], images: int, files: Files) -> Section:
    """Figure 4: accuracy against the radius, in each norm."""
    caption = (
        f"Accuracy under PGD-10 at each radius, on {images:,} images, and its 95 % interval (Wilson) as a band; the "
        "radius 0 is clean accuracy."
    )
    body = drawn(files, "figure4_accuracy", accuracies, figures.draw_accuracies, caption)
    of_l2 = [row for row in accuracies if row["norm"] == "l2"]
    if of_l2:
        heads = ["network", "images", *(f"PGD-10, L2 eps {eps:.4g}" for eps in dict.fromkeys(r["eps"] for r in of_l2))]
        rows = [
            [name, f"{images:,}", *(with_interval(r["accuracy"], images) for r in of_l2 if r["model"] == name)]
            for name in dict.fromkeys(row["model"] for row in of_l2)
        ]
        body += table(heads, rows)
    return Section("Figure 4: accuracy against eps", body)


def bounds_section(bounds: list[Row], files: Files) -> Section:
    """Theorem 1 beside what attacks find."""
    counts = {name: sum(row["model"] == name for row in bounds) for name in dict.fromkeys(r["model"] for r in bounds)}
    shown = ", ".join(f"{count} ({name})" for name, count in counts.items())
    caption = (
        f"L2 distance to the decision boundary that DeepFool and PGD-20 find, of images classified rightly: {shown}. "
        "Beside it, the bounds that gradient and curvature at the image give, if the margin between the two likeliest "
        "classes were quadratic. Where it is not, what is found lies outside of them. Of a network with kinks the "
        "margin's exact curvature is zero, and the bounds meet."
    )
    return Section("Theorem 1", drawn(files, "theorem1_bounds", bounds, figures.draw_bounds, caption))


def masking_section(checked: Checked, eps: float, images: int, files: Files) -> Section:
    """The gradient-masking checklists."""
    marks = {True: Html('<span class="pass">pass</span>'), False: Html('<span class="fail">FAIL</span>'), None: "skip"}
    body = ""
    for name, items in checked:
        head = f"{name}, {images:,} images, eps {eps:.4g}: {verdict(items).splitlines()[0]}"
        rows = [[marks[item.passed], item.name, item.words] for item in items]
        body += f"<p>{escape(head)}</p>" + table(["", "what holds of useful gradients", "evidence"], rows)
    rows_of_items = [
        {"model": name, "item": item.name, "passed": item.passed, "evidence": item.words}
        for name, items in checked
        for item in items
    ]
    if rows_of_items:
        files["checklist.csv"] = csv_bytes(rows_of_items)
    return Section("Gradient masking", body or "<p>Nothing to examine.</p>")


def drawn(files: Files, name: str, rows: list[Row], draw: Callable[[list[Row], IO[bytes]], None], caption: str) -> str:
    """Draw a figure of rows, which are kept as CSV, and return it with its caption."""
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
