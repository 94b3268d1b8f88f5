"""Items of exercise set 04, guidance. Stubs and solutions stand in solutions/04_guidance.py."""

from course_lib.grading.sets.set_04.classifier import Bayes, ClassifierGuided
from course_lib.grading.sets.set_04.fields import IntervalGuided, Rescaled
from course_lib.grading.sets.set_04.free import BatchedGuided, Guided, NegativeGuided
from course_lib.grading.sets.set_04.measure import AdherenceAndDiversity, TwoScores
from course_lib.grading.sets.set_04.training import DropoutLoss

__all__ = [
    "AdherenceAndDiversity",
    "BatchedGuided",
    "Bayes",
    "ClassifierGuided",
    "DropoutLoss",
    "Guided",
    "IntervalGuided",
    "NegativeGuided",
    "Rescaled",
    "TwoScores",
]
