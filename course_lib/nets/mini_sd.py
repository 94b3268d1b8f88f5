"""The parts of `mini-sd`, a Stable Diffusion of a few million weights, all of them classes of diffusers and transformers."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 128
"""Of the text embeddings."""
LENGTH = 32
"""Tokens of a prompt, with the two that mark its ends."""
START, END = "<|startoftext|>", "<|endoftext|>"


def vae() -> AutoencoderKL:
    """64 x 64 pixels <-> 8 x 8 x 4 latents (Rombach et al. 2022, Sec. 3.1), 1.7 million weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Change `vae` in place so that it gives and takes (z - mean) / std for its latents z; mean and std (4,), one a channel.

    The 1 x 1 convolutions about the latents take it in, so pictures stay the same. Stable Diffusion has one scaling factor
    for all channels (Rombach et al. 2022, App. G); here each has unit variance, and the factor is 1.
    """
    mean, std = mean.to(vae.quant_conv.weight), std.to(vae.quant_conv.weight)
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:4] /= std[:, None, None, None]
    out.bias[:4] = (out.bias[:4] - mean) / std
    out.bias[4:] -= 2 * std.log()  # of log variances
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]


def unet(channels: tuple[int, ...] = (64, 96), heads: int = 2) -> UNet2DConditionModel:
    """A U-Net at 8 x 8 and 4 x 4 that attends to the text at both (Rombach et al. 2022, Sec. 3.3)."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=heads,  # the number of heads, whatever diffusers calls it
        norm_num_groups=8,
    )


def tokenizer(words: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token: byte pairs are merged until it is (Sennrich et al. 2016)."""
    pieces = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz"))
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=[letter + "</w>" for letter in letters],  # else numbered, and so ties broken, in another order each time
    )  # fmt: skip
    pieces.train_from_iterator(words, trainer)
    model = json.loads(pieces.to_str())["model"]
    vocab = {token: i for i, token in enumerate((START, END, *model["vocab"]))}
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """The tokens of each prompt, padded: (B, LENGTH) long. Raises ValueError for a prompt that does not fit."""
    rows = tokenizer(prompts, padding="max_length").input_ids
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > LENGTH:
            raise ValueError(f"prompt {prompt!r} has {len(row)} tokens with the two ends; expected at most {LENGTH}")
    return torch.tensor(rows)


def text_encoder(tokens: int, layers: int = 2) -> CLIPTextModel:
    """A CLIP text encoder: prompt tokens (B, LENGTH) -> embeddings (B, LENGTH, WIDTH)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def scheduler() -> DDIMScheduler:
    """The noise levels of Stable Diffusion: sqrt(beta) even from sqrt(0.00085) to sqrt(0.012) in 1,000 steps; predicts v."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # of no effect here, but diffusers warns of any other
        timestep_spacing="trailing",  # begins at the last level, whatever the number of steps (Lin et al. 2024, Sec. 3.3)
    )


class Compressor(nn.Module):
    """The VAE as one network for training: (x (B, 3, H, W), eps (B, 4, H/8, W/8)) -> (reconstruction, KL (B,)).

    z = mean + std eps; the KL divergence of N(mean, std^2) from N(0, 1), in nats a latent number (Kingma and Welling 2014).
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        of = self.vae.encode(x).latent_dist
        mean, logvar = of.mean.float(), of.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).mean(1)
        return self.vae.decode(mean + (0.5 * logvar).exp() * eps).sample, kl


class TextReader(nn.Module):
    """A text encoder that is to say what a prompt names: token ids (B, LENGTH) -> logits (B, outputs), from the first end mark.

    What stands there is also CLIP's summary of a prompt (Radford et al. 2021, Sec. 2.4).
    """

    def __init__(self, text_encoder: CLIPTextModel, outputs: int):
        super().__init__()
        self.text_encoder, self.head = text_encoder, nn.Linear(WIDTH, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        end = (ids == self.text_encoder.config.eos_token_id).int().argmax(1)
        return self.head(self.text_encoder(ids)[0][torch.arange(len(ids), device=ids.device), end])


class TextToLatent(nn.Module):
    """U-Net and text encoder as one network: (c_in x (B, 4, 8, 8), t (B,), token ids (B, LENGTH)) -> prediction (B, 4, 8, 8)."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, time, encoder_hidden_states=self.text_encoder(ids)[0], return_dict=False)[0]


class MiniSD(nn.Module):
    """All weights of the pipeline."""

    def __init__(self, vae: AutoencoderKL, generator: TextToLatent, words: list[str]):
        super().__init__()
        self.vae, self.generator, self.words = vae, generator, words

    def pipeline(self) -> Any:
        """The diffusers pipeline of these weights."""
        from diffusers import StableDiffusionPipeline

        with torch.no_grad():
            return StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.generator.text_encoder,
                tokenizer=tokenizer(self.words),
                unet=self.generator.unet,
                scheduler=scheduler(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
