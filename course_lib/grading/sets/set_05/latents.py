"""Items 05.1 and 05.2: the posterior of the autoencoder with its KL divergence, and the scale of latents."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, named, right
from course_lib.nets.vae import Posterior


def _nats(terms: Tensor) -> Tensor:
    """Half the sum over the numbers of each sample, (B,)."""
    return terms.flatten(1).sum(1) / 2


@item(
    "05.1", title="The posterior and its KL divergence", function="posterior", points=1, minutes=15, difficulty=1,
    answers=("course_lib.nets.vae.Posterior",),
    hints=(
        "logvar is log of the variance. The standard deviation is its root: exp(logvar / 2); the variance is exp(logvar).",
        "z = mean + exp(logvar / 2) eps. For the divergence each number of a sample gives mean^2 + var - 1 - logvar.",
        "Sum those over all numbers of a sample, flatten(1).sum(1), and halve: one number for each sample, (B,).",
    ),
)  # fmt: skip
class PosteriorKL:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...]) -> Case:
            # means off 0 and variances below 1, as an encoder gives them: a mean of squares then differs from a square of means
            draws = {"mean": 0.6 + rng.normal(size=shape), "logvar": rng.uniform(-2.5, 0.5, shape)}
            return draws | {"eps": rng.normal(size=shape)}

        standard = {"mean": np.zeros((2, 3)), "logvar": np.zeros((2, 3)), "eps": rng.normal(size=(2, 3))}
        return [case((3, 2, 2, 3)), case((4, 5)), standard]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, T(case["mean"]), T(case["logvar"]), T(case["eps"])), "z", "kl"))

    def reference(mean: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        of = Posterior(mean, logvar)
        return of.sample(eps), of.kl()

    @mistake(
        "the KL divergence has the standard deviation where the variance belongs: exp(logvar), not exp(logvar / 2); z is right"
    )
    def deviation_for_variance(mean, logvar, eps):
        std = (logvar / 2).exp()
        return mean + std * eps, _nats(mean**2 + std - 1 - logvar)

    @mistake("the factor 1/2 of the KL divergence is missing; z is right")
    def half_forgotten(mean, logvar, eps):
        return mean + (logvar / 2).exp() * eps, 2 * _nats(mean**2 + logvar.exp() - 1 - logvar)

    @mistake(
        "z is drawn with the *variance* exp(logvar) as its deviation; the deviation is exp(logvar / 2); the divergence is right"
    )
    def variance_for_deviation(mean, logvar, eps):
        return mean + logvar.exp() * eps, _nats(mean**2 + logvar.exp() - 1 - logvar)

    @mistake("z is drawn with logvar / 2 itself as the deviation; it is the logarithm of it: exp(logvar / 2)")
    def logarithm_for_deviation(mean, logvar, eps):
        return mean + logvar / 2 * eps, _nats(mean**2 + logvar.exp() - 1 - logvar)

    @mistake("z is the mean without any noise: a point, not a draw; add exp(logvar / 2) eps")
    def no_noise(mean, logvar, eps):
        return mean.clone(), _nats(mean**2 + logvar.exp() - 1 - logvar)

    @mistake(
        "the sign of logvar is turned in z: the deviation is exp(-logvar / 2), one over what it should be; the divergence is right"
    )
    def precision_for_variance(mean, logvar, eps):
        return mean + (-logvar / 2).exp() * eps, _nats(mean**2 + logvar.exp() - 1 - logvar)

    @mistake(
        "the terms are *averaged* over the numbers of a sample; the divergence of independent numbers is their sum "
        "(a mean is used as a loss, with another weight; it is no KL divergence)"
    )
    def mean_over_numbers(mean, logvar, eps):
        terms = mean**2 + logvar.exp() - 1 - logvar
        return mean + (logvar / 2).exp() * eps, terms.flatten(1).mean(1) / 2

    @mistake("the terms of the whole batch are averaged, and all samples get the same number; sum over each sample by itself")
    def one_for_the_batch(mean, logvar, eps):
        kl = _nats(mean**2 + logvar.exp() - 1 - logvar)
        return mean + (logvar / 2).exp() * eps, kl.mean().expand(len(kl))

    @mistake("logvar is added; small variances must *cost*: - logvar")
    def logarithm_added(mean, logvar, eps):
        return mean + (logvar / 2).exp() * eps, _nats(mean**2 + logvar.exp() - 1 + logvar)

    @mistake("the divergence has log of the deviation, logvar / 2, where log of the variance belongs")
    def half_of_the_logarithm(mean, logvar, eps):
        return mean + (logvar / 2).exp() * eps, _nats(mean**2 + logvar.exp() - 1 - logvar / 2)

    @mistake("the - 1 is missing: at mean 0 and variance 1, where q is N(0, I) itself, the divergence must be 0")
    def one_forgotten(mean, logvar, eps):
        return mean + (logvar / 2).exp() * eps, _nats(mean**2 + logvar.exp() - logvar)

    @mistake("this is the divergence the other way round, KL(N(0, I) || q); it is KL(q || N(0, I)) that the bound has")
    def turned_round(mean, logvar, eps):
        return mean + (logvar / 2).exp() * eps, _nats((1 + mean**2) * (-logvar).exp() - 1 + logvar)

    @mistake("the divergence has the wrong sign: the bound has - KL, and KL itself is never negative")
    def sign_turned(mean, logvar, eps):
        return mean + (logvar / 2).exp() * eps, -_nats(mean**2 + logvar.exp() - 1 - logvar)

    @mistake(
        "this is log q(z) - log p(z) at the one z drawn: right in the mean over eps, but noisy; the mean is known in closed form"
    )
    def at_one_draw(mean, logvar, eps):
        z = mean + (logvar / 2).exp() * eps
        return z, _nats(z**2 - eps**2 - logvar)

    @mistake("the pair is turned round: return z first, then the KL divergence")
    def pair_turned(mean, logvar, eps):
        return _nats(mean**2 + logvar.exp() - 1 - logvar), mean + (logvar / 2).exp() * eps

    @law("z must be mean + std eps, with std = exp(logvar / 2)")
    def reparameterised(case: Case, out: Outputs) -> bool:
        return close(out["z"], case["mean"] + np.exp(case["logvar"] / 2) * case["eps"])

    @law("z is right; the divergence of q from N(0, I) can never be negative")
    def not_negative(case: Case, out: Outputs) -> bool:
        return bool((out["kl"] >= -1e-9).all())

    @law("z is right; where mean = 0 and logvar = 0, q is N(0, I) and the divergence must be 0")
    def zero_for_the_prior(case: Case, out: Outputs) -> bool:
        return bool(case["mean"].any()) or close(out["kl"], 0)

    @law("z is right; the divergence is not 1/2 the sum of mean^2 + var - 1 - logvar over the numbers of a sample")
    def summed(case: Case, out: Outputs) -> bool:
        terms = case["mean"] ** 2 + np.exp(case["logvar"]) - 1 - case["logvar"]
        return close(2 * out["kl"], terms.reshape(len(terms), -1).sum(1))


# --- 05.2 ----------------------------------------------------------------------------------------------


def _use(shift: Tensor, scale: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The constants, (C,) each, and what they make of z and y."""
    m, s = shift[:, None, None], scale[:, None, None]
    return shift, scale, (z - m) * s, y / s + m


