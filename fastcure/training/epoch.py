"""The steps of an epoch, of normal training or with CURE: the two differ in their objective alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastcure._functional import cross_entropy
from fastcure.objectives.cure import CURE, CUREOutput
from fastcure.training.ranks import Ranks, out_of_memory
from fastcure.training.schedule import Schedule
from fastcure.training.tally import Tally


class Normal(nn.Module):
    """The objective of normal training: cross-entropy in training mode, and no penalty."""

    batch_stats = "split"
    """As `CURE` has it: a step changes the statistics of batch norms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> CUREOutput:
        """Return what `CURE` returns."""
        logits = self.model(x)
        loss = cross_entropy(logits, y).mean()
        return CUREOutput(loss, loss, torch.zeros((), device=x.device), logits)


def train_steps(
    objective: CURE | Normal,
    batches: Iterable[tuple[int, float, tuple[Tensor, Tensor]]],
    optimizer: torch.optim.Optimizer,
    schedules: Mapping[str, Schedule],
    tally: Tally,
    ranks: Ranks,
    autocast: torch.dtype | None = None,
) -> Iterator[None]:
    """Train, and yield after every step.

    Each process takes its share of a batch, and its images weigh as those of any other. Gradients are added up only
    when every process has its own: where memory runs out in one, all halve `objective.microbatch` and repeat the step.
    (In a DistributedDataParallel the others would wait for it in their backward.) Where loss, penalty or gradient are
    not finite, neither weights nor statistics move; no value is read for that, so that nobody waits for a GPU.

    Args:
        objective: of the step.
        batches: index in the epoch, time in epochs, and `(x, y)`, the same for all processes.
        optimizer: of the model's parameters; one that looks at `found_inf`, as fused ones do.
        schedules: of `lr`, and of attributes of the objective, set before each step.
        tally: takes the numbers of each step.
        ranks: the processes.
        autocast: dtype of autocast, or None.

    Raises:
        MemoryError: if memory does not suffice for one image at a time, or where batch norms need the whole batch: in
            normal training, and with `batch_stats="train"`.
    """
    objective.model.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moving = list(objective.model.buffers()) if objective.batch_stats != "frozen" else []
    for index, now, batch in batches:
        for name, schedule in schedules.items():
            if name != "lr":
                setattr(objective, name, schedule.at(now))
        for group in optimizer.param_groups:
            group["lr"] = schedules["lr"].at(now)
        ranks.copy_from_first(moving)
        before = [buffer.clone() for buffer in moving]
        random = _random_state(ranks.device)
        while True:
            optimizer.zero_grad()
            sums = _backward(objective, batch, ranks, autocast)
            if not ranks.most(sums is None):
                break
            _set(moving, before)
            _set_random_state(ranks.device, random)
            _halve(objective, -(-len(batch[0]) // ranks.size))
        assert sums is not None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        ranks.add_up([*gradients, sums])
        finite = tally.add(index, sums, nn.utils.get_total_norm(gradients))
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        _set(moving, [torch.where(finite, *pair) for pair in zip(moving, before, strict=True)])
        yield


def _backward(
    objective: CURE | Normal, batch: tuple[Tensor, Tensor], ranks: Ranks, autocast: torch.dtype | None
) -> Tensor | None:
    """Add this process's part of the batch's gradient to `.grad`.

    Returns:
        float64 (4,): over the images of this process the sums of loss, penalty, right answers and 1; None if memory ran
        out.
    """
    x, y = ranks.share(*batch)
    count = len(x)
    if not count:  # all must have gradients: of one image of weight zero
        x, y = (part[:1] for part in batch)
    try:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            total, loss, penalty, logits = objective(x, y)
        (total * (count / len(batch[0]))).backward()
        right = (logits.argmax(1) == y).float().mean()
        return count * torch.stack([loss, penalty, right, torch.ones_like(right)]).detach().double()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def _halve(objective: CURE | Normal, images: int) -> None:
    """Let the objective take fewer of the `images` of a step at a time."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if isinstance(objective, Normal) or objective.batch_stats == "train":
        raise MemoryError(
            f"memory does not suffice for a step on {images} images, which batch norms in training mode need together: "
            "lower --batch-size"
        )
    tried = min(objective.microbatch or images, images)
    if tried == 1:
        raise MemoryError(
            "memory does not suffice for a step of CURE, even with the penalty on one image at a time: lower "
            "--batch-size, or take a smaller --model"
        )
    objective.microbatch = (tried + 1) // 2


@torch.no_grad()
def _set(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def _set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
