"""Gradients that are means of several passes, of models whose randomness is known."""

from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from fastcure.attacks import ATTACKS, autoattack, fgsm, margin_loss, pgd

N, SLOPE = 20_000, 0.5


class Blurred(nn.Module):
    """Two classes; the margin's gradient in each pixel is `SLOPE`, plus normal noise that is new in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        height = ((SLOPE + torch.randn_like(x)) * x).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(height), height], 1)


@pytest.mark.filterwarnings("ignore:the model is random")
@pytest.mark.parametrize("eot", [1, 4, 16])
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_signs_are_right_as_often_as_those_of_a_mean(attack: object, eot: int) -> None:
    """Of a mean of k normal numbers the sign is right with probability Phi(SLOPE sqrt(k))."""
    torch.manual_seed(0)
    x, y, model = torch.full((1, 1, 1, N), 0.5), torch.zeros(1).long(), Blurred()
    options = {"steps": 1, "step_size": 0.1, "random_start": False} if attack is pgd else {}
    adv = attack(model, x, y, 0.1, loss_fn=margin_loss, eot=eot, **options)  # type: ignore[operator]
    share, expected = float((adv > x).double().mean()), NormalDist().cdf(SLOPE * eot**0.5)
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / N) ** 0.5)


class Coin(nn.Module):
    """Class 0 has a bonus of 9 at tails, the first pass and every second one; it is lost, on average, where x > 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        height = 10 * (x.flatten(1)[:, 0] - 0.6)
        bonus = 9.0 * (self.passes % 2) - 4.5
        return torch.stack([torch.full_like(height, bonus), height], 1)


def test_starts_are_compared_by_the_mean_of_the_passes() -> None:
    torch.manual_seed(0)
    model, x, y = Coin(), torch.full((4, 1, 1, 1), 0.5), torch.zeros(4).long()
    adv = pgd(model, x, y, 0.2, steps=3, restarts=2, eot=6)
    assert model.passes == 2 * (3 * 6 + 6)  # of each start: gradients, and the judgement
    assert torch.allclose(adv, torch.tensor(0.7))


def test_without_it_a_random_model_is_warned_of_and_with_it_not() -> None:
    x, y, model = torch.full((2, 1, 1, 9), 0.5), torch.zeros(2).long(), Blurred()
    pgd(model, x, y, 0.1, steps=1, eot=2)
    with pytest.warns(UserWarning, match="attack the mean of 20 passes: eot=20"):
        pgd(model, x, y, 0.1, steps=1)


def test_autoattack_takes_the_authors_ensemble_for_random_models(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("pyautoattack")
    seen = {}

    def attack(self: object, x: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        seen.update(attacks=self.attacks_to_run, eot=self.apgd.eot_iter)  # type: ignore[attr-defined]
        return x, None

    monkeypatch.setattr(package.AutoAttack, "run_standard_evaluation", attack)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(25, 5)), torch.rand(2, 1, 5, 5), torch.zeros(2).long()
    autoattack(model, x, y, 0.1, eot=20)
    assert seen == {"attacks": ["apgd-ce", "apgd-dlr"], "eot": 20}


def test_every_attack_of_the_registry_takes_it() -> None:
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(25, 2)), torch.rand(2, 1, 5, 5), torch.zeros(2).long()
    for name in set(ATTACKS) - {"autoattack"}:
        adv = ATTACKS[name](model, x, y, eps=0.1, eot=2, generator=torch.Generator().manual_seed(0))
        assert float((adv - x).abs().max()) <= 0.1 + 1e-6, name


def test_bad_values_are_errors() -> None:
    x, y, model = torch.rand(2, 1, 1, 9), torch.zeros(2).long(), Blurred()
    with pytest.raises(ValueError, match="eot must be >= 1, got 0"):
        pgd(model, x, y, eot=0)
    with pytest.raises(ValueError, match="cuda_graph=True has no eot=2"):
        pgd(model, x, y, eot=2, cuda_graph=True)
