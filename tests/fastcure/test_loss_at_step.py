"""The loss at x + h z, in every engine."""

import pytest
import torch
from networks import IN_FLOAT64, NETWORKS, Case, make, relative
from torch import Tensor
from torch.nn import functional as F

from fastcure import CURE, curvature, reference
from fastcure._functional import FunctionalLoss


def gradients(case: Case, **options: object) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, penalty and the parameter gradients of a weighting of both."""
    case = case.copy()
    out = curvature(*case, h=0.7, loss_at="step", **options)
    total = (out.loss.mul(torch.linspace(0.5, 1, len(case.x))) + 0.3 * out.penalty).sum()
    return out.loss, out.penalty, list(torch.autograd.grad(total, list(case.model.parameters())))


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("mlp-softplus", "compile"),
        *((name, e) for name in ("mlp-softplus", "batch_norm-relu-max") for e in ("auto", "eager")),
    ],
)
def test_equals_the_reference(name: str, engine: str, aot_eager: object) -> None:
    case = make(NETWORKS[name], 5, seed=1)
    for power in (1, 2):
        ours, truth = (gradients(case, engine=e, power=power) for e in (engine, "reference"))
        for value, wanted in zip(ours, truth, strict=True):
            assert relative(value, wanted) < 1e-9


@pytest.mark.parametrize("batch_stats", ["frozen", "train"])
def test_it_is_the_loss_of_an_ordinary_forward_there(batch_stats: str) -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 6, seed=2)
    case.model.train(batch_stats == "train")
    twin, z = case.copy(), torch.randn_like(case.x)
    with torch.no_grad():
        logits, loss = twin.model(twin.x), F.cross_entropy(twin.model(twin.x + 0.7 * z), twin.y, reduction="none")
    out = curvature(*case, h=0.7, loss_at="step", direction=z, batch_stats=batch_stats)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.penalty, curvature(*twin, h=0.7, direction=z, batch_stats=batch_stats).penalty)


def test_the_first_order_engine_takes_it_there_as_well() -> None:
    case = make(NETWORKS["mlp-softplus"], 5, seed=3)
    ours, truth = (gradients(case, engine=engine) for engine in ("first_order", "reference"))
    assert relative(ours[0], truth[0]) < IN_FLOAT64
    for value, wanted in zip(ours[2], truth[2], strict=True):
        assert relative(value, wanted) < 1e-4
    alone = curvature(*case, h=0.7, loss_at="step", engine="first_order").loss.sum()
    exact = curvature(*case, h=0.7, loss_at="step", engine="reference").loss.sum()
    parameters = list(case.model.parameters())
    for value, wanted in zip(*(torch.autograd.grad(loss, parameters) for loss in (alone, exact)), strict=True):
        assert relative(value, wanted) < IN_FLOAT64


def test_the_reference_is_the_definition() -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=4)
    functional = FunctionalLoss(case.model)
    point = case.x.clone().requires_grad_()
    (g,) = torch.autograd.grad(functional(point, case.y)[1].sum(), point)
    _, loss, _ = reference.curvature(functional, case.x, case.y, 0.7, loss_at="step")
    torch.testing.assert_close(loss, functional(case.x + 0.7 * reference.unit_sign(g), case.y)[1])


def test_in_parts() -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 6, seed=5)
    totals = []
    for microbatch in (None, 4):
        model = case.copy().model
        out = CURE(model, 0.7, 0.3, loss_at="step", microbatch=microbatch)(case.x, case.y)
        out.total.backward()
        totals.append([out.total.detach(), out.loss.detach(), *(p.grad for p in model.parameters())])
    for whole, parts in zip(*totals, strict=True):
        assert relative(parts, whole) < IN_FLOAT64


def test_what_does_not_go_together_is_said() -> None:
    case = make(NETWORKS["mlp-relu"], 2, seed=6)
    with pytest.raises(ValueError, match="loss_at must be 'x' or 'step', got 'fgsm'"):
        curvature(*case, loss_at="fgsm")
    with pytest.raises(ValueError, match="must have batch_stats 'frozen' or 'train', got 'split'"):
        CURE(case.model, loss_at="step", batch_stats="split")
