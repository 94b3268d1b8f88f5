"""Items 02.1 and 02.4: the Gaussian that undoes one step, given x0 and given an estimate of it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_02.common import (
    STEPS,
    clean,
    levels,
    noisy,
    numbers,
    posterior_mean,
    posterior_variance,
    signal,
)
from course_lib.grading.sets.tools import T, fit, named, pictures, right


@item(
    "02.1", title="The posterior of one step", function="posterior", points=2, minutes=20, difficulty=2,
    answers=STEPS,
    hints=(
        "Bayes: q(x_{t-1} | x_t, x0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x0), two Gaussians that you know. Multiplied, their precisions add.",
        "Read as a function of x_{t-1}, the step q(x_t | x_{t-1}) is a Gaussian around x_t / sqrt(1 - beta_t) of precision (1 - beta_t) / beta_t. The mean is the average of the two centres, weighted with the precisions. Multiply the fractions out: beta_t + (1 - beta_t) (1 - alpha_bar_{t-1}) is 1 - alpha_bar_t, and then t = 0 divides nothing by 0.",
        "You need alpha_bar at t and at t - 1. Before the first step nothing is noise: alpha_bar is 1 there, so put a 1 before the cumulative product.",
        "Eq. 7: the mean is sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x0 + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t.",
        "The variance is (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t, one number for each sample; reshape the factors of x0 and x_t to (B, 1, 1, 1).",
    ),
)  # fmt: skip
class Posterior:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {
                "x0": pictures(rng),
                "x_t": rng.normal(size=(4, 1, 4, 4)),
                "t": np.concatenate([rng.permutation(np.arange(1, 10))[:3], [0]]),
                "betas": rng.uniform(0.05, 0.3, 10),
            }
            for _ in range(2)
        ]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["x0"]), T(case["x_t"]), T(case["t"]), T(case["betas"]))
        return arrays(**named(result, "mean", "variance"))

    def reference(x0: Tensor, x_t: Tensor, t: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
        return posterior_mean(x0, x_t, t, betas), posterior_variance(betas, t)

    @mistake("the variance is the forward step's, beta_t; knowing x0, it is beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)")
    def forward_variance(x0, x_t, t, betas):
        return posterior_mean(x0, x_t, t, betas), betas[t]

    @mistake("the second value is the standard deviation; return the variance, without the root")
    def deviation(x0, x_t, t, betas):
        return posterior_mean(x0, x_t, t, betas), posterior_variance(betas, t).sqrt()

    @mistake("the second value is the clipped logarithm of the variance, as some programs store it; return the variance itself")
    def log_variance(x0, x_t, t, betas):
        return posterior_mean(x0, x_t, t, betas), posterior_variance(betas, t).clamp_min(1e-20).log()

    @mistake("the two factors of the mean have changed places: at t = 0 the mean must be x0")
    def swapped(x0, x_t, t, betas):
        beta, a, b = numbers(betas, t)
        mean = right(b.sqrt() * beta / (1 - a), x0) * x_t + right((1 - beta).sqrt() * (1 - b) / (1 - a), x_t) * x0
        return mean, beta * (1 - b) / (1 - a)

    @mistake("the mean's roots are missing: the signal is scaled by sqrt(alpha_bar_{t-1}), a step by sqrt(1 - beta_t)")
    def no_roots(x0, x_t, t, betas):
        beta, a, b = numbers(betas, t)
        mean = right(b * beta / (1 - a), x0) * x0 + right((1 - beta) * (1 - b) / (1 - a), x_t) * x_t
        return mean, beta * (1 - b) / (1 - a)

    @mistake("at t = 0 the index t - 1 wraps round to the *last* entry of alpha_bar; before the first step alpha_bar is 1")
    def wraps_round(x0, x_t, t, betas):
        after, _ = signal(betas)
        beta, a, b = betas[t], after[t], after[t - 1]
        mean = right(b.sqrt() * beta / (1 - a), x0) * x0 + right((1 - beta).sqrt() * (1 - b) / (1 - a), x_t) * x_t
        return mean, beta * (1 - b) / (1 - a)

    @mistake("at t = 0 alpha_bar_{t-1} is held at alpha_bar_0, the index cut off at 0; before the first step alpha_bar is 1")
    def index_held(x0, x_t, t, betas):
        after, _ = signal(betas)
        beta, a, b = betas[t], after[t], after[(t - 1).clamp_min(0)]
        mean = right(b.sqrt() * beta / (1 - a), x0) * x0 + right((1 - beta).sqrt() * (1 - b) / (1 - a), x_t) * x_t
        return mean, beta * (1 - b) / (1 - a)

    @mistake("x0 is scaled by sqrt(1 - beta_t), the signal that *one* step keeps; x_{t-1} holds sqrt(alpha_bar_{t-1}) x0")
    def signal_of_one_step(x0, x_t, t, betas):
        beta, a, b = numbers(betas, t)
        kept = (1 - beta).sqrt()
        mean = right(kept * beta / (1 - a), x0) * x0 + right(kept * (1 - b) / (1 - a), x_t) * x_t
        return mean, beta * (1 - b) / (1 - a)

    @mistake("x0 is scaled by sqrt(alpha_bar_t); the mean is a guess of x_{t-1}, whose signal is sqrt(alpha_bar_{t-1}) x0")
    def signal_of_x_t(x0, x_t, t, betas):
        beta, a, b = numbers(betas, t)
        mean = right(a.sqrt() * beta / (1 - a), x0) * x0 + right((1 - beta).sqrt() * (1 - b) / (1 - a), x_t) * x_t
        return mean, beta * (1 - b) / (1 - a)

    @mistake("x_t is scaled by sqrt(alpha_bar_t); one step is undone, so it is sqrt(1 - beta_t)")
    def all_steps_of_x_t(x0, x_t, t, betas):
        beta, a, b = numbers(betas, t)
        mean = right(b.sqrt() * beta / (1 - a), x0) * x0 + right(a.sqrt() * (1 - b) / (1 - a), x_t) * x_t
        return mean, beta * (1 - b) / (1 - a)

    @mistake("the division by 1 - alpha_bar_t is missing, so that the two factors do not share out the mean")
    def not_divided(x0, x_t, t, betas):
        beta, _, b = numbers(betas, t)
        mean = right(b.sqrt() * beta, x0) * x0 + right((1 - beta).sqrt() * (1 - b), x_t) * x_t
        return mean, beta * (1 - b)

    @mistake("this is q(x_{t-1} | x0), which forgets x_t; the posterior knows both")
    def forgets_x_t(x0, x_t, t, betas):
        _, _, b = numbers(betas, t)
        return right(b.sqrt(), x0) * x0 + 0 * x_t, 1 - b

    @mistake("the factors of shape (B,) meet the *last* axis and change from column to column; reshape them to (B, 1, 1, 1)")
    def along_the_width(x0, x_t, t, betas):
        beta, a, b = numbers(betas, t)
        mean = b.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - b) / (1 - a) * x_t
        return mean, beta * (1 - b) / (1 - a)

    @law("at t = 0 there is nothing left to guess: the mean must be x0 and the variance 0")
    def ends_at_x0(case: Case, out: Outputs) -> bool:
        last = case["t"] == 0
        return bool(np.allclose(out["mean"][last], case["x0"][last]) and np.allclose(out["variance"][last], 0))

    @law("the mean of a sample is no weighted sum of its x0 and its x_t with one factor each")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return all(fit(*rows)[1] < 1e-9 for rows in zip(out["mean"], case["x0"], case["x_t"], strict=True))

    @law("the mean loses signal: from x_t = sqrt(alpha_bar_t) x0 it must make sqrt(alpha_bar_{t-1}) x0")
    def keeps_the_signal(case: Case, out: Outputs) -> bool:
        (of_x0, of_x_t), (a, b) = _factors(case, out), levels(case)
        return bool(np.allclose(of_x0 + of_x_t * np.sqrt(a), np.sqrt(b)))

    @law("the noise that the mean takes over from x_t, and `variance`, must add up to 1 - alpha_bar_{t-1}")
    def adds_up(case: Case, out: Outputs) -> bool:
        (_, of_x_t), (a, b) = _factors(case, out), levels(case)
        return bool(np.allclose(of_x_t**2 * (1 - a) + out["variance"], 1 - b))


def _factors(case: Case, out: Outputs) -> np.ndarray:
    """The factors of x0 and of x_t in each sample's mean, (2, B)."""
    return np.stack([fit(*rows)[0] for rows in zip(out["mean"], case["x0"], case["x_t"], strict=True)], 1)


