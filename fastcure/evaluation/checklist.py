"""The gradient-masking checklist: is a network robust, or are its gradients useless to the attack?

Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, section 3.1; Carlini et
al., "On evaluating adversarial robustness", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcure._functional import cross_entropy, evaluation_mode, find_logits
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import check_batch, check_classes, check_labels, check_pixels, check_positive
from fastcure.attacks import ATTACKS, fgsm, pgd, spsa
from fastcure.attacks._arguments import check_numbers
from fastcure.data import stratified
from fastcure.evaluation.accuracy import Attack, check_outputs, correct, judge
from fastcure.evaluation.interval import with_interval

MORE_STEPS, RESTARTS = 5, 3
"""What the stronger PGD has more than the one in question."""

EPS_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Item(NamedTuple):
    """One item of the checklist."""

    name: str
    """What holds of a network whose gradients are of use."""
    passed: bool | None
    """None where it could not be examined."""
    evidence: dict[str, Any]
    """Accuracies (of all images) and losses, as numbers or lists of them."""
    words: str
    """The evidence in one sentence."""


Check = Callable[[], Item]


@outside_inference_mode
def masking_checklist(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    *,
    surrogate: nn.Module | None = None,
    margin: float = 0.02,
    steps: int = 10,
    samples: int = 32,
    batch_size: int = 256,
    eot: int = 1,
    autoattack_images: int = 0,
    generator: torch.Generator | None = None,
    progress: Callable[[list[Check]], Iterable[Check]] = list,
) -> list[Item]:
    """Examine whether L-infinity PGD at `eps` can be believed on a network.

    An attack that should not be the stronger one counts as such only if the drop in accuracy exceeds `margin` by two
    standard errors (of paired counts: only images on which the two attacks differ add to it). It takes about
    `55 steps + 20 (2 samples + 1)` times the arithmetic of classifying the images, at most. It may be called inside
    torch.inference_mode, which it leaves.

    Args:
        model: the network, normalisation inside.
        x: `(B, ...)` images in [0, 1]; a few hundred make the margin worth its name.
        y: class indices `(B,)`.
        eps: radius in pixels.
        surrogate: a network from standard training on the same task, from which attacks are transferred; without it
            that item is skipped.
        margin: difference in accuracy that is taken for none.
        steps: of the PGD in question.
        samples: sign vectors of each of SPSA's 20 estimates.
        batch_size: images at a time.
        eot: as in `fastcure.attacks.pgd`, for a model that is random on purpose.
        autoattack_images: AutoAttack is run on a stratified sample of so many of the images, where pyautoattack is
            installed; its thousands of passes an image take most of the time. Without any, its item is left out.
        generator: source of the random starts and signs.
        progress: wraps the list of checks, to show how far they are.

    Returns:
        Six items, in the order of this file, or seven with AutoAttack's; `verdict` puts them in words. Accuracies are
        followed by their 95 % intervals, see `fastcure.evaluation.interval`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range, or no image is classified rightly.
        FloatingPointError: if an attack met a NaN, or an output of the model on its images is NaN or infinite.

    Warns:
        UserWarning: as `fastcure.attacks.pgd` does.

    Examples:
        >>> import torch
        >>> from fastcure.evaluation.checklist import masking_checklist, verdict
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x = torch.rand(20, 1, 4, 4)
        >>> items = masking_checklist(model, x, model(x).argmax(1), eps=8 / 255, steps=5, samples=8)
        >>> print(verdict(items))  # doctest: +ELLIPSIS
        gradient masking: ...
    """
    check_batch(x, y, None)
    check_labels(y, len(x), soft=False)
    check_pixels(x, option=False)
    check_positive("eps", eps)
    check_positive("margin", margin, zero=True)
    check_positive("autoattack_images", autoattack_images, zero=True)
    with evaluation_mode(model):
        exam = _Examination(
            *(model, x, y, eps, surrogate, margin, steps, samples, batch_size, eot, autoattack_images, generator)
        )
        checks: list[Check] = [
            exam.more_steps,
            exam.gradient_free,
            exam.transfer,
            exam.unbounded,
            exam.growing_eps,
            exam.rising_loss,
            *([exam.autoattack] if autoattack_images else []),
        ]
        return [check() for check in progress(checks)]


def verdict(items: list[Item]) -> str:
    """Format the items as lines of text, the conclusion first.

    Examples:
        >>> from fastcure.evaluation.checklist import Item, verdict
        >>> print(verdict([Item("an unbounded attack reaches 0 %", True, {}, "eps = 1 leaves 0.0%")]))
        gradient masking: no sign of it in 1 items
          pass  an unbounded attack reaches 0 %: eps = 1 leaves 0.0%
    """
    failed = sum(item.passed is False for item in items)
    seen = sum(item.passed is not None for item in items)
    marks = {True: "pass", False: "FAIL", None: "skip"}
    head = f"{failed} of {seen} items fail" if failed else f"no sign of it in {seen} items"
    return "\n".join([f"gradient masking: {head}"] + [f"  {marks[i.passed]}  {i.name}: {i.words}" for i in items])


@dataclass(eq=False)
class _Examination:
    """The images that the model classifies rightly, and what the attacks leave of them."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    surrogate: nn.Module | None
    margin: float
    steps: int
    samples: int
    batch_size: int
    eot: int
    autoattack_images: int
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        self.count = len(self.x)
        chosen = torch.zeros(self.count, dtype=torch.bool)
        if self.autoattack_images:
            chosen[stratified(self.y, self.autoattack_images, seed=0)] = True
        right = self._clean()
        if not right.any():
            raise ValueError(
                f"the model classifies none of the {self.count} images rightly: there is nothing to attack"
            )
        self.x, self.y = self.x[right], self.y[right]
        self.chosen, self.chosen_count = chosen.to(right.device)[right], int(chosen.sum())
        """Which of them AutoAttack is run on, and of how many images these are those classified rightly."""

    def more_steps(self) -> Item:
        """PGD with more steps and restarts finds little that PGD does not."""
        passed, drop = self._compare(self.weak, self.strong)
        evidence = {"pgd": self._accuracy(self.weak), "stronger_pgd": self._accuracy(self.strong), **drop}
        words = (
            f"PGD-{self.steps} leaves {self._shown(self.weak)}, with PGD-{MORE_STEPS * self.steps} from {RESTARTS} "
            f"starts added {self._shown(self.strong)} (margin {self.margin:.1%})"
        )
        return Item("more steps and restarts change nothing", passed, evidence, words)

    def gradient_free(self) -> Item:
        """SPSA, which uses no gradient, is no stronger than PGD."""
        attack = partial(spsa, eps=self.eps, samples=self.samples, generator=self.generator)
        return self._outside("an attack without gradients is no stronger", "spsa", "SPSA", self._survivors(attack))

    def transfer(self) -> Item:
        """Adversarial images of a surrogate are no stronger than the model's own."""
        name = "a black-box attack is no stronger"
        surrogate = self.surrogate
        if surrogate is None:
            return Item(name, None, {}, "no surrogate from standard training was given to transfer attacks from")
        attack = self._pgd(self.eps)
        left = self._survivors(lambda _, x, y: attack(surrogate, x, y))
        return self._outside(name, "transfer", "PGD on a surrogate from standard training", left)

    def unbounded(self) -> Item:
        """With the whole box to move in, every image is misclassified."""
        left = self._survivors(self._pgd(1.0, MORE_STEPS * self.steps))
        evidence = {"accuracy": self._accuracy(left)}
        return Item("an unbounded attack reaches 0 %", not left.any(), evidence, f"eps = 1 leaves {self._shown(left)}")

    def growing_eps(self) -> Item:
        """A larger ball holds more adversarial images."""
        radii = [0.0] + [factor * self.eps for factor in EPS_FACTORS]
        left = [torch.ones_like(self.weak)]
        left += [self.weak if eps == self.eps else self._survivors(self._pgd(eps)) for eps in radii[1:]]
        passed = all(self._compare(large, small)[0] for small, large in pairwise(left))
        evidence = {"eps": radii, "accuracy": [self._accuracy(each) for each in left]}
        words = ", ".join(f"{self._shown(each)} at {eps:.3g}" for eps, each in zip(radii, left, strict=True))
        return Item("accuracy falls as eps grows", passed, evidence, words)

    def rising_loss(self) -> Item:
        """Short steps along the gradient's sign raise the loss, each of them and of nearly every image."""
        losses = torch.stack(self._walk())  # (steps + 1, right images)
        check_numbers(~losses.isfinite().all(0))
        mean = losses.mean(1)
        flat = (losses[-1] <= losses[0]).double()
        share, error = float(flat.mean()), math.sqrt(float(flat.sum())) / len(flat)
        rise = mean.diff()
        passed = bool((rise > -0.01 * (mean.max() - mean.min())).all()) and share - 2 * error <= self.margin
        evidence = {"mean_loss": mean.tolist(), "share_not_risen": share}
        words = (
            f"the mean goes from {mean[0]:.3g} to {mean[-1]:.3g}, falling in {int((rise < 0).sum())} of {self.steps} "
            f"steps; of {share:.1%} of the images it does not rise"
        )
        return Item("the loss rises along the attack's path", passed, evidence, words)

    def autoattack(self) -> Item:
        """AutoAttack, on a sample of the images, is no stronger than PGD."""
        name = "AutoAttack is no stronger"
        if find_spec("pyautoattack") is None:
            return Item(name, None, {}, "the package pyautoattack is not installed: pip install pyautoattack")
        attack = partial(
            ATTACKS["autoattack"], eps=self.eps, batch_size=self.batch_size, eot=self.eot, generator=self.generator
        )
        of, count = self.chosen, self.chosen_count
        if not of.any():
            return Item(name, None, {"images": count}, f"none of {count:,} images is classified rightly without it")
        left = torch.ones_like(of)
        left[of] = self._survivors(attack, of)
        passed, drop = self._compare(self.strong[of], left[of], count)
        accuracies = {
            "weaker_pgd": int(self.weak[of].sum()) / count,
            "pgd": int(self.strong[of].sum()) / count,
            "autoattack": int(left[of].sum()) / count,
        }
        words = (
            f"AutoAttack leaves {with_interval(accuracies['autoattack'], count)}, PGD "
            f"{with_interval(accuracies['pgd'], count)} of {count:,} images (margin {self.margin:.1%})"
        )
        return Item(name, passed, {"images": count, **accuracies, **drop}, words)

    @cached_property
    def weak(self) -> Tensor:
        return self._survivors(self._pgd(self.eps))

    @cached_property
    def strong(self) -> Tensor:
        stronger = self._pgd(self.eps, MORE_STEPS * self.steps, RESTARTS)
        return self.weak & self._survivors(stronger)

    def _pgd(self, eps: float, steps: int | None = None, restarts: int = 1) -> Attack:
        options: dict[str, Any] = {"eot": self.eot, "generator": self.generator}
        return partial(pgd, eps=eps, steps=steps or self.steps, restarts=restarts, **options)

    def _survivors(self, attack: Attack, of: Tensor | slice = slice(None)) -> Tensor:
        """Return `(B,)`: which images, all or some `of` them, are still classified rightly under an attack."""
        batches = zip(self.x[of].split(self.batch_size), self.y[of].split(self.batch_size), strict=True)
        return torch.cat([correct(self.model, x, y, attack) for x, y in batches])

    def _clean(self) -> Tensor:
        """Return `(B,)`: which images are classified rightly; all are checked."""
        valid: list[Tensor] = []
        right: list[Tensor] = []
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            with torch.no_grad():
                logits = find_logits(self.model(x))
            check_classes(y, logits)
            for whole, part in zip((valid, right), judge(logits, y), strict=True):
                whole.append(part)
        check_outputs(int((~torch.cat(valid)).sum()), self.count)
        return torch.cat(right)

    def _accuracy(self, left: Tensor) -> float:
        return int(left.sum()) / self.count

    def _shown(self, left: Tensor) -> str:
        return with_interval(self._accuracy(left), self.count)

    def _compare(self, left: Tensor, challenger: Tensor, count: int | None = None) -> tuple[bool, dict[str, float]]:
        """Whether the attack that leaves `challenger` is no stronger than the one that leaves `left`; the drop.

        It is of `count` images, or all.
        """
        gained, lost, count = int((left & ~challenger).sum()), int((challenger & ~left).sum()), count or self.count
        drop, error = (gained - lost) / count, math.sqrt(gained + lost) / count
        return drop - 2 * error <= self.margin, {"drop": drop, "standard_error": error, "margin": self.margin}

    def _outside(self, name: str, key: str, title: str, left: Tensor) -> Item:
        passed, drop = self._compare(self.strong, left)
        evidence = {"pgd": self._accuracy(self.strong), key: self._accuracy(left), **drop}
        words = f"{title} leaves {self._shown(left)}, PGD {self._shown(self.strong)} (margin {self.margin:.1%})"
        return Item(name, passed, evidence, words)

    def _walk(self) -> list[Tensor]:
        """Return the loss of each image `(B,)` at x and after each of `steps` steps of eps / steps."""
        path = []
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            losses, adv = [], x
            for step in range(self.steps + 1):
                with torch.no_grad():  # in float64 the loss of a sure network is not yet 0
                    losses.append(cross_entropy(find_logits(self.model(adv)).double(), y))
                if step < self.steps:
                    adv = fgsm(self.model, adv, y, self.eps / self.steps, eot=self.eot)
            path.append(torch.stack(losses))
        return list(torch.cat(path, 1))
