"""The second-order rule of attention, against its definition in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import relative, rounding
from torch import Tensor, nn
from torch.autograd import grad, gradgradcheck
from torch.nn import functional as F

from fastcure import curvature, double_backward
from fastcure.profiling.flops import FlopCounter
from fastcure.rules import attention

SEEN = torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) > 0.3
SEEN[2] = False  # one query sees no key
FLOATS = torch.randn(3, 1, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((3, 2), {}),
    "no batch": ((), {}),
    "causal": ((2,), {"is_causal": True}),
    "scale": ((2,), {"scale": 0.7}),
    "boolean mask": ((3, 2), {"attn_mask": SEEN}),
    "float mask": ((3, 2), {"attn_mask": FLOATS}),
}


@pytest.fixture
def _long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the rule for short sequences, four queries at a time."""
    monkeypatch.setattr(attention, "LONG", 1)
    monkeypatch.setattr(attention, "ROWS", 4)


def operands(batch: tuple[int, ...], dtype: torch.dtype = torch.float64, **size: int) -> list[Tensor]:
    """Queries, keys and values of other widths; the keys are not contiguous."""
    torch.manual_seed(0)
    L, S, E, E_v = (size.get(name, default) for name, default in (("L", 7), ("S", 9), ("E", 5), ("E_v", 4)))
    shapes = (*batch, L, E), (*batch, E, S), (*batch, S, E_v)
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [t.requires_grad_() for t in (q, k.mT, v)]


def defined(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    scores = (q @ k.mT) * options.get("scale", q.shape[-1] ** -0.5)
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        weights = torch.where(mask, scores.exp(), 0.0)
    else:
        weights = (scores if mask is None else scores + mask).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v


def derivatives(function: Callable[..., Tensor], tensors: list[Tensor], order: int = 2, **options: Any) -> list[Tensor]:
    """Output, and the gradients of sums made of those before."""
    out = function(*tensors, **options)
    found, scalar = [out], (out.sin() * out).sum()
    for _ in range(order):
        gradients = grad(scalar, tensors, create_graph=True)
        found += gradients
        scalar = torch.stack([(g * g.cos()).sum() for g in gradients]).sum()
    return found


@pytest.mark.usefixtures("_long")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name: str, order: int) -> None:
    batch, options = CASES[name]
    tensors = operands(batch)
    with double_backward():
        ours = derivatives(F.scaled_dot_product_attention, tensors, order, **options)
    for found, wanted in zip(ours, derivatives(defined, tensors, order, **options), strict=True):
        assert relative(found, wanted) < 1e-11


@pytest.mark.usefixtures("_long")
@pytest.mark.parametrize("wanted", ["query", "key", "value", "key and value"])
def test_third_derivatives_where_some_operands_are_constant(wanted: str) -> None:
    names = ("query", "key", "value")
    tensors = [t.detach().requires_grad_(name in wanted) for t, name in zip(operands((2,)), names, strict=True)]

    def attended(attention: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t for t in tensors if t.requires_grad]
        return derivatives(lambda *_: attention(*tensors), leaves, 3)

    with double_backward():
        ours = attended(F.scaled_dot_product_attention)
    for found, truth in zip(ours, attended(defined), strict=True):
        assert relative(found, truth) < 1e-11


@pytest.mark.usefixtures("_long")
def test_second_derivatives_by_finite_differences() -> None:
    torch.manual_seed(0)
    into, out = nn.Linear(4, 12).double(), nn.Linear(4, 3).double()

    def network(x: Tensor, *_: Tensor) -> Tensor:
        with double_backward():
            return out(F.scaled_dot_product_attention(*into(x).chunk(3, -1), is_causal=True))

    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(network, (x, *into.parameters(), *out.parameters()), fast_mode=True)


@pytest.mark.usefixtures("_long")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    tensors = operands((2,), dtype, L=70, S=70)
    with double_backward():
        ours = derivatives(F.scaled_dot_product_attention, tensors)
    truth = derivatives(defined, [t.detach().double().requires_grad_() for t in tensors])
    for found, wanted in zip(ours, truth, strict=True):
        assert found.dtype == dtype
        # Each of few passes is rounded at its end; what they sum is wide.
        assert relative(found.double(), wanted) < 4 * rounding(dtype, 1 if dtype != torch.float32 else 70)


