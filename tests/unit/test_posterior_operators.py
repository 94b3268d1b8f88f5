"""The solvers on the operators of pictures: the same as on the operator's matrix, and the measurement is in the result."""

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.operators import (
    CT,
    HDR,
    JPEG,
    MRI,
    Bicubic,
    BlockAverage,
    Blur,
    GaussianCS,
    Grey,
    Hadamard,
    Mask,
    Matrix,
    gaussian_kernel,
)
from course_lib.posterior import ddnm_plus, ddrm, ddrm_jpeg, ddrm_start, ilvr, mixed_projection, null_space, replacement, snips
from course_lib.sample import sample
from course_lib.steps import ddpm
from tests.draws import level, noise_of, normal

F64 = torch.float64
SHAPE = (3, 4, 4)
GRID = torch.tensor([5.0, 1.0, 0.3, 0.0], dtype=F64)
OPERATORS = {
    "mask": lambda: Mask.box(SHAPE, 2),
    "random mask": lambda: Mask.random(SHAPE, 0.4, torch.Generator().manual_seed(0)),
    "super-resolution": lambda: BlockAverage(SHAPE, 2),
    "bicubic": lambda: Bicubic(SHAPE, 2),
    "grey": lambda: Grey(SHAPE),
    "blur": lambda: Blur(gaussian_kernel(0.8, 3), SHAPE),
    "Hadamard": lambda: Hadamard(SHAPE, 12, torch.Generator().manual_seed(0)),
    "Gaussian": lambda: GaussianCS(SHAPE, 12, torch.Generator().manual_seed(0)),
    "MRI": lambda: MRI(SHAPE, torch.arange(16).reshape(4, 4) % 3 > 0),
}


def D(x, sigma):
    """The denoiser of N(0, I)."""
    return x / (1 + sigma**2)


def dense(A):
    """The operator's matrix, (outputs, inputs): its columns are the measurements of the unit pictures."""
    n = torch.Size(A.shape).numel()
    return Matrix(A(torch.eye(n, dtype=F64).reshape(n, *A.shape)).reshape(n, -1).T.contiguous())


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_spectral_step_is_the_step_of_the_operators_matrix(name):
    """Without noise, since bases differ in what they turn it into. What decides is whether s, U and V are paired rightly."""
    A = OPERATORS[name]()
    flat, x = dense(A), normal(3, *SHAPE)
    y = A(normal(1, *SHAPE, seed=1))
    silent = lambda x: 0 * x
    for solver in (ddrm, ddnm_plus, snips):
        for sigma, sigma_next in ((3.0, 2.0), (0.4, 0.1)):
            found, _ = solver(A, y, 0.2, silent)(D, x, level(sigma), level(sigma_next))
            other, _ = solver(flat, y.flatten(1), 0.2, silent)(D, x.flatten(1), level(sigma), level(sigma_next))
            assert_close(found.flatten(1), other, rtol=0, atol=1e-9)  # s >= 1e-2 here divides rounding of 1e-15
    start = ddrm_start(x, level(3.0), A, y, 0.2).flatten(1)
    assert_close(start, ddrm_start(x.flatten(1), level(3.0), flat, y.flatten(1), 0.2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_measurement_without_noise_is_in_the_result(name):
    """In float64: |A x - y| is rounding times the condition, at most 1e3."""
    A = OPERATORS[name]()
    truth = normal(2, *SHAPE, seed=5)
    y, noise = A(truth), noise_of(6)
    steps = {
        "replacement": (D, replacement(ddpm(noise), A, y, noise)),
        "ilvr": (D, ilvr(ddpm(noise), A, truth, noise)),
        "ddnm": (null_space(D, A, y), ddpm(noise)),
        "ddrm": (D, ddrm(A, y, 0.0, noise)),
        "ddnm_plus": (D, ddnm_plus(A, y, 0.0, noise)),
    }
    for solver, (belief, step) in steps.items():
        x = sample(belief, 5 * normal(2, *SHAPE, seed=7), GRID, step)
        assert float((A(x) - y).abs().max()) < 1e-9, solver


def test_ct_is_projected_by_iteration():
    """The Radon transform has no SVD here: its pseudo-inverse comes from conjugate gradients, to 1e-6 of the residual."""
    A = CT((1, 8, 8), 6)
    y = A(normal(1, 1, 8, 8, seed=1))
    noise = noise_of(2)
    x = sample(D, 5 * normal(2, 1, 8, 8), GRID, mixed_projection(ddpm(noise), A, y, noise, 0.9))
    free = sample(D, 5 * normal(2, 1, 8, 8), GRID, ddpm(noise_of(2)))
    assert float((A(x) - y).norm()) < 0.7 * float((A(free) - y).norm())
    with pytest.raises(ValueError, match="CT has no singular value decomposition here"):
        ddrm(A, y, 0.1, noise)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ddrm_for_jpeg_comes_closer_than_the_decoded_picture(seed):
    """Smooth blocks, a prior that knows it, quality 10: the mean of 8 samples, as the paper takes it, has 0.93 to 0.95 of the
    RMSE of decode(y); one sample adds its own spread. Without its term the run goes where the prior goes."""
    i = torch.arange(8, dtype=F64)
    line = torch.exp(-((i[:, None] - i) ** 2) / 18)
    prior = Mixture.gaussian(torch.zeros(64), 0.2 * torch.kron(line, line) + 1e-4 * torch.eye(64, dtype=F64))
    truth = prior.sample(20, torch.Generator().manual_seed(seed)).reshape(20, 1, 8, 8)
    A = JPEG((1, 8, 8), 10)
    y = A(truth)
    grid = torch.cat([torch.logspace(0, -2, 20, dtype=F64), torch.zeros(1, dtype=F64)])
    y = y.repeat(8, 1, 1, 1, 1, 1)
    start = A.decode(y) + normal(160, 1, 8, 8, seed=seed)

    def rmse(x):
        return float((x.reshape(8, 20, 1, 8, 8).mean(0) - truth).square().mean().sqrt())

    found = rmse(sample(prior.denoiser, start, grid, ddrm_jpeg(A, y, noise_of(3))))
    without = rmse(sample(prior.denoiser, start, grid, ddrm_jpeg(A, y, noise_of(3), eta_b=0.0)))
    assert found < 0.97 * rmse(A.decode(y))
    assert found < 0.5 * without


def test_nonlinear_operators_of_pictures_are_refused():
    for A in (HDR(SHAPE), JPEG((3, 8, 8), 50)):
        with pytest.raises(ValueError, match=f"A = {type(A).__name__} is not linear and ddrm takes linear operators only"):
            ddrm(A, torch.zeros(1, *A.out), 0.1, noise_of(0))
    with pytest.raises(ValueError, match=r"y has shape \(1, 3, 8, 8\); expected \(B, 3, 1, 1, 8, 8\) for JPEG"):
        ddrm_jpeg(JPEG((3, 8, 8), 50), torch.zeros(1, 3, 8, 8), noise_of(0))
