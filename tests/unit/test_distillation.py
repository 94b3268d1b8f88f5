"""Few-step students: targets and losses against closed forms, and each method against itself without what defines it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.testing import assert_close

from course_lib.denoisers import from_edm
from course_lib.devices import generator
from course_lib.distillation import (
    Followed,
    consistency_distillation,
    consistency_loss,
    consistency_step,
    from_consistency,
    progressive_loss,
    progressive_round,
    pseudo_huber,
    truncated_snr,
    two_step_target,
)
from course_lib.gaussians import Mixture
from course_lib.metrics import sliced_wasserstein
from course_lib.nets.lora import LowRank, low_rank
from course_lib.nets.mlp import MLP
from course_lib.nets.unet import UNet
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.singlestep import heun
from course_lib.steps import ddim
from course_lib.training import fit
from course_lib.types import right
from course_lib.worlds.toys import three_blobs
from tests.draws import level, noise_of, normal

F64 = torch.float64
SE = 4.5  # standard errors
BLOBS = three_blobs()
ONE = Mixture.gaussian(torch.tensor([0.4, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
GRID = karras(16, 0.02, 15.0)


# --- progressive: the target ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [ONE, BLOBS], ids=["Gaussian", "mixture"])
@pytest.mark.parametrize("levels", [(15.0, 7.0, 3.0), (0.9, 0.5, 0.3), (0.04, 0.02, 0.0), (0.5, 0.4999, 0.4998)])
def test_one_ddim_step_with_the_target_lands_where_two_of_the_teacher_do(mixture, levels):
    x, (sigma, mid, last) = mixture.sample(20, generator(1), levels[0]), map(level, levels)
    twice, _ = ddim(mixture.denoiser, ddim(mixture.denoiser, x, sigma, mid)[0], mid, last)
    target = two_step_target(mixture.denoiser, x, sigma, mid, last)
    once, _ = ddim(lambda x, sigma: target, x, sigma, last)
    assert_close(once, twice, rtol=0, atol=1e-12)
    if levels[1] - levels[2] > 0.01:  # and it is no single value of the teacher's
        assert float((target - mixture.denoiser(x, sigma)).abs().max()) > 1e-3


def test_the_target_is_the_published_one():
    """Salimans and Ho 2022, Algorithm 2, in the variance-preserving coordinates of the paper, row by row."""
    sigma, mid, last = torch.tensor([[8.0, 0.7, 0.05], [3.0, 0.5, 0.02], [1.0, 0.2, 0.0]], dtype=F64)
    x = normal(3, 2) * (1 + sigma[:, None])
    alpha, alpha1, alpha2 = ((1 + s**2).rsqrt()[:, None] for s in (sigma, mid, last))
    std, std1, std2 = sigma[:, None] * alpha, mid[:, None] * alpha1, last[:, None] * alpha2

    z = alpha * x
    x_hat = BLOBS.denoiser(z / alpha, sigma)
    z1 = alpha1 * x_hat + std1 / std * (z - alpha * x_hat)
    x_hat = BLOBS.denoiser(z1 / alpha1, mid)
    z2 = alpha2 * x_hat + std2 / std1 * (z1 - alpha1 * x_hat)
    expected = (z2 - std2 / std * z) / (alpha2 - std2 / std * alpha)
    assert_close(two_step_target(BLOBS.denoiser, x, sigma, mid, last), expected, rtol=1e-10, atol=1e-10)


def halved(D, sigmas):
    """The perfect student: at each level of sigmas[::2], the teacher's two-step target."""
    steps = {float(s): rest for s, *rest in zip(sigmas[:-2:2], sigmas[1::2], sigmas[2::2], strict=True)}
    return lambda x, sigma: two_step_target(D, x, sigma, *steps[float(sigma)])


def test_perfect_students_walk_the_teachers_path_down_to_one_step():
    D, sigmas, x = BLOBS.denoiser, GRID, BLOBS.sample(20, generator(2), 15.0)
    end = sample(D, x, sigmas)
    while len(sigmas) > 2:
        D, sigmas = halved(D, sigmas), sigmas[::2]
        assert_close(sample(D, x, sigmas), end, rtol=0, atol=1e-10)
    assert len(sigmas) == 2  # sixteen calls of the teacher in one of the student


