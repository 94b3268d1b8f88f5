"""The library of the diffusion course. See `course_lib.sample.sample` for the one loop and `types` for the two types."""

__version__ = "0.1.0"
