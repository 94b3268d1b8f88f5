"""`mini-sd` steered without a control's training: guidance by an edge predictor, and noise priors for segmentation maps.

`python -m course_lib.zoo.controls_guided` (or `... predictor sketch`) measures what `controls_guided.json` has not yet, row by
row, so that it goes on where it was interrupted; `rows(part)` reads it.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import zoo
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise, autocast, generator, one_thread
from course_lib.guidance import cfg
from course_lib.guidance.sketch import predictor, sketch_guided
from course_lib.nets.control import controlled
from course_lib.nets.edge_predictor import EdgePredictor, block_ends, tapped
from course_lib.noise_priors import NoisePrior, categorical, coarse, joint, plain, spatial
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.training import Fit, fit
from course_lib.types import Noise, Step, right
from course_lib.worlds.scenes.dataset import cache_folder
from course_lib.worlds.scenes.maps import CLASSES
from course_lib.zoo import stored
from course_lib.zoo.control_data import Mapped, mapped
from course_lib.zoo.judge_controls import MAPS, STEPS, W, judged, prompts, scenes
from course_lib.zoo.judge_scenes import BATCH as PICTURES
from course_lib.zoo.map_judge import edge_f1, truth
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.recipes.control import BATCH, batches
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("controls_guided.json")
WEIGHTS = Path(__file__).with_name("controls_guided.safetensors")
COMMAND = "python -m course_lib.zoo.controls_guided"
SCENES, SEED = 4_000, 62
"""Scenes that the edge predictor learns from, and that the priors' moments are of."""
TRAINING_STEPS = 1_500
KEPT = 0.05
"""So much of the prompts' adherence may guidance cost on the validation scenes."""
CODES = {"latents": 4, "lines": 64}
"""What a predictor may predict, and its channels: the VAE's latents of the drawing, as the paper has it, or its own pixels."""


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


@functools.cache
def model() -> Pretrained:
    """What is steered."""
    return zoo.load("mini-sd", device="cpu")


# --- the edge predictor ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoded(drawing: Tensor, code: str) -> Tensor:
    """A drawing (N, 3, 64, 64) in [0, 1] at the side of the latents, (N, CODES[code], 8, 8), one of CODES."""
    if code == "lines":
        return F.pixel_unshuffle(drawing[:, :1], model().factor)
    with autocast(model().device):
        return torch.cat([model().encode(2 * some - 1).float() for some in drawing.split(BATCH)])


@dataclass
class Drawn(Mapped):
    """Scenes whose condition is their drawing in all CODES, (N, 4 + 64, 8, 8)."""

    codes: Tensor

    def condition(self, kind: str, rows: Tensor) -> Tensor:
        """The codes of these scenes' lines."""
        return self.codes[rows]


def drawn(of: Mapped) -> Drawn:
    """These scenes with the codes of their lines."""
    lines = of.condition("lines", torch.arange(len(of)))
    return Drawn(of.of, of.mean, of.std, of.ids, of.maps, torch.cat([encoded(lines, code) for code in CODES], 1))


def networks() -> nn.ModuleDict:
    """The untrained predictors, one for each of CODES."""
    with tapped(layers()) as features, torch.no_grad():
        model().denoiser.given(**model().embed([""]))(torch.zeros(1, *model().shape), torch.ones(()))
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        return nn.ModuleDict({code: EdgePredictor(sum(f.shape[1] for f in features), c) for code, c in CODES.items()})


def layers() -> list[nn.Module]:
    """The layers of `mini-sd` that are read."""
    return block_ends(model().net)


def errors_of(nets: nn.ModuleDict, D: NetworkDenoiser, x0: Tensor, sigma: Tensor, eps: Tensor, codes: Tensor) -> Tensor:
    """The squared error of each predictor for each sample over its code's own mean square, (B, number of CODES)."""
    x = x0 + right(sigma, x0) * eps
    with tapped(layers()) as features, torch.no_grad():
        D(x, sigma)
    time = D.c_noise(sigma.double()).to(x)
    found = [
        (nets[code](features, time), wanted) for code, wanted in zip(CODES, codes.split(list(CODES.values()), 1), strict=True)
    ]
    return torch.stack([(P - E).float().square().flatten(1).mean(1) / E.float().var() for P, E in found], 1)


