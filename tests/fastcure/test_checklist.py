"""The gradient-masking checklist: an honest network passes, each item fails on a network built to fail it alone.

Those networks see one pixel: `height(d)`, d = pixel - 0.5, is by how much they err, and `slope` what they claim that
their gradient is. All images lie at d = 0 and eps is 0.1, so that a picture of `height` explains each of them.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.attacks import ATTACKS, pgd
from fastcure.evaluation import checklist as checklists
from fastcure.evaluation.checklist import Item, masking_checklist, verdict

STEPS, SPSA, TRANSFER, UNBOUNDED, EPS, LOSS, AUTOATTACK = range(7)
Curve = Callable[[Tensor], Tensor]


class Landscape(nn.Module):
    """Two classes; 1 wins where `height` is above 0. A `slope` replaces the gradient of `height` (a masking layer)."""

    def __init__(self, height: Curve, slope: float | None = None) -> None:
        super().__init__()
        self.height, self.slope = height, slope

    def forward(self, x: Tensor) -> Tensor:
        d = x.flatten(1)[:, 0] - 0.5
        height = self.height(d)
        if self.slope is not None:
            height = height.detach() + self.slope * (d - d.detach())
        return torch.stack([torch.zeros_like(height), height], 1)


def through(*points: tuple[float, float]) -> Curve:
    """The piecewise linear curve through points (d, height), constant beyond them."""

    def curve(d: Tensor) -> Tensor:
        height = torch.full_like(d, points[0][1])
        for (left, low), (right, high) in pairwise(points):
            height = height + (high - low) / (right - left) * (d.clamp(left, right) - left)
        return height

    return curve


class Flawed(NamedTuple):
    model: nn.Module
    surrogate: nn.Module
    fails: int


# A hill to the left of x that is too low within eps, and a network whose attack goes to the left.
LEFT, RIGHT = Landscape(lambda d: -10 * d - 2), Landscape(lambda d: 10 * d - 2)
FLAWED = {
    # A second hill, high enough, that only a start beyond d = 0.05 climbs: a quarter of them.
    "more steps": Flawed(
        Landscape(through((-0.5, 4.0), (-0.1, -0.5), (0.05, -2.0), (0.07, 0.5), (0.5, 4.0))), LEFT, STEPS
    ),
    # The gradient says left where the network errs sooner to the right, as outputs at x +- delta show.
    "gradient-free": Flawed(
        Landscape(through((-0.5, 4.0), (-0.1, -0.5), (0.0, -1.0), (0.1, 0.5), (0.5, 1.0)), slope=-1.0), LEFT, SPSA
    ),
    # The same, but the hill to the right lies behind a dip that hides it from SPSA.
    "transfer": Flawed(
        Landscape(through((-0.5, 4.0), (-0.1, -0.5), (0.0, -1.0), (0.05, -2.0), (0.08, 0.5), (0.5, 1.0)), slope=-1.0),
        RIGHT,
        TRANSFER,
    ),
    # It never errs, wherever the attack goes.
    "unbounded": Flawed(Landscape(lambda d: d - 5), RIGHT, UNBOUNDED),
    # A hill at eps with a valley at twice eps, which the gradient does not show.
    "eps": Flawed(
        Landscape(through((-0.5, -3.0), (0.05, -0.5), (0.1, 1.0), (0.15, -1.0), (0.25, -1.0), (0.4, 1.0)), slope=1.0),
        LEFT,
        EPS,
    ),
    # A dip on the way to the hill, which the gradient does not show.
    "loss": Flawed(
        Landscape(through((-0.5, -1.0), (0.0, -1.0), (0.05, -2.0), (0.08, 1.0), (0.5, 4.0)), slope=1.0), LEFT, LOSS
    ),
}


def examine(model: nn.Module, surrogate: nn.Module | None) -> list[Item]:
    x, y = torch.full((100, 1, 1, 1), 0.5), torch.zeros(100, dtype=torch.int64)
    return masking_checklist(
        model, x, y, 0.1, surrogate=surrogate, samples=4, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", FLAWED)
def test_each_item_fails_on_a_network_built_to_fail_it_alone(name: str) -> None:
    flawed = FLAWED[name]
    items = examine(flawed.model, flawed.surrogate)
    assert [item.passed for item in items] == [item != flawed.fails for item in range(6)], verdict(items)
    words = verdict(items).splitlines()
    assert words[0] == "gradient masking: 1 of 6 items fail"
    assert words[1 + flawed.fails].startswith(f"  FAIL  {items[flawed.fails].name}: ")


def test_all_random_numbers_come_from_the_generator() -> None:
    state = torch.get_rng_state()
    examine(Landscape(lambda d: 20 * d - 1), RIGHT)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_honest_landscape_passes() -> None:
    items = examine(Landscape(lambda d: 20 * d - 1), RIGHT)
    assert all(item.passed for item in items), verdict(items)
    assert [item.name for item in items] == [
        "more steps and restarts change nothing",
        "an attack without gradients is no stronger",
        "a black-box attack is no stronger",
        "an unbounded attack reaches 0 %",
        "accuracy falls as eps grows",
        "the loss rises along the attack's path",
    ]
    none = "0.0% [0.0, 3.7]"  # the rule of three: 3 / 100 is where a 95 % interval of one side ends
    assert items[STEPS].words.startswith(f"PGD-10 leaves {none}, with PGD-50 from 3 starts added {none}")
    assert items[SPSA].words.startswith(f"SPSA leaves {none}, PGD {none}")
    assert items[TRANSFER].words.startswith(f"PGD on a surrogate from standard training leaves {none}, PGD {none}")
    assert items[EPS].evidence["accuracy"] == [1, 1, 0, 0, 0, 0]  # it errs from d = 0.05 on, the third radius
    assert items[EPS].evidence["eps"] == pytest.approx([0, 0.025, 0.05, 0.1, 0.2, 0.4])
    walk = torch.linspace(0, 0.1, 11, dtype=torch.float64)
    assert items[LOSS].evidence["mean_loss"] == pytest.approx(F.softplus(20 * walk - 1).tolist(), rel=1e-5)


def test_without_a_surrogate_its_item_is_skipped_with_words() -> None:
    items = examine(Landscape(lambda d: 20 * d - 1), None)
    assert [item.passed for item in items] == [True, True, None, True, True, True]
    assert "no sign of it in 5 items" in verdict(items)
    assert "skip  a black-box attack is no stronger: no surrogate from standard training was given" in verdict(items)


def test_images_classified_wrongly_count_as_wrong_and_are_not_attacked() -> None:
    x, y = torch.full((10, 1, 1, 1), 0.5), torch.arange(10) % 2
    items = masking_checklist(LEFT, x, y, 0.1, samples=4, batch_size=3)
    assert items[EPS].evidence["accuracy"] == [0.5, 0.5, 0.5, 0.5, 0.5, 0.0]  # the last radius alone passes d = -0.2


@pytest.mark.parametrize(("failures", "passes"), [(2, True), (5, True), (12, False)])
def test_a_drop_counts_where_it_exceeds_the_margin_by_two_standard_errors(failures: int, passes: bool) -> None:
    # The surrogate's attack, to the right, breaks `failures` of 100 images at d = 0.01; the network's own goes left.
    model = Landscape(
        through((-0.5, 4.0), (-0.12, -0.5), (0.0, -1.0), (0.105, -0.5), (0.11, 0.5), (0.5, 1.0)), slope=-1.0
    )
    x = torch.full((100, 1, 1, 1), 0.5)
    x[:failures] += 0.01
    item = masking_checklist(model, x, torch.zeros(100).long(), 0.1, surrogate=RIGHT, samples=4)[TRANSFER]
    assert item.evidence["drop"] == pytest.approx(failures / 100)
    assert item.evidence["standard_error"] == pytest.approx(failures**0.5 / 100)
    assert item.passed == passes


def test_the_model_comes_back_as_it_was_and_nothing_right_is_an_error() -> None:
    model = Landscape(lambda d: 20 * d - 1).train()
    examine(model, None)
    assert model.training
    with pytest.raises(ValueError, match="classifies none of the 100 images rightly"):
        examine(Landscape(lambda d: 20 * d + 1), None)


class Ring(nn.Module):
    """It errs from 0.006 to 0.05 around d = 0.05, and its gradient points there: fine steps end where it is right."""

    def forward(self, x: Tensor) -> Tensor:
        away = x.flatten(1)[:, 0] - 0.55
        height = torch.where((away.detach().abs() > 0.006) & (away.detach().abs() < 0.05), 1.0, -1.0)
        height = height - (away.abs() - away.detach().abs())
        return torch.stack([torch.zeros_like(height), height], 1)


def test_autoattack_s_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network errs to the right, where its gradient does not point: PGD fails, and what sees outputs does not."""
    asked = []

    def elsewhere(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, **_: object) -> Tensor:
        asked.append(len(x))
        return x + eps

    monkeypatch.setitem(ATTACKS, "autoattack", elsewhere)
    x, y = torch.full((100, 1, 1, 1), 0.5), torch.arange(100) % 2  # class 1 is classified wrongly
    items = masking_checklist(FLAWED["transfer"].model, x, y, 0.1, samples=4, autoattack_images=40, batch_size=15)
    assert (items[AUTOATTACK].name, items[AUTOATTACK].passed) == ("AutoAttack is no stronger", False)
    evidence = items[AUTOATTACK].evidence
    assert (evidence["images"], evidence["pgd"], evidence["autoattack"]) == (40, 0.5, 0.0)
    assert asked == [15, 5]  # of the 40, those that are classified rightly
    assert items[AUTOATTACK].words.startswith("AutoAttack leaves 0.0% [0.0, 8.8], PGD 50.0% [35.2, 64.8] of 40 images")
    monkeypatch.setattr(checklists, "find_spec", lambda _: None)
    items = masking_checklist(LEFT, x, y, 0.1, samples=4, autoattack_images=40, progress=lambda checks: checks[-1:])
    assert [item.passed for item in items] == [None]
    assert "pip install pyautoattack" in items[0].words


