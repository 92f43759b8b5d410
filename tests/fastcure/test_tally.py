"""The sums of an epoch, and the first step that is not finite."""

import math

import pytest
import torch

from fastcure.training.tally import EpochResult, NotFinite, Tally


def added(tally: Tally, step: int, sums: list[float], norm: float = 1.0) -> bool:
    return bool(tally.add(step, torch.tensor(sums, dtype=torch.float64), torch.tensor(norm)))


def test_means_are_of_the_images_of_finite_steps() -> None:
    tally = Tally(torch.device("cpu"))
    assert tally.result() == EpochResult(0.0, 0.0, 0.0, 0)
    assert added(tally, 0, [4.0, 2.0, 1.0, 2.0])
    assert not added(tally, 1, [8.0, math.nan, 4.0, 4.0])
    assert not added(tally, 2, [8.0, 4.0, 4.0, 4.0], math.inf)
    assert added(tally, 3, [2.0, 7.0, 2.0, 4.0])
    assert tally.result() == EpochResult(1.0, 1.5, 0.5, 2)


@pytest.mark.parametrize("norm", [3.0, math.inf])
def test_the_first_step_that_is_not_finite_is_kept_with_its_means(norm: float) -> None:
    tally = Tally(torch.device("cpu"))
    added(tally, 0, [4.0, 2.0, 1.0, 2.0])
    assert tally.first_bad() is None
    added(tally, 1, [8.0, math.inf, 2.0, 4.0], norm)
    added(tally, 2, [1.0, math.inf, 1.0, 1.0], 5.0)
    added(tally, 3, [4.0, 2.0, 1.0, 2.0])
    assert tally.first_bad() == NotFinite(1, 2.0, math.inf, norm)
    tally.clear()
    assert tally.first_bad() is None
    assert tally.result() == EpochResult(0.0, 0.0, 0.0, 0)
