"""Item 11.3: a temporal layer after a spatial one, and the learned share of each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_11.common import waves
from course_lib.grading.sets.tools import T, fit

Layer = Callable[[Tensor], Tensor]
LOUD = 7.3
"""How much larger what the layer says is than z: so that rounding shows."""


def _layer(h: Tensor) -> Tensor:
    """Stands for a 3-D convolution: (B, C, T, H, W), shape kept; frames, channels and neighbouring pixels meet."""
    if not isinstance(h, Tensor) or h.ndim != 5:
        got = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
        raise Unacceptable(f"layer is called on {got}; expected clips (B, C, T, H, W)")
    mixed = torch.einsum("oc,ts,bcshw->bothw", waves(h.shape[1]), waves(h.shape[2], 1), h + 0.4 * h.roll(1, -1))
    return LOUD * torch.tanh(mixed)


LAYERS: dict[str, Layer] = {"mixing": _layer, "silent": lambda h: h + 0 * _layer(h)}


def _clip(z: Tensor, T: int) -> Tensor:
    """(B T, C, H, W) -> (B, C, T, H, W)."""
    return z.unflatten(0, (-1, T)).transpose(1, 2)


def _frames(h: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W)."""
    return h.transpose(1, 2).flatten(0, 1)


def _by(alpha: Tensor, z: Tensor, layer: Layer, T: int) -> Tensor:
    """alpha z + (1 - alpha) z'."""
    return alpha * z + (1 - alpha) * _frames(layer(_clip(z, T)))


