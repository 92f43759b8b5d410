"""A gradient in two parts is their sum to whoever reads it, and two tensors to a kernel that asks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from fastcure_kernels.split_gradient import Branch, SplitGradient, parts_of, reads_parts
from torch import Tensor
from torch.autograd import Function, grad


class Reads(Function):
    """The identity, whose backward notes the parts in which its gradient came."""

    @staticmethod
    def forward(ctx, x):
        reads_parts(ctx)
        ctx.parts = []
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.parts.append(parts_of(g))
        return g * 1.0


class Twice(Function):
    """2 x, whose gradient may wait for another."""

    @staticmethod
    def forward(ctx, x):
        ctx.branch = Branch(x, even_if_first=True)
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return SplitGradient.of(2 * g) if ctx.branch.may_split() else 2 * g


def used_twice(x, other=torch.sin, *more, watch=lambda y: None):
    """The node of a tensor with two uses, what anybody has asked of it, and a scalar made of it."""
    y = Reads.apply(x)
    node, held = y.grad_fn, watch(y)
    total = other(y) + Twice.apply(y)
    for use in more:
        total = total + use(y)
    return node, held, total.sum()


def in_parts(node):
    return [second is not None for _, second in node.parts]


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 3, requires_grad=True)


def test_the_node_reads_two_tensors_and_nothing_added_them(x):
    node, _, total = used_twice(x)
    (g,) = grad(total, x)
    ((first, second),) = node.parts
    assert {type(first), type(second)} == {Tensor}
    assert sorted([first.unique().numel(), second.unique().numel()]) == [1, 6]  # 2, and the cosines
    assert torch.equal(g, x.cos() + 2)


def test_differentiated_again(x):
    node, _, total = used_twice(x)
    (g,) = grad(total, x, create_graph=True)
    assert g.requires_grad
    torch.testing.assert_close(grad(g.square().sum(), x)[0], -2 * (x.cos() + 2) * x.sin())
    assert in_parts(node)[0]


def test_three_uses_are_added_up(x):
    node, _, total = used_twice(x, torch.sin, torch.exp)
    (g,) = grad(total, x)
    assert in_parts(node) == [False]
    torch.testing.assert_close(g, x.cos() + 2 + x.exp())


def with_hook(y):
    seen = []
    y.register_hook(seen.append)
    return seen


WATCHED = {
    "held": lambda y: y,
    "kept by retain_grad": lambda y: y.retain_grad(),
    "a hook": with_hook,
    "a hook that changes it": lambda y: y.register_hook(lambda g: g.mul_(1.0)) and None,
}


@pytest.mark.parametrize("name", WATCHED)
def test_where_somebody_can_tell_it_is_a_tensor_in_memory(x, name):
    node, held, total = used_twice(x, watch=WATCHED[name])
    (g,) = grad(total, x, retain_graph=True)
    assert in_parts(node) == [False]
    assert torch.equal(g, x.cos() + 2)
    if name == "a hook":
        assert [type(each) for each in held] == [Tensor]
        assert torch.equal(held[0], g)
    if name == "held":
        (found,) = grad(total, held)
        assert type(found) is Tensor
        assert torch.equal(found, g)


def test_a_hook_of_the_node_reads_the_sum(x):
    node, _, total = used_twice(x)
    seen = []
    node.register_prehook(lambda gradients: seen.append(gradients[0]) or (gradients[0].mul(3.0),))
    assert torch.equal(grad(total, x)[0], 3 * (x.cos() + 2))
    assert torch.equal(seen[0].detach(), x.cos() + 2)


def test_a_leaf_gets_an_ordinary_gradient(x):
    (2 * x + Twice.apply(x)).sum().backward()
    assert type(x.grad) is Tensor


def test_no_more_than_the_shape_is_written_down():
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    total = SplitGradient.of(a) + b
    assert [part is t for part, t in zip(parts_of(total), (a, b), strict=True)] == [True, True]
    assert (total.shape, total.stride(), total.dtype) == (a.shape, a.stride(), a.dtype)
    assert torch.equal(total + 0, a + b)
    assert parts_of(total)[1] is None  # read once, it is a sum
    assert torch.equal(total, a + b)


@pytest.mark.parametrize(
    "other",
    [torch.rand(4), torch.rand(3, 4).double(), torch.rand(4, 3).T, 2.0],
    ids=["broadcast", "another dtype", "another layout", "a number"],
)
def test_what_is_not_of_its_kind_is_added_at_once(other):
    a = torch.rand(3, 4)
    total = SplitGradient.of(a) + other
    assert type(total) is Tensor
    assert torch.equal(total, a + other)
    assert torch.equal(torch.add(SplitGradient.of(a), a, alpha=3), torch.add(a, a, alpha=3))


def test_changed_in_place():
    a, b = torch.rand(3), torch.rand(3)
    total = SplitGradient.of(a) + b
    same = total.mul_(2.0)
    assert same is total
    assert torch.equal(total, (a + b) * 2)
    assert torch.equal(SplitGradient.of(a).add_(1.0), a)  # the memory of `a`


READERS = {
    "printing": repr,
    "a copy": copy.deepcopy,
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "numpy": lambda g: torch.as_tensor(g.numpy()),
    "numpy's own": lambda g: torch.as_tensor(np.asarray(g)),
    "a list": lambda g: torch.tensor(g.tolist()),
    "dlpack": torch.from_dlpack,
    "storage": lambda g: torch.tensor(g.untyped_storage().tolist(), dtype=torch.uint8).view(torch.float32),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("parts", [1, 2])
def test_what_passes_operators_by_reads_the_sum(name, parts):
    a, b = torch.rand(3), torch.rand(3)
    g, expected = (SplitGradient.of(a), a) if parts == 1 else (SplitGradient.of(a) + b, a + b)
    found = READERS[name](g)
    assert found == repr(expected) if name == "printing" else torch.equal(found, expected)
    assert g.data_ptr() != 0


def test_nobody_behind_it_reads_parts(x):
    for y in (x, x * 2):
        assert not Branch(y, even_if_first=True).may_split()
    y = Reads.apply(x)
    uses = [Branch(y, even_if_first=False) for _ in range(2)]
    graph = y * y
    del y
    assert [use.may_split() for use in uses] == [False, True]
    assert graph.requires_grad
