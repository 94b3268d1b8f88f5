"""Items of exercise set 02, the reverse process. Stubs and solutions stand in solutions/02_reverse_process.py."""

from course_lib.grading.sets.set_02.ancestral import AncestralStep, SampleDdpm
from course_lib.grading.sets.set_02.ddim import MendDdim
from course_lib.grading.sets.set_02.loss import RandomTimeLoss
from course_lib.grading.sets.set_02.measures import BitsPerDim, BoundTerm, PrecisionRecall
from course_lib.grading.sets.set_02.posterior import Posterior, X0AndMean
from course_lib.grading.sets.set_02.training import DropLabels, TrainStep

__all__ = [
    "AncestralStep",
    "BitsPerDim",
    "BoundTerm",
    "DropLabels",
    "MendDdim",
    "Posterior",
    "PrecisionRecall",
    "RandomTimeLoss",
    "SampleDdpm",
    "TrainStep",
    "X0AndMean",
]
