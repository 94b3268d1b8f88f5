"""The explorer of text-to-video: a clip of the prompt and the motion, beside the image model, frame by frame."""

from __future__ import annotations

import functools
import html
import io
import itertools
import re
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import ipywidgets as widgets
import numpy as np
from PIL import Image as pillow
from torch import Tensor

from course_lib.study import clips, pictures, style
from course_lib.study.explorer import Explorer
from course_lib.video.inflation import mixed
from course_lib.video.measures import identity
from course_lib.worlds.scenes.captions import Reading, parse
from course_lib.worlds.scenes.clip_captions import PHRASES, parse_motion
from course_lib.worlds.scenes.labels import OF_OBJECT
from course_lib.zoo.video import PretrainedVideo, clips_of, split
from course_lib.zoo.video_data import SHARED

if TYPE_CHECKING:  # reading a model loads diffusers
    from course_lib.zoo.motion_reader import MotionReader
    from course_lib.zoo.readers import SceneReader

WIDTH, CELL, TOP, FOOT = 900, 384, 96, 66  # screen pixels: of all, of a clip, above and below the clips
GAP = (WIDTH - 2 * CELL) // 3
HEIGHT = TOP + CELL + FOOT
LINE = 82  # characters of a prompt that fit in one line of the figure
SILENT = "nothing said"


def motion_name(motion: str, direction: str) -> str:
    """A motion in few words: "sliding left", "camera orbits right"; of none "no motion"."""
    phrase = PHRASES[motion, direction][0] if motion else "no motion"
    return phrase.removeprefix("while the ").replace(" to the ", " ")


MOTIONS: dict[str, str] = {SILENT: ""} | {motion_name(*key): phrases[0] for key, phrases in PHRASES.items()}
"""What the menu "motion" offers -> what is then said after the prompt."""


class Setting(NamedTuple):
    """What decides a clip; prompt names scene and motion."""

    prompt: str
    guidance: float
    mixing: float
    shared: float
    steps: int
    seed: int


class Seen(NamedTuple):
    """What is read in a clip: of how many frames shape and colour are right, or the commonest are; motion and direction."""

    said: str
    motion: tuple[str, str]


