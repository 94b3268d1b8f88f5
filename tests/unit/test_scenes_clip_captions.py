"""Captions of clips: they parse back, and fit the text encoder in every wording."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from course_lib.nets import mini_sd as nets
from course_lib.worlds.scenes.attributes import COLOURS, SHAPES, SIZES
from course_lib.worlds.scenes.captions import OBJECTS, OPENINGS, WORDING, captions, parse, vocabulary, words
from course_lib.worlds.scenes.clip_captions import (
    MAX_TOKENS,
    OF_OBJECTS,
    PHRASES,
    directions,
    motion_captions,
    motion_vocabulary,
    parse_motion,
)
from course_lib.worlds.scenes.clips import MOTIONS, draw_clips


def longest(phrases: Iterable[str]) -> str:
    return max(phrases, key=lambda phrase: len(words(phrase)))


def of(kind: str) -> str:
    """The longest wording of a kind."""
    return longest(phrase for names in WORDING[kind].values() for phrase in names)


@pytest.mark.parametrize("objects", [1, 2])
def test_captions_of_clips_parse_back(objects: int) -> None:
    """All that the caption of the first frame names, but for the details that must go; a detail has at most 6 tokens."""
    clips = draw_clips(600, 8, None, objects)
    texts, scene = motion_captions(clips, 9), captions(clips.start, 9)
    sides, detail = directions(clips), 1 + max(len(words(of(kind))) for kind in ("ground", "light", "view"))
    used, shortened = set(), 0
    for i, text in enumerate(texts):
        reading, whole = parse_motion(text), parse(scene[i])
        assert reading.motion == MOTIONS[clips.motion[i]] and reading.direction == sides[i]
        start, _, phrase = text.rpartition(", ")
        if len(words(f"{scene[i]}, {phrase}")) <= MAX_TOKENS:
            assert start == scene[i] and reading.scene == whole
        else:
            shortened += 1
            assert MAX_TOKENS - detail < len(words(text)), "no more is left out than must be"
            assert reading.scene.relation == whole.relation and len(reading.scene.objects) == len(whole.objects)
            for said, thing in zip(reading.scene.objects, whole.objects, strict=True):
                assert {**thing, **said} == thing and {"shape", "colour", "size"} <= set(said)
            assert reading.scene.ground in (None, whole.ground) and reading.scene.light in (None, whole.light)
        if objects == 2 and reading.motion in OF_OBJECTS:
            kind = (clips.start.size, clips.start.colour, clips.start.shape)
            size, colour, shape = (int(x[i, 0]) for x in kind)
            named = {"size": list(SIZES)[size], "colour": list(COLOURS)[colour], "shape": SHAPES[shape]}
            assert reading.mover == named
        else:
            assert reading.mover is None
        used |= set(words(text))
    assert used & set(motion_vocabulary()) == set(motion_vocabulary()) - ({"the"} - used)
    assert used <= set(vocabulary()) | set(motion_vocabulary())
    assert (shortened > 100) == (objects == 2)


def test_every_wording_fits_the_text_encoder() -> None:
    """Without details a caption is an opening, two objects, what one is to the other after a comma, and a motion after another.

    Details are left out until it fits, so the longest of each decides. Drawn captions go to the limit.
    """
    assert MAX_TOKENS + 2 == nets.LENGTH
    thing = longest(form.format(size=of("size"), colour=of("colour"), shape=of("shape")) for form in OBJECTS)
    of_objects = longest(phrase for (motion, _), phrases in PHRASES.items() if motion in OF_OBJECTS for phrase in phrases)
    of_camera = longest(phrase for (motion, _), phrases in PHRASES.items() if motion not in OF_OBJECTS for phrase in phrases)
    for motion in (of_camera, f"the {of('size')} {of('colour')} {of('shape')} {of_objects}"):
        assert len(words(f"{longest(OPENINGS)} {thing}, {of('relation')} {thing}, {motion}")) <= MAX_TOKENS
    clips, tokenizer = draw_clips(2000, 10, None, (1, 2)), nets.tokenizer(sorted({*vocabulary(), *motion_vocabulary()}))
    texts = [text for seed in range(5) for text in motion_captions(clips, seed)]
    assert max(len(words(text)) for text in texts) == MAX_TOKENS
    ids = nets.token_ids(tokenizer, texts)  # raises for a caption that does not fit
    assert [int((row > 1).sum()) for row in ids] == [len(words(text)) for text in texts]
