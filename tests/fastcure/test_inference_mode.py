"""Attacks and measures inside torch.inference_mode, where the validation loops of trainers call them."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastcure.analysis
import fastcure.attacks
from fastcure.analysis import (
    accuracy_curve,
    curvature_along_gradient,
    curvature_profile,
    frobenius_norm,
    loss_surface,
    robustness_bounds,
)
from fastcure.attacks import autoattack, deepfool, fgsm, pgd, spsa
from fastcure.evaluation.accuracy import accuracy, correct
from fastcure.evaluation.checklist import masking_checklist
from fastcure.evaluation.evaluate import evaluate
from fastcure.evaluation.settings import EvaluationSettings

Run = Callable[..., object]


def seeded(run: Callable[..., object], **options: object) -> Run:
    return lambda *case: run(*case, generator=torch.Generator().manual_seed(0), **options)


checklist = seeded(masking_checklist, eps=0.1, steps=2, samples=2)
RUNS: dict[str, Run] = {
    "fgsm": fgsm,
    "pgd": seeded(pgd, steps=3, restarts=2),
    "pgd-l2": seeded(pgd, steps=3, norm="l2"),
    "spsa": seeded(spsa, steps=2, samples=4),
    "deepfool": deepfool,
    "autoattack": seeded(autoattack, attacks=("apgd-ce",)),
    "accuracy": partial(accuracy, attack=partial(pgd, random_start=False)),
    "correct": correct,
    "curve": partial(accuracy_curve, eps=[0.0, 0.1], steps=2),
    "checklist": lambda *case: [
        item.evidence for item in seeded(masking_checklist, eps=0.1, steps=2, samples=2)(*case)
    ],
    "along": curvature_along_gradient,
    "along-finite": partial(curvature_along_gradient, method="finite", h=0.5),
    "frobenius": seeded(frobenius_norm, probes=5),
    "profile": partial(curvature_profile, k=2),
    "bounds": robustness_bounds,
    "margins": partial(robustness_bounds, kind="margin"),
    "surface": seeded(loss_surface, points=3),
}


@pytest.fixture
def case() -> Case:
    made = make(NETWORKS["batch_norm-gelu-average"], 6, seed=0)
    made.model.eval()
    return made._replace(y=made.model(made.x).argmax(1))


@pytest.mark.parametrize("name", RUNS)
def test_the_result_is_that_outside(case: Case, name: str) -> None:
    """With everything made outside, the images made inside, and the model as well."""
    run = RUNS[name]
    wanted = run(*case)
    with torch.inference_mode():
        images = case._replace(x=case.x.clone(), y=case.y.clone())
        everything = case.copy()
    for given in (images, everything):
        torch.testing.assert_close(run(*given), wanted)
    for given in (case, images, everything):
        with torch.inference_mode():
            found = run(*given)
            assert torch.is_inference_mode_enabled()
        torch.testing.assert_close(found, wanted)
    for tensor in tree_leaves(found):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():  # autograd takes it
            assert not tensor.requires_grad
            (2 * tensor.requires_grad_()).sum().backward()


def test_every_attack_and_measure_is_tried() -> None:
    others = {"ATTACKS", "L2_ATTACKS", "margin_loss", "quadratic_bounds"}
    public = {*fastcure.attacks.__all__, *fastcure.analysis.__all__} - others
    functions = {name for name in public if not inspect.isclass(getattr(fastcure.attacks, name, None))}
    functions -= {name for name in functions if inspect.isclass(getattr(fastcure.analysis, name, None))}
    tried = {fgsm, pgd, spsa, deepfool, autoattack, accuracy_curve, curvature_along_gradient, frobenius_norm}
    tried |= {curvature_profile, robustness_bounds, loss_surface}
    assert functions == {function.__name__ for function in tried}


def test_gradients_stay_off_for_the_callers_code(case: Case) -> None:
    seen = []

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x

    with torch.inference_mode():
        accuracy(*case, attack)
    assert seen == [False]


def test_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 30)
    x = (rng.integers(0, 128, (30, 8, 8, 3)) + 90 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (tmp_path / "validated.py").write_text(
        "import torch\nfrom torch import nn\n\ndef network():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    found = {"model": "validated:network", "dataset": "npz:data.npz", "eps": (0.1,), "device": "cpu", "steps": 2}
    settings = EvaluationSettings.of(found)
    wanted = evaluate(settings, say=lambda _: None)
    with torch.inference_mode():
        assert evaluate(settings, say=lambda _: None) == wanted
