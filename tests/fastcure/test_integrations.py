"""The mixins on stand-ins for the trainers; tests/distributed/test_examples.py has them on the real ones."""

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import NETWORKS, Case, make
from torch import Tensor, nn

import fastcure
from fastcure.integrations import LightningMixin, TrainerMixin
from fastcure.objectives import Objective


class Module(nn.Module):
    """Stands in for a LightningModule that counts its steps."""

    def __init__(self, model: nn.Module, **trainer: Any) -> None:
        super().__init__()
        self.model, self.logged = model, list[dict[str, Any]]()
        default = {"global_step": 0, "estimated_stepping_batches": 8, "max_epochs": 4}
        self.trainer = SimpleNamespace(**(default | trainer))

    def log_dict(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


class Robust(LightningMixin, Module):
    schedules = {"gamma": "0:2x50%,2", "h": "0.5x1,1x3"}

    def make_objective(self) -> fastcure.CURE:
        return fastcure.CURE(self.model)


class Trainer:
    """Stands in for a Hugging Face Trainer."""

    def __init__(self, model: nn.Module, *, processes: int = 1, **options: Any) -> None:
        self.model, self.logged = model, list[dict[str, Any]]()
        self.args = SimpleNamespace(n_gpu=options.get("n_gpu", 1), average_tokens_across_devices=True)
        self.accelerator = SimpleNamespace(num_processes=processes)
        self.state = SimpleNamespace(global_step=3, max_steps=8, num_train_epochs=4)
        self.label_smoother = self.compute_loss_func = None
        self.__dict__ |= {name: value for name, value in options.items() if name in vars(self)}

    def log(self, logs: dict[str, Any]) -> None:
        self.logged.append(logs)


class RobustTrainer(TrainerMixin, Trainer):
    schedules = {"gamma": "0:2x50%,2"}

    def make_objective(self) -> fastcure.CURE:
        return fastcure.CURE(self.model, h=0.7)


@pytest.fixture
def case() -> Case:
    return make(NETWORKS["mlp-softplus"], 8, seed=0)


@pytest.mark.parametrize(("step", "gamma", "h"), [(0, 0.0, 0.5), (1, 0.5, 0.5), (3, 1.5, 1.0), (8, 2.0, 1.0)])
def test_a_lightning_module_follows_its_schedules(case: Case, step: int, gamma: float, h: float) -> None:
    module = Robust(case.model, global_step=step)
    total = module.training_step((case.x, case.y))
    expected = fastcure.CURE(case.copy().model, h, gamma)(case.x, case.y)
    torch.testing.assert_close(total, expected.total)
    assert {name: float(value) for name, value in module.logged[0].items()} == pytest.approx(
        {"loss": expected.loss.item(), "penalty": expected.penalty.item(), "gamma": gamma, "h": h}
    )


def test_a_checkpoint_holds_the_network_once_under_its_names(case: Case) -> None:
    names = list(Module(case.model).state_dict())
    module = Robust(case.model)
    module.training_step((case.x, case.y)).backward()
    assert list(module.state_dict()) == names
    assert len(list(module.parameters())) == len(list(case.model.parameters()))


def test_a_run_without_end_has_no_schedule(case: Case) -> None:
    endless = {"estimated_stepping_batches": float("inf"), "max_epochs": -1}
    with pytest.raises(ValueError, match="schedules need a run that ends, got max_epochs=-1"):
        Robust(case.model, **endless).training_step((case.x, case.y))
    module = Robust(case.model, max_epochs=-1)
    module.schedules = {"gamma": "0:2x50%,2"}  # type: ignore[misc]
    module.trainer.global_step = 2
    module.training_step((case.x, case.y))
    assert module.objective.gamma == 1.0


@pytest.mark.parametrize("parts", [(8,), (4, 4), (5, 2, 1)])
def test_each_sample_of_an_update_weighs_the_same(case: Case, parts: tuple[int, ...]) -> None:
    """The gradients of batches of any sizes add up to that of the whole, also of two processes whose mean is taken."""
    expected = case.copy().model
    fastcure.CURE(expected, h=0.7, gamma=1.5)(case.x, case.y).total.backward()
    for processes in (1, 2):
        model = case.copy().model.train()
        trainer = RobustTrainer(model, processes=processes)
        assert trainer.model_accepts_loss_kwargs
        for x, y in zip(case.x.split(parts), case.y.split(parts), strict=True):
            loss = trainer.compute_loss(model, {"pixel_values": x, "labels": y}, num_items_in_batch=torch.tensor(8))
            (loss / processes).backward()
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


def test_a_mean_is_returned_where_the_trainer_divides(case: Case) -> None:
    model = case.model.train()
    trainer = RobustTrainer(model)
    loss, out = trainer.compute_loss(model, {"image": case.x, "labels": case.y}, return_outputs=True)
    expected = fastcure.CURE(case.copy().model, 0.7, 1.5)(case.x, case.y)
    torch.testing.assert_close(loss, expected.total)
    torch.testing.assert_close(out["logits"], expected.logits)
    trainer.log({"loss": 1.0})
    trainer.log({"eval_loss": 1.0})
    assert trainer.logged[0] == {"loss": 1.0, "gamma": 1.5, "penalty": pytest.approx(expected.penalty.item(), abs=1e-6)}
    assert trainer.logged[1] == {"eval_loss": 1.0}


def test_evaluation_is_that_of_the_network(case: Case) -> None:
    model = case.model.eval()
    with torch.no_grad():
        loss, out = RobustTrainer(model).compute_loss(model, {"x": case.x, "labels": case.y}, True, 16)
        torch.testing.assert_close(out["logits"], model(case.x))
        torch.testing.assert_close(loss, nn.functional.cross_entropy(model(case.x), case.y))


def test_a_network_that_the_trainer_makes_anew_is_the_one_that_is_trained(case: Case) -> None:
    """As `model_init` does, in each call of `train`."""
    first, second = case.model.train(), case.copy().model.train()
    trainer, batch = RobustTrainer(first), {"x": case.x, "labels": case.y}
    trainer.compute_loss(first, batch).backward()
    gradients = [parameter.grad for parameter in first.parameters()]
    made = trainer.objective
    assert trainer.objective is made
    first.zero_grad()
    trainer.model = second
    trainer.compute_loss(second, batch).backward()
    assert all(parameter.grad is None for parameter in first.parameters())
    for parameter, expected in zip(second.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_a_network_that_a_module_is_given_anew_is_the_one_that_is_trained(case: Case) -> None:
    module = Robust(case.model)
    first = module.objective
    assert module.objective is first
    module.model = torch.compile(case.model, backend="eager")  # which has the network inside
    assert module.objective is first
    module.model = copy.deepcopy(case.model)
    assert module.objective is not first
    assert module.objective.model is module.model


def test_a_wrapper_that_is_not_known_is_refused(case: Case) -> None:
    trainer = RobustTrainer(case.model.train())
    with pytest.raises(ValueError, match="in DistributedDataParallel, got Sequential: leave out fsdp"):
        trainer.compute_loss(nn.Sequential(case.model).train(), {"x": case.x, "labels": case.y})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "must hold pixel_values and labels, got nothing"),
        ({"a": 1, "b": 2, "labels": 3}, "got a, b, labels: define images_and_labels"),
        ({"pixel_values": 1}, "got pixel_values: .* or set remove_unused_columns=False"),
    ],
)
def test_batches_of_another_form_are_one_clear_error(case: Case, inputs: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustTrainer(case.model).images_and_labels(inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu": 2}, "one device a process, got n_gpu=2: start it by torchrun"),
        ({"label_smoother": object()}, "label_smoothing_factor has no effect with TrainerMixin"),
        ({"compute_loss_func": print}, "compute_loss_func has no effect with TrainerMixin"),
    ],
)
def test_what_would_have_no_effect_is_refused(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustTrainer(case.model, **options)


def test_what_a_subclass_leaves_out_is_named(case: Case) -> None:
    class Undefined(LightningMixin, Module):
        pass

    class Misspelt(LightningMixin, Module):
        def make_objective(self) -> Objective:
            return fastcure.CURE(self.modle)

    class Unknown(Robust):
        schedules = {"gama": "1"}

    batch: tuple[Tensor, Tensor] = (case.x, case.y)
    with pytest.raises(NotImplementedError, match=r"Undefined must define make_objective\(self\), such as"):
        Undefined(case.model).training_step(batch)
    with pytest.raises(RuntimeError, match=r"make_objective of Misspelt failed: .* 'modle'"):
        Misspelt(case.model).training_step(batch)
    with pytest.raises(ValueError, match="schedules of CURE may name gamma, h, got 'gama'"):
        Unknown(case.model).training_step(batch)


def test_an_objective_that_keeps_something_of_each_sample_is_refused(case: Case) -> None:
    class Keeping(fastcure.CURE):
        per_sample = ("last",)

    class Mixed(LightningMixin, Module):
        def make_objective(self) -> Objective:
            return Keeping(case.model, h=1.0)

    with pytest.raises(TypeError, match="keeps nothing of each sample, got Keeping with last: train it by"):
        Mixed(case.model).training_step((case.x, case.y))


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits / self.temperature, y, reduction="none")


def test_a_parameter_that_nothing_would_train_is_refused(case: Case) -> None:
    class Trained(TrainerMixin, Trainer):
        def make_objective(self) -> Objective:
            return fastcure.CURE(self.model, h=0.7, loss_fn=self.args.loss)

    class Fitted(LightningMixin, Module):
        def make_objective(self) -> Objective:
            return fastcure.CURE(self.model, h=0.7, loss_fn=self.loss or loss)

    loss, batch = Scaled().to(case.x), {"x": case.x, "labels": case.y}
    trainer, module = Trained(case.model.train()), Fitted(case.model)
    trainer.args.loss, module.loss = loss, None
    message = "CURE has the parameter loss_fn.temperature, which would not be trained, as it is none of the network's"
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(case.model, batch)
    with pytest.raises(ValueError, match=message):
        module.training_step((case.x, case.y))
    module.loss = loss  # of the module, and so among the parameters of its optimiser
    module.training_step((case.x, case.y)).backward()
    assert loss.temperature.grad is not None
    loss.requires_grad_(False)
    trainer.compute_loss(case.model, batch).backward()
