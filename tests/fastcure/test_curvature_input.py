"""What `curvature` is given: every kind of model and loss is right, or one clear error."""

from types import SimpleNamespace

import pytest
import torch
from definitions import EXACT
from networks import NETWORKS, Case, Checkpointed, Temperature, cancellation, make, relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE, curvature
from fastcure._functional import FunctionalLoss, cross_entropy, input_gradient


@pytest.fixture
def case() -> Case:
    return make(NETWORKS["batch_norm-relu-max"], 6, seed=0)


@pytest.mark.parametrize("engine", EXACT)
def test_a_trainable_tensor_that_is_no_parameter_is_an_error(case: Case, engine: str) -> None:
    free = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(\).*not one of their parameters.*register it"):
        curvature(*case, engine=engine, loss_fn=lambda logits, y: free * F.cross_entropy(logits, y, reduction="none"))

    class FastWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow = nn.Linear(3, 3)
            self.fast = self.slow.weight.detach().clone().requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.slow(x), self.fast)

    with pytest.raises(ValueError, match=r"shape \(3, 3\).*not one of their parameters"):
        curvature(FastWeights(), torch.rand(2, 3), torch.tensor([0, 1]), engine=engine)


def test_a_parameter_reached_around_the_models_attributes_is_trained() -> None:
    model = nn.Linear(3, 3)
    weight = model.weight
    model.forward = lambda x: torch.tanh(x @ weight)
    out = curvature(model, torch.rand(2, 3), torch.tensor([0, 1]))
    (out.loss + out.penalty).sum().backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 0
    assert model.bias.grad is None


@pytest.mark.parametrize("engine", EXACT)
def test_a_partly_frozen_model(case: Case, engine: str) -> None:
    twin = case.copy()
    penalty = curvature(*twin).penalty
    penalty.sum().backward()
    for parameter in list(case.model.parameters())[:4]:
        parameter.requires_grad_(False)
    curvature(*case, engine=engine).penalty.sum().backward()
    assert all(p.grad is None for p in list(case.model.parameters())[:4])
    ours, truth = ([p.grad for p in model.parameters()][4:] for model in (case.model, twin.model))
    assert relative(ours, truth) < rounding(torch.float64, case.x.numel(), cancellation(case, penalty.detach()))


@pytest.mark.parametrize("engine", EXACT)
def test_a_model_with_nothing_to_train(case: Case, engine: str) -> None:
    wanted = curvature(*case).penalty
    out = curvature(case.model.requires_grad_(False), case.x, case.y, engine=engine)
    assert not out.penalty.requires_grad
    torch.testing.assert_close(out.penalty, wanted.detach())


@pytest.mark.parametrize("engine", EXACT)
def test_a_learnable_loss(case: Case, engine: str) -> None:
    def penalty(logarithm: float) -> Tensor:
        loss_fn = Temperature().double()
        nn.init.constant_(loss_fn.logarithm, logarithm)
        out = curvature(*case, loss_fn=loss_fn, engine=engine, direction=direction).penalty.sum()
        out.backward()
        return out.detach(), loss_fn.logarithm.grad

    direction = torch.randn_like(case.x)
    (above, _), (below, _), (_, exact) = penalty(0.3 + 1e-6), penalty(0.3 - 1e-6), penalty(0.3)
    torch.testing.assert_close(exact, (above - below) / 2e-6, rtol=1e-6, atol=0)
    assert len(list(CURE(case.model, loss_fn=Temperature()).parameters())) == len(list(case.model.parameters())) + 1


@pytest.mark.parametrize("wrap", [lambda t: (t, 1), lambda t: {"logits": t}, lambda t: SimpleNamespace(logits=t)])
def test_logits_are_found_in_what_a_model_returns(wrap: object) -> None:
    case = make(NETWORKS["mlp-relu"], 4, seed=0)
    wanted = curvature(*case)
    plain = case.model.forward
    case.model.forward = lambda x: wrap(plain(x))
    torch.testing.assert_close(curvature(*case), wanted)


def test_a_compiled_model_is_used_uncompiled(case: Case) -> None:
    compiled = torch.compile(case.model, backend="eager")
    torch.testing.assert_close(curvature(compiled, case.x, case.y), curvature(*case))


