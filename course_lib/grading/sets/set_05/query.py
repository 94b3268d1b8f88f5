"""Item 05.8: a picture at any place, by the local ensemble of a local implicit image function."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T
from course_lib.nets import liif

CORNERS = tuple(torch.tensor([dy, dx], dtype=torch.float64) for dy in (0, 1) for dx in (0, 1))


class _Answer:
    """f(z (B, N, C), away (N, 2)) -> (B, N, 3), which is not linear in either; refuses other shapes."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, z: Tensor, away: Tensor) -> Tensor:
        C = len(self.weight) - 2
        if z.ndim != 3 or z.shape[-1] != C or away.shape[-2:] != (z.shape[1], 2):
            raise Unacceptable(
                f"f is asked with z of shape {tuple(z.shape)} and away of shape {tuple(away.shape)}; expected (B, N, {C}) and (N, 2)"
            )
        return torch.tanh(z @ self.weight[:C] + away @ self.weight[C:])


def _units(features: Tensor, at: Tensor) -> Tensor:
    """Places in units of a feature, (N, 2): the whole numbers are the centres of features."""
    return (at + 1) / 2 * torch.tensor(features.shape[-2:]) - 0.5


def _read(features: Tensor, where: Tensor) -> Tensor:
    """Features at whole numbers (N, 2) of row and column, (B, N, C)."""
    row, column = (where[:, i].long().clamp(0, n - 1) for i, n in enumerate(features.shape[-2:]))
    return features[:, :, row, column].transpose(1, 2)


def _opposite(away: Tensor) -> Tensor:
    """The area of the rectangle between the place and the opposite feature, (N,)."""
    return (1 - away.abs()).prod(-1)


def _mixed(f, features: Tensor, index: Tensor, weight=_opposite, told=lambda away: away, read=_read) -> Tensor:
    """The sum of weight(away) f(z, told(away)) over the four features around each place."""
    total = 0
    for corner in CORNERS:
        one = index.floor() + corner
        away = index - one
        total = total + weight(away)[:, None] * f(read(features, one), told(away))
    return total


