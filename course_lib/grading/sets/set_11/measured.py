"""Item 11.9: how much a clip flickers, and how far it is from its own flow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, named
from course_lib.video.measures import warp as look_up

Look = Callable[[Tensor, Tensor], Tensor]
UNIT = math.sqrt(math.pi / 12)
"""1 / (sqrt(6) sqrt(2 / pi)): what makes the mean size of a second difference of Gaussian noise its deviation."""
LINEAR, FROZEN = 1, 2


def _second(clips: Tensor) -> Tensor:
    """x_(k+1) - 2 x_k + x_(k-1)."""
    return clips[:, 2:] - 2 * clips[:, 1:-1] + clips[:, :-2]


def _size(differences: Tensor) -> Tensor:
    """The mean size of each clip's, (N,)."""
    return differences.abs().flatten(1).mean(1)


def _flicker(clips: Tensor) -> Tensor:
    return UNIT * _size(_second(clips))


def _along(clips: Tensor, flow: Tensor, warp: Look) -> Tensor:
    """x_(k+1)(p + flow_k(p)) - x_k(p), (N, F - 1, C, H, W)."""
    found = warp(clips[:, 1:].flatten(0, 1), flow.flatten(0, 1))
    return found.view_as(clips[:, 1:]) - clips[:, :-1]


def _over(values: Tensor, where: Tensor) -> Tensor:
    """The mean of values (N, F - 1, 1, H, W) over where they count, (N,)."""
    return (values * where).flatten(1).sum(1) / where.flatten(1).sum(1)


def _error(clips: Tensor, flow: Tensor, visible: Tensor, warp: Look) -> Tensor:
    return _over(_along(clips, flow, warp).abs().mean(2, keepdim=True), visible)


