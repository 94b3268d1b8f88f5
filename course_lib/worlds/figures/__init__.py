"""A small articulated figure: 18 joints, 25 pose numbers, motions with names, a camera, keypoints and a drawing.

World: right-handed, z up, metres. At heading 0 the figure faces +x and its left side is +y; at rest it stands upright
with hanging arms. The pelvis is the origin unless a root position is given.

A pose is x (..., 25): the heading as two numbers (cos, sin), of which only the direction counts, so that no angle wraps
around; then the ANGLES in radians, each a rotation about one axis of its joint (a kinematic tree, as in the
pose part of SMPL; Loper et al. 2015). Poses are frames of eight named motions, varied by shared factors (a crouch bends
hips, knees and spine together) and softly kept inside the limits of each joint.
"""

from course_lib.worlds.figures.body import ANGLES as ANGLES
from course_lib.worlds.figures.body import BODY as BODY
from course_lib.worlds.figures.body import DIM as DIM
from course_lib.worlds.figures.body import HIGH as HIGH
from course_lib.worlds.figures.body import JOINTS as JOINTS
from course_lib.worlds.figures.body import LOW as LOW
from course_lib.worlds.figures.body import NAMES as NAMES
from course_lib.worlds.figures.body import OFFSETS as OFFSETS
from course_lib.worlds.figures.body import PARENTS as PARENTS
from course_lib.worlds.figures.body import SKELETON as SKELETON
from course_lib.worlds.figures.body import Angle as Angle
from course_lib.worlds.figures.body import Joint as Joint
from course_lib.worlds.figures.body import check_pose as check_pose
from course_lib.worlds.figures.body import forward as forward
from course_lib.worlds.figures.body import joint_error as joint_error
from course_lib.worlds.figures.body import mirrored as mirrored
from course_lib.worlds.figures.body import turned as turned
from course_lib.worlds.figures.motions import FACTORS as FACTORS
from course_lib.worlds.figures.motions import FPS as FPS
from course_lib.worlds.figures.motions import MOTIONS as MOTIONS
from course_lib.worlds.figures.motions import Clips as Clips
from course_lib.worlds.figures.motions import draw_clips as draw_clips
from course_lib.worlds.figures.motions import draw_poses as draw_poses
from course_lib.worlds.figures.motions import grounded as grounded
from course_lib.worlds.figures.motions import within as within
from course_lib.worlds.figures.seen import DISTANCE as DISTANCE
from course_lib.worlds.figures.seen import ELEVATION as ELEVATION
from course_lib.worlds.figures.seen import FIELD_OF_VIEW as FIELD_OF_VIEW
from course_lib.worlds.figures.seen import MISSING as MISSING
from course_lib.worlds.figures.seen import NOISE as NOISE
from course_lib.worlds.figures.seen import Keypoints as Keypoints
from course_lib.worlds.figures.seen import camera as camera
from course_lib.worlds.figures.seen import detect as detect
from course_lib.worlds.figures.seen import draw as draw
from course_lib.worlds.figures.seen import observe as observe
from course_lib.worlds.figures.seen import project as project
from course_lib.worlds.figures.seen import reprojection as reprojection
