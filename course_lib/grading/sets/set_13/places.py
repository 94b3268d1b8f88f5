"""Item 13.3: where a control's residuals are added in a U-Net."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_13.common import blended, unchanged
from course_lib.grading.sets.tools import T

Layer = Callable[..., Tensor]


def _net(levels: int) -> tuple[list[Layer], Layer, list[Layer]]:
    """down, middle, up of a network whose features all have the shape of x."""
    down = [lambda h, k=k: torch.tanh(blended(h, k) + 0.2 * k) for k in range(levels)]
    up = [lambda h, skip, k=k: torch.tanh(blended(h, 40 + k) + 0.8 * blended(skip, 60 + k)) for k in range(levels)]
    return down, lambda h: torch.tanh(blended(h, 20)), up


def _kept(down: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """What each layer of the encoder gives."""
    kept = [x]
    for layer in down:
        kept.append(layer(kept[-1]))
    return kept[1:]


def _decoded(up: Sequence[Layer], h: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """The decoder: the last feature that was kept comes first."""
    for layer, skip in zip(up, reversed(kept), strict=True):
        h = layer(h, skip)
    return h


def _added(features: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    return [f + r for f, r in zip(features, residuals, strict=True)]


_SWITCHED = {
    "told": lambda i, levels: True,
    "untold": lambda i, levels: False,
    "by_the_middle": lambda i, levels: i == levels,
    "by_the_finest": lambda i, levels: i == 0,
}
"""Which residuals are not 0 in each run."""


def _switched(case: Case, run: str) -> list[Tensor]:
    """The residuals of a run."""
    on = _SWITCHED[run]
    return [r.clone() if on(i, case["levels"]) else 0 * r for i, r in enumerate(T(case["residuals"]))]


@item(
    "13.3", title="The right places", function="told_unet", points=2, minutes=20, difficulty=2,
    answers=("course_lib.nets.unet.UNet.forward",),
    hints=(
        "First the network as it is: keep what each down layer gives, then the middle, and each up layer gets h and the *last* kept feature that is left: kept.pop(). Without residuals this must be the network itself.",
        "The encoder and the middle never hear of the residuals: they are added when all features are there, and only the decoder sees them. residuals[i] belongs to kept[i], the last to what the middle gives.",
        "*r, r_middle = residuals; kept = [f + one for f, one in zip(kept, r)]; h = middle(h) + r_middle, where h is the last feature *without* its residual.",
    ),
)  # fmt: skip
class RightPlaces:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(levels: int, shape: tuple[int, ...]) -> Case:
            return {"levels": levels, "x": rng.normal(size=shape), "residuals": 0.5 * rng.normal(size=(levels + 1, *shape))}

        return [case(3, (2, 3, 2, 2)), case(4, (1, 2, 2, 4))]

    def drive(fn, case: Case) -> Outputs:
        net, x, out = _net(case["levels"]), T(case["x"]), {}
        for name in _SWITCHED:
            residuals = _switched(case, name)
            with unchanged(residuals):
                out[name] = call(fn, *net, x, residuals)
        return arrays(**out)

    def reference(down, middle, up, x: Tensor, residuals: Sequence[Tensor]) -> Tensor:
        kept = _kept(down, x)
        return _decoded(up, middle(kept[-1]) + residuals[-1], _added(kept, residuals[:-1]))

    @mistake(
        "residuals are added to the encoder's *running* feature, so that all later layers see them too: that is where a T2I-Adapter adds its own. A ControlNet's are for the decoder alone"
    )
    def running_feature(down, middle, up, x, residuals):
        h, kept = x, []
        for layer, r in zip(down, residuals, strict=False):
            h = layer(h) + r
            kept.append(h)
        return _decoded(up, middle(h) + residuals[-1], kept)

    @mistake("residuals go into the encoder's running feature, and not into what is kept of it: it is the other way round")
    def running_feature_only(down, middle, up, x, residuals):
        h, kept = x, []
        for layer, r in zip(down, residuals, strict=False):
            h = layer(h)
            kept.append(h)
            h = h + r
        return _decoded(up, middle(h) + residuals[-1], kept)

    @mistake(
        "the last kept feature goes into the middle *with* its residual: kept[-1] += r changes the tensor that the middle is given as well; make new tensors, f + r"
    )
    def in_place(down, middle, up, x, residuals):
        kept = _added(_kept(down, x), residuals[:-1])
        h = _kept(down, x)[-1] + residuals[-2]
        return _decoded(up, middle(h) + residuals[-1], kept)

    @mistake("the order is reversed: residuals[0] is for what the *first* layer of the encoder gives, as kept[0]")
    def order_reversed(down, middle, up, x, residuals):
        kept = _kept(down, x)
        return _decoded(up, middle(kept[-1]) + residuals[-1], _added(kept, residuals[-2::-1]))

    @mistake(
        "the decoder is given the kept features in the order of the encoder; the last one that was kept comes first: kept.pop()"
    )
    def first_in_first_out(down, middle, up, x, residuals):
        kept = _kept(down, x)
        return _decoded(up, middle(kept[-1]) + residuals[-1], _added(kept, residuals[:-1])[::-1])

    @mistake("the middle's residual is missing")
    def middle_forgotten(down, middle, up, x, residuals):
        kept = _kept(down, x)
        return _decoded(up, middle(kept[-1]), _added(kept, residuals[:-1]))

    @mistake("only the middle's residual is added: the kept features have theirs too")
    def middle_alone(down, middle, up, x, residuals):
        kept = _kept(down, x)
        return _decoded(up, middle(kept[-1]) + residuals[-1], kept)

    @mistake("the middle's residual is added *before* the middle; it is for what the middle gives")
    def before_the_middle(down, middle, up, x, residuals):
        kept = _kept(down, x)
        return _decoded(up, middle(kept[-1] + residuals[-1]), _added(kept, residuals[:-1]))

    @mistake("the residuals are off by one: the middle's is the last, not the first")
    def middle_first(down, middle, up, x, residuals):
        kept = _kept(down, x)
        return _decoded(up, middle(kept[-1]) + residuals[0], _added(kept, residuals[1:]))

    @mistake("each residual is added twice, to the kept feature and to the decoder's h beside it; the kept feature alone")
    def added_twice(down, middle, up, x, residuals):
        *kept, h = _added([*(features := _kept(down, x)), middle(features[-1])], residuals)
        for layer, skip, r in zip(up, reversed(kept), residuals[-2::-1], strict=True):
            h = layer(h + r, skip)
        return h

    @mistake("residuals are added to the decoder's h, and the kept features stay as they are; it is the other way round")
    def into_the_decoder(down, middle, up, x, residuals):
        kept = _kept(down, x)
        h = middle(kept[-1]) + residuals[-1]
        for layer, skip, r in zip(up, reversed(kept), residuals[-2::-1], strict=True):
            h = layer(h + r, skip)
        return h

    @mistake(
        "residuals are added to what the layers of the decoder give; they belong to what these are *given*, the kept features"
    )
    def after_the_decoder(down, middle, up, x, residuals):
        kept = _kept(down, x)
        h = middle(kept[-1]) + residuals[-1]
        for layer, skip, r in zip(up, reversed(kept), residuals[-2::-1], strict=True):
            h = layer(h, skip) + r
        return h

    @mistake("h and the kept feature are exchanged in the decoder: layer(h, skip)")
    def exchanged(down, middle, up, x, residuals):
        kept = _kept(down, x)
        h = middle(kept[-1]) + residuals[-1]
        for layer, skip in zip(up, reversed(_added(kept, residuals[:-1])), strict=True):
            h = layer(skip, h)
        return h

    @mistake("the residuals *replace* the features: what the locked encoder found is lost; add them")
    def replaced(down, middle, up, x, residuals):
        return _decoded(up, residuals[-1], residuals[:-1])

    @mistake("features are multiplied by 1 + r, which is how a layer is modulated; a residual is added")
    def modulated(down, middle, up, x, residuals):
        kept = _kept(down, x)
        changed = [f * (1 + r) for f, r in zip(kept, residuals, strict=False)]
        return _decoded(up, middle(kept[-1]) * (1 + residuals[-1]), changed)

    @law(
        "with residuals of 0 the answer must be that of the network itself: down, middle, then up with the kept features, last first"
    )
    def the_network_itself(case: Case, out: Outputs) -> bool:
        return close(out["untold"], _right(case, "untold"))

    @law("with the middle's residual alone, the last, the answer must be the decoder's to what the middle gives, plus it")
    def middle_in_place(case: Case, out: Outputs) -> bool:
        return close(out["by_the_middle"], _right(case, "by_the_middle"))

    @law("with residuals[0] alone only the decoder's *last* layer may notice: it is given kept[0] + residuals[0]")
    def finest_in_place(case: Case, out: Outputs) -> bool:
        return close(out["by_the_finest"], _right(case, "by_the_finest"))


def _right(case: Case, run: str) -> np.ndarray:
    """The right answer of a run."""
    down, middle, up = _net(case["levels"])
    residuals = _switched(case, run)
    kept = _kept(down, T(case["x"]))
    return _decoded(up, middle(kept[-1]) + residuals[-1], _added(kept, residuals[:-1])).numpy()
