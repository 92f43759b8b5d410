"""Attacks on a CUDA device: the same images as on the CPU, from a generator on either."""

import pytest
import torch
from networks import NETWORKS, Case, make

from fastcure.attacks import autoattack, deepfool, pgd, spsa
from fastcure.evaluation.checklist import masking_checklist

pytestmark = pytest.mark.gpu


@pytest.fixture
def case() -> Case:
    case = make(NETWORKS["batch_norm-gelu-average"], 8, seed=0)
    case.model.eval()
    return case._replace(y=case.model(case.x).argmax(1))


def on_cuda(case: Case) -> Case:
    twin = case.copy()
    return Case(twin.model.cuda(), twin.x.cuda(), twin.y.cuda())


def test_deepfool_finds_the_same(case: Case) -> None:
    for cpu, cuda in zip(deepfool(*case), deepfool(*on_cuda(case)), strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-3, atol=1e-6)


def test_restarts_and_targets_find_the_same(case: Case) -> None:
    goal = case._replace(y=(case.y + 1) % 7)
    options = {"eps": 0.05, "steps": 3, "restarts": 3, "targeted": True}
    cpu, cuda = (pgd(*c, **options, generator=torch.Generator().manual_seed(0)) for c in (goal, on_cuda(goal)))
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=1e-6)


def test_a_cpu_generator_makes_spsa_repeatable(case: Case) -> None:
    runs = [spsa(*on_cuda(case), 0.1, steps=3, samples=8, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*runs)
    assert (runs[0].cpu() != case.x).any()


def test_autoattack_and_the_checklist_run(case: Case) -> None:
    cuda = on_cuda(case)
    state = torch.cuda.get_rng_state()
    adv = autoattack(*cuda, 0.3, attacks=("apgd-ce", "fab-t"))
    assert (cuda.model(adv).argmax(1) != cuda.y).any()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert len(masking_checklist(*cuda, 0.05, samples=2)) == 6


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_images_outside_of_the_box_are_an_error(case: Case, cuda_graph: bool) -> None:
    cuda = on_cuda(case)
    options = {"steps": 2, "random_start": False, "cuda_graph": cuda_graph}
    pgd(*cuda, **options)  # the first examines the model
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\], got .*fastcure\.models\.Normalize"):
        pgd(cuda.model, 4 * cuda.x - 2, cuda.y, **options)


def test_probabilities_and_random_models_are_warned_of(case: Case) -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :7] + torch.randn_like(x.flatten(1)[:, :7])

    _, x, y = on_cuda(case)
    for model, message in ((Noisy(), "random in evaluation mode"), (torch.nn.Softmax(1), "look like probabilities")):
        images = x if isinstance(model, Noisy) else x.flatten(1)[:, :7]
        with pytest.warns(UserWarning, match=message) as seen:
            pgd(model, images, y, steps=2)
        assert len(seen) == 1
        pgd(model, images, y, steps=2)
