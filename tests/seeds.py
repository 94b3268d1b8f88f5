"""Numbers of stored rows that differ in their seeds alone: mean and standard error, and whether one is surely below another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from types import ModuleType

Measured = tuple[float, float]


def over_seeds(stored: ModuleType, seeds: Sequence[int]) -> Callable[..., Measured]:
    """A function (part, measure, **key) -> mean and standard error of one number over the rows of `stored` with this key.

    stored  a module whose `rows(part)` are measured; each key must leave one row a seed
    """

    def of(part: str, measure: str, **key: object) -> Measured:
        values = [row[measure] for row in stored.rows(part) if key.items() <= row.items()]
        assert len(values) == len(seeds)
        return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))

    return of


def surely_less(a: Measured, b: Measured, errors: float = 2.0) -> bool:
    """Whether a is below b by so many standard errors of their difference."""
    return b[0] - a[0] > errors * math.hypot(a[1], b[1])