@item(
    "02.4", title="A clipped estimate and its mean", function="x0_and_mean", points=2, minutes=15, difficulty=2,
    answers=(*STEPS, "course_lib.denoisers.NetworkDenoiser"),
    hints=(
        "First solve x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps for x0, with the network's eps_hat in place of eps.",
        "Pictures live in [-1, 1]: clamp the estimate of x0, and nothing else.",
        "Then the mean is that of 02.1, with the *clipped* estimate in place of x0.",
    ),
)  # fmt: skip
class X0AndMean:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [{**noisy(rng), "t": t} for t in (0, int(rng.integers(1, 5)), int(rng.integers(5, 10)))]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["x_t"]), T(case["eps_hat"]), case["t"], T(case["betas"]))
        return arrays(**named(result, "x0_hat", "mean"))

    def reference(x_t: Tensor, eps_hat: Tensor, t: int, betas: Tensor) -> tuple[Tensor, Tensor]:
        x0 = clean(x_t, eps_hat, t, betas).clamp(-1, 1)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("the estimate is not clipped: no pixel of a picture is beyond -1 or 1, so the network is wrong there")
    def not_clipped(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat, t, betas)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("the estimate is clipped to [0, 1]; pictures are in [-1, 1] here")
    def clipped_to_one(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat, t, betas).clamp(0, 1)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("the mean is made of the estimate before clipping, or of eps_hat: the sampler would not notice the clipping")
    def mean_of_the_unclipped(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat, t, betas)
        return x0.clamp(-1, 1), posterior_mean(x0, x_t, t, betas)

    @mistake("the mean is clipped too; x_{t-1} is noisy, and noise goes beyond [-1, 1]: clip x0_hat only")
    def mean_clipped(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat, t, betas).clamp(-1, 1)
        return x0, posterior_mean(x0, x_t, t, betas).clamp(-1, 1)

    @mistake("eps_hat is clipped in place of x0_hat; the noise may be of any size, the picture may not")
    def noise_clipped(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat.clamp(-1, 1), t, betas)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("the estimate is squashed by tanh, which bends the values inside as well; clamp leaves them as they are")
    def squashed(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat, t, betas).tanh()
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("the estimate is divided by its largest pixel, which fades the whole picture; clamp only what is beyond [-1, 1]")
    def rescaled(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat, t, betas)
        x0 = x0 / right(x0.abs().flatten(1).amax(1).clamp_min(1), x0)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("x0_hat is not divided by sqrt(alpha_bar_t): taking the noise away leaves the *shrunk* signal")
    def not_divided(x_t, eps_hat, t, betas):
        x0 = (x_t - (1 - signal(betas)[0][t]).sqrt() * eps_hat).clamp(-1, 1)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("only x_t is divided by sqrt(alpha_bar_t): the division is by the whole of x_t - sqrt(1 - alpha_bar_t) eps_hat")
    def bracket_missing(x_t, eps_hat, t, betas):
        a = signal(betas)[0][t]
        x0 = (x_t / a.sqrt() - (1 - a).sqrt() * eps_hat).clamp(-1, 1)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("eps_hat is multiplied by 1 - alpha_bar_t, a variance; its factor is the root of that")
    def noise_without_root(x_t, eps_hat, t, betas):
        a = signal(betas)[0][t]
        x0 = ((x_t - (1 - a) * eps_hat) / a.sqrt()).clamp(-1, 1)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("x0_hat is estimated with beta_t, as if one step lay between x0 and x_t; it is t + 1 of them: alpha_bar_t")
    def one_step(x_t, eps_hat, t, betas):
        x0 = ((x_t - betas[t].sqrt() * eps_hat) / (1 - betas[t]).sqrt()).clamp(-1, 1)
        return x0, posterior_mean(x0, x_t, t, betas)

    @mistake("this is DDIM's mean, which keeps all of eps_hat; the ancestral mean is that of q(x_{t-1} | x_t, x0_hat)")
    def ddim_mean(x_t, eps_hat, t, betas):
        x0, b = clean(x_t, eps_hat, t, betas).clamp(-1, 1), signal(betas)[1][t]
        return x0, b.sqrt() * x0 + (1 - b).sqrt() * eps_hat

    @mistake("at t = 0 the index t - 1 wraps round to the *last* entry of alpha_bar; before the first step alpha_bar is 1")
    def wraps_round(x_t, eps_hat, t, betas):
        x0, after = clean(x_t, eps_hat, t, betas).clamp(-1, 1), signal(betas)[0]
        beta, a, b = betas[t], after[t], after[t - 1]
        return x0, b.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - b) / (1 - a) * x_t

    @mistake("the pair is turned round: return x0_hat first, then the mean")
    def pair_turned(x_t, eps_hat, t, betas):
        x0 = clean(x_t, eps_hat, t, betas).clamp(-1, 1)
        return posterior_mean(x0, x_t, t, betas), x0

    @law("x0_hat must lie in [-1, 1]")
    def in_range(case: Case, out: Outputs) -> bool:
        return bool((np.abs(out["x0_hat"]) <= 1 + 1e-9).all())

    @law("where x0_hat is not clipped, sqrt(alpha_bar_t) x0_hat + sqrt(1 - alpha_bar_t) eps_hat must give x_t back")
    def gives_back(case: Case, out: Outputs) -> bool:
        a, free = levels(case)[0], np.abs(out["x0_hat"]) < 1 - 1e-9
        return bool(np.allclose((np.sqrt(a) * out["x0_hat"] + np.sqrt(1 - a) * case["eps_hat"])[free], case["x_t"][free]))

    @law("x0_hat is right, the mean is not: it is the weighted sum of x0_hat and x_t of 02.1, which gives x0_hat itself at t = 0")
    def mean_of_the_posterior(case: Case, out: Outputs) -> bool:
        right_mean = posterior_mean(T(out["x0_hat"]), T(case["x_t"]), case["t"], T(case["betas"]))
        return bool(np.allclose(out["mean"], right_mean.numpy()))
