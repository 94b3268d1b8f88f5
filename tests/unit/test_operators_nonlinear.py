"""Phase retrieval, clipped light, JPEG and blind blur: what defines each, its gradient or that it has none."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from course_lib.operators import HDR, JPEG, BlindBlur, Blur, LinearOperator, Operator, PhaseRetrieval, gaussian_kernel
from tests.draws import normal

F64 = torch.float64
MAKE = {
    "phase": lambda: PhaseRetrieval((2, 5, 6), 2),
    "hdr": lambda: HDR((2, 5, 6), 2.0),
    "jpeg": lambda: JPEG((3, 8, 16), 50),
}
nonlinear = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@nonlinear
def test_shapes_types_and_batches(make):
    """A row does not depend on its batch; float32 stays float32 and agrees but for numbers at a tie of rounding."""
    A, x = make(), 0.5 * normal(3, *make().shape)
    y = A(x)
    assert y.shape == (3, *A.out) and A.check_measurement(y) is y
    assert_close(A(x[1:2]), y[1:2], rtol=0, atol=1e-12)
    single = A(x.float())
    assert single.dtype == torch.float32
    assert float(((single.double() - y).abs() > 1e-4).double().mean()) < 1e-3
    with pytest.raises(ValueError, match=rf"^x has shape .*; expected \(B, .*\) for {type(A).__name__}$"):
        A(x[..., 1:])


@nonlinear
def test_is_not_linear(make):
    A, x = make(), 0.5 * normal(1, *make().shape)
    assert not isinstance(A, LinearOperator) and isinstance(A, Operator)
    assert float((A(2 * x) + A(-2 * x)).abs().max()) > 0.1 or float((A(2 * x) - 2 * A(x)).abs().max()) > 0.1


@nonlinear
def test_gradient(make):
    """Where the flag says differentiable, autograd agrees with finite differences; elsewhere the gradient says nothing."""
    A, x = make(), 0.3 * normal(1, *make().shape, seed=3)
    x.requires_grad_()
    if A.differentiable:
        assert torch.autograd.gradcheck(A, x, atol=1e-6)
    else:
        (gradient,) = torch.autograd.grad(A(x).sum(), x)
        assert float(gradient.abs().max()) == 0


# --- phase retrieval and clipped light -----------------------------------------------------------


def test_phase_retrieval_keeps_the_energy_and_forgets_sign_place_and_half_turns():
    A, x = PhaseRetrieval((1, 4, 6), 2), normal(1, 1, 4, 6)
    y = A(x)
    assert y.shape == (1, 1, 8, 12) and bool((y >= 0).all())
    assert_close(y.square().sum(), x.square().sum())
    for other in (-x, x.flip(2, 3)):
        assert_close(A(other), y)
    small = torch.nn.functional.pad(x[..., :2, :3], (0, 3, 0, 2))
    assert_close(A(small.roll((1, 2), (2, 3))), A(small))  # moved within the zeros


def test_phase_retrieval_has_a_gradient_at_zero():
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(PhaseRetrieval((1, 4, 4), 2)(x).sum(), x)
    assert float(gradient.abs().max()) == 0


def test_clipped_light_has_no_gradient_where_it_is_clipped():
    x = torch.tensor([-0.9, -0.2, 0.3, 0.6], dtype=F64).reshape(1, 1, 1, 4).requires_grad_()
    y = HDR((1, 1, 4), 2.0)(x)
    assert_close(y.flatten(), torch.tensor([-1.0, -0.4, 0.6, 1.0], dtype=F64))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.flatten().tolist() == [0, 2, 2, 0]


# --- JPEG ----------------------------------------------------------------------------------------


def levels(x):
    return (127.5 * (x + 1)).round().clamp(0, 255)


def waves(channels, seed=0):
    """A picture (1, channels, 64, 64) of whole levels: broad waves and some noise."""
    u = torch.arange(64, dtype=F64)
    wave = 0.5 * torch.sin(u[:, None] / 7) * torch.cos(u / 11)
    return levels(wave + 0.05 * normal(1, channels, 64, 64, seed=seed) + 0.1) / 127.5 - 1


def pillow(x, quality):
    """What Pillow's libjpeg makes of a picture of whole levels, and its tables."""
    array = levels(x)[0].to(torch.uint8).numpy()
    picture = Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    opened = Image.open(file)
    decoded = torch.from_numpy(np.array(opened)).double()
    return (decoded[None] if decoded.ndim == 2 else decoded.movedim(-1, 0)), opened.quantization


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 100])
def test_tables_are_libjpegs(quality):
    _, tables = pillow(waves(3), quality)
    A = JPEG((3, 64, 64), quality)
    assert A.tables.tensor[0].flatten().tolist() == tables[0]
    assert A.tables.tensor[1].flatten().tolist() == A.tables.tensor[2].flatten().tolist() == tables[1]


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_grey_pictures_are_pillows(quality):
    """Pixels agree to one level, the rounding at the end and that of libjpeg's inverse in whole numbers, but for flips.

    libjpeg keeps a coefficient in steps of 1/8, so by a mean of 1/32 it is off, and a number flips where it lies that near a
    tie: with a probability of at most 2 / (32 Q) for each, summed over a block, were coefficients spread evenly over Q.
    """
    x, A = waves(1), JPEG((1, 64, 64), quality)
    decoded, _ = pillow(x, quality)
    gap = (levels(A.decode(A(x)))[0] - decoded).abs()
    blocks = gap.reshape(8, 8, 8, 8).amax((1, 3))
    flips = float((1 / (16 * A.tables.tensor)).sum())
    assert float((blocks > 1).double().mean()) <= min(flips, 0.5)
    assert float(gap.mean()) < 0.5


