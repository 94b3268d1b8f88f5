"""The explorer of latent diffusion: a picture between two prompts, where a word is listened to, and the latent itself."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from torch import Tensor

from course_lib.devices import SampleNoise
from course_lib.guidance import cfg
from course_lib.nets.crossattention import recorded, word_maps
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer

if TYPE_CHECKING:  # reading a model loads diffusers
    from course_lib.zoo.pretrained import Pretrained

HEIGHT, SIDE, GAP, TOP = 376, 280, 15, 54  # of the view and of its three panels, in screen pixels


class LatentExplorer(Explorer):
    """DDIM under guidance from one noise, with the condition on the line between the embeddings of two prompts.

    model  a text-to-image `Pretrained` whose network is a UNet2DConditionModel and whose latent has four channels

    Beside the picture: the mean over layers and steps of the cross-attention map of one word of the first prompt, over the
    picture in grey, and the four channels of the latent at the end. `word` counts from 1 and stops at the last.
    """

    GUIDANCE, STEPS, WORDS = (1.0, 8.0), (4, 30), 20  # ranges of the sliders

    def __init__(
        self,
        model: Pretrained,
        prompt: str = "a large red mug on grass",
        other: str = "a large blue mug on sand",
        word: int = 3,
        guidance: float = 3.0,
        steps: int = 8,
        seed: int = 0,
    ):
        self._model = model
        with torch.no_grad():
            self._nothing = model.embed([""])
        self.walk = functools.lru_cache(maxsize=32)(self._walk)
        with style.context():
            self._build()
        text = widgets.Layout(width="430px")
        super().__init__(
            {
                "between": widgets.FloatSlider(0.0, min=0.0, max=1.0, step=0.1, description="between", readout_format=".1f"),
                "prompt": widgets.Text(prompt, description="prompt", continuous_update=False, layout=text),
                "other": widgets.Text(other, description="and", continuous_update=False, layout=text),
                "word": widgets.IntSlider(word, min=1, max=self.WORDS, description="word"),
                "guidance": widgets.FloatSlider(
                    guidance, min=self.GUIDANCE[0], max=self.GUIDANCE[1], step=0.5, description="guidance", readout_format=".1f"
                ),
                "steps": widgets.IntSlider(steps, min=self.STEPS[0], max=self.STEPS[1], description="steps"),
                "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
            }
        )

    def _build(self) -> None:
        """Make the artists once: a redraw only moves them."""
        figure, wide = pictures.canvas(pictures.WIDTH, HEIGHT), pictures.WIDTH
        figure.set_layout_engine("none")
        small = (SIDE - GAP) // 2

        def panel(left: float, top: float, side: float) -> Axes:
            ax = figure.add_axes((left / wide, 1 - (top + side) / HEIGHT, side / wide, side / HEIGHT))
            ax.set_axis_off()
            return ax

        lefts = [GAP + k * (SIDE + GAP) for k in range(3)]
        self._axes = [panel(left, TOP, SIDE) for left in lefts[:2]]
        corners = [(lefts[2] + i * (small + GAP), TOP + j * (small + GAP)) for j in (0, 1) for i in (0, 1)]
        self._channels = [panel(*corner, small) for corner in corners]
        at = 1 - (TOP - 14) / HEIGHT
        self._titles = [figure.text((left + SIDE / 2) / wide, at, "", ha="center", fontsize=14) for left in lefts]
        self._foot = figure.text(0.5, 12 / HEIGHT, "", ha="center", fontsize=13, color=style.COLOURS["muted"])
        self._titles[2].set_text("the latent's four channels")
        self._figure = figure

    def words(self, prompt: str) -> list[str]:
        """The tokens of a prompt, as text."""
        tokens = self._model.components["tokenizer"].tokenize(prompt)
        return [token.removesuffix("</w>") for token in tokens]

    @torch.no_grad()
    def _walk(
        self, prompt: str, other: str, between: float, guidance: float, steps: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The picture (3, H, W), the latent (4, h, w) and the map of each token (L, H, W), on the CPU."""
        model = self._model
        ends = [model.embed([text]) for text in (prompt, other)]
        asked = {name: torch.lerp(ends[0][name], ends[1][name], between) for name in ends[0]}
        D = cfg(model.denoiser.given(**asked), model.denoiser.given(**self._nothing), guidance)
        sigmas = model.sigmas(steps)
        x = model.start(SampleNoise(seed)(torch.empty(1, *model.shape, device=model.device)), sigmas[0])
        with recorded(model.components["unet"]) as kept:
            latent = model.finish(sample(D, x, sigmas, ddim), sigmas[-1])
        maps = word_maps({name: [one[:1] for one in calls] for name, calls in kept.items()}, model.pixels)
        return model.decode(latent)[0].float().cpu(), latent[0].float().cpu(), maps[0]

    def draw(self, between: float, prompt: str, other: str, word: int, guidance: float, steps: int, seed: int) -> bytes:
        """The picture, the map of the word, the latent."""
        picture, latent, maps = self.walk(prompt, other, between, guidance, steps, seed)
        words = self.words(prompt)
        chosen = min(word, len(words))
        array = pictures.to_rgb(picture[None], "picture")[0]
        for ax in (*self._axes, *self._channels):
            ax.clear()
            ax.set_axis_off()
        self._axes[0].imshow(array, interpolation="nearest")
        self._axes[1].imshow(array.mean(2), cmap="gray", vmin=0, vmax=255 if array.dtype.kind == "u" else 1)
        self._axes[1].imshow(maps[chosen], cmap="magma", alpha=0.6)  # the mark of the start has map 0
        for ax, channel in zip(self._channels, latent, strict=True):
            ax.imshow(channel, cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest")
        self._titles[0].set_text(f"{between:.1f} of the way, guidance {guidance:g}")
        self._titles[1].set_text(f"who listens to “{words[chosen - 1]}”" if words else "no word")
        marked = " ".join(f"[{one}]" if k == chosen - 1 else one for k, one in enumerate(words))
        self._foot.set_text(f"{marked}   →   {other}" if between else marked)
        return pictures.render(self._figure)
