"""Item 07.5: the estimate of PiGDM, with a covariance of x0 that the noise level sets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, level, noised
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_07.common import as_in_the_loop, differentiated
from course_lib.grading.sets.tools import T

HALF = 0.5**0.5  # the deviation of the data whose denoiser is "gaussian": N(0.4, 0.5)


def _r2(sigma: Tensor, s: float) -> Tensor:
    """The variance of x0 given x under N(m, s^2 I)."""
    return sigma**2 * s**2 / (sigma**2 + s**2)


def _total(A: Tensor, r2: Tensor | float, noise: float) -> Tensor:
    """r^2 A A^T plus a variance of the noise, (m, m)."""
    return r2 * A @ A.T + noise * torch.eye(len(A), dtype=A.dtype)


def _whitened(S: Tensor, r: Tensor) -> Tensor:
    """S^-1 r of each row."""
    return torch.linalg.solve(S, r.T).T


def _through(D, A: Tensor, x: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """J^T A^T v for the Jacobian J of D at x, with v held fixed."""
    return differentiated(lambda x: D(x, sigma) @ A.T * v, x)


def _estimate(D, A: Tensor, y: Tensor, x: Tensor, sigma: Tensor, S: Tensor, scale: Tensor | float) -> Tensor:
    """D plus scale times J^T A^T S^-1 (y - A D)."""
    x0 = D(x, sigma)
    return x0 + scale * _through(D, A, x, sigma, _whitened(S, y - x0 @ A.T))


@item(
    "07.5", title="ΠGDM's covariance and estimate", function="pigdm_estimate", points=3, minutes=35, difficulty=3,
    answers=("course_lib.posterior.gradient.pigdm", "course_lib.posterior.gradient.dps_score"),
    hints=(
        "Under the prior N(m, s² I) and given x = x0 + sigma eps, precisions add: 1 / r² = 1 / s² + 1 / sigma². So r² = sigma² s² / (sigma² + s²).",
        "Given x, x0 is taken for D plus noise of variance r². Then y has the mean A D and the covariance S = r² A A^T + sigma_y² I, (m, m). v = S^-1 (y - A D): rows, torch.linalg.solve(S, residual.T).T.",
        "grad_x log p(y | x) = J^T A^T v with the Jacobian J of D. Under torch.enable_grad(), with x that requires a gradient: torch.autograd.grad((x0 @ A.T * v.detach()).sum(), x)[0].",
        "A score becomes an estimate by Tweedie's formula: D + sigma² grad_x log p(y | x). The square of sigma, and r² nowhere else.",
    ),
)  # fmt: skip
class PiGDM:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(D: str, s: float, m: int, n: int) -> Case:
            sigma, A = float(rng.uniform(0.7, 1.5)), rng.normal(size=(m, n))
            y = rng.normal(size=(3, n)) @ A.T + rng.normal(size=(3, m))
            return {"D": D, "A": A, "y": y, "x": noised(rng, (3, n), sigma), "sigma": sigma,
                    "sigma_y": float(rng.uniform(0.3, 0.6)), "s": s}  # fmt: skip

        return [case("gaussian", HALF, 2, 4), case("turned", 1.0, 3, 5), case("peaks", float(rng.uniform(1.3, 1.8)), 2, 3)]

    def drive(fn, case: Case) -> Outputs:
        tensors = (T(case[name]) for name in ("A", "y", "x"))
        with as_in_the_loop():
            return arrays(x0=call(fn, DENOISERS[case["D"]], *tensors, level(case["sigma"]), case["sigma_y"], case["s"]))

    def reference(D, A: Tensor, y: Tensor, x: Tensor, sigma: Tensor, sigma_y: float, s: float) -> Tensor:
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), sigma_y**2), sigma**2)

    @mistake(
        "the factor sigma² is forgotten: D + grad log p adds a score to an estimate; Tweedie's formula has sigma² between them"
    )
    def tweedie_forgotten(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), sigma_y**2), 1.0)

    @mistake("the score is multiplied by sigma; Tweedie's formula has sigma²")
    def sigma_for_its_square(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), sigma_y**2), sigma)

    @mistake(
        "the Jacobian of D is left out: A^T v is the gradient by x0; by x it is J^T A^T v, one pass back through the network"
    )
    def jacobian_left_out(D, A, y, x, sigma, sigma_y, s):
        x0 = D(x, sigma)
        return x0 + sigma**2 * _whitened(_total(A, _r2(sigma, s), sigma_y**2), y - x0 @ A.T) @ A

    @mistake(
        "r² = sigma²: that is the variance of x0 given x when nothing is known beforehand; the data have the variance s², and r² never exceeds it"
    )
    def prior_forgotten(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, sigma**2, sigma_y**2), sigma**2)

    @mistake("r² = sigma² / (1 + sigma²), the paper's, whatever s is: it is right for data of variance 1")
    def always_the_papers(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, 1.0), sigma_y**2), sigma**2)

    @mistake("r² = s², the variance of the data: that forgets that x tells of x0 too, the more the lower sigma is")
    def noise_level_forgotten(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, s**2, sigma_y**2), sigma**2)

    @mistake("r stands where r² belongs: S is a covariance")
    def r_not_squared(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s).sqrt(), sigma_y**2), sigma**2)

    @mistake("s stands where s² belongs: r² = sigma² s² / (sigma² + s²) combines two *variances*")
    def s_not_squared(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, sigma**2 * s / (sigma**2 + s), sigma_y**2), sigma**2)

    @mistake("r² is the sum 1 / sigma² + 1 / s², a precision; the variance is its inverse")
    def precision_for_variance(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, 1 / _r2(sigma, s), sigma_y**2), sigma**2)

    @mistake("r² A A^T is missing from S: the estimate is then taken for x0 itself, as in DPS's score, and y pulls too hard")
    def uncertainty_forgotten(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, 0.0, sigma_y**2), sigma**2)

    @mistake("sigma_y² I is missing from S: y is taken for exact")
    def noise_forgotten(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), 0.0), sigma**2)

    @mistake("sigma_y stands where its square belongs: S = r² A A^T + sigma_y² I is a covariance")
    def noise_not_squared(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), sigma_y), sigma**2)

    @mistake(
        "A A^T is taken for I, S = (r² + sigma_y²) I: right for a mask, whose rows are orthonormal; a general A mixes and scales"
    )
    def rows_taken_for_orthonormal(D, A, y, x, sigma, sigma_y, s):
        S = (_r2(sigma, s) + sigma_y**2) * torch.eye(len(A), dtype=A.dtype)
        return _estimate(D, A, y, x, sigma, S, sigma**2)

    @mistake("only the diagonal of A A^T is used: measurements that overlap hang together, and S is a full matrix")
    def diagonal_alone(D, A, y, x, sigma, sigma_y, s):
        S = _total(A, _r2(sigma, s), sigma_y**2)
        return _estimate(D, A, y, x, sigma, torch.diag(S.diagonal()), sigma**2)

    @mistake("S is not inverted: v = S (y - A D) trusts a noisy measurement *more*")
    def not_inverted(D, A, y, x, sigma, sigma_y, s):
        S = _total(A, _r2(sigma, s), sigma_y**2)
        return _estimate(D, A, y, x, sigma, torch.linalg.inv(S), sigma**2)

    @mistake(
        "the sign is turned: the estimate is to come closer to the measurement, D + sigma² J^T A^T v with v = S^-1 (y - A D)"
    )
    def sign_turned(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), sigma_y**2), -(sigma**2))

    @mistake("the pull is too long by a factor of 2: the density's exponent is *half* of r^T S^-1 r, and its gradient J^T A^T v")
    def half_forgotten(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), sigma_y**2), 2 * sigma**2)

    @mistake("v is not held fixed: the gradient of v · A D also differentiates v, which depends on D; detach v")
    def v_not_detached(D, A, y, x, sigma, sigma_y, s):
        S = _total(A, _r2(sigma, s), sigma_y**2)
        loss = lambda x: D(x, sigma) @ A.T * _whitened(S, y - D(x, sigma) @ A.T)
        return D(x, sigma) + sigma**2 * differentiated(loss, x)

    @mistake("the residual is that of the noisy x, y - A x; measure the estimate D(x, sigma)")
    def residual_of_x(D, A, y, x, sigma, sigma_y, s):
        v = _whitened(_total(A, _r2(sigma, s), sigma_y**2), y - x @ A.T)
        return D(x, sigma) + sigma**2 * _through(D, A, x, sigma, v)

    @mistake(
        "the pull is multiplied by r² once more (the paper's algorithm weighs it so, against large steps): then this is no posterior mean even for a Gaussian"
    )
    def weighed_once_more(D, A, y, x, sigma, sigma_y, s):
        r2 = _r2(sigma, s)
        return _estimate(D, A, y, x, sigma, _total(A, r2, sigma_y**2), sigma**2 * r2)

    @mistake("sigma² times the gradient is added to x and not to D: that is the score's move without the prior's part")
    def added_to_x(D, A, y, x, sigma, sigma_y, s):
        return _estimate(D, A, y, x, sigma, _total(A, _r2(sigma, s), sigma_y**2), sigma**2) + x - D(x, sigma)

    @law("for data N(m, s² I) the result must be the exact E[x0 | x, y], and is not")
    def exact_for_a_gaussian(case: Case, out: Outputs) -> bool:
        if case["D"] != "gaussian":
            return True
        A, y, x, sigma = (case[name] for name in ("A", "y", "x", "sigma"))
        precision = (1 / HALF**2 + 1 / sigma**2) * np.eye(A.shape[1]) + A.T @ A / case["sigma_y"] ** 2
        pulls = 0.4 / HALF**2 + x / sigma**2 + y @ A / case["sigma_y"] ** 2
        return close(out["x0"], np.linalg.solve(precision, pulls.T).T)

    @law(
        "for data of variance s² it is right, and the pull must go through the network's own Jacobian: it must lie in the span of J^T A^T"
    )
    def through_the_network(case: Case, out: Outputs) -> bool:
        D, A, x, sigma = DENOISERS[case["D"]], T(case["A"]), T(case["x"]), level(case["sigma"])
        rows = [_through(D, A, x, sigma, torch.eye(len(A), dtype=A.dtype)[i].expand(len(x), -1)) for i in range(len(A))]
        pull = T(out["x0"]) - D(x, sigma)
        for columns, one in zip(torch.stack(rows, -1), pull, strict=True):
            if not close(columns @ torch.linalg.lstsq(columns, one[:, None]).solution[:, 0], one):
                return False
        return True
