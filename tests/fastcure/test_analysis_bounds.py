"""The bounds of theorem 1 against the minimal perturbation of thousands of quadratics, and of networks."""

import math
from functools import partial

import pytest
import torch
from hessians import hessians, quadratic
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Case, make
from torch import Tensor, nn

from fastcure.analysis import Bounds, quadratic_bounds, robustness_bounds


def minimal(c: Tensor, g: Tensor, values: Tensor) -> Tensor:
    """Minimal ||r|| with -c + g.r + r.H r / 2 >= 0, c (B,); g and the ascending eigenvalues (B, N), in H's own axes.

    On the way up, the best r of each length is r(mu) = (mu - H)^-1 g, mu falling from infinity to
    max(lambda_max, 0): bisection on d = mu - max(lambda_max, 0). What is still missing at d = 0 (the hard case: g
    has nothing along the top eigenvectors) is made up along the top one.
    """
    top = values[:, -1:].clamp(min=0)
    distance = top - values

    def at(d: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.where(g == 0, 0.0, g / (d + distance))
        return r, (g * r + values * r.square() / 2).sum(1)

    low, high = (torch.full_like(c, exponent) for exponent in (-60.0, 40.0))
    for _ in range(200):
        middle = (low + high) / 2
        reached = at(10 ** middle[:, None])[1] >= c
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    r, gain = at(10 ** low[:, None])
    short = c - gain
    nu = values[:, -1]
    extra = torch.where(short > 1e-9 * c, 2 * short / nu.clamp(min=0), 0.0)  # r.u is 0 there
    found = (r.square().sum(1) + extra).sqrt()
    found = torch.where((short > 1e-9 * c) & (nu <= 0), torch.inf, found)
    return torch.where(c == 0, 0.0, found)


def check(c: Tensor, g: Tensor, values: Tensor) -> Bounds:
    bounds = quadratic_bounds(c, g.norm(dim=1), values[:, -1], g[:, -1])
    truth = minimal(c, g, values)
    slack = 1 + 1e-7
    assert not any(bound.isnan().any() for bound in bounds)
    assert bool((bounds.lower >= 0).all())
    assert bool((bounds.lower <= truth * slack).all()), (bounds.lower / truth).max()
    assert bool((truth <= bounds.upper * slack).all()), (truth / bounds.upper).max()
    assert bool((bounds.lower_simple <= bounds.lower * slack).all())
    assert bool((bounds.upper <= bounds.upper_simple * slack).all())
    return bounds


def draw(count: int, N: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    c, g, values = (normal(count) * 2).exp(), normal(count, N), normal(count, N)
    scale = (normal(count, 1) * 3).exp()
    return c, g * (normal(count, 1) * 3).exp(), (values * scale).sort(1).values


@pytest.mark.parametrize("N", [1, 2, 5, 40])
def test_bounds_hold_on_random_quadratics(N: int) -> None:
    c, g, values = draw(2000, N, seed=N)
    bounds = check(c, g, values)
    assert float((bounds.lower / minimal(c, g, values)).max()) > 0.99  # and are tight at times
    if N == 1:  # where g lies along u they meet
        up = values[:, -1] >= 0
        torch.testing.assert_close(bounds.lower[up], bounds.upper[up])


@pytest.mark.parametrize(
    "degenerate",
    [
        "g = 0", "g orthogonal to u", "c = 0", "nu = 0", "nu tiny", "nu huge", "negative definite", "H = 0",
        "g tiny", "c tiny", "c huge", "repeated", "g = 0 and H = 0",
    ],
)  # fmt: skip
def test_bounds_hold_on_degenerate_quadratics(degenerate: str) -> None:
    c, g, values = draw(500, 6, seed=0)
    if "g = 0" in degenerate:
        g = torch.zeros_like(g)
    if "H = 0" in degenerate:
        values = torch.zeros_like(values)
    shift = values - values[:, -1:]
    if degenerate == "g orthogonal to u":
        g[:, -1] = 0
    elif degenerate == "repeated":
        values[:, -3:] = values[:, -1:]
    elif degenerate == "negative definite":
        values = shift - 0.1
    elif degenerate.startswith("nu"):
        values = shift + {"nu = 0": 0.0, "nu tiny": 1e-300, "nu huge": 1e12}[degenerate]
    elif degenerate == "g tiny":
        g = g * 1e-200
    elif degenerate.startswith("c"):
        c = {"c = 0": torch.zeros_like(c), "c tiny": c * 1e-30, "c huge": c * 1e12}[degenerate]
    bounds = check(c, g, values)
    if degenerate == "c = 0":
        assert all(torch.equal(bound, torch.zeros_like(c)) for bound in bounds)
    if degenerate == "g = 0 and H = 0":
        assert all(torch.equal(bound, torch.full_like(c, torch.inf)) for bound in bounds)
    if degenerate == "negative definite":
        assert torch.equal(bounds.upper, torch.full_like(c, torch.inf))
        torch.testing.assert_close(bounds.lower, c / g.norm(dim=1))
    if degenerate == "H = 0":
        torch.testing.assert_close(bounds.lower, c / g.norm(dim=1))
        torch.testing.assert_close(bounds.lower, bounds.lower_simple)


positive = st.floats(1e-9, 1e6)
number = st.just(0.0) | positive | positive.map(lambda value: -value)


@settings(max_examples=100, deadline=None)
@given(st.just(0.0) | positive, st.lists(st.tuples(number, number), min_size=1, max_size=4))
def test_bounds_hold_on_whatever_is_found(c: float, axes: list[tuple[float, float]]) -> None:
    values, g = torch.tensor(sorted(axes), dtype=torch.float64).unbind(1)
    check(torch.tensor([c], dtype=torch.float64), g[None], values[None])


def test_the_solver_of_this_test_against_a_search_of_all_directions() -> None:
    c, g, values = draw(60, 2, seed=9)
    angles = torch.linspace(0, 2 * math.pi, 50_001, dtype=torch.float64)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    for i in range(60):
        slope, curve = directions @ g[i], directions.square() @ values[i]
        root = slope.square() + 2 * curve * c[i]
        # the first root of curve t^2 / 2 + slope t - c, where there is one
        t = 2 * c[i] / (slope + root.clamp(min=0).sqrt())
        best = torch.where((root >= 0) & (t > 0), t, torch.inf).min()
        torch.testing.assert_close(minimal(c[i : i + 1], g[i : i + 1], values[i : i + 1])[0], best, rtol=1e-4, atol=0)


def test_both_forms_are_the_theorems() -> None:
    c, g, values = draw(300, 4, seed=1)
    nu, norm, along = values[:, -1].abs() + 0.1, g.norm(dim=1), g[:, -1]
    bounds = quadratic_bounds(c, norm, nu, along)
    for bound, slope in ((bounds.lower, norm), (bounds.upper, along.abs())):
        naive = slope / nu * ((1 + 2 * nu * c / slope.square()).sqrt() - 1)
        safe = nu * c > 1e-6 * slope.square()  # elsewhere the naive form loses its digits
        torch.testing.assert_close(bound[safe], naive[safe], rtol=1e-6, atol=0)
    torch.testing.assert_close(bounds.lower_simple, c / norm - 2 * nu * c**2 / norm**3)
    torch.testing.assert_close(bounds.upper_simple, c / along.abs())


def expected(loss: Tensor, g: Tensor, H: Tensor, threshold: float) -> Bounds:
    values, vectors = torch.linalg.eigh(H)
    along = (vectors[..., -1] * g).sum(1)
    return quadratic_bounds((threshold - loss).clamp(min=0), g.norm(dim=1), values[:, -1], along)


def differentiate(case: Case, loss_fn: object) -> tuple[Tensor, Tensor, Tensor]:
    model = case.copy().model.eval()
    point = case.x.clone().requires_grad_()
    loss = loss_fn(model(point), case.y)  # type: ignore[operator]
    (g,) = torch.autograd.grad(loss.sum(), point)
    return loss.detach(), g.flatten(1), hessians(case, loss_fn)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.smooth])
