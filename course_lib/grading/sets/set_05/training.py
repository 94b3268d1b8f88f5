"""Item 05.6: a training step of a model of latents that is told a text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, right

Text = tuple[Tensor, Tensor]
"""Embeddings (B, L, T) of a text's tokens, and the mask (B, L) of those that are there; of the empty text without B."""
SIZE = 3
"""Numbers of a token's embedding."""


class _Net:
    """net(z_t, alpha_bar, text, mask) -> v, of one weight; refuses what a real network would, and keeps what it is asked."""

    def __init__(self) -> None:
        self.gain = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, z: Tensor, alpha_bar: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        shapes = {
            "alpha_bar": (alpha_bar, (len(z),)),
            "text": (text, (len(z), mask.shape[-1], SIZE)),
            "mask": (mask, text.shape[:2]),
        }
        for name, (value, wanted) in shapes.items():
            if tuple(value.shape) != tuple(wanted):
                raise Unacceptable(f"net is told {name} of shape {tuple(value.shape)}; expected {tuple(wanted)}")
        if mask.dtype != torch.bool:
            raise Unacceptable(f"net is told a mask of type {mask.dtype}; expected torch.bool")
        if not bool(mask.any(1).all()):
            raise Unacceptable("net is told a text without a single word; the empty text has words too: its start and its end")
        self.calls.append(tuple(one.detach() for one in (z, alpha_bar, text, mask)))
        places = torch.arange(1.0, 1 + text.shape[1], dtype=text.dtype)
        heard = (torch.tanh(text).sum(-1) * places * mask).sum(1) / mask.sum(1)
        return self.gain * (torch.tanh(z) * right(0.4 + alpha_bar, z) + 0.5 * right(torch.tanh(heard), z))


