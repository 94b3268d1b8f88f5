"""Sketch guidance: the move in closed form for a linear predictor, its gradient, and the predictor that reads a U-Net."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.testing import assert_close

from course_lib.denoisers import from_diffusers
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.guidance.sketch import predictor, sketch_guided, slope
from course_lib.nets.edge_predictor import EdgePredictor, block_ends, tapped
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim
from tests.draws import level, normal

F64 = torch.float64
WORLD = Mixture.gaussian(torch.tensor([0.5, -1.0, 0.2]), torch.diag(torch.tensor([1.0, 0.3, 0.1])))
A, B = normal(2, 3, seed=1), normal(2, seed=2)
TARGET = torch.tensor([[1.0, -0.5]], dtype=F64)


def linear(x, sigma):
    """A predictor that is known: A x + b."""
    return x @ A.T + B


def read_by_mean(x, sigma):
    """The exact one of a Gaussian world: E[A x0 + b | x]."""
    return WORLD.denoiser(x, sigma) @ A.T + B


# --- the guidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "sigma_next"), [(10.0, 4.0), (1.0, 0.3), (0.2, 0.0)])
@pytest.mark.parametrize("beta", [0.4, 1.6])
def test_the_move_of_a_linear_predictor_in_closed_form(sigma, sigma_next, beta):
    x = normal(5, 3, seed=3) * sigma
    found, memory = sketch_guided(ddim, linear, TARGET, beta)(WORLD.denoiser, x, level(sigma), level(sigma_next))
    plain, _ = ddim(WORLD.denoiser, x, level(sigma), level(sigma_next))
    z, z_next = x / (1 + sigma**2) ** 0.5, plain / (1 + sigma_next**2) ** 0.5
    g = 2 * (x @ A.T + B - TARGET) @ A * (1 + sigma**2) ** 0.5  # grad_z = sqrt(1 + sigma^2) grad_x
    alpha = beta * (z - z_next).norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)
    assert_close(found, (z_next - alpha * g) * (1 + sigma_next**2) ** 0.5, rtol=1e-12, atol=1e-12)
    assert memory is None


def test_no_strength_is_the_step_itself():
    assert sketch_guided(ddim, linear, TARGET, 0.0) is ddim


def test_outside_its_levels_the_step_and_its_memory_are_as_they_were():
    def remembers(D, x, sigma, sigma_next, memory=None):
        return ddim(D, x, sigma, sigma_next)[0], (memory or 0) + 1

    step, x = sketch_guided(remembers, linear, TARGET, 1.0, low=0.5, high=2.0), normal(4, 3)
    for sigma, moved in ((3.0, False), (2.0, True), (1.0, True), (0.5, False)):
        found, memory = step(WORLD.denoiser, x, level(sigma), level(sigma / 2), 6)
        plain, count = remembers(WORLD.denoiser, x, level(sigma), level(sigma / 2), 6)
        assert torch.equal(found, plain) != moved
        assert memory == (None if moved else count)


def test_the_gradient_agrees_with_finite_differences():
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x, h = normal(4, 3, seed=5), 1e-6
    found = slope(lambda x, sigma: net(x), x, level(1.0), TARGET)
    loss = lambda at: (net(at) - TARGET).square().sum(1)
    steps = torch.stack([loss(x + h * e) - loss(x - h * e) for e in torch.eye(3, dtype=F64)], 1) / (2 * h)
    assert_close(found, steps.detach(), rtol=1e-6, atol=1e-7)
    assert not found.requires_grad and all(weight.grad is None for weight in net.parameters())


def test_a_sample_does_not_depend_on_its_batch():
    step, x = sketch_guided(ddim, linear, TARGET, 1.0), normal(6, 3, seed=6)
    whole = step(WORLD.denoiser, x, level(2.0), level(1.0))[0]
    assert_close(step(WORLD.denoiser, x[4:], level(2.0), level(1.0))[0], whole[4:])


def test_where_the_prediction_is_right_nothing_moves():
    x = normal(4, 3)
    found, _ = sketch_guided(ddim, linear, linear(x, None), 1.6)(WORLD.denoiser, x, level(2.0), level(1.0))
    assert_close(found, ddim(WORLD.denoiser, x, level(2.0), level(1.0))[0], rtol=0, atol=0)


def test_guided_samples_come_to_the_target():
    """A Gaussian world and the exact predictor: the error of what is sampled falls with the strength, sample by sample."""
    x, sigmas = 20 * normal(500, 3, seed=8), karras(40, 0.02, 20.0)
    errors = []
    for beta in (0.0, 0.2, 0.4, 0.8):
        x0 = sample(WORLD.denoiser, x, sigmas, sketch_guided(ddim, read_by_mean, TARGET, beta))
        errors.append((x0 @ A.T + B - TARGET).norm(dim=1))
    for more, less in pairwise(errors):
        gain = more - less
        assert float(gain.mean()) > 5 * float(gain.std()) / len(x) ** 0.5


def test_bad_input_is_an_error_in_one_line():
    with pytest.raises(ValueError, match="beta = -1; expected a finite strength >= 0"):
        sketch_guided(ddim, linear, TARGET, -1)
    with pytest.raises(ValueError, match="low = 2 and high = 1; expected noise levels with 0 <= low < high"):
        sketch_guided(ddim, linear, TARGET, 1.0, low=2.0, high=1.0)
    step = sketch_guided(ddim, linear, torch.zeros(1, 3, dtype=F64), 1.0)
    with pytest.raises(ValueError, match=r"target has shape \(1, 3\); expected \(4, 2\), or one row for all"):
        step(WORLD.denoiser, normal(4, 3), level(2.0), level(1.0))
    step = sketch_guided(ddim, linear, TARGET.expand(3, -1), 1.0)
    with pytest.raises(ValueError, match=r"target has shape \(3, 2\); expected \(4, 2\)"):
        step(WORLD.denoiser, normal(4, 3), level(2.0), level(1.0))


# --- the predictor ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoiser():
    """A tiny U-Net of diffusers, in float64."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 24), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    D = from_diffusers(unet.double().eval().requires_grad_(False), DDIMScheduler())
    return D.given(encoder_hidden_states=normal(1, 5, 8, seed=1))


