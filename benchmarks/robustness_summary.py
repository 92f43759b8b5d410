"""The tables of docs/study.md, from the rows of the study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from robustness_grid import MAIN
from robustness_recipe import Recipe
from robustness_table import Row

INTRODUCTION = """\
Written by `python benchmarks/robustness.py --plot` from the rows in `robustness.csv`; `docs/study.md` describes the
runs and discusses the results. Accuracies are in percent, on the first test images (their number is in the rows); of
several seeds the mean, with the worst and the best in brackets. One F is a forward pass of one image. Times are those
of a machine that did other work besides, and so are no benchmark."""

OVERVIEW = """\
The main methods, PGD-20 x 5 with the settings that validation images chose, means over seeds, by training compute; and
AutoAttack on the first images, seed 0, at the middle budget:"""

Setting = tuple[str, str, str]
BUDGETS = (17.0, 34.0, 85.0, 255.0, 510.0)
"""The presets', in F an image."""


def summary(rows: list[Row]) -> str:
    """Return all tables as Markdown."""
    parts = ["# Tables of the study", INTRODUCTION, OVERVIEW, overview(rows)]
    for setting in dict.fromkeys(setting_of(row) for row in rows):
        its = [row for row in rows if setting_of(row) == setting]
        parts += [f"## {title(setting)}", *tables(its)]
    return "\n\n".join(parts)


def overview(rows: list[Row]) -> str:
    """The main methods at a glance: a line a setting and budget, and one for AutoAttack."""
    lines = []
    for setting in dict.fromkeys(setting_of(row) for row in rows):
        its = [row for row in rows if setting_of(row) == setting]
        best = {label: row for label, row in chosen(its).items() if label in MAIN}
        if len(best) < len(MAIN) / 2:
            continue
        found = {label: robust_by_budget(its, row) for label, row in best.items()}
        name = f"{setting[0]}, {255 * float(setting[2]):.3g}/255"
        for budget in sorted({budget for accuracies in found.values() for budget in accuracies}):
            means = {label: sum(of[budget]) / len(of[budget]) for label, of in found.items() if budget in of}
            lines.append([f"{name}, {budget:.0f} F", *rounded(means)])
        attacked = {label: float(row["autoattack"]) for label, row in best.items() if row["autoattack"]}
        lines.append([f"{name}, AutoAttack", *rounded(attacked)])
    return table(("", *MAIN), lines)


def rounded(accuracies: Mapping[str, float]) -> list[str]:
    """The main methods' in whole percent."""
    return [f"{100 * accuracies[label]:.0f}" if label in accuracies else "" for label in MAIN]


def setting_of(row: Row) -> Setting:
    """What a panel of the picture shares."""
    return row["dataset"], row["model"], row["eps"]


def title(setting: Setting) -> str:
    """A setting in words."""
    dataset, model, eps = setting
    return f"{dataset}, {model}, eps {255 * float(eps):.3g}/255"


def tables(rows: list[Row]) -> Iterator[str]:
    """The tables of one setting; those that would be empty are left out."""
    best = chosen(rows)
    yield "At the middle budget, the settings that validation images chose:"
    yield table(
        (
            "method",
            "F a sample",
            "ms an image",
            "clean",
            "PGD-20 x 5",
            "AutoAttack (PGD-20 x 5 there; on the margin)",
            "checklist",
        ),
        ([label, *equal_compute(repeated(rows, row))] for label, row in best.items()),
    )
    budgets = {label: by_budget(rows, row) for label, row in best.items()}
    columns = sorted({budget for found in budgets.values() for budget in found})
    if len(columns) > 1:
        yield "PGD-20 x 5 and seconds of training by budget, in F an image, seed 0:"
        yield table(
            ("method", *(f"{budget:.0f} F" for budget in columns)),
            (
                [label, *(found.get(budget, "") for budget in columns)]
                for label, found in budgets.items()
                if len(found) > 1
            ),
        )
    search = [row for row in rows if row["stage"] == "search" and row["gamma"] != "0"]
    if search:
        yield "What gamma, learning rate and h do, seed 0:"
        yield table(
            ("method", "gamma", "learning rate", "h / step of eps", "clean", "PGD-20 x 5", "validation"),
            (
                [
                    r["label"],
                    last(r["gamma"]),
                    peak(r["lr"]),
                    last(r["h"]),
                    *percent(r, "clean", "pgd20x5", "val_pgd10"),
                ]
                for r in sorted(search, key=lambda r: r["label"])
            ),
        )
    others = [row for row in rows if row["stage"] in ("ablation", "scratch")]
    if others:
        yield "One thing changed, seed 0:"
        yield table(
            ("run", "F a sample", "epochs", "clean", "PGD-20 x 5"),
            ([r["label"], f"{float(r['cost']):.1f}", r["epochs"], *percent(r, "clean", "pgd20x5")] for r in others),
        )
    trained = [row for row in rows if row["objective"] != "standard"]
    if len(trained) > 2:
        yield correlation(trained)
    longest = [row for row in rows if row["stage"] == "budget" and int(row["epochs"]) > 6]
    if longest:
        yield "PGD-10 on 128 validation images after each epoch of the long runs:"
        yield table(("method", "by epoch"), ([r["label"], epochs(r)] for r in longest))


