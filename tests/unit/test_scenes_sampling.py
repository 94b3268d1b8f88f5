"""The scenes that are drawn: the numbers behind them, the split, and where the objects stand."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from course_lib.worlds.scenes import sampling
from course_lib.worlds.scenes.attributes import COLOURS, GROUNDS, LIGHTS, RELATIONS, SHAPES, SIZES, SUPPORTS, VIEWS, Scenes
from course_lib.worlds.scenes.camera import camera
from course_lib.worlds.scenes.sampling import (
    ON_TOP,
    SPLITS,
    combinations,
    draw,
    gaps,
    held_out,
    margins,
    middles,
    mix,
    relations,
    uniforms,
    views,
)
from course_lib.worlds.scenes.solids import FOOT

FALSE_ALARM = 1e-6
"""Each chi-square test below rejects a fair source with this probability; seeds are fixed."""


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(Scenes))


def assert_uniform(cells: Tensor, count: int) -> None:
    """Pearson's test: sum (observed - expected)^2 / expected is chi-square with count - 1 degrees of freedom."""
    observed = torch.bincount(cells.flatten(), minlength=count).double()
    expected = cells.numel() / count
    assert len(observed) == count
    assert expected >= 20  # the chi-square law is an approximation for large expected counts
    assert ((observed - expected) ** 2 / expected).sum() < chi2.isf(FALSE_ALARM, count - 1)


# --- numbers


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    """The published outputs of SplitMix64 for the seed 1234567, and its first for the seed 0."""
    states = [(1234567 + k * sampling.GOLDEN) % 2**64 for k in (1, 2, 3)] + [sampling.GOLDEN]
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 0xE220A8397B1DCDAF]
    signed = torch.tensor([(x + 2**63) % 2**64 - 2**63 for x in states])
    assert [x % 2**64 for x in mix(signed).tolist()] == known


@pytest.mark.parametrize("bits", [0, 24, 44])
def test_numbers_are_uniform_in_their_high_and_their_low_bits(bits: int) -> None:
    u = uniforms(3, torch.arange(4096), 16)
    assert bool(((u >= 0) & (u < 1)).all())
    assert_uniform(((u * 2.0**bits % 1) * 256).long(), 256)


@pytest.mark.parametrize("axis", ["stream", "index", "distant index", "seed"])
def test_neighbouring_numbers_are_independent(axis: str) -> None:
    """Pairs fill a 16 x 16 table evenly: 255 degrees of freedom."""
    index = torch.arange(40_000)
    u = uniforms(7, index, 4)
    if axis == "stream":
        pairs = u[:, 0::2], u[:, 1::2]
    elif axis == "index":
        pairs = u[0::2], u[1::2]
    elif axis == "distant index":
        pairs = u, uniforms(7, index + 2**32, 4)
    else:
        pairs = u, uniforms(8, index, 4)
    a, b = ((x * 16).long() for x in pairs)
    assert_uniform(16 * a + b, 256)


def test_a_number_depends_on_seed_index_and_stream_only() -> None:
    u = uniforms(5, torch.arange(100), 12)
    assert torch.equal(uniforms(5, torch.tensor([70, 3]), 4, first=6), u[[70, 3], 6:10])
    assert torch.equal(uniforms(5 + 2**64, torch.arange(100), 12), u)
    assert u.flatten().unique().numel() == u.numel()


# --- what is drawn


@pytest.mark.parametrize("objects", [1, 2, (1, 2)])
@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_does_not_depend_on_how_many_are_drawn(objects: int | tuple[int, ...], split: str) -> None:
    many = draw(60, 4, objects, split)
    assert same(draw(60, 4, objects, split), many)
    assert same(draw(20, 4, objects, split), many[:20])
    assert same(draw(20, 4, objects, split, first=30), many[30:50])
    assert same(draw(1, 4, objects, split, first=17), many[17])
    assert not torch.equal(draw(60, 5, objects, split).azimuth, many.azimuth)
    assert len(draw(0, 4, objects, split)) == 0


def test_one_in_eight_combinations_is_held_out_and_every_value_is_in_both_splits() -> None:
    train, kept = ({tuple(row) for row in combinations(split).tolist()} for split in SPLITS)
    every = set(itertools.product(range(len(SHAPES)), range(len(COLOURS)), range(len(SIZES))))
    assert train | kept == every and not train & kept
    assert len(kept) * 8 == len(every) == 128
    for rows in (train, kept):
        for attribute, values in enumerate((SHAPES, COLOURS, SIZES)):
            assert {row[attribute] for row in rows} == set(range(len(values)))
    # What is new in a held-out combination is the pair of shape and colour: no size of it is trained.
    assert not {row[:2] for row in train} & {row[:2] for row in kept}


