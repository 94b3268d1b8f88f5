"""Item 13.8: whether a picture has the lines that were asked for."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T


def _near(lines: Tensor, reach: int) -> Tensor:
    """Where a line is at most `reach` away along each axis."""
    return F.max_pool2d(lines.double(), 2 * reach + 1, 1, reach) > 0


def _count(lines: Tensor) -> Tensor:
    """Pixels of lines in each picture, (N,)."""
    return lines.flatten(1).sum(1).double()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """The share of the pixels of `whole` that are in `part`, 0 where there are none."""
    return _count(part & whole) / _count(whole).clamp_min(1)


def _harmonic(a: Tensor, b: Tensor) -> Tensor:
    return 2 * a * b / (a + b).clamp_min(1e-12)


def _or_one(f1: Tensor, found: Tensor, asked: Tensor) -> Tensor:
    """1 where both drawings are empty."""
    return torch.where((found | asked).flatten(1).any(1), f1, 1.0)


def _f1(found: Tensor, asked: Tensor, near) -> Tensor:
    """The F1 with this notion of nearness."""
    return _or_one(_harmonic(_share(near(asked), found), _share(near(found), asked)), found, asked)


def _drawn(rng: np.random.Generator, N: int, side: int, reach: int) -> Case:
    """Line drawings, and the same shifted, with parts missing and others added; the last three have empty ones among them."""
    asked = np.zeros((N, 1, side, side), bool)
    for picture in asked[:, 0]:
        picture[rng.integers(1, side - 1), 1:-2] = True
        picture[2:-1, rng.integers(1, side - 1)] = True
    found = np.roll(asked, (reach, int(rng.integers(0, reach + 1))), (2, 3)) & (rng.random(asked.shape) < 0.8)
    found |= rng.random(asked.shape) < 0.06
    found[-3], asked[-3] = False, False
    found[-2], asked[-1] = False, False
    return {"found": found, "asked": asked, "reach": reach}


@item(
    "13.8", title="Are the lines where they were asked for?", function="edge_f1", points=2, minutes=20, difficulty=2,
    answers=("course_lib.zoo.map_judge.edge_f1", "course_lib.zoo.map_judge.errors"),
    hints=(
        "near(lines) marks all pixels that have a line within reach: F.max_pool2d(lines.double(), 2 * reach + 1, 1, reach) > 0.",
        "Precision: of the lines *found*, the share that lies near an asked one, (near(asked) & found) over found. Recall: of those *asked*, the share that lies near a found one.",
        "Sum over (1, 2, 3) for each picture, with clamp_min(1) below; F1 = 2 P R / (P + R), with a small number for 0 / 0; then 1 where both drawings are empty.",
    ),
)  # fmt: skip
class EdgeF1:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [_drawn(rng, 6, 12, 1), _drawn(rng, 5, 16, 2)]

    def drive(fn, case: Case) -> Outputs:
        found, asked = T(case["found"]), T(case["asked"])
        pair = {"f1": call(fn, found, asked, case["reach"]), "exchanged": call(fn, asked, found, case["reach"])}
        return {name: np.nan_to_num(value, nan=-1.0) for name, value in arrays(**pair).items()}

    def reference(found: Tensor, asked: Tensor, reach: int) -> Tensor:
        return _f1(found, asked, lambda lines: _near(lines, reach))

    @mistake("a line must be hit to the pixel: `reach` is not used")
    def to_the_pixel(found, asked, reach):
        return _f1(found, asked, lambda lines: lines)

    @mistake("the window of the tolerance has the side 2 reach - 1: from -reach to reach there are 2 reach + 1 pixels")
    def window_too_small(found, asked, reach):
        return _f1(found, asked, lambda lines: _near(lines, reach - 1))

    @mistake("the window of the tolerance has the side 4 reach + 1: from -reach to reach there are 2 reach + 1 pixels")
    def window_too_large(found, asked, reach):
        return _f1(found, asked, lambda lines: _near(lines, 2 * reach))

    @mistake("the tolerance is a diamond: reach counts along each axis, so that the neighbourhood is a square, corners included")
    def diamond(found, asked, reach):
        def near(lines):
            for _ in range(reach):
                across, down = (F.max_pool2d(lines.double(), size, 1, (size[0] // 2, size[1] // 2)) for size in ((1, 3), (3, 1)))
                lines = (across + down) > 0
            return lines

        return _f1(found, asked, near)

    @mistake("this is the precision alone: a picture with one right pixel of a line has 1; what is missing must cost as well")
    def precision_alone(found, asked, reach):
        return _or_one(_share(_near(asked, reach), found), found, asked)

    @mistake("this is the recall alone: a picture that is all lines has 1; what is too much must cost as well")
    def recall_alone(found, asked, reach):
        return _or_one(_share(_near(found, reach), asked), found, asked)

    @mistake("precision and recall are averaged; F1 is their harmonic mean, which is near 0 where one of them is")
    def arithmetic_mean(found, asked, reach):
        mean = (_share(_near(asked, reach), found) + _share(_near(found, reach), asked)) / 2
        return _or_one(mean, found, asked)

    @mistake("this is the root of their product, the geometric mean; F1 is 2 P R / (P + R)")
    def geometric_mean(found, asked, reach):
        mean = (_share(_near(asked, reach), found) * _share(_near(found, reach), asked)).sqrt()
        return _or_one(mean, found, asked)

    @mistake("the factor 2 is missing in 2 P R / (P + R): a perfect drawing would have one half")
    def half(found, asked, reach):
        near = lambda lines: _near(lines, reach)
        return _or_one(_f1(found, asked, near) / 2, found, asked)

    @mistake(
        "the wrong drawing is widened: precision asks of each pixel *found* whether an asked one is near, so the asked lines are widened; in recall the found ones"
    )
    def wrong_one_widened(found, asked, reach):
        def share(part, whole):
            return _count(part) / _count(whole).clamp_min(1)

        precision, recall = share(_near(found, reach) & asked, found), share(_near(asked, reach) & found, asked)
        return _or_one(_harmonic(precision, recall), found, asked)

    @mistake("both drawings are widened, and then compared to the pixel: thick lines meet too easily, and their own width counts")
    def both_widened(found, asked, reach):
        return _f1(_near(found, reach), _near(asked, reach), lambda lines: lines)

    @mistake("this is intersection over union: a measure of areas; a line a pixel beside the other has 0")
    def over_union(found, asked, reach):
        return _or_one(_count(found & asked) / _count(found | asked).clamp_min(1), found, asked)

    @mistake(
        "this is the share of *all* pixels that agree: nearly all are empty in both, so that an empty picture would be nearly perfect"
    )
    def accuracy(found, asked, reach):
        return _share(found == asked, torch.ones_like(found))

    @mistake("the counts of all pictures are put together: pictures with many lines rule; each picture has an F1 of its own")
    def pooled(found, asked, reach):
        def share(part, whole):
            return (part & whole).sum() / whole.sum().clamp_min(1)

        f1 = _harmonic(share(_near(asked, reach), found), share(_near(found, reach), asked))
        return f1.expand(len(found))

    @mistake("where nothing was asked for and nothing is found the answer is 0, or 0 / 0: that is a perfect picture, 1")
    def nothing_is_wrong(found, asked, reach):
        return _harmonic(_share(_near(asked, reach), found), _share(_near(found, reach), asked))

    @mistake(
        "where one drawing is empty the answer is 1: that is right only where both are; lines that are missing, or too much, are errors"
    )
    def one_empty_is_right(found, asked, reach):
        both = found.flatten(1).any(1) & asked.flatten(1).any(1)
        return torch.where(both, _f1(found, asked, lambda lines: _near(lines, reach)), 1.0)

    @mistake("this is the control *error*, 1 - F1; return F1")
    def error(found, asked, reach):
        return 1 - _f1(found, asked, lambda lines: _near(lines, reach))

    @law("some values are not finite: where a drawing is empty a share is 0 / 0; clamp the count, and the sum of P and R")
    def finite(case: Case, out: Outputs) -> bool:
        return bool((out["f1"] >= 0).all())

    @law("F1 lies between 0 and 1")
    def in_range(case: Case, out: Outputs) -> bool:
        return bool((out["f1"] <= 1 + 1e-9).all())

    @law(
        "where both drawings are empty F1 is 1, and where one is, it is 0: nothing that was asked for is there, or nothing of what is there was asked for"
    )
    def empty_drawings(case: Case, out: Outputs) -> bool:
        return close(out["f1"][-3:], [1, 0, 0])

    @law("when what is found and what was asked for are exchanged, precision and recall are too, and F1 stays the same")
    def symmetric(case: Case, out: Outputs) -> bool:
        return close(out["f1"], out["exchanged"])
