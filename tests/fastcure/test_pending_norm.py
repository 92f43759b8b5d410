"""A norm that waits for a ReLU under `double_backward`, where kernels run: whatever is done with it is as in torch."""

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from fastcure_kernels.jit import LISTENERS
from fastcure_kernels.split_gradient import SplitGradient
from networks import relative, rounding
from operators import Operators
from torch import Tensor, nn
from torch.autograd import grad, gradgradcheck
from torch.nn import functional as F

from fastcure import double_backward
from fastcure.rules.context import fused_norms
from fastcure.rules.pending_norm import PendingNorm

SHAPE = (2, 3, 2, 2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("kernels"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


class Norms:
    """Two batch norms, and the tensors that go into what is made of them."""

    def __init__(self, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> None:
        torch.manual_seed(0)
        self.x, self.r = (torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_() for _ in range(2))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        drawn = (torch.rand(4, shape[1], dtype=wide, device=DEVICE) + 0.5).unbind()
        self.parameters = [(t * (1 if i % 2 else -1)).requires_grad_() for i, t in enumerate(drawn)]
        self.truth = False

    def leaves(self) -> list[Tensor]:
        return [self.x, self.r, *self.parameters]

    def as_truth(self) -> "Norms":
        """The same in float64, written out."""
        other = Norms()
        other.x, other.r, *other.parameters = (t.detach().double().requires_grad_() for t in self.leaves())
        other.truth = True
        return other

    def __call__(self, x: Tensor, which: int = 0) -> Tensor:
        weight, bias = self.parameters[2 * which : 2 * which + 2]
        if not self.truth:
            return F.batch_norm(x, None, None, weight, bias, True)
        dims, channels = [d for d in range(x.dim()) if d != 1], (-1, *[1] * (x.dim() - 2))
        centred = x - x.mean(dims, keepdim=True)
        deviation = (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * weight.view(channels) + bias.view(channels)


def relu_and_ignore(y: Tensor) -> Tensor:
    F.relu(y, inplace=True)
    return y


def zeroed(y: Tensor) -> Tensor:
    y[0, 0] = 0.5
    return y


def mixed(n: Norms, z: Tensor) -> Tensor:
    return F.conv2d(z, torch.outer(n.parameters[1], n.parameters[3])[:, :, None, None])


def block(n: Norms, shortcut: Callable[[Tensor], Tensor]) -> Tensor:
    z = F.relu(n(n.x) + n.r)
    return F.relu(n(mixed(n, z), 1) + shortcut(z))


USES: dict[str, Callable[[Norms], Tensor]] = {
    "nothing": lambda n: n(n.x),
    "relu": lambda n: F.relu(n(n.x)),
    "relu in place": lambda n: F.relu_(n(n.x)),
    "relu in place, ignored": lambda n: relu_and_ignore(n(n.x)),
    "relu in place, ignored, and on in place": lambda n: relu_and_ignore(n(n.x)).mul(1.0).add_(n.r),
    "residual": lambda n: n(n.x) + n.r,
    "residual, relu": lambda n: F.relu(n(n.x) + n.r),
    "residual first, relu in place": lambda n: F.relu(n.r + n(n.x), inplace=True),
    "residual in place, relu in place": lambda n: n(n.x).add_(n.r).relu_(),
    "two residuals": lambda n: F.relu(n(n.x) + n.r + n.r.sin()),
    "a scaled residual": lambda n: F.relu(torch.add(n(n.x), n.r, alpha=0.5)),
    "a residual that is broadcast": lambda n: F.relu(n(n.x) + n.r[:, :1]),
    "a number": lambda n: F.relu(n(n.x) + 0.1),
    "two norms": lambda n: F.relu(n(n.x) + n(n.r, 1)),
    "two norms, and the second again": lambda n: (lambda s: F.relu(n(n.x) + s) * s)(n(n.r, 1)),
    "to itself": lambda n: (lambda y: F.relu(y + y))(n(n.x)),
    "a chain": lambda n: F.relu(n(F.relu(n(n.x)) + n.r, 1)),
    "a chain in place": lambda n: (lambda z: F.relu_(n(z, 1).add_(z)))(F.relu_(n(n.x))),
    "a block": lambda n: block(n, lambda z: z),
    "a block with a convolution beside it": lambda n: block(n, lambda z: mixed(n, z)),
    "a block and a third use": lambda n: block(n, lambda z: z.sin() + z),
    "a block in place": lambda n: (lambda z: n(mixed(n, z), 1).add_(z).relu_())(n(n.x).add_(n.r).relu_()),
    "a plain block": lambda n: (lambda z: F.relu(n(mixed(n, z), 1) + z))(F.relu(n(n.x))),
    "seen after": lambda n: (lambda y: F.relu(y) * y.sin())(n(n.x)),
    "seen before": lambda n: (lambda y: y.sin() * F.relu(y))(n(n.x)),
    "seen before, residual": lambda n: (lambda y: y.sum() * F.relu(y + n.r))(n(n.x)),
    "its sum seen": lambda n: (lambda y: F.relu(y) * y.sin())(n(n.x) + n.r),
    "two relus": lambda n: (lambda y: F.relu(y) * F.relu(y + n.r))(n(n.x)),
    "overwritten after": lambda n: (lambda y: F.relu(y) + y.mul_(2.0))(n(n.x)),
    "overwritten before": lambda n: F.relu(n(n.x).mul_(-1.0) + n.r),
    "itself added in place": lambda n: F.relu((lambda y: y.add_(y))(n(n.x))),
    "a part overwritten": lambda n: F.relu(zeroed(n(n.x))),
    "a view, then in place": lambda n: (lambda y, v: F.relu_(y.mul(1.0)) + v)(*(lambda y: (y, y[:, :1]))(n(n.x))),
    "detached": lambda n: F.relu(n(n.x)) + F.relu(n(n.x).detach() + n.r),
    "detached in place": lambda n: F.relu(n(n.x).detach_() + n.r),
    "a convolution": lambda n: F.conv2d(n(n.x), n.parameters[2].view(1, -1, 1, 1)),
    "another activation": lambda n: F.leaky_relu_(n(n.x), 0.1) + n.r,
    "hardswish in place": lambda n: F.hardswish(n(n.x), inplace=True) + n.r,
}


def second_order(norms: Norms, use: Callable[[Norms], Tensor]) -> list[Tensor]:
    """Values, input gradient, and the gradients of a penalty and a loss in one backward."""
    with double_backward():
        y = use(norms)
        loss = ((y / 4 + 0.1) ** 3).sum()
        inputs = [t for t in (norms.x, norms.r) if t.requires_grad]
        first = [g for g in grad(loss, inputs, create_graph=True, allow_unused=True) if g is not None]
    total = loss + sum(g.square().sum() for g in first)
    found = grad(total, norms.leaves(), allow_unused=True)
    return [y, *first, *(torch.zeros(()) if g is None else g for g in found)]


@pytest.mark.parametrize("name", USES)
def test_values_and_derivatives_of_whatever_is_done_with_it(name: str) -> None:
    norms = Norms()
    ours, truth = second_order(norms, USES[name]), second_order(norms.as_truth(), USES[name])
    assert len(ours) == len(truth)
    for value, expected in zip(ours, truth, strict=True):
        assert value.shape == expected.shape
        assert float((value - expected).detach().abs().max()) <= 1e-11 * float(expected.detach().abs().max())


@pytest.mark.parametrize("name", ["relu", "residual, relu", "two norms", "a chain in place", "seen after"])
def test_third_derivatives(name: str) -> None:
    def third(norms: Norms) -> list[Tensor]:
        with double_backward():
            scalar, found = ((USES[name](norms) / 8) ** 3).sum(), list[Tensor]()
            for _ in range(3):  # scaled as in test_batch_norm.py
                found += [
                    g for g in grad(scalar, norms.leaves(), create_graph=True, allow_unused=True) if g is not None
                ]
                scalar = torch.stack([(t * t.cos()).sum() / 8 for t in found[-4:]]).sum()
        return found

    norms = Norms()
    for ours, truth in zip(third(norms), third(norms.as_truth()), strict=True):
        assert relative(ours, truth) < 1e-9


def test_second_derivatives_by_finite_differences() -> None:
    norms = Norms()

    def run(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        norms.x, norms.r, norms.parameters[:2] = x, residual, parameters
        with double_backward():
            return USES["residual, relu"](norms)

    assert gradgradcheck(run, norms.leaves()[:4], fast_mode=True)


@pytest.mark.parametrize(
    ("shape", "last"),
    [((6, 2), False), ((5, 3, 7), False), ((2, 3, 5, 3), False), ((2, 3, 5, 3), True), ((2, 9, 3, 2, 1), False)],
)
def test_bf16_in_odd_shapes_and_both_layouts(shape: tuple[int, ...], last: bool) -> None:
    norms = Norms(torch.bfloat16, shape)
    truth = second_order(norms.as_truth(), USES["residual, relu"])
    if last:  # and the residual contiguous
        norms.x = norms.x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    scale = float(truth[1].detach().norm())
    for value, expected in zip(second_order(norms, USES["residual, relu"]), truth, strict=True):
        value, expected = value.detach().double(), expected.detach()
        # Rounded at the ends of each of four passes; of a few values a channel a gradient is a difference.
        assert float((value - expected).norm()) <= 2 * rounding(torch.bfloat16, 1) * max(float(expected.norm()), scale)


@pytest.mark.parametrize(
    "use", ["relu", "relu in place", "residual, relu", "residual in place, relu in place", "two norms"]
)
def test_one_kernel_takes_it(use: str) -> None:
    norms, launches = Norms(), list[Any]()
    LISTENERS.append(launches.append)
    try:
        with double_backward(), PlainOperators() as operators:
            USES[use](norms)
    finally:
        LISTENERS.remove(launches.append)
    assert len(launches) == (6 if use == "two norms" else 3)  # statistics in two launches, and the rest in one
    assert {"add", "add_", "relu", "relu_", "clone"}.isdisjoint(operators.calls)


class PlainOperators(Operators):
    """Those that run on plain tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            NotImplemented
            if {PendingNorm, SplitGradient} & {*types}
            else super().__torch_dispatch__(func, types, args, kwargs)
        )


@pytest.mark.parametrize(
    "use", ["a block", "a block with a convolution beside it", "a block in place", "a plain block"]
)
def test_kernels_add_the_gradients_of_branches(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with PlainOperators() as operators:
        found = second_order(Norms(), USES[use])
    monkeypatch.setattr(SplitGradient, "of", lambda g: g)
    with PlainOperators() as before:
        expected = second_order(Norms(), USES[use])
    assert before.calls.count("add") - operators.calls.count("add") == 2  # of the first backward, and of the last
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("use", ["residual, relu", "a block", "a block with a convolution beside it"])
def test_passes_that_are_differentiated_once_take_it_too(use: str) -> None:
    norms, truth = Norms(), Norms().as_truth()
    with fused_norms(norms.x):
        y = USES[use](norms)
        assert type(F.relu(norms.r).grad_fn).__name__ == "ReluBackward0"  # no rule, where there is no norm
    for ours, expected in zip(
        grad(y.sin().sum(), norms.leaves()[:4]),
        grad(USES[use](truth).sin().sum(), truth.leaves()[:4]),
        strict=True,
    ):
        assert relative(ours, expected) < 1e-11


def before(y: Tensor, seen: list[Any]) -> Tensor:
    y.register_hook(seen.append)
    return F.relu(y)


def after(y: Tensor, seen: list[Any]) -> Tensor:
    z = F.relu(y)
    y.register_hook(seen.append)
    return z


def of_the_node(y: Tensor, seen: list[Any]) -> Tensor:
    z = F.relu(y)
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda gradients: seen.append(gradients[0]))
    return z


def of_what_is_changed(y: Tensor, seen: list[Any]) -> Tensor:
    y.register_hook(seen.append)
    return F.relu_(y)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("watch", [before, after, of_the_node, of_what_is_changed])
def test_hooks_see_the_gradient_that_arrives(watch: Callable[..., Tensor], residual: bool) -> None:
    def run(norms: Norms) -> list[Tensor]:
        seen = list[Tensor]()
        with double_backward():
            y = norms(norms.x) + norms.r if residual else norms(norms.x)
            z = watch(y, seen)
            del y
            (first,) = grad(z.square().sum(), norms.x, create_graph=True)
        (first.square().sum() + z.sum()).backward()
        return [*seen, *(leaf.grad for leaf in norms.leaves()[:4] if leaf.grad is not None)]

    norms = Norms()
    ours, truth = run(norms), run(norms.as_truth())
    assert len(ours) == len(truth)
    assert len(truth) >= 5
    for value, expected in zip(ours, truth, strict=True):
        assert relative(value, expected) < 1e-11


def test_its_own_gradient() -> None:
    def run(norms: Norms) -> list[Tensor]:
        with double_backward():
            y = norms(norms.x)
            total = y + norms.r
            loss = F.relu(total).square().sum() + F.relu(y).sin().sum()
            found = list(grad(loss, [y, total, norms.x], create_graph=True))
            y.retain_grad()
        (sum(g.square().sum() for g in found) + loss).backward(inputs=[y, total, norms.x], retain_graph=True)
        assert y.grad is not None
        assert total.grad is not None
        return [*found, y.grad, total.grad, norms.x.grad]  # type: ignore[list-item]

    norms = Norms()
    for value, expected in zip(run(norms), run(norms.as_truth()), strict=True):
        assert relative(value, expected) < 1e-11


def test_the_gradient_of_what_a_relu_in_place_has_made() -> None:
    def run(norms: Norms) -> list[Tensor]:
        seen = list[Tensor]()
        with double_backward():
            z = norms(norms.x).add_(norms.r).relu_()
            z.register_hook(seen.append)
            z.retain_grad()
            y = F.relu(norms(mixed(norms, z), 1) + z)
            found = list(grad(y.sin().sum(), [z, norms.x], create_graph=True))
        y.sin().sum().backward(retain_graph=True)
        assert z.grad is not None
        return [*found, *seen, z.grad, *grad(sum(g.square().sum() for g in found), norms.leaves())]

    norms = Norms()
    ours, truth = run(norms), run(norms.as_truth())
    assert len(ours) == len(truth)
    for value, expected in zip(ours, truth, strict=True):
        assert type(value) is Tensor
        assert relative(value, expected) < 1e-10


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_of_modules_see_what_torch_gives(in_place: bool) -> None:
    def run(double: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(in_place), nn.BatchNorm2d(3), nn.ReLU(in_place)).to(
            DEVICE, torch.float64
        )
        seen = list[Tensor]()
        model[0].register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
        model[2].register_forward_hook(lambda _, __, out: out + 1)
        if not in_place:  # torch refuses both together
            model[2].register_full_backward_hook(lambda _, into, out: seen.extend([*into, *out]))
        x = Norms().x
        with double_backward() if double else torch.enable_grad():
            y = model(x)
        return [*seen, y, *grad(y.square().sum(), [x, *model.parameters()])]

    for value, expected in zip(run(True), run(False), strict=True):
        assert relative(value, expected) < 1e-9  # a norm of a norm: the first one's gradients cancel


def test_what_is_read_of_it_outside_of_autograd_is_computed_once() -> None:
    norms = Norms()
    with double_backward():
        y = norms(norms.x)
    assert isinstance(y, PendingNorm)
    expected = norms.as_truth()(norms.x.double())
    launches = list[Any]()
    LISTENERS.append(launches.append)
    try:
        assert (y.shape, y.stride(), y.dtype, y.requires_grad) == (SHAPE, norms.x.stride(), torch.float64, True)
        assert not launches
        for _ in range(2):
            torch.testing.assert_close(torch.as_tensor(y.detach().cpu().numpy()), expected.detach().cpu())
            assert len(launches) == 1
    finally:
        LISTENERS.remove(launches.append)
    assert repr(y) == repr(y.detach())
    assert type(y.clone()) is Tensor
    with torch.no_grad():
        assert type(y + norms.r) is Tensor
        assert not (y + norms.r).requires_grad


def test_terms_that_change_before_it_is_read_are_an_error() -> None:
    norms = Norms()
    residual = norms.r.detach().clone()
    with double_backward():
        total = norms(norms.x) + residual
        residual.add_(1)
        with pytest.raises(RuntimeError, match="FASTCURE_BACKEND=torch"):
            F.relu(total)
        with pytest.raises(RuntimeError, match="changed in place before that output was used"):
            total.sum()
        with pytest.raises(RuntimeError, match="squeeze_ changed the shape"):
            norms(norms.x).unsqueeze_(0)


def test_an_output_that_is_changed_is_torch_s_error() -> None:
    norms = Norms()
    with double_backward():
        z = relu_and_ignore(norms(norms.x))
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_nothing_keeps_it_alive() -> None:
    norms = Norms()
    with double_backward():
        y = norms(norms.x)
        z = F.relu_(y + norms.r)
        (first,) = grad(z.square().sum(), norms.x, create_graph=True)
    first.square().sum().backward()
    held = [ref(y), ref(z), ref(first)]
    gc.disable()
    try:
        del y, z, first
        assert [each() for each in held] == [None] * 3
    finally:
        gc.enable()
