"""Scores that learn beside the pictures: they begin as the teacher, share its weights, learn, and go on where they stopped."""

import math

import pytest
import torch
from torch import nn

from course_lib.denoisers import NetworkDenoiser, from_x0
from course_lib.devices import SampleNoise, generator, one_thread
from course_lib.distill import (
    Bootstrapped,
    Companions,
    SecondScore,
    distill,
    distill_grad,
    log_uniform,
    point,
    renoised,
    sds,
    vsd,
)
from course_lib.gaussians import Mixture
from course_lib.nets.lora import lora_state
from course_lib.nets.pixels import Pixels

LEVELS = log_uniform(0.1, 3.0)


class Small(nn.Module):
    """A network of pictures (B, 2, 4, 4) with layers for a LoRA, told the noise level and a shift."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_v = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x, time, shift):
        told = (shift + time).expand(len(x)).reshape(-1, 1, 1, 1) * torch.ones_like(x[:, :1])
        return self.to_v(torch.tanh(self.to_q(torch.cat([x, told], 1))))


@pytest.fixture
def teacher() -> NetworkDenoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Small()
    return from_x0(net, lambda s: s.log(), shift=torch.zeros(1))


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.randn(6, 2, 4, 4, generator=generator(1))


def test_a_second_score_is_the_teacher_at_first(teacher, x0):
    second, sigma = SecondScore(teacher, LEVELS, rank=2), torch.tensor(0.7)
    assert torch.equal(second(x0, sigma), teacher(x0, sigma))
    gradient = distill_grad(teacher, second, x0, sigma, SampleNoise(0))
    assert torch.equal(gradient, torch.zeros_like(x0))  # so that VSD without guidance begins at rest


def test_a_second_score_learns_the_pictures_and_leaves_the_teacher(teacher, x0):
    before = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    second = SecondScore(teacher, LEVELS, rank=2, lr=1e-2)
    with one_thread():
        for step in range(400):
            second.learn(x0, 0.0, generator(2, step))
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())
    assert second.net.to_q.layer.weight.data_ptr() == teacher.net.to_q.weight.data_ptr()  # shared, not held twice
    assert len(second.losses) == 400
    # Deviation of a step's loss, from the last 100: the fall must exceed five standard errors of a mean of 100.
    early, late = torch.tensor(second.losses[:100]), torch.tensor(second.losses[-100:])
    assert early.mean() - late.mean() > 5 * math.hypot(early.std() / 10, late.std() / 10)


def test_on_one_picture_vsd_turns_into_sds(teacher, x0):
    """A second score that knows the one particle is a point mass."""
    one = x0[:1].expand(8, -1, -1, -1)
    second, cosines = SecondScore(teacher, LEVELS, rank=2, lr=1e-2), []
    with one_thread(), torch.no_grad():
        for step in range(301):
            if step % 100 == 0:
                sigma = LEVELS(0.0, 8, generator(3))
                a, b = (distill_grad(teacher, fake, one, sigma, SampleNoise(4)).flatten() for fake in (second, point(one)))
                cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
            second.learn(one, 0.0, generator(5, step))
    assert cosines[0] == 0 and cosines[1] > 0.1 and cosines[-1] > max(cosines[:2])


def test_a_condition_given_to_a_second_score_reaches_its_network(teacher, x0):
    second, sigma = SecondScore(teacher, LEVELS, rank=2), torch.tensor(0.7)
    told = teacher.given(shift=torch.ones(1))(x0, sigma)
    assert torch.equal(second.given(shift=torch.ones(1))(x0, sigma), told)
    assert not torch.equal(told, teacher(x0, sigma))


def _run(teacher: NetworkDenoiser, path, stop_at=None) -> tuple[torch.Tensor, Companions]:
    second = SecondScore(teacher, LEVELS, rank=2, lr=1e-2)
    boot = Bootstrapped(teacher, teacher, LEVELS, lambda progress: 1.0, every=3, calls=2, rank=2, seed=1)
    both, theta = Companions(boot, second), Pixels((2, 4, 4), 3)
    optimizer = torch.optim.Adam(theta.parameters(), lr=0.1)
    with one_thread():
        x0 = distill(theta, vsd(boot, second), LEVELS, optimizer, 10, companion=both, checkpoint=path, stop_at=stop_at)
    return x0, both


def test_a_run_with_companions_resumes_bit_for_bit(teacher, tmp_path):
    whole, of_whole = _run(teacher, None)
    part, _ = _run(teacher, tmp_path / "run.pt", stop_at=5)
    again, of_again = _run(teacher, tmp_path / "run.pt")
    assert not torch.equal(part, whole) and torch.equal(again, whole)
    for one, other in zip(of_whole.companions, of_again.companions, strict=True):
        assert one.losses == other.losses
        assert all(torch.equal(a, b) for a, b in zip(lora_state(one.net).values(), lora_state(other.net).values(), strict=True))


def test_a_bootstrapped_teacher_renews_its_references_every_few_steps(teacher, x0):
    asked = []

    def guided(x, sigma):
        asked.append(float(sigma))
        return teacher(x, sigma)

    boot, shown = Bootstrapped(teacher, guided, LEVELS, lambda progress: 2.0 - progress, every=4, calls=3, rank=2), []
    for step in range(9):
        boot.learn(x0, step / 8, generator(6, step))
        shown.append(boot.references)
    renewed = [k for k in range(9) if k == 0 or not torch.equal(shown[k], shown[k - 1])]
    assert renewed == [0, 4, 8]
    assert len(asked) == 3 * 3 and asked[::3] == pytest.approx([2.0, 1.5, 1.0])  # from the level strength(progress) down
    assert shown[0].shape == x0.shape and len(boot.losses) == 9


def test_renoised_pictures_are_likelier_and_near_what_they_were():
    """Of the exact Denoiser of a mixture: points between its modes move to where its density is higher."""
    mixture = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.09 * torch.eye(2).expand(2, 2, 2))
    x0 = torch.randn(256, 2, generator=generator(7), dtype=torch.float64)  # of deviation 1 about 0, between the modes
    with one_thread():
        better = renoised(mixture.denoiser, x0, 1.0, SampleNoise(8), calls=20)
    assert better.shape == x0.shape and better.dtype == x0.dtype
    gain = (mixture.log_prob(better, 0.0) - mixture.log_prob(x0, 0.0)).double()
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))
    # It stays in the half plane it came from more often than chance, 1/2, by five standard errors of a share of 256.
    same = (better[:, 0].sign() == x0[:, 0].sign()).double().mean()
    assert same > 0.5 + 5 * 0.5 / math.sqrt(256)


def test_sds_and_vsd_of_a_point_mass_agree(teacher, x0):
    sigma = torch.tensor(0.7)
    pair = [rule(x0, sigma, SampleNoise(9)) for rule in (sds(teacher), vsd(teacher, point(x0)))]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-6)
