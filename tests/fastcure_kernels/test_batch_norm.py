"""The passes of a training-mode batch norm against autograd of its definition in float64."""

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fastcure_kernels import batch_norm as passes
from fastcure_kernels.channel_sums import PROGRAMS, Layout, _divide
from fastcure_kernels.split_gradient import SplitGradient
from torch import Tensor
from torch.autograd import grad

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(2, 3), (37, 5), (3, 3, 7), (2, 1, 3, 3), (2, 70, 1, 1), (3, 4, 6, 5), (2, 2, 2, 3, 2), (1, 4, 2, 3)]
LAYOUTS = ["contiguous", "channels_last", "sliced"]
AFTER = ["nothing", "relu", "residual", "residual and relu"]
EPS = 0.1  # of two values x_hat is else +-1, and q the difference of equal numbers


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """All tests of this file."""


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    g: Tensor
    v: Tensor
    v_residual: Tensor | None
    g2: Tensor


def operands(shape, dtype=torch.float32, device="cpu", after="nothing", mean=0.5):
    torch.manual_seed(0)
    x = torch.randn(shape) + mean
    w, b = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    rest = [torch.randn(shape) for _ in range(5)]
    if "residual" not in after:
        rest[0] = rest[3] = None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, *rest = (t if t is None else t.to(device, dtype) for t in (x, *rest))
    return Operands(x, w.to(device, wide), b.to(device, wide), rest[0], rest[1], rest[2], rest[3], rest[4])


def forward(x, weight=None, bias=None, running=None, momentum=0.1, residual=None, relu=False):
    norm, y = passes.measure(x, weight, bias, running, momentum, EPS)
    return (y, norm) if y is not None and residual is None and not relu else passes.finish(norm, residual, relu)


def ours(o, relu, lay=lambda t: t):
    """All values and derivatives, by the passes."""
    o = Operands(*(t if t is None or t.dim() < 2 else lay(t) for t in o))
    y, norm = forward(o.x, o.weight, o.bias, residual=o.residual, relu=relu)
    q, w_sums, w = passes.backward(norm, o.g)
    u, v_sums = passes.double_backward(norm, o.v, w, o.v_residual)
    g_x, sums, w2 = passes.last_backward(norm, o.g2, o.v, w, v_sums, w_sums)
    found = {"y": y, "q": q, "bias, first": w_sums[0], "weight, first": w_sums[1], "u": u}
    found |= {"x": g_x, "bias": sums[0], "weight": sums[1]}
    return found | ({"residual": w2} if o.residual is not None else {})


def truth(o, relu):
    """The same by autograd of the definition, in float64."""
    o = Operands(*(t if t is None else t.detach().cpu().double() for t in o))
    leaves = [t.requires_grad_() for t in (o.x, o.weight, o.bias, o.g, o.residual) if t is not None]
    dims = [d for d in range(o.x.dim()) if d != 1]
    m = o.x.mean(dims, keepdim=True)
    channels = (1, -1, *[1] * (o.x.dim() - 2))
    z = (o.x - m) / ((o.x - m).square().mean(dims, keepdim=True) + EPS).sqrt()
    z = z * o.weight.view(channels) + o.bias.view(channels)
    z = z if o.residual is None else z + o.residual
    y = torch.relu(z) if relu else z
    first = grad(y, (o.x, o.weight, o.bias, *leaves[4:]), o.g, create_graph=True)
    objective = (first[0] * o.v).sum() + (y * o.g2).sum()
    if o.residual is not None:
        objective = objective + (first[3] * o.v_residual).sum()
    g_x, g_weight, g_bias, u, *g_residual = grad(objective, leaves)
    found = {"y": y, "q": first[0], "bias, first": first[2], "weight, first": first[1], "u": u}
    found |= {"x": g_x, "bias": g_bias, "weight": g_weight}
    return found | ({"residual": g_residual[0]} if g_residual else {})


