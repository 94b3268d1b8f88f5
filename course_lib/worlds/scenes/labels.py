"""What there is to read in a picture: labels of every attribute, in an order of the objects that the picture shows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import COLOURS, GROUNDS, LIGHTS, ORIENTED, RELATIONS, SHAPES, SIZES, Scenes
from course_lib.worlds.scenes.captions import Reading
from course_lib.worlds.scenes.sampling import relations

PAIRS = ("left of", "in front of", "on top of")
"""Relations of the first object to the second once the objects are put in order: "right of" and "behind" are turned round."""

OF_SCENE: dict[str, tuple[str, ...]] = {
    "count": ("one", "two"),
    "relation": PAIRS,
    "ground": tuple(GROUNDS),
    "light": tuple(LIGHTS),
}
OF_OBJECT: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
"""The attributes that have a name for each value, of the scene and of each object."""


@dataclass
class Labels:
    """Labels of N scenes with room for two objects; -1 where there is nothing to read.

    count, relation, ground, light (N,), shape, colour, size (N, 2): long, index into the names of OF_SCENE, OF_OBJECT.
    azimuth (N, 2): degrees in [0, 360) by which the camera stands to the left of an object's front, 0 for shapes that have
    none. front (N, 2) bool: whether a front is turned to the camera, by less than 90 degrees.
    Object 0 is the one on the left, in front or on top.
    """

    count: Tensor
    relation: Tensor
    ground: Tensor
    light: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    azimuth: Tensor
    front: Tensor

    def __len__(self) -> int:
        return len(self.count)

    @property
    def oriented(self) -> Tensor:
        """Whether there is an object with a front: (N, 2) bool."""
        return self.shape >= SHAPES.index(ORIENTED[0])

    @property
    def fronts(self) -> Tensor:
        """How many fronts the camera sees, (N,) long: one object with two would be the Janus problem."""
        return self.front.sum(1)


def labels(scenes: Scenes) -> Labels:
    """The labels of these scenes. Raises ValueError where the objects stand as `relations` does not know."""
    relation = relations(scenes)
    turned = (relation == RELATIONS.index("right of")) | (relation == RELATIONS.index("behind"))
    pair = torch.tensor([0, 0, 1, 1, 2, -1], device=relation.device)[relation]  # in the order of RELATIONS; -1 is the last
    order = torch.where(
        turned[:, None], torch.tensor([1, 0], device=relation.device), torch.tensor([0, 1], device=relation.device)
    )

    def put(values: Tensor, empty: int) -> Tensor:
        if values.shape[1] == 1:
            values = torch.cat([values, torch.full_like(values, empty)], 1)
        return values.gather(1, order)

    shape = put(scenes.shape, -1)
    oriented = shape >= SHAPES.index(ORIENTED[0])
    azimuth = torch.where(oriented, (scenes.azimuth[:, None] - put(scenes.yaw, 0)) % 360, 0.0)
    return Labels(
        count=scenes.present.sum(1) - 1,
        relation=pair,
        ground=scenes.ground,
        light=scenes.light,
        shape=shape,
        colour=put(scenes.colour, -1),
        size=put(scenes.size, -1),
        azimuth=azimuth,
        front=oriented & (torch.deg2rad(azimuth).cos() > 0),
    )


def obeyed(read: Labels, prompts: list[Reading]) -> dict[str, Tensor]:
    """Whether each picture shows what its prompt names, by attribute: name -> (N,) float, 1, 0, or nan where not named.

    shape, colour and size ask for all named objects; `count` is always asked; `view` asks that the camera stands within 45
    degrees of the side named, of every object for which one is named. `all` is 1 where every named attribute is right.
    Raises ValueError where the numbers of pictures and prompts differ.
    """
    if len(read) != len(prompts):
        raise ValueError(f"prompts has {len(prompts)} readings; expected {len(read)}, one for each picture")
    rows = []
    for i, prompt in enumerate(prompts):
        found = [_obeyed(read, i, order) for order in _orders(prompt)]
        rows.append(max(found, key=lambda row: (row["all"], sum(row.values()))))
    names = ("count", "shape", "colour", "size", "relation", "ground", "light", "view", "all")
    return {name: torch.tensor([row.get(name, float("nan")) for row in rows]) for name in names}


def _orders(prompt: Reading) -> list[Reading]:
    """Two objects of which no relation is named may stand in either order."""
    free = prompt.relation is None and len(prompt.objects) == 2
    return [prompt, dataclasses.replace(prompt, objects=prompt.objects[::-1])] if free else [prompt]


def _obeyed(read: Labels, i: int, prompt: Reading) -> dict[str, float]:
    objects, relation = list(prompt.objects), prompt.relation
    if relation in ("right of", "behind"):
        objects.reverse()
        relation = {"right of": "left of", "behind": "in front of"}[relation]
    found: dict[str, list[bool]] = {"count": [int(read.count[i]) == len(objects) - 1]}
    for name, value in (("relation", relation), ("ground", prompt.ground), ("light", prompt.light)):
        if value is not None:
            found[name] = [int(getattr(read, name)[i]) == OF_SCENE[name].index(value)]
    for k, thing in enumerate(objects[:2]):  # of more, no picture has enough
        for name, value in thing.items():
            if name == "view":
                side = 90.0 * ("front", "left", "back", "right").index(value)
                off = abs((float(read.azimuth[i, k]) - side + 180) % 360 - 180)
                right = bool(read.oriented[i, k]) and off <= 45
            else:
                right = int(getattr(read, name)[i, k]) == OF_OBJECT[name].index(value)
            found.setdefault(name, []).append(right)
    row = {name: float(all(values)) for name, values in found.items()}
    return row | {"all": float(all(row.values()))}
