"""Pretrained pipelines of diffusers as one kind of object, in the course's coordinate x = x0 + sigma eps.

What a pipeline does inside its loop is taken apart here: a Denoiser, a grid, the embedding of prompts, and the way
between pictures and latents. The loop, the steps and the guidance are those of the course.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser, discrete_of, from_diffusers
from course_lib.devices import channels_last, pick_device
from course_lib.schedules import Flow, Schedule
from course_lib.types import float64
from course_lib.zoo import ZooError, folders, scaling
from course_lib.zoo.hub import instead

SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "DDPMPipeline")
OPTIONAL = (*folders.UNUSED, "text_encoder_3", "tokenizer_3")
"""Components without which a pipeline works: Stable Diffusion 3 may be saved without its largest text encoder."""
TOP = 1e6
"""Where the grid of a flow starts, instead of at sigma = infinity: the pictures differ by about 1e-6."""
T5_TOKENS = 256
"""The longest prompt that the third text encoder of Stable Diffusion 3 is given."""


def _worth_saying(record: logging.LogRecord) -> bool:
    return "ImageProcessor` requires torchvision (not installed)" not in record.getMessage()


# Pipelines of diffusers import image processors of transformers, which no model here uses; transformers then says that they
# fall back to PIL because there is no torchvision. The course does without it, and to a student the line reads like a fault.
logging.getLogger("transformers.utils.import_utils").addFilter(_worth_saying)


@dataclass(frozen=True)
class Pretrained:
    """A pretrained pipeline: Denoiser, noise levels, text encoders and VAE.

    pipeline   the diffusers pipeline that holds the weights; its own call still works
    denoiser   D(x, sigma) over latents (or pixels); `denoiser.given(**model.embed(prompts))` gives the prompts
    schedule   times and levels: the trained table of alpha_bar, or the straight line of a flow
    shape      of one x at the model's own size, (C, H, W); `pixels` is the side of its picture
    clip       the pipeline's own sampler clamps x0 to [-clip, clip] at each step; None where it does not
    words      the words that a tokenizer of whole words knows; None where any word can be spelled
    """

    name: str
    pipeline: Any
    denoiser: NetworkDenoiser
    schedule: Schedule
    shape: tuple[int, int, int]
    pixels: int
    clip: float | None = None
    words: frozenset[str] | None = None
    _reported: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def components(self) -> dict[str, Any]:
        """Networks, tokenizers and scheduler by the names that diffusers gives them; those left out are None."""
        return self.pipeline.components

    @property
    def net(self) -> nn.Module:
        """The network that denoises: a U-Net, or a transformer."""
        return _network(self.pipeline)

    @property
    def vae(self) -> nn.Module | None:
        """The autoencoder; None for a model of pixels."""
        return self.components.get("vae")

    @property
    def scheduler(self) -> Any:
        """The scheduler that the pipeline came with."""
        return self.pipeline.scheduler

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device

    @property
    def sigma_max(self) -> float:
        """The largest trained noise level; for a flow the level that stands for infinity."""
        return TOP if isinstance(self.schedule, Flow) else float(self.schedule.sigma(self.schedule.t_max))

    @property
    def factor(self) -> int:
        """Pixels to a latent, along each side; 1 for a model of pixels."""
        return _factor(self.pipeline)

    def to(self, device: str | torch.device) -> Pretrained:
        """Move all networks, in place; returns the model itself."""
        self.pipeline.to(device)
        return self

    # --- noise levels ------------------------------------------------------------------------------------------------

    def sigmas(self, n: int) -> Tensor:
        """The levels that the pipeline's own scheduler visits in n steps, strictly falling: (n + 1,) CPU float64.

        The last is 0, or the first trained level where the scheduler has set_alpha_to_one = False. Levels that occur twice
        count once. With spacing "linspace" diffusers' DDIM steps to other levels than it visits next: these are those visited.
        """
        steps = int(self.scheduler.config.num_train_timesteps)
        if not 1 <= n <= steps:
            raise ValueError(f"n = {n}; expected from 1 to {steps} steps, as many as model {self.name!r} was trained on")
        scheduler = copy.deepcopy(self.scheduler)  # set_timesteps would change the pipeline's own
        shift = {"mu": self._shift()} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(n, **shift)
        if isinstance(self.schedule, Flow):
            levels = self.schedule.sigma(float64(scheduler.sigmas).clamp_max(1 - 1 / TOP))
        elif hasattr(scheduler, "sigmas"):  # the family of k-diffusion, which may have its own spacing
            levels = float64(scheduler.sigmas)
        else:
            ends_at_zero = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1
            visited = self.schedule.sigma(float64(scheduler.timesteps))  # held at its ends: an offset may lead beyond
            levels = torch.cat([visited, visited.new_zeros(1) if ends_at_zero else self.schedule.sigma(torch.zeros(1))])
        return levels.unique().flip(0)

    def _shift(self) -> float:
        """The shift of a flow's times that grows with the number of tokens (Esser et al. 2024, Sec. 5.3.2)."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config = self.scheduler.config
        tokens = (self.shape[1] // self.net.config.patch_size) * (self.shape[2] // self.net.config.patch_size)
        ends = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return calculate_shift(tokens, *ends)

    def _scale(self, sigma: Tensor | float) -> float:
        """Our x over the pipeline's own: 1 / alpha(t), or 1 where the scheduler does not scale the signal."""
        level = float(sigma)
        if isinstance(self.schedule, Flow):
            return 1 + level
        return 1.0 if _explodes(self.scheduler) else math.hypot(1, level)

    def start(self, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Where the pipeline starts from standard normal noise (B, C, H, W), as our x at level sigma.

        Its x_t is the noise alone, so x = noise / alpha(t): sqrt(1 + sigma^2) noise, for a flow (1 + sigma) noise.
        """
        if not _explodes(self.scheduler):
            return self._scale(sigma) * noise
        # k-diffusion's x is ours; whether the unit variance of the data is counted depends on the spacing
        leading = self.scheduler.config.timestep_spacing == "leading"
        return (math.hypot(1, float(sigma)) if leading else float(sigma)) * noise

    def finish(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The latents that the pipeline returns, alpha(t) x, from our x at the last level: x itself where sigma = 0."""
        return x / self._scale(sigma)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def embed(self, prompts: Sequence[str] | str, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The condition of each prompt, flat tensors (B, ...): `denoiser.given(**model.embed(["a red cube"]))`.

        `embed([""])` is the reference of classifier-free guidance as the pipeline has it without a negative prompt. `size` is
        the height and width in pixels that Stable Diffusion XL is told (Podell et al. 2023, Sec. 2.2). Raises ZooError for a
        model without text and for a prompt longer than the tokenizer takes; warns, once a word, of words that it never saw.
        """
        if "tokenizer" not in self.components:
            raise ZooError(f"model {self.name!r} takes no text; expected to sample from its denoiser without a condition")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._check_lengths(prompts)
        self._check_words(prompts)
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        kind = type(self.pipeline).__name__
        if kind == "StableDiffusionPipeline":
            return {"encoder_hidden_states": self.pipeline.encode_prompt(prompts, **options)[0]}
        if kind == "StableDiffusion3Pipeline":
            tokens, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, None, **options)
            return {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        tokens, _, pooled, _ = self.pipeline.encode_prompt(prompts, **options)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            given = torch.tensor([prompt != "" for prompt in prompts], device=tokens.device)
            tokens, pooled = tokens * given[:, None, None], pooled * given[:, None]
        height, width = size or (self.shape[1] * self.factor, self.shape[2] * self.factor)
        told = torch.tensor([height, width, 0, 0, height, width], dtype=tokens.dtype, device=tokens.device)
        return {"encoder_hidden_states": tokens, "text_embeds": pooled, "time_ids": told.expand(len(prompts), 6)}

    def _check_lengths(self, prompts: Sequence[str]) -> None:
        for part in ("", "_2", "_3"):
            tokenizer, encoder = self.components.get(f"tokenizer{part}"), self.components.get(f"text_encoder{part}")
            if tokenizer is None or encoder is None:
                continue
            places = getattr(encoder.config, "max_position_embeddings", T5_TOKENS)  # T5's positions are relative
            most = min(tokenizer.model_max_length, places)
            for prompt in prompts:
                count = len(tokenizer(prompt, verbose=False).input_ids)
                if count > most:
                    raise ZooError(
                        f"prompt {prompt!r} has {count} tokens with the marks of its ends; expected at most {most} "
                        f"for the tokenizer{part} of model {self.name!r}: shorten it"
                    )

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """The words and marks of the prompts that the model never saw, sorted; empty where it is not known what it saw."""
        if self.words is None:
            return []
        return sorted({word for prompt in prompts for word in re.findall(r"[^\W\d_]+|\d|[^\w\s]", prompt.lower())} - self.words)

    def _check_words(self, prompts: Sequence[str]) -> None:
        fresh = [word for word in self.unknown_words(prompts) if word not in self._reported]
        if fresh:
            self._reported.update(fresh)
            warnings.warn(self.never_saw(fresh), UserWarning, stacklevel=3)

    def never_saw(self, unknown: Sequence[str]) -> str:
        """What to say of words that the model never saw: them, and the words that it knows."""
        known = ", ".join(sorted(word for word in self.words or () if word.isalpha()))
        return f"model {self.name!r} never saw {', '.join(map(repr, unknown))}; the words that it knows: {known}"

    # --- pictures ----------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents of images (B, 3, H, W) in [-1, 1]: z = scaling (mean + std noise - shift); without `noise` the mean.

        Identity for a model of pixels. Gradients flow to the images. Raises ZooError for a side no multiple of `factor`.
        """
        if images.ndim != 4 or any(side % self.factor for side in images.shape[-2:]):
            raise ZooError(
                f"images has shape {tuple(images.shape)}; expected (B, C, H, W) with sides that are multiples of "
                f"{self.factor}, as the VAE of model {self.name!r} needs"
            )
        if self.vae is None:
            return images
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        shift, scale = scaling.of(self.vae.config, z)
        return (z - shift) / scale

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of scaled latents; `clamp=False` leaves the VAE's output, and its gradient, as it is.

        For a model of pixels only the clamp remains. Gradients flow to the latents. Raises ZooError for another number of
        channels and another device; warns of latents that seem not to be scaled, whose deviation is above 4.
        """
        if self.vae is None:
            images = latents
        else:
            scaling.check(latents, self.vae.config, self.device, self.name)
            shift, scale = scaling.of(self.vae.config, latents)
            images = self.vae.decode(latents * scale + shift, return_dict=False)[0]
        return images.clamp(-1, 1) if clamp else images


def _network(pipeline: Any) -> nn.Module:
    parts = pipeline.components
    return parts["transformer"] if "transformer" in parts else parts["unet"]


def _factor(pipeline: Any) -> int:
    vae = pipeline.components.get("vae")
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def _explodes(scheduler: Any) -> bool:
    """Whether the scheduler's own x is x0 + sigma eps, as in k-diffusion: its noise then starts at sigma, not at 1."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1


# --- loading ---------------------------------------------------------------------------------------------------------


def load(
    folder: Path | str,
    name: str | None = None,
    device: str | None = None,
    words: frozenset[str] | None = None,
) -> Pretrained:
    """The pipeline that save_pretrained wrote to `folder`: fp32, frozen, in evaluation mode; `name` is for messages.

    Raises ZooError, in one line, for a folder that is no pipeline, a class that is not supported, missing or damaged weights,
    a scheduler that no adapter takes, and too little memory.
    """
    folder, where = Path(folder).expanduser(), pick_device(device)
    name = str(folder) if name is None else name
    kind = folders.read_index(folder).get("_class_name")
    if kind not in SUPPORTED:
        raise ZooError(f"model {name!r} is a {kind}; expected one of {', '.join(SUPPORTED)}")
    lacking = folders.missing_files(folder)
    if lacking:
        raise ZooError(f"model {name!r} has no {', '.join(lacking)} in {str(folder)!r}; save or download it again")
    needed, free = folders.memory_needed(folder), folders.memory_free()
    if needed > free:
        raise ZooError(
            f"model {name!r} needs {needed / 1e9:.3g} GB of memory in fp32, and {free / 1e9:.3g} GB are free; "
            f"close other programs, or {instead(name)}"
        )
    return wrap(_read(folder, name, kind), name, words).to(where)


def _read(folder: Path, name: str, kind: str) -> Any:
    import diffusers
    from safetensors import SafetensorError

    pipeline_class, parts = getattr(diffusers, kind), folders.components(folder)
    accepted = inspect.signature(pipeline_class.__init__).parameters
    options: dict[str, Any] = dict.fromkeys(set(OPTIONAL) & set(accepted) - set(parts))
    options |= {"requires_safety_checker": False} if "requires_safety_checker" in accepted else {}
    try:
        with _no_progress_bars():
            encoders = {part: _text_encoder(folder, part) for part in parts if part.startswith("text_encoder")}
            pipeline = pipeline_class.from_pretrained(folder, local_files_only=True, **options, **encoders)
        for part, net in _networks(pipeline):
            _refuse_missing(part, [key for key, value in net.state_dict().items() if value.is_meta])
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ZooError(f"model {name!r} in {str(folder)!r} cannot be read ({reason}); save or download it again") from error
    return pipeline


def _text_encoder(folder: Path, part: str) -> nn.Module:
    """Read apart from the pipeline, because transformers fills weights that it does not find with random numbers."""
    import transformers

    library, kind = folders.read_index(folder)[part]
    if library != "transformers":
        raise ValueError(f"{part} is of {library}; expected a class of transformers")
    net, found = getattr(transformers, kind).from_pretrained(folder / part, local_files_only=True, output_loading_info=True)
    _refuse_missing(part, found["missing_keys"])
    return net


def _refuse_missing(part: str, keys: Iterable[str]) -> None:
    missing = sorted(keys)
    if missing:
        raise ValueError(f"the weights of {part} lack {len(missing)} tensors, the first {missing[0]}")


def _networks(pipeline: Any) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]


def wrap(pipeline: Any, name: str, words: frozenset[str] | None = None) -> Pretrained:
    """A diffusers pipeline in memory as a `Pretrained`: its networks become fp32 and are frozen.

    Raises ZooError for a network or scheduler that no adapter takes.
    """
    for kind, part in _networks(pipeline):
        part.float().eval().requires_grad_(False)  # transformers reads half precision as half precision
        if kind in ("unet", "vae"):
            channels_last(part, pipeline.device)
    net, scheduler = _network(pipeline), pipeline.scheduler
    if net.config.get("time_cond_proj_dim"):
        raise ZooError(f"model {name!r} is told its guidance scale (time_cond_proj_dim); expected a model without")
    try:
        denoiser = from_diffusers(net, scheduler)
        schedule = Flow() if type(scheduler).__name__.startswith("FlowMatch") else discrete_of(scheduler)
    except ValueError as error:
        raise ZooError(f"model {name!r} cannot be a Denoiser: {error}") from None
    size = net.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    clip = float(scheduler.config.get("clip_sample_range", 1.0)) if scheduler.config.get("clip_sample") else None
    shape = (net.config.in_channels, height, width)
    return Pretrained(name, pipeline, denoiser, schedule, shape, height * _factor(pipeline), clip, words)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Reading from a disk is quick; the bars of both libraries would only fill the notebook."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
