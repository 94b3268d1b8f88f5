"""Score distillation of pictures with `mini-sd`, method by method: the latents of pictures, optimised under its score.

`python -m course_lib.zoo.distilled` (or `... tuning methods`) measures what `distilled.json` has not yet, row by row, so that it
goes on where it was interrupted; `rows(part)` reads it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import metrics, zoo
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise, autocast, generator, one_thread
from course_lib.distill import (
    Bootstrapped,
    Companions,
    Levels,
    Rule,
    SecondScore,
    checkpointed,
    distill,
    distill_grad,
    nfsd,
    point,
    sds,
    sjc,
    uniform_times,
    vsd,
)
from course_lib.distill.loop import Companion
from course_lib.guidance import cfg
from course_lib.nets.painted import Painted
from course_lib.nets.pixels import Pixels
from course_lib.nets.siren import Siren
from course_lib.types import Denoiser, Noise
from course_lib.worlds.scenes.captions import parse
from course_lib.zoo import stored
from course_lib.zoo.judge_distilled import PROMPTS, judged, judged_pictures, model, prompts, reader, renders
from course_lib.zoo.judge_scenes import generate
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("distilled.json")
COMMAND = "python -m course_lib.zoo.distilled"
Made = tuple[Rule, Companion | None]
SCALES = (1.0, 3.0, 7.5, 30.0, 100.0)
USUAL = 3.0
"""The scale that `mini-sd` is best sampled at, by its card: settings are chosen at it, and terms switched off."""
SEEDS = (0, 1, 2)
STEPS, PARTICLES = 150, 3
SETTINGS: dict[str, list[dict[str, float]]] = {
    **{name: [{"lr": lr} for lr in (0.03, 0.05, 0.1, 0.2)] for name in ("SDS", "SJC", "NFSD")},
    "VSD": [{"lr": lr, "second": second} for lr in (0.05, 0.1) for second in (1e-3, 5e-3)],
    "BSD": [{"lr": 0.05, "second": 5e-3, "start": start, "again": again} for start in (3.0, 10.0) for again in (1.0, 3.0)],
}
"""What each method may choose among: the rate of Adam; for VSD its second score's; BSD has VSD's two, and those of `bsd_of`."""
RANK = 4
"""Of the LoRAs that learn."""
DRAWS = 2
"""Draws of noise that SJC averages: with one it is SDS."""
SPLIT = 0.2
"""The share of the schedule below which NFSD takes eps_ref for what leads to pictures (Katzir et al. 2024: t < 200 of 1000)."""
PLAIN = "a large red ball"
"""The prompt of what draws its picture by few numbers."""


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


# --- what is distilled, and what judges it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Prompts, one for each particle, and the Denoisers of `mini-sd` under them and under the empty prompt."""

    prompts: list[str]
    D: NetworkDenoiser
    D_ref: NetworkDenoiser

    def guided(self, w: float) -> Denoiser:
        """Classifier-free guidance of scale w: 0 gives D_ref, 1 gives D."""
        return cfg(self.D, self.D_ref, w)


def asked(prompts: Sequence[str]) -> Asked:
    """The Denoisers of `mini-sd` under these prompts; ValueError for words that it never saw, which it would take for others."""
    if unknown := model().unknown_words(prompts):
        raise ValueError(f"prompts: {model().never_saw(unknown)}")
    given = [model().denoiser.given(**model().embed(some)) for some in (list(prompts), [""] * len(prompts))]
    return Asked(list(prompts), *given)


@functools.cache
def bad() -> Denoiser:
    """NFSD's Denoiser of pictures as they should not be."""
    return zoo.load("mini-sd-degraded", device="cpu")


def levels() -> Levels:
    """Times uniform between 0.02 and 0.98 of the schedule, for every method."""
    return uniform_times(model().schedule)


def split_level() -> float:
    """The noise level at SPLIT."""
    return float(model().schedule.sigma(torch.tensor(SPLIT * model().schedule.t_max)))


