"""Item 06.5: one step of DDRM in the coordinates of the singular value decomposition."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import level
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, fit
from course_lib.operators import SVD, LinearOperator
from course_lib.posterior import ddrm


class _Diagonal(LinearOperator):
    """y_i = s_i x_i: an operator that is its own decomposition."""

    def __init__(self, s: Tensor):
        self.s, self.shape, self.out = s, tuple(s.shape), tuple(s.shape)

    def apply(self, x: Tensor) -> Tensor:
        return self.s * x

    def svd(self) -> SVD:
        same = lambda c: c
        return SVD(self.s, same, same, same, same)


def _read(y: Tensor, s: Tensor, sigma_y: float) -> tuple[Tensor, Tensor]:
    """y_i / s_i and r_i = sigma_y / s_i; 0 and infinity where nothing is measured."""
    one = torch.where(s > 0, s, 1.0)
    return torch.where(s > 0, y / one, 0.0), torch.where(s > 0, sigma_y / one, torch.inf)


def _unseen(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, z: Tensor) -> Tensor:
    """A coordinate that is not measured: DDIM with noise."""
    return x0 + sigma_next * ((1 - eta**2) ** 0.5 * (x - x0) / sigma + eta * z)


def _noisier(x0: Tensor, y: Tensor, r: Tensor, sigma_next: Tensor, eta: float, z: Tensor) -> Tensor:
    """A measurement with more noise than sigma'."""
    return x0 + sigma_next * ((1 - eta**2) ** 0.5 * _pull(y - x0, r) + eta * z)


def _cleaner(x0: Tensor, y: Tensor, r: Tensor, sigma_next: Tensor, eta_b: float, z: Tensor) -> Tensor:
    """A measurement with at most sigma' of noise."""
    return _mixed(x0, y, eta_b) + (sigma_next**2 - (eta_b * r) ** 2).clamp_min(0).sqrt() * z


def _pull(away: Tensor, r: Tensor) -> Tensor:
    """away / r, and 0 where r is 0 and the case does not apply."""
    return away / torch.where(r > 0, r, torch.inf)


def _mixed(x0: Tensor, y: Tensor, eta_b: float) -> Tensor:
    return (1 - eta_b) * x0 + eta_b * y


def _chosen(s: Tensor, known: Tensor, unseen: Tensor, noisier: Tensor, cleaner: Tensor) -> Tensor:
    """The case of each coordinate."""
    return torch.where(s > 0, torch.where(known, cleaner, noisier), unseen)


