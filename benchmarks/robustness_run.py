"""One run of the robustness study: a recipe trained on a setting's images from a seed, and what came of it."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from robustness_data import Images, as_floats
from robustness_recipe import NETWORKS, Recipe, Setting
from torch import Tensor, nn
from tqdm import tqdm

from fastcure import eps_to_h, prepare
from fastcure._functional import LossFn, cross_entropy, evaluation_mode
from fastcure._writing import write_whole
from fastcure.analysis import curvature_along_gradient, frobenius_norm
from fastcure.attacks import autoattack, margin_loss, pgd
from fastcure.data import Loader
from fastcure.evaluation.checklist import masking_checklist
from fastcure.profiling.flops import FlopCounter
from fastcure.training.epoch import train_steps
from fastcure.training.optimizer import make_optimizer
from fastcure.training.ranks import Ranks, Share
from fastcure.training.tally import Tally

Columns = dict[str, Any]
RESTARTS, FOLLOWED, MEASURED = 5, 128, 200


class Run:
    """A recipe, a setting and a seed.

    Args:
        recipe: how to train.
        setting: on what.
        seed: of initial weights, order, augmentation, noise and attacks.
        start: the run of standard training whose network is the start, for a recipe that starts from one.
        cache: folder of trained weights; None to train whatever is there.
        images, device: as they say.
    """

    def __init__(
        self,
        recipe: Recipe,
        setting: Setting,
        seed: int,
        start: Run | None,
        images: Images,
        device: torch.device,
        cache: Path | None,
    ) -> None:
        if (start is None) != (recipe.start == "scratch"):
            raise ValueError(
                f"a run from the network after standard training, and no other, needs that: got start={recipe.start!r}"
            )
        self.recipe, self.setting, self.seed, self.start = recipe, setting, seed, start
        self.images, self.device, self.cache = images, device, cache

    @property
    def key(self) -> dict[str, str]:
        """What determines the run, as a row shows it."""
        row = {**asdict(self.recipe), **asdict(self.setting), "seed": self.seed}
        return {name: str(value) for name, value in row.items()}

    def execute(self) -> Columns:
        """Train, and measure all but the two things of `examine`."""
        model, spent = self.trained()
        start = self.started()
        return {**spent, **self._measured(model, start)}

    def examine(self) -> Columns:
        """AutoAttack, PGD on the margin, and the checklist of gradient masking."""
        model, n = self.trained()[0], self.setting.autoattack_images
        x, y = self._part(self.images.test, n)
        with evaluation_mode(model):
            adv = autoattack(model, x, y, self.setting.eps, generator=self._generator())
            with torch.no_grad():
                left, correct = (int((model(images).argmax(1) == y).sum()) for images in (adv, x))
        margin = self._survivors(model, (x, y), steps=20, restarts=RESTARTS, loss_fn=margin_loss)
        columns: Columns = {"autoattack": left / n, "margin20x5_subset": float(margin.double().mean())}
        if not correct:
            return {**columns, "checklist": "no image is classified correctly"}
        surrogate = self.start.trained()[0] if self.start else None
        options: Columns = {"surrogate": surrogate, "steps": 20, "samples": 16, "generator": self._generator()}
        items = masking_checklist(model, x, y, self.setting.eps, **options)
        failed = [item.name for item in items if item.passed is False]
        seen = sum(item.passed is not None for item in items)
        return {**columns, "checklist": "; ".join(failed) or f"passes {seen} of {seen}"}

    def trained(self) -> tuple[nn.Module, Columns]:
        """Return the network and what its training told, from the cache if it is there."""
        path = None
        if self.cache is not None:
            name = hashlib.sha256(json.dumps(self.key, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]
            path = self.cache / f"{name}.pt"
            if path.is_file():
                held = torch.load(path, map_location=self.device, weights_only=True)
                model = self._built()
                model.load_state_dict(held["model"])
                return model, held["spent"]
        model = self.started()
        spent = self._train(model)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save({"model": model.state_dict(), "spent": spent}, content)
            write_whole(path, content.getvalue())
        return model, spent

    def started(self) -> nn.Module:
        """Return the network before training."""
        return self.start.trained()[0] if self.start else self._built()

    def _built(self) -> nn.Module:
        torch.manual_seed(self.seed)
        mean, std = self.images.moments
        channels = self.images.train[0].shape[1]
        model = NETWORKS[self.setting.model](self.images.num_classes, channels, mean, std)
        model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return prepare(model, self._part(self.images.train, 1)[0])

    def _train(self, model: nn.Module) -> Columns:
        recipe, setting = self.recipe, self.setting
        cost = self.cost(copy.deepcopy(model))
        x, y = self.images.train
        order = torch.Generator().manual_seed(self.seed)
        augment = self.images.augment
        loader = Loader(x, y, setting.batch_size, device=self.device, augment=augment, generator=order)
        objective, tally = recipe.make(model), Tally(self.device)
        objective.generator = self._generator()
        schedules = recipe.schedules(setting.eps, self.images.numel)
        optimizer = make_optimizer(model.parameters())
        seconds, followed, penalties = 0.0, list[float](), list[float]()
        title = f"{recipe.label} {self.seed}"
        for epoch in tqdm(range(recipe.epochs), title, leave=False, unit="epoch", disable=None):
            began = time.perf_counter()
            tally.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the first-order engine says of kinks is what is measured here
                for _ in train_steps(
                    *(objective, self._batches(loader, epoch), optimizer, schedules, tally, Ranks(self.device))
                ):
                    pass
            penalties.append(tally.result().penalty)
            seconds += time.perf_counter() - began
            robust = self._survivors(model, self._part(self.images.validation, FOLLOWED), steps=10, restarts=1)
            followed.append(float(robust.float().mean()))
        images = recipe.epochs * len(y)
        return {
            "cost": round(cost, 3),
            "compute": round(cost * images),
            "seconds": round(seconds, 1),
            "milliseconds_an_image": round(1e3 * seconds / images, 3),
            "followed": " ".join(f"{value:.4f}" for value in followed),
            "penalties": " ".join(f"{value:.4g}" for value in penalties),
        }

    def _batches(self, loader: Loader, epoch: int) -> Iterator[tuple[int, float, Share]]:
        for index, batch in enumerate(loader.batches()):
            batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
            yield index, epoch + index / len(loader), Ranks(self.device).counted(batch, len(batch.x))

    def cost(self, model: nn.Module) -> float:
        """Count the forward passes that a sample's training takes."""
        x, y = self._part(self.images.train, self.setting.batch_size)
        objective = self.recipe.make(model.train())
        with torch.no_grad(), FlopCounter() as forward:
            model(x)
        with warnings.catch_warnings(), FlopCounter() as counter:
            warnings.simplefilter("ignore")
            for name, schedule in self.recipe.schedules(self.setting.eps, self.images.numel).items():
                if name != "lr":
                    setattr(objective, name, schedule.segments[-1].stop)
            objective(x, y).total.backward()
        return counter.total / forward.total

    def _measured(self, model: nn.Module, start: nn.Module) -> Columns:
        validation, test = self._part(self.images.validation), self._part(self.images.test)
        robust = self._survivors(model, test, steps=20, restarts=RESTARTS)
        columns = {
            "val_clean": self._survivors(model, validation),
            "val_pgd10": self._survivors(model, validation, steps=10, restarts=1),
            "clean": self._survivors(model, test),
            "pgd20x5": robust,
            "pgd20x5_subset": robust[: self.setting.autoattack_images],
        }
        accuracies = {name: round(float(mask.double().mean()), 5) for name, mask in columns.items()}
        before = {f"{name}_before": value for name, value in self._curvature(start).items()}
        return {**accuracies, **before, **{f"{k}_after": v for k, v in self._curvature(model).items()}}

    def _curvature(self, model: nn.Module) -> dict[str, str]:
        """Means over validation images: ||Hz|| exact, and by the step of eps; ||H||_F by that step."""
        x, y = self._part(self.images.validation, MEASURED)
        finite: Columns = {"method": "finite", "h": eps_to_h(self.setting.eps, self.images.numel)}
        means = {
            "hz_exact": curvature_along_gradient(model, x, y).value,
            "hz": curvature_along_gradient(model, x, y, **finite).value,
            "frobenius": frobenius_norm(model, x, y, probes=10, generator=self._generator(), **finite).value,
        }
        return {name: f"{float(value.mean()):.6g}" for name, value in means.items()}

    def _survivors(
        self,
        model: nn.Module,
        part: tuple[Tensor, Tensor],
        steps: int = 0,
        restarts: int = 0,
        loss_fn: LossFn = cross_entropy,
    ) -> Tensor:
        """Return which images `(N,)` are classified correctly under every start of PGD on a loss.

        A start attacks only those that the starts before it left, which changes no accuracy.
        """
        x, y = part
        generator = self._generator()
        options: Columns = {"eps": self.setting.eps, "steps": steps, "generator": generator, "loss_fn": loss_fn}
        attack: Callable[..., Tensor] = partial(pgd, **options)
        with evaluation_mode(model):
            left = torch.ones_like(y, dtype=torch.bool)
            for start in range(restarts + 1):
                survivors = []
                for index in left.nonzero().flatten().split(256):
                    images, labels = x[index], y[index]
                    adv = attack(model, images, labels) if start else images
                    with torch.no_grad():
                        survivors.append(index[model(adv).argmax(1) == labels])
                left = torch.zeros_like(left)
                if survivors:
                    left[torch.cat(survivors)] = True
        return left

    def _part(self, split: tuple[Tensor, Tensor], count: int | None = None) -> tuple[Tensor, Tensor]:
        x, y = split
        return as_floats(x[:count], self.device), y[:count].to(self.device)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1)
