"""How many cases a property is tried on, and how many were."""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

FUZZ = int(os.environ.get("FUZZ", "1"))
"""1: the same few cases each time, as in `make test`. More: so many times as many, drawn at random."""

TRIED: Counter[str] = Counter()
"""Cases by property."""


def cases(count: int) -> Callable[..., Any]:
    return settings(
        max_examples=count * FUZZ,
        derandomize=FUZZ == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
