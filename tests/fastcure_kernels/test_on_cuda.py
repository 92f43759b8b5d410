"""What only a GPU shows: sizes beyond 32-bit indices, CUDA graphs, no waiting for the device, one compilation."""

import fastcure_kernels as fk
import pytest
import torch
from fastcure_kernels import batch_norm

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")


def every_operator(x, parameter):
    grad = x - 0.5
    adv = fk.linf_step(x, grad, x, parameter, parameter)
    adv = fk.l2_step(adv, grad, x, parameter, parameter)
    adv = fk.bias_relu(adv, adv[0, :, 0, 0], x)
    running = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    adv, norm = batch_norm.finish(batch_norm.measure(adv, None, None, running, 0.1, 1e-5)[0], relu=True)
    q, w_sums, w = batch_norm.backward(norm, x)
    u, v_sums = batch_norm.double_backward(norm, q, w)
    adv = batch_norm.last_backward(norm, u, q, w, v_sums, w_sums)[0]
    return fk.difference_sqnorm(adv, fk.direction_step(x, grad, parameter))


def test_more_elements_than_32_bits_count():
    rows, N = 65_540, 32_768  # 2^31 elements and 131,072 more: only the last rows are compared
    x = torch.zeros(rows, N, dtype=torch.bfloat16, device="cuda")
    x[-2:] = torch.rand(2, N)
    tail = x[-2:].clone()
    assert torch.equal(fk.linf_step(x, x - 0.5, x, 0.25, 0.25)[-2:], fk.linf_step(tail, tail - 0.5, tail, 0.25, 0.25))
    assert torch.equal(fk.direction_step(x, x, 1.3)[-2:], fk.direction_step(tail, tail, 1.3))
    assert torch.equal(fk.bias_relu(x, x[-1], x)[-2:], fk.bias_relu(tail, x[-1], tail))
    assert torch.equal(fk.difference_sqnorm(x, -x)[-2:], fk.difference_sqnorm(tail, -tail))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("parameter", [0.25, "tensor"])
def test_no_waiting_for_the_device(parameter):
    x = torch.rand(4, 3, 32, 32, device="cuda")
    parameter = torch.tensor(0.25, device="cuda") if parameter == "tensor" else parameter
    every_operator(x, parameter)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        every_operator(x, parameter)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_reads_its_parameters():
    x, eps = torch.rand(4, 3, 32, 32, device="cuda"), torch.tensor(0.25, device="cuda")
    every_operator(x, eps)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adv = fk.linf_step(x + 1, x, x, 0.1, eps, -1.0, 2.0)
        norms = every_operator(x, 0.25)
    for value in (0.25, 0.0):
        eps.fill_(value)
        graph.replay()
        torch.testing.assert_close(adv, (x + value).clamp(max=2.0))
    assert norms.isfinite().all()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_relu_of_the_size_of_a_network(dtype, form):
    x, residual, w = (torch.randn(32, 64, 56, 56, device="cuda", dtype=dtype).to(memory_format=form) for _ in range(3))
    bias = torch.randn(64, device="cuda", dtype=dtype)
    tensors = [t.requires_grad_() for t in (x, bias, residual)]
    y = fk.bias_relu(*tensors)
    wide = x.float() + bias.float().view(-1, 1, 1) + residual.float()
    torch.testing.assert_close(y, wide.relu().to(dtype))
    g_x, g_bias, g_residual = torch.autograd.grad(y, tensors, w)
    assert torch.equal(g_x, torch.where(y > 0, w, 0))
    assert torch.equal(g_x, g_residual)
    torch.testing.assert_close(g_bias, g_x.float().sum((0, 2, 3)).to(dtype), rtol=2e-2, atol=1)


def test_values_do_not_recompile():
    from fastcure_kernels.linf_step import _linf_step_kernel

    x = torch.rand(4, 64, device="cuda")
    fk.linf_step(x, x, x, 0.1, 0.2)
    (cache, *_) = _linf_step_kernel.jitted.device_caches[x.device.index]
    built = len(cache)
    for value in (0.0, 0.3, 1.0, -1.0):
        fk.linf_step(x, x, x, value, value)
    assert len(cache) == built
