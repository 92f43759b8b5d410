"""Attacks: against plain loops, inside their ball and box, and leaving the model alone."""

from typing import Any

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure._functional import LossFn, cross_entropy
from fastcure.attacks import ATTACKS, fgsm, margin_loss, pgd, spsa
from fastcure.evaluation.accuracy import accuracy


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


def test_ten_steps_by_default(case: Case) -> None:
    passes: list[int] = []
    case.model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    pgd(*case)
    assert passes == [len(case.x)] * 10


def test_fgsm_is_one_full_step(case: Case) -> None:
    torch.testing.assert_close(fgsm(*case, eps=0.05), plain_pgd(case, 0.05, 0.05, 1, "linf"))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_stays_in_the_ball_and_the_box(case: Case, norm: str, per_sample: bool) -> None:
    case = case._replace(x=case.x.clamp(0.1, 0.8))
    eps = torch.linspace(0, 0.4, 8, dtype=torch.float64) if per_sample else 0.3
    adv = pgd(*case, eps=eps, norm=norm, bounds=(0.1, 0.8), generator=torch.Generator().manual_seed(1))
    length = (adv - case.x).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
    assert (length <= torch.as_tensor(eps) + 1e-9).all()
    assert adv.min() >= 0.1
    assert adv.max() <= 0.8
    assert not adv.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_model_sees_no_point_outside_the_box(case: Case, norm: str) -> None:
    seen: list[Tensor] = []
    case.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    pgd(case.model, 0.4 + 0.2 * case.x, case.y, eps=0.5, steps=3, norm=norm, restarts=2, bounds=(0.4, 0.6))
    assert len(seen) >= 8
    assert all(point.min() >= 0.4 and point.max() <= 0.6 for point in seen)


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


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss_fn", [margin_loss, lambda logits, y: 1e3 * F.cross_entropy(logits, y, reduction="none")])
def test_restarts_equal_the_best_of_single_runs(case: Case, loss_fn: LossFn, targeted: bool) -> None:
    options = {"eps": 0.02, "steps": 2, "loss_fn": loss_fn, "targeted": targeted}
    generator = torch.Generator().manual_seed(3)
    runs = [pgd(*case, **options, generator=generator) for _ in range(6)]
    ours = pgd(*case, **options, restarts=6, generator=torch.Generator().manual_seed(3))
    for i, label in enumerate(case.y):

        def rank(run: Tensor, i: int = i, label: Tensor = label) -> tuple[bool, float]:
            logits = case.model(run[i : i + 1]).detach()
            value = float(loss_fn(logits, label[None]))
            hit = bool(logits.argmax() == label)
            return (hit, -value) if targeted else (not hit, value)

        assert torch.equal(ours[i], max(runs, key=rank)[i])


def test_a_misclassified_sample_comes_before_any_loss() -> None:
    """Success with the lowest possible loss, against failures with a higher one: both signs, and large."""

    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0] - 0.5], 1)

    def misleading(logits: Tensor, y: Tensor) -> Tensor:
        return -1e6 - 100 * logits[:, 1]  # highest where the sample is right

    x, y = torch.full((20, 1), 0.5), torch.zeros(20, dtype=torch.int64)
    adv = pgd(Steps(), x, y, 0.4, 1e-4, 1, restarts=8, loss_fn=misleading, generator=torch.Generator().manual_seed(0))
    assert (adv > 0.5).all()


def test_a_loss_that_is_not_a_number_in_one_restart_is_reported() -> None:
    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.cat([2 * x, 2 - 2 * x], 1)
            # The gradient is fine everywhere; the loss of the final points is NaN beyond 0.7.
            return torch.where(x > 0.7, torch.nan, logits) if not torch.is_grad_enabled() else logits

    x, y = torch.full((4, 1), 0.5), torch.ones(4, dtype=torch.int64)
    pgd(Fragile(), x, y, 0.1, restarts=5)
    with pytest.raises(FloatingPointError, match="the loss or its gradient of 4 of 4 samples is NaN"):
        pgd(Fragile(), x, y, 0.3, restarts=5)


