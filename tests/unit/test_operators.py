"""The laws of every operator: adjoint, norm, solution, pseudo-inverse, singular values, shapes, types and batches."""

import pytest
import torch
from torch.testing import assert_close

from course_lib.operators import (
    CT,
    MRI,
    Bicubic,
    BlockAverage,
    Blur,
    CoilMRI,
    Decomposed,
    GaussianCS,
    GaussianNoise,
    Grey,
    Hadamard,
    LinearOperator,
    Mask,
    Matrix,
    Operator,
    ReflectedBlur,
    cartesian_mask,
    coil_maps,
    gaussian_kernel,
    measure,
    motion_kernel,
)
from tests.draws import normal

F64 = torch.float64
SMALL, ODD = (3, 8, 8), (2, 5, 7)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


LINEAR = {
    "matrix": lambda: Matrix(normal(4, 7, seed=1)),
    "mask box": lambda: Mask.box(SMALL, 4),
    "mask half": lambda: Mask.half(ODD, "right"),
    "mask random": lambda: Mask.random(SMALL, 0.3, seeded()),
    "mask of one channel": lambda: Mask(normal(*ODD) > 0),
    "block average": lambda: BlockAverage((2, 6, 9), 3),
    "block average 1": lambda: BlockAverage(ODD, 1),
    "grey": lambda: Grey(SMALL),
    "blur gaussian": lambda: Blur(gaussian_kernel(0.7), SMALL),
    "blur odd": lambda: Blur(normal(3, 2, seed=2), ODD),  # no symmetry, an even side
    "blur flat": lambda: Blur(torch.ones(1, 4, dtype=F64) / 4, SMALL),  # frequencies that vanish exactly
    "blur motion": lambda: Blur(motion_kernel(5, 30), (1, 9, 8)),
    "blur reflected": lambda: ReflectedBlur((2, 5, 7), 1.0),
    "bicubic": lambda: Bicubic((2, 8, 12), 4),
    "hadamard": lambda: Hadamard((2, 4, 8), 30, seeded()),
    "gaussian sensing": lambda: GaussianCS((1, 5, 6), 12, seeded()),
    "mri": lambda: MRI((2, 6, 8), cartesian_mask(6, 8, 2, seeded())),
    "mri random": lambda: MRI((1, 5, 7), normal(5, 7) > 0),  # of some pairs f, -f one is measured, of some both
    "mri even": lambda: MRI((1, 4, 6), normal(4, 6, seed=1) > 0),
    "mri coils": lambda: CoilMRI((1, 6, 8), cartesian_mask(6, 8, 2, seeded()), coil_maps(3, 6, 8)),
    "ct": lambda: CT((2, 6, 6), 5),
    "ct odd": lambda: CT((1, 5, 5), [10.0, 100.0]),
}
linear = pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
DECOMPOSED = {name: make for name, make in LINEAR.items() if isinstance(make(), Decomposed | Matrix)}
decomposed = pytest.mark.parametrize("make", DECOMPOSED.values(), ids=DECOMPOSED)


def dot(a, b):
    return (a * b).flatten(1).sum(1)


def matrix_of(function, shape):
    """The matrix of a linear function of pictures, column by column."""
    n = torch.Size(shape).numel()
    return function(torch.eye(n, dtype=F64).reshape(n, *shape)).flatten(1).T


@linear
def test_adjoint(make):
    """<A x, y> = <x, A^T y> to 1e-10 of the product of the norms, and A^T is the one that autograd derives from `apply`."""
    A = make()
    x, y = normal(3, *A.shape, seed=3), normal(3, *A.out, seed=4)
    gap = dot(A(x), y) - dot(x, A.adjoint(y))
    assert bool((gap.abs() <= 1e-10 * x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)).all())
    assert_close(A.adjoint(y), LinearOperator.adjoint(A, y), rtol=0, atol=1e-12)


