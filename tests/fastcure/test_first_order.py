"""The engine for models without second derivatives: right where the model is smooth, and it says so where it is not."""

import pytest
import torch
from networks import IN_FLOAT64, NETWORKS, Case, make, relative
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcure import CURE, curvature
from fastcure.engines.first_order import step_size
from fastcure.profiling.flops import FlopCounter

SMOOTH = [name for name, network in NETWORKS.items() if network.smooth]


def gradients(case: Case, engine: str, power: int = 2) -> list[Tensor]:
    case = case.copy()
    out = curvature(*case, 0.7, engine=engine, power=power)
    weights = torch.randn(2, len(case.x), generator=torch.Generator().manual_seed(0)).to(out.loss)
    (weights * torch.stack([out.loss, out.penalty])).sum().backward()
    return [p.grad for p in case.model.parameters()]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("power", [1, 2])
def test_gradients_on_smooth_networks(name: str, power: int) -> None:
    case = make(NETWORKS[name], 5, seed=0)
    truth = gradients(case, "reference", power)
    assert relative(gradients(case, "first_order", power), truth) < 1e-6
    assert relative(gradients(case.copy(torch.float32), "first_order", power), truth) < 1e-3


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("batch_stats", ["frozen", "split"])
def test_values_are_those_of_the_other_engines(name: str, power: int, batch_stats: str) -> None:
    case = make(NETWORKS[name], 5, seed=1)
    ours, theirs = (
        curvature(*case.copy(), power=power, batch_stats=batch_stats, engine=engine)
        for engine in ("first_order", "reference")
    )
    torch.testing.assert_close(ours, theirs)


def test_the_loss_alone_has_its_exact_gradient() -> None:
    case = make(NETWORKS["mlp-softplus"], 5, seed=2)
    grads = []
    for engine in ("first_order", "reference"):
        out = curvature(*case, engine=engine)
        grads.append(torch.autograd.grad(out.loss.sum(), list(case.model.parameters())))
    assert relative(*grads) < IN_FLOAT64


def test_retain_graph_serves_two_backwards() -> None:
    case = make(NETWORKS["mlp-softplus"], 5, seed=2)
    truth = gradients(case, "reference")
    weights = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double()
    out = curvature(*case, 0.7, engine="first_order")
    (weights[0] * out.loss).sum().backward(retain_graph=True)
    (weights[1] * out.penalty).sum().backward()
    assert relative([p.grad for p in case.model.parameters()], truth) < 1e-6


def test_the_cost_is_sixteen_forward_passes() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GELU()) for _ in range(8)], nn.Flatten())
    x, y = torch.rand(2, 16, 8, 8), torch.tensor([0, 1])
    with torch.no_grad(), FlopCounter() as forward:
        model(x)
    cure = CURE(model, engine="first_order")
    cure(x, y)  # looks for kinks
    with FlopCounter() as step:
        cure(x, y).total.backward()
    assert 15 * forward.total < step.total <= 16.5 * forward.total


def test_it_runs_where_there_is_no_double_backward() -> None:
    case = make(NETWORKS["attention"], 4, seed=0, dtype=torch.float32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        point = case.x.clone().requires_grad_()
        (g,) = torch.autograd.grad(case.model(point).sum(), point, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            g.sum().backward()
        ours = gradients(case, "first_order")
    truth = gradients(case.copy(torch.float64), "reference")  # under the MATH kernels
    assert relative(ours, truth) < 1e-3
    # The exact engines take the MATH kernels themselves.
    assert relative(gradients(case, "eager"), truth) < 1e-5


def test_the_step_balances_truncation_and_rounding() -> None:
    assert step_size(torch.float32) == pytest.approx(4.9e-3, rel=0.01)
    assert step_size(torch.float64) == pytest.approx(6.1e-6, rel=0.01)


def test_a_parameter_changed_before_the_backward_is_an_error() -> None:
    case = make(NETWORKS["mlp-softplus"], 5, seed=0)
    out = curvature(*case, engine="first_order")
    with torch.no_grad():
        case.model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place since the forward"):
        out.penalty.sum().backward()


def test_the_backward_runs_in_the_forwards_autocast() -> None:
    case = make(NETWORKS["mlp-softplus"], 5, seed=0, dtype=torch.float32)
    seen: list[torch.dtype] = []
    curvature(*case, engine="first_order")  # looks for kinks, in float64
    case.model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = CURE(case.model, engine="first_order")(case.x, case.y)
    out.total.backward()
    assert seen == [torch.bfloat16] * 6
