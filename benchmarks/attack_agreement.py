"""Do our attacks find what torchattacks' and foolbox's find? Accuracies at equal settings, on one network and images.

    python benchmarks/attack_agreement.py RUN [--images 1000]

RUN is the folder of a finetune run. The peers: `pip install foolbox` and `pip install --no-deps torchattacks`, which
names torchvision as a dependency and does not import it. The exit status is 1 if accuracies differ by more than
`--within` points. Where there is no random start all three compute the same; with one, the starts differ. In L2 those
of torchattacks are of another distribution as well (the radius is uniform, not the point in the ball): such rows are
reported, and judged by foolbox alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import foolbox
import torch
import torchattacks
from record import write
from torch import Tensor, nn
from tqdm import tqdm

from fastcure.attacks import fgsm, pgd
from fastcure.data import load, stratified
from fastcure.evaluation.accuracy import accuracy
from fastcure.evaluation.settings import EvaluationSettings
from fastcure.models.loading import load_model

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
L2_EPS = (0.5, 1.0)
STEPS = 10


def foolbox_attack(attack: Any, eps: float) -> Attack:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=eps)[1]

    return run


def torchattacks_attack(make: Callable[..., Any]) -> Attack:
    return lambda model, x, y: make(model)(x, y)


def attacks(eps: tuple[float, ...], seed: int) -> Iterator[tuple[str, float, dict[str, Attack]]]:
    """Name, radius, and the attack of each library; 2.5 eps / steps a step."""
    fb, ta = foolbox.attacks, torchattacks
    for radius in eps:
        yield (
            "FGSM",
            radius,
            {
                "fastcure": partial(fgsm, eps=radius),
                "torchattacks": torchattacks_attack(partial(ta.FGSM, eps=radius)),
                "foolbox": foolbox_attack(fb.LinfFastGradientAttack(random_start=False), radius),
            },
        )
    norms = [("linf", radius, ta.PGD, fb.LinfProjectedGradientDescentAttack) for radius in eps]
    norms += [("l2", radius, ta.PGDL2, fb.L2ProjectedGradientDescentAttack) for radius in L2_EPS]
    for norm, radius, theirs, foolboxes in norms:
        for start in (False, True):
            step = 2.5 * radius / STEPS
            peer = partial(theirs, eps=radius, alpha=step, steps=STEPS, random_start=start)
            options: dict[str, Any] = {"eps": radius, "step_size": step, "steps": STEPS, "norm": norm}
            generator = torch.Generator().manual_seed(seed)
            yield (
                f"PGD-{STEPS} {norm}{', random start' if start else ''}",
                radius,
                {
                    "fastcure": partial(pgd, random_start=start, generator=generator, **options),
                    "torchattacks": torchattacks_attack(peer),
                    "foolbox": foolbox_attack(
                        foolboxes(abs_stepsize=step, steps=STEPS, random_start=start, rel_stepsize=None), radius
                    ),
                },
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--within", type=float, default=1.0, help="points (1.0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    settings = EvaluationSettings.of({"run": str(arguments.run)})
    data = load(settings.dataset, settings.data_dir)
    chosen = stratified(data.y_test, arguments.images, arguments.seed)
    x, y = data.x_test[chosen].to(arguments.device), data.y_test[chosen].to(arguments.device)
    options = {"num_classes": data.num_classes, "in_channels": x.shape[1]}
    model = load_model(settings.model, settings.checkpoint, **options).to(arguments.device).eval()

    torch.manual_seed(arguments.seed)
    print(f"{len(x):,} test images of {data.name}, clean accuracy {accuracy(model, x, y):.1%}")
    print(f"{'attack':<28} {'eps':>7} {'fastcure':>9} {'torchattacks':>13} {'foolbox':>9} {'largest difference':>19}")
    rows: list[dict[str, Any]] = []
    for name, eps, by_library in tqdm(list(attacks(settings.eps, arguments.seed)), leave=False, disable=None):
        found = {library: accuracy(model, x, y, attack) for library, attack in by_library.items()}
        equals = found if name != f"PGD-{STEPS} l2, random start" else {**found, "torchattacks": found["fastcure"]}
        points = round(100 * max(abs(found["fastcure"] - value) for value in equals.values()), 6)
        rows.append({"dataset": data.name, "images": len(x), "attack": name, "eps": eps, **found, "points": points})
        shown = "{fastcure:9.1%} {torchattacks:13.1%} {foolbox:9.1%}".format(**found)
        tqdm.write(f"{name:<28} {eps:7.3g} {shown} {points:12.2f} points")
    print(f"written to {write('attack_agreement', rows, torch.device(arguments.device))}")
    return int(max(row["points"] for row in rows) > arguments.within)


if __name__ == "__main__":
    sys.exit(main())
