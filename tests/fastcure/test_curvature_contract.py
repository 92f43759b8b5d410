"""What `curvature` promises besides the right numbers: each way to a silent mistake is closed."""

import math

import pytest
import torch
from definitions import EXACT
from networks import NETWORKS, Case, cancellation, make, relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature
from fastcure.profiling.flops import FlopCounter


@pytest.fixture
def case() -> Case:
    return make(NETWORKS["batch_norm-relu-max"], 6, seed=0)


def flat_gradients(case: Case) -> list[Tensor]:
    return [p.grad for p in case.model.parameters()]


@pytest.mark.parametrize("engine", EXACT)
def test_a_training_forward_before_the_backward_changes_nothing(case: Case, engine: str) -> None:
    twin = case.copy()
    curvature(*twin, engine=engine).penalty.sum().backward()
    out = curvature(*case, engine=engine)
    case.model.train()
    case.model(torch.randn_like(case.x) * 5)  # overwrites the running statistics in place
    out.penalty.sum().backward()
    assert relative(flat_gradients(case), flat_gradients(twin)) == 0


def test_flags_buffers_and_gradients_come_back(case: Case) -> None:
    case.model[1].eval()
    case.model[0].weight.requires_grad_(False)
    case.model[0].weight.grad = torch.ones_like(case.model[0].weight)
    flags = [m.training for m in case.model.modules()]
    buffers = [b.clone() for b in case.model.buffers()]
    wanted = [p.requires_grad for p in case.model.parameters()]
    curvature(*case)
    assert [m.training for m in case.model.modules()] == flags
    assert [p.requires_grad for p in case.model.parameters()] == wanted
    assert all(torch.equal(a, b) for a, b in zip(case.model.buffers(), buffers, strict=True))
    assert [p.grad is None for p in case.model.parameters()] == [False] + [True] * (len(wanted) - 1)


def test_everything_comes_back_after_an_exception(case: Case) -> None:
    flags = [m.training for m in case.model.modules()]
    weight = case.model[0].weight

    def fails(logits: Tensor, y: Tensor) -> Tensor:
        raise KeyError("from the loss")

    with pytest.raises(KeyError, match="from the loss"):
        curvature(*case, loss_fn=fails)
    assert [m.training for m in case.model.modules()] == flags
    assert case.model[0].weight is weight


@pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")
@pytest.mark.parametrize("engine", EXACT)
def test_dropout_is_off_in_frozen_mode(engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = torch.rand(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    first, second = (curvature(model, x, y, engine=engine).penalty for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:batch_stats=.* leaves batch norms as their flags say")
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("batch_stats", ["frozen", "split", "train"])
def test_a_loss_with_a_mode_of_its_own(case: Case, engine: str, batch_stats: str) -> None:
    """Dropout inside a loss: off in the penalty's passes, on in the ordinary forward of "split", whose flags stand."""

    class DropsAll(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(1.0)

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.dropout(logits), y, reduction="none")

    loss_fn = DropsAll()
    case.model.eval()
    plain = curvature(*case, engine=engine, batch_stats=batch_stats)
    out = curvature(*case, engine=engine, batch_stats=batch_stats, loss_fn=loss_fn)
    torch.testing.assert_close(out.penalty, plain.penalty)
    assert out.penalty.min() > 0
    uniform = torch.full_like(plain.loss, math.log(plain.logits.shape[1]))
    torch.testing.assert_close(out.loss, uniform if batch_stats == "split" else plain.loss)
    assert loss_fn.training
    assert loss_fn.dropout.training


@pytest.mark.parametrize("batch_stats", ["frozen", "split", "train"])
def test_the_logits_are_detached(case: Case, batch_stats: str) -> None:
    out = curvature(*case, batch_stats=batch_stats)
    assert not out.logits.requires_grad
    assert out.loss.requires_grad


@pytest.mark.parametrize("engine", [*EXACT, "first_order"])
def test_a_direction_is_taken_as_a_constant(engine: str) -> None:
    case = make(NETWORKS["mlp-softplus"], 6, seed=0)
    twin, z = case.copy(), torch.rand_like(case.x)
    curvature(*twin, direction=z, engine=engine).penalty.sum().backward()
    z = z.clone().requires_grad_()
    curvature(*case, direction=z, engine=engine).penalty.sum().backward()
    assert z.grad is None
    assert relative(flat_gradients(case), flat_gradients(twin)) == 0


@pytest.mark.parametrize("batch_stats", ["frozen", "split", "train"])
def test_loss_and_penalty_may_go_backward_one_after_the_other(case: Case, batch_stats: str) -> None:
    twin = case.copy()
    out = curvature(*twin, batch_stats=batch_stats)
    (out.loss.mean() + 3 * out.penalty.mean()).backward()
    out = curvature(*case, batch_stats=batch_stats)
    out.loss.mean().backward(retain_graph=True)
    (3 * out.penalty.mean()).backward()
    limit = rounding(torch.float64, case.x.numel(), cancellation(case, out.penalty.detach()))
    assert relative(flat_gradients(case), flat_gradients(twin)) < limit


def test_the_gradient_of_the_loss_alone_does_not_pay_for_the_penalty() -> None:
    case = make(NETWORKS["resnet8"], 6, seed=0)
    with torch.no_grad(), FlopCounter() as forward:
        case.model(case.x)
    out = curvature(*case)
    with FlopCounter() as backward:
        out.loss.sum().backward()
    assert backward.total <= 2.05 * forward.total


def test_a_second_backward_needs_retain_graph(case: Case) -> None:
    out = curvature(*case)
    out.penalty.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        out.loss.sum().backward()


def test_the_inner_graph_is_freed_by_backward_not_by_the_caller(case: Case) -> None:
    out = curvature(*case)
    freed = out.penalty.grad_fn
    out.penalty.sum().backward()
    assert freed.state is None


@pytest.mark.parametrize("engine", EXACT)
def test_a_second_derivative_is_an_error(case: Case, engine: str) -> None:
    out = curvature(*case, engine=engine)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.penalty.sum(), list(case.model.parameters()), create_graph=True)


@pytest.mark.parametrize("engine", EXACT)
def test_power_one_has_gradient_zero_where_the_penalty_is_zero(engine: str) -> None:
    model = nn.Linear(4, 3).double()

    def linear(logits: Tensor, y: Tensor) -> Tensor:  # its gradient is the same everywhere
        return logits.gather(1, y[:, None]).squeeze(1)

    x, y = torch.rand(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    out = curvature(model, x, y, loss_fn=linear, power=1, engine=engine)
    assert torch.equal(out.penalty, torch.zeros(5).double())
    out.penalty.sum().backward()
    assert torch.equal(model.weight.grad, torch.zeros(3, 4).double())


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("power", [1, 2])
def test_a_zero_gradient_gives_a_zero_penalty(engine: str, power: int) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    nn.init.constant_(model[0].bias, -100.0)  # every unit is off
    x, y = torch.rand(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    out = curvature(model, x, y, power=power, engine=engine)
    assert torch.equal(out.penalty, torch.zeros(5).double())
    out.penalty.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("power", [1, 2])
def test_nan_is_not_hidden(case: Case, engine: str, power: int) -> None:
    x = case.x.clone()
    x[2, 0, 0, 0] = torch.nan
    penalty = curvature(case.model, x, case.y, engine=engine, power=power).penalty
    assert penalty.isnan().tolist() == [False, False, True, False, False, False]


def test_hooks_on_parameters_fire_once_with_the_whole_gradient(case: Case) -> None:
    seen = []
    weight = case.model[0].weight
    weight.register_hook(seen.append)
    out = curvature(*case)
    (out.loss + out.penalty).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)


def test_without_grad_nothing_is_kept(case: Case) -> None:
    wanted = curvature(*case)
    with torch.no_grad():
        out = curvature(*case)
    assert not out.penalty.requires_grad
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.penalty, wanted.penalty.detach())
