"""The scene world: objects on a ground, with exact text, depth, normals, segmentation, cameras and signed distances."""

from course_lib.worlds.scenes.attributes import Scenes as Scenes
from course_lib.worlds.scenes.camera import Camera as Camera
from course_lib.worlds.scenes.camera import camera as camera
from course_lib.worlds.scenes.camera import rays as rays
from course_lib.worlds.scenes.captions import captions as captions
from course_lib.worlds.scenes.captions import parse as parse
from course_lib.worlds.scenes.captions import vocabulary as vocabulary
from course_lib.worlds.scenes.render import Rendered as Rendered
from course_lib.worlds.scenes.render import edges as edges
from course_lib.worlds.scenes.render import render as render
from course_lib.worlds.scenes.sampling import draw as draw
from course_lib.worlds.scenes.solids import sdf as sdf