class VideoExplorer(Explorer):
    """A clip of a prompt and a motion that plays, beside the same prompt drawn by the image model frame by frame.

    model   a text-to-video `PretrainedVideo`, as `zoo.load("mini-video")`
    motions reads motions, `zoo.load("scenes-motion")`, as `reader` reads attributes, `zoo.load("scenes-reader")`
    folder  where "save MP4" writes the clip; by default the folder of the notebook

    mixing m turns what each temporal layer gives into z + m (z' - z): 0 is the image model, and above 1 it overshoots. `shared`
    is a of the noise that the frames have in common, see `video.noise`. The clip on the right has m = 0 and a = 0; both have one
    guidance and one seed, so that with m = 0 and a = 0 they are equal to the last bit. Shape, colour and motion are read in both.
    A clip is kept, so that only what has changed is computed. Words that the model never saw, and a motion that it cannot hear,
    are told below the view.

    Raises ValueError for values that the explorer does not offer.
    """

    KEPT = 64  # clips that are kept
    NOISES = (0.0, 2.0, 10.0, SHARED)
    RANGES: ClassVar = {"guidance": (1.0, 8.0), "mixing": (0.0, 1.5), "steps": (4, 20), "seed": (0, 2**31 - 1)}

    def __init__(
        self,
        model: PretrainedVideo,
        motions: MotionReader,
        reader: SceneReader,
        prompt: str = "a large red car on grass",
        motion: str = "sliding left",
        mixing: float = 1.0,
        shared: float = SHARED,
        guidance: float = 2.0,
        steps: int = 8,
        seed: int = 0,
        folder: Path | str = ".",
    ):
        self._model, self._motions_of, self._reader, self._folder = model, motions, reader, Path(folder)
        for name in ("clip", "seen"):
            setattr(self, name, functools.lru_cache(maxsize=self.KEPT)(getattr(self, f"_{name}")))
        self._check(motion, shared, guidance=guidance, mixing=mixing, steps=steps, seed=seed)
        with style.context():
            self._build()
        made = {
            "prompt": widgets.Text(prompt, description="prompt", continuous_update=False, layout=widgets.Layout(width="430px")),
            "motion": widgets.Dropdown(options=list(MOTIONS), value=motion, description="motion"),
            "mixing": self._slider("mixing", mixing, 0.05),
            "guidance": self._slider("guidance", guidance, 0.5),
            "shared": widgets.Dropdown(options=[(_shared(a), a) for a in self.NOISES], value=shared, description="noise"),
            "steps": widgets.IntSlider(steps, min=self.RANGES["steps"][0], max=self.RANGES["steps"][1], description="steps"),
            "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
        }
        super().__init__(made)
        self.save = widgets.Button(description="save MP4", tooltip="write the clip on the left to a file")
        self.saved = widgets.HTML()
        self.save.on_click(lambda _: self._save())
        self.children[0].children = (*self.children[0].children, self.save)
        self.children = (*self.children, self.saved)

    def _slider(self, name: str, value: float, step: float) -> widgets.FloatSlider:
        low, high = self.RANGES[name]
        digits = ".1f" if step >= 0.1 else ".2f"
        return widgets.FloatSlider(value, min=low, max=high, step=step, description=name, readout_format=digits)

    def _check(self, motion: str, shared: float, **values: float) -> None:
        if motion not in MOTIONS:
            raise ValueError(f"motion = {motion!r}; expected one of {', '.join(MOTIONS)}")
        if shared not in self.NOISES:
            raise ValueError(f"shared = {shared!r}; expected one of {', '.join(f'{a:g}' for a in self.NOISES)}")
        for name, value in values.items():
            low, high = self.RANGES[name]
            if not low <= value <= high:
                raise ValueError(f"{name} = {value!r}; expected a number from {low:g} to {high:g}")

    # --- what is computed -------------------------------------------------------------------------

    def settings(
        self, prompt: str, motion: str, mixing: float, shared: float, guidance: float, steps: int, seed: int
    ) -> tuple[Setting, Setting]:
        """What the controls ask for: the clip, and the image model frame by frame, which is not told of the motion."""
        scene, told = split(prompt)[0], said(prompt, motion)
        told = told if mixing and split(told)[1] else scene  # a motion that is not heard would be taken for a part of the scene
        plain = Setting(scene, guidance, 0.0, 0.0, steps, seed)
        return plain._replace(prompt=told, mixing=mixing, shared=shared), plain

    def _clip(self, of: Setting) -> Tensor:
        """The clip (T, 3, H, W) of a setting."""
        with warnings.catch_warnings(), mixed(self._model.denoiser.net, of.mixing):
            warnings.simplefilter("ignore", UserWarning)  # of unknown words, which `_show` tells
            return clips_of(self._model, [of.prompt], of.guidance, of.seed, of.steps, of.shared)[0]

    def _seen(self, of: Setting, prompt: str) -> Seen:
        """What is read in the clip of a setting, beside what this prompt asks for."""
        x, wanted = self.clip(of)[None], asked(prompt)[0]
        moved = self._motions_of.read(x)
        if wanted is not None:
            right = int(identity(x, self._reader, [wanted])["both"].sum())
            words = f"shape and colour as asked: {right} of {x.shape[1]} frames"
        else:
            read = self._reader.read(x[0])
            pairs = zip(read.colour[:, 0].tolist(), read.shape[:, 0].tolist(), strict=True)
            (colour, shape), most = Counter(pairs).most_common(1)[0]
            words = f"read: {OF_OBJECT['colour'][colour]} {OF_OBJECT['shape'][shape]} in {most} of {x.shape[1]} frames"
        return Seen(words, (moved.word[0], moved.direction[0]))

    # --- what is shown ----------------------------------------------------------------------------

    def _build(self) -> None:
        """Make the artists once: a redraw only changes them. The clips are put into the picture's pixels."""
        self._places = [(TOP, GAP), (TOP, 2 * GAP + CELL)]
        self._figure = figure = pictures.canvas(WIDTH, HEIGHT)
        figure.set_layout_engine("none")
        self._axes = axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.set_axis_off()
        look = {"ha": "center", "va": "baseline", "parse_math": False}
        self._heading = axes.text(WIDTH / 2, 26, "", fontsize=14, **look)
        middles = [x + CELL / 2 for _, x in self._places]
        self._titles = [
            axes.text(x, TOP - 32, "", fontsize=12, linespacing=1.25, **look | {"va": "center_baseline"}) for x in middles
        ]
        self._kept, self._motions = (
            [axes.text(x, TOP + CELL + down, "", fontsize=13, **look) for x in middles] for down in (26, 51)
        )

    def draw(self, **values: Any) -> bytes:
        """The clip and the frames of the image model, and what is read in both; an animated PNG."""
        self._check(values["motion"], values["shared"], **{name: values[name] for name in self.RANGES})
        prompt, both = said(values["prompt"], values["motion"]), self.settings(**values)
        m, a = values["mixing"], values["shared"]
        scene, motion = split(prompt)
        scene = textwrap.shorten(scene, LINE - len(motion), placeholder=" …") or "(nothing)"
        self._heading.set_text(f"asked: {scene}{motion and ', '}{motion}")
        layers = f"with temporal layers, mixing {m:g}" if m else "mixing 0: the image model"
        self._titles[0].set_text(f"{layers}\nnoise: {_shared(a)}")
        self._titles[1].set_text(f"the image model, frame by frame\nnoise: {_shared(0)}")
        wanted = asked(prompt)[1]
        for of, kept, moved in zip(both, self._kept, self._motions, strict=True):
            seen = self.seen(of, prompt)
            kept.set_text(seen.said)
            right = wanted is not None and seen.motion == wanted
            verdict = "" if wanted is None else ", as asked" if right else ", not as asked"
            moved.set_text(f"motion: {motion_name(*seen.motion) if seen.motion[0] else 'none is read'}{verdict}")
            moved.set_color("black" if wanted is None else style.COLOURS["model" if right else "warn"])
        frames = [pictures.to_rgb(self.clip(of), "clip") for of in both]
        scale = CELL // frames[0].shape[1]
        return clips.apng(clips.drawn(self._figure), self._places, np.stack(frames), clips.FPS, scale)

    def poster(self) -> bytes:
        """The first frame of both: what viewers without a kernel see."""
        with pillow.open(io.BytesIO(self.picture.value)) as playing:
            return pictures.small_png(playing.convert("RGB"))

    def _show(self, values: dict[str, Any]) -> None:
        super()._show(values)
        prompt, motion = values["prompt"], values["motion"]
        told, image = said(prompt, motion), self._model.image
        unknown = image.unknown_words([split(prompt)[0]])
        lines = [image.never_saw(unknown)] if unknown else []
        if MOTIONS[motion] and not split(told)[1]:
            lines.append(f"the prompt is no scene that captions can name, so the temporal layers do not hear {motion!r}")
        self.message.value = _warning("; ".join(lines)) if lines else ""

    # --- a file -----------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the clip to a new file, and say where."""
        told = self.settings(**self.values)[0]
        words = said(self.values["prompt"], self.values["motion"]).lower()
        path = _free(self._folder.resolve(), re.sub(r"[^a-z0-9]+", "_", words).strip("_")[:80] or "clip")
        try:
            clip = self.clip(told)
            self.saved.value = html.escape(clips.saved(clip, path, scale=CELL // clip.shape[-1])[1])
        except (OSError, RuntimeError) as error:
            self.saved.value = _warning(f"not saved: {' '.join(str(error).split())}")


def said(prompt: str, motion: str) -> str:
    """The prompt with the motion of the menu in the place of its own, where one was chosen."""
    scene = split(prompt)[0]
    return f"{scene}, {MOTIONS[motion]}" if scene and MOTIONS[motion] else prompt


def asked(prompt: str) -> tuple[Reading | None, tuple[str, str] | None]:
    """The scene and the motion, with its direction, that a prompt asks for; None for what it does not name."""
    if split(prompt)[1]:
        found = parse_motion(prompt)
        return found.scene, (found.motion, found.direction)
    try:
        scene = parse(prompt)
    except ValueError:
        return None, None
    return (scene if scene.objects else None), None


def _free(folder: Path, name: str) -> Path:
    """The first of name_1.mp4, name_2.mp4, ... that is not there, nor as an animated PNG."""
    paths = (folder / f"{name}_{number}.mp4" for number in itertools.count(1))
    return next(path for path in paths if not path.exists() and not path.with_suffix(".png").exists())


def _shared(a: float) -> str:
    return f"shared, a = {a:g}" if a else "each frame its own"


def _warning(words: str) -> str:
    return f'<span style="color:{style.COLOURS["warn"]}">{html.escape(words)}</span>'
