"""Guidance by a classifier: Bayes' rule for scores, grad log p(x | c) = grad log p(x) + grad log p(c | x)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.gaussians import Mixture
from course_lib.types import Denoiser, right

Classifier = Callable[[Tensor, Tensor], Tensor]
"""`classifier(x, sigma)`: logits of p(c | x, sigma), (B, classes), of x = x0 + sigma eps, (B, ...)."""


@dataclass(frozen=True)
class NetworkClassifier:
    """A noise-aware network as a Classifier: net(c_in x, c_noise), conditioned as EDM's denoisers are.

    c_in = 1 / sqrt(sigma^2 + sd^2), c_noise = 250 ln sigma (see `denoisers.from_edm`).
    """

    net: nn.Module
    sigma_data: float

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        time = 250 * sigma.clamp_min(1e-10).log()
        return self.net(right(c_in, x) * x, time.to(x.device, x.dtype)).to(x.dtype)


def noise_blind(reader: Callable[[Tensor], Tensor]) -> Classifier:
    """A reader of clean pictures, asked at every noise level without being told it: where noise is seen its gradient is wrong."""
    return lambda x, sigma: reader(x)


def bayes_classifier(parts: Sequence[Mixture], weights: Sequence[float] | Tensor | None = None) -> Classifier:
    """The exact classifier of a mixture of classes: logits log w_c + log p_c(x; sigma), of which the softmax is p(c | x, sigma).

    p_c(x; sigma) = (p_c * N(0, sigma^2 I))(x). `parts` are the classes, `weights` their shares, equal by default.
    """
    shares = torch.ones(len(parts)) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if len(shares) != len(parts) or not bool((shares > 0).all()):
        raise ValueError(f"weights = {shares.tolist()}; expected {len(parts)} positive numbers, one for each of parts")
    return lambda x, sigma: torch.stack([part.log_prob(x, sigma) for part in parts], 1) + shares.log().to(x)


def classifier_guidance(D: Denoiser, classifier: Classifier, label: Tensor | int, w: float) -> Denoiser:
    """Classifier guidance: D_w(x, sigma) = D(x, sigma) + w sigma^2 grad_x log p(label | x, sigma).

    w = 0 gives D; with the exact classifier w = 1 gives E[x0 | x, label]; above it the density is p(x) p(label | x)^w at each
    level (Dhariwal and Nichol 2021, Algorithm 1 and Eq. 14; Song et al. 2021, Eq. 14). `label` is (B,) or one class for all.
    A call of D and a forward and backward pass of the classifier. Raises ValueError for a label that is no class, and
    FloatingPointError where the gradient is not finite.
    """
    if w == 0:
        return D

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        through = _through(x)
        with torch.enable_grad():
            at = x if through else x.detach().requires_grad_()
            slope = _slope(classifier(at, sigma), label, at, sigma, w, through)
        return D(x, sigma) + w * right(_square(sigma), x) * slope

    return guided


def reader_guidance(D: Denoiser, reader: Callable[[Tensor], Tensor], label: Tensor | int, w: float) -> Denoiser:
    """Guidance by a reader of *clean* pictures, as CLIP guides: D_w = D + w sigma^2 grad_x log p(label | D(x, sigma)).

    The gradient goes through the network of D, so the reader sees what it was trained on (Bansal et al. 2023, Eq. 6, forward
    universal guidance). w = 0 gives D. Not exact at any w: log p(c | E[x0 | x]) stands for log E[p(c | x0) | x].
    `reader(x0)` returns logits (B, classes); D's network is called once. Raises as `classifier_guidance`.
    """
    if w == 0:
        return D

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        through = _through(x)
        with torch.enable_grad():
            at = x if through else x.detach().requires_grad_()
            x0 = D(at, sigma)
            slope = _slope(reader(x0), label, at, sigma, w, through)
        return (x0 if through else x0.detach()) + w * right(_square(sigma), x) * slope

    return guided


def _square(sigma: Tensor) -> Tensor:
    return torch.as_tensor(sigma, dtype=torch.float64) ** 2


def _through(x: Tensor) -> bool:
    """Whether the caller differentiates through the guided Denoiser, so that the slope itself needs a graph."""
    return x.requires_grad and torch.is_grad_enabled()


def _slope(logits: Tensor, label: Tensor | int, x: Tensor, sigma: Tensor, w: float, graph: bool) -> Tensor:
    """grad_x log p(label | x), the shape of x; one row's does not depend on the others'."""
    label = torch.as_tensor(label, device=logits.device).expand(len(x))
    classes = logits.shape[1]
    if bool(((label < 0) | (label >= classes)).any()):
        wrong = label[(label < 0) | (label >= classes)][0]
        raise ValueError(f"label = {int(wrong)}; expected a class from 0 to {classes - 1}, of which the classifier knows")
    log_p = torch.log_softmax(logits, 1).gather(1, label[:, None])
    (slope,) = torch.autograd.grad(log_p.sum(), x, create_graph=graph)
    if not bool(torch.isfinite(slope).all()):
        level = float(torch.as_tensor(sigma).max())
        raise FloatingPointError(
            f"the classifier's gradient is not finite at sigma = {level:.6g} with w = {w:g}; expected finite numbers: "
            "lower w, run the classifier in fp32, or start at a noise level on which it was trained"
        )
    return slope