@linear
def test_norm(make):
    """The norm is the largest singular value of the dense matrix.

    Power iteration from a random start comes from below; with two singular values that are close, 100 steps leave a relative
    gap of at most 1 / (2 * 100) log(n) of the norm (Kuczynski and Wozniakowski 1992, Theorem 4.1, for A^T A, half of it for A).
    """
    A = make()
    exact = float(torch.linalg.matrix_norm(matrix_of(A, A.shape), 2))
    derived = LinearOperator.norm(A)
    n = torch.Size(A.shape).numel()
    assert exact * (1 - 0.871 * torch.log(torch.tensor(n)) / 200) <= derived <= exact * (1 + 1e-12)
    if type(A).norm is not LinearOperator.norm:
        assert_close(A.norm(), exact, rtol=1e-10, atol=0)


@linear
def test_solve(make):
    """(A^T A + ridge I) x = b for each row's own ridge, as the dense system has it; so does the derived one, by CG.

    CG leaves a residual of 1e-6 |b|, so an error of at most 1e-6 |b| / ridge.
    """
    A = make()
    b, ridge = normal(3, *A.shape, seed=5), torch.tensor([0.1, 1.0, 30.0], dtype=F64)
    M = matrix_of(A, A.shape)
    eye = torch.eye(M.shape[1], dtype=F64)
    exact = torch.stack([torch.linalg.solve(M.T @ M + r * eye, row) for r, row in zip(ridge, b.flatten(1), strict=True)])
    derived = LinearOperator.solve(A, b, ridge)
    bound = 1e-6 * b.flatten(1).norm(dim=1) / ridge
    assert bool(((derived.flatten(1) - exact).norm(dim=1) <= bound).all())
    if type(A).solve is not LinearOperator.solve:
        assert_close(A.solve(b, ridge).flatten(1), exact, rtol=1e-10, atol=1e-10)
        assert_close(A.solve(b, 1.0)[1], A.solve(b, ridge)[1])  # one number for all rows
        back = A.adjoint(A(b))  # ridge = 0: the part of b that A sees
        assert_close(A.solve(back, 0.0), A.pinv(A(b)), rtol=1e-8, atol=1e-8)


@decomposed
def test_the_pseudo_inverse_and_the_solution_have_gradients(make):
    """Both are linear, f(y) = P y, so the gradient of <P y, x> is P^T x: it is finite, and <P^T x, y> = <P y, x>."""
    A = make()
    x, y = normal(1, *A.shape, seed=12), normal(1, *A.out, seed=13)
    for function, value in ((A.pinv, y), (lambda b: A.solve(b, 0.3), normal(1, *A.shape, seed=14))):
        value.requires_grad_()
        inner = (function(value) * x).sum()
        (gradient,) = torch.autograd.grad(inner, value)
        assert_close((gradient * value).sum(), inner, rtol=1e-8, atol=1e-10)


@decomposed
def test_a_small_ridge_still_counts_where_nothing_is_seen(make):
    """On b in the null space (A^T A + ridge I)^-1 b = b / ridge, also for a ridge far below the precision of float32."""
    A = make()
    x = normal(2, *A.shape, seed=11)
    b = x - A.pinv(A(x))
    if isinstance(A, Decomposed):
        assert_close(1e-12 * A.solve(b.float(), 1e-12).double(), b, rtol=0, atol=1e-4)


@decomposed
def test_pseudo_inverse(make):
    """Moore and Penrose's four conditions on the dense matrices, to 1e-10 of the largest number in each."""
    A = make()
    M, P = matrix_of(A, A.shape), matrix_of(A.pinv, A.out)
    for got, expected in ((M @ P @ M, M), (P @ M @ P, P), ((M @ P).T, M @ P), ((P @ M).T, P @ M)):
        assert_close(got, expected, rtol=0, atol=1e-10 * max(1.0, float(expected.abs().max())))


@linear
def test_derived_pseudo_inverse(make):
    """What conjugate gradients promise: A^T (A p - y) is at most 1e-6 of A^T y, and p has no part that A does not see.

    The residual of the recursion drifts from the true one by rounding, 1e-10 of the start at most.
    """
    A = make()
    y = normal(2, *A.out, seed=10)
    p = LinearOperator.pinv(A, y)
    back = A.adjoint(y)
    left = (A.adjoint(A(p) - y)).flatten(1).norm(dim=1)
    assert bool((left <= (1e-6 + 1e-10) * back.flatten(1).norm(dim=1)).all())
    _, s, Vt = torch.linalg.svd(matrix_of(A, A.shape))
    unseen = Vt[int((s > 1e-10 * s.max()).sum()) :]
    assert_close(p.flatten(1) @ unseen.T, torch.zeros(2, len(unseen), dtype=F64), rtol=0, atol=1e-9 * float(p.norm()))


