"""Steps that are replayed are eager steps, exactly, whatever changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import relative, rounding
from replayed import MODES, batch, closed_over, gradients, network, replays, same, train, warmed
from torch import nn

from fastcure import CURE, curvature, prepare
from fastcure._trials import EAGER_RUNS
from fastcure.engines import ENGINES


@pytest.mark.parametrize("engine", ["auto", "cuda_graph"])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_as_the_eager_engine_does(
    device: torch.device, mode: str, prepared: bool, engine: str
) -> None:
    options, models = dict(MODES[mode]), [network(device) for _ in range(2)]
    if options.get("h") == "each":
        options["h"] = torch.linspace(0.5, 2, 8).double().to(device)
    for model, which in zip(models, ("eager", engine), strict=True):
        if prepared:
            prepare(model, batch(device, 0)[0])
        train(CURE(model, gamma=0.3, engine=which, **options), 5, device)
    assert replays(models[1], engine) >= 3
    same(*models)


@pytest.mark.parametrize("options", [{}, MODES["preset"]], ids=str)
def test_shapes_and_models_in_turn(device: torch.device, options: dict[str, Any]) -> None:
    pairs = [[network(device, seed) for _ in range(2)] for seed in range(2)]
    for eager, _ in pairs:
        train(CURE(eager, engine="eager", **options), 6, device, sizes=(8, 6))
    cures = [CURE(model, **options) for _, model in pairs]
    optimizers = [torch.optim.SGD(cure.parameters(), lr=0.01, momentum=0.9) for cure in cures]
    for step in range(6):
        for size in (8, 6):
            for cure, optimizer in zip(cures, optimizers, strict=True):
                optimizer.zero_grad()
                cure(*batch(device, step, size)).total.backward()
                optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
                optimizer.step()
    for eager, model in pairs:
        assert replays(model) >= 2 * (5 - EAGER_RUNS)
        same(model, eager)


@pytest.mark.parametrize("amp", [False, True])
def test_a_replay_computes_in_the_precision_of_the_eager_step(device: torch.device, amp: bool) -> None:
    models, (x, y) = [network(device).float() for _ in range(2)], batch(device, 0)
    for model, engine in zip(models, ("eager", "auto"), strict=True):
        cure = CURE(model, engine=engine)
        for _ in range(EAGER_RUNS + 2):
            cure.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                total = cure(x.float(), y).total
            total.backward()
    assert replays(models[1]) >= 1
    limit = rounding(torch.bfloat16, 1) if amp else rounding(torch.float32, 100)
    assert relative(*map(gradients, models)) < limit


def change_hook(cure: CURE) -> None:
    cure.model.conv.register_forward_hook(lambda module, args, out: 2 * out)  # type: ignore[union-attr,operator]


def change_flag(cure: CURE) -> None:
    cure.model.still.eval()  # type: ignore[union-attr,operator]


def change_weight(cure: CURE) -> None:
    cure.model.head.weight = nn.Parameter(cure.model.head.weight.detach() * 2)  # type: ignore[union-attr,operator]


def change_buffer(cure: CURE) -> None:
    cure.model.still.running_var = torch.ones_like(cure.model.still.running_var) * 3  # type: ignore[union-attr,arg-type]


def change_trained(cure: CURE) -> None:
    cure.model.conv.weight.requires_grad_(False)  # type: ignore[union-attr]


def change_attribute(cure: CURE) -> None:
    cure.model.scale = 0.5  # type: ignore[assignment]


def change_settings(cure: CURE) -> None:
    cure.model.settings["shift"] = 0.5  # type: ignore[index,operator]


def change_forward(cure: CURE) -> None:
    cure.model.norm.forward = lambda x: x * 2  # type: ignore[union-attr,assignment,method-assign]


def change_module(cure: CURE) -> None:
    cure.model.norm = nn.Identity()


def change_loss(cure: CURE) -> None:
    cure.loss_fn = closed_over(3.0)


def change_in_place(cure: CURE) -> None:
    with torch.no_grad():
        cure.model.conv.weight.mul_(2)  # type: ignore[union-attr,operator]


CHANGES = [
    change_hook,
    change_flag,
    change_weight,
    change_buffer,
    change_trained,
    change_attribute,
    change_settings,
    change_forward,
    change_module,
    change_loss,
    change_in_place,
]


@pytest.mark.parametrize("engine", ["auto", "cuda_graph"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_is_seen(device: torch.device, change: Callable[[CURE], None], engine: str) -> None:
    cures = [
        CURE(network(device), engine=which, batch_stats="train", loss_fn=closed_over(1.0))
        for which in ("eager", engine)
    ]
    for cure in cures:
        train(cure, 4, device)
        change(cure)
        train(cure, 2, device, first=4)
    same(cures[1].model, cures[0].model)


@pytest.mark.parametrize("engine", ["auto", "cuda_graph"])
def test_several_forwards_before_their_backwards(device: torch.device, engine: str) -> None:
    model, wanted = warmed(device, engine), []
    for step in (1, 2, 3):
        model.zero_grad()
        CURE(model, engine="eager")(*batch(device, step)).total.backward()
        wanted.append(gradients(model))
    totals = [CURE(model, engine=engine)(*batch(device, step)).total for step in (1, 2, 3)]
    for step in (2, 0, 1):
        model.zero_grad()
        totals[step].backward()
        assert relative(gradients(model), wanted[step]) < 1e-10


@pytest.mark.parametrize("engine", ["auto", "cuda_graph"])
def test_loss_and_penalty_in_backwards_of_their_own(device: torch.device, engine: str) -> None:
    model = warmed(device, engine).eval()  # a rerun in the backward finds the flags of then
    results = []
    for which in ("eager", engine):
        out = curvature(model, *batch(device, 1), engine=which)
        for value, retain in ((out.penalty, True), (out.loss, True), (out.penalty, False)):
            model.zero_grad()
            value.sum().backward(retain_graph=retain)
            results.append(gradients(model))
        with pytest.raises(RuntimeError, match="freed by an earlier backward"):
            out.loss.sum().backward()
    for theirs, ours in zip(results[:3], results[3:], strict=True):
        assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize("options", [{}, MODES["preset"]], ids=str)
def test_a_backward_that_never_comes_holds_nothing_up(device: torch.device, options: dict[str, Any]) -> None:
    model = network(device)
    cure = CURE(model, **options)
    for _ in range(EAGER_RUNS + 2):  # the first one of a model is watched for dropout
        cure(*batch(device, 0)).total.backward()
    before = replays(model)
    parts = len(ENGINES["auto"].captures._kept[model])  # type: ignore[attr-defined]
    for step in range(3):
        cure(*batch(device, step))
    assert replays(model) == before + 3 * parts
    statistics = [model.norm.running_mean, model.norm.num_batches_tracked]
    assert all(value is not None for value in statistics)


def test_gradients_that_are_kept_stay(device: torch.device) -> None:
    model = warmed(device)
    CURE(model)(*batch(device, 1)).total.backward()
    model.zero_grad()
    CURE(model)(*batch(device, 1)).total.backward()
    kept = [p.grad for p in model.parameters()]
    values = gradients(model)
    for p in model.parameters():
        p.grad = None
    CURE(model)(*batch(device, 2)).total.backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True) if a is not None)


@pytest.mark.parametrize(("options", "memories"), [({}, 1), (MODES["preset"], 2)], ids=str)
def test_captures_that_take_turns_share_their_memory(
    device: torch.device, options: dict[str, Any], memories: int
) -> None:
    """The parts of a batch wait for one backward together, so each has its own."""
    model = network(device)
    train(CURE(model, engine="cuda_graph", **options), 2, device, sizes=(8, 12, 16))
    captures = ENGINES["cuda_graph"].captures  # type: ignore[attr-defined]
    (of_stream,) = captures._memories[model].values()
    assert len(of_stream) == memories
    assert len(captures._kept[model]) == 3 * memories
