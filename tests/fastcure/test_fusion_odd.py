"""ReLUs fused in networks that are odd, as on a GPU: each is right, or an error, and none is silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd import Doubled, Odd, fused, pair, relus
from prepared import case_of, check_exact
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature, prepare

# `Odd` has a dropout, which few of its ways take.
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode"),
]


def kept(m: Odd, x: Tensor) -> Tensor:
    m.kept = pair(m, x)
    return F.relu(m.kept)


def shortcut_changed(m: Odd, x: Tensor) -> Tensor:
    shortcut = m.other(x)
    out = pair(m, x) + shortcut
    shortcut.mul_(2)
    return F.relu(out) + shortcut


def by_shape(m: Odd, x: Tensor) -> Tensor:
    y = pair(m, x)
    assert y.dim() == 4
    assert y.dtype == x.dtype
    return F.relu(y + torch.ones(y.shape, dtype=y.dtype, device=y.device))


def twice(m: Odd, x: Tensor) -> Tensor:
    y = pair(m, x)
    y += m.later(m.other(x))
    return F.relu(y) + F.relu(-1.0 * F.relu(m.later(m.other(x.flip(2)))))


# How it runs, how many of its ReLUs are fused, and what is said of the batch norm called bn
ODD: dict[str, tuple[Callable[[Odd, Tensor], Any], tuple[int, int], str]] = {
    "relu": (lambda m, x: F.relu(pair(m, x)), (1, 1), ""),
    "relu in place": (lambda m, x: m.relu(pair(m, x)), (1, 1), ""),
    "method": (lambda m, x: pair(m, x).relu_(), (1, 1), ""),
    "identity and dropout between": (lambda m, x: m.relu(m.identity(pair(m, x))), (1, 1), ""),
    "shortcut": (lambda m, x: F.relu(m.other(x) + pair(m, x)), (1, 1), ""),
    "shortcut in place": (lambda m, x: torch.relu(pair(m, x).add_(m.other(x))), (1, 1), ""),
    "shortcut with a norm": (lambda m, x: m.relu(pair(m, x).add(m.later(m.other(x)))), (1, 1), ""),
    "metadata": (by_shape, (1, 1), ""),
    "two relus": (lambda m, x: F.relu(y := pair(m, x)) + F.relu(y + x.mean()), (0, 2), "add takes its output"),
    "norm that runs twice": (twice, (1, 3), ""),
    "no relu": (lambda m, x: pair(m, x), (0, 0), "tanh takes its output"),
    "gelu": (lambda m, x: F.gelu(pair(m, x)), (0, 0), "gelu takes its output"),
    "relu and more": (lambda m, x: F.relu(y := pair(m, x)) + y, (0, 1), "tanh takes its output"),
    "dropout before": (lambda m, x: F.relu(m.dropout(pair(m, x))), (0, 1), "dropout takes its output"),
    "scaled": (lambda m, x: F.relu(2 * pair(m, x)), (0, 1), "mul takes its output"),
    "other scale": (lambda m, x: F.relu(torch.add(pair(m, x), m.other(x), alpha=2)), (0, 1), "add takes its output"),
    "broadcast": (lambda m, x: F.relu(pair(m, x) + x[:, :1, 2:, 2:]), (0, 1), "add takes its output"),
    "into the shortcut": (lambda m, x: F.relu(m.other(x).add_(pair(m, x))), (0, 1), "add_ takes its output"),
    "an operator of one's own": (lambda m, x: F.relu(Doubled.apply(pair(m, x))), (0, 1), "mul takes its output"),
    "kept": (kept, (0, 1), "its output is kept"),
    "second output": (lambda m, x: (F.relu(y := pair(m, x)), y), (1, 1), ""),
    "shortcut changed": (shortcut_changed, (0, 1), "a change in place of one of its terms takes its output"),
    "unused": (lambda m, x: F.relu(m.other(x)) + 0 * len(pair(m, x)), (0, 1), "nothing takes its output"),
    "no gradient": (lambda m, x: F.relu(torch.no_grad()(lambda: pair(m, x))() + m.other(x)), (1, 1), ""),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_networks(name: str) -> None:
    way, counts, why = ODD[name]
    case = case_of(Odd(way), (2, 6, 6))
    prepare(case.model, case.x)
    assert (fused(case), [line for line in relus(case) if "of bn:" in line]) == (
        counts,
        [f"  not that of bn: {why}"] if why else [],
    )
    vars(case.model).pop("kept", None)  # what has a history cannot be copied
    check_exact(case)


@pytest.mark.parametrize(
    "path",
    [
        lambda m, y: F.gelu(y),
        lambda m, y: y + y.mean(),
        lambda m, y: y,
        lambda m, y: y.mul_(2),
        lambda m, y: Doubled.apply(y),
        lambda m, y: torch.cat([y, y], 1)[:, 2:7],
        lambda m, y: (F.relu(y), y.detach().sin())[1] + y,
        lambda m, y: torch.utils.checkpoint.checkpoint(torch.cos, y, use_reentrant=False),
        lambda m, y: F.batch_norm(y, torch.zeros(5).to(y), torch.ones(5).to(y)),
        lambda m, y: m.conv2(y),
    ],
)
def test_another_path_is_right_all_the_same(path: Callable[[Odd, Tensor], Tensor]) -> None:
    model = Odd(lambda m, x: path(m, pair(m, x)) if len(x) > 2 else F.relu(pair(m, x)))
    model.conv2 = nn.Conv2d(5, 5, 3, padding=1)
    case = case_of(model, (2, 6, 6))
    prepare(case.model, case.x)
    assert fused(case) == (1, 1)
    check_exact(case)


def test_a_sum_that_is_still_pending_may_be_the_logits() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(2, 3, 6), nn.BatchNorm2d(3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return (
                y.view(y.shape[:2]) if self.fixed else self.head(F.relu(y)[..., 0, 0]) if len(x) < 3 else y[..., 0, 0]
            )

    for fixed in (True, False):
        model = Last()
        model.fixed = fixed
        check_exact(case_of(model, (2, 6, 6)))


def test_another_path_that_changes_a_shortcut_in_between_is_an_error() -> None:
    case = case_of(Odd(lambda m, x: shortcut_changed(m, x) if len(x) > 2 else F.relu(pair(m, x))), (2, 6, 6))
    prepare(case.model, case.x)
    with pytest.raises(RuntimeError, match=r"changed in place in between: call fastcure.prepare again"):
        curvature(*case)
    assert not any("forward" in vars(module) for module in case.model.modules())
