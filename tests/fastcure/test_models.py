"""The bundled networks: sizes, shapes, normalisation inside."""

import pytest
import torch
from torch import nn

from fastcure.models import MODELS, Normalize, WideResNet, build


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet8", 0.0780), ("resnet18", 11.174), ("wide_resnet28_10", 36.479)]
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    count = sum(p.numel() for p in build(name).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.001)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, (16, 16)), (3, (32, 32)), (2, (9, 13)), (4, (28, 28))])
def test_any_channel_count_and_input_size(name: str, channels: int, size: tuple[int, int]) -> None:
    model = build(name, num_classes=7, in_channels=channels).eval()
    with torch.no_grad():
        assert model(torch.rand(1, channels, *size)).shape == (1, 7)


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_normalisation_is_a_layer_and_is_saved(name: str) -> None:
    torch.manual_seed(0)
    inside = build(name, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1)).eval()
    plain = build(name, mean=(0.0,), std=(1.0,)).eval()
    state = inside.state_dict()
    mean, std = state.pop("normalize.mean"), state.pop("normalize.std")
    plain.load_state_dict(state, strict=False)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(inside(x), plain((x - mean[:, None, None]) / std[:, None, None]))


def test_batch_norms_are_followed_by_relu_in_the_first_network() -> None:
    model = build("resnet8").eval()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("resnet9"), f"model must be one of {', '.join(MODELS)}, got 'resnet9'"),
        (lambda: Normalize(3, (0.1, 0.2), (1.0,)), "mean must have 1 or 3 values"),
        (lambda: Normalize(1, (0.1,), (0.0,)), "std must be > 0, got 0.0"),
        (lambda: WideResNet(depth=27), "depth must be 10, 16, 22, 28, ..., got 27"),
    ],
)
def test_bad_input_is_one_clear_error(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
