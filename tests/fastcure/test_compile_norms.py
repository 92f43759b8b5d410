"""Batch norms in training mode under the compiled engine: exact, also in what they leave behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS, Case, make, relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE, curvature

# Of torch's own making, in torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LIMIT = rounding(torch.float64, 4 * 64, condition=100)


class Norms(nn.Module):
    """Norms of all kinds: one that runs twice, one in evaluation mode, and by their options."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.twice, self.mean = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)
        self.plain = nn.BatchNorm2d(4, affine=False, eps=0.1)
        self.still, self.free = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.flat, self.last = nn.BatchNorm1d(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x)).relu()
        x = self.plain(self.mean(self.second(x)) + x).tanh()
        x = self.free(self.still(self.twice(x)).sigmoid())
        return self.last(self.flat(x.flatten(1)))


def norms(batch: int = 8, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    model, x = Norms().to(dtype), torch.rand(batch, 3, 4, 4, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.train()(x)
    model.still.eval()
    return Case(model, x, torch.arange(batch) % 5)


def stepped(case: Case, engine: str, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of a step, and the buffers after it."""
    case.model.zero_grad()
    result = CURE(case.model, 0.7, 2.0, engine=engine, batch_stats="train", **options)(case.x, case.y)
    result.total.backward()
    gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
    return [result.total.detach(), *gradients], [buffer.clone() for buffer in case.model.buffers()]


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_at": "step", "power": 1}, {"fraction": 0.5}, {"fraction": 0.5, "loss_at": "step"}],
    ids=["whole", "step", "part", "part-step"],
)
def test_it_is_exact_and_moves_statistics_once(aot_eager: Any, options: dict[str, Any]) -> None:
    compiled, reference = norms(), norms()
    for _ in range(3):
        ours, buffers = stepped(compiled, "compile", **options)
        truth, once = stepped(reference, "reference", **options)
        assert relative(ours, truth) < LIMIT
        for mine, theirs in zip(buffers, once, strict=True):
            assert relative(mine, theirs) < rounding(torch.float64, 8 * 16)
    assert aot_eager.frame_count == (
        2 if "fraction" in options else 1
    )  # the samples without a penalty are compiled too
    assert not [module for module in compiled.model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast_they_compute_in_the_wider_type(aot_eager: Any, dtype: torch.dtype) -> None:
    """As the eager engine does, up to rounding."""
    found = []
    for engine in ("compile", "eager"):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found.append(stepped(norms(dtype=torch.float32), engine))
    (ours, buffers), (eager, once) = found
    assert relative(ours, eager) < rounding(dtype, 8 * 16, condition=4)
    assert relative(buffers, once) < rounding(dtype, 8 * 16)
    assert {t.dtype for t in ours} == {torch.float32}


class Small(nn.Module):
    """Two norms, and little else: it is soon compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.still = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.still(self.norm(self.first(x)).tanh())


CHANGES: dict[str, Callable[[Any], object]] = {
    "eps": lambda model: setattr(model.norm, "eps", 0.3),
    "momentum": lambda model: setattr(model.norm, "momentum", 0.7),
    "mean of all": lambda model: setattr(model.norm, "momentum", None),
    "flags": lambda model: (model.norm.eval(), model.still.train()),
    "another": lambda model: setattr(model, "norm", nn.BatchNorm1d(4).double()),
    "no weight": lambda model: setattr(model.norm, "weight", None),
    "a hook": lambda model: model.norm.register_forward_hook(lambda module, args, output: 2 * output),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_first_step_is_seen(aot_eager: Any, change: Callable[[Any], object]) -> None:
    torch.manual_seed(0)
    model = Small().double()
    model.train()(torch.rand(6, 6, dtype=torch.float64))
    model.still.eval()
    compiled = Case(model, torch.rand(5, 6, dtype=torch.float64), torch.arange(5) % 4)
    reference = compiled.copy()
    for _ in range(2):
        ours, buffers = stepped(compiled, "compile")
        truth, once = stepped(reference, "reference")
        assert relative(ours, truth) < LIMIT
        assert relative(buffers, once) < LIMIT
        change(compiled.model)
        torch.manual_seed(1)
        change(reference.model)


def test_a_norm_with_a_forward_of_its_own_is_refused(aot_eager: Any) -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(2 * input)

    class Named(nn.BatchNorm2d):
        """Of another name alone."""

    case = norms()
    case.model.mean = Named(4).double()
    reference = case.copy()
    assert relative(stepped(case, "compile")[0], stepped(reference, "reference")[0]) < LIMIT
    case.model.mean = Own(4).double()
    before = copy.deepcopy(case.model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"the batch norm model\.mean \(Own\).*forward of its own: use engine='eager'"
    ):
        curvature(*case, engine="compile", batch_stats="train")
    assert all(torch.equal(t, before[name]) for name, t in case.model.state_dict().items())


def test_statistics_that_another_module_moves_are_refused(aot_eager: Any) -> None:
    """The region runs it twice, and would move them twice."""

    class Calls(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            moved = self.norm.running_mean, self.norm.running_var
            return F.batch_norm(super().forward(x), *moved, training=self.norm.training).tanh()

    case = Case(Calls().double(), torch.rand(5, 6, dtype=torch.float64), torch.arange(5) % 4)
    with pytest.raises(RuntimeError, match=r"moves model\.norm\.running_\w+ otherwise than by calling its batch norm"):
        curvature(*case, engine="compile", batch_stats="train")


def test_one_value_a_channel_is_refused_as_by_torch(aot_eager: Any) -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 1, seed=0)
    case.model.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        curvature(case.model, case.x[..., :1, :1], case.y, batch_stats="train", engine="compile")