def learner(of: Asked, rate: float, seed: int) -> SecondScore:
    """VSD's second score, which starts as the teacher under the same prompts."""
    return SecondScore(of.D, levels(), rank=RANK, lr=rate, half=True, seed=seed)


def sds_of(of: Asked, w: float, seed: int) -> Made:
    """SDS of the guided Denoiser."""
    return sds(of.guided(w)), None


def sjc_of(of: Asked, w: float, seed: int) -> Made:
    """SJC of the guided Denoiser, the mean of DRAWS draws."""
    return sjc(of.guided(w), DRAWS), None


def vsd_of(of: Asked, w: float, seed: int, second: float) -> Made:
    """VSD of the guided Denoiser; `second` is the learning rate of its second score."""
    learns = learner(of, second, seed)
    return vsd(of.guided(w), learns), learns


def nfsd_of(of: Asked, w: float, seed: int) -> Made:
    """NFSD, its D_bad a LoRA of `mini-sd`."""
    return nfsd(of.D, of.D_ref, bad(), w, split_level()), None


def bsd_of(of: Asked, w: float, seed: int, second: float, start: float, again: float) -> Made:
    """VSD whose teacher is bootstrapped on re-noised pictures (BSD).

    They are noised to a level that falls from `start` to 0.5 and denoised with guidance w, which the teacher so learns; `again`
    is the scale at which it is guided itself, 1 for not at all.
    """
    learns = learner(of, second, seed)
    boot = Bootstrapped(
        of.D, of.guided(w), levels(), lambda progress: start + (0.5 - start) * progress, every=30, calls=8, rank=RANK, lr=second,
        half=True, seed=seed + 50,
    )  # fmt: skip
    return vsd(cfg(boot, of.D_ref, again), learns), Companions(boot, learns)


METHODS: dict[str, Callable[..., Made]] = {"SDS": sds_of, "SJC": sjc_of, "VSD": vsd_of, "NFSD": nfsd_of}
"""Of what is asked, the guidance scale, the seed and settings: the rule, and what learns beside it."""
BEYOND = {**METHODS, "BSD": bsd_of}
"""And the one that is measured at the usual scale only."""


def distilled(
    of: Asked, rule: Rule, lr: float, seed: int, companion: Companion | None = None, steps: int = STEPS
) -> tuple[Tensor, float]:
    """The latents of all particles after Adam whose rate falls evenly to 0, and seconds a step of one thread."""
    theta = Pixels(model().shape, len(of.prompts), seed, spread=1.0)
    optimizer = torch.optim.Adam(theta.parameters(), lr=lr, betas=(0.9, 0.99))

    def fall(step: int, x0: Tensor) -> None:
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)

    with one_thread(), sdpa_kernel(SDPBackend.MATH):  # the fused attention's way back is slow on sequences as short as these
        begun = time.process_time()
        z = distill(theta, rule, levels(), optimizer, steps, seed=seed, companion=companion, half=True, on_step=fall)
    return z, (time.process_time() - begun) / steps


# --- the rows ------------------------------------------------------------------------------------------------------------


def tune(method: str) -> Row:
    """Each setting on the validation prompts, a particle each, with a seed that is not measured with.

    Chosen is the one whose pictures obey most, and of several the one with the smallest Frechet distance.
    """
    tried, of = [], asked(prompts("validation"))
    for setting in SETTINGS[method]:
        made = BEYOND[method](of, USUAL, 100, **{name: value for name, value in setting.items() if name != "lr"})
        z, _ = distilled(of, made[0], setting["lr"], 100, made[1])
        tried.append({**setting, **judged(z, of.prompts, "validation")})
    best = min(range(len(tried)), key=lambda k: (-tried[k]["obeyed"], tried[k]["frechet"]))
    return {"method": method, "tried": tried, "chosen": SETTINGS[method][best]}