def _moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (C,)."""
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)


@item(
    "05.2", title="The scale of latents", function="standardised", points=1, minutes=15, difficulty=1,
    tolerance=5e-4,  # variances divided by n or by n - 1 = 2047 are both right, 2.4e-4 apart in the scale
    hints=(
        "A channel is one of C, and its numbers are all that the N samples have at all places: dim=(0, 2, 3).",
        "shift is the mean of a channel, scale 1 / its standard deviation; (C,) becomes (C, 1, 1) to meet (B, C, h, w).",
        "Into the model: (z - shift) * scale. Back: undo the last thing first, y / scale + shift.",
    ),
)  # fmt: skip
class Standardised:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(channels: int) -> Case:
            drawn = rng.permuted(np.linspace(-1, 1, channels)) + rng.uniform(0.1, 0.3, channels)
            means, stds = (1.6 * drawn, np.exp(0.9 * rng.permuted(np.linspace(-1, 1, channels)) + 0.4))
            samples = rng.normal(size=(8, 1, 1, 1)) + rng.normal(size=(8, channels, 16, 16))  # samples differ in their means
            of = lambda unit: means[:, None, None] + stds[:, None, None] * unit
            z, y = rng.normal(size=(2, channels, 2, 3)), rng.normal(size=(2, channels, 2, 3))
            return {"latents": of(samples), "z": of(z), "y": y}

        return [case(4), case(3)]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["latents"]), T(case["z"]), T(case["y"]))
        return arrays(**named(result, "shift", "scale", "into", "back"))

    def reference(latents: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, std = _moments(latents)
        return _use(mean, 1 / std, z, y)

    @mistake("scale is the standard deviation, and latents are multiplied by it; divide by it: scale = 1 / std")
    def multiplied(latents, z, y):
        return _use(*_moments(latents), z, y)

    @mistake(
        "one number is used for all channels, 1 / std of all latents, as Stable Diffusion does; here every channel is to have variance 1 by itself"
    )
    def one_for_all_channels(latents, z, y):
        mean, std = latents.mean().expand(z.shape[1]), latents.std().expand(z.shape[1])
        return _use(mean, 1 / std, z, y)

    @mistake("the means are left where they are, shift = 0: that is Stable Diffusion's rule, and channels keep their offsets")
    def no_shift(latents, z, y):
        mean, std = _moments(latents)
        return _use(torch.zeros_like(mean), 1 / std, z, y)

    @mistake("scale is 1 over the *variance*; take its root")
    def variance_for_deviation(latents, z, y):
        mean, std = _moments(latents)
        return _use(mean, 1 / std**2, z, y)

    @mistake("scale is 1 over the root of the mean *square*: the mean has to be taken off before squaring")
    def mean_square(latents, z, y):
        mean, _ = _moments(latents)
        return _use(mean, 1 / latents.square().mean((0, 2, 3)).sqrt(), z, y)

    @mistake(
        "the deviation is taken within each sample and then averaged: what samples differ by is lost, and the variance comes out above 1"
    )
    def within_samples(latents, z, y):
        mean, _ = _moments(latents)
        return _use(mean, 1 / latents.std((2, 3)).mean(0), z, y)

    @mistake("shift and scale are those of the first sample alone; use all of them")
    def first_sample(latents, z, y):
        return _use(latents[0].mean((1, 2)), 1 / latents[0].std((1, 2)), z, y)

    @mistake("shift and scale bring each channel to [-1, 1] by its least and largest number; asked for are mean 0 and variance 1")
    def by_the_range(latents, z, y):
        low, high = latents.amin((0, 2, 3)), latents.amax((0, 2, 3))
        return _use((low + high) / 2, 2 / (high - low), z, y)

    @mistake(
        "z is brought to mean 0 and variance 1 by its *own* moments: then `back` cannot undo it; use the constants of `latents` for every batch"
    )
    def moments_of_the_batch(latents, z, y):
        mean, std = _moments(latents)
        m, s = _moments(z)
        return mean, 1 / std, (z - right(m, z[0])) / right(s, z[0]), y * right(std, y[0]) + right(mean, y[0])

    @mistake("on the way back y is *multiplied* by scale once more; the way back divides: y / scale + shift")
    def multiplied_back(latents, z, y):
        mean, std = _moments(latents)
        shift, scale, into, _ = _use(mean, 1 / std, z, y)
        return shift, scale, into, y * right(scale, y[0]) + right(shift, y[0])

    @mistake("the way back is in the wrong order, (y + shift) / scale: undo the last thing first, the scale, and then the shift")
    def back_in_the_wrong_order(latents, z, y):
        mean, std = _moments(latents)
        shift, scale, into, _ = _use(mean, 1 / std, z, y)
        return shift, scale, into, (y + right(shift, y[0])) / right(scale, y[0])

    @mistake("the shift is not put back on the way back: y / scale alone")
    def shift_not_put_back(latents, z, y):
        mean, std = _moments(latents)
        shift, scale, into, _ = _use(mean, 1 / std, z, y)
        return shift, scale, into, y / right(scale, y[0])

    @mistake(
        "the way in scales first and shifts then, z * scale - shift; the shift is in units of the latents: (z - shift) * scale"
    )
    def scaled_first(latents, z, y):
        mean, std = _moments(latents)
        shift, scale, _, back = _use(mean, 1 / std, z, y)
        return shift, scale, z * right(scale, z[0]) - right(shift, z[0]), back

    @mistake("the shift has the wrong sign: it is added on the way in, and the channels move away from 0")
    def shift_added(latents, z, y):
        mean, std = _moments(latents)
        m, s = right(mean, z[0]), right(std, z[0])
        return mean, 1 / std, (z + m) / s, y * s - m

    @mistake("shift and scale are returned in the wrong order: shift, scale, into, back")
    def pair_turned(latents, z, y):
        mean, std = _moments(latents)
        shift, scale, into, back = _use(mean, 1 / std, z, y)
        return scale, shift, into, back

    @law("with your shift and scale, (latents - shift) * scale must have mean 0 in every channel")
    def mean_zero(case: Case, out: Outputs) -> bool:
        return bool(np.abs(_scaled(case, out).mean((0, 2, 3))).max() < 1e-3)

    @law("with your shift and scale, (latents - shift) * scale must have variance 1 in every channel")
    def variance_one(case: Case, out: Outputs) -> bool:
        return bool(np.abs(_scaled(case, out).std((0, 2, 3)) - 1).max() < 1e-3)

    @law("shift and scale are right; the way in must be (z - shift) * scale, with your own two")
    def way_in(case: Case, out: Outputs) -> bool:
        return close(out["into"], (case["z"] - out["shift"][:, None, None]) * out["scale"][:, None, None])

    @law("the way in is right; the way back must undo it")
    def way_back(case: Case, out: Outputs) -> bool:
        return close((out["back"] - out["shift"][:, None, None]) * out["scale"][:, None, None], case["y"])


def _scaled(case: Case, out: Outputs) -> np.ndarray:
    return (case["latents"] - out["shift"][:, None, None]) * out["scale"][:, None, None]
