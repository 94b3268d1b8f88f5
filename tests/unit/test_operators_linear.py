"""Masks, means and blurs: their definition on pictures, their values, and what they refuse."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.operators import BlockAverage, Blur, Grey, Mask, gaussian_kernel, motion_kernel
from tests.draws import normal

F64 = torch.float64


# --- masks ---------------------------------------------------------------------------------------


def test_a_mask_shows_what_it_observes():
    A = Mask.box((3, 6, 8), (2, 4), corner=(1, 3))
    y = A(torch.ones(1, 3, 6, 8))
    assert y.shape == (1, 3, 6, 8) and float(y.sum()) == 3 * (48 - 8)
    assert float(y[..., 1:3, 3:7].abs().max()) == 0
    assert bool(Mask.box((1, 8, 8), 4).observed[0, 2:6, 2:6].logical_not().all())  # the middle


@pytest.mark.parametrize(("side", "hidden"), [("left", (0, 1)), ("right", (0, -1)), ("top", (0, 1)), ("bottom", (-1, 0))])
def test_a_half_is_hidden(side, hidden):
    observed = Mask.half((1, 4, 6), side).observed[0]
    assert int(observed.sum()) == 12 and not observed[hidden]


def test_a_random_mask_observes_its_share_of_the_pixels():
    A = Mask.random((3, 10, 10), 0.25, torch.Generator().manual_seed(3))
    assert int(A.observed[0].sum()) == 25
    assert bool((A.observed == A.observed[:1]).all())  # the same in all channels
    again = Mask.random((3, 10, 10), 0.25, torch.Generator().manual_seed(3))
    assert torch.equal(A.observed, again.observed)


def test_one_mask_serves_all_channels():
    mask = normal(1, 5, 5) > 0
    assert Mask(mask, (3, 5, 5)).out == (3, 5, 5)
    assert torch.equal(Mask(mask, (3, 5, 5)).observed[2], mask[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mask(torch.ones(1, 4, 4)), "mask has dtype torch.float32; expected torch.bool"),
        (lambda: Mask(torch.zeros(1, 4, 4, dtype=torch.bool)), "mask is False everywhere; expected at least one"),
        (lambda: Mask(torch.ones(1, 4, 5, dtype=torch.bool), (3, 4, 4)), r"mask has shape \(1, 4, 5\); expected \(3, 4, 4\)"),
        (lambda: Mask(torch.ones(4, 4, dtype=torch.bool), (3, 4, 4)), r"mask has shape \(4, 4\); expected \(3, 4, 4\)"),
        (lambda: Mask.box((1, 8, 8), 9), "expected a box inside the 8 x 8 pixels"),
        (lambda: Mask.box((1, 8, 8), 8), "mask is False everywhere"),
        (lambda: Mask.half((1, 8, 8), "middle"), "side = 'middle'; expected one of left, right, top, bottom"),
        (lambda: Mask.random((1, 8, 8), 0.0), "share = 0; expected a share of the 64 pixels"),
        (lambda: Mask.random((1, 8, 8), 1.5), "share = 1.5; expected"),
    ],
)
def test_bad_masks(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_value_where_nothing_is_observed_is_no_measurement():
    A = Mask.box((1, 8, 8), 4)
    with pytest.raises(ValueError, match="y has a value where Mask observes nothing; expected 0 there"):
        A.check_measurement(torch.ones(1, 1, 8, 8))


# --- means ---------------------------------------------------------------------------------------


def test_block_averages_are_torchs():
    x = normal(2, 3, 8, 12)
    A = BlockAverage((3, 8, 12), 4)
    assert_close(A(x), torch.nn.functional.avg_pool2d(x, 4))
    low = A.pinv(A(x))  # ILVR's low-pass: each block is its mean, and a second time changes nothing
    assert_close(low[:, :, :4, :4], x[:, :, :4, :4].mean((2, 3), keepdim=True).expand(-1, -1, 4, 4))
    assert_close(A.pinv(A(low)), low)


def test_grey_is_the_mean_of_the_colours():
    x = normal(2, 3, 4, 4)
    assert_close(Grey((3, 4, 4))(x), x.mean(1, keepdim=True))
    assert_close(Grey((3, 4, 4)).norm(), 3**-0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BlockAverage((3, 8, 8), 3), "factor = 3 does not divide 8 x 8 pixels; expected a divisor of both"),
        (lambda: BlockAverage((3, 8, 8), 0), "factor = 0; expected a whole number >= 1"),
        (lambda: Grey((1, 8, 8)), r"shape = \(1, 8, 8\) has 1 channel; expected a picture in colours"),
    ],
)
def test_bad_means(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# --- blurs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 5), (2, 4), (1, 1), (6, 7)])
def test_blur_is_the_sum_over_the_kernel(size):
    """(k * x)(p) = sum_u k(u) x(p - u + centre), indices around the edges."""
    kernel, x = normal(*size, seed=1), normal(2, 2, 6, 7, seed=2)
    expected = sum(
        kernel[i, j] * x.roll((i - size[0] // 2, j - size[1] // 2), (-2, -1)) for i in range(size[0]) for j in range(size[1])
    )
    assert_close(Blur(kernel, (2, 6, 7))(x), expected)


def test_gaussian_kernel():
    """Its moments are those of the density: with size 8 std the cut tails hold 6e-5 of the mass (4 std on each side)."""
    kernel, u = gaussian_kernel(2.0, 17), torch.arange(17, dtype=F64) - 8
    assert_close(float(kernel.sum()), 1.0)
    assert_close(float((kernel.sum(0) * u**2).sum()), 4.0, rtol=16 * 6.4e-5, atol=0)
    assert gaussian_kernel(1.2).shape == (9, 9)


def test_motion_kernel():
    """Sum 1, centred; along its path the variance of the uniform law L^2 / 12 plus at most 1/4, the bilinear weight's."""
    for length, angle in ((7.0, 0.0), (9.0, 90.0), (6.0, 30.0), (5.5, -45.0)):
        kernel = motion_kernel(length, angle)
        u = torch.arange(len(kernel), dtype=F64) - len(kernel) // 2
        a = math.radians(angle)
        along = u[None, :] * math.cos(a) - u[:, None] * math.sin(a)
        assert_close(float(kernel.sum()), 1.0)
        assert abs(float((kernel * along).sum())) < 1e-12
        # Two shares f, 1 - f of a unit distance have a variance of at most 1/4; sampling each h = 1/8 adds at most L h / 6 + h^2.
        low, high = length**2 / 12, length**2 / 12 + 0.25 + length / 8 / 6 + 1 / 64
        assert low <= float((kernel * along**2).sum()) <= high
        assert bool((kernel.sum() > 0) & (kernel >= 0).all())
    assert_close(motion_kernel(4, 90), motion_kernel(4, 0).T)
    anticlockwise = motion_kernel(7, 45)
    assert float(anticlockwise[2, -3]) > 0 == float(anticlockwise[2, 2])  # up on the right
    assert_close(motion_kernel(0, 10), torch.ones(1, 1, dtype=F64))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Blur(gaussian_kernel(3), (1, 8, 8)), "kernel has 19 x 19 pixels; expected at most the picture's 8 x 8"),
        (lambda: Blur(torch.ones(3), (1, 8, 8)), r"kernel has shape \(3,\); expected a matrix"),
        (lambda: Blur(torch.full((3, 3), float("nan")), (1, 8, 8)), "expected a matrix .* of finite numbers"),
        (lambda: gaussian_kernel(0), "std = 0; expected a width > 0 in pixels"),
        (lambda: motion_kernel(-1, 0), "length = -1; expected a number of pixels >= 0"),
    ],
)
def test_bad_blurs(make, said):
    with pytest.raises(ValueError, match=said):
        make()
