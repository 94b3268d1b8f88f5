"""Adapters: a network that is exact in its own convention becomes the exact posterior mean; merging changes nothing."""

import pytest
import torch
from torch.testing import assert_close

from course_lib import schedules
from course_lib.denoisers import (
    batched,
    discrete_of,
    from_diffusers,
    from_edm,
    from_eps,
    from_flow,
    from_v,
    from_x0,
    low_precision,
)
from course_lib.devices import bf16_pays
from course_lib.gaussians import Mixture
from course_lib.guidance import cfg
from course_lib.nets.mlp import MLP
from course_lib.schedules import Cosine, Discrete, Linear
from course_lib.types import right
from course_lib.worlds.toys import three_blobs

F64 = torch.float64
SIGMA_DATA = 0.6
VP = [Linear(), Cosine(), Discrete(schedules.linear_betas()), Discrete(schedules.cosine_betas())]


def gaussian() -> Mixture:
    root = torch.tensor([[0.6, 0.0], [0.5, 0.3]], dtype=F64)
    return Mixture.gaussian(torch.tensor([1.0, -0.5]), root @ root.T)


def vp_network(mixture: Mixture, schedule, kind: str):
    """The exact prediction from x_t = alpha x0 + std eps and t: eps, x0 or v = alpha eps - std x0."""

    def net(x_t, t):
        alpha, std = (right(c, x_t) for c in (schedule.alpha(t), schedule.std(t)))
        x0 = mixture.denoiser(x_t / alpha, schedule.sigma(t))
        eps = (x_t - alpha * x0) / std
        return {"eps": eps, "x0": x0, "v": alpha * eps - std * x0}[kind]

    return net


def flow_network(mixture: Mixture):
    """The exact velocity E[eps - x0 | x_t], x_t = (1 - t) x0 + t eps."""

    def net(x_t, t):
        x0 = mixture.denoiser(x_t / (1 - right(t, x_t)), t / (1 - t))
        return (x_t - (1 - right(t, x_t)) * x0) / right(t, x_t) - x0

    return net


def edm_network(mixture: Mixture):
    """F of Karras et al. 2022, Eq. 7 with Table 1, whose c_noise = ln(sigma) / 4 is given times 1000."""

    def net(scaled, c_noise):
        sigma = (4 * c_noise / 1000).exp()
        s = right(sigma, scaled)
        x = scaled * (s**2 + SIGMA_DATA**2).sqrt()
        c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
        c_out = s * SIGMA_DATA / (SIGMA_DATA**2 + s**2).sqrt()
        return (mixture.denoiser(x, sigma) - c_skip * x) / c_out

    return net


def adapters(mixture: Mixture) -> dict:
    make = {"eps": from_eps, "x0": from_x0, "v": from_v}
    found = {
        f"{kind} {type(schedule).__name__} {schedule.name}": make[kind](vp_network(mixture, schedule, kind), schedule.t_of_sigma)
        for schedule in VP
        for kind in make
    }
    return found | {"flow": from_flow(flow_network(mixture)), "edm": from_edm(edm_network(mixture), SIGMA_DATA)}


NAMES = list(adapters(gaussian()))


@pytest.mark.parametrize("make", [gaussian, three_blobs])
@pytest.mark.parametrize("name", NAMES)
def test_an_exact_network_becomes_the_exact_denoiser(name, make):
    mixture = make()
    D, x = adapters(mixture)[name], mixture.sample(5, torch.Generator().manual_seed(0), 1.0)
    for sigma in (0.02, 0.5, 3.0, 60.0):
        level = torch.tensor(sigma, dtype=F64)
        assert_close(D(sigma * x, level), mixture.denoiser(sigma * x, level), rtol=0, atol=1e-8)
    each = torch.tensor([0.02, 0.1, 0.5, 3.0, 60.0], dtype=F64)
    assert_close(D(x, each), mixture.denoiser(x, each), rtol=0, atol=1e-8)
    assert_close(D(x, 0.5), mixture.denoiser(x, torch.tensor(0.5, dtype=F64)), rtol=0, atol=1e-8)  # a plain number


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_costs_single_precision(name):
    """x of size sigma + 1 rounded to 2^-24 of itself, through a difference of two such numbers."""
    mixture = gaussian()
    D = adapters(mixture)[name]
    for sigma in (0.1, 1.0, 30.0):
        x = mixture.sample(5, torch.Generator().manual_seed(0), sigma).float()
        found = D(x, torch.tensor(sigma, dtype=F64))
        assert found.dtype == torch.float32
        exact = mixture.denoiser(x.double(), torch.tensor(sigma, dtype=F64))
        assert float((found - exact).abs().max()) < 64 * 2**-24 * float(x.abs().max() + 1)


