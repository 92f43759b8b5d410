"""DeepFool: exact on linear networks, against a plain loop on others, and honest about what it did not find."""

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn

from fastcure.attacks import deepfool

TOLERANCE = 1 / 4096  # of the halvings


@pytest.fixture
def linear() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)).double()
    x = torch.rand(40, 3, 2, 2, dtype=torch.float64)
    return Case(model, x, model(x).argmax(1))


@pytest.fixture
def network() -> Case:
    case = make(NETWORKS["batch_norm-gelu-average"], 12, seed=1)
    case.model.eval()
    return case._replace(y=case.model(case.x).argmax(1))


def nearest_boundary(case: Case) -> tuple[Tensor, Tensor]:
    """min_k |f_k| / ||w_k|| and w_k / ||w_k||, sample by sample."""
    weight, distances, normals = case.model[1].weight.detach(), [], []
    for x, y in zip(case.x, case.y, strict=True):
        f = case.model(x[None])[0].detach()
        found = [((f[y] - f[k]) / (weight[k] - weight[y]).norm(), weight[k] - weight[y]) for k in range(6) if k != y]
        distance, w = min(found, key=lambda pair: float(pair[0]))
        distances.append(distance)
        normals.append((w / w.norm()).view_as(x))
    return torch.stack(distances), torch.stack(normals)


@pytest.mark.parametrize("overshoot", [0.0, 0.02, 0.5])
def test_exact_on_a_linear_network(linear: Case, overshoot: float) -> None:
    distance, normal = nearest_boundary(linear)
    found = deepfool(linear.model, linear.x, overshoot=overshoot)
    # Without an overshoot a sample may stop on the boundary itself; then the shortest step takes it over.
    torch.testing.assert_close(found.distance, distance, rtol=2 * TOLERANCE, atol=1e-6)
    torch.testing.assert_close(found.normal, normal)
    torch.testing.assert_close(found.perturbation, distance.reshape(-1, 1, 1, 1) * normal, rtol=0, atol=1e-3)
    assert (linear.model(found.x_adv).argmax(1) != linear.y).all()
    torch.testing.assert_close(found.x_adv, linear.x + found.perturbation)
    torch.testing.assert_close(found.distance, found.perturbation.flatten(1).norm(dim=1))


def plain_deepfool(case: Case, i: int) -> Tensor:
    """The published algorithm on one sample: its total perturbation, overshoot included."""
    x, own, total = case.x[i : i + 1], case.y[i], torch.zeros_like(case.x[i : i + 1])
    for _ in range(50):
        point = (x + 1.02 * total).requires_grad_()
        f = case.model(point)[0]
        if f.argmax() != own:
            break
        (g0,) = torch.autograd.grad(f[own], point, retain_graph=True)
        best = None
        for k in range(len(f)):
            if k != own:
                w = torch.autograd.grad(f[k], point, retain_graph=True)[0] - g0
                length = float((f[own] - f[k]).detach() / w.norm())
                best = min(best or (length, w), (length, w), key=lambda pair: pair[0])
        total = total + best[0] * best[1] / best[1].norm()
    return 1.02 * total


def test_goes_where_the_published_algorithm_goes_and_no_further(network: Case) -> None:
    found = deepfool(network.model, network.x, network.y)
    plain = torch.cat([plain_deepfool(network, i) for i in range(12)])
    ours, theirs = found.perturbation.flatten(1), plain.flatten(1)
    assert (found.distance <= theirs.norm(dim=1) * (1 + 1e-9)).all()
    assert (torch.cosine_similarity(ours, theirs) > 1 - 1e-9).all()
    wrong = network.model(found.x_adv).argmax(1) != network.y
    just_before = network.x + (1 - 2 * TOLERANCE) * (found.x_adv - network.x)
    assert wrong.all()
    assert (network.model(just_before).argmax(1) == network.y).all()


def test_the_normal_is_the_gradient_of_the_two_classes_that_meet(network: Case) -> None:
    found = deepfool(network.model, network.x)
    point = found.x_adv.clone().requires_grad_()
    logits = network.model(point)
    rival = logits.argmax(1)
    difference = logits.gather(1, rival[:, None]) - logits.gather(1, network.y[:, None])
    (w,) = torch.autograd.grad(difference.sum(), point)
    torch.testing.assert_close(found.normal, nn.functional.normalize(w.flatten(1)).view_as(w))
    torch.testing.assert_close(found.normal.flatten(1).norm(dim=1), torch.ones(12, dtype=torch.float64))


def test_each_sample_is_on_its_own(network: Case) -> None:
    together = deepfool(network.model, network.x)
    for i in (0, 7):
        alone = deepfool(network.model, network.x[i : i + 1])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[i])


def test_a_sample_of_another_class_already_stays(linear: Case) -> None:
    y = linear.y.clone()
    y[::2] = (y[::2] + 1) % 6
    found = deepfool(linear.model, linear.x, y)
    assert (found.distance[::2] == 0).all()
    assert torch.equal(found.x_adv[::2], linear.x[::2])
    assert (found.distance[1::2] > 0).all()


