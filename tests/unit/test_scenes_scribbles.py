"""Sketches of scenes: thickness, wobble and gaps against what they are said to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from course_lib.worlds.scenes import draw, edges, render, scribbles


def level(n: int, size: int = 64) -> Tensor:
    """Drawings of one level line, in the middle."""
    lines = torch.zeros(n, 1, size, size)
    lines[:, :, size // 2] = 1
    return lines


@pytest.mark.parametrize(("size", "thick"), [(64, 2.0), (128, 4.0)])
def test_a_steady_hand_draws_every_line_in_place_two_pixels_thick_at_64(size: int, thick: float) -> None:
    sketch = scribbles(level(1, size), seed=0, wobble=0.0, dropped=0.0)
    # The distance to the line is a whole number and bilinear weights at pixel centres are 0 and 1, to rounding.
    torch.testing.assert_close(sketch.sum(2), torch.full((1, 1, size), thick), atol=1e-3, rtol=0)
    seen = render(draw(8, 0, (1, 2)))
    lines = edges(seen.depth, seen.normal, seen.segmentation)
    sketch = scribbles(seen, seed=0, wobble=0.0, dropped=0.0)
    assert sketch[lines == 1].min() > 1 - 1e-3
    away = torch.nn.functional.max_pool2d(lines, 5, 1, 2) == 0  # over two pixels from every line
    assert sketch[away].max() == 0


def test_the_wobble_is_one_pixel_in_root_mean_square() -> None:
    """The line is where y + f = its place, so its displacement is -f to first order.

    Second order: f changes by 2 pi / 30 px on the way of a pixel, which adds some 4 %; 400 fields know their mean square
    to sqrt(2 / 400) = 7 %, that is 3.5 % of its root; four of these and the bias are 18 %.
    """
    for wobble in (1.0, 0.5):
        sketch = scribbles(level(400), seed=1, wobble=wobble, dropped=0.0)[:, 0]
        rows = torch.arange(64.0)[:, None]
        middle = (sketch * rows).sum(1) / sketch.sum(1)
        assert abs(float((middle - 32).square().mean().sqrt()) / wobble - 1) < 0.18


@pytest.mark.parametrize("dropped", [0.15, 0.5])
def test_the_share_of_line_left_out_is_that_asked_for(dropped: float) -> None:
    """One field says little, its whole line may be in a gap: standard error at most sqrt(p (1 - p) / 400).

    At 0.5 the law of the field is symmetric and the share exact; at 0.15 a sum of six cosines differs from a normal law by
    about 0.01.
    """
    kept = scribbles(level(400), 2, wobble=0.0, dropped=dropped).sum() / (400 * 64 * 2)
    assert abs(1 - float(kept) - dropped) < 4 * math.sqrt(dropped * (1 - dropped) / 400) / 2 + 0.01 * (dropped < 0.5)


def test_a_sketch_depends_on_its_seed_and_number_only() -> None:
    seen = render(draw(6, 3, (1, 2)))
    lines = edges(seen.depth, seen.normal, seen.segmentation)
    whole = scribbles(lines, 5)
    assert torch.equal(whole, scribbles(seen, 5))
    torch.testing.assert_close(scribbles(lines[3:5], 5, first=3), whole[3:5], atol=1e-5, rtol=0)
    assert (scribbles(lines, 6) - whole).abs().amax((1, 2, 3)).min() > 0.5
    same = scribbles(lines[:1].expand(2, -1, -1, -1), 5)
    assert (same[0] - same[1]).abs().max() > 0.5
    assert whole.min() >= 0 and whole.max() <= 1


def test_nothing_to_draw_leaves_the_paper_blank() -> None:
    assert scribbles(torch.zeros(2, 1, 64, 64), 0).max() == 0


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"lines has shape \(1, 3, 8, 8\)"):
        scribbles(torch.zeros(1, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="wobble = -1; expected a number from 0 to 4"):
        scribbles(level(1), 0, wobble=-1)
    with pytest.raises(ValueError, match="dropped = 1.0; expected a number from 0 to 0.99"):
        scribbles(level(1), 0, dropped=1.0)
