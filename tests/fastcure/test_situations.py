"""Models and callers out of the ordinary: each is right, as the reference says, or one clear error or warning."""

import warnings
from collections.abc import Callable

import pytest
import torch
from networks import IN_FLOAT64, NETWORKS, Case, Checkpointed, make, relative
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastcure import CURE, curvature, prepare

of_torch = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute:UserWarning"
)


@pytest.fixture
def case() -> Case:
    return make(NETWORKS["batch_norm-gelu-average"], 4, seed=0)


def gradients(case: Case, engine: str = "eager", **options: object) -> list[Tensor]:
    case.model.zero_grad()
    out = curvature(*case, 0.7, engine=engine, **options)
    (out.loss.sum() + out.penalty.sum()).backward()
    return [p.grad.clone() for p in case.model.parameters() if p.grad is not None]


def check_right(case: Case) -> None:
    """Exact engines, before and after `prepare`, and where the model is smooth the other one."""
    truth = gradients(case, "reference")
    assert relative(gradients(case), truth) < 1e-9
    assert relative(gradients(case, "first_order"), truth) < 1e-4
    prepare(case.model, case.x)
    assert relative(gradients(case), truth) < 1e-9


def with_layers(case: Case, change: Callable[[nn.Module], nn.Module]) -> Case:
    """The case with `change` applied to its first convolution and its last layer."""
    model = case.copy().model
    model[0], model[-1] = change(model[0]), change(model[-1])
    return Case(model, case.x, case.y)


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrisations(case: Case, norm: Callable[[nn.Module], nn.Module]) -> None:
    check_right(with_layers(case, norm))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm(case: Case) -> None:
    check_right(with_layers(case, nn.utils.weight_norm))


@of_torch
def test_parametrisations_compiled(case: Case, aot_eager: None) -> None:
    case = with_layers(case, parametrizations.weight_norm)
    assert relative(gradients(case, "compile"), gradients(case, "reference")) < 1e-9


def test_tied_parameters(case: Case) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(3 * 70, 7)).double()
    model[0][3].weight = model[0][0].weight
    check_right(Case(model, case.x, case.y))


def test_partly_frozen_parameters(case: Case) -> None:
    for parameter in list(case.model.parameters())[::2]:
        parameter.requires_grad_(False)
    check_right(case)
    assert [p.grad is None for p in case.model.parameters()] == [True, False] * 5 + [True]


@of_torch
def test_partly_frozen_parameters_compiled(case: Case, aot_eager: None) -> None:
    for parameter in list(case.model.parameters())[::2]:
        parameter.requires_grad_(False)
    assert relative(gradients(case, "compile"), gradients(case, "reference")) < 1e-9


def test_hooks_of_modules_are_heeded(case: Case) -> None:
    kinds = []

    def scale_output(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        kinds.append(type(output))
        return 1.1 * output

    case.model[0].register_forward_hook(scale_output)
    case.model[2].register_forward_pre_hook(lambda module, inputs: (0.9 * inputs[0],))
    case.model[4].register_full_backward_hook(lambda module, into, out: (0.8 * into[0],))
    truth = gradients(case, "reference")
    assert relative(gradients(case), truth) < 1e-9
    prepare(case.model, case.x)
    assert relative(gradients(case), truth) < 1e-9
    assert set(kinds) == {Tensor}


@of_torch
@pytest.mark.parametrize("form", ["submodule", "in place", "function"])
def test_a_compiled_part_of_a_model_runs_uncompiled(case: Case, form: str) -> None:
    truth = gradients(case, "reference")
    if form == "submodule":
        case.model[3] = torch.compile(case.model[3], backend="aot_eager")
    elif form == "in place":
        case.model[3].compile(backend="aot_eager")
    else:
        case.model[5].forward = torch.compile(lambda x: F.gelu(x), backend="aot_eager")
    case.model.eval()(case.x).sum().backward()  # compiled by now
    check_right(case)
    assert relative(gradients(case), truth) < 1e-9
    torch._dynamo.reset()


@of_torch
@pytest.mark.parametrize("microbatch", [None, 2])
def test_compiling_the_penalty_itself_is_an_error(case: Case, microbatch: int | None) -> None:
    cure = CURE(case.model, microbatch=microbatch)
    with pytest.raises(AssertionError, match="not_inside_torch_compile"):
        torch.compile(cure, backend="aot_eager")(case.x, case.y)
    torch._dynamo.reset()


def checkpointed(reentrant: bool = False) -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.5))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7))
    return nn.Sequential(Checkpointed(inner, reentrant), pooled).double()


@pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")
@pytest.mark.parametrize(("engine", "reentrant"), [("eager", True), ("eager", False), ("reference", False)])
def test_checkpointing_is_one_clear_error(case: Case, engine: str, reentrant: bool) -> None:
    model = checkpointed(reentrant)
    with pytest.raises(RuntimeError, match=r"turn it off, and save memory by CURE\(model, microbatch=N\)"):
        CURE(model, engine=engine)(case.x, case.y).total.backward()


@pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")
def test_checkpointing_is_right_in_first_order(case: Case) -> None:
    model = checkpointed()
    ours = gradients(Case(model, case.x, case.y), "first_order")
    plain = nn.Sequential(model[0].inner, model[1])
    assert relative(ours, gradients(Case(plain, case.x, case.y), "reference")) < 1e-6


class Noise(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.randn_like(x)


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)


@pytest.mark.parametrize("layer", [Drops(), Noise(0.1)])
@pytest.mark.parametrize("engine", ["eager", "first_order", "reference"])
def test_randomness_in_evaluation_mode_is_an_error(case: Case, layer: nn.Module, engine: str) -> None:
    model = nn.Sequential(*list(case.model)[:3], layer, *list(case.model)[3:])
    for microbatch in (None, 2):  # it stays one
        with pytest.raises(ValueError, match=r"random in evaluation mode: logits differ by .*training=self.training"):
            CURE(model, engine=engine, microbatch=microbatch)(case.x, case.y)


@pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode")
def test_random_numbers_that_change_nothing_are_allowed(case: Case) -> None:
    model = nn.Sequential(Noise(0.0), nn.Dropout(0.5), *case.model)
    assert relative(gradients(Case(model, case.x, case.y)), gradients(case)) < IN_FLOAT64


@pytest.mark.parametrize("scale", [255, -1, 1.1])
def test_pixels_outside_of_0_to_1_are_warned_of_once_a_model(case: Case, scale: float) -> None:
    with pytest.warns(UserWarning, match=r"pixels should be in \[0, 1\], got .*fastcure.models.Normalize"):
        curvature(case.model, (1 if scale > 0 else -1e-2) + case.x * scale, case.y)
    curvature(case.model, case.x * scale, case.y)
    with pytest.warns(UserWarning, match="pixels should be"):
        curvature(case.copy().model, case.x * 255, case.y)
    curvature(case.copy().model, case.x.clamp(-0.5, 0.99) * 1.011, case.y)  # by 1e-3


@pytest.mark.parametrize("h", [0.01, torch.tensor([1.0, 1.0, 0.01, 1.0])])
def test_steps_lost_in_rounding_are_warned_of_once_a_model(case: Case, h: float | Tensor) -> None:
    narrow = case.copy(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"h should be >= 0.11 for 210 pixels in torch.bfloat16, got 0.01"):
            curvature(*narrow, h)
        curvature(*narrow, h)
        curvature(*narrow.copy(), 0.12)
    curvature(*narrow.copy(), h)  # in float32
    with pytest.warns(UserWarning, match="in torch.float32, got 1e-06"):
        curvature(*narrow.copy(), 1e-6)


def test_the_step_that_is_warned_of_is_where_the_penalty_goes_wrong() -> None:
    case = make(NETWORKS["layer_norm-gelu-adaptive"], 16, seed=0)
    z = torch.randn_like(case.x).sign() / case.x[0].numel() ** 0.5
    errors = []
    for multiple in (0.1, 1, 10):
        h = multiple * torch.finfo(torch.bfloat16).eps * case.x[0].numel() ** 0.5
        truth = curvature(*case, h, direction=z).penalty
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors.append(relative(curvature(*case.copy(torch.float32), h, direction=z.float()).penalty, truth))
    assert errors[0] > 0.3
    assert errors[1] < 0.3
    assert errors[2] < 0.05


@of_torch
def test_labels_out_of_range_compiled(case: Case, aot_eager: None) -> None:
    curvature(*case, engine="compile")
    for label in (-100, -1, 7):
        with pytest.raises((IndexError, ValueError), match=rf"{label}.* out of bounds|labels must be in"):
            curvature(case.model, case.x, torch.full_like(case.y, label), engine="compile")


def test_another_dtype_or_device_is_torchs_error(case: Case) -> None:
    with pytest.raises(RuntimeError, match=r"Float.*Double"):
        curvature(case.model, case.x.float(), case.y)
    with pytest.raises(ValueError, match=r"got cpu and meta: pass y.to\(x.device\)"):
        curvature(case.model, case.x, case.y.to("meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        curvature(case.model.to("meta"), case.x, case.y).penalty.sum().item()


@of_torch
def test_forward_mode_and_functional_transforms_are_refused(case: Case) -> None:
    refused = pytest.raises(RuntimeError, match=r"no forward-mode derivative and no rule for torch.func.*backward\(\)")

    def penalty(scale: Tensor) -> Tensor:
        return curvature(nn.Sequential(case.model[:-1], Scaled(case.model[-1], scale)), case.x, case.y).penalty.sum()

    one = torch.ones((), dtype=torch.float64)
    with refused:
        jvp(penalty, (one,), (one,))
    with refused:
        grad(penalty)(one)
    with refused:
        vmap(penalty)(one[None])
    with refused, torch.autograd.forward_ad.dual_level(), torch.no_grad():
        penalty(one)
    curvature(*case)


class Scaled(nn.Module):
    def __init__(self, layer: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def test_tensors_of_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        x = case.x.clone()
        model = case.copy().model
    with pytest.raises(ValueError, match=r"made under torch.inference_mode.*pass x.clone\(\)"):
        curvature(case.model, x, case.y)
    with pytest.raises(RuntimeError, match="inference"):
        curvature(model, case.x, case.y)


def test_microbatches_free_their_gradients(case: Case) -> None:
    total = CURE(case.model, microbatch=2)(case.x, case.y).total
    state = total.grad_fn
    assert len(state.state) == 11
    total.backward(retain_graph=True)
    once = [p.grad.clone() for p in case.model.parameters()]
    total.backward()
    assert relative([p.grad for p in case.model.parameters()], [2 * g for g in once]) < IN_FLOAT64
    assert state.state is None
    with pytest.raises(RuntimeError, match="retain_graph=True keeps it"):
        total.backward()


@pytest.mark.parametrize("statistics", [False, True])
def test_instance_norms_of_one_image(statistics: bool) -> None:
    """Where torch 2.13's own double backward is wrong: one image, channels last."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=statistics)
    layers = nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    model = nn.Sequential(*layers).double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(1, 2, 6, 6).double().contiguous(memory_format=torch.channels_last)
    y, found = torch.tensor([1]), []
    for images, labels, engine in ((x, y, "eager"), (torch.cat([x, x]), torch.cat([y, y]), "reference")):
        model.zero_grad()
        out = curvature(model, images, labels, engine=engine)
        (out.loss + out.penalty).mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert relative(found[0], found[1]) < 1e-10
