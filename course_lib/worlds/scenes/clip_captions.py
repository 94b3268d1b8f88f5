"""Captions of clips: the caption of the first frame and what moves, and the way back."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

from course_lib.worlds.scenes.attributes import COLOURS, SHAPES, SIZES
from course_lib.worlds.scenes.captions import WORDING, Reading, captions, parse, words
from course_lib.worlds.scenes.clips import MOTIONS, Clips
from course_lib.worlds.scenes.sampling import uniforms

FIRST_STREAM = 4000
"""Wording of motions draws from streams of its own, so that one seed may serve all."""

MAX_TOKENS = 30
"""Words and commas of a caption: a text encoder of 32 tokens takes no more between the two that mark the ends."""

OF_OBJECTS = ("slide", "bounce", "spin")
"""The motions of object 0; the others are the camera's."""

PHRASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("slide", "left"): ("sliding left", "moving left", "gliding left"),
    ("slide", "right"): ("sliding right", "moving right", "gliding right"),
    ("bounce", ""): ("bouncing", "hopping", "jumping"),
    ("spin", ""): ("spinning", "turning around", "rotating"),
    ("orbit", "left"): ("while the camera orbits to the left", "as the camera circles to the left"),
    ("orbit", "right"): ("while the camera orbits to the right", "as the camera circles to the right"),
    ("zoom", "in"): ("while the camera zooms in", "as the camera comes closer"),
    ("zoom", "out"): ("while the camera zooms out", "as the camera backs away"),
    ("roll", "left"): ("while the camera rolls to the left", "as the camera tilts to the left"),
    ("roll", "right"): ("while the camera rolls to the right", "as the camera tilts to the right"),
    ("pan", "left"): ("while the camera pans to the left", "as the camera turns to the left"),
    ("pan", "right"): ("while the camera pans to the right", "as the camera turns to the right"),
}
"""What is said of a motion and its direction, "" where none is named. Left and right are those of the viewer or the camera."""


@dataclass
class ClipReading:
    """What the caption of a clip names: the first frame, the motion, its direction ("" for none), and what moves.

    mover holds shape, colour and size of the object that moves where the caption tells it apart from another, else None.
    """

    scene: Reading
    motion: str
    direction: str
    mover: dict[str, str] | None


def direction(motion: str, amount: float) -> str:
    """The direction of a motion of this amount as captions name it: left, right, in, out, or "" where none is named."""
    sides = [side for name, side in PHRASES if name == motion]
    return sides[0] if len(sides) == 1 else sides[(amount > 0) != (sides[0] == "in")]


def directions(clips: Clips) -> list[str]:
    """The direction of each clip's motion, see `direction`."""
    pairs = zip(clips.motion.tolist(), clips.amount.tolist(), strict=True)
    return [direction(MOTIONS[motion], amount) for motion, amount in pairs]


def motion_captions(clips: Clips, seed: int, first: int = 0) -> list[str]:
    """Describe each clip in words: a caption of its first frame, then the motion; wording i depends on (seed, first + i).

    Where a scene has two objects, the one that moves is named in full: ", the small red cube sliding left". At most
    MAX_TOKENS words and commas: of ground, light and views, the last that are named are left out until it fits. Raises
    ValueError as `captions` does.
    """
    numbers = uniforms(seed, torch.arange(first, first + len(clips)), 4, FIRST_STREAM).tolist()
    start, texts = clips.start, []
    columns = (captions(start, seed, first), numbers, clips.motion.tolist(), directions(clips), start.present.sum(1).tolist())
    kinds = torch.stack([start.size, start.colour, start.shape], -1)[:, 0].tolist()
    tables = ("size", tuple(SIZES)), ("colour", tuple(COLOURS)), ("shape", SHAPES)
    for text, row, motion, direction, objects, kind in zip(*columns, kinds, strict=True):
        phrase = _one(PHRASES[MOTIONS[motion], direction], row[0])
        if objects > 1 and MOTIONS[motion] in OF_OBJECTS:
            named = zip(tables, kind, row[1:], strict=True)
            phrase = f"the {' '.join(_one(WORDING[key][names[i]], u) for (key, names), i, u in named)} {phrase}"
        texts.append(f"{_within(text, MAX_TOKENS - 1 - len(words(phrase)))}, {phrase}")
    return texts


@functools.cache
def _details() -> re.Pattern[str]:
    """Finds what the caption of a scene may leave out, with the comma that goes with it."""
    phrases = [phrase for kind in ("ground", "light", "view") for names in WORDING[kind].values() for phrase in names]
    either = "|".join(phrases)
    return re.compile(rf"^({either}), |,? ({either})\b")


def _within(text: str, room: int) -> str:
    """The caption of a scene, without the last of its details that make it longer than `room` words and commas."""
    while len(words(text)) > room:
        *_, last = _details().finditer(text)
        text = text[: last.start()] + text[last.end() :]
    return text


def _one(options: tuple[str, ...], u: float) -> str:
    return options[int(u * len(options))]


@functools.cache
def _phrases() -> dict[tuple[str, ...], tuple[str, str]]:
    return {tuple(words(phrase)): key for key, synonyms in PHRASES.items() for phrase in synonyms}


def motion_vocabulary() -> list[str]:
    """All words that can occur in the motion of a caption, sorted, but for the names of the object that moves."""
    return sorted({word for phrase in _phrases() for word in phrase} | {"the"})


def parse_motion(caption: str) -> ClipReading:
    """Read the caption of a clip back. Raises ValueError where it does not end in a motion, and as `parse` does."""
    tokens = words(caption)
    known = _phrases()
    size = next((n for n in range(max(map(len, known)), 0, -1) if tuple(tokens[-n:]) in known), 0)
    if not size:
        raise ValueError(f"caption {caption!r} ends in no motion; expected one such as 'sliding left' at its end")
    motion, direction = known[tuple(tokens[-size:])]
    rest, mover = tokens[:-size], None
    last = max((i for i, word in enumerate(rest) if word == "the"), default=0)
    if rest[-1:] == [","]:
        rest = rest[:-1]
    elif rest[last - 1 : last + 1] == [",", "the"]:
        mover = parse(" ".join(["a", *rest[last + 1 :]])).objects[0]
        rest = rest[: last - 1]
    return ClipReading(parse(" ".join(rest)), motion, direction, mover)
