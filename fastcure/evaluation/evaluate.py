"""`fastcure evaluate`: the accuracy of a network, clean and under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastcure._environment import pick_device
from fastcure._extras import need
from fastcure._inference_mode import outside_inference_mode
from fastcure.attacks import ATTACKS, L2_ATTACKS, deepfool
from fastcure.data import Dataset, limited, sampled
from fastcure.evaluation.accuracy import correct
from fastcure.evaluation.checklist import Check, masking_checklist, verdict
from fastcure.evaluation.interval import weaker_than_autoattack, wilson, with_interval
from fastcure.evaluation.network import load_images, load_network
from fastcure.evaluation.results import conclude
from fastcure.evaluation.settings import EvaluationSettings
from fastcure.training.ranks import Ranks, Work, join, own_device

Results = dict[str, Any]
NORMS = {"linf": "L-infinity", "l2": "L2"}
MOST_CLASSES = 20
"""Lines of the table of classes; all of them are in the results."""


@outside_inference_mode
def evaluate(settings: EvaluationSettings, say: Callable[[str], object] = print) -> Results:
    """Measure what `settings` describe; write it to `settings.out`, if given.

    Under torchrun the processes share the images, with the same result, and the main one writes and prints; the
    checklist alone is made by each for itself.

    Args:
        settings: of the evaluation.
        say: takes each line of the report.

    Returns:
        `clean`; of each of `settings.attacks`, `{eps: accuracy}`, and with `settings.eps_l2` also, called `pgd_l2` and
        `autoattack_l2`, of those that have this norm; `intervals` of all these, with 95 % confidence; `warnings`, where
        PGD leaves much more than AutoAttack; but for random networks `deepfool`, `{"mean", "median", "found"}` over the
        images classified correctly (L2 lengths, the mean of those found); `classes`, where these have names, the
        accuracies of each; if asked for `checklist`, its items; and
        `settings`, `images` (how many) of `test_set` (how many), `environment`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: before anything is written, if a setting, the data or the model is
            not as it must be.
        FloatingPointError: if an attack met a NaN.
        MemoryError: if memory runs out.
    """
    with join(pick_device(own_device(settings.device))) as ranks:
        return _evaluate(settings, ranks.voice(say), ranks)


def _evaluate(settings: EvaluationSettings, say: Callable[[str], object], ranks: Ranks) -> Results:
    if "autoattack" in settings.attacks:
        need("pyautoattack", purpose="by --attacks autoattack")
    whole = load_images(settings)
    data = limited(whole, settings.limit, settings.seed)
    model = load_network(settings, data, settings.checkpoint, ranks.device, say)
    surrogate = None
    if settings.checklist and settings.surrogate is not None:
        surrogate = load_network(settings, data, settings.surrogate, ranks.device, say)
    say(
        f"{data.name}: {sampled(data, whole)} of {' x '.join(map(str, data.x_test.shape[1:]))}, "
        f"{settings.model} from {settings.checkpoint or 'its function'} on {ranks}, seed {settings.seed}"
    )
    measure = _Measure(model, data, ranks, settings)
    steps, starts, images = settings.steps, settings.restarts, len(data.x_test)
    titles = {"pgd": f"PGD-{steps}" + (f" x {starts}" if starts > 1 else ""), "autoattack": "AutoAttack"}
    options = {"pgd": {"steps": steps, "restarts": starts}, "autoattack": {"batch_size": settings.batch_size}}

    def row(title: str, accuracies: Iterable[float]) -> None:
        say(f"{title:<16}" + "".join(f" {with_interval(value, images):>20}" for value in accuracies))

    results: Results = {"clean": measure.accuracy("clean")}
    say(f"accuracy, in brackets the 95 % interval (Wilson) of {images:,} images:")
    row("clean", [results["clean"]])
    for norm, radii in (("linf", settings.eps), ("l2", settings.eps_l2)):
        names = [name for name in settings.attacks if norm == "linf" or name in L2_ATTACKS]
        if radii:
            say(f"{NORMS[norm]:<16}" + "".join(f" {f'eps {eps:.3g}':>20}" for eps in radii))
        for name in names if radii else ():
            title = titles.get(name, name.upper())
            attack = partial(ATTACKS[name], **options.get(name, {}), eot=settings.eot)
            attack = partial(attack, norm="l2") if norm == "l2" else attack
            found = [measure.accuracy(f"{title} {NORMS[norm]} {eps:.3g}", attack, eps) for eps in radii]
            results[name if norm == "linf" else f"{name}_l2"] = {
                f"{eps:.6g}": value for eps, value in zip(radii, found, strict=True)
            }
            row(title, found)
    results["intervals"] = intervals(results, images)
    results["warnings"] = weak_attacks(results, titles["pgd"], images)
    for warning in results["warnings"]:
        say(f"warning: {warning}")
    if settings.eot == 1:
        results["deepfool"] = measure.distances()
        say("DeepFool: L2 distance {mean}, median {median}, found for {found}".format(**_shown(results["deepfool"])))
    if data.classes:
        results["classes"] = measure.by_class
        say(by_class(measure.by_class, data))
    if settings.checklist:
        items = measure.checklist(surrogate)
        results["checklist"] = [item._asdict() for item in items]
        say(verdict(items))
    return conclude(settings, data, whole, ranks, results, say)


def intervals(results: Results, images: int) -> Results:
    """Return the 95 % interval of each accuracy in `results`, under the same names."""
    return {
        name: intervals(value, images) if isinstance(value, dict) else list(wilson(value, images))
        for name, value in results.items()
    }


def weak_attacks(results: Results, title: str, images: int) -> list[str]:
    """Say at which radii PGD, called `title`, leaves much more accuracy than AutoAttack."""
    found = []
    for suffix, norm in (("", NORMS["linf"]), ("_l2", NORMS["l2"])):
        strong = results.get(f"autoattack{suffix}", {})
        for eps, left in results.get(f"pgd{suffix}", {}).items() if strong else ():
            words = weaker_than_autoattack(title, left, strong[eps], images)
            found += [f"{norm}, eps {float(eps):.3g}: {words}"] if words else []
    return found


class _Measure:
    """The test images, and what is measured on them."""

    def __init__(self, model: nn.Module, data: Dataset, ranks: Ranks, settings: EvaluationSettings) -> None:
        self.model, self.settings, self.ranks = model, settings, ranks
        self.x, self.y, self.classes = data.x_test, data.y_test, data.classes
        self.by_class: dict[str, dict[str, float]] = {name: {} for name in data.classes}
        """Accuracies of each class, if they have names, by what they were measured under."""

    def accuracy(self, title: str, attack: Callable[..., Tensor] | None = None, eps: float = 0.0) -> float:
        """Accuracy, clean or under an attack."""

        def attacked(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
            return correct(self.model, x, y, attack and partial(attack, eps=eps, generator=generator))

        rows = self._map(title, attacked).double()
        for label, name in enumerate(self.classes):
            if len(own := rows[self.y == label]):
                self.by_class[name][title] = float(own.mean())
        return float(rows.mean())

    def distances(self) -> dict[str, float | None]:
        """DeepFool's L2 distances within the box, over the images classified rightly."""

        def distance(x: Tensor, y: Tensor, _: torch.Generator) -> Tensor:
            return deepfool(self.model, x.float() / 255, y, bounds=(0.0, 1.0)).distance

        distances = self._map("DeepFool", distance).double()
        distances = distances[distances > 0]
        found = distances[distances.isfinite()]
        if not len(found):
            return {"mean": None, "median": None, "found": 0.0 if len(distances) else None}
        middle = float(distances.median())
        median = middle if middle < float("inf") else None
        return {"mean": float(found.mean()), "median": median, "found": len(found) / len(distances)}

    def _map(self, title: str, work: Work) -> Tensor:
        """Apply `work` to all images, with a bar of progress."""
        with self._bar(title, len(self.x), "image") as bar:

            def followed(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
                row = work(x, y, generator)
                bar.update(len(x) * self.ranks.size)
                return row

            return self.ranks.map(followed, self.x, self.y, self.settings.seed, self.settings.batch_size)

    def checklist(self, surrogate: nn.Module | None) -> list[Any]:
        """The gradient-masking checklist at the last radius."""
        x, y = self.x.to(self.ranks.device).float() / 255, self.y.to(self.ranks.device)

        def progress(checks: list[Check]) -> tqdm[Check]:
            return self._bar("checklist", checks, "item")

        generator = torch.Generator().manual_seed(self.settings.seed)
        options: dict[str, Any] = {"steps": self.settings.steps, "batch_size": self.settings.batch_size}
        options |= {"eot": self.settings.eot, "autoattack_images": self.settings.autoattack_images}
        options |= {"generator": generator, "progress": progress}
        return masking_checklist(self.model, x, y, self.settings.eps[-1], surrogate=surrogate, **options)

    def _bar(self, title: str, work: Any, unit: str) -> Any:
        what = {"total": work} if isinstance(work, int) else {"iterable": work}
        hidden = None if self.ranks.is_main_process else True
        return tqdm(desc=title, leave=False, unit=unit, dynamic_ncols=True, disable=hidden, **what)


def by_class(accuracies: dict[str, dict[str, float]], data: Dataset) -> str:
    """Format, of each class, its name, its number of test images, clean accuracy and the least accuracy of any attack.

    Of more than `MOST_CLASSES`, those with the least of these are shown.
    """
    counts = data.y_test.bincount(minlength=data.num_classes).tolist()
    rows = [
        (min(found.values()), f"{name:<24.24} {count:>8,} {found['clean']:>8.1%} {min(found.values()):>8.1%}")
        for (name, found), count in zip(accuracies.items(), counts, strict=True)
        if found
    ]
    head = f"{'class':<24} {'images':>8} {'clean':>8} {'least':>8}"
    if len(rows) > MOST_CLASSES:
        head += f"   ({MOST_CLASSES} of {len(rows)} classes, the least accurate under attack)"
        rows = sorted(rows)[:MOST_CLASSES]
    return "\n".join([head, *(row for _, row in rows)])


def _shown(distances: dict[str, float | None]) -> dict[str, str]:
    mean, median, found = distances["mean"], distances["median"], distances["found"]
    lengths = ["-" if value is None else f"{value:.3g}" for value in (mean, median)]
    return {"mean": lengths[0], "median": lengths[1], "found": "-" if found is None else f"{found:.1%}"}