@pytest.mark.parametrize("objects", [1, (1, 2)])
def test_held_out_combinations_are_never_trained_and_only_they_are_held_out(objects: int | tuple[int, ...]) -> None:
    for split in SPLITS:
        scenes = draw(20_000, 11, objects, split)
        new = held_out(scenes.shape, scenes.colour, scenes.size)
        assert bool((new[scenes.present] == (split == "held out")).all())
        assert not bool(new[~scenes.present].any())


def test_every_attribute_is_uniform() -> None:
    for split in SPLITS:
        scenes = draw(20_000, 2, 1, split)
        rows = combinations(split)
        code = (rows * torch.tensor([16, 2, 1])).sum(-1)
        drawn = 16 * scenes.shape[:, 0] + 2 * scenes.colour[:, 0] + scenes.size[:, 0]
        assert_uniform(torch.searchsorted(code, drawn), len(rows))
    assert_uniform(len(LIGHTS) * scenes.ground + scenes.light, len(LIGHTS) * len(GROUNDS))
    assert_uniform((scenes.azimuth / 22.5).long() % 16, 16)
    assert_uniform((scenes.yaw[:, 0] / 22.5).long() % 16, 16)
    two = draw(20_000, 2, (1, 2))
    assert_uniform(two.present[:, 1].long(), 2)
    assert_uniform(relations(draw(20_000, 2, 2)), len(RELATIONS))


def test_an_absent_object_is_marked() -> None:
    one = draw(50, 0, 1)
    for field in ("shape", "colour", "size"):
        assert getattr(one, field).dtype == torch.long
        assert bool((getattr(one, field)[:, 1] == -1).all())
    assert bool((one.position[:, 1] == 0).all()) and bool((one.yaw[:, 1] == 0).all()) and bool((one.scale[:, 1] == 0).all())
    assert bool((relations(one) == -1).all())


def test_two_objects_of_a_scene_differ() -> None:
    kinds = [torch.stack([s.shape, s.colour, s.size], -1) for s in (draw(20_000, 1, 2, split) for split in SPLITS)]
    assert all(bool((k[:, 0] != k[:, 1]).any(-1).all()) for k in kinds)


# --- where it stands


@pytest.fixture(scope="module", params=SPLITS)
def scenes(request: pytest.FixtureRequest) -> Scenes:
    return draw(30_000, 21, (1, 2), request.param)


def test_objects_are_inside_the_picture(scenes: Scenes) -> None:
    assert margins(scenes).min() > 0


def test_objects_on_the_ground_keep_a_tenth_of_their_radii_apart(scenes: Scenes) -> None:
    """Sideways they are 1.1 radii or more apart, in depth 1.15: the gap is at least 0.1 of the sum. float32: 1e-5."""
    assert bool((gaps(scenes) >= 0.1 * scenes.scale.sum(1) - 1e-5).all())


def test_neither_object_hides_the_centre_of_the_other(scenes: Scenes) -> None:
    """The ray from the eye to the centre of the farther object passes the ball around the nearer one outside."""
    pair = scenes[(relations(scenes) >= 0) & (relations(scenes) != ON_TOP)]
    x = middles(pair) - camera(pair).eye[:, None]
    length = x.norm(dim=-1)
    near = length.argmin(1)
    row = torch.arange(len(pair))
    front, rear = x[row, near], x[row, 1 - near]
    ray = rear / rear.norm(dim=-1, keepdim=True)
    passing = torch.linalg.cross(front, ray).norm(dim=-1)
    assert bool((passing > pair.scale[row, near]).all())


def test_relations_are_what_the_camera_sees(scenes: Scenes) -> None:
    """Projected by the camera itself: left is a smaller u, in front a smaller depth, on top a smaller v."""
    found = relations(scenes)
    pixels, depth = camera(scenes).project(scenes.position, 64)
    u, v = (pixels[:, 0] - pixels[:, 1]).unbind(-1)
    closer = depth[:, 0] - depth[:, 1]
    for name, holds in (("left of", u < 0), ("right of", u > 0), ("in front of", closer < 0), ("behind", closer > 0)):
        assert bool(holds[found == RELATIONS.index(name)].all()), name
    top = found == ON_TOP
    assert bool((v[top] < 0).all()) and torch.equal(scenes.position[top, 0, :2], scenes.position[top, 1, :2])
    assert bool((scenes.position[:, 1, 2] == 0).all()) and bool((scenes.position[~top, 0, 2] == 0).all())


def test_what_is_on_top_stands_on_a_flat_face(scenes: Scenes) -> None:
    """The foot of the upper object is as high as the lower one: twice the height of the centre, by symmetry."""
    top = scenes[relations(scenes) == ON_TOP]
    assert {SHAPES[i] for i in top.shape[:, 1].tolist()} <= set(SUPPORTS)
    height = torch.tensor([2 * FOOT[SHAPES[i]] for i in top.shape[:, 1].tolist()]) * top.scale[:, 1]
    torch.testing.assert_close(top.position[:, 0, 2], height)
    assert bool((top.scale[:, 0] < top.scale[:, 1]).all())


