"""The penalty of networks whose batch norms are in training mode."""

import copy

import pytest
import torch
from networks import NETWORKS, Case, Checkpointed, cancellation, make, relative, rounding
from torch import Tensor, nn
from torch.autograd import grad

from fastcure import CURE, curvature


def test_one_value_a_channel_is_refused_as_by_torch() -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 1, seed=0)
    case.model.train()
    before = [buffer.clone() for buffer in case.model.buffers()]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        curvature(case.model, case.x[..., :1, :1], case.y, batch_stats="train")
    assert all(map(torch.equal, before, case.model.buffers()))


class Watched(nn.Module):
    """A network with dropout, a norm in evaluation mode and one in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.LazyLinear(5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.fixture
def watched() -> tuple[nn.Module, Tensor, Tensor]:
    """With inputs."""
    torch.manual_seed(0)
    model, x = Watched().double(), torch.rand(6, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    model.train()
    model.body[5].eval()
    return model, x, torch.arange(6) % 5


@pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")
@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_norms_do_what_their_flags_say_and_move_once(watched: tuple, engine: str) -> None:
    model, x, y = watched
    twin = copy.deepcopy(model)
    twin.body[3].eval()
    loss = torch.nn.functional.cross_entropy(twin(x), y, reduction="none")
    flags = [module.training for module in model.modules()]
    out = curvature(model, x, y, batch_stats="train", engine=engine)
    assert flags == [module.training for module in model.modules()]
    torch.testing.assert_close(out.loss, loss)
    for ours, once in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, once, rtol=rounding(torch.float64, x.numel()), atol=0)
    assert not torch.allclose(out.penalty, curvature(model, x, y).penalty)


def test_a_failing_pass_moves_nothing(watched: tuple) -> None:
    model, x, y = watched
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ZeroDivisionError):
        curvature(model, x, y, batch_stats="train", loss_fn=lambda logits, y: 1 / 0)
    assert all(map(torch.equal, before, model.buffers()))


def test_a_training_forward_in_between_changes_no_gradient(watched: tuple) -> None:
    model, x, y = watched
    model.body[3].eval()
    parameters = list(model.parameters())
    out = curvature(model, x, y, batch_stats="train")
    truth = grad(out.penalty.sum(), parameters)
    out = curvature(model, x, y, batch_stats="train")
    model(x + 1)
    for ours, theirs in zip(grad(out.penalty.sum(), parameters), truth, strict=True):
        assert relative(ours, theirs) < rounding(torch.float64, x.numel())


def test_the_estimate_says_so(watched: tuple) -> None:
    able = "among 'auto', 'eager', 'compile', 'cuda_graph', 'reference', got 'first_order'"
    with pytest.raises(ValueError, match=able):
        curvature(*watched, batch_stats="train", engine="first_order")


def test_synchronised_norms_have_no_double_backward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ValueError, match=r"the SyncBatchNorm 1: keep nn\.BatchNorm"):
        curvature(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), batch_stats="train")


def test_a_batch_cannot_be_divided(watched: tuple) -> None:
    model, x, y = watched
    with pytest.raises(ValueError, match="microbatch must be None with batch_stats='train', got 2"):
        CURE(model, batch_stats="train", microbatch=2)
    cure = CURE(model, batch_stats="train")
    cure.microbatch = 2
    with pytest.raises(ValueError, match="microbatch must be None"):
        cure(x, y)


def test_mixed_dtypes_take_the_library_s_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3))
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    z = torch.randn_like(x) / 192**0.5
    truth = curvature(model, x, y, batch_stats="train", direction=z)
    with torch.autocast("cpu", torch.bfloat16):
        out = curvature(model, x, y, batch_stats="train", direction=z)
    limit = rounding(torch.bfloat16, 1, cancellation(Case(model, x, y), truth.penalty))
    assert relative(out.penalty, truth.penalty) < limit
    parameters = list(model.parameters())
    ours, wide = (grad((o.loss + o.penalty).sum(), parameters) for o in (out, truth))
    assert relative(ours, wide) < 2 * limit


@pytest.mark.parametrize("of", ["loss", "penalty"])
def test_activation_checkpointing_is_an_error(of: str) -> None:
    body = Checkpointed(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)))  # ends in its norm
    model = nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(48, 5))
    out = curvature(model, torch.rand(6, 3, 4, 4), torch.arange(6) % 5, batch_stats="train")
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        getattr(out, of).sum().backward()


class Remembering(nn.Module):
    """A network with buffers that a forward makes, and changes the shape of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(64, 5)
        self.register_buffer("grid", None)
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        if self.grid is None:
            self.grid = torch.ones(4, 4)
        self.last = h.detach().mean((1, 2, 3))
        return self.fc((h * self.grid).tanh().flatten(1))


def test_buffers_of_other_modules_are_none_of_its_business() -> None:
    model = Remembering()
    for step in (1, 2):
        curvature(model, torch.rand(6, 3, 4, 4), torch.arange(6) % 5, batch_stats="train")
        assert int(model.norm.num_batches_tracked) == step
    assert model.last.shape == (1,)


class NormedLoss(nn.Module):
    """A loss with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.norm(logits), y, reduction="none")


def test_norms_of_one_name_in_model_and_loss_both_move() -> None:
    model, loss_fn = Remembering(), NormedLoss()
    curvature(model, torch.rand(6, 3, 4, 4), torch.arange(6) % 5, loss_fn=loss_fn, batch_stats="train")
    assert int(model.norm.num_batches_tracked) == int(loss_fn.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_norms_of_the_loss_do_so_as_well(engine: str) -> None:
    model, loss_fn = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), NormedLoss()
    x, y = torch.rand(6, 3, 4, 4), torch.arange(6) % 5
    expected = copy.deepcopy(loss_fn)(model(x), y)
    torch.testing.assert_close(
        curvature(model, x, y, loss_fn=loss_fn, batch_stats="train", engine=engine).loss, expected
    )
    assert int(loss_fn.norm.num_batches_tracked) == 1
