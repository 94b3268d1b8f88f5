"""The explorer of score distillation on a text-to-image model: a picture as it is distilled, step by step."""

from __future__ import annotations

import functools
import html
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from course_lib.devices import generator
from course_lib.distill import Levels, Rule, distill, nfsd, sds, sjc, uniform_times
from course_lib.guidance import cfg
from course_lib.nets.pixels import Pixels
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer
from course_lib.types import Denoiser, Noise, right

if TYPE_CHECKING:  # reading a model loads diffusers
    from course_lib.zoo.pretrained import Pretrained

WIDTH, SIDE, GAP, TOP, STRIP, FOOT = 900, 256, 24, 66, 120, 56  # of the view, its pictures and strips, in screen pixels
HEIGHT = TOP + SIDE + 30 + STRIP + FOOT
NFSD = "NFSD"
RULES = ("SDS", "SDS without − ε", "SJC, mean of 2", NFSD)
NOISY = 0.2  # share of the trained times above which NFSD asks D_bad (Katzir et al. 2024, Sec. 4)


class Setting(NamedTuple):
    """What decides a run: all controls but the step."""

    prompt: str
    rule: str
    guidance: float
    annealed: bool
    seed: int


class Step(NamedTuple):
    """x0 (1, C, H, W) after a step; and where it asked: sigma (1,), x there; and the rms of its gradient."""

    x0: Tensor
    sigma: Tensor
    x: Tensor
    size: float


class Distilling:
    """A run of `steps` steps of Adam on one latent, as far as it was asked for."""

    def __init__(self, rule: Rule, levels: Levels, theta: Pixels, steps: int, lr: float, seed: int):
        self._rule, self._levels, self._theta, self._steps, self._seed = rule, levels, theta, steps, seed
        self._optimizer = torch.optim.Adam(theta.parameters(), lr=lr, betas=(0.9, 0.99))
        self.done: list[Step] = []

    def step(self, number: int) -> Step:
        """What this step did, counted from 1; those before it are done first."""
        while len(self.done) < number:
            self.done.append(self._next(len(self.done)))
        return self.done[number - 1]

    def _next(self, k: int) -> Step:
        seen: dict[str, Any] = {}

        def levels(progress: float, rows: int, draws: torch.Generator) -> Tensor:
            return self._levels(k / (self._steps - 1), rows, draws)

        def rule(x0: Tensor, sigma: Tensor, noise: Noise) -> Tensor:
            def watched(x0: Tensor) -> Tensor:
                eps = noise(x0)
                seen.update(sigma=sigma, x=x0 + right(sigma, x0) * eps)
                return eps

            gradient = self._rule(x0, sigma, watched)
            seen.update(size=float(gradient.square().mean().sqrt()))
            return gradient

        draws = generator(self._seed, k).initial_seed()  # one step of the course's loop, whose noise is that of step k
        x0 = distill(self._theta, rule, levels, self._optimizer, 1, seed=draws)
        return Step(x0.detach().clone(), **seen)


