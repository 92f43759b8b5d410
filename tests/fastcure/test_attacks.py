"""Attacks: against plain loops, inside their ball and box, and leaving the model alone."""

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.accuracy import accuracy
from fastcure.attacks import fgsm, pgd


@pytest.fixture
def case() -> Case:
    case = make(NETWORKS["batch_norm-relu-max"], 8, seed=0)
    case.model.eval()
    return case


def loss(case: Case, x: Tensor) -> Tensor:
    return F.cross_entropy(case.model(x), case.y, reduction="none")


def plain_pgd(case: Case, eps: float, step_size: float, steps: int, norm: str) -> Tensor:
    adv = case.x.clone()
    for _ in range(steps):
        adv.requires_grad_()
        (g,) = torch.autograd.grad(loss(case, adv).sum(), adv)
        if norm == "linf":
            adv = adv.detach() + step_size * g.sign()
            adv = torch.maximum(torch.minimum(adv, case.x + eps), case.x - eps)
        else:
            adv = adv.detach() + step_size * F.normalize(g.flatten(1)).view_as(g)
            delta = (adv - case.x).flatten(1)
            adv = case.x + (delta * (eps / delta.norm(dim=1, keepdim=True)).clamp(max=1)).view_as(adv)
        adv = adv.clamp(0, 1)
    return adv


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.7)])
def test_equals_a_plain_loop(case: Case, norm: str, eps: float) -> None:
    ours = pgd(*case, eps=eps, step_size=eps / 3, steps=5, norm=norm, random_start=False)
    torch.testing.assert_close(ours, plain_pgd(case, eps, eps / 3, 5, norm))
    assert (loss(case, ours) > loss(case, case.x)).all()


def test_the_default_step_is_two_and_a_half_radii_over_the_steps(case: Case) -> None:
    ours = pgd(*case, eps=0.05, steps=5, random_start=False)
    torch.testing.assert_close(ours, plain_pgd(case, 0.05, 0.025, 5, "linf"))


def test_fgsm_is_one_full_step(case: Case) -> None:
    torch.testing.assert_close(fgsm(*case, eps=0.05), plain_pgd(case, 0.05, 0.05, 1, "linf"))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_stays_in_the_ball_and_the_box(case: Case, norm: str, per_sample: bool) -> None:
    eps = torch.linspace(0, 0.4, 8, dtype=torch.float64) if per_sample else 0.3
    adv = pgd(*case, eps=eps, norm=norm, bounds=(0.1, 0.8), generator=torch.Generator().manual_seed(1))
    inside = (case.x >= 0.1) & (case.x <= 0.8)  # the box may be further than eps from a pixel outside of it
    length = torch.where(inside, adv - case.x, 0.0).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
    assert (length <= torch.as_tensor(eps) + 1e-9).all()
    assert adv.min() >= 0.1
    assert adv.max() <= 0.8
    assert not adv.requires_grad


def test_restarts_keep_the_best_of_each_sample(case: Case) -> None:
    def attack(restarts: int) -> Tensor:
        return pgd(*case, eps=0.02, steps=2, restarts=restarts, generator=torch.Generator().manual_seed(3))

    one, many = attack(1), attack(6)

    def wrong(x: Tensor) -> Tensor:
        return case.model(x).argmax(1) != case.y

    assert (wrong(many) >= wrong(one)).all()
    same = wrong(many) == wrong(one)
    assert (loss(case, many)[same] >= loss(case, one)[same]).all()
    assert (loss(case, many) > loss(case, one)).any()


def test_a_generator_makes_it_repeatable(case: Case) -> None:
    first, again, other = (pgd(*case, eps=0.1, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_leaves_the_model_alone(case: Case) -> None:
    model = case.model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    in_training = pgd(*case, eps=0.1, random_start=False)
    assert all(m.training for m in model.modules())
    assert [p.grad is None for p in model.parameters()][1:] == [True] * (len(list(model.parameters())) - 1)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    model.eval()
    assert torch.equal(in_training, pgd(*case, eps=0.1, random_start=False))


def test_works_without_grad_and_on_a_frozen_model(case: Case) -> None:
    wanted = pgd(*case, eps=0.1, random_start=False)
    with torch.no_grad():
        assert torch.equal(pgd(*case, eps=0.1, random_start=False), wanted)
    case.model.requires_grad_(False)
    assert torch.equal(pgd(*case, eps=0.1, random_start=False), wanted)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_a_number_is_reported(case: Case, norm: str) -> None:
    nn.init.constant_(case.model[0].weight, torch.nan)
    with pytest.raises(FloatingPointError, match="gradient of 8 of 8 samples is NaN"):
        pgd(*case, norm=norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"eps": torch.ones(3)}, r"shape \(8,\), got shape \(3,\)"),
        ({"step_size": float("nan")}, "step_size must be >= 0, got nan"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"restarts": 0}, "restarts must be >= 1, got 0"),
        ({"restarts": 2, "random_start": False}, "would repeat one attack"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"bounds": (1.0, 0.0)}, "lower < upper"),
    ],
)
def test_bad_input_is_one_clear_error(case: Case, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd(*case, **options)


def test_accuracy_counts_right_answers_of_the_model_in_evaluation_mode() -> None:
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    x = torch.tensor([0, 10, 100, 200, 255], dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    y = torch.tensor([0, 0, 1, 1, 1])
    assert accuracy(Bright(), x, y, batch_size=2) == 0.8
    assert accuracy(Bright(), x / 255, y) == 0.8
    assert accuracy(Bright(), x, y, attack=lambda model, images, labels: 1 - images) == 0.2
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(Bright(), x[:0], y[:0])
