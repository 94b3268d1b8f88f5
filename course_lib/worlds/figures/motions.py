"""Eight named motions of the figure: single poses and short clips, on feet that do not slide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.worlds.figures.body import ANGLES, HIGH, INDEX, JOINTS, LOW, forward, mirrored

Wave = tuple[float, float, float]
"""Middle and swing in radians, and when in the cycle, in turns: angle = middle + swing sin(2 pi (cycle + when))."""


def _both(name: str, middle: float, swing: float = 0.0, left: float = 0.0, right: float = 0.0) -> dict[str, Wave]:
    return {f"l_{name}": (middle, swing, left), f"r_{name}": (middle, swing, right)}


def _gait(stride: float, bend: float, arms: float, elbow: float, lean: float) -> dict[str, Wave]:
    """Legs and arms in opposite phase; a knee is most bent as its leg swings forwards."""
    return {
        **_both("hip_flex", 0.15 + stride / 4, stride, 0.0, 0.5),
        **_both("knee", 0.1 + bend, bend, 0.8, 0.3),
        **_both("shoulder_flex", 0.0, arms, 0.5, 0.0),
        **_both("elbow", elbow, 0.3 * arms, 0.5, 0.0),
        "spine_twist": (0.0, 0.3 * arms, 0.5),
        "lean": (lean, 0.0, 0.0),
    }


MOTIONS: dict[str, dict[str, Wave]] = {
    "stand": {**_both("shoulder_abd", 0.15), **_both("elbow", 0.3), "turn": (0.0, 0.4, 0.0)},
    "walk": _gait(0.4, 0.35, 0.4, 0.4, 0.05),
    "run": _gait(0.7, 0.7, 0.7, 1.4, 0.25),
    "squat": {
        **_both("hip_flex", 0.8, 0.7),
        **_both("knee", 0.95, 0.8),
        **_both("shoulder_flex", 0.8, 0.6),
        "spine_flex": (0.25, 0.2, 0.0),
    },
    "wave": {
        "r_shoulder_flex": (0.3, 0.0, 0.0),
        "r_shoulder_abd": (1.5, 0.2, 0.0),
        "r_elbow": (1.3, 0.6, 0.25),
        **_both("hip_abd", 0.1),
    },
    "reach": {
        "r_shoulder_flex": (1.5, 0.8, 0.0),
        "r_elbow": (0.5, 0.4, 0.5),
        "spine_flex": (0.25, 0.3, 0.0),
        "spine_twist": (0.2, 0.2, 0.0),
        **_both("knee", 0.3, 0.2),
        **_both("hip_flex", 0.2, 0.15),
    },
    "kick": {
        "r_hip_flex": (0.4, 0.8, 0.0),
        "r_knee": (0.7, 0.6, 0.6),
        "l_knee": (0.25, 0.1, 0.0),
        "l_shoulder_flex": (0.4, 0.5, 0.0),
        **_both("shoulder_abd", 0.5),
        "lean": (-0.05, 0.1, 0.5),
    },
    "jack": {
        **_both("shoulder_abd", 0.9, 0.8),
        **_both("hip_abd", 0.25, 0.2),
        **_both("elbow", 0.3),
        **_both("knee", 0.25, 0.15, 0.5, 0.5),
    },
}
FACTORS: list[dict[str, float]] = [
    {"l_hip_flex": 0.3, "r_hip_flex": 0.3, "l_knee": 0.35, "r_knee": 0.35, "spine_flex": 0.15},  # a crouch
    {"l_hip_flex": 0.2, "r_hip_flex": -0.2, "l_knee": 0.15, "r_knee": -0.15},  # one leg in front
    {"l_shoulder_flex": 0.3, "r_shoulder_flex": 0.3, "l_elbow": 0.2, "r_elbow": 0.2},  # arms raised in front
    {"l_shoulder_flex": 0.25, "r_shoulder_flex": -0.25, "spine_twist": -0.15},
    {"l_shoulder_abd": 0.25, "r_shoulder_abd": 0.25, "l_shoulder_rot": 0.15, "r_shoulder_rot": 0.15},
    {"spine_twist": 0.15, "turn": 0.3, "l_hip_rot": 0.1, "r_hip_rot": -0.1},  # looking to one side
    {"l_hip_abd": 0.12, "r_hip_abd": 0.12, "l_hip_rot": 0.1, "r_hip_rot": 0.1},
    {"lean": 0.1, "spine_flex": 0.15, "nod": -0.15},
    {"roll": 0.07, "spine_side": -0.12, "l_hip_abd": 0.07, "r_hip_abd": -0.07},
]
"""Shared changes of one standard deviation, in radians: what makes two figures in the same motion differ."""
FREE = 0.1
"""Deviation of each angle on its own, in radians."""
FPS = 12.0


def _table(rows: list[dict[str, float]]) -> Tensor:
    out = torch.zeros(len(rows), len(ANGLES))
    for row, values in zip(out, rows, strict=True):
        for name, value in values.items():
            row[INDEX[name]] = value
    return out


_MIDDLE, _SWING, _WHEN = (_table([{n: wave[k] for n, wave in m.items()} for m in MOTIONS.values()]) for k in range(3))
_LOADINGS = _table(FACTORS)


@dataclass
class Clips:
    """Clips of motion: `pose` (N, T, 25), `root` (N, T, 3) in metres, the `motion` of each, (N,), an index of MOTIONS."""

    pose: Tensor
    root: Tensor
    motion: Tensor


def draw_clips(n: int, frames: int = 16, generator: torch.Generator | None = None, motion: Tensor | None = None) -> Clips:
    """n clips of `frames` frames at FPS, of motions drawn evenly or as given, (n,): a random phase, speed, size, figure and side.

    angle(t) = soft(middle + gain swing sin(2 pi (f t + phase + when)) + variation), soft as `within` says. Raises ValueError for
    motions that there are not.
    """
    pose, motion = _moving(n, frames, generator, motion)
    return Clips(pose, grounded(pose), motion)


def _moving(n: int, frames: int, generator: torch.Generator | None, motion: Tensor | None) -> tuple[Tensor, Tensor]:
    if motion is None:
        motion = torch.randint(len(MOTIONS), (n,), generator=generator)
    elif motion.shape != (n,) or not bool(((motion >= 0) & (motion < len(MOTIONS))).all()):
        raise ValueError(f"motion = {motion.tolist()}; expected {n} indices of figures.MOTIONS, 0 to {len(MOTIONS) - 1}")
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=generator)
    seconds = torch.arange(frames)[None, :, None] / FPS
    phase, speed, gain = uniform(0, 1), uniform(0.6, 1.1), uniform(0.6, 1.2)
    factors = torch.randn(n, len(FACTORS), generator=generator)
    variation = factors @ _LOADINGS + FREE * torch.randn(n, len(ANGLES), generator=generator)
    cycle = 2 * math.pi * (phase + speed * seconds + _WHEN[motion][:, None])  # (n, T, 23)
    angles = within(_MIDDLE[motion][:, None] + gain * _SWING[motion][:, None] * cycle.sin() + variation[:, None])
    heading = uniform(-math.pi, math.pi) + uniform(-0.5, 0.5) * seconds  # (n, T, 1), a slow turn
    pose = torch.cat((heading.cos(), heading.sin(), angles), -1)
    return torch.where(uniform(0, 1) < 0.5, pose, mirrored(pose)), motion


def draw_poses(n: int, generator: torch.Generator | None = None, motion: Tensor | None = None) -> Tensor:
    """n poses, (n, 25): single frames of `draw_clips`."""
    return _moving(n, 1, generator, motion)[0][:, 0]


def within(angles: Tensor) -> Tensor:
    """Bring angles (..., 23) into their limits: unchanged in the middle, bent smoothly before each end.

    a' = m + h g((a - m) / h), m and h the middle and half the width of the limits; g(u) = u up to 0.7, and 0.7 + 0.3
    tanh((|u| - 0.7) / 0.3) beyond, with the sign of u.
    """
    low, high = LOW.to(angles), HIGH.to(angles)
    u = (2 * angles - low - high) / (high - low)
    over = (u.abs() - 0.7).clamp_min(0) / 0.3
    return (low + high) / 2 + (high - low) / 2 * u.sign() * (u.abs().clamp_max(0.7) + 0.3 * over.tanh())


def grounded(pose: Tensor) -> Tensor:
    """Root positions (..., T, 3) of a clip (..., T, 25): the lowest toe or ankle is on z = 0 and that foot does not slide.

    The foot that is lower in the first of two frames stands between them. The clip begins above the origin.
    """
    feet = forward(pose)[..., [JOINTS.index(f"{side}_{part}") for side in "lr" for part in ("ankle", "toe")], :]
    height = -feet[..., 2].amin(-1)
    standing = feet[..., 2].argmin(-1)[..., :-1, None, None].expand(*feet.shape[:-3], feet.shape[-3] - 1, 1, 2)
    before, after = (part.gather(-2, standing)[..., 0, :] for part in (feet[..., :-1, :, :2], feet[..., 1:, :, :2]))
    way = torch.cat((torch.zeros_like(feet[..., :1, 0, :2]), (before - after).cumsum(-2)), -2)
    return torch.cat((way, height[..., None]), -1)
