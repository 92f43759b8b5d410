"""Samples have every class in its share, whatever the order of the images."""

import pytest
import torch

from fastcure.data import Dataset, hold_out, limited, sampled, stratified


def labels(sizes: list[int]) -> torch.Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@pytest.mark.parametrize("sizes", [[20] * 5, [50, 3, 17, 1], [7]])
@pytest.mark.parametrize("count", [1, 4, 10, 50])
@pytest.mark.parametrize("order", ["sorted", "shuffled", "reversed"])
def test_each_class_has_its_share(sizes: list[int], count: int, order: str) -> None:
    y = labels(sizes)
    y = {"sorted": y, "shuffled": y[torch.randperm(len(y))], "reversed": y.flip(0)}[order]
    chosen = stratified(y, count, seed=3)
    assert len(set(chosen.tolist())) == len(chosen) == min(count, len(y))
    assert chosen.tolist() == sorted(chosen.tolist())
    for label, size in enumerate(sizes):
        share = len(chosen) * size / len(y)
        assert abs(int((y[chosen] == label).sum()) - share) < 1


def test_the_choice_is_by_the_seed_and_every_image_is_as_likely() -> None:
    y = labels([8, 4, 4])
    assert torch.equal(stratified(y, 6, 1), stratified(y, 6, 1))
    taken = torch.zeros(16)
    for seed in range(2000):
        taken[stratified(y, 6, seed)] += 1
    # Binomial: each of 16 images is in 6 of 16 samples; five standard deviations.
    assert ((taken / 2000 - 6 / 16).abs() < 5 * (6 / 16 * 10 / 16 / 2000) ** 0.5).all()


def test_all_of_them_stay_in_their_order() -> None:
    assert stratified(labels([3, 2]), 9, 0).tolist() == [0, 1, 2, 3, 4]


def dataset(train: int, test: int) -> Dataset:
    """Sorted by class; each image holds its own place."""
    places = torch.arange(train + test).view(-1, 1, 1, 1).to(torch.uint8)
    y = torch.cat([torch.arange(train) * 4 // train, torch.arange(test) * 4 // test])
    return Dataset(places[:train], y[:train], places[train:], y[train:], 4, "four")


def test_a_limit_is_of_both_splits() -> None:
    whole = dataset(120, 80)
    data = limited(whole, 20, 0)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert y.bincount().tolist() == [5] * 4
        places = x.flatten().tolist()
        assert y.tolist() == [place * 4 // 120 if place < 120 else (place - 120) * 4 // 80 for place in places]
    assert limited(whole, None, 0) is whole
    assert sampled(data, whole) == "20 test images (a sample of 80, stratified by class)"
    assert sampled(whole, whole) == "80 test images"


@pytest.mark.parametrize(("count", "expected"), [(None, 12), (20, 20), (119, 119)])
def test_what_is_held_out_is_not_trained_on(count: int | None, expected: int) -> None:
    whole = dataset(120, 80)
    data, x, y = hold_out(whole, count, 0)
    assert len(x) == len(y) == expected
    assert sorted(torch.cat([data.x_train, x]).flatten().tolist()) == list(range(120))
    assert torch.equal(data.x_test, whole.x_test)
    assert y.tolist() == [place * 4 // 120 for place in x.flatten().tolist()]
    assert all(abs(n - expected / 4) < 1 for n in y.bincount(minlength=4).tolist())


def test_of_many_images_128_are_held_out() -> None:
    y = labels([1000, 1000])
    data = Dataset(torch.zeros(2000, 1, 1, 1, dtype=torch.uint8), y, torch.zeros(1, 1, 1, 1), y[:1], 2, "many")
    assert len(hold_out(data, None, 0)[2]) == 128


@pytest.mark.parametrize(("train", "count"), [(120, 120), (1, None)])
def test_images_to_train_on_must_be_left(train: int, count: int | None) -> None:
    with pytest.raises(ValueError, match=f"validation must leave images to train on, got {train} of the {train}"):
        hold_out(dataset(train, 8), count, 0)
