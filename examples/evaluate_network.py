"""Measure a network of your own and look for gradient masking: `python examples/evaluate_network.py`."""

from functools import partial

from small_digits import EPS, H, datasets, trained_network

import fastcure
from fastcure.evaluation.accuracy import accuracy
from fastcure.evaluation.checklist import masking_checklist, verdict


def main(images: int | None = None) -> dict[str, float]:
    """Return the accuracies of a network and a measure of the curvature of its loss."""
    train, test = datasets(images)
    model = trained_network(train).eval()
    x, y = test.tensors

    attacks = {
        "clean": None,
        "FGSM": fastcure.attacks.fgsm,
        "PGD-20": partial(fastcure.attacks.pgd, steps=20),
    }
    found = {}
    for name, attack in attacks.items():
        found[name] = accuracy(model, x, y, attack and partial(attack, eps=EPS / 4))
        print(f"{name} at eps {EPS / 4}: {found[name]:.1%}")

    curvature = fastcure.analysis.curvature_along_gradient(model, x, y, method="finite", h=H)
    found["curvature"] = float(curvature.value.mean())
    print(f"curvature along the gradient: {found['curvature']:.2f}")
    print(verdict(masking_checklist(model, x, y, eps=EPS / 4, steps=5, samples=8)))
    return found


if __name__ == "__main__":
    main()
