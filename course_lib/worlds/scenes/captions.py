"""Captions: what is in a scene, in many wordings, and the way back from a caption to what it names.

A caption always names shape, colour and size of every object and how two objects stand to each other. Ground, light and
the side from which an oriented object is seen are named four times in five, where MAX_WORDS leaves room. Left and right
of relations and of the light are the viewer's; those of "seen from" are the object's own, see `sampling.views`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TypeVar

import torch

from course_lib.worlds.scenes.attributes import COLOURS, GROUNDS, LIGHTS, RELATIONS, SHAPES, SIZES, VIEWS, Scenes
from course_lib.worlds.scenes.sampling import relations, uniforms, views

Phrase = TypeVar("Phrase")
MAX_WORDS = 24
STREAMS = 32
FIRST_STREAM = 1000
"""Wording draws from streams that no scene draws from, so that one seed may serve both."""
NAMED = 0.8
UNDER = "under"

WORDING: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "sphere": ("sphere", "ball"),
        "cube": ("cube", "block"),
        "cylinder": ("cylinder", "drum"),
        "cone": ("cone",),
        "car": ("car", "toy car"),
        "mug": ("mug", "cup"),
        "snowman": ("snowman",),
        "house": ("house", "cottage"),
    },
    "colour": {name: (name,) for name in COLOURS} | {"cyan": ("cyan", "turquoise"), "purple": ("purple", "violet")},
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "view": {view: tuple(f"{verb} from the {view}" for verb in ("seen", "viewed")) for view in VIEWS},
    "ground": {
        "grey": ("on grey ground", "on a grey floor"),
        "white": ("on white ground", "on a white floor"),
        "grass": ("on grass", "on a lawn"),
        "sand": ("on sand", "on a beach"),
        "checkered": ("on a checkered floor", "on a chessboard"),
        "plain": ("on a plain background", "against a plain background"),
    },
    "light": {light: (f"lit from the {light}", f"with light from the {light}") for light in LIGHTS},
    "relation": {
        "left of": ("left of", "to the left of"),
        "right of": ("right of", "to the right of"),
        "in front of": ("in front of", "nearer than"),
        "behind": ("behind", "farther than"),
        "on top of": ("on top of", "on"),
        UNDER: ("under", "below"),
    },
}
OPPOSITE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of", "on top of": UNDER}
OBJECTS = (
    "a {size} {colour} {shape}",
    "a {colour} {size} {shape}",
    "a {size} {shape} in {colour}",
    "a {shape}, {size} and {colour}",
)
OPENINGS = ("", "", "a picture of", "a view of", "there is")
LEADS = ("", "there is")
"""The openings before which a phrase may stand, as in "on grass, there is a small red cube"."""


@dataclasses.dataclass
class Reading:
    """What a caption names: objects in the order of mention, each a dict of shape, colour, size, view, as far as named.

    relation is what the first object is to the second, one of RELATIONS; ground and light are names. None where the
    caption does not say. "B under A" is read as "A on top of B", with A first.
    """

    objects: list[dict[str, str]]
    relation: str | None = None
    ground: str | None = None
    light: str | None = None


def words(caption: str) -> list[str]:
    """Split a caption into its lower-case words; a comma is one of its own."""
    return re.findall(r"[^\s,]+|,", caption.lower())


def count(caption: str) -> int:
    """The number of words of a caption, without commas."""
    return sum(word != "," for word in words(caption))


class _Chooser:
    """Spends one row of uniform numbers, one for each choice."""

    def __init__(self, row: list[float]):
        self._numbers = iter(row)

    def one(self, options: Sequence[Phrase]) -> Phrase:
        return options[int(next(self._numbers) * len(options))]

    def shuffled(self, items: Sequence[Phrase]) -> list[Phrase]:
        """Every order equally likely (Fisher and Yates): the i-th place takes one of what is left."""
        left, done = list(items), []
        while len(left) > 1:
            done.append(left.pop(int(next(self._numbers) * len(left))))
        return done + left

    def chance(self, p: float) -> bool:
        return next(self._numbers) < p


class _Plain(_Chooser):
    """Takes the first wording of everything, in order, and says all that is said more often than not."""

    def __init__(self) -> None:
        super().__init__([])

    def one(self, options: Sequence[Phrase]) -> Phrase:
        return options[0]

    def shuffled(self, items: Sequence[Phrase]) -> list[Phrase]:
        return list(items)

    def chance(self, p: float) -> bool:
        return p > 0.5


def _object(kind: tuple[int, int, int], choose: _Chooser) -> str:
    names = zip(("shape", "colour", "size"), (SHAPES, tuple(COLOURS), tuple(SIZES)), kind, strict=True)
    chosen = {attribute: choose.one(WORDING[attribute][table[value]]) for attribute, table, value in names}
    return choose.one(OBJECTS).format(**chosen)


def _caption(
    kinds: list[tuple[int, int, int]], sides: list[int], relation: int, ground: int, light: int, choose: _Chooser
) -> str:
    bodies = [_object(kind, choose) for kind in kinds]
    link = ""
    if relation >= 0:
        word = RELATIONS[relation]
        if choose.chance(0.5):  # mention object 1 first
            bodies, sides, word = bodies[::-1], sides[::-1], OPPOSITE[word]
        link = choose.one(WORDING["relation"][word])
    opening = choose.one(OPENINGS)
    length = sum(count(part) for part in (opening, link, *bodies))

    rest: list[str] = []
    wanted = [("ground", list(GROUNDS)[ground], 0), ("light", list(LIGHTS)[light], 0)]
    wanted += [("view", VIEWS[side], i) for i, side in enumerate(sides) if side >= 0]
    for kind, name, i in choose.shuffled(wanted):
        phrase = choose.one(WORDING[kind][name])
        if not choose.chance(NAMED) or length + count(phrase) > MAX_WORDS:
            continue
        length += count(phrase)
        if kind == "view":
            bodies[i] += f", {phrase}"
        else:
            rest.append(phrase)

    text = bodies[0]
    if link:
        # Without the comma, "seen from the front left of" would have two readings.
        text += f"{', ' if ',' in text else ' '}{link} {bodies[1]}"
    if opening:
        text = f"{opening} {text}"
    if rest and opening in LEADS and choose.chance(0.4):
        text = f"{rest.pop()}, {text}"
    for phrase in rest:
        text += (", " if "," in text or choose.chance(0.5) else " ") + phrase
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def captions(scenes: Scenes, seed: int | None, first: int = 0) -> list[str]:
    """Describe each scene in words, lower case, at most MAX_WORDS of them; wording i depends on (seed, first + i) and the scene.

    Synonyms, the order of the attributes, of the two objects and of the phrases are drawn. With seed None every scene gets
    its plain caption: the first synonym, one fixed order, and all that MAX_WORDS has room for. Raises ValueError where a
    scene has no object 0, or where its objects stand as `relations` does not know.
    """
    if not bool(scenes.present[:, 0].all()):
        row = int((~scenes.present[:, 0]).nonzero()[0])
        raise ValueError(f"shape[{row}, 0] = -1; expected every scene to have an object 0")
    kinds = torch.stack([scenes.shape, scenes.colour, scenes.size], -1).tolist()
    if seed is None:
        choosers: list[_Chooser] = [_Plain() for _ in range(len(scenes))]
    else:
        numbers = uniforms(seed, torch.arange(first, first + len(scenes)), STREAMS, FIRST_STREAM).tolist()
        choosers = [_Chooser(row) for row in numbers]
    there = scenes.present.sum(1).tolist()
    columns = (kinds, views(scenes).tolist(), there, relations(scenes).tolist(), scenes.ground.tolist(), scenes.light.tolist())
    return [
        _caption([tuple(k) for k in kind[:n]], side[:n], relation, ground, light, choose)
        for kind, side, n, relation, ground, light, choose in zip(*columns, choosers, strict=True)
    ]


@functools.cache
def _phrases() -> dict[tuple[str, ...], tuple[str, str]]:
    known = {
        tuple(words(phrase)): (kind, name)
        for kind, names in WORDING.items()
        for name, synonyms in names.items()
        for phrase in synonyms
    }
    known |= {tuple(words(opening)): ("", "") for opening in OPENINGS if opening}
    known |= {(article,): ("article", "") for article in ("a", "an")}
    return known | {(word,): ("", "") for word in ("and", "in", ",")}


def vocabulary() -> list[str]:
    """All words that can occur in a caption, sorted; the comma is one of them."""
    return sorted({word for phrase in _phrases() for word in phrase})


def parse(caption: str) -> Reading:
    """Read a caption back: the longest phrase known at each place says what is named there.

    An article begins an object; a view belongs to the object before it, or to the first where none is named yet. Raises
    ValueError for a word that is not known or stands alone, and where one thing is named twice.
    """
    known, reading, relation = _phrases(), Reading([]), None
    longest = max(map(len, known))
    tokens, waiting, at = words(caption), {}, 0
    while at < len(tokens):
        size = next((n for n in range(longest, 0, -1) if tuple(tokens[at : at + n]) in known), 0)
        if not size:
            raise ValueError(f"caption has {tokens[at]!r} at word {at + 1}; expected words and phrases of the vocabulary")
        kind, name = known[tuple(tokens[at : at + size])]
        at += size
        if kind == "article":
            reading.objects.append(waiting)
            waiting = {}
        elif kind in ("ground", "light"):
            _name_once(getattr(reading, kind) is None, kind, caption)
            setattr(reading, kind, name)
        elif kind == "relation":
            _name_once(relation is None, kind, caption)
            relation = name
        elif kind:
            thing = reading.objects[-1] if reading.objects else waiting
            _name_once(kind not in thing, kind, caption)
            thing[kind] = name
    if relation and len(reading.objects) != 2:
        raise ValueError(f"caption {caption!r} names a relation and {len(reading.objects)} objects; expected two objects")
    if relation == UNDER:
        reading.objects.reverse()
        relation = "on top of"
    reading.relation = relation
    return reading


def _name_once(free: bool, kind: str, caption: str) -> None:
    if not free:
        raise ValueError(f"caption {caption!r} names two values of {kind}; expected one")
