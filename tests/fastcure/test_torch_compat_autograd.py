"""A canary for each private name of torch's autograd that the package uses."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from canaries import breaks
from fastcure_kernels.torch_compat import has_gradient_hooks
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import fastcure._torch_compat as compat

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch's own files


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1


class Square(torch.autograd.Function):
    """Notes what its backward sees."""

    notes: list[object]

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        nodes = [node for node, _ in ctx.next_functions]
        Square.notes = [
            [compat.engine_will_execute(node) for node in nodes],
            compat.backward_retains_graph(),
            compat.thread_local("fastcure.test"),
        ]
        return g * w, g * x


def product() -> tuple[Tensor, Tensor, Tensor]:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    return x, w, Square.apply(x.view_as(x), w.view_as(w))


@breaks("rules would compute gradients of weights that nobody asked for; rules would leave out gradients")
def test_a_backward_knows_which_nodes_it_goes_through() -> None:
    x, w, y = product()
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert Square.notes[0] == [True, False]
    torch.autograd.grad(y.sum(), w, retain_graph=True)
    assert Square.notes[0] == [False, True]
    y.sum().backward()
    assert Square.notes[0] == [True, True]


@breaks("a batch norm would mix operands of two backward passes, or leave out one of its two paths to the input")
def test_each_backward_has_a_number_of_its_own_and_waits_for_edges_that_carry_nothing() -> None:
    seen = []

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x * 1, x.new_empty(0)

        @staticmethod
        def backward(ctx, g, token):
            seen.append(("late", compat.backward_id(), token))
            return g

    class Early(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, token):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            seen.append(("early", compat.backward_id(), None))
            return g, None

    x, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y, token = Late.apply(x)
    z = Early.apply(other, token)
    for _ in range(2):
        torch.autograd.grad((y.sum(), z.sum()), (x, other), retain_graph=True)
    assert [name for name, *_ in seen] == ["early", "late"] * 2
    assert all(token is None for *_, token in seen)
    numbers = [number for _, number, _ in seen]
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3] != -1
    torch.autograd.grad(z.sum(), x, allow_unused=True)
    assert [name for name, *_ in seen[4:]] == ["early", "late"]


@breaks("a rule would change a view in place and leave its base with a wrong history")
def test_views_are_known() -> None:
    x = torch.ones(2, 2, requires_grad=True) * 1
    assert compat.is_view(x[0])
    assert not compat.is_view(x)
    assert not compat.is_view(x.clone())


@breaks("a hook would be given a gradient that waits for another to be added")
def test_hooks_of_tensors_are_known() -> None:
    x = torch.ones(2, requires_grad=True) * 1
    assert not has_gradient_hooks(x)
    handle = x.register_hook(lambda g: g)
    assert has_gradient_hooks(x)
    handle.remove()
    assert not has_gradient_hooks(x)


@breaks("a rule asked about a leaf would get an answer that it does not know")
def test_a_leaf_for_whose_gradient_grad_was_called_is_an_error() -> None:
    class OfLeaf(Identity):
        @staticmethod
        def backward(ctx, g):
            with pytest.raises(RuntimeError):
                compat.engine_will_execute(ctx.next_functions[0][0])
            return g

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(OfLeaf.apply(x).sum(), x)


@breaks("engines would free, or keep, the graph of a penalty against retain_graph")
def test_a_backward_knows_whether_its_graph_is_kept() -> None:
    x, _, y = product()
    for retain in (True, False):
        torch.autograd.grad(y.sum(), x, retain_graph=retain)
        assert Square.notes[1] is retain


@breaks("a change of a weight between forward and backward would go unseen")
def test_versions_count_changes_in_place() -> None:
    x = torch.ones(2)
    before = compat.version(x)
    x.add_(1)
    x[:1].mul_(2)
    assert compat.version(x) == before + 2


@breaks("foreign Functions would not be tried for a second derivative; backward hooks would count as foreign code")
def test_a_node_knows_its_function() -> None:
    node = product()[2].grad_fn
    assert compat.function_of(type(node)) is Square
    hooked = nn.Linear(2, 2)
    hooked.register_full_backward_hook(lambda *_: None)
    node = hooked(torch.ones(1, 2)).grad_fn
    assert compat.function_of(type(node)) is compat.BackwardHookFunction


@pytest.mark.parametrize(("name", "slope"), [("elu", 1.0), ("selu", 1.6732632)])
@breaks("the kink of SELU would not be warned of")
def test_an_elu_tells_its_slopes(name: str, slope: float) -> None:
    node = getattr(F, name)(torch.ones(2, requires_grad=True)).grad_fn
    assert compat.elu_slope(node) == pytest.approx(slope)


@breaks("tangents would be lost without an error")
def test_forward_mode_is_seen() -> None:
    assert not compat.in_forward_mode()
    with forward_ad.dual_level():
        assert compat.in_forward_mode()


@pytest.mark.parametrize(
    "transform", [torch.func.vmap, torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))]
)
@breaks("rules would run inside torch.func, where their gradients are wrong")
def test_transforms_are_seen(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(compat.in_functorch_transform())
        return x.sum()

    assert not compat.in_functorch_transform()
    transform(f)(torch.ones(3))
    assert seen == [True]


@breaks("rules would mix the gradients of is_grads_batched=True")
def test_batched_gradients_are_seen() -> None:
    seen = []

    class Seen(Identity):
        @staticmethod
        def backward(ctx, g):
            seen.append(compat.is_batched_gradient(g))
            return g

    x = torch.ones(2, requires_grad=True)
    y = Seen.apply(x)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


@breaks("double_backward() of one thread would act in another; double_backward() would not act in a backward")
def test_torchs_thread_local_state_belongs_to_a_thread() -> None:
    compat.set_thread_local("fastcure.test", 7)
    found = []
    thread = threading.Thread(target=lambda: found.append(compat.thread_local("fastcure.test")))
    thread.start()
    thread.join()
    x, _, y = product()
    torch.autograd.grad(y.sum(), x)
    assert compat.thread_local("fastcure.test") == 7
    assert found == [0]
    assert Square.notes[2] == 7


@pytest.mark.parametrize("value", [{}, "all", -1, 256, True])
def test_nothing_but_small_numbers_is_kept_in_it(value: object) -> None:
    """Of torch 2.11 an object that is kept there loses a reference, and with the last one the process dies."""
    with pytest.raises(TypeError, match=r"must be an int in 0\.\.255, got"):
        compat.set_thread_local("fastcure.test", value)  # type: ignore[arg-type]
