"""Second derivatives that torch lacks, or gets wrong in silence: each is right, or one clear error.

What is right is a definition by plain double backpropagation, of a network written in operators of which torch has all
derivatives, or finite differences of first-order gradients.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from networks import relative
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastcure import CURE, attacks, curvature, double_backward, explain, prepare
from fastcure.analysis import curvature_along_gradient, curvature_profile, frobenius_norm, robustness_bounds
from fastcure.engines import ENGINES
from fastcure.engines.compile import Compile
from fastcure.rules.plain_operators import PlainOperators

pytestmark = pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode:UserWarning")
H = 0.5
EXACT = ["eager", "reference"]
of_torch = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine "compile" without code generation."""
    monkeypatch.setitem(ENGINES, "compile", Compile("aot_eager"))
    yield
    torch._dynamo.reset()


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def network(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()
    model(images()[0])
    return model


def definition(model: nn.Module, x: Tensor, y: Tensor, z: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
    """Penalty (B,), and the gradients of its mean in one vector, as the paper writes them."""
    model = copy.deepcopy(model).train(train)

    def g(point: Tensor) -> Tensor:
        point = point.requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True)[0]

    penalty = (g(x + H * z) - g(x.clone())).flatten(1).square().sum(1)
    grads = torch.autograd.grad(penalty.mean(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    return penalty.detach(), torch.cat([grad.flatten() for grad in grads])


def finite_differences(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same by central differences, in every parameter, of penalties made of first-order gradients."""
    model = copy.deepcopy(model).eval()

    def penalties() -> Tensor:
        ends = []
        for point in (x + H * z, x.clone()):
            point.requires_grad_()
            ends += torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
        return (ends[0] - ends[1]).flatten(1).square().sum(1)

    grads, e = [], 1e-5
    with torch.no_grad():
        for values in (parameter.view(-1) for parameter in model.parameters()):
            for i in range(len(values)):
                sides = []
                for side in (e, -2 * e, e):
                    values[i] += side
                    with torch.enable_grad():
                        sides.append(penalties().mean())
                grads.append((sides[0] - sides[1]) / (2 * e))
    return penalties().detach(), torch.stack(grads)


def unit(x: Tensor) -> Tensor:
    return torch.randn_like(x).sign() / x[0].numel() ** 0.5


def ours(model: nn.Module, x: Tensor, y: Tensor, z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    penalty = curvature(model, x, y, H, direction=z, **options).penalty
    penalty.mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return penalty.detach(), torch.cat([grad.flatten() for grad in grads])


def check_right(model: nn.Module, plain: nn.Module | None = None, *, first_order: bool = True) -> None:
    """Compare engines, and the exact ||Hz||, with the definition of `plain`, the same network in other operators."""
    (x, y), plain = images(), plain or model
    z = unit(x)
    truth = definition(plain, x, y, z)
    for engine in EXACT:
        for value, right in zip(ours(model, x, y, z, engine=engine), truth, strict=True):
            assert relative(value, right) < 1e-9, engine
    if first_order:
        for value, right in zip(ours(model, x, y, z, engine="first_order"), truth, strict=True):
            assert relative(value, right) < 1e-5
    assert relative(curvature_along_gradient(model, x, y).value, along_gradient(plain, x, y)) < 1e-9


def along_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||Hz|| with z of the gradient's signs, (B,)."""
    model = copy.deepcopy(model).eval()
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True)
    z = g.detach().sign() / g.detach().sign().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.autograd.grad(g, point, z)[0].flatten(1).norm(dim=1)


def check_refused(model: nn.Module, message: str, error: type[Exception] = RuntimeError, **options: Any) -> None:
    """Every exact engine and measure raises one error."""
    x, y = images()
    for engine in (*EXACT, "auto"):
        with pytest.raises(error, match=message):
            curvature(model, x, y, H, engine=engine, **options).penalty.sum().backward()
    with pytest.raises(error, match=message):
        CURE(model, H, microbatch=2, **options)(x, y).total.backward()
    for measure in (curvature_along_gradient, curvature_profile, frobenius_norm, robustness_bounds):
        with pytest.raises(error, match=message):
            measure(model, x, y, **options)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: Tensor) -> Tensor:
        return self.function(t)


# Operators of one's own


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class OnceSquare(Square):
    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))


