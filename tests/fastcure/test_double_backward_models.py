"""Models inside `fastcure.double_backward()`: their penalty's gradients are those of torch."""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from networks import IN_FLOAT64, Checkpointed, relative
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointError

from fastcure import double_backward

jit = pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # forward mode is scripted in torch


def penalty_gradients(
    model: nn.Module, x: Tensor, context: Callable[[], Any] = double_backward, inside: bool = False
) -> list[Tensor]:
    """Of ||d output / d x||^2, in the parameters; the last backward inside of the context or outside."""
    model.zero_grad()
    with context():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        if inside:
            g.square().sum().backward()
    if not inside:
        g.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [torch.view_as_real(g) if g.is_complex() else g for g in grads]


class Attention(nn.Module):
    """`nn.MultiheadAttention`, whose inside is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x, x, x, need_weights=False)[0])


class Hyper(nn.Module):
    """A convolution whose weight is made of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 3), nn.Linear(3, 108)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean((0, 2, 3))).view(4, 3, 3, 3)
        return torch.func.functional_call(self.conv, {"weight": weight}, (x,)).tanh()


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.conv, in_dims=2, out_dims=2)(torch.stack([x, x.flip(3)], 2)).tanh()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(torch.complex128)).abs()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 2, 2), nn.GroupNorm(1, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": network,
    "evaluation mode": lambda: network().eval(),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Tanh()),
    "hyper-network": Hyper,
    "vmap": Frames,
    "complex": Complex,
    "channels_last": lambda: network().to(memory_format=torch.channels_last),
    "no batch": lambda: nn.Sequential(nn.Flatten(0, 1), nn.Conv1d(6, 4, 3), nn.Tanh()),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_differentiated_as_by_torch(name: str) -> None:
    model, x = MODELS[name]().double(), torch.rand(2, 3, 6, 7, dtype=torch.float64)
    if name == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    found, truth = penalty_gradients(model, x), penalty_gradients(other, x, nullcontext)
    assert relative(found, truth) < IN_FLOAT64
    for buffer, wanted in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted)


def test_one_image_in_channels_last() -> None:
    """Where torch 2.13 is wrong itself, against the same image in the other layout and twice."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh()).double()
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    truth = [g / 2 for g in penalty_gradients(copy.deepcopy(model), torch.cat([x, x]), nullcontext)]
    model.to(memory_format=torch.channels_last)
    found = penalty_gradients(model, x.contiguous(memory_format=torch.channels_last))
    assert relative(found, truth) < IN_FLOAT64


def test_the_inside_of_attention_has_a_second_derivative() -> None:
    model, x = Attention().double(), torch.rand(2, 3, 8, dtype=torch.float64)
    found = penalty_gradients(copy.deepcopy(model), x)
    with sdpa_kernel(SDPBackend.MATH):
        truth = penalty_gradients(model, x, nullcontext)
    assert relative(found, truth) < IN_FLOAT64


def test_activation_checkpointing_wants_the_backward_inside() -> None:
    model = Checkpointed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())).double()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    found = penalty_gradients(copy.deepcopy(model), x, inside=True)
    assert relative(found, penalty_gradients(copy.deepcopy(model), x, nullcontext)) < IN_FLOAT64
    with pytest.raises(CheckpointError):
        penalty_gradients(model, x)


@jit
def test_scripted_code() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), torch.rand(2, 3, 6, 6).double()
    scripted = torch.jit.script(copy.deepcopy(model))
    assert relative(penalty_gradients(scripted, x), penalty_gradients(model, x, nullcontext)) < IN_FLOAT64


def test_compiled_code() -> None:
    """A compiled part has no second derivative, inside the context as outside; its values and gradients are right."""
    model, x = network().eval(), torch.rand(2, 3, 6, 6)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        for context in (double_backward, nullcontext):
            with context():
                point = x.clone().requires_grad_()
                found.append(torch.autograd.grad(run(point).sin().sum(), point)[0])
    assert max(relative(other, found[0]) for other in found[1:]) < 1e-5
    with double_backward(), pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
        penalty_gradients(torch.compile(model, backend="aot_eager"), x, nullcontext)


@jit
def test_transforms_and_forward_mode_are_those_of_torch() -> None:
    model, x = network().double().eval(), torch.rand(1, 3, 5, 5, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return model(x).sin().sum()

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    for call in (lambda: torch.func.grad(f)(x), lambda: torch.func.hessian(f)(x), tangent):
        truth = call()
        with double_backward():
            assert relative(call(), truth) < IN_FLOAT64


def test_two_threads_on_one_model() -> None:
    model, x = network().double().eval(), torch.rand(4, 2, 3, 6, 6, dtype=torch.float64)
    truths = [penalty_gradients(copy.deepcopy(model), images, nullcontext) for images in x]
    parameters, found = list(model.parameters()), {}

    def work(i: int) -> None:
        for _ in range(20):
            with double_backward():
                point = x[i].clone().requires_grad_()
                (g,) = torch.autograd.grad(model(point).sin().sum(), point, create_graph=True)
            found[i] = torch.autograd.grad(g.square().sum(), parameters, allow_unused=True)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i, truth in enumerate(truths):
        assert relative([g for g in found[i] if g is not None], truth) < IN_FLOAT64


def test_statistics_that_change_later_change_no_gradient() -> None:
    model, x = network().double().eval(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    truth = penalty_gradients(copy.deepcopy(model), x)
    with double_backward():
        point = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(point).sin().sum(), point, create_graph=True)
    model.train()(x)
    g.square().sum().backward()
    assert relative([p.grad for p in model.parameters() if p.grad is not None], truth) < IN_FLOAT64
