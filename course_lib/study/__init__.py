"""Plots, pictures and explorers for the lectures; the only part of the library that imports matplotlib and ipywidgets."""

from course_lib.study.canvas import Canvas
from course_lib.study.code import source
from course_lib.study.control import ControlExplorer
from course_lib.study.debugger import DebugExplorer
from course_lib.study.distilled import DistillExplorer
from course_lib.study.distilled_pictures import ImageDistillExplorer
from course_lib.study.explorer import Explorer
from course_lib.study.explorers import ReverseExplorer, ScheduleExplorer
from course_lib.study.flows import FlowExplorer
from course_lib.study.guidance import GuidanceExplorer
from course_lib.study.inverse import InverseExplorer
from course_lib.study.latents import LatentExplorer
from course_lib.study.particles import ParticleExplorer
from course_lib.study.pictures import animate, grid, png, render, strip, tile
from course_lib.study.points import density, field, outline, plane, scatter
from course_lib.study.posteriors import PosteriorExplorer
from course_lib.study.samplers import SamplerExplorer
from course_lib.study.scenes import PromptExplorer, SceneExplorer
from course_lib.study.style import COLOURS, DENSITY, use

__all__ = [
    "COLOURS",
    "DENSITY",
    "Canvas",
    "ControlExplorer",
    "DebugExplorer",
    "DistillExplorer",
    "Explorer",
    "FlowExplorer",
    "GuidanceExplorer",
    "ImageDistillExplorer",
    "InverseExplorer",
    "LatentExplorer",
    "ParticleExplorer",
    "PosteriorExplorer",
    "PromptExplorer",
    "ReverseExplorer",
    "SamplerExplorer",
    "SceneExplorer",
    "ScheduleExplorer",
    "animate",
    "density",
    "field",
    "grid",
    "outline",
    "plane",
    "png",
    "render",
    "scatter",
    "source",
    "strip",
    "tile",
    "use",
]
