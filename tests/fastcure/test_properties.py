"""The engines against the reference on random architectures, shapes, types, memory formats and options."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from architectures import networks
from fuzzing import TRIED, cases
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE, curvature, prepare
from fastcure.engines import ENGINES
from fastcure.engines.compile import Compile
from fastcure.reference import unit_sign

# The networks are in the modes that are drawn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode"),
    pytest.mark.filterwarnings("ignore:batch_stats=.* leaves batch norms as their flags say"),
]


class Problem(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor
    options: dict[str, Any]
    w_loss: Tensor
    w_penalty: Tensor
    dtype: torch.dtype
    """float64, float32, or bfloat16: that is float32 under autocast."""


@st.composite
def problems(draw: Any, dtypes: list[torch.dtype], smooth: bool = False) -> Problem:
    model, shape = draw(networks(smooth))
    dtype = draw(st.sampled_from(dtypes))
    batch = draw(st.integers(1, 4))
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    x = torch.rand(batch, *shape, dtype=torch.float64)
    model = model.to(kept)
    # On the CPU torch 2.13 writes through a null pointer in the backward of a channels-last GroupNorm whose input needs
    # no gradient, and its double backward of a channels-last InstanceNorm is wrong in a batch of one.
    torchs_fault = any(isinstance(m, (nn.GroupNorm, nn.InstanceNorm2d)) for m in model.modules())
    if x.dim() == 4 and not torchs_fault and draw(st.booleans()):
        x, model = (v.to(memory_format=torch.channels_last) for v in (x, model))
    elif draw(st.booleans()):
        x = x.repeat_interleave(2, -1)[..., ::2]
    with torch.no_grad():
        classes = copy.deepcopy(model).eval()(x.to(kept)).shape[1]
    y = torch.randint(classes, (batch,))
    if draw(st.booleans()):
        y = F.one_hot(y, classes).to(kept) * 0.9 + 0.1 / classes
    parameters = list(model.parameters())
    for index in draw(st.sets(st.integers(0, len(parameters) - 1), max_size=len(parameters) - 1)):
        parameters[index].requires_grad_(False)
    least = 0.1 if dtype != torch.bfloat16 else 4 * torch.finfo(dtype).eps * x[0].numel() ** 0.5
    lengths = st.floats(least, 2.0)
    h = draw(lengths) if draw(st.booleans()) else torch.tensor([draw(lengths) for _ in x], dtype=kept)
    options = {"h": h, "power": draw(st.sampled_from([1, 2]))}
    if not any(isinstance(m, nn.Dropout) for m in model.modules()) and batch > 1 and draw(st.booleans()):
        options["batch_stats"] = draw(st.sampled_from(["split", "train"] if dtype == torch.float64 else ["split"]))
        if any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
            model.eval()
    if options.get("batch_stats") != "split" and draw(st.booleans()):
        options["loss_at"] = "step"
    # Without the weight of the loss, whose gradient is much larger, an error in that of the penalty shows.
    w_loss = torch.randn(batch, dtype=torch.float64) * draw(st.booleans())
    return Problem(model, x.to(kept), y, options, w_loss, torch.rand(batch).double() + 0.5, dtype)


class Found(NamedTuple):
    loss: Tensor
    penalty: Tensor
    gradients: Tensor
    buffers: list[Tensor]


def solve(problem: Problem, engine: str, prepared: bool = False, **options: Any) -> Found:
    model = copy.deepcopy(problem.model)
    if prepared:
        prepare(model, problem.x)
    with torch.autocast("cpu", torch.bfloat16, enabled=problem.dtype == torch.bfloat16):
        out = curvature(model, problem.x, problem.y, engine=engine, **problem.options, **options)
    (problem.w_loss * out.loss + problem.w_penalty * out.penalty).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return Found(
        out.loss.detach(), out.penalty.detach(), torch.cat([g.flatten() for g in gradients]), [*model.buffers()]
    )


def truth_of(problem: Problem, direction: Tensor) -> tuple[Found, float]:
    """The reference, and the norm of all gradients: those of the parameters that are not frozen may be zero."""
    unfrozen = problem._replace(model=copy.deepcopy(problem.model).requires_grad_())
    scale = float(solve(unfrozen, "reference", direction=direction).gradients.double().norm())
    return solve(problem, "reference", direction=direction), scale


def widened(problem: Problem) -> Problem:
    """The same in float64."""
    y = problem.y.double() if problem.y.is_floating_point() else problem.y
    model = copy.deepcopy(problem.model).double()
    return problem._replace(model=model, x=problem.x.double(), y=y, dtype=torch.float64)


def input_gradient(problem: Problem, x: Tensor) -> Tensor:
    """g(x) of the model in evaluation mode, in float64."""
    model = copy.deepcopy(problem.model).double().eval()
    x = x.detach().double().requires_grad_()
    y = problem.y.double() if problem.y.is_floating_point() else problem.y
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def direction_and_condition(problem: Problem) -> tuple[Tensor, float]:
    """z, and the largest ||g|| / ||d|| of a sample: the factor by which rounding in g is larger in d.

    The direction is given to all, for a sign of g is a matter of rounding where g is.
    """
    g = input_gradient(problem, problem.x)
    z = unit_sign(g)
    h = torch.as_tensor(problem.options["h"]).double().reshape(-1, *[1] * (g.dim() - 1))
    d = input_gradient(problem, problem.x.double() + h * z) - g
    return z.to(problem.x), float(((g.flatten(1).norm(dim=1) + 1e-4) / (d.flatten(1).norm(dim=1) + 1e-300)).max())


def errors(ours: Found, truth: Found, scale: float) -> list[float]:
    """Of losses, penalties and gradients, relative."""
    scales = [float(truth.loss.double().norm()), float(truth.penalty.double().norm()), scale]
    pairs = zip(ours[:3], truth[:3], scales, strict=True)
    return [float((a.double() - b.double()).norm()) / size if size else float(a.norm()) for a, b, size in pairs]


def check(problem: Problem, engine: str, tolerance: float, prepared: bool = False) -> None:
    """Compare with the reference; `tolerance` is that where d is as long as g."""
    z, condition = direction_and_condition(problem)
    tolerance *= 1 + condition
    if condition > 1e5 or tolerance > 0.3:  # the loss is constant or nearly linear, and d is rounding
        return
    ours, (truth, scale) = solve(problem, engine, prepared, direction=z), truth_of(problem, z)
    found = errors(ours, truth, scale)
    if max(found) > tolerance and problem.dtype != torch.float64:  # the reference itself may be no better here
        exact = solve(widened(problem), "reference", direction=z.double())
        tolerance = max(tolerance, 4 * max(errors(truth, exact, scale)))
    note(f"errors {found} of losses, penalties and gradients; allowed {tolerance}")
    assert max(found) <= tolerance
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers, truth.buffers, strict=True))
    TRIED[f"{engine}, {problem.dtype}".replace("torch.", "")] += 1


@cases(80)
@given(problems([torch.float64]), st.booleans())
def test_eager_in_float64(problem: Problem, prepared: bool) -> None:
    check(problem, "eager", 1e-12, prepared)


@cases(40)
@given(problems([torch.float32, torch.bfloat16]), st.booleans())
def test_eager_in_narrower_types(problem: Problem, prepared: bool) -> None:
    check(problem, "eager", 1e-4 if problem.dtype == torch.float32 else 0.08, prepared)


@cases(40)
@given(problems([torch.float64], smooth=True))
def test_first_order_in_float64(problem: Problem) -> None:
    if problem.options.get("batch_stats") == "train":
        problem.options["batch_stats"] = "frozen"  # it does not take the other
    check(problem, "first_order", 1e-6)


@cases(10)
@given(problems([torch.float64]), st.booleans(), st.integers(1, 3), st.sampled_from([1.0, 0.6, 0.3]))
def test_microbatches(problem: Problem, prepared: bool, microbatch: int, fraction: float) -> None:
    g = input_gradient(problem, problem.x)
    if ((g != 0) & (g.abs() < 1e-9)).any() or direction_and_condition(problem)[1] > 1e3:
        return  # a sign in z, or d, is rounding, which another batch size changes
    model = copy.deepcopy(problem.model).eval()
    options = {"h": problem.options["h"], "power": problem.options["power"], "gamma": 2.0, "fraction": fraction}
    found = []
    for size in (None, microbatch):
        model.zero_grad()
        if prepared:
            prepare(model, problem.x)
        out = CURE(model, microbatch=size, **options)(problem.x, problem.y)
        out.total.backward()
        found.append(torch.cat([out.loss[None], out.penalty[None], *(p.grad.flatten() for p in trained(model))]))
    assert (found[0] - found[1]).norm() <= 1e-9 * found[0].norm().detach()
    TRIED["microbatches"] += 1


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own making
@cases(3)
@given(problems([torch.float64]))
def test_compile_in_float64(problem: Problem) -> None:
    """Without code generation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "compile", Compile("aot_eager"))
        check(problem, "compile", 1e-12)
    torch._dynamo.reset()
