"""Set 07: right answers in another form pass, the library's own are refused, and references agree with the library."""

import ast

import numpy as np
import pytest
import torch

from course_lib import langevin, posterior
from course_lib.gaussians import Mixture
from course_lib.grading import verdicts
from course_lib.grading.items import find, items_of
from course_lib.grading.paths import sources
from course_lib.grading.sets.set_03.common import DENOISERS
from course_lib.grading.submission import _defines
from course_lib.operators import Blur, Matrix
from course_lib.posterior import particles
from course_lib.steps import ddim
from tests.graders.tools import _names, assert_right


def test_a_right_answer_written_in_another_way_passes_set_07():
    def by_precision(m, C, A, y, sigma_y):
        cov = torch.linalg.inv(torch.linalg.inv(C) + A.T @ A / sigma_y**2)
        return (torch.linalg.solve(C, m) + y @ A / sigma_y**2) @ cov, cov

    def by_the_joint_gaussian(m, C, A, y, sigma_y):
        d, e = len(m), len(A)
        whole = torch.cat([torch.eye(d, dtype=C.dtype), A]) @ C @ torch.cat([torch.eye(d, dtype=C.dtype), A]).T
        whole[d:, d:] += sigma_y**2 * torch.eye(e, dtype=C.dtype)
        kept = whole[:d, d:] @ torch.linalg.inv(whole[d:, d:])
        return torch.stack([m + kept @ (one - A @ m) for one in y]), whole[:d, :d] - kept @ whole[d:, :d]

    def by_distributions(weights, means, covs, A, y, sigma_y):
        S = A @ covs @ A.T + sigma_y**2 * torch.eye(len(A), dtype=covs.dtype)
        logs = torch.distributions.MultivariateNormal(means @ A.T, S).log_prob(y[:, None]) + weights.log()
        return (logs - logs.logsumexp(1, keepdim=True)).exp()

    def by_backward(D, A, y, x, sigma):
        x = x.clone()
        with torch.enable_grad():
            x.requires_grad_()
            for r in y - A(D(x, sigma)):
                torch.sqrt((r * r).sum()).backward(retain_graph=True)
        return x.grad

    def by_the_jacobian(D, A, y, x, sigma):
        slopes = []
        for one, seen in zip(x, y, strict=True):
            J = torch.autograd.functional.jacobian(lambda p: A(D(p[None], sigma))[0].flatten(), one)
            r = (seen - A(D(one[None], sigma))[0]).flatten()
            slopes.append(-torch.einsum("m,m...->...", r / r.norm(), J))
        return torch.stack(slopes)

    def through_the_other_coordinate(move, slope, x, sigma, sigma_next, zeta):
        x_vp = move(x, sigma, sigma_next) / torch.sqrt(1 + sigma_next**2)
        return torch.sqrt(1 + sigma_next**2) * (x_vp - zeta * torch.sqrt(1 + sigma**2) * slope(x, sigma))

    def by_the_density(D, A, y, x, sigma, sigma_y, s):
        r2 = 1 / (1 / s**2 + 1 / sigma**2)
        S = r2 * A @ A.T + sigma_y**2 * torch.eye(len(A), dtype=A.dtype)
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            x0 = D(x, sigma)
            log_p = torch.distributions.MultivariateNormal(x0 @ A.T, S).log_prob(y)
            return x0 + sigma**2 * torch.autograd.grad(log_p.sum(), x, retain_graph=True)[0]

    def in_the_space_of_pictures(D, A, y, x, sigma, sigma_y, s):
        r2 = (sigma * s) ** 2 / (sigma**2 + s**2)
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            x0 = D(x, sigma)
            inner = r2 * A.T @ A + sigma_y**2 * torch.eye(A.shape[1], dtype=A.dtype)
            v = torch.linalg.solve(inner, A.T @ (y - x0.detach() @ A.T).T).T
            x0.backward(v)
        return (x0 + sigma**2 * x.grad).detach()

    def in_the_papers_terms(D, A, y, mu, sigma, eps, sigma_y, weight):
        with torch.enable_grad():
            mu = mu.clone().requires_grad_()
            x = mu + sigma * eps
            predicted = (x - D(x, sigma)) / sigma
            loss = 0.5 * ((y - A(mu)) / sigma_y).flatten(1).pow(2).sum(1)
            loss = loss + weight * sigma * ((predicted - eps).detach() * mu).flatten(1).sum(1)
            loss.sum().backward()
        return loss, mu.grad

    def by_normal_densities(log_w, x_next, mean, guided, std, log_y, log_y_next):
        log_p, log_q = (torch.distributions.Normal(one, std).log_prob(x_next).sum(-1) for one in (mean, guided))
        logs = log_w + log_p + log_y_next - log_q - log_y
        w = torch.exp(logs - logs.max())
        return w / w.sum(), w.sum() ** 2 / (w**2).sum()

    def in_a_loop(x, W, u):
        chosen, k, total = [], 0, float(W[0])
        for i in range(len(W)):
            while total < (i + u) / len(W) and k < len(W) - 1:
                k += 1
                total += float(W[k])
            chosen.append(x[k])
        return torch.stack(chosen[::-1]), torch.ones(len(W), dtype=W.dtype) / len(W)  # in another order

    def by_differentiation(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            log_y = -(y - x @ A.T).square().sum() / (2 * (sigma_y**2 + gamma**2))
            score = torch.autograd.grad(log_y, x)[0] - (x - D(x, sigma)) / sigma**2
        return (x + tau * score + np.sqrt(2 * tau) * z).detach()

    def by_appended_rows(k, x, y, ridge):
        kh, kw = k.shape
        basis = torch.eye(kh * kw, dtype=k.dtype).reshape(-1, kh, kw)
        columns = [Blur(one, tuple(x.shape[1:]))(x).flatten() for one in basis]
        X = torch.cat([torch.stack(columns, 1), ridge**0.5 * torch.eye(kh * kw, dtype=k.dtype)])
        right = torch.cat([y.flatten(), ridge**0.5 * k.flatten()])
        new = torch.relu(torch.linalg.lstsq(X, right[:, None]).solution[:, 0]).reshape(kh, kw)
        return new / new.sum()

    for item_id, fn in (("07.1", by_precision), ("07.1", by_the_joint_gaussian), ("07.2", by_distributions),
                        ("07.3", by_backward), ("07.3", by_the_jacobian),
                        ("07.4", through_the_other_coordinate), ("07.5", by_the_density),
                        ("07.5", in_the_space_of_pictures), ("07.6", in_the_papers_terms), ("07.7", by_normal_densities),
                        ("07.8", in_a_loop), ("07.9", by_differentiation), ("07.10", by_appended_rows)):  # fmt: skip
        assert_right(item_id, fn)


def test_the_library_is_no_answer_set_07():
    def exact(m, C, A, y, sigma_y):
        found = [Mixture.gaussian(m, C).posterior(A, one, sigma_y) for one in y]
        return torch.stack([one.means[0] for one in found]), found[0].covs[0]

    def weights(weights, means, covs, A, y, sigma_y):
        return torch.stack([Mixture(weights, means, covs).posterior(A, one, sigma_y).weights for one in y])

    def slope(D, A, y, x, sigma):
        return x - posterior.dps(ddim, A, y)(D, x, sigma, sigma)[0]

    def step(move, slope, x, sigma, sigma_next, zeta):
        return posterior.dps(move, None, None, zeta)(None, x, sigma, sigma_next)[0]

    def estimate(D, A, y, x, sigma, sigma_y, s):
        return posterior.pigdm(D, Matrix(A), y, sigma_y, posterior.gaussian_variance(s))(x, sigma)

    def descent(D, A, y, mu, sigma, eps, sigma_y, weight):
        mode = posterior.red_diff(D, mu, A, y, sigma_y, torch.tensor([2.0, 1.0]), lambda x: eps)
        return mode, mode

    def size(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return log_w.softmax(0), particles.effective_sample_size(log_w)

    def resampled(x, W, u):
        return x[particles.systematic(W, lambda like: like)], W

    def walk(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return langevin.langevin(D, x, sigma, lambda x: z, 0.16)

    def annealed(D, A, y, x, sigma, sigma_y, gamma, tau, z):
        return posterior.csgm(Matrix(A), y, sigma_y, lambda x: z)(D, x, sigma, sigma)[0]

    for item_id, fn in (("07.1", exact), ("07.2", weights), ("07.3", slope), ("07.4", step), ("07.5", estimate),
                        ("07.6", descent), ("07.7", size), ("07.8", resampled), ("07.9", walk), ("07.9", annealed)):  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, result)


def test_a_missing_graph_is_said():
    """What a detached tensor does to autograd has no arrays to compare: the message must name it."""

    def without_enabling(D, A, y, x, sigma):
        x = x.clone().requires_grad_()
        return torch.autograd.grad((y - A(D(x, sigma))).flatten(1).norm(dim=1).sum(), x)[0]

    def detached_estimate(D, A, y, x, sigma):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            x0 = D(x, sigma).detach().requires_grad_()
            return torch.autograd.grad((y - A(x0)).flatten(1).norm(dim=1).sum(), x)[0]

    def asked_too_early(D, A, y, x, sigma, sigma_y, s):
        x0 = D(x, sigma)
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad((x0 @ A.T).sum(), x)[0]

    for item_id, fn, words in (
        ("07.3", without_enabling, "no graph to differentiate"),
        ("07.3", detached_estimate, "does not depend on the tensor"),
        ("07.5", asked_too_early, "no graph to differentiate"),
    ):
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and words in result.message, (item_id, result)


def test_what_random_or_moved_particles_do_is_said():
    generator = torch.Generator().manual_seed(0)

    def independent_draws(x, W, u):
        index = torch.multinomial(W, len(W), replacement=True, generator=generator)
        return x[index], torch.full_like(W, 1 / len(W))

    def indices(x, W, u):
        return torch.searchsorted(W.cumsum(0), (torch.arange(len(W)) + u) / len(W)), torch.full_like(W, 1 / len(W))

    def mixed(x, W, u):
        return W @ x.flatten(1) + 0 * x.flatten(1), W

    for fn, words in (
        (independent_draws, "torch.multinomial"),
        (indices, "expected particles"),
        (mixed, "x_next has"),
    ):
        result = verdicts.judge("07.8", fn)
        assert result.status == verdicts.WRONG and words in result.message, (fn.__name__, result)


def test_systematic_resampling_is_unbiased():
    """Averaged over u, each particle comes N W times; on a grid of 1,000 u to within half a cell for each of its two ends."""
    W = torch.tensor([0.05, 0.32, 0.0, 0.41, 0.22], dtype=torch.float64)
    x = torch.arange(5.0).double()[:, None]
    copies = torch.zeros(5, dtype=torch.float64)
    for u in (torch.arange(1000) + 0.5) / 1000:
        copies += torch.bincount(find("07.8").reference(x, W, float(u))[0][:, 0].long(), minlength=5)
    assert float((copies / 1000 - 5 * W).abs().max()) <= 1e-3


def test_the_exact_items_agree_with_the_oracle():
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    root, A, y = draw(3, 4, 4), draw(2, 4), draw(5, 2)
    prior = Mixture(torch.tensor([0.2, 0.5, 0.3]), draw(3, 4), root @ root.mT + 0.1 * torch.eye(4).double())
    mean, cov = find("07.1").reference(prior.means[0], prior.covs[0], A, y, 0.3)
    weights = find("07.2").reference(prior.weights, prior.means, prior.covs, A, y, 0.3)
    for b in range(5):
        exact = prior.posterior(A, y[b], 0.3)
        for ours, theirs in ((mean[b], exact.means[0]), (cov, exact.covs[0]), (weights[b], exact.weights)):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)  # 64 bits, condition numbers below 1e4


@pytest.mark.parametrize("name", ["turned", "peaks"])
def test_the_guided_items_agree_with_the_solvers(name):
    generator = torch.Generator().manual_seed(2)
    matrix, x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 5), (4, 5), (4, 3)))
    D, A = DENOISERS[name], Matrix(matrix)
    sigma, sigma_next = torch.tensor([1.3, 0.6], dtype=torch.float64)
    move = lambda x, sigma, sigma_next: ddim(D, x, sigma, sigma_next)[0]
    slope = lambda x, sigma: find("07.3").reference(D, A, y, x, sigma)
    ours = find("07.4").reference(move, slope, x, sigma, sigma_next, 0.7)
    theirs, _ = posterior.dps(ddim, A, y, 0.7)(D, x, sigma, sigma_next)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    ours = find("07.5").reference(D, matrix, y, x, sigma, 0.4, 0.8)
    theirs = posterior.pigdm(D, A, y, 0.4, posterior.gaussian_variance(0.8))(x, sigma)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)  # two ways to solve with S


def test_no_name_of_the_notebook_is_one_that_a_known_mistake_uses():
    """The grader carries along what binds a name that an answer reads: a name that means two things misleads it."""
    body = ast.parse(sources("solutions")["07"].read_text()).body
    bound = set().union(*(_defines(node) or set() for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))))
    for item in items_of("07").values():
        for known in item.mistakes:
            assert not bound & _names(known.fn.__code__) & known.fn.__globals__.keys(), (item.id, known.name)
