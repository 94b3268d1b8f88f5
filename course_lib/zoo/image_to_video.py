"""A picture that begins to move: TRIP's image noise prior against the same training without it.

All go on from the temporal layers of `mini-video`, for as many steps, on the same clips and noise, told the first frame alike.

    plain               the ordinary denoising loss, of all frames
    TRIP                that of D' = lambda z^1 + (1 - lambda) D, see `video.conditioning.trip`, with lambda from 1 at the first
                        frame down to 0 at the last: the noise in a frame is taken for x - z^1, as if the clip stood still
    TRIP, shared noise  the same with what `prior` knows in place of z^1: frames share most of their noise here, and that of the
                        first is known exactly

With lambda = 0 all are the first. Nothing is written over what is drawn. Each has the learning rate, of as many, that was best
for it on validation clips.

`python -m course_lib.zoo.image_to_video` (or `... rates clips`) measures what `image_to_video.json` has not yet, row by row;
`rows(part)` reads it. Networks that are trained are kept in the cache, not in the zoo.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_lib import zoo
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.training import Fit, denoising_loss, fit
from course_lib.types import Denoiser, right
from course_lib.video.conditioning import decay, trip
from course_lib.video.inflation import Temporal, inflated
from course_lib.video.masks import context, first
from course_lib.video.measures import flicker, warp_error
from course_lib.video.noise import correlated
from course_lib.worlds.scenes.clips import RenderedClips, render_clips
from course_lib.worlds.scenes.dataset import cache_folder
from course_lib.zoo import stored
from course_lib.zoo.judge_video import SPLITS, STEPS, W, clips, judged, reconstructed
from course_lib.zoo.recipes import video as recipe
from course_lib.zoo.recipes.control import attention_of
from course_lib.zoo.stored import Row
from course_lib.zoo.video import PretrainedVideo, encoded, frames_of
from course_lib.zoo.video_data import FRAMES, SHARED, SIDE, filmed
from course_lib.zoo.videos import on_object

STORED = Path(__file__).with_name("image_to_video.json")
COMMAND = "python -m course_lib.zoo.image_to_video"
SEEDS = (0, 1, 2)
KNOWN = first(FRAMES, 1)
MOVED = (0.0, 0.536, 0.687, 0.732, 0.787, 0.856, 0.876, 0.827)
"""Root mean square of x0_i - z^1 over the training clips, in latents."""
RATES = (1e-3, 3e-3, 9e-3)
TRIAL, TRAINED = 100, 300
"""Steps of a training that only chooses the learning rate, and of one that is judged."""
SHOWN = 48
"""How many test clips are judged."""
VALIDATED = 168
"""Clips, levels and noise of the validation loss, the same for all."""


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


@functools.cache
def model() -> PretrainedVideo:
    """The model from which both go on."""
    return zoo.load("mini-video", device="cpu")


# --- what the first frame says ----------------------------------------------------------------------------------------------


def prior(x: Tensor, z1: Tensor, sigma: Tensor, a: float, moved: Tensor | None = None) -> Tensor:
    """E[x0_i | x_1, x_i, z^1] for Gaussian moves x0_i ~ N(z^1, tau_i^2) under noise in common: (B, T, C, H, W).

    The noise of the first frame is known, eps_1 = (x_1 - z^1) / sigma, and eps_i = rho^2 eps_1 + sqrt(1 - rho^4) xi with
    rho^2 = a^2 / (1 + a^2), see `video.noise`. So u_i = x_i - rho^2 sigma eps_1 is x0_i under noise of s = sigma sqrt(1 - rho^4)
    alone, and P_i = z^1 + tau_i^2 / (tau_i^2 + s^2) (u_i - z^1).

    x (B, T, C, H, W), z1 (B, C, H, W); moved (T,) is tau, MOVED by default. With tau = 0 this is z^1, TRIP's prior.
    """
    tau2 = (torch.tensor(MOVED) if moved is None else moved).to(x).view(-1, 1, 1, 1) ** 2
    rho2, still = a**2 / (1 + a**2), z1[:, None]
    s2 = right(sigma, x) ** 2 * (1 - rho2**2)
    u = x - rho2 * (x[:, :1] - still)
    return still + tau2 / (tau2 + s2) * (u - still)


def shared(D: Denoiser, z1: Tensor, shares: Tensor, a: float = SHARED) -> Denoiser:
    """D'_i = lambda_i P_i + (1 - lambda_i) D_i, P of `prior`: `trip` for frames that move and share noise, shares (T,)."""
    lam = shares.float().view(-1, 1, 1, 1)
    return lambda x, sigma: torch.lerp(D(x, sigma), prior(x, z1, sigma, a), lam)


