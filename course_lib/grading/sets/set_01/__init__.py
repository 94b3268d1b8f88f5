"""Items of exercise set 01, the forward process. Stubs and solutions stand in solutions/01_forward_process.py."""

from course_lib.grading.sets.set_01.denoising import DdpmLoss, DenoiseGaussian, DenoiseMixture, X0AndV
from course_lib.grading.sets.set_01.noising import BetasOf, LogSnr, NoiseTo, NoisingStep, SigmaOf

__all__ = ["BetasOf", "DdpmLoss", "DenoiseGaussian", "DenoiseMixture", "LogSnr", "NoiseTo", "NoisingStep", "SigmaOf", "X0AndV"]