def by_hand(**values: object) -> Scenes:
    """Two cars; the camera at azimuth 0 stands on the +x side, so +y is to its right."""
    plain = {
        "shape": [[4, 4]],
        "colour": [[0, 1]],
        "size": [[0, 0]],
        "position": [[[0.0, 0, 0], [0, 0, 0]]],
        "yaw": [[0.0, 0]],
        "ground": [0],
        "light": [0],
        "azimuth": [0.0],
        "elevation": [20.0],
        "distance": [5.0],
    }
    return Scenes(**{key: torch.tensor(value) for key, value in (plain | values).items()})


@pytest.mark.parametrize(
    ("offset", "name"),
    [
        ([0.1, -1.0, 0], "left of"),
        ([0.1, 1.0, 0], "right of"),
        ([1.0, 0.1, 0], "in front of"),
        ([-1.0, 0.1, 0], "behind"),
        ([0.1, 0.1, 0.5], "on top of"),
    ],
)
@pytest.mark.parametrize("turn", [0, 90, 200])
def test_relations_of_scenes_laid_by_hand(offset: list[float], name: str, turn: int) -> None:
    a = math.radians(turn)
    x, y, z = offset
    turned = [x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a), z]
    scenes = by_hand(position=[[turned, [0.0, 0, 0]]], azimuth=[float(turn)])
    assert RELATIONS[relations(scenes)] == name


@pytest.mark.parametrize(
    ("azimuth", "view"), [(0, "front"), (90, "left"), (180, "back"), (270, "right"), (40, "front"), (-50, "right")]
)
@pytest.mark.parametrize("yaw", [0.0, 130.0, 359.0])
def test_views_are_the_objects_own_sides(azimuth: float, view: str, yaw: float) -> None:
    """The front points along +x turned by yaw, so from above the left side is a quarter turn counter-clockwise from it."""
    scenes = by_hand(azimuth=[azimuth + yaw], yaw=[[yaw, yaw]], shape=[[4, 0]])
    assert views(scenes).tolist() == [[VIEWS.index(view), -1]]


def test_margins_are_the_room_left_around_the_ball() -> None:
    """A ball grown by its margin touches the edge: 0.1 % less is inside, 1 % more is cut.

    5,000 points on the ball leave no cap of more than 0.1 rad empty, which costs 1 - cos(0.1) = 0.5 % of the radius.
    """
    few = draw(40, 3, (1, 2))
    i = torch.arange(5000, dtype=torch.float64) + 0.5
    z, turn = 1 - i / 2500, math.pi * (3 - math.sqrt(5)) * i
    ball = torch.stack([(1 - z * z).sqrt() * turn.cos(), (1 - z * z).sqrt() * turn.sin(), z], -1).float()
    for k in (0, 1):
        there = few[few.present[:, k]]
        reach = (there.scale + margins(there))[:, k, None, None]
        for grown, inside in ((0.999, True), (1.01, False)):
            pixels, _ = camera(there).project(middles(there)[:, k, None] + grown * reach * ball, 64)
            assert bool((((pixels >= 0) & (pixels <= 64)).all(-1).all(-1) == inside).all())


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"objects": 3}, r"objects = 3; expected 1, 2 or \(1, 2\)"),
        ({"objects": ()}, r"objects = \(\); expected"),
        ({"split": "test"}, "split = 'test'; expected 'train' or 'held out'"),
        ({"n": -1}, "n = -1 and first = 0; expected numbers >= 0"),
        ({"seed": 1.5}, "seed = 1.5; expected a whole number"),
    ],
)
def test_bad_input_is_named(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(**({"n": 2, "seed": 0} | arguments))


def test_scenes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"position\[0\] puts object 1 above object 0; expected the upper object first"):
        relations(by_hand(position=[[[0.0, 0, 0], [0, 0, 0.5]]]))
    with pytest.raises(ValueError, match=r"yaw has shape \(1, 1\); expected \(1, 2\) beside shape \(N, K\) = \(1, 2\)"):
        by_hand(yaw=[[0.0]])
    with pytest.raises(ValueError, match=r"shape has shape \(2,\); expected \(N, K\)"):
        by_hand(shape=[4, 4])
    one = by_hand()
    doubled = {field.name: getattr(one, field.name) for field in dataclasses.fields(Scenes)}
    four = Scenes(**{name: torch.cat([value, value], 1) if value.ndim > 1 else value for name, value in doubled.items()})
    with pytest.raises(ValueError, match="scenes have room for 4 objects; expected one or two"):
        relations(four)


def test_rows_of_scenes() -> None:
    many = draw(10, 0, 2)
    assert same(many[torch.tensor([3, 1])][0], many[3])
    assert same(many[-1], many[9:10])
    assert same(many[many.azimuth >= 0], many)
    assert same(many.to("cpu"), many)
    with pytest.raises(IndexError, match="rows = 10; expected a number from -10 to 9"):
        many[10]
