"""Blind super-resolution: the picture and the kernel that blurred it are found in turn inside the sampling (BlindDiff).

y = M (k * x0) + sigma_y n: blur around the edges with an unknown kernel k, then the means M of small blocks. The kernels are
anisotropic Gaussians; theta (B, 3), the entries (rr, rc, cc) of the logarithm of their covariance in rows r and columns c,
has no bounds.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from course_lib.integrals import ratio
from course_lib.operators.base import SVD, Shape
from course_lib.operators.decomposed import Decomposed
from course_lib.operators.means import BlockAverage
from course_lib.operators.nonlinear import BlindBlur
from course_lib.steps import check_falling
from course_lib.types import Denoiser, right

F64 = torch.float64


class BlindDenoiser(Denoiser, Protocol):
    """A Denoiser of pictures beside a measurement, that is told a kernel and can guess it.

    given(kernel=theta)  the same Denoiser under the kernels theta (B, 3)
    guess(x, sigma)      mean and deviation of theta given x and y, (B, 3) each
    """

    def given(self, *, kernel: Tensor) -> Denoiser: ...

    def guess(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]: ...


def gaussian_kernels(theta: Tensor, size: int) -> Tensor:
    """k(u) ~ exp(-u^T S^-1 u / 2) with sum 1 on size x size pixels, (..., 3) -> (..., size, size).

    S = exp([[t1, t2], [t2, t3]]) in pixels^2, the matrix exponential: positive definite for every theta.
    """
    entries = theta.new_tensor([[[1, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 0], [0, 1]]])
    precision = torch.linalg.matrix_exp(-(theta[..., None, None] * entries).sum(-3))
    u = torch.arange(size, dtype=theta.dtype, device=theta.device) - size // 2
    place = torch.cartesian_prod(u, u)
    return torch.softmax(-((place @ precision) * place).sum(-1) / 2, -1).unflatten(-1, (size, size))


def log_covariance(major: Tensor, minor: Tensor, angle: Tensor) -> Tensor:
    """theta (..., 3) of kernels with these deviations in pixels, `major` at `angle` radians anticlockwise from the horizontal.

    log S = 2 log(major) a a^T + 2 log(minor) b b^T with a = (-sin, cos) and b = (cos, sin) in rows, which run downwards, and
    columns.
    """
    p, q, c, s = 2 * major.log(), 2 * minor.log(), angle.cos(), angle.sin()
    return torch.stack([p * s**2 + q * c**2, (q - p) * c * s, p * c**2 + q * s**2], -1)


class BlindSuperResolution(BlindBlur):
    """y = M (k * x), M the means of factor x factor blocks: A(x, k), (B, C, H, W) and (B, size, size) -> (B, C, H / f, W / f).

    Linear in each argument alone: `at(k)` is the operator of the picture, `of(x)` that of the kernel. In Fourier coordinates
    Y = F(G X), where G = B K holds the kernel and the block and F is the mean of the f^2 frequencies that M makes one:
    F(G X)(f) = sum_j (G X)(f + j n) / f^2. Raises ValueError where `factor` does not divide H and W, and for a large kernel.
    """

    def __init__(self, shape: Shape, size: int, factor: int):
        super().__init__(shape, size)
        self.means = BlockAverage(self.shape, factor)
        self.out, self.factor = self.means.out, factor
        corner = torch.zeros(1, *self.out, dtype=F64)
        corner[..., 0, 0] = 1
        self._block = torch.fft.fft2(self.means.adjoint(corner)[:, :1]).conj()

    def apply(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self.means.apply(super().apply(x, kernel))

    def at(self, kernel: Tensor) -> Decomposed:
        """The linear operator x -> A(x, k) of one known kernel (size, size), with its SVD."""
        return _AtKernel(self, kernel)

    def gain(self, kernel: Tensor) -> Tensor:
        """G of kernels (B, size, size), (B, 1, H, W)."""
        delta = kernel.new_zeros(len(kernel), 1, *self.shape[-2:])
        delta[..., 0, 0] = 1
        spectrum = torch.fft.fft2(super().apply(delta, kernel))
        return spectrum * self._block.to(spectrum)

    def fold(self, spectrum: Tensor) -> Tensor:
        """F, (..., H, W) -> (..., H / f, W / f)."""
        f, (height, width) = self.factor, self.out[-2:]
        return spectrum.unflatten(-1, (f, width)).unflatten(-3, (f, height)).mean((-4, -2))

    def unfold(self, spectrum: Tensor) -> Tensor:
        """f^2 times F's transpose: the spectrum repeated, (..., H / f, W / f) -> (..., H, W)."""
        return spectrum.repeat(*[1] * (spectrum.ndim - 2), self.factor, self.factor)