def reader(widths=(8,)):
    torch.manual_seed(1)
    return EdgePredictor(16 + 24 + 24 + 24 + 16, 2, widths).double().eval()


def test_features_are_those_of_every_block_of_both_paths(denoiser):
    layers = block_ends(denoiser.net)
    assert layers == block_ends(denoiser.net.unet)
    x = normal(1, 4, 8, 8)
    plain = denoiser(x, level(1.0))
    with tapped(layers) as kept:
        assert torch.equal(denoiser(x, level(1.0)), plain)
    assert [tuple(f.shape[1:]) for f in kept] == [(16, 8, 8), (24, 4, 4), (24, 4, 4), (24, 4, 4), (16, 8, 8)]
    denoiser(x, level(1.0))
    assert len(kept) == 5


def test_hooks_go_also_upon_an_error(denoiser):
    layers = block_ends(denoiser.net)
    with pytest.raises(RuntimeError), tapped(layers):
        raise RuntimeError
    assert not any(layer._forward_hooks for layer in layers)


def test_the_gradient_through_the_network_agrees_with_finite_differences(denoiser):
    predict, x, target = predictor(denoiser, reader(), block_ends(denoiser.net)), normal(1, 4, 8, 8), normal(1, 2, 8, 8, seed=4)
    g, h = slope(predict, x, level(1.0), target), 1e-5
    for seed in range(3):
        e = normal(*x.shape, seed=10 + seed)
        losses = [(predict(x + sign * h * e, level(1.0)) - target).square().sum() for sign in (1, -1)]
        assert_close((g * e).sum(), (losses[0] - losses[1]).detach() / (2 * h), rtol=1e-6, atol=1e-8)


def test_each_place_is_read_by_itself():
    net, features = reader(), [normal(2, c, 8, 8, seed=c) for c in (16, 24, 24, 24, 16)]
    order = torch.randperm(64, generator=generator(0))
    moved = [f.flatten(2)[..., order].view_as(f) for f in features]
    time = torch.tensor([10.0, 700.0], dtype=F64)
    assert_close(net(moved, time), net(features, time).flatten(2)[..., order].view(2, 2, 8, 8))


def test_it_is_told_the_time():
    net, features = reader(), [normal(1, c, 8, 8, seed=c) for c in (16, 24, 24, 24, 16)]
    one, other = (net(features, torch.tensor(t, dtype=F64)) for t in (10.0, 700.0))
    assert bool(((one - other).abs() > 0.01).any())


def test_a_network_that_it_cannot_read_is_an_error():
    with pytest.raises(ValueError, match="net is a Linear; expected diffusers' UNet2DConditionModel"):
        block_ends(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="features have 16 channels in all; expected 104"):
        reader()([normal(1, 16, 8, 8)], torch.tensor(1.0))
