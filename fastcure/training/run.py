"""A run in progress: its model, its batches, its optimiser, and how far they came."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastcure.attacks import pgd
from fastcure.data import Dataset, Loader, default_augmentation, stratified
from fastcure.evaluation.accuracy import correct
from fastcure.objectives import OBJECTIVES, Objective
from fastcure.training.average import WeightAverage
from fastcure.training.buffers import Buffers
from fastcure.training.checkpoint import Parts, Progress, checksum, pack, unpack
from fastcure.training.epoch import train_steps
from fastcure.training.eta import Eta, passes_of
from fastcure.training.history import epoch_line, epoch_row
from fastcure.training.interrupt import Interrupted, Interruption
from fastcure.training.objective import make_objectives, schedules_of
from fastcure.training.optimizer import load_optimizer, load_scaler, make_optimizer, optimizer_tensors, scaler_tensors
from fastcure.training.ranks import Ranks, Share
from fastcure.training.run_folder import RunFolder
from fastcure.training.settings import AUTOCAST, Settings
from fastcure.training.tally import Tally
from fastcure.training.track import track_row
from fastcure.training.trackers import Trackers

EVALUATED = 256
"""Images at a time in an evaluation, unless training takes fewer at a time for want of memory."""

SAVE_EVERY = 600.0
"""Seconds of training after which the state is saved within an epoch. It is at the end of each."""

LOOK_EVERY = {"cpu": 1}
"""Steps after which a device is asked whether all were finite; others after 50. It is before a save, too."""

RECALIBRATED = 2048
"""Training images, not augmented, from which batch norms of averaged weights take their statistics."""

Metrics = dict[str, Any]


class Run:
    """Trains and evaluates a model, and can be saved after every step and restored.

    Args:
        settings: of the run.
        data: on the CPU.
        held: images and labels that are not trained on, nor in the test set, to follow the run on.
        model: on the device of `ranks`; it is trained in place.
        ranks: the processes that share the work.
        folder: takes the state and the history.
        interruption: looked at after every step and in every batch of an evaluation.
    """

    def __init__(
        self,
        settings: Settings,
        data: Dataset,
        held: tuple[Tensor, Tensor],
        model: nn.Module,
        ranks: Ranks,
        folder: RunFolder,
        interruption: Interruption,
    ) -> None:
        self.settings, self.model, self.ranks = settings, model, ranks
        self.folder, self.interruption = folder, interruption
        self.test, self.held = (data.x_test, data.y_test), held
        self.loader = Loader(
            data.x_train,
            data.y_train,
            settings.batch_size,
            device=ranks.device,
            augment=default_augmentation(data.name) if settings.augment else None,
            generator=torch.Generator().manual_seed(settings.seed),
            workers=settings.workers,
            share=(ranks.rank, ranks.size),
        )
        self.progress = Progress(data=checksum(*data[:4], *held), microbatch=settings.microbatch)
        self.objectives = make_objectives(settings, model, data.x_train.shape, ranks.device)
        self.optimizer = self._optimizer()
        self.average: WeightAverage | None = None
        self.scaler = torch.amp.GradScaler(ranks.device.type) if settings.amp == "fp16" else None
        self.tally = Tally(ranks.device)
        self.passes = passes_of(settings, len(data.y_train), len(held[1]), len(data.y_test))
        self.eta, self.trackers = Eta(0.0), Trackers((), folder.path, {})
        self._generator_of_steps = torch.Generator(ranks.device)
        self._train = data.x_train, data.y_train
        self._saved = self._clock = 0.0

    def restore(self, path: Path) -> None:
        """Take up a state that was saved.

        Raises:
            ValueError: if it cannot be read, does not fit the model, or was reached on other data.
        """
        progress, parts = unpack(path)
        if progress.data != self.progress.data:
            raise ValueError(f"{path} was reached on other images or labels than those of {self.settings.dataset}")
        epochs = self.settings.epochs if progress.phase == "finetune" else self.settings.pretrain_epochs
        if progress.epoch > epochs or progress.step > len(self.loader):
            raise ValueError(
                f"{path} does not fit this run: it is at step {progress.step} of epoch {progress.epoch} of "
                f"{progress.phase}, which has {epochs} epochs of {len(self.loader)} steps"
            )
        try:
            self.objectives[progress.phase].load_state_dict(parts["objective"])
            load_optimizer(self.optimizer, parts.get("optimizer", {}))
            if progress.phase == "finetune" and self.settings.ema is not None:
                self.average = WeightAverage(self.model, self.settings.ema)
                self.average.load(parts["average"])
            self._generator.set_state(parts["random"]["loader"])
            torch.set_rng_state(parts["random"]["torch"])
            if self.ranks.device.type == "cuda" and "cuda" in parts["random"]:
                torch.cuda.set_rng_state(parts["random"]["cuda"], self.ranks.device)
            self.tally.numbers.copy_(parts["tally"]["numbers"])
            if self.scaler is not None:
                load_scaler(self.scaler, parts["scaler"])
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not fit this run: {' '.join(str(error).split())[:300]}") from error
        known = [n for n in (progress.microbatch, self.settings.microbatch) if n is not None]
        progress.microbatch = min(known, default=None)
        self.progress = progress

    def begin_fine_tuning(self) -> None:
        """Start the second phase, with an optimiser of its own."""
        self.progress.phase, self.progress.epoch, self.progress.step = "finetune", 0, 0
        self.optimizer = self._optimizer()
        if self.settings.ema is not None:
            self.average = WeightAverage(self.model, self.settings.ema)

    def start(self) -> None:
        """Begin to tell the time that is left, and to send numbers to trackers."""
        self.eta = Eta(self.passes.left(self.settings, self.progress, len(self.loader)))
        if self.ranks.is_main_process:
            self.trackers = Trackers(self.settings.log_to, self.folder.path, asdict(self.settings))

    def train(self, epochs: int) -> None:
        """Train until the phase has had `epochs` epochs, with a row of history each."""
        progress, settings = self.progress, self.settings
        fine_tuning = progress.phase == "finetune"
        self._clock = time.perf_counter() - progress.seconds.get(progress.phase, 0.0)
        numel = self.test[0][0].numel()
        schedules = schedules_of(settings, numel) if fine_tuning else {"lr": settings.schedule("pretrain_lr")}
        objective = self.objectives[progress.phase]
        objective.generator = self._generator_of_steps
        if objective.can_microbatch:
            objective.microbatch = progress.microbatch
        self.ranks.broadcast(objective.state_dict().values())
        self._epoch_began_at = self._generator.get_state()
        self._save()
        if fine_tuning and not progress.track:  # a run that was stopped in its first epoch has the row already
            progress.track = self._tracked()
        while progress.epoch < epochs:
            title = f"{progress.phase} {progress.epoch + 1}/{epochs}"
            steps = train_steps(
                *(objective, self._batches(title), self.optimizer, schedules, self.tally, self.ranks),
                autocast=AUTOCAST[settings.amp],
                scaler=self.scaler,
                clip=settings.clip,
                average=self.average,
            )
            for _ in steps:
                progress.step += 1
                if objective.can_microbatch:
                    self._note_microbatch(objective.microbatch)
                self._pause()
            self.ranks.broadcast(Buffers(objective).shared)  # of batch norms, which saw other images elsewhere
            self._save()
            self._recalibrate(objective)
            result = self.tally.result()
            last = progress.epoch + 1 - 1 / len(self.loader)  # of the epoch's last step
            columns = ("lr", *OBJECTIVES[settings.objective].scheduled)
            scheduled = {name: schedules[name].at(last) if name in schedules else 0.0 for name in columns}
            self._end_epoch(epoch_row(progress.phase, progress.epoch + 1, scheduled, result), title)
        self._epoch_began_at = self._generator.get_state()
        self._save()  # with the last epoch's row: a finished run can be prolonged from here

    def evaluate(self, title: str, model: nn.Module | None = None) -> Metrics:
        """Clean accuracy, and accuracy under PGD-10 at each eps, on the whole test set.

        Args:
            title: shown beside the progress.
            model: the network; the one that is trained if None.
        """
        model, robust = model or self.model, {}
        for eps in self._bar(self.settings.eps, f"PGD-10 {title}", unit="eps"):
            robust[f"{eps:.6g}"] = self._accuracy(model, *self.test, eps)
        clean = self._accuracy(model, *self.test)
        self.eta.made(self.passes.test)
        self.trackers.log(f"test {title}", {"clean": clean, **robust}, len(self.progress.history))
        return {"clean": clean, "pgd": robust}

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        return make_optimizer(self.model.parameters(), settings.optimizer, settings.momentum, settings.weight_decay)

    def _recalibrate(self, objective: Objective) -> None:
        """Give the averaged network statistics of its own, where training changes those of the model."""
        if self.average is None or not objective.updates_buffers:
            return
        x, y = self._train
        size = min(self.settings.batch_size, len(x))
        chosen = stratified(y, RECALIBRATED, self.settings.seed)
        chosen = chosen[: len(chosen) // size * size] if len(chosen) > size else chosen
        self.average.recalibrate([x[part].to(self.ranks.device).float() / 255 for part in chosen.split(size)])
        self.ranks.broadcast(self.average.model.buffers())

    @property
    def _generator(self) -> torch.Generator:
        assert self.loader.generator is not None
        return self.loader.generator

    def _batches(self, title: str) -> Iterator[tuple[int, float, Share]]:
        """The batches of the epoch that are left, each with its index and its time in epochs."""
        self._epoch_began_at = self._generator.get_state()
        step, steps = self.progress.step, len(self.loader)
        left, images = self.loader.batches(step), len(self.loader.y)
        progress, seed = self.progress, self.settings.seed
        bar = self._bar(left, title, unit="step", initial=step, total=steps, postfix=str(self.eta))
        for index, batch in enumerate(bar, step):
            # Of the step and the process alone: a resumed run draws what it would have drawn.
            place = f"{seed} {progress.phase} {progress.epoch} {index} {self.ranks.rank}"
            self._generator_of_steps.manual_seed(zlib.crc32(place.encode()))
            whole = min(self.settings.batch_size, images - index * self.settings.batch_size)
            yield index, self.progress.epoch + index / steps, self.ranks.counted(batch, whole)

    def _note_microbatch(self, microbatch: int | None) -> None:
        """Remember, and say, that memory sufficed for so few images only."""
        progress = self.progress
        if microbatch != progress.microbatch and self.ranks.is_main_process:
            tqdm.write(
                f"memory ran out in step {progress.step} of epoch {progress.epoch + 1} of {progress.phase}: from there "
                f"on, steps take {microbatch} images at a time, with the same result (--microbatch {microbatch})"
            )
        progress.microbatch = microbatch

    def _check_finite(self) -> None:
        """Stop if a step of the epoch was not finite; where they are skipped, if no step was.

        Raises:
            FloatingPointError: in all processes alike.
        """
        bad = self.tally.first_bad()
        progress, steps = self.progress, len(self.loader)
        if bad is None:
            return
        skips = self.settings.non_finite == "skip"
        if skips and (progress.step < steps or self.tally.result().skipped < steps):
            return
        climbs = "gamma" in OBJECTIVES[self.settings.objective].scheduled
        fix = "lower --lr or --gamma, or let gamma climb from 0" if climbs else "lower --lr, or set --clip"
        raise FloatingPointError(
            f"batch {bad.step + 1} of {steps} in epoch {progress.epoch + 1} of {progress.phase} had loss {bad.loss:g}, "
            f"penalty {bad.penalty:g} and a gradient of norm {bad.gradient:g}"
            + (", and all others of the epoch were skipped like it" if skips else "")
            + (f": {fix}" if progress.phase == "finetune" else ": lower --pretrain-lr")
            + ("" if skips else "; or leave such batches out, by --resume --non-finite skip")
        )

    def _pause(self) -> None:
        """Between two steps: look whether they were finite, save if it is time, and stop if a signal came."""
        if self.progress.step % LOOK_EVERY.get(self.ranks.device.type, 50) == 0:
            self._check_finite()
        due = int(time.monotonic() - self._saved > SAVE_EVERY)
        request = self.ranks.all_reduce_max(self.interruption.signal or due)  # 1 is neither SIGINT nor SIGTERM
        if request:
            self._save()
        if request > 1:
            raise Interrupted(request)

    def _save(self) -> None:
        """Save all that the rest of the run depends on, unless it is not to go on."""
        self._check_finite()
        progress = self.progress
        progress.seconds[progress.phase] = round(time.perf_counter() - self._clock, 1)
        if self.ranks.is_main_process:
            random = {"loader": self._epoch_began_at, "torch": torch.get_rng_state()}
            if self.ranks.device.type == "cuda":
                random["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
            parts: Parts = {
                "objective": self.objectives[progress.phase].state_dict(),
                "optimizer": optimizer_tensors(self.optimizer),
                "random": random,
                "tally": {"numbers": self.tally.numbers},
            }
            if self.average is not None:
                parts["average"] = self.average.tensors()
            if self.scaler is not None:
                parts["scaler"] = scaler_tensors(self.scaler)
            self.folder.write(self.folder.checkpoint.name, pack(progress, parts))
        self._saved = time.monotonic()

    def _end_epoch(self, row: dict[str, Any], title: str) -> None:
        progress, eps = self.progress, self.settings.eps[-1]
        models: dict[str, nn.Module | None] = {"": self.model}
        if self.settings.ema is not None:
            models["ema_"] = None if self.average is None else self.average.model
        for prefix, model in models.items():
            for name, radius in (("clean", None), ("pgd", eps)):
                row[prefix + name] = None if model is None else self._accuracy(model, *self.held, radius)
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.tally.clear()
        progress.history.append(row)
        progress.track = self._tracked()
        self.eta.made(self.passes.finetune if progress.phase == "finetune" else self.passes.pretrain)
        if self.ranks.is_main_process:
            self.folder.write_csv("history.csv", progress.history)
            tqdm.write(epoch_line(title, row, eps, len(self.loader), str(self.eta)))
            self.trackers.log(progress.phase, row, len(progress.history))
            if progress.track:
                self.trackers.log("track", progress.track[-1], len(progress.history))

    def _tracked(self) -> list[dict[str, Any]]:
        """The track up to here, with a row for the present state if it is asked for."""
        progress, settings = self.progress, self.settings
        if not (settings.track and progress.phase == "finetune"):
            return progress.track
        chosen = stratified(self.held[1], settings.track, settings.seed)
        x, y = (part[chosen].to(self.ranks.device) for part in self.held)
        rows = [*progress.track, track_row(self.model, x, y, progress.epoch, settings.seed, settings.eps[-1])]
        if self.ranks.is_main_process:
            self.folder.write_csv("track.csv", rows)
        return rows

    def _accuracy(self, model: nn.Module, x: Tensor, y: Tensor, eps: float | None = None) -> float:
        """Accuracy on images, clean or under PGD-10; the processes share the batches."""

        def attacked(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
            self.interruption.check()
            attack = None if eps is None else partial(pgd, eps=eps, steps=10, generator=generator)
            return correct(model, x, y, attack)

        batch_size = self.progress.microbatch or EVALUATED
        return float(self.ranks.map(attacked, x, y, self.settings.seed, batch_size).double().mean())

    def _bar(self, work: Any, title: str, **options: Any) -> Any:
        hidden = not self.ranks.is_main_process or None
        return tqdm(work, title, leave=False, dynamic_ncols=True, disable=hidden, **options)
