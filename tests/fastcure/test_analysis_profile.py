"""Curvature profiles against eigenvalues of the Hessian by first principles."""

from collections.abc import Callable

import pytest
import torch
from hessians import hessians, quadratic
from networks import NETWORKS, Case, make, relative
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.analysis import curvature_profile
from fastcure.analysis.lanczos import extremes

smooth_networks = pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.smooth])


def ends(spectrum: Tensor, k: int) -> Tensor:
    return torch.cat([spectrum[:, :k], spectrum[:, -k:]], 1)


@smooth_networks
def test_the_full_spectrum_of_smooth_networks(name: str) -> None:
    case = make(NETWORKS[name], 2, seed=0)
    truth = torch.linalg.eigvalsh(hessians(case))
    exact = curvature_profile(*case)
    assert exact.eigenvalues.dtype == torch.float64
    assert relative(exact.eigenvalues, truth) < 1e-10
    torch.testing.assert_close(exact.mean, exact.eigenvalues.mean(0))
    assert relative(curvature_profile(*case, method="finite", h=1e-3).eigenvalues, truth) < 1e-3
    assert relative(curvature_profile(*case.copy(torch.float32)).eigenvalues, truth) < 1e-5


@smooth_networks
def test_the_extremes_of_smooth_networks(name: str) -> None:
    case = make(NETWORKS[name], 2, seed=0)
    k = 3
    truth = ends(torch.linalg.eigvalsh(hessians(case)), k)
    exact = curvature_profile(*case, k=k)
    assert exact.eigenvalues.shape == (2, 2 * k)
    assert exact.mean.shape == (2 * k,)
    assert relative(exact.eigenvalues, truth) < 1e-9
    assert relative(curvature_profile(*case, k=k, method="finite", h=1e-3).eigenvalues, truth) < 1e-3
    assert relative(curvature_profile(*case.copy(torch.float32), k=k).eigenvalues, truth) < 1e-5


@pytest.mark.parametrize("name", ["mlp-relu", "resnet8", "batch_norm-relu-max"])
def test_the_exact_hessian_of_a_relu_network_is_of_low_rank_and_has_no_negative_eigenvalue(name: str) -> None:
    case = make(NETWORKS[name], 3, seed=2)
    model = nn.Sequential(case.model[0], nn.ReLU(), case.model[-1]) if name == "mlp-relu" else case.model  # no norm
    with torch.no_grad():
        classes = model.eval()(case.x).shape[1]
    eigenvalues = curvature_profile(model, case.x, case.y).eigenvalues
    assert float(eigenvalues.min()) > -1e-10
    assert int((eigenvalues > 1e-10).sum(1).max()) <= classes - 1
    assert float(eigenvalues[:, -1].min()) > 1e-6
    # k below, at and above the rank: the others are zeros, and Krylov spaces have ended long before.
    for k in (1, classes - 1, min(classes + 4, case.x[0].numel() // 2)):
        found = curvature_profile(model, case.x, case.y, k=k).eigenvalues
        torch.testing.assert_close(found, ends(eigenvalues, k), rtol=1e-8, atol=1e-12)


class WithoutCurvature(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("on_record", [False, True])
def test_a_hessian_of_zeros(k: int | None, on_record: bool) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:  # on the record, its gradient has a graph that leads nowhere
        return (F.relu(logits + 5) if on_record else logits).sum(1)

    x, y = torch.rand(2, 9), torch.zeros(2).long()
    assert torch.equal(
        curvature_profile(WithoutCurvature(), x, y, k=k, loss_fn=loss).eigenvalues,
        torch.zeros(2, 2 * k if k else 9, dtype=torch.float64),
    )


SPECTRA = {
    "plain": torch.linspace(-2, 5, 40),
    "repeated": torch.tensor([-3.0] * 4 + [0.0] * 30 + [1.0] + [7.0] * 5),
    "low rank": torch.tensor([0.0] * 36 + [1e-3, 1.0, 2.0, 400.0]),
    "negative": torch.linspace(-9, -2, 40).square().neg(),
    "identity": torch.ones(40),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_a_quadratic_agrees_to_rounding(name: str) -> None:
    made = quadratic(SPECTRA[name])
    case, truth = made.case(3), SPECTRA[name].double().sort().values.expand(3, -1)
    atol = 1e-12 * float(truth.abs().max())
    for k in (None, 1, 5):
        wanted = ends(truth, k) if k else truth
        exact = curvature_profile(*case, k=k, loss_fn=made.loss).eigenvalues
        torch.testing.assert_close(exact, wanted, rtol=0, atol=atol)  # rounding
        finite = curvature_profile(*case, method="finite", h=1.0, k=k, loss_fn=made.loss).eigenvalues
        torch.testing.assert_close(finite, wanted, rtol=0, atol=10 * atol)


def test_finite_spectra_are_those_of_the_symmetric_part_of_differences_along_unit_vectors() -> None:
    case = make(NETWORKS["mlp-relu"], 2, seed=3)
    h = torch.tensor([0.4, 1.5])
    model = case.copy().model.eval()

    def g(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), case.y, reduction="sum"), x)[0]

    columns = [(g(case.x + h[:, None] * unit) - g(case.x)) / h[:, None] for unit in torch.eye(13)]
    A = torch.stack(columns, 2)
    assert float((A - A.mT).norm() / A.norm()) > 0.01
    truth = torch.linalg.eigvalsh((A + A.mT) / 2)
    torch.testing.assert_close(curvature_profile(*case, method="finite", h=h).eigenvalues, truth)


def test_lanczos_on_768_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(384, 8)
    )
    case = Case(model, torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2]))
    model(case.x)
    wide = case.copy(torch.float64)
    full = curvature_profile(*wide).eigenvalues
    assert relative(full[:1], torch.linalg.eigvalsh(hessians(Case(wide.model, wide.x[:1], wide.y[:1])))) < 1e-10
    k = 8
    calls = []
    wide.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    assert relative(curvature_profile(*wide, k=k).eigenvalues, ends(full, k)) < 1e-9
    assert calls == [3 * k]  # all samples and a block of vectors together
    assert relative(curvature_profile(*case, k=k).eigenvalues, ends(full, k)) < 1e-5
    finite = curvature_profile(*wide, k=2, method="finite", h=1e-3).eigenvalues
    assert relative(finite, ends(full, 2)) < 1e-3