@item(
    "05.8", title="A picture at any place", function="local_ensemble", points=2, minutes=30, difficulty=3,
    answers=("course_lib.nets.liif.ensemble",),
    hints=(
        "Count in units of a feature: index = (at + 1) / 2 * (h, w) - 0.5 is (N, 2), and a whole number where a feature's centre is. The four around are floor(index) + (0 or 1, 0 or 1).",
        "z of a corner is features[:, :, row, column].transpose(1, 2), (B, N, C); its offset is away = index - corner, each number between -1 and 1.",
        "The rectangle to the *opposite* corner has the sides 1 - |away|: weight = (1 - away.abs()).prod(-1). The four weights add up to 1; sum weight[:, None] * f(z, away).",
    ),
)  # fmt: skip
class LocalEnsemble:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(B: int, C: int, h: int, w: int, N: int) -> Case:
            inside = 1 - 1 / np.array([h, w])  # between the outer centres, where all four features are there
            at = rng.uniform(-0.98, 0.98, (N, 2)) * inside
            return {"features": rng.normal(size=(B, C, h, w)), "at": at, "weight": rng.normal(size=(C + 2, 3))}

        constant = case(2, 2, 3, 4, 5)
        constant["features"][:] = constant["features"][:, :, :1, :1]
        constant["weight"][-2:] = 0  # f does not hear the offset: all four answers agree
        return [case(2, 2, 4, 6, 7), case(1, 3, 5, 3, 9), case(3, 2, 4, 4, 6), constant]

    def drive(fn, case: Case) -> Outputs:
        return arrays(out=call(fn, _Answer(T(case["weight"])), T(case["features"]), T(case["at"])))

    def reference(f, features: Tensor, at: Tensor) -> Tensor:
        return liif.ensemble(lambda z, away, cell: f(z, away), features, at, torch.zeros(2)).transpose(1, 2)

    @mistake(
        "each answer weighs as the rectangle between the place and its *own* feature: the farthest counts most; take the opposite one"
    )
    def adjacent_area(f, features, at):
        return _mixed(f, features, _units(features, at), weight=lambda away: away.abs().prod(-1))

    @mistake(
        "the offsets are in units of the picture, where it is 2 wide; f is told them in units of a feature: times h / 2 and w / 2"
    )
    def offsets_in_absolute_units(f, features, at):
        sides = torch.tensor(features.shape[-2:])
        return _mixed(f, features, _units(features, at), told=lambda away: away * 2 / sides)

    @mistake("`at` is read as (x, y); it is (y, x), row first")
    def places_as_x_y(f, features, at):
        return _mixed(f, features, _units(features, at.flip(-1)))

    @mistake("the features and weights are right, and f is told the offset as (x, y); it is (y, x), as in `at`")
    def offsets_as_x_y(f, features, at):
        return _mixed(f, features, _units(features, at), told=lambda away: away.flip(-1))

    @mistake("the offset has the wrong sign: from the feature *to* the place, place - centre")
    def offsets_turned(f, features, at):
        return _mixed(f, features, _units(features, at), told=lambda away: -away)

    @mistake("only the nearest feature answers: the picture jumps where the nearest changes; mix all four")
    def nearest_alone(f, features, at):
        index = _units(features, at)
        return f(_read(features, index.round()), index - index.round())

    @mistake("the four answers count the same, 1/4 each: seams stay; weigh them by the area opposite")
    def plain_mean(f, features, at):
        return _mixed(f, features, _units(features, at), weight=lambda away: torch.full_like(away[:, 0], 0.25))

    @mistake("the *features* are interpolated and f is asked once; f is asked about each feature, and its four answers are mixed")
    def features_interpolated(f, features, at):
        index = _units(features, at)
        return f(_mixed(lambda z, _: z, features, index), index - index.round())

    @mistake("all four features are asked with the offset from the nearest one; each has its own")
    def one_offset_for_all(f, features, at):
        index = _units(features, at)
        return _mixed(f, features, index, told=lambda away: index - index.round())

    @mistake(
        "the weights go with one over the distance; asked for are areas, which are 0 where a feature stops to be one of the four"
    )
    def inverse_distance(f, features, at):
        index = _units(features, at)
        total = _mixed(lambda z, away: torch.ones_like(z[..., :1]), features, index, lambda away: 1 / away.norm(dim=-1))
        return _mixed(f, features, index, lambda away: 1 / away.norm(dim=-1)) / total

    @mistake(
        "the areas are not divided by their sum: in units of the picture a cell has the area 4 / (h w), and the answers come out too small"
    )
    def areas_not_normalised(f, features, at):
        h, w = features.shape[-2:]
        return _mixed(f, features, _units(features, at), weight=lambda away: _opposite(away) * 4 / (h * w))

    @mistake(
        "-1 and 1 are taken for the *centres* of the outer features; they are the edges of the picture (align_corners=False)"
    )
    def corners_aligned(f, features, at):
        return _mixed(f, features, (at + 1) / 2 * (torch.tensor(features.shape[-2:]) - 1))

    @mistake("half a feature is forgotten: centres lie at (k + 1/2) / n of a side, so that index = (at + 1) / 2 * n - 1/2")
    def half_forgotten(f, features, at):
        return _mixed(f, features, _units(features, at) + 0.5)

    @mistake("the weight is 1 less the *distance* along one axis only, |dy|; an area has both sides")
    def one_side(f, features, at):
        return _mixed(f, features, _units(features, at), weight=lambda away: (1 - away[:, 0].abs()) / 2)

    @law("where all features are one and f does not hear the offset, the answer must be that of f: the weights add up to 1")
    def weights_add_up(case: Case, out: Outputs) -> bool:
        return bool(case["weight"][-2:].any()) or close(out["out"], _four(case)[0])

    @law("an answer is a mean of four, and must lie between the least and the largest that f gives for the features around")
    def between_the_four(case: Case, out: Outputs) -> bool:
        said = _four(case)
        return bool(((out["out"] >= said.min(0) - 1e-9) & (out["out"] <= said.max(0) + 1e-9)).all())

    @law("the answers are means of the right four, but with other weights than the areas opposite")
    def areas(case: Case, out: Outputs) -> bool:
        features, at = T(case["features"]), T(case["at"])
        return close(out["out"], _mixed(_Answer(T(case["weight"])), features, _units(features, at)))


def _four(case: Case) -> np.ndarray:
    """What f says for each of the four features, (4, B, N, 3)."""
    features, index = T(case["features"]), _units(T(case["features"]), T(case["at"]))
    f = _Answer(T(case["weight"]))
    return torch.stack([f(_read(features, index.floor() + one), index - index.floor() - one) for one in CORNERS]).numpy()
