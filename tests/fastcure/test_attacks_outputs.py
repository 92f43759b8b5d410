"""What all attacks promise of the outputs of a model: probabilities, noise, no gradient, no number."""

from functools import partial
from pathlib import Path

import pytest
import torch
from attack_runs import ATTACKS, USERS, Run, case, each, found_by_deepfool
from torch import Tensor, nn

from fastcure.attacks import deepfool, fgsm, pgd
from fastcure.evaluation.accuracy import accuracy, correct

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
    assert Path(seen[0].filename).parent == Path(__file__).parent  # the caller, be it one of attack_runs.py
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
    assert Path(seen[0].filename).parent == Path(__file__).parent  # the caller, be it one of attack_runs.py
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
