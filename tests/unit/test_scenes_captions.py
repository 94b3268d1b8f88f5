"""Captions say what the scene is, in many wordings, and nothing else: reading them back gives the scene."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from course_lib.worlds.scenes.attributes import COLOURS, GROUNDS, LIGHTS, RELATIONS, SHAPES, SIZES, VIEWS, Scenes
from course_lib.worlds.scenes.captions import MAX_WORDS, NAMED, WORDING, Reading, captions, count, parse, vocabulary, words
from course_lib.worlds.scenes.sampling import SPLITS, draw, relations, views

SAID_OTHERWISE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}


@pytest.fixture(scope="module", params=[(1, "train"), (2, "train"), (2, "held out")], ids=str)
def drawn(request: pytest.FixtureRequest) -> tuple[Scenes, list[str]]:
    objects, split = request.param
    scenes = draw(4000, 31, objects, split)
    return scenes, captions(scenes, 8)


def objects_of(scenes: Scenes, i: int) -> list[dict[str, str]]:
    """What is true of the objects of scene i, in the words of `attributes`."""
    found = []
    for k in range(int(scenes.present[i].sum())):
        thing = {
            "shape": SHAPES[scenes.shape[i, k]],
            "colour": list(COLOURS)[scenes.colour[i, k]],
            "size": list(SIZES)[scenes.size[i, k]],
        }
        side = int(views(scenes)[i, k])
        found.append(thing | ({"view": VIEWS[side]} if side >= 0 else {}))
    return found


def test_a_caption_read_back_is_the_scene_and_nothing_else(drawn: tuple[Scenes, list[str]]) -> None:
    scenes, texts = drawn
    kinds = relations(scenes).tolist()
    for i, text in enumerate(texts[:1500]):
        reading, truth = parse(text), objects_of(scenes, i)
        relation = RELATIONS[kinds[i]] if kinds[i] >= 0 else None
        assert len(reading.objects) == len(truth), text
        swapped = reading.relation != relation
        if swapped:
            assert reading.relation == SAID_OTHERWISE[relation], text
            truth.reverse()
        for said, thing in zip(reading.objects, truth, strict=True):
            assert {**thing, **said} == thing, text  # nothing that is false
            assert {"shape", "colour", "size"} <= set(said), text  # and always these
        assert reading.ground in (None, list(GROUNDS)[scenes.ground[i]]), text
        assert reading.light in (None, list(LIGHTS)[scenes.light[i]]), text


def test_captions_keep_to_the_length_and_to_the_vocabulary(drawn: tuple[Scenes, list[str]]) -> None:
    known = set(vocabulary())
    for text in drawn[1]:
        assert count(text) <= MAX_WORDS, text
        assert set(words(text)) <= known, text
        assert text == text.lower().strip() and "  " not in text and " ," not in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_every_word_of_the_vocabulary_and_every_synonym_occurs() -> None:
    """The rarest phrase, one of two wordings of one relation of five, has a share of 2.5 %: (1 - 0.025)^8000 < 1e-80."""
    texts = captions(draw(8000, 1, (1, 2)), 2)
    assert {word for text in texts for word in words(text)} == set(vocabulary())
    joined = "\n".join(texts)
    for names in WORDING.values():
        for phrase in itertools.chain(*names.values()):
            assert re.search(rf"\b{phrase}\b", joined), phrase


def test_phrases_of_different_meaning_differ() -> None:
    phrases = [phrase for names in WORDING.values() for synonyms in names.values() for phrase in synonyms]
    assert len(phrases) == len(set(phrases))
    for attribute, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("ground", GROUNDS), ("light", LIGHTS)):
        assert list(WORDING[attribute]) == list(values)
    assert list(WORDING["view"]) == list(VIEWS) and list(WORDING["relation"])[:5] == list(RELATIONS)


def test_light_ground_and_view_are_named_four_times_in_five() -> None:
    """Where there is room, as with one object. Within 5 standard errors of a share p of n: 5 sqrt(p (1 - p) / n)."""
    scenes = draw(6000, 5, 1)
    readings = [parse(text) for text in captions(scenes, 5)]
    oriented = (views(scenes)[:, 0] >= 0).tolist()
    named = {
        "ground": [reading.ground is not None for reading in readings],
        "light": [reading.light is not None for reading in readings],
        "view": ["view" in reading.objects[0] for reading, has in zip(readings, oriented, strict=True) if has],
    }
    for kind, values in named.items():
        error = (NAMED * (1 - NAMED) / len(values)) ** 0.5
        assert abs(sum(values) / len(values) - NAMED) < 5 * error, kind
    # One without the others occurs, so that none of them can be told from another's presence.
    assert len(set(zip(named["ground"], named["light"], strict=True))) == 4


def test_the_wording_varies_in_order_too() -> None:
    """Size before colour and after it, object 1 first in half of the captions, phrases before the object and after it."""
    scenes = draw(4000, 9, 2)
    texts = captions(scenes, 9)
    sides = relations(scenes)
    beside = [i for i in range(len(texts)) if sides[i] < 4]
    swapped = sum(parse(texts[i]).relation != RELATIONS[sides[i]] for i in beside)
    assert abs(swapped / len(beside) - 0.5) < 5 * 0.5 / len(beside) ** 0.5
    one = captions(draw(500, 9, 1), 9)
    for pattern in (
        r"(large|big|small|little) red",
        r"red (large|big|small|little)",
        r"in red",
        r"and red",
        "^on ",
        "^lit ",
        "^with ",
    ):
        assert any(re.search(pattern, text) for text in one), pattern
    assert len(set(captions(draw(1, 0), seed)[0] for seed in range(200))) > 100  # one scene, many captions


def test_a_caption_depends_on_its_seed_and_place_and_not_on_the_batch() -> None:
    scenes = draw(50, 3, (1, 2))
    texts = captions(scenes, 6)
    assert captions(scenes, 6) == texts
    assert captions(scenes[:20], 6) == texts[:20]
    assert captions(scenes[20:], 6, first=20) == texts[20:]
    assert captions(scenes, 7) != texts


def test_wording_tells_nothing_of_the_scene() -> None:
    """Two scenes of the same place and seed, equal but for the colour, get captions that differ in the colour alone."""
    red = draw(200, 3, 1)
    blue = red[:]
    red.colour, blue.colour = torch.where(red.present, 0, -1), torch.where(red.present, 5, -1)
    assert captions(blue, 1) == [text.replace(" red", " blue") for text in captions(red, 1)]


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("a cube", Reading([{"shape": "cube"}])),
        ("An orange BALL", Reading([{"colour": "orange", "shape": "sphere"}])),
        (
            "a picture of a mug, small and violet, seen from the back, on a lawn",
            Reading([{"shape": "mug", "size": "small", "colour": "purple", "view": "back"}], None, "grass"),
        ),
        (
            "lit from the left, a cone on a block on sand",
            Reading([{"shape": "cone"}, {"shape": "cube"}], "on top of", "sand", "left"),
        ),
        ("a cube below a toy car", Reading([{"shape": "car"}, {"shape": "cube"}], "on top of")),
        (
            "a car, seen from the front, left of a house in red",
            Reading([{"shape": "car", "view": "front"}, {"shape": "house", "colour": "red"}], "left of"),
        ),
        (
            "seen from the right, a cup nearer than a drum",
            Reading([{"view": "right", "shape": "mug"}, {"shape": "cylinder"}], "in front of"),
        ),
    ],
)
def test_reading_by_hand(text: str, reading: Reading) -> None:
    assert parse(text) == reading


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red zebra", "caption has 'zebra' at word 3; expected words and phrases of the vocabulary"),
        ("a red blue cube", "names two values of colour; expected one"),
        ("a cube on sand on grass", "names two values of ground; expected one"),
        ("a cube behind", "names a relation and 1 objects; expected two objects"),
        ("a cube seen from", "caption has 'seen' at word 3"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(text)


def test_a_scene_without_its_first_object_is_named() -> None:
    scenes = draw(3, 0, 1)
    scenes.shape[2, 0] = -1
    with pytest.raises(ValueError, match=r"shape\[2, 0\] = -1; expected every scene to have an object 0"):
        captions(scenes, 0)


def test_held_out_words_are_all_trained() -> None:
    """No word is new in the held-out split, only the combination is."""
    train, kept = ({word for text in captions(draw(4000, 0, (1, 2), split), 0) for word in words(text)} for split in SPLITS)
    assert kept <= train
