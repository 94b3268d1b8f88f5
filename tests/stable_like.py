"""A small U-Net with the blocks of Stable Diffusion, for parity with diffusers, and how close two networks of its kind are."""

import torch
from diffusers import UNet2DConditionModel

CLOSE = 1e-5
"""Relative: fp32 networks of some ten layers round by about 2^-21 = 5e-7 of the largest number."""


def stable_like(**options) -> UNet2DConditionModel:
    """The blocks of Stable Diffusion 1.5, of few channels: the last attends to nothing, and each has two layers."""
    torch.manual_seed(2)
    settings = {
        "sample_size": 8,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**settings | options).eval()