class OpaqueSquare(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (2 * g * ctx.saved_tensors[0]).detach()


class OpaqueSum(Square):
    """As a fused loss: what comes into its backward has no history of its own."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return (t * t).sum(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g[:, None].detach() * ctx.saved_tensors[0].detach()


class LeadByConstant(Square):
    """The gradient of its first argument is None, that of the second has no graph."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, (2 * g * ctx.saved_tensors[0]).detach()


def test_a_gradient_that_is_none_hides_no_other() -> None:
    model = network(nn.Conv2d(1, 2, 3), Lambda(lambda t: LeadByConstant.apply(torch.ones(()), t)))
    check_refused(model, "LeadByConstantBackward has no second derivative")


@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish])
def test_the_slope_at_a_kink_is_torchs(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([-3.0, 3.0], dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(function(x).sum(), x)
    with double_backward():
        (ours,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("function", [OnceSquare, OpaqueSquare])
@pytest.mark.parametrize("residual", [False, True])
def test_a_function_without_a_second_derivative_is_one_error(function: Any, residual: bool) -> None:
    def square(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: apply(t) + (t.tanh() if residual else 0)

    model = network(nn.Conv2d(1, 2, 3), Lambda(square(function.apply)))
    check_refused(
        model, rf"{function.__name__}Backward has no second derivative.*engine='first_order'.*method='finite'"
    )
    x, y = images()
    z, plain = unit(x), copy.deepcopy(model)
    plain[1] = Lambda(square(lambda t: t * t))
    assert relative(ours(model, x, y, z, engine="first_order")[1], definition(plain, x, y, z)[1]) < 1e-6
    values = [curvature_along_gradient(m, x, y, method="finite", h=0.1).value for m in (model, plain)]
    assert relative(*values) < 1e-9
    attacks.pgd(model, x, y)


@pytest.mark.parametrize("function", [OnceSquare, OpaqueSum])
def test_so_it_is_in_the_loss(function: Any) -> None:
    model = network(nn.Conv2d(1, 2, 3), nn.Tanh())
    check_refused(
        model, "has no second derivative", loss_fn=lambda logits, y: function.apply(logits).reshape(len(y), -1)[:, 0]
    )


def test_so_it_is_where_it_joins_a_model_later() -> None:
    model, (x, y) = network(nn.Conv2d(1, 2, 3), nn.Tanh()), images()
    curvature(model, x, y)
    model[1] = Lambda(OnceSquare.apply)
    with pytest.raises(RuntimeError, match="OnceSquareBackward has no second derivative"):
        curvature(model, x, y)


@of_torch
@pytest.mark.parametrize("function", [OnceSquare, OpaqueSquare])
def test_so_it_is_compiled(function: Any, aot_eager: None) -> None:
    model, (x, y) = network(nn.Conv2d(1, 2, 3), Lambda(function.apply)), images()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        curvature(model, x, y, engine="compile")


def test_functions_that_have_one_are_right() -> None:
    class Stop(Square):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return torch.zeros_like(g)

    model = network(nn.Conv2d(1, 2, 3), Lambda(lambda t: Square.apply(t) + Stop.apply(t)))
    plain = copy.deepcopy(model)
    plain[1] = Lambda(lambda t: t * t + (t * t).detach())
    check_right(model, plain, first_order=False)  # which sees values change that are given no gradient


# Operators without a second derivative in torch


def test_an_operator_without_a_second_derivative_is_one_error() -> None:
    def segments(t: Tensor) -> Tensor:
        return torch.segment_reduce(t, "sum", lengths=torch.ones(len(t), dtype=torch.int64))

    model = network(nn.Conv2d(1, 2, 3), nn.Flatten(), Lambda(segments))
    check_refused(model, "no second derivative of _segment_reduce: replace it, or use CURE's engine='first_order'")


def test_an_operator_with_a_backward_in_code_of_its_own_is_one_error() -> None:
    @torch.library.custom_op("fastcure_tests::square", mutates_args=())
    def square(t: Tensor) -> Tensor:
        return t * t

    @torch.library.custom_op("fastcure_tests::square_backward", mutates_args=())
    def square_backward(g: Tensor, t: Tensor) -> Tensor:
        return 2 * g * t

    square.register_autograd(
        lambda ctx, g: square_backward(g, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    check_refused(network(nn.Conv2d(1, 2, 3), Lambda(square)), "no second derivative of fastcure_tests.square_backward")


class Hardsigmoid(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return torch.where((t > -3) & (t < 3), t / 6 + 0.5, (t > 0).to(t))


class Hardswish(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return torch.where(t <= -3, 0 * t, torch.where(t < 3, t * (t + 3) / 6, t))


HARD = {
    "hardsigmoid": (nn.Hardsigmoid(), Hardsigmoid()),
    "hardsigmoid in place": (nn.Hardsigmoid(inplace=True), Hardsigmoid()),
    "hardsigmoid called": (Lambda(F.hardsigmoid), Hardsigmoid()),
    "hardswish": (nn.Hardswish(), Hardswish()),
    "hardswish in place": (nn.Hardswish(inplace=True), Hardswish()),
    "hardswish called": (Lambda(F.hardswish), Hardswish()),
}


def hard_network(layer: nn.Module) -> nn.Module:
    """Many activations below -3 and above 3."""
    model = network(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), layer)
    nn.init.normal_(model[1].weight, std=4)
    return model


@pytest.mark.filterwarnings("ignore:the first-order engine misses")
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("prepared", [False, True])
def test_hard_activations(name: str, prepared: bool) -> None:
    layer, plain_layer = HARD[name]
    model = hard_network(layer)
    plain, (x, y) = copy.deepcopy(model), images()
    plain[2] = plain_layer
    if prepared:
        prepare(model, x)
    z = unit(x)
    truth = definition(plain, x, y, z)
    for engine in EXACT:
        for value, right in zip(ours(model, x, y, z, engine=engine), truth, strict=True):
            assert relative(value, right) < 1e-9
    assert relative(curvature_along_gradient(model, x, y).value, along_gradient(plain, x, y)) < 1e-9


@pytest.mark.parametrize("name", HARD)
def test_hard_activations_are_torchs_at_their_edges(name: str) -> None:
    """Value and first derivative, and NaN passes."""
    layer, _ = HARD[name]
    x = torch.tensor([-4, -3, -2.9, -0.0, 0, 1, 2.9, 3, 4, float("nan")], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad((value := layer(x + 0)).sum(), x)
    with PlainOperators():
        (plain_derivative,) = torch.autograd.grad((plain_value := layer(x + 0)).sum(), x)
    torch.testing.assert_close(plain_value, value, equal_nan=True)
    torch.testing.assert_close(plain_derivative[:-1], derivative[:-1])


def test_running_statistics_take_the_momentum_given() -> None:
    x, mean, var = torch.randn(6, 3, 4, dtype=torch.float64), torch.zeros(3).double(), torch.ones(3).double()
    with PlainOperators():
        F.batch_norm(x, mean, var, training=True, momentum=0.3)
    torch.testing.assert_close(mean, 0.3 * x.mean((0, 2)))
    torch.testing.assert_close(var, 0.7 + 0.3 * x.var((0, 2)))


@of_torch
@pytest.mark.parametrize("name", ["hardsigmoid", "hardswish", "hardswish called"])
def test_hard_activations_compiled(name: str, aot_eager: None) -> None:
    layer, plain_layer = HARD[name]
    model, (x, y) = hard_network(layer).eval(), images()
    plain, z = copy.deepcopy(model), unit(x)
    plain[2] = plain_layer
    assert relative(ours(model, x, y, z, engine="compile")[1], definition(plain, x, y, z)[1]) < 1e-9


@of_torch
def test_hardsigmoid_called_and_compiled_is_one_error(aot_eager: None) -> None:
    x, y = images()
    with pytest.raises(RuntimeError, match="no second derivative of hardsigmoid: use engine='eager'"):
        curvature(hard_network(Lambda(F.hardsigmoid)), x, y, engine="compile").penalty.sum().backward()


# Scripted code


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
        for value, right in zip(ours(made, x, y, z, engine="first_order"), truth, strict=True):
            assert relative(value, right) < 1e-6


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


# Models that differentiate themselves


class LayerNorm(nn.LayerNorm):
    def forward(self, t: Tensor) -> Tensor:
        return normalised(t, [-3, -2, -1], self.eps) * self.weight + self.bias


class GroupNorm(nn.GroupNorm):
    def forward(self, t: Tensor) -> Tensor:
        groups = t.unflatten(1, (self.num_groups, -1))
        return affine(normalised(groups, [2, 3, 4], self.eps).flatten(1, 2), self)


class InstanceNorm(nn.InstanceNorm2d):
    def forward(self, t: Tensor) -> Tensor:
        return affine(normalised(t, [2, 3], self.eps), self)


class BatchNorm(nn.BatchNorm2d):
    def forward(self, t: Tensor) -> Tensor:
        if self.training:
            return affine(normalised(t, [0, 2, 3], self.eps), self)
        mean, var = self.running_mean.view(-1, 1, 1), self.running_var.view(-1, 1, 1)
        return affine((t - mean) / (var + self.eps).sqrt(), self)


def normalised(t: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = t - t.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def affine(t: Tensor, norm: Any) -> Tensor:
    return t * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


class Energy(nn.Module):
    """Its logits depend on its own gradient."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.inner(x).logsumexp(1).sum(), x, create_graph=True)
        return self.inner(x) + self.last(g.flatten(1))


NORMS: dict[str, tuple[nn.Module, nn.Module]] = {
    "layer": (nn.LayerNorm((4, 6, 6)), LayerNorm((4, 6, 6))),
    "layer called": (Lambda(lambda t: F.layer_norm(t, t.shape[1:])), Lambda(lambda t: normalised(t, [1, 2, 3], 1e-5))),
    "group": (nn.GroupNorm(2, 4), GroupNorm(2, 4)),
    "instance": (nn.InstanceNorm2d(4, affine=True), InstanceNorm(4, affine=True)),
    "instance called": (Lambda(F.instance_norm), Lambda(lambda t: normalised(t, [2, 3], 1e-5))),
    "batch": (nn.BatchNorm2d(4), BatchNorm(4)),
    "batch by the batch": (nn.BatchNorm2d(4, track_running_stats=False).train(), BatchNorm(4).train()),
    "batch called": (
        Lambda(lambda t: F.batch_norm(t, None, None, training=True)),
        Lambda(lambda t: normalised(t, [0, 2, 3], 1e-5)),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_models_that_differentiate_themselves(name: str) -> None:
    norm, plain_norm = (copy.deepcopy(n) for n in NORMS[name])
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model, plain = Energy(norm).double(), Energy(plain_norm).double()
    plain.load_state_dict(model.state_dict(), strict="batch" not in name)
    x, y = images()
    z, training = unit(x), name == "batch by the batch"
    plain.train(training)

    truth = definition(plain, x, y, z, train=training)
    for engine in EXACT:
        for value, right in zip(ours(model, x, y, z, engine=engine), truth, strict=True):
            assert relative(value, right) < 1e-9, engine
    if not training:
        assert relative(curvature_along_gradient(model, x, y).value, along_gradient(plain, x, y)) < 1e-9


def test_so_do_they_where_some_samples_have_no_penalty() -> None:
    model, (x, y) = Energy(nn.GroupNorm(2, 4)).double(), images()
    F.cross_entropy(model(x), y).backward()
    truth = [p.grad for p in model.parameters()]
    model.zero_grad()
    CURE(model, H, gamma=0.0, fraction=0.5)(x, y).total.backward()
    assert relative([p.grad for p in model.parameters()], truth) < 1e-12


@pytest.mark.parametrize("engine", EXACT)
def test_so_do_they_with_batch_statistics_of_training_mode(engine: str) -> None:
    model, plain = Energy(nn.BatchNorm2d(4)).double(), Energy(BatchNorm(4)).double()
    plain.load_state_dict(model.state_dict())
    x, y = images()
    z, twin = unit(x), copy.deepcopy(model)
    with torch.no_grad():
        twin.inner[1](twin.inner[0](x))
        twin.inner[1](twin.inner[0](x))  # the model calls it twice
    truth = definition(plain, x, y, z, train=True)
    for value, right in zip(ours(model, x, y, z, engine=engine, batch_stats="train"), truth, strict=True):
        assert relative(value, right) < 1e-9
    assert relative([*model.buffers()], [*twin.buffers()]) < 1e-12


# Weights that depend on the image


class Hyper(nn.Module):
    """Each image makes a weight of `layer` from its own pixels."""

    def __init__(self, layer: nn.Module, name: str, size: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.name, self.size = layer, name, size
        self.make, self.last = nn.Linear(64, int(torch.Size(size).numel())), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            weight = self.make(row.flatten()).view(self.size)
            rows.append(functional_call(self.layer, {self.name: weight}, (row[None],)))
        return self.last(torch.cat(rows).tanh().mean((2, 3)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias"])
@pytest.mark.parametrize("prepared", [False, True])
def test_weights_that_depend_on_the_image(name: str, norm: bool, prepared: bool) -> None:
    if name.startswith("1") and not norm:
        return
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Tanh())
    model = Hyper(layers, name, tuple(layers.get_parameter(name).shape)).double()
    if prepared:
        prepare(model, images()[0])
    check_right(model)


@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_so_do_those_of_a_batch_norm_in_training_mode(name: str) -> None:
    model = Hyper(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), name, (4,)).double()
    x, y = images()
    z = unit(x)
    truth = definition(model, x, y, z, train=True)
    for value, right in zip(ours(model, x, y, z, batch_stats="train"), truth, strict=True):
        assert relative(value, right) < 1e-9


def test_an_image_as_the_weight_of_a_convolution() -> None:
    class Correlates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 4, 8, padding=2, bias=False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(functional_call(self.conv, {"weight": x}, (x,)).div(20).tanh().mean((2, 3)))

    check_right(Correlates().double(), first_order=False)  # whose steps are of each image on its own


# Transforms of torch.func inside a model


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.norm, self.last = nn.InstanceNorm2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([x, x.flip(3)], 2)
        frames = torch.vmap(self.norm, in_dims=2, out_dims=2)(frames)
        return self.last(torch.vmap(self.inner, in_dims=2, out_dims=2)(frames).tanh().mean((2, 3, 4)))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.filterwarnings("ignore:the first-order engine misses")
def test_vmap_inside_a_model(prepared: bool) -> None:
    model, (x, y) = Frames().double().eval(), images()
    if prepared:
        prepare(model, x)
        assert "batch norms folded into the layer before: 0 of 2" in explain(model, x)
        assert "inner.1 not: it runs inside a transform of torch.func" in explain(model, x)
    z = unit(x)
    truth = definition(model, x, y, z)
    for engine in EXACT:
        for value, right in zip(ours(model, x, y, z, engine=engine), truth, strict=True):
            assert relative(value, right) < 1e-9
    assert relative(curvature_along_gradient(model, x, y).value, along_gradient(model, x, y)) < 1e-9
    attacks.pgd(model, x, y)
    attacks.deepfool(model, x)


def test_vmap_around_a_batch_norm_in_training_mode() -> None:
    model, (x, y) = Frames(), images()
    for i in (1, 4):
        model.inner[i] = nn.BatchNorm2d(4, track_running_stats=False)
    model.inner[2] = nn.Tanh()
    model.double().train()
    z = unit(x)
    truth = definition(model, x, y, z, train=True)
    for value, right in zip(ours(model, x, y, z, batch_stats="train"), truth, strict=True):
        assert relative(value, right) < 1e-9


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(4), nn.LayerNorm((4, 6, 6))])
def test_grad_inside_a_model(norm: nn.Module) -> None:
    class Functional(Energy):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.last(torch.func.grad(lambda t: self.inner(t).logsumexp(1).sum())(x).flatten(1))

    plain = {nn.BatchNorm2d: BatchNorm(4), nn.LayerNorm: LayerNorm((4, 6, 6))}.get(type(norm), nn.Identity())
    model, other = Functional(copy.deepcopy(norm)).double(), Energy(plain).double()
    other.load_state_dict(model.state_dict())
    check_right(model, other)


# Models that hide their gradients


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


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.complex128}
        self.inner = nn.Sequential(
            nn.Conv2d(1, 4, 3, **options), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1, groups=2, **options)
        )
        self.last = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.to(torch.complex128)).abs().square().mean((2, 3)))


def test_complex_convolutions() -> None:
    model, (x, y) = Complex(), images()
    z = unit(x)
    truth = definition(model, x, y, z)
    for engine in (*EXACT, "first_order"):
        for value, right in zip(ours(model, x, y, z, engine=engine), truth, strict=True):
            assert float((value - right).abs().square().sum().sqrt() / right.abs().square().sum().sqrt()) < 1e-6
    assert relative(curvature_along_gradient(model, x, y).value, along_gradient(model, x, y)) < 1e-9


def test_the_definition_agrees_with_finite_differences() -> None:
    """Of this file's truth itself, where nothing but first derivatives is used."""
    for layer in (nn.Tanh(), Lambda(OpaqueSquare.apply)):
        model, (x, y) = network(nn.Conv2d(1, 2, 3), layer, nn.AvgPool2d(3)), images()
        z = unit(x)
        plain = copy.deepcopy(model)
        if isinstance(layer, Lambda):
            plain[1] = Lambda(lambda t: t * t)
        assert relative(definition(plain, x, y, z)[1], finite_differences(model, x, y, z)[1]) < 1e-5


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