@pytest.mark.parametrize("name", ["eps", "v", "flow", "edm"])
def test_without_noise_x_is_returned(name):
    """D(x, 0) = x whatever the network says, alone or in a batch with noisy frames (B, T)."""
    net = lambda x, t: torch.sin(x) + 0 * right(t, x).cos()
    schedule = Linear()
    D = {
        "eps": from_eps(net, schedule.t_of_sigma),
        "v": from_v(net, schedule.t_of_sigma),
        "flow": from_flow(net),
        "edm": from_edm(net),
    }[name]
    x = torch.randn(2, 3, 4, dtype=F64)
    sigma = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.5]], dtype=F64)
    for levels, clean in ((torch.tensor(0.0), slice(None)), (sigma[:, 0], [0]), (sigma, sigma == 0)):
        assert_close(D(x, levels)[clean], x[clean], rtol=0, atol=0)


def test_edm_keeps_input_and_target_at_unit_variance():
    """For data of variance sd^2: Var[c_in x] = 1, and Var[(x0 - c_skip x) / c_out] = 1 (Karras et al. 2022, App. B.6)."""
    s = torch.logspace(-3, 3, 50, dtype=F64)
    c_skip, c_out, c_in = from_edm(MLP(), SIGMA_DATA).coefficients(s)
    assert_close(c_in**2 * (s**2 + SIGMA_DATA**2), torch.ones_like(s))
    # x0 - c_skip (x0 + s eps)
    assert_close(((1 - c_skip) ** 2 * SIGMA_DATA**2 + c_skip**2 * s**2) / c_out**2, torch.ones_like(s))


# --- what a network may return ---------------------------------------------------------------------------------------


def test_a_learned_variance_is_dropped():
    mean = lambda x, t: 0.3 * x
    both = lambda x, t: torch.cat([0.3 * x, torch.full_like(x, 1e3)], 1)
    x = torch.randn(2, 3, 4, 4)
    level, t_of_sigma = torch.tensor(0.7), Linear().t_of_sigma
    assert torch.equal(from_eps(both, t_of_sigma)(x, level), from_eps(mean, t_of_sigma)(x, level))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 9, 4, 4), (2, 3, 2, 2), (2, 6, 2, 2), (2, 3, 16)])
def test_another_shape_is_refused(shape):
    D = from_eps(lambda x, t: torch.zeros(shape), Linear().t_of_sigma)
    with pytest.raises(ValueError, match=r"network returned shape .* for x of shape \(2, 3, 4, 4\)"):
        D(torch.zeros(2, 3, 4, 4), torch.tensor(1.0))


def test_a_network_in_half_precision_returns_the_type_of_x():
    D = from_flow(lambda x, t: x.bfloat16())
    assert D(torch.ones(2, 3), torch.tensor(1.0)).dtype == torch.float32


# --- conditions and merging ---------------------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """A class-conditional network that counts its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net, self.calls = MLP(width=16, depth=1, classes=10).double(), 0

    def forward(self, x, time, label=None):
        self.calls += 1
        return self.net(x, time, label)


MAKE = {
    "eps": lambda net, **c: from_eps(net, Linear().t_of_sigma, **c),
    "edm": lambda net, **c: from_edm(net, 0.5, **c),
    "flow": lambda net, **c: from_flow(net, **c),
}
LABELS = torch.tensor([3, 1, 4, 1]), torch.full((4,), 10)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_given_sets_the_condition_and_leaves_the_original():
    net = Counting()
    D = from_edm(net, label=LABELS[1])
    sigma = torch.tensor(0.8, dtype=F64)
    before = D(X, sigma)
    assert_close(D.given(label=LABELS[0])(X, sigma), from_edm(net, label=LABELS[0])(X, sigma))
    assert_close(D(X, sigma), before)
    assert not torch.allclose(D.given(label=LABELS[0])(X, sigma), before)


