"""The penalty on a share of each batch, the loss on all of it."""

import copy
import itertools
from typing import Any

import pytest
import torch
from networks import IN_FLOAT64, NETWORKS, Case, Checkpointed, make, relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcure import CURE, CUREOutput, curvature, prepare
from fastcure._batch import plan

H, GAMMA = 0.7, 0.3
BATCH_NORM = "batch_norm-relu-max"


def step(case: Case, h: float | Tensor = H, **options: Any) -> tuple[CUREOutput, list[Tensor], nn.Module]:
    """What a step returns and leaves on a copy of the model."""
    model = case.copy().model.train()
    out = CURE(model, h, GAMMA, **options)(case.x, case.y)
    out.total.backward()
    return out, [p.grad for p in model.parameters() if p.grad is not None], model


def expected(case: Case, some: int, h: float | Tensor = H, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The definition: the mean loss of all and the mean penalty of the first, by plain double backpropagation."""
    model = case.copy().model.train()
    out = curvature(model, case.x, case.y, h, engine="reference", **options)
    total = out.loss.mean() + GAMMA * out.penalty[:some].mean()
    return total.detach(), list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("mlp-softplus", BATCH_NORM) for engine in ("auto", "eager", "reference")]
    + [("mlp-softplus", "compile")],
)
@pytest.mark.parametrize("loss_at", ["x", "step"])
def test_is_the_definition(name: str, loss_at: str, engine: str, aot_eager: object) -> None:
    case = make(NETWORKS[name], 7, seed=1)
    for power, lengths in ((1, H), (2, torch.linspace(0.3, 0.9, 7, dtype=case.x.dtype))):
        options: dict[str, Any] = {"power": power, "loss_at": loss_at}
        out, gradients, _ = step(case, lengths, engine=engine, fraction=0.4, **options)
        total, wanted = expected(case, 3, lengths, **options)
        torch.testing.assert_close(out.total, total)
        torch.testing.assert_close(out.logits, case.copy().model.eval()(case.x).detach())
        assert relative(gradients, wanted) < 1e-9


def test_with_split_statistics_the_loss_is_that_of_one_ordinary_forward() -> None:
    case = make(NETWORKS[BATCH_NORM], 8, seed=2)
    out, gradients, model = step(case, batch_stats="split", fraction=0.25)
    whole, wanted, moved = step(case, batch_stats="split")  # its penalty apart
    torch.testing.assert_close(out.loss, whole.loss)
    torch.testing.assert_close(out.logits, whole.logits)
    penalty = curvature(moved, case.x[:2], case.y[:2], H, engine="reference").penalty.mean()
    torch.testing.assert_close(out.penalty, penalty.detach())
    for ours, theirs in zip(model.buffers(), moved.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert relative(gradients, wanted) > 1e-6  # another penalty


@pytest.mark.parametrize("loss_at", ["x", "step"])
@pytest.mark.parametrize(("fraction", "some"), [(0.25, 2), (0.75, 6)])
def test_in_training_mode_each_part_is_a_batch_and_the_larger_one_moves(
    fraction: float, some: int, loss_at: str
) -> None:
    case = make(NETWORKS[BATCH_NORM], 8, seed=3)
    out, gradients, model = step(case, batch_stats="train", loss_at=loss_at, fraction=fraction)

    twin = case.copy().model.train()
    parts = [slice(some), slice(some, None)]
    options: dict[str, Any] = {"batch_stats": "train", "loss_at": loss_at, "engine": "reference"}
    found = [curvature(twin, case.x[part], case.y[part], H, **options) for part in parts]
    total = torch.cat([part.loss for part in found]).mean() + GAMMA * found[0].penalty.mean()
    torch.testing.assert_close(out.total, total)
    assert relative(gradients, list(torch.autograd.grad(total, list(twin.parameters())))) < 1e-9

    mover = case.copy().model.train()
    mover(case.x[max(parts, key=lambda part: len(case.x[part]))])
    for ours, theirs in zip(model.buffers(), mover.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("loss_at", ["x", "step"])
def test_is_unbiased(loss_at: str) -> None:
    case = make(NETWORKS[BATCH_NORM], 8, seed=4)
    sums = [torch.zeros_like(p) for p in case.model.parameters()]
    for turn in range(4):
        rolled = Case(case.model, case.x.roll(-2 * turn, 0), case.y.roll(-2 * turn, 0))
        for total, gradient in zip(sums, step(rolled, fraction=0.25, loss_at=loss_at)[1], strict=True):
            total += gradient / 4
    assert relative(sums, step(case, loss_at=loss_at)[1]) < 1e-9


@pytest.mark.parametrize("options", [{}, {"loss_at": "step"}, {"batch_stats": "split"}], ids=str)
def test_in_parts(options: dict[str, Any]) -> None:
    case = make(NETWORKS[BATCH_NORM], 7, seed=5)
    whole = step(case, fraction=0.4, **options)
    for microbatch in (1, 2, 3, 5):
        parts = step(case, fraction=0.4, microbatch=microbatch, **options)
        for ours, theirs in zip(parts[0], whole[0], strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach())
        assert relative(parts[1], whole[1]) < 1e-10


def test_the_first_order_engine() -> None:
    case = make(NETWORKS["mlp-softplus"], 6, seed=6)
    _, gradients, _ = step(case, engine="first_order", fraction=0.5)
    assert relative(gradients, expected(case, 3)[1]) < 1e-4


def test_one_sample_has_a_penalty_at_least() -> None:
    case = make(NETWORKS["mlp-softplus"], 3, seed=7)
    torch.testing.assert_close(step(case, fraction=1e-3)[0].penalty, curvature(*case, h=H).penalty[0].detach())
    assert step(case, fraction=0.99)[0].total == step(case)[0].total  # of three, all


def test_leaves_no_trace() -> None:
    case = make(NETWORKS[BATCH_NORM], 6, seed=8)
    model = case.model.train()
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        out = CURE(model, fraction=0.5, loss_at="step")(case.x, case.y)
    assert not out.total.requires_grad
    assert all(module.training for module in model.modules())
    assert all(map(torch.equal, before, model.buffers()))
    assert all(p.grad is None for p in model.parameters())


def test_a_training_forward_before_the_backward_changes_nothing() -> None:
    case = make(NETWORKS[BATCH_NORM], 6, seed=9)
    wanted = step(case, fraction=0.5)[1]
    model = case.copy().model.train()
    out = CURE(model, H, GAMMA, fraction=0.5)(case.x, case.y)
    model(case.x * 3)
    out.total.backward()
    assert relative([p.grad for p in model.parameters() if p.grad is not None], wanted) < IN_FLOAT64


def test_a_gradient_that_the_rest_would_lose_is_an_error() -> None:
    free = torch.ones(3, requires_grad=True)

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, y, reduction="none")
        return losses * free.sum() if len(y) == 3 else losses  # in the rest alone

    case = make(NETWORKS["mlp-softplus"], 4, seed=10)
    with pytest.raises(ValueError, match="not one of their parameters"):
        CURE(case.model, loss_fn=loss_fn, fraction=0.25)(case.x, case.y)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_what_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], 1 for a penalty on every sample, got"):
        CURE(nn.Linear(2, 2), fraction=fraction)


def test_it_may_be_set_as_h_and_gamma_may() -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=12)
    cure = CURE(case.model, H, GAMMA)
    cure.fraction = 0.5
    torch.testing.assert_close(cure(case.x, case.y).total, CURE(case.model, H, GAMMA, fraction=0.5)(*case[1:]).total)
    with pytest.raises(ValueError, match="fraction must be in"):
        cure.fraction = 2
    assert "fraction=0.5" in repr(cure)


@pytest.mark.filterwarnings("ignore:batch_stats=.* leaves batch norms as their flags say")
@pytest.mark.parametrize(("batch", "some"), [(1, 1), (3, 3), (4, 2), (5, 2), (16, 4)])
def test_in_training_mode_no_part_is_too_small_for_a_batch_norm(batch: int, some: int) -> None:
    torch.manual_seed(13)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.rand(batch, 3, dtype=torch.float64), torch.arange(batch) % 2
    if batch == 1:
        model.eval()
    out = CURE(model, H, GAMMA, batch_stats="train", fraction=0.25)(x, y)
    truth = curvature(model, x[:some], y[:some], H, batch_stats="train", engine="reference")
    torch.testing.assert_close(out.penalty.detach(), truth.penalty.mean().detach())


class FailsAt(nn.Module):
    """Raises in the n-th pass through it."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.left = passes

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise ZeroDivisionError
        return x


@pytest.mark.parametrize("fraction", [0.25, 0.75])
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_a_pass_that_fails_leaves_buffers_and_flags(passes: int, fraction: float) -> None:
    torch.manual_seed(14)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), FailsAt(passes), nn.Linear(4, 2)).double()
    before = [buffer.clone() for buffer in model.buffers()]
    cure = CURE(model, batch_stats="train", loss_at="step", fraction=fraction)
    with pytest.raises(ZeroDivisionError):
        cure(torch.rand(8, 3, dtype=torch.float64), torch.arange(8) % 2)
    assert all(map(torch.equal, before, model.buffers()))
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")
def test_what_checkpointing_recomputes_is_in_evaluation_mode() -> None:
    torch.manual_seed(15)
    inner = nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Dropout(), nn.Linear(6, 4)).double()
    x, y = torch.rand(8, 5, dtype=torch.float64), torch.arange(8) % 4
    case = Case(nn.Sequential(Checkpointed(inner), nn.Softplus(), nn.Linear(4, 4).double()), x, y)
    _, gradients, _ = step(case, engine="first_order", fraction=0.25)
    plain = Case(nn.Sequential(inner, *case.model[1:]), x, y)  # type: ignore[index]
    assert relative(gradients, step(plain, engine="first_order", fraction=0.25)[1]) < 1e-9


