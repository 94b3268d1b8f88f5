"""Text-to-video models: an image model, the temporal layers that were trained on it, and what their prompts say to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.video.conditioning import rollout
from course_lib.video.inflation import Temporal, inflated
from course_lib.video.masks import context
from course_lib.video.noise import correlated
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.video_data import FRAMES, SHARED, texts

BATCH = 8
TOP = 600.0
"""The highest noise level of a clip: frames that share most of their noise show there, too, nothing of what moves."""
ABOVE = (TOP, 150.0, 40.0)
"""Levels above those of the image model at which sampling starts, for a model that was trained there."""
W = 2.0
"""Guidance, as `zoo.videos` found on validation clips."""


@dataclass(frozen=True)
class PretrainedVideo:
    """An image model whose U-Net holds temporal layers.

    image     the image model, which draws each frame and whose grid and VAE serve
    denoiser  D(x, sigma) over clips of latents x (B, T, C, H, W); `denoiser.given(**model.embed(prompts))` gives the prompts
    frames    of the clips that it was trained on
    shared    a of the noise that frames have in common at the start of sampling, see `video.noise`
    above     noise levels above those of the image model, falling, at which sampling starts from noise in common
    """

    name: str
    image: Pretrained
    denoiser: NetworkDenoiser
    frames: int = FRAMES
    shared: float = SHARED
    above: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one x, (T, C, H, W)."""
        return (self.frames, *self.image.shape)

    def sigmas(self, n: int) -> Tensor:
        """`above`, and then the n levels of the image model's sampler and the last: CPU float64, strictly falling."""
        own = self.image.sigmas(n)
        return torch.cat([torch.tensor(self.above).to(own), own])

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt: its scene for the spatial layers, its motion, after the last comma, for the others.

        Where these can be told nothing, as AnimateDiff's, the whole prompt is for the spatial layers. A prompt without a motion
        leaves that to the model. Raises ZooError for a prompt longer than the tokenizer takes.
        """
        if "motion" not in self.denoiser.net.told:
            return self.image.embed(prompts)
        scenes, motions = zip(*(split(prompt) for prompt in prompts), strict=True)
        return {**self.image.embed(scenes), "motion": summary(self.image, motions)}

    def on(self, image: Pretrained) -> PretrainedVideo:
        """The same temporal layers on another image model of the same layers, as a personalised one."""
        return replace(self, name=f"{self.name} on {image.name}", image=image, denoiser=inflated(image.denoiser, self.temporal))

    @property
    def temporal(self) -> Temporal:
        """The temporal layers."""
        return self.denoiser.net.temporal

    def decode(self, z: Tensor) -> Tensor:
        """The frames (B, T, 3, 8 H, 8 W) of latents (B, T, C, H, W), each by itself."""
        return self.image.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])


def wrap(
    image: Pretrained,
    temporal: Temporal,
    name: str,
    frames: int = FRAMES,
    shared: float = SHARED,
    above: tuple[float, ...] = (),
) -> PretrainedVideo:
    """These temporal layers on this image model."""
    return PretrainedVideo(name, image, inflated(image.denoiser, temporal), frames, shared, above)


def split(prompt: str) -> tuple[str, str]:
    """Scene and motion of a prompt: "a red cube, spinning"; one that does not end in a motion is all scene."""
    from course_lib.worlds.scenes.clip_captions import parse_motion

    try:
        parse_motion(prompt)
    except ValueError:
        return prompt, ""
    return texts(prompt)


def summary(image: Pretrained, motions: Sequence[str]) -> Tensor:
    """What the text encoder says of each motion at the mark that ends it, (B, width)."""
    from course_lib.zoo.control_data import tokens

    return encoded(image, tokens(list(motions)).to(image.device))


@torch.no_grad()
def encoded(image: Pretrained, ids: Tensor) -> Tensor:
    """The state of the text encoder at the end mark of tokens (B, LENGTH): (B, width)."""
    encoder = image.components["text_encoder"]
    end = (ids == encoder.config.eos_token_id).int().argmax(1)
    return encoder(ids)[0][torch.arange(len(ids), device=ids.device), end]


def clips_of(
    model: PretrainedVideo,
    prompts: Sequence[str],
    w: float = W,
    seed: int = 0,
    steps: int = 20,
    shared: float | None = None,
    known: Tensor | None = None,
    z: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """Clips (N, T, 3, 64, 64) in [-1, 1] of these prompts, see `latents_of`, decoded frame by frame."""
    return frames_of(model, latents_of(model, prompts, w, seed, steps, shared, known, z, progress))


def frames_of(model: PretrainedVideo, z: Tensor) -> Tensor:
    """Clips (N, T, 3, 64, 64) in [-1, 1] of latents (N, T, C, H, W), decoded frame by frame, on the CPU."""
    with autocast(model.image.device), torch.no_grad():
        return torch.cat([model.decode(some.to(model.image.device)).float().cpu() for some in z.split(BATCH)])


def latents_of(
    model: PretrainedVideo,
    prompts: Sequence[str],
    w: float = W,
    seed: int = 0,
    steps: int = 20,
    shared: float | None = None,
    known: Tensor | None = None,
    z: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """Latents (N, T, C, H, W) of clips of these prompts: DDIM under classifier-free guidance w.

    shared    a of the noise at the start, see `video.noise`; the model's own where it is None
    known, z  which frames (T,) or (N, T) are known, and clips of latents (N, T, C, H, W) that hold them: they come back as they
              are, and the model is told of them in both halves of the guidance

    Clip i depends on prompt i and (seed, i), not on its batch. Raises ValueError where `known` is given without z, or to a model
    that can be told of no frames.
    """
    if (known is None) != (z is None):
        raise ValueError(f"known is {'not ' if known is None else ''}given and z is not; expected both or neither")
    if z is not None and "context" not in model.denoiser.net.told:
        raise ValueError(f"model = {model.name!r} can be told of no frames; expected one that hears `context`, as mini-video")
    shared = model.shared if shared is None else shared
    sigmas, found = model.sigmas(steps) if shared else model.image.sigmas(steps), []
    for first in tqdm(range(0, len(prompts), BATCH), desc="clips", unit="batch", disable=not progress):
        some = list(prompts[first : first + BATCH])
        told = {}
        if z is not None:
            mask = known.expand(len(prompts), -1)[first : first + BATCH]
            told["context"] = context(z[first : first + BATCH], mask).to(model.image.device)
        pair = [model.denoiser.given(**model.embed(said), **told) for said in (some, [""] * len(some))]
        own = SampleNoise(seed, first)(torch.empty(len(some), *model.shape, device=model.image.device))
        start = model.image.start(correlated(own, shared), sigmas[0])
        with autocast(model.image.device), torch.no_grad():
            x = model.image.finish(sample(cfg(*pair, w), start, sigmas), sigmas[-1]).float().cpu()
        if z is not None:
            x = torch.where(mask[..., None, None, None], z[first : first + BATCH].to(x), x)
        found.append(x)
    return torch.cat(found)


def long_clips(
    model: PretrainedVideo,
    prompts: Sequence[str],
    frames: int,
    overlap: int = 2,
    w: float = W,
    seed: int = 0,
    steps: int = 20,
    known: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Clips (N, frames, 3, 64, 64) of any length: windows of the model's own, each of which goes on from the last `overlap`
    frames of the one before, with a UserWarning that says so; a shorter clip is the beginning of a whole one.

    known (frames,), z (N, frames, C, H, W) as of `latents_of`. Raises ValueError as `latents_of` and `conditioning.rollout`.
    """
    whole = max(frames, model.frames)
    if (known is None) != (z is None):
        raise ValueError(f"known is {'not ' if known is None else ''}given and z is not; expected both or neither")
    given = torch.zeros(len(prompts), whole, *model.shape[1:])
    seen = torch.zeros(whole, dtype=torch.bool)
    if z is not None:
        given[:, :frames], seen[:frames] = z, known

    def draw(clip: Tensor, there: Tensor, times: Tensor) -> Tensor:
        told = {"known": there, "z": clip} if bool(there.any()) else {}
        return latents_of(model, prompts, w, seed + int(times[0]), steps, **told)

    return frames_of(model, rollout(draw, given, model.frames, overlap, seen)[:, :frames])
