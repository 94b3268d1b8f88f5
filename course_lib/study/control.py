"""The explorer of spatial control: draw, or take a scene's map, and see what a ControlNet makes of it beside the prompt."""

from __future__ import annotations

import functools
import html
import io
import textwrap
import warnings
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.patches import Rectangle
from PIL import Image as pillow
from PIL import ImageDraw
from torch import Tensor, nn

from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import cfg
from course_lib.guidance.controls import sigma_interval, within
from course_lib.nets.control import controlled, guess
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.study import pictures, style
from course_lib.study.canvas import Canvas, Drawing
from course_lib.study.control_maps import KINDS, NOTHING, SIDE, Asked, asked, starts
from course_lib.study.explorer import Panel
from course_lib.study.scenes import described
from course_lib.types import Denoiser
from course_lib.worlds.scenes.attributes import SHAPES
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.labels import obeyed

if TYPE_CHECKING:  # reading a model loads diffusers
    from course_lib.zoo.map_judge import MapJudge, Maps
    from course_lib.zoo.pretrained import Pretrained
    from course_lib.zoo.readers import SceneReader

CELL, GAP, HEAD, TOP, FOOT = 192, 16, 46, 46, 34  # screen pixels: of a picture, between two, above each, above and below all
WIDTH, HEIGHT = 3 * CELL + 4 * GAP, TOP + 2 * (CELL + HEAD) + FOOT
LINE = 72  # characters that fit in one line of the figure
SHEET = 320  # screen pixels of the canvas
BLANK = np.full((SIDE, SIDE, 3), 238, np.uint8)
EMPTY = "nothing is drawn: this is the picture without control; draw on the paper, or choose a start"


class Plain(NamedTuple):
    """What decides the picture without control."""

    prompt: str
    guidance: float
    steps: int
    seed: int


class Told(NamedTuple):
    """What decides the picture with it, beside `Plain`; `drawn` is SHAPES[0] for a control that does not read it."""

    control: str
    start: str
    drawing: Drawing
    drawn: str
    scale: float
    guess: bool
    begin: float
    end: float


class Result(NamedTuple):
    """A picture (1, 3, H, W) in [-1, 1], and the maps that are read in it."""

    picture: Tensor
    found: Maps


