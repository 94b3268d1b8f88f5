"""The explorer of the scene world: the scene that the controls say, its picture and its exact maps."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest
import torch

from course_lib.study.scenes import ANGLES, CHOICES, DEPTHS, SEGMENTS, START, SceneExplorer, scene
from course_lib.worlds.scenes import captions, edges, render
from course_lib.worlds.scenes.attributes import RELATIONS, SHAPES, SIZES, VIEWS
from course_lib.worlds.scenes.sampling import gaps, margins, relations, views
from course_lib.worlds.scenes.tracing import FAR
from tests.shown import REDRAW, SLACK, crop, decode, inside_and_apart, levels, seconds

# --- scenes -----------------------------------------------------------------------------------------------------------


def test_a_scene_has_the_attributes_that_are_asked():
    made = scene(**{**START, "shape": "house", "colour": "cyan", "size": "small", "ground": "sand", "light": "front"})
    assert captions(made, None) == ["a small cyan house, seen from the front, on sand, lit from the front"]
    assert (float(made.azimuth), float(made.elevation), float(made.yaw)) == (START["azimuth"], START["elevation"], 0)
    assert made.shape.shape == (1, 1)


def test_the_turn_of_the_object_and_the_way_of_the_camera_change_the_side_that_is_seen():
    for azimuth, turn in itertools.product((0, 90, 180, 270), (0, 90, 180, 270)):
        side = views(scene(**{**START, "azimuth": azimuth, "turn": turn}))[0, 0]
        assert VIEWS[side] == VIEWS[(azimuth - turn) // 90 % 4]


@pytest.mark.parametrize("azimuth", [0.0, START["azimuth"]])
@pytest.mark.parametrize("second", RELATIONS)
def test_the_relation_is_the_one_of_the_menu_from_azimuth_0_and_at_the_start(second, azimuth):
    for size in SIZES:
        made = scene(**{**START, "second": second, "size": size, "azimuth": azimuth})
        assert RELATIONS[relations(made)[0]] == second
        assert f"a {size} red car, seen from the front, {second} a large blue cube" in captions(made, None)[0]


def test_the_objects_stay_while_the_camera_goes_round_and_their_relation_turns():
    made = [scene(**{**START, "second": "left of", "azimuth": azimuth}) for azimuth in (0, 90, 180, 270)]
    assert all(torch.equal(one.position, made[0].position) for one in made)
    assert [RELATIONS[relations(one)[0]] for one in made] == ["left of", "behind", "right of", "in front of"]


@pytest.mark.parametrize("second", CHOICES["second"])
def test_objects_fit_the_picture_and_do_not_meet(second):
    """The ball around a shape does, at every corner of the sliders; shapes differ in the height of its centre alone."""
    elevations = (*ANGLES["elevation"], 25.0)
    for shape, size, azimuth, elevation in itertools.product(SHAPES, SIZES, range(0, 360, 30), elevations):
        made = scene(**{**START, "shape": shape, "size": size, "azimuth": azimuth, "elevation": elevation, "second": second})
        assert float(margins(made).min()) > 0 and float(gaps(made)) > 0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"shape": "teapot"}, "shape = 'teapot'; expected one of sphere, cube, "),
        ({"colour": "mauve"}, "colour = 'mauve'; expected one of red, orange, "),
        ({"size": "tiny"}, "size = 'tiny'; expected one of small, large"),
        ({"ground": "snow"}, "ground = 'snow'; expected one of grey, "),
        ({"light": "back"}, "light = 'back'; expected one of left, right, front"),
        ({"second": "under"}, "second = 'under'; expected one of none, left of, "),
        ({"azimuth": 361.0}, r"azimuth = 361.0; expected degrees from 0 to 360"),
        ({"elevation": 5.0}, r"elevation = 5.0; expected degrees from 10 to 40"),
        ({"turn": float("nan")}, r"turn = nan; expected degrees from 0 to 360"),
    ],
)
def test_values_outside_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        scene(**{**START, **values})
    with pytest.raises(ValueError, match=message):
        SceneExplorer(**values)


# --- SceneExplorer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes_shown():
    return SceneExplorer()


@pytest.fixture
def shown(scenes_shown):
    """The explorer at its first values."""
    for name, value in START.items():
        scenes_shown.controls[name].value = value
    return scenes_shown


def test_the_pictures_are_those_of_the_world_by_whole_screen_pixels(shown):
    values = {**START, "second": "left of", "ground": "checkered", "elevation": 15.0}
    for name, value in values.items():
        shown.controls[name].value = value
    made, seen = scene(**values), shown.poster()
    assert np.array_equal(crop(seen, 10, 30, 384), levels(render(made, 128).rgb[0], 3))

    maps = render(made, 96)
    things = maps.segmentation[0, 0].numpy() + 1
    assert set(things.flatten()) == {0, 1, 2, 3}
    assert np.array_equal(shown._segments.get_array(), matplotlib.colors.to_rgba_array(SEGMENTS)[things][..., :3])
    lines = edges(maps.depth, maps.normal, maps.segmentation)
    assert np.array_equal(crop(seen, 698, 248, 192), levels(2 * lines[0] - 1, 2))

    # A direction is a colour, (n + 1) / 2, to the nearest of 255 levels; matplotlib rounds down.
    normals = crop(seen, 698, 30, 192)[::2, ::2] / 127.5 - 1
    assert np.abs(normals - maps.normal[0].permute(1, 2, 0).numpy())[things > 0].max() <= 1 / 127.5 + 1e-6

    # The colours of depth are those of the scale beside it, and there is none where there is no surface.
    depth = shown._depth.get_array()
    assert np.array_equal(depth.mask, things == 0) and np.array_equal(depth.data, maps.depth[0, 0].numpy())
    scale = decode(seen)[30 : 30 + 192, 424 + 192 + 8 + 6].astype(int)
    at = ((maps.depth[0, 0].numpy().clip(*DEPTHS) - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]) * 191).round().astype(int)
    colours = crop(seen, 424, 30, 192)[::2, ::2].astype(int)
    assert np.abs(colours - scale[at])[things > 0].max() <= 4, "one of 192 levels is at most 4 of 255 in viridis"
    assert (np.abs(colours - 0xD9)[things == 0] == 0).all()


def test_no_depth_lies_before_the_scale():
    near = [
        render(scene(**{**START, "shape": shape, "elevation": elevation, "azimuth": azimuth, "second": second}), 24).depth.min()
        for shape, elevation, azimuth, second in itertools.product(
            ("snowman", "car"), ANGLES["elevation"], (0.0, 90.0), CHOICES["second"]
        )
    ]
    assert DEPTHS[0] < float(min(near)) < DEPTHS[0] + 0.5 and DEPTHS[1] < FAR


CHANGES = {
    "shape": "mug", "colour": "green", "size": "small", "ground": "sand", "light": "right", "second": "behind",
    "azimuth": 130.0, "elevation": 12.0, "turn": 180.0,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_each_control_changes_the_picture_and_back(shown, name):
    before = shown.poster()
    shown.controls[name].value = CHANGES[name]
    assert shown.message.value == "" and shown.poster() != before
    large = crop(shown.poster(), 10, 30, 384)
    assert np.array_equal(large, levels(render(scene(**{**START, name: CHANGES[name]}), 128).rgb[0], 3))
    shown.controls[name].value = START[name]
    assert shown.poster() == before


def test_the_caption_and_the_side_are_below(shown):
    assert shown._caption.get_text() == "a large red car, seen from the front, on grass, lit from the left"
    assert shown._view.get_text() == "view: front"
    shown.controls["turn"].value = 180.0
    assert "seen from the back" in shown._caption.get_text() and shown._view.get_text() == "view: back"
    shown.controls["shape"].value, shown.controls["second"].value = "cone", "right of"
    assert shown._caption.get_text().replace("\n", " ") == captions(scene(**shown.values), None)[0]
    assert shown._view.get_text().split("      ") == ["view: none, a cone has no front", "relation, as seen: right of"]


def test_text_neither_overlaps_nor_leaves_the_figure(shown):
    """With the longest caption of a scene."""
    longest = {"shape": "snowman", "colour": "orange", "ground": "plain", "light": "right", "second": "in front of"}
    for name, value in longest.items():
        shown.controls[name].value = value
    assert inside_and_apart(shown)


def test_a_redraw_leaves_no_artists_behind_and_is_in_time(shown):
    count = len(shown._axes.figure.findobj())
    assert seconds(shown) < SLACK * REDRAW
    assert len(shown._axes.figure.findobj()) == count


def test_the_poster_is_a_small_png(shown):
    bundle = shown._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} < set(bundle)
    assert bytes(shown.poster()).startswith(b"\x89PNG") and decode(shown.poster()).shape == (540, 900, 3)
    assert len(shown.poster()) < 100_000
