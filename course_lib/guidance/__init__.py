"""Guidance: wrappers of a Denoiser that return another Denoiser."""

from course_lib.guidance.classifiers import (
    Classifier,
    NetworkClassifier,
    bayes_classifier,
    classifier_guidance,
    noise_blind,
    reader_guidance,
)
from course_lib.guidance.free import cfg

__all__ = [
    "Classifier",
    "NetworkClassifier",
    "bayes_classifier",
    "cfg",
    "classifier_guidance",
    "noise_blind",
    "reader_guidance",
]