@item(
    "11.9", title="Flicker and warping error", function="coherence", points=2, minutes=20, difficulty=2,
    answers=(
        "course_lib.video.measures.flicker", "course_lib.video.measures.warp_error", "course_lib.video.measures.still_flicker",
    ),
    hints=(
        "Second differences along the axis of frames: clips.diff(n=2, dim=1). Sizes, then the mean of each clip: .abs().flatten(1).mean(1), times sqrt(pi / 12).",
        "warp takes frames, so fold: warp(clips[:, 1:].flatten(0, 1), flow.flatten(0, 1)) looks the *next* frame up where each pixel went; compare with clips[:, :-1].",
        "Mean over the channels first, (N, F - 1, 1, H, W); then the sum over visible pixels divided by their number, clip by clip.",
    ),
)  # fmt: skip
class Measured:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(N: int, F: int, H: int, W: int) -> Case:
            """The clips LINEAR and FROZEN are what they are called, all others drawn."""
            clips, step = rng.normal(size=(N, F, 3, H, W)), rng.normal(size=(3, H, W))
            clips[LINEAR] = clips[LINEAR, :1] + np.arange(F).reshape(F, 1, 1, 1) * step
            clips[FROZEN] = clips[FROZEN, :1]
            flow = rng.uniform(-1.5, 1.5, (N, F - 1, 2, H, W))
            flow[FROZEN] = 0.0
            return {"clips": clips, "flow": flow, "visible": rng.uniform(size=(N, F - 1, 1, H, W)) < 0.6}

        return [case(4, 5, 4, 5), case(3, 4, 5, 3)]

    def drive(fn, case: Case) -> Outputs:
        given = (T(case[name]) for name in ("clips", "flow", "visible"))
        return arrays(**named(call(fn, *given, look_up), "flicker", "error"))

    def reference(clips: Tensor, flow: Tensor, visible: Tensor, warp: Look) -> tuple[Tensor, Tensor]:
        return _flicker(clips), _error(clips, flow, visible, warp)

    @mistake("these are *first* differences: everything that moves at all counts as flicker; x_(k+1) - 2 x_k + x_(k-1)")
    def first_difference(clips, flow, visible, warp):
        return UNIT * _size(clips.diff(dim=1)), _error(clips, flow, visible, warp)

    @mistake(
        "the second differences are taken between frames two apart, x_(k+2) - x_k: that is motion again; x_(k+1) - 2 x_k + x_(k-1)"
    )
    def two_apart(clips, flow, visible, warp):
        return UNIT * _size(clips[:, 2:] - clips[:, :-2]), _error(clips, flow, visible, warp)

    @mistake("the middle frame counts once, x_(k+1) - x_k + x_(k-1): that is no difference, and not 0 for a frozen clip; -2 x_k")
    def middle_once(clips, flow, visible, warp):
        return UNIT * _size(_second(clips) + clips[:, 1:-1]), _error(clips, flow, visible, warp)

    @mistake("the differences are taken along the *channels*, axis 2: a clip is (N, F, 3, H, W), and frames are axis 1")
    def along_channels(clips, flow, visible, warp):
        return UNIT * _size(clips.diff(n=2, dim=2)), _error(clips, flow, visible, warp)

    @mistake("the clip is closed to a ring: its first frame follows its last, as torch.roll makes it; only true neighbours count")
    def as_a_ring(clips, flow, visible, warp):
        return UNIT * _size(clips.roll(-1, 1) - 2 * clips + clips.roll(1, 1)), _error(clips, flow, visible, warp)

    @mistake("differences of either sign cancel: it is their *size* that is averaged")
    def no_sizes(clips, flow, visible, warp):
        return UNIT * _second(clips).flatten(1).mean(1), _error(clips, flow, visible, warp)

    @mistake(
        "this is a root mean square, over sqrt(6): for Gaussian flicker the same, but a few edges that pass weigh more; mean sizes"
    )
    def root_mean_square(clips, flow, visible, warp):
        return (_second(clips).square().flatten(1).mean(1) / 6).sqrt(), _error(clips, flow, visible, warp)

    @mistake("the factor sqrt(pi / 12) is missing: a flicker of deviation s would be measured as 1.95 s")
    def no_unit(clips, flow, visible, warp):
        return _size(_second(clips)), _error(clips, flow, visible, warp)

    @mistake("the factor is 1 / sqrt(6) alone: the *mean size* of a Gaussian is sqrt(2 / pi) of its deviation, so sqrt(pi / 12)")
    def deviation_of_sizes(clips, flow, visible, warp):
        return _size(_second(clips)) / 6**0.5, _error(clips, flow, visible, warp)

    @mistake(
        "the factor is turned, sqrt(12 / pi): it makes a mean size to a deviation, and the second difference is larger than both"
    )
    def unit_turned(clips, flow, visible, warp):
        return _size(_second(clips)) / UNIT, _error(clips, flow, visible, warp)

    @mistake("all clips get one number, their mean; each has its own")
    def one_for_all(clips, flow, visible, warp):
        return _flicker(clips).mean().expand(len(clips)), _error(clips, flow, visible, warp).mean().expand(len(clips))

    @mistake(
        "the flow is used backwards: it leads from frame k to k + 1, so frame k + 1 is looked up at p + flow(p), and compared with frame k at p"
    )
    def flow_backwards(clips, flow, visible, warp):
        found = warp(clips[:, :-1].flatten(0, 1), flow.flatten(0, 1)).view_as(clips[:, 1:])
        return _flicker(clips), _over((found - clips[:, 1:]).abs().mean(2, keepdim=True), visible)

    @mistake("the flow has the other sign: a pixel is seen again at p + flow(p), and warp looks there")
    def flow_turned(clips, flow, visible, warp):
        return _flicker(clips), _error(clips, -flow, visible, warp)

    @mistake("the flow is not used: what moves counts as an error; look frame k + 1 up where each pixel went")
    def no_flow(clips, flow, visible, warp):
        return _flicker(clips), _error(clips, 0 * flow, visible, warp)

    @mistake("pixels that are not seen in the next frame count too: they cannot be found there; mean over visible ones")
    def all_pixels(clips, flow, visible, warp):
        return _flicker(clips), _error(clips, flow, torch.ones_like(visible), warp)

    @mistake("the mean is over pixels that are *not* seen in the next frame; over the visible ones")
    def hidden_pixels(clips, flow, visible, warp):
        return _flicker(clips), _error(clips, flow, ~visible, warp)

    @mistake(
        "hidden pixels are set to 0 and still counted: a clip with much hidden looks better; divide by the number of visible ones"
    )
    def counted_all(clips, flow, visible, warp):
        size = _along(clips, flow, warp).abs().mean(2, keepdim=True)
        return _flicker(clips), (size * visible).flatten(1).mean(1)

    @mistake("the three channels are summed and counted as one, three times too much: their mean first, or divide by 3")
    def channels_summed(clips, flow, visible, warp):
        return _flicker(clips), 3 * _error(clips, flow, visible, warp)

    @mistake("the error is that of *squares*; absolute differences are asked for, in units of the picture")
    def squares(clips, flow, visible, warp):
        return _flicker(clips), _over(_along(clips, flow, warp).square().mean(2, keepdim=True), visible)

    @law("a clip whose pixels change linearly with time must have no flicker")
    def linear_is_none(case: Case, out: Outputs) -> bool:
        return close(out["flicker"][LINEAR], 0.0)

    @law("a frozen clip must have neither flicker nor, with a flow of 0, an error")
    def frozen_is_none(case: Case, out: Outputs) -> bool:
        return close(out["flicker"][FROZEN], 0.0) and close(out["error"][FROZEN], 0.0)

    @law("both are means of sizes: none may be below 0")
    def not_negative(case: Case, out: Outputs) -> bool:
        return bool((out["flicker"] > -1e-9).all() and (out["error"] > -1e-9).all())

    @law("the flicker is not the mean size of the second differences along time, times sqrt(pi / 12)")
    def flicker_fits(case: Case, out: Outputs) -> bool:
        return close(out["flicker"], _flicker(T(case["clips"])).numpy())