@pytest.mark.usefixtures("_long")
def test_autocast_computes_as_it_does_outside_of_the_context() -> None:
    q, k, v = operands((2,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.scaled_dot_product_attention(q, k, v)
        with double_backward():
            ours = F.scaled_dot_product_attention(q, k, v)
            (g,) = grad(ours.float().square().sum(), q, create_graph=True)
        g.square().sum().backward()
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert relative(ours.double(), plain.double()) < 2 * rounding(torch.bfloat16, 1)
    assert k.grad is not None and k.grad.dtype == torch.float32  # noqa: PT018


@pytest.mark.usefixtures("_long")
def test_nan_stays() -> None:
    q, k, v = operands((2,))
    with torch.no_grad():
        k[0, 0] = torch.nan
    with double_backward():
        out = F.scaled_dot_product_attention(q, k, v, torch.zeros(7, 9, dtype=torch.float64))
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.usefixtures("_long")
def test_many_gradients_at_once_are_refused() -> None:
    tensors = operands((2,))
    with double_backward():
        out = F.scaled_dot_product_attention(*tensors)
        with pytest.raises(RuntimeError, match="is_grads_batched"):
            grad(out, tensors, torch.ones(3, *out.shape), is_grads_batched=True)


def test_what_it_does_not_serve_is_plain_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONG", 9)
    q, k, v = operands((2,), L=9)
    learned = torch.zeros(9, 9, dtype=torch.float64, requires_grad=True)
    heads = [torch.cat([q, q])[None], k[None], v[None]]
    for tensors, options in [
        ([q, k, v], {"attn_mask": learned}),
        ([q[:1], k, v], {}),
        ([q[:, :8], k, v], {}),
        (heads, {"enable_gqa": True}),
    ]:
        with double_backward():
            out = F.scaled_dot_product_attention(*tensors, **options)
        assert "_Attention" not in type(_source(out)).__name__
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, **options))
    with double_backward():
        assert type(_source(F.scaled_dot_product_attention(q, k, v))).__name__ == "_AttentionBackward"


def _source(out: Tensor) -> Any:
    """The node of attention, below the view of its output."""
    node = out.grad_fn
    while node is not None and "View" in type(node).__name__:
        node = node.next_functions[0][0]
    return node


class Block(nn.Module):
    """Attention over the rows of an image, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


@pytest.mark.parametrize(("tokens", "keeps"), [(252, True), (256, False), (400, False)])
def test_nothing_of_the_size_of_the_probabilities_is_kept(tokens: int, keeps: bool) -> None:
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    torch.manual_seed(0)
    block, x, y = Block(), torch.rand(2, 4, tokens // 4, 16), torch.tensor([0, 1])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), double_backward():
        x.requires_grad_()
        (g,) = grad(F.cross_entropy(block(x), y), x, create_graph=True)
    assert (max(kept) >= tokens**2) == keeps
    assert keeps or max(kept) <= 2 * tokens * 48
    g.square().sum().backward()


def test_it_costs_what_it_is_said_to() -> None:
    """24 products for 18, of a step that is differentiated twice."""
    counts = []
    for tokens in (256, 255):
        q, k, v = (torch.randn(1, tokens, 16).requires_grad_() for _ in range(3))
        with FlopCounter() as counter, double_backward():
            out = F.scaled_dot_product_attention(q, k, v)
            first = grad(out.square().sum(), (q, k, v), create_graph=True)
            (sum(g.square().sum() for g in first) + out.sum()).backward()  # type: ignore[union-attr]
        counts.append(counter.total / (2 * tokens**2 * 16))
    assert counts == [24, 18]


def test_cure_of_a_long_sequence_is_the_reference() -> None:
    torch.manual_seed(0)
    block, x, y = Block().double(), torch.rand(2, 4, 64, 16, dtype=torch.float64), torch.tensor([0, 1])
    gradients = []
    for engine in ("eager", "reference"):
        block.zero_grad()
        out = curvature(block, x, y, h=0.7, engine=engine)
        (out.loss + out.penalty).sum().backward()
        gradients.append([p.grad for p in block.parameters()])
    assert relative(*gradients) < 1e-9  # type: ignore[arg-type]


def test_what_a_boolean_mask_leaves_out_has_no_weight() -> None:
    q = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    with double_backward():
        found = F.scaled_dot_product_attention(q, q, q, mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, mask))


def test_vectors_have_the_error_of_torch() -> None:
    vector = torch.rand(4, requires_grad=True)
    with pytest.raises(RuntimeError) as plain:
        F.scaled_dot_product_attention(vector, vector, vector)
    with double_backward(), pytest.raises(RuntimeError) as ours:
        F.scaled_dot_product_attention(vector, vector, vector)
    assert str(ours.value) == str(plain.value)
