"""The explorers of the scene world: a scene with its exact maps, and a picture that forms from a prompt."""

from __future__ import annotations

import html
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image as pillow
from torch import Tensor

from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer
from course_lib.worlds.scenes.attributes import GROUNDS, LIGHTS, RELATIONS, SIZES, SUPPORTS, VIEWS, Scenes
from course_lib.worlds.scenes.captions import WORDING, captions, parse
from course_lib.worlds.scenes.labels import OF_OBJECT, OF_SCENE, Labels, obeyed
from course_lib.worlds.scenes.render import edges, render
from course_lib.worlds.scenes.sampling import DISTANCES, ELEVATIONS, relations, views
from course_lib.worlds.scenes.tracing import FAR

if TYPE_CHECKING:  # reading a model loads diffusers, which a scene does not need
    from course_lib.zoo.pretrained import Pretrained
    from course_lib.zoo.readers import SceneReader

Array = np.ndarray

LARGE, SMALL = 384, 192  # sides of the large picture and of the four small ones, in screen pixels
LINE = 86  # characters that fit in one line of the figure
BELIEFS = 4  # levels at which a PromptExplorer shows what the model believes

CHOICES: dict[str, tuple[str, ...]] = {
    **OF_OBJECT,
    "ground": tuple(GROUNDS),
    "light": tuple(LIGHTS),
    "second": ("none", *RELATIONS),
}
"""What each menu of a SceneExplorer offers."""

ANGLES: dict[str, tuple[float, float]] = {"azimuth": (0.0, 360.0), "elevation": ELEVATIONS, "turn": (0.0, 360.0)}
"""The ranges of its sliders, in degrees."""

START: dict[str, Any] = {
    "shape": "car",
    "colour": "red",
    "size": "large",
    "ground": "grass",
    "light": "left",
    "azimuth": 40.0,
    "elevation": 25.0,
    "turn": 0.0,
    "second": "none",
}
"""What it shows first."""

SECOND = {"shape": "cube", "colour": "blue", "size": "large"}
"""The second object, on which any other can stand."""

ASIDE: dict[str, tuple[float, float]] = {
    "left of": (0.0, -1.0),
    "right of": (0.0, 1.0),
    "in front of": (1.0, 0.65),
    "behind": (-1.0, -0.65),
}
"""From the second object to the first along x and y: to the viewer at azimuth 0, +x is nearer and +y the right."""

SEGMENTS = ("#D9D9D9", "#F0E9DC", style.COLOURS["data"], style.COLOURS["noise"])
"""Colours of the background, the ground, and the two objects; the first is that of missing depths and normals as well."""

DEPTHS = (2.0, 8.0)
"""The range of the colours of depth, in world units; ground that is farther has the last colour."""


def scene(
    shape: str, colour: str, size: str, ground: str, light: str, azimuth: float, elevation: float, turn: float, second: str
) -> Scenes:
    """One scene of these attributes, as a batch; `second` is what its object is to a large blue cube, or "none".

    azimuth and elevation of the camera and turn (yaw) of the object in degrees. The relation is the one that a viewer at
    azimuth 0 sees: the objects stay where they are while the camera goes round. Raises ValueError for a name that is none
    of CHOICES and for an angle outside ANGLES.
    """
    first = {"shape": shape, "colour": colour, "size": size}
    for name, value in {**first, "ground": ground, "light": light, "second": second}.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} = {value!r}; expected one of {', '.join(CHOICES[name])}")
    for name, angle in {"azimuth": azimuth, "elevation": elevation, "turn": turn}.items():
        low, high = ANGLES[name]
        if not low <= angle <= high:
            raise ValueError(f"{name} = {angle!r}; expected degrees from {low:g} to {high:g}")
    things = [first, SECOND] if second != "none" else [first]
    return Scenes(
        **{name: torch.tensor([[CHOICES[name].index(thing[name]) for thing in things]]) for name in first},
        position=_positions([SIZES[thing["size"]] for thing in things], second)[None],
        yaw=torch.tensor([[float(turn), 0.0]])[:, : len(things)],
        ground=torch.tensor([CHOICES["ground"].index(ground)]),
        light=torch.tensor([CHOICES["light"].index(light)]),
        azimuth=torch.tensor([float(azimuth)]),
        elevation=torch.tensor([float(elevation)]),
        distance=torch.tensor([DISTANCES[len(things)][1]]),  # the farthest, from which all fits the picture
    )


