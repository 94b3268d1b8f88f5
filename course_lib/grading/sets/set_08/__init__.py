"""Items of exercise set 08, score distillation. Stubs and solutions stand in solutions/08_score_distillation.py."""

from course_lib.grading.sets.set_08.average import PerturbAndAverage
from course_lib.grading.sets.set_08.decomposed import NoiseFree
from course_lib.grading.sets.set_08.latent import ThroughTheEncoder
from course_lib.grading.sets.set_08.lora import LowRank
from course_lib.grading.sets.set_08.residual import NoiseResidual, WithAndWithout
from course_lib.grading.sets.set_08.second import SecondScoreLoss, VSDGradient
from course_lib.grading.sets.set_08.surrogate import Surrogate
from course_lib.grading.sets.set_08.weighting import LevelAndFactor

__all__ = [
    "LevelAndFactor",
    "LowRank",
    "NoiseFree",
    "NoiseResidual",
    "PerturbAndAverage",
    "SecondScoreLoss",
    "Surrogate",
    "ThroughTheEncoder",
    "VSDGradient",
    "WithAndWithout",
]
