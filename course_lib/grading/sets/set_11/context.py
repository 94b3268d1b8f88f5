"""Item 11.6: what a video model is told of the frames that are known, and the loss over the others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_08.common import one_number
from course_lib.grading.sets.set_11.common import clip_like, some_known, waves
from course_lib.grading.sets.tools import T, named, right


class Net:
    """net(x, sigma, context) -> (B, T, C, H, W), what it takes for the noise; refuses what a real network would refuse."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        B, frames, C, H, W = x.shape
        clip_like("net", "sigma", sigma, (B,))
        clip_like("net", "context", context, (B, frames, C + 1, H, W))
        self.calls += 1
        told = torch.einsum("oc,btchw->btohw", waves(C + 1, 2)[:C], context)
        mixed = torch.einsum("ts,bschw->btchw", waves(frames), x + told)
        return torch.tanh(mixed + 0.3 * right(sigma, x))


def _seen(known: Tensor, like: Tensor) -> Tensor:
    """(B, T) -> (B, T, 1, 1, 1), 1 where a frame is known, of the type of `like`."""
    return known.to(like)[:, :, None, None, None]


def _context(m: Tensor, z: Tensor, said: Tensor | None = None) -> Tensor:
    """[m z, m], with the channel `said` in place of the last m where it is given."""
    said = m if said is None else said
    return torch.cat([m * z, said.expand(*z.shape[:2], 1, *z.shape[3:])], 2)