def _positions(scales: list[float], second: str) -> Tensor:
    """Feet of the objects, (K, 3), about the origin; two beside each other are 1.15 of the sum of their radii apart or more."""
    if second == "none":
        return torch.zeros(1, 3)
    if second == "on top of":
        return torch.tensor([[0.0, 0.0, SUPPORTS[SECOND["shape"]] * scales[1]], [0.0, 0.0, 0.0]])
    half = 1.15 / 2 * sum(scales) * torch.tensor([*ASIDE[second], 0.0])
    return torch.stack([half, -half])


# --- pictures and text at places of a figure, in screen pixels from its top-left corner ---------------------------------


def _sheet(height: int) -> Axes:
    """Axes that fill a figure and count in screen pixels: one for all pictures, since each takes 4 ms to draw."""
    figure = pictures.canvas(pictures.WIDTH, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, pictures.WIDTH), ylim=(height, 0))
    axes.set_autoscale_on(False)
    return axes


def _place(axes: Axes, x: int, y: int, side: int, pixels: int, title: str = "", **options: Any) -> tuple[AxesImage, Text]:
    """A picture yet to be set, of so many pixels a side, in a square of `side` screen pixels; and the title above it."""
    square = (x, x + side, y + side, y)
    way = "auto" if side % pixels else "nearest"  # a large model's picture has more pixels than there is room for
    image = axes.imshow(np.zeros((2, 2)), extent=square, interpolation=way, aspect="auto", **options)
    return image, _write(axes, x + side / 2, y - 14, title)


def _write(axes: Axes, x: float, y: float, text: str = "", size: float = 13, **options: Any) -> Text:
    """Text about a place; a prompt may hold dollar signs, which are no formula."""
    return axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "parse_math": False, **options})


def _png(axes: Axes) -> bytes:
    """The figure as PNG in full colour: a palette would step through the depths, and takes longer than it saves here."""
    axes.figure.canvas.draw()
    picture = pillow.fromarray(np.asarray(axes.figure.canvas.buffer_rgba())).convert("RGB")
    return pictures.small_png(picture, palettes=())


class SceneExplorer(Explorer):
    """A scene of the world, live: its picture, its depth, normals, segmentation and edges, and its plain caption.

    `values` replace those of START; they are named and checked as in `scene`. With a second object, the menu has the
    relation that is seen from azimuth 0, and the caption the one that the camera sees.
    """

    PIXELS, MAPS = 128, 96  # sides of what is rendered: the picture, and the maps

    def __init__(self, **values: Any):
        values = {**START, **values}
        scene(**values)
        with style.context():
            self._build()
        controls: dict[str, widgets.Widget] = {
            name: widgets.Dropdown(options=CHOICES[name], value=values[name], description=name)
            for name in ("shape", "colour", "size", "ground", "light", "second")
        }
        controls["second"].tooltip = "what the object is to a second one, seen from azimuth 0"
        for name, (low, high) in ANGLES.items():
            controls[name] = widgets.FloatSlider(
                values[name],
                min=low,
                max=high,
                step=1.0,
                description=f"{name} (°)",
                readout_format=".0f",
                style={"description_width": "90px"},
            )
        super().__init__(controls)

    def _build(self) -> None:
        """Make the artists once: a redraw only moves them."""
        axes = _sheet(540)
        self._axes = axes
        left, right, upper, lower = 424, 698, 30, 248
        self._picture, _ = _place(axes, 10, upper, LARGE, self.PIXELS)
        depths = matplotlib.colormaps["viridis_r"].with_extremes(bad=SEGMENTS[0])
        colours = {"cmap": depths, "vmin": DEPTHS[0], "vmax": DEPTHS[1]}
        self._depth, _ = _place(axes, left, upper, SMALL, self.MAPS, "depth (world units)", **colours)
        self._normal, _ = _place(axes, right, upper, SMALL, self.MAPS, "normals (x, y, z)")
        self._segments, _ = _place(axes, left, lower, SMALL, self.MAPS, "segmentation")
        self._edges, _ = _place(axes, right, lower, SMALL, self.MAPS, "edges")
        x, (near, far) = left + SMALL + 8, DEPTHS
        scale = np.linspace(near, far, SMALL)[:, None]
        axes.imshow(scale, extent=(x, x + 12, upper + SMALL, upper), interpolation="nearest", aspect="auto", **colours)
        for depth in np.linspace(near, far, 4):
            y = upper + SMALL * (depth - near) / (far - near)
            va = {near: "top", far: "bottom"}.get(depth, "center")  # none reaches beyond the scale
            _write(axes, x + 18, y, f"≥ {depth:g}" if depth == far else f"{depth:g}", 12, ha="left", va=va)
        self._caption = _write(axes, pictures.WIDTH / 2, 456, size=14, va="top")
        self._view = _write(axes, pictures.WIDTH / 2, 0, color=style.COLOURS["muted"])

    def draw(self, **values: Any) -> bytes:
        """The scene of these values, named and checked as in `scene`."""
        scenes = scene(**values)
        rgb, maps = render(scenes, self.PIXELS).rgb, render(scenes, self.MAPS, samples=1)
        segments = maps.segmentation[0, 0].numpy()
        palette = np.array([matplotlib.colors.to_rgb(colour) for colour in SEGMENTS])
        here = (segments >= 0)[..., None]
        depth = maps.depth[0, 0].numpy()
        for artist, image in (
            (self._picture, pictures.to_rgb(rgb, "rgb")[0]),
            (self._depth, np.ma.masked_where(depth >= FAR, depth)),
            (self._normal, np.where(here, (maps.normal[0].permute(1, 2, 0).numpy() + 1) / 2, palette[0])),
            (self._segments, palette[segments + 1]),
            (self._edges, pictures.to_rgb(2 * edges(maps.depth, maps.normal, maps.segmentation) - 1, "edges")[0]),
        ):
            artist.set_data(image)
        lines = textwrap.wrap(captions(scenes, None)[0], LINE)
        self._caption.set_text("\n".join(lines))
        side, relation = int(views(scenes)[0, 0]), int(relations(scenes)[0])
        said = [f"view: {VIEWS[side]}" if side >= 0 else f"view: none, a {values['shape']} has no front"]
        said += [f"relation, as seen: {RELATIONS[relation]}"] * (relation >= 0)
        self._view.set(text="      ".join(said), y=474 + 24 * len(lines))
        return _png(self._axes)


