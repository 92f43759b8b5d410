"""Batch norms in training mode: their own second-order rule, and the penalty that is evaluated through them."""

import copy
from typing import Any

import pytest
import torch
from networks import NETWORKS, Case, cancellation, make, relative, rounding
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastcure import CURE, curvature, double_backward

SHAPES = [(4, 3), (4, 3, 5), (2, 3, 3, 2), (2, 2, 2, 1, 2), (3, 1, 2, 2)]
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def norm_for(shape: tuple[int, ...], **options: Any) -> Any:
    """A batch norm with random weights, in training mode."""
    norm = KINDS[len(shape)](shape[1], **options).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


def as_function(norm: Any) -> Any:
    """The rule as a function of x, weight and bias."""

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        if parameters:
            norm._parameters.update(zip(("weight", "bias"), parameters, strict=True))
        return normalise(norm, x)

    return function


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    with double_backward():
        return norm(x)


@pytest.mark.parametrize(
    ("shape", "affine", "backend"),
    [
        *((shape, affine, "auto") for shape in SHAPES for affine in (True, False)),
        ((4, 3, 5), False, "triton"),
        ((2, 3, 3, 2), True, "triton"),
    ],
)
def test_derivatives(shape: tuple[int, ...], affine: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm = norm_for(shape, affine=affine)
    inputs = [torch.randn(shape, dtype=torch.float64), *norm.parameters()]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    function = as_function(norm)
    fast = backend == "triton"  # interpreted: along one random direction
    assert gradcheck(function, inputs, fast_mode=fast)
    assert gradgradcheck(function, inputs, fast_mode=fast)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_third_derivatives(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm = norm_for((3, 2, 2, 2))
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)

    def deep(function: Any) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, norm.weight, norm.bias)]
        # Scaled so that no order is far above 1: the cosine of t multiplies the rounding of t by |t|.
        scalar, found = ((function(*leaves) / 8) ** 3).sum(), list[Tensor]()
        for _ in range(3):
            found += grad(scalar, leaves, create_graph=True)
            scalar = torch.stack([(t * t.cos()).sum() for t in found[-3:]]).sum()
        return found

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        deviation = (x.var((0, 2, 3), unbiased=False, keepdim=True) + norm.eps).sqrt()
        centred = x - x.mean((0, 2, 3), keepdim=True)
        return centred / deviation * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    for ours, truth in zip(deep(as_function(norm)), deep(torchs), strict=True):
        assert relative(ours, truth) < 1e-9


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_second_derivatives_in_every_layout_and_in_fp32(layout: str) -> None:
    x = torch.randn(5, 4, 6, 3)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    norm = norm_for((5, 4, 6, 3))
    wide = copy.deepcopy(norm)
    w, v = torch.randn(5, 4, 6, 3), torch.randn(5, 4, 6, 3)

    def second(norm: Any, run: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        point, weights = x.to(dtype).detach().requires_grad_(), w.to(dtype).requires_grad_()
        (first,) = grad(run(point), point, weights, create_graph=True)
        return first, *grad(first, (weights, point, norm.weight), v.to(dtype))

    ours = second(norm.float(), lambda x: normalise(norm, x), torch.float32)
    for value, truth in zip(ours, second(wide, wide, torch.float64), strict=True):
        assert relative(value, truth) < rounding(torch.float32, 5 * 6 * 3)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    deviation = (centred.square().mean((0, 2, 3), keepdim=True) + eps).sqrt()
    return centred / deviation * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def one_norm(dtype: torch.dtype = torch.float64) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A norm, its inputs and two gradients at its output."""
    torch.manual_seed(0)
    norm = norm_for((3, 2, 4, 4)).to(dtype)
    leaves = [torch.randn(3, 2, 4, 4, dtype=dtype), norm.weight, norm.bias]
    return norm, [t.detach().requires_grad_() for t in leaves], list(torch.randn(3, 3, 2, 4, 4, dtype=dtype).unbind())


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_several_gradients_of_one_norm_meet_in_one_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm, leaves, (w, other, v) = one_norm()

    def objective(function: Any) -> Tensor:
        y = function(*leaves)
        first = grad(y, leaves[0], w * y.detach(), create_graph=True)[0]
        again = grad(y, leaves[0], other, create_graph=True)[0]
        return (first * v).sum() + (again * first.detach()).sum() + (y**3).sum()

    for ours, truth in zip(
        grad(objective(as_function(norm)), leaves), grad(objective(plain_norm), leaves), strict=True
    ):
        assert relative(ours, truth) < 1e-11


def test_a_backward_that_takes_one_path_alone_leaves_nothing_to_the_next() -> None:
    norm, leaves, (w, other, v) = one_norm()
    w.requires_grad_()

    def run(function: Any) -> list[Tensor]:
        y = function(*leaves)
        (first,) = grad(y, leaves[0], w, create_graph=True)
        found = list(grad(first, w, v, retain_graph=True))  # stops before the norm
        with pytest.raises(ZeroDivisionError):
            (first * v + y * Failing.apply(other.clone().requires_grad_())).sum().backward(retain_graph=True)
        for leaf in (*leaves, w):
            leaf.grad = None
        found += grad(y, leaves, other, retain_graph=True)
        found += grad(first, leaves[:2], v, retain_graph=True)
        return found + list(grad((first, y), leaves, (v, other)))

    for ours, truth in zip(run(as_function(norm)), run(plain_norm), strict=True):
        assert relative(ours, truth) < 1e-11


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 / 0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_bf16_images_with_fp32_parameters(
    backend: str, form: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm, leaves, directions = one_norm(torch.bfloat16)
    norm = norm.float()
    leaves = [leaves[0].detach().to(memory_format=form).requires_grad_(), norm.weight, norm.bias]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def run(function: Any, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        w, other, v = (t.to(dtype).requires_grad_() for t in directions)
        y = function(*leaves)
        (first,) = grad(y, leaves[0], w, create_graph=True)
        return [y, first, *grad(((first, y)), (*leaves, w), (v, other))]

    ours = run(lambda x, *_: normalise(norm, x), leaves, torch.bfloat16)
    limit = rounding(torch.bfloat16, 48)
    for value, truth in zip(ours, run(plain_norm, wide, torch.float64), strict=True):
        assert relative(value.double(), truth) < limit


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}, {"affine": False}], ids=str
)
def test_a_forward_is_that_of_the_module(options: dict[str, Any]) -> None:
    ours, theirs = norm_for((6, 3, 4, 4), **options), None
    theirs = copy.deepcopy(ours)
    for _ in range(3):
        x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
        assert torch.equal(normalise(ours, x), theirs(x))
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(one, other)


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


@pytest.mark.parametrize("engine", ["compile", "first_order"])
def test_other_engines_say_so(watched: tuple, engine: str) -> None:
    with pytest.raises(ValueError, match=f"among 'auto', 'eager', 'cuda_graph', 'reference', got '{engine}'"):
        curvature(*watched, batch_stats="train", engine=engine)


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


class Checkpointed(nn.Module):
    """A network whose body, which ends in its batch norm, is computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.body, x, use_reentrant=False)).flatten(1))


@pytest.mark.parametrize("of", ["loss", "penalty"])
def test_activation_checkpointing_is_an_error(of: str) -> None:
    out = curvature(Checkpointed(), torch.rand(6, 3, 4, 4), torch.arange(6) % 5, batch_stats="train")
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
