"""What all attacks, and all that use them, promise of what they are given: images, labels, outputs of the model."""

import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.analysis import accuracy_curve, loss_surface
from fastcure.attacks import autoattack, deepfool, fgsm, margin_loss, pgd, spsa
from fastcure.evaluation.accuracy import accuracy, correct
from fastcure.evaluation.checklist import masking_checklist
from fastcure.models import Normalize

Run = Callable[..., object]


def found_by_deepfool(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> Tensor:
    return deepfool(model, x, y, **options).x_adv  # type: ignore[arg-type]


ATTACKS: dict[str, Run] = {
    "fgsm": fgsm,
    "pgd": partial(pgd, steps=2),
    "pgd-l2": partial(pgd, eps=0.5, steps=2, norm="l2"),
    "restarts": partial(pgd, steps=2, restarts=2),
    "margin": partial(pgd, steps=2, loss_fn=margin_loss),
    "spsa": partial(spsa, steps=2, samples=4),
    "deepfool": found_by_deepfool,
    "autoattack": partial(autoattack, attacks=("apgd-ce",)),
}
USERS: dict[str, Run] = {
    "curve": partial(accuracy_curve, eps=[0.0, 0.1], steps=2),
    "curve of one radius": partial(accuracy_curve, eps=[0.1], steps=2),
    "checklist": partial(masking_checklist, eps=0.1, steps=2, samples=2),
    "surface": partial(loss_surface, points=3),
}
ACCURACIES: dict[str, Run] = {"accuracy": accuracy, "correct": correct}


def each(*groups: dict[str, Run]) -> pytest.MarkDecorator:
    runs = {name: run for group in groups for name, run in group.items()}
    return pytest.mark.parametrize("run", runs.values(), ids=runs)


def case(dtype: torch.dtype = torch.float32, *last: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network, three classes, and twelve images, all classified rightly."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), *last)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 36, generator=generator))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)  # the boundaries meet in the middle of the box
    x = torch.rand(12, 1, 6, 6, generator=generator)
    y = model(x).argmax(1)
    return model.to(dtype), x.to(dtype), y


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


# Probabilities in place of logits.


def shortest(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The distance to the nearest boundary of a linear network: min over k of (f_y - f_k) / ||w_y - w_k||."""
    weight, f = model[1].weight.detach().double(), model[:2].double()(x.double()).detach()
    rows = []
    for i in range(len(x)):
        others = [k for k in range(3) if k != y[i]]
        rows.append(min((f[i, y[i]] - f[i, k]) / (weight[y[i]] - weight[k]).norm() for k in others))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sureness", [1.0, 30.0])
def test_deepfool_on_probabilities_warns_and_finds_the_boundary_or_nothing(dtype: torch.dtype, sureness: float) -> None:
    model, x, y = case(dtype)
    with torch.no_grad():
        model[1].weight.mul_(sureness)
        model[1].bias.mul_(sureness)
    exact = shortest(model, x, y).to(dtype)
    model = model.to(dtype)
    torch.testing.assert_close(deepfool(model, x).distance, exact, rtol=1e-3, atol=1e-6)
    with pytest.warns(UserWarning, match="must return logits, got what look like probabilities"):
        found = deepfool(nn.Sequential(model, nn.Softmax(1)), x)
    reached = found.distance.isfinite()
    assert reached.double().mean() >= 0.5
    ratio = found.distance[reached] / exact[reached]
    assert (ratio > 1 - 1e-3).all()
    assert (ratio < 10).all()  # gradients of probabilities point another way, but the boundary is where it is
    before = x + (found.x_adv - x) * (1 - 2e-3)
    assert (model(before).argmax(1) == y)[reached].all()
    assert (model(found.x_adv).argmax(1) != y)[reached].all()


@each(
    {**ATTACKS, "checklist": USERS["checklist"], "surface": USERS["surface"]},
    {"torch's loss": partial(pgd, steps=2, loss_fn=nn.CrossEntropyLoss(reduction="none"))},
)
def test_probabilities_are_warned_of_once_a_model(run: Run) -> None:
    model, x, y = case(torch.float32, nn.Softmax(1))
    with pytest.warns(UserWarning, match="leave out the last softmax") as seen:
        run(model, x, y)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    run(model, x, y)


class Centred(nn.Module):
    """Rows that sum to 1, with numbers below 0."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True) + 1 / logits.shape[1]


@each(ATTACKS, USERS)
@pytest.mark.parametrize("last", [nn.Identity(), nn.LogSoftmax(1), nn.Sigmoid(), Centred()])
def test_logits_are_not_warned_of(run: Run, last: nn.Module) -> None:
    model, x, y = case(torch.float32, last)
    run(model, x, y)


# Randomness.


class Noisy(nn.Module):
    """Logits with noise, from torch's generator."""

    def __init__(self, model: nn.Module, size: float) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits + self.size * torch.randn_like(logits)


@each({name: attack for name, attack in ATTACKS.items() if name != "deepfool"})
def test_an_attack_on_a_random_model_warns_once(run: Run) -> None:
    model, x, y = case()
    noisy = Noisy(model, 0.5)
    with pytest.warns(UserWarning, match="random in evaluation mode: logits differ by .*%") as seen:
        run(noisy, x, y)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    run(noisy, x, y)
    run(Noisy(model, 0.0), x, y)  # what it draws changes nothing


def test_deepfool_and_surfaces_of_a_random_model_are_an_error() -> None:
    model, x, y = case()
    for run in (found_by_deepfool, USERS["surface"]):
        with pytest.raises(ValueError, match="random in evaluation mode: logits differ by"):
            run(Noisy(model, 1e-3), x, y)


def test_examining_a_model_draws_no_number_of_its_own() -> None:
    model, x, y = case()
    noisy = Noisy(model, 0.0)
    states = []
    for _ in range(2):  # the first looks twice, the second does not look
        torch.manual_seed(0)
        fgsm(noisy, x, y)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# Gradients that do not exist.


@pytest.mark.parametrize("run", [ATTACKS[name] for name in ("fgsm", "pgd", "pgd-l2", "restarts", "deepfool")])
@pytest.mark.parametrize("cut", ["no_grad", "detach", "constant"])
def test_a_model_without_a_gradient_is_one_clear_error(run: Run, cut: str) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            if cut == "detach":
                return self.model(x.detach())
            with torch.no_grad():
                logits = self.model(x)
            return logits if cut == "no_grad" else logits + torch.zeros((), requires_grad=True)

    model, x, y = case()
    with pytest.raises(RuntimeError, match=r"the loss has no gradient with respect to the images, .* stand still"):
        run(Cut(), x, y)


# What is not a number.


class Broken(nn.Module):
    """Logits with `value` in a column, for the images whose first pixel is above one half."""

    def __init__(self, model: nn.Module, value: float, column: int) -> None:
        super().__init__()
        self.model, self.value, self.column = model, value, column

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        hit = (x.flatten(1)[:, 0] > 0.5)[:, None] & (torch.arange(3) == self.column)
        return torch.where(hit, self.value, logits)


@each(ATTACKS, USERS, {"accuracy": accuracy})
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 2])
def test_outputs_that_are_no_numbers_are_reported(run: Run, value: float, column: int) -> None:
    model, x, _ = case()
    y = torch.full((12,), column)  # argmax takes the broken column for the class
    x[:, 0, 0, 0] = 0.9
    with pytest.raises(FloatingPointError, match=r"NaN|infinite"):
        run(Broken(model, value, column), x, y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_output_that_is_no_number_counts_as_wrong(value: float) -> None:
    model, x, y = case()
    hit = x.flatten(1)[:, 0] > 0.5
    assert 0 < hit.sum() < 12
    broken = Broken(model, value, 1)
    wanted = (model(x).argmax(1) == y) & ~hit
    assert torch.equal(correct(broken, x, y), wanted)
    with pytest.raises(FloatingPointError, match=f"outputs of {int(hit.sum())} of 12 images"):
        accuracy(broken, x, y, batch_size=5)


def test_a_class_that_is_masked_out_is_no_mistake() -> None:
    model, x, _ = case()
    masked = Broken(model, -torch.inf, 2)
    y = masked(x).argmax(1)
    assert accuracy(masked, x, y) == 1


def test_a_distance_to_where_the_output_overflows_is_none() -> None:
    """One pixel, class 0 until the logits overflow at 0.7: no other class is ever named."""

    class Edge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = x[:, 0] - 2
            return torch.stack([torch.zeros_like(score), torch.where(x[:, 0] > 0.7, torch.nan, score)], 1)

    with pytest.raises(FloatingPointError, match="1 of 1 samples is NaN"):
        deepfool(Edge(), torch.tensor([[0.5]]))


def test_a_step_beyond_the_boundary_into_overflow_is_taken_back() -> None:
    """One pixel, class 1 from 0.6 on, and the logit of class 0 overflows at 0.7."""

    class Edge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = x[:, 0] - 0.6
            return torch.stack([torch.where(x[:, 0] > 0.7, torch.nan, 0 * score), score], 1)

    found = deepfool(Edge(), torch.tensor([[0.5]]), overshoot=5.0)
    assert float(found.distance) == pytest.approx(0.1, rel=1e-3)


def test_a_gradient_that_vanishes_in_rounding_leads_nowhere() -> None:
    """The boundary lies at 1e40, which float32 has no number for: nothing is found, and no point is infinite."""

    class Faint(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = 1e-40 * x[:, 0] - 1
            return torch.stack([torch.zeros_like(score), score], 1)

    found = deepfool(Faint(), torch.tensor([[0.5]]), steps=3)
    assert found.distance.isinf().all()
    assert torch.equal(found.x_adv, torch.tensor([[0.5]]))


def test_attacks_and_accuracy_take_only_images() -> None:
    model, x, y = case()
    with pytest.raises(TypeError, match=r"got torch\.int64: pass x\.byte\(\)"):
        accuracy(model, (x * 255).long(), y)
    with warnings.catch_warnings():
        assert accuracy(model, 3 * x - 7, y) <= 1  # clean accuracy has no box