def test_the_weight_is_the_larger_of_two_errors():
    """Salimans and Ho 2022, Eq. 9: max(|x0 - x0^|^2, |eps - eps^|^2), with eps^ = (x - x0^) / sigma."""
    sigma = torch.tensor([0.01, 0.5, 1.0, 3.0, 20.0], dtype=F64)
    x0, eps, guess = normal(5, 2), normal(5, 2, seed=1), normal(5, 2, seed=2)
    eps_guess = (x0 + sigma[:, None] * eps - guess) / sigma[:, None]
    errors = torch.stack([(x0 - guess).square().sum(1), (eps - eps_guess).square().sum(1)])
    assert_close(truncated_snr(sigma) * errors[0], errors.max(0).values, rtol=1e-9, atol=0)


def test_the_progressive_loss_is_zero_for_the_perfect_student_and_teaches_only_the_student():
    x0, eps, k = BLOBS.sample(8, generator(3)), normal(8, 2, seed=4), torch.arange(8)
    sigma = GRID[2 * k]
    perfect = lambda x, s: two_step_target(BLOBS.denoiser, x, s, GRID[2 * k + 1], GRID[2 * k + 2])
    assert float(progressive_loss(perfect, BLOBS.denoiser, x0, eps, k, GRID).max()) == 0
    shift = 0.1 * normal(8, 2, seed=5)
    off = progressive_loss(lambda x, s: perfect(x, s) + shift, BLOBS.denoiser, x0, eps, k, GRID)
    assert_close(off.double(), truncated_snr(sigma) * shift.square().mean(1), rtol=1e-5, atol=0)  # in single precision
    a, b = torch.ones((), dtype=F64, requires_grad=True), torch.ones((), dtype=F64, requires_grad=True)
    progressive_loss(lambda x, s: a * x, lambda x, s: b * BLOBS.denoiser(x, s), x0, eps, k, GRID).sum().backward()
    assert a.grad is not None and b.grad is None


# --- consistency: boundary, loss, sampling ----------------------------------------------------------------------------


def test_the_boundary_holds_for_any_network():
    """Song et al. 2023, Eq. 5 and App. C; EDM's coefficients, without sigma_min, miss it."""
    net, x = lambda x, t: 1e3 * torch.sin(x), normal(6, 2)
    assert_close(from_consistency(net, 0.7, 0.02)(x, level(0.02)), x, rtol=0, atol=1e-12)
    assert float((from_edm(net, 0.7)(x, level(0.02)) - x).abs().max()) > 1
    s, sd, low = 1.3, 0.7, 0.02
    skip, out, into = (float(c) for c in from_consistency(net, sd, low).coefficients(level(s)))
    assert skip == pytest.approx(sd**2 / ((s - low) ** 2 + sd**2), rel=1e-12)
    assert out == pytest.approx(sd * (s - low) / math.sqrt(sd**2 + s**2), rel=1e-12)
    assert into == pytest.approx(1 / math.sqrt(sd**2 + s**2), rel=1e-12)


def test_pseudo_huber_is_the_published_metric():
    d = torch.tensor([[0.0, 0.0], [1e-6, 0.0], [0.3, 0.4], [30.0, 40.0]], dtype=F64)
    found, c = pseudo_huber(d, 0.1), 0.1
    assert_close(found[2:].double(), (d[2:].square().sum(1) + c**2).sqrt() - c, rtol=1e-6, atol=0)  # single precision
    assert float(found[0]) == 0 and float(found[1]) == pytest.approx(1e-12 / (2 * c), rel=1e-5)


@pytest.mark.parametrize(("step", "order"), [(heun, 3), (ddim, 2)])
def test_the_exact_consistency_function_leaves_only_the_error_of_one_step(step, order):
    """|f(x, sigma) - f(x^, sigma')| is the local error of the solver: O(h^2) for Euler, O(h^3) for Heun.

    The metric is quadratic for so small a difference, hence the root. Halving h divides it by 2^order, up to O(h).
    """
    f = lambda x, sigma: torch.stack([ONE.flow(row[None], s, 0.02)[0] for row, s in zip(x, sigma, strict=True)])
    x0, eps = ONE.sample(50, generator(6)), normal(50, 2, seed=7)

    def gap(ratio):
        sigmas = torch.tensor([1.0, 1 / ratio], dtype=F64)
        return float(
            consistency_loss(f, f, ONE.denoiser, x0, eps, torch.zeros(50).long(), sigmas, c=1.0, step=step).mean().sqrt()
        )

    measured = math.log2(gap(1.1) / gap(1.1**0.5))
    assert abs(measured - order) < 0.15