def chosen(rows: Iterable[Row]) -> dict[str, Row]:
    """Label -> the searched row that is best on validation images, the first of equals."""
    best: dict[str, Row] = {}
    for row in rows:
        old = best.get(row["label"])
        if row["stage"] == "search" and (old is None or float(row["val_pgd10"]) > float(old["val_pgd10"])):
            best[row["label"]] = row
    return best


def repeated(rows: Iterable[Row], best: Row) -> list[Row]:
    """The row, and those of the same settings from other seeds."""
    return [best, *(row for row in rows if row["stage"] == "seed" and alike(row, best))]


def alike(row: Row, best: Row) -> bool:
    """Whether two rows are of one recipe, seed and epochs apart."""
    return all(row[name] == best[name] for name in Recipe.__dataclass_fields__ if name != "epochs")


def equal_compute(rows: Sequence[Row]) -> list[str]:
    """The columns of the first table: of several seeds the mean, and in brackets the worst and the best."""
    first = rows[0]
    values = [f"{float(first['cost']):.1f}", f"{float(first['milliseconds_an_image']):.1f}"]
    for name in ("clean", "pgd20x5"):
        found = [100 * float(row[name]) for row in rows]
        mean = sum(found) / len(found)
        values.append(f"{mean:.1f} ({min(found):.1f}-{max(found):.1f})" if len(found) > 1 else f"{mean:.1f}")
    examined = first["autoattack"] != ""
    there = ("autoattack", "pgd20x5_subset", "margin20x5_subset")
    values.append("{} ({}; {})".format(*percent(first, *there)) if examined else "")
    return [*values, first["checklist"]]


def by_budget(rows: Iterable[Row], best: Row) -> dict[float, str]:
    """F an image, rounded to the preset's budgets -> PGD-20 x 5 and seconds."""
    its = [row for row in rows if row["stage"] == "budget" and row["seed"] == best["seed"] and alike(row, best)]
    return {budget_of(row): f"{percent(row, 'pgd20x5')[0]} ({float(row['seconds']):.0f} s)" for row in (best, *its)}


def robust_by_budget(rows: Iterable[Row], best: Row) -> dict[float, list[float]]:
    """F an image, rounded likewise -> PGD-20 x 5 of each seed."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row is best or (row["stage"] in ("seed", "budget") and alike(row, best)):
            found.setdefault(budget_of(row), []).append(float(row["pgd20x5"]))
    return found


def budget_of(row: Row) -> float:
    """The budget that a run's whole epochs come nearest to."""
    return min(BUDGETS, key=lambda budget: abs(budget - float(row["compute"]) / float(row["train"])))


def correlation(rows: Sequence[Row]) -> str:
    """How curvature along the gradient goes with robust accuracy."""
    curvature, robust = ([float(row[name]) for row in rows] for name in ("hz_after", "pgd20x5"))
    ranks = [ranked(values) for values in (curvature, robust)]
    middle = (len(rows) - 1) / 2
    above = sum((a - middle) * (b - middle) for a, b in zip(*ranks, strict=True))
    sizes = [sum((r - middle) ** 2 for r in rank) for rank in ranks]
    rho = above / (sizes[0] * sizes[1]) ** 0.5
    before, low, high = float(rows[0]["hz_before"]), min(curvature), max(curvature)
    return (
        f"Curvature along the gradient at the step of eps: {before:.2g} before, {low:.2g} to {high:.2g} after, in "
        f"{len(rows)} runs; its rank correlation with PGD-20 x 5 accuracy is {rho:.2f}."
    )


def ranked(values: Sequence[float]) -> list[float]:
    """Ranks from 0, equal values sharing theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, position = [0.0] * len(values), 0
    for _, group in groupby(order, key=values.__getitem__):
        members = list(group)
        for index in members:
            ranks[index] = position + (len(members) - 1) / 2
        position += len(members)
    return ranks


def epochs(row: Row) -> str:
    """Accuracies after each epoch, rounded to percent."""
    return " ".join(f"{100 * float(value):.0f}" for value in row["followed"].split())


def percent(row: Row, *names: str) -> list[str]:
    """Columns in percent."""
    return [f"{100 * float(row[name]):.1f}" for name in names]


def last(schedule: str) -> str:
    """The value at which a schedule ends."""
    return schedule.split(",")[-1].split(":")[-1]


def peak(schedule: str) -> str:
    """The value to which a learning rate climbs."""
    return schedule.split(",")[-1].split(":")[0]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
