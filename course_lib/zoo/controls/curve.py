"""When a control begins to be obeyed: the "sudden convergence phenomenon" (Zhang et al. 2023, Fig. 4) as a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

FACTOR = 2.0
"""The width, as a ratio of steps, of the window around the step of convergence."""


@dataclass(frozen=True)
class Convergence:
    """Where a curve falls, and how steeply.

    step   of the middle of the fall
    share  of the whole fall that happens within a factor of two in steps around it, from step / sqrt(2) to step sqrt(2)
    even   that share of a fall that is even in the logarithm of the step, from the first step above 0 to the last
    """

    step: float
    share: float
    even: float

    @property
    def sudden(self) -> bool:
        """Whether more than half of the fall happens within a factor of two in steps."""
        return self.share > 0.5


def convergence(steps: Sequence[int], errors: Sequence[float]) -> Convergence:
    """The step after which errors stay below the middle of their first and last, straight in log step between measurements.

    steps   rising, the first 0: before training
    errors  one for each; the first is the level before, the last the level after

    Before the first step above 0 the error is the first. Raises ValueError for other steps and for an error that does not fall.
    """
    rises = all(a < b for a, b in pairwise(steps))
    if len(steps) != len(errors) or len(steps) < 3 or steps[0] != 0 or not rises:
        raise ValueError(f"steps = {list(steps)} of {len(errors)} errors; expected at least three that rise from 0, one an error")
    fall = errors[0] - errors[-1]
    if not fall > 0:
        raise ValueError(f"errors go from {errors[0]:.4g} to {errors[-1]:.4g}; expected them to fall")
    middle = (errors[0] + errors[-1]) / 2
    # log step: step 0 stands where an even spacing of the first two steps above 0 would have put it
    logs = np.log([steps[1] ** 2 / steps[2], *steps[1:]])
    last = max(k for k, error in enumerate(errors) if error >= middle)
    part = (errors[last] - middle) / (errors[last] - errors[last + 1])
    at = logs[last] + part * (logs[last + 1] - logs[last])
    half = math.log(FACTOR) / 2
    before, after = np.interp([at - half, at + half], logs, errors)
    return Convergence(float(np.exp(at)), float((before - after) / fall), 2 * half / float(logs[-1] - logs[1]))
