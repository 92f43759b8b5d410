"""The compiled engine against the reference, mostly without a code generator: what is compiled is what matters here."""

import gc
import logging
import shutil
import warnings
import weakref
from typing import Any

import pytest
import torch
from networks import NETWORKS, Case, Temperature, make, relative
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional as F

from fastcure import CURE, curvature
from fastcure.engines import ENGINES
from fastcure.engines.compile import Compile

# Of torch's own making, in torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def gradients(case: Case, engine: str, **options: object) -> list[Tensor]:
    case.model.zero_grad()
    out = curvature(*case, engine=engine, **options)
    weights = torch.randn(2, len(case.x), generator=torch.Generator().manual_seed(0)).to(out.loss)
    (weights * torch.stack([out.loss, out.penalty])).sum().backward()
    return [p.grad for p in case.model.parameters()]


ELSEWHERE = ("resnet8", "batch_norm-gelu-average")
"""A residual network is compiled in test_rewrite; what the other is made of, others have."""


# The root of the squared norm is one operation at the end of the region, whatever the network.
@pytest.mark.parametrize(
    ("name", "power"), [(name, 1 if name == "mlp-relu" else 2) for name in NETWORKS if name not in ELSEWHERE]
)
def test_equals_the_reference(aot_eager: object, name: str, power: int) -> None:
    case = make(NETWORKS[name], 4, seed=0)
    ours, truth = (gradients(case, engine, h=0.7, power=power) for engine in ("compile", "reference"))
    assert relative(ours, truth) < 1e-9
    torch.testing.assert_close(
        curvature(*case, engine="compile", h=0.7, power=power),
        curvature(*case, engine="reference", h=0.7, power=power),
    )


@pytest.mark.parametrize("lost", ["first", "last"])
def test_a_gradient_that_compilation_loses_is_an_error(aot_eager: object, lost: str) -> None:
    class Loses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            layers = {"first": self.first, "last": self.last}
            for name, layer in layers.items():
                lose = torch.compiler.is_compiling() and name == lost
                x = F.linear(x, layer.weight.detach() if lose else layer.weight, layer.bias).tanh()
            return x

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="the compiled gradients differ from the eager ones by"):
        curvature(Loses().double(), torch.rand(4, 6).double(), torch.tensor([0, 1, 2, 0]), engine="compile")


def test_h_and_weights_change_without_recompilation(aot_eager: Any) -> None:
    case = make(NETWORKS["mlp-relu"], 4, seed=0)
    cure = CURE(case.model, engine="compile")
    for step in range(6):
        cure.h, cure.gamma = 0.5 + 0.1 * step, 1.0 + step
        cure(case.x, case.y).total.backward()
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter -= 1e-3 * parameter.grad
    assert aot_eager.frame_count == 1
    ours, truth = (gradients(case, engine, h=0.33) for engine in ("compile", "reference"))
    assert relative(ours, truth) < 1e-9
    assert aot_eager.frame_count == 1


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_models_than_torch_keeps_each_have_their_own(aot_eager: Any) -> None:
    """torch keeps 8 compilations of one piece of code, here 2, and then silently falls back."""
    cases = [make(NETWORKS["mlp-softplus"], 4, seed) for seed in range(3)]
    for case in cases + cases:
        ours, truth = (gradients(case, engine) for engine in ("compile", "reference"))
        assert relative(ours, truth) < 1e-9
    assert aot_eager.frame_count == 3


def test_another_shape_is_another_compilation_and_right(aot_eager: Any) -> None:
    for batch in (4, 3, 4, 3):
        case = make(NETWORKS["mlp-softplus"], batch, seed=0)
        ours, truth = (gradients(case, engine) for engine in ("compile", "reference"))
        assert relative(ours, truth) < 1e-9


def test_modes_of_calling(aot_eager: object) -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    z = torch.randn_like(case.x)
    soft = Case(case.model, case.x, F.one_hot(case.y, 5).double())
    own_h = torch.tensor([0.3, 0.6, 0.9, 1.2]).double()
    normed = Case(nn.Sequential(nn.BatchNorm1d(13), case.model).double(), case.x, case.y)
    for these, options in [
        (case, {"direction": z}),
        (soft, {}),
        (case, {"h": own_h}),
        (normed, {"batch_stats": "split"}),
    ]:
        ours, truth = (gradients(these.copy(), engine, **options) for engine in ("compile", "reference"))
        assert relative(ours, truth) < 1e-9
    with torch.no_grad():
        assert not curvature(*case, engine="compile").penalty.requires_grad


