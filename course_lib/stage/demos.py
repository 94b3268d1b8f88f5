"""The explorers that each lecture shows on the stage: one table, one row a lecture.

The library is imported where an explorer is built, so that a server that only lists or serves them starts at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from course_lib.study.explorer import Panel


@dataclass(frozen=True)
class Demo:
    """What `course demo` shows of one lecture: name -> a function that builds the explorer; the first is shown first."""

    title: str
    explorers: dict[str, Callable[[], Panel]]


def _world() -> Panel:
    from course_lib import study

    return study.SceneExplorer()


def _prompt() -> Panel:
    from course_lib import study, zoo

    return study.PromptExplorer(zoo.load("mini-sd"), zoo.load("scenes-reader"))


def _schedules() -> Panel:
    from course_lib import study

    return study.ScheduleExplorer()


def _particles() -> Panel:
    from course_lib import study
    from course_lib.worlds import toys

    return study.ParticleExplorer(toys.ring(8), n=120)


def _digits(rule: str) -> Panel:
    """Digits 0 to 5 by class, by "DDIM" or by "DDPM"; on the CPU, since the network is so small that a GPU would not help."""
    import torch

    from course_lib import steps, study, zoo
    from course_lib.schedules import karras

    D = zoo.load("digits", device="cpu").given(label=torch.arange(6))
    way = {"noisy_step": steps.ddpm} if rule == "DDPM" else {"step": steps.ddim}
    return study.ReverseExplorer(D, f"digits 0 to 5, {rule}", sigmas=lambda n: karras(n, 0.01, 15.0), **way)


def _samplers() -> Panel:
    import torch

    from course_lib import study, zoo
    from course_lib.worlds import toys

    return study.SamplerExplorer(toys.three_blobs(), zoo.load("digits", device="cpu").given(label=torch.arange(6)))


def _flows() -> Panel:
    from course_lib import study, zoo
    from course_lib.worlds import toys

    return study.FlowExplorer(toys.three_blobs(), zoo.load("blobs-reflow", device="cpu")[0])


def _guidance() -> Panel:
    from course_lib import study, zoo
    from course_lib.worlds import toys

    D, classifier, reader = (zoo.load(name, device="cpu") for name in ("digits", "digits-classifier", "digits-reader"))
    return study.GuidanceExplorer(toys.three_classes(), D, classifier, reader)


def _latents() -> Panel:
    from course_lib import study, zoo

    return study.LatentExplorer(zoo.load("mini-sd"))


def _inverse() -> Panel:
    import torch

    from course_lib import study, zoo
    from course_lib.worlds.scenes.dataset import SceneDataset

    D, pictures = zoo.load("scenes-prior", device="cpu"), SceneDataset(8, 61, 32).pictures(torch.arange(8))
    return study.InverseExplorer(D, pictures, low=0.01, high=40.0)


def _posteriors() -> Panel:
    from course_lib import study
    from course_lib.zoo import posteriors

    return study.PosteriorExplorer(posteriors.PRIOR)


def _particles_distilled() -> Panel:
    from course_lib import study
    from course_lib.worlds import toys

    return study.DistillExplorer(toys.three_blobs())


def _picture_distilled() -> Panel:
    from course_lib import study, zoo

    bad = zoo.load("mini-sd-degraded") if zoo.available("mini-sd-degraded") else None
    return study.ImageDistillExplorer(zoo.load("mini-sd"), bad)


def _control() -> Panel:
    from course_lib import zoo
    from course_lib.study.control import ControlExplorer

    trained = {kind: f"mini-control-{kind}" for kind in ("edge", "depth", "seg")}
    controls = {kind: zoo.load(name) for kind, name in trained.items() if zoo.available(name)}
    return ControlExplorer(zoo.load("mini-sd"), controls, zoo.load("scenes-maps"), zoo.load("scenes-reader"))


def _video() -> Panel:
    """Clips are saved in the home folder: that of the notebook lasts no longer than the stage."""
    from pathlib import Path

    from course_lib import zoo
    from course_lib.study.video import VideoExplorer

    model, motions, reader = (zoo.load(name) for name in ("mini-video", "scenes-motion", "scenes-reader"))
    return VideoExplorer(model, motions, reader, folder=Path.home())


DEMOS: dict[str, Demo] = {
    "00": Demo("Start here", {"the world": _world, "a prompt becomes a picture": _prompt}),
    "01": Demo("The forward process", {"into noise": _schedules, "and back, by DDIM": lambda: _digits("DDIM")}),
    "02": Demo("The reverse process", {"particles and score": _particles, "digits by DDPM": lambda: _digits("DDPM")}),
    "03": Demo("Score SDEs and fast samplers", {"samplers at equal cost": _samplers}),
    "03b": Demo("Flows and few steps", {"straight and bent flows": _flows}),
    "04": Demo("Guidance", {"guidance": _guidance}),
    "05": Demo("Latent diffusion and architectures", {"latents and words": _latents}),
    "06": Demo("Inverse problems I: replacement and linear solvers", {"two solvers, one prior": _inverse}),
    "07": Demo("Inverse problems II: posterior, variational, particle and blind methods", {"the exact posterior": _posteriors}),
    "08": Demo(
        "Score distillation", {"particles under a rule": _particles_distilled, "a picture, distilled": _picture_distilled}
    ),
    "11": Demo("Video diffusion", {"a prompt becomes a clip": _video}),
    "13": Demo("ControlNet and spatial control", {"draw, and it is followed": _control}),
}
"""Lecture number -> what is shown; a new lecture's explorer is one row here."""


def titles(names: list[str]) -> dict[str, str]:
    """Lecture number -> title of the demos of these numbers or names; CourseError where one has no demo."""
    from course_lib.grading.paths import CourseError, number_of

    found = {}
    for name in names:
        number = number_of(name)
        if number not in DEMOS:
            raise CourseError(f"lecture {number} has no explorer on the stage; those that have one: {', '.join(DEMOS)}")
        found[number] = DEMOS[number].title
    return found