class Counted:
    """A linear map, and how many vectors it was applied to."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self.product, self.products = product, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.products += v.shape[1]
        return self.product(v)


def test_lanczos_restarts() -> None:
    spectrum = torch.linspace(-1, 1, 400).double()
    made = quadratic(spectrum)
    multiply = Counted(lambda v: v @ made.A)
    found = extremes(multiply, made.b[None, None], low=2, high=3, block=4, tolerance=1e-7)
    assert 69 < multiply.products < 800  # a basis has 69 vectors at most
    assert found.vectors.shape[1] <= 69
    torch.testing.assert_close(found.values[0, :2], spectrum[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close(found.values[0, -3:], spectrum[-3:], rtol=1e-9, atol=0)
    unit = torch.eye(found.vectors.shape[1], dtype=torch.float64)
    torch.testing.assert_close(found.vectors[0] @ found.vectors[0].T, unit, rtol=0, atol=1e-12)
    residual = found.vectors[0] @ made.A - found.values[0, :, None] * found.vectors[0]
    assert float(residual[[0, 1, -3, -2, -1]].norm(dim=1).max()) < 1e-7


def test_lanczos_ends_where_rounding_hides_the_rest_and_says_so() -> None:
    made = quadratic(torch.linspace(-0.5, 1, 200))
    rounded = Counted(lambda v: v @ made.A + 0.01 * F.normalize(torch.randn_like(v), dim=2))
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=r"uncertain by up to \de-02 of the largest, after .* use float64"):
        found = extremes(rounded, made.b[None, None], low=1, high=1, block=2, tolerance=1e-7)
    assert rounded.products < 200
    assert abs(float(found.values[0, -1]) - 1) < 0.01


def test_lanczos_gives_up_in_the_end() -> None:
    made = quadratic(torch.cat([torch.linspace(-1, 0, 80), 1 - torch.logspace(-6, -9, 80)]))
    multiply = Counted(lambda v: v @ made.A)
    found = extremes(multiply, made.b[None, None], low=0, high=9, block=2, tolerance=1e-13)
    assert multiply.products == 4 * 160
    assert float((found.values[0, -9:] - 1).abs().max()) < 1e-6


def test_confident_samples_in_fp32() -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=4)
    with torch.no_grad():
        case.model[-1].weight.mul_(60)
        logits = case.model(case.x)
        case = case._replace(y=logits.argmax(1))
        doubt = 1 - logits.softmax(1).amax(1)
    assert float(doubt.min()) < 1e-9  # float32 rounds 1 - p to 0
    truth = torch.linalg.eigvalsh(hessians(case))
    for k in (None, 2):
        found = curvature_profile(*case.copy(torch.float32), k=k).eigenvalues
        for i in range(4):
            assert relative(found[i, -2:], truth[i, -2:]) < 1e-2


def test_a_start_that_is_an_eigenvector_does_not_end_the_search() -> None:
    spectrum = torch.linspace(-1, 1, 60).double()
    A = spectrum.diag()
    for start in (torch.eye(60).double()[30], torch.zeros(60).double()):
        found = extremes(lambda v: v @ A, start[None, None], low=0, high=1, block=2, tolerance=1e-8)
        torch.testing.assert_close(found.values[0, -1], spectrum[-1])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_lanczos_is_uncertain_relative_to_the_largest_eigenvalue(scale: float) -> None:
    made = quadratic(torch.linspace(-0.5, 1, 200))

    def rounded(v: Tensor) -> Tensor:
        return scale * (v @ made.A + 0.01 * F.normalize(torch.randn_like(v), dim=2))

    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=r"uncertain by up to \de-02 of the largest"):
        extremes(rounded, made.b[None, None], low=1, high=1, block=2, tolerance=1e-7)