def test_without_grad_the_rest_keeps_no_graph() -> None:
    kept: list[Tensor] = []

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        kept.append(logits)
        return F.cross_entropy(logits, y, reduction="none")

    case = make(NETWORKS["mlp-softplus"], 8, seed=16)
    with torch.no_grad():
        CURE(case.model, loss_fn=loss_fn, fraction=0.25, microbatch=2)(case.x, case.y)
    assert not kept[-1].requires_grad


def test_bad_lengths_are_named_as_of_the_whole_batch() -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=11)
    for microbatch, lengths in itertools.product((None, 1), (torch.ones(3), torch.ones(1))):
        with pytest.raises(ValueError, match=r"h must be a number or have shape \(4,\)"):
            CURE(case.model, h=lengths, fraction=0.5, microbatch=microbatch)(case.x, case.y)


class Called(TorchDispatchMode):
    """The operators that run within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_samples_without_a_penalty_take_folded_layers_and_fast_attention() -> None:
    """Nothing is differentiated twice there."""
    folded = make(NETWORKS["batch_norm-relu-max"], 4, seed=0)
    apart = copy.deepcopy(folded.model)
    prepare(folded.model, folded.x)
    gradients = []
    for model in (folded.model, apart):
        with Called() as called:
            CURE(model, fraction=0.25)(folded.x, folded.y).total.backward()
        assert any("batch_norm" in name for name in called.names) == (model is apart)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert relative(*gradients) < rounding(torch.float64, 1000)
    attention = make(NETWORKS["attention"], 4, seed=0, dtype=torch.float32)
    for fraction in (0.25, 1.0):
        with Called() as called:
            CURE(attention.model, fraction=fraction)(attention.x, attention.y).total.backward()
        assert ("_scaled_dot_product_flash_attention_for_cpu" in called.names) == (fraction < 1)


def test_a_plan_without_losses_holds_what_has_a_penalty_alone() -> None:
    found = [(part.samples, part.penalised) for part in plan(8, 5, 2, losses=False)]
    assert found == [(slice(0, 2), True), (slice(2, 4), True), (slice(4, 5), True)]
