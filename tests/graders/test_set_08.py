"""Set 08: right answers in another form pass, the library's own are refused, and references agree with the library."""

import ast

import pytest
import torch
import torch.nn.functional as F

from course_lib import distill, training
from course_lib.gaussians import Mixture
from course_lib.grading import verdicts
from course_lib.grading.items import find, items_of
from course_lib.grading.paths import sources
from course_lib.grading.sets.set_08.common import BELIEFS
from course_lib.grading.submission import _defines
from course_lib.guidance import cfg
from course_lib.schedules import Discrete
from tests.graders.tools import _names, assert_right


def column(sigma, x):
    return sigma.view(-1, *[1] * (x.ndim - 1))


def test_a_right_answer_written_in_another_way_passes_set_08():
    def in_the_papers_terms(D, x0, sigma, eps):
        x = x0 + column(sigma, x0) * eps
        return (x - D(x, sigma)) / column(sigma, x0) - eps

    def sample_by_sample(D, x0, sigma, eps):
        return torch.stack([(a - D((a + s * e)[None], s[None])[0]) / s for a, s, e in zip(x0, sigma, eps, strict=True)])

    def half_a_squared_distance(x0, gradient):
        return 0.5 * F.mse_loss(x0, (x0 - gradient).detach(), reduction="sum")

    def worth_nothing(x0, gradient):
        return torch.sum((x0 - x0.detach()) * gradient.detach())

    def by_backward(D, x0, sigma, eps):
        x0 = x0.clone()
        with torch.enable_grad():
            x0.requires_grad_()
            x = x0 + sigma * eps
            loss = ((x - D(x, sigma)) / sigma - eps).pow(2).sum() / 2
            loss.backward()
        with torch.no_grad():
            x = x0 + sigma * eps
            return x0.grad, ((x - D(x, sigma)) / sigma - eps)

    def by_the_whole_jacobian(D, x0, sigma, eps):
        residual = lambda z: (z - D(z + sigma * eps, sigma)) / sigma
        J = torch.autograd.functional.jacobian(residual, x0).reshape(x0.numel(), x0.numel())
        r = residual(x0)
        return (J.T @ r.flatten()).reshape(x0.shape), r

    def by_the_level_alone(betas, t):
        sigma = torch.sqrt(1 / (1 - betas).cumprod(0) - 1)[t]
        return sigma, sigma / (1 + sigma**2)

    def by_logarithms(betas, t):
        alpha_bar = torch.exp(torch.log1p(-betas).cumsum(0)).gather(0, t)
        return torch.sqrt((1 - alpha_bar) / alpha_bar), torch.sqrt(alpha_bar * (1 - alpha_bar))

    def in_a_loop(D, x0, sigma, eps):
        total = torch.zeros_like(x0)
        for e in eps:
            x = x0 + sigma * e
            total += (D(x, sigma) - x) / sigma**2 + e / sigma
        return total / len(eps)

    def in_one_call_sample_by_sample(D, x0, sigma, eps):
        n, B = eps.shape[:2]
        x = x0.repeat_interleave(n, 0) + sigma * eps.transpose(0, 1).flatten(0, 1)
        return (D(x, sigma.expand(n * B)).reshape(B, n, *x0.shape[1:]).mean(1) - x0) / sigma**2

    def by_noises(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        x = x0 + column(sigma, x0) * eps
        eps_cond, eps_ref, eps_fake = ((x - D(x, sigma)) / column(sigma, x) for D in (D_cond, D_ref, D_fake))
        return w * eps_cond + (1 - w) * eps_ref - eps_fake

    def by_scores(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        s = column(sigma, x0)
        x = x0 + s * eps
        cond, ref, fake = ((D(x, sigma) - x) / s**2 for D in (D_cond, D_ref, D_fake))
        return s * (fake - torch.lerp(ref, cond, w))

    def in_the_networks_terms(D_fake, x0, sigma, eps):
        with torch.no_grad():
            particles = x0.clone()
        x = particles + column(sigma, x0) * eps
        return F.mse_loss((x - D_fake(x, sigma)) / column(sigma, x0), eps)

    def weighted(D_fake, x0, sigma, eps):
        x0 = x0.data
        error = (D_fake(x0 + column(sigma, x0) * eps, sigma) - x0).square().flatten(1).mean(1)
        return (error / sigma**2).mean()

    def by_the_merged_weight(x, W, A, B, alpha):
        merged = torch.addmm(W, B, A, alpha=alpha / B.shape[1])
        return F.linear(x, merged), merged

    def by_einsum(x, W, A, B, alpha):
        change = torch.einsum("or,ri->oi", B, A) * (alpha / A.size(0))
        return F.linear(x, W) + torch.einsum("...i,oi->...o", x, change), change + W

    def by_indexing(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        x, s = x0 + column(sigma, x0) * eps, column(sigma, x0)
        delta_D = (x - D_ref(x, sigma)) / s
        high = sigma >= split
        delta_D[high] -= ((x - D_bad(x, sigma)) / s)[high]
        return delta_D + w * (D_ref(x, sigma) - D_cond(x, sigma)) / s

    def by_a_mask(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        s = column(sigma, x0)
        x = x0 + s * eps
        cond, ref, bad = D_cond(x, sigma), D_ref(x, sigma), D_bad(x, sigma)
        high = (s >= split).to(x.dtype)
        return ((1 - high) * (x - ref) + high * (bad - ref) + w * (ref - cond)) / s

    def by_the_surrogate(encode, pull, image, scaling):
        with torch.enable_grad():
            image = image.clone().requires_grad_()
            z = encode(image) * scaling
            (0.5 * (z - (z - pull(z)).detach()).square().sum()).backward()
        return image.grad

    def by_vjp(encode, pull, image, scaling):
        g = pull(scaling * encode(image))
        return torch.autograd.functional.vjp(lambda picture: scaling * encode(picture), image, g)[1]

    for item_id, fn in (("08.1", in_the_papers_terms), ("08.1", sample_by_sample), ("08.2", half_a_squared_distance),
                        ("08.2", worth_nothing), ("08.3", by_backward), ("08.3", by_the_whole_jacobian),
                        ("08.4", by_the_level_alone), ("08.4", by_logarithms), ("08.5", in_a_loop),
                        ("08.5", in_one_call_sample_by_sample), ("08.6", by_noises), ("08.6", by_scores),
                        ("08.7", in_the_networks_terms), ("08.7", weighted), ("08.8", by_the_merged_weight),
                        ("08.8", by_einsum), ("08.9", by_indexing), ("08.9", by_a_mask), ("08.10", by_the_surrogate),
                        ("08.10", by_vjp)):  # fmt: skip
        assert_right(item_id, fn)


def test_the_library_is_no_answer_set_08():
    def residual(D, x0, sigma, eps):
        return distill.sds(D)(x0, sigma, lambda x: eps)

    def one_draw(D, x0, sigma, eps):
        return distill.sjc(D)(x0, sigma, lambda x: eps)

    def loss(x0, gradient):
        return distill.distill(lambda: x0, lambda *_: gradient, None, None, 1)

    def jacobian(D, x0, sigma, eps):
        through = distill.sds(D, jacobian=True)(x0, sigma, lambda x: eps)
        return through, through

    def weight(betas, t):
        sigma = Discrete(betas).sigma(t)
        return sigma, distill.dreamfusion(sigma) / sigma

    def average(D, x0, sigma, eps):
        draws = iter(eps)
        return -distill.sjc(D, len(eps))(x0, sigma, lambda x: next(draws)) / sigma

    def variational(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        return distill.vsd(D_cond, D_fake)(x0, sigma, lambda x: eps)

    def guided(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        return cfg(D_cond, D_ref, w)(x0, sigma)

    def denoising(D_fake, x0, sigma, eps):
        return training.denoising_loss(D_fake, x0.detach(), sigma, eps).mean()

    def noise_free(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        return distill.nfsd(D_cond, D_ref, D_bad, w, split)(x0, sigma, lambda x: eps)

    for item_id, fn in (("08.1", residual), ("08.1", one_draw), ("08.2", loss), ("08.3", jacobian), ("08.4", weight),
                        ("08.5", average), ("08.6", variational), ("08.6", guided), ("08.7", denoising),
                        ("08.9", noise_free)):  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, fn.__name__, result)


def test_a_missing_graph_is_said_set_08():
    """What a detached tensor does to autograd has no arrays to compare: the message must name it."""

    def all_detached(x0, gradient):
        return (x0.detach() * gradient.detach()).sum()

    def x0_detached(x0, gradient):
        return (x0.detach() * gradient).sum() + 0 * gradient.sum()

    def not_summed(x0, gradient):
        return x0 * gradient.detach()

    def nothing(x0, gradient):
        x0.sum()

    def not_enabled(D, x0, sigma, eps):
        x0 = x0.clone().requires_grad_()
        r = (x0 - D(x0 + sigma * eps, sigma)) / sigma
        return torch.autograd.grad(r.square().sum() / 2, x0)[0], r.detach()

    def frozen(D_fake, x0, sigma, eps):
        with torch.no_grad():
            return F.mse_loss(D_fake(x0, sigma), x0)

    def one_a_sample(D_fake, x0, sigma, eps):
        return (D_fake(x0, sigma) - x0).flatten(1).mean(1)

    def as_numbers(x, W, A, B, alpha):
        change = alpha / len(A) * (B @ A).detach()
        return x @ (W + change).T, W + change

    def encoded_too_early(encode, pull, image, scaling):
        z = scaling * encode(image)
        with torch.enable_grad():
            image = image.clone().requires_grad_()
            return torch.autograd.grad(z, image, grad_outputs=pull(z))[0]

    for item_id, fn, words in (
        ("08.2", all_detached, "the loss has no graph"),
        ("08.2", x0_detached, "by x0 must be the given one"),
        ("08.2", not_summed, "has shape (3, 4); expected one number"),
        ("08.2", nothing, "is a return missing?"),
        ("08.3", not_enabled, "no graph to differentiate"),
        ("08.7", frozen, "the second score cannot learn"),
        ("08.7", one_a_sample, "expected one number"),
        ("08.8", as_numbers, "A and B learn by the derivative"),
        ("08.10", encoded_too_early, "no graph to differentiate"),
    ):
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and words in result.message, (item_id, fn.__name__, result)


@pytest.mark.parametrize("name", ["network", "peaks"])
def test_the_references_agree_with_the_rules(name):
    chance = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, generator=chance, dtype=torch.float64)
    sigma = torch.tensor([0.4, 0.8, 1.3, 2.0]).double()
    D, ref, other = BELIEFS[name], BELIEFS["gaussian"], BELIEFS["turned"]
    given = lambda x: eps
    level, draws = sigma[1], torch.stack([eps, -eps, eps.flip(0)])
    in_turn = iter(draws)
    for ours, theirs in (
        (find("08.1").reference(D, x0, sigma, eps), distill.sds(D)(x0, sigma, given)),
        (find("08.3").reference(D, x0, level, eps)[0], distill.sds(D, jacobian=True)(x0, level, given)),
        (-level * find("08.5").reference(D, x0, level, draws), distill.sjc(D, 3)(x0, level, lambda x: next(in_turn))),
        (find("08.6").reference(D, ref, other, x0, sigma, eps, 3.0), distill.vsd(cfg(D, ref, 3.0), other)(x0, sigma, given)),
        (
            find("08.9").reference(D, ref, other, x0, sigma, eps, 3.0, 1.0),
            distill.nfsd(D, ref, other, 3.0, 1.0)(x0, sigma, given),
        ),
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    loss = training.denoising_loss(D, x0, sigma, eps).mean()  # in single precision
    assert float(find("08.7").reference(D, x0, sigma, eps)) == pytest.approx(float(loss), rel=1e-6)


def test_the_weight_agrees_with_the_schedule():
    betas, t = torch.linspace(1e-3, 0.1, 50).double(), torch.tensor([3, 20, 49])
    sigma, c = find("08.4").reference(betas, t)
    assert torch.allclose(sigma, Discrete(betas).sigma(t), rtol=1e-10)
    assert torch.allclose(c, distill.dreamfusion(sigma) / sigma, rtol=1e-10)


def test_the_residual_of_a_gaussian_is_the_closed_form():
    """kappa (x0 - mu) / sigma - (1 - kappa) eps, with kappa = sigma^2 / (s^2 + sigma^2)."""
    s, mu = 0.6, torch.tensor([0.3, -1.0]).double()
    D = Mixture.isotropic(mu[None], s).denoiser
    chance = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 5, 2, generator=chance, dtype=torch.float64)
    sigma = torch.linspace(0.2, 3, 5).double()
    kappa = (sigma**2 / (s**2 + sigma**2))[:, None]
    exact = kappa * (x0 - mu) / sigma[:, None] - (1 - kappa) * eps
    assert torch.allclose(find("08.1").reference(D, x0, sigma, eps), exact, rtol=0, atol=1e-12)


def test_no_name_of_the_notebook_is_one_that_a_known_mistake_uses_set_08():
    """The grader carries along what binds a name that an answer reads: a name that means two things misleads it."""
    body = ast.parse(sources("solutions")["08"].read_text()).body
    bound = set().union(*(_defines(node) or set() for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))))
    for item in items_of("08").values():
        for known in item.mistakes:
            assert not bound & _names(known.fn.__code__) & known.fn.__globals__.keys(), (item.id, known.name)