def test_a_gradient_that_is_not_a_number_in_one_restart_is_reported() -> None:
    class NaNAtFirst(nn.Module):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return torch.cat([x, 1 - x], 1) * (torch.nan if self.passes == 1 else 1.0)

    x, y = torch.full((4, 1), 0.5), torch.ones(4, dtype=torch.int64)
    with pytest.raises(FloatingPointError, match="the loss or its gradient of 4 of 4 samples is NaN"):
        pgd(NaNAtFirst(), x, y, 0.1, steps=1, restarts=3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_descends_to_the_wanted_class(case: Case, norm: str) -> None:
    target = (case.model(case.x).argmax(1) + 1) % 7
    goal = case._replace(y=target)
    eps = 0.3 if norm == "linf" else 5.0
    adv = pgd(*goal, eps=eps, steps=20, norm=norm, targeted=True, random_start=False)
    assert (loss(goal, adv) < loss(goal, case.x)).all()
    assert (case.model(adv).argmax(1) == target).double().mean() > 0.5
    step = fgsm(*goal, eps=0.01, targeted=True)
    flipped = 2 * case.x - fgsm(*goal, eps=0.01, bounds=(-9, 9))
    torch.testing.assert_close(step, flipped.clamp(0, 1))


def test_the_margin_loss_is_the_best_wrong_logit_less_the_right_one() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [-1e4, 0.0, -2e4]])
    y = torch.tensor([1, 2, 0])
    assert margin_loss(logits, y).tolist() == [-2.0, 2.0, 1e4]
    soft = torch.tensor([[0.1, 0.8, 0.1], [0.0, 0.4, 0.6], [0.5, 0.3, 0.2]])
    assert margin_loss(logits, soft).tolist() == [-2.0, 2.0, 1e4]
    (g,) = torch.autograd.grad(margin_loss(logits.requires_grad_(), y).sum(), logits)
    assert g.tolist() == [[0, -1, 1], [0, 1, -1], [-1, 1, 0]]
    with pytest.raises(ValueError, match="C >= 2"):
        margin_loss(logits[:, :1], y)
    with pytest.raises(ValueError, match="one label for each of the 3 samples"):
        margin_loss(logits, y[:2])


def test_a_sure_network_is_attacked_through_its_margin(case: Case) -> None:
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e6 * case.model(x)

    y = case.model(case.x).argmax(1)

    def left(loss_fn: LossFn) -> float:
        adv = pgd(Sure(), case.x, y, 0.1, loss_fn=loss_fn, random_start=False)
        return float((case.model(adv).argmax(1) == y).double().mean())

    assert left(margin_loss) < 0.5
    assert left(cross_entropy) == 1.0


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
        ({"eps": torch.ones(3)}, r"^eps .*shape \(8,\), got shape \(3,\)"),
        ({"step_size": torch.ones(3)}, r"^step_size .*shape \(8,\), got shape \(3,\)"),
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

    x = torch.tensor([0, 10, 100, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    y = torch.tensor([0, 0, 1, 1, 1])
    assert accuracy(Bright(), x, y, batch_size=2) == 0.8
    assert accuracy(Bright(), x / 255, y) == 0.8
    assert accuracy(Bright(), x, y, attack=lambda model, images, labels: 1 - images) == 0.2
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(Bright(), x[:0], y[:0])


def test_accuracy_counts_outputs_that_name_no_class() -> None:
    class BlindInTheDark(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1, keepdim=True)
            return torch.cat([0.5 - mean, mean - 0.5], 1).masked_fill(mean < 0.1, torch.nan)

    x = torch.tensor([0, 10, 100, 20, 255], dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 2)
    with pytest.raises(FloatingPointError, match="the outputs of 3 of 5 images are NaN or infinite"):
        accuracy(BlindInTheDark(), x, torch.zeros(5, dtype=torch.int64), batch_size=2)


def test_accuracy_gives_each_batch_a_generator_that_follows_the_seed() -> None:
    def seeds(seed: int) -> list[int]:
        seen: list[int] = []

        def attack(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(generator.initial_seed())
            return x

        model, labels = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(5, dtype=torch.int64)
        accuracy(model, torch.rand(5, 1, 2, 2), labels, attack, batch_size=2, seed=seed)
        return seen

    assert len(set(seeds(1) + seeds(2))) == 6
    assert seeds(1) == seeds(1)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "spsa"])
def test_the_attacks_by_name_are_the_functions(case: Case, name: str) -> None:
    function = {"fgsm": fgsm, "pgd": pgd, "spsa": spsa}[name]

    def seeded(**options: Any) -> dict[str, Any]:
        return options | ({} if name == "fgsm" else {"generator": torch.Generator().manual_seed(3)})

    x, y, generator = case.x[:2], case.y[:2], torch.Generator().manual_seed(3)
    expected = function(case.model, x, y, 0.05, **seeded())
    assert torch.equal(ATTACKS[name](case.model, x, y, 0.05, eot=1, generator=generator), expected)
    assert not torch.equal(expected, x)