def test_classes_limits_the_boundaries_that_are_tried(linear: Case) -> None:
    all_, two = deepfool(linear.model, linear.x), deepfool(linear.model, linear.x, classes=2)
    second = linear.model(linear.x).topk(2).indices[:, 1]
    assert (two.distance >= all_.distance * (1 - 2 * TOLERANCE)).all()
    assert (two.distance > 1.01 * all_.distance).any()
    assert (linear.model(deepfool(linear.model, linear.x, classes=2, overshoot=1e-9).x_adv).argmax(1) == second).any()


def test_stays_in_the_box(linear: Case) -> None:
    free, boxed = deepfool(linear.model, linear.x), deepfool(linear.model, linear.x, bounds=(0.0, 1.0))
    assert boxed.distance.isfinite().all()
    assert boxed.x_adv.min() >= 0
    assert boxed.x_adv.max() <= 1
    assert (linear.model(boxed.x_adv).argmax(1) != linear.y).all()
    assert (boxed.distance >= free.distance * (1 - 2 * TOLERANCE)).all()
    clipped = (free.x_adv.clamp(0, 1) != free.x_adv).flatten(1).any(1)
    assert clipped.any()
    torch.testing.assert_close(boxed.distance[~clipped], free.distance[~clipped])


def test_a_pixel_at_a_bound_leaves_the_way_to_the_others() -> None:
    """Two logits, score -4 a + 3 b - 2 of pixels a, b: from (0, 0.5) only b can go, to (0, 2/3)."""

    class Plane(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = -4 * x[:, 0] + 3 * x[:, 1] - 2
            return torch.stack([torch.zeros_like(score), score], 1)

    found = deepfool(Plane(), torch.tensor([[0.0, 0.5]]), bounds=(0.0, 1.0))
    torch.testing.assert_close(found.x_adv, torch.tensor([[0.0, 2 / 3]]), rtol=TOLERANCE, atol=1e-6)
    torch.testing.assert_close(found.normal, torch.tensor([[-0.8, 0.6]]))
    unreachable = deepfool(Plane(), torch.tensor([[0.0, 0.5]]), bounds=(0.0, 0.6))
    assert unreachable.distance.isinf().all()
    assert (unreachable.x_adv <= 0.6).all()


@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 3.0)])
def test_pixels_at_a_bound_move_inwards_alone(box: tuple[float, float]) -> None:
    """Two logits, score w.x - c; pixels at either bound, or in the middle, from where none reaches a bound."""
    generator = torch.Generator().manual_seed(0)
    lower, upper = box
    w = torch.randn(12, generator=generator, dtype=torch.float64)
    at = torch.randint(3, (40, 12), generator=generator)
    x = torch.tensor([lower, (lower + upper) / 2, upper], dtype=torch.float64)[at]
    blocked = ((at == 0) & (w < 0)) | ((at == 2) & (w > 0))
    free = torch.where(blocked, 0.0, w.expand(40, 12))
    gap = 0.2 * free.square().sum(1) / w.abs().max()  # no pixel moves by more than 0.2

    class Plane(nn.Module):
        def __init__(self, i: int) -> None:
            super().__init__()
            self.threshold = x[i] @ w + gap[i]

        def forward(self, points: Tensor) -> Tensor:
            score = points @ w - self.threshold
            return torch.stack([torch.zeros_like(score), score], 1)

    for i in range(40):
        found = deepfool(Plane(i), x[i : i + 1], steps=1, bounds=box)  # the network is linear: one step is enough
        torch.testing.assert_close(found.distance[0], gap[i] / free[i].norm(), rtol=2 * TOLERANCE, atol=0)
        assert (found.perturbation[0][blocked[i]] == 0).all()


def test_what_was_not_found_is_infinitely_far() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sum(1), x.sum(1) - 1], 1)

    found = deepfool(Constant(), torch.rand(3, 4), steps=4)
    assert found.distance.isinf().all()
    assert (found.normal == 0).all()
    assert found.x_adv.isfinite().all()


def test_leaves_the_model_alone_and_reports_what_is_not_a_number(network: Case) -> None:
    model = network.model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        deepfool(model, network.x)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(FloatingPointError, match="12 of 12 samples is NaN"):
        deepfool(model, network.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"overshoot": -1.0}, "overshoot must be >= 0, got -1.0"),
        ({"classes": 1}, "classes must be >= 2"),
        ({"bounds": (1.0, 1.0)}, "lower < upper"),
        ({"y": torch.zeros(3)}, "one label for each of the 40 samples"),
    ],
)
def test_bad_input_is_one_clear_error(linear: Case, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepfool(linear.model, linear.x, **options)


def test_a_network_of_one_output_has_no_boundary() -> None:
    with pytest.raises(ValueError, match="2 outputs or more, got 1"):
        deepfool(nn.Linear(4, 1), torch.rand(3, 4))
