"""Items of exercise set 03, samplers. Stubs and solutions stand in solutions/03_score_sdes_and_samplers.py."""

from course_lib.grading.sets.set_03.exponential import ExponentialStep, Step2M
from course_lib.grading.sets.set_03.flow import FlowStep, ReflowBatch
from course_lib.grading.sets.set_03.likelihood import FlowBitsPerDim, RoundTrip
from course_lib.grading.sets.set_03.measure import ChooseGrid, Order
from course_lib.grading.sets.set_03.noise import ReverseSdeStep
from course_lib.grading.sets.set_03.ode import EulerStep, HeunStep

__all__ = [
    "ChooseGrid",
    "EulerStep",
    "ExponentialStep",
    "FlowBitsPerDim",
    "FlowStep",
    "HeunStep",
    "Order",
    "ReflowBatch",
    "ReverseSdeStep",
    "RoundTrip",
    "Step2M",
]