def test_loss_and_penalty_may_go_backward_one_after_the_other(aot_eager: object) -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    truth = gradients(case, "reference")
    case.model.zero_grad()
    out = curvature(*case, engine="compile")
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    (weights[0] * out.loss).sum().backward(retain_graph=True)
    (weights[1] * out.penalty).sum().backward()
    assert relative([p.grad for p in case.model.parameters()], truth) < 1e-9


def test_a_learnable_loss(aot_eager: object) -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    loss_fn = Temperature().double()
    found = []
    for engine in ("compile", "reference"):
        loss_fn.zero_grad()
        gradients(case, engine, loss_fn=loss_fn)
        found.append(loss_fn.logarithm.grad.clone())
    torch.testing.assert_close(*found)


class Opaque(torch.autograd.Function):
    """A square whose backward the compiler takes for constant in x."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_a_model_that_breaks_the_graph_is_one_clear_error(aot_eager: object) -> None:
    class Breaks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    with pytest.raises(
        RuntimeError, match=r"takes whole, and it does not take this one \(Call to .*use engine='eager'"
    ):
        curvature(Breaks(3, 3), torch.rand(2, 3), torch.tensor([0, 1]), engine="compile")


def test_a_model_that_changes_its_buffers_is_one_clear_error(aot_eager: object) -> None:
    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    with pytest.raises(RuntimeError, match=r"does not take this one \(.*in-place operation.*use engine='eager'$"):
        curvature(Counts(), torch.rand(2, 3), torch.tensor([0, 1]), engine="compile")


def test_an_operator_of_ones_own_is_right_or_an_error(aot_eager: object) -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Opaque.apply(self.first(x)))

    torch.manual_seed(0)
    case = Case(Squares().double(), torch.rand(4, 5).double(), torch.tensor([0, 1, 2, 0]))
    truth = gradients(case, "reference")
    try:
        ours = gradients(case, "compile")
    except RuntimeError as error:
        assert "use engine='eager'" in str(error)  # noqa: PT017
    else:
        assert relative(ours, truth) < 1e-9


def test_it_says_that_it_compiles(aot_eager: object, caplog: pytest.LogCaptureFixture) -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    with caplog.at_level(logging.WARNING, "fastcure"):
        curvature(*case, engine="compile")
        assert caplog.records[0].message.startswith("fastcure: compiling Sequential for ")
        count = len(caplog.records)
        curvature(*case, engine="compile")
        assert len(caplog.records) == count


@torch._inductor.config.patch({"cpp.simdlen": 256, "cpp.vec_isa_ok": True})
def test_generated_code() -> None:
    """The real thing, without trial builds for each set of vector instructions; without a C++ compiler, its error."""
    torch.manual_seed(0)  # a network of few operations: each that is generated takes a second to build
    model = nn.Sequential(nn.Linear(6, 3), nn.Softplus()).double()
    case = Case(model, torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    if shutil.which("g++") is None:
        with pytest.raises(RuntimeError, match="install g"):
            gradients(case, "compile")
        return
    ours, truth = (gradients(case, engine) for engine in ("compile", "reference"))
    assert relative(ours, truth) < 1e-9
    torch._dynamo.reset()


def test_deprecations_within_torch_are_not_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        place = ("_script.py", 365, "torch.jit._script")
        warnings.warn_explicit("`torch.jit.script_method` is deprecated.", DeprecationWarning, *place)
        return lookup_backend("aot_eager")(module, inputs)

    monkeypatch.setitem(ENGINES, "compile", Compile(backend))  # type: ignore[arg-type]
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature(*case, engine="compile")
    torch._dynamo.reset()


def test_no_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler on the CPU, and none was found: install g"):
        curvature(nn.Linear(3, 3), torch.rand(2, 3), torch.tensor([0, 1]), engine="compile")


def test_a_forgotten_model_is_collected(aot_eager: object) -> None:
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    gone = weakref.ref(case.model)
    gradients(case, "compile")
    del case
    torch._dynamo.reset()  # torch's own caches hold what was compiled
    gc.collect()
    assert gone() is None