METHODS: dict[str, Callable[[Denoiser, Tensor], Denoiser]] = {
    "plain": functools.partial(trip, shares=decay(FRAMES, 0.0)),
    "TRIP": functools.partial(trip, shares=decay(FRAMES)),
    "TRIP, shared noise": functools.partial(shared, shares=decay(FRAMES)),
}
"""Name -> D' of D and the first frame."""


# --- training ----------------------------------------------------------------------------------------------------------------


def start() -> Temporal:
    """A copy of its temporal layers that can learn."""
    return copy.deepcopy(model().temporal).train().requires_grad_(True)


def lowest() -> float:
    """The lowest level at which the sampler asks the network; its last step leads from there to its end."""
    return float(model().sigmas(STEPS)[-2])


def levels() -> Tensor:
    """The noise levels of `mini-video`, but for those below `lowest`.

    There D' = x0 asks TRIP's D for x0 + lambda / (1 - lambda) (x0 - z^1), whose v grows as 1 / sigma.
    """
    known = recipe.levels(model().image, recipe.STAGES[-1]["above"])
    return known[known >= lowest()]


@functools.cache
def drawn(n: int = recipe.BATCH, split: str = "train") -> Any:
    """What `fit` draws from: batches of n as for `mini-video` in its last stage, of its training or of validation clips."""
    of = filmed(recipe.CLIPS, recipe.SEED) if split == "train" else filmed(*SPLITS[split])
    return recipe.batches(of, levels(), n, recipe.DROPPED if split == "train" else 0.0, recipe.STAGES[-1]["shared"])


def loss_of(method: Callable[[Denoiser, Tensor], Denoiser]) -> Any:
    """What `fit` minimises: the denoising loss of v of all frames, of D' by one of METHODS."""
    image = model().image

    def loss(temporal: Temporal, x0: Tensor, sigma: Tensor, eps: Tensor, _: Tensor, scene: Tensor, motion: Tensor) -> Tensor:
        with attention_of(x0.device):
            with torch.no_grad():
                text = image.pipeline.text_encoder(scene)[0]
            told = {"motion": encoded(image, motion), "context": context(x0, KNOWN)}
            D = inflated(image.denoiser, temporal).given(encoder_hidden_states=text, **told)
            return denoising_loss(method(D, x0[:, 0]), x0, sigma, eps, "v")

    return loss


def train(method: str, lr: float, seed: int, steps: int, progress: bool = False) -> Fit:
    """`training.fit` from the temporal layers of `mini-video`; batches depend on the seed alone."""
    words = f"{method} {lr:g} {seed} {steps} {zoo.card('mini-video')['sha256']}"
    kept = cache_folder() / "image_to_video" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.ckpt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    of, loss = drawn(), loss_of(METHODS[method])
    return fit(start(), of, loss, steps=steps, lr=lr, seed=seed, nhwc=False, device="cpu", checkpoint=kept, progress=progress)


@functools.cache
def _validation() -> tuple[Tensor, ...]:
    return drawn(VALIDATED, "validation")(generator(SPLITS["validation"][1]))


@torch.no_grad()
def validation_loss(method: str, temporal: Temporal) -> float:
    """The mean loss of a method over validation clips."""
    parts = zip(*(rows.split(24) for rows in _validation()), strict=True)
    with autocast("cpu"):
        return round(float(torch.cat([loss_of(METHODS[method])(temporal, *part) for part in parts]).mean()), 4)


def rate(method: str, lr: float) -> Row:
    """The validation loss after a short training at this rate."""
    run = train(method, lr, 10, TRIAL)  # a seed of its own
    return {"method": method, "lr": lr, "steps": TRIAL, "loss": validation_loss(method, run.net)}


def best(method: str) -> float:
    """The learning rate whose validation loss is least."""
    return min((row for row in rows("rates") if row["method"] == method), key=lambda row: row["loss"])["lr"]


# --- drawing -----------------------------------------------------------------------------------------------------------------


