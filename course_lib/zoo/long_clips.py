"""Long clips: a cascade over time against networks that draw all frames at once, in a world of which everything is known.

A blob swings along the middle row of the frame, p_t = c + a cos(2 pi f t + phi), with f = 1/16 or 3/16. On every fourth frame
these two cannot be told apart: phi at one is -phi at the other. The cascade draws such key frames, then what is between two of
them, window by window (Make-A-Video; Singer et al. 2022; Imagen Video; Ho et al. 2022). Two key frames leave exactly two
motions, as likely as each other, and each of 8 windows chooses by itself: even with perfect networks one clip in 128 keeps its
period. `exact windows` are such clips, drawn without a network. The space-time U-Net (Lumiere; Bar-Tal et al. 2024) and the
video diffusion transformer draw all of the clip at once.

`python -m course_lib.zoo.long_clips` (or `... bounds clips`) measures what `long_clips.json` has not yet, row by row;
`rows(part)` reads it. The three have about as many weights, and about as many seconds of the processor.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import SampleNoise, generator, one_thread
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.nets.space_time import SpaceTimeUNet
from course_lib.nets.unet import UNet
from course_lib.nets.video_dit import VideoDiT
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.training import Fit, denoising_loss, edm_weight, fit, lognormal_sigmas
from course_lib.video.masks import context, every
from course_lib.zoo import stored
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("long_clips.json")
COMMAND = "python -m course_lib.zoo.long_clips"
SEEDS = (0, 1, 2)

FRAMES, SIDE, EVERY = 32, 8, 4
WINDOWS = FRAMES // EVERY
KEYS = torch.arange(0, FRAMES + 1, EVERY)
"""Key frames; the last stands after the clip, so that every window has two."""
CENTRE = (SIDE - 1) / 2
AMPLITUDES = (1.5, 2.5)
"""Pixels; the blob, four pixels wide, then never leaves the frame."""
FREQUENCIES = torch.tensor([1 / 16, 3 / 16], dtype=torch.float64)
"""Swings a frame, periods of 16 and 5 1/3 frames; each is the other's mirror image, 1/4 - f."""

# --- the world --------------------------------------------------------------------------------------------------------------


@dataclass
class Swings:
    """Motions p_t = c + a cos(2 pi f t + phi): (N,) each."""

    a: Tensor
    f: Tensor
    phi: Tensor

    def along(self, times: Tensor) -> Tensor:
        """a cos(2 pi f t + phi), pixels right of the middle, (N, n) at `times` (n,)."""
        return self.a[:, None] * torch.cos(2 * torch.pi * self.f[:, None] * times + self.phi[:, None])


def swings(n: int, source: torch.Generator) -> Swings:
    """n motions: f one of two, a and phi drawn evenly from their ranges."""
    a, phi = torch.rand(2, n, generator=source, dtype=torch.float64)
    f = FREQUENCIES[torch.randint(2, (n,), generator=source)]
    return Swings(AMPLITUDES[0] + (AMPLITUDES[1] - AMPLITUDES[0]) * a, f, 2 * math.pi * phi)


def spline(u: Tensor) -> Tensor:
    """The cubic B-spline, 0 beyond 2: moved anywhere, its values at whole numbers sum to 1, with its middle as mean."""
    u = u.abs()
    return torch.where(u < 1, 2 / 3 - u**2 + u**3 / 2, (2 - u).clamp_min(0) ** 3 / 6)


def render(p: Tensor) -> Tensor:
    """Frames (..., 1, 8, 8) of a blob at p (..., 2), right and down in pixels, on black; 1 where it is brightest.

    The centre of mass is p exactly, since a spline reproduces linear functions.
    """
    column, row = (1.5 * spline(torch.arange(SIDE) - p[..., k, None]) for k in (0, 1))
    return (row[..., :, None] * column[..., None, :])[..., None, :, :].float()


def frames_at(along: Tensor) -> Tensor:
    """Clips (N, T, 1, 8, 8) of a blob so far right of the middle, (N, T)."""
    return render(CENTRE + torch.stack([along, torch.zeros_like(along)], -1))


# --- exact measures ---------------------------------------------------------------------------------------------------------

WITHIN = 0.25
"""Pixels, root mean square, within which a clip counts as one swing."""
AXES = (1.25, 2.75)
"""Pixels: the larger half axis that the path of a clip must have, or it is frozen or leaves the world's range."""


