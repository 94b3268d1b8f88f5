"""The canvas: what is marked is under the brush, one value a stroke, and what is seen is what is read."""

import base64
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from course_lib.study import style
from course_lib.study.canvas import Canvas, Drawing
from tests.shown import decode, levels

PICTURE = torch.linspace(-1, 1, 16 * 24).view(1, 16, 24)


def send(canvas, event, *at):
    """What a page sends: coordinates on the screen, of the canvas."""
    if event.startswith("touch"):
        content = {"touches": [{"x": x, "y": y} for x, y in at]}
    else:
        content = {"x": at[0], "y": at[1]} if at else {}
    canvas.surface._handle_frontend_event(canvas.surface, {"event": event, **content}, [])


def painted(canvas):
    """Stand in for the page: the pixels that it has been sent, and how many squares there were in each message."""
    H, W = canvas._size
    page, counts = np.zeros((H, W, 3), np.uint8), []

    def fill(x, y, width, height, colour):
        assert width == height == canvas._scale and not (x % width).any() and not (y % height).any()
        page[y // height, x // width] = colour
        counts.append(len(x))

    canvas.surface.fill_styled_rects = fill
    return page, counts


@pytest.mark.parametrize("brush", [1.0, 2.0, 3.5, 7.0])
def test_a_stroke_marks_the_pixels_whose_centre_is_under_the_brush(brush):
    """Against the distance to many points of the line: 2,000 of them are 0.02 apart, which moves a distance by 1e-4."""
    canvas = Canvas(PICTURE)
    ends = np.array([[3.2, 2.7], [19.1, 9.4], [12.0, 14.2]])
    canvas.stroke(ends, brush)
    share = np.linspace(0, 1, 1000)[:, None]
    line = np.concatenate([ends[0] + share * (ends[1] - ends[0]), ends[1] + share * (ends[2] - ends[1])])
    y, x = np.mgrid[:16, :24] + 0.5
    away = np.hypot(x[..., None] - line[:, 0], y[..., None] - line[:, 1]).min(-1)
    reach = max(brush, math.sqrt(2)) / 2
    expected = np.clip(reach + 0.5 - away, 0, 1)
    assert_close(canvas.scribble[0].double().numpy(), expected, rtol=0, atol=1e-3)
    sure = np.abs(away - reach) > 1e-3
    assert sure.mean() > 0.99 and (canvas.mask.numpy() == (away <= reach))[sure].all()
    assert canvas.mask.shape == (16, 24) and canvas.mask.dtype == torch.bool
    assert canvas.scribble.shape == (1, 16, 24) and canvas.scribble.dtype == torch.float32


def test_the_thinnest_brush_is_one_pixel_wide_and_never_slips_between_centres():
    canvas = Canvas(PICTURE, brush=1.0)
    canvas.stroke([(0.5, 4.5), (23.5, 4.5)])
    assert canvas.mask.sum() == 24 and canvas.mask[4].all()
    for dot in ((5.0, 5.0), (5.5, 5.0), (0.01, 0.01), (23.99, 15.99)):
        canvas.clear()
        canvas.stroke([dot])
        assert canvas.mask[int(dot[1]), int(dot[0])], dot
    canvas.clear()
    canvas.stroke([(1.0, 2.0), (9.0, 10.0)])  # through the corners of pixels alone
    assert all(canvas.mask[k + 2, k + 1] for k in range(8))


def test_strokes_add_up_leave_the_picture_at_its_edge_and_are_cleared():
    canvas = Canvas(PICTURE, brush=3.0)
    canvas.stroke([(-4.0, -4.0), (3.0, 3.0)])
    first = canvas.mask
    canvas.stroke([(20.0, 12.0), (40.0, 12.0)], brush=1.0)
    both = canvas.mask
    assert first[0, 0] and both[12, 23] and bool((both >= first).all()) and both.sum() > first.sum()
    canvas.stroke([(-9.0, 30.0)])
    assert torch.equal(canvas.mask, both)
    canvas.clear()
    assert not canvas.mask.any() and not canvas.scribble.any()


def test_the_mouse_draws_and_a_stroke_that_ends_is_one_change():
    canvas, told = Canvas(PICTURE, brush=2.0), []
    canvas.observe(lambda change: told.append(canvas.mask), names="value")
    scale = canvas._scale
    send(canvas, "mouse_move", 40, 40)  # no button is pressed
    send(canvas, "mouse_up", 40, 40)
    assert not canvas.mask.any() and told == []
    for event, x in (("mouse_down", 2), ("mouse_move", 6), ("mouse_move", 9), ("mouse_up", 12)):
        send(canvas, event, x * scale, 5 * scale)
    send(canvas, "mouse_move", 20 * scale, 12 * scale)
    assert len(told) == 1 and torch.equal(told[0], canvas.mask)
    other = Canvas(PICTURE, brush=2.0)
    other.stroke([(2, 5), (12, 5)])
    assert torch.equal(canvas.mask, other.mask) and canvas.mask.any()

    send(canvas, "mouse_down", 5 * scale, 9 * scale)  # dragged out, and released where the page does not say
    send(canvas, "mouse_out", 5 * scale, 16.5 * scale)
    assert len(told) == 2 and canvas.mask[15, 5]
    send(canvas, "mouse_move", 20 * scale, 12 * scale)
    assert not canvas.mask[12, 20] and len(told) == 2
    canvas.eraser.click()
    assert len(told) == 3 and canvas.value == Drawing()


def test_a_finger_draws_as_the_mouse_does():
    drawn = []
    for begin, move, end in (("mouse_down", "mouse_move", "mouse_up"), ("touch_start", "touch_move", "touch_end")):
        canvas = Canvas(PICTURE)
        touch = begin.startswith("touch")
        for event, at in ((begin, (30, 30)), (move, (90, 60))):
            send(canvas, event, *([at] if touch else at))
        send(canvas, end, *([] if touch else (90, 60)))
        assert len(canvas.value.strokes) == 1
        drawn.append(canvas.mask)
    assert torch.equal(*drawn) and drawn[0].any()


def test_a_drawing_can_be_kept_and_set_again():
    canvas = Canvas(PICTURE)
    canvas.stroke([(3, 3), (9, 3)])
    kept, mask = canvas.value, canvas.mask
    canvas.stroke([(12, 12)], brush=5)
    assert canvas.value != kept and hash(canvas.value) != hash(kept)
    canvas.value = kept
    assert torch.equal(canvas.mask, mask)
    assert torch.equal(torch.from_numpy(kept.ink(16, 24)), canvas.scribble[0])


def test_the_page_shows_what_is_read():
    """It is sent nothing before it asks, then all, then what changes."""
    canvas = Canvas(PICTURE)
    page, counts = painted(canvas)
    canvas.stroke([(4, 4)])
    assert counts == []
    send(canvas, "client_ready")
    assert counts == [16 * 24]
    for draw in (lambda: canvas.stroke([(9, 9), (14, 2)]), canvas.clear, lambda: setattr(canvas, "picture", PICTURE.flip(2))):
        draw()
        seen = decode(canvas.poster())[:: canvas._scale, :: canvas._scale]
        assert np.abs(page.astype(int) - seen).max() <= 2  # a poster has a palette
        clean = levels(canvas.picture)
        changed = (np.abs(page.astype(int) - clean) > 2).any(-1)
        assert (changed == canvas.mask.numpy()).all()
    assert max(counts[1:-1]) < 100
    send(canvas, "client_ready")
    assert counts[-1] == 16 * 24

    colour = np.array([int(style.COLOURS["guide"][k : k + 2], 16) for k in (1, 3, 5)])
    canvas.stroke([(4, 4)])
    dark = levels(canvas.picture)[3, 3]
    assert np.abs(page[3, 3] - dark).sum() > 100 and np.abs(page[3, 3] - colour).sum() < 300


def test_white_paper_shows_black_ink():
    canvas = Canvas(size=(32, 32))
    assert canvas.picture is None and (decode(canvas.poster()) == 255).all() and decode(canvas.poster()).shape == (320, 320, 3)
    canvas.stroke([(4, 16), (28, 16)], brush=4)
    seen = decode(canvas.poster())[5::10, 5::10, 0]
    assert np.abs(seen / 255 - (1 - canvas.scribble[0].numpy())).max() < 0.02
    assert seen[16, 16] == 0


def test_the_display_holds_the_canvas_and_a_poster():
    canvas = Canvas(PICTURE.expand(3, -1, -1))
    canvas.stroke([(4, 4)])
    bundle = canvas._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == canvas.model_id
    assert base64.b64decode(bundle["image/png"]) == canvas.poster()
    assert bundle["text/plain"] == "Canvas(16 x 24 pixels, Drawing of 1 stroke)"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"picture has shape \(16, 24\); expected \(1, H, W\) or \(3, H, W\)"):
        Canvas(PICTURE[0])
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="brush = .*; expected a positive diameter"):
            Canvas(PICTURE, brush=wrong)
    with pytest.raises(ValueError, match=r"size = \(0, 5\), side = 320; expected positive"):
        Canvas(size=(0, 5))
    canvas = Canvas(PICTURE)
    with pytest.raises(ValueError, match=r"picture has shape \(1, 24, 16\); expected 16 x 24 pixels"):
        canvas.picture = PICTURE.mT
    for points in ([], [(1, 2, 3)], [(math.nan, 2)], (1, 2)):
        with pytest.raises(ValueError, match="points = .*; expected at least one pair"):
            canvas.stroke(points)
    with pytest.raises(ValueError, match="brush = 0; expected"):
        canvas.stroke([(1, 1)], brush=0)
    assert canvas.value == Drawing()
