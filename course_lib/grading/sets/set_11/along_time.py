"""Item 11.2: each place of a clip as a sequence of frames, and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_11.common import waves
from course_lib.grading.sets.tools import T

Attend = Callable[[Tensor], Tensor]


def _attend(h: Tensor) -> Tensor:
    """Stands for an attention: (N, L, C) -> (N, L, C), each row by itself; its steps and its channels meet."""
    if not isinstance(h, Tensor) or h.ndim != 3:
        got = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
        raise Unacceptable(f"attend is called on {got}; expected sequences (N, t, c)")
    return torch.tanh(waves(h.shape[1]) @ h @ waves(h.shape[2], 1))


def _sequences(x: Tensor) -> Tensor:
    """[b, t, c, h, w] -> [b h w, t, c]."""
    return x.permute(0, 3, 4, 1, 2).flatten(0, 2)


def _clip(h: Tensor, x: Tensor) -> Tensor:
    """[b h w, t, c] -> the shape of x."""
    return h.unflatten(0, (len(x), *x.shape[-2:])).permute(0, 3, 4, 1, 2)


@item(
    "11.2", title="Sequences of frames", function="along_time", points=2, minutes=20, difficulty=2,
    answers=("course_lib.nets.temporal.to_time", "course_lib.nets.temporal.from_time", "course_lib.nets.temporal.TemporalAttention"),
    hints=(
        "reshape keeps the order in memory, and only renames it. To bring axes that are apart next to each other, permute first.",
        "x.permute(0, 3, 4, 1, 2) is [b, h, w, t, c]; reshape(b * h * w, t, c) then joins the first three.",
        "Back the same way in reverse: reshape(b, h, w, t, c), then permute so that t and c come behind b: permute(0, 3, 4, 1, 2) once more.",
    ),
)  # fmt: skip
class AlongTime:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [{"x": rng.normal(size=shape)} for shape in ((2, 3, 4, 2, 5), (3, 4, 2, 3, 2))]

    def drive(fn, case: Case) -> Outputs:
        return arrays(clip=call(fn, T(case["x"]), _attend))

    def reference(x: Tensor, attend: Attend) -> Tensor:
        return _clip(attend(_sequences(x)), x)

    @mistake(
        "reshape alone, there and back: without attention it undoes itself and looks right, but what it calls a sequence are numbers that lie side by side in memory. permute first"
    )
    def reshaped_only(x, attend):
        b, t, c, h, w = x.shape
        return attend(x.reshape(b * h * w, t, c)).reshape(x.shape)

    @mistake(
        "the way there is right, the way back a reshape alone: the result lies in memory as [b, h, w, t, c]; permute it back"
    )
    def back_by_reshape(x, attend):
        return attend(_sequences(x)).reshape(x.shape)

    @mistake("the way there is a reshape alone, the way back permutes: the sequences are no courses of a pixel; permute first")
    def there_by_reshape(x, attend):
        b, t, c, h, w = x.shape
        return _clip(attend(x.reshape(b * h * w, t, c)), x)

    @mistake("this attends over *space*: in each frame the places look at each other, [b t, h w, c]; no frame sees another")
    def over_space(x, attend):
        b, t, c, h, w = x.shape
        tokens = x.permute(0, 1, 3, 4, 2).reshape(b * t, h * w, c)
        return attend(tokens).reshape(b, t, h, w, c).permute(0, 1, 4, 2, 3)

    @mistake("this attends over space and time together, [b, t h w, c]: dear, and another layer; each place by itself, over t")
    def over_both(x, attend):
        b, t, c, h, w = x.shape
        tokens = x.permute(0, 1, 3, 4, 2).reshape(b, t * h * w, c)
        return attend(tokens).reshape(b, t, h, w, c).permute(0, 1, 4, 2, 3)

    @mistake("frames of *different clips* look at each other: b belongs to the rows, not to the sequence, [b h w, t, c]")
    def over_clips(x, attend):
        b, t, c, h, w = x.shape
        tokens = x.permute(3, 4, 0, 1, 2).reshape(h * w, b * t, c)
        return attend(tokens).reshape(h, w, b, t, c).permute(2, 3, 4, 0, 1)

    @mistake("clips look at each other, [t h w, b, c]: b and t are exchanged, and a sequence has one frame of each clip")
    def clips_for_frames(x, attend):
        b, t, c, h, w = x.shape
        tokens = x.permute(1, 3, 4, 0, 2).reshape(t * h * w, b, c)
        return attend(tokens).reshape(t, h, w, b, c).permute(3, 0, 4, 1, 2)

    @mistake("channels look at each other: the sequences are [b h w, c, t], with the frames as their width; t comes before c")
    def over_channels(x, attend):
        return _clip(attend(_sequences(x).mT).mT, x)

    @mistake("a whole frame is one token, [b, t, c h w]: then all places meet in it; each place has a sequence of its own")
    def frame_as_token(x, attend):
        return attend(x.flatten(2)).reshape(x.shape)

    @mistake("on the way back rows and columns are exchanged: h came before w, so split the first axis into (b, h, w)")
    def back_by_columns(x, attend):
        b, _, _, h, w = x.shape
        return attend(_sequences(x)).unflatten(0, (b, w, h)).permute(0, 3, 4, 2, 1)

    @mistake("on the way back the places are taken for the slowest axis: b came first, so split the first axis into (b, h, w)")
    def back_places_first(x, attend):
        b, _, _, h, w = x.shape
        return attend(_sequences(x)).unflatten(0, (h, w, b)).permute(2, 3, 4, 0, 1)

    @mistake("x is added: `attend` is all of the layer here; what goes round it comes in 11.4")
    def residual_added(x, attend):
        return x + _clip(attend(_sequences(x)), x)

    @law(
        "what stands at one place must not depend on other places: this pixel's frames alone must give what they give in the clip"
    )
    def places_apart(case: Case, out: Outputs) -> bool:
        course = T(case["x"])[1, :, :, 0, 1]
        return close(out["clip"][1, :, :, 0, 1], _attend(course[None])[0].numpy())

    @law("one place is right and others are not: look at the order in which the first axis is split on the way back")
    def all_places(case: Case, out: Outputs) -> bool:
        x = T(case["x"])
        corner = _attend(x[:, :, :, -1, 0])
        return close(out["clip"][:, :, :, -1, 0], corner.numpy())
