"""Items 02.8 to 02.10: precision and recall, bits per dimension, a term of the variational bound."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.tools import T, named, pictures
from course_lib.metrics import precision_recall as library_precision_recall


def _share(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Share of `points` within a ball around one of `centres` or more."""
    return (torch.cdist(points, centres) <= radii).any(1).double().mean()


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour among the others."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values


@item(
    "02.8", title="Precision and recall", function="precision_recall", points=2, minutes=20, difficulty=2,
    answers=("course_lib.metrics.precision_recall",),
    hints=(
        "One helper does both: the share of the points of one set that lie in a ball around some point of the other.",
        "torch.cdist gives all distances. The radius of a point is the distance to its k-th nearest *other* point: among the distances to all, itself included, the (k + 1)-th smallest (kthvalue).",
        "Precision: fake points, balls around real ones, radii within the real set. Recall: the same with real and fake exchanged.",
        "inside = (torch.cdist(points, centres) <= radii).any(1), where radii is (len(centres),).",
    ),
)  # fmt: skip
class PrecisionRecall:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for k in (2, 3, 4):
            real = rng.normal(size=(60, 2))
            result.append({"real": real, "fake": rng.normal(size=(45, 2)) * np.array([1.5, 0.6]) + 0.5, "k": k})
        return [*result, {"real": real, "fake": real[:25] + 0.0, "k": 3}, {"real": real, "fake": real[:25] + 100, "k": 3}]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, T(case["real"]), T(case["fake"]), case["k"]), "precision", "recall"))

    def reference(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
        return library_precision_recall(real, fake, k)

    @mistake("the pair is turned round: precision asks how many *fake* points are good, recall how many real ones are reached")
    def pair_turned(real, fake, k):
        return _share(real, fake, _radii(fake, k)), _share(fake, real, _radii(real, k))

    @mistake(
        "each point counts as its own first neighbour, so that the balls reach to the (k - 1)-th only; skip the distance 0 to itself"
    )
    def itself_counted(real, fake, k):
        return _share(fake, real, _radii(real, k - 1)), _share(real, fake, _radii(fake, k - 1))

    @mistake(
        "the balls reach to the neighbour after the k-th: kthvalue counts from 1, and the point itself is the first, so it is k + 1"
    )
    def one_too_far(real, fake, k):
        return _share(fake, real, _radii(real, k + 1)), _share(real, fake, _radii(fake, k + 1))

    @mistake(
        "the balls stand round the points that are judged: a far-off sample would carry a large ball with it and always hit something"
    )
    def balls_of_the_judged(real, fake, k):
        inside = torch.cdist(fake, real) <= _radii(fake, k)[:, None]
        reached = torch.cdist(real, fake) <= _radii(real, k)[:, None]
        return inside.any(1).double().mean(), reached.any(1).double().mean()

    @mistake("one radius serves all points, the mean one; each point has its own, so that thin regions get large balls")
    def one_radius(real, fake, k):
        return _share(fake, real, _radii(real, k).mean()), _share(real, fake, _radii(fake, k).mean())

    @mistake("one radius serves all points, the largest one: a single far-off point then opens the whole plane; each has its own")
    def largest_radius(real, fake, k):
        return _share(fake, real, _radii(real, k).max()), _share(real, fake, _radii(fake, k).max())

    @mistake(
        "only the ball of the nearest point is tried; a point farther away may have a larger ball that holds it: use any() over all"
    )
    def nearest_only(real, fake, k):
        def share(points, centres):
            distance, index = torch.cdist(points, centres).min(1)
            return (distance <= _radii(centres, k)[index]).double().mean()

        return share(fake, real), share(real, fake)

    @mistake(
        "this counts the *balls* that hold a point of the other set; precision and recall count points: any() goes over the centres"
    )
    def counts_balls(real, fake, k):
        inside = torch.cdist(fake, real) <= _radii(real, k)
        reached = torch.cdist(real, fake) <= _radii(fake, k)
        return inside.any(0).double().mean(), reached.any(0).double().mean()

    @mistake(
        "recall uses the radii of the real set again; its balls stand round the *fake* points and reach to their k-th fake neighbour"
    )
    def real_balls_twice(real, fake, k):
        inside = torch.cdist(fake, real) <= _radii(real, k)
        return inside.any(1).double().mean(), inside.any(0).double().mean()

    @mistake(
        "this is the mean over all pairs; one ball is enough for a point to be inside: any(), and then the mean over the points"
    )
    def over_all_pairs(real, fake, k):
        inside = torch.cdist(fake, real) <= _radii(real, k)
        reached = torch.cdist(real, fake) <= _radii(fake, k)
        return inside.double().mean(), reached.double().mean()

    @mistake("the distances are sums of absolute differences (p = 1); the balls are round: Euclidean distance")
    def city_blocks(real, fake, k):
        def share(points, centres):
            radii = torch.cdist(centres, centres, p=1).kthvalue(k + 1, dim=1).values
            return (torch.cdist(points, centres, p=1) <= radii).any(1).double().mean()

        return share(fake, real), share(real, fake)

    @law("precision and recall are shares: both lie in [0, 1]")
    def shares(case: Case, out: Outputs) -> bool:
        return all(0 <= float(out[name]) <= 1 for name in ("precision", "recall"))

    @law("every fake point that is a copy of a real one lies in its ball: precision must be 1 there")
    def copies(case: Case, out: Outputs) -> bool:
        copied = (case["fake"][:, None] == case["real"]).all(-1).any(1).all()
        return not copied or bool(np.isclose(out["precision"], 1))

    @law(
        "two sets that lie far apart have no point in common: both must be 0 there. The radius of a ball is measured in its own set"
    )
    def far_apart(case: Case, out: Outputs) -> bool:
        far = (case["fake"].min(0) > case["real"].max(0) + 50).any()
        return not far or (float(out["precision"]) == 0 and float(out["recall"]) == 0)

    @law("a share of points is a whole number over their number: len(fake) in precision, len(real) in recall")
    def whole_numbers(case: Case, out: Outputs) -> bool:
        counts = out["precision"] * len(case["fake"]), out["recall"] * len(case["real"])
        return all(abs(float(count) - round(float(count))) < 1e-3 for count in counts)


def _squared(x: Tensor, mean: Tensor) -> Tensor:
    return (x - mean).square().flatten(1)


@item(
    "02.9", title="Bits per dimension of a Gaussian", function="bits_per_dim", points=1, minutes=10, difficulty=2,
    answers=("course_lib.gaussians.Mixture",),
    hints=(
        "log N(x; m, s^2 I) is a sum over the d numbers of x: -(x - m)^2 / (2 s^2) - log(s) - log(2 pi) / 2 each.",
        "Sum over all axes but the first: one number for each sample.",
        "Nats become bits when divided by log 2. Then divide by d and turn the sign.",
    ),
)  # fmt: skip
class BitsPerDim:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {"x": pictures(rng), "mean": rng.uniform(-0.5, 0.5, (1, 4, 4)), "std": std}
            for std in rng.uniform(0.2, 0.8, 3).tolist()
        ]

    def drive(fn, case: Case) -> Outputs:
        return arrays(bits=call(fn, T(case["x"]), T(case["mean"]), T(case["std"])))

    def reference(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (_squared(x, mean) / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2).mean(1) / math.log(2)

    @mistake("this is in nats: divide by log 2")
    def nats(x, mean, std):
        return (_squared(x, mean) / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2).mean(1)

    @mistake("the nats are multiplied by log 2; one bit is log 2 = 0.69 nats, so divide")
    def multiplied(x, mean, std):
        return (_squared(x, mean) / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2).mean(1) * math.log(2)

    @mistake("these are the bits of the whole sample; divide by d, the numbers in one sample")
    def whole_sample(x, mean, std):
        return (_squared(x, mean) / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2).sum(1) / math.log(2)

    @mistake("the sum is divided by the numbers in the whole batch; d counts those of one sample")
    def by_the_batch(x, mean, std):
        return (_squared(x, mean) / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2).sum(1) / (x.numel() * math.log(2))

    @mistake("the sign is turned: a likely sample needs few bits")
    def sign_turned(x, mean, std):
        return -(_squared(x, mean) / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2).mean(1) / math.log(2)

    @mistake("the constant log(2 pi) / 2 is missing; it plays no part in training, but a likelihood has it")
    def no_constant(x, mean, std):
        return (_squared(x, mean) / (2 * std**2) + std.log()).mean(1) / math.log(2)

    @mistake("the normaliser's log(std) is missing: a wider Gaussian is lower everywhere")
    def no_log_std(x, mean, std):
        return (_squared(x, mean) / (2 * std**2) + math.log(2 * math.pi) / 2).mean(1) / math.log(2)

    @mistake("the normaliser is subtracted once for a whole sample; a Gaussian in d dimensions has it d times")
    def normalised_once(x, mean, std):
        total = (_squared(x, mean) / (2 * std**2)).sum(1) + std.log() + math.log(2 * math.pi) / 2
        return total / (x[0].numel() * math.log(2))

    @mistake("the factor 1/2 in the exponent is missing")
    def no_half(x, mean, std):
        return (_squared(x, mean) / std**2 + std.log() + math.log(2 * math.pi) / 2).mean(1) / math.log(2)

    @mistake("std is used as if it were the variance: square it in the exponent, and its logarithm counts whole")
    def std_as_variance(x, mean, std):
        return (_squared(x, mean) / (2 * std) + std.log() / 2 + math.log(2 * math.pi) / 2).mean(1) / math.log(2)

    @mistake("only the squared error is turned into bits; the normaliser is in nats still: divide the whole sum by log 2")
    def half_in_bits(x, mean, std):
        return (_squared(x, mean) / (2 * std**2) / math.log(2) + std.log() + math.log(2 * math.pi) / 2).mean(1)

    @mistake("the mean is left out: the distance is that from 0")
    def from_zero(x, mean, std):
        return (_squared(x, 0 * mean) / (2 * std**2) + std.log() + math.log(2 * math.pi) / 2).mean(1) / math.log(2)

    @law("two samples must differ by the difference of their squared distances from the mean, over 2 std^2 d log 2")
    def differences(case: Case, out: Outputs) -> bool:
        distance = ((case["x"] - case["mean"]) ** 2).mean((1, 2, 3)) / (2 * case["std"] ** 2 * math.log(2))
        return bool(np.allclose(out["bits"] - out["bits"][0], distance - distance[0]))

    @law("the samples differ as they should, but the part that all share is not log2(2 pi std^2) / 2")
    def shared_part(case: Case, out: Outputs) -> bool:
        distance = ((case["x"] - case["mean"]) ** 2).mean((1, 2, 3)) / (2 * case["std"] ** 2 * math.log(2))
        return bool(np.allclose(out["bits"] - distance, math.log2(2 * math.pi * case["std"] ** 2) / 2))


def _to_bits(x: Tensor) -> float:
    return 1 / (x[0].numel() * math.log(2))


@item(
    "02.10", title="One term of the bound", function="bound_term", points=1, minutes=10, difficulty=2,
    answers=("course_lib.likelihood.Bound",),
    hints=(
        "The factor is half of what the signal-to-noise ratio gains in the step, and SNR = 1 / sigma^2.",
        "sigma_next is the smaller of the two, so 1 / sigma_next^2 - 1 / sigma^2 is positive.",
        "|x0 - x0_hat|^2 is a sum over all axes but the first; divide by d log 2 at the end.",
    ),
)  # fmt: skip
class BoundTerm:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for _ in range(3):
            sigma = float(rng.uniform(0.8, 3))
            result.append(
                {"x0": pictures(rng), "x0_hat": pictures(rng), "sigma": sigma, "sigma_next": sigma * float(rng.uniform(0.4, 0.8))}
            )
        return result

    def drive(fn, case: Case) -> Outputs:
        return arrays(bits=call(fn, T(case["x0"]), T(case["x0_hat"]), T(case["sigma"]), T(case["sigma_next"])))

    def reference(x0: Tensor, x0_hat: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return (sigma_next**-2 - sigma**-2) / 2 * _squared(x0, x0_hat).sum(1) * _to_bits(x0)

    @mistake(
        "the levels have changed places and the term is negative; a step goes *down* to sigma_next, where the signal-to-noise ratio is larger"
    )
    def levels_turned(x0, x0_hat, sigma, sigma_next):
        return (sigma**-2 - sigma_next**-2) / 2 * _squared(x0, x0_hat).sum(1) * _to_bits(x0)

    @mistake("the factor 1/2 is missing")
    def no_half(x0, x0_hat, sigma, sigma_next):
        return (sigma_next**-2 - sigma**-2) * _squared(x0, x0_hat).sum(1) * _to_bits(x0)

    @mistake("the ratios are 1 / sigma; the signal-to-noise ratio is one of variances, 1 / sigma^2")
    def not_squared(x0, x0_hat, sigma, sigma_next):
        return (1 / sigma_next - 1 / sigma) / 2 * _squared(x0, x0_hat).sum(1) * _to_bits(x0)

    @mistake("this is the gain in *log* SNR; the bound has the gain in SNR itself")
    def log_ratio(x0, x0_hat, sigma, sigma_next):
        return (sigma / sigma_next).log() * _squared(x0, x0_hat).sum(1) * _to_bits(x0)

    @mistake("the factor is the difference of the noise's variances; it is that of their inverses, the signal-to-noise ratios")
    def variances(x0, x0_hat, sigma, sigma_next):
        return (sigma**2 - sigma_next**2) / 2 * _squared(x0, x0_hat).sum(1) * _to_bits(x0)

    @mistake(
        "this weighs with 1 / sigma^2, as the simple loss does, whatever the length of the step; the bound weighs with the difference of the two levels"
    )
    def simple_weight(x0, x0_hat, sigma, sigma_next):
        return sigma**-2 / 2 * _squared(x0, x0_hat).sum(1) * _to_bits(x0) + 0 * sigma_next

    @mistake("this takes the ratio 1 / sigma_next^2 whole, what all steps so far gained; one step gains the difference")
    def all_so_far(x0, x0_hat, sigma, sigma_next):
        return sigma_next**-2 / 2 * _squared(x0, x0_hat).sum(1) * _to_bits(x0) + 0 * sigma

    @mistake("this is in nats: divide by log 2")
    def nats(x0, x0_hat, sigma, sigma_next):
        return (sigma_next**-2 - sigma**-2) / 2 * _squared(x0, x0_hat).mean(1)

    @mistake("the nats are multiplied by log 2; one bit is log 2 = 0.69 nats, so divide")
    def multiplied(x0, x0_hat, sigma, sigma_next):
        return (sigma_next**-2 - sigma**-2) / 2 * _squared(x0, x0_hat).mean(1) * math.log(2)

    @mistake("the sum is divided by the numbers in the whole batch; d counts those of one sample")
    def by_the_batch(x0, x0_hat, sigma, sigma_next):
        return (sigma_next**-2 - sigma**-2) / 2 * _squared(x0, x0_hat).sum(1) / (x0.numel() * math.log(2))

    @mistake("these are the bits of the whole sample; divide by d, the numbers in one sample")
    def whole_sample(x0, x0_hat, sigma, sigma_next):
        return (sigma_next**-2 - sigma**-2) / 2 * _squared(x0, x0_hat).sum(1) / math.log(2)

    @mistake("the distance is not squared")
    def plain_distance(x0, x0_hat, sigma, sigma_next):
        return (sigma_next**-2 - sigma**-2) / 2 * _squared(x0, x0_hat).sum(1).sqrt() * _to_bits(x0)

    @law("a term of the bound is a divergence, and never negative")
    def positive(case: Case, out: Outputs) -> bool:
        return bool((out["bits"] >= 0).all())

    @law("samples must differ in proportion to |x0 - x0_hat|^2, summed over all axes but the first")
    def proportional(case: Case, out: Outputs) -> bool:
        distance = ((case["x0"] - case["x0_hat"]) ** 2).sum((1, 2, 3))
        return bool(np.allclose(out["bits"] / out["bits"].sum(), distance / distance.sum()))

    @law("the factor of |x0 - x0_hat|^2 / (d log 2) is not half of what the signal-to-noise ratio gains in the step")
    def half_the_gain(case: Case, out: Outputs) -> bool:
        distance = ((case["x0"] - case["x0_hat"]) ** 2).mean((1, 2, 3)) / math.log(2)
        return bool(np.allclose(out["bits"] / distance, (case["sigma_next"] ** -2 - case["sigma"] ** -2) / 2))
