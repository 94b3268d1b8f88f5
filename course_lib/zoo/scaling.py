"""Between a VAE's own latents and the scaled ones that a diffusion model sees, which have a deviation of about 1."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from course_lib.zoo import ZooError

LARGE = 4.0
"""Deviation from which on latents are taken for unscaled; Stable Diffusion 1's own have 5.5."""


def of(config: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale of a VAE's own latents, (C, 1, 1) or 0-d, of the type of z: its latent = scale z + shift."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(v, device=z.device, dtype=z.dtype).reshape(-1, 1, 1) for v in (mean, std))
    else:
        shift, scale = z.new_tensor(config.get("shift_factor") or 0.0), z.new_tensor(1.0)
    return shift, scale / config.scaling_factor


def check(latents: Tensor, config: Any, device: torch.device, name: str) -> None:
    """Raise ZooError for latents of another shape or device than the model's; warn of those that seem unscaled."""
    channels = config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ZooError(f"latents has shape {tuple(latents.shape)}; expected (B, {channels}, h, w) for model {name!r}")
    if latents.device != device:
        raise ZooError(f"latents is on {latents.device}, model {name!r} on {device}; expected one device: use `.to(...)`")
    size = float(latents.detach().float().square().mean().sqrt())
    if size > LARGE:
        warnings.warn(f"latents has the deviation {size:.3g}; expected about 1, as `encode` scales them", stacklevel=3)