def chosen(method: str) -> dict[str, float]:
    """The setting that was best on the validation prompts."""
    return next(row["chosen"] for row in rows("tuning") if row["method"] == method)


def ordinary(w: float, seed: int) -> Row:
    """As many pictures of the same prompts, sampled: what distillation is held against."""
    of = prompts("test") * PARTICLES
    with one_thread():
        return {"w": w, "seed": seed, **judged_pictures(generate(model(), of, w, seed=200 + seed), of, "test")}


def rendered(seed: int) -> Row:
    """As many renders that obey the prompts, of those that the others are held against: what chance alone gives."""
    of = renders("test").unflatten(0, (PROMPTS["test"][0], -1))[:, PARTICLES * seed : PARTICLES * (seed + 1)]
    with one_thread():
        return {"seed": seed, **judged_pictures(of.transpose(0, 1).flatten(0, 1), prompts("test") * PARTICLES, "test")}


def measure(method: str, w: float, seed: int) -> Row:
    """One run of a method on the test prompts, PARTICLES of each, at its chosen setting."""
    setting, of = dict(chosen(method)), asked(prompts("test") * PARTICLES)
    lr = setting.pop("lr")
    rule, learns = BEYOND[method](of, w, seed, **setting)
    z, seconds = distilled(of, rule, lr, seed, learns)
    return {"method": method, "w": w, "seed": seed, **judged(z, of.prompts, "test"), "seconds_a_step": round(seconds, 4)}


def without(off: str, of: Asked, w: float) -> Rule:
    """The rule at the scale w without the term that defines it."""

    def prompt_alone(x0: Tensor, sigma: Tensor, noise: Noise) -> Tensor:
        return distill_grad(of.guided(w), of.D_ref, x0, sigma, noise)

    return {
        "SDS, prompt": sds(of.D_ref),
        "SJC, perturbation": sjc(of.guided(w), perturb=False),
        "VSD, second score": lambda x0, sigma, noise: distill_grad(of.guided(w), point(x0), x0, sigma, noise),
        "NFSD, delta_D": prompt_alone,
    }[off]


OFF = (
    ("SDS, prompt", USUAL),
    ("SJC, perturbation", USUAL),
    *(("VSD, second score", w) for w in (1.0, USUAL, 7.5, 30.0)),
    ("NFSD, delta_D", USUAL),
)


def ablate(off: str, w: float, seed: int) -> Row:
    """A method at the scale w without its defining term, at the method's own rate."""
    of, method = asked(prompts("test") * PARTICLES), off.split(",")[0]
    z, _ = distilled(of, without(off, of, w), chosen(method)["lr"], seed)
    return {"off": off, "method": method, "w": w, "seed": seed, **judged(z, of.prompts, "test")}


def aligned(seed: int, w: float, steps: Sequence[int] = (0, 10, 25, 50, 100, 200, 400)) -> Row:
    """The cosine between the gradients of VSD and SDS on one frozen render, as the second score learns it.

    A second score that knows the one particle exactly is a point mass, and VSD is then SDS. At w = 1 VSD is 0 at first.
    """
    each = len(renders("test")) // PROMPTS["test"][0]
    of = asked([prompts("test")[seed]] * 8)
    with torch.no_grad():
        x0 = model().encode(renders("test")[seed * each : seed * each + 1]).expand(8, -1, -1, -1)
    second, cosines = learner(of, chosen("VSD")["second"], seed), []
    with one_thread(), sdpa_kernel(SDPBackend.MATH):
        for step in range(max(steps) + 1):
            if step in steps:
                cosines.append(round(alignment(of, second, x0, w), 4))
            second.learn(x0, 0.0, generator(seed, 77, step))
    return {"seed": seed, "w": w, "steps": list(steps), "cosine": cosines}


