"""Items 06.3 and 06.8: replacement of known pixels at the right noise level, and RePaint's jumps back."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, ask, geometric, level, noised, step_case
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, fit
from course_lib.operators import Mask
from course_lib.posterior import replacement
from course_lib.steps import ddim

PICTURE = (3, 1, 4, 4)


def _step(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Deterministic DDIM."""
    x0 = D(x, sigma)
    return x0 + sigma_next / sigma * (x - x0)


def _overwritten(x: Tensor, y_t: Tensor, mask: Tensor, sigma_next: Tensor, sigma_y: float) -> Tensor:
    """y_t in the known pixels, unless x is cleaner than y already."""
    return torch.where(mask, y_t, x) if sigma_next >= sigma_y else x


def _missing(high: Tensor, low: Tensor | float) -> Tensor:
    """The noise that leads from one level to a higher one; 0 where it is not higher."""
    return (high**2 - low**2).clamp_min(0).sqrt()


@item(
    "06.3", title="Replacement at the right noise level", function="replaced", points=2, minutes=20, difficulty=2,
    answers=("course_lib.posterior.replacement.replacement",),
    hints=(
        "First the step, as if nothing were known: x0 = D(x, sigma), x' = x0 + (sigma' / sigma) (x - x0). It ends at sigma'.",
        "The known pixels must look as x' does: x0 with noise of size sigma'. y has noise of size sigma_y already.",
        "Independent noises add in variance: sigma_y² + s² = sigma'², so y_t = y + s z with s = sqrt(sigma'² - sigma_y²).",
        "torch.where(mask, y_t, x'); where sigma' < sigma_y, y is noisier than x' and nothing is overwritten.",
    ),
)  # fmt: skip
class Replaced:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(D: str, ratio: float, sigma_y: float) -> Case:
            mask = rng.permuted(np.arange(16) < 8).reshape(PICTURE[1:])
            y = np.where(mask, rng.normal(size=PICTURE), 0.0)
            return step_case(rng, D, PICTURE, ratio) | {"y": y, "mask": mask, "sigma_y": sigma_y, "z": rng.normal(size=PICTURE)}

        noisy = float(rng.uniform(0.2, 0.3))  # sigma is at least 0.7: sigma' = 0.2 sigma may lie below sigma_y, 0.6 sigma above
        late = case("turned", 0.25, 0.0)
        late["sigma_y"] = late["sigma_next"] * 1.5
        return [case("peaks", 0.6, 0.0), case("turned", 0.6, noisy), late, case("peaks", 0.0, 0.0)]

    def drive(fn, case: Case) -> Outputs:
        D, sigma, sigma_next = DENOISERS[case["D"]], level(case["sigma"]), level(case["sigma_next"])
        return arrays(
            x=call(fn, D, T(case["x"]), sigma, sigma_next, T(case["y"]), T(case["mask"]), case["sigma_y"], T(case["z"]))
        )

    def reference(D, x: Tensor, sigma: Tensor, sigma_next: Tensor, y: Tensor, mask: Tensor, sigma_y: float, z: Tensor) -> Tensor:
        return replacement(ddim, Mask(mask), y, lambda x: z, sigma_y)(D, x, sigma, sigma_next)[0]

    @mistake("the known pixels get the noise of sigma, the level that the step has left; x' lies at sigma'")
    def level_before(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return _overwritten(_step(D, x, sigma, sigma_next), y + _missing(sigma, sigma_y) * z, mask, sigma_next, sigma_y)

    @mistake(
        "y is put in without noise: at sigma' the network then sees a picture that is clean in one part and noisy in the other"
    )
    def clean(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return _overwritten(_step(D, x, sigma, sigma_next), y, mask, sigma_next, sigma_y)

    @mistake("sigma_y² is *added*: y has that noise already, and needs only the rest, sqrt(sigma'² - sigma_y²)")
    def noise_added_twice(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        std = (sigma_next**2 + sigma_y**2).sqrt()
        return _overwritten(_step(D, x, sigma, sigma_next), y + std * z, mask, sigma_next, sigma_y)

    @mistake("deviations are subtracted, sigma' - sigma_y; independent noises add in *variance*: sqrt(sigma'² - sigma_y²)")
    def deviations_subtracted(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return _overwritten(_step(D, x, sigma, sigma_next), y + (sigma_next - sigma_y) * z, mask, sigma_next, sigma_y)

    @mistake("the measurement's own noise is forgotten: y + sigma' z has the variance sigma'² + sigma_y²")
    def own_noise_forgotten(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return torch.where(mask, y + sigma_next * z, _step(D, x, sigma, sigma_next))

    @mistake("z is multiplied by the variance sigma'² - sigma_y²; take its root")
    def variance_for_deviation(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return _overwritten(_step(D, x, sigma, sigma_next), y + (sigma_next**2 - sigma_y**2) * z, mask, sigma_next, sigma_y)

    @mistake("below sigma_y the known pixels are still overwritten: y is noisier there than x' may be; leave x' as it is")
    def overwritten_to_the_end(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return torch.where(mask, y + _missing(sigma_next, sigma_y) * z, _step(D, x, sigma, sigma_next))

    @mistake("the mask is turned round: it is True where a pixel is *known*, and that is where y goes")
    def mask_turned(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return _overwritten(_step(D, x, sigma, sigma_next), y + _missing(sigma_next, sigma_y) * z, ~mask, sigma_next, sigma_y)

    @mistake(
        "x is overwritten *before* the step, at sigma; the step then moves the known pixels away again. Overwrite x', after it"
    )
    def before_the_step(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return _step(D, _overwritten(x, y + _missing(sigma, sigma_y) * z, mask, sigma, sigma_y), sigma, sigma_next)

    @mistake("it is the estimate x0 that is overwritten: that is the null-space method of 06.4; here x' is, by y with noise")
    def estimate_overwritten(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        x0 = D(x, sigma)
        return torch.where(mask, y, x0) + sigma_next / sigma * (x - x0)

    @mistake("the step is missing: x itself is overwritten and stays at sigma where nothing is known")
    def no_step(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return _overwritten(x, y + _missing(sigma_next, sigma_y) * z, mask, sigma_next, sigma_y)

    @mistake("the noise is the network's own, (x - x0) / sigma; replacement takes fresh noise, z")
    def noise_of_the_network(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        eps = (x - D(x, sigma)) / sigma
        return _overwritten(_step(D, x, sigma, sigma_next), y + _missing(sigma_next, sigma_y) * eps, mask, sigma_next, sigma_y)

    @mistake("y_t is scaled by 1 / sqrt(1 + sigma'²): that is DDPM's coordinate; here x = x0 + sigma eps, and y keeps its size")
    def other_coordinate(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        y_t = (y + _missing(sigma_next, sigma_y) * z) / (1 + sigma_next**2).sqrt()
        return _overwritten(_step(D, x, sigma, sigma_next), y_t, mask, sigma_next, sigma_y)

    @law("where nothing is known the result must be that of the plain step, x0 + (sigma' / sigma) (x - x0)")
    def unknown_part(case: Case, out: Outputs) -> bool:
        x0, hidden = ask(case, case["x"], case["sigma"]), ~case["mask"]
        moved = x0 + case["sigma_next"] / case["sigma"] * (case["x"] - x0)
        return close(out["x"][:, hidden], moved[:, hidden])

    @law("where sigma' < sigma_y the known pixels must be those of the plain step too")
    def left_alone(case: Case, out: Outputs) -> bool:
        if case["sigma_next"] >= case["sigma_y"]:
            return True
        x0 = ask(case, case["x"], case["sigma"])
        return close(out["x"], x0 + case["sigma_next"] / case["sigma"] * (case["x"] - x0))

    @law("the known pixels must be y plus noise s z, such that y's own noise and this together have the deviation sigma'")
    def level_of_the_known(case: Case, out: Outputs) -> bool:
        if case["sigma_next"] < case["sigma_y"]:
            return True
        y, z = (case[name][:, case["mask"]] for name in ("y", "z"))
        (signal, s), rest = fit(out["x"][:, case["mask"]], y, z)
        return rest < 1e-8 and close(signal, 1) and close(s**2 + case["sigma_y"] ** 2, case["sigma_next"] ** 2)


# --- 06.8 ----------------------------------------------------------------------------------------------


def _down(down, x: Tensor, levels: Tensor) -> Tensor:
    """One step after the other, from the first level to the last."""
    for sigma, sigma_next in pairwise(levels):
        x = down(x, sigma, sigma_next)
    return x


def _rounds(down, x: Tensor, levels: Tensor, z: Tensor, back) -> Tensor:
    """back(x, draw) and all steps down, once for each draw."""
    for draw in z:
        x = _down(down, back(x, draw), levels)
    return x


DOWN = {
    "still": lambda x, sigma, sigma_next: x,
    "peaks": lambda x, sigma, sigma_next: _step(DENOISERS["peaks"], x, sigma, sigma_next),
    "turned": lambda x, sigma, sigma_next: _step(DENOISERS["turned"], x, sigma, sigma_next),
}


@item(
    "06.8", title="RePaint's jump back", function="resampled", points=2, minutes=20, difficulty=2,
    answers=("course_lib.posterior.replacement.repaint",),
    hints=(
        "x = x0 + sigma' eps has noise of variance sigma'². At sigma it has sigma². Independent noises add in variance.",
        "x + sqrt(sigma² - sigma'²) z with sigma = levels[0] and sigma' = levels[-1]: one jump over all the levels between.",
        "Then every step down again: for k in range(len(levels) - 1): x = down(x, levels[k], levels[k + 1]). Once for each draw in z.",
    ),
)  # fmt: skip
class Resampled:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(down: str, steps: int, rounds: int) -> Case:
            levels = geometric(rng, steps, 0.4, float(rng.uniform(1.5, 2.5)))
            x = noised(rng, PICTURE, 0.4)
            return {"down": down, "x": x, "levels": levels, "z": rng.normal(size=(rounds, *PICTURE))}

        return [case("still", 2, 2), case("peaks", 3, 3), case("turned", 2, 2)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(x=call(fn, DOWN[case["down"]], T(case["x"]), T(case["levels"]), T(case["z"])))

    def reference(down, x: Tensor, levels: Tensor, z: Tensor) -> Tensor:
        return _rounds(down, x, levels, z, lambda x, draw: x + _missing(levels[0], levels[-1]) * draw)

    @mistake("deviations are subtracted, sigma - sigma'; noises add in *variance*: sqrt(sigma² - sigma'²)")
    def deviations_subtracted(down, x, levels, z):
        return _rounds(down, x, levels, z, lambda x, draw: x + (levels[0] - levels[-1]) * draw)

    @mistake("z is multiplied by the variance sigma² - sigma'²; take its root")
    def variance_for_deviation(down, x, levels, z):
        return _rounds(down, x, levels, z, lambda x, draw: x + (levels[0] ** 2 - levels[-1] ** 2) * draw)

    @mistake("all of sigma's noise is added, though x has that of sigma' already: the sum is sqrt(sigma² + sigma'²), above sigma")
    def all_the_noise(down, x, levels, z):
        return _rounds(down, x, levels, z, lambda x, draw: x + levels[0] * draw)

    @mistake("the variances are added, sqrt(sigma² + sigma'²); what is missing is their difference")
    def variances_added(down, x, levels, z):
        return _rounds(down, x, levels, z, lambda x, draw: x + (levels[0] ** 2 + levels[-1] ** 2).sqrt() * draw)

    @mistake("x is forgotten: sigma z alone starts again from pure noise, and nothing of what was found remains")
    def pure_noise(down, x, levels, z):
        return _rounds(down, x, levels, z, lambda x, draw: levels[0] * draw)

    @mistake(
        "x shrinks and gets the noise of DDPM's coordinate, in which the variance stays 1; here x = x0 + sigma eps keeps x0's size"
    )
    def other_coordinate(down, x, levels, z):
        share = (1 + levels[-1] ** 2) / (1 + levels[0] ** 2)
        return _rounds(down, x, levels, z, lambda x, draw: share.sqrt() * x + (1 - share).sqrt() * draw)

    @mistake("the way down is one long step from sigma to sigma'; take all the levels between, for which `down` was made")
    def one_long_step(down, x, levels, z):
        return _rounds(down, x, levels[[0, -1]], z, lambda x, draw: x + _missing(levels[0], levels[-1]) * draw)

    @mistake("the jump goes back one level only, to levels[-2]; go back to levels[0]")
    def one_level_back(down, x, levels, z):
        return _rounds(down, x, levels[-2:], z, lambda x, draw: x + _missing(levels[-2], levels[-1]) * draw)

    @mistake("every round gets the same noise, z[0]; each jump needs a draw of its own")
    def same_noise(down, x, levels, z):
        return _rounds(down, x, levels, z[:1].expand_as(z), lambda x, draw: x + _missing(levels[0], levels[-1]) * draw)

    @mistake("there is one round only; go back and down once for *each* draw in z")
    def one_round(down, x, levels, z):
        return _rounds(down, x, levels, z[:1], lambda x, draw: x + _missing(levels[0], levels[-1]) * draw)

    @mistake("every round starts from the first x; start from what the last round has found, or the rounds do not add up")
    def always_the_first(down, x, levels, z):
        return _rounds(down, x, levels, z, lambda _, draw: x + _missing(levels[0], levels[-1]) * draw)

    @mistake("the last jump back is not followed by the way down: what comes back lies at sigma, not at sigma'")
    def left_at_the_top(down, x, levels, z):
        jump = lambda x, draw: x + _missing(levels[0], levels[-1]) * draw
        return jump(_rounds(down, x, levels, z[:-1], jump), z[-1])

    @mistake("noise is added on the way down too, before each step; it is added once, in the jump")
    def noise_at_every_level(down, x, levels, z):
        for draw in z:
            x = x + _missing(levels[0], levels[-1]) * draw
            for sigma, sigma_next in pairwise(levels):
                x = down(x, sigma, sigma_next) + _missing(sigma, sigma_next) * draw
        return x

    @law("where down changes nothing, each round must add noise of variance sigma² - sigma'², each with its own draw")
    def noise_of_the_jump(case: Case, out: Outputs) -> bool:
        if case["down"] != "still":
            return True
        factors, rest = fit(out["x"], case["x"], *case["z"])
        return rest < 1e-8 and close(factors[0], 1) and close(factors[1:] ** 2, case["levels"][0] ** 2 - case["levels"][-1] ** 2)
