"""Items of exercise set 13, ControlNet. Stubs and solutions stand in solutions/13_controlnet.py."""

from course_lib.grading.sets.set_13.copies import TrainCopy
from course_lib.grading.sets.set_13.edges import EdgeF1
from course_lib.grading.sets.set_13.guess import GuessMode
from course_lib.grading.sets.set_13.guided import UnderGuidance
from course_lib.grading.sets.set_13.places import RightPlaces
from course_lib.grading.sets.set_13.priors import ClassPrior
from course_lib.grading.sets.set_13.scales import Scales
from course_lib.grading.sets.set_13.several import Several
from course_lib.grading.sets.set_13.training import TrainingStep
from course_lib.grading.sets.set_13.zeros import ZeroConvolution

__all__ = [
    "ClassPrior",
    "EdgeF1",
    "GuessMode",
    "RightPlaces",
    "Scales",
    "Several",
    "TrainCopy",
    "TrainingStep",
    "UnderGuidance",
    "ZeroConvolution",
]
