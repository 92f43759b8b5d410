"""The penalty and its gradients against the reference, and the reference against first principles."""

import pytest
import torch
from networks import IN_FLOAT64, NETWORKS, Case, cancellation, make, relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature

every_network = pytest.mark.parametrize("name", NETWORKS)


def gradients(case: Case, **options: object) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, penalty and the parameter gradients of a random weighting of both, on a copy of the network."""
    case = case.copy()
    out = curvature(*case, **options)
    w_loss, w_penalty = torch.randn(2, len(case.x), generator=torch.Generator().manual_seed(0)).to(out.loss)
    total = (w_loss * out.loss + w_penalty * out.penalty).sum()
    return out.loss, out.penalty, list(torch.autograd.grad(total, list(case.model.parameters())))


@pytest.mark.filterwarnings("ignore:batch_stats=.* leaves batch norms as their flags say:UserWarning")
@every_network
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("batch_stats", ["frozen", "split", "train"])
@pytest.mark.parametrize("batch", [1, 5])
def test_equals_the_reference_in_fp64(name: str, power: int, batch_stats: str, batch: int) -> None:
    case = make(NETWORKS[name], batch, seed=batch)
    if batch == 1 and batch_stats != "frozen":
        case.model.eval()  # batch norm in training mode refuses a single value a channel
    options = {"h": 0.7, "power": power, "batch_stats": batch_stats}
    ours = gradients(case, engine="eager", **options)
    truth = gradients(case, engine="reference", **options)
    for value, wanted in zip(ours, truth, strict=True):
        assert relative(value, wanted) < 1e-9


@every_network
@pytest.mark.parametrize("fixed_direction", [False, True])
def test_fp32_stays_near_the_fp64_reference(name: str, fixed_direction: bool) -> None:
    errors = []
    for seed in range(5):
        wide = make(NETWORKS[name], 6, seed)
        z = F.normalize(torch.randn(6, wide.x[0].numel(), dtype=torch.float64)).view_as(wide.x)
        ours = gradients(wide.copy(torch.float32), h=0.7, direction=z.float() if fixed_direction else None)
        truth = gradients(wide, engine="reference", h=0.7, direction=z if fixed_direction else None)
        error = max(relative(value, wanted) for value, wanted in zip(ours, truth, strict=True))
        # The longest sums are those of a weight's gradient, over the pixels of the batch.
        errors.append(error / rounding(torch.float32, wide.x.numel(), cancellation(wide, truth[1])))
    # A kink, and where the direction is not given a sign, may fall on the other side.
    assert sorted(errors)[-1 if NETWORKS[name].smooth else -2] < 1


def test_the_definitions_on_a_linear_network_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x, y, h = torch.rand(4, 6).double(), torch.tensor([0, 2, 1, 1]), 0.8
    one_hot = F.one_hot(y, 3)

    def g(point: Tensor) -> Tensor:  # of cross-entropy: W^T (softmax(W x + b) - one-hot)
        return (model(point).softmax(1) - one_hot) @ model.weight

    z = g(x).sign() / 6**0.5
    penalty = (g(x + h * z) - g(x)).square().sum(1)
    for engine in ("eager", "reference"):
        out = curvature(model, x, y, h, engine=engine)
        torch.testing.assert_close(out.penalty, penalty)
        torch.testing.assert_close(out.loss, F.cross_entropy(model(x), y, reduction="none"))
        torch.testing.assert_close(out.logits, model(x).detach())
        torch.testing.assert_close(curvature(model, x, y, h, engine=engine, power=1).penalty, penalty.sqrt())
        v = torch.randn_like(x)
        along = (g(x + h * v) - g(x)).square().sum(1)
        given = curvature(model, x, y, h, engine=engine, direction=v).penalty
        torch.testing.assert_close(given, along, rtol=IN_FLOAT64, atol=0)


@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_gradients_against_numerical_differences(engine: str) -> None:
    case = make(NETWORKS["mlp-softplus"], 3, seed=1)
    direction = torch.randn_like(case.x)  # the true one jumps where a gradient entry changes sign
    parameter = case.model[0].weight

    def total(values: Tensor) -> Tensor:
        with torch.no_grad():
            parameter.copy_(values)
        out = curvature(*case, engine=engine, direction=direction)
        return out.loss.sum() + 2 * out.penalty.sum()

    at = parameter.detach().clone()
    (exact,) = torch.autograd.grad(total(at), parameter)
    probe, step = torch.randn_like(at), 1e-5
    numerical = (total(at + step * probe) - total(at - step * probe)).detach() / (2 * step)
    torch.testing.assert_close((exact * probe).sum(), numerical, rtol=1e-7, atol=0)


@every_network
def test_a_batch_gives_what_its_samples_give_alone(name: str) -> None:
    case = make(NETWORKS[name], 64, seed=3)
    together = curvature(*case)
    alone = [curvature(case.model, case.x[i : i + 1], case.y[i : i + 1]) for i in range(64)]
    length, condition = case.x[0].numel(), cancellation(case, together.penalty)
    assert relative(together.penalty, torch.cat([out.penalty for out in alone])) < rounding(
        torch.float64, length, 10 * condition
    )
    assert relative(together.loss, torch.cat([out.loss for out in alone])) < rounding(torch.float64, length, 10)


def test_split_takes_the_loss_from_one_ordinary_forward() -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 6, seed=2)
    twin = case.copy()
    loss = F.cross_entropy(twin.model(twin.x), twin.y, reduction="none")
    out = curvature(*case, batch_stats="split")
    torch.testing.assert_close(out.loss, loss)
    for ours, once in zip(case.model.buffers(), twin.model.buffers(), strict=True):
        torch.testing.assert_close(ours, once, rtol=0, atol=0)
    # The penalty sees the statistics that this forward left behind.
    torch.testing.assert_close(out.penalty, curvature(*twin).penalty)


@pytest.mark.filterwarnings("ignore:batch_stats=.* leaves batch norms as their flags say:UserWarning")
@pytest.mark.parametrize("batch_stats", ["split", "train"])
def test_all_agree_in_evaluation_mode(batch_stats: str) -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 6, seed=2)
    case.model.eval()
    ours, frozen = gradients(case, batch_stats=batch_stats), gradients(case)
    limit = rounding(torch.float64, case.x.numel(), cancellation(case, frozen[1]))
    for value, wanted in zip(ours, frozen, strict=True):
        assert relative(value, wanted) < limit


def test_each_sample_may_have_a_step_length_of_its_own() -> None:
    case = make(NETWORKS["resnet8"], 4, seed=5)
    h = torch.tensor([0.2, 0.5, 1.0, 2.0])
    penalty = curvature(*case, h=h).penalty
    for i in range(4):
        alone = curvature(case.model, case.x[i : i + 1], case.y[i : i + 1], float(h[i])).penalty
        torch.testing.assert_close(penalty[i : i + 1], alone, rtol=1e-6, atol=0)
    z = torch.randn_like(case.x)
    given = [curvature(*case, h=h, direction=z, engine=engine).penalty for engine in ("eager", "reference")]
    torch.testing.assert_close(*given)


def test_soft_targets_generalise_labels() -> None:
    case = make(NETWORKS["mlp-relu"], 5, seed=6)
    soft = F.one_hot(case.y, 5).double()
    torch.testing.assert_close(curvature(case.model, case.x, soft), curvature(*case))


def test_channels_last_and_strided_images() -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 4, seed=7)
    wanted = curvature(*case).penalty
    for x in (case.x.contiguous(memory_format=torch.channels_last), case.x.mT.contiguous().mT):
        assert not x.is_contiguous()
        torch.testing.assert_close(curvature(case.model, x, case.y).penalty, wanted)
