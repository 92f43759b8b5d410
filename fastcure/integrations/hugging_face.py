"""A Hugging Face Trainer that trains its network with an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastcure._functional import find_logits
from fastcure.integrations._with_objective import WithObjective
from fastcure.objectives import Objective, ObjectiveOutput


class TrainerMixin(WithObjective):
    """The loss of a `transformers.Trainer`; put it before the trainer's class.

    `self.model` stays the network: checkpoints, `save_model`, evaluation and `push_to_hub` are those of the network.
    It works in one process and in several (DistributedDataParallel), in 32 bits and in bf16, and with gradient
    accumulation over batches of any sizes: each sample of an update weighs the same.

    Define `make_objective`, which is called again for each network that `model_init` makes; `schedules` span the run's
    epochs. The penalty and the scheduled numbers are logged with the loss, which is the objective's total in training
    and the mean of its `loss_fn` in evaluation. Networks that are not of the library transformers need
    `remove_unused_columns=False` in the training arguments.

    Raises:
        ValueError: if a process has several devices, if the network is sharded, or if another loss is asked for.

    Examples:
        With `transformers.Trainer` in place of `object`:

        >>> import fastcure
        >>> from fastcure.integrations import TrainerMixin
        >>> class RobustTrainer(TrainerMixin, object):
        ...     schedules = {"gamma": "0:1x50%,1"}
        ...
        ...     def make_objective(self):
        ...         return fastcure.CURE(self.model, h=fastcure.eps_to_h(8 / 255, 3 * 224 * 224))
    """

    model: nn.Module
    args: Any
    state: Any
    accelerator: Any
    label_smoother: Any
    compute_loss_func: Any
    _penalty: Tensor | None = None
    _values: Mapping[str, float] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"TrainerMixin uses one device a process, got n_gpu={self.args.n_gpu}: start it by torchrun, or set "
                "CUDA_VISIBLE_DEVICES to one device"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            what = "label_smoothing_factor" if self.label_smoother is not None else "compute_loss_func"
            raise ValueError(
                f"{what} has no effect with TrainerMixin, whose loss is the objective's: leave it out, and give the "
                "objective a loss_fn, such as fastcure.objectives.SmoothedCrossEntropy(0.1)"
            )
        self.model_accepts_loss_kwargs = True  # asks the trainer for num_items_in_batch
        self.label_names = getattr(self, "label_names", None) or ["labels"]

    def _trained(self) -> nn.Module:
        return self.model  # made anew by `model_init` for each training

    def images_and_labels(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return images and labels of a batch: "labels", and "pixel_values" or the only other entry."""
        others = [name for name in inputs if name != "labels"]
        name = "pixel_values" if "pixel_values" in others else others[0] if len(others) == 1 else None
        if name is None or "labels" not in inputs:
            raise ValueError(
                f"a batch must hold pixel_values and labels, got {', '.join(inputs) or 'nothing'}: define "
                "images_and_labels(self, inputs), or set remove_unused_columns=False"
            )
        return inputs[name], inputs["labels"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch: in training its share of the mean over the samples of the update.

        Args:
            model: the network, or the DistributedDataParallel around it.
            inputs: of the batch.
            return_outputs: return `(loss, {"logits": logits})`.
            num_items_in_batch: labels of all batches of the update, in all processes by the trainer's default.
        """
        x, y = self.images_and_labels(inputs)
        if not (model.training and torch.is_grad_enabled()):
            logits = find_logits(model(x))
            loss = self.objective.loss_fn(logits, y).mean()
            return (loss, {"logits": logits}) if return_outputs else loss
        if self.schedules:
            share = self.state.global_step / self.state.max_steps
            self._values = self._follow_schedules(share, self.state.num_train_epochs)
        out = call_through(model, self.model, self.objective, x, y)
        self._penalty = out.penalty.detach()
        loss = out.total
        if num_items_in_batch is not None:
            # DistributedDataParallel takes the mean over the processes, of a sum over all of them.
            together = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * (y.ne(-100).sum() * together / num_items_in_batch)
        return (loss, {"logits": out.logits}) if return_outputs else loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add the penalty of the last batch and the scheduled numbers to what is logged in training."""
        if "loss" in logs and self._penalty is not None:
            logs = {**logs, "penalty": round(float(self._penalty), 6), **self._values}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def call_through(wrapper: nn.Module, network: nn.Module, objective: Objective, x: Tensor, y: Tensor) -> ObjectiveOutput:
    """Call the objective of a network as if the wrapper around the network were around the objective.

    During the call of the wrapper the network's `forward` is the objective, as Lightning has its own step there.

    Raises:
        ValueError: for a wrapper that is no DistributedDataParallel.
    """
    if wrapper is network:
        return objective(x, y)
    if not (isinstance(wrapper, DistributedDataParallel) and wrapper.module is network):
        raise ValueError(
            f"TrainerMixin takes a network alone or in DistributedDataParallel, got {type(wrapper).__name__}: leave "
            "out fsdp, deepspeed and torch_compile"
        )
    own = vars(network).get("forward")  # that of accelerate, which casts

    def restore() -> None:
        vars(network).pop("forward", None)
        if own is not None:
            network.forward = own

    def forward(_: Tensor) -> ObjectiveOutput:
        restore()
        return objective(x, y)

    network.forward = forward
    try:
        return wrapper(x)
    finally:
        restore()
