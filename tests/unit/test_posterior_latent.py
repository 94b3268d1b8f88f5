"""PSLD with a linear encoder and decoder and a Gaussian prior of the latent: its equation, and what its gluing term is for."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import Counted
from course_lib.gaussians import Mixture
from course_lib.operators import Mask, Matrix
from course_lib.operators.base import Operator
from course_lib.posterior import dps, psld
from course_lib.sample import sample
from course_lib.steps import ddim, ddpm
from tests.affine import F64, Problem, shrink
from tests.draws import level, noise_of, normal

EXACT = {"rtol": 0, "atol": 1e-9}
"""Both sides are float64 matrix algebra with numbers of order 1: rounding is 1e-14, a wrong term is 1e-3 and more."""
GRID = torch.cat([torch.logspace(math.log10(20.0), -2, 30, dtype=F64), torch.zeros(1, dtype=F64)])
N, K = 12, 4
"""Values of a picture and of a latent."""


def world(seed):
    """An orthonormal decoder S (N, K), a mask that sees half of the picture, as in the paper's linear model."""
    S = torch.linalg.qr(normal(N, K, seed=seed))[0]
    seen = torch.zeros(N, dtype=torch.bool)
    seen[torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: N // 2]] = True
    return S, Mask(seen)


class Decoded(Operator):
    """A after a linear decoder."""

    def __init__(self, A, S):
        self.A, self.S, self.shape, self.out = A, S, (S.shape[1],), A.out

    def apply(self, z):
        return self.A(z @ self.S.T)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(5.0, 2.0), (0.5, 0.0)])
def test_a_step_is_the_formula_by_hand(sigma, sigma_next):
    """With x = S z0, encode(x) = B x, P = A^+ A, J = dD/dz symmetric: the gradients are -J S^T A^T r / |r| and
    J (I - B (I - P) S)^T g / |g|, g = z0 - B (x + A^+ (y - A x)). A matrix whose A^+ is not A^T."""
    p, S, B = Problem(0, d=K), normal(N, K), normal(K, N, seed=1)
    matrix = normal(5, N, seed=2)
    A, y, z = Matrix(matrix), normal(1, 5, seed=3), normal(6, K, seed=4)
    sigma, sigma_next, zeta, gamma = level(sigma), level(sigma_next), 0.7, 0.2
    J, _ = shrink(p.prior, sigma)
    pinv = torch.linalg.pinv(matrix)
    z0 = p.prior.denoiser(z, sigma)
    x = z0 @ S.T
    r = y - x @ matrix.T
    g = z0 - (x + r @ pinv.T) @ B.T
    glue = torch.eye(K, dtype=F64) - B @ (torch.eye(N, dtype=F64) - pinv @ matrix) @ S
    unit = lambda v: v / v.norm(dim=1, keepdim=True)
    slope = (-zeta * unit(r) @ matrix @ S + gamma * unit(g) @ glue) @ J
    plain, _ = ddim(p.prior.denoiser, z, sigma, sigma_next)
    D = Counted(p.prior.denoiser)
    step = psld(ddim, A, y, lambda x: x @ B.T, lambda z: z @ S.T, zeta, gamma)
    found, memory = step(D, z, sigma, sigma_next)
    assert D.calls == 1 and memory is None and not found.requires_grad
    assert_close(found, plain - torch.sqrt((1 + sigma**2) * (1 + sigma_next**2)) * slope, **EXACT)


def test_without_gluing_it_is_dps_through_the_decoder():
    S, A = world(0)
    p, y = Problem(0, d=K), A(normal(1, N, seed=1))
    z = normal(5, K, seed=2)
    encode = lambda x: pytest.fail("gamma = 0 asked the encoder")
    found, _ = psld(ddim, A, y, encode, lambda z: z @ S.T, 0.4, 0.0)(p.prior.denoiser, z, level(1.0), level(0.5))
    expected, _ = dps(ddim, Decoded(A, S), y, 0.4)(p.prior.denoiser, z, level(1.0), level(0.5))
    assert_close(found, expected, **EXACT)


def errors(seed, prior, encoder, decoder, A, gamma, zeta):
    """RMSE of pictures, and of latents to the encoding of what they decode to, of 60 problems with noise of 0.3."""
    n = 60
    truth = prior.sample(n, torch.Generator().manual_seed(seed)) @ decoder.T
    y = A(truth + 0.3 * normal(n, N, seed=seed + 7))
    step = psld(ddpm(noise_of(1)), A, y, lambda x: x @ encoder.T, lambda z: z @ decoder.T, zeta, gamma)
    z = sample(prior.denoiser, 20 * normal(n, prior.dim, seed=seed + 3), GRID, step)
    x = z @ decoder.T
    return tuple(float((a - b).square().mean().sqrt()) for a, b in ((x, truth), (z, x @ encoder.T)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gluing_brings_the_picture_nearer(seed):
    """N(0, I) latents of an orthonormal decoder, zeta = 0.1: the noise of y outside of what decodes makes |r| large, and so DPS's
    move small; gluing does not see it. With zeta tuned for each, 0.3, the two are alike."""
    S, A = world(seed)
    given = seed, Mixture.gaussian(torch.zeros(K), torch.eye(K)), S.T, S, A
    assert errors(*given, gamma=0.1, zeta=0.1)[0] < 0.95 * errors(*given, gamma=0.0, zeta=0.1)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gluing_settles_the_latent_that_the_picture_leaves_open(seed):
    """Twice as many latents as the picture has degrees of freedom: half of them, of deviation 0.5, decode to nothing. DPS leaves
    them as the prior draws them, an RMSE of 0.5 sqrt(1 / 2) = 0.35, here of 240 numbers, with a standard error of 0.016; gluing
    takes half of it away at least."""
    S, A = world(seed)
    W = torch.linalg.qr(normal(2 * K, 2 * K, seed=seed + 1))[0]
    seen, unseen = W[:, :K], W[:, K:]
    prior = Mixture.gaussian(torch.zeros(2 * K), seen @ seen.T + 0.25 * unseen @ unseen.T)
    given = seed, prior, seen @ S.T, S @ seen.T, A
    without, glued = errors(*given, gamma=0.0, zeta=0.3), errors(*given, gamma=0.3, zeta=0.3)
    assert without[1] == pytest.approx(0.354, abs=4.5 * 0.016)
    assert glued[1] < 0.5 * without[1]
    assert glued[0] < 1.1 * without[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda S, A, y: psld(ddim, Decoded(A, S), y, None, None), "A = Decoded is not linear and psld takes linear operators"),
        (lambda S, A, y: psld(ddim, A, y[:, :3], None, None), r"y has shape \(1, 3\); expected \(B, 12\) for Mask"),
        (lambda S, A, y: psld(ddim, A, y, None, None, -1.0), "zeta = -1.0; expected a step size, a finite number >= 0"),
        (lambda S, A, y: psld(ddim, A, y, None, None, 1.0, float("inf")), "gamma = inf; expected a step size"),
    ],
)
def test_what_it_refuses(make, said):
    S, A = world(0)
    with pytest.raises(ValueError, match=said):
        make(S, A, A(normal(1, N)))


def test_an_encoder_of_another_shape_is_refused():
    S, A = world(0)
    step = psld(ddim, A, A(normal(1, N)), lambda x: x, lambda z: z @ S.T)
    with pytest.raises(ValueError, match=r"encode returned shape \(5, 12\); expected that of the latents, \(5, 4\)"):
        step(Problem(0, d=K).prior.denoiser, normal(5, K), level(1.0), level(0.5))