@pytest.mark.parametrize("sigma", [torch.tensor(0.8), torch.tensor([0.1, 0.8, 3.0, 9.0])])
@pytest.mark.parametrize("name", MAKE)
def test_a_shared_network_is_called_once(name, sigma):
    net = Counting()
    D = MAKE[name](net)
    pair = [D.given(label=label) for label in LABELS]
    apart = [one(X, sigma) for one in pair]
    net.calls = 0
    together = batched(*pair)(X, sigma)
    assert net.calls == 1 and len(together) == 2
    for a, b in zip(together, apart, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_two_adapters_of_one_network_are_one_call(name):
    """Made one by one with the same options, they share the network as `given` does."""
    net, sigma, linear = Counting(), torch.tensor(0.8), Linear()
    make = {**MAKE, "eps": lambda net, **c: from_eps(net, linear.t_of_sigma, **c)}[name]
    first, second = (make(net, label=label) for label in LABELS)
    guided = cfg(first, second, 2.0)(X, sigma)
    assert net.calls == 1
    assert_close(guided, 2 * first(X, sigma) - second(X, sigma), rtol=1e-10, atol=1e-10)


def test_denoisers_that_differ_are_called_in_turn():
    net, other, sigma = Counting(), Counting(), torch.tensor(0.8)
    plain = lambda x, s: 0.5 * x
    here, there = from_edm(net, label=LABELS[0]), from_edm(other, label=LABELS[1])
    groups = [
        (here, there),  # two networks
        (here, plain),  # no network at all
        (here, from_edm(net, 0.9, label=LABELS[1])),  # the same network under another preconditioning
        (here, from_edm(net)),  # a condition that the other lacks
        (from_eps(net, Linear().t_of_sigma, label=LABELS[0]), from_eps(net, Linear(0.2, 9.0).t_of_sigma, label=LABELS[1])),
    ]
    for group in groups:
        for found, D in zip(batched(*group)(X, sigma), group, strict=True):
            assert_close(found, D(X, sigma), rtol=1e-12, atol=1e-12)


def test_three_denoisers_are_one_call_too():
    net, sigma = Counting(), torch.tensor(0.8)
    D = from_edm(net)
    trio = [D.given(label=torch.full((4,), k)) for k in (0, 5, 10)]
    found = batched(*trio)(X, sigma)
    assert net.calls == 1
    for a, one in zip(found, trio, strict=True):
        assert_close(a, one(X, sigma), rtol=1e-12, atol=1e-12)


def test_a_condition_that_is_broadcast_works_merged_as_it_does_alone():
    """label (1,) serves a whole batch in a separate call, so it must in a merged one."""
    D, sigma = from_edm(Counting()), torch.tensor(0.8)
    one, null = D.given(label=torch.tensor([3])), D.given(label=torch.tensor([10]))
    expected = 2 * one(X, sigma) - null(X, sigma)
    assert_close(cfg(one, null, 2.0)(X, sigma), expected, rtol=1e-10, atol=1e-10)


# --- classifier-free guidance ---------------------------------------------------------------------------------------------


def test_guidance_is_linear_between_its_endpoints():
    a, b = three_blobs().denoiser, gaussian().denoiser
    sigma = torch.tensor(0.8, dtype=F64)
    assert torch.equal(cfg(a, b, 0)(X, sigma), b(X, sigma))
    assert torch.equal(cfg(a, b, 1.0)(X, sigma), a(X, sigma))
    for w in (-1.0, 0.5, 3.0, 7.5):
        assert_close(cfg(a, b, w)(X, sigma), (1 - w) * b(X, sigma) + w * a(X, sigma), rtol=1e-12, atol=1e-12)
        assert_close(cfg(a, a, w)(X, sigma), a(X, sigma), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("w", "calls"), [(0, 1), (1, 1), (2.5, 1)])
def test_guidance_costs_one_call(w, calls):
    net = Counting()
    D = from_edm(net)
    cfg(D.given(label=LABELS[0]), D.given(label=LABELS[1]), w)(X, torch.tensor(0.8))
    assert net.calls == calls


def test_guidance_is_the_gradient_of_the_mixed_log_densities():
    """(D - x) / sigma^2 = (1 - w) grad log p_ref + w grad log p_cond, each of the noised marginals."""
    a, b, w, sigma = three_blobs(), gaussian(), 3.0, torch.tensor(0.8, dtype=F64)
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(((1 - w) * b.log_prob(x, sigma) + w * a.log_prob(x, sigma)).sum(), x)
    assert_close((cfg(a.denoiser, b.denoiser, w)(X, sigma) - X) / sigma**2, slope, rtol=0, atol=1e-8)


def test_discrete_of_reads_the_table_of_a_scheduler():
    from diffusers import DDPMScheduler

    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        scheduler = DDPMScheduler(beta_schedule=name)
        schedule = discrete_of(scheduler)
        assert schedule.name == name
        found = schedule.alpha_bar(torch.arange(1000, dtype=F64))
        assert_close(found, scheduler.alphas_cumprod.double(), rtol=1e-9, atol=1e-12)


def test_low_precision_is_the_network_s_alone():
    """Within the call products are in bfloat16 where the hardware has it, around it never; what comes back is of x's type."""
    within = []

    def net(x, time):
        within.append((x @ x.mT).dtype)
        return x @ torch.eye(x.shape[-1])

    D, x, sigma = from_x0(net, lambda sigma: sigma), torch.randn(2, 4, 4), torch.tensor(0.5)
    found = low_precision(D)(x, sigma)
    assert found.dtype == (x @ x.mT).dtype == torch.float32
    assert within == [torch.bfloat16 if bf16_pays("cpu") else torch.float32]
    assert_close(found, D(x, sigma), rtol=2**-8, atol=0)  # bfloat16 keeps eight bits


def test_a_network_of_diffusers_is_a_module_whose_weights_can_be_found():
    from diffusers import DDIMScheduler, UNet2DModel

    shape = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **shape)
    D = from_diffusers(unet, DDIMScheduler())
    assert isinstance(D.net, torch.nn.Module) and {id(p) for p in D.net.parameters()} == {id(p) for p in unet.parameters()}