def check(o, close, after="nothing", looser=4.0, lay=lambda t: t):
    relu = "relu" in after
    values, expected = ours(o, relu, lay), truth(o, relu)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == (o.weight.dtype if name.startswith(("bias", "weight")) else o.x.dtype)
        # torch's own norms do not sum half precision in float32 on every device.
        close(value if os.environ["FASTCURE_BACKEND"] == "triton" else value.to(o.x.dtype), expected[name], looser)
    return values


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, close, dtype, after):
    check(operands((3, 5, 4, 7), dtype, device, after), close, after)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, close, shape):
    check(operands(shape, device=device, after="residual and relu"), close, "residual and relu")
    check(operands(shape, device=device), close, "relu")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 16, 5, 4), dtype) for dtype in DTYPES]
    + [(shape, torch.float32) for shape in [(2, 8, 3, 5), (5, 24), (2, 72, 3, 3), (3, 136, 2, 1)]],
    ids=str,
)
def test_a_mask_of_bits_where_channels_are_last(triton_device, close, lay, shape, dtype):
    o = operands(shape, dtype, triton_device, "residual and relu")
    order = "channels_last" if len(shape) == 4 else "contiguous"
    check(o, close, "residual and relu", lay=lambda t: lay(t, order))
    y, norm = forward(*(lay(t, order) if t.dim() == 4 else t for t in o[:3]), residual=o.residual, relu=True)
    bits = norm.mask.cpu().numpy()
    assert bits.nbytes == y.numel() // 8
    memory = y.cpu().movedim(1, -1).flatten()
    assert torch.equal(torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool(), memory > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("after", ["relu", "residual and relu"])
def test_layouts(device, close, lay, layout, after):
    o = operands((3, 4, 6, 5), device=device, after=after)
    values = check(o, close, after, lay=lambda t: lay(t, layout))
    if layout != "sliced":
        assert values["y"].stride() == values["x"].stride() == lay(o.x, layout).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_rows_than_one_program_takes(triton_device, close, lay, layout, monkeypatch):
    monkeypatch.setattr(
        "fastcure_kernels.channel_sums.PROGRAMS", 3
    )  # each then takes several tiles, the last one fewer
    o = operands((5, 33, 19, 17), device=triton_device)
    check(o, close, "relu", lay=lambda t: lay(t, layout))


def test_a_mean_far_from_zero_costs_no_digits(device, close):
    # Multiples of 1/8 around 2^15, of which all sums of squares without a shift lose everything.
    torch.manual_seed(0)
    x = (torch.randint(-16, 17, (8, 3, 16, 16)) / 8 + 2.0**15).to(device)
    y, norm = forward(x)
    wide = x.double().cpu()
    m = wide.mean((0, 2, 3), keepdim=True)
    close(y, (wide - m) / (wide.var((0, 2, 3), unbiased=False, keepdim=True) + EPS).sqrt(), 2e4)  # of m's own rounding
    r = 1 / (wide.var((0, 2, 3), unbiased=False) + EPS).sqrt()
    close(norm.stats[1], r, 4.0 if os.environ["FASTCURE_BACKEND"] == "triton" else 1e3)
    close(norm.stats[0], m.flatten())


@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_running_statistics(device, close, momentum, dtype):
    o = operands((4, 3, 5, 5), dtype, device)
    mean, var = torch.rand_like(o.weight), torch.rand_like(o.weight)
    wide = o.x.double().cpu()
    expected = [mean.cpu().double().lerp(wide.mean((0, 2, 3)), momentum)]
    expected += [var.cpu().double().lerp(wide.var((0, 2, 3)), momentum)]
    forward(o.x, None, o.bias, (mean, var), momentum)
    close(mean, expected[0], 4.0)
    close(var, expected[1], 4.0)


def test_a_channel_with_nan_is_nan_alone(device):
    o = operands((2, 3, 4, 4), device=device)
    o.x[0, 1, 2, 2] = torch.nan
    for value in ours(o, relu=True).values():
        channels = value if value.dim() == 1 else value.movedim(1, 0).flatten(1)
        assert not channels[0].isnan().any()
        assert not channels[2].isnan().any()
    y, _ = forward(o.x, o.weight, o.bias, relu=True)
    assert y[:, 1].isnan().all()


def test_without_a_gradient_at_the_output(device, close):
    o = operands((3, 4, 2, 5), torch.float64, device)
    zero = o._replace(g2=torch.zeros_like(o.g2))
    _, norm = forward(o.x, o.weight, o.bias)
    _, w_sums, w = passes.backward(norm, o.g)
    _, v_sums = passes.double_backward(norm, o.v, w)
    g_x, sums, w2 = passes.last_backward(norm, None, o.v, w, v_sums, w_sums)
    expected = truth(zero, relu=False)
    assert w2 is None
    close(g_x, expected["x"])
    close(sums[1], expected["weight"], 4.0)
    assert not sums[0].any()


@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", torch.bfloat16), ("channels_last", torch.float32)])
@pytest.mark.parametrize("after", AFTER)
def test_gradients_in_two_parts_give_the_bits_of_their_sum(triton_device, lay, after, dtype, layout):
    o = operands((3, 5, 4, 7), dtype, triton_device, after)
    more = torch.randn_like(o.g)
    split = [SplitGradient.of(lay(g, layout)) + lay(more, layout) for g in (o.g, o.g2)]
    assert [len(g.parts) for g in split] == [2, 2]
    whole = ours(o._replace(g=o.g + more, g2=o.g2 + more), "relu" in after)
    for name, value in ours(o._replace(g=split[0], g2=split[1]), "relu" in after).items():
        assert torch.equal(value, whole[name]), name
    assert [len(g.parts) for g in split] == [2, 2]  # nobody has added them up


def test_every_run_gives_the_same_bits(triton_device):
    o = operands((6, 5, 9, 9), device=triton_device, after="residual")
    for one, other in zip(ours(o, True).values(), ours(o, True).values(), strict=True):
        assert torch.equal(one, other)


def test_reductions_are_divided_into_one_wave():
    for shape in ((128, 64, 32, 32), (128, 512, 4, 4), (2, 3), (4096, 2048, 7, 7)):
        x = torch.empty(shape, device="meta")
        for layout in (Layout.of(x), Layout.of(x)._replace(last=False)):
            programs, rows, options = _divide(layout, wide=False)
            assert (programs - 1) * rows < layout.M <= programs * rows
            assert programs * -(-layout.C // options["CHANNELS"]) <= max(PROGRAMS, -(-layout.C // options["CHANNELS"]))