class _AtKernel(Decomposed):
    """x -> A(x, k), by one dense matrix that acts on each channel."""

    def __init__(self, A: BlindSuperResolution, kernel: Tensor):
        self.A, self.kernel, self.shape, self.out = A, kernel, A.shape, A.out
        n = math.prod(self.shape[-2:])
        pixels = torch.eye(n, dtype=F64).reshape(n, 1, *self.shape[-2:]).expand(n, *self.shape)
        self._U, self._s, self._Vt = torch.linalg.svd(A.apply(pixels, kernel.double())[:, 0].flatten(1).T)

    def apply(self, x: Tensor) -> Tensor:
        return self.A.apply(x, self.kernel).to(x.dtype)

    def svd(self) -> SVD:
        """Coordinates that have a singular value come first, channel by channel; in float64 also where autocast is on."""
        channels, m, U, Vt = self.shape[0], len(self._s), self._U, self._Vt

        def coordinates(x: Tensor) -> Tensor:
            c = x.double().flatten(2) @ Vt.T
            return torch.cat([c[..., :m].flatten(1), c[..., m:].flatten(1)], 1).to(x)

        def back(c: Tensor) -> Tensor:
            parts = c.double().split([channels * m, channels * (len(Vt) - m)], 1)
            both = torch.cat([part.reshape(len(c), channels, -1) for part in parts], 2)
            return (both @ Vt).reshape(len(c), *self.shape).to(c)

        return SVD(
            self._s.repeat(channels),
            Vt=coordinates,
            V=back,
            Ut=lambda y: (y.double().flatten(2) @ U).flatten(1).to(y),
            U=lambda c: (c.double().reshape(len(c), channels, m) @ U.T).reshape(len(c), *self.out).to(c),
        )


