"""The scene world: objects on a ground, with exact text, depth, normals, segmentation, cameras and signed distances."""

from course_lib.worlds.scenes.attributes import Scenes as Scenes
from course_lib.worlds.scenes.camera import Camera as Camera
from course_lib.worlds.scenes.camera import camera as camera
from course_lib.worlds.scenes.camera import rays as rays
from course_lib.worlds.scenes.captions import captions as captions
from course_lib.worlds.scenes.captions import parse as parse
from course_lib.worlds.scenes.captions import vocabulary as vocabulary
from course_lib.worlds.scenes.clip_captions import motion_captions as motion_captions
from course_lib.worlds.scenes.clip_captions import motion_vocabulary as motion_vocabulary
from course_lib.worlds.scenes.clip_captions import parse_motion as parse_motion
from course_lib.worlds.scenes.clips import MOTIONS as MOTIONS
from course_lib.worlds.scenes.clips import Clips as Clips
from course_lib.worlds.scenes.clips import RenderedClips as RenderedClips
from course_lib.worlds.scenes.clips import draw_clips as draw_clips
from course_lib.worlds.scenes.clips import render_clips as render_clips
from course_lib.worlds.scenes.clouds import Cloud as Cloud
from course_lib.worlds.scenes.clouds import point_cloud as point_cloud
from course_lib.worlds.scenes.clouds import scene_sdf as scene_sdf
from course_lib.worlds.scenes.render import Rendered as Rendered
from course_lib.worlds.scenes.render import edges as edges
from course_lib.worlds.scenes.render import render as render
from course_lib.worlds.scenes.sampling import draw as draw
from course_lib.worlds.scenes.scribbles import scribbles as scribbles
from course_lib.worlds.scenes.solids import sdf as sdf
