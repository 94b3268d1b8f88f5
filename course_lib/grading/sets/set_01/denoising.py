"""Items 01.6 to 01.9: predictions, exact denoisers, the training loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.gaussians import Mixture
from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.tools import T, named, pictures, right
from course_lib.schedules import cosine_betas, linear_betas


@item(
    "01.6", title="eps, x0 and v from each other", function="x0_and_v", points=2, minutes=15, difficulty=2,
    answers=("course_lib.denoisers.NetworkDenoiser",),
    hints=(
        "Solve x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps for x0.",
        "v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0: put your x0 into it.",
        "alpha_bar is (B,): reshape it to (B, 1, 1, 1) before it meets x_t.",
    ),
)  # fmt: skip
class X0AndV:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {"x_t": rng.normal(size=(3, 1, 2, 2)), "eps": rng.normal(size=(3, 1, 2, 2)), "alpha_bar": rng.uniform(0.1, 0.9, 3)}
            for _ in range(2)
        ]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, T(case["x_t"]), T(case["eps"]), T(case["alpha_bar"])), "x0", "v"))

    def reference(x_t: Tensor, eps: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = (x_t - b * eps) / a
        return x0, a * eps - b * x0

    @mistake("x0 is not divided by sqrt(alpha_bar): taking the noise away leaves the *shrunk* signal")
    def not_divided(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = x_t - b * eps
        return x0, a * eps - b * x0

    @mistake("the square roots are missing: alpha_bar and 1 - alpha_bar are variances, x_t mixes with deviations")
    def no_roots(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t), right(1 - alpha_bar, x_t)
        x0 = (x_t - b * eps) / a
        return x0, a * eps - b * x0

    @mistake("the sign of v is turned: v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 points from data to noise")
    def v_turned(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = (x_t - b * eps) / a
        return x0, b * x0 - a * eps

    @mistake(
        "the factors of v have changed places: eps goes with sqrt(alpha_bar) and x0 with sqrt(1 - alpha_bar), the reverse of x_t"
    )
    def v_swapped(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = (x_t - b * eps) / a
        return x0, b * eps - a * x0

    @mistake("this v is the flow's velocity eps - x0; v-prediction weights the two with sqrt(alpha_bar) and sqrt(1 - alpha_bar)")
    def flow_velocity(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = (x_t - b * eps) / a
        return x0, eps - x0

    @mistake("v is computed from x_t in place of x0; put the clean estimate into it")
    def v_of_xt(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        return (x_t - b * eps) / a, a * eps - b * x_t

    @mistake("the pair is turned round: return x0 first, then v")
    def pair_turned(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = (x_t - b * eps) / a
        return a * eps - b * x0, x0

    @mistake("x0 is divided by alpha_bar; x_t carries sqrt(alpha_bar) x0, so divide by the root")
    def divided_by_alpha_bar(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = (x_t - b * eps) / a**2
        return x0, a * eps - b * x0

    @mistake("the two parts of v are added; v = sqrt(alpha_bar) eps *minus* sqrt(1 - alpha_bar) x0")
    def v_added(x_t, eps, alpha_bar):
        a, b = right(alpha_bar, x_t).sqrt(), right(1 - alpha_bar, x_t).sqrt()
        x0 = (x_t - b * eps) / a
        return x0, a * eps + b * x0

    @law("x0 does not give x_t back: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps must equal x_t")
    def gives_back(case: Case, out: Outputs) -> bool:
        a = case["alpha_bar"].reshape(-1, 1, 1, 1)
        return bool(np.allclose(np.sqrt(a) * out["x0"] + np.sqrt(1 - a) * case["eps"], case["x_t"]))

    @law("x0 is right, v is not: alpha eps - sqrt(1 - alpha_bar) x0 with alpha = sqrt(alpha_bar)")
    def velocity(case: Case, out: Outputs) -> bool:
        a = case["alpha_bar"].reshape(-1, 1, 1, 1)
        return bool(np.allclose(out["v"], np.sqrt(a) * case["eps"] - np.sqrt(1 - a) * out["x0"]))


@item(
    "01.7", title="The exact denoiser of a Gaussian", function="denoise_gaussian", points=2, minutes=15, difficulty=2,
    answers=("course_lib.gaussians.Mixture",),
    hints=(
        "x is a noisy reading of x0, and N(mean, std^2) is what was known before. Weigh both by their precision, 1 / variance.",
        "Precision of the reading: 1 / sigma^2. Precision of the prior: 1 / std^2.",
        "E[x0 | x] = (std^2 x + sigma^2 mean) / (std^2 + sigma^2). Check: sigma -> 0 gives x, sigma -> infinity gives mean.",
    ),
)  # fmt: skip
class DenoiseGaussian:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {
                "x": rng.normal(size=5) * 2,
                "sigma": float(rng.uniform(0.3, 3)),
                "mean": float(rng.uniform(0.5, 2)),
                "std": float(rng.uniform(0.4, 2)),
            }
            for _ in range(3)
        ]

    def drive(fn, case: Case) -> Outputs:
        return arrays(x0=call(fn, T(case["x"]), T(case["sigma"]), case["mean"], case["std"]))

    def reference(x: Tensor, sigma: Tensor, mean: float, std: float) -> Tensor:
        return Mixture.gaussian(torch.tensor([mean]), torch.tensor([[std**2]])).denoiser(x[:, None], sigma)[:, 0]

    @mistake("the weights have changed places: the noisier the reading, the *less* it counts, so x is weighted by std^2")
    def swapped(x, sigma, mean, std):
        return (sigma**2 * x + std**2 * mean) / (std**2 + sigma**2)

    @mistake("the weights are standard deviations; precisions are inverse variances, so square them")
    def not_squared(x, sigma, mean, std):
        return (std * x + sigma * mean) / (std + sigma)

    @mistake("the prior's mean is forgotten: this shrinks towards 0; shrink towards the mean")
    def towards_zero(x, sigma, mean, std):
        return std**2 * x / (std**2 + sigma**2)

    @mistake("x0 = x is right only without noise: it trusts the reading fully and ignores the prior")
    def no_prior(x, sigma, mean, std):
        return x + 0 * sigma

    @mistake("this is the score of the noised density; the denoiser is x + sigma^2 times it")
    def score(x, sigma, mean, std):
        return (mean - x) / (std**2 + sigma**2)

    @mistake("the score is multiplied by sigma; Tweedie's formula has sigma^2")
    def tweedie_sigma(x, sigma, mean, std):
        return x + sigma * (mean - x) / (std**2 + sigma**2)

    @mistake("the distance to the mean is shrunk, and the mean not added back: the estimate is mean + share * (x - mean)")
    def not_added_back(x, sigma, mean, std):
        return std**2 / (std**2 + sigma**2) * (x - mean)

    @mistake("the weighted sum is not divided by the sum of the precisions, 1 / sigma^2 + 1 / std^2")
    def not_normalised(x, sigma, mean, std):
        return x / sigma**2 + mean / std**2

    @law("x0 must lie between the reading x and the prior's mean")
    def between(case: Case, out: Outputs) -> bool:
        low, high = np.minimum(case["x"], case["mean"]), np.maximum(case["x"], case["mean"])
        return bool(((out["x0"] >= low - 1e-9) & (out["x0"] <= high + 1e-9)).all())


@item(
    "01.8", title="E[x0 | x] of a mixture", function="denoise_mixture", points=3, minutes=25, difficulty=3,
    answers=("course_lib.gaussians.Mixture", "course_lib.gaussians.Empirical"),
    hints=(
        "If you knew the component k that x0 came from, item 01.7 would be the answer. You do not: average over k with p(k | x).",
        "Bayes: p(k | x) is proportional to weights[k] * N(x; means[k], std^2 + sigma^2), the *noised* component.",
        "Work with logarithms and torch.softmax over the components; the squared distance sums over the coordinates.",
        "x[:, None] - means has shape (B, K, d); finally sum p(k | x) times each component's estimate over k.",
    ),
)  # fmt: skip
class DenoiseMixture:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for sigma in (0.4, 1.0, 2.5):
            weights = rng.dirichlet([2.0] * 3)
            result.append({"x": rng.normal(size=(6, 2)) * 1.5, "sigma": sigma, "weights": weights, "means": rng.normal(size=(3, 2)) * 1.5,
                           "std": float(rng.uniform(0.3, 0.8))})  # fmt: skip
        return result

    def drive(fn, case: Case) -> Outputs:
        return arrays(x0=call(fn, T(case["x"]), T(case["sigma"]), T(case["weights"]), T(case["means"]), case["std"]))

    def reference(x: Tensor, sigma: Tensor, weights: Tensor, means: Tensor, std: float) -> Tensor:
        return Mixture.isotropic(means, std, weights).denoiser(x, sigma)

    @mistake("the responsibilities use the component's own variance std^2; x is noisy, so it is std^2 + sigma^2")
    def clean_variance(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        return _mixed(x, means, sigma, std, weights.log() - d2 / (2 * std**2))

    @mistake("the responsibilities use sigma^2 alone; the component's width adds to it: std^2 + sigma^2")
    def noise_variance(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        return _mixed(x, means, sigma, std, weights.log() - d2 / (2 * sigma**2))

    @mistake("the weights of the components are missing from p(k | x): Bayes' rule needs the prior")
    def no_weights(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        return _mixed(x, means, sigma, std, -d2 / (2 * (std**2 + sigma**2)) + 0 * weights)

    @mistake("the factor 1/2 in the exponent of the Gaussian is missing")
    def no_half(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        return _mixed(x, means, sigma, std, weights.log() - d2 / (std**2 + sigma**2))

    @mistake("the softmax runs over the batch; for each x it is the *components* whose probabilities sum to 1")
    def over_batch(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        share = torch.softmax(weights.log() - d2 / (2 * (std**2 + sigma**2)), 0)
        each = (std**2 * x[:, None] + sigma**2 * means) / (std**2 + sigma**2)
        return (share[..., None] * each).sum(1)

    @mistake("only the likeliest component is used; E[x0 | x] averages over all of them (this is what makes it smooth)")
    def hard_choice(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        best = (weights.log() - d2 / (2 * (std**2 + sigma**2))).argmax(-1)
        return (std**2 * x + sigma**2 * means[best]) / (std**2 + sigma**2)

    @mistake("the means are averaged, not each component's estimate: the width std is lost, as if the data were points")
    def only_means(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        share = torch.softmax(weights.log() - d2 / (2 * (std**2 + sigma**2)), -1)
        return share @ means

    @mistake("the components are averaged with the prior weights, whatever x is; Bayes' rule turns them into p(k | x)")
    def prior_only(x, sigma, weights, means, std):
        return _mixed(x, means, sigma, std, weights.log().expand(len(x), -1))

    @mistake("the weights enter the softmax without a logarithm: p(k | x) is a product, so its logarithm is a sum of logarithms")
    def weights_without_log(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        return _mixed(x, means, sigma, std, weights - d2 / (2 * (std**2 + sigma**2)))

    @mistake("p(k | x) is not normalised: divide weights[k] * N(x; means[k], ...) by its sum over k (softmax does both)")
    def not_normalised(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square().sum(-1)
        joint = weights * torch.exp(-d2 / (2 * (std**2 + sigma**2)))
        return (joint[..., None] * (std**2 * x[:, None] + sigma**2 * means) / (std**2 + sigma**2)).sum(1)

    @mistake(
        "each coordinate chooses its components by itself; a point belongs to one component, so sum the squares over d first"
    )
    def each_coordinate(x, sigma, weights, means, std):
        d2 = (x[:, None] - means).square()
        share = torch.softmax(weights.log()[:, None] - d2 / (2 * (std**2 + sigma**2)), 1)
        return (share * (std**2 * x[:, None] + sigma**2 * means) / (std**2 + sigma**2)).sum(1)

    @mistake("the distance is not squared: the exponent of a Gaussian has |x - m|^2")
    def plain_distance(x, sigma, weights, means, std):
        d = (x[:, None] - means).norm(dim=-1)
        return _mixed(x, means, sigma, std, weights.log() - d / (2 * (std**2 + sigma**2)))


def _mixed(x: Tensor, means: Tensor, sigma: Tensor, std: float, log_share: Tensor) -> Tensor:
    """Average each component's estimate with softmax(log_share) over the components."""
    each = (std**2 * x[:, None] + sigma**2 * means) / (std**2 + sigma**2)
    return (torch.softmax(log_share, -1)[..., None] * each).sum(1)


