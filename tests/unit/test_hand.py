"""Drawings that no renderer made, and photographs: what they show, their size, and ink laid as the canvas lays it."""

import socket
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from course_lib.study.canvas import Drawing, Stroke
from course_lib.worlds import hand
from course_lib.worlds.scenes.attributes import SHAPES, SIZES
from course_lib.worlds.scenes.maps import canny


def test_there_are_fifty_drawings_of_all_shapes_in_both_sizes():
    drawn = hand.sketches()
    assert len(drawn) == 50
    shapes = Counter(shape for one in drawn for _, shape in one.things)
    assert set(shapes) == set(SHAPES) and min(shapes.values()) >= 5
    assert {size for one in drawn for size, _ in one.things} == set(SIZES)
    assert Counter(len(one.things) for one in drawn) == {1: 30, 2: 20}


def test_a_drawing_depends_on_its_number_and_seed_alone():
    assert hand.sketches(7) == hand.sketches(50)[:7]
    assert all(a != b for a, b in zip(hand.sketches(50), hand.sketches(50, seed=14), strict=True))


def test_strokes_replayed_on_the_canvas_give_the_same_ink():
    """The canvas takes float64 and keeps float32, so the two agree to the rounding of a number below 1."""
    for one in hand.sketches(10):
        drawing = Drawing(tuple(Stroke(line, one.brush) for line in one.strokes))
        np.testing.assert_allclose(hand.ink(one)[0].numpy(), drawing.ink(64, 64), atol=2**-23)


@pytest.mark.parametrize("one", hand.sketches(), ids=lambda one: " ".join(shape for _, shape in one.things))
def test_a_drawing_is_thin_lines_on_its_sheet(one):
    ink = hand.ink(one)
    assert ink.shape == (1, 64, 64) and float(ink.min()) == 0 and float(ink.max()) == 1
    assert 2 <= one.brush <= 3
    assert 0.02 < float((ink > 0.5).double().mean()) < 0.25
    points = np.array([point for line in one.strokes for point in line])
    assert points.shape[1] == 2 and np.isfinite(points).all()


def test_the_hand_is_not_exact():
    """Each whole ellipse, drawn in one stroke, misses its own beginning; a machine's would meet it."""
    gaps = []
    for i in range(40):
        pen = hand.Pen(np.random.default_rng(i), (32, 32), 18)
        pen.arc((0, 0), 1, 1)
        first, last = np.array(pen.strokes[0])[[0, -1]]
        gaps.append(np.hypot(*(last - first)))
    assert np.median(gaps) > 1.0  # pixels


def test_points_of_a_stroke_are_about_a_pixel_apart():
    """So that a canvas may replay it: no jump from one stroke to another is inside a stroke."""
    for one in hand.sketches():
        for line in one.strokes:
            steps = [np.hypot(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(line)]
            assert max(steps) < 3 * hand.STEP


def test_ink_of_another_size_is_the_same_drawing():
    one = hand.sketches(1)[0]
    large = torch.nn.functional.avg_pool2d(hand.ink(one, 128), 2)
    assert float((large - hand.ink(one)).abs().mean()) < 0.02
    with pytest.raises(ValueError, match="side = 0; expected a positive number"):
        hand.ink(one, 0)


def test_photos_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("photos asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    pictures = hand.photos()
    assert pictures.shape == (len(hand.PHOTOS), 3, 64, 64)
    assert float(pictures.min()) >= -1 and float(pictures.max()) <= 1
    lines = canny(pictures)
    assert (lines.flatten(1).mean(1) > 0.01).all() and (lines.flatten(1).mean(1) < 0.35).all()


def test_photos_are_the_middle_of_the_pictures():
    """The camera man, 512 pixels wide: blocks of 8, near what a smooth filter makes of them."""
    from PIL import Image

    file = hand.Path(hand.skimage.__file__).parent / "data" / "camera.png"
    blocks = np.asarray(Image.open(file), float).reshape(64, 8, 64, 8).mean((1, 3)) / 127.5 - 1
    found = hand.photos()[hand.PHOTOS.index("camera.png"), 0].numpy()
    assert np.abs(found - blocks).mean() < 0.03


def test_a_photo_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(hand, "PHOTOS", ("nobody.png",))
    with pytest.raises(ValueError, match="came without nobody.png"):
        hand.photos()
