"""Solvers of inverse problems y = A x0 + sigma_y n with one unconditional Denoiser: the replacement and linear family.

replacement  overwrite what is known after each step: ScoreSDE's replacement, RePaint, ILVR
projection   draw x towards the noised measurement before each step: score-based MRI and CT
ddrm         each coordinate of the SVD weighs its own measurement: DDRM, and its form for JPEG
ddnm         the range from y, the null space from D: DDNM, DDNM+
snips        annealed Langevin dynamics on the posterior in the SVD's coordinates
annealed     annealed Langevin dynamics with an annealed likelihood: CSGM
reddiff      the posterior's mode by stochastic descent: RED-diff
plug_and_play  a data step in x0 space between two levels: DiffPIR, DAPS, PnP-flow
body         a first guess inverted to a middle level, and back under the gradient of an objective: ScoreHMR
blind        picture and kernel in turn: BlindDiff
ccdf         start from a noised estimate
gradient     back through D: DPS, its score form (reconstruction guidance), PiGDM, MCG
particles    weighed and selected samples, exact in the limit: MCGdiff, TDS
latent       through the decoder of a latent model: PSLD
moments      what any of them draws when the prior is one Gaussian, exactly
checks       what they ask of a problem; a step that stops when x diverges
"""

from course_lib.posterior.annealed import csgm
from course_lib.posterior.blind import BlindDiff, BlindSuperResolution
from course_lib.posterior.body import score_hmr
from course_lib.posterior.ccdf import come_closer
from course_lib.posterior.checks import watched
from course_lib.posterior.ddnm import ddnm_plus, null_space
from course_lib.posterior.ddrm import ddrm, ddrm_jpeg, ddrm_start
from course_lib.posterior.gradient import checkpointed, dps, dps_score, gaussian_variance, mcg, pigdm
from course_lib.posterior.latent import psld
from course_lib.posterior.particles import mcgdiff, tds
from course_lib.posterior.plug_and_play import daps, diffpir, pnp_flow
from course_lib.posterior.projection import mixed_projection
from course_lib.posterior.reddiff import red_diff
from course_lib.posterior.replacement import ilvr, repaint, replacement
from course_lib.posterior.snips import snips

__all__ = [
    "BlindDiff",
    "BlindSuperResolution",
    "checkpointed",
    "come_closer",
    "csgm",
    "daps",
    "ddnm_plus",
    "ddrm",
    "ddrm_jpeg",
    "ddrm_start",
    "diffpir",
    "dps",
    "dps_score",
    "gaussian_variance",
    "ilvr",
    "mcg",
    "mcgdiff",
    "mixed_projection",
    "null_space",
    "pigdm",
    "pnp_flow",
    "psld",
    "red_diff",
    "repaint",
    "replacement",
    "score_hmr",
    "snips",
    "tds",
    "watched",
]