def begun(
    of: PretrainedVideo,
    method: str,
    prompts: Sequence[str],
    z1: Tensor,
    seed: int = 0,
    steps: int = STEPS,
    batch: int = 8,
) -> Tensor:
    """Latents (N, T, C, H, W) of clips that begin with z1 (N, C, H, W), as the sampler leaves them: all frames are drawn.

    DDIM of D' under classifier-free guidance, from noise that frames share; the network is told z1 in both halves.
    """
    sigmas, found = of.sigmas(steps), []
    for i in range(0, len(prompts), batch):
        some, picture = list(prompts[i : i + batch]), z1[i : i + batch]
        told = context(picture[:, None].expand(-1, of.frames, -1, -1, -1), KNOWN)
        pair = [of.denoiser.given(**of.embed(said), context=told) for said in (some, [""] * len(some))]
        own = SampleNoise(seed, i)(torch.empty(len(some), *of.shape))
        x = of.image.start(correlated(own, of.shared), sigmas[0])
        with autocast("cpu"), torch.no_grad():
            found.append(of.image.finish(sample(METHODS[method](cfg(*pair, W), picture), x, sigmas), sigmas[-1]).float())
    return torch.cat(found)


@functools.cache
def shown(n: int = SHOWN) -> tuple[RenderedClips, Tensor]:
    """The first n test clips, with their flow, and their frames through the VAE."""
    true = render_clips(clips("test").of[:n], SIDE)
    return true, reconstructed(model().image, true.rgb)


def coherence(x: Tensor) -> Row:
    """Of clips x (n, T, 3, 64, 64) that were drawn from the first frames of the first n test clips:

    kept      PSNR in dB of the first frame to the given one, both decoded; 120 where they are equal
    jump      mean |x_2 - x_1| over that of the true clips through the VAE: 1 is right, 0 is frozen
    later     the same of all later frames
    flickers  `measures.flicker` over theirs
    warped    `measures.warp_error` along the true flow over theirs: a clip that is frozen, or moves otherwise, is above 1
    object    PSNR in dB on the object, of all frames but the first
    """
    true, same = shown(len(x))
    error = (x[:, 0] - same[:, 0]).square().flatten(1).mean(1).clamp_min(4e-12)

    def over(measure: Callable[[Tensor], Tensor]) -> float:
        return round(float(measure(x).nanmean() / measure(same).nanmean()), 4)

    return {
        "kept": round(float((10 * torch.log10(4 / error)).mean()), 3),
        "jump": over(lambda y: (y[:, 1] - y[:, 0]).abs()),
        "later": over(lambda y: y[:, 1:].diff(dim=1).abs()),
        "flickers": over(flicker),
        "warped": over(lambda y: warp_error(y, true.flow, true.visible)),
        "object": on_object(x, true, ~KNOWN),
    }


def of_clips(x: Tensor) -> Row:
    """`coherence`, and what `judged` says, motion first: a clip that stands still is coherent by any measure without flow."""
    return coherence(x) | judged(x, "test")


def _drawn(method: str, of: PretrainedVideo, seed: int) -> Row:
    with torch.no_grad():
        z1 = of.image.encode(shown()[0].rgb[:, 0])
    return of_clips(frames_of(of, begun(of, method, clips("test").captions[:SHOWN], z1, seed)))


def untrained(method: str, seed: int) -> Row:
    """`mini-video` itself, told the first frame, with the prior that it was not trained for and without."""
    row = {"method": method, "seed": seed, "sha256": zoo.card("mini-video")["sha256"][:8]}
    return row | {"loss": validation_loss(method, model().temporal)} | _drawn(method, model(), seed)


def trained(method: str, seed: int) -> Row:
    """One training of a method at its best learning rate, and the clips that it draws."""
    run = train(method, best(method), seed, TRAINED)
    row = {"method": method, "seed": seed, "lr": best(method), "steps": TRAINED, "seconds": round(run.seconds)}
    of = replace(model(), name=method, denoiser=inflated(model().image.denoiser, run.net))
    return row | {"loss": validation_loss(method, run.net)} | _drawn(method, of, seed)


def true(of: str) -> Row:
    """The true clips, through the VAE: what the others are compared with."""
    return {"of": of} | of_clips(shown()[1])


PARTS: stored.Parts = {
    "true": (true, [{"of": "through the VAE"}]),
    "untrained": (untrained, [{"method": method, "seed": seed} for seed in SEEDS for method in METHODS]),
    "rates": (rate, [{"method": method, "lr": lr} for lr in RATES for method in METHODS]),
    "clips": (trained, [{"method": method, "seed": seed} for seed in SEEDS for method in METHODS]),
}


def main(asked: list[str]) -> None:
    """Measure what is missing of the parts asked for, or of all."""
    stored.run(STORED, COMMAND, PARTS, asked)


if __name__ == "__main__":
    main(sys.argv[1:])
