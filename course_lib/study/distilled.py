"""The explorer of score distillation in the plane: particles that follow a rule's gradient over an exact density."""

from __future__ import annotations

import functools
import itertools
import math
from string import ascii_uppercase
from typing import Any, ClassVar, NamedTuple

import ipywidgets as widgets
import torch
from matplotlib.collections import LineCollection
from matplotlib.patheffects import withStroke
from torch import Tensor

from course_lib.devices import generator, one_thread
from course_lib.distill import Rule, falling, log_uniform, nfsd, of_score, sds, vsd
from course_lib.gaussians import Empirical, Mixture
from course_lib.guidance import cfg
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer
from course_lib.study.points import density, outline, plane, scatter

F64 = torch.float64
WIDTH, HEIGHT = 900, 470  # of the picture, in screen pixels
RULES = ("SDS", "VSD", "NFSD")
NOTHING = "none"  # the prompt of the reference
MOST = 6  # parts of a mixture: the bars of more would not be legible


class Setting(NamedTuple):
    """What decides a run: all controls but the step."""

    rule: str
    prompt: str
    guidance: float
    high: float
    low: float
    annealed: bool
    seed: int


class Parts(NamedTuple):
    """How particles lie in the parts of a mixture: their shares, (K,), and their spread in each over the exact one, (K,)."""

    shares: Tensor
    spreads: Tensor