def alignment(of: Asked, second: Denoiser, x0: Tensor, w: float, batches: int = 4) -> float:
    """Mean cosine of the gradients of VSD and SDS at shared noise, over the rows of so many batches."""
    found = []
    for k in range(batches):
        sigma = levels()(0.0, len(x0), generator(78, k))
        with torch.no_grad(), autocast("cpu"):
            pair = [distill_grad(of.guided(w), fake, x0, sigma, SampleNoise(79 + k)).flatten(1) for fake in (second, point(x0))]
        found.append(torch.cosine_similarity(*pair))
    return float(torch.cat(found).mean())


def in_pixels(kept: str, steps: int = STEPS) -> Row:
    """SDS of pixels: the gradient comes back through the VAE's encoder, whose activations are kept or computed again."""
    of = asked(prompts("test"))
    encode = {"kept": model().encode, "recomputed": checkpointed(model().encode)}[kept]

    def run(steps: int) -> Tensor:
        theta = Pixels((3, 64, 64), len(of.prompts), 0, tanh=True)
        return distill(
            theta, sds(of.guided(USUAL)), levels(), torch.optim.Adam(theta.parameters(), lr=0.05), steps, encode=encode, half=True
        )

    with one_thread():
        begun = time.process_time()
        pictures = run(steps)
        seconds = (time.process_time() - begun) / steps
        peak = metrics.peak_bytes(lambda: run(1))
    right = reader().obeys(pictures, [parse(one) for one in of.prompts])["all"]
    return {
        "kept": kept,
        "w": USUAL,
        "pictures": len(pictures),
        "obeyed": round(float(right.mean()), 4),
        "seconds_a_step": round(seconds, 4),
        "megabytes": round(peak / 1e6, 1),
    }


GENERATORS: dict[str, tuple[Callable[[int], nn.Module], float]] = {"Siren": (Siren, 1e-3), "Painted": (Painted, 0.05)}
"""What makes so many pictures, and the rate of Adam."""


def of_generator(generator: str, steps: int = 2 * STEPS) -> Row:
    """SDS of what is no picture but draws one, four of one prompt: the gradient comes back through encoder and generator."""
    of = asked([PLAIN] * 4)
    make, lr = GENERATORS[generator]
    theta = make(4)
    with one_thread():
        begun = time.process_time()
        optimizer = torch.optim.Adam(theta.parameters(), lr=lr)
        pictures = distill(theta, sds(of.guided(USUAL)), levels(), optimizer, steps, encode=model().encode, half=True)
        seconds = (time.process_time() - begun) / steps
    right = reader().obeys(pictures, [parse(PLAIN)] * 4)
    return {
        "generator": generator,
        "w": USUAL,
        "numbers": sum(value[0].numel() for value in theta.parameters()),
        "steps": steps,
        **{name: round(float(right[name].mean()), 4) for name in ("shape", "colour", "size", "all")},
        "seconds_a_step": round(seconds, 4),
    }


PARTS: stored.Parts = {
    "tuning": (tune, [{"method": method} for method in BEYOND]),
    "renders": (rendered, [{"seed": seed} for seed in SEEDS]),
    "ordinary": (ordinary, [{"w": w, "seed": seed} for seed in SEEDS for w in SCALES]),
    "methods": (measure, [{"method": method, "w": w, "seed": seed} for seed in SEEDS for w in SCALES for method in METHODS]),
    "ablations": (ablate, [{"off": off, "w": w, "seed": seed} for seed in SEEDS for off, w in OFF]),
    "cosine": (aligned, [{"seed": seed, "w": w} for seed in SEEDS for w in (1.0, USUAL)]),
    "bsd": (measure, [{"method": method, "w": USUAL, "seed": seed} for seed in range(9) for method in ("VSD", "BSD")]),
    "pixels": (in_pixels, [{"kept": kept} for kept in ("kept", "recomputed")]),
    "generators": (of_generator, [{"generator": name} for name in GENERATORS]),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    stored.run(STORED, COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
