"""Steps in bfloat16 and float16 autocast, and the gradient scaler that float16 needs."""

import pytest
import torch
from networks import relative
from torch import Tensor, nn

from fastcure import CURE, curvature, prepare
from fastcure import _functional as functional
from fastcure.models import resnet8
from fastcure.objectives import TRADES, SmoothedCrossEntropy, Standard


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = resnet8(in_channels=1)
    x, y = torch.rand(4, 1, 16, 16), torch.arange(4)  # float16 is slow on a CPU
    prepare(model, x)
    return model, x, y


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_near_those_of_float32(
    case: tuple, dtype: torch.dtype, close: float, channels_last: bool
) -> None:
    model, x, y = case
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        g = torch.autograd.grad(nn.functional.cross_entropy(model.eval()(point := x.requires_grad_()), y), point)[0]
    z = g.sign() / g.sign().flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)  # of an entry near 0, rounding tips the sign
    x = x.detach()
    results = []
    for amp in (None, dtype):
        model.zero_grad()
        with torch.autocast("cpu", amp or dtype, enabled=amp is not None):
            out = curvature(model, x, y, direction=z)
        assert out.loss.dtype == out.penalty.dtype == torch.float32
        (out.loss + out.penalty).sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        results.append(gradients(model))
    assert 0 < relative(results[1], results[0]) < close


def test_a_gradient_scaler_finds_its_scale_and_changes_nothing_else(case: tuple) -> None:
    """Too large a scale overflows float16: the scaler must see it, leave the step out, and come down."""
    model, x, y = case
    x = x[:, :, :8, :8]
    cure = CURE(model, h=1.25, gamma=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-4)
    scales = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            total = cure(x, y).total
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        found = gradients(model)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**30
    assert scales[-1] == scales[-2]  # it has found one
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        cure(x, y).total.backward()
    assert relative(found, gradients(model)) < 0.02


@pytest.mark.parametrize("microbatch", [None, 4])
def test_an_input_gradient_too_small_for_float16_survives(
    monkeypatch: pytest.MonkeyPatch, microbatch: int | None
) -> None:
    """Of a network that is sure of its answers: 1e-9, where the smallest number of float16 is 6e-8."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2, 1), nn.Softplus(), nn.Conv2d(8, 8, 3, 2, 1), nn.Softplus()),
        *(nn.Flatten(), nn.Linear(32, 5)),
    )
    with torch.no_grad():
        model[-1].weight.mul_(90)  # type: ignore[operator]
    x = torch.rand(8, 1, 8, 8)
    y = model(x).argmax(1)

    def step(amp: bool, scale: float) -> tuple[float, Tensor]:
        model.zero_grad()
        monkeypatch.setattr(functional, "LOSS_SCALE", scale)
        with torch.autocast("cpu", torch.float16, enabled=amp):
            out = CURE(model, h=0.5, gamma=1e6, microbatch=microbatch)(x, y)
        (out.total * 2.0**16).backward()  # as a gradient scaler does
        return float(out.penalty.detach()), torch.cat([gradient.flatten() for gradient in gradients(model)])

    (penalty, gradient), (found, scaled), (lost, unscaled) = step(False, 1.0), step(True, 1024.0), step(True, 1.0)
    assert 0 < penalty < 1e-13  # a premise, not rounding: differences of 64 pixels below float16's least number, 2^-24
    assert found == pytest.approx(penalty, rel=0.05)
    assert relative(scaled, gradient) < 0.05
    assert lost == 0
    assert relative(unscaled, gradient) > 0.5


class Recorded(nn.Module):
    """A network that keeps the logits of its last pass."""

    logits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.logits = self.layers(x)
        return self.logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smoothed_loss_is_that_of_the_logits(dtype: torch.dtype) -> None:
    """Of logits in 16 bits, as autocast makes them; nothing but them is rounded to so few."""
    torch.manual_seed(0)
    model, x, y = Recorded(), torch.rand(64, 48), torch.arange(64) % 5
    objective = Standard(model, SmoothedCrossEntropy(0.1))
    with torch.autocast("cpu", dtype):
        out = objective(x, y)
    out.total.backward()
    assert model.logits.dtype == dtype
    truth = nn.functional.cross_entropy(model.logits.double(), y, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_divergence_is_that_of_the_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, y = Recorded(), torch.rand(64, 3, 4, 4), torch.arange(64) % 5
    with torch.autocast("cpu", dtype):
        out = TRADES(model, eps=0.01, steps=1)(x, y)
    log_p, log_q = model.logits.double().log_softmax(1).chunk(2)
    truth = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    assert 1e-6 < truth < 1e-3
    assert out.penalty.item() == pytest.approx(truth, abs=1e-6)
