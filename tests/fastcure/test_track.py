"""A row of `--track`, on a linear network, whose Hessian and worst perturbations can be written down."""

import pytest
import torch
from hessians import hessians
from networks import Case
from torch import nn

from fastcure.training.track import track_row


@pytest.fixture
def case() -> Case:
    """Two classes; grey images, so that a ball of 8/255 lies within the box."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    nn.init.normal_(model[1].weight)
    x = torch.randint(100, 156, (60, 1, 3, 4), dtype=torch.uint8)
    return Case(model, x, model(x / 255).argmax(1))


def test_a_row_is_what_the_definitions_give(case: Case) -> None:
    model, x, y = case
    y[:6] = 1 - y[:6]  # which makes these wrong from the beginning
    row = track_row(*case, epoch=3, seed=5, eps=8 / 255)
    assert list(row) == ["epoch", "images", "frobenius", "along_z", "clean", "eps", "pgd", "pgd_paper"]
    assert row["epoch"] == 3
    assert row["clean"] == 0.9
    H = hessians(Case(model, x.double() / 255, y))
    g = (model[1].weight[1] - model[1].weight[0]).detach().double()  # up to a positive factor and its sign
    along = (H @ (g.sign() / 12**0.5)).norm(dim=1).mean()
    assert row["along_z"] == pytest.approx(float(along), rel=1e-4)
    exact = float(torch.linalg.matrix_norm(H).mean())
    assert row["frobenius"] == pytest.approx(exact, rel=0.5)
    assert row["frobenius"] != pytest.approx(exact, rel=1e-3)  # 20 probes an image
    worst = x / 255 - 8 / 255 * (2 * y - 1)[:, None, None, None] * g.float().sign().view(1, 3, 4)
    left = (model(worst).argmax(1) == y).double().mean()
    assert 0 < left < 0.9
    assert row["pgd"] == pytest.approx(float(left))


def test_its_random_numbers_are_its_own_and_follow_the_seed(case: Case) -> None:
    state, flags = torch.get_rng_state(), [module.training for module in case.model.modules()]
    first, again, other = (track_row(*case, epoch=0, seed=seed, eps=0.01) for seed in (1, 1, 2))
    assert first == again
    assert first["frobenius"] != other["frobenius"]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in case.model.modules()] == flags