@item(
    "06.5", title="One coordinate of DDRM", function="ddrm_coordinates", points=3, minutes=40, difficulty=3,
    answers=("course_lib.posterior.ddrm.ddrm", "course_lib.posterior.spectral.Spectrum"),
    hints=(
        "Where s > 0 divide by it: y / s is x0 plus noise of deviation r = sigma_y / s. Where s = 0 use torch.where(s > 0, s, 1) to divide, and do not use the result.",
        "All three cases end with noise of variance sigma'² in total. With s = 0 and with sigma' < r it is shared as (1 - eta²) + eta² = 1: an old direction and fresh noise.",
        "The old direction is eps = (x - x0) / sigma where nothing is measured, and (y / s - x0) / r where it is, but with more noise than sigma'.",
        "Where sigma' >= r, eta_b y / s brings the variance eta_b² r² along; fresh noise gives the rest, sqrt(sigma'² - eta_b² r²).",
        "torch.where(s > 0, torch.where(sigma_next >= r, third, second), first). Clamp what stands under the root at 0, for coordinates of the other cases.",
    ),
)  # fmt: skip
class DDRMCoordinates:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(sigma: float, sigma_next: float, sigma_y: float, eta: float, eta_b: float) -> Case:
            # r = sigma_y / s: below sigma', between the two levels, and above sigma; three coordinates are not measured
            r = np.concatenate([rng.uniform(0.3, 0.7, 3) * 0.8, rng.uniform(0.9, 1.2, 3), rng.uniform(1.8, 3.0, 3)])
            s = rng.permuted(np.concatenate([0.4 / r, np.zeros(3)]))
            clean, draws = rng.normal(size=(2, len(s))), rng.normal(size=(4, 2, len(s)))
            y = np.where(s > 0, s * clean + 0.4 * draws[3], 0.0)
            return {"x": clean + sigma * draws[0], "x0": clean + 0.5 * draws[1], "y": y, "s": s, "sigma": sigma,
                    "sigma_next": sigma_next, "sigma_y": sigma_y, "eta": eta, "eta_b": eta_b, "z": draws[2]}  # fmt: skip

        sigma, eta = float(rng.uniform(1.4, 1.6)), float(rng.uniform(0.5, 0.85))
        return [
            case(sigma, 0.8, 0.4, eta, float(rng.uniform(0.5, 0.8))),
            case(sigma, 0.8, 0.4, eta, 1.0),
            case(sigma, 0.8, 0.0, eta, 1.0),  # an exact measurement: r = 0
            case(sigma, 0.0, 0.4, eta, 1.0),  # the last step
        ]

    def drive(fn, case: Case) -> Outputs:
        levels = level(case["sigma"]), level(case["sigma_next"])
        vectors = (T(case[name]) for name in ("x", "x0", "y", "s"))
        return arrays(x=call(fn, *vectors, *levels, case["sigma_y"], case["eta"], case["eta_b"], T(case["z"])))

    def reference(
        x: Tensor,
        x0: Tensor,
        y: Tensor,
        s: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        sigma_y: float,
        eta: float,
        eta_b: float,
        z: Tensor,
    ) -> Tensor:
        step = ddrm(_Diagonal(s), y, sigma_y, lambda x: z, eta, eta_b)
        return step(lambda x, sigma: x0, x, sigma, sigma_next)[0]

    @mistake(
        "the measurement's noise is taken as sigma_y in every coordinate; y / s has sigma_y / s: weak singular values are noisy"
    )
    def noise_not_divided(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y_bar, r = _read(y, s, sigma_y)[0], torch.full_like(s, sigma_y)
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y_bar, r, sigma_next, eta, z), _cleaner(x0, y_bar, r, sigma_next, eta_b, z))  # fmt: skip

    @mistake("y is not divided by s: it lies on the scale of the measurement, and x0 on that of the picture")
    def measurement_not_divided(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        r = _read(y, s, sigma_y)[1]
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _cleaner(x0, y, r, sigma_next, eta_b, z))  # fmt: skip

    @mistake("the case is chosen by sigma; it is the level that the step goes to, sigma', that is compared with r")
    def level_before(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        return _chosen(s, sigma >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _cleaner(x0, y, r, sigma_next, eta_b, z))  # fmt: skip

    @mistake("the second and the third case are exchanged: where sigma' >= r the measurement is the *cleaner* one, and is taken")
    def cases_exchanged(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        return _chosen(s, sigma_next < r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _cleaner(x0, y, r, sigma_next, eta_b, z))  # fmt: skip

    @mistake(
        "third case: the measurement's noise is not taken off; eta_b y / s brings eta_b² r² along, and the sum is above sigma'²"
    )
    def noise_not_taken_off(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _mixed(x0, y, eta_b) + sigma_next * z)  # fmt: skip

    @mistake("third case: the measurement's noise is *added*, sqrt(sigma'² + eta_b² r²); it is there already: subtract it")
    def noise_added(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        std = (sigma_next**2 + (eta_b * torch.where(s > 0, r, 0.0)) ** 2).sqrt()
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _mixed(x0, y, eta_b) + std * z)  # fmt: skip

    @mistake("third case: deviations are subtracted, sigma' - eta_b r; variances are: sqrt(sigma'² - eta_b² r²)")
    def deviations_subtracted(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        std = (sigma_next - eta_b * r).clamp_min(0)
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _mixed(x0, y, eta_b) + std * z)  # fmt: skip

    @mistake("third case: all of r² is taken off; only the share eta_b of y is in the mean, and brings eta_b² r²")
    def share_forgotten(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        std = (sigma_next**2 - r**2).clamp_min(0).sqrt()
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _mixed(x0, y, eta_b) + std * z)  # fmt: skip

    @mistake("third case: the shares are exchanged; eta_b is that of the measurement, 1 - eta_b that of the estimate")
    def shares_exchanged(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        std = (sigma_next**2 - (eta_b * r) ** 2).clamp_min(0).sqrt()
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, y, r, sigma_next, eta, z), _mixed(y, x0, eta_b) + std * z)  # fmt: skip

    @mistake("second case: a measurement with more noise than sigma' is not used at all; it gives the direction (y / s - x0) / r")
    def noisy_ones_unused(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        unseen = _unseen(x, x0, sigma, sigma_next, eta, z)
        return _chosen(s, sigma_next >= r, unseen, unseen, _cleaner(x0, y, r, sigma_next, eta_b, z))

    @mistake("second case: the direction has the wrong sign, and leads away from the measurement: (y / s - x0) / r")
    def away_from_y(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z),
                       _noisier(x0, 2 * x0 - y, r, sigma_next, eta, z), _cleaner(x0, y, r, sigma_next, eta_b, z))  # fmt: skip

    @mistake("second case: the direction is divided by sigma'; (y / s - x0) has the size r, and divided by r it is of size 1")
    def divided_by_the_level(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        noisier = x0 + (1 - eta**2) ** 0.5 * (y - x0) + sigma_next * eta * z
        return _chosen(s, sigma_next >= r, _unseen(x, x0, sigma, sigma_next, eta, z), noisier,
                       _cleaner(x0, y, r, sigma_next, eta_b, z))  # fmt: skip

    @mistake("the shares of noise are 1 - eta and eta, which add up to 1; their *squares* have to: sqrt(1 - eta²) and eta")
    def shares_not_squared(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        fresh = sigma_next * eta * z
        unseen = x0 + sigma_next * (1 - eta) * (x - x0) / sigma + fresh
        noisier = x0 + sigma_next * (1 - eta) * _pull(y - x0, r) + fresh
        return _chosen(s, sigma_next >= r, unseen, noisier, _cleaner(x0, y, r, sigma_next, eta_b, z))

    @mistake(
        "first case: the old direction is missing, and all noise is fresh: that is eta = 1; keep sqrt(1 - eta²) of (x - x0) / sigma"
    )
    def all_noise_fresh(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        return _chosen(s, sigma_next >= r, x0 + sigma_next * z, _noisier(x0, y, r, sigma_next, eta, z),
                       _cleaner(x0, y, r, sigma_next, eta_b, z))  # fmt: skip

    @mistake("first case: x - x0 is divided by sigma'; x lies at sigma, and (x - x0) / sigma is of size 1")
    def direction_of_the_wrong_level(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        y, r = _read(y, s, sigma_y)
        unseen = x0 + (1 - eta**2) ** 0.5 * (x - x0) + sigma_next * eta * z
        return _chosen(
            s, sigma_next >= r, unseen, _noisier(x0, y, r, sigma_next, eta, z), _cleaner(x0, y, r, sigma_next, eta_b, z)
        )

    @law("first case, s = 0: the result must be x0 + sigma' (sqrt(1 - eta²) eps + eta z) with eps = (x - x0) / sigma")
    def first(case: Case, out: Outputs) -> bool:
        x, x0, z = (case[name][:, case["s"] == 0] for name in ("x", "x0", "z"))
        eps = (x - x0) / case["sigma"]
        return close(
            out["x"][:, case["s"] == 0], x0 + case["sigma_next"] * ((1 - case["eta"] ** 2) ** 0.5 * eps + case["eta"] * z)
        )

    @law("second case, sigma' < r: the result must be x0 plus noise of sigma' in all, in part along (y / s - x0) / r")
    def second(case: Case, out: Outputs) -> bool:
        here = (case["s"] > 0) & (case["sigma_next"] * case["s"] < case["sigma_y"])
        if not here.any():
            return True
        x0, y, z = (case[name][:, here] for name in ("x0", "y", "z"))
        r = case["sigma_y"] / case["s"][here]
        along = (y / case["s"][here] - x0) / r
        return close(out["x"][:, here], x0 + case["sigma_next"] * ((1 - case["eta"] ** 2) ** 0.5 * along + case["eta"] * z))

    @law("third case, sigma' >= r: the variance of eta_b y / s and that of the fresh noise must add up to sigma'²")
    def third(case: Case, out: Outputs) -> bool:
        for i in np.flatnonzero((case["s"] > 0) & (case["sigma_next"] * case["s"] >= case["sigma_y"])):
            mean = (1 - case["eta_b"]) * case["x0"][:, i] + case["eta_b"] * case["y"][:, i] / case["s"][i]
            (factor,), rest = fit(out["x"][:, i] - mean, case["z"][:, i])
            carried = (case["eta_b"] * case["sigma_y"] / case["s"][i]) ** 2
            if rest > 1e-8 or factor < 0 or not close(factor**2 + carried, case["sigma_next"] ** 2):
                return False
        return True