def test_the_stronger_pgd_keeps_what_the_weaker_one_broke() -> None:
    """PGD ends within a step of d = 0.05: of 10 steps it is 0.025 long, and mostly errs; of 50, 0.005, and never."""
    evidence = examine(Ring(), None)[STEPS].evidence
    assert evidence["pgd"] < 0.5
    assert evidence["stronger_pgd"] == evidence["pgd"]
    assert evidence["drop"] == 0


def test_a_loss_that_is_no_number_at_the_end_of_the_path_is_reported() -> None:
    honest = Landscape(lambda d: 20 * d - 1)
    broken = Landscape(lambda d: torch.where(d > 0.095, torch.nan, 20 * d - 1))
    x, y = torch.full((100, 1, 1, 1), 0.5), torch.zeros(100, dtype=torch.int64)
    (item,) = masking_checklist(honest, x, y, 0.1, progress=lambda checks: checks[-1:])
    assert item.passed
    with pytest.raises(FloatingPointError, match="100 of 100 samples is NaN"):
        masking_checklist(broken, x, y, 0.1, progress=lambda checks: checks[-1:])


def test_a_surrogate_attacks_in_evaluation_mode_and_comes_back_as_it_was() -> None:
    class Reversed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (LEFT if self.training else RIGHT)(x)

    surrogate = Reversed().train()
    flawed = FLAWED["transfer"]
    assert [item.passed for item in examine(flawed.model, surrogate)] == [item != TRANSFER for item in range(6)]
    assert surrogate.training


