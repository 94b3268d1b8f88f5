"""What `mini-video` does in use: mixing, noise, guidance, frames that are known, and rules that make known what it was not told.

`python -m course_lib.zoo.videos` (or `... mixing known`) measures what `videos.json` has not yet, row by row; `rows(part)` reads
it. Prompts and judges are those of `judge_video`: settings are compared on its validation clips, and what is claimed is measured
on its test clips with three seeds of noise.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from course_lib import zoo
from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import cfg
from course_lib.video.conditioning import fill
from course_lib.video.inflation import mixed
from course_lib.video.masks import every, first
from course_lib.video.noise import correlated
from course_lib.worlds.scenes.clips import RenderedClips, render_clips
from course_lib.zoo import stored
from course_lib.zoo.judge_video import STEPS, W, clips, judged
from course_lib.zoo.stored import Row
from course_lib.zoo.video import PretrainedVideo, clips_of, frames_of
from course_lib.zoo.video_data import FRAMES, SIDE

STORED = Path(__file__).with_name("videos.json")
COMMAND = "python -m course_lib.zoo.videos"
SEEDS = (0, 1, 2)
MIXINGS = (0.0, 0.5, 1.0)
NOISES = (0.0, 2.0, 10.0, 20.0, 40.0)
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
KEYS: dict[str, Tensor] = {
    "every third": every(FRAMES, 3),
    "both ends": every(FRAMES, FRAMES - 1),
    "first": first(FRAMES, 1),
    "first two": first(FRAMES, 2),
}
"""Which frames of a clip are known."""
MOVING = ("slide", "bounce", "spin")
"""Motions of the object itself."""
MOVED = 24
"""How many clips of these motions are used of a split."""
STRENGTHS = (1.0, 2.0, 4.0)
"""Strengths of reconstruction guidance that are compared."""
RULED = ("every third",)
RULES = ("told", "replacement", "reconstruction guidance")


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


@functools.cache
def model() -> PretrainedVideo:
    """The model that is measured."""
    return zoo.load("mini-video", device="cpu")


def _asked(split: str, w: float = W, shared: float | None = None, m: float = 1.0) -> Row:
    with mixed(model().denoiser.net, m):
        return judged(clips_of(model(), clips(split).captions, w, 0, STEPS, shared), split)


def mixing(m: float) -> Row:
    """The validation prompts with each temporal layer's share multiplied by m."""
    return {"m": m} | _asked("validation", m=m)


def noise(shared: float) -> Row:
    """The validation prompts from noise of which frames have this much in common, under guidance 3, as of pictures."""
    return {"shared": shared} | _asked("validation", w=3.0, shared=shared)


def start(above: bool) -> Row:
    """The validation prompts with, or without, the levels above those of the image model."""
    one = model() if above else replace(model(), above=())
    return {"above": above} | judged(clips_of(one, clips("validation").captions, W, 0, STEPS), "validation")


def guidance(w: float) -> Row:
    """The validation prompts under this guidance."""
    return {"w": w} | _asked("validation", w=w)


# --- frames that are known -----------------------------------------------------------------------------------------------


@functools.cache
def moving(split: str) -> tuple[list[str], RenderedClips, Tensor]:
    """Captions, renders, and latents of the first clips of a split in which the object itself moves."""
    of = clips(split)
    at = torch.tensor([i for i, word in enumerate(of.words) if word in MOVING][:MOVED])
    true = render_clips(of.of[at], SIDE)
    with torch.no_grad():
        z = torch.cat([model().image.encode(some) for some in true.rgb.flatten(0, 1).split(64)])
    return [of.captions[i] for i in at.tolist()], true, z.unflatten(0, true.rgb.shape[:2])


def on_object(x: Tensor, true: RenderedClips, frames: Tensor) -> float:
    """PSNR in dB of these frames (T,) of clips x over the pixels of the object, the mean over clips."""
    where = (true.segmentation > 0)[:, frames]  # (N, t, 1, H, W)
    error = ((x - true.rgb)[:, frames].square().mean(2, keepdim=True) * where).flatten(1).sum(1) / where.flatten(1).sum(1)
    return round(float((10 * torch.log10(4 / error)).mean()), 3)


def blend(x: Tensor, known: Tensor) -> Tensor:
    """Clips (N, T, ...) whose frames that are not known are blended of the known ones around them, linear in time."""
    at = known.nonzero().flatten().tolist()
    out = x.clone()
    for i in (~known).nonzero().flatten().tolist():
        before, after = max((k for k in at if k < i), default=None), min((k for k in at if k > i), default=None)
        if before is None or after is None:
            out[:, i] = x[:, after if before is None else before]  # only one side is known: that frame again
        else:
            share = (i - before) / (after - before)
            out[:, i] = (1 - share) * x[:, before] + share * x[:, after]
    return out


