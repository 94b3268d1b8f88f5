"""`scenes-motion`: reads which motion a clip of the scene world shows, and which way, or that it shows none.

A second judge beside `tracking`, which holds a clip against the exact geometry of each motion. This one is learnt from true
clips, half of them through `mini-sd`'s VAE, that are blurred, noisy and of unsteady brightness, so that it reads what a model
draws. Frozen clips, shuffled ones and such of several scenes teach it what is no motion.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import zoo
from course_lib.nets.motion_reader import MotionNet
from course_lib.training import Fit, fit
from course_lib.video.tracking import shares
from course_lib.worlds.scenes.clip_captions import directions
from course_lib.worlds.scenes.clips import MOTIONS, Clips, draw_clips
from course_lib.zoo.motion_reader import CLASSES, NOTHING, MotionReader
from course_lib.zoo.recipes.scenes_reader import degrade
from course_lib.zoo.recipes.settings import settings
from course_lib.zoo.video_data import FRAMES, pictures

DATA = "4,000 training clips of seed 81, one object, every second through the VAE of mini-sd; mirrored, reversed and degraded"
CLIPS, SEED = 4_000, 81
TESTING = (400, 9_801)
TRAINING: dict[str, Any] = {"steps": 3_000, "lr": 2e-3, "seed": 81}
BATCH = 24
STILL, SHUFFLED, SEVERAL = 0.1, 0.1, 0.05
"""Shares of clips that are made frozen, shuffled, and of frames of several clips."""
OTHER = {"left": "right", "right": "left", "in": "out", "out": "in", "": ""}


def network(name: str = "scenes-motion") -> MotionNet:
    """The untrained network."""
    return MotionNet(len(CLASSES))


def wrap(net: nn.Module) -> MotionReader:
    """What `zoo.load` returns."""
    return MotionReader(net)


def labels(of: Clips) -> Tensor:
    """The number in CLASSES of each clip's motion, (N,)."""
    words = [MOTIONS[motion] for motion in of.motion.tolist()]
    return torch.tensor([CLASSES.index(pair) for pair in zip(words, directions(of), strict=True)])


@functools.cache
def turned() -> tuple[Tensor, Tensor]:
    """The class of a clip of each class when it is mirrored, and when it runs backwards."""
    mirrored = [(word, way if word == "zoom" else OTHER[way]) for word, way in CLASSES]
    back = [(word, OTHER[way]) for word, way in CLASSES]
    return tuple(torch.tensor([CLASSES.index(pair) for pair in pairs]) for pairs in (mirrored, back))


def through_vae(x: Tensor) -> Tensor:
    """Clips (N, F, 3, H, W) through the VAE of `mini-sd`."""
    model = zoo.load("mini-sd", device="cpu")
    with torch.no_grad():
        return torch.cat([model.decode(model.encode(some)) for some in x.flatten(0, 1).split(64)]).view_as(x)


def in_bytes(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as bytes, which take a quarter of the memory."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips in bytes and their labels; every second went through the VAE."""
    of = draw_clips(n, seed, objects=1, frames=FRAMES)
    parts = []
    for rows in torch.arange(n).split(50):
        x = pictures(of[rows])
        x[1::2] = through_vae(x[1::2])
        parts.append(in_bytes(x))
    return torch.cat(parts), labels(of)


def varied(x: Tensor, label: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips (B, F, 3, H, W) mirrored, reversed, frozen, shuffled or mixed, and what they then show."""
    n, frames = x.shape[:2]
    mirror, back = torch.rand(2, n, generator=source) < 0.5
    x = torch.where(mirror[:, None, None, None, None], x.flip(-1), x)
    x = torch.where(back[:, None, None, None, None], x.flip(1), x)
    mirrored, backwards = turned()
    label = torch.where(mirror, mirrored[label], label)
    label = torch.where(back, backwards[label], label)
    kind, order = torch.rand(n, generator=source), torch.rand(n, frames, generator=source).argsort(1)
    still, shuffled = kind < STILL, (kind >= STILL) & (kind < STILL + SHUFFLED)
    several = (kind >= STILL + SHUFFLED) & (kind < STILL + SHUFFLED + SEVERAL)
    at = torch.where(still[:, None], order[:, :1], torch.where(shuffled[:, None], order, torch.arange(frames)))
    rows = torch.where(several[:, None], torch.randint(n, (n, frames), generator=source), torch.arange(n)[:, None])
    return x[rows, at], torch.where(still | shuffled | several, NOTHING, label)


def train(
    name: str = "scenes-motion",
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> Fit:
    """Minimise the cross-entropy of the motion of degraded clips."""
    x, label = data(CLIPS, SEED)

    def draw(source: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (BATCH,), generator=source)
        clips, shown = varied(x[rows].float() / 127.5 - 1, label[rows], source)
        return degrade(clips.flatten(0, 1), source).view_as(clips), shown

    def loss(net: nn.Module, clips: Tensor, shown: Tensor) -> Tensor:
        return F.cross_entropy(net(clips).float(), shown, reduction="none")

    chosen = settings(TRAINING, steps=steps, lr=lr, seed=seed)
    torch.manual_seed(chosen["seed"])
    net = network(name) if net is None else net
    return fit(net, draw, loss, weight_decay=0.02, ema_decay=0.998, nhwc=False, **chosen, **options)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Share of held-out clips whose motion, and direction, is read right: true ones, these through the VAE, shuffled, frozen."""
    reader = MotionReader(net)
    of = draw_clips(*TESTING, objects=1, frames=FRAMES)
    x = pictures(of)
    words, ways = [MOTIONS[motion] for motion in of.motion.tolist()], directions(of)
    order = torch.rand(len(x), FRAMES, generator=torch.Generator().manual_seed(0)).argsort(1)
    sets = {
        "true": x,
        "reconstructed": through_vae(x),
        "shuffled": x[torch.arange(len(x))[:, None], order],
        "frozen": x[:, :1].expand_as(x),
    }
    found = {kind: shares(reader.read(clips), words, ways) for kind, clips in sets.items()}
    return {"clips": len(x)} | {kind: {key: round(value, 4) for key, value in row.items()} for kind, row in found.items()}
