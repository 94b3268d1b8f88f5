"""Item 04.4: condition dropout in the training step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import NULL, PICTURE, Labelled, classes, close, one_call
from course_lib.grading.sets.tools import T, right


def _loss(D, x0: Tensor, label: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """Mean over all numbers of the squared error of x0, over sigma^2."""
    s = right(sigma, x0)
    return ((D(x0 + s * eps, sigma, label) - x0) / s).square().mean()


def _case(rng: np.random.Generator, shape: tuple[int, ...], sorted_u: bool) -> Case:
    """A batch of which some labels are dropped and some kept, in any draw."""
    n, p = shape[0], float(rng.uniform(0.25, 0.4))
    dropped = rng.permutation(n) < 2
    u = np.where(dropped, rng.uniform(0, p, n), rng.uniform(p, 1, n))
    return {
        "x0": rng.uniform(-1, 1, shape),
        "label": classes(rng, n),
        "sigma": np.exp(rng.uniform(-1.2, 1.0, n)),
        "eps": rng.normal(size=shape),
        "u": np.sort(u) if sorted_u else u,
        "p": p,
    }


@item(
    "04.4", title="A training step with condition dropout", function="dropout_loss", points=2, minutes=15, difficulty=2,
    answers=("course_lib.training.denoising_loss",),
    hints=(
        "Only the labels are touched: where u < p they become null. x0, sigma and eps of such a sample stay as they are; it is noised like all others.",
        "Then the loss as ever: x = x0 + sigma eps with sigma as (B, 1, ...), one call of D(x, sigma, labels) for the whole batch.",
        "torch.where(u < p, null, label) for the labels; the squared error of D against x0, over sigma^2, and its mean over everything: all samples, dropped or not.",
    ),
)  # fmt: skip
class DropoutLoss:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [_case(rng, (7, *PICTURE[1:]), False), _case(rng, (6, 2), False), _case(rng, (6, 6), True)]

    def drive(fn, case: Case) -> Outputs:
        D, gain = Labelled(), torch.ones((), dtype=torch.float64, requires_grad=True)  # the network's one parameter
        x0, label, sigma, eps, u = (T(case[name]) for name in ("x0", "label", "sigma", "eps", "u"))
        loss = call(fn, lambda x, s, c: gain * D(x, s, c), x0, label, sigma, eps, u, case["p"], NULL)
        loss_array = arrays(loss=loss)
        if isinstance(loss, Tensor) and loss.ndim:
            raise Unacceptable(f"the loss has shape {tuple(loss.shape)}; expected one number, the mean over the batch")
        learns = isinstance(loss, Tensor) and loss.requires_grad
        gradient = torch.autograd.grad(loss, gain, allow_unused=True)[0] if learns else None
        return loss_array | one_call(D) | arrays(gradient=0.0 if gradient is None else gradient)

    def reference(D, x0: Tensor, label: Tensor, sigma: Tensor, eps: Tensor, u: Tensor, p: float, null: int) -> Tensor:
        return _loss(D, x0, label.masked_fill(u < p, null), sigma, eps)

    @mistake("no label is dropped: the network never meets the null class, and its unconditional estimate stays untrained")
    def nothing_dropped(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, label, sigma, eps)

    @mistake("the labels are *kept* with probability p; p is the share that is dropped: where u < p")
    def kept_with_p(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, label.masked_fill(u >= p, null), sigma, eps)

    @mistake("the labels with u above 1 - p are dropped: as many in the mean, but the event asked for is u < p")
    def upper_end(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, label.masked_fill(u > 1 - p, null), sigma, eps)

    @mistake("one draw decides for the whole batch; each sample is dropped or kept by itself, with its own u")
    def whole_batch(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, torch.full_like(label, null) if u[0] < p else label, sigma, eps)

    @mistake("dropped labels become 0, and that is a class of its own; without a condition means the index `null`")
    def class_zero(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, label * (u >= p), sigma, eps)

    @mistake(
        "the *pictures* of the dropped samples are wiped out as well: the null class is to learn all data, not 0; only the label is replaced"
    )
    def pictures_dropped(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0 * right((u >= p).to(x0), x0), label.masked_fill(u < p, null), sigma, eps)

    @mistake(
        "dropped samples get no noise: the network is then asked about clean pictures under the null class; only the label is replaced"
    )
    def noise_dropped(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, label.masked_fill(u < p, null), sigma, eps * right((u >= p).to(x0), x0))

    @mistake("dropped samples become pure noise, as if there were no data without a condition; they are noised like all others")
    def only_noise(D, x0, label, sigma, eps, u, p, null):
        s, keep = right(sigma, x0), right((u >= p).to(x0), x0)
        return ((D(keep * x0 + s * eps, sigma, label.masked_fill(u < p, null)) - x0) / s).square().mean()

    @mistake("dropped samples are left out of the loss; they are what teaches the network its unconditional estimate")
    def left_out_of_the_loss(D, x0, label, sigma, eps, u, p, null):
        s, kept = right(sigma, x0), u >= p
        error = (D(x0 + s * eps, sigma, label.masked_fill(u < p, null)) - x0) / s
        return error[kept].square().mean()

    @mistake(
        "two losses are added, one with all labels and one with none: twice the cost, and no dropout; one call, in which some labels are null"
    )
    def two_losses(D, x0, label, sigma, eps, u, p, null):
        return (1 - p) * _loss(D, x0, label, sigma, eps) + p * _loss(D, x0, torch.full_like(label, null), sigma, eps)

    @mistake(
        "the *answers* are blended, p of the one without and 1 - p of the one with the label; dropout picks one of the two for each sample"
    )
    def answers_blended(D, x0, label, sigma, eps, u, p, null):
        blend = lambda x, s, c: (1 - p) * D(x, s, c) + p * D(x, s, torch.full_like(c, null))
        return _loss(blend, x0, label, sigma, eps)

    @mistake(
        "the network is asked with all labels, and dropped samples are taken out of its *answer*: that is dropout of the output; replace the label before the call"
    )
    def output_dropped(D, x0, label, sigma, eps, u, p, null):
        return _loss(lambda x, s, c: D(x, s, c) * right((u >= p).to(x), x), x0, label, sigma, eps)

    @mistake("the squared error is not divided by sigma^2: strong noise then counts most; the labels are right")
    def not_weighted(D, x0, label, sigma, eps, u, p, null):
        return (D(x0 + right(sigma, x0) * eps, sigma, label.masked_fill(u < p, null)) - x0).square().mean()

    @mistake("the answer is compared with eps; this network is a denoiser, its target is x0; the labels are right")
    def compared_with_noise(D, x0, label, sigma, eps, u, p, null):
        s = right(sigma, x0)
        return ((D(x0 + s * eps, sigma, label.masked_fill(u < p, null)) - eps) / s).square().mean()

    @mistake(
        "the error is summed over the numbers of a sample, and only then averaged over the batch; the mean is over everything"
    )
    def summed_over_a_sample(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, label.masked_fill(u < p, null), sigma, eps) * x0[0].numel()

    @mistake(
        "the loss is right, but cut off from the network (item, detach, no_grad): no gradient comes back, and nothing is learned"
    )
    def detached(D, x0, label, sigma, eps, u, p, null):
        return _loss(D, x0, label.masked_fill(u < p, null), sigma, eps).detach()

    @law("the network must be called once, with all B samples")
    def called_once(case: Case, out: Outputs) -> bool:
        return out["calls"] == 1

    @law("the network is not asked about x0 + sigma eps at sigma; dropout touches the labels alone")
    def noised_as_ever(case: Case, out: Outputs) -> bool:
        s = case["sigma"].reshape(-1, *[1] * (case["x0"].ndim - 1))
        return close(out["net_x"], case["x0"] + s * case["eps"]) and close(out["net_sigma"], case["sigma"])

    @law("a label with u >= p must reach the network as it was")
    def kept(case: Case, out: Outputs) -> bool:
        keep = case["u"] >= case["p"]
        return bool((out["net_label"][keep] == case["label"][keep]).all())

    @law("a label with u < p must reach the network as null")
    def dropped(case: Case, out: Outputs) -> bool:
        return bool((out["net_label"][case["u"] < case["p"]] == NULL).all())

    @law(
        "the network is asked as it should be; the loss is not the mean, over all numbers of all samples, of (D - x0)^2 / sigma^2"
    )
    def mean_of_all(case: Case, out: Outputs) -> bool:
        asked = [T(out[name]) for name in ("net_x", "net_sigma")]
        s = case["sigma"].reshape(-1, *[1] * (case["x0"].ndim - 1))
        error = (Labelled()(*asked, T(out["net_label"]).long()).numpy() - case["x0"]) / s
        return close(out["loss"], (error**2).mean())

    @law("the loss is right, but no gradient, or a wrong one, reaches the network's weights")
    def gradient_arrives(case: Case, out: Outputs) -> bool:
        return out["gradient"] != 0
