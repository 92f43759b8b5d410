"""PGD-10 against plain torch code, torchattacks and foolbox, on the same network and batch in one run.

The peers: `pip install foolbox` and `pip install --no-deps torchattacks`; one that is not installed is left out, and
said to be. An attack that leaves its ball, or raises the loss by another amount than ours (by more than the fraction
`WITHIN`), is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from record import write
from timing import medians, peak_mib
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import CPU, DEVICE, Workload

from fastcure.attacks import pgd

EPS, STEPS, WITHIN = 8 / 255, 10, 0.05
STEP = 2.5 * EPS / STEPS
WORKLOADS = CPU[:2] if DEVICE.type == "cpu" else [Workload("resnet18", batch) for batch in (32, 128, 512)]
ROWS: list[dict[str, object]] = []


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD as a tutorial writes it."""
    adv = x.clone()
    for _ in range(STEPS):
        adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = adv.detach() + STEP * g.sign()
        adv = (x + (adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    return adv


def contenders(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The attack of each library at equal settings, from the image itself: all compute the same."""
    ours = partial(pgd, model, x, y, EPS, STEP, STEPS, random_start=False)
    attacks: dict[str, Callable[[], Tensor]] = {"fastcure": ours, "plain torch": partial(plain, model, x, y)}
    if DEVICE.type == "cuda":
        attacks["fastcure, eager"] = partial(ours, cuda_graph=False)
    if find_spec("torchattacks"):
        import torchattacks

        attack: Any = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=False)
        attacks["torchattacks"] = partial(attack, x, y)
    if find_spec("foolbox"):
        import foolbox

        peer = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        linf = foolbox.attacks.LinfProjectedGradientDescentAttack(
            abs_stepsize=STEP, rel_stepsize=None, steps=STEPS, random_start=False
        )
        attacks["foolbox"] = lambda: linf(peer, x, y, epsilons=EPS)[1]
    return attacks


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_attacks(benchmark: pytest.FixtureRequest, workload: Workload) -> None:
    model, x, _ = workload.build()
    model.eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    attacks = contenders(model, x, y)
    gained: dict[str, float] = {}
    with torch.no_grad():
        clean = float(F.cross_entropy(model(x), y))
    for title, attack in attacks.items():
        adv = attack()
        assert float((adv - x).abs().max()) <= EPS * 1.001, f"{title} leaves the ball: nothing is timed"
        with torch.no_grad():
            gained[title] = float(F.cross_entropy(model(adv), y)) - clean
        off = abs(gained[title] / gained["fastcure"] - 1)
        assert off <= WITHIN, f"{title} raises the loss by {gained[title]:.4f}, ours by {gained['fastcure']:.4f}"
    memory = {title: peak_mib(attack) for title, attack in attacks.items()}
    times = medians(benchmark, attacks, budget=30.0)

    missing = [name for name in ("torchattacks", "foolbox") if name not in attacks]
    print(f"\nPGD-{STEPS}, {workload}, {DEVICE}" + (f"; not installed: {', '.join(missing)}" if missing else ""))
    for title, seconds in times.items():
        ratio = seconds / times["fastcure"]
        print(f"  {title:<22} {seconds * 1e3:9.1f} ms  {ratio:5.2f} x ours  {memory[title]:6d} MiB")
        row = {"model": workload.model, "batch": workload.batch, "attack": f"PGD-{STEPS}", "by": title}
        row |= {"milliseconds": round(seconds * 1e3, 3), "ratio_to_ours": round(ratio, 3)}
        ROWS.append({**row, "loss_gained": round(gained[title], 5), "peak_MiB": memory[title]})
    write(f"attacks-{DEVICE.type}", ROWS, DEVICE, by="by")
