"""Items of exercise set 07, posteriors and blind measurements. Stubs and solutions stand in solutions/07_inverse_posterior.py."""

from course_lib.grading.sets.set_07.exact import ComponentWeights, GaussianPosterior
from course_lib.grading.sets.set_07.kernels import KernelUpdate
from course_lib.grading.sets.set_07.particles import ParticleWeights, Systematic
from course_lib.grading.sets.set_07.pseudoinverse import PiGDM
from course_lib.grading.sets.set_07.reconstruction import DPSStep, ResidualSlope
from course_lib.grading.sets.set_07.variational import REDDiff
from course_lib.grading.sets.set_07.walk import LangevinStep

__all__ = [
    "ComponentWeights",
    "DPSStep",
    "GaussianPosterior",
    "KernelUpdate",
    "LangevinStep",
    "ParticleWeights",
    "PiGDM",
    "REDDiff",
    "ResidualSlope",
    "Systematic",
]
