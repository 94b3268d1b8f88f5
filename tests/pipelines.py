"""Tiny pipelines of diffusers with random weights, of the same classes as the large ones, their tokenizers included."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TOKENS = 16
"""The longest prompt, with the two marks of its ends."""
WORDS = {"red": ["re", "red</w>"], "cube": ["cu", "be</w>", "cube</w>"]}
PROMPTS = ["a red cube", "a blue ball"]
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE = {**SCALED, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""The scheduler's options of Stable Diffusion."""


def tokenizer(length: int = TOKENS) -> CLIPTokenizer:
    """Letters, and the two words of WORDS as one token each."""
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase + ","]
    pieces = [piece for parts in WORDS.values() for piece in parts]
    tokens = dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *letters, *pieces])
    merges = [("r", "e"), ("re", "d</w>"), ("c", "u"), ("b", "e</w>"), ("cu", "be</w>")]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=length)


def text_encoder(projected: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    """Two pixels to a latent, along each side."""
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def unet(width: int, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def stable_diffusion(prediction: str = "epsilon", scheduler: Any = None, **vae_options: Any) -> StableDiffusionPipeline:
    """As Stable Diffusion 1.5 (epsilon) and 2.1 (v_prediction)."""
    return StableDiffusionPipeline(
        vae=vae(**vae_options),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(16),
        scheduler=scheduler or DDIMScheduler(prediction_type=prediction, **STABLE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(scheduler: Any = None, zeros: bool = True, **vae_options: Any) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, **vae_options),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projected=True, seed=3),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            use_linear_projection=True,
        ),
        scheduler=scheduler or DDIMScheduler(**STABLE),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    torch.manual_seed(5)
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = T5TokenizerFast(vocab=specials + [(letter, -3.0) for letter in string.ascii_lowercase], extra_ids=0)
    config = T5Config(vocab_size=len(words), d_model=40, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), words


def stable_diffusion_3(scheduler: Any = None, with_t5: bool = True) -> StableDiffusion3Pipeline:
    third, words = t5() if with_t5 else (None, None)
    torch.manual_seed(4)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder(projected=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projected=True, seed=3),
        tokenizer_2=tokenizer(),
        text_encoder_3=third,
        tokenizer_3=words,
    )


def ddpm(scheduler: Any = None) -> DDPMPipeline:
    """Three channels of pixels, no text."""
    torch.manual_seed(6)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=4, **blocks,
    ).eval()  # fmt: skip
    return DDPMPipeline(net, scheduler or DDPMScheduler(clip_sample=False))


def save_each(folder: Path) -> Path:
    """One pipeline of each kind in `folder`: sd, xl, sd3 and ddpm."""
    for name, make in {"sd": stable_diffusion, "xl": stable_diffusion_xl, "sd3": stable_diffusion_3, "ddpm": ddpm}.items():
        make().save_pretrained(folder / name)
    return folder