def _between(known: Tensor) -> Tensor:
    """The frames that are asked for: between key frames, or after the first ones."""
    at = known.nonzero().flatten()
    last = int(at.max()) if int(at.max()) + 1 > len(at) else len(known)
    return (~known) & (torch.arange(len(known)) < last)


def known_guidance(w: float) -> Row:
    """PSNR on the object under this guidance, every third frame of validation clips known."""
    captions, true, z = moving("validation")
    known = KEYS["every third"]
    x = clips_of(model(), captions, w, 0, STEPS, known=known, z=z)
    return {"w": w, "psnr": on_object(x, true, _between(known))}


def known_w() -> float:
    """The guidance that is best on validation clips where frames are known."""
    return max(rows("known guidance"), key=lambda row: row["psnr"])["w"]


def known(keys: str, seed: int) -> Row:
    """PSNR on the object of frames that are drawn, of key frames blended, and of the true frames through the VAE."""
    captions, true, z = moving("test")
    asked = _between(KEYS[keys])
    x, through = clips_of(model(), captions, known_w(), seed, STEPS, known=KEYS[keys], z=z), frames_of(model(), z)
    found = {"drawn": x, "blended": blend(through, KEYS[keys]), "reconstructed": through}
    return {"keys": keys, "seed": seed} | {name: on_object(one, true, asked) for name, one in found.items()}


def _filled(keys: str, seed: int, w_r: float, split: str) -> Tensor:
    """Clips in which the known frames are put by `fill`; the model is told of none."""
    captions, _, z = moving(split)
    made, sigmas = [], model().sigmas(STEPS)
    for i in range(0, len(captions), 8):
        some = captions[i : i + 8]
        source = SampleNoise(seed, i)

        def shared(like: Tensor, source: SampleNoise = source) -> Tensor:
            return correlated(source(like), model().shared)

        pair = [model().denoiser.given(**model().embed(said)) for said in (some, [""] * len(some))]
        x = model().image.start(shared(torch.empty(len(some), *model().shape)), sigmas[0])
        with autocast("cpu"):
            x = fill(cfg(*pair, known_w()), x, sigmas, z[i : i + 8], KEYS[keys], shared, w_r=w_r)
        made.append(frames_of(model(), x.detach().float()))
    return torch.cat(made)


def strength(w_r: float) -> Row:
    """PSNR on the object under reconstruction guidance of this strength, every third frame of validation clips known."""
    keys = RULED[0]
    x = _filled(keys, 0, w_r, "validation")
    return {"w_r": w_r, "psnr": on_object(x, moving("validation")[1], _between(KEYS[keys]))}


def rule(keys: str, rule: str, seed: int) -> Row:
    """Of test clips with known frames: PSNR on the object, and how far neighbouring frames lie apart where known ones end.

    jump  mean |x_(k+1) - x_k| over pairs of which one frame is known, over that of the true clips through the VAE
    """
    captions, true, z = moving("test")
    if rule == "told":
        x = clips_of(model(), captions, known_w(), seed, STEPS, known=KEYS[keys], z=z)
    else:
        best = max(rows("strength"), key=lambda row: row["psnr"])["w_r"]
        x = _filled(keys, seed, best if rule == "reconstruction guidance" else 0.0, "test")
    border = KEYS[keys][1:] != KEYS[keys][:-1]
    apart = [float(one.diff(dim=1)[:, border].abs().mean()) for one in (x, frames_of(model(), z))]
    return {
        "keys": keys,
        "rule": rule,
        "seed": seed,
        "psnr": on_object(x, true, _between(KEYS[keys])),
        "jump": round(apart[0] / apart[1], 4),
    }


PARTS: stored.Parts = {
    "mixing": (mixing, [{"m": m} for m in MIXINGS]),
    "noise": (noise, [{"shared": a} for a in NOISES]),
    "start": (start, [{"above": above} for above in (False, True)]),
    "guidance": (guidance, [{"w": w} for w in GUIDANCES]),
    "known guidance": (known_guidance, [{"w": w} for w in (1.0, 1.5, 3.0)]),
    "known": (known, [{"keys": keys, "seed": seed} for keys in KEYS for seed in SEEDS]),
    "strength": (strength, [{"w_r": w_r} for w_r in STRENGTHS]),
    "rules": (rule, [{"keys": keys, "rule": one, "seed": seed} for keys in RULED for one in RULES for seed in SEEDS]),
}


def main(asked: list[str]) -> None:
    """Measure what is missing of the parts asked for, or of all."""
    stored.run(STORED, COMMAND, PARTS, asked)


if __name__ == "__main__":
    main(sys.argv[1:])
