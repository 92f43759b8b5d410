"""A batch in parts: the same numbers and gradients, with the memory of a part."""

import pytest
import torch
from networks import IN_FLOAT64, NETWORKS, Case, make, relative
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastcure import CURE


def step(case: Case, **options: object) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    case = case.copy()
    out = CURE(case.model, 0.7, 3.0, **options)(case.x, case.y)
    out.total.backward()
    return out, [p.grad for p in case.model.parameters()]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_stats", ["frozen", "split"])
@pytest.mark.parametrize("microbatch", [1, 3, 7, 100])
def test_equals_the_whole_batch(name: str, batch_stats: str, microbatch: int) -> None:
    case = make(NETWORKS[name], 7, seed=0)
    whole, truth = step(case, batch_stats=batch_stats)
    parts, ours = step(case, batch_stats=batch_stats, microbatch=microbatch)
    assert relative(ours, truth) < IN_FLOAT64
    torch.testing.assert_close(tuple(parts), tuple(whole))


@pytest.mark.parametrize("engine", ["reference", "first_order"])
def test_every_engine(engine: str) -> None:
    case = make(NETWORKS["mlp-softplus"], 7, seed=0)
    assert relative(step(case, engine=engine, microbatch=2)[1], step(case, engine=engine)[1]) < 1e-9


def test_buffers_change_once_in_split_mode() -> None:
    case = make(NETWORKS["batch_norm-relu-max"], 7, seed=0)
    twin = case.copy()
    CURE(case.model, batch_stats="split", microbatch=2)(case.x, case.y)
    twin.model(twin.x)
    for ours, once in zip(case.model.buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(ours, once)


def test_no_more_is_saved_for_backward_than_for_a_part() -> None:
    """Count the bytes that autograd holds at the same time."""

    def peak(batch: int, microbatch: int | None) -> int:
        case = make(NETWORKS["batch_norm-gelu-average"], batch, seed=0)
        held = most = 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal held, most
                self.tensor, self.bytes = tensor, tensor.nbytes
                held += self.bytes
                most = max(most, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.bytes

        with saved_tensors_hooks(Held, lambda box: box.tensor):
            CURE(case.model, microbatch=microbatch)(case.x, case.y).total.backward()
        return most

    assert peak(32, 4) < 1.1 * peak(4, None)
    assert peak(32, None) > 5 * peak(4, None)


def test_hooks_fire_once_and_a_scaled_total_scales() -> None:
    case = make(NETWORKS["mlp-relu"], 6, seed=0)
    truth = step(case)[1]
    seen: list[Tensor] = []
    case.model[0].weight.register_hook(seen.append)
    (2 * CURE(case.model, 0.7, 3.0, microbatch=2)(case.x, case.y).total).backward()
    assert len(seen) == 1
    assert relative([p.grad for p in case.model.parameters()], [2 * g for g in truth]) < IN_FLOAT64


def test_each_part_takes_its_own_step_lengths() -> None:
    case = make(NETWORKS["mlp-relu"], 5, seed=0)
    h = torch.tensor([0.1, 0.4, 0.8, 1.0, 2.0], dtype=torch.float64)
    cure, parts = CURE(case.model), CURE(case.model, microbatch=2)
    cure.h = parts.h = h
    torch.testing.assert_close(cure(case.x, case.y).penalty, parts(case.x, case.y).penalty)


def test_without_grad_it_measures() -> None:
    case = make(NETWORKS["mlp-relu"], 5, seed=0)
    with torch.no_grad():
        out = CURE(case.model, microbatch=2)(case.x, case.y)
    assert not out.total.requires_grad
    torch.testing.assert_close(out.penalty, CURE(case.model)(case.x, case.y).penalty.detach())


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="microbatch must be >= 1, or None for the whole batch, got 0"):
        CURE(nn.Linear(2, 2), microbatch=0)
    out = CURE(nn.Linear(3, 2), microbatch=1)(torch.rand(2, 3), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        out.total.backward(create_graph=True)
    with pytest.raises(ValueError, match="labels must be in"):
        CURE(nn.Linear(3, 2), microbatch=1)(torch.rand(2, 3), torch.tensor([0, 2]))


def test_parameters_that_share_one_gradient() -> None:
    """autograd hands the same tensor to both terms of a sum: adding to one in place would add to the other."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 13)), nn.Parameter(torch.randn(4, 13))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ (self.a + self.b).T)

    torch.manual_seed(0)
    case = Case(Sum().double(), torch.rand(6, 13).double(), torch.arange(6) % 4)
    for gamma in (0.0, 2.0):
        found = []
        for microbatch in (None, 2):
            case.model.zero_grad()
            CURE(case.model, gamma=gamma, microbatch=microbatch)(case.x, case.y).total.backward()
            found.append([p.grad for p in case.model.parameters()])
        assert relative(*found) < IN_FLOAT64


def test_a_part_that_is_the_whole_batch_is_the_whole_batch() -> None:
    """Loss and penalty keep their graph, as without `microbatch`."""
    case = make(NETWORKS["mlp-softplus"], 4, seed=0)
    assert CURE(case.model, microbatch=4)(case.x, case.y).penalty.requires_grad
    assert not CURE(case.model, microbatch=3)(case.x, case.y).penalty.requires_grad
