"""Batch norms folded in front of the compiled region: exact, whatever stands before them, and only where they may."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import relative, rounding
from torch import Tensor, nn

from fastcure import curvature, prepare
from fastcure._folding.layers import UsedElsewhereError
from fastcure.engines._compile_folding import Folding

# Of torch's own making, in torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Tied(nn.Module):
    """Two convolutions of one weight, each with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.b.weight = self.a.weight
        self.norm_a, self.norm_b, self.fc = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.a(x)).relu()
        return self.fc(self.norm_b(self.b(x)).relu().flatten(1))


class SharedStatistics(Tied):
    """Two batch norms with one mean and one variance."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(2, 2, 3, padding=1)
        self.double()  # a conversion later would part them
        self.norm_b.running_mean, self.norm_b.running_var = self.norm_a.running_mean, self.norm_a.running_var


def sequential(*layers: nn.Module) -> nn.Module:
    features = nn.Sequential(*layers, nn.GELU(), nn.Flatten())
    return nn.Sequential(features, nn.Linear(features.eval()(torch.rand(2, 2, 4, 4)).shape[1], 3))


def convolution() -> nn.Module:
    return sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4))


def convolutions() -> nn.Module:
    return sequential(
        nn.Conv2d(2, 4, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3)
    )


def norm_first() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5)
    return sequential(nn.BatchNorm2d(2), *layers)


def others() -> nn.Module:
    """A norm without an affine map, and one without statistics."""
    first = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4, affine=False), nn.Tanh()
    return sequential(*first, nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3, track_running_stats=False))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "convolutions": (convolutions, 2, 0),
    "norm first, and a linear layer": (norm_first, 1, 1),
    "no fold": (others, 0, 0),
    "tied weights": (Tied, 0, 2),
    "shared statistics": (SharedStatistics, 0, 0),
}
"""With the numbers of batch norms that are folded into a layer, and that become a product and a sum."""


def gradients(model: nn.Module, x: Tensor, y: Tensor, engine: str) -> list[Tensor]:
    model.zero_grad()
    out = curvature(model, x, y, h=0.7, engine=engine)
    (out.loss + out.penalty).sum().backward()
    return [out.loss.detach(), out.penalty.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_exact_and_follows_the_model(aot_eager: Any, name: str) -> None:
    make, folds, norms = MODELS[name]
    torch.manual_seed(0)
    model, x, y = make().double(), torch.rand(4, 2, 4, 4).double(), torch.tensor([0, 1, 2, 1])
    model.train()(x)
    prepare(model, x)
    found = Folding(model.eval(), norms=True)
    assert (len(found.folds), len(found.norms)) == (folds, norms)
    for _ in range(2):
        assert relative(gradients(model, x, y, "compile"), gradients(model, x, y, "reference")) < 1e-10
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.train()(x)  # running statistics move
    assert aot_eager.frame_count == 1
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_a_layer_keeps_its_dtype_beside_a_wider_norm(aot_eager: Any) -> None:
    torch.manual_seed(0)
    model = convolution().bfloat16()
    model[0][1].float()  # type: ignore[index,union-attr]
    x, y = torch.rand(4, 2, 4, 4).bfloat16(), torch.tensor([0, 1, 2, 1])
    prepare(model, x)
    assert len(Folding(model, norms=True).folds) == 1
    found = [gradients(model, x, y, engine) for engine in ("compile", "eager")]
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    assert relative(*found) < rounding(torch.bfloat16, 1, condition=4)


def test_a_hook_added_later_takes_the_batch_norm_out(aot_eager: Any) -> None:
    torch.manual_seed(0)
    model, x, y = convolution().double(), torch.rand(4, 2, 4, 4).double(), torch.tensor([0, 1, 2, 1])
    prepare(model, x)
    before = gradients(model, x, y, "compile")
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    handle = norm.register_forward_hook(lambda module, args, output: 2 * output)
    assert relative(gradients(model, x, y, "compile"), gradients(model, x, y, "reference")) < 1e-10
    handle.remove()
    assert relative(gradients(model, x, y, "compile"), before) == 0


@pytest.mark.parametrize("prepared", [False, True])
def test_a_batch_norm_replaced_later_is_seen(aot_eager: Any, prepared: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.rand(4, 2, 4, 4).double(), torch.tensor([0, 1, 2, 1])
    for _ in range(2):
        if prepared:
            prepare(model, x)
        assert relative(gradients(model, x, y, "compile"), gradients(model, x, y, "reference")) < 1e-10
        model[1] = nn.BatchNorm2d(4).double()
        model.train()(x * 3 + 1)


def test_hooks_added_later_are_heeded(aot_eager: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.rand(4, 2, 4, 4).double(), torch.tensor([0, 1, 2, 1])
    gradients(model, x, y, "compile")
    for layer, factor in ((0, 1.7), (1, 0.6), (2, 1.3)):
        model[layer].register_forward_hook(lambda module, args, output, factor=factor: output * factor)
    assert relative(gradients(model, x, y, "compile"), gradients(model, x, y, "reference")) < 1e-10


class Peeking(nn.Module):
    """Reads a batch norm's weight beside it; or goes another way later."""

    def __init__(self, skip: bool | None = None) -> None:
        super().__init__()
        self.skip = skip
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.skip is None:
            x = self.norm(x) * self.norm.weight.abs().reshape(-1, 1, 1)
        elif not self.skip:
            x = self.norm(x)
        return self.fc(torch.nn.functional.gelu(x).flatten(1))


def test_what_reads_a_batch_norm_elsewhere_is_refused(aot_eager: Any) -> None:
    """Also of an initial one, whose weight is nearly that of its map."""
    torch.manual_seed(0)
    model, x, y = Peeking().double(), torch.rand(4, 2, 4, 4).double(), torch.tensor([0, 1, 2, 1])
    with pytest.raises(RuntimeError, match=r"reads a batch norm's parameters or statistics elsewhere"):
        curvature(model, x, y, engine="compile")


def test_a_path_that_changes_later_is_refused(aot_eager: Any) -> None:
    torch.manual_seed(0)
    model, x, y = Peeking(skip=False).double(), torch.rand(4, 2, 4, 4).double(), torch.tensor([0, 1, 2, 1])
    prepare(model, x)
    curvature(model, x, y, engine="compile")
    model.skip = True
    with pytest.raises(UsedElsewhereError):
        curvature(model, x, y, engine="compile")


def test_a_module_under_two_names_is_refused(aot_eager: Any) -> None:
    block = nn.Linear(3, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), block, nn.GELU(), block)
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match=r"one module under two names, 2 and 4: use engine='eager'"):
        curvature(model, torch.rand(2, 4), torch.tensor([0, 1]), engine="compile")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
