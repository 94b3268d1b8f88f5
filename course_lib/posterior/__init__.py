"""Solvers of inverse problems y = A x0 + sigma_y n with one unconditional Denoiser: the replacement and linear family.

replacement  overwrite what is known after each step: ScoreSDE's replacement, RePaint, ILVR
projection   draw x towards the noised measurement before each step: score-based MRI and CT
ddrm         each coordinate of the SVD weighs its own measurement: DDRM, and its form for JPEG
ddnm         the range from y, the null space from D: DDNM, DDNM+
snips        annealed Langevin dynamics on the posterior in the SVD's coordinates
ccdf         start from a noised estimate
moments      what any of them draws when the prior is one Gaussian, exactly
checks       what they ask of a problem; a step that stops when x diverges
"""

from course_lib.posterior.ccdf import come_closer
from course_lib.posterior.checks import watched
from course_lib.posterior.ddnm import ddnm_plus, null_space
from course_lib.posterior.ddrm import ddrm, ddrm_jpeg, ddrm_start
from course_lib.posterior.projection import mixed_projection
from course_lib.posterior.replacement import ilvr, repaint, replacement
from course_lib.posterior.snips import snips

__all__ = [
    "come_closer",
    "ddnm_plus",
    "ddrm",
    "ddrm_jpeg",
    "ddrm_start",
    "ilvr",
    "mixed_projection",
    "null_space",
    "repaint",
    "replacement",
    "snips",
    "watched",
]