def train(steps: int = TRAINING_STEPS) -> Fit:
    """Minimise the errors of both predictors on noisy latents of SCENES scenes, at noise levels even in t."""
    draw = batches(drawn(mapped(SCENES, SEED)), ("lines",), model().schedule.sigma(torch.arange(1000)), dropped=0.0)

    def loss(nets: nn.ModuleDict, x0: Tensor, sigma: Tensor, eps: Tensor, ids: Tensor, codes: Tensor) -> Tensor:
        with torch.no_grad():
            text = model().pipeline.text_encoder(ids)[0]
        return errors_of(nets, model().denoiser.given(encoder_hidden_states=text), x0, sigma, eps, codes).sum(1)

    kept = cache_folder() / "controls" / "edge_predictor.ckpt"
    return fit(networks(), draw, loss, steps=steps, lr=3e-3, seed=SEED, device="cpu", checkpoint=kept, save_every=250)


@functools.cache
def predictors() -> nn.ModuleDict:
    """The trained predictors; they are trained, and kept in half precision, where that was not done."""
    if not WEIGHTS.exists():
        state = train().net.state_dict()
        save_file({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, WEIGHTS)
    nets = networks()
    nets.load_state_dict(load_file(WEIGHTS))
    return nets.float().eval().requires_grad_(False)


@torch.no_grad()
def accuracy(t: int) -> Row:
    """At the level of one trained time, on the test scenes: what the predictors leave of their codes' variance, and F1 of lines.

    The variance is about the mean drawing, place by place, so that 1 is what is known without a look at x. A line is where the
    predicted pixel is above a third.
    """
    of = drawn(scenes("test"))
    sigma, x0 = (
        model().schedule.sigma(torch.tensor(float(t))),
        of.latents(torch.arange(len(of)), torch.randn(of.mean.shape, generator=generator(t))),
    )
    D = model().denoiser.given(**model().embed(prompts("test")))
    with tapped(layers()) as features, one_thread(), autocast("cpu"):
        D(x0 + sigma.to(x0) * SampleNoise(t)(x0), sigma)
    row: Row = {"t": t, "sigma": round(float(sigma), 4)}
    asked = truth(of, torch.arange(len(of))).lines
    for code, E in zip(CODES, of.codes.split(list(CODES.values()), 1), strict=True):
        P = predictors()[code]([f.float() for f in features], D.c_noise(sigma).float())
        row[f"{code}_left"] = round(float((P - E).square().mean() / (E - E.mean(0)).square().mean()), 4)
    row["lines_f1"] = round(float(edge_f1(F.pixel_shuffle(P, model().factor) > 1 / 3, asked).mean()), 4)
    return row


# --- sampling, with what may be changed about it --------------------------------------------------------------------------

Begin = Callable[[slice, Noise, Tensor], Tensor]
"""(rows, noise, sigma) -> x of these scenes at the first level."""
StepOf = Callable[[slice, NetworkDenoiser], Step]
"""(rows, the Denoiser under their prompts) -> the step for these scenes."""


def usual(rows: slice, noise: Noise, sigma: Tensor) -> Tensor:
    """The pipeline's own start."""
    return model().start(noise(torch.empty(rows.stop - rows.start, *model().shape)), sigma)


def pictures(
    split: str,
    seed: int,
    sigmas: Tensor,
    control: str | None = None,
    begin: Begin = usual,
    step_of: StepOf = lambda rows, D: ddim,
) -> Tensor:
    """One picture of each scene of a split, (N, 3, 64, 64): of its prompt, and of its map where a kind of control is named.

    The usual start and DDIM give the pictures of `judge_controls.pictures_of`.
    """
    of, texts, found = scenes(split), prompts(split), []
    D = (
        model().denoiser
        if control is None
        else controlled(model().denoiser, map=zoo.load(f"mini-control-{control}", device="cpu"))
    )
    for first in range(0, len(of), PICTURES):
        rows = slice(first, min(first + PICTURES, len(of)))
        at = torch.arange(rows.start, rows.stop)
        given = {} if control is None else {"map": of.condition(MAPS[control][0], at)}
        pair = [D.given(**model().embed(text), **given) for text in (texts[rows], [""] * len(at))]
        with one_thread(), autocast("cpu"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            x = begin(rows, SampleNoise(seed, first), sigmas[0])
            x = sample(cfg(*pair, W), x, sigmas, step_of(rows, pair[0]))
            found.append(model().decode(model().finish(x, sigmas[-1])).float())
    return torch.cat(found)


# --- sketch guidance --------------------------------------------------------------------------------------------------------


def sketched(split: str, seed: int, code: str, beta: float, t: int) -> Tensor:
    """Pictures guided by the predictor of a code, with strength `beta`, at the levels above that of time t."""
    lines = scenes(split).condition("lines", torch.arange(len(scenes(split))))
    target, low = encoded(lines, code), float(model().schedule.sigma(torch.tensor(float(t))))

    def step_of(rows: slice, D: NetworkDenoiser) -> Step:
        return sketch_guided(ddim, predictor(D, predictors()[code], layers()), target[rows], beta, low)

    return pictures(split, seed, model().sigmas(STEPS), step_of=step_of)


def tune_sketch(code: str, beta: float, t: int) -> Row:
    """One setting on the validation scenes, with a seed that is not measured with."""
    return {"code": code, "beta": beta, "t": t, **judged(sketched("validation", 100, code, beta, t), "validation")}


def chosen_sketch(code: str) -> Row:
    """The setting of a code with the smallest edge error on the validation scenes of those that keep the prompts.

    Kept they are where at most KEPT fewer of the pictures obey than without guidance.
    """
    tried = rows("sketch tuning")
    least = next(row["obeyed"] for row in tried if row["beta"] == 0) - KEPT
    best = min((row for row in tried if row["code"] == code and row["obeyed"] >= least - 1e-9), key=lambda row: row["edge"])
    return {name: best[name] for name in ("code", "beta", "t")}


def sketch(method: str, seed: int) -> Row:
    """The test scenes without their lines ('none'), guided by one of CODES of them, or under `mini-control-edge` ('control')."""
    if method in CODES:
        found = sketched("test", seed, **chosen_sketch(method))
    else:
        found = pictures("test", seed, model().sigmas(STEPS), "edge" if method == "control" else None)
    return {"method": method, "seed": seed, **judged(found, "test")}


# --- noise priors -----------------------------------------------------------------------------------------------------------


@functools.cache
def priors() -> dict[str, NoisePrior]:
    """The usual start and those of Gao et al. 2024, their moments those of SCENES training scenes."""
    of, K = mapped(SCENES, SEED), len(CLASSES)
    at = torch.arange(len(of))
    x0, labels = of.latents(at, torch.randn(of.mean.shape, generator=generator(SEED))), labels_of(of)
    return {
        "plain": plain(model().shape, K),
        "spatial": spatial(x0, K),
        "categorical": categorical(x0, labels, K),
        "joint": joint(x0, labels, K),
    }


def labels_of(of: Mapped) -> Tensor:
    """The class of each place of these scenes' latents, (N, 8, 8)."""
    return coarse(of.maps["classes"], model().factor, len(CLASSES))


def levels(steps: int, t: int) -> Tensor:
    """`model().sigmas(steps)`, begun at time t <= 999 instead of the last one: the same spacing, over fewer times."""
    times = torch.arange(t + 1, 0, -(t + 1) / steps, dtype=torch.float64).round() - 1
    return model().schedule.sigma(torch.cat([times, torch.zeros(1)])).unique().flip(0)


def mismatch(t: int) -> Row:
    """How far N(0, I) is from what x_t is, in numbers: on the test scenes, exactly.

    signal  sqrt(alpha_bar): how much of x0 is in x_t
    shift   the length of the mean of x_t over the scenes, in standard deviations of its noise; 0 for the usual start
    spread  the largest eigenvalue of the covariance of x_t over that of the usual start, 1; and the smallest
    nats    by how much the usual start is worse than each prior, a scene: the difference of `NoisePrior.nats`
    fitted  the same for one Gaussian with the full mean and covariance of the training latents, whatever the classes
    """
    sigma = model().schedule.sigma(torch.tensor(float(t)))
    of, test, s2 = mapped(SCENES, SEED), scenes("test"), float(sigma) ** 2
    known, x0 = (set_.latents(torch.arange(len(set_)), torch.randn(set_.mean.shape, generator=generator(k))).double().flatten(1)
                 for k, set_ in ((SEED, of), (t, test)))  # fmt: skip
    m, C = known.mean(0), torch.cov(known.T)
    V = C + s2 * torch.eye(len(m), dtype=torch.float64)
    off = x0 - m
    quadratic = (off @ torch.linalg.inv(V) * off).sum(1) + s2 * torch.linalg.inv(V).trace()
    fitted = (quadratic + torch.logdet(V) + len(m) * math.log(2 * math.pi)) / 2
    nats = {name: prior.nats(x0.view(-1, *model().shape), labels_of(test), sigma) for name, prior in priors().items()}
    ends = torch.linalg.eigvalsh(V) / (1 + s2)
    return {
        "t": t,
        "sigma": round(float(sigma), 4),
        "alpha_bar": round(1 / (1 + s2), 6),
        "signal": round((1 + s2) ** -0.5, 4),
        "shift": round(float(m.norm()) / math.sqrt(s2), 4),
        "spread": [round(float(ends[-1]), 4), round(float(ends[0]), 4)],
        "nats": {name: round(float((nats["plain"] - value).mean()), 4) for name, value in nats.items() if name != "plain"},
        "fitted": round(float((nats["plain"] - fitted).mean()), 4),
    }


def begun(split: str, prior: str, steps: int, t: int, seed: int) -> Row:
    """Segmentation-conditioned pictures of a split, from a prior at the level of time t in so many steps of DDIM."""
    labels = labels_of(scenes(split))
    begin = lambda rows, noise, sigma: priors()[prior].start(labels[rows], sigma, noise)
    found = judged(pictures(split, seed, levels(steps, t), "seg", begin), split)
    return {"prior": prior, "steps": steps, "t": t, "seed": seed, **found}


def chosen_time(steps: int) -> int:
    """The time to begin at, of which either the usual start or the joint prior has the smallest Frechet distance (validation)."""
    return min((row for row in rows("prior tuning") if row["steps"] == steps), key=lambda row: row["frechet"])["t"]


def tune_prior(prior: str, steps: int, t: int) -> Row:
    """One setting on the validation scenes, with a seed that is not measured with."""
    return begun("validation", prior, steps, t, 100)


def from_prior(prior: str, steps: int, seed: int) -> Row:
    """A prior on the test scenes, begun where the schedule ends."""
    return begun("test", prior, steps, LAST, seed)


def from_chosen(prior: str, steps: int, seed: int) -> Row:
    """A prior on the test scenes, begun at the time that is best for so many steps."""
    return begun("test", prior, steps, chosen_time(steps), seed)


SEEDS = (0, 1, 2)
LAST = 999
TIMES = (LAST, 899, 799, 599, 399, 199)
FEW = (2, 5, 20)
"""Steps from a prior: the fewer, the longer the first, which is where priors differ."""
PRIORS = ("plain", "spatial", "categorical", "joint")
PARTS: stored.Parts = {
    "predictor": (accuracy, [{"t": t} for t in (9, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999)]),
    "sketch tuning": (
        tune_sketch,
        [{"code": "lines", "beta": 0.0, "t": 499}]
        + [{"code": code, "beta": beta, "t": 499} for code in CODES for beta in (0.4, 0.8, 1.6)]
        + [{"code": "lines", "beta": beta, "t": 199} for beta in (0.4, 0.8)],
    ),
    "sketch": (sketch, [{"method": method, "seed": seed} for seed in SEEDS for method in ("none", *CODES, "control")]),
    "mismatch": (mismatch, [{"t": t} for t in TIMES]),
    "prior tuning": (
        tune_prior,
        [{"prior": prior, "steps": steps, "t": t} for steps in FEW[:-1] for prior in ("plain", "joint") for t in TIMES],
    ),
    "priors": (
        from_prior,
        [{"prior": prior, "steps": steps, "seed": seed} for steps in FEW for seed in SEEDS for prior in PRIORS],
    ),
    "late priors": (
        from_chosen,
        [{"prior": prior, "steps": steps, "seed": seed} for steps in FEW[:-1] for seed in SEEDS for prior in PRIORS],
    ),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    stored.run(STORED, COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