TABLES = {"linear": linear_betas(20), "cosine": cosine_betas(20)}
NETS = {
    "wave": lambda x, t: torch.sin(3 * x + right(t.double(), x) / 5),
    "blend": lambda x, t: 0.4 * x - right(t.double(), x) / 30 + 0.1,
}


@item(
    "01.9", title="The training loss", function="ddpm_loss", points=3, minutes=20, difficulty=2,
    answers=("course_lib.training.denoising_loss", "course_lib.schedules.Schedule.add_noise", "course_lib.denoisers.NetworkDenoiser"),
    hints=(
        "Three lines: make x_t from x0 and eps as in 01.2; ask the network, net(x_t, t); compare its answer with eps.",
        "Algorithm 1 compares with eps, the noise that was added, not with x0.",
        "Return one number per sample: the mean of the squared error over all axes but the first.",
    ),
)  # fmt: skip
class DdpmLoss:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {
                "net": net,
                "betas": betas,
                "x0": pictures(rng, 3),
                "t": rng.integers(1, 20, 3),
                "eps": rng.normal(size=(3, 1, 4, 4)),
            }
            for net in NETS
            for betas in TABLES
        ]

    def drive(fn, case: Case) -> Outputs:
        alpha_bar = torch.cumprod(1 - TABLES[case["betas"]], 0)
        gain = torch.ones((), dtype=torch.float64, requires_grad=True)  # the network's one parameter
        net = NETS[case["net"]]
        loss = call(fn, lambda x, t: gain * net(x, t), T(case["x0"]), T(case["t"]), T(case["eps"]), alpha_bar)
        learns = isinstance(loss, Tensor) and loss.requires_grad
        return arrays(loss=loss, gradient=torch.autograd.grad(loss.sum(), gain)[0] if learns else 0.0)

    def reference(net, x0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
        a = right(alpha_bar[t], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).square().flatten(1).mean(1)

    @mistake("the network's answer is compared with x0; it is to predict the noise eps (Algorithm 1)")
    def compares_x0(net, x0, t, eps, alpha_bar):
        a = right(alpha_bar[t], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - x0).square().flatten(1).mean(1)

    @mistake("the squared error is summed over the pixels; take the mean, or the step size depends on the picture's size")
    def summed(net, x0, t, eps, alpha_bar):
        a = right(alpha_bar[t], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).square().flatten(1).sum(1)

    @mistake("the network sees x0, not x_t: it has nothing to denoise")
    def clean_input(net, x0, t, eps, alpha_bar):
        return (net(x0, t) - eps).square().flatten(1).mean(1)

    @mistake("x_t is made without the square roots of alpha_bar and 1 - alpha_bar")
    def no_roots(net, x0, t, eps, alpha_bar):
        a = right(alpha_bar[t], x0)
        return (net(a * x0 + (1 - a) * eps, t) - eps).square().flatten(1).mean(1)

    @mistake("the error is not squared: this is the mean absolute error")
    def absolute(net, x0, t, eps, alpha_bar):
        a = right(alpha_bar[t], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).abs().flatten(1).mean(1)

    @mistake("the network is not told the time of each sample: pass t, not zeros")
    def no_time(net, x0, t, eps, alpha_bar):
        a = right(alpha_bar[t], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, torch.zeros_like(t)) - eps).square().flatten(1).mean(1)

    @mistake("every sample is noised to the time of the first one; index alpha_bar with the whole of t")
    def first_time(net, x0, t, eps, alpha_bar):
        a = alpha_bar[t[0]]
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).square().flatten(1).mean(1)

    @mistake("the loss is right, but it carries no gradient (detach, no_grad or item): with it no network can learn")
    def detached(net, x0, t, eps, alpha_bar):
        a = right(alpha_bar[t], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).square().flatten(1).mean(1).detach()

    @mistake("alpha_bar is treated as if it were betas; it is the cumulative product of 1 - beta already, so index it with t")
    def product_again(net, x0, t, eps, alpha_bar):
        a = right(torch.cumprod(1 - alpha_bar, 0)[t], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).square().flatten(1).mean(1)

    @mistake("the noise level is one step early: t counts from 0, so sample b has alpha_bar[t[b]]")
    def off_by_one(net, x0, t, eps, alpha_bar):
        a = right(alpha_bar[t - 1], x0)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).square().flatten(1).mean(1)

    @law("the loss must be one number per sample that is never negative")
    def positive(case: Case, out: Outputs) -> bool:
        return bool((out["loss"] >= 0).all())
