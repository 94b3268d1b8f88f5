"""Items of exercise set 11, video diffusion. Stubs and solutions stand in solutions/11_video_ldm.py."""

from course_lib.grading.sets.set_11.along_time import AlongTime
from course_lib.grading.sets.set_11.context import FrameConditioning
from course_lib.grading.sets.set_11.inflated import InflatedConvolution
from course_lib.grading.sets.set_11.keyframes import Keyframes
from course_lib.grading.sets.set_11.measured import Measured
from course_lib.grading.sets.set_11.mixing import MixedLayer
from course_lib.grading.sets.set_11.motion_lora import MotionLoRA
from course_lib.grading.sets.set_11.reconstruction import Reconstruction
from course_lib.grading.sets.set_11.shared_noise import ClipNoise
from course_lib.grading.sets.set_11.start import NewBlock

__all__ = [
    "AlongTime",
    "ClipNoise",
    "FrameConditioning",
    "InflatedConvolution",
    "Keyframes",
    "Measured",
    "MixedLayer",
    "MotionLoRA",
    "NewBlock",
    "Reconstruction",
]
