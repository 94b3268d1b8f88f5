"""Item 13.10: a start of the sampler that knows the segmentation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close, level
from course_lib.grading.sets.tools import T, named

PARTS = ("mean", "std", "start")


def _pixels(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N h w, C)."""
    return latents.movedim(1, -1).flatten(0, -2)


def _moments(pixels: Tensor, labels: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each class, (K, C); of all pixels where a class has none."""
    mean = pixels.mean(0)
    means, stds = mean.repeat(K, 1), (pixels - mean).square().mean(0).sqrt().repeat(K, 1)
    for k in range(K):
        if len(own := pixels[labels.flatten() == k]):
            means[k] = own.mean(0)
            stds[k] = (own - means[k]).square().mean(0).sqrt()
    return means, stds


def _placed(values: Tensor, wanted: Tensor) -> Tensor:
    """What belongs to each pixel's class, (K, C) and (B, h, w) -> (B, C, h, w)."""
    return values[wanted].movedim(-1, 1)


def _start(mean: Tensor, std: Tensor, wanted: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    return _placed(mean, wanted) + (_placed(std, wanted) ** 2 + sigma**2).sqrt() * eps


@item(
    "13.10", title="A start that knows the segmentation", function="class_prior", points=2, minutes=25, difficulty=3,
    answers=("course_lib.noise_priors.categorical", "course_lib.noise_priors.joint", "course_lib.noise_priors.NoisePrior.start"),
    hints=(
        "pixels = latents.movedim(1, -1).flatten(0, -2) is (N h w, C), and labels.flatten() their classes in the same order. mean[k] = pixels[own].mean(0), and std[k] likewise, with correction=0.",
        "A class that has no pixel (own.any() is False) takes mean and deviation of all pixels. Each channel has its own.",
        "mean[wanted] is (B, h, w, C): .movedim(-1, 1) puts the channels right. x = x0 + sigma eps has the *variance* std² + sigma², so start = mean + sqrt(std² + sigma²) * eps.",
    ),
)  # fmt: skip
class ClassPrior:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(N: int, C: int, side: int, K: int) -> Case:
            labels = rng.integers(0, K - 1, (N, side, side))  # the last class has no pixel
            labels[0] = labels[0, 0, 0]  # not as often in each picture
            centres, spreads = rng.normal(size=(K, C)), rng.uniform(0.3, 1.0, (K, C))
            latents = centres[labels] + spreads[labels] * rng.normal(size=(*labels.shape, C))
            return {
                "latents": np.moveaxis(latents, -1, 1).copy(),
                "labels": labels,
                "K": K,
                "wanted": rng.permutation(np.arange(2 * side * side) % K).reshape(2, side, side),
                "sigma": float(rng.uniform(0.7, 1.5)),
                "eps": rng.normal(size=(2, C, side, side)),
            }

        return [case(4, 3, 3, 4), case(5, 2, 4, 3)]

    def drive(fn, case: Case) -> Outputs:
        latents, labels, wanted, eps = (T(case[name]) for name in ("latents", "labels", "wanted", "eps"))
        sigma = level(case["sigma"])
        return arrays(**named(call(fn, latents, labels, case["K"], wanted, sigma, eps), *PARTS))

    def reference(
        latents: Tensor, labels: Tensor, K: int, wanted: Tensor, sigma: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake(
        "latents.reshape(-1, C) does not bring the channels to the end: each row is then made of several pixels of one channel; .movedim(1, -1) first"
    )
    def reshaped_latents(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(latents.reshape(-1, latents.shape[1]), labels, K)
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake("mean[wanted] is (B, h, w, C), and a reshape to (B, C, h, w) mixes pixels and channels; .movedim(-1, 1)")
    def reshaped_start(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        m, s = (values[wanted].reshape(eps.shape) for values in (mean, std))
        return mean, std, m + (s**2 + sigma**2).sqrt() * eps

    @mistake("deviations are added, std + sigma: of independent noises the *variances* add, sqrt(std² + sigma²)")
    def deviations_added(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std, _placed(mean, wanted) + (_placed(std, wanted) + sigma) * eps

    @mistake(
        "the start has the noise sigma alone about the mean, as if all pixels of a class were equal; their spread belongs to it"
    )
    def spread_forgotten(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std, _placed(mean, wanted) + sigma * eps

    @mistake("the start has the spread of the class alone: this is a draw of x0, and the sampler begins at x = x0 + sigma eps")
    def noise_forgotten(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std, _placed(mean, wanted) + _placed(std, wanted) * eps

    @mistake("the start has the right spread about 0: the mean of the class is what it should know")
    def mean_forgotten(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std, (_placed(std, wanted) ** 2 + sigma**2).sqrt() * eps

    @mistake("this is the usual start, sigma eps: it knows nothing of the segmentation")
    def usual_start(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std, sigma * eps

    @mistake("the start is DDPM's, divided by sqrt(1 + sigma²); here x = x0 + sigma eps, and the picture keeps its size")
    def variance_preserving(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std, _start(mean, std, wanted, sigma, eps) / (1 + sigma**2).sqrt()

    @mistake("std is the variance: take its root")
    def variance_for_deviation(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        return mean, std**2, _start(mean, std**2, wanted, sigma, eps)

    @mistake("the deviation is about 0, the root of the mean square: subtract the mean of the class first")
    def about_zero(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        std = (std**2 + mean**2).sqrt()
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake("the deviation is about the mean of *all* pixels; each class has its own")
    def about_the_common_mean(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        std = (std**2 + (mean - _pixels(latents).mean(0)) ** 2).sqrt()
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake("the deviation is divided by n - 1, as .std() does by default; here by n, correction=0")
    def unbiased(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        n = torch.bincount(labels.flatten(), minlength=K)
        n = torch.where(n > 0, n, labels.numel()).double()[:, None]
        std = std * (n / (n - 1)).sqrt()
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake(
        "a class without a pixel has mean and deviation 0 (or NaN that was made 0): where nothing is known, take those of all pixels"
    )
    def absent_is_zero(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        there = (torch.bincount(labels.flatten(), minlength=K) > 0)[:, None]
        return mean * there, std * there, _start(mean * there, std * there, wanted, sigma, eps)

    @mistake("a class without a pixel has mean 0 and deviation 1, as if latents were standard; take those of all pixels")
    def absent_is_standard(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        there = (torch.bincount(labels.flatten(), minlength=K) > 0)[:, None]
        mean, std = mean * there, torch.where(there, std, 1.0)
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake("all channels share one mean and one deviation; each channel has its own")
    def channels_pooled(latents, labels, K, wanted, sigma, eps):
        C = latents.shape[1]
        mean, std = _moments(_pixels(latents).reshape(-1, 1), labels.flatten().repeat_interleave(C), K)
        mean, std = mean.expand(K, C), std.expand(K, C)
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake(
        "the means of the pictures are averaged: a picture with few pixels of a class then counts as much as one with many; put all pixels of a class together"
    )
    def mean_of_means(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), labels, K)
        for k in range(K):
            each = [one[:, own == k].mean(1) for one, own in zip(latents, labels, strict=True) if (own == k).any()]
            if each:
                mean[k] = torch.stack(each).mean(0)
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @mistake("the classes are not used: all have mean and deviation of all pixels")
    def one_class(latents, labels, K, wanted, sigma, eps):
        mean, std = _moments(_pixels(latents), 0 * labels, 1)
        mean, std = mean.repeat(K, 1), std.repeat(K, 1)
        return mean, std, _start(mean, std, wanted, sigma, eps)

    @law("the means of the classes, each as often as it has pixels, must have the mean of all pixels")
    def means_add_up(case: Case, out: Outputs) -> bool:
        share = np.bincount(case["labels"].ravel(), minlength=case["K"]) / case["labels"].size
        return close(share @ out["mean"], case["latents"].mean((0, 2, 3)))

    @law("the variance of all pixels is that within the classes plus that of their means: std does not fit")
    def variances_add_up(case: Case, out: Outputs) -> bool:
        share = np.bincount(case["labels"].ravel(), minlength=case["K"]) / case["labels"].size
        total = share @ (out["std"] ** 2 + (out["mean"] - case["latents"].mean((0, 2, 3))) ** 2)
        return close(total, case["latents"].var((0, 2, 3)))

    @law("a class that has no pixel must have mean and deviation of all pixels")
    def absent(case: Case, out: Outputs) -> bool:
        all_ = case["latents"].mean((0, 2, 3)), case["latents"].std((0, 2, 3))
        return close(out["mean"][-1], all_[0]) and close(out["std"][-1], all_[1])

    @law("mean and std are right; the start is not mean + sqrt(std² + sigma²) eps of each pixel's class")
    def start_fits(case: Case, out: Outputs) -> bool:
        mean, std = T(out["mean"]), T(out["std"])
        return close(out["start"], _start(mean, std, T(case["wanted"]), level(case["sigma"]), T(case["eps"])).numpy())