@decomposed
def test_projection(make):
    """`project` measures y wherever an x does, moves nothing that already does, and moves along the row space only."""
    A = make()
    x, y = normal(2, *A.shape, seed=6), A(normal(2, *A.shape, seed=7))
    nearest = A.project(x, y)
    assert_close(A(nearest), y, rtol=0, atol=1e-9)
    assert_close(A.project(nearest, y), nearest, rtol=0, atol=1e-9)
    assert_close(A.pinv(A(nearest - x)), nearest - x, rtol=0, atol=1e-9)


@decomposed
def test_singular_value_decomposition(make):
    """A = U diag(s) V^T; V is orthonormal and complete, U has orthonormal columns, and each function is the other's transpose."""
    A = make()
    svd = A.svd()
    n, r = torch.Size(A.shape).numel(), len(svd.s)
    assert svd.s.dtype == F64 and bool((svd.s >= 0).all()) and r <= n
    Vt, V = matrix_of(svd.Vt, A.shape), matrix_of(svd.V, (n,))
    Ut, U = matrix_of(svd.Ut, A.out), matrix_of(svd.U, (r,))
    eye = torch.eye(n, dtype=F64)
    assert_close(Vt @ V, eye, rtol=0, atol=1e-12)
    assert_close(Vt, V.T, rtol=0, atol=1e-12)
    assert_close(Ut, U.T, rtol=0, atol=1e-12)
    assert_close(Ut @ U, eye[:r, :r], rtol=0, atol=1e-12)
    assert_close(U @ torch.diag(svd.s) @ Vt[:r], matrix_of(A, A.shape), rtol=0, atol=1e-12)


@linear
def test_types_and_batches(make):
    """A row does not depend on its batch, and float32 stays float32 and agrees to its precision."""
    A = make()
    x, y = normal(3, *A.shape, seed=8), normal(3, *A.out, seed=9)
    functions = [(A, x), (A.adjoint, y)]
    if isinstance(A, Decomposed | Matrix):
        svd = A.svd()
        functions += [(svd.Vt, x), (svd.Ut, y), (svd.V, svd.Vt(x)), (svd.U, svd.Ut(y))]
    for function, value in functions:
        whole = function(value)
        assert whole.dtype == F64
        assert_close(function(value[1:2]), whole[1:2], rtol=0, atol=1e-12)
        single = function(value.float())
        assert single.dtype == torch.float32
        # at most n products of size |value| max|A| are summed, each with a relative error of 6e-8
        assert_close(single.double(), whole, rtol=1e-4, atol=2e-6 * float(value.flatten(1).norm(dim=1).max()) * max(A.norm(), 1))


@linear
def test_another_shape_is_refused(make):
    A = make()
    for function, shape, name in ((A, A.shape, "x"), (A.adjoint, A.out, "y"), (A.pinv, A.out, "y")):
        wrong = normal(2, *shape[:-1], shape[-1] + 1)
        with pytest.raises(ValueError, match=rf"^{name} has shape \(2, .*; expected \(B, .*\) for {type(A).__name__}$"):
            function(wrong)


@linear
def test_a_measurement_is_checked(make):
    A = make()
    y = A(normal(1, *A.shape))
    assert A.check_measurement(y) is y
    with pytest.raises(ValueError, match="y has a value that is not finite"):
        A.check_measurement(y * float("nan"))
    noisy = measure(A, normal(1, *A.shape), GaussianNoise(0.1), seeded())
    assert A.check_measurement(noisy) is noisy
    if A.observed is not None:
        assert bool(A.observed.any()) and not bool(A.observed.all())
        with pytest.raises(ValueError, match=f"y has a value where {type(A).__name__} observes nothing; expected 0"):
            A.check_measurement(noisy + 1)


def test_an_operator_without_a_decomposition_says_so():
    class Shift(LinearOperator):
        shape = out = (4,)

        def apply(self, x):
            return x.roll(1, -1)

    with pytest.raises(ValueError, match="Shift has no singular value decomposition here; expected"):
        Shift().svd()
    assert isinstance(Shift(), Operator) and Shift.differentiable
