"""The module: its total, its settable weights, its parameters."""

import pytest
import torch
from networks import NETWORKS, make

from fastcure import CURE, curvature, eps_to_h, h_to_eps


def test_total_is_loss_plus_gamma_times_penalty() -> None:
    case = make(NETWORKS["resnet8"], 5, seed=0)
    cure = CURE(case.model, h=0.5, gamma=3.0)
    out = cure(case.x, case.y)
    each = curvature(*case, h=0.5)
    torch.testing.assert_close(out.loss, each.loss.mean())
    torch.testing.assert_close(out.penalty, each.penalty.mean())
    torch.testing.assert_close(out.total, out.loss + 3 * out.penalty)
    torch.testing.assert_close(out.logits, each.logits)
    out.total.backward()
    assert all(p.grad is not None for p in case.model.parameters())


def test_schedules_set_plain_attributes() -> None:
    case = make(NETWORKS["mlp-relu"], 5, seed=0)
    cure = CURE(case.model)
    assert (cure.h, cure.gamma) == (1.25, 4.0)
    cure.h, cure.gamma = 0.5, 8
    out = cure(case.x, case.y)
    torch.testing.assert_close(out.penalty, curvature(*case, h=0.5).penalty.mean())
    torch.testing.assert_close(out.total, out.loss + 8 * out.penalty)
    assert "h=0.5, gamma=8" in repr(cure)


def test_the_models_state_dict_knows_nothing_of_cure() -> None:
    case = make(NETWORKS["resnet8"], 2, seed=0)
    keys = list(case.model.state_dict())
    cure = CURE(case.model)
    assert list(case.model.state_dict()) == keys
    assert list(cure.state_dict()) == [f"model.{key}" for key in keys]
    assert [id(p) for p in cure.parameters()] == [id(p) for p in case.model.parameters()]


@pytest.mark.parametrize(("name", "value"), [("h", 0.0), ("h", -1), ("gamma", -1), ("gamma", float("inf"))])
def test_weights_out_of_range_are_refused_when_set(name: str, value: float) -> None:
    cure = CURE(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"{name} must be .* 0, got {value}"):
        setattr(cure, name, value)


def test_lengths_and_pixel_steps_convert_both_ways() -> None:
    assert h_to_eps(1.25, 3072) * 255 == pytest.approx(5.75, abs=0.01)
    assert eps_to_h(h_to_eps(1.25, 3072), 3072) == pytest.approx(1.25)
    with pytest.raises(ValueError, match="number of input values"):
        eps_to_h(0.1, 0)


def test_a_step_of_length_h_is_an_fgsm_step() -> None:
    from fastcure_kernels import direction_step

    from fastcure.attacks import fgsm

    case = make(NETWORKS["mlp-softplus"], 5, seed=0)
    x = case.x.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(case.model(x), case.y, reduction="sum"), x)
    eps = h_to_eps(1.25, 13)
    torch.testing.assert_close(direction_step(case.x, g, 1.25), fgsm(*case, eps=eps, bounds=(-9, 9)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "fast"}, ValueError, "engine must be one of"),
        ({"batch_stats": "x"}, ValueError, "batch_stats must be"),
        ({"power": 3}, ValueError, "power must be 1 or 2"),
        ({"microbatch": 2.5}, ValueError, "microbatch must be >= 1"),
        ({"gamma": torch.ones(1)}, ValueError, "gamma must be a number or a 0-dim tensor"),
        ({"gamma": torch.ones((), requires_grad=True)}, ValueError, "gamma requires grad"),
        ({"model": torch.tanh}, TypeError, "torch.nn.Module"),
    ],
)
def test_bad_settings_are_refused_at_once(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CURE(**{"model": torch.nn.Linear(2, 2), **options})
