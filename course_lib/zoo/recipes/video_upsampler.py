"""`mini-video-upsampler`: latents of 128-pixel clips from those of 64-pixel ones, frame by frame at first, then along time.

As of Video LDM (Blattmann et al. 2023, Sec. 3.4), the network of frames is trained first; with it frozen, its temporal layers. An
error of latents may be seen or not, so that the loss then has, beside theirs, that of pictures from the frozen decoder.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from course_lib import zoo
from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import generator
from course_lib.training import Fit, edm_weight, fit, lognormal_sigmas, write_atomically
from course_lib.types import right
from course_lib.video.inflation import inflated, pseudo_3d_of
from course_lib.worlds.scenes.clips import Clips
from course_lib.worlds.scenes.dataset import VERSION, cache_folder
from course_lib.worlds.scenes.render import render
from course_lib.zoo import judge_upsampler
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.recipes import video
from course_lib.zoo.recipes.settings import settings
from course_lib.zoo.upsampler import FACTOR, SIGMA_DATA, Beside, Upsampler, told
from course_lib.zoo.upsampler import wrap as wrap_upsampler
from course_lib.zoo.video_data import FRAMES, LATENT, SIDE, filmed

CLIPS = 800
DATA = f"the first {CLIPS} of the training clips of mini-video, rendered at 64 and at 128 pixels"
STAGES: dict[str, dict[str, Any]] = {
    "latents": {"steps": 2_000, "lr": 2e-3, "seed": 91, "clips": 4},
    "pictures": {"steps": 500, "lr": 1e-3, "seed": 92, "clips": 2, "decoded": 4},
    "temporal": {"steps": 400, "lr": 2e-3, "seed": 93, "clips": 4},
}
"""A step has `clips`, or as many single frames in all but the last stage; so many of these are decoded."""
IN_BYTES = ("mini-video-upsampler",)
WIDTHS = (24, 32)
LARGEST_S = 0.5
NOISY = 3
"""Each clip of so many is behind noise, of a level drawn evenly up to LARGEST_S."""
SEEN = (1.33, 0.38, 0.51, 1.78)
"""How much of an error of each channel is seen: the mean squared change of pictures for noise in it alone, their mean 1."""
PIXELS = 20.0
"""Weight of the error of pictures, in the second stage."""
CHANGES = 1.0
"""Weight of the error of changes from frame to frame, in the last."""


def network(name: str = "mini-video-upsampler") -> nn.ModuleDict:
    """The untrained network of frames, and its temporal layers."""
    torch.manual_seed(STAGES["latents"]["seed"])
    frames = Beside(WIDTHS)
    return nn.ModuleDict({"frames": frames, "temporal": pseudo_3d_of(frames, seed=STAGES["temporal"]["seed"])})


def pairs(n: int, seed: int) -> tuple[Tensor, Tensor, Clips]:
    """Of n clips what is told of the small one, half precision (n, F, TOLD, 16, 16), the latents of the large one, and the clips.

    Every third is behind noise, see NOISY; kept in the cache.
    """
    large = filmed(n, seed, side=FACTOR * SIDE)
    words = f"upsampler {n} {seed} {NOISY} {LARGEST_S} {VERSION} {zoo.card('mini-sd')['sha256']}"
    kept = cache_folder() / "clips" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.pt"
    if not kept.exists():
        low = filmed(max(n, video.CLIPS), seed).mean[:n]
        model, source = zoo.load("mini-sd", device="cpu"), generator(seed, n)
        s = LARGEST_S * torch.rand(n, generator=source) * (torch.arange(n) % NOISY == 0)
        eps = torch.randn(low.shape, generator=source)
        parts = [told(model, low[i], s[i], eps[i]).half() for i in tqdm(torch.arange(n).split(4), desc="clips", unit="batch")]
        write_atomically(kept, lambda path: torch.save(torch.cat(parts), path))
    return torch.load(kept, weights_only=True), large.mean, large.of


def batches(low: Tensor, high: Tensor, of: Clips, clips: int, whole: bool, decoded: int = 0) -> Any:
    """What `fit` draws from: (r, sigma, eps, low), of whole clips (B, T, ...) or of as many frames (B T, ...) of any clips, and,
    where asked, pictures (decoded, 3, 128, 128) of frames of these that are evenly apart.

    r is what the large latents have that e has not.
    """

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        n = clips if whole else clips * FRAMES
        rows, frame = torch.randint(len(high), (n,), generator=source), torch.randint(FRAMES, (n,), generator=source)
        at = rows if whole else (rows, frame)
        seen = low[at].float()
        r = high[at] - seen[..., :LATENT, :, :]
        found = r, lognormal_sigmas(n, -0.4, 1.2, source), torch.randn(r.shape, generator=source), seen
        if not decoded:
            return found
        some = slice(None, None, n // decoded)
        return *found, large_pictures(of, rows[some], frame[some])

    return draw


def large_pictures(of: Clips, rows: Tensor, frame: Tensor) -> Tensor:
    """Frame `frame` (n,) of clip `rows` (n,) at 128 pixels, (n, 3, 128, 128)."""
    scenes, view = of[rows].states()
    i = FRAMES * torch.arange(len(rows)) + frame
    return render(scenes[i], FACTOR * SIDE, view=replace(view, eye=view.eye[i], axes=view.axes[i])).rgb


def loss_of(
    model: Pretrained, D: NetworkDenoiser, r: Tensor, sigma: Tensor, eps: Tensor, low: Tensor, x: Tensor | None = None
) -> Tensor:
    """lambda(sigma) SEEN |D - r|^2, D = D(r + sigma eps, sigma; low), the mean of each row, (B,). There is added,

    of clips            CHANGES lambda(sigma) SEEN |d D - d r|^2, d the difference of neighbouring frames
    where x is given    PIXELS lambda(sigma) |decode(e + D) - x|^2, of the frames of which x are pictures, their mean
    """
    weight = edm_weight(SIGMA_DATA)(sigma)
    found = D.given(low=low)(r + right(sigma, r) * eps, sigma).float()
    seen, off = torch.tensor(SEEN, device=r.device)[:, None, None], found - r
    error = weight * (seen * off.square()).flatten(1).mean(1)
    if r.ndim == 5:
        error = error + CHANGES * weight * (seen * off.diff(dim=1).square()).flatten(1).mean(1)
    if x is None:
        return error
    some = slice(None, None, len(r) // len(x))
    wrong = (model.decode((low[:, :LATENT] + found)[some], clamp=False).float() - x).square().flatten(1).mean(1)
    return error + PIXELS * (weight[some] * wrong).mean()


def train(
    name: str = "mini-video-upsampler",
    net: nn.ModuleDict | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    checkpoint: Path | None = None,
    stop_at: int | None = None,
    **options: Any,
) -> Fit:
    """The stages of STAGES; `steps`, `lr`, `seed` and `stop_at` are those of the last.

    A run that starts from a network, or that has a length of its own, has the last stage alone.
    """
    whole = net is None and steps is None
    net, (low, high, of), model = network(name) if net is None else net, pairs(CLIPS, video.SEED), zoo.load("mini-sd", device)
    own = STAGES["temporal"]
    last = {"temporal": own | settings(own, steps=steps, lr=lr, seed=seed) | {"stop_at": stop_at}}
    frames, temporal, losses, seconds = net["frames"], net["temporal"], [], {}
    for stage, own in (STAGES | last if whole else last).items():
        own, along = dict(own), stage == "temporal"
        draw = batches(low, high, of, own.pop("clips"), along, own.pop("decoded", 0))

        def loss(part: nn.Module, *rows: Tensor, below: nn.Module | None = frames if along else None) -> Tensor:
            D = from_edm(part, SIGMA_DATA) if below is None else inflated(from_edm(below, SIGMA_DATA), part)
            return loss_of(model, D, *rows)

        part = (temporal if along else frames).train().requires_grad_(True)
        file = checkpoint.with_suffix(f".{stage}.ckpt") if checkpoint else None
        run = fit(part, draw, loss, checkpoint=file, nhwc=False, device=device, **own, **options)
        frames, temporal = (frames, run.net) if along else (run.net, temporal)
        losses, seconds[stage] = losses + run.losses, run.seconds
    return Fit(nn.ModuleDict({"frames": frames, "temporal": temporal}), losses, sum(seconds.values()), seconds)


def wrap(net: nn.ModuleDict) -> Upsampler:
    """What `zoo.load` returns."""
    return wrap_upsampler(zoo.load("mini-sd", device=str(next(net.parameters()).device)), net)


def judge(name: str, net: nn.ModuleDict) -> dict[str, Any]:
    """Beside bilinear enlargement, and frame by frame, see `judge_upsampler`."""
    return judge_upsampler.judge(wrap(net))
