"""The module: its total, its settable weights, its parameters."""

from typing import Any

import pytest
import torch
from networks import NETWORKS, make
from torch import nn
from torch.optim.swa_utils import AveragedModel

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


def test_a_microbatch_out_of_range_is_refused_when_set() -> None:
    cure = CURE(torch.nn.Linear(2, 2), microbatch=4)
    for value in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"microbatch must be >= 1, or None for the whole batch, got {value}"):
            cure.microbatch = value
    assert cure.microbatch == 4


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gama", "gamma"), ("Gamma", "gamma"), ("H", "h"), ("batchstats", "batch_stats"), ("micro_batch", "microbatch"),
        ("fractoin", "fraction"), ("engin", "engine"), ("lossfn", "loss_fn"), ("powr", "power"), ("loss_t", "loss_at"),
    ],
)  # fmt: skip
def test_a_misspelt_setting_is_an_error(name: str, meant: str) -> None:
    cure = CURE(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match=f"CURE has no setting '{name}': did you mean '{meant}'"):
        setattr(cure, name, 1)
    assert name not in vars(cure)


def test_other_attributes_may_be_set() -> None:
    cure = CURE(nn.Linear(2, 2))
    for name in ("gammas", "gamma_max", "_gama", "name", "step", "h0", "epoch", "power_of_ten"):
        setattr(cure, name, 1)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *batch: torch.Tensor) -> Any:
        return self.module(*batch)


@pytest.mark.parametrize("wrap", [Wrapper, AveragedModel])
def test_a_setting_on_a_wrapper_is_refused(wrap: type[Any]) -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    wrapper: Any = wrap(CURE(case.model, h=0.5))
    out = wrapper(case.x, case.y)
    for name, value in {"gamma": 0.0, "loss_fn": nn.Identity(), "h": torch.tensor(0.1)}.items():
        setattr(wrapper, name, value)
        with pytest.raises(ValueError, match=f"{name} was set to .* on the {wrap.__name__} around CURE"):
            wrapper(case.x, case.y)
        delattr(wrapper, name)
    wrapper.gamma, wrapper.module.gamma = 1.0, 1.0
    torch.testing.assert_close(wrapper(case.x, case.y).total, out.loss + out.penalty)


def test_a_setting_on_a_compiled_module_arrives() -> None:
    cure: Any = CURE(nn.Linear(2, 2))
    compiled = torch.compile(cure, backend="eager")
    compiled.gamma = 0.5
    assert cure.gamma == 0.5


def test_a_wrapper_in_the_model_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # made in earnest, it needs a GPU
    nn.Module.__init__(sharded)
    for model, kind in (
        (nn.Sequential(nn.Linear(4, 3), nn.DataParallel(nn.Linear(3, 3))), "DataParallel"),
        (nn.Sequential(nn.Linear(4, 3), sharded), "FullyShardedDataParallel"),
    ):
        with pytest.raises(TypeError, match=f"must have no {kind} in it, got one at '1'"):
            CURE(model)(torch.rand(2, 4), torch.tensor([0, 1]))


def test_lengths_and_pixel_steps_convert_both_ways() -> None:
    assert h_to_eps(1.25, 3072) * 255 == pytest.approx(5.75, abs=0.01)
    assert eps_to_h(h_to_eps(1.25, 3072), 3072) == pytest.approx(1.25)
    assert h_to_eps(0.5, 1) == eps_to_h(0.5, 1) == 0.5
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