def bad(**changes: object) -> dict[str, object]:
    return {"model": nn.Linear(3, 4), "x": torch.rand(2, 3), "y": torch.tensor([0, 3]), **changes}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(h=-1.0), ValueError, "h must be > 0, got -1.0"),
        (bad(h=0), ValueError, "h must be > 0, got 0"),
        (bad(h=float("nan")), ValueError, "h must be > 0, got nan"),
        (bad(h=torch.tensor([1.0, -2.0])), ValueError, "h must be > 0, got -2.0"),
        (bad(h=torch.ones(3)), ValueError, r"shape \(2,\), got shape \(3,\)"),
        (bad(power=3), ValueError, "power must be 1 or 2, got 3"),
        (bad(batch_stats="batch"), ValueError, "'frozen', 'split' or 'train', got 'batch'"),
        (bad(engine="fast"), ValueError, "auto, eager, compile, cuda_graph, first_order, reference, got 'fast'"),
        (bad(y=torch.tensor([0, 4])), ValueError, r"labels must be in 0\.\.3.* got 0\.\.4"),
        (bad(y=torch.tensor([-1, 2])), ValueError, r"got -1\.\.2"),
        (bad(y=torch.tensor([1])), ValueError, "one label for each of the 2 samples"),
        (bad(y=torch.tensor([[1], [2]])), ValueError, r"shape \(2,\), one class index a sample, got \(2, 1\)"),
        (bad(y=torch.rand(2, 3)), ValueError, r"shape of the logits \(2, 4\), got \(2, 3\)"),
        (bad(x=torch.ones(2, 3, dtype=torch.uint8)), TypeError, r"got torch.uint8: pass x.float\(\) / 255"),
        (bad(x=[1.0]), TypeError, "x must be a tensor"),
        (bad(x=torch.rand(2)), ValueError, "batch dimension"),
        (bad(x=torch.rand(2, 3, requires_grad=True)), ValueError, r"pass x.detach\(\)"),
        (bad(direction=torch.rand(2, 4)), ValueError, r"shape of x \(2, 3\), got \(2, 4\)"),
        (bad(loss_fn=F.cross_entropy), ValueError, "use reduction='none'"),
        (bad(model=torch.tanh), TypeError, "torch.nn.Module, got builtin"),
    ],
)
def test_bad_input_is_one_clear_error(call: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        curvature(**call)


def test_forward_mode_is_refused() -> None:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.rand(2, 3), torch.rand(2, 3))
        with pytest.raises(ValueError, match="forward-mode tangent"):
            curvature(nn.Linear(3, 4), x, torch.tensor([0, 1]))


@pytest.mark.parametrize("engine", EXACT)
def test_a_loss_that_the_model_keeps_to_itself_is_not_lost_in_silence(engine: str) -> None:
    class Auxiliary(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            self.auxiliary = logits.square().mean()
            return torch.tanh(logits)

    model = Auxiliary(3, 3)
    out = curvature(model, torch.rand(2, 3), torch.tensor([0, 1]), engine=engine)
    with pytest.raises(RuntimeError, match="put auxiliary losses into loss_fn"):
        (out.loss.sum() + model.auxiliary).backward()


def test_a_weight_that_depends_on_the_input(case: Case) -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.make, self.last = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(3, 108), nn.Linear(4, 7)
            del self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            self.conv.weight = self.make(torch.tanh(x.mean((0, 2, 3)))).reshape(4, 3, 3, 3)
            return self.last(torch.tanh(self.conv(x)).mean((2, 3)))

    model = Hyper().double()
    ours, truth = (curvature(model, case.x[:1], case.y[:1], engine=engine).penalty for engine in ("eager", "reference"))
    torch.testing.assert_close(ours, truth)


def test_activation_checkpointing_is_right_or_one_clear_error(case: Case) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU())
    model = nn.Sequential(Checkpointed(inner), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7))
    out = CURE(model.double())(case.x, case.y)
    with pytest.raises(RuntimeError, match=r"activation checkpointing.*CURE\(model, microbatch=N\)"):
        out.total.backward()


def test_inference_mode_is_refused(case: Case) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        curvature(*case)


def test_the_default_loss_is_traced_whole() -> None:
    """Its look at the labels is for calls that are not compiled: it would break the graph."""
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True, dynamic=False)
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(compiled(logits, y), F.cross_entropy(logits, y, reduction="none"))


def test_sharded_parameters_are_refused() -> None:
    model = nn.Linear(3, 3)
    model.weight.full_tensor = lambda: model.weight  # as a DTensor has it
    with pytest.raises(TypeError, match=r"model must not have sharded parameters .*fully_shard\(CURE\(model\)\)"):
        curvature(model, torch.rand(2, 3), torch.tensor([0, 1]))


def test_a_direction_of_another_shape_is_refused() -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    with pytest.raises(ValueError, match=r"direction must have the shape of x \(4, .*\), got \(3, "):
        curvature(*case, direction=case.x[:3])


def test_a_loss_in_another_dtype_keeps_whole_numbers_whole() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    wide = FunctionalLoss(model).to(torch.float64)
    kinds = {name: tensor.dtype for name, tensor in wide.state.items()}
    assert kinds.pop("model.2.num_batches_tracked") == torch.int64
    assert set(kinds.values()) == {torch.float64}


def test_a_loss_of_weights_alone_has_no_input_gradient() -> None:
    x, weight = torch.rand(3, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient with respect to the images"):
        input_gradient(weight.square(), x)
