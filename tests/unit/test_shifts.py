"""A shifted schedule: its algebra, Stable Diffusion 3's form of it, and the pictures that it is made for."""

import pytest
import torch
from torch.testing import assert_close

from course_lib.schedules import CONTINUOUS, Discrete, linear_betas
from course_lib.shifts import Shifted
from tests.draws import normal

F64 = torch.float64
BASES = [*(kind() for kind in CONTINUOUS.values()), Discrete(linear_betas())]
every = pytest.mark.parametrize("base", BASES, ids=lambda base: f"{type(base).__name__}-{base.name}")


def times(base, n=101):
    return base.t_min + (base.t_max - base.t_min) * torch.linspace(0.01, 0.99, n, dtype=F64)


@every
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_sigma_is_multiplied_and_the_rule_is_kept(base, factor):
    shifted, t = Shifted(base, factor), times(base)
    assert_close(shifted.sigma(t), factor * base.sigma(t), rtol=1e-10, atol=0)
    total = lambda one: one.alpha(t) ** 2 + one.std(t) ** 2 if base.preserves_variance else one.alpha(t) + one.std(t)
    if base.name != "edm":
        assert_close(total(shifted), torch.ones(len(t), dtype=F64))
    else:
        assert_close(shifted.alpha(t), torch.ones(len(t), dtype=F64))
    assert_close(shifted.t_of_sigma(shifted.sigma(t)), base.t_of_sigma(base.sigma(t)), rtol=1e-9, atol=1e-9)


def test_the_straight_line_has_stable_diffusion_3s_times():
    t, s = torch.linspace(0, 1, 11, dtype=F64), 3.0
    assert_close(Shifted(CONTINUOUS["flow"](), s).std(t), s * t / (1 + (s - 1) * t))


@pytest.mark.parametrize("k", [2, 4])
def test_a_large_picture_is_as_noisy_when_shown_small(k):
    """A flat picture of k times the side, under the shifted noise and averaged over k x k pixels, has the small one's noise.

    The deviation of n = (64 / k)^2 independent means is known to 1 / sqrt(2 n) of itself; 4.5 of these are allowed.
    """
    base, t = CONTINUOUS["cosine"](), torch.tensor(0.5, dtype=F64)
    eps = normal(1, 1, 64, 64)
    x = Shifted(base, k).add_noise(torch.zeros_like(eps), t, eps) / Shifted(base, k).alpha(t)
    small = torch.nn.functional.avg_pool2d(x, k)
    assert abs(float(small.std() / base.sigma(t)) - 1) < 4.5 / (2 * small.numel()) ** 0.5
    plain = torch.nn.functional.avg_pool2d(base.add_noise(torch.zeros_like(eps), t, eps) / base.alpha(t), k)
    assert float(plain.std() / base.sigma(t)) < 1.2 / k  # without the shift the noise is averaged away


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="factor = 0; expected a number > 0"):
        Shifted(CONTINUOUS["flow"](), 0)
