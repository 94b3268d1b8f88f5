"""Resampling, compressed sensing, MRI and CT: against torch, scipy, numpy and scikit-image, and what they refuse."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from skimage.transform import iradon, radon
from torch.testing import assert_close

from course_lib.operators import (
    CT,
    MRI,
    Bicubic,
    CoilMRI,
    GaussianCS,
    Hadamard,
    ReflectedBlur,
    cartesian_mask,
    coil_maps,
)
from tests.draws import normal

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n):
    """A smooth picture (1, 1, n, n) within the inscribed circle: two Gaussians, cut where they are below 1e-3."""
    u = torch.arange(n, dtype=F64) - n // 2
    bump = lambda row, column, std: torch.exp(-((u[:, None] - row) ** 2 + (u - column) ** 2) / (2 * std**2))
    picture = bump(-0.1 * n, 0.1 * n, 0.06 * n) + 0.5 * bump(0.15 * n, -0.05 * n, 0.08 * n)
    return torch.where(picture > 1e-3, picture, 0.0)[None, None]


# --- resampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_bicubic_is_torchs(factor):
    x = normal(2, 3, 8, 12)
    size = (8 // factor, 12 // factor)
    expected = torch.nn.functional.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    assert_close(Bicubic((3, 8, 12), factor)(x), expected, rtol=0, atol=1e-12)


def test_reflected_blur_is_scipys():
    x = normal(2, 1, 9, 12)
    expected = scipy.ndimage.gaussian_filter(x.numpy(), 1.5, mode="reflect", radius=6, axes=(2, 3))
    assert_close(ReflectedBlur((1, 9, 12), 1.5)(x), torch.from_numpy(expected), rtol=0, atol=1e-12)


# --- compressed sensing --------------------------------------------------------------------------


def test_hadamard_rows_spread_over_one_channel():
    A = Hadamard((3, 4, 4), 20, seeded(1))
    rows = A.adjoint(torch.eye(20, dtype=F64))
    assert_close(rows.flatten(2).norm(dim=2).sort(1).values, torch.tensor([0.0, 0.0, 1.0], dtype=F64).expand(20, 3))
    assert set((rows.abs() * 4).round(decimals=12).unique().tolist()) == {0.0, 1.0}  # +- 1 / sqrt(16), or another channel
    assert torch.equal(A(rows[:1]), Hadamard((3, 4, 4), 20, seeded(1))(rows[:1]))


def test_gaussian_sensing_keeps_the_mean_square():
    """E |A x|^2 = |x|^2; with m = 200 its relative deviation is sqrt(2 / m) = 0.1, of which 4.5 are allowed."""
    A, x = GaussianCS((1, 16, 16), 200, seeded()), normal(1, 1, 16, 16, seed=1)
    assert abs(float(A(x).square().sum() / x.square().sum()) - 1) < 0.45


# --- MRI -----------------------------------------------------------------------------------------


def test_mri_is_numpys_transform():
    mask, x = normal(6, 8) > 0, normal(2, 1, 6, 8)
    expected = np.fft.fftshift(np.fft.fft2(x.numpy(), norm="ortho"), axes=(-2, -1)) * mask.numpy()
    y = MRI((1, 6, 8), mask)(x)
    assert_close(torch.complex(y[:, :, 0], y[:, :, 1]), torch.from_numpy(expected))
    flat = MRI((1, 6, 8), torch.ones(6, 8, dtype=torch.bool))(torch.ones(1, 1, 6, 8))
    assert_close(float(flat[0, 0, 0, 3, 4]), 48**0.5)  # frequency 0 in the middle


def test_half_of_the_frequencies_determine_a_real_picture():
    """-f is the conjugate of f: rows 0 to 3 of 6 hold one of each pair of 5 x 8 frequencies, and row 0 its own mirror images."""
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:4] = True
    A, x = MRI((1, 6, 8), mask), normal(1, 1, 6, 8)
    assert_close(A.pinv(A(x)), x)
    assert_close(A.svd().s.unique(), torch.tensor([0.5**0.5, 1.0], dtype=F64))


def test_coils_that_see_every_frequency_lose_nothing():
    """sum_k |S_k|^2 = 1, so A^T A = I on real pictures."""
    coils = coil_maps(4, 6, 8)
    assert_close(coils.abs().square().sum(0), torch.ones(6, 8, dtype=F64))
    A, x = CoilMRI((2, 6, 8), torch.ones(6, 8, dtype=torch.bool), coils), normal(1, 2, 6, 8)
    assert_close(A.adjoint(A(x)), x)
    one = CoilMRI((1, 6, 8), normal(6, 8) > 0, torch.ones(1, 6, 8, dtype=torch.complex128))
    assert_close(one(x[:, :1])[:, :, 0], MRI((1, 6, 8), one.mask)(x[:, :1]))


def test_cartesian_mask():
    mask = cartesian_mask(16, 32, 4, seeded())
    assert mask.shape == (16, 32) and bool((mask == mask[:1]).all())
    assert int(mask[0].sum()) == 8 and bool(mask[0, 15:17].all())
    assert bool(cartesian_mask(4, 8, 1).all())


# --- CT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 17])
def test_ct_is_scikit_images(n):
    """The same sampling of the same turned picture, so equal to the rounding of n sums: 1e-10."""
    x, angles = blobs(n), [0.0, 17.0, 45.0, 90.0, 133.0]
    expected = radon(x[0, 0].numpy(), theta=np.array(angles), circle=True).T
    assert_close(CT((1, n, n), angles)(x)[0, 0], torch.from_numpy(expected), rtol=0, atol=1e-10)


def test_ct_keeps_the_mass_and_gives_the_known_integrals_of_a_gaussian():
    """Each projection of exp(-r^2 / 2 s^2) is s sqrt(2 pi) exp(-t^2 / 2 s^2).

    Sampling bilinearly between pixels adds at most |f''| / 8 from each axis, |f''| <= 1 / s^2; over the length 6 s in which
    the integrand is above 1 % this is 6 / (4 s).
    """
    n, s = 48, 4.0
    u = torch.arange(n, dtype=F64) - n // 2
    x = torch.exp(-(u[:, None] ** 2 + u**2) / (2 * s**2))[None, None]
    y = CT((1, n, n), 9)(x)[0, 0]
    exact = s * (2 * torch.pi) ** 0.5 * torch.exp(-(u**2) / (2 * s**2))
    assert_close(y, exact.expand(9, n), rtol=0, atol=6 / (4 * s))
    assert_close(y[0], x[0, 0].sum(0))  # at 0 degrees the sums of the columns


@pytest.mark.parametrize("n", [32, 33])
def test_filtered_back_projection_is_scikit_images(n):
    """The same filter and the same linear interpolation, so equal to rounding; and it inverts what it should."""
    x, A = blobs(n), CT((1, n, n), 48)
    y = A(x)
    picture = A.fbp(y)[0, 0]
    peer = iradon(y[0, 0].numpy().T, theta=A.angles.numpy(), circle=True)
    assert_close(picture, torch.from_numpy(peer), rtol=0, atol=1e-10)
    assert float((picture - x[0, 0]).square().mean().sqrt()) < 0.02  # of a picture whose largest value is 1
    assert float((A.adjoint(y)[0, 0] - x[0, 0]).abs().max()) > 10  # without the filter there is no picture


def test_the_gradient_of_ct_runs_both_ways():
    A = CT((1, 5, 5), 3)
    y, x = normal(1, *A.out).requires_grad_(), normal(1, *A.shape)
    (gradient,) = torch.autograd.grad((A.adjoint(y) * x).sum(), y)
    assert_close(gradient, A(x))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Bicubic((3, 8, 8), 3), "factor = 3 does not divide 8 x 8 pixels"),
        (lambda: ReflectedBlur((1, 8, 8), 3.0), "std = 3 reaches over 12 pixels; expected at most the picture's 8"),
        (lambda: ReflectedBlur((1, 8, 8), 0.0), "std = 0; expected a width > 0"),
        (lambda: Hadamard((3, 6, 6), 10), r"shape = \(3, 6, 6\) has 36 pixels; expected a power of two"),
        (lambda: Hadamard((1, 4, 4), 17), "m = 17; expected 1 to 16 measurements of 16 values"),
        (lambda: GaussianCS((1, 4, 4), 0), "m = 0; expected 1 to 16"),
        (lambda: MRI((1, 6, 8), torch.ones(8, 6, dtype=torch.bool)), r"mask has shape \(8, 6\) .*expected bool \(6, 8\)"),
        (lambda: MRI((1, 6, 8), torch.ones(6, 8)), "mask has .* dtype torch.float32; expected bool"),
        (lambda: MRI((1, 6, 8), torch.zeros(6, 8, dtype=torch.bool)), "mask is False everywhere; expected at least one"),
        (
            lambda: CoilMRI((1, 6, 8), torch.ones(6, 8, dtype=torch.bool), coil_maps(2, 6, 6)),
            r"coils has shape \(2, 6, 6\) .*expected complex \(K, 6, 8\)",
        ),
        (lambda: cartesian_mask(8, 8, 0.5), "acceleration = 0.5; expected a number from 1 to the width, 8"),
        (lambda: coil_maps(0, 8, 8), "count = 0; expected at least one coil"),
        (lambda: CT((1, 8, 6), 4), r"shape = \(1, 8, 6\); expected square pictures"),
        (lambda: CT((1, 8, 8), 0), "expected at least one finite angle in degrees"),
        (lambda: CT((1, 8, 8), [float("nan")]), "expected at least one finite angle in degrees"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(ValueError, match=said):
        make()