def test_the_consistency_loss_teaches_only_the_online_function():
    x0, eps, k = BLOBS.sample(8, generator(3)), normal(8, 2, seed=4), torch.arange(8)
    a, b, d = (torch.ones((), dtype=F64, requires_grad=True) for _ in range(3))
    loss = consistency_loss(
        lambda x, s: a * x, lambda x, s: b * x, lambda x, s: d * BLOBS.denoiser(x, s), x0, eps, k, GRID[:-1], c=0.1
    )
    loss.sum().backward()
    assert loss.shape == (8,) and a.grad is not None and b.grad is None and d.grad is None


def test_multistep_sampling_is_algorithm_1():
    """Song et al. 2023, Algorithm 1, written out; then the law: with the exact f every level keeps p_{sigma_min}."""
    f, low = lambda x, sigma: ONE.flow(x, sigma, 0.5), 0.5
    x_T = ONE.sample(4, generator(8), 15.0)
    z1, z2 = normal(4, 2, seed=1), normal(4, 2, seed=2)
    expected = f(x_T, 15.0)
    for tau, z in ((4.0, z1), (0.8, z2)):
        expected = f(expected + math.sqrt(tau**2 - low**2) * z, tau)
    rows = iter((z1, z2))
    levels = torch.tensor([15.0, 4.0, 0.8, 0.0], dtype=F64)
    found = sample(f, x_T, levels, consistency_step(lambda x: next(rows), low))
    assert_close(found, expected, rtol=1e-10, atol=1e-10)

    n = 20_000
    ends = sample(f, ONE.sample(n, generator(9), 15.0), levels, consistency_step(noise_of(10), low))
    C = ONE.cov + low**2 * torch.eye(2, dtype=F64)
    deviation = (C.diagonal() / n).sqrt()
    assert bool(((ends.mean(0) - ONE.mean).abs() < SE * deviation).all())
    error = ((C**2 + torch.outer(C.diagonal(), C.diagonal())) / n).sqrt()  # of an entry of a Gaussian's covariance
    assert bool(((torch.cov(ends.T) - C).abs() < SE * error).all())
    # 0.8 in place of sqrt(0.8^2 - 0.5^2) would add 0.5^2 to the variance before the last call
    wrong = f(ONE.sample(n, generator(11), low) + 0.8 * normal(n, 2, seed=12), 0.8)
    assert bool(((torch.cov(wrong.T) - C).abs() > SE * error).any())


def test_the_follower_is_the_published_average():
    """theta^- after three updates: mu^2 theta_0 + (1 - mu) (mu theta_1 + theta_2), Song et al. 2023, Eq. 8."""
    net, mu, x = nn.Linear(1, 1, bias=False, dtype=F64), 0.9, torch.ones(1, 1, dtype=F64)
    pair = Followed(net, mu)
    for value in (2.0, 3.0, 5.0):  # the network as it is at each call
        with torch.no_grad():
            net.weight.fill_(value)
        if value == 2.0:
            pair.follower.weight.fill_(value)
        pair(x)
    expected = mu**2 * 2 + mu * (1 - mu) * 3 + (1 - mu) * 5
    assert float(pair(x, follower=True)) == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        pair(x)  # to look is not to train
    pair.eval()(x)
    assert float(pair.follower.weight) == pytest.approx(expected, rel=1e-12)
    assert not pair.follower.weight.requires_grad


# --- small children of a network --------------------------------------------------------------------------------------


def test_a_low_rank_child_starts_as_its_parent_and_keeps_only_what_learns():
    torch.manual_seed(3)
    parent = UNet(channels=1, widths=(16, 32), blocks=1, classes=3)
    for p in parent.parameters():
        nn.init.normal_(p, std=0.1)  # else its last layer says 0
    child, x, t = low_rank(parent, 2), torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    assert_close(child(x, t), parent(x, t), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in child.parameters()) == sum(v.numel() for v in child.state_dict().values())
    assert sum(p.numel() for p in child.parameters()) < sum(p.numel() for p in parent.parameters()) / 3
    for layer in (m for m in child.modules() if isinstance(m, LowRank)):
        nn.init.normal_(layer.up)
    twin = low_rank(parent, 2)
    twin.load_state_dict(copy.deepcopy(child.state_dict()))
    assert_close(twin(x, t), child(x, t), rtol=1e-5, atol=1e-5)
    one = next(m for m in child.modules() if isinstance(m, LowRank) and m.layer.weight.ndim == 4)
    change, W = one.up.detach() @ one.down.detach(), one.layer.weight
    assert_close(one(x), conv2d(x, W + change.reshape(W.shape), one.bias, padding=1), rtol=1e-5, atol=1e-5)
    assert torch.linalg.matrix_rank(change) == 2
    with pytest.raises(ValueError, match="rank = 0; expected at least 1"):
        low_rank(parent, 0)