def test_the_loss_of_networks(name: str) -> None:
    case = make(NETWORKS[name], 3, seed=0)
    loss, g, H = differentiate(case, partial(nn.functional.cross_entropy, reduction="none"))
    threshold = float(loss.sort().values[1]) + 0.1  # one sample is beyond it, perhaps
    truth = expected(loss, g, H, threshold)
    found = robustness_bounds(*case, threshold=threshold)
    for bound, wanted in zip(found, truth, strict=True):
        torch.testing.assert_close(bound, wanted, rtol=1e-6, atol=0)
    assert found.lower.dtype == torch.float64
    by_default = robustness_bounds(*case)
    torch.testing.assert_close(by_default.lower, expected(loss, g, H, math.log(2)).lower, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", [None, 2, torch.tensor([1, 2, 3])])
def test_the_margin_of_networks(target: int | Tensor | None) -> None:
    case = make(NETWORKS["mlp-softplus"], 3, seed=1)
    with torch.no_grad():
        logits = case.model.eval()(case.x)
        order = logits.argsort(1, descending=True)
    case = case._replace(y=order[:, 0] if target is None else torch.zeros(3).long())
    other = order[:, 1] if target is None else torch.as_tensor(target).expand(3)

    def margin(logits: Tensor, y: Tensor) -> Tensor:
        return logits.gather(1, y[:, 1:]).squeeze(1) - logits.gather(1, y[:, :1]).squeeze(1)

    f, g, H = differentiate(case._replace(y=torch.stack([case.y, other], 1)), margin)
    truth = expected(f, g, H, 0.0)
    for bound, wanted in zip(robustness_bounds(*case, kind="margin", target=target), truth, strict=True):
        torch.testing.assert_close(bound, wanted, rtol=1e-6, atol=0)
    soft = nn.functional.one_hot(case.y, 5).double()
    soft_bounds = robustness_bounds(case.model, case.x, soft, kind="margin", target=target)
    torch.testing.assert_close(soft_bounds.upper, truth.upper, rtol=1e-6, atol=0)


def test_the_margin_of_a_piecewise_linear_network_is_bounded_by_one_number() -> None:
    case = make(NETWORKS["resnet8"], 4, seed=0)
    with torch.no_grad():
        logits = case.model.eval()(case.x)
    case = case._replace(y=logits.argmax(1))
    f, g, H = differentiate(case, lambda logits, y: logits.topk(2, 1).values.flip(1).diff(dim=1).squeeze(1).neg())
    assert float(H.abs().max()) == 0
    for bound in robustness_bounds(*case, kind="margin"):
        torch.testing.assert_close(bound, -f / g.norm(dim=1))


@pytest.mark.parametrize("N", [30, 300])
def test_a_quadratic_loss(N: int) -> None:
    spectra = {"simple": torch.linspace(-2, 5, N), "repeated": torch.tensor([5.0] * 3 + [-1.0] * (N - 3))}
    spectra |= {"negative": -torch.linspace(1, 4, N), "top 0": torch.tensor([-1.0] * 7 + [0.0] * (N - 7))}
    for name, spectrum in spectra.items():
        made = quadratic(spectrum)
        case = made.case(5)
        g = case.x @ made.A + made.b
        values, vectors = torch.linalg.eigh(made.A)
        loss = made.loss(case.x, case.y)
        threshold = float(loss.max()) + 3
        axes = g @ vectors
        top = values > values[-1] - 1e-9
        axes = torch.cat([axes[:, ~top], torch.zeros(5, int(top.sum()) - 1), axes[:, top].norm(dim=1)[:, None]], 1)
        nu = values[-1].expand(5) * (name != "top 0")
        truth = quadratic_bounds(threshold - loss, g.norm(dim=1), nu, axes[:, -1])
        found = robustness_bounds(*case, loss_fn=made.loss, threshold=threshold)
        for bound, wanted in zip(found, truth, strict=True):
            torch.testing.assert_close(bound, wanted, rtol=1e-7, atol=0)
        r = minimal(threshold - loss, g @ vectors, values.expand(5, -1))
        assert bool((found.lower <= r * (1 + 1e-9)).all())
        assert bool((r <= found.upper * (1 + 1e-9)).all())


def test_a_single_value() -> None:
    made = quadratic(torch.tensor([3.0]))
    case = made.case(4)
    found = robustness_bounds(*case, loss_fn=made.loss, threshold=10.0)
    torch.testing.assert_close(found.lower, found.upper)
    distance = found.lower[:, None]
    at = torch.maximum(made.loss(case.x + distance, case.y), made.loss(case.x - distance, case.y))
    torch.testing.assert_close(at, torch.full((4,), 10.0, dtype=torch.float64))
