"""SPSA: it sees outputs only, finds on a linear network what the gradient would, and stays in its ball."""

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn

from fastcure.attacks import margin_loss, spsa


@pytest.fixture
def case() -> Case:
    case = make(NETWORKS["batch_norm-relu-max"], 8, seed=0)
    case.model.eval()
    return case._replace(y=case.model(case.x).argmax(1))


class Linear(nn.Module):
    """Class 1 wins where the sum of the weighted pixels exceeds `threshold`."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("weight", torch.tensor([3.0, -2.0, 1.0, -4.0]))

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) * self.weight).sum(1) - self.threshold
        return torch.stack([torch.zeros_like(score), score], 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_goes_to_the_corner_of_the_ball_on_a_linear_network() -> None:
    model, x, y = Linear(5.0), torch.full((5, 1, 2, 2), 0.5), torch.zeros(5, dtype=torch.int64)
    adv = spsa(model, x, y, 0.1, samples=64, generator=generator())
    corner = x + 0.1 * model.weight.sign().view(1, 2, 2)
    torch.testing.assert_close(adv, corner)
    flipped = spsa(model, x, y, 0.1, samples=64, bounds=(0.45, 0.55), generator=generator())
    torch.testing.assert_close(flipped, x + 0.05 * model.weight.sign().view(1, 2, 2))


def test_the_estimate_is_the_mean_of_two_sided_differences_along_signs() -> None:
    """One step from x: all 16 sign vectors of 4 pixels, drawn often, give the gradient; its sign is the step."""
    model, x, y = Linear(5.0), torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    adv = spsa(model, x, y, 0.1, steps=1, samples=512, step_size=0.03, generator=generator())
    torch.testing.assert_close(adv, x + 0.03 * model.weight.sign())


def test_the_points_compared_are_a_hundredth_away_by_default() -> None:
    model, x, y = Linear(5.0), torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    spsa(model, x, y, 0.1, steps=1, samples=4)
    for points in seen[1:]:  # the first pass asks which samples are misclassified already
        torch.testing.assert_close((points - 0.5).abs(), torch.full_like(points, 0.01))


@pytest.mark.parametrize("chunk_size", [2, 5, 64])
def test_no_pass_holds_more_images_than_the_chunk_size(chunk_size: int) -> None:
    model, x, y = Linear(5.0), torch.full((7, 4), 0.5), torch.zeros(7, dtype=torch.int64)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    spsa(model, x, y, 0.1, steps=1, samples=4, chunk_size=chunk_size)
    assert max(seen) <= chunk_size
    assert sum(seen) == 7 * (1 + 2 * 4)


def test_a_sample_stops_where_it_is_first_misclassified() -> None:
    model, x, y = Linear(-0.7), torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)  # score 0.3 - 1 at x
    x[0], x[1] = torch.tensor([0.9, 0.1, 0.9, 0.1]), torch.tensor([0.2, 0.5, 0.5, 0.5])
    adv = spsa(model, x, y, 0.3, steps=20, samples=64, step_size=0.02, generator=generator())
    assert torch.equal(adv[0], x[0])  # wrong from the beginning
    step = 0.02 * model.weight.sign()
    torch.testing.assert_close((adv[1] - x[1]) / step, ((adv[1] - x[1]) / step).round())
    before = margin_loss(model(adv - step), y)
    assert (margin_loss(model(adv), y) > 0).all()
    assert (before[1:2] <= 0).all()


def test_uses_no_gradient_and_sees_through_rounding(case: Case) -> None:
    class Rounded(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return case.model((20 * x).round() / 20)

    model = Rounded()
    y = model(case.x).argmax(1)
    adv = spsa(model, case.x, y, 0.1, samples=64, delta=0.05, generator=generator())
    assert (model(adv).argmax(1) != y).any()
    assert not adv.requires_grad


@pytest.mark.parametrize("per_sample", [False, True])
def test_stays_in_the_ball_and_the_box(case: Case, per_sample: bool) -> None:
    case = case._replace(x=case.x.clamp(max=0.9))
    eps = torch.linspace(0, 0.3, 8, dtype=torch.float64) if per_sample else 0.3
    adv = spsa(*case, eps=eps, steps=5, samples=8, bounds=(0.0, 0.9), generator=generator())
    length = (adv - case.x).abs().flatten(1).amax(1)
    assert (length <= torch.as_tensor(eps) + 1e-9).all()
    assert adv.min() >= 0
    moved = adv != case.x
    assert adv[moved].max() <= 0.9
    assert moved.any()


def test_chunks_bound_the_batch_and_change_nothing_else(case: Case) -> None:
    sizes: list[int] = []
    hook = case.model.register_forward_hook(lambda model, inputs, output: sizes.append(len(inputs[0])))
    first = spsa(*case, eps=0.1, steps=3, samples=6, generator=generator())
    assert max(sizes) == 2 * 6 * 8
    sizes.clear()
    chunked = spsa(*case, eps=0.1, steps=3, samples=6, chunk_size=10, generator=generator())
    assert max(sizes) == 10
    hook.remove()
    torch.testing.assert_close(first, chunked)
    assert not torch.equal(first, spsa(*case, eps=0.1, steps=3, samples=6, generator=generator(1)))


def test_probabilities_stand_for_their_largest_class(case: Case) -> None:
    soft = nn.functional.one_hot(case.y, 7).double() * 0.5 + 0.05
    hard, same = (spsa(case.model, case.x, y, 0.1, steps=2, samples=4, generator=generator()) for y in (case.y, soft))
    assert torch.equal(hard, same)


def test_an_output_that_is_not_a_number_is_reported(case: Case) -> None:
    nn.init.constant_(case.model[0].weight, torch.nan)
    with pytest.raises(FloatingPointError, match="8 of 8 samples is NaN"):
        spsa(*case)


def test_an_estimate_that_was_once_not_a_number_is_reported() -> None:
    class NaNOnce(Linear):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1  # the first asks for the loss, the second for an estimate
            return super().forward(x.nan_to_num(0.5)) * (torch.nan if self.passes == 2 else 1.0)

    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(FloatingPointError, match="3 of 3 samples is NaN"):
        spsa(NaNOnce(5.0), x, y, 0.1, steps=3, samples=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"step_size": -0.1}, "step_size must be >= 0, got -0.1"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
        ({"delta": 0.0}, "delta must be > 0, got 0.0"),
        ({"chunk_size": 1}, "chunk_size must be >= 2"),
        ({"bounds": (1.0, 0.0)}, "bounds must be .* lower < upper"),
    ],
)
def test_bad_input_is_one_clear_error(case: Case, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        spsa(*case, **options)


def test_no_images_are_no_error(case: Case) -> None:
    assert spsa(case.model, case.x[:0], case.y[:0]).shape == (0, 3, 11, 9)