def test_colour_pictures_are_near_pillows():
    """Pillow rounds YCbCr before the transform and after it, by at most 1/2 each: its mean error is under one level of ours."""
    x, A = waves(3), JPEG((3, 64, 64), 75)
    decoded, _ = pillow(x, 75)
    assert float((levels(A.decode(A(x)))[0] - decoded).abs().mean()) < 1
    assert float((levels(x)[0] - decoded).abs().mean()) > 2  # compression itself changes more


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_second_compression_changes_nothing(channels, dtype):
    A = JPEG((channels, 64, 64), 30)
    y = A(waves(channels).to(dtype))
    assert torch.equal(y, y.round())
    assert torch.equal(A(A.decode(y)), y) and torch.equal(A(A.pinv(y)), y)


def test_a_better_quality_is_nearer():
    x = waves(3)
    errors = [float((JPEG((3, 64, 64), q).decode(JPEG((3, 64, 64), q)(x)) - x).square().mean()) for q in (5, 20, 50, 80, 100)]
    assert errors == sorted(errors, reverse=True)
    # at quality 100 every Q is 1: rounding adds 1/12 to each YCbCr coefficient, and RGB of it at most 1 + 1.772^2 times that
    assert errors[-1] < (1 + 1.772**2) / 12 / 127.5**2


# --- blind blur ----------------------------------------------------------------------------------


def test_blind_blur_is_the_blur_of_its_kernel():
    A, x, kernel = BlindBlur((2, 6, 8), 3), normal(2, 2, 6, 8), normal(3, 3, seed=1)
    assert_close(A(x, kernel), Blur(kernel, (2, 6, 8))(x))
    assert_close(A.at(kernel)(x), A(x, kernel))
    kernels = torch.stack([kernel, kernel.T])
    assert_close(A(x, kernels)[1:], Blur(kernel.T, (2, 6, 8))(x[1:]))
    assert A.differentiable


def test_blind_blur_is_linear_in_its_kernel():
    """With a known picture the kernel is the solution of a linear problem, which conjugate gradients solve to 1e-6."""
    A, x, kernel = BlindBlur((1, 8, 8), 3), normal(2, 1, 8, 8), gaussian_kernel(0.8, 3)
    y, of = A(x, kernel), A.of(x)
    k, z = normal(2, 3, 3, seed=4), normal(2, 1, 8, 8, seed=5)
    assert_close((of(k) * z).sum(), (k * of.adjoint(z)).sum())
    assert_close(of.pinv(y), kernel.expand(2, 3, 3), rtol=0, atol=1e-5)
    assert torch.autograd.gradcheck(A, (normal(1, 1, 8, 8).requires_grad_(), normal(3, 3).requires_grad_()), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PhaseRetrieval((1, 8, 8), 0.5), "oversampling = 0.5; expected a factor >= 1"),
        (lambda: HDR((1, 8, 8), 0), "factor = 0; expected an exposure > 0"),
        (lambda: JPEG((1, 8, 8), 0), "quality = 0; expected 1 to 100"),
        (lambda: JPEG((1, 8, 12), 50), r"shape = \(1, 8, 12\); expected .* that 8 divides"),
        (lambda: JPEG((2, 8, 8), 50), r"shape = \(2, 8, 8\); expected 1 or 3 channels"),
        (
            lambda: JPEG((1, 8, 8), 50).decode(torch.zeros(1, 1, 8, 8)),
            r"y has shape \(1, 1, 8, 8\); expected \(B, 1, 1, 1, 8, 8\)",
        ),
        (lambda: BlindBlur((1, 8, 8), 9), "kernel has 9 x 9 pixels; expected at most the picture's 8 x 8"),
        (
            lambda: BlindBlur((1, 8, 8), 3)(torch.zeros(2, 1, 8, 8), torch.zeros(5, 5)),
            r"kernel has .* expected \(3, 3\)",
        ),
        (lambda: BlindBlur((1, 8, 8), 3)(torch.zeros(2, 1, 8, 7), torch.zeros(3, 3)), r"x has shape .*expected \(B, 1, 8, 8\)"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()
