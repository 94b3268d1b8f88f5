"""Items 02.5 and 02.6: the ancestral step, and the whole ancestral sampler."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_02.common import (
    NETS,
    STEPS,
    batch,
    clean,
    drive_sampler,
    grown,
    levels,
    noisy,
    posterior_mean,
    posterior_variance,
    sampler_case,
    signal,
)
from course_lib.grading.sets.tools import T, fit


def _mean(x_t: Tensor, eps: Tensor, t: int, betas: Tensor) -> Tensor:
    """The mean of Algorithm 2, line 4."""
    beta, a = betas[t], signal(betas)[0][t]
    return (x_t - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()


def _ancestral(x_t: Tensor, eps: Tensor, t: int, betas: Tensor, s: Tensor | float, z: Tensor) -> Tensor:
    """Algorithm 2, line 4, with the deviation s."""
    return _mean(x_t, eps, t, betas) + s * z


def _deviation(t: int, betas: Tensor, variance: str, last: int = 0) -> Tensor:
    """The deviation of the noise at time t; 0 up to the time `last`."""
    chosen = betas[t] if variance == "large" else posterior_variance(betas, t)
    return chosen.sqrt() if t > last else 0 * chosen


@item(
    "02.5", title="The ancestral step", function="ancestral_step", points=2, minutes=20, difficulty=2,
    answers=STEPS,
    hints=(
        "The mean can be had as in 02.4: x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t), not clipped, put into the mean of 02.1. Then add sigma_t z.",
        "For the short form use sqrt(alpha_bar_t) = sqrt(1 - beta_t) sqrt(alpha_bar_{t-1}): the factors of x_t add up to 1 / sqrt(1 - beta_t). Which factor is left for eps_hat?",
        "The mean is (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(1 - beta_t).",
        "sigma_t^2 is beta_t for 'large', and beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) for 'small'; z is multiplied by sigma_t, its root.",
        "The last step, t = 0, ends at the clean sample: add no noise there, whatever the variance.",
    ),
)  # fmt: skip
class AncestralStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {**noisy(rng), "t": t, "z": rng.normal(size=(3, 1, 4, 4)), "variance": variance}
            for t in (0, 1, int(rng.integers(2, 10)))
            for variance in ("small", "large")
        ]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["x_t"]), T(case["eps_hat"]), case["t"], T(case["betas"]), T(case["z"]), case["variance"])
        return arrays(x=result)

    def reference(x_t: Tensor, eps_hat: Tensor, t: int, betas: Tensor, z: Tensor, variance: str) -> Tensor:
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, variance), z)

    @mistake("noise is added in the last step too: with 'large' the sample keeps noise of variance beta_0; add none at t = 0")
    def noise_at_the_end(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, variance, last=-1), z)

    @mistake("the step at t = 1 gets no noise; the paper counts from 1 and leaves out z at its first time, which is t = 0 here")
    def no_noise_at_one(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, variance, last=1), z)

    @mistake("z is multiplied by the variance; a draw is mean + standard deviation * z, so take the square root")
    def variance_for_deviation(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, variance) ** 2, z)

    @mistake("`variance` is ignored: 'small' too gets beta_t; it asks for beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)")
    def always_large(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, "large"), z)

    @mistake("`variance` is ignored: 'large' too gets the posterior's variance; it asks for beta_t")
    def always_small(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, "small"), z)

    @mistake("the two variances have changed places: beta_t is the larger one")
    def names_swapped(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, "small" if variance == "large" else "large"), z)

    @mistake("z is missing: without it all samples drift to the means, and the set of samples shrinks")
    def no_noise(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, 0.0, z)

    @mistake("eps_hat is divided by sqrt(beta_t), the noise of one step; it is that of all of them: sqrt(1 - alpha_bar_t)")
    def alpha_for_alpha_bar(x_t, eps_hat, t, betas, z, variance):
        mean = (x_t - betas[t].sqrt() * eps_hat) / (1 - betas[t]).sqrt()
        return mean + _deviation(t, betas, variance) * z

    @mistake("all of the noise is taken away in one step; a step removes the share beta_t / sqrt(1 - alpha_bar_t) of eps_hat")
    def all_noise(x_t, eps_hat, t, betas, z, variance):
        mean = (x_t - (1 - signal(betas)[0][t]).sqrt() * eps_hat) / (1 - betas[t]).sqrt()
        return mean + _deviation(t, betas, variance) * z

    @mistake("the mean is not divided by sqrt(1 - beta_t): the forward step shrank the signal by it")
    def not_divided(x_t, eps_hat, t, betas, z, variance):
        mean = x_t - betas[t] / (1 - signal(betas)[0][t]).sqrt() * eps_hat
        return mean + _deviation(t, betas, variance) * z

    @mistake("x0_hat is clipped as in 02.4; here the mean is the one without clipping")
    def clipped(x_t, eps_hat, t, betas, z, variance):
        mean = posterior_mean(clean(x_t, eps_hat, t, betas).clamp(-1, 1), x_t, t, betas)
        return mean + _deviation(t, betas, variance) * z

    @mistake("the mean is divided by sqrt(alpha_bar_t), which undoes all steps at once; one is undone: sqrt(1 - beta_t)")
    def alpha_bar_for_alpha(x_t, eps_hat, t, betas, z, variance):
        a = signal(betas)[0][t]
        mean = (x_t - betas[t] / (1 - a).sqrt() * eps_hat) / a.sqrt()
        return mean + _deviation(t, betas, variance) * z

    @mistake("eps_hat is multiplied by beta_t / (1 - alpha_bar_t); the root of 1 - alpha_bar_t is missing")
    def root_missing(x_t, eps_hat, t, betas, z, variance):
        mean = (x_t - betas[t] / (1 - signal(betas)[0][t]) * eps_hat) / (1 - betas[t]).sqrt()
        return mean + _deviation(t, betas, variance) * z

    @mistake("sigma_t z stands inside the bracket and is divided by sqrt(1 - beta_t) too; it is added after the division")
    def noise_in_the_bracket(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, eps_hat, t, betas, _deviation(t, betas, variance) / (1 - betas[t]).sqrt(), z)

    @mistake("eps_hat is added; the way back takes the noise away")
    def noise_added(x_t, eps_hat, t, betas, z, variance):
        return _ancestral(x_t, -eps_hat, t, betas, _deviation(t, betas, variance), z)

    @law("x is no weighted sum of x_t, eps_hat and z: nothing is clipped here, and z is the only noise")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return _parts(case, out)[1] < 1e-9

    @law("the factor of x_t must be 1 / sqrt(1 - beta_t)")
    def factor_of_x(case: Case, out: Outputs) -> bool:
        return bool(np.isclose(_parts(case, out)[0][0], (1 - case["betas"][case["t"]]) ** -0.5))

    @law(
        "the factor of x_t is right, that of eps_hat is not: put x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t) into the mean of 02.1 once more"
    )
    def factor_of_eps(case: Case, out: Outputs) -> bool:
        factors, beta = _parts(case, out)[0], case["betas"][case["t"]]
        return bool(np.isclose(factors[1] / factors[0], -beta / np.sqrt(1 - levels(case)[0])))

    @law("the factor of z must be 0 at t = 0, and elsewhere a root of the variance that was asked for")
    def factor_of_z(case: Case, out: Outputs) -> bool:
        wanted = _deviation(case["t"], T(case["betas"]), case["variance"])
        return bool(np.isclose(_parts(case, out)[0][2], float(wanted)))


def _parts(case: Case, out: Outputs) -> tuple[np.ndarray, float]:
    """The factors of x_t, eps_hat and z in the step, and what they leave unexplained."""
    return fit(out["x"], case["x_t"], case["eps_hat"], case["z"])


def _sample(net, x_T: Tensor, betas: Tensor, noise) -> Tensor:
    """Algorithm 2 with sigma_t^2 = beta_t."""
    x = x_T
    for t in reversed(range(len(betas))):
        x = _mean(x, net(x, batch(t, x)), t, betas)
        x = x + betas[t].sqrt() * noise(x) if t > 0 else x
    return x


@item(
    "02.6", title="The whole sampler", function="sample_ddpm", points=2, minutes=20, difficulty=2, tolerance=1e-5,
    answers=STEPS,
    hints=(
        "A loop over the times from the last, T - 1, down to 0: `for t in reversed(range(len(betas)))`. Nothing is left out at either end.",
        "In it: eps = net(x, the time of each sample), the mean of 02.5, and, unless t is 0, betas[t].sqrt() * noise(x).",
        "The network wants t as (B,): torch.full((len(x),), t). Call noise(x) anew in each step.",
    ),
)  # fmt: skip
class SampleDdpm:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [sampler_case(rng, net, 6) for net in NETS]

    def drive(fn, case: Case) -> Outputs:
        return drive_sampler(fn, case)

    def reference(net, x_T: Tensor, betas: Tensor, noise) -> Tensor:
        return _sample(net, x_T, betas, noise)

    @mistake("noise is added in the last step too: what comes out is a clean sample with noise of variance beta_0")
    def noise_at_the_end(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t, x)), t, betas) + betas[t].sqrt() * noise(x)
        return x

    @mistake("the loop ends at t = 1: the last step, t = 0, is missing, and the sample stays noisy (range stops before its end)")
    def stops_at_one(net, x_T, betas, noise):
        x = x_T
        for t in range(len(betas) - 1, 0, -1):
            x = _mean(x, net(x, batch(t, x)), t, betas) + betas[t].sqrt() * noise(x)
        return x

    @mistake("the loop starts one step late, at T - 2; x_T has the noise of all T steps, of which the last is T - 1")
    def starts_late(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas) - 1)):
            x = _mean(x, net(x, batch(t, x)), t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake("time runs forwards, from 0 to T - 1; the way back starts at the noisiest time")
    def forwards(net, x_T, betas, noise):
        x = x_T
        for t in range(len(betas)):
            x = _mean(x, net(x, batch(t, x)), t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake("the network is told T - 1 - t, the number of the step; it wants the time t of the noise in x")
    def told_the_step(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(len(betas) - 1 - t, x)), t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake("the network is told t + 1; it was trained with times that count from 0")
    def counted_from_one(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t + 1, x)), t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake("the same noise is added in every step: draw it inside the loop, or its parts add up instead of averaging out")
    def same_noise(net, x_T, betas, noise):
        x, z = x_T, noise(x_T)
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t, x)), t, betas)
            x = x + betas[t].sqrt() * z if t > 0 else x
        return x

    @mistake("the network is asked once, at x_T; the whole point of many steps is that it looks again at each x")
    def asked_once(net, x_T, betas, noise):
        x, eps = x_T, net(x_T, batch(len(betas) - 1, x_T))
        for t in reversed(range(len(betas))):
            x = _mean(x, eps, t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake("the network is asked about x_T in every step; ask it about the x of this step")
    def asked_about_x_T(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x_T, batch(t, x)), t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake("the noise is multiplied by beta_t, its variance; take the square root")
    def variance_for_deviation(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t, x)), t, betas)
            x = x + betas[t] * noise(x) if t > 0 else x
        return x

    @mistake(
        "this is the smaller variance, beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t); sigma_t^2 = beta_t is asked for here"
    )
    def small_variance(net, x_T, betas, noise):
        x, alpha_bar = x_T, torch.cumprod(1 - betas, 0)
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t, x)), t, betas)
            if t > 0:
                x = x + (betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])).sqrt() * noise(x)
        return x

    @mistake("no noise is added at all: this run ends near the mean of the data, and not at a sample")
    def no_noise(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t, x)), t, betas)
        return x

    @mistake("x_T is replaced by fresh noise; start at the x_T that was given, so that one can start twice at the same point")
    def own_start(net, x_T, betas, noise):
        x = noise(x_T)
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t, x)), t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake("x is clipped to [-1, 1] after each step; a noisy x goes beyond, and must")
    def clips_x(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = _mean(x, net(x, batch(t, x)), t, betas)
            x = (x + betas[t].sqrt() * noise(x) if t > 0 else x).clamp(-1, 1)
        return x

    @mistake("the guess of x0 is clipped in each step, as in 02.4; this sampler clips nothing")
    def clips_x0(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x0 = clean(x, net(x, batch(t, x)), t, betas).clamp(-1, 1)
            x = posterior_mean(x0, x, t, betas)
            x = x + betas[t].sqrt() * noise(x) if t > 0 else x
        return x

    @mistake(
        "each step guesses x0 and noises it afresh to the level before; the ancestral step also keeps a part of x_t, as the posterior of 02.1 says"
    )
    def noised_afresh(net, x_T, betas, noise):
        x, before = x_T, signal(betas)[1]
        for t in reversed(range(len(betas))):
            x0 = clean(x, net(x, batch(t, x)), t, betas)
            x = before[t].sqrt() * x0 + (1 - before[t]).sqrt() * noise(x) if t > 0 else x0
        return x

    @law("with a network that answers 0, the result must be a weighted sum of x_T and the draws of noise(x): nothing is clipped")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return case["net"] != "zero" or grown(case, out)[1] < 1e-9

    @law("with a network that answers 0, x_T must come out divided by sqrt(1 - beta_t) of every one of the T steps")
    def every_step(case: Case, out: Outputs) -> bool:
        return case["net"] != "zero" or bool(np.isclose(grown(case, out)[0][0], np.prod(1 - case["betas"]) ** -0.5))

    @law(
        "with a network that answers 0, the noises of the T - 1 steps that have one do not have the deviations sqrt(beta_t) when they are added"
    )
    def every_noise(case: Case, out: Outputs) -> bool:
        betas, steps = case["betas"], len(case["betas"])
        wanted = [np.sqrt(betas[t] / np.prod(1 - betas[:t])) for t in range(steps - 1, 0, -1)]
        wanted += [0.0] * (len(case["noise"]) - len(wanted))  # and no draw more
        return case["net"] != "zero" or bool(np.allclose(grown(case, out)[0][1:], wanted))

    @law(
        "with a network that answers 0 the run is right, with one that answers it is not: look at what net is asked (the x and the t of this step) and at the factor of its answer"
    )
    def every_answer(case: Case, out: Outputs) -> bool:
        wanted = drive_sampler(_sample, case)["x0"]
        return case["net"] == "zero" or bool(np.allclose(out["x0"], wanted))
