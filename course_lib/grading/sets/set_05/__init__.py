"""Items of exercise set 05, latent diffusion and architectures. Stubs and solutions stand in solutions/05_latent_diffusion.py."""

from course_lib.grading.sets.set_05.attention import CrossAttended
from course_lib.grading.sets.set_05.joint import GivenAndAlone
from course_lib.grading.sets.set_05.latents import PosteriorKL, Standardised
from course_lib.grading.sets.set_05.query import LocalEnsemble
from course_lib.grading.sets.set_05.shift import ShiftedSchedule
from course_lib.grading.sets.set_05.training import TextLoss
from course_lib.grading.sets.set_05.transformer import AdaLNBlock, Patches

__all__ = [
    "AdaLNBlock",
    "CrossAttended",
    "GivenAndAlone",
    "LocalEnsemble",
    "Patches",
    "PosteriorKL",
    "ShiftedSchedule",
    "Standardised",
    "TextLoss",
]