class DistillExplorer(Explorer):
    """Particles in the plane under SDS, VSD or NFSD, above the exact density of what is asked for.

    prior   a `Mixture` in the plane of at most 6 parts, named A, B, ...: the reference D_ref, without a prompt
    rule    one of RULES
    prompt  NOTHING, or some of the parts, such as "A" or "A or B": D_cond is the exact Denoiser of p(x0 | prompt)

    All Denoisers are exact. The guided one is D_ref + guidance (D_cond - D_ref). The second score of VSD is that of the particles
    themselves, `Empirical`. D_bad of NFSD, the Denoiser of bad pictures, is that of blurred data: one Gaussian with the mean
    of the prior and twice its width, which has lost all parts. It takes the noise off at levels from `split`, the
    mean width s of a part: below, eps_ref holds the share kappa = sigma^2 / (s^2 + sigma^2) < 1/2 of the noise.

    Particles start from the round Gaussian with the prior's mean and variance and move by x0 <- x0 - lr w(sigma) gradient with
    w = sigma and lr falling from LR[0] to LR[1]. The levels fall from `high` to `low`, one for all particles (annealed), or are
    drawn log-uniform between them for each. A seed has one start and one sequence of noise, whatever the rule. Bars compare
    the share of each part with the exact one, and the spread within it with that of the part.

    Raises ValueError for a prior that is not in the plane or has too many parts, and for values that the controls do not offer.
    """

    N, STEPS, LR, KEPT = 96, 300, (0.3, 0.03), 32
    TAIL, FEWEST, FAR = 40, 2.0, 4.0
    RANGES: ClassVar = {"step": (0, STEPS), "guidance": (0.0, 20.0), "high": (1.0, 6.0), "low": (0.05, 0.5)}

    def __init__(
        self,
        prior: Mixture,
        rule: str = "SDS",
        prompt: str = NOTHING,
        guidance: float = 1.0,
        high: float = 3.0,
        low: float = 0.1,
        annealed: bool = True,
        step: int = 150,
        seed: int = 0,
    ):
        if prior.dim != 2:
            raise ValueError(f"prior is in {prior.dim} dimensions; expected 2")
        if len(prior.weights) > MOST:
            raise ValueError(f"prior has {len(prior.weights)} parts; expected at most {MOST}")
        self._prior, self.asked, self.K = prior, _prompts(prior), len(prior.weights)
        for name, value, among in (("rule", rule, RULES), ("prompt", prompt, self.asked)):
            if value not in among:
                raise ValueError(f"{name} = {value!r}; expected one of {', '.join(among)}")
        for name, value in (("step", step), ("guidance", guidance), ("high", high), ("low", low)):
            least, most = self.RANGES[name]
            if not least <= value <= most:
                raise ValueError(f"{name} = {value!r}; expected a number from {least:g} to {most:g}")
        self.split = float((prior.weights @ prior.covs.diagonal(dim1=1, dim2=2).mean(1)).sqrt())
        self.blurred = Mixture.gaussian(prior.mean, 2**2 * prior.cov)
        self.width = float((prior.cov.trace() / 2).sqrt())  # of the start
        reach = prior.means.abs().amax(1) + 2.5 * prior.covs.diagonal(dim1=1, dim2=2).amax(1).sqrt()
        self.half = round(1.35 * float(reach.max()), 1)  # of the plane that is shown: guidance may lead far out
        self.run = functools.lru_cache(maxsize=self.KEPT)(self._run)
        with style.context():
            self._build()

        def slider(name: str, value: float, step: float, description: str) -> widgets.FloatSlider:
            (least, most), digits = self.RANGES[name], ".2f" if step < 0.1 else ".1f"
            return widgets.FloatSlider(value, min=least, max=most, step=step, description=description, readout_format=digits)

        super().__init__(
            {
                "step": widgets.IntSlider(step, min=0, max=self.STEPS, step=5, description="step"),
                "rule": widgets.Dropdown(options=RULES, value=rule, description="rule"),
                "prompt": widgets.Dropdown(options=list(self.asked), value=prompt, description="prompt"),
                "guidance": slider("guidance", guidance, 0.5, "guidance"),
                "high": slider("high", high, 0.5, "highest σ"),
                "low": slider("low", low, 0.05, "lowest σ"),
                "annealed": widgets.Checkbox(annealed, description="annealed", indent=False),
                "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
            }
        )

    # --- what is computed -------------------------------------------------------------------------

    def rule(self, setting: Setting, particles: Tensor) -> Rule:
        """The rule of a setting; VSD's second score follows `particles` (N, 2) as they move in place."""
        D_cond, D_ref = self.asked[setting.prompt].denoiser, self._prior.denoiser
        if setting.rule == "NFSD":
            return nfsd(D_cond, D_ref, self.blurred.denoiser, setting.guidance, self.split, of_score)
        D = cfg(D_cond, D_ref, setting.guidance)
        return sds(D, of_score) if setting.rule == "SDS" else vsd(D, Empirical(particles), of_score)

    def _run(self, setting: Setting) -> Tensor:
        """The particles before each step and after the last, (STEPS + 1, N, 2).

        A plain loop: `distill` gives each particle a generator of its own, which costs more than all the rest of a step.
        """
        draws, chance = generator(setting.seed, 0), generator(setting.seed, 1)
        x = self._prior.mean + self.width * torch.randn(self.N, 2, dtype=F64, generator=draws)
        rule = self.rule(setting, x)
        levels = falling(setting.high, setting.low) if setting.annealed else log_uniform(setting.low, setting.high)
        noise, kept = functools.partial(_normal, draws), [x.clone()]
        with one_thread():
            for k in range(self.STEPS):
                progress = k / (self.STEPS - 1)
                lr = self.LR[0] * (self.LR[1] / self.LR[0]) ** progress
                x -= lr * rule(x, levels(progress, self.N, chance), noise)
                kept.append(x.clone())
        return torch.stack(kept)

    def parts(self, x: Tensor) -> Parts:
        """Shares and spreads of x (N, 2), a particle being in each part by p(part | x): exact samples are at w_k and 1.

        Further than FAR deviations from a part it is not in it. The spread in fewer than FEWEST particles is nan.
        """
        along = torch.einsum("nkd,kde->nke", x[:, None] - self._prior.means, self._prior.axes)
        near = (along**2 / self._prior.variances).sum(2) < self.FAR**2
        belongs = self._prior.responsibilities(x) * near
        count = belongs.sum(0)
        centre = belongs.T @ x / count[:, None]
        square = (belongs * ((x[:, None] - centre) ** 2).sum(2)).sum(0) / (count - 1)
        exact = self._prior.covs.diagonal(dim1=1, dim2=2).sum(1)
        return Parts(count / len(x), torch.where(count >= self.FEWEST, square / exact, math.nan).sqrt())

    def exact_shares(self, prompt: str) -> Tensor:
        """p(part | prompt), (K,)."""
        wanted = _wanted(prompt, self.K)
        return wanted * self._prior.weights / (wanted * self._prior.weights).sum()

    # --- what is shown ----------------------------------------------------------------------------

    def _build(self) -> None:
        """Make the artists once: a redraw only moves them, and another prompt redraws the plane."""
        self._figure = figure = pictures.canvas(WIDTH, HEIGHT)
        figure.set_layout_engine("none")
        self._axes, self._in_plane = figure.add_axes((0.06, 0.13, 0.43, 0.75)), ""
        tops, named = (1.0, 2.0), ("share of the particles (black: exact)", "spread relative to the exact one (black)")
        self._rows = [figure.add_axes((0.58, at, 0.39, 0.27)) for at in (0.61, 0.12)]
        counts = (self.K + 1, self.K)  # the shares have one more, of particles that are in no part
        self._bars = [ax.bar(range(n), 0, 0.6, color=style.COLOURS["model"]) for ax, n in zip(self._rows, counts, strict=True)]
        lines = {"colors": style.COLOURS["exact"], "linewidths": 2}
        self._exact = [ax.hlines(range(len(bars)), 0, 1, **lines) for ax, bars in zip(self._rows, self._bars, strict=True)]
        for ax, top, name in zip(self._rows, tops, named, strict=True):
            ax.set(xlim=(-0.6, self.K + 0.6), ylim=(0, 1.04 * top), yticks=(0, top / 2, top))
            ax.set_title(name, fontsize=13)
            ax.grid(False, axis="x")

    def draw(self, step: int, **others: Any) -> bytes:
        """The plane on the left; on the right the shares of the parts above the spreads in them."""
        setting = Setting(**others)
        run = self.run(setting)
        x, found = run[step], self.parts(run[step])
        if self._in_plane != setting.prompt:
            self._plane(setting.prompt)
        self._dots.set_offsets(x.numpy())
        self._trails.set_segments(list(run[max(0, step - self.TAIL) : step + 1].transpose(0, 1).numpy()))
        self._axes.set_title(self._said(setting, run, step), fontsize=14)
        shares = torch.cat([found.shares, 1 - found.shares.sum()[None]])
        self._set(0, shares, torch.cat([self.exact_shares(setting.prompt), torch.zeros(1)]))
        self._set(1, found.spreads, torch.ones(self.K))
        return pictures.render(self._figure)

    def _plane(self, prompt: str) -> None:
        """The density of what is asked for, the outline of all, the parts' names, and dots and trails to be moved."""
        ax, box = self._axes, (-self.half, self.half) * 2
        ax.clear()
        density(ax, self.asked[prompt].log_prob, box, levels=8)
        if prompt != NOTHING:
            outline(ax, self._prior.log_prob, box)
        self._trails = LineCollection([], colors=style.COLOURS["noise"], linewidths=0.8, alpha=0.5, zorder=2)
        ax.add_collection(self._trails)
        self._dots = scatter(ax, torch.zeros(1, 2), colour=style.COLOURS["model"], size=14, alpha=0.9)
        halo = [withStroke(linewidth=3, foreground="white")]
        for name, mean, cov in zip(ascii_uppercase, self._prior.means, self._prior.covs, strict=False):
            out = mean - self._prior.mean
            out = out / out.norm() if float(out.norm()) > 1e-6 else torch.tensor([0.0, 1.0], dtype=F64)
            at = mean + (2.8 * (out @ cov @ out).sqrt() + 0.05 * self.half) * out
            ax.text(*at.tolist(), name, ha="center", va="center", fontsize=14, path_effects=halo, zorder=4)
        plane(ax, box)
        ax.locator_params(nbins=8)
        self._in_plane = prompt

    def _said(self, setting: Setting, run: Tensor, step: int) -> str:
        level = f"σ from {setting.low:g} to {setting.high:g}"
        if setting.annealed:
            fallen = max(step - 1, 0) / (self.STEPS - 1)
            level = f"σ = {setting.high * (setting.low / setting.high) ** fallen:.2g}"
        prompt = "no prompt" if setting.prompt == NOTHING else f"prompt {setting.prompt}, guidance {setting.guidance:g}"
        outside = int((run[step].abs() > self.half).any(1).sum())
        return f"{setting.rule}: step {step} of {self.STEPS}, {level}\n{prompt}" + (
            f"; {outside} not in sight" if outside else ""
        )

    def _set(self, row: int, found: Tensor, exact: Tensor) -> None:
        """The height of each bar, its value below it, and a line across it where the exact one is."""
        ax, names = self._rows[row], [*ascii_uppercase[: self.K], "else"]
        for bar, value in zip(self._bars[row], found.nan_to_num(0).tolist(), strict=True):
            bar.set_height(value)  # one that is too high is cut
        self._exact[row].set_segments([[(k - 0.4, value), (k + 0.4, value)] for k, value in enumerate(exact.tolist())])
        values = ["none" if math.isnan(value) else f"{value:.2f}" for value in found.tolist()]
        ax.set_xticks(range(len(values)), [f"{name}\n{value}" for name, value in zip(names, values, strict=False)], fontsize=12)


def _normal(draws: torch.Generator, x: Tensor) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=draws)


def _wanted(prompt: str, K: int) -> Tensor:
    """1 for each of K parts that a prompt names, else 0; all for NOTHING."""
    names = ascii_uppercase[:K] if prompt == NOTHING else prompt.split(" or ")
    return torch.tensor([float(name in names) for name in ascii_uppercase[:K]], dtype=F64)


def _prompts(prior: Mixture) -> dict[str, Mixture]:
    """Prompt -> p(x0 | prompt): all parts, each, and, of three or more, each two."""
    names = ascii_uppercase[: len(prior.weights)]
    prompts = [NOTHING, *(names if len(names) > 1 else "")]
    if len(names) > 2:
        prompts += [" or ".join(two) for two in itertools.combinations(names, 2)]
    found = {}
    for prompt in prompts:
        kept = _wanted(prompt, len(names)).bool()
        found[prompt] = Mixture(prior.weights[kept], prior.means[kept], prior.covs[kept])
    return found