# --- the methods in the plane, each against itself without what defines it --------------------------------------------

SIGMA_DATA, ROUND = 1.1, 250
OPTIONS = {"lr": 5e-3, "half": False, "progress": False, "ema_decay": 0.99}


def plane(source):
    """Points and noise."""
    return BLOBS.sample(128, source).float(), torch.randn(128, 2, generator=source)


def in_the_plane(net):
    return from_edm(net, SIGMA_DATA)


def of_the_end(net):
    return from_consistency(net, SIGMA_DATA, 0.02)


def distance(D, sigmas):
    """Sliced Wasserstein distance of 4,000 samples to the blobs."""
    x = sigmas[0] * torch.randn(4000, 2, generator=generator(20))
    return sliced_wasserstein(sample(D, x, sigmas), BLOBS.sample(4000, generator(21)))


def four_step_student(seed):
    """16 -> 8 -> 4 steps."""
    torch.manual_seed(seed)
    net, teacher, sigmas = MLP(2, 64, 2), BLOBS.denoiser, GRID
    for _ in range(2):
        run = progressive_round(lambda D=teacher: D, net, in_the_plane, plane, sigmas, steps=ROUND, seed=seed, **OPTIONS)
        teacher, net, sigmas = in_the_plane(run.net), copy.deepcopy(run.net).requires_grad_(True), sigmas[::2]
    return teacher


def student_of_one_step(seed):
    """As long, but the target is the teacher's own D(x, sigma) at the four levels: one step in place of two."""
    torch.manual_seed(seed)

    def draw(source):
        return (*plane(source), torch.randint(4, (128,), generator=source))

    def loss(net, x0, eps, k):
        sigma = GRID[::4][k]
        x = x0 + right(sigma, x0) * eps
        return truncated_snr(sigma) * (in_the_plane(net)(x, sigma) - BLOBS.denoiser(x, sigma)).square().mean(1)

    return in_the_plane(fit(MLP(2, 64, 2), draw, loss, steps=2 * ROUND, seed=seed, **OPTIONS).net)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_progressive_needs_the_two_steps(seed):
    """At 4 steps. Off, the student can only be where DDIM is with the exact D; on, it is to undo half of that at least."""
    on, off = (distance(make(seed), GRID[::4]) for make in (four_step_student, student_of_one_step))
    assert abs(off - distance(BLOBS.denoiser, GRID[::4])) < 0.05  # a small network, briefly trained
    assert on < off / 2


def consistency_of(seed, same_path=True):
    """A consistency function; off, the neighbour at sigma' has its own noise: of the same x0, but on another path."""
    torch.manual_seed(seed)
    net, sigmas = MLP(2, 64, 2), GRID[:-1]
    if same_path:
        teacher = lambda: BLOBS.denoiser
        options = {"c": 0.01, "steps": 2 * ROUND, "seed": seed, **OPTIONS}
        return of_the_end(consistency_distillation(teacher, net, of_the_end, plane, sigmas, **options).net)

    def draw(source):
        k = torch.randint(len(sigmas) - 1, (128,), generator=source)
        return (*plane(source), k, torch.randn(128, 2, generator=source))

    def loss(net, x0, eps, k, other):
        f = of_the_end(net)
        anew = lambda D, x, sigma, sigma_next, memory=None: (x0 + right(sigma_next, x0) * other, None)
        return consistency_loss(f, f.given(follower=True), BLOBS.denoiser, x0, eps, k, sigmas, c=0.01, step=anew)

    return of_the_end(fit(Followed(net), draw, loss, steps=2 * ROUND, seed=seed, **OPTIONS).net.net)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_consistency_needs_neighbours_on_one_path(seed):
    """With one call. Off, f can only be the mean of the ends that a point may have: all samples are near E[x0]."""
    once = torch.tensor([15.0, 0.0])
    on, off = (distance(consistency_of(seed, same_path), once) for same_path in (True, False))
    assert on < off / 2
