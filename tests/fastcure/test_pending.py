"""Sums left pending until their ReLU: whatever is done with one, values and gradients are those of the plain sum."""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from foreign import Cube
from networks import relative, rounding
from operators import Operators
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure._folding.pending import OverwrittenError, Pending


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", request.param)


def terms(bias: bool = True, residual: bool = True) -> list[Tensor | None]:
    """x, bias and residual, leaves in fp64."""
    torch.manual_seed(0)
    shapes = [(2, 3, 4, 5), (3,) if bias else None, (2, 3, 4, 5) if residual else None]
    return [shape and torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def plain_sum(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    total = x * 1 if bias is None else x + bias.view(-1, 1, 1)
    return total if residual is None else total + residual


def pending_sum(x: Tensor, bias: Tensor | None, residual: Tensor | None, takers: Any = ()) -> Pending:
    return Pending.of(x * 1, bias if bias is None else bias * 1, residual if residual is None else residual * 1, takers)


def held(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """What somebody else who holds the object sees after a change in place, beside what the change returned."""

    def use(s: Tensor, other: Tensor) -> Tensor:
        holder = [s]
        result = change(s, other)
        return result * 2 + holder[0].sin()

    return use


def plus(s: Tensor, other: Tensor) -> Tensor:
    s += other
    return s


def alias_before(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """What a view made before a change in place sees of it."""

    def use(s: Tensor, other: Tensor) -> Tensor:
        view = s.flatten(1)
        change(s, other)
        return view * 2 + s.flatten(1)

    return use


def by_index(s: Tensor, other: Tensor) -> Tensor:
    s[:, 0] = other[:, 0]
    return s


def other_is_changed_after(s: Tensor, other: Tensor) -> Tensor:
    total = s.cos() + other
    other.mul_(2)
    return total.relu() + other


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda s, o: F.relu(s),
    "relu of torch": lambda s, o: torch.relu(s) + torch.relu(input=s),
    "relu of a tensor": lambda s, o: s.relu(),
    "relu module": lambda s, o: nn.ReLU()(s) * nn.ReLU()(s),
    "relu in place": held(lambda s, o: nn.ReLU(inplace=True)(s)),
    "relu_": held(lambda s, o: s.relu_()),
    "relu_ of torch": held(lambda s, o: torch.relu_(s)),
    "in place without gradient": held(lambda s, o: (torch.no_grad()(plus)(s, o), torch.no_grad()(F.relu_)(s))[0]),
    "plus, without gradient": lambda s, o: F.relu(torch.no_grad()(lambda: s + o)()) * s,
    "plus": lambda s, o: F.relu(s + o),
    "plus from the left": lambda s, o: F.relu(o + s),
    "plus itself": lambda s, o: F.relu(s + s),
    "plus in place": held(lambda s, o: F.relu(plus(s, o))),
    "plus in place, relu in place": held(lambda s, o: F.relu(plus(s, o), inplace=True)),
    "add_ and then not relu": held(lambda s, o: s.add_(o).cos()),
    "into another in place": lambda s, o: F.relu(o.add_(s)),
    "plus twice": lambda s, o: F.relu(s + o + o.cos()),
    "plus twice in place": lambda s, o: F.relu(plus(plus(s, o), o)),
    "added by name": lambda s, o: F.relu(torch.add(s, other=o)) + F.relu(torch.add(s, o, alpha=1)),
    "a multiple added": lambda s, o: F.relu(torch.add(s, o, alpha=-2)) + F.relu(s.add(o, alpha=3)),
    "a number added": lambda s, o: F.relu(s + 0.5) + F.relu(1 + s) + sum([s, o]),
    "a channel added": lambda s, o: F.relu(s + o[:1, :, :1, :1]) + F.relu(o[:, :1] + s),
    "of another dtype added": lambda s, o: F.relu(s + o.detach().float()),
    "a parameter added": lambda s, o: F.relu(s + nn.Parameter(o.detach())),
    "not relu": lambda s, o: F.gelu(s) + s.square(),
    "relu and not relu": lambda s, o: F.relu(s) + s.sigmoid() + F.relu(s + o),
    "leaky": lambda s, o: F.leaky_relu(s) + F.relu6(s) + s.clamp(min=0),
    "changed in place": held(lambda s, o: s.mul_(3)),
    "changed in place by torch": held(lambda s, o: torch.sigmoid_(s)),
    "changed by index": held(by_index),
    "added in place after a view": alias_before(plus),
    "relu in place after a view": alias_before(lambda s, o: s.relu_()),
    "added in place after what changed it": held(lambda s, o: (s.mul_(2), plus(s, o), s.relu_())[1]),
    "changed as data": lambda s, o: (s.data.mul_(2), s)[1] + 0,
    "detached": lambda s, o: s.detach() * s,
    "without gradient": lambda s, o: torch.no_grad()(lambda: F.relu(s + o))() * s,
    "viewed": lambda s, o: s.view(2, -1).relu() + s.flatten(1) + s.permute(0, 2, 3, 1).reshape(2, -1),
    "indexed": lambda s, o: s[0].relu() + s[:, 1:2].mean() + sum(image.sum() for image in s),
    "in a list": lambda s, o: torch.cat([s, o, s.relu()], 1) + torch.stack([s, s + o]).sum(0).repeat(1, 3, 1, 1),
    "pooled": lambda s, o: F.max_pool2d(s, 2) + F.adaptive_avg_pool2d(s, 2),
    "convolved": lambda s, o: F.conv2d(s, o[:, :, :2, :2]),
    "to another dtype": lambda s, o: s.to(torch.float32).double() + s.double(),
    "a function of one's own": lambda s, o: Cube.apply(s),
    "a function of one's own after a change": held(lambda s, o: Cube.apply(plus(s, o))),
    "a function of one's own after another change": held(lambda s, o: Cube.apply(s.mul_(2))),
    "a function of one's own after relu_": held(lambda s, o: (s.relu_(), Cube.apply(s))[1]),
    "vmap": lambda s, o: torch.vmap(lambda image: image.relu() * 2)(s),
    "checkpointed": lambda s, o: torch.utils.checkpoint.checkpoint(lambda t: F.relu(t) ** 2, s, use_reentrant=False),
    "hooked": lambda s, o: (s.register_hook(lambda g: 2 * g), F.relu(s) * s)[1],
    "copied": lambda s, o: s.clone() + copy.copy(s) + torch.empty_like(s).copy_(s),
    "by its number": lambda s, o: s * float(s.detach().mean()) if s.sum() > -1e9 else s,
    "the other changes later": other_is_changed_after,
}


def derivatives(make: Callable[..., Tensor], use: Callable[[Tensor, Tensor], Tensor], given: list[Any]) -> list[Tensor]:
    """The result of a use, its gradients, and those of a function of them."""
    leaves = [t for t in given if t is not None]
    torch.manual_seed(1)
    other = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    out = use(make(*given), other * 1)
    assert type(out) is Tensor
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view_as(out).requires_grad_()
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(out.double(), [*leaves, other], weight, **options)
    second = torch.autograd.grad(sum((g * g.cos()).sum() for g in first), [*leaves, other, weight], **options)
    return [out, *first, *second]


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.usefixtures("backend")
def test_whatever_is_done_is_as_with_the_plain_sum(name: str, present: tuple[bool, bool]) -> None:
    results = [derivatives(make, USES[name], terms(*present)) for make in (pending_sum, plain_sum)]
    for value, truth in zip(*results, strict=True):
        assert value.shape == truth.shape
        assert value.dtype == truth.dtype
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("first", [(True, False), (False, False), (True, True)], ids=str)
@pytest.mark.parametrize("second", [(True, False), (False, False), (False, True)], ids=str)
@pytest.mark.usefixtures("backend")
def test_two_of_them(first: tuple[bool, bool], second: tuple[bool, bool], in_place: bool) -> None:
    def run(make: Callable[..., Tensor]) -> list[Tensor]:
        mine, theirs = terms(*first), terms(*second)
        a, b = make(*mine), make(*[t if t is None else t.sin() for t in theirs])
        out = F.relu(plus(a, b) if in_place else a + b) + b.cos()
        leaves = [t for t in (*mine, *theirs) if t is not None]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for value, truth in zip(run(pending_sum), run(plain_sum), strict=True):
        assert relative(value, truth) < rounding(torch.float64, 100, condition=10)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    return


@pytest.mark.parametrize(
    "use",
    [
        lambda a, b, o: F.relu(a + o),
        lambda a, b, o: (o + a).relu_(),
        lambda a, b, o: nn.ReLU(inplace=True)(plus(a, o)),
        lambda a, b, o: torch.relu(a),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_one_pass(use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    a, b, o = pending_sum(*terms(residual=False)), pending_sum(*terms(residual=False)), torch.randn(2, 3, 4, 5).double()
    with Operators() as operators:
        use(a, b, o)
    assert operators.calls == ["gated_sum_and_mask"]


@pytest.mark.usefixtures("kernels")
def test_two_of_them_in_one_pass_and_a_sum_of_biases() -> None:
    a, b = pending_sum(*terms(residual=False)), pending_sum(*terms(residual=False))
    with Operators() as operators:
        F.relu(plus(a, b), inplace=True)
    assert operators.calls == ["add", "gated_sum_and_mask"]


def test_metadata_computes_nothing() -> None:
    x, bias, _ = terms()
    assert x is not None
    x = x.contiguous(memory_format=torch.channels_last)
    s, truth = Pending.of(x, bias, None, ()), plain_sum(x, bias, None)
    with Operators() as operators:
        for read in (
            lambda t: (t.shape, t.size(), t.size(1), len(t), t.dim(), t.ndim, t.numel(), t.nelement(), torch.numel(t)),
            lambda t: (t.dtype, t.device, t.layout, t.is_cuda, t.get_device(), t.element_size(), t.is_leaf),
            lambda t: (t.requires_grad, t.is_floating_point(), torch.is_floating_point(t), t.is_complex()),
            lambda t: (t.stride(), t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)),
        ):
            assert read(s) == read(truth)
    assert not operators.calls
    assert s.bias is bias


def test_the_sum_is_computed_once() -> None:
    s = pending_sum(*terms())
    with Operators() as operators:
        assert s.detach().data_ptr() == s.data_ptr()
        s.view(2, -1), s[0], s.requires_grad
    assert operators.calls == ["add", "add"]


def test_what_takes_it_is_written_down() -> None:
    mine, theirs = [], []
    s, t = pending_sum(*terms(residual=False), takers=(mine,)), pending_sum(*terms(residual=False), takers=(theirs,))
    both = s + t
    assert mine == theirs == []
    F.relu(both), F.gelu(both), torch.cat([both, s]), Cube.apply(t)
    assert mine == ["relu", "gelu", "cat", "cat"]
    assert theirs[:3] == ["relu", "gelu", "cat"]
    assert theirs[3:]


def changed_residual(s: Tensor, other: Tensor) -> Tensor:
    s = s + other
    other.mul_(2)
    return F.relu(s)


def changed_residual_elsewhere(s: Tensor, other: Tensor) -> Tensor:
    s = s + other
    other.view(-1)[0] = 5
    return s.cos()


@pytest.mark.parametrize("use", [changed_residual, changed_residual_elsewhere])
def test_a_term_that_was_changed_in_between_is_an_error(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    takers: list[str] = []
    with pytest.raises(OverwrittenError, match=r"changed in place in between: call fastcure.prepare again"):
        use(pending_sum(*terms(residual=False), takers=(takers,)), torch.randn(2, 3, 4, 5).double())
    assert takers[-1] == "a change in place of one of its terms"


def test_a_change_of_shape_in_place_is_an_error() -> None:
    with pytest.raises(OverwrittenError):
        pending_sum(*terms()).unsqueeze_(0)


def test_nothing_holds_it() -> None:
    given = terms()
    s = pending_sum(*given)
    y = F.relu(s + 1) + F.relu(s) + Cube.apply(s)
    references = [weakref.ref(s), weakref.ref(s.x)]
    (g,) = torch.autograd.grad(y.sum(), given[:1], create_graph=True)
    del s, y, g
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("order", [1, 2])
def test_history_under_no_grad_and_without_gradients(order: int) -> None:
    x = torch.randn(2, 3, 4).double()
    s = Pending.of(x, None, x.cos(), ())
    assert not s.requires_grad
    with torch.no_grad():
        t = Pending.of(x.clone().requires_grad_(), None, None, ())
        t += s
    assert not t.requires_grad
    assert relative(F.relu(t), F.relu(2 * x + x.cos())) < rounding(torch.float64, 1, condition=10)
