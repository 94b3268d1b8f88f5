"""Whether a motion module that was learnt on `mini-sd` moves it, and moves a personalised model without a loss of its style."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib import zoo
from course_lib.video import measures
from course_lib.zoo.judge_style import styled
from course_lib.zoo.judge_video import STEPS, clips, judged, judges, motions, per_frame, real, scenes_of
from course_lib.zoo.video import PretrainedVideo, clips_of

W = 3.0
"""Guidance, as of pictures of `mini-sd`."""
CLIPS = 100
"""How many prompts of the test split are animated."""
BASES = ("mini-sd", "mini-style")


def animated(model: PretrainedVideo, base: str, n: int = CLIPS, seed: int = 0, w: float = W) -> Tensor:
    """Clips (n, F, 3, 64, 64) of `base` with these temporal layers; the prompts say nothing of motion."""
    return clips_of(model.on(zoo.load(base, device="cpu")), scenes_of("test")[:n], w, seed, STEPS)


def facts(x: Tensor) -> dict[str, float]:
    """Of clips of the first prompts of the test split: shares of frames with the right shape and colour (`identity`) and in the
    style of `mini-style`; `moving`, share in which any motion is read; flicker and smoothness, see `measures`."""
    reader = judges()[1]
    kept = measures.identity(x, reader, clips("test").wanted[: len(x)])["both"]
    found = {
        "identity": kept.float().mean(),
        "style": styled(x.flatten(0, 1)).float().mean(),
        "moving": torch.tensor([word != "" for word in motions().read(x).word]).float().mean(),
        "smoothness": measures.smoothness(x, reader).mean(),
    }
    rounded = {name: round(float(value), 4) for name, value in found.items()}
    return rounded | {"flicker": round(float(measures.flicker(x).mean()), 5)}


def judge(model: PretrainedVideo) -> dict[str, Any]:
    """Of `mini-sd` and `mini-style`, animated and frame by frame without the module; Frechet video distance of the first."""
    found: dict[str, Any] = {"guidance": W, "steps": STEPS, "clips": CLIPS}
    reader = judges()[1]
    for base in BASES:
        x = animated(model, base)
        found[base] = facts(x)
        found[f"{base}, frame by frame"] = facts(per_frame(model.on(zoo.load(base, device="cpu")), "test", n=CLIPS, w=W))
        if base == "mini-sd":
            found[base]["frechet"] = round(measures.frechet_video_distance(real(), x, reader), 4)
    return found


def judge_lora(model: PretrainedVideo, word: str, way: str) -> dict[str, Any]:
    """Of `mini-sd` and `mini-style`: how often the motion that a MotionLoRA was learnt from is read, word and direction."""
    found: dict[str, Any] = {"guidance": W, "steps": STEPS, "clips": CLIPS}
    for base in BASES:
        x = animated(model, base)
        moved = judged(x, "test", [word] * len(x), [way] * len(x))
        found[base] = facts(x) | {name: moved[name] for name in ("word", "direction", "tracked")}
    return found
