"""Guidance: wrappers of a Denoiser that return another Denoiser.

classifiers  Bayes' rule for scores: a classifier of noisy pictures, or a reader of clean ones
free         classifier-free guidance, negative prompts, interval, rescale, APG, CFG++
attention    guidance by the same network with worse attention, or with a blur where it attends
controls     a control within an interval of noise levels
tilted       the density that guidance is often said to sample, exactly, and the gap
"""

from course_lib.guidance.attention import pag, perturbed, sag
from course_lib.guidance.classifiers import (
    Classifier,
    NetworkClassifier,
    bayes_classifier,
    classifier_guidance,
    noise_blind,
    reader_guidance,
)
from course_lib.guidance.controls import sigma_interval, within
from course_lib.guidance.free import Weight, apg, cfg, cfg_pp, cfg_rescaled, interval
from course_lib.guidance.tilted import Tilted, tilt_gap, tilted_gaussian

__all__ = [
    "Classifier",
    "NetworkClassifier",
    "Tilted",
    "Weight",
    "apg",
    "bayes_classifier",
    "cfg",
    "cfg_pp",
    "cfg_rescaled",
    "classifier_guidance",
    "interval",
    "noise_blind",
    "pag",
    "perturbed",
    "reader_guidance",
    "sag",
    "sigma_interval",
    "tilt_gap",
    "tilted_gaussian",
    "within",
]
