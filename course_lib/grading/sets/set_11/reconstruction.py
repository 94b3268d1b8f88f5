"""Item 11.8: reconstruction guidance, by which unknown frames answer for what the network makes of the known ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import level
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_07.common import as_in_the_loop, differentiated, flat_squares
from course_lib.grading.sets.set_11.common import Clips, some_known
from course_lib.grading.sets.tools import T, fit


def _squares(D, x: Tensor, sigma: Tensor, x0: Tensor, m: Tensor) -> Tensor:
    """|x_a - D_a(x)|^2 of each clip, (B,)."""
    return flat_squares(m * (x0 - D(x, sigma)))


def _mask(known: Tensor, like: Tensor) -> Tensor:
    """(B, T) -> (B, T, 1, 1, 1), 1 where a frame is known, of the type of `like`."""
    return known.to(like)[:, :, None, None, None]


def _slope(D, x: Tensor, sigma: Tensor, x0: Tensor, m: Tensor) -> Tensor:
    """The gradient of |x_a - D_a(x)|^2 by x."""
    return differentiated(lambda x: _squares(D, x, sigma, x0, m), x)


def _guided(D, x: Tensor, sigma: Tensor, x0: Tensor, m: Tensor, move: Tensor) -> Tensor:
    """x_a in the known frames, D_b - move in the others."""
    return m * x0 + (1 - m) * (D(x, sigma) - move)


@item(
    "11.8", title="Reconstruction guidance", function="reconstruction", points=3, minutes=30, difficulty=3,
    answers=("course_lib.posterior.gradient.dps_score", "course_lib.posterior.gradient.dps", "course_lib.posterior.gradient.pigdm"),
    hints=(
        "The loop runs under torch.no_grad(). Inside `with torch.enable_grad():` make x = x.detach().requires_grad_(), and only then ask D(x, sigma): the gradient goes back *through* the network, which is how it comes from known to unknown frames.",
        "square = ((x0 - said)[known] ** 2).sum(): a sum, over known frames alone. slope = torch.autograd.grad(square, x)[0] has a value in every frame.",
        "torch.where(m, x0, said.detach() - w / 2 * slope), with m = known[:, :, None, None, None]. No alpha: in x = x0 + sigma eps it cancels.",
    ),
)  # fmt: skip
class Reconstruction:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(w: float, *shape: int) -> Case:
            known = some_known(rng, *shape[:2])
            sigma, clean = float(rng.uniform(0.6, 1.6)), rng.normal(size=shape)
            x0 = clean * known[:, :, None, None, None]
            x = clean + sigma * rng.normal(size=shape)
            return {"x": x, "sigma": sigma, "x0": x0, "known": known, "w": w}

        w = float(rng.uniform(2, 6))
        return [case(w, 2, 4, 1, 2, 2), case(w / 3, 3, 5, 2, 1, 2), case(0.0, 2, 3, 1, 2, 1)]

    def drive(fn, case: Case) -> Outputs:
        D, (x, x0, known) = Clips(case["x"].shape), (T(case[name]) for name in ("x", "x0", "known"))
        with as_in_the_loop():
            said = call(fn, D, x, level(case["sigma"]), x0, known, case["w"])
        return arrays(x0=said, carries_a_graph=1.0 + float(getattr(said, "requires_grad", False)))

    def reference(D, x: Tensor, sigma: Tensor, x0: Tensor, known: Tensor, w: float) -> Tensor:
        m = _mask(known, x)
        return _guided(D, x, sigma, x0, m, w / 2 * _slope(D, x, sigma, x0, m))

    @mistake("the sign is turned: this moves away from what is known; the gradient points uphill, so it is subtracted")
    def sign_turned(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return _guided(D, x, sigma, x0, m, -w / 2 * _slope(D, x, sigma, x0, m))

    @mistake("the factor 1/2 is missing: Eq. 7 has w / 2 before the gradient of a *square*, which brings a 2 of its own")
    def half_forgotten(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return _guided(D, x, sigma, x0, m, w * _slope(D, x, sigma, x0, m))

    @mistake("this is the gradient of the norm, not of its square: it pulls as hard when all but nothing is left to correct")
    def not_squared(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        slope = differentiated(lambda x: _squares(D, x, sigma, x0, m).sqrt(), x)
        return _guided(D, x, sigma, x0, m, w / 2 * slope)

    @mistake("this is the gradient of the *mean* square: it grows weaker with each pixel of a frame; the squares are summed")
    def mean_square(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        numbers = m.expand_as(x).flatten(1).sum(1)
        slope = differentiated(lambda x: _squares(D, x, sigma, x0, m) / numbers, x)
        return _guided(D, x, sigma, x0, m, w / 2 * slope)

    @mistake(
        "nothing has moved: D was detached, or its residual taken as it stands. By D's own frames the gradient lies in the known ones alone; only *through* the network, by x, does it come to the others"
    )
    def jacobian_left_out(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return _guided(D, x, sigma, x0, m, 0 * x)

    @mistake(
        "the gradient is multiplied by sigma², as for a score that becomes an estimate: the variance of the guess, taken as sigma², stands below and cancels it"
    )
    def times_the_variance(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return _guided(D, x, sigma, x0, m, w / 2 * sigma**2 * _slope(D, x, sigma, x0, m))

    @mistake(
        "the paper's alpha = 1 / sqrt(1 + sigma²) is there, and the gradient is by x: the paper's is by z = alpha x, 1 / alpha times as large, and alpha cancels"
    )
    def alpha_left_in(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return _guided(D, x, sigma, x0, m, w / 2 / (1 + sigma**2).sqrt() * _slope(D, x, sigma, x0, m))

    @mistake(
        "the square is over *all* frames: where nothing is known x0 is 0, and the clip is pulled to grey; known frames alone"
    )
    def all_frames_compared(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        slope = differentiated(lambda x: flat_squares(x0 - D(x, sigma)), x)
        return _guided(D, x, sigma, x0, m, w / 2 * slope)

    @mistake("all frames are moved, the known ones too: those are not to be guessed; put x0 there")
    def known_moved(D, x, sigma, x0, known, w):
        return D(x, sigma) - w / 2 * _slope(D, x, sigma, x0, _mask(known, x))

    @mistake("the known frames are left as D says: what is known is known; put x0 there")
    def known_as_said(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return D(x, sigma) - (1 - m) * w / 2 * _slope(D, x, sigma, x0, m)

    @mistake("only the *known* frames are moved, and the others stay as D says: the gradient belongs to the others")
    def known_moved_alone(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return D(x, sigma) - m * w / 2 * _slope(D, x, sigma, x0, m)

    @mistake("the mask is turned round: the frames that are 0 in x0 are taken for known")
    def mask_turned(D, x, sigma, x0, known, w):
        m = _mask(~known, x)
        return _guided(D, x, sigma, x0, m, w / 2 * _slope(D, x, sigma, x0, m))

    @mistake(
        "x is moved along the gradient, and D asked again: a second call, at another point; it is the *estimate* that is moved"
    )
    def x_moved(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        moved = x - (1 - m) * w / 2 * _slope(D, x, sigma, x0, m)
        return _guided(D, moved, sigma, x0, m, 0 * x)

    @mistake("the gradient is divided by its length in each clip: it says how far to go as well; keep it")
    def unit_length(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        slope = _slope(D, x, sigma, x0, m)
        return _guided(D, x, sigma, x0, m, w / 2 * slope / flat_squares(slope).sqrt()[:, None, None, None, None])

    @mistake("the squares are averaged over the clips: each clip is then guided less the more there are; sum them")
    def averaged_over_clips(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        return _guided(D, x, sigma, x0, m, w / 2 / len(x) * _slope(D, x, sigma, x0, m))

    @mistake(
        "the result still carries a graph: over the steps all networks would be kept in memory; detach D's answer, and subtract outside enable_grad"
    )
    def graph_kept_alive(D, x, sigma, x0, known, w):
        m = _mask(known, x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return _guided(D, x, sigma, x0, m, w / 2 * _slope(D, x, sigma, x0, m))

    @law("where a frame is known the result must be x0")
    def known_frames(case: Case, out: Outputs) -> bool:
        return close(out["x0"][case["known"]], case["x0"][case["known"]])

    @law("at w = 0 the other frames must be what D says")
    def without_weight(case: Case, out: Outputs) -> bool:
        return case["w"] > 0 or close(out["x0"][~case["known"]], _parts(case)[0])

    @law("the other frames must be D's, moved along the gradient of |x_a - D_a(x)|², and by nothing else")
    def along_the_gradient(case: Case, out: Outputs) -> bool:
        said, slope = _parts(case)
        return case["w"] == 0 or fit(out["x0"][~case["known"]], said, slope)[1] < 1e-8

    @law("the direction is right and the length is not: D_b - w/2 times the gradient of the sum of squares")
    def length(case: Case, out: Outputs) -> bool:
        said, slope = _parts(case)
        return case["w"] == 0 or close(fit(out["x0"][~case["known"]], said, slope)[0], [1, -case["w"] / 2])


def _parts(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What D says of the unknown frames, and the gradient there."""
    D, (x, x0, known) = Clips(case["x"].shape), (T(case[name]) for name in ("x", "x0", "known"))
    slope = _slope(D, x, level(case["sigma"]), x0, _mask(known, x))
    return D(x, level(case["sigma"])).numpy()[case["known"] == 0], slope.numpy()[case["known"] == 0]
