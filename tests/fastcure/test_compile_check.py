"""The check of a compiled step: it finds a second derivative that is wrong by 1 %, and takes no rounding for it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature
from fastcure._functional import cross_entropy, evaluation_mode
from fastcure.engines import ENGINES, Evaluation, Request
from fastcure.engines._compile_check import check
from fastcure.engines.compile import Compile
from fastcure.engines.eager import Eager

PRECISIONS = {"float32": (torch.float32, False), "float64": (torch.float64, False), "autocast": (torch.float32, True)}


@pytest.fixture
def _uncoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine "compile" that stops before code generation."""
    monkeypatch.setitem(ENGINES, "compile", Compile("aot_eager"))
    yield
    torch._dynamo.reset()


class Bent(nn.Module):
    """A tanh whose second derivative, where it is compiled, is too large by a share; value and slope are right."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, u: Tensor) -> Tensor:
        y = u.tanh()
        if not torch.compiler.is_compiling():
            return y
        second, distance = (-2 * y * (1 - y.square())).detach(), u - u.detach()
        return y + self.share * second * distance.square() / 2


def bent(share: float, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 20), Bent(share), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    return Case(model.to(dtype), torch.rand(12, 9, dtype=dtype), torch.arange(12) % 4)


@pytest.mark.usefixtures("_uncoded")
@pytest.mark.parametrize(("dtype", "h"), [(torch.float32, 0.3), (torch.float64, torch.linspace(0.1, 1.0, 12))])
def test_a_compiled_second_derivative_that_is_one_percent_off_is_an_error(dtype: torch.dtype, h: object) -> None:
    curvature(*bent(0.0, dtype), h, engine="compile")
    with pytest.raises(RuntimeError, match=r"differ from the eager ones by \d\.\de-0[34] of their size"):
        curvature(*bent(0.01, dtype), h, engine="compile")


@pytest.mark.usefixtures("_uncoded")
@pytest.mark.parametrize("name", ["batch_norm-relu-max", "mlp-relu", "shared"])
def test_compiled_networks_pass_in_float32(name: str) -> None:
    curvature(*make(NETWORKS[name], 6, seed=1, dtype=torch.float32), 0.7, engine="compile")


def requested(case: Case, **options: object) -> Request:
    return Request(case.model, cross_entropy, case.x, case.y, **{"h": 0.7, **options})


def rounded_otherwise(request: Request, x: Tensor) -> tuple[Evaluation, Tensor]:
    """The eager step of the samples in reverse order, by other convolutions."""
    z = F.normalize(torch.ones_like(x).flatten(1)).view_as(x)
    with torch.backends.mkldnn.flags(enabled=False):
        return Eager().forward(replace(request, x=x.flip(0), y=request.y.flip(0), direction=z)), z


class Reversed(Eager):
    """The backward of a batch in reverse order."""

    def backward(self, state, w_loss, w_penalty, *, retain):
        weights = [w if w is None else w.flip(0) for w in (w_loss, w_penalty)]
        with torch.backends.mkldnn.flags(enabled=False):
            return super().backward(state, *weights, retain=retain)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # of torch's own switch
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_rounding_alone_is_no_error(name: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    for seed in range(3):
        case = make(NETWORKS[name], 6, seed=seed, dtype=dtype)
        request = requested(case)
        with evaluation_mode(case.model), torch.autocast("cpu", enabled=autocast):
            assert check(lambda x, request=request: rounded_otherwise(request, x), request, Reversed())


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_a_model_of_one_dtype_is_compared_in_it(share: float) -> None:
    class OneDtype(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.table = nn.Linear(9, 4), torch.randn(9, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x @ self.table).tanh())

    class Off(Eager):
        def backward(self, *args: object, **options: object) -> object:
            return tuple(g if g is None else g * (1 + share) for g in super().backward(*args, **options))

    torch.manual_seed(0)
    case = Case(OneDtype(), torch.rand(5, 9), torch.arange(5) % 4)
    request = requested(case)
    z = F.normalize(torch.randn(5, 9))

    def region(x: Tensor) -> tuple[Evaluation, Tensor]:
        return Eager().forward(replace(request, x=x, direction=z)), z

    if not share:
        assert check(region, request, Off())
        return
    with pytest.raises(RuntimeError, match=r"differ from the eager ones by 1\.0e-02"):
        check(region, request, Off())


def test_samples_that_depend_on_each_other_are_compared_as_one_batch() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x - x.mean(0)).tanh())

    torch.manual_seed(0)
    request = requested(Case(Mixed(), torch.rand(20, 9), torch.arange(20) % 4))
    z = F.normalize(torch.randn(20, 9))
    assert check(lambda x: (Eager().forward(replace(request, x=x, direction=z)), z), request, Eager())


def test_gradients_that_are_not_finite_tell_nothing() -> None:
    case = bent(0.0, torch.float32)
    case.x[0] = torch.nan
    request = requested(case)
    z = F.normalize(torch.randn(12, 9))
    assert not check(lambda x: (Eager().forward(replace(request, x=x, direction=z)), z), request, Eager())
