"""Item 11.7: frames between key frames, by a sampler that is shown the key frames at each level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import geometric
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_11.common import Clips, some_known
from course_lib.grading.sets.tools import T

Shown = Callable[[Tensor, int], Tensor]
"""(x, k) -> x as D is asked about it in step k."""


def _put(x: Tensor, frames: Tensor, known: Tensor) -> Tensor:
    """x with these frames where they are known."""
    return torch.where(known[:, :, None, None, None], frames, x)


def _moved(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Deterministic DDIM."""
    x0 = D(x, sigma)
    return x0 + sigma_next / sigma * (x - x0)


def _sampled(D, x: Tensor, sigmas: Tensor, shown: Shown) -> Tensor:
    """All steps; before each, x is as `shown` makes it."""
    for k in range(len(sigmas) - 1):
        x = _moved(D, shown(x, k), sigmas[k], sigmas[k + 1])
    return x


@item(
    "11.7", title="Between key frames, by replacement", function="between", points=2, minutes=20, difficulty=2,
    answers=("course_lib.posterior.replacement.replacement", "course_lib.posterior.replacement.repaint"),
    hints=(
        "At level sigma the network has only ever seen frames with noise of size sigma: so a known frame is shown as x0 + sigma eps.",
        "for k in range(len(sigmas) - 1): first x = torch.where(known[:, :, None, None, None], x0 + sigmas[k] * noise[k], x), then the step from sigmas[k] to sigmas[k + 1].",
        "The step moves the known frames too. After the last one, at sigma = 0, put x0 in once more.",
    ),
)  # fmt: skip
class Keyframes:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(N: int, *shape: int) -> Case:
            B, frames = shape[:2]
            sigmas = np.append(geometric(rng, N - 1, 0.3, float(rng.uniform(2, 4))), 0.0) if N > 1 else np.array([1.3, 0.0])
            known = some_known(rng, B, frames)
            return {"x": sigmas[0] * rng.normal(size=shape), "sigmas": sigmas, "known": known,
                    "x0": rng.normal(size=shape) * known[:, :, None, None, None], "noise": rng.normal(size=(N, *shape))}  # fmt: skip

        return [case(1, 3, 4, 1, 1, 2), case(3, 2, 5, 2, 1, 2), case(4, 3, 4, 1, 2, 1)]

    def drive(fn, case: Case) -> Outputs:
        D = Clips(case["x"].shape)
        with torch.no_grad():
            return arrays(x=call(fn, D, *(T(case[name]) for name in ("x", "sigmas", "x0", "known", "noise"))), calls=D.calls)

    def reference(D, x: Tensor, sigmas: Tensor, x0: Tensor, known: Tensor, noise: Tensor) -> Tensor:
        x = _sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k] * noise[k], known))
        return _put(x, x0, known)

    @mistake(
        "the known frames are put in *clean*: at level sigma the network takes what they show for x0 plus noise, and smooths it away"
    )
    def clean(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0, known)), x0, known)

    @mistake("the known frames have the noise of the *next* level: D is asked about x at sigmas[k], so they need sigmas[k]")
    def next_level(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k + 1] * noise[k], known)), x0, known)

    @mistake("the known frames have the noise of the first level all the time; it falls with sigma")
    def first_level(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[0] * noise[k], known)), x0, known)

    @mistake("noise is multiplied by the variance sigma²; by its root")
    def variance(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k] ** 2 * noise[k], known)), x0, known)

    @mistake("the mask is turned round: what is known is left to the sampler, and the rest is overwritten")
    def mask_turned(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k] * noise[k], ~known)), x0, ~known)

    @mistake(
        "the known frames are shown once, before the first step: each step moves them away again; show them before every one"
    )
    def shown_once(D, x, sigmas, x0, known, noise):
        x = _sampled(D, x, sigmas, lambda x, k: x if k else _put(x, x0 + sigmas[0] * noise[0], known))
        return _put(x, x0, known)

    @mistake("the known frames are put into the result alone: the others were made without a look at them")
    def at_the_end(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: x), x0, known)

    @mistake(
        "x is overwritten *after* the step, for sigmas[k + 1]: the first call, which decides most, has not seen the known frames"
    )
    def after_the_step(D, x, sigmas, x0, known, noise):
        for k in range(len(sigmas) - 1):
            x = _put(_moved(D, x, sigmas[k], sigmas[k + 1]), x0 + sigmas[k + 1] * noise[k], known)
        return x

    @mistake(
        "it is the *estimate* D(x, sigma) that gets the known frames, not x: the network never sees them, and the other frames do not follow"
    )
    def estimate_overwritten(D, x, sigmas, x0, known, noise):
        for k in range(len(sigmas) - 1):
            found = _put(D(x, sigmas[k]), x0, known)
            x = found + sigmas[k + 1] / sigmas[k] * (x - found)
        return x

    @mistake("every level takes the noise of the first, noise[0]; each has a draw of its own, noise[k]")
    def same_noise(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k] * noise[0], known)), x0, known)

    @mistake("all frames of a clip get the noise of its first: the network was trained on frames with noise of their own")
    def one_noise_a_clip(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k] * noise[k][:, :1], known)), x0, known)

    @mistake("all clips get the mask of the first; each has known frames of its own")
    def first_clips_mask(D, x, sigmas, x0, known, noise):
        known = known[:1].expand_as(known)
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k] * noise[k], known)), x0, known)

    @mistake("the known frames are *added* to what stands in x; they replace it")
    def added(D, x, sigmas, x0, known, noise):
        return _put(_sampled(D, x, sigmas, lambda x, k: _put(x, x + x0 + sigmas[k] * noise[k], known)), x0, known)

    @mistake(
        "the known frames are scaled by 1 / sqrt(1 + sigma²): that is DDPM's coordinate; here x = x0 + sigma eps keeps x0's size"
    )
    def other_coordinate(D, x, sigmas, x0, known, noise):
        shown = lambda x, k: _put(x, (x0 + sigmas[k] * noise[k]) / (1 + sigmas[k] ** 2).sqrt(), known)
        return _put(_sampled(D, x, sigmas, shown), x0, known)

    @mistake("the last step has moved the known frames, and they stay so: put x0 in once more at sigma = 0")
    def last_left_out(D, x, sigmas, x0, known, noise):
        return _sampled(D, x, sigmas, lambda x, k: _put(x, x0 + sigmas[k] * noise[k], known))

    @law("in the result the known frames must be x0")
    def keeps_the_known(case: Case, out: Outputs) -> bool:
        return close(out["x"][case["known"]], case["x0"][case["known"]])

    @law("D must be called once a step")
    def one_call_a_step(case: Case, out: Outputs) -> bool:
        return out["calls"] == len(case["sigmas"]) - 1

    @law("with a single step the other frames must be what D says of x with the known frames at sigmas[0] in it")
    def single_step(case: Case, out: Outputs) -> bool:
        if len(case["sigmas"]) > 2:
            return True
        x, x0, known, noise = (T(case[name]) for name in ("x", "x0", "known", "noise"))
        sigma = T(case["sigmas"])[0]
        said = Clips(x.shape)(_put(x, x0 + sigma * noise[0], known), sigma).numpy()
        return close(out["x"][~case["known"]], said[~case["known"]])
