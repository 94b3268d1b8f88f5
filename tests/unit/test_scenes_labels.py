"""Labels say what a scene shows, in an order of its objects that the picture shows; prompts are judged by them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from course_lib.worlds.scenes import Scenes, camera, captions, draw, parse
from course_lib.worlds.scenes.attributes import COLOURS, GROUNDS, LIGHTS, ORIENTED, RELATIONS, SHAPES, SIZES, TARGET, VIEWS
from course_lib.worlds.scenes.captions import MAX_WORDS, OBJECTS, OPENINGS, WORDING, Reading, count, words
from course_lib.worlds.scenes.labels import OF_OBJECT, OF_SCENE, PAIRS, Labels, labels, obeyed
from course_lib.worlds.scenes.sampling import middles, relations, views

ON_TOP = RELATIONS.index("on top of")
FIELDS = [field.name for field in dataclasses.fields(Labels)]


@pytest.fixture(scope="module")
def pairs() -> Scenes:
    return draw(600, 41, 2)


def flipped(scenes: Scenes) -> Scenes:
    """The same scenes with their objects numbered the other way round."""
    changed = {name: getattr(scenes, name).flip(1) for name in ("shape", "colour", "size", "position", "yaw")}
    return dataclasses.replace(scenes, **changed)


def one(shape: str, yaw: Tensor) -> Scenes:
    """Scenes of one object each, seen from azimuth 0."""
    n = len(yaw)
    index, zero = torch.zeros(n, dtype=torch.long), torch.zeros(n)
    return Scenes(
        shape=torch.full((n, 1), SHAPES.index(shape)), colour=index[:, None], size=index[:, None], position=torch.zeros(n, 1, 3),
        yaw=yaw[:, None], ground=index, light=index, azimuth=zero, elevation=zero + 20, distance=zero + 3.6,
    )  # fmt: skip


def changed(of: Labels, name: str, rows: Tensor | slice, value: Tensor, k: int | None = None) -> Labels:
    """The labels with other values of one attribute, of object `k` or of the scene."""
    full = getattr(of, name).clone()
    if k is None:
        full[rows] = value
    else:
        full[rows, k] = value
    return dataclasses.replace(of, **{name: full})


# --- labels ------------------------------------------------------------------------------------------------------------------


def test_labels_do_not_depend_on_which_object_is_which(pairs: Scenes) -> None:
    beside = pairs[relations(pairs) != ON_TOP]
    a, b = labels(beside), labels(flipped(beside))
    assert len(beside) > 300 and bool((relations(beside) != relations(flipped(beside))).all())
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_object_0_is_the_one_on_the_left_in_front_or_on_top(pairs: Scenes) -> None:
    """By the camera: where the middle of each object is seen, and how far away. A relation is one offset of a scene's own
    frame; "left of" is 1.1 sums of radii sideways and at most 0.2 in depth, so perspective cannot turn its sign."""
    of, kinds = labels(pairs), relations(pairs)
    pixels, depth = camera(pairs).project(middles(pairs), 64)
    own = (labels(pairs).shape == pairs.shape).all(1) & (of.colour == pairs.colour).all(1) & (of.size == pairs.size).all(1)
    turned = torch.zeros(len(pairs), dtype=torch.bool)
    for name, smaller in (("left of", pixels[..., 0]), ("in front of", depth), ("on top of", -middles(pairs)[..., 2])):
        rows = of.relation == PAIRS.index(name)
        assert int(rows.sum()) > 80
        turned |= rows & (smaller[:, 1] < smaller[:, 0])
    assert torch.equal(own, ~turned)  # the two objects differ in shape, colour or size
    for name in ("shape", "colour", "size"):
        expected = torch.where(turned[:, None], getattr(pairs, name).flip(1), getattr(pairs, name))
        assert torch.equal(getattr(of, name), expected), name
    assert torch.equal(turned, (kinds == RELATIONS.index("right of")) | (kinds == RELATIONS.index("behind")))


def test_one_object_has_labels_of_its_own_and_none_of_another() -> None:
    scenes = draw(200, 3, 1)
    alone = one("car", torch.zeros(1))
    for of in (labels(scenes), labels(alone)):
        assert bool((of.count == 0).all()) and bool((of.relation == -1).all())
        for name in OF_OBJECT:
            assert getattr(of, name).shape == (len(of), 2) and bool((getattr(of, name)[:, 1] == -1).all())
        assert not bool(of.front[:, 1].any()) and bool((of.azimuth[:, 1] == 0).all()) and not bool(of.oriented[:, 1].any())
    of = labels(scenes)
    for name in OF_OBJECT:
        assert torch.equal(getattr(of, name)[:, 0], getattr(scenes, name)[:, 0])
    assert torch.equal(of.ground, scenes.ground) and torch.equal(of.light, scenes.light)
    assert bool((labels(draw(20, 3, 2)).count == 1).all())


def test_every_label_occurs_and_has_a_name() -> None:
    of = labels(draw(2000, 4, (1, 2)))
    for name, values in (OF_SCENE | OF_OBJECT).items():
        found = set(getattr(of, name).unique().tolist()) - {-1}
        assert found == set(range(len(values))), name
    assert OF_SCENE["ground"] == tuple(GROUNDS) and OF_SCENE["light"] == tuple(LIGHTS)
    assert list(OF_OBJECT.values()) == [SHAPES, tuple(COLOURS), tuple(SIZES)]


def test_azimuth_and_front_are_those_of_the_camera() -> None:
    """(cos, sin) azimuth are the shares of the direction to the camera along an object's front, (cos yaw, sin yaw), and along
    its own left, (-sin yaw, cos yaw). fp32 degrees up to 720 round by 720 * 2^-24, cos and sin of them by a few 1e-6."""
    scenes = draw(400, 8, 1)
    of = labels(scenes)
    to = (camera(scenes).eye - torch.tensor(TARGET))[:, :2]
    to, yaw = to / to.norm(dim=-1, keepdim=True), torch.deg2rad(scenes.yaw[:, 0])
    ahead, left = to[:, 0] * yaw.cos() + to[:, 1] * yaw.sin(), to[:, 1] * yaw.cos() - to[:, 0] * yaw.sin()
    has = torch.isin(scenes.shape[:, 0], torch.tensor([SHAPES.index(name) for name in ORIENTED]))
    assert torch.equal(has, of.oriented[:, 0]) and 100 < int(has.sum()) < 300
    found = torch.deg2rad(of.azimuth[:, 0])[has]
    torch.testing.assert_close(torch.stack([found.cos(), found.sin()]), torch.stack([ahead, left])[:, has], rtol=0, atol=1e-5)
    assert bool((of.azimuth[~has] == 0).all()) and bool(((of.azimuth >= 0) & (of.azimuth < 360)).all())
    assert torch.equal(of.front[:, 0], has & (ahead > 0))
    assert torch.equal(of.fronts, of.front.sum(1)) and set(of.fronts.tolist()) == {0, 1}


def test_azimuth_agrees_with_the_sides_that_captions_name(pairs: Scenes) -> None:
    """`views` is the nearest quarter of a turn."""
    of, seen = labels(pairs), views(pairs)
    swapped = (of.shape != pairs.shape).any(1) | (of.colour != pairs.colour).any(1) | (of.size != pairs.size).any(1)
    seen = torch.where(swapped[:, None], seen.flip(1), seen)
    nearest = (of.azimuth / 90).round().long() % 4
    assert torch.equal(torch.where(of.oriented, nearest, -1), seen)
    sides = one("car", -90.0 * torch.arange(4))
    assert labels(sides).azimuth[:, 0].tolist() == [0, 90, 180, 270]
    assert [VIEWS[i] for i in views(sides)[:, 0]] == ["front", "left", "back", "right"]


def test_two_fronts_are_counted(pairs: Scenes) -> None:
    of = labels(pairs)
    assert set(of.fronts.tolist()) == {0, 1, 2}
    assert torch.equal(of.fronts == 2, of.front.all(1))


# --- prompts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objects", "split"), [(1, "train"), (2, "train"), (2, "held out")])
@pytest.mark.parametrize("seed", [None, 6])
def test_a_scene_obeys_its_own_caption(objects: int, split: str, seed: int | None) -> None:
    scenes = draw(500, 21, objects, split)
    readings = [parse(caption) for caption in captions(scenes, seed)]
    found = obeyed(labels(scenes), readings)
    for name, values in found.items():
        assert bool((values.isnan() | (values == 1)).all()), name
    named = {
        "relation": [reading.relation is not None for reading in readings],
        "ground": [reading.ground is not None for reading in readings],
        "light": [reading.light is not None for reading in readings],
        "view": [any("view" in thing for thing in reading.objects) for reading in readings],
    }
    for name, asked in named.items():
        assert found[name].isnan().logical_not().tolist() == asked, name
        assert any(asked) == (objects == 2 or name != "relation")
    for name in ("count", "shape", "colour", "size", "all"):
        assert not bool(found[name].isnan().any()), name


def test_a_view_on_the_border_of_two_sides_obeys_its_caption() -> None:
    """Captions round half to even and `obeyed` takes in both ends of 45 degrees; so do their fp32 neighbours."""
    borders = torch.tensor([45.0, 135.0, 225.0, 315.0, -45.0, -135.0, -225.0, -315.0])
    yaw = torch.cat([borders.nextafter(torch.tensor(v)) for v in (-1e3, 1e3)] + [borders])
    scenes = one("house", yaw)
    readings = [parse(caption) for caption in captions(scenes, None)]
    assert {reading.objects[0]["view"] for reading in readings} == set(VIEWS)
    assert bool((obeyed(labels(scenes), readings)["view"] == 1).all())


@pytest.mark.parametrize("off", [44.0, 46.0])
def test_a_view_covers_45_degrees_to_either_side(off: float) -> None:
    for side, view in enumerate(VIEWS):
        yaw = -90.0 * side + torch.tensor([off, -off])
        found = obeyed(labels(one("mug", yaw)), 2 * [Reading([{"shape": "mug", "view": view}])])
        assert found["view"].tolist() == found["all"].tolist() == 2 * [float(off < 45)], view


@pytest.fixture(scope="module")
def judged() -> tuple[Labels, list[Reading], dict[str, Tensor]]:
    scenes = draw(400, 23, (1, 2))
    of, readings = labels(scenes), [parse(caption) for caption in captions(scenes, 2)]
    return of, readings, obeyed(of, readings)


def same_but(found: dict[str, Tensor], before: dict[str, Tensor], rows: Tensor, *names: str) -> bool:
    """Whether these attributes and `all` are 0 in `rows` and everything else is as before."""
    expected = {name: torch.where(rows, 0.0, value) if name in (*names, "all") else value for name, value in before.items()}
    return all(torch.equal(found[name].nan_to_num(-1), expected[name].nan_to_num(-1)) for name in before)


@pytest.mark.parametrize("name", list(OF_SCENE))
def test_a_wrong_attribute_of_the_scene_is_found_and_named(name: str, judged: tuple) -> None:
    of, readings, before = judged
    value, n = getattr(of, name), len(OF_SCENE[name])
    rows = ~before[name].isnan()
    for turn in range(1, n):
        wrong = changed(of, name, slice(None), torch.where(value >= 0, (value + turn) % n, value))
        assert same_but(obeyed(wrong, readings), before, rows, name)
    assert int(rows.sum()) > 100 and (name == "count" or int(rows.sum()) < len(rows))  # unnamed: no matter what is there


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("name", list(OF_OBJECT))
def test_a_wrong_attribute_of_one_object_is_found_and_named(name: str, k: int, judged: tuple) -> None:
    """Of shapes another of the same kind, with or without a front: only then is the view as right as before."""
    of, readings, before = judged
    value, rows = getattr(of, name)[:, k], of.shape[:, k] >= 0
    if name == "shape":
        wrong = value // 4 * 4 + (value + 1) % 4
    else:
        wrong = (value + 1) % len(OF_OBJECT[name])
    found = obeyed(changed(of, name, rows, wrong[rows], k), readings)
    assert same_but(found, before, rows, name) and int(rows.sum()) > 100


@pytest.mark.parametrize("k", [0, 1])
def test_a_wrong_view_is_found_and_named(k: int, judged: tuple) -> None:
    """Turned by a half or a quarter of a turn, or with the front lost, since the object is another."""
    of, readings, before = judged
    rows = torch.zeros(len(of), dtype=torch.bool)
    for i, reading in enumerate(readings):
        objects = reading.objects[::-1] if reading.relation in ("right of", "behind") else reading.objects
        rows[i] = k < len(objects) and "view" in objects[k]
    assert 30 < int(rows.sum()) < len(rows)
    for turn in (90, 180, 270):
        wrong = changed(of, "azimuth", slice(None), (of.azimuth[:, k] + turn) % 360, k)
        assert same_but(obeyed(wrong, readings), before, rows, "view")
    found = obeyed(changed(of, "shape", rows, torch.tensor(SHAPES.index("cone")), k), readings)
    assert same_but(found, before, rows, "view", "shape")


def test_objects_that_have_changed_places_do_not_obey(pairs: Scenes) -> None:
    """The relation is read as such; its objects are then the wrong ones, unless they are alike in an attribute."""
    of = labels(pairs)
    readings = [parse(caption) for caption in captions(pairs, None)]
    swapped = dataclasses.replace(of, **{name: getattr(of, name).flip(1) for name in (*OF_OBJECT, "azimuth", "front")})
    found = obeyed(swapped, readings)
    assert not bool(found["all"].any()) and bool((found["relation"] == 1).all())
    for name in OF_OBJECT:
        alike = getattr(of, name)[:, 0] == getattr(of, name)[:, 1]
        assert torch.equal(found[name] == 1, alike), name


def test_what_a_prompt_does_not_name_is_not_judged() -> None:
    of = labels(one("cone", torch.zeros(2)))
    found = obeyed(of, [Reading([{"shape": "cone"}]), Reading([{"colour": "blue"}], ground="grass")])
    nan = {name for name, values in found.items() if bool(values.isnan().all())}
    assert nan == {"relation", "light", "view", "size"}
    assert found["shape"].nan_to_num(-1).tolist() == [1, -1] and found["colour"].nan_to_num(-1).tolist() == [-1, 0]
    assert found["all"].tolist() == [1, 0] and found["count"].tolist() == [1, 1]


def test_no_scene_obeys_a_prompt_of_three_objects_or_of_none(pairs: Scenes) -> None:
    of = labels(pairs[:1])
    for text in ("a cube, a cone, a mug", "on grass"):
        found = obeyed(of, [parse(text)])
        assert found["count"].tolist() == found["all"].tolist() == [0], text


def test_as_many_prompts_as_pictures() -> None:
    of = labels(draw(3, 1))
    with pytest.raises(ValueError, match="prompts has 2 readings; expected 3, one for each picture"):
        obeyed(of, 2 * [Reading([{}])])
    assert all(len(values) == 0 for values in obeyed(labels(draw(3, 1)[:0]), []).values())


# --- plain captions ----------------------------------------------------------------------------------------------------------


def test_plain_captions_are_exact() -> None:
    scenes = one("mug", torch.zeros(1))
    assert captions(scenes, None) == ["a small red mug, seen from the front, on grey ground, lit from the left"]


def test_plain_captions_have_one_wording() -> None:
    """No seed, so one text a scene; the first synonym of everything; and nothing that the scene does not say."""
    scenes = draw(600, 12, (1, 2))
    plain, worded = captions(scenes, None), captions(scenes, 4)
    assert captions(scenes, None) == plain and captions(scenes[100:], None, first=7) == plain[100:]
    others = {
        tuple(words(phrase)): tuple(words(synonyms[0]))
        for names in WORDING.values()
        for synonyms in names.values()
        for phrase in synonyms[1:]
    }
    firsts = {tuple(words(synonyms[0])) for names in WORDING.values() for synonyms in names.values()}
    for text, other in zip(plain, worded, strict=True):
        assert count(text) <= MAX_WORDS, text
        said = words(text)
        spans = {tuple(said[i:j]) for i in range(len(said)) for j in range(i + 1, min(i + 8, len(said)) + 1)}
        for phrase in others.keys() & spans:  # a synonym that is part of a first wording, as "on" of "on top of"
            assert any(phrase != first and set(phrase) <= set(first) for first in firsts & spans), text
        assert not any(opening and text.startswith(opening) for opening in OPENINGS), text
        a, b = parse(text), parse(other)
        assert a.relation is None or f" {WORDING['relation'][a.relation][0]} a" in text, text
        if a.relation != b.relation:
            b.objects.reverse()
            assert {a.relation, b.relation} in ({"left of", "right of"}, {"in front of", "behind"}), (text, other)
        assert a.ground in (None, b.ground) or b.ground is None
        assert a.light in (None, b.light) or b.light is None
        for thing, same in zip(a.objects, b.objects, strict=True):
            assert {"shape", "colour", "size"} <= thing.keys()
            assert all(same.get(key, value) == value for key, value in thing.items()), (text, other)


def test_plain_captions_put_size_before_colour_and_name_all_that_there_is_room_for() -> None:
    scenes = draw(300, 13, 1)
    seen = views(scenes)[:, 0]
    for i, text in enumerate(captions(scenes, None)):
        reading = parse(text)
        thing = reading.objects[0]
        assert text.startswith(OBJECTS[0].format(**thing).replace("a orange", "an orange")), text
        assert reading.ground == list(GROUNDS)[scenes.ground[i]] and reading.light == list(LIGHTS)[scenes.light[i]]
        assert thing.get("view") == (VIEWS[seen[i]] if seen[i] >= 0 else None)