@dataclass
class Seen:
    """What stands in frames: p (N, T, 2), sharpness (N, T), and unlike (N, T)."""

    p: Tensor
    sharpness: Tensor
    unlike: Tensor


def see(x: Tensor) -> Seen:
    """Read clips (N, T, 1, 8, 8): exact for true ones.

    p           centre of mass within two pixels of the brightest, which is all of the blob
    sharpness   sum of squares over that of the true blob at p
    unlike      |x - true blob| / |true blob|
    """
    x = x.double()
    light = F.pad(x[:, :, 0].clamp_min(0), (2, 2, 2, 2))  # (N, T, 12, 12)
    brightest = x.flatten(2).argmax(-1)
    at = torch.arange(5)
    rows, columns = (first[..., None] + at for first in (brightest // SIDE, brightest % SIDE))  # (N, T, 5) in the padded frame
    near = light.gather(2, rows[..., None].expand(-1, -1, -1, SIDE + 4))
    near = near.gather(3, columns[:, :, None].expand(-1, -1, 5, -1))  # (N, T, 5, 5)
    mass = near.sum((2, 3)).clamp_min(1e-6)
    p = torch.stack([(near.sum(2) * (columns - 2)).sum(-1), (near.sum(3) * (rows - 2)).sum(-1)], -1) / mass[..., None]
    true = render(p).double()
    squares = true.square().sum((2, 3, 4))
    return Seen(p, x.square().sum((2, 3, 4)) / squares, ((x - true).square().sum((2, 3, 4)) / squares).sqrt())


def swing_of(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best periodic motion through places p (N, T, 2): c + alpha cos(2 pi f t) + beta sin(2 pi f t), an ellipse, f within
    [0.04, 0.3] on a grid of 1e-4.

    Returns the root mean square distance from it (N,), its f (N,), and the larger half axis (N,).
    """
    p = p.double()
    f, t = torch.arange(0.04, 0.3, 1e-4, dtype=torch.float64), torch.arange(p.shape[1], dtype=torch.float64)
    angle = 2 * torch.pi * f[:, None] * t
    basis = torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()], -1)  # (F, T, 3)
    Q = torch.linalg.qr(basis).Q
    explained = torch.einsum("ftk,ntd->nfkd", Q, p).square().sum((2, 3))
    best = explained.argmax(1)
    found = torch.linalg.lstsq(basis[best], p).solution  # (N, 3, 2): c, alpha, beta
    apart = (p - basis[best] @ found).square().sum(-1).mean(1).sqrt()
    return apart, f[best], torch.linalg.matrix_norm(found[:, 1:], 2)


def choices(p: Tensor) -> Tensor:
    """Which of the two frequencies fits best in each window, four frames from a key frame on: p (N, T, 2) -> (N, T / 4), 0 or 1.

    The fit is p - c = alpha cos(2 pi f t) + beta sin(2 pi f t), by least squares.
    """
    angle = 2 * torch.pi * FREQUENCIES[:, None] * torch.arange(EVERY)
    Q = torch.linalg.qr(torch.stack([angle.cos(), angle.sin()], -1)).Q  # (2, 4, 2)
    return torch.einsum("ftk,nwtd->nwfkd", Q, (p.double() - CENTRE).unflatten(1, (-1, EVERY))).square().sum((3, 4)).argmax(2)


def judged(x: Tensor) -> Row:
    """Means over clips (N, T, 1, 8, 8).

    residual   pixels, root mean square, between the places of the blob and the best periodic motion
    one swing  share of clips with residual within WITHIN and a half axis within AXES
    one period share of clips whose `choices` are the same in all windows, 1/128 by chance
    consistent share of clips that are both
    agree      share of neighbouring windows whose choices are the same; by chance fast^2 + (1 - fast)^2, 1/2 or more
    fast       share of windows whose choice is 3/16; half of the world's
    """
    seen = see(x)
    residual, _, axis = swing_of(seen.p)
    swing = (residual < WITHIN) & (axis > AXES[0]) & (axis < AXES[1])
    chosen = choices(seen.p)
    period = (chosen == chosen[:, :1]).all(1)
    found = {"residual": residual, "one swing": swing, "one period": period, "consistent": swing & period}
    found |= {"agree": chosen[:, 1:] == chosen[:, :-1], "fast": chosen}
    found |= {"axis": axis, "sharpness": seen.sharpness, "unlike": seen.unlike}
    return {name: round(float(value.double().mean()), 4) for name, value in found.items()}


# --- what the windows of a cascade can do at best ---------------------------------------------------------------------------


def exact_windows(of: Swings, source: torch.Generator) -> Tensor:
    """Clips with the true key frames, and each window between them drawn from its exact law by itself.

    a cos(phi) at frame 0 and -a sin(phi) at frame 4 leave f = 1/16 with phi and f = 3/16 with -phi, each as likely as the other.
    """
    mirror = Swings(of.a, 1 / EVERY - of.f, -of.phi)
    t = torch.arange(FRAMES)
    coins = torch.randint(2, (len(of.a), WINDOWS), generator=source).bool().repeat_interleave(EVERY, 1)
    return frames_at(torch.where(coins, mirror.along(t), of.along(t)))


# --- networks ---------------------------------------------------------------------------------------------------------------


class Folded(nn.Module):
    """A network of clips that sees 2 x 2 pixels as four times the channels, as `nets.unet.Folded`: a quarter of the places."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        told = {} if context is None else {"context": F.pixel_unshuffle(context, 2)}
        return F.pixel_shuffle(self.net(F.pixel_unshuffle(x, 2), time, **told), 2)


def hears(net: nn.Module) -> bool:
    """Whether a network is told what is known of its frames."""
    return isinstance(net, Folded) and net.net.told > 0


def space_time(widths: tuple[int, ...], **options: Any) -> nn.Module:
    """A U-Net of clips on 4 x 4 places, 2 x 2 pixels each."""
    return Folded(SpaceTimeUNet(UNet(4, widths, blocks=1, attention=()), **options))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "key frames": lambda: space_time((16, 32, 40), halved=0, frames=len(KEYS)),
    "windows": lambda: space_time((16, 32, 40), halved=0, frames=EVERY + 1, told=8),
    "space-time U-Net": lambda: space_time((16, 32, 64), frames=FRAMES),
    "video DiT": lambda: VideoDiT(1, 120, 3, 4, (2, SIDE), side=1),
}
"""Name -> the untrained network; the first two are the cascade's."""
METHODS = {
    "cascade": ("key frames", "windows"),
    "space-time U-Net": ("space-time U-Net",),
    "video DiT": ("video DiT",),
}
STEPS = {"key frames": 1130, "windows": 1270, "space-time U-Net": 1350, "video DiT": 4600}
"""About as many seconds of the processor for each method, those of its networks together."""
RATES = {"key frames": 2e-3, "windows": 2e-3, "space-time U-Net": 4e-3, "video DiT": 4e-3}
BATCHES = {"key frames": 16, "windows": 16, "space-time U-Net": 16, "video DiT": 32}
"""The best of three trials a method at seed 99, about a quarter as long. In brackets the clips of 200 that were consistent, and
for the cascade the last losses of its two networks. Levels of noise, for all, and the patches of the DiT were set before, with
blobs of six colours along any line: two trials of the DiT, one of the space-time U-Net.

cascade           2e-3, 16 clips (0.393, 0.247); 4e-3, 16 (0.401, 0.247); 4e-3, 32 (0.427, 0.251)
space-time U-Net  4e-3, 16 (9); 8e-3, 16 (2); 4e-3, 16, two levels on patches of 2 frames and 4 x 4 pixels (0)
video DiT         2e-3, 64, 128 channels (32); 4e-3, 32, 128 channels (129); 8e-3, 32 (11)
"""
ENDS = every(EVERY + 1, EVERY)
"""What a window is told: the key frames at its ends."""
SIGMA_DATA = 0.135
"""The root mean square of a pixel, within 3 %: 1.5^2 * 0.479 / 8, as the squares of a spline's values sum to 0.479."""
LEVELS = karras(20, 0.15, 10.0)
"""Down to a level far below the norm of a clip, 6, so that the last prediction is the clip."""
CLIPS = 200


def denoiser(net: nn.Module, **condition: Any) -> NetworkDenoiser:
    """The Denoiser of a network."""
    return from_edm(net, SIGMA_DATA, **condition)


def batch(network: str, n: int, source: torch.Generator) -> tuple[Tensor, ...]:
    """Clips as this network sees them, levels, noise."""
    of = swings(n, source)
    times = {"key frames": KEYS, "windows": torch.arange(EVERY + 1)}.get(network, torch.arange(FRAMES))
    x0 = frames_at(of.along(times))
    return x0, lognormal_sigmas(n, 0.0, 0.9, source), torch.randn(x0.shape, generator=source)


def loss_of(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """The denoising loss (B,); a network that is told key frames is told its first and last, and judged by the others."""
    told, open_ = {}, torch.tensor(1.0)
    if hears(net):
        told, open_ = {"context": context(x0, ENDS)}, (~ENDS).to(x0)[:, None, None, None]
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused attention's backward pass is slow for so few tokens
        return denoising_loss(denoiser(net, **told), x0, sigma, eps, edm_weight(SIGMA_DATA), open_)


def train(network: str, seed: int, steps: int) -> Fit:
    """`training.fit` of one network on one thread; its batches depend on the seed alone."""
    torch.manual_seed(seed)
    net = NETWORKS[network]()
    draw = functools.partial(batch, network, BATCHES[network])
    options = {"lr": RATES[network], "seed": seed, "ema_decay": 0.99, "nhwc": False, "device": "cpu", "progress": False}
    with one_thread():
        return fit(net, draw, loss_of, steps=steps, **options)


def draw(net: nn.Module, frames: int, n: int, seed: int, **condition: Any) -> Tensor:
    """n clips (n, frames, 1, 8, 8)."""
    x = SampleNoise(seed).start((n, frames, 1, SIDE, SIDE), LEVELS[0])
    with one_thread():
        return sample(denoiser(net.eval(), **condition), x, LEVELS, dpm_solver_pp_2m)


def cascade(keys: nn.Module, windows: nn.Module, n: int, seed: int, z: Tensor | None = None) -> Tensor:
    """Key frames (n, 9, 1, 8, 8), drawn or given as z, then all windows; key frames are written over what was drawn there."""
    z = draw(keys, len(KEYS), n, seed) if z is None else z
    ends = torch.zeros(n, WINDOWS, EVERY + 1, *z.shape[2:])
    ends[:, :, 0], ends[:, :, -1] = z[:, :-1], z[:, 1:]
    told = context(ends.flatten(0, 1), ENDS)
    drawn = draw(windows, EVERY + 1, len(told), seed + 1, context=told).unflatten(0, (n, -1))
    return torch.where(ENDS[:, None, None, None], ends, drawn)[:, :, :EVERY].flatten(1, 2)


def clips(method: str, seed: int, n: int = CLIPS) -> Row:
    """One training of a method and what is seen in the clips that it draws.

    seconds  of the processor, in training
    losses   the mean over the last 100 steps of each network
    """
    begun = time.process_time()
    fits = [train(network, seed, STEPS[network]) for network in METHODS[method]]
    seconds, nets = round(time.process_time() - begun, 1), [one.net for one in fits]
    losses = [round(sum(one.losses[-100:]) / 100, 4) for one in fits]
    weights = sum(p.numel() for net in nets for p in net.parameters())
    x = cascade(*nets, n, 1000 + seed) if method == "cascade" else draw(nets[0], FRAMES, n, 1000 + seed)
    row = {"method": method, "seed": seed, "seconds": seconds, "weights": weights, "losses": losses} | judged(x)
    if method == "cascade":
        of = swings(n, generator(3_000_000, seed))
        row["from true key frames"] = judged(cascade(*nets, n, 1000 + seed, frames_at(of.along(KEYS))))
    return row


def bounds(what: str, seed: int, n: int = 500) -> Row:
    """True clips, or true key frames with windows drawn from their exact law."""
    of = swings(n, generator(3_000_000, seed))
    x = frames_at(of.along(torch.arange(FRAMES))) if what == "true" else exact_windows(of, generator(4_000_000, seed))
    return {"what": what, "seed": seed} | judged(x)


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


PARTS: stored.Parts = {
    "bounds": (bounds, [{"what": what, "seed": seed} for what in ("true", "exact windows") for seed in SEEDS]),
    "clips": (clips, [{"method": method, "seed": seed} for seed in SEEDS for method in METHODS]),
}


def main(asked: list[str]) -> None:
    """Measure what is missing of the parts asked for, or of all."""
    stored.run(STORED, COMMAND, PARTS, asked)


if __name__ == "__main__":
    main(sys.argv[1:])
