"""Item 11.5: noise whose frames have something in common."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, fit, named


def _shares(a: float) -> tuple[float, float]:
    """a / sqrt(1 + a^2) and 1 / sqrt(1 + a^2)."""
    return a / (1 + a**2) ** 0.5, 1 / (1 + a**2) ** 0.5


def _mixed(shared: Tensor, own: Tensor, shares: tuple[float, float]) -> Tensor:
    return shares[0] * shared[:, None] + shares[1] * own


def _chain(first: Tensor, own: Tensor, shares: tuple[float, float]) -> Tensor:
    """eps_0 = first, eps_i = shares[0] eps_(i-1) + shares[1] own_i."""
    frames = [first]
    for i in range(1, own.shape[1]):
        frames.append(shares[0] * frames[-1] + shares[1] * own[:, i])
    return torch.stack(frames, 1)


def _both(shared: Tensor, own: Tensor, shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
    return _mixed(shared, own, shares), _chain(own[:, 0], own, shares)


@item(
    "11.5", title="Noise in common", function="clip_noise", points=2, minutes=20, difficulty=2,
    answers=("course_lib.video.noise.correlated", "course_lib.video.noise.covariance"),
    hints=(
        "Each frame alone must have the noise N(0, I) that the image model knows. Of independent noises the *variances* add: the squares of the two factors sum to 1.",
        "a / sqrt(1 + a²) for what is in common, 1 / sqrt(1 + a²) for a frame's own. mixed = s * shared[:, None] + o * own.",
        "Progressive: frames = [own[:, 0]]; for each further i append s * frames[-1] + o * own[:, i]; torch.stack(frames, 1).",
    ),
)  # fmt: skip
class ClipNoise:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(a: float, *shape: int) -> Case:
            B, _, *frame = shape
            return {"shared": rng.normal(size=(B, *frame)), "own": rng.normal(size=shape), "a": a}

        drawn = float(rng.uniform(1.4, 2.6))
        return [case(drawn, 2, 5, 2, 2, 3), case(1 / drawn, 3, 4, 1, 3, 2), case(0.0, 2, 3, 1, 2, 2)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, T(case["shared"]), T(case["own"]), case["a"]), "mixed", "progressive"))

    def reference(shared: Tensor, own: Tensor, a: float) -> tuple[Tensor, Tensor]:
        return _both(shared, own, _shares(a))

    @mistake(
        "nothing is divided by sqrt(1 + a²): each frame then has the variance 1 + a², or more along the chain, and the image model takes it for a higher noise level"
    )
    def not_normalised(shared, own, a):
        return _both(shared, own, (a, 1.0))

    @mistake(
        "the factors are a / (1 + a) and 1 / (1 + a), which sum to 1; their *squares* must, or the frames have too little noise"
    )
    def factors_sum_to_one(shared, own, a):
        return _both(shared, own, (a / (1 + a), 1 / (1 + a)))

    @mistake("the factors are the variances, a² / (1 + a²) and 1 / (1 + a²); noise is multiplied by their roots")
    def variances_for_deviations(shared, own, a):
        return _both(shared, own, (a**2 / (1 + a**2), 1 / (1 + a**2)))

    @mistake("a is taken for the share of the variance, sqrt(a) and sqrt(1 - a): it is a ratio of deviations, and may be above 1")
    def a_as_a_share(shared, own, a):
        return _both(shared, own, (a**0.5 / (1 + a) ** 0.5, 1 / (1 + a) ** 0.5))

    @mistake("the factors are exchanged: at a = 0 frames are independent, and the larger a the more they share")
    def exchanged(shared, own, a):
        return _both(shared, own, _shares(a)[::-1])

    @mistake("the shared noise is that of the first clip in all of them: frames of a clip share noise, clips do not")
    def shared_by_all_clips(shared, own, a):
        return _both(shared[:1].expand_as(shared), own, _shares(a))

    @mistake(
        "the shared noise is made of the frames' own, as their mean: that has the variance 1 / T and is not independent of them"
    )
    def mean_for_shared(shared, own, a):
        return _both(own.mean(1), own, _shares(a))

    @mistake(
        "the progressive noise starts from 0: its first frame has the variance 1 / (1 + a²), and so the next ones too little"
    )
    def from_zero(shared, own, a):
        return _mixed(shared, own, _shares(a)), _chain(_shares(a)[1] * own[:, 0], own, _shares(a))

    @mistake("the progressive noise starts from the shared one; its first frame is that frame's own noise")
    def from_shared(shared, own, a):
        return _mixed(shared, own, _shares(a)), _chain(shared, own, _shares(a))

    @mistake(
        "each frame is made of its neighbour's *own* noise: then frames two apart have nothing in common; take the noise that the frame before has got"
    )
    def of_own_neighbour(shared, own, a):
        s, o = _shares(a)
        return _mixed(shared, own, (s, o)), torch.cat([own[:, :1], s * own[:, :-1] + o * own[:, 1:]], 1)

    @mistake("each frame is made of the *first* one: all later ones are then alike near to it; take the frame before")
    def of_the_first(shared, own, a):
        s, o = _shares(a)
        return _mixed(shared, own, (s, o)), torch.cat([own[:, :1], s * own[:, :1] + o * own[:, 1:]], 1)

    @mistake("the chain runs from the last frame to the first; it starts with frame 0")
    def backwards(shared, own, a):
        return _mixed(shared, own, _shares(a)), _chain(own[:, -1], own.flip(1), _shares(a)).flip(1)

    @mistake(
        "neighbours of the chain have the correlation a² / (1 + a²), that of mixed frames; in the progressive noise it is a / sqrt(1 + a²)"
    )
    def correlation_of_mixed(shared, own, a):
        s = a**2 / (1 + a**2)
        return _mixed(shared, own, _shares(a)), _chain(own[:, 0], own, (s, (1 - s**2) ** 0.5))

    @mistake("only the chain is divided by sqrt(1 + a²); the mixed frames have the variance 1 + a²")
    def mixed_not_normalised(shared, own, a):
        return _mixed(shared, own, (a, 1.0)), _chain(own[:, 0], own, _shares(a))

    @mistake("the first mixed frame is left as its own noise: all frames of the mixed noise are made alike")
    def first_frame_left(shared, own, a):
        mixed, progressive = _both(shared, own, _shares(a))
        return torch.cat([own[:, :1], mixed[:, 1:]], 1), progressive

    @law("each mixed frame must be a sum of the clip's shared noise and the frame's own, with two factors whose squares sum to 1")
    def variance_of_mixed(case: Case, out: Outputs) -> bool:
        factors, rest = fit(out["mixed"], np.broadcast_to(case["shared"][:, None], case["own"].shape), case["own"])
        return rest < 1e-8 and close((factors**2).sum(), 1)

    @law("at a = 0 both must be the frames' own noise")
    def independent_at_zero(case: Case, out: Outputs) -> bool:
        return case["a"] > 0 or (close(out["mixed"], case["own"]) and close(out["progressive"], case["own"]))

    @law("frame 0 of the progressive noise must be that frame's own")
    def first_frame(case: Case, out: Outputs) -> bool:
        return close(out["progressive"][:, 0], case["own"][:, 0])

    @law(
        "each further frame of the progressive noise must be a sum of the frame before, as it is, and its own noise; squares sum to 1"
    )
    def variance_of_chain(case: Case, out: Outputs) -> bool:
        factors, rest = fit(out["progressive"][:, 1:], out["progressive"][:, :-1], case["own"][:, 1:])
        return rest < 1e-8 and close((factors**2).sum(), 1)
