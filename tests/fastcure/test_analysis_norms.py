"""Norms of the input Hessian against the Hessian by first principles, and the standard error against the spread."""

from functools import partial

import pytest
import torch
from hessians import hessians, quadratic
from networks import IN_FLOAT64, NETWORKS, Case, make, relative
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcure import curvature, reference
from fastcure.analysis import curvature_along_gradient, frobenius_norm
from fastcure.models import resnet8, resnet18
from fastcure.profiling.flops import FlopCounter

smooth_networks = pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.smooth])
methods = pytest.mark.parametrize("options", [{}, {"method": "finite", "h": 1e-3}], ids=["exact", "finite"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@smooth_networks
@methods
def test_frobenius_norms_within_four_standard_errors(name: str, options: dict) -> None:
    case = make(NETWORKS[name], 4, seed=0)
    truth = hessians(case).flatten(1).norm(dim=1)
    found = frobenius_norm(*case, generator=seeded(), **options)
    assert float(((found.value - truth) / found.standard_error).abs().max()) < 4
    assert float((found.standard_error / truth).max()) < 0.2


def test_the_standard_error_of_two_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel, H = 2, probes 1 and 3: ||H v||^2 is 4 and 36, of mean 20 and standard deviation 16 sqrt(2)."""
    form = quadratic(torch.tensor([2.0]))
    probes = iter([1.0, 3.0])
    monkeypatch.setattr(torch, "randn", lambda *_, **options: torch.tensor([next(probes)], dtype=options["dtype"]))
    found = frobenius_norm(*form.case(1), probes=2, loss_fn=form.loss)
    assert float(found.value) == pytest.approx(20**0.5)
    assert float(found.standard_error) == pytest.approx(16 * 2**0.5 / 2**0.5 / (2 * 20**0.5))


@methods
def test_the_standard_error_is_the_spread_of_independent_estimates(options: dict) -> None:
    case = make(NETWORKS["mlp-softplus"], 1, seed=0)
    truth = hessians(case).norm()
    many = Case(case.model, case.x.expand(400, -1), case.y.expand(400))
    found = frobenius_norm(*many, generator=seeded(), **options)
    spread = found.value.std()
    assert abs(float(found.standard_error.mean() / spread) - 1) < 0.15  # 400 estimates: the spread is right to 4 %
    assert abs(float(found.value.mean() - truth)) < 4 * float(spread) / 20 + 0.01 * float(spread)
    assert float(((found.value - truth).abs() < 2 * found.standard_error).double().mean()) > 0.9


@smooth_networks
def test_curvature_along_the_gradients_sign(name: str) -> None:
    case = make(NETWORKS[name], 4, seed=0)
    model = case.copy().model.eval()
    point = case.x.clone().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(point), case.y, reduction="sum"), point)
    z = reference.unit_sign(g).flatten(1)
    truth = (hessians(case) @ z[..., None]).squeeze(2).norm(dim=1)
    assert relative(curvature_along_gradient(*case).value, truth) < 1e-10
    assert relative(curvature_along_gradient(*case, method="finite", h=1e-3).value, truth) < 1e-3
    assert relative(curvature_along_gradient(*case.copy(torch.float32)).value, truth) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_the_finite_one_is_the_penalty(name: str) -> None:
    case = make(NETWORKS[name], 4, seed=1)
    h = torch.tensor([0.3, 0.6, 1.2, 2.4])
    found = curvature_along_gradient(*case, method="finite", h=h)
    torch.testing.assert_close(found.value, curvature(*case, h=h, power=1).penalty.detach() / h.double())


def test_a_quadratic_agrees_to_rounding() -> None:
    made = quadratic(torch.linspace(-2, 5, 30))
    case = made.case(3)
    z = reference.unit_sign(case.x @ made.A + made.b)
    truth = (z @ made.A).norm(dim=1)
    exact, finite = {"loss_fn": made.loss}, {"loss_fn": made.loss, "method": "finite", "h": 0.7}
    for options in (exact, finite):
        torch.testing.assert_close(curvature_along_gradient(*case, **options).value, truth, rtol=IN_FLOAT64, atol=0)
    one, other = (frobenius_norm(*case, generator=seeded(), **options) for options in (exact, finite))
    torch.testing.assert_close(one, other, rtol=IN_FLOAT64, atol=0)
    assert float(((one.value - made.A.norm()) / one.standard_error).abs().max()) < 4


def test_an_isotropic_quadratic_has_the_estimate_of_the_chi_distribution() -> None:
    made = quadratic(torch.full((50,), 3.0))
    found = frobenius_norm(*made.case(4), probes=2000, generator=seeded(), loss_fn=made.loss)
    # ||3 v||^2 = 9 chi^2_50, with mean 450 and variance 8100
    torch.testing.assert_close(found.value, torch.full((4,), 450.0**0.5).double(), rtol=0.02, atol=0)
    wanted = 90 / 2000**0.5 / (2 * 450**0.5)
    torch.testing.assert_close(found.standard_error, torch.full((4,), wanted).double(), rtol=0.1, atol=0)


@methods
def test_probes_follow_the_generator_and_differ_between_samples(options: dict) -> None:
    case = make(NETWORKS["mlp-softplus"], 1, seed=0)
    twice = Case(case.model, case.x.expand(2, -1), case.y.expand(2))
    first, again, other = (frobenius_norm(*twice, probes=10, generator=seeded(s), **options) for s in (0, 0, 1))
    assert torch.equal(first.value, again.value)
    assert not torch.isclose(first.value, other.value).any()
    assert not torch.isclose(first.value[0], first.value[1])
    torch.manual_seed(3)
    by_default = frobenius_norm(*twice, probes=10, **options)
    torch.manual_seed(3)
    assert torch.equal(by_default.value, frobenius_norm(*twice, probes=10, **options).value)


def dead() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    nn.init.constant_(model[0].bias, -100.0)  # every unit is off
    return model


@methods
def test_zero_where_the_gradient_is_zero(options: dict) -> None:
    x, y = torch.rand(3, 4), torch.tensor([0, 1, 2])
    zeros = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(curvature_along_gradient(dead(), x, y, **options).value, zeros)
    found = frobenius_norm(dead(), x, y, **options)
    assert torch.equal(found.value, zeros)
    assert torch.equal(found.standard_error, zeros)


def flops(run: object) -> int:
    with FlopCounter() as counter:
        run()  # type: ignore[operator]
    return counter.total


@methods
@pytest.mark.parametrize(("network", "probes", "chunk_size"), [(resnet18, 10, 2), (resnet8, 40, 256), (resnet8, 39, 1)])
def test_the_cost_is_at_most_a_fifth_above_two_passes_a_probe(
    options: dict, network: object, probes: int, chunk_size: int
) -> None:
    model, x, y = network(), torch.rand(2, 3, 16, 16), torch.tensor([0, 1])  # type: ignore[operator]
    with torch.no_grad():
        forward = flops(lambda: model(x))
    spent = flops(lambda: frobenius_norm(model, x, y, probes=probes, chunk_size=chunk_size, **options))
    assert 2 * probes * forward < spent <= 1.2 * 2 * probes * forward
    if chunk_size <= len(x):  # one graph of g(x), or one g(x), for all the probes
        assert spent <= (2 * probes + 2.01) * forward
    assert flops(partial(curvature_along_gradient, model, x, y, **options)) <= 4.01 * forward


def test_attention_is_differentiated_twice() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.into(x)[:, None].chunk(3, -1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))

    torch.manual_seed(0)
    case = Case(Attention().double(), torch.rand(2, 5, 4).double(), torch.tensor([0, 2]))
    with sdpa_kernel(SDPBackend.MATH):
        truth = hessians(case).flatten(1).norm(dim=1)
    found = frobenius_norm(*case, generator=seeded())
    assert float(((found.value - truth) / found.standard_error).abs().max()) < 4
