"""Wilson's interval against published and computed ones, and what it says of two attacks."""

import pytest
from scipy.stats import binomtest, norm

from fastcure.evaluation.interval import MUCH, Z, weaker_than_autoattack, wilson, with_interval

PUBLISHED = [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("hits", "images", "low", "high"), PUBLISHED)
def test_it_is_the_published_one(hits: int, images: int, low: float, high: float) -> None:
    assert wilson(hits / images, images) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "images"), [(0, 1), (1, 1), (3, 7), (9_999, 10_000), (450, 450)])
def test_it_is_scipy_s(hits: int, images: int) -> None:
    expected = binomtest(hits, images).proportion_ci(0.95, method="wilson")
    assert wilson(hits / images, images) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert pytest.approx(norm.ppf(0.975), abs=1e-14) == Z


def test_words() -> None:
    assert with_interval(15 / 148, 148) == "10.1% [6.2, 16.0]"
    assert with_interval(1.0, 450) == "100.0% [99.2, 100.0]"


@pytest.mark.parametrize(("accuracy", "images", "message"), [(1.5, 9, "accuracy must be"), (0.5, 0, "images must be")])
def test_what_is_no_accuracy_is_an_error(accuracy: float, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson(accuracy, images)


def test_much_more_than_autoattack_is_more_than_its_interval_and_than_some_points() -> None:
    high = binomtest(50, 100).proportion_ci(0.95, method="wilson").high  # 9.6 points above
    assert weaker_than_autoattack("PGD-10", high - 1e-6, 0.5, 100) is None
    words = weaker_than_autoattack("PGD-10", 0.5 + 2 * (high - 0.5), 0.5, 100)
    assert words is not None
    assert words.startswith("PGD-10 leaves 69.2%, AutoAttack 50.0% [40.4, 59.6] of the same 100 images: 19.2 points ")
    assert "2.0 times as far as the 95 % interval reaches" in words
    assert weaker_than_autoattack("PGD-10", 0.5 + MUCH - 1e-6, 0.5, 1_000_000) is None  # the interval is 0.1 points
    assert weaker_than_autoattack("PGD-10", 0.5 + MUCH + 1e-6, 0.5, 1_000_000) is not None
