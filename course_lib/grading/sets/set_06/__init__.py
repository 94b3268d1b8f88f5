"""Items of exercise set 06, inverse problems by replacement. Stubs and solutions stand in solutions/06_inverse_replacement.py."""

from course_lib.grading.sets.set_06.coordinates import DDRMCoordinates
from course_lib.grading.sets.set_06.linear import Adjoint, Projection
from course_lib.grading.sets.set_06.lowpass import Refined
from course_lib.grading.sets.set_06.nullspace import NullSpace
from course_lib.grading.sets.set_06.replacing import Replaced, Resampled
from course_lib.grading.sets.set_06.reversible import Wired
from course_lib.grading.sets.set_06.start import ComeCloser

__all__ = [
    "Adjoint",
    "ComeCloser",
    "DDRMCoordinates",
    "NullSpace",
    "Projection",
    "Refined",
    "Replaced",
    "Resampled",
    "Wired",
]
