"""Item 11.1: a convolution over space as one over time and space that starts as it, frame by frame."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T


def _taps(W: Tensor, shares: Tensor) -> Tensor:
    """(O, I, k, k) and a share for each tap (kt,) -> (O, I, kt, k, k)."""
    return shares.to(W)[:, None, None] * W[:, :, None]


def _at(kt: int, place: int) -> Tensor:
    """All of the kernel at one tap."""
    return torch.eye(kt, dtype=torch.float64)[place]


@item(
    "11.1", title="Inflate a convolution", function="inflate", points=1, minutes=10, difficulty=1,
    answers=("course_lib.nets.temporal.inflate_conv", "course_lib.nets.temporal.TimeConv"),
    hints=(
        "A convolution over time adds what its kt taps see in kt neighbouring frames. To see its own frame alone, all taps but one must be 0.",
        "With a padding of kt // 2 on either side, tap kt // 2 stands on the frame itself.",
        "inflated = W.new_zeros(*W.shape[:2], kt, *W.shape[2:]); inflated[:, :, kt // 2] = W.",
    ),
)  # fmt: skip
class InflatedConvolution:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(k: int, kt: int, outputs: int) -> Case:
            return {"W": rng.normal(size=(outputs, 2, k, k)), "kt": kt, "clip": rng.normal(size=(1, 2, 6, 5, 6))}

        return [case(3, 3, 3), case(5, 5, 2), case(3, 5, 2)]

    def drive(fn, case: Case) -> Outputs:
        W, kt = T(case["W"]), case["kt"]
        out = arrays(weight=call(fn, W, kt))
        if out["weight"].ndim == 5 and out["weight"].shape[:2] == tuple(W.shape[:2]):
            padding = kt // 2, W.shape[-1] // 2, W.shape[-1] // 2
            out["y"] = F.conv3d(T(case["clip"]), T(out["weight"]), padding=padding).numpy()
        return out

    def reference(W: Tensor, kt: int) -> Tensor:
        return _taps(W, _at(kt, kt // 2))

    @mistake("every tap is the whole kernel: a frame then gets the sum of its neighbours, kt times too much; one tap alone is W")
    def every_tap(W, kt):
        return _taps(W, torch.ones(kt))

    @mistake(
        "every tap is W / kt, a moving average over time: that is the image model on a frozen clip alone, and away from its ends; moving things blur. One tap is W, the others 0"
    )
    def moving_average(W, kt):
        return _taps(W, torch.ones(kt) / kt)

    @mistake("the taps are W / sqrt(kt), which keeps the variance of independent frames; but frames get mixed. One tap is W")
    def variance_kept(W, kt):
        return _taps(W, torch.ones(kt) / kt**0.5)

    @mistake(
        "W stands in the first tap: padded by kt // 2 on either side, that sees the frame kt // 2 *before*; the clip is delayed"
    )
    def first_tap(W, kt):
        return _taps(W, _at(kt, 0))

    @mistake(
        "W stands in the last tap: padded by kt // 2 on either side, that sees the frame kt // 2 *after*; the clip runs ahead"
    )
    def last_tap(W, kt):
        return _taps(W, _at(kt, -1))

    @mistake("W stands in tap 1, which is the middle of three only; the middle of kt is kt // 2")
    def tap_one(W, kt):
        return _taps(W, _at(kt, 1))

    @mistake("W stands one tap before the middle: taps count from 0, and the middle is number kt // 2")
    def counted_from_one(W, kt):
        return _taps(W, _at(kt, kt // 2 - 1))

    @mistake("the middle tap is W / kt, as if it were one of kt alike; the others are 0, so it carries all of W")
    def middle_divided(W, kt):
        return _taps(W, _at(kt, kt // 2) / kt)

    @mistake(
        "the taps fall off to both sides, a smoothing over time: neighbouring frames shine through. All but the middle are 0"
    )
    def smoothed(W, kt):
        hat = 1 - (torch.arange(kt, dtype=torch.float64) - kt // 2).abs() / (kt // 2 + 1)
        return _taps(W, hat / hat.sum())

    @mistake(
        "all taps are 0: that is the start of something which is *added* to the image model; here the convolution itself goes on"
    )
    def zeros(W, kt):
        return _taps(W, torch.zeros(kt))

    @mistake("the time axis is the last one: this convolves frames with rows of pixels; it stands before the two axes of space")
    def time_last(W, kt):
        return _taps(W, _at(kt, kt // 2)).movedim(2, -1)

    @mistake("the time axis stands between rows and columns; it comes before both, (O, I, kt, k, k)")
    def time_between(W, kt):
        return _taps(W, _at(kt, kt // 2)).movedim(2, 3)

    @mistake("rows and columns are exchanged: the kernel is transposed in space")
    def space_transposed(W, kt):
        return _taps(W.mT, _at(kt, kt // 2))

    @mistake("the kernel is turned by 180 degrees: torch's convolutions do not flip it, neither over two axes nor over three")
    def turned(W, kt):
        return _taps(W.flip(-2, -1), _at(kt, kt // 2))

    @law("at tap kt // 2 must stand W itself")
    def middle_is_W(case: Case, out: Outputs) -> bool:
        return close(out["weight"][:, :, case["kt"] // 2], case["W"])

    @law("a frame sees others: with zeros around a clip, each frame's result must be that of the 2-D convolution of it alone")
    def frame_by_frame(case: Case, out: Outputs) -> bool:
        frames = T(case["clip"])[0].movedim(1, 0)
        alone = F.conv2d(frames, T(case["W"]), padding=case["W"].shape[-1] // 2).movedim(0, 1)
        return close(out["y"][0], alone.numpy())
