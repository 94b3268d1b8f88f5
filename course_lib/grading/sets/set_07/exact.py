"""Items 07.1 and 07.2: the exact posterior of a Gaussian, and the weights of a mixture's components."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.gaussians import Mixture
from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_07.common import NOT_FINITE, all_finite, with_gaps
from course_lib.grading.sets.tools import T, named


def _covariance(rng: np.random.Generator, d: int) -> np.ndarray:
    """A covariance matrix whose variances lie about 1."""
    root = rng.normal(size=(d, d))
    return root @ root.T / d + 0.3 * np.eye(d)


def _total(A: Tensor, C: Tensor, noise: float) -> Tensor:
    """A C A^T plus a variance of the noise, (..., e, e)."""
    return A @ C @ A.T + noise * torch.eye(len(A), dtype=C.dtype)


def _gain(C: Tensor, A: Tensor, noise: float) -> Tensor:
    """C A^T (A C A^T + noise I)^-1, (d, e)."""
    return torch.linalg.solve(_total(A, C, noise), A @ C).T


def _moments(m: Tensor, C: Tensor, A: Tensor, y: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the covariance that belong to a gain."""
    return m + (y - A @ m) @ G.T, C - G @ A @ C


@item(
    "07.1", title="The exact posterior of a Gaussian", function="gaussian_posterior", points=2, minutes=20, difficulty=2,
    answers=("course_lib.gaussians.Mixture.posterior", "course_lib.gaussians.Mixture.conditional"),
    hints=(
        "x0 and y are jointly Gaussian. E[y] = A m, Cov[y] = S = A C A^T + sigma_y² I, and Cov[x0, y] = C A^T.",
        "The gain G = C A^T S^-1 says how x0 follows y: the mean is m + G (y - A m). Rows: m + (y - A @ m) @ G.T.",
        "The covariance is C - G A C, the same for every y. G without an inverse: torch.linalg.solve(S, A @ C).T, since S and C are symmetric.",
    ),
)  # fmt: skip
class GaussianPosterior:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(d: int, e: int, B: int) -> Case:
            return {"m": rng.normal(size=d), "C": _covariance(rng, d), "A": rng.normal(size=(e, d)),
                    "y": rng.normal(size=(B, e)), "sigma_y": float(rng.uniform(0.4, 0.8))}  # fmt: skip

        return [case(4, 2, 3), case(3, 5, 2)]  # fewer measurements than unknowns, and more

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, *(T(case[name]) for name in ("m", "C", "A", "y")), case["sigma_y"])
        return arrays(**named(result, "mean", "cov"))

    def reference(m: Tensor, C: Tensor, A: Tensor, y: Tensor, sigma_y: float) -> tuple[Tensor, Tensor]:
        return _moments(m, C, A, y, _gain(C, A, sigma_y**2))

    @mistake("sigma_y stands where its square belongs: S = A C A^T + sigma_y² I is a covariance")
    def noise_not_squared(m, C, A, y, sigma_y):
        return _moments(m, C, A, y, _gain(C, A, sigma_y))

    @mistake("the noise is added as 1, S = A C A^T + I; it is sigma_y² I")
    def noise_of_size_one(m, C, A, y, sigma_y):
        return _moments(m, C, A, y, _gain(C, A, 1.0))

    @mistake("the prior's mean is not taken off: x0 follows what is *surprising* in y, y - A m, not y itself")
    def mean_not_taken_off(m, C, A, y, sigma_y):
        G = _gain(C, A, sigma_y**2)
        return m + y @ G.T, C - G @ A @ C

    @mistake("the mean starts from 0 and not from m: G (y - A m) is the correction alone")
    def correction_alone(m, C, A, y, sigma_y):
        G = _gain(C, A, sigma_y**2)
        return (y - A @ m) @ G.T, C - G @ A @ C

    @mistake(
        "the prior's covariance is taken for I, in the gain: that is ridge regression, and forgets how the entries hang together"
    )
    def ridge(m, C, A, y, sigma_y):
        G = _gain(torch.eye(len(C), dtype=C.dtype), A, sigma_y**2)
        return _moments(m, C, A, y, G)

    @mistake("the prior has no say: this is the least-squares answer A^+ y; where A sees nothing it must stay with the prior")
    def least_squares(m, C, A, y, sigma_y):
        G = torch.linalg.pinv(A)
        return y @ G.T, sigma_y**2 * G @ G.T

    @mistake("the covariance is returned as I - G A; it is (I - G A) C")
    def prior_left_out(m, C, A, y, sigma_y):
        G = _gain(C, A, sigma_y**2)
        return m + (y - A @ m) @ G.T, torch.eye(len(C), dtype=C.dtype) - G @ A

    @mistake("G A C is *added*: a measurement can only lower the uncertainty, C - G A C")
    def covariance_grows(m, C, A, y, sigma_y):
        G = _gain(C, A, sigma_y**2)
        return m + (y - A @ m) @ G.T, C + G @ A @ C

    @mistake("the covariance is the prior's: what was measured takes G A C off")
    def covariance_of_the_prior(m, C, A, y, sigma_y):
        return _moments(m, C, A, y, _gain(C, A, sigma_y**2))[0], C.clone()

    @mistake("this is G A C, the part of the covariance that the measurement has taken *off*; what is left is C - G A C")
    def what_was_learned(m, C, A, y, sigma_y):
        G = _gain(C, A, sigma_y**2)
        return m + (y - A @ m) @ G.T, G @ A @ C

    @mistake("the precision C^-1 + A^T A / sigma_y² is returned; the covariance is its inverse")
    def precision_returned(m, C, A, y, sigma_y):
        mean = _moments(m, C, A, y, _gain(C, A, sigma_y**2))[0]
        return mean, torch.linalg.inv(C) + A.T @ A / sigma_y**2

    @mistake(
        "the precision of the measurement is A^T A, without its 1 / sigma_y²: this is the posterior under noise of size 1 in the covariance"
    )
    def precision_without_noise(m, C, A, y, sigma_y):
        mean = _moments(m, C, A, y, _gain(C, A, sigma_y**2))[0]
        return mean, torch.linalg.inv(torch.linalg.inv(C) + A.T @ A)

    @mistake("the sign of the surprise is turned: the mean goes away from the measurement; it is m + G (y - A m)")
    def sign_turned(m, C, A, y, sigma_y):
        G = _gain(C, A, sigma_y**2)
        return m - (y - A @ m) @ G.T, C - G @ A @ C

    @mistake("the noise is forgotten, S = A C A^T (its pseudo-inverse where it has none): y is then taken for exact")
    def noise_forgotten(m, C, A, y, sigma_y):
        return _moments(m, C, A, y, C @ A.T @ torch.linalg.pinv(_total(A, C, 0.0), rtol=1e-8))

    @mistake("every sample has the mean of the first y; each measurement has its own posterior")
    def first_measurement(m, C, A, y, sigma_y):
        mean, cov = _moments(m, C, A, y, _gain(C, A, sigma_y**2))
        return mean[:1].expand_as(mean), cov

    @law(
        "the covariance must be symmetric, with no eigenvalue below 0, and the prior's minus it likewise: a measurement only adds knowledge"
    )
    def between(case: Case, out: Outputs) -> bool:
        cov, known = out["cov"], case["C"] - out["cov"]
        lowest = min(np.linalg.eigvalsh((one + one.T) / 2).min() for one in (cov, known))
        return close(cov, cov.T) and lowest > -1e-8

    @law(
        "where A sees nothing the mean must be what the prior's covariance makes of the rest: mean - m must lie in the span of C A^T"
    )
    def spanned(case: Case, out: Outputs) -> bool:
        columns, moved = case["C"] @ case["A"].T, (out["mean"] - case["m"]).T
        return close(columns @ np.linalg.lstsq(columns, moved, rcond=None)[0], moved)

    @law("the mean does not make the density the largest: C^-1 (mean - m) must be A^T (y - A mean) / sigma_y²")
    def stationary(case: Case, out: Outputs) -> bool:
        left = np.linalg.solve(case["C"], (out["mean"] - case["m"]).T).T
        right = (case["y"] - out["mean"] @ case["A"].T) @ case["A"] / case["sigma_y"] ** 2
        return bool(np.allclose(left, right, rtol=1e-6, atol=1e-6))


