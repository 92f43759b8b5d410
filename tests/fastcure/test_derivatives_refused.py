"""Models of which no exact engine can have a second derivative: each is one clear error."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from definitions import (
    Lambda,
    check_near,
    check_refused,
    check_right,
    definition,
    images,
    network,
    of_torch,
    ours,
    seeded,
    unit,
)
from torch import Tensor, nn

from fastcure import curvature, prepare
from fastcure.analysis import curvature_along_gradient

# Scripted code

pytestmark = seeded


@of_torch
@pytest.mark.parametrize("make", ["script", "trace"])
@pytest.mark.parametrize("part", ["all", "some"])
def test_scripted_models_are_one_error_and_right_in_first_order(make: str, part: str) -> None:
    model, (x, y) = network(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout()), images()
    z = unit(x)
    truth = definition(model, x, y, z)

    def scripted(module: nn.Module, example: Tensor) -> nn.Module:
        return torch.jit.script(module) if make == "script" else torch.jit.trace(module.eval(), example)

    if part == "all":
        made = scripted(copy.deepcopy(model), x)
    else:
        made = copy.deepcopy(model)
        made[1] = scripted(made[1], made[0](x).detach())
    check_refused(made, r"scripted or traced \(.*before torch.jit.script.*use CURE's engine='first_order'")
    for _ in range(3):  # scripted code is optimised as it goes
        check_near(ours(made, x, y, z, engine="first_order"), truth, 1e-6)


@of_torch
def test_scripted_functions_are_one_error() -> None:
    def gelu(t: Tensor) -> Tensor:
        return 0.5 * t * (1 + torch.tanh(0.8 * t))

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, y, reduction="none")

    x, y = images()
    model = network(nn.Conv2d(1, 2, 3), nn.Tanh())
    with pytest.raises(RuntimeError, match="loss_fn is a ScriptFunction"):
        curvature(model, x, y, loss_fn=torch.jit.script(loss_fn))
    model[1] = Lambda(torch.jit.script(gelu))
    with pytest.raises(RuntimeError, match="it calls a scripted function"):
        curvature(model, x, y)  # whose second pass is optimised code


class Hides(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.last, self.how = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), nn.Linear(72, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                return self.last(self.inner(x).tanh())
        if self.how == "inference_mode":
            with torch.inference_mode():
                out = self.last(self.inner(x).tanh())
            return out.clone()
        if self.how == "features":
            with torch.no_grad():
                features = self.inner(x)
            return self.last(features.tanh())
        out = self.last(self.inner(x.detach() if self.how == "input" else x).tanh())
        return out.detach() if self.how == "output" else out


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "features", "input", "output"])
def test_a_model_without_gradients_is_one_error(how: str) -> None:
    message = "the loss has no gradient with respect to the images, so that the penalty would be 0"
    model, (x, y) = Hides(how).double(), images()
    check_refused(model, message)
    for options in ({"engine": "first_order"}, {"engine": "eager", "loss_at": "step"}):
        with pytest.raises(RuntimeError, match=message):
            curvature(model, x, y, **options)
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        curvature(model, x, y)
    with pytest.raises(RuntimeError, match=message):
        curvature_along_gradient(model, x, y, method="finite", h=0.1)


@of_torch
def test_so_it_is_compiled_without_gradients(aot_eager: None) -> None:
    x, y = images()
    with pytest.raises(RuntimeError, match="the penalty would be 0"):
        curvature(Hides("features").double(), x, y, engine="compile")


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("layer", [partial(nn.LazyConv2d, 4, 3), partial(nn.LazyBatchNorm2d, affine=False)])
def test_lazy_modules_without_shapes_are_one_error(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    check_refused(model, "of a lazy module has no shape yet: run the model on a batch before", ValueError)
    with pytest.raises(ValueError, match="has no shape yet"):
        prepare(model, images()[0])
    model(images()[0])
    check_right(model)


@pytest.mark.parametrize("engine", ["auto", "reference", "first_order"])
def test_a_module_that_leaves_the_program_leaves_the_model_as_it_was(engine: str) -> None:
    def leave(t: Tensor) -> Tensor:
        raise SystemExit(0)

    model, (x, y) = network(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), Lambda(torch.tanh), nn.Dropout()), images()
    prepare(model, x)
    model[2] = Lambda(leave)
    parameters, flags = [*model.parameters()], [module.training for module in model.modules()]
    with pytest.raises(SystemExit):
        curvature(model, x, y, engine=engine)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert not any("forward" in vars(module) for module in model.modules())
    model[2] = Lambda(torch.tanh)
    curvature(model, x, y, engine=engine)
