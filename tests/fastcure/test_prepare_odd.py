"""Folding in networks that are odd: each is right, or an error, and none is silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import relative
from odd import Doubled, Odd, pair
from prepared import case_of, check_exact, check_under_autocast, count, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature, explain, prepare

# `Odd` has a dropout, which few of its ways take.
pytestmark = pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")


def in_place(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += x.mean()
    return m.bn(y)


def changed_as_data(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.data.mul_(2)
    return m.bn(y)


def by_index(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 0] = 0
    return m.bn(y)


def with_gate(gate: Callable[[Tensor], Tensor]) -> Callable[[Odd, Tensor], Tensor]:
    def way(m: Odd, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) * gate(y)

    return way


def stored_and_used(m: Odd, x: Tensor) -> Tensor:
    out = m.stored(x, lambda y: y)
    return out + m.kept.detach().cos()


def stored_for_the_user(m: Odd, x: Tensor) -> Tensor:
    return m.stored(x, lambda y: y)


def hooked_gradient(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.register_hook(lambda grad: 2 * grad)
    return m.bn(y)


def norm_in_training(m: Odd, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.bn.train()
    return m.bn(y)


ELSEWHERE = "the output of conv is used elsewhere too"

# How it runs, how many of its two batch norms can be folded, and what is said of that called bn
ODD: dict[str, tuple[Callable[[Odd, Tensor], Any], int, str]] = {
    "a pair": (pair, 1, ""),
    "identity between": (lambda m, x: m.bn(m.identity(m.conv(x))), 1, ""),
    "arguments by name": (lambda m, x: m.bn(input=m.conv(input=x)), 1, ""),
    "shape looked at": (lambda m, x: m.bn((y := m.conv(x)).reshape(y.shape)), 0, "its input is not the output of a"),
    "second output": (lambda m, x: (m.bn(y := m.conv(x)), y), 1, ""),
    "relu between": (lambda m, x: m.bn(F.relu(m.conv(x))), 0, "its input is not the output of a plain"),
    "relu in place between": (lambda m, x: m.bn(m.relu(m.conv(x))), 0, ELSEWHERE),
    "changed in place": (in_place, 0, ELSEWHERE),
    "changed as data": (changed_as_data, 0, ELSEWHERE),
    "changed by index": (by_index, 0, ELSEWHERE),
    "used twice": (with_gate(torch.sigmoid), 0, ELSEWHERE),
    "used detached": (with_gate(lambda y: y.detach().sigmoid()), 0, ELSEWHERE),
    "used as data": (with_gate(lambda y: y.data.sigmoid()), 0, ELSEWHERE),
    "used in a list": (with_gate(lambda y: torch.cat([y, y], 1)[:, :5]), 0, ELSEWHERE),
    "used as a number": (
        with_gate(lambda y: 1 + float(y.detach().mean())),
        0,
        "the output of conv is used elsewhere too",
    ),
    "used by a function of one's own": (with_gate(Doubled.apply), 0, ELSEWHERE),
    "used to decide": (with_gate(lambda y: 2 if y.sum() > 0 else 3), 0, ELSEWHERE),
    "gradient hooked": (hooked_gradient, 0, ELSEWHERE),
    "stored and used": (stored_and_used, 0, ELSEWHERE),
    "stored for the user": (stored_for_the_user, 0, ELSEWHERE),
    "two norms": (lambda m, x: m.bn(y := m.conv(x)) + m.later(y), 0, ELSEWHERE),
    "norm of a norm": (lambda m, x: m.later(m.bn(m.conv(x))), 1, ""),
    "shared norm": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), 0, "it runs 2 times a forward"),
    "layer twice": (lambda m, x: m.bn(m.conv(x)) + m.conv(x.flip(2)), 0, "its input is not the output of a plain"),
    "layer once by its forward": (
        lambda m, x: m.bn(m.conv(x)) + m.conv.forward(x),
        0,
        "the output of conv is used elsewhere too",
    ),
    "norm first": (lambda m, x: m.conv(m.bn(x.repeat(1, 3, 1, 1)[:, :5])[:, :2]), 0, "its input is not the output"),
    "norm unused": (lambda m, x: m.later(m.conv(x)), 1, "it runs 0 times a forward"),
    "norm in training": (norm_in_training, 0, ELSEWHERE),
    "no gradient": (lambda m, x: torch.no_grad()(lambda: m.bn(m.conv(x)))() + m.other(x), 1, ""),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_networks(name: str) -> None:
    way, folded, why = ODD[name]
    case = case_of(Odd(way), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == folded
    if why:
        assert f"bn not: {why}" in explain(case.model, case.x)
    else:
        assert "bn into conv" in explain(case.model)
    vars(case.model).pop("kept", None)  # what has a history cannot be copied
    ours, truth = (gradients(case, prepared) for prepared in (True, False))
    assert all(relative(value, other) < 1e-10 for value, other in zip(ours[:3], truth[:3], strict=True))
    if name != "gradient hooked":  # plain double backpropagation goes through the hook at other times
        check_exact(case)


@pytest.mark.parametrize(
    ("options", "folded"),
    [({"affine": False}, 1), ({"momentum": None}, 1), ({"eps": 0.3}, 1), ({"track_running_stats": False}, 0)],
)
def test_batch_norms_of_every_kind(options: dict[str, Any], folded: int) -> None:
    case = case_of(Odd(pair, **options), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == folded
    assert folded or "bn not: it keeps no running statistics" in explain(case.model, case.x)
    check_exact(case)


def test_without_statistics_one_value_a_channel() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 3))
    case = case_of(model, (4,))
    prepare(case.model, case.x)  # would refuse a single image
    check_exact(case)


def test_a_linear_layer_whose_channels_are_not_those_of_the_norm() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten(), nn.Linear(25, 3))
    case = case_of(model, (5, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 0
    assert "1 not: its channels are not those of 0" in explain(case.model, case.x)
    check_exact(case)


@pytest.mark.parametrize("frozen", ["conv.weight", "conv", "bn.weight", "bn", "conv bn", "bn.bias conv.bias"])
def test_a_pair_that_is_partly_frozen(frozen: str) -> None:
    case = case_of(Odd(pair), (2, 6, 6))
    for name, parameter in case.model.named_parameters():
        if any(name.startswith(prefix) for prefix in frozen.split()):
            parameter.requires_grad_(False)
    check_exact(case)


def test_convolutions_that_share_a_weight() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    model[3].weight, model[4].weight = model[0].weight, model[1].weight
    case = case_of(model, (4, 7, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 2
    check_exact(case)


def test_norms_wider_than_their_layers() -> None:
    model = Odd(pair)
    case = case_of(model, (2, 6, 6)).copy(torch.bfloat16)
    case.model.bn.float()
    plain = curvature(*case)
    prepare(case.model, case.x)
    assert count(case.model) == 1
    out = curvature(*case)
    assert out.logits.dtype == torch.bfloat16
    assert relative(out.loss, plain.loss) < 0.02


def test_under_autocast() -> None:
    check_under_autocast(nn.GELU)


# A network whose path depends on its input, or that has changed since


@pytest.mark.parametrize(
    "path",
    [
        lambda m, x: m.bn(y := m.conv(x)) + (y if len(x) > 2 else 0),
        lambda m, x: m.bn(y := m.conv(x)) * (y.detach().sigmoid() if len(x) > 2 else 1),
        lambda m, x: m.bn(m.conv(x)) + (m.conv(x.flip(2)) if len(x) > 2 else 0),
        lambda m, x: (z := m.conv(x.flip(2)), m.bn(m.conv(x)) + z)[1] if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.conv(x) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.later(m.conv(x)) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.bn(m.relu(m.conv(x))) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: (m.bn(m.other(x)) + m.conv(x)) if len(x) > 2 else m.bn(m.conv(x)),
    ],
)
def test_another_path_that_breaks_a_pair_is_an_error(path: Callable[[Odd, Tensor], Tensor]) -> None:
    case = case_of(Odd(path), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 1
    with pytest.raises(RuntimeError, match=r"output of Conv2d.* went to its batch norm alone.*fastcure.prepare again"):
        curvature(*case)
    assert not any("forward" in vars(module) for module in case.model.modules())
    assert curvature(case.model, case.x[:2], case.y[:2]).penalty.isfinite().all()


@pytest.mark.parametrize(
    "path",
    [
        lambda m, x: m.bn(m.other(x) if len(x) > 2 else m.conv(x)),
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x.flip(2))) if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.bn(x.repeat(1, 3, 1, 1)[:, :5] if len(x) > 2 else m.conv(x)),
        lambda m, x: (m.conv(x), m.bn(m.other(x)))[1] if len(x) > 2 else m.bn(m.conv(x)),
        lambda m, x: m.bn(m.later(m.other(x)) if len(x) > 2 else m.conv(x)),
        lambda m, x: m.bn(torch.stack([m.conv(image) for image in x]) if len(x) > 2 else m.conv(x)),
    ],
)
def test_another_path_that_leaves_the_pair_whole_is_right(path: Callable[[Odd, Tensor], Tensor]) -> None:
    case = case_of(Odd(path), (2, 6, 6))
    prepare(case.model, case.x)
    assert count(case.model) == 1
    check_exact(case)


def test_statistics_that_change_in_the_forward_come_back() -> None:
    model = case_of(Odd(norm_in_training), (2, 6, 6)).model
    before = [buffer.clone() for buffer in model.buffers()]
    prepare(model, torch.rand(2, 2, 6, 6).double())
    assert all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True))


def test_an_output_that_a_loss_takes_from_the_network_is_an_error() -> None:
    def path(m: Odd, x: Tensor) -> Tensor:
        y = m.conv(x)
        m.kept = y if len(x) > 2 else None
        return m.bn(y)

    case = case_of(Odd(path), (2, 6, 6))
    prepare(case.model, case.x)

    def with_activity(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none") + case.model.kept.square().flatten(1).sum(1)

    with pytest.raises(RuntimeError, match=r"fastcure\.prepare again"):
        curvature(*case, loss_fn=with_activity)


def test_what_a_network_stores_is_ordinary_after_preparing() -> None:
    case = case_of(Odd(stored_for_the_user), (2, 6, 6))
    prepare(case.model, case.x)
    assert type(case.model.kept) is Tensor
    curvature(*case)
    assert type(case.model.kept) is Tensor
    assert case.model.kept.shape == (4, 5, 4, 4)