# --- 07.2 ----------------------------------------------------------------------------------------------


def _logs(weights: Tensor, means: Tensor, covs: Tensor, A: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """log w_k, the quadratic form of y under component k and log det of its covariance: (K,), (B, K), (K,)."""
    S = _total(A, covs, noise)
    residual = y[:, None] - means @ A.T  # (B, K, e)
    quadratic = torch.einsum("bki,kij,bkj->bk", residual, torch.linalg.inv(S), residual)
    return weights.log(), quadratic, torch.logdet(S)


@item(
    "07.2", title="Which component was measured?", function="component_weights", points=2, minutes=20, difficulty=2,
    answers=("course_lib.gaussians.Mixture.posterior", "course_lib.gaussians.Mixture.responsibilities",
             "course_lib.gaussians.Mixture.log_prob"),
    hints=(
        "Bayes' rule over k: w_k' is proportional to w_k p(y | k), and p(y | k) = N(y; A m_k, S_k), with the S_k of 07.1.",
        "Take logarithms: log w_k - r^T S_k^-1 r / 2 - log det S_k / 2 with r = y - A m_k. (The factor 2 pi is the same for all k.) torch.logdet, torch.linalg.solve.",
        "torch.softmax(logs, -1) normalises over k without ever taking the exponential of -1000: it subtracts the largest first.",
    ),
)  # fmt: skip
class ComponentWeights:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(K: int, d: int, e: int, B: int, far: float) -> Case:
            covs = np.stack([_covariance(rng, d) * scale for scale in rng.uniform(0.3, 2.0, K)])
            weights = rng.uniform(0.2, 1.0, K)
            A, means = rng.normal(size=(e, d)), rng.normal(size=(K, d))
            away = far * np.ones(e) / e**0.5
            return {"weights": weights / weights.sum(), "means": means, "covs": covs, "A": A,
                    "y": rng.normal(size=(B, e)) + away, "sigma_y": float(rng.uniform(0.4, 0.7))}  # fmt: skip

        near, distant = case(4, 3, 2, 5, 0.0), case(3, 3, 2, 2, 0.0)
        # a measurement so far from all components that each density is 0 in floating point; the components are alike
        distant["covs"] = np.stack([distant["covs"][0]] * 3)
        distant["means"] = distant["means"] * 0.02
        distant["y"] = distant["y"] + 200.0
        return [near, distant]

    def drive(fn, case: Case) -> Outputs:
        names = ("weights", "means", "covs", "A", "y")
        return with_gaps(weights=call(fn, *(T(case[name]) for name in names), case["sigma_y"]))

    def reference(weights: Tensor, means: Tensor, covs: Tensor, A: Tensor, y: Tensor, sigma_y: float) -> Tensor:
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(prior - (quadratic + logdet) / 2, -1)

    @mistake(
        "densities are multiplied and divided outside the logarithm: where y is far from all components they are all 0, and 0 / 0 is left; use softmax of the logarithms"
    )
    def outside_the_logarithm(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        density = (prior - (quadratic + logdet) / 2).exp()
        return density / density.sum(-1, keepdim=True)

    @mistake("the prior weights w_k are forgotten: a rare component is as likely beforehand as a common one")
    def prior_forgotten(weights, means, covs, A, y, sigma_y):
        _, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(-(quadratic + logdet) / 2, -1)

    @mistake("the determinant is forgotten: a wide component spreads its probability over more measurements, by sqrt(det S_k)")
    def determinant_forgotten(weights, means, covs, A, y, sigma_y):
        prior, quadratic, _ = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(prior - quadratic / 2, -1)

    @mistake("the determinant is not halved: a density has 1 / sqrt(det S_k)")
    def determinant_not_halved(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(prior - quadratic / 2 - logdet, -1)

    @mistake("the quadratic form is not halved: a Gaussian is exp(- r^T S^-1 r / 2)")
    def quadratic_not_halved(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(prior - quadratic - logdet / 2, -1)

    @mistake("the determinant's sign is turned: log det S_k is to be subtracted")
    def determinant_added(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(prior - quadratic / 2 + logdet / 2, -1)

    @mistake("the components' own spread is forgotten, S = sigma_y² I: that compares y with the means' measurements only")
    def spread_forgotten(weights, means, covs, A, y, sigma_y):
        prior, quadratic, _ = _logs(weights, means, torch.zeros_like(covs), A, y, sigma_y**2)
        return torch.softmax(prior - quadratic / 2, -1)

    @mistake("the noise of the measurement is forgotten, S_k = A C_k A^T; add sigma_y² I")
    def noise_forgotten(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, 0.0)
        return torch.softmax(prior - (quadratic + logdet) / 2, -1)

    @mistake("sigma_y stands where its square belongs: S_k = A C_k A^T + sigma_y² I is a covariance")
    def noise_not_squared(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y)
        return torch.softmax(prior - (quadratic + logdet) / 2, -1)

    @mistake("the weights are normalised over the measurements; for each y they must sum to 1 over the components, the last axis")
    def normalised_over_samples(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(prior - (quadratic + logdet) / 2, 0)

    @mistake("the weights are not normalised: these are w_k p(y | k), up to a factor")
    def not_normalised(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        logs = prior - (quadratic + logdet) / 2
        return (logs - logs.max(-1, keepdim=True).values).exp()

    @mistake("the logarithms are returned; weights are their exponentials")
    def logarithms_returned(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.log_softmax(prior - (quadratic + logdet) / 2, -1)

    @mistake(
        "only the best component is kept, with weight 1; the posterior is a mixture again, and every component has its share"
    )
    def winner_takes_all(weights, means, covs, A, y, sigma_y):
        prior, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        best = (prior - (quadratic + logdet) / 2).argmax(-1)
        return torch.nn.functional.one_hot(best, len(weights)).to(y)

    @mistake("w_k goes into the softmax without its logarithm: softmax takes exponentials, exp(w_k) in place of w_k")
    def prior_not_in_logs(weights, means, covs, A, y, sigma_y):
        _, quadratic, logdet = _logs(weights, means, covs, A, y, sigma_y**2)
        return torch.softmax(weights - (quadratic + logdet) / 2, -1)

    @mistake("the weights of the prior are returned as they were: y tells which component is likely")
    def not_updated(weights, means, covs, A, y, sigma_y):
        return weights.expand(len(y), -1).clone()

    @law(NOT_FINITE)
    def finite(case: Case, out: Outputs) -> bool:
        return all_finite(out)

    @law("for each measurement the weights must not be negative and must sum to 1 over the components, the last axis")
    def normalised(case: Case, out: Outputs) -> bool:
        return bool((out["weights"] >= 0).all()) and close(out["weights"].sum(-1), 1)

    @law("the ratio of two weights must be that of w_k N(y; A m_k, S_k): mind the prior weight, the determinant and both halves")
    def ratios(case: Case, out: Outputs) -> bool:
        mixture = Mixture(T(case["weights"]), T(case["means"]), T(case["covs"]))
        exact = [mixture.posterior(T(case["A"]), T(y), case["sigma_y"]).weights.numpy() for y in case["y"]]
        return close(out["weights"], np.stack(exact))
