"""Loss surfaces: the values of the plane they claim to show."""

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.analysis import loss_surface


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_the_negative_loss_of_the_plane(dtype: torch.dtype) -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 3, seed=0, dtype=dtype)
    normal = torch.randn_like(case.x) * 7
    found = loss_surface(*case, normal=normal, span=1.5, points=5, generator=seeded())
    torch.testing.assert_close(found.a, torch.linspace(-1.5, 1.5, 5, dtype=dtype))
    assert torch.equal(found.a, found.b)
    assert found.values.shape == (3, 5, 5)
    assert found.directions.shape == (3, 2, *case.x.shape[1:])

    axes = found.directions.flatten(2)
    tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps}
    torch.testing.assert_close(axes @ axes.mT, torch.eye(2, dtype=dtype).expand(3, 2, 2), **tolerance)
    torch.testing.assert_close(axes[:, 0], F.normalize(normal.flatten(1)), **tolerance)

    model = case.model.eval()
    for i, j in ((0, 0), (1, 3), (2, 2), (4, 1)):
        at = case.x + found.a[i] * found.directions[:, 0] + found.b[j] * found.directions[:, 1]
        wanted = -F.cross_entropy(model(at), case.y, reduction="none").detach()
        torch.testing.assert_close(found.values[:, i, j], wanted, rtol=1e-5, atol=1e-6)
    original = -F.cross_entropy(model(case.x), case.y, reduction="none").detach()
    torch.testing.assert_close(found.values[:, 2, 2], original)


def test_the_random_direction_follows_the_generator() -> None:
    case = make(NETWORKS["mlp-softplus"], 2, seed=0)
    normal = torch.randn_like(case.x)
    first, again, other = (loss_surface(*case, normal=normal, points=3, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.values, again.values)
    assert not torch.isclose(first.directions[:, 1], other.directions[:, 1]).any()
    assert torch.equal(first.directions[:, 0], other.directions[:, 0])


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_change_nothing_and_bound_the_batch(chunk_size: int) -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 3, seed=0)
    normal = torch.randn_like(case.x)
    wanted = loss_surface(*case, normal=normal, points=5, generator=seeded())
    largest = []
    case.model.register_forward_pre_hook(lambda _, inputs: largest.append(len(inputs[0])))
    found = loss_surface(*case, normal=normal, points=5, generator=seeded(), chunk_size=chunk_size)
    torch.testing.assert_close(found, wanted)
    assert max(largest) == min(chunk_size, 75)


def test_without_a_normal_deepfool_gives_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 2).double(), torch.rand(3, 6).double()
    y = model(x).argmax(1)
    found = loss_surface(model, x, y, points=3, generator=seeded())
    across = F.normalize(model.weight[1] - model.weight[0], dim=0).detach()
    wanted = torch.where(y[:, None] == 0, across, -across)
    torch.testing.assert_close(found.directions[:, 0], wanted, rtol=1e-6, atol=1e-6)
    assert bool((found.values[:, 2, 1] < found.values[:, 0, 1]).all())  # -l falls towards the boundary


def call(**changes: object) -> Tensor:
    case = Case(nn.Linear(6, 3), torch.rand(2, 6), torch.tensor([0, 1]))
    return loss_surface(*case, **{"normal": torch.ones(2, 6), "points": 3, **changes}).values  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": 4}, "points must be odd, so that x is one of them, and >= 3, got 4"),
        ({"points": 1}, "got 1"),
        ({"span": 0.0}, "span must be > 0, got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
        ({"normal": torch.ones(2, 5)}, r"shape of x \(2, 6\), got \(2, 5\)"),
        ({"normal": torch.tensor([1.0, 0.0])[:, None].expand(2, 6)}, "one of length 0.0 for sample 1"),
        ({"normal": torch.full((2, 6), torch.nan)}, "one of length nan for sample 0"),
    ],
)
def test_bad_input_is_one_clear_error(changes: dict[str, object], message: str) -> None:
    assert call().shape == (2, 3, 3)
    with pytest.raises(ValueError, match=message):
        call(**changes)