class ControlExplorer(Panel):
    """A condition map, the pictures of a prompt without control and under it, and the maps that are read in both.

    model     a text-to-image `Pretrained` of 64 x 64 pixels
    controls  kind -> its control, as `zoo.load("mini-control-edge")`; kinds are those of KINDS
    judge     reads maps, `zoo.load("scenes-maps")`; the control error is its reading against the map
    reader    says what it reads in the picture, and whether that is what was asked, where `parse` understands the prompt

    Both pictures have the noise of the seed and are sampled by DDIM; at scale 0 they are equal to the last bit.
    `begin` and `end` are shares of the steps, as in diffusers. In guess mode there is no prompt, and the control is given to
    one half of the guidance alone (Zhang et al. 2023, Sec. 3.4). A picture is kept, so that only what has changed is
    computed. Words that the model never saw, and an empty sheet, are told below the view.

    Raises ValueError for no controls, and for values that the explorer does not offer.
    """

    KEPT = 64  # pictures that are kept, of each kind
    RANGES: ClassVar = {"scale": (0.0, 1.5), "begin": (0.0, 1.0), "end": (0.0, 1.0), "guidance": (0.0, 8.0), "steps": (4, 30)}

    def __init__(
        self,
        model: Pretrained,
        controls: Mapping[str, nn.Module],
        judge: MapJudge,
        reader: SceneReader | None = None,
        prompt: str = "a large blue car on sand, lit from the left",
        control: str | None = None,
        start: str = "car",
        scale: float = 1.0,
        guidance: float = 3.0,
        steps: int = 8,
        seed: int = 0,
    ):
        if not controls or not set(controls) <= set(KINDS):
            raise ValueError(f"controls = {sorted(controls)}; expected at least one of {', '.join(KINDS)}")
        control = next(iter(controls)) if control is None else control
        self._model, self._judge, self._reader = model, judge, reader
        self._controls = dict(controls)
        self._D = controlled(model.denoiser, **controls)
        for name in ("asked", "embedded", "plain", "told"):
            setattr(self, name, functools.lru_cache(maxsize=self.KEPT)(getattr(self, f"_{name}")))
        self._check(control, scale=scale, guidance=guidance, steps=steps, seed=seed)
        self.asked(control, start, Drawing(), SHAPES[0])
        with style.context():
            self._build()
        self.canvas = Canvas(torch.ones(3, SIDE, SIDE), brush=2.0, side=SHEET)
        self.picture = widgets.Image(format="png", layout=widgets.Layout(flex="none"))
        made: dict[str, Any] = {
            "scale": self._slider("scale", scale, 0.05),
            "prompt": widgets.Text(prompt, description="prompt", continuous_update=False, layout=widgets.Layout(width="640px")),
            "control": widgets.Dropdown(
                options=[(KINDS[kind].name, kind) for kind in controls], value=control, description="control"
            ),
            "start": widgets.Dropdown(options=starts(control), value=start, description="start"),
            "drawn": widgets.Dropdown(options=list(SHAPES), description="draw a"),
            "guess": widgets.Checkbox(False, description="guess mode", indent=False),
            "begin": self._slider("begin", 0.0, 0.05),
            "end": self._slider("end", 1.0, 0.05),
            "guidance": self._slider("guidance", guidance, 0.5),
            "steps": widgets.IntSlider(steps, min=self.RANGES["steps"][0], max=self.RANGES["steps"][1], description="steps"),
            "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
            "drawing": self.canvas,
        }
        made["drawn"].tooltip = "what closed lines are in a map of classes"
        made["control"].observe(self._offer, names="value")  # before the panel's own, which reads all values
        wrap = widgets.Layout(flex_flow="row wrap", align_items="flex-start")
        sheet = self.canvas.surface.layout  # white paper on a white page wants an edge
        sheet.border, sheet.width, sheet.height = f"1px solid {style.COLOURS['muted']}", f"{SHEET + 2}px", f"{SHEET + 2}px"
        left = widgets.VBox([widgets.HTML("draw here"), self.canvas], layout=widgets.Layout(flex="none"))
        super().__init__(made, widgets.HBox([left, self.picture], layout=wrap))
        top = self.children[0]  # the canvas is a control that stands in the view
        top.children = [one for one in top.children if one is not self.canvas]

    def _slider(self, name: str, value: float, step: float) -> widgets.FloatSlider:
        low, high = self.RANGES[name]
        digits = ".1f" if step >= 0.1 else ".2f"
        return widgets.FloatSlider(value, min=low, max=high, step=step, description=name, readout_format=digits)

    def _offer(self, change: Any) -> None:
        """The starts of the control that was chosen; the one that was chosen before stays where it is among them."""
        start, offered = self.controls["start"], starts(change["new"])
        if list(start.options) != offered:
            kept = start.value if start.value in offered else NOTHING
            start.options = offered
            start.value = kept

    def _check(self, control: str, **values: float) -> None:
        if control not in self._controls:
            raise ValueError(f"control = {control!r}; expected one of {', '.join(self._controls)}")
        for name, value in values.items():
            low, high = self.RANGES.get(name, (0, 2**31 - 1))
            if not low <= value <= high:
                raise ValueError(f"{name} = {value!r}; expected a number from {low:g} to {high:g}")

    # --- what is computed -------------------------------------------------------------------------

    def _asked(self, control: str, start: str, drawing: Drawing, drawn: str) -> Asked:
        return asked(control, start, drawing, drawn)

    @torch.no_grad()
    def _embedded(self, prompt: str) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unknown words, which `_show` tells
            return self._model.embed([prompt])

    def _halves(self, prompt: str) -> tuple[Any, Any]:
        """D of the prompt and of no prompt, both without control."""
        return tuple(self._model.denoiser.given(**self.embedded(text)) for text in (prompt, ""))

    def _plain(self, of: Plain) -> Result:
        return self._sampled(cfg(*self._halves(of.prompt), of.guidance), of)

    def _told(self, of: Plain, told: Told) -> Result:
        sigmas = self._model.sigmas(of.steps)
        given = {told.control: self.asked(told.control, told.start, told.drawing, told.drawn).map.to(self._model.device)}
        name, scale = f"{told.control}_scale", torch.full((1,), told.scale, device=self._model.device)
        scales = scale, scale
        if told.guess:
            weights = guess(len(self._controls[told.control].zeros), told.scale).to(scale)
            scales = weights, torch.zeros_like(weights)
        D = [self._D.given(**self.embedded(text), **given, **{name: s}) for text, s in zip((of.prompt, ""), scales, strict=True)]
        guided = cfg(*D, of.guidance)
        if (told.begin, told.end) != (0, 1):
            outside = cfg(*self._halves(of.prompt), of.guidance)
            guided = within(guided, outside, *sigma_interval(sigmas, told.begin, told.end))
        return self._sampled(guided, of)

    @torch.no_grad()
    def _sampled(self, D: Denoiser, of: Plain) -> Result:
        model, sigmas = self._model, self._model.sigmas(of.steps)
        noise = SampleNoise(of.seed)(torch.empty(1, *model.shape, device=model.device))
        # on a processor autocast would cast the frozen weights at each call, which costs a small network more than it saves
        with autocast(model.device, enabled=model.device.type != "cpu"):
            x = sample(D, model.start(noise, sigmas[0]), sigmas, ddim)
            picture = model.decode(model.finish(x, sigmas[-1])).float().cpu()
        return Result(picture, self._judge.read(picture))

    # --- what is shown ----------------------------------------------------------------------------

    def _build(self) -> None:
        """Make the artists once: a redraw only changes them."""
        self._figure = figure = pictures.canvas(WIDTH, HEIGHT)
        figure.set_layout_engine("none")
        self._axes = axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))  # one for all, in screen pixels
        axes.set_axis_off()
        look = {"ha": "center", "va": "center", "fontsize": 12, "parse_math": False}
        self._shown, self._titles = [], []
        for row in (0, 1):
            for column in (0, 1, 2):
                x, y = GAP + column * (CELL + GAP), TOP + HEAD + row * (CELL + HEAD)
                self._shown.append(axes.imshow(BLANK, extent=(x, x + CELL, y + CELL, y), interpolation="nearest", aspect="auto"))
                axes.add_patch(Rectangle((x, y), CELL, CELL, fill=False, color=style.COLOURS["muted"]))
                self._titles.append(axes.text(x + CELL / 2, y - HEAD / 2, "", **look))
        axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        y = TOP + CELL + 1.5 * HEAD
        self._titles[3].set_y(y - 11)  # the legend is its second line
        self._legend = [axes.text(GAP + x, y + 10, "", **look | {"ha": "left"}) for x in (0, 56, 136)]
        self._heading = axes.text(WIDTH / 2, TOP / 2, "", **look | {"fontsize": 13})
        self._foot = axes.text(WIDTH / 2, HEIGHT - FOOT / 2, "", color=style.COLOURS["muted"], **look | {"fontsize": 13})

    def _show(self, values: dict[str, Any]) -> None:
        told = self.settings(**values)[1]
        image = self.draw(**values)
        self.controls["drawn"].layout.display = None if told.control == "seg" else "none"
        self.canvas.picture = self.asked(told.control, told.start, Drawing(), SHAPES[0]).paper[0]
        self.picture.value = image
        unknown = [] if told.guess else self._model.unknown_words([values["prompt"]])
        said = [EMPTY] * _empty(told) + ([self._model.never_saw(unknown)] if unknown else [])
        self.message.value = f'<span style="color:{style.COLOURS["warn"]}">{html.escape("; ".join(said))}</span>' if said else ""

    def settings(
        self, prompt: str, guidance: float, steps: int, seed: int, drawn: str, guess: bool, **told: Any
    ) -> tuple[Plain, Told]:
        """What the controls ask for; what a setting does not read is always the same, so that nothing is computed twice."""
        drawn = drawn if told["control"] == "seg" else SHAPES[0]
        return Plain("" if guess else prompt, guidance, steps, seed), Told(drawn=drawn, guess=guess, **told)

    def draw(self, **values: Any) -> bytes:
        """The map, the pictures without control and with it, and what is read in them; as PNG."""
        plain, told = self.settings(**values)
        self._check(told.control, **{name: values[name] for name in (*self.RANGES, "seed")})
        kind, asked = KINDS[told.control], self.asked(told.control, told.start, told.drawing, told.drawn)
        base, under = self.plain(plain), None if _empty(told) else self.told(plain, told)
        read, given = f"{kind.layer} read in it", "guess mode" if told.guess else "with control"
        self._set(0, f"map: {kind.name}\n{told.start}", 2 * asked.map - 1)
        self._set(1, f"without control{self._verdict(plain.prompt, base)}", base.picture)
        if under is None:
            self._set(2, "with control\nnothing is drawn")
            self._set(3)
            self._set(4, read, asked.shown(base.found))
            self._set(5)
        else:
            self._set(2, f"{given}, scale {told.scale:g}{self._verdict(plain.prompt, under)}", under.picture)
            self._set(3, "asked against read", asked.compared(under.found))
            for place, found in ((4, base.found), (5, under.found)):
                self._set(place, f"{read}\n{kind.error} = {asked.error(found):.2f}", asked.shown(found))
        words = [] if under is None else list(kind.legend.items())
        for text, (colour, said) in zip_longest(self._legend, words, fillvalue=("muted", "")):
            text.set(text=said, color=style.COLOURS[colour])
        self._heading.set_text(self._read(base if under is None else under))
        prompt = "no prompt (guess mode)" if told.guess else f"prompt: {plain.prompt or '(empty)'}"
        self._foot.set_text(textwrap.shorten(prompt, LINE, placeholder=" …"))
        return pictures.render(self._figure)

    def _set(self, place: int, title: str = "", image: Tensor | None = None) -> None:
        self._titles[place].set_text(title)
        self._shown[place].set_data(BLANK if image is None else pictures.to_rgb(image, "image")[0])

    def _read(self, of: Result) -> str:
        return "" if self._reader is None else textwrap.fill(f"read: {described(self._reader.read(of.picture))}", LINE)

    def _verdict(self, prompt: str, of: Result) -> str:
        """Whether the picture shows what its prompt names, a line of a title; none where that is not known."""
        try:
            wanted = parse(prompt)
        except ValueError:
            return ""
        if self._reader is None or not wanted.objects:
            return ""
        found = obeyed(self._reader.read(of.picture), [wanted])["all"]
        return "\nas prompted" if bool(found) else "\nnot as prompted"

    def poster(self) -> bytes:
        """The canvas as it is, and beside it the picture."""
        parts = [pillow.open(io.BytesIO(png)).convert("RGB") for png in (self.canvas.poster(), self.picture.value)]
        sheet = pillow.new("RGB", (SHEET + 2 + WIDTH, max(part.height for part in parts)), "white")
        sheet.paste(parts[0], (1, TOP + HEAD))
        sheet.paste(parts[1], (parts[0].width + 2, 0))
        ImageDraw.Draw(sheet).rectangle((0, TOP + HEAD - 1, SHEET + 1, TOP + HEAD + SHEET), outline=style.COLOURS["muted"])
        return pictures.small_png(sheet)


def _empty(told: Told) -> bool:
    """Whether nothing is on the sheet."""
    return told.start == NOTHING and not told.drawing.ink(SIDE, SIDE).any()
