"""A run in progress: its model, its batches, its optimiser, and how far they came."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastcure import CURE
from fastcure.attacks import pgd
from fastcure.data import Dataset, Loader, default_augmentation, stratified
from fastcure.evaluation.accuracy import right
from fastcure.training.checkpoint import Parts, Progress, pack, unpack
from fastcure.training.epoch import Normal, train_steps
from fastcure.training.interrupt import Interrupted, Interruption
from fastcure.training.optimizer import adam, load_optimizer, optimizer_tensors
from fastcure.training.ranks import Ranks
from fastcure.training.run_folder import RunFolder
from fastcure.training.settings import Settings, step_lengths
from fastcure.training.tally import EpochResult, Tally
from fastcure.training.track import track_row

EVALUATED = 256
"""Images at a time in an evaluation, unless training takes fewer at a time for want of memory."""

SAVE_EVERY = 600.0
"""Seconds of training after which the state is saved within an epoch. It is at the end of each."""

LOOK_EVERY = {"cpu": 1}
"""Steps after which a device is asked whether all were finite; others after 50. It is before a save, too."""

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
        self.test = data.x_test.to(ranks.device), data.y_test.to(ranks.device)
        self.held = held[0].to(ranks.device), held[1].to(ranks.device)
        self.loader = Loader(
            data.x_train,
            data.y_train,
            settings.batch_size,
            device=ranks.device,
            augment=default_augmentation(data.name) if settings.augment else None,
            generator=torch.Generator().manual_seed(settings.seed),
        )
        self.progress = Progress(data=checksum(*data[:4], *held), microbatch=settings.microbatch)
        self.optimizer = adam(model)
        self.tally = Tally(ranks.device)
        self._saved = self._clock = 0.0

    def restore(self) -> None:
        """Take up the state in the folder.

        Raises:
            ValueError: if it cannot be read, does not fit the model, or was reached on other data.
        """
        path = self.folder.checkpoint
        progress, parts = unpack(path)
        if progress.data != self.progress.data:
            raise ValueError(f"{path} was reached on other images or labels than those of {self.settings.dataset}")
        epochs = self.settings.epochs if progress.phase == "cure" else self.settings.pretrain_epochs
        if progress.epoch > epochs or progress.step > len(self.loader):
            raise ValueError(
                f"{path} does not fit this run: it is at step {progress.step} of epoch {progress.epoch} of "
                f"{progress.phase}, which has {epochs} epochs of {len(self.loader)} steps"
            )
        try:
            self.model.load_state_dict(parts["model"])
            load_optimizer(self.optimizer, parts.get("optimizer", {}))
            self._generator.set_state(parts["random"]["loader"])
            torch.set_rng_state(parts["random"]["torch"])
            if self.ranks.device.type == "cuda" and "cuda" in parts["random"]:
                torch.cuda.set_rng_state(parts["random"]["cuda"], self.ranks.device)
            self.tally.numbers.copy_(parts["tally"]["numbers"])
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not fit this run: {' '.join(str(error).split())[:300]}") from error
        known = [n for n in (progress.microbatch, self.settings.microbatch) if n is not None]
        progress.microbatch = min(known, default=None)
        self.progress = progress

    def begin_fine_tuning(self) -> None:
        """Start the second phase, with an optimiser of its own."""
        self.progress.phase, self.progress.epoch, self.progress.step = "cure", 0, 0
        self.optimizer = adam(self.model)

    def train(self, epochs: int) -> None:
        """Train until the phase has had `epochs` epochs, with a row of history each."""
        progress, settings = self.progress, self.settings
        cured = progress.phase == "cure"
        self._clock = time.perf_counter() - progress.seconds.get(progress.phase, 0.0)
        if cured:
            schedules = {name: settings.schedule(name) for name in ("lr", "gamma")}
            values = self.test[0][0].numel()
            schedules["h"] = step_lengths(settings.h, settings.h_unit, settings.epochs, settings.eps, values)
            engine = "eager" if settings.engine == "auto" else settings.engine
            objective: CURE | Normal = CURE(
                self.model,
                power=settings.power,
                engine=engine,
                batch_stats=settings.batch_stats,
                loss_at=settings.loss_at,
                fraction=settings.fraction,
                microbatch=progress.microbatch,
            )
        else:
            schedules, objective = {"lr": settings.schedule("pretrain_lr")}, Normal(self.model)
        self.ranks.copy_from_first(self.model.state_dict().values())
        self._epoch_began_at = self._generator.get_state()
        self._save()
        if cured and not progress.track:  # a run that was stopped in its first epoch has the row already
            progress.track = self._tracked()
        while progress.epoch < epochs:
            title = f"{progress.phase} {progress.epoch + 1}/{epochs}"
            batches = self._batches(title)
            amp = torch.bfloat16 if settings.amp == "bf16" else None
            for _ in train_steps(objective, batches, self.optimizer, schedules, self.tally, self.ranks, amp):
                progress.step += 1
                if isinstance(objective, CURE):
                    self._note_microbatch(objective.microbatch)
                self._pause()
            self.ranks.copy_from_first(self.model.buffers())  # of batch norms, which saw other images elsewhere
            self._save()
            result = self.tally.result()
            last = progress.epoch + 1 - 1 / len(self.loader)  # of the epoch's last step
            row = {name: schedules[name].at(last) if name in schedules else 0.0 for name in ROW}
            self._end_epoch(row, result, title)

    def evaluate(self, title: str) -> Metrics:
        """Clean accuracy, and accuracy under PGD-10 at each eps, on the whole test set."""
        robust = {}
        for eps in self._bar(self.settings.eps, f"PGD-10 {title}", unit="eps"):
            robust[f"{eps:.6g}"] = self._accuracy(*self.test, eps)
        return {"clean": self._accuracy(*self.test), "pgd": robust}

    @property
    def _generator(self) -> torch.Generator:
        assert self.loader.generator is not None
        return self.loader.generator

    def _batches(self, title: str) -> Iterator[tuple[int, float, tuple[Tensor, Tensor]]]:
        """The batches of the epoch that are left, each with its index and its time in epochs."""
        self._epoch_began_at = self._generator.get_state()
        step, steps = self.progress.step, len(self.loader)
        left = islice(self.loader, step, None)
        for index, batch in enumerate(self._bar(left, title, unit="step", initial=step, total=steps), step):
            yield index, self.progress.epoch + index / steps, batch

    def _note_microbatch(self, microbatch: int | None) -> None:
        """Remember, and say, that memory sufficed for so few images only."""
        progress = self.progress
        if microbatch != progress.microbatch and self.ranks.first:
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
        mend = "lower --lr or --gamma, or let gamma climb from 0"
        raise FloatingPointError(
            f"batch {bad.step + 1} of {steps} in epoch {progress.epoch + 1} of {progress.phase} had loss {bad.loss:g}, "
            f"penalty {bad.penalty:g} and a gradient of norm {bad.gradient:g}"
            + (", and all others of the epoch were skipped like it" if skips else "")
            + (f": {mend}" if progress.phase == "cure" else ": lower --pretrain-lr")
            + ("" if skips else "; or leave such batches out, by --resume --non-finite skip")
        )

    def _pause(self) -> None:
        """Between two steps: look whether they were finite, save if it is time, and stop if a signal came."""
        if self.progress.step % LOOK_EVERY.get(self.ranks.device.type, 50) == 0:
            self._check_finite()
        due = int(time.monotonic() - self._saved > SAVE_EVERY)
        request = self.ranks.most(self.interruption.signal or due)  # 1 is neither SIGINT nor SIGTERM
        if request:
            self._save()
        if request > 1:
            raise Interrupted(request)

    def _save(self) -> None:
        """Save all that the rest of the run depends on, unless it is not to go on."""
        self._check_finite()
        progress = self.progress
        progress.seconds[progress.phase] = round(time.perf_counter() - self._clock, 1)
        if self.ranks.first:
            random = {"loader": self._epoch_began_at, "torch": torch.get_rng_state()}
            if self.ranks.device.type == "cuda":
                random["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
            parts: Parts = {
                "model": self.model.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer),
                "random": random,
                "tally": {"numbers": self.tally.numbers},
            }
            self.folder.write(self.folder.checkpoint.name, pack(progress, parts))
        self._saved = time.monotonic()

    def _end_epoch(self, row: dict[str, float], result: EpochResult, title: str) -> None:
        clean, robust = self._accuracy(*self.held), self._accuracy(*self.held, self.settings.eps[-1])
        progress = self.progress
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.tally.clear()
        progress.history.append(
            {
                "phase": progress.phase,
                "epoch": progress.epoch,
                **row,
                "loss": result.loss,
                "penalty": result.penalty,
                "train_accuracy": result.accuracy,
                "skipped": result.skipped,
                "clean": clean,
                "pgd": robust,
            }
        )
        progress.track = self._tracked()
        if self.ranks.first:
            self.folder.write_csv("history.csv", progress.history)
            tqdm.write(
                f"{title:>15}  loss {result.loss:.3f}  "
                + (f"penalty {result.penalty:.2e}  " if progress.phase == "cure" else "")
                + f"train {result.accuracy:6.1%}  clean {clean:6.1%}  pgd({self.settings.eps[-1]:.3g}) {robust:6.1%}"
                + (f"  skipped {result.skipped} of {len(self.loader)} steps" if result.skipped else "")
            )

    def _tracked(self) -> list[dict[str, Any]]:
        """The track up to here, with a row for the present state if it is asked for."""
        progress, settings = self.progress, self.settings
        if not (settings.track and progress.phase == "cure"):
            return progress.track
        x, y = self.held
        chosen = stratified(y, settings.track, settings.seed).to(y.device)
        rows = [*progress.track, track_row(self.model, x[chosen], y[chosen], progress.epoch, settings.seed)]
        if self.ranks.first:
            self.folder.write_csv("track.csv", rows)
        return rows

    def _accuracy(self, x: Tensor, y: Tensor, eps: float | None = None) -> float:
        """Accuracy on images, clean or under PGD-10; the processes share the batches."""

        def attacked(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
            self.interruption.check()
            attack = None if eps is None else partial(pgd, eps=eps, steps=10, generator=generator)
            return right(self.model, x, y, attack)

        batch_size = self.progress.microbatch or EVALUATED
        return float(self.ranks.map(attacked, x, y, self.settings.seed, batch_size).double().mean())

    def _bar(self, work: Any, title: str, **options: Any) -> Any:
        bar = partial(tqdm, leave=False, dynamic_ncols=True, disable=None if self.ranks.first else True)
        return bar(work, title, **options)


ROW = ("lr", "gamma", "h")
"""Columns of the history that hold schedules: what the epoch's last step used."""


def checksum(*parts: Tensor) -> int:
    """Return a number that other images or labels hardly share."""
    value = 0
    for part in parts:
        value = zlib.crc32(part.contiguous().numpy().data, value)
    return value