def _noised(z0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    return z0 + right(sigma, z0) * eps


def _mean(square: Tensor, counted: Tensor) -> Tensor:
    """The mean of `square` over the frames that are counted, (B, T, 1, 1, 1)."""
    return (square * counted).sum() / counted.expand_as(square).sum()


def _answer(net, z0: Tensor, m: Tensor, sigma: Tensor, eps: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The context, and the loss of the noise over unknown frames."""
    return context, _mean((net(_noised(z0, sigma, eps), sigma, context) - eps) ** 2, 1 - m)


@item(
    "11.6", title="Frames that are known", function="frame_conditioning", points=2, minutes=20, difficulty=2,
    answers=("course_lib.training.denoising_loss",),
    hints=(
        "m = known as numbers, (B, T, 1, 1, 1), multiplies clips: m * z0 are the known frames, clean, and 0 elsewhere.",
        "The last channel of the context is m at every pixel: m.expand(B, T, 1, H, W). torch.cat([m * z0, that], 2).",
        "x = z0 + sigma eps in *all* frames. square = (net(x, sigma, context) - eps) ** 2; the mean over unknown frames is square[~known].mean().",
    ),
)  # fmt: skip
class FrameConditioning:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(B: int, *frames: int) -> Case:
            shape = B, *frames
            return {
                "z0": rng.normal(size=shape),
                "known": some_known(rng, B, shape[1]),
                "sigma": rng.uniform(0.4, 1.5, B),
                "eps": rng.normal(size=shape),
            }

        free = case(2, 3, 2, 2, 2)
        free["known"] = np.zeros_like(free["known"])
        return [case(3, 4, 2, 2, 3), case(4, 5, 3, 2, 2), free]

    def drive(fn, case: Case) -> Outputs:
        net = Net()
        said = named(call(fn, net, *(T(case[name]) for name in ("z0", "known", "sigma", "eps"))), "context", "loss")
        return arrays(context=said["context"], loss=one_number(said["loss"]), calls=net.calls)

    def reference(net, z0: Tensor, known: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(m, z0))

    @mistake("the mask is turned round: the context shows the frames that are to be found, and hides the known ones")
    def mask_turned(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(1 - m, z0))

    @mistake("the context's frames are right, and its last channel is turned round: it is 1 where a frame is *known*")
    def channel_turned(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(m, z0, 1 - m))

    @mistake("the context shows the *noisy* frames, which the network is given anyway; known frames are known clean")
    def noisy_context(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(m, _noised(z0, sigma, eps)))

    @mistake("unknown frames stand in the context too: the network copies them, and has nothing to copy when it is used; m * z0")
    def unknown_shown(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(torch.ones_like(m), z0, m))

    @mistake("unknown frames are filled with noise in the context: 0 is what says that there is nothing; m * z0")
    def noise_for_unknown(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(torch.ones_like(m), torch.where(m > 0, z0, eps), m))

    @mistake("the last channel is 1 in all frames: a black frame then looks like an unknown one; it is the mask")
    def channel_of_ones(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(m, z0, torch.ones_like(m)))

    @mistake("the last channel is 0 in all frames: a black frame then looks like an unknown one; it is the mask")
    def channel_of_zeros(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(m, z0, torch.zeros_like(m)))

    @mistake(
        "the mask is the first channel; the latents come first, then the mask, [m z, m]: a trained network knows only its own order"
    )
    def mask_first(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, m, sigma, eps, _context(m, z0).roll(1, 2))

    @mistake("all clips get the mask of the first; each has its own")
    def first_clips_mask(net, z0, known, sigma, eps):
        m = _seen(known, z0)[:1].expand(len(z0), -1, -1, -1, -1)
        return _answer(net, z0, m, sigma, eps, _context(m, z0))

    @mistake("the loss is the mean over *all* frames: where a frame is known there is nothing to learn but to copy")
    def all_frames(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        return _answer(net, z0, 0 * m, sigma, eps, _context(m, z0))

    @mistake("the loss is over the *known* frames; what is asked are the others")
    def known_frames(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        context = _context(m, z0)
        square = (net(_noised(z0, sigma, eps), sigma, context) - eps) ** 2
        return context, (square * m).sum() / m.expand_as(square).sum().clamp_min(1)

    @mistake(
        "the known frames are set to 0 in the loss and still counted: the mean is over all numbers; count unknown frames alone"
    )
    def counted_all(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        context = _context(m, z0)
        return context, ((1 - m) * (net(_noised(z0, sigma, eps), sigma, context) - eps) ** 2).mean()

    @mistake(
        "the mean is taken clip by clip first: a frame of a clip with few unknown ones counts more; one mean over all of them"
    )
    def mean_of_means(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        context = _context(m, z0)
        square = (1 - m) * (net(_noised(z0, sigma, eps), sigma, context) - eps) ** 2
        numbers = (1 - m).expand_as(square).flatten(1).sum(1)
        return context, (square.flatten(1).sum(1) / numbers).mean()

    @mistake("the loss is a sum: it grows with the frames that are unknown; take the mean over them")
    def summed(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        context = _context(m, z0)
        return context, ((1 - m) * (net(_noised(z0, sigma, eps), sigma, context) - eps) ** 2).sum()

    @mistake("the answer is compared with z0; this network tells the noise")
    def compared_with_the_clip(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        context = _context(m, z0)
        return context, _mean((net(_noised(z0, sigma, eps), sigma, context) - z0) ** 2, 1 - m)

    @mistake(
        "known frames are put clean into x as well: here all frames of x have the noise of sigma, and the context says what is known"
    )
    def known_clean_in_x(net, z0, known, sigma, eps):
        m = _seen(known, z0)
        context = _context(m, z0)
        x = torch.where(m > 0, z0, _noised(z0, sigma, eps))
        return context, _mean((net(x, sigma, context) - eps) ** 2, 1 - m)

    @law("the context must have the known frames of z0 in its first channels, and 0 where a frame is unknown")
    def frames_of_context(case: Case, out: Outputs) -> bool:
        return close(out["context"][:, :, :-1], case["z0"] * case["known"][:, :, None, None, None])

    @law("the last channel of the context must be 1 at each pixel of a known frame, and 0 elsewhere")
    def mask_of_context(case: Case, out: Outputs) -> bool:
        return close(out["context"][:, :, -1], np.broadcast_to(case["known"][:, :, None, None], out["context"][:, :, -1].shape))

    @law("the context is right, the loss is not: look at what the network is given, and over which numbers the mean is")
    def loss_fits(case: Case, out: Outputs) -> bool:
        z0, known, sigma, eps = (T(case[name]) for name in ("z0", "known", "sigma", "eps"))
        m = _seen(known, z0)
        return close(out["loss"], float(_answer(Net(), z0, m, sigma, eps, _context(m, z0))[1]))

    @law("the network must be called once")
    def called_once(case: Case, out: Outputs) -> bool:
        return out["calls"] == 1
