"""Score distillation: pictures, or whatever renders them, optimised under the score of a trained model.

rules   what pulls at x0: SDS, SJC, VSD, NFSD, and the two that edit or interval-match, DDS and ISM
levels  which noise levels are asked about, and how each is weighted
loop    the optimiser over theta
second  scores that learn beside the pictures: VSD's second score, BSD's teacher
exact   points in the plane: expectations by quadrature, what SDS minimises, basins, shares and spreads
"""

from course_lib.distill.levels import Levels, Weight, dreamfusion, falling, log_uniform, of_score, one, uniform_times
from course_lib.distill.loop import Companions, checkpointed, distill
from course_lib.distill.rules import Rule, dds, distill_grad, ism, nfsd, point, sds, sjc, vsd
from course_lib.distill.second import Bootstrapped, SecondScore, renoised

__all__ = [
    "Bootstrapped",
    "Companions",
    "Levels",
    "Rule",
    "SecondScore",
    "Weight",
    "checkpointed",
    "dds",
    "distill",
    "distill_grad",
    "dreamfusion",
    "falling",
    "ism",
    "log_uniform",
    "nfsd",
    "of_score",
    "one",
    "point",
    "renoised",
    "sds",
    "sjc",
    "uniform_times",
    "vsd",
]