class PromptExplorer(Explorer):
    """A prompt becomes a picture: what D believes at four levels, and what DDIM under classifier-free guidance ends at.

    model   a text-to-image `Pretrained`
    reader  says what it reads in the picture, and whether that is what was asked, where `parse` understands the prompt

    The noise of a seed and the embedding of a prompt are kept. A warning of words that the model never saw stays below the
    view as long as the prompt holds them. Raises ZooError for a model without text, ValueError for values outside the
    ranges of the controls.
    """

    GUIDANCE, STEPS, KEPT = (0.0, 8.0), (4, 30), 32  # ranges of the sliders; embeddings that are kept

    def __init__(
        self,
        model: Pretrained,
        reader: SceneReader | None = None,
        prompt: str = "a small red cube on grass, lit from the left",
        guidance: float = 3.0,
        steps: int = 8,
        seed: int = 0,
    ):
        self._check(guidance, steps, seed)
        self._model, self._reader = model, reader
        with torch.no_grad():
            self._nothing = model.embed([""])
        self._embedded: dict[str, dict[str, Tensor]] = {}
        self._noise: tuple[int, Tensor] | None = None
        with style.context():
            self._build()
        wide = widgets.Layout(width="640px")
        super().__init__(
            {
                "prompt": widgets.Text(prompt, description="prompt", continuous_update=False, layout=wide),
                "guidance": widgets.FloatSlider(
                    guidance, min=self.GUIDANCE[0], max=self.GUIDANCE[1], step=0.5, description="guidance", readout_format=".1f"
                ),
                "steps": widgets.IntSlider(steps, min=self.STEPS[0], max=self.STEPS[1], description="steps"),
                "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
            }
        )

    def _check(self, guidance: float, steps: int, seed: int) -> None:
        for name, value, (low, high) in (("guidance", guidance, self.GUIDANCE), ("steps", steps, self.STEPS)):
            if not low <= value <= high:
                raise ValueError(f"{name} = {value!r}; expected a number from {low:g} to {high:g}")
        if seed < 0:
            raise ValueError(f"seed = {seed!r}; expected a whole number, at least 0")

    def _build(self) -> None:
        """Make the artists once: a redraw only moves them."""
        axes, pixels = _sheet(570), self._model.pixels
        self._axes, self._heading = axes, _write(axes, pictures.WIDTH / 2, 36)
        self._beliefs = [_place(axes, 30 + 208 * (i % 2), 98 + 226 * (i // 2), SMALL, pixels) for i in range(BELIEFS)]
        self._picture, _ = _place(axes, 486, 98, LARGE, pixels)
        self._settings = _write(axes, 486 + LARGE / 2, 500)
        self._foot = _write(axes, pictures.WIDTH / 2, 544, color=style.COLOURS["muted"])

    def _embed(self, prompt: str) -> dict[str, Tensor]:
        """The embedding of the prompt; words that the model never saw are told below the view."""
        if prompt not in self._embedded:
            while len(self._embedded) >= self.KEPT:
                del self._embedded[next(iter(self._embedded))]
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", UserWarning)
                self._embedded[prompt] = self._model.embed([prompt])
        return self._embedded[prompt]

    @torch.no_grad()
    def _run(self, prompt: str, guidance: float, steps: int, seed: int) -> tuple[list[float], Tensor]:
        """Levels of four of the steps, and the pictures (5, 3, H, W) on the CPU: what D believes there, and the last one."""
        model, beliefs = self._model, []
        if self._noise is None or self._noise[0] != seed:
            self._noise = seed, SampleNoise(seed)(torch.empty(1, *model.shape, device=model.device))
        asked = self._embed(prompt)
        guided = cfg(model.denoiser.given(**asked), model.denoiser.given(**self._nothing), guidance)

        def D(x: Tensor, sigma: Tensor) -> Tensor:
            beliefs.append(guided(x, sigma))  # DDIM asks once a step
            return beliefs[-1]

        sigmas = model.sigmas(steps)
        # on a processor autocast would cast the frozen weights at each call, which costs a small network more than it saves
        with autocast(model.device, enabled=model.device.type != "cpu"):
            x = sample(D, model.start(self._noise[1], sigmas[0]), sigmas, ddim)
            shown = [i * len(beliefs) // BELIEFS for i in range(BELIEFS)]
            latents = torch.cat([*(beliefs[i] for i in shown), model.finish(x, sigmas[-1])])
            return [float(sigmas[i]) for i in shown], model.decode(latents).float().cpu()

    def draw(self, prompt: str, guidance: float, steps: int, seed: int) -> bytes:
        """How the picture of this prompt forms."""
        self._check(guidance, steps, seed)
        sigmas, images = self._run(prompt, guidance, steps, seed)
        arrays = pictures.to_rgb(images, "images")
        for (picture, title), array, sigma in zip(self._beliefs, arrays[:-1], sigmas, strict=True):
            picture.set_data(array)
            title.set_text(f"D(x, σ) at σ = {sigma:.2g}")
        self._picture.set_data(arrays[-1])
        self._settings.set_text(f"after {steps} steps, guidance {guidance:g}")
        heading, colour = self._read(prompt, images[-1:])
        self._heading.set(text=heading, color=colour)
        self._foot.set_text("\n".join(textwrap.wrap(f"prompt: {prompt or '(empty)'}", LINE, max_lines=2, placeholder=" …")))
        if fresh := self._model.unknown_words([prompt]):
            words = html.escape(self._model.never_saw(fresh))
            self.message.value = f'<span style="color:{style.COLOURS["warn"]}">{words}</span>'
        return _png(self._axes)

    def _read(self, prompt: str, image: Tensor) -> tuple[str, str]:
        """The heading and its colour: what the reader reads, and whether that is what the prompt asks for, if it is known."""
        if self._reader is None:
            return "how the picture forms: what the model believes, level by level", style.COLOURS["exact"]
        read = self._reader.read(image)
        heading = "\n".join(textwrap.wrap(f"read: {described(read)}", LINE))
        try:
            wanted = parse(prompt)
        except ValueError:
            return heading, style.COLOURS["exact"]
        if not wanted.objects:
            return heading, style.COLOURS["exact"]
        wrong = [name for name, right in obeyed(read, [wanted]).items() if right == 0 and name != "all"]
        verdict = f"as asked: no ({', '.join(wrong)})" if wrong else "as asked: yes"
        between = "; " if len(heading) + len(verdict) < LINE else ";\n"
        return f"{heading}{between}{verdict}", style.COLOURS["warn" if wrong else "model"]


def described(read: Labels) -> str:
    """What was read in the first picture, in the words of a plain caption without articles."""
    text = ""
    for k in range(int(read.count[0]) + 1):
        if k:
            text += f"{', ' if ',' in text else ' '}{OF_SCENE['relation'][int(read.relation[0])]} "
        text += " ".join(OF_OBJECT[name][int(getattr(read, name)[0, k])] for name in ("size", "colour", "shape"))
        if bool(read.oriented[0, k]):
            text += f", seen from the {VIEWS[round(float(read.azimuth[0, k]) / 90) % len(VIEWS)]}"
    ground, light = (WORDING[name][OF_SCENE[name][int(getattr(read, name)[0])]][0] for name in ("ground", "light"))
    return f"{text}{', ' if ',' in text else ' '}{ground}, {light}"
