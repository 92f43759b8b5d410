"""What all attacks, and all that use them, promise of what they are given: images, bounds, labels."""

import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from attack_runs import ACCURACIES, ATTACKS, USERS, Run, case, each
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.analysis import accuracy_curve
from fastcure.attacks import deepfool, fgsm, pgd
from fastcure.evaluation.accuracy import accuracy
from fastcure.models import Normalize

# Images outside of the box.


@each(ATTACKS, USERS)
@pytest.mark.parametrize("change", [lambda x: (x - 0.4) / 0.2, lambda x: x * 255, lambda x: x - 0.01])
def test_images_outside_of_the_box_are_an_error(run: Run, change: Callable[[Tensor], Tensor]) -> None:
    model, x, y = case()
    outside = change(x)
    met = rf"{float(outside.min()):.4g}\.\.{float(outside.max()):.4g}"
    with pytest.raises(ValueError, match=rf"pixels in \[0, 1\], got {met}: .*fastcure\.models\.Normalize"):
        run(model, outside, y)


@each(ATTACKS, USERS)
def test_one_image_of_many_outside_is_an_error_and_a_nan_does_not_hide_it(run: Run) -> None:
    model, x, y = case()
    x[3, 0, 2, 2] = 1.01
    x[5, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"got 0\.\d+\.\.1\.01"):
        run(model, x, y)


@each(ATTACKS, USERS)
def test_rounding_is_allowed(run: Run) -> None:
    model, x, y = case()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1 + 1e-6, -1e-6
    run(model, x, y)


@each({name: attack for name, attack in ATTACKS.items() if name != "autoattack"})
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(run: Run, dtype: torch.dtype) -> None:
    model, x, y = case(dtype)
    x[0, 0, 0, 0] = 1 + torch.finfo(dtype).eps
    run(model, x, y)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\], got .*\.\.1\.5"):
        run(model, x + 0.5 * (x == x.max()), y)


@each({name: run for name, run in {**ATTACKS, **USERS}.items() if name not in ("autoattack", "checklist")})
def test_another_box_is_named_by_bounds(run: Run) -> None:
    model, x, y = case()
    run(model, 4 * x - 2, y, bounds=(-2.0, 2.0))
    with pytest.raises(ValueError, match=r"pixels in \[-1, 2\], got -1\.9\d*\.\.1\.9\d*: .*bounds=\(lower, upper\)"):
        run(model, 4 * x - 2, y, bounds=(-1.0, 2.0))


@pytest.mark.parametrize("attack", [partial(pgd, steps=3, random_start=False), fgsm])
def test_bounds_of_normalised_images_give_the_attack_on_pixels(attack: Run) -> None:
    """Two ways to attack one function: normalisation as a layer, or normalised images with eps and bounds to match."""
    model, x, y = case(torch.float64)
    inside = nn.Sequential(Normalize(1, [0.4], [0.2]).double(), model)
    wanted = attack(inside, x, y, eps=0.1)
    found = attack(model, (x - 0.4) / 0.2, y, eps=0.5, bounds=(-2.0, 3.0))
    torch.testing.assert_close(found * 0.2 + 0.4, wanted, rtol=0, atol=1e-12)


def test_deepfool_without_limits_is_that_of_other_units() -> None:
    model, x, y = case(torch.float64)
    inside = nn.Sequential(Normalize(1, [0.4], [0.2]).double(), model)
    wanted = deepfool(inside, x, y).distance
    found = deepfool(model, (x - 0.4) / 0.2, y, bounds=(-math.inf, math.inf)).distance
    torch.testing.assert_close(found * 0.2, wanted, rtol=1e-3, atol=0)


def test_uint8_images_have_bounds_of_their_own() -> None:
    model, x, y = case()
    with pytest.raises(ValueError, match=r"bounds must be \(0, 1\) for uint8 images"):
        accuracy_curve(model, (x * 255).byte(), y, [0.1], bounds=(0.0, 255.0))


# Labels.

MISTAKES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "(N, 1)": (lambda y: y[:, None], r"shape \(12,\), one class index a sample, got \(12, 1\): pass y\.flatten\(\)"),
    "(N, 1) of floats": (lambda y: y[:, None].float(), r"got \(12, 1\): pass y\.flatten\(\)"),
    "one-hot integers": (lambda y: F.one_hot(y, 3), r"got \(12, 3\): pass y\.argmax\(1\)"),
    "floats": (lambda y: y.float(), r"whole numbers, one class index a sample, got torch\.float32: pass y\.long\(\)"),
    "too few": (lambda y: y[:5], "one label for each of the 12 samples, got"),
    "negative": (lambda y: y.index_fill(0, torch.tensor([2]), -1), r"labels must be in 0\.\.2, .* got -1\.\.2"),
    "ignored": (lambda y: y.index_fill(0, torch.tensor([2]), -100), r"got -100\.\.2"),
    "too large": (lambda y: y.index_fill(0, torch.tensor([2]), 3), r"labels must be in 0\.\.2, .* got 0\.\.3"),
    "no tensor": (lambda y: y.tolist(), "one label for each of the 12 samples, got list"),  # type: ignore[dict-item]
}


@each(ATTACKS, USERS, ACCURACIES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_labels_that_are_none_are_one_clear_error(run: Run, mistake: str) -> None:
    model, x, y = case()
    change, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        run(model, x, change(y))


@each(ATTACKS)
def test_soft_targets_are_understood_by_attacks(run: Run) -> None:
    model, x, y = case()
    torch.manual_seed(0)
    wanted = run(model, x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(run(model, x, F.one_hot(y, 3).float()), wanted)
    with pytest.raises(ValueError, match=r"shape of the logits \(\d+, 3\), got \(\d+, 4\)"):
        run(model, x, F.one_hot(y, 4).float())


@each({name: run for name, run in {**USERS, **ACCURACIES}.items() if name != "surface"})
def test_soft_targets_have_no_accuracy(run: Run) -> None:
    model, x, y = case()
    with pytest.raises(ValueError, match=r"class indices \(12,\), got probabilities \(12, 3\): pass y\.argmax\(1\)"):
        run(model, x, F.one_hot(y, 3).float())


def test_a_loss_of_ones_own_takes_labels_of_its_own() -> None:
    model, x, _ = case()
    wanted = torch.rand(12, 3)  # what the logits shall leave: no labels

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - targets).square().sum(1)

    adv = pgd(model, x, wanted[:, :, None].squeeze(2), 0.1, loss_fn=loss, random_start=False)
    assert (loss(model(adv), wanted) > loss(model(x), wanted)).all()


def test_attacks_and_accuracy_take_only_images() -> None:
    model, x, y = case()
    with pytest.raises(TypeError, match=r"got torch\.int64: pass x\.byte\(\)"):
        accuracy(model, (x * 255).long(), y)
    with warnings.catch_warnings():
        assert accuracy(model, 3 * x - 7, y) <= 1  # clean accuracy has no box
