"""The steps of an epoch, of whatever objective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastcure.objectives import Objective
from fastcure.schedules import Schedule
from fastcure.training.average import WeightAverage
from fastcure.training.buffers import Buffers
from fastcure.training.ranks import Ranks, Share, out_of_memory
from fastcure.training.tally import Tally


def train_steps(
    objective: Objective,
    batches: Iterable[tuple[int, float, Share]],
    optimizer: torch.optim.Optimizer,
    schedules: Mapping[str, Schedule],
    tally: Tally,
    ranks: Ranks,
    *,
    autocast: torch.dtype | None = None,
    clip: float | None = None,
    average: WeightAverage | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[None]:
    """Train, and yield after every step.

    Each process takes its share of a batch, and its images weigh as those of any other. Gradients are added up only
    when every process has its own: where memory runs out in one, all halve `objective.microbatch` and repeat the step.
    (In a DistributedDataParallel the others would wait for it in their backward.) Where loss, penalty or gradient are
    not finite, neither weights nor buffers change; no value is read for that, so that nobody waits for a GPU.

    Args:
        objective: of the step.
        batches: number in the epoch, time in epochs, and this process's share.
        optimizer: of the model's parameters; one that looks at `found_inf`, as fused ones do.
        schedules: of `lr`, and of attributes of the objective, set before each step.
        tally: takes the numbers of each step.
        ranks: the processes.
        autocast: dtype of autocast, or None.
        clip: largest L2 norm of the gradient of all parameters; a longer one is scaled down to it.
        average: of the weights, updated after each step.
        scaler: of the loss, for autocast to float16. A gradient that overflows leaves its step out and lowers the
            scale; it counts as not finite only where the scale has come down to 1.

    Raises:
        MemoryError: if memory does not suffice for one image at a time, or the objective takes a batch as a whole.
    """
    model = objective.model
    model.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    buffers = Buffers(objective)
    for step, now, batch in batches:
        for name, schedule in schedules.items():
            if name != "lr":
                setattr(objective, name, schedule.at(now))
        for group in optimizer.param_groups:
            group["lr"] = schedules["lr"].at(now)
        objective.transform = batch.transform
        ranks.broadcast(buffers.shared)
        before = buffers.copy(batch.places)
        random = _random_state(ranks.device, objective.generator)
        while True:
            optimizer.zero_grad()
            sums = _backward(objective, batch, autocast, scaler)
            if not ranks.all_reduce_max(sums is None):
                break
            buffers.put_back(batch.places, before)
            _set_random_state(ranks.device, objective.generator, random)
            _halve(objective, -(-batch.whole // ranks.size))
        assert sums is not None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        ranks.all_reduce([*gradients, sums])
        fits = None if scaler is None else _unscale(scaler, optimizer)
        norm = nn.utils.get_total_norm(gradients)
        finite = tally.add(step, sums, norm if fits is None else torch.where(fits, norm, 0.0))
        finite = finite if fits is None else finite & fits
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        if scaler is not None:
            scaler.update()
        buffers.settle(batch, before, finite, ranks)
        if average is not None:
            average.update(model, finite)
        yield


def _unscale(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Tensor:
    """Divide the gradients by the scale; return whether they fit into float16, 0-dim.

    At a scale of 1 they are as they are.
    """
    scale = scaler.scale(torch.ones((), device=optimizer.param_groups[0]["params"][0].device))
    scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return nn.utils.get_total_norm(gradients).isfinite() | (scale <= 1)


def _backward(
    objective: Objective, batch: Share, autocast: torch.dtype | None, scaler: torch.amp.GradScaler | None
) -> Tensor | None:
    """Add this process's part of the batch's gradient to `.grad`.

    Returns:
        float64 (4,): over the images of this process the sums of loss, penalty, correct answers and 1; None if memory
        ran out.
    """
    x, y, places, _, count, whole = batch  # all must have gradients, be it of one image of weight zero
    try:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            total, loss, penalty, logits = objective(x, y, places)
        total = total * (count / whole)
        (total if scaler is None else scaler.scale(total)).backward()
        correct = (logits.argmax(1) == y).float().mean()
        return count * torch.stack([loss, penalty, correct, torch.ones_like(correct)]).detach().double()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def _halve(objective: Objective, images: int) -> None:
    """Let the objective take fewer of the `images` of a step at a time."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not objective.can_microbatch:
        raise MemoryError(
            f"memory does not suffice for a step of {objective.title} on {images} images, which it takes together: "
            "lower --batch-size"
        )
    tried = min(objective.microbatch or images, images)
    if tried == 1:
        raise MemoryError(
            f"memory does not suffice for a step of {objective.title}, even with the penalty on one image at a time: "
            "lower --batch-size, or take a smaller --model"
        )
    objective.microbatch = (tried + 1) // 2


def _random_state(device: torch.device, generator: torch.Generator | None) -> list[Tensor]:
    """The states of torch's generators, and of the objective's."""
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return states + ([generator.get_state()] if generator is not None else [])


def _set_random_state(device: torch.device, generator: torch.Generator | None, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    if generator is not None:
        generator.set_state(states[-1])