def _noised(z0: Tensor, alpha_bar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z_t and v."""
    signal, noise = right(alpha_bar.sqrt(), z0), right((1 - alpha_bar).sqrt(), z0)
    return signal * z0 + noise * eps, signal * eps - noise * z0


def _told(words: Text, empty: Text, dropped: Tensor) -> Text:
    """The empty text in the rows of `dropped`."""
    return torch.where(dropped[:, None, None], empty[0], words[0]), torch.where(dropped[:, None], empty[1], words[1])


def _loss(net, z0: Tensor, told: Text, alpha_bar: Tensor, eps: Tensor) -> Tensor:
    z_t, v = _noised(z0, alpha_bar, eps)
    return (net(z_t, alpha_bar, *told) - v).square().mean()


@item(
    "05.6", title="A training step of a text-to-latent model", function="text_loss", points=3, minutes=35, difficulty=3,
    answers=("course_lib.training.denoising_loss",),
    hints=(
        "Three steps: the latent z0 = scale (mean + std eps_z); its noisy z_t and the target v; what the network is told of the text.",
        "Where u < p, *both* embeddings and mask are those of the empty text: torch.where(drop[:, None, None], empty[0], words[0]), and likewise the masks with drop[:, None].",
        "a = alpha_bar as (B, 1, 1, 1): z_t = sqrt(a) z0 + sqrt(1 - a) eps, v = sqrt(a) eps - sqrt(1 - a) z0. One call net(z_t, alpha_bar, text, mask), and the mean of (net - v)^2.",
    ),
)  # fmt: skip
class TextLoss:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(B: int, shape: tuple[int, ...], L: int, first: bool) -> Case:
            p = float(rng.uniform(0.25, 0.4))
            dropped = np.roll(np.arange(B) < 2, 0 if first else 1)  # the first row in one case, another in the other
            draws = {name: rng.normal(size=(B, *shape)) for name in ("mean", "eps_z", "eps")}
            return draws | {
                "std": rng.uniform(0.3, 0.9, (B, *shape)),
                "scale": float(rng.uniform(0.3, 0.6)),
                "text": rng.normal(size=(B, L, SIZE)),
                "mask": np.arange(L) < rng.integers(3, L + 1, B)[:, None],
                "empty": rng.normal(size=(L, SIZE)),
                "empty_mask": np.arange(L) < 2,
                "alpha_bar": rng.uniform(0.2, 0.9, B),
                "u": np.where(dropped, rng.uniform(0, p, B), rng.uniform(p, 1, B)),
                "p": p,
            }

        return [case(5, (2, 2, 3), 5, True), case(6, (3, 2, 2), 4, False)]

    def drive(fn, case: Case) -> Outputs:
        net, of = _Net(), {name: T(value) for name, value in case.items() if isinstance(value, np.ndarray)}
        words, empty = (of["text"], of["mask"]), (of["empty"], of["empty_mask"])
        latent = of["mean"], of["std"], case["scale"]
        loss = call(fn, net, *latent, words, empty, of["alpha_bar"], of["u"], case["p"], of["eps_z"], of["eps"])
        out = arrays(loss=loss)
        if isinstance(loss, Tensor) and loss.ndim:
            raise Unacceptable(f"the loss has shape {tuple(loss.shape)}; expected one number, the mean over the batch")
        if not net.calls:
            raise Unacceptable("the network was never called")
        learns = isinstance(loss, Tensor) and loss.requires_grad
        gradient = torch.autograd.grad(loss, net.gain, allow_unused=True)[0] if learns else None
        z, alpha_bar, text, mask = (torch.cat(parts) for parts in zip(*net.calls, strict=True))
        out |= arrays(gradient=0.0 if gradient is None else gradient, calls=len(net.calls))
        return out | arrays(net_z=z, net_alpha_bar=alpha_bar, net_text=text * mask[..., None], net_mask=mask.double())

    def reference(
        net, mean: Tensor, std: Tensor, scale: float, words: Text, empty: Text, alpha_bar: Tensor, u: Tensor, p: float,
        eps_z: Tensor, eps: Tensor,
    ) -> Tensor:  # fmt: skip
        return _loss(net, scale * (mean + std * eps_z), _told(words, empty, u < p), alpha_bar, eps)

    @mistake("no text is dropped: the network never hears the empty text, and guidance has nothing to lead away from")
    def nothing_dropped(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * (mean + std * eps_z), words, alpha_bar, eps)

    @mistake("the texts are *kept* with probability p; p is the share that is dropped: where u < p")
    def kept_with_p(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * (mean + std * eps_z), _told(words, empty, u >= p), alpha_bar, eps)

    @mistake("one draw decides for the whole batch; each row is dropped or kept by itself, with its own u")
    def whole_batch(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * (mean + std * eps_z), _told(words, empty, (u[0] < p).expand(len(u))), alpha_bar, eps)

    @mistake(
        "dropped texts become zeros: the network is never told that when it samples; use the empty text's own embeddings, `empty`"
    )
    def zeros(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        told = _told(words, (torch.zeros_like(empty[0]), empty[1]), u < p)
        return _loss(net, scale * (mean + std * eps_z), told, alpha_bar, eps)

    @mistake(
        "the embeddings are replaced, and the mask is still that of the dropped text: the network reads padding of the empty one as words"
    )
    def mask_not_replaced(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * (mean + std * eps_z), (_told(words, empty, u < p)[0], words[1]), alpha_bar, eps)

    @mistake("the mask is replaced, and the embeddings are still those of the dropped text: its first words are heard")
    def only_mask_replaced(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * (mean + std * eps_z), (words[0], _told(words, empty, u < p)[1]), alpha_bar, eps)

    @mistake("the latents are not scaled: noise levels mean nothing unless they have variance 1; z0 = scale (mean + std eps_z)")
    def not_scaled(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, mean + std * eps_z, _told(words, empty, u < p), alpha_bar, eps)

    @mistake("the latents are divided by scale; it multiplies on the way into the model")
    def divided_by_scale(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, (mean + std * eps_z) / scale, _told(words, empty, u < p), alpha_bar, eps)

    @mistake("only the mean is scaled: the deviation of the posterior is in units of the latents too, scale (mean + std eps_z)")
    def only_mean_scaled(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * mean + std * eps_z, _told(words, empty, u < p), alpha_bar, eps)

    @mistake("the latent is the posterior's mean; it is to be drawn, mean + std eps_z")
    def posterior_not_sampled(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * mean, _told(words, empty, u < p), alpha_bar, eps)

    @mistake("one noise serves twice, in the posterior and in z_t: they are independent, eps_z and eps")
    def one_noise(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * (mean + std * eps), _told(words, empty, u < p), alpha_bar, eps)

    @mistake("the answer is compared with eps; this network predicts v = sqrt(a) eps - sqrt(1 - a) z0")
    def compared_with_noise(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        z_t, _ = _noised(scale * (mean + std * eps_z), alpha_bar, eps)
        return (net(z_t, alpha_bar, *_told(words, empty, u < p)) - eps).square().mean()

    @mistake("the sign of v is turned: v = sqrt(a) eps - sqrt(1 - a) z0, the noise is positive")
    def v_turned(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        z_t, v = _noised(scale * (mean + std * eps_z), alpha_bar, eps)
        return (net(z_t, alpha_bar, *_told(words, empty, u < p)) + v).square().mean()

    @mistake("dropped rows are left out of the loss; they are what teaches the network the empty text")
    def left_out_of_the_loss(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        z_t, v = _noised(scale * (mean + std * eps_z), alpha_bar, eps)
        return (net(z_t, alpha_bar, *_told(words, empty, u < p)) - v)[u >= p].square().mean()

    @mistake(
        "the loss is right, but cut off from the network (item, detach, no_grad): no gradient comes back, and nothing is learned"
    )
    def detached(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        return _loss(net, scale * (mean + std * eps_z), _told(words, empty, u < p), alpha_bar, eps).detach()

    @law("the network must be called once, with all B rows")
    def called_once(case: Case, out: Outputs) -> bool:
        return out["calls"] == 1

    @law("the network is not asked about z_t = sqrt(a) z0 + sqrt(1 - a) eps at a = alpha_bar, with z0 = scale (mean + std eps_z)")
    def asked_about_noisy_latents(case: Case, out: Outputs) -> bool:
        z_t, _ = _noised(_latent(case), T(case["alpha_bar"]), T(case["eps"]))
        return close(out["net_z"], z_t) and close(out["net_alpha_bar"], case["alpha_bar"])

    @law("a text with u >= p must reach the network as it was, with its mask")
    def kept(case: Case, out: Outputs) -> bool:
        keep = case["u"] >= case["p"]
        words = case["text"] * case["mask"][..., None]
        return close(out["net_text"][keep], words[keep]) and close(out["net_mask"][keep], case["mask"][keep])

    @law("in place of a text with u < p the network must be told the empty text, with the empty text's mask")
    def dropped(case: Case, out: Outputs) -> bool:
        drop = case["u"] < case["p"]
        words = case["empty"] * case["empty_mask"][:, None]
        return close(out["net_text"][drop] - words, 0) and close(out["net_mask"][drop] - case["empty_mask"], 0)

    @law("the network is asked as it should be; the loss is not the mean, over all numbers of all rows, of (net - v)^2")
    def mean_of_all(case: Case, out: Outputs) -> bool:
        z, alpha_bar, text, mask = (T(out[f"net_{name}"]) for name in ("z", "alpha_bar", "text", "mask"))
        said = _Net()(z, alpha_bar, text, mask.bool()).detach()
        return close(out["loss"], (said - _noised(_latent(case), alpha_bar, T(case["eps"]))[1]).square().mean())

    @law("the loss is right, but no gradient, or a wrong one, reaches the network's weights")
    def gradient_arrives(case: Case, out: Outputs) -> bool:
        return out["gradient"] != 0


def _latent(case: Case) -> Tensor:
    return T(case["scale"] * (case["mean"] + case["std"] * case["eps_z"]))
