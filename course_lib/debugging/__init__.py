"""The sampling debugger: why a model whose loss falls draws noise.

A network is right under exactly one convention: what its output means, how its input is scaled, which time it is
told. A `NetworkDenoiser` is a network with a convention. `diagnose` reads the network under every other one, and
the difference between the sampler's convention and the one that denoises best is the fault.
"""

from course_lib.debugging.diagnosis import FAULTS, Diagnosis, diagnose
from course_lib.debugging.planting import plant

__all__ = ["FAULTS", "Diagnosis", "diagnose", "plant"]
