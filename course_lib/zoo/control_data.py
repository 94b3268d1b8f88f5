"""What controls are trained and judged on: scenes as `mini-sd` sees them, beside their condition maps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib import zoo
from course_lib.devices import autocast
from course_lib.nets import mini_sd as nets
from course_lib.training import write_atomically
from course_lib.worlds.scenes.captions import vocabulary
from course_lib.worlds.scenes.dataset import CHUNK, VERSION, SceneDataset, cache_folder
from course_lib.worlds.scenes.maps import STYLES, as_map, canny, classes, edge_map, nearness, segmentation_map
from course_lib.worlds.scenes.render import Rendered, render
from course_lib.worlds.scenes.scribbles import scribbles

WORDINGS = 4
"""Captions of each scene."""
LAYERS = ("lines", "scribbles", "canny", "near", "classes")
"""What is kept of each scene beside its latent: maps of one byte a pixel."""


@dataclass
class Mapped:
    """Scenes 0, ..., n - 1 of a seed: latents' mean and std (N, 4, 8, 8), tokens (N, WORDINGS, LENGTH), maps (N, 64, 64) uint8.

    maps  by the names of LAYERS: lines, sketches and Canny's lines in {0, ..., 255}; 255 times the nearness; classes
    """

    of: SceneDataset
    mean: Tensor
    std: Tensor
    ids: Tensor
    maps: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, rows: Tensor, noise: Tensor) -> Tensor:
        """A draw of the posterior of each of these scenes, (B, 4, 8, 8)."""
        return self.mean[rows] + self.std[rows] * noise

    def condition(self, kind: str, rows: Tensor) -> Tensor:
        """The condition maps (B, 3, 64, 64) in [0, 1] of these scenes: a name of LAYERS."""
        layer = self.maps[kind][rows]
        return segmentation_map(layer.long()) if kind == "classes" else as_map(layer[:, None].float() / 255)


def tokens(prompts: list[str]) -> Tensor:
    """The tokens that `mini-sd` makes of prompts, (B, LENGTH)."""
    return nets.token_ids(nets.tokenizer(vocabulary()), prompts)


def sketch(seen: Rendered, seed: int, first: int) -> Tensor:
    """Sketches (N, 1, H, W) from exact to shaky and broken, so that a network meets every hand; scene i has its own."""
    lines = edge_map(seen)[:, :1]
    kinds = [(0.4, 0.0), (1.0, 0.15), (1.5, 0.3)]
    drawn = torch.stack([scribbles(lines, seed, first, wobble, dropped) for wobble, dropped in kinds])
    rows = torch.arange(len(lines))
    return drawn[(rows + first) % len(kinds), rows]


@torch.no_grad()
def mapped(n: int, seed: int, style: str | None = None, split: str = "train") -> Mapped:
    """The first n scenes of a seed, of one or two objects, ready to train on; kept in the cache, for there are several trainings.

    style  of the pictures, a name of `maps.STYLES`, or None for the world's own; the maps stay as they are
    """
    of = SceneDataset(n, seed, objects=(1, 2), split=split)
    words = f"{n} {seed} {style} {split} {VERSION} {zoo.card('mini-sd')['sha256']}"
    kept = cache_folder() / "controls" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.pt"
    if not kept.exists():
        write_atomically(kept, lambda path: torch.save(_build(of, style), path))
    mean, std, maps = torch.load(kept, weights_only=True)
    ids = torch.stack([tokens(of.captions(wording)) for wording in range(WORDINGS)], 1)
    return Mapped(of, mean.float(), std.float(), ids, maps)


def _build(of: SceneDataset, style: str | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model, found = zoo.load("mini-sd"), []
    for rows in tqdm(torch.arange(len(of)).split(CHUNK), desc="scenes and their maps", unit="batch"):
        scenes, first = of.scenes[rows], int(rows[0])
        seen = render(scenes, of.size)
        pictures = STYLES[style](scenes, of.size) if style else seen.rgb
        with autocast(model.device):
            posterior = model.vae.encode(pictures.to(model.device)).latent_dist
        layers = {
            "lines": edge_map(seen)[:, 0],
            "scribbles": sketch(seen, of.seed, first)[:, 0],
            "canny": canny(seen.rgb)[:, 0],
            "near": nearness(seen.depth)[:, 0],
        }
        layers = {name: (255 * layer).round().byte() for name, layer in layers.items()} | {
            "classes": classes(seen, scenes).byte()
        }
        found.append((posterior.mean.half().cpu(), posterior.std.half().cpu(), layers))
    means, stds, layers = zip(*found, strict=True)
    return torch.cat(means), torch.cat(stds), {name: torch.cat([part[name] for part in layers]) for name in LAYERS}