class Conditional:
    """What is known of a picture and its kernel in one step of sampling: x0 ~ N(x_hat, r^2 I), theta ~ N(guess, spread^2), and y.

    `picture` is the image step, `kernel` the kernel step, which lowers

    E(theta) = -w log p(y | theta) + |(theta - guess) / spread|^2 / 2,   y | theta ~ N(A x_hat, r^2 A A^T + sigma_y^2 I)

    The picture is integrated out: the minimum over picture and kernel together prefers kernels that blur nothing (Levin et al.
    2009). w <= 1 counts the measurement as fewer numbers than it has, since D's errors are not independent from pixel to pixel.

    x_hat (B, *shape), y (B, *out), guess and spread (B, 3), r^2 = `variance` >= 0, sigma_y > 0. A A^T is diagonal in the Fourier
    coordinates of y, with the entries F(|G|^2) (Zhao et al. 2016).
    """

    def __init__(
        self,
        A: BlindSuperResolution,
        y: Tensor,
        sigma_y: float,
        x_hat: Tensor,
        variance: float,
        guess: Tensor,
        spread: Tensor,
        weight: float = 1.0,
    ):
        self.A, self.sigma_y, self.variance, self.weight = A, sigma_y, variance, weight
        self.x_hat, self.guess, self.spread = x_hat.double(), guess.double(), spread.double()
        self._X, self._Y = torch.fft.fft2(self.x_hat), torch.fft.fft2(y.double())

    def picture(self, theta: Tensor) -> Tensor:
        """E[x0 | x_hat, y, theta] = x_hat + r^2 A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A x_hat), (B, *shape), in closed form."""
        G, R, v = self._residual(theta)
        return self.x_hat + self.variance * torch.fft.ifft2(G.conj() * self.A.unfold(R / v)).real

    def surprise(self, theta: Tensor) -> Tensor:
        """E(theta) of each row but for a constant, (B,)."""
        _, R, v = self._residual(theta)
        misfit = (R.abs().square() / v).flatten(1).sum(1) / math.prod(self.A.out[-2:])
        volume = self.A.out[0] * v.log().flatten(1).sum(1)
        return self.weight * (misfit + volume) / 2 + ((theta - self.guess) / self.spread).square().sum(1) / 2

    def kernel(self, theta: Tensor, steps: int = 2, halvings: int = 5) -> Tensor:
        """From theta (B, 3), `steps` Gauss-Newton steps, each halved until E falls and not taken where it does not.

        theta' = theta - t H^-1 grad E,  H = w Re(J^* v^-1 J) / n + spread^-2,  J = -F(dG/dtheta X)
        """
        value = self.surprise(theta)
        for _ in range(steps):
            d, t = self._direction(theta), 1.0
            waiting = torch.ones_like(value, dtype=torch.bool)
            for _ in range(halvings):
                tried = theta - t * d
                new = self.surprise(tried)
                better = waiting & (new < value)
                theta, value = torch.where(better[:, None], tried, theta), torch.where(better, new, value)
                waiting, t = waiting & ~better, t / 2
        return theta

    def _direction(self, theta: Tensor) -> Tensor:
        with torch.enable_grad():
            at = theta.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.surprise(at).sum(), at)
        size = self.A.kernel_shape[0]
        tangents = vmap(jacfwd(lambda one: gaussian_kernels(one, size)))(theta).movedim(-1, 1)  # (B, 3, size, size)
        dG = self.A.gain(tangents.flatten(0, 1)).unflatten(0, tangents.shape[:2])
        J = (self.A.fold(dG * self._X[:, None]) / self._residual(theta)[2][:, None].sqrt()).flatten(2)
        H = self.weight * (J @ J.mH).real / math.prod(self.A.out[-2:]) + torch.diag_embed(self.spread**-2)
        return torch.linalg.solve(H, slope[..., None])[..., 0]

    def _residual(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G (B, 1, H, W), the measurement's spectrum less that of x_hat, (B, C, h, w), and its variance, (B, 1, h, w)."""
        G = self.A.gain(gaussian_kernels(theta, self.A.kernel_shape[0]))
        return G, self._Y - self.A.fold(G * self._X), self.variance * self.A.fold(G.abs().square()) + self.sigma_y**2


class BlindDiff:
    """A Step that finds the picture and its kernel in turn (BlindDiff; Li et al. 2024), with both steps in closed form or nearly.

    guess, spread = D.guess(x, sigma);  x_hat = D(x, sigma), told the present theta
    theta <- Conditional.kernel(theta);  x0 <- Conditional.picture(theta);  x' = x0 + (sigma' / sigma) (x - x0)

    As theirs, the network gives both priors, of the kernel by its guess and of the picture by what it removes. They follow a
    gradient of |y - A(x_hat, k)| through the network, and their kernel is the guess; here both steps weigh prior against y.

    start  theta (B or 1, 3) at which sampling begins; with `alternate` = False it is kept: the non-blind solver of this kernel
    s      r^2 = sigma^2 s^2 / (sigma^2 + s^2): D's variance, were pictures N(., s^2 I)
    weight w of the kernel step

    theta is the memory from step to step; `found` (B, 3) is the last step's. One call of D and one of its guess. Raises
    ValueError for sigma_y <= 0, a start of another shape, and a y that is not A's.
    """

    def __init__(
        self,
        A: BlindSuperResolution,
        y: Tensor,
        sigma_y: float,
        start: Tensor,
        s: float = 0.4,
        weight: float = 0.03,
        alternate: bool = True,
    ):
        if not 0 < sigma_y < math.inf:
            raise ValueError(f"sigma_y = {sigma_y}; expected the measurement's standard deviation, a finite number > 0")
        if start.ndim != 2 or start.shape[1] != 3 or len(start) not in (1, len(y)):
            raise ValueError(f"start has shape {tuple(start.shape)}; expected ({len(y)}, 3) or (1, 3), logarithms of covariances")
        self.A, self.y, self.sigma_y = A, A.check_measurement(y), sigma_y
        self.start = start.double().expand(len(y), 3)
        self.s, self.weight, self.alternate = s, weight, alternate
        self.found = self.start

    def __call__(
        self, D: BlindDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        check_falling(sigma, sigma_next)
        theta = self.start if memory is None else memory
        guess, spread = D.guess(x, sigma)
        variance = float(sigma**2 * self.s**2 / (sigma**2 + self.s**2))
        x_hat = D.given(kernel=theta)(x, sigma)
        at = Conditional(self.A, self.y, self.sigma_y, x_hat, variance, guess, spread, self.weight)
        theta = at.kernel(theta) if self.alternate else theta
        x0 = at.picture(theta).to(x.dtype)
        self.found = theta
        return x0 + right(ratio(sigma, sigma_next), x) * (x - x0), theta