class ImageDistillExplorer(Explorer):
    """One latent of a text-to-image model, as score distillation makes a picture of it in STEPS steps of Adam.

    model  a text-to-image `Pretrained`
    D_bad  a Denoiser of bad pictures over the same latents, as `zoo.load("mini-sd-degraded")`; without it the menu has no NFSD
    rule   one of RULES

    Shown are x0 after the step, the noisy x at which it asked, in the model's own coordinate x / sqrt(1 + sigma^2), and what
    the guided Denoiser believes there, all three decoded; below them, the rms of the gradient w (eps_hat - eps), w = 1, and
    the level of each step until now. The deviation of x0 is 1 for latents of pictures; more of it is saturation. Times are
    uniform between 2 % and 98 % of the trained ones, or, annealed, their upper end falls to 10 %. A run goes on from the
    furthest step that was looked at. Words that the model never saw are told below the view.

    Raises ValueError for a rule that is unknown or lacks its D_bad, and for values outside the ranges of the controls.
    """

    STEPS, LR, KEPT = 100, 0.1, 16
    GUIDANCE = (1.0, 100.0)
    SIZES, LEVELS = (0.1, 200), (0.03, 30)  # of the axes of the strips

    def __init__(
        self,
        model: Pretrained,
        D_bad: Denoiser | None = None,
        prompt: str = "a large red mug on grass",
        rule: str = "SDS",
        guidance: float = 7.5,
        annealed: bool = True,
        step: int = 50,
        seed: int = 0,
    ):
        rules = [name for name in RULES if name != NFSD or D_bad is not None]
        if rule not in rules:
            raise ValueError(f"rule = {rule!r}; expected one of {', '.join(rules)}" + (", or a D_bad" if rule == NFSD else ""))
        for name, value, (low, high) in (("guidance", guidance, self.GUIDANCE), ("step", step, (1, self.STEPS))):
            if not low <= value <= high:
                raise ValueError(f"{name} = {value!r}; expected a number from {low:g} to {high:g}")
        self._model, self._D_bad = model, D_bad
        self.run = functools.lru_cache(maxsize=self.KEPT)(self._run)
        self.guided = functools.lru_cache(maxsize=self.KEPT)(self._guided)
        with style.context():
            self._build()
        wide = widgets.Layout(width="430px")
        super().__init__(
            {
                "step": widgets.IntSlider(step, min=1, max=self.STEPS, description="step"),
                "prompt": widgets.Text(prompt, description="prompt", continuous_update=False, layout=wide),
                "rule": widgets.Dropdown(options=rules, value=rule, description="rule"),
                "guidance": widgets.FloatSlider(
                    guidance,
                    min=self.GUIDANCE[0],
                    max=self.GUIDANCE[1],
                    step=0.5,
                    description="guidance",
                    readout_format=".1f",
                    continuous_update=False,
                ),
                "annealed": widgets.Checkbox(annealed, description="annealed", indent=False),
                "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
            }
        )

    # --- what is computed -------------------------------------------------------------------------

    @torch.no_grad()
    def _guided(self, prompt: str, guidance: float) -> tuple[Denoiser, Denoiser, Denoiser]:
        """D_cond, D_ref, and the one that is guided from one to the other."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unknown words, which `draw` tells
            D_cond, D_ref = (self._model.denoiser.given(**self._model.embed([text])) for text in (prompt, ""))
        return D_cond, D_ref, cfg(D_cond, D_ref, guidance)

    def _run(self, setting: Setting) -> Distilling:
        D_cond, D_ref, D = self.guided(setting.prompt, setting.guidance)
        schedule = self._model.schedule
        if setting.rule == NFSD:
            split = float(schedule.sigma(torch.tensor(NOISY * schedule.t_max)))
            rule = nfsd(D_cond, D_ref, self._D_bad, setting.guidance, split)
        else:
            rule = {"SDS": sds(D), RULES[1]: sds(D, baseline=False), RULES[2]: sjc(D, n=2)}[setting.rule]
        levels = uniform_times(schedule, end=0.1 if setting.annealed else None)
        theta = Pixels(self._model.shape, seed=setting.seed).to(self._model.device)
        return Distilling(rule, levels, theta, self.STEPS, self.LR, setting.seed)

    @torch.no_grad()
    def _decoded(self, *latents: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a large deviation, which is what guidance does to them
            return self._model.decode(torch.cat(latents)).float().cpu()

    # --- what is shown ----------------------------------------------------------------------------

    def _build(self) -> None:
        """Make the artists once: a redraw only changes them."""
        self._figure = figure = pictures.canvas(WIDTH, HEIGHT)
        figure.set_layout_engine("none")
        lefts = [(WIDTH - 3 * SIDE - 2 * GAP) / 2 + k * (SIDE + GAP) for k in range(3)]
        boxes = [(left / WIDTH, 1 - (TOP + SIDE) / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT) for left in lefts]
        self._axes = [figure.add_axes(box) for box in boxes]
        for ax in self._axes:
            ax.set_axis_off()
        blank = np.full((self._model.pixels, self._model.pixels, 3), 255, np.uint8)
        self._shown = [ax.imshow(blank, interpolation="nearest") for ax in self._axes]
        self._titles = [ax.set_title("", fontsize=13, pad=5) for ax in self._axes]
        self._heading = figure.text(0.5, 1 - 20 / HEIGHT, "", ha="center", va="center", fontsize=15)
        self._marks = []
        strips = (90, "rms gradient", self.SIZES, "model"), (520, "level σ", self.LEVELS, "noise")
        for left, name, (low, high), colour in strips:
            ax = figure.add_axes((left / WIDTH, FOOT / HEIGHT, 336 / WIDTH, STRIP / HEIGHT))
            ax.set(xlim=(0, self.STEPS + 1), yscale="log", ylim=(low, high), xlabel="step", ylabel=name)
            ax.set_yticks([tick for tick in (0.1, 1, 10, 100) if low <= tick <= high])
            ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            self._marks += ax.plot([], [], "o", color=style.COLOURS[colour], markersize=4)

    def draw(self, step: int, **others: Any) -> bytes:
        """The picture at this step, where it asked and what was believed there; and all steps until now."""
        setting = Setting(**others)
        run = self.run(setting)
        now, sigma = run.step(step), float(run.step(step).sigma)
        with torch.no_grad():
            belief = self.guided(setting.prompt, setting.guidance)[2](now.x, now.sigma)
        images = self._decoded(now.x0, now.x / (1 + sigma**2) ** 0.5, belief)
        said = (f"x0, deviation {float(now.x0.std()):.2f}", f"asked at x = x0 + σ ε, σ = {sigma:.2g}", "believed there, D(x, σ)")
        for shown, title, image, words in zip(self._shown, self._titles, pictures.to_rgb(images, "images"), said, strict=True):
            shown.set_data(image)
            title.set_text(words)
        self._heading.set_text(f"{setting.rule}: step {step} of {self.STEPS}, guidance {setting.guidance:g}")
        until = range(1, step + 1)
        self._marks[0].set_data(until, [run.step(k).size for k in until])
        self._marks[1].set_data(until, [float(run.step(k).sigma) for k in until])
        if unknown := self._model.unknown_words([setting.prompt]):
            words = html.escape(self._model.never_saw(unknown))
            self.message.value = f'<span style="color:{style.COLOURS["warn"]}">{words}</span>'
        return pictures.render(self._figure)
