"""`fastcure finetune`: standard training or a checkpoint, then an objective, and accuracies before and after."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from fastcure._environment import environment, pick_device
from fastcure.data import Dataset, hold_out, limited, load, stratified
from fastcure.evaluation.interval import wilson
from fastcure.evaluation.network import check_network
from fastcure.models import MODELS
from fastcure.models.loading import load_model, parse_arguments
from fastcure.models.normalize import bare
from fastcure.models.placement import placed
from fastcure.models.weights import load_weights
from fastcure.objectives import CURE, OBJECTIVES, Objective
from fastcure.training.curves import draw_curves
from fastcure.training.interrupt import Interruption
from fastcure.training.ranks import Ranks, join, own_device
from fastcure.training.run import Metrics, Run
from fastcure.training.run_folder import RunFolder, reserved
from fastcure.training.settings import Settings
from fastcure.training.trackers import check_trackers

MOST_PIXELS = 1 << 27
"""Numbers from which mean and deviation of the pixels are computed."""


def finetune(settings: Settings, say: Callable[[str], object] = print, *, resume: bool = False) -> dict[str, Metrics]:
    """Run what `settings` describe, and leave the results in `settings.out` (see `RunFolder`).

    Under torchrun the processes share every batch and every evaluation, and the main one writes and prints.

    Args:
        settings: of the run.
        say: takes each line of the report.
        resume: go on with the run in `settings.out`. Where there is none it is begun; where it is finished it stays,
            or goes on if `settings.epochs` are more.

    Returns:
        `{"before": ..., "after": ...}`, each `{"clean": accuracy, "pgd": {eps: accuracy}}`; with `settings.ema` also
        `"ema"`, of the averaged weights.

    Raises:
        ValueError, OSError, ModuleNotFoundError: before anything is written, if a setting, the data or the
            checkpoint is not as it must be, or another process uses the folder; OSError also if the disk fills up,
            which loses nothing saved.
        FloatingPointError: at a step whose loss, penalty or gradient is not finite, unless such are skipped.
        MemoryError: if memory does not suffice, even for one image at a time.
        Interrupted: at SIGINT or SIGTERM, once the state is saved.
    """
    with (
        join(pick_device(own_device(settings.device))) as ranks,
        Interruption(patient=ranks.size > 1) as interruption,
        reserved(settings.out) if ranks.is_main_process else nullcontext(True) as free,
    ):
        if ranks.all_reduce_max(not free):
            raise ValueError(
                f"out must be a folder of its own, got {settings.out}, which another run uses: wait for it, or choose "
                "another"
            )
        return _finetune(settings, ranks.voice(say), resume, ranks, interruption)


def _finetune(
    settings: Settings, say: Callable[[str], object], resume: bool, ranks: Ranks, interruption: Interruption
) -> dict[str, Metrics]:
    folder = RunFolder(settings.out, resume)
    prolonged = folder.check_settings(asdict(settings))
    ranks.agree(begun=folder.begun, finished=folder.finished, prolonged=prolonged)
    if folder.finished and not prolonged:
        say(f"the run in {folder.path} is finished: nothing is left to do (more --epochs prolong it)")
        return folder.read_json("metrics.json")
    check_trackers(settings.log_to)
    if settings.engine == "cuda_graph" and ranks.device.type != "cuda":
        raise ValueError(f"--engine cuda_graph wants a CUDA device, got {ranks.device}: leave it out")
    whole = load(
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        test_fraction=settings.val_fraction,
        workers=settings.workers or None,
    )
    held_out = settings.validation if settings.val_fraction is None else float(settings.val_fraction)
    data, *held = hold_out(limited(whole, settings.limit, settings.seed), held_out, settings.seed)
    torch.manual_seed(settings.seed)
    model = placed(make_model(settings, data, say), settings.model, data.x_test.shape[1:], ranks.device)
    check_network(model, settings.model, data, ranks.device)
    objective = OBJECTIVES[settings.objective]
    title = objective.title
    run = Run(settings, data, (held[0], held[1]), model, ranks, folder, interruption)
    saved = folder.state if prolonged else folder.checkpoint
    resumed = saved.exists()
    if resumed:
        run.restore(saved)
    elif settings.checkpoint is not None:
        load_weights(bare(model), settings.checkpoint, say)
    progress = run.progress
    ranks.agree(data=progress.data, phase=progress.phase, epoch=progress.epoch, step=progress.step)
    if resumed:
        say(f"resuming after {progress.epoch} epochs and {progress.step} steps of {progress.phase}")
    say(
        f"{data.name}: {len(data.x_train):,} training, {len(held[1]):,} validation, {len(data.x_test):,} test images "
        f"of {' x '.join(map(str, data.x_train.shape[1:]))}, {settings.model} on {ranks}, seed {settings.seed}"
    )
    if settings.limit is not None:
        say(f"--limit: stratified samples of {len(whole.x_train):,} training and {len(whole.x_test):,} test images")
    if settings.checkpoint is not None and settings.pretrain_epochs:
        say(f"fine-tuning starts from {settings.checkpoint}: there is no standard training (--pretrain-epochs)")
    if settings.track > len(held[1]):
        say(f"--track {settings.track}: there are {len(held[1])} validation images; --validation N holds out more")

    if prolonged:
        say(f"the finished run is prolonged to {settings.epochs} epochs; its schedules are read as those of so many")

    if ranks.is_main_process and prolonged:
        folder.reopen(asdict(settings))
    elif ranks.is_main_process and not folder.begun:
        folder.write_json("config.json", asdict(settings))
    run.start()
    if progress.phase == "pretrain":
        run.train(0 if settings.checkpoint is not None else settings.pretrain_epochs)
        if ranks.is_main_process:
            folder.write_weights("original.safetensors", bare(model))
        progress.before = run.evaluate(f"before {title}")
        run.begin_fine_tuning()
    run.train(settings.epochs)
    if ranks.is_main_process:
        folder.write_weights("model.safetensors", bare(model))
    metrics = {"before": progress.before or {}, "after": run.evaluate(f"after {title}")}
    if run.average is not None:
        metrics["ema"] = run.evaluate("of the average", run.average.model)
        if ranks.is_main_process:
            folder.write_weights("ema.safetensors", bare(run.average.model))
    warnings = collapse(metrics, data.y_test, objective)
    if ranks.is_main_process:
        folder.write_json("metrics.json", metrics)
        try:
            picture = io.BytesIO()
            draw_curves(progress.history, metrics, picture, data.name, len(held[1]), len(data.y_test), title)
        except Exception as error:  # the results are there without it
            reason = " ".join(str(error).split())[:200]
            warnings.append(f"curves.png could not be drawn ({type(error).__name__}: {reason})")
        else:
            folder.write("curves.png", picture.getvalue())
        found = {"microbatch": progress.microbatch, "seconds": progress.seconds, "warnings": warnings}
        found["images"] = {"train": len(data.y_train), "validation": len(held[1]), "test": len(data.y_test)}
        about = {"num_classes": data.num_classes, "channels": data.x_test.shape[1], "classes": list(data.classes)}
        folder.write_json("environment.json", {**environment(ranks.device), **found, **about})
        folder.finish()
    run.trackers.close()
    say(table(metrics, title))
    low, high = wilson(0.5, len(data.y_test))
    say(f"{len(data.y_test):,} test images: a 95 % interval (Wilson) is {100 * (high - low):.1f} points wide at most")
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"results in {folder.path}")
    return metrics


def make_model(settings: Settings, data: Dataset, log: Callable[[str], object] | None = None) -> nn.Module:
    """Make the network; a bundled one has mean and deviation of the data's pixels as its normalisation.

    Args:
        settings: of the run.
        data: gives a network of the library's, or of timm's, its channels and classes.
        log: as in `load_model`.
    """
    channels = data.x_train.shape[1]
    mean, std = settings.mean, settings.std
    if settings.model in MODELS and mean is None:
        count = min(10_000, max(1, MOST_PIXELS // data.x_train.shape[1:].numel()))
        chosen = stratified(data.y_train, count, settings.seed)
        pixels = data.x_train[chosen].transpose(0, 1).reshape(channels, -1).double() / 255
        # A constant channel has no deviation.
        mean, std = tuple(pixels.mean(1).tolist()), tuple(pixels.std(1).clamp_min(1e-2).tolist())
    sizes = {"num_classes": data.num_classes, "in_channels": channels}
    arguments = parse_arguments(settings.model_arg)
    return load_model(settings.model, None, mean, std, arguments=arguments, **sizes, log=log)


def collapse(metrics: dict[str, Metrics], y_test: Tensor, objective: type[Objective] = CURE) -> list[str]:
    """Say what is wrong with a network that learnt nothing, or lost much of its clean accuracy to fine-tuning.

    Clean accuracy is compared with that of a constant answer, the most frequent class. Fine-tuning may take a quarter
    of what the network had above it; more is taken for a collapse, if it is twice the standard error of the difference.

    Args:
        metrics: accuracies before and after.
        y_test: labels of the test images.
        objective: of fine-tuning.
    """
    chance = float(y_test.bincount().max()) / len(y_test)
    before, after = (metrics[name]["clean"] for name in ("before", "after"))
    noise = 2 * (sum(p * (1 - p) for p in (before, after)) / len(y_test)) ** 0.5
    if before <= chance:
        return [
            f"before {objective.title}, clean accuracy is {before:.1%}, no better than the most frequent class "
            f"({chance:.1%}): give standard training more --pretrain-epochs or another --pretrain-lr, or start from a "
            "--checkpoint"
        ]
    if before - after > max((before - chance) / 4, noise):
        weight = "lower --gamma, let it climb more slowly, " if "gamma" in objective.scheduled else ""
        return [
            f"clean accuracy fell from {before:.1%} to {after:.1%} (the most frequent class has {chance:.1%}): {weight}"
            "lower --lr, or give standard training more --pretrain-epochs"
        ]
    return []


def table(metrics: dict[str, Metrics], title: str = "CURE") -> str:
    """Format accuracies before and after, and of averaged weights, as lines of text."""
    columns = {"before": metrics["before"], f"after {title}": metrics["after"]}
    if "ema" in metrics:
        columns["averaged"] = metrics["ema"]
    widths = [8, *(max(11, len(name) + 1) for name in list(columns)[1:])]

    def line(name: str, cells: Iterable[str]) -> str:
        return " ".join([f"{name:<20}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])

    lines = [line("accuracy", columns), line("clean", [f"{of['clean']:.1%}" for of in columns.values()])]
    for eps in metrics["before"]["pgd"]:
        lines.append(line(f"PGD-10, eps {float(eps):.4g}", [f"{of['pgd'][eps]:.1%}" for of in columns.values()]))
    return "\n".join(lines)
