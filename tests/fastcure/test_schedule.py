"""Schedules: what they say at each moment, and what is refused."""

import pytest
import torch

from fastcure.schedules import schedule


@pytest.mark.parametrize(
    ("text", "epochs", "values"),
    [
        ("4", 20, {0: 4, 19.9: 4, 20: 4}),
        ("4x10,8x5,12x5", 20, {0: 4, 9.99: 4, 10: 8, 14.9: 8, 15: 12, 20: 12}),
        ("4x50%,8x25%,12x25%", 8, {0: 4, 3.9: 4, 4: 8, 6: 12}),
        ("0:4x5, 4", 10, {0: 0, 2.5: 2, 5: 4, 10: 4}),
        ("1e-3:1e-5", 10, {0: 1e-3, 5: 5.05e-4, 10: 1e-5}),
        ("1:0", 0, {0: 0}),
        ("onecycle:5", 10, {0: 0.2, 3: 5, 10: 0.2 / 1e4}),
    ],
)
def test_values(text: str, epochs: int, values: dict[float, float]) -> None:
    found = schedule(text, epochs, "gamma")
    assert {epoch: found.at(epoch) for epoch in values} == pytest.approx(values)


def test_one_cycle_is_torchs() -> None:
    steps, epochs = 1000, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    wanted = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    found = schedule("onecycle:0.01", epochs, "lr")
    for step in range(steps):
        # torch ends each half with its last step, we with the first of the next.
        assert found.at(step / steps * epochs) == pytest.approx(wanted.get_last_lr()[0], abs=0.01 * 6 / steps)
        optimizer.step()
        wanted.step()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("four", "gamma must be a number or a schedule such as .* got 'four'"),
        ("4,8", "gamma must be a number or a schedule"),
        ("4x", "gamma must be a number or a schedule"),
        ("", "gamma must be a number or a schedule"),
        ("-1", "gamma must be finite and >= 0 throughout, got '-1'"),
        ("nan", "finite"),
        ("4x5,8x4", "gamma must last the run's 10 epochs, got 9"),
        ("onecycle:", "gamma must be onecycle:PEAK with a peak > 0, .* got 'onecycle:'"),
        ("4x11,8", "gamma must be finite and >= 0|gamma must last"),
    ],
)
def test_bad_input_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(text, 10, "gamma")