class Trained(NamedTuple):
    robust: nn.Module
    normal: nn.Module
    x: Tensor
    y: Tensor


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four classes: a bright quarter of a noisy 6 x 6 image."""
    y = torch.randint(4, (count,), generator=generator)
    bright = F.one_hot(y, 4).reshape(-1, 1, 2, 2).repeat_interleave(3, 2).repeat_interleave(3, 3)
    x = 0.4 + 0.2 * bright + 0.15 * torch.randn(count, 1, 6, 6, generator=generator)
    return x.clamp(0, 1), y


def train(adversarial: bool) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        x, y = images(128, generator)
        x = pgd(model, x, y, 0.05, steps=4, generator=generator) if adversarial else x
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained(train(True), train(False), *images(300, torch.Generator().manual_seed(1)))


class Scaled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.model(x)


class Rounded(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.model((8 * x).round() / 8)


@pytest.mark.parametrize("which", ["robust", "normal"])
def test_an_honest_network_passes(trained: Trained, which: str) -> None:
    items = checklist(trained, getattr(trained, which))
    assert all(item.passed for item in items), verdict(items)
    assert verdict(items).startswith("gradient masking: no sign of it in 6 items")


@pytest.mark.parametrize("mask", [Scaled, Rounded])
@pytest.mark.parametrize("which", ["robust", "normal"])
def test_a_network_that_masks_its_gradients_is_caught(trained: Trained, mask: type[Scaled], which: str) -> None:
    items = checklist(trained, mask(getattr(trained, which)))
    assert not any(items[item].passed for item in (SPSA, TRANSFER, UNBOUNDED, LOSS)), verdict(items)


def checklist(trained: Trained, model: nn.Module) -> list[Item]:
    generator = torch.Generator().manual_seed(2)
    return masking_checklist(model, trained.x, trained.y, 0.05, surrogate=trained.normal, generator=generator)
