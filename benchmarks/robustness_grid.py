"""The grids of the robustness study: which runs, in which order, and how a method's settings are chosen.

Every method has the same arithmetic to spend. At the middle budget its settings are searched one after the other, its
learning rate among them, each from seed 0 and by PGD-10 accuracy on validation images; then they stay, for other
seeds and budgets. Test images decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from robustness_recipe import Recipe, Setting
from torch import nn

KIND: dict[str, dict[str, Any]] = {
    "standard": {"objective": "standard"},
    "FGSM": {"objective": "fgsm"},
    "FGSM-RS": {"objective": "fgsm-rs"},
    **{f"PGD-{n}": {"objective": "pgd", "steps": n} for n in (2, 7, 10)},
    "input gradient": {"objective": "input-gradient"},
    "TRADES-2": {"objective": "trades", "steps": 2},
    **{f"CURE {mode}": {"objective": "cure", "batch_stats": mode} for mode in ("frozen", "split", "train")},
    "CURE at FGSM": {"objective": "cure", "batch_stats": "frozen", "loss_at": "step"},
    "CURE at FGSM, train": {"objective": "cure", "loss_at": "step"},
    "CURE first order": {"objective": "cure", "batch_stats": "frozen", "engine": "first_order"},
    "CURE/4 train": {"objective": "cure", "fraction": 0.25},
    "CURE/4 at FGSM, train": {"objective": "cure", "fraction": 0.25, "loss_at": "step"},
}
FIRST_ORDER = 16.0
"""F a sample of the first-order engine; of exact ones the objective knows."""


@dataclass(frozen=True)
class Sizes:
    """A preset: the setting, and how much of everything."""

    setting: Setting
    budgets: tuple[float, float, float]
    """F an image for all epochs together: a low one, the one of the search, a high one."""
    standard_epochs: int
    rates: tuple[float, ...]
    """Peak learning rates to choose from, the likeliest first."""
    gammas: dict[str, tuple[float, ...]]
    """Weights to choose from, the likeliest first, by label."""
    steps: tuple[float, ...]
    """Finite steps to choose from besides that of eps."""
    seeds: tuple[int, ...]
    """Besides 0."""


class Study(Protocol):
    """What a grid asks for."""

    def run(self, recipe: Recipe, seed: int, stage: str) -> None:
        """Do a run, unless its row is there."""

    def best(self, label: str) -> Recipe:
        """Return the searched recipe of a label that is best on validation images."""

    def best_of(self, recipes: Sequence[Recipe]) -> Recipe:
        """Return the recipe that is best on validation images, the first of equals; each has been run from seed 0."""

    def examine(self, recipe: Recipe, seed: int) -> None:
        """Put a run under AutoAttack and the checklist, unless that is done."""


MAIN = (
    *("standard", "CURE frozen", "CURE train", "CURE at FGSM, train", "CURE/4 at FGSM, train", "FGSM", "FGSM-RS"),
    *("PGD-2", "PGD-7"),
)
OTHERS = ("CURE/4 train", "TRADES-2", "CURE split", "CURE at FGSM", "input gradient")
CURVES = tuple(label for label in MAIN if label != "standard")
SCRATCH = (*MAIN, "CURE split", "input gradient", "PGD-10")


def full(study: Study, sizes: Sizes) -> None:
    """Everything, the most telling first."""
    low, _, high = sizes.budgets
    searched(study, MAIN, sizes)
    for budget in (high, low):
        for label in CURVES:
            study.run(at(study.best(label), budget), 0, "budget")
    repeated(study, MAIN, sizes)
    for label in CURVES:
        study.examine(study.best(label), 0)
    for recipe in (*ablations(study.best("CURE frozen"), sizes), *shares(study.best("CURE/4 at FGSM, train"), sizes)):
        study.run(recipe, 0, "ablation")
    for label in ("PGD-7", "FGSM-RS"):
        study.run(replace(study.best(label), label=f"{label}, frozen", batch_stats="frozen"), 0, "ablation")
    searched(study, OTHERS, sizes)
    study.run(at(replace(study.best("PGD-7"), label="PGD-10", steps=10), sizes.budgets[1]), 0, "search")
    for label in SCRATCH:
        study.run(from_scratch(study.best(label), sizes), 0, "scratch")
    for label in (*MAIN, *OTHERS, "PGD-10"):
        study.examine(study.best(label), 0)


def long(study: Study, sizes: Sizes) -> None:
    """The main methods, and the high budget, at which one-step training may overfit."""
    searched(study, MAIN, sizes)
    for seed in (0, *sizes.seeds):
        for label in CURVES:
            study.run(at(study.best(label), sizes.budgets[2]), seed, "budget")
    repeated(study, MAIN, sizes)
    for label in CURVES:
        study.examine(study.best(label), 0)


def smooth(study: Study, sizes: Sizes) -> None:
    """The exact gradient against finite differences of parameter gradients, on a network without kinks."""
    labels = ("CURE frozen", "CURE first order")
    searched(study, labels, sizes)
    repeated(study, labels, sizes)


def few(study: Study, sizes: Sizes) -> None:
    """The main methods at one budget."""
    searched(study, MAIN, sizes)
    for label in CURVES:
        study.examine(study.best(label), 0)
    repeated(study, MAIN, sizes)


def searched(study: Study, labels: Sequence[str], sizes: Sizes) -> None:
    """The likeliest settings of all, then the others."""
    for label in labels:
        study.run(first(label, sizes), 0, "search")
    for label in labels:
        search(study, label, sizes)


def repeated(study: Study, labels: Sequence[str], sizes: Sizes) -> None:
    """The best settings from other seeds."""
    for seed in sizes.seeds:
        for label in labels:
            study.run(study.best(label), seed, "seed")


def standard(sizes: Sizes) -> Recipe:
    """Standard training, from whose network the others start."""
    return Recipe("start", "standard", sizes.standard_epochs, rate(sizes.rates[0]), start="scratch")


def first(label: str, sizes: Sizes) -> Recipe:
    """The likeliest settings of a method at the middle budget."""
    gammas = sizes.gammas.get(label)
    gamma = ramp(gammas[0]) if gammas else "0"
    return at(Recipe(label, epochs=1, lr=rate(sizes.rates[0]), gamma=gamma, **KIND[label]), sizes.budgets[1])


def search(study: Study, label: str, sizes: Sizes) -> None:
    """Choose gamma, then the learning rate, then h, each for the best of those before it."""
    seen = [first(label, sizes)]
    study.run(seen[0], 0, "search")

    def choose(name: str, values: Sequence[str]) -> None:
        best = study.best_of(seen)
        for value in values:
            seen.append(replace(best, **{name: value}))
            study.run(seen[-1], 0, "search")

    choose("gamma", [ramp(gamma) for gamma in sizes.gammas.get(label, ())[1:]])
    choose("lr", [rate(top) for top in sizes.rates[1:]])
    if label == "CURE frozen":
        choose("h", [f"{h:g}" for h in sizes.steps])


def ablations(best: Recipe, sizes: Sizes) -> list[Recipe]:
    """The best CURE with one thing changed."""
    gamma, h = peak(best.gamma), float(best.h)
    changes: dict[str, dict[str, Any]] = {
        "constant gamma": {"gamma": f"{gamma:g}"},
        "gamma in three steps": {"gamma": f"{gamma / 3:g}x50%,{2 * gamma / 3:g}x25%,{gamma:g}"},
        "h ramped": {"h": f"{h / 10:g}:{h:g}x50%,{h:g}"},
        **{f"power 1, gamma x {f:g}": {"power": 1, "gamma": ramp(f * gamma)} for f in (1.0, 0.3)},
        "fraction 1/4": {"fraction": 0.25},
        "first order": {"engine": "first_order"},
    }
    return [at(replace(best, label=f"CURE: {name}", **change), sizes.budgets[1]) for name, change in changes.items()]


def shares(best: Recipe, sizes: Sizes) -> list[Recipe]:
    """The penalty on other shares of each batch than a quarter, with the loss at the FGSM point."""
    return [at(replace(best, label=f"CURE/{n} at FGSM, train", fraction=1 / n), sizes.budgets[1]) for n in (8, 2)]


def from_scratch(best: Recipe, sizes: Sizes) -> Recipe:
    """The same from initial weights, at the high budget; the finite step grows with the penalty."""
    h = f"0.1:{best.h}x50%,{best.h}" if "CURE" in best.label else best.h
    return replace(at(best, sizes.budgets[2]), label=f"{best.label}, from scratch", start="scratch", h=h)


def at(recipe: Recipe, budget: float) -> Recipe:
    """Give a recipe the epochs that a budget pays for."""
    return replace(recipe, epochs=max(1, round(budget / cost(recipe))))


def cost(recipe: Recipe) -> float:
    """F a sample, by which a budget is turned into epochs; a row has the counted one."""
    return FIRST_ORDER if recipe.engine == "first_order" else recipe.make(nn.Identity()).cost


def rate(top: float) -> str:
    """The schedule of the learning rate: up in a tenth of the run, then down to a hundredth."""
    return f"0:{top:g}x10%,{top:g}:{top / 100:g}"


def ramp(gamma: float) -> str:
    """The schedule of gamma: up in the first half of the run."""
    return f"0:{gamma:g}x50%,{gamma:g}"


def peak(schedule: str) -> float:
    """The last value of a schedule."""
    return float(schedule.split(",")[-1].split(":")[-1])
