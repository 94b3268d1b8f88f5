"""Item 13.4: how much of a control is added, in which step, for which sample and at which feature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T


def _steps(sigmas: Tensor) -> Tensor:
    """Where each step begins, as a share of all N: n / N, in double precision."""
    N = len(sigmas) - 1
    return torch.arange(N, dtype=torch.float64) / N


def _inside(sigmas: Tensor, start: float, end: float) -> Tensor:
    """Whether each step is controlled, (N,)."""
    N = len(sigmas) - 1
    return (_steps(sigmas) >= start) & (torch.arange(1, N + 1, dtype=torch.float64) / N <= end)


def _table(on: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """(N,), (B,), (L,) -> (N, B, L)."""
    return on.to(scale)[:, None, None] * scale[None, :, None] * weights


@item(
    "13.4", title="Scales and steps", function="control_scales", points=1, minutes=15, difficulty=1,
    answers=("course_lib.guidance.controls.sigma_interval", "course_lib.guidance.controls.within"),
    hints=(
        "There are N = len(sigmas) - 1 steps; step n goes from sigmas[n] to sigmas[n + 1]. Only the *number* of the step counts, not the values of sigma.",
        "begins = torch.arange(N) / N, ends = torch.arange(1, N + 1) / N; on = (begins >= start) & (ends <= end), of shape (N,).",
        "Three axes: on[:, None, None] * scale[None, :, None] * weights[None, None, :].",
    ),
)  # fmt: skip
class Scales:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(N: int, size: int, start: float, end: float) -> Case:
            falls = np.cumsum(rng.uniform(0.5, 1.5, N + 1))
            return {"sigmas": 14 * np.exp(-5 * (falls - falls[0]) / (falls[-1] - falls[0])), "start": start / N, "end": end / N,
                    "scale": rng.uniform(0.4, 1.4, size), "weights": rng.uniform(0.1, 1.0, size)}  # fmt: skip

        exact = case(8, 3, 2.0, 6.0)  # where eighths are exact, the ends count
        return [exact, case(int(rng.integers(9, 13)), 4, float(rng.uniform(1.3, 2.7)), float(rng.uniform(5.75, 5.95)))]

    def drive(fn, case: Case) -> Outputs:
        sigmas, scale, weights = (T(case[name]) for name in ("sigmas", "scale", "weights"))
        return arrays(scales=call(fn, sigmas, case["start"], case["end"], scale, weights))

    def reference(sigmas: Tensor, start: float, end: float, scale: Tensor, weights: Tensor) -> Tensor:
        return _table(_inside(sigmas, start, end), scale, weights)

    @mistake(
        "start and end are taken for shares of the *noise*: steps are chosen by sigma / sigmas[0]. They are shares of the steps, whatever their levels are"
    )
    def by_sigma(sigmas, start, end, scale, weights):
        share = 1 - sigmas / sigmas[0]
        return _table((share[:-1] >= start) & (share[1:] <= end), scale, weights)

    @mistake("a step counts as inside by its beginning alone: it must also be over at `end`, (n + 1) / N <= end")
    def by_beginning(sigmas, start, end, scale, weights):
        share = _steps(sigmas)
        return _table((share >= start) & (share < end), scale, weights)

    @mistake("a step that begins exactly at `end` is controlled: it must be over at `end`, (n + 1) / N <= end")
    def beginning_at_the_end(sigmas, start, end, scale, weights):
        share = _steps(sigmas)
        return _table((share >= start) & (share <= end), scale, weights)

    @mistake("a step counts as inside by its end alone: it must not begin before `start`, n / N >= start")
    def by_end(sigmas, start, end, scale, weights):
        share = _steps(sigmas) + 1 / (len(sigmas) - 1)
        return _table((share > start) & (share <= end), scale, weights)

    @mistake("the ends do not count: a step may begin exactly at `start`, and be over exactly at `end`")
    def ends_do_not_count(sigmas, start, end, scale, weights):
        share = _steps(sigmas)
        return _table((share > start) & (share + 1 / (len(sigmas) - 1) < end), scale, weights)

    @mistake("the steps are counted so that the last one begins at 1, n / (N - 1): N steps share the way from 0 to 1, n / N")
    def last_step_at_one(sigmas, start, end, scale, weights):
        share = torch.linspace(0, 1, len(sigmas) - 1).double()
        return _table((share >= start) & (share <= end), scale, weights)

    @mistake("the steps inside and outside are exchanged: control acts *between* start and end")
    def exchanged(sigmas, start, end, scale, weights):
        return _table(~_inside(sigmas, start, end), scale, weights)

    @mistake("all steps count, since each begins after start *or* is over before end; both must hold")
    def either(sigmas, start, end, scale, weights):
        return _table(torch.ones(len(sigmas) - 1), scale, weights)

    @mistake("shares are counted from the last step back, as sigma grows: sampling begins at share 0, with the largest sigma")
    def counted_back(sigmas, start, end, scale, weights):
        return _table(_inside(sigmas, start, end).flip(0), scale, weights)

    @mistake("control never ends: `end` is not used")
    def never_ends(sigmas, start, end, scale, weights):
        return _table(_inside(sigmas, start, 1.0), scale, weights)

    @mistake("control acts from the first step on: `start` is not used")
    def from_the_first(sigmas, start, end, scale, weights):
        return _table(_inside(sigmas, 0.0, end), scale, weights)

    @mistake(
        "scale and weights lie along each other's axes: (N, B, L), with the scale of each sample and the weight of each feature"
    )
    def axes_exchanged(sigmas, start, end, scale, weights):
        return _table(_inside(sigmas, start, end), weights, scale)

    @mistake("scale and weights are added; they multiply, so that a scale of 0 is no control")
    def added(sigmas, start, end, scale, weights):
        return _inside(sigmas, start, end).to(scale)[:, None, None] * (scale[None, :, None] + weights)

    @mistake("all features have the same scale: weights are not used")
    def weights_ignored(sigmas, start, end, scale, weights):
        return _table(_inside(sigmas, start, end), scale, torch.ones_like(weights))

    @mistake("all samples have scale 1: `scale` is not used")
    def scale_ignored(sigmas, start, end, scale, weights):
        return _table(_inside(sigmas, start, end), torch.ones_like(scale), weights)

    @mistake("the weights are divided by their sum: they are no shares of one whole; each feature has its own residual")
    def weights_normalised(sigmas, start, end, scale, weights):
        return _table(_inside(sigmas, start, end), scale, weights / weights.sum())

    @law("a step that is controlled must have scale[b] * weights[l], and one that is not 0: there is something else")
    def two_kinds(case: Case, out: Outputs) -> bool:
        full = case["scale"][:, None] * case["weights"]
        return all(close(row, full) or close(row, 0.0) for row in out["scales"])

    @law("the steps that are controlled are others than those with start <= n / N and (n + 1) / N <= end")
    def right_steps(case: Case, out: Outputs) -> bool:
        on = _inside(T(case["sigmas"]), case["start"], case["end"]).numpy()
        return bool((out["scales"].any((1, 2)) == on).all())
