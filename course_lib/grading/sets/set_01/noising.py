"""Items 01.1 to 01.5: noising, schedules, signal-to-noise ratio, sigma."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.tools import T, pictures, right


@item(
    "01.1", title="One step of noise", function="noising_step", points=1, minutes=5, difficulty=1,
    answers=("course_lib.schedules.Schedule.transition", "course_lib.schedules.Schedule.add_noise"),
    hints=(
        "q(x_t | x_prev) is a Gaussian. Its mean is a multiple of x_prev, its variance is beta.",
        "A Gaussian with mean m and variance s^2 is drawn as m + s * eps: the factor of eps is a standard deviation.",
        "The multiple is sqrt(1 - beta), so that data of variance 1 keep variance (1 - beta) + beta = 1.",
    ),
)  # fmt: skip
class NoisingStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {"x_prev": pictures(rng), "beta": float(rng.uniform(0.05, 0.6)), "eps": rng.normal(size=(4, 1, 4, 4))}
            for _ in range(3)
        ]

    def drive(fn, case: Case) -> Outputs:
        return arrays(x_t=call(fn, T(case["x_prev"]), T(case["beta"]), T(case["eps"])))

    def reference(x_prev: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
        return (1 - beta).sqrt() * x_prev + beta.sqrt() * eps

    @mistake(
        "the noise is scaled by beta, which is its variance; a draw is mean + standard deviation * eps, so take the square root"
    )
    def noise_without_root(x_prev, beta, eps):
        return (1 - beta).sqrt() * x_prev + beta * eps

    @mistake(
        "the signal is scaled by 1 - beta; the mean of q(x_t | x_prev) has its square root, or the variance would not stay 1"
    )
    def signal_without_root(x_prev, beta, eps):
        return (1 - beta) * x_prev + beta.sqrt() * eps

    @mistake("both square roots are missing: (1 - beta) x + beta eps mixes like a flow and loses variance at every step")
    def no_roots(x_prev, beta, eps):
        return (1 - beta) * x_prev + beta * eps

    @mistake("signal and noise have changed places: sqrt(beta) belongs to eps and sqrt(1 - beta) to x_prev")
    def swapped(x_prev, beta, eps):
        return beta.sqrt() * x_prev + (1 - beta).sqrt() * eps

    @mistake("the signal is not shrunk: x_prev + sqrt(beta) eps lets the variance grow (a variance-exploding step)")
    def exploding(x_prev, beta, eps):
        return x_prev + beta.sqrt() * eps

    @mistake("the noise is scaled by sqrt(1 - beta) too; its variance is beta")
    def same_factor(x_prev, beta, eps):
        return (1 - beta).sqrt() * (x_prev + eps)

    @law("x_t is no weighted sum of x_prev and eps; use the eps that is given and draw no other")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return _factors(case["x_prev"], case["eps"], out["x_t"])[1] < 1e-9

    @law("the squares of the factors of x_prev and eps do not add up to 1, so that data of variance 1 would not keep it")
    def keeps_variance(case: Case, out: Outputs) -> bool:
        return bool(np.isclose((_factors(case["x_prev"], case["eps"], out["x_t"])[0] ** 2).sum(), 1))


def _factors(x: np.ndarray, eps: np.ndarray, x_t: np.ndarray) -> tuple[np.ndarray, float]:
    """The factors of x and eps in x_t, by least squares, and the share of x_t that they do not explain."""
    parts = np.stack([x.ravel(), eps.ravel()], 1)
    factors = np.linalg.lstsq(parts, x_t.ravel(), rcond=None)[0]
    return factors, float(np.abs(parts @ factors - x_t.ravel()).max() / np.abs(x_t).max())


@item(
    "01.2", title="Jump to any time", function="noise_to", points=2, minutes=10, difficulty=1,
    answers=("course_lib.schedules.Schedule.add_noise", "course_lib.schedules.Discrete"),
    hints=(
        "Two steps in a row are one larger step: the factors of the signal multiply, and the variances of the two noises add. What share of the variance is still signal?",
        "alpha_bar_t is the product of all (1 - beta_s) up to and including t: torch.cumprod.",
        "x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps; t differs from sample to sample, so reshape to (B, 1, 1, 1).",
    ),
)  # fmt: skip
class NoiseTo:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {
                "x0": pictures(rng),
                "t": rng.integers(1, 12, 4),
                "betas": rng.uniform(0.03, 0.08, 12),  # their sum stays below 1
                "eps": rng.normal(size=(4, 1, 4, 4)),
            }
            for _ in range(3)
        ]

    def drive(fn, case: Case) -> Outputs:
        return arrays(x_t=call(fn, T(case["x0"]), T(case["t"]), T(case["betas"]), T(case["eps"])))

    def reference(x0: Tensor, t: Tensor, betas: Tensor, eps: Tensor) -> Tensor:
        alpha_bar = right(torch.cumprod(1 - betas, 0)[t], x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    @mistake("1 - beta_t stands where alpha_bar_t is needed: that is one step, not t of them; take the cumulative product")
    def one_step(x0, t, betas, eps):
        a = right((1 - betas)[t], x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    @mistake("alpha_bar is the cumulative product of beta; it is that of 1 - beta")
    def product_of_betas(x0, t, betas, eps):
        a = right(torch.cumprod(betas, 0)[t], x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    @mistake("the factor of eps has no square root: 1 - alpha_bar is the variance of the noise")
    def noise_without_root(x0, t, betas, eps):
        a = right(torch.cumprod(1 - betas, 0)[t], x0)
        return a.sqrt() * x0 + (1 - a) * eps

    @mistake("neither factor has its square root: alpha_bar is a share of variance, and x0 and eps are scaled by deviations")
    def no_roots(x0, t, betas, eps):
        a = right(torch.cumprod(1 - betas, 0)[t], x0)
        return a * x0 + (1 - a) * eps

    @mistake(
        "the product ends one step early: alpha_bar_t includes beta_t itself (indices count from 0, so it is cumprod(1 - betas)[t])"
    )
    def off_by_one(x0, t, betas, eps):
        a = right(torch.cumprod(1 - betas, 0)[t - 1], x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    @mistake("every sample is taken to the time of the first one; t has an entry for each sample")
    def first_time(x0, t, betas, eps):
        a = torch.cumprod(1 - betas, 0)[t[0]]
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    @mistake("the noise is scaled by sqrt(beta_t), the share of step t alone; after t steps its variance is 1 - alpha_bar_t")
    def beta_noise(x0, t, betas, eps):
        a = right(torch.cumprod(1 - betas, 0)[t], x0)
        return a.sqrt() * x0 + right(betas[t], x0).sqrt() * eps

    @mistake("the factor of x0 has no square root: alpha_bar is a share of variance, and x0 is scaled by its root")
    def signal_without_root(x0, t, betas, eps):
        a = right(torch.cumprod(1 - betas, 0)[t], x0)
        return a * x0 + (1 - a).sqrt() * eps

    @mistake("signal and noise have changed places: sqrt(alpha_bar) belongs to x0 and sqrt(1 - alpha_bar) to eps")
    def swapped(x0, t, betas, eps):
        a = right(torch.cumprod(1 - betas, 0)[t], x0)
        return (1 - a).sqrt() * x0 + a.sqrt() * eps

    @mistake(
        "the factors have shape (B,) and meet the *last* axis, so that they change from column to column; reshape them to (B, 1, 1, 1)"
    )
    def along_the_width(x0, t, betas, eps):
        a = torch.cumprod(1 - betas, 0)[t]
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    @mistake("the betas are summed: 1 - sum(beta) agrees with the product only while the betas are tiny")
    def summed(x0, t, betas, eps):
        a = right((1 - torch.cumsum(betas, 0))[t], x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    @law("a sample is no weighted sum of its x0 and its eps; use the eps that is given, and one factor for a whole sample")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return all(_factors(*sample)[1] < 1e-9 for sample in zip(case["x0"], case["eps"], out["x_t"], strict=True))


@item(
    "01.3", title="A schedule of your own", function="betas_of", points=2, minutes=10, difficulty=2,
    answers=("course_lib.schedules.cosine_betas",),
    hints=(
        "alpha_bar_t = alpha_bar_(t-1) (1 - beta_t). Solve this for beta_t.",
        "Before the first step nothing has been lost: alpha_bar_(-1) = 1, so beta_0 = 1 - alpha_bar_0.",
        "Clip at 0.999 (clamp_max): where alpha_bar reaches 0, the last beta would be 1 and nothing could be undone.",
    ),
)  # fmt: skip
class BetasOf:
    def cases(rng: np.random.Generator) -> list[Case]:
        own = np.cos(np.linspace(0.1, np.pi / 2, 10)) ** rng.uniform(1.5, 3)
        return [{"alpha_bar": np.cumprod(1 - rng.uniform(0.02, 0.4, 8))}, {"alpha_bar": own}]

    def drive(fn, case: Case) -> Outputs:
        return arrays(betas=call(fn, T(case["alpha_bar"])))

    def reference(alpha_bar: Tensor) -> Tensor:
        before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        return (1 - alpha_bar / before).clamp_max(0.999)

    @mistake("beta is the difference of neighbours; it is the *relative* loss, 1 - alpha_bar_t / alpha_bar_(t-1)")
    def difference(alpha_bar):
        before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        return (before - alpha_bar).clamp_max(0.999)

    @mistake("this is 1 - alpha_bar_t, the noise collected over all steps; beta_t is what step t alone adds")
    def all_noise(alpha_bar):
        return (1 - alpha_bar).clamp_max(0.999)

    @mistake("beta_t is shifted by one: it compares alpha_bar_(t+1) with alpha_bar_t, and the first step is lost")
    def shifted(alpha_bar):
        after = torch.cat([alpha_bar[1:], alpha_bar[-1:]])
        return (1 - after / alpha_bar).clamp_max(0.999)

    @mistake("the first beta is 0: before step 0 there is no noise, alpha_bar = 1, so beta_0 = 1 - alpha_bar_0")
    def no_first(alpha_bar):
        return torch.cat([torch.zeros_like(alpha_bar[:1]), 1 - alpha_bar[1:] / alpha_bar[:-1]]).clamp_max(0.999)

    @mistake("the ratio is that of the square roots (of the signal's scale); beta is a share of variance: use alpha_bar itself")
    def ratio_of_roots(alpha_bar):
        before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        return (1 - (alpha_bar / before).sqrt()).clamp_max(0.999)

    @mistake("this is 1 - beta_t, what step t keeps; beta_t is what it adds")
    def kept(alpha_bar):
        before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        return (alpha_bar / before).clamp_max(0.999)

    @mistake("the last beta is not clipped: where alpha_bar reaches 0 it is 1, and a step that keeps nothing cannot be undone")
    def unclipped(alpha_bar):
        before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        return 1 - alpha_bar / before

    @law("the betas do not give the schedule back: cumprod(1 - betas) must equal alpha_bar wherever beta is not clipped")
    def gives_back(case: Case, out: Outputs) -> bool:
        free = out["betas"] < 0.998
        return bool(np.allclose(np.cumprod(1 - out["betas"])[free], case["alpha_bar"][free], atol=1e-6))


@item(
    "01.4", title="Signal-to-noise ratio", function="log_snr", points=1, minutes=5, difficulty=1,
    answers=("course_lib.schedules.Schedule.log_snr", "course_lib.schedules.Schedule.snr"),
    hints=(
        "SNR is a ratio of variances: that of the signal's part over that of the noise's part.",
        "The signal's part of the variance is alpha_bar, the noise's part is 1 - alpha_bar.",
        "log alpha_bar - log(1 - alpha_bar), natural logarithms.",
    ),
)  # fmt: skip
class LogSnr:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [{"alpha_bar": rng.uniform(0.02, 0.98, 6)} for _ in range(2)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(log_snr=call(fn, T(case["alpha_bar"])))

    def reference(alpha_bar: Tensor) -> Tensor:
        return alpha_bar.log() - (1 - alpha_bar).log()

    @mistake("the sign is turned: this is log noise over signal, which rises with time; SNR falls")
    def upside_down(alpha_bar):
        return (1 - alpha_bar).log() - alpha_bar.log()

    @mistake("this is half of it: the ratio of standard deviations; SNR is a ratio of variances")
    def of_deviations(alpha_bar):
        return (alpha_bar.log() - (1 - alpha_bar).log()) / 2

    @mistake("the logarithm is missing: this is the SNR itself")
    def no_log(alpha_bar):
        return alpha_bar / (1 - alpha_bar)

    @mistake("this is in decibel, 10 log10 SNR; here and in the papers log SNR is in nats")
    def decibel(alpha_bar):
        return 10 * (alpha_bar / (1 - alpha_bar)).log10()

    @mistake("this is the logarithm to base 10; log SNR is the natural logarithm, torch.log")
    def base_ten(alpha_bar):
        return (alpha_bar / (1 - alpha_bar)).log10()

    @mistake("this is the signal's share, log alpha_bar, and not its ratio to the noise")
    def share(alpha_bar):
        return alpha_bar.log()

    @mistake("the variances are squared: alpha_bar is a variance already (alpha^2), so it is not squared again")
    def squared(alpha_bar):
        return 2 * (alpha_bar.log() - (1 - alpha_bar).log())

    @law("log SNR must be 0 where signal and noise are equal, at alpha_bar = 1/2, positive above it and negative below")
    def sign(case: Case, out: Outputs) -> bool:
        return bool(((out["log_snr"] > 0) == (case["alpha_bar"] > 0.5)).all())


@item(
    "01.5", title="From alpha_bar to sigma", function="sigma_of", points=1, minutes=5, difficulty=1,
    answers=("course_lib.schedules.Schedule.sigma",),
    hints=(
        "Divide x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps by whatever makes the factor of x0 equal to 1.",
        "What then multiplies eps is sigma.",
        "sigma = sqrt((1 - alpha_bar) / alpha_bar).",
    ),
)  # fmt: skip
class SigmaOf:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [{"alpha_bar": rng.uniform(0.02, 0.98, 6)} for _ in range(2)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(sigma=call(fn, T(case["alpha_bar"])))

    def reference(alpha_bar: Tensor) -> Tensor:
        return ((1 - alpha_bar) / alpha_bar).sqrt()

    @mistake(
        "this is the deviation of the noise in x_t, sqrt(1 - alpha_bar); in the course's coordinate it is divided by sqrt(alpha_bar)"
    )
    def not_divided(alpha_bar):
        return (1 - alpha_bar).sqrt()

    @mistake("the square root is missing: this is sigma^2")
    def squared(alpha_bar):
        return (1 - alpha_bar) / alpha_bar

    @mistake("upside down: this is signal over noise, 1 / sigma")
    def upside_down(alpha_bar):
        return (alpha_bar / (1 - alpha_bar)).sqrt()

    @mistake("divided by alpha_bar instead of its square root: x_t carries sqrt(alpha_bar) x0")
    def divided_twice(alpha_bar):
        return (1 - alpha_bar).sqrt() / alpha_bar

    @mistake(
        "the noise is scaled by 1 - sqrt(alpha_bar) here; its deviation in x_t is sqrt(1 - alpha_bar), a root over the difference"
    )
    def of_roots(alpha_bar):
        return (1 - alpha_bar.sqrt()) / alpha_bar.sqrt()

    @law("sigma must satisfy alpha_bar = 1 / (1 + sigma^2)")
    def inverts(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(1 / (1 + out["sigma"] ** 2), case["alpha_bar"]))