@item(
    "11.3", title="The mixing factor", function="mixed_layer", points=2, minutes=15, difficulty=1,
    answers=("course_lib.nets.temporal.Mixed",),
    hints=(
        "The frames of one clip follow one another: z.unflatten(0, (-1, T)) is (B, T, C, H, W). A 3-D convolution wants channels first: transpose(1, 2).",
        "Back: transpose(1, 2), then flatten(0, 1). What the layer gives is z'; z is what it was given.",
        "alpha = torch.sigmoid(a) is the share of the *spatial* z: alpha * z + (1 - alpha) * z_time, or z + (1 - alpha) * (z_time - z).",
    ),
)  # fmt: skip
class MixedLayer:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(layer: str, B: int, T: int, a: float) -> Case:
            return {"z": rng.normal(size=(B * T, 3, 2, 4)), "layer": layer, "a": a, "T": T}

        a = float(rng.uniform(0.3, 0.8))
        return [case("mixing", 2, 4, a), case("mixing", 3, 2, -3 * a), case("silent", 2, 3, a), case("mixing", 2, 3, 50.0)]

    def drive(fn, case: Case) -> Outputs:
        z = T(case["z"])
        out = arrays(z=call(fn, z, LAYERS[case["layer"]], torch.tensor([case["a"]], dtype=torch.float64), case["T"]))
        if case["a"] > 40:  # sigmoid is 1 to the last bit
            out["kept"] = np.array(1.0 if np.array_equal(out["z"], z.numpy()) else 2.0)
        return out

    def reference(z: Tensor, layer: Layer, a: Tensor, T: int) -> Tensor:
        return z + (1 - a.sigmoid()) * (_frames(layer(_clip(z, T))) - z)

    @mistake("the shares are exchanged: alpha belongs to the spatial z, and alpha = 1 is the image model")
    def exchanged(z, layer, a, T):
        return _by(1 - a.sigmoid(), z, layer, T)

    @mistake("a itself is the share: it is learned, and may leave [0, 1]; alpha = sigmoid(a)")
    def a_itself(z, layer, a, T):
        return _by(a, z, layer, T)

    @mistake("a is clamped to [0, 1]: beyond that its gradient is 0, and it never comes back; alpha = sigmoid(a)")
    def clamped(z, layer, a, T):
        return _by(a.clamp(0, 1), z, layer, T)

    @mistake("alpha is tanh(a), GLIGEN's gate, which goes from -1 to 1; alpha = sigmoid(a)")
    def by_tanh(z, layer, a, T):
        return _by(a.tanh(), z, layer, T)

    @mistake("the new part is *added* to all of z: then z counts twice where the layer changes nothing; z has the share alpha")
    def added(z, layer, a, T):
        return z + _by(0 * a, z, layer, T) * (1 - a.sigmoid())

    @mistake(
        "z is counted with alpha and z' in full: the shares must add up to 1, or a layer that changes nothing makes z larger"
    )
    def new_in_full(z, layer, a, T):
        return a.sigmoid() * z + _by(0 * a, z, layer, T)

    @mistake("the shares are the roots of alpha and 1 - alpha: that keeps the variance of independent parts, and z' is made of z")
    def roots(z, layer, a, T):
        return a.sigmoid().sqrt() * z + (1 - a.sigmoid()).sqrt() * _by(0 * a, z, layer, T)

    @mistake("nothing is mixed: the result is that of the temporal layer alone, whatever a is")
    def layer_alone(z, layer, a, T):
        return _by(0 * a, z, layer, T)

    @mistake("the first axis is split as (T, B): frames of a clip follow one another, so it is (B, T)")
    def time_first(z, layer, a, T):
        folded = z.unflatten(0, (T, -1)).permute(1, 2, 0, 3, 4)
        found = layer(folded).permute(2, 0, 1, 3, 4).flatten(0, 1)
        return a.sigmoid() * z + (1 - a.sigmoid()) * found

    @mistake("the channels are not brought before the frames: the layer takes frames for channels, and convolves channels")
    def channels_for_frames(z, layer, a, T):
        return a.sigmoid() * z + (1 - a.sigmoid()) * layer(z.unflatten(0, (-1, T))).flatten(0, 1)

    @mistake("reshape alone makes (B, C, T, H, W): frames and channels are shuffled; split the first axis, then transpose")
    def reshaped_only(z, layer, a, T):
        _, C, H, W = z.shape
        return a.sigmoid() * z + (1 - a.sigmoid()) * layer(z.reshape(-1, C, T, H, W)).reshape(z.shape)

    @mistake("the way back is a reshape alone: z' lies in memory as (B, C, T, H, W); transpose first, then flatten")
    def back_by_reshape(z, layer, a, T):
        return a.sigmoid() * z + (1 - a.sigmoid()) * layer(_clip(z, T)).reshape(z.shape)

    @mistake("all frames are one clip, as if B were 1: clips then look at each other; T says how many frames a clip has")
    def one_clip(z, layer, a, T):
        return _by(a.sigmoid(), z, layer, len(z))

    @mistake(
        "right but for rounding: z' + alpha (z - z') at alpha = 1 is z' + (z - z'), which is not z to the last bit. z + (1 - alpha)(z' - z) is, and so is alpha z + (1 - alpha) z'"
    )
    def rounded(z, layer, a, T):
        new = _by(0 * a, z, layer, T)
        return new + a.sigmoid() * (z - new)

    @law("where the layer changes nothing, z' = z, the result must be z, whatever alpha is")
    def silent_layer(case: Case, out: Outputs) -> bool:
        return case["layer"] != "silent" or close(out["z"], case["z"])

    @law("at alpha = 1 the result must be z, the image model's, to the last bit")
    def image_model(case: Case, out: Outputs) -> bool:
        return "kept" not in out or out["kept"] == 1

    @law("the result must be a weighted sum of z and what the layer makes of its frames, (B, C, T, H, W)")
    def of_these_two(case: Case, out: Outputs) -> bool:
        return case["layer"] == "silent" or fit(out["z"], *_parts(case))[1] < 1e-8

    @law("the shares do not fit: alpha = sigmoid(a) for z, 1 - alpha for z'")
    def shares(case: Case, out: Outputs) -> bool:
        if case["layer"] == "silent":
            return True
        alpha = 1 / (1 + np.exp(-case["a"]))
        return close(fit(out["z"], *_parts(case))[0], [alpha, 1 - alpha])


def _parts(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """z and z'."""
    return case["z"], _frames(_layer(_clip(T(case["z"]), case["T"]))).numpy()
