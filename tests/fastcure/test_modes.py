"""What modes leave undone is said once a model: batch norms that do not train, regularisation that is left out."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE, curvature

X, Y = torch.rand(6, 4), torch.arange(6) % 3


def said(model: nn.Module, steps: int = 2, **options: Any) -> list[str]:
    """The warnings of some steps."""
    cure = CURE(model, **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            cure(X, Y).total.backward()
    assert all(warning.filename == __file__ for warning in seen if "kinks" not in str(warning.message))
    return [str(warning.message) for warning in seen]


def norms() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize("options", [{}, {"fraction": 0.5}], ids=str)
@pytest.mark.parametrize("batch_stats", ["train", "split"])
def test_norms_that_could_train_and_do_not_are_told_once(batch_stats: Any, options: dict[str, Any]) -> None:
    (message,) = said(norms().eval(), batch_stats=batch_stats, **options)
    assert re.match(f"batch_stats='{batch_stats}' .* all 2 of this model are in evaluation mode", message)
    assert "call model.train()" in message


def test_norms_in_parts_are_told_as_well() -> None:
    assert len(said(norms().eval(), batch_stats="split", microbatch=2)) == 1


def test_it_is_told_in_the_step_in_which_it_becomes_so() -> None:
    model = norms().train()
    assert not said(model, batch_stats="train")
    assert len(said(model.eval(), batch_stats="train")) == 1


def test_norms_that_are_frozen_on_purpose_are_no_matter() -> None:
    partly = norms().train()
    partly[1].eval()
    without_statistics = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    for model in (partly, without_statistics.eval(), nn.Linear(4, 3).eval(), norms().train()):
        assert not said(model, batch_stats="train")
    assert not said(norms().eval(), batch_stats="frozen")


def test_validation_says_nothing() -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        CURE(norms().eval(), batch_stats="train")(X, Y)
        CURE(Regularised().train())(X, Y)


class DropPath(nn.Module):
    """As in timm."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class StochasticDepth(nn.Module):
    """As in torchvision."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1) > self.p) / (1 - self.p) if self.training else x


class Regularised(nn.Module):
    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share
        self.first = nn.Sequential(nn.Linear(4, 8), nn.Dropout(share), DropPath(share), StochasticDepth(share, "row"))
        self.attention = nn.MultiheadAttention(8, 2, dropout=share)
        self.rest = nn.Sequential(nn.AlphaDropout(share), nn.RReLU(0.2, 0.2 + share), nn.Linear(8, 3))
        self.recurrent = nn.GRU(8, 8, 2, dropout=share)

    def forward(self, x: Tensor) -> Tensor:
        t = F.dropout(self.first(x), self.share, self.training)
        return self.rest(t + self.attention(t[None], t[None], t[None])[0][0])


NAMES = ("first.1 (Dropout, 0.1)", "first.2 (DropPath, 0.1)", "first.3 (StochasticDepth, 0.1)", "attention (Mult")


@pytest.mark.parametrize(
    "options",
    [
        {}, {"engine": "reference"}, {"engine": "first_order"}, {"fraction": 0.5}, {"microbatch": 2},
        {"loss_at": "step"}, {"batch_stats": "train"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*kinks")
def test_what_is_left_out_is_named_once(options: dict[str, Any]) -> None:
    messages = [message for message in said(Regularised().train(), **options) if "kinks" not in message]
    assert len(messages) == 1
    assert "computed in evaluation mode, which leaves out" in messages[0]
    assert all(name in messages[0] for name in NAMES)
    assert "and 4 more: the model is trained without it" in messages[0]
    assert "batch_stats='split'" in messages[0]


def test_functional_dropout_is_found_where_it_is_called() -> None:
    class Functional(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(F.alpha_dropout(x, 0.2, self.training), training=self.training))

    (message,) = said(Functional(nn.Linear(4, 3)).train())
    assert len(re.findall(r"F\.(alpha_)?dropout at test_modes\.py:\d+ \(0\.\d\)", message)) == 2
    assert "alpha_dropout at test_modes.py" in message
    assert "(0.5)" in message


def test_a_loss_that_drops_is_named() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.2)

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.dropout(logits), y, reduction="none")

    (message,) = said(nn.Linear(4, 3).train(), loss_fn=Loss())
    assert "dropout (Dropout, 0.2)" in message


def test_the_compile_engine_names_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcure.engines import ENGINES

    monkeypatch.setitem(ENGINES, "compile", ENGINES["eager"])  # what matters is the name
    (message,) = said(Regularised().train(), engine="compile")
    assert NAMES[0] in message


def test_what_is_off_or_does_nothing_is_no_matter() -> None:
    frozen = Regularised().train()
    for module in frozen.modules():
        if module is not frozen and module is not frozen.first[0]:
            module.eval()
    frozen.share = 0.0
    for model in (Regularised().eval(), Regularised(0.0).train(), frozen):
        assert not said(model)
    assert not said(Regularised().train(), batch_stats="split")  # whose loss has it


def test_a_model_that_trains_later_is_told_then() -> None:
    model = Regularised().eval()
    assert not said(model)
    assert len(said(model.train())) == 1


def test_it_changes_no_number() -> None:
    model = Regularised().double().train()
    x = X.double()
    with pytest.warns(UserWarning, match="leaves out"):
        first = curvature(model, x, Y)
    second = curvature(model.eval(), x, Y)
    assert torch.equal(first.penalty, second.penalty)
    assert torch.equal(first.loss, second.loss)
