"""A model in two threads: right, or an error in the second; and the model is what it was."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcure import CURE, attacks, curvature, prepare
from fastcure.analysis import curvature_along_gradient

pytestmark = pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode:UserWarning")
MESSAGE = r"another thread uses this model \(its .*\) in fastcure now.*copy.deepcopy"
IMAGES = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


class Waits(nn.Module):
    """Stops in the first forward until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside.is_set():
            self.inside.set()
            assert self.go_on.wait(60)
        return x

    def __deepcopy__(self, memo: Any) -> nn.Module:
        return nn.Identity()


def network() -> tuple[nn.Module, Waits]:
    torch.manual_seed(0)
    waits = Waits()
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), waits, nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers), waits


def gradients(model: nn.Module, engine: str) -> list[Tensor]:
    CURE(model, engine=engine)(*IMAGES).total.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


USES: dict[str, Callable[[nn.Module], Any]] = {
    "curvature": lambda model: curvature(model, *IMAGES),
    "first_order": lambda model: curvature(model, *IMAGES, engine="first_order"),
    "a part": lambda model: curvature(nn.Sequential(*model), *IMAGES),
    "analysis": lambda model: curvature_along_gradient(model, *IMAGES),
    "attack": lambda model: attacks.pgd(model, *IMAGES),
    "deepfool": lambda model: attacks.deepfool(model, IMAGES[0]),
    "prepare": lambda model: prepare(model, IMAGES[0]),
}


@pytest.mark.parametrize("engine", ["eager", "reference", "first_order"])
@pytest.mark.parametrize("use", USES)
def test_the_second_thread_raises_and_the_first_is_right(engine: str, use: str) -> None:
    model, waits = network()
    truth = gradients(copy.deepcopy(model), engine)
    parameters, flags = [*model.parameters()], [module.training for module in model.modules()]
    found: list[list[Tensor]] = []
    first = threading.Thread(target=lambda: found.append(gradients(model, engine)))
    first.start()
    try:
        assert waits.inside.wait(60)
        with pytest.raises(RuntimeError, match=MESSAGE):
            USES[use](model)
    finally:
        waits.go_on.set()
        first.join()
    for value, right in zip(found[0], truth, strict=True):
        torch.testing.assert_close(value, right)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert not any("forward" in vars(module) for module in model.modules())
    USES[use](model)  # free again


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_models_of_two_threads_share_raises_in_the_second(training: bool) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.waits = Waits()

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.waits(logits), y, reduction="none")

    loss_fn, models = Loss().train(training), [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    first = threading.Thread(target=lambda: curvature(models[0], *IMAGES, loss_fn=loss_fn))
    first.start()
    try:
        assert loss_fn.waits.inside.wait(60)
        with pytest.raises(RuntimeError, match=MESSAGE):
            curvature(models[1], *IMAGES, loss_fn=loss_fn)
    finally:
        loss_fn.waits.go_on.set()
        first.join()


def test_two_threads_with_a_copy_each_are_right() -> None:
    model, waits = network()
    waits.inside.set()
    truth, found = gradients(copy.deepcopy(model), "eager"), []

    def work() -> None:
        mine = copy.deepcopy(model)
        for _ in range(20):
            mine.zero_grad()
            found.append(gradients(mine, "eager"))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for values in (found[0], found[-1]):
        torch.testing.assert_close(values, truth)


def test_settings_of_the_process_come_back_when_threads_overlap() -> None:
    import torch._dynamo.eval_frame

    def settings() -> list[Any]:
        flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        return [torch._dynamo.eval_frame._stance.stance, *flags]

    before = settings()
    models = [network(), network()]
    threads = [threading.Thread(target=curvature, args=(model, *IMAGES)) for model, _ in models]
    for thread, (_, waits) in zip(threads, models, strict=True):  # one begins after the other
        thread.start()
        assert waits.inside.wait(60)
    for thread, (_, waits) in zip(threads, models, strict=True):  # and so it ends
        waits.go_on.set()
        thread.join()
    assert settings() == before


def test_attacks_of_two_threads_that_change_nothing_go_side_by_side() -> None:
    model, waits = network()
    model.eval()
    first = threading.Thread(target=lambda: attacks.deepfool(model, IMAGES[0]))
    first.start()
    try:
        assert waits.inside.wait(60)
        attacks.deepfool(model, IMAGES[0])
    finally:
        waits.go_on.set()
        first.join()


def test_after_an_exception_the_model_is_free() -> None:
    model, waits = network()
    waits.inside.set()

    def fail() -> None:
        with pytest.raises(TypeError):
            curvature(model, *IMAGES, loss_fn=lambda x: x)

    failed = threading.Thread(target=fail)
    failed.start()
    failed.join()
    curvature(model, *IMAGES)
