"""AutoAttack through its authors' package: no weaker than PGD, for any number of classes, and without side effects."""

import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fastcure.attacks import autoattack, pgd


def network(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(108, 24), nn.BatchNorm1d(24, momentum=1.0), nn.ReLU(), nn.Linear(24, classes)
    )
    x = torch.rand(24, 3, 6, 6)
    model(x)  # batch statistics that spread the images over the classes
    return model, x, model.eval()(x).argmax(1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


FAST = ("apgd-ce", "fab-t")


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize(("norm", "attack"), [("linf", "apgd-ce"), ("linf", "apgd-t"), ("l2", "fab-t")])
def test_networks_and_images_in_channels_last(norm: str, attack: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x = torch.rand(6, 3, 6, 6)
    y = model(x).argmax(1)
    plain = autoattack(model, x, y, 0.5, norm, attacks=(attack,), generator=generator())
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = x.contiguous(memory_format=torch.channels_last)
    adv = autoattack(model, last, y, 0.5, norm, attacks=(attack,), generator=generator())
    assert accuracy(model, adv, y) == accuracy(model, plain, y) < 1


@pytest.mark.parametrize(
    ("norm", "eps", "classes"),
    [*(("linf", 0.03, classes) for classes in (2, 3, 12)), ("l2", 0.25, 4)],
)
def test_is_no_weaker_than_pgd(
    classes: int, norm: str, eps: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pyautoattack.square import SquareAttack

    init = SquareAttack.__init__

    def fewer_queries(self: SquareAttack, *arguments: object, **options: object) -> None:
        init(self, *arguments, **{**options, "n_queries": 50})

    monkeypatch.setattr(SquareAttack, "__init__", fewer_queries)
    model, x, y = network(classes)
    y[:3] = (y[:3] + 1) % classes  # wrong from the beginning
    adv = autoattack(model, x, y, eps, norm, generator=generator())
    assert accuracy(model, adv, y) <= accuracy(model, pgd(model, x, y, eps, norm=norm, generator=generator()), y)
    assert 0 < accuracy(model, adv, y) < 1 - 3 / 24
    length = (adv - x).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
    assert (length <= eps * (1 + 1e-4)).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    unbroken = (model(adv).argmax(1) == y) | (model(x).argmax(1) != y)
    assert torch.equal(adv[unbroken], x[unbroken])
    if classes != 3:  # with three the package warns of the targeted DLR loss although it does not run
        assert not [record for record in caplog.records if "classes" in record.getMessage()]


def test_a_float64_model_keeps_its_dtype_and_its_exact_pixels() -> None:
    model, x, y = network(3)
    adv = autoattack(model.double(), x.double() + 1e-12, y, 0.03, attacks=FAST, generator=generator())
    assert adv.dtype == torch.float64
    broken = model(adv).argmax(1) != y
    assert broken.any()
    assert torch.equal(adv[~broken], (x.double() + 1e-12)[~broken])


def test_leaves_the_model_and_the_process_alone() -> None:
    model, x, y = network(3)
    model.train()
    weights = [parameter.clone() for parameter in model.parameters()]

    def trace(*_: object) -> None:
        return None

    torch.manual_seed(7)
    random.seed(7)
    state, python, before = torch.get_rng_state(), random.getstate(), sys.gettrace()
    sys.settrace(trace)
    try:
        first = autoattack(model, x, y, 0.03, attacks=FAST, generator=generator())
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert torch.equal(first, autoattack(model, x, y, 0.03, attacks=FAST, generator=generator()))


def test_a_network_whose_output_is_a_view_of_its_input_is_not_written_into() -> None:
    x = torch.rand(8, 4, 1, 1)
    kept = x.clone()
    autoattack(nn.Flatten(), x, x.flatten(1).argmax(1), 0.05, attacks=("square",), generator=generator())
    assert torch.equal(x, kept)


def test_bad_input_is_one_clear_error() -> None:
    model, x, y = network(3)
    with pytest.raises(ValueError, match="eps must be > 0"):
        autoattack(model, x, y, 0.0)
    with pytest.raises(ValueError, match="at least 5 x 5 pixels, got 4 x 6"):
        autoattack(model, x[:, :, :4], y, norm="l2")
    with pytest.raises(ValueError, match="norm must be"):
        autoattack(model, x, y, norm="l1")
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), got shape \(24, 108\)"):
        autoattack(model, x.flatten(1), y)
    with pytest.raises(ValueError, match="2 outputs or more, got 1"):
        autoattack(nn.Sequential(nn.Flatten(), nn.Linear(108, 1)), x, y * 0)
    nn.init.constant_(model[1].weight, torch.nan)
    with pytest.raises(FloatingPointError, match="24 of 24 samples is NaN"):
        autoattack(model, x, y)


def test_without_the_package_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['pyautoattack'] = None\n"
        "import torch; from fastcure.attacks import autoattack\n"
        "autoattack(torch.nn.Flatten(), torch.rand(2, 3, 1, 1), torch.tensor([0, 1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the package pyautoattack is needed by autoattack: pip install pyautoattack" in done.stderr
