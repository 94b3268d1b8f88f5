"""Set 06: right answers in another form pass, the library's own are refused, and closed forms agree with the library."""

import ast
from itertools import pairwise

import numpy as np
import torch

from course_lib import posterior
from course_lib.grading import verdicts
from course_lib.grading.items import find, items_of
from course_lib.grading.paths import sources
from course_lib.grading.sets.set_03.common import DENOISERS
from course_lib.grading.submission import _defines
from course_lib.nets.reversible import Coupling
from course_lib.operators import BlockAverage, Blur, Mask, Matrix
from course_lib.steps import ddim
from tests.graders.tools import _names


def test_a_right_answer_written_in_another_way_passes_set_06():
    def by_differentiation(y, kernel, factor):
        x = torch.zeros(*y.shape[:-2], y.shape[-2] * factor, y.shape[-1] * factor, dtype=y.dtype, requires_grad=True)
        rows, columns = kernel.shape
        padded = torch.zeros(x.shape[-2:], dtype=y.dtype)
        for u in range(rows):
            for v in range(columns):
                padded[(u - rows // 2) % x.shape[-2], (v - columns // 2) % x.shape[-1]] += kernel[u, v]
        blurred = torch.fft.ifft2(torch.fft.fft2(padded) * torch.fft.fft2(x)).real
        torch.nn.functional.avg_pool2d(blurred, factor).backward(y)
        return x.grad

    def by_least_squares(A, x, y):
        return x + torch.linalg.lstsq(A, (y - x @ A.T).T, driver="gelsd").solution.T

    def by_rows(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        eps = (x - D(x, sigma)) / sigma
        out = x + (sigma_next - sigma) * eps
        if sigma_next >= sigma_y:
            out[:, mask] = (y + z * torch.sqrt((sigma_next - sigma_y) * (sigma_next + sigma_y)))[:, mask]
        return out

    def by_parts(D, A, y, x, sigma):
        x0 = D(x, sigma.expand(len(x)))
        return A.pinv(y) + x0 - A.pinv(A(x0))

    def number_by_number(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        out, kept = torch.empty_like(x), np.sqrt(1 - eta**2)
        for i, gain in enumerate(s.tolist()):
            spread = sigma_y / gain if gain else float("inf")
            if gain == 0:
                out[:, i] = x0[:, i] + sigma_next * (kept * (x - x0)[:, i] / sigma + eta * z[:, i])
            elif sigma_next < spread:
                out[:, i] = x0[:, i] + sigma_next * (kept * (y[:, i] / gain - x0[:, i]) / spread + eta * z[:, i])
            else:
                rest = float(sigma_next**2 - eta_b**2 * spread**2) ** 0.5
                out[:, i] = torch.lerp(x0[:, i], y[:, i] / gain, eta_b) + rest * z[:, i]
        return out

    def by_reshaping(x, reference, sigma_next, factor, until, z):
        def low(p):
            blocks = p.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))  # (..., h, factor, w, factor)
            return blocks.mean((-3, -1), keepdim=True).expand_as(blocks).reshape(p.shape)

        return x + (low(reference) + sigma_next * low(z) - low(x)) * bool(sigma_next >= until)

    def from_the_end(estimate, sigmas, t0, z):
        grid = sigmas[-round(t0 * (len(sigmas) - 1)) - 1 :]
        return [torch.add(estimate, z * grid[0]), grid]

    def by_variances(down, x, levels, z):
        for k in range(len(z)):
            for high, low in pairwise(levels):  # all levels of a jump have one draw
                x = x + (high**2 - low**2) / (levels[0] ** 2 - levels[-1] ** 2).sqrt() * z[k]
            for high, low in pairwise(levels):
                x = down(x, high, low)
        return x

    def by_lerp(f, a, b, c, d, v):
        return torch.lerp(f(a), b, v), a, d, c / v + (1 - 1 / v) * f(d)

    for item_id, fn in (("06.1", by_differentiation), ("06.2", by_least_squares), ("06.3", by_rows), ("06.4", by_parts),
                        ("06.5", number_by_number), ("06.6", by_reshaping), ("06.7", from_the_end), ("06.8", by_variances),
                        ("06.9", by_lerp)):  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.correct, (item_id, result.message)


def test_the_library_is_no_answer_set_06():
    def adjoint(y, kernel, factor):
        shape = (*y.shape[1:-2], y.shape[-2] * factor, y.shape[-1] * factor)
        return Blur(kernel, shape).adjoint(BlockAverage(shape, factor).adjoint(y))

    def projection(A, x, y):
        return Matrix(A).project(x, y)

    def replaced(D, x, sigma, sigma_next, y, mask, sigma_y, z):
        return posterior.replacement(ddim, Mask(mask), y, lambda x: z, sigma_y)(D, x, sigma, sigma_next)[0]

    def projected(D, A, y, x, sigma):
        return A.project(D(x, sigma), y)

    def coordinates(x, x0, y, s, sigma, sigma_next, sigma_y, eta, eta_b, z):
        step = posterior.ddrm(Matrix(torch.diag(s)), y, sigma_y, lambda x: z, eta, eta_b)
        return step(lambda x, sigma: x0, x, sigma, sigma_next)[0]

    def refined(x, reference, sigma_next, factor, until, z):
        A = BlockAverage(tuple(x.shape[1:]), factor)
        return x + A.pinv(A(reference + sigma_next * z - x))

    def closer(estimate, sigmas, t0, z):
        return posterior.come_closer(estimate, sigmas, t0, lambda x: z)

    def resampled(down, x, levels, z):
        step = lambda D, x, sigma, sigma_next, memory=None: (down(x, sigma, sigma_next), None)
        return posterior.repaint(step, Mask(torch.ones(1, 4, 4).bool()), x, lambda x: z[0])(None, x, levels[0], levels[-1])[0]

    class Body(torch.nn.Module):
        def forward(self, x):
            return x

    def wired(f, a, b, c, d, v):
        layer = Coupling(Body(), v)
        return *layer(a, b), *layer.inverse(c, d)

    for item_id, fn in {"06.1": adjoint, "06.2": projection, "06.3": replaced, "06.4": projected, "06.5": coordinates,
                        "06.6": refined, "06.7": closer, "06.8": resampled, "06.9": wired}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, result)


def test_the_rounds_are_those_of_repaint():
    """RePaint whose mask sees one pixel: the steps down of 06.8 are then replacement's, and the draws come in its order."""
    observed = torch.zeros(1, 4, 4, dtype=torch.bool)
    observed[0, 1, 2] = True
    start, *draws = torch.randn(16, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, levels, D = Mask(observed), torch.tensor([2.0, 1.1, 0.4], dtype=torch.float64), DENOISERS["peaks"]
    y = A(start)

    def run(solve):
        queue = list(draws)
        return solve(lambda x: queue.pop(0))

    def ours(noise):
        rule = posterior.replacement(ddim, A, y, noise)
        down = lambda x, sigma, sigma_next: rule(D, x, sigma, sigma_next)[0]

        class Draws:  # z, one draw when a round asks for it
            def __iter__(self):
                return (noise(start) for _ in range(2))

        x = down(down(2 * start, levels[0], levels[1]), levels[1], levels[2])
        return find("06.8").reference(down, x, levels, Draws())

    def theirs(noise):
        step, x, memory = posterior.repaint(ddim, A, y, noise, jump=2, resamplings=3), 2 * start, None
        for sigma, sigma_next in pairwise(levels):
            x, memory = step(D, x, sigma, sigma_next, memory)
        return x

    assert torch.allclose(run(ours), run(theirs), rtol=0, atol=1e-12)  # the same sums in the same order


def test_the_wiring_is_that_of_the_coupling():
    a, b, c, d = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    body = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh()).double()
    layer = Coupling(body, 0.25)  # exact in the parameter's 32 bits
    with torch.no_grad():
        theirs = *layer(a, b), *layer.inverse(c, d)
        ours = find("06.9").reference(body, a, b, c, d, 0.25)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_no_name_of_the_notebook_is_one_that_a_known_mistake_uses():
    """The grader carries along what binds a name that an answer reads: a name that means two things misleads it."""
    body = ast.parse(sources("solutions")["06"].read_text()).body
    bound = set().union(*(_defines(node) or set() for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))))
    for item in items_of("06").values():
        for known in item.mistakes:
            assert not bound & _names(known.fn.__code__) & known.fn.__globals__.keys(), (item.id, known.name)
