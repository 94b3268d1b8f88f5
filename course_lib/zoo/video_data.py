"""What video models are trained on: clips as `mini-sd` sees their frames, and what captions say of scene and motion."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib import zoo
from course_lib.devices import autocast
from course_lib.training import write_atomically
from course_lib.worlds.scenes.clip_captions import motion_captions
from course_lib.worlds.scenes.clips import Clips, draw_clips
from course_lib.worlds.scenes.dataset import CHUNK, VERSION, cache_folder
from course_lib.worlds.scenes.render import render
from course_lib.zoo.control_data import WORDINGS, tokens

FRAMES, SIDE = 8, 64
LATENT = 4
"""Channels of a latent of `mini-sd`."""
SHARED = 40.0
"""a of the noise that the frames of a clip have in common, see `video.noise`, at the start of sampling: a
correlation of 0.9994, which was best on validation clips, see `zoo.videos`."""


@dataclass
class Filmed:
    """Clips 0, ..., n - 1 of a seed: latents' mean and std (N, F, 4, 8, 8), tokens of two texts (N, WORDINGS, LENGTH).

    scene   of the caption of the first frame, which is all that an image model is told
    motion  of what moves, and how
    """

    of: Clips
    mean: Tensor
    std: Tensor
    scene: Tensor
    motion: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, rows: Tensor) -> Filmed:
        """The clips of an index tensor or a mask."""
        return Filmed(self.of[rows], self.mean[rows], self.std[rows], self.scene[rows], self.motion[rows])

    def latents(self, rows: Tensor, noise: Tensor) -> Tensor:
        """A draw of the posterior of each frame of these clips, (B, F, 4, 8, 8)."""
        return self.mean[rows] + self.std[rows] * noise


def texts(caption: str) -> tuple[str, str]:
    """What the caption of a clip says of its first frame, and of its motion: "a red cube", "spinning"."""
    scene, _, motion = caption.rpartition(", ")
    return scene, motion


def pictures(clips: Clips, side: int = SIDE) -> Tensor:
    """The frames of clips, (N, F, 3, side, side) in [-1, 1]."""
    scenes, view = clips.states()
    return render(scenes, side, view=view).rgb.unflatten(0, (len(clips), clips.frames))


@torch.no_grad()
def filmed(n: int, seed: int, frames: int = FRAMES, motion: str | None = None, split: str = "train", side: int = SIDE) -> Filmed:
    """The first n clips of a seed, of one object and any motion or one, ready to train on; kept in the cache."""
    of = draw_clips(n, seed, motion, objects=1, split=split, frames=frames)
    words = f"clips {n} {seed} {frames} {motion} {split} {VERSION} {zoo.card('mini-sd')['sha256']}"
    words += f" {side}" if side != SIDE else ""
    kept = cache_folder() / "clips" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.pt"
    if not kept.exists():
        write_atomically(kept, lambda path: torch.save(_encoded(of, side), path))
    mean, std = torch.load(kept, weights_only=True)
    said = [[texts(caption) for caption in motion_captions(of, seed + wording)] for wording in range(WORDINGS)]
    scene, motions = (torch.stack([tokens([pair[k] for pair in row]) for row in said], 1) for k in range(2))
    return Filmed(of, mean.float(), std.float(), scene, motions)


def _encoded(of: Clips, side: int) -> tuple[Tensor, Tensor]:
    """Mean and std of the latents of all frames, (N, F, 4, side / 8, side / 8) in half precision."""
    model, means, stds = zoo.load("mini-sd"), [], []
    for rows in tqdm(torch.arange(len(of)).split(CHUNK // of.frames), desc="clips", unit="batch"):
        x = pictures(of[rows], side)
        with autocast(model.device):
            posterior = model.vae.encode(x.flatten(0, 1).to(model.device)).latent_dist
        means.append(posterior.mean.half().cpu().unflatten(0, x.shape[:2]))
        stds.append(posterior.std.half().cpu().unflatten(0, x.shape[:2]))
    return torch.cat(means), torch.cat(stds)
