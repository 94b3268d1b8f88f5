"""Item 07.9: a step of Langevin dynamics on the posterior, with an annealed measurement."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, ask, level, noised
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, fit


def _prior(D, x: Tensor, sigma: Tensor) -> Tensor:
    """The score of the prior at sigma."""
    return (D(x, sigma) - x) / sigma**2


def _likelihood(A: Tensor, y: Tensor, x: Tensor, variance: float) -> Tensor:
    """A^T (y - A x) / variance of each row."""
    return (y - x @ A.T) @ A / variance


def _walked(x: Tensor, tau: float, score: Tensor, z: Tensor) -> Tensor:
    """One step of Langevin dynamics."""
    return x + tau * score + (2 * tau) ** 0.5 * z


@item(
    "07.9", title="A Langevin step on the posterior", function="langevin_step", points=1, minutes=15, difficulty=1,
    answers=("course_lib.posterior.annealed.csgm", "course_lib.langevin.langevin"),
    hints=(
        "Bayes' rule for scores (04.1): the posterior's score is the prior's plus the likelihood's.",
        "The prior's is (D(x, sigma) - x) / sigma². The likelihood's, of N(y; A x, (sigma_y² + gamma²) I), is A^T (y - A x) / (sigma_y² + gamma²); for rows A^T r is r @ A.",
        "Langevin: x + tau * score + sqrt(2 tau) z. The noise's variance is 2 tau, and with no other does it keep the distribution.",
    ),
)  # fmt: skip
class LangevinStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(D: str, B: int, m: int, n: int) -> Case:
            sigma, A = float(rng.uniform(0.6, 1.5)), rng.normal(size=(m, n))
            return {"D": D, "A": A, "y": rng.normal(size=(B, m)), "x": noised(rng, (B, n), sigma), "sigma": sigma,
                    "sigma_y": float(rng.uniform(0.3, 0.5)), "gamma": float(rng.uniform(0.6, 0.9)),
                    "tau": float(rng.uniform(0.05, 0.2)), "z": rng.normal(size=(B, n))}  # fmt: skip

        return [case("turned", 3, 2, 5), case("peaks", 4, 4, 3)]

    def drive(fn, case: Case) -> Outputs:
        tensors = (T(case[name]) for name in ("A", "y", "x"))
        numbers = (case[name] for name in ("sigma_y", "gamma", "tau"))
        return arrays(x=call(fn, DENOISERS[case["D"]], *tensors, level(case["sigma"]), *numbers, T(case["z"])))

    def reference(
        D, A: Tensor, y: Tensor, x: Tensor, sigma: Tensor, sigma_y: float, gamma: float, tau: float, z: Tensor
    ) -> Tensor:
        return _walked(x, tau, _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2), z)

    @mistake("the noise is sqrt(tau) z: too little, the samples gather at the peaks; Langevin has sqrt(2 tau)")
    def two_forgotten(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        score = _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2)
        return x + tau * score + tau**0.5 * z

    @mistake("the noise is tau z: its *variance* is 2 tau, so it is sqrt(2 tau) z, and for small steps far larger than the drift")
    def noise_of_the_drifts_size(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        score = _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2)
        return x + tau * score + tau * z

    @mistake("the noise is 2 tau z: take the root")
    def root_forgotten(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        score = _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2)
        return x + tau * score + 2 * tau * z

    @mistake("there is no noise: that climbs to a peak of the posterior and stays; add sqrt(2 tau) z")
    def no_noise(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return x + tau * (_prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2))

    @mistake(
        "the drift is tau / 2 times the score beside noise sqrt(2 tau) z: tau / 2 belongs to sqrt(tau) z, tau to sqrt(2 tau) z"
    )
    def half_the_drift(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        score = _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2)
        return x + tau / 2 * score + (2 * tau) ** 0.5 * z

    @mistake("the prior's score has the wrong sign, x - D: it points away from the data")
    def prior_turned(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, -_prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2), z)

    @mistake("the likelihood's score has the wrong sign, A x - y: it leads away from the measurement")
    def likelihood_turned(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma) - _likelihood(A, y, x, sigma_y**2 + gamma**2), z)

    @mistake("D - x is not divided by sigma²: it is sigma² times the score")
    def prior_not_divided(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, D(x, sigma) - x + _likelihood(A, y, x, sigma_y**2 + gamma**2), z)

    @mistake("D - x is divided by sigma: that is minus the noise; the score is (D - x) / sigma²")
    def prior_divided_once(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, (D(x, sigma) - x) / sigma + _likelihood(A, y, x, sigma_y**2 + gamma**2), z)

    @mistake("the prior is forgotten: where A sees nothing the walk never comes to rest")
    def likelihood_alone(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _likelihood(A, y, x, sigma_y**2 + gamma**2), z)

    @mistake("the measurement is forgotten: this walks on the prior")
    def prior_alone(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma), z)

    @mistake(
        "gamma² is missing: while x is noisy, y - A x is larger than sigma_y, and a pull divided by sigma_y² alone throws x far off"
    )
    def anneal_forgotten(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2), z)

    @mistake("sigma_y² is missing: only gamma² is in the likelihood's variance")
    def noise_forgotten(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma) + _likelihood(A, y, x, gamma**2), z)

    @mistake("deviations are added, (sigma_y + gamma)²; independent errors add in *variance*, sigma_y² + gamma²")
    def deviations_added(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma) + _likelihood(A, y, x, (sigma_y + gamma) ** 2), z)

    @mistake("the likelihood is divided by the deviation sqrt(sigma_y² + gamma²); a score has the variance below")
    def divided_by_the_deviation(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma) + _likelihood(A, y, x, (sigma_y**2 + gamma**2) ** 0.5), z)

    @mistake(
        "the residual is that of the estimate, y - A D(x, sigma): here the likelihood is that of x itself, without a pass through D"
    )
    def estimate_measured(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma) + _likelihood(A, y, D(x, sigma), sigma_y**2 + gamma**2), z)

    @mistake("A^+ stands in place of A^T: the gradient of |y - A x|² / 2 is - A^T (y - A x); A^+ would solve, not descend")
    def inverse_for_adjoint(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        pull = (y - x @ A.T) @ torch.linalg.pinv(A).T / (sigma_y**2 + gamma**2)
        return _walked(x, tau, _prior(D, x, sigma) + pull, z)

    @mistake("tau multiplies the prior's score only; both belong to one score, and tau stands before their sum")
    def tau_on_one(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma), z) + _likelihood(A, y, x, sigma_y**2 + gamma**2)

    @mistake("the step starts from D(x, sigma); it starts from x, which stays at the level sigma")
    def from_the_estimate(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(D(x, sigma), tau, _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2), z)

    @mistake("the noise is multiplied by sigma: its size depends on the step tau alone, sqrt(2 tau)")
    def noise_of_the_level(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return _walked(x, tau, _prior(D, x, sigma) + _likelihood(A, y, x, sigma_y**2 + gamma**2), sigma * z)

    @law("the move x' - x must be made of the prior's score, of A^T (y - A x) and of z, and of nothing else")
    def made_of_three(case: Case, out: Outputs) -> bool:
        return _factors(case, out)[1] < 1e-8

    @law("the noise does not fit the drift: where the score is multiplied by tau, the noise has the variance 2 tau")
    def noise_fits(case: Case, out: Outputs) -> bool:
        (prior, _, noise), _ = _factors(case, out)
        return close(noise**2, 2 * prior)

    @law(
        "the two scores do not fit together: the likelihood's is A^T (y - A x) / (sigma_y² + gamma²), with tau before it as before the prior's"
    )
    def scores_fit(case: Case, out: Outputs) -> bool:
        (prior, pull, _), _ = _factors(case, out)
        return close(pull * (case["sigma_y"] ** 2 + case["gamma"] ** 2), prior)


def _factors(case: Case, out: Outputs) -> tuple[np.ndarray, float]:
    """The factors of the prior's score, of A^T (y - A x) and of z in the move."""
    x, A = case["x"], case["A"]
    score = (ask(case, x, case["sigma"]) - x) / case["sigma"] ** 2
    return fit(out["x"] - x, score, (case["y"] - x @ A.T) @ A, case["z"])
