"""The four families: exact inverses and densities, gradients that go where they belong, and what each cannot do without."""

import math

import pytest
import torch
import torch.nn.functional as F

from course_lib import families, metrics
from course_lib.devices import SampleNoise, generator
from course_lib.families import FAMILIES, GAN, VAE, Diffusion, Flow, fit_family, sized
from course_lib.nets.realnvp import RealNVP
from course_lib.worlds import digits, toys
from course_lib.zoo import tune

F64 = torch.float64


def stirred(net, seed=0):
    """The network with random weights throughout, in float64: coupling layers start as the identity."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return net.double()


@pytest.mark.parametrize("dim", [2, 5])
def test_realnvp_is_inverted_exactly_and_its_determinant_is_the_jacobians(dim):
    net, x = stirred(RealNVP(dim, layers=4, width=16)), torch.randn(6, dim, dtype=F64)
    z, log_det = net(x)
    assert (net.inverse(z) - x).abs().max() < 1e-9  # float64 rounding
    for row, value in zip(x, log_det.detach(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda one: net(one[None])[0][0], row)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(value), abs=1e-9)


def test_realnvp_is_a_density():
    """Its integral by the rectangle rule, whose error on so smooth a density is rounding; the square holds 1e5 samples easily."""
    net = stirred(RealNVP(2, layers=4, width=16), seed=1)
    side = torch.arange(-40, 40, 0.1, dtype=F64)
    with torch.no_grad():
        assert net.inverse(torch.randn(100_000, 2, dtype=F64)).abs().max() < 35
        total = sum(float(net.log_prob(part).exp().sum()) for part in torch.cartesian_prod(side, side).split(50_000)) * 0.1**2
    assert abs(total - 1) < 1e-6


def test_one_backward_pass_gives_generator_and_critic_their_own_gradients():
    torch.manual_seed(0)
    gan, x0 = GAN(2, width=8, gamma=0.7).double(), torch.randn(5, 2, dtype=F64)
    torch.manual_seed(1)
    gan(x0).mean().backward()
    got = {name: weight.grad.clone() for name, weight in gan.named_parameters()}
    torch.manual_seed(1)
    fake = gan.generator(torch.randn(5, 2, dtype=F64))
    wanted = torch.autograd.grad(F.softplus(-gan.critic(fake)).mean(), list(gan.generator.parameters()))
    for (name, _), grad in zip(gan.generator.named_parameters(), wanted, strict=True):
        assert torch.allclose(got[f"generator.{name}"], grad, atol=1e-12), name
    x = x0.clone().requires_grad_(True)
    out = gan.critic(x)
    slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
    critic = F.softplus(-out)[:, 0] + F.softplus(gan.critic(fake.detach()))[:, 0] + 0.35 * slope.square().sum(1)
    own = torch.autograd.grad(critic.mean(), list(gan.critic.parameters()), allow_unused=True)
    for (name, weight), grad in zip(gan.critic.named_parameters(), own, strict=True):
        assert torch.allclose(got[f"critic.{name}"], torch.zeros_like(weight) if grad is None else grad, atol=1e-12), name


def test_the_vae_loss_is_the_elbo_of_torch_distributions():
    from torch.distributions import Normal, kl_divergence

    torch.manual_seed(0)
    vae, x0, eps = VAE(3, width=8, latent=2, s=0.4).double(), torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)
    mu, log_v = vae.encoder(x0).chunk(2, -1)
    posterior = Normal(mu, (log_v / 2).exp())
    z = mu + posterior.scale * eps
    elbo = Normal(vae.decoder(z), 0.4).log_prob(x0).sum(1) - kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(vae.bound(x0, eps), -elbo / 3, rtol=1e-6)  # s is held in fp32


def test_the_vae_bound_is_above_the_likelihood_by_importance_sampling():
    """-ELBO is an upper bound; log p by 20,000 importance samples, whose error is far below the gap of an untrained encoder."""
    torch.manual_seed(0)
    vae, x0 = VAE(2, width=8, latent=1, s=0.5).double(), torch.randn(4, 2, dtype=F64)
    with torch.no_grad():
        z = torch.randn(20_000, 1, dtype=F64)
        s = vae.log_s.exp()
        log_p_x = -(x0[:, None] - vae.decoder(z)).square().sum(-1) / (2 * s**2) - 2 * vae.log_s - math.log(2 * math.pi)
        exact = -(log_p_x.logsumexp(1) - math.log(20_000))
        bound = torch.stack([vae.nats(x0, seed) for seed in range(200)]).mean(0)
    assert (bound > exact).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_do_not_depend_on_the_batch_and_need_training(name):
    family = sized(name, 2, 3000)
    with pytest.raises(ValueError, match=f"the {name} has 0 updates"):
        family.sample(4)
    done = fit_family(family, lambda source: torch.randn(16, 2, generator=source), 3, progress=False)
    assert int(done.net.updates) == 3
    many, few = done.net.sample(9, seed=5), done.net.sample(4, seed=5)
    assert torch.allclose(many[:4], few, atol=1e-5) and not torch.allclose(done.net.sample(4, seed=6), few)
    if name == "GAN":
        with pytest.raises(ValueError, match="no likelihood"):
            done.net.nats(few)
    else:
        assert done.net.nats(few).shape == (4,)


@pytest.mark.parametrize(("dim", "parameters"), [(2, 20_000), (64, 100_000)])
def test_the_families_are_of_one_size(dim, parameters):
    for name in FAMILIES:
        count = sum(p.numel() for p in sized(name, dim, parameters).parameters())
        assert abs(count / parameters - 1) < 0.03, name


def test_dequantised_digits_come_back():
    grey, _ = digits.originals("test")
    x0 = digits.dequantise(grey, torch.rand(grey.shape, generator=generator(0)))
    assert float(x0.min()) >= -1 and float(x0.max()) < 1
    assert torch.equal(digits.quantise(x0), grey)
    assert torch.equal(digits.enlarge(grey / 8 - 1), digits.load("test")[0])


# --- what each family cannot do without -----------------------------------------------------------------

SEEDS, LR = (0, 1, 2), 5e-3
STEPS = {"GAN": 120, "VAE": 150, "flow": 80, "diffusion": 150}


class DeafGAN(GAN):
    """The critic hears nothing of the data: its loss is left out."""

    def loss(self, x0):
        fake = self.generator(torch.randn(len(x0), self.latent))
        frozen = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        return F.softplus(-torch.func.functional_call(self.critic, frozen, (fake,))[:, 0])


class LooseVAE(VAE):
    """An autoencoder: the divergence from N(0, I) is left out."""

    def bound(self, x0, eps):
        mu, log_v = self.encoder(x0).chunk(2, -1)
        error = (x0 - self.decoder(mu + (log_v / 2).exp() * eps)).square().sum(-1)
        return error / (2 * (2 * self.log_s).exp()) / self.dim + self.log_s


class FlatFlow(Flow):
    """The determinant is left out."""

    def loss(self, x0):
        return self.net(x0)[0].square().sum(-1) / (2 * self.dim)


class OneStepDiffusion(Diffusion):
    """One call of D in place of a hundred small steps."""

    def __init__(self, *args, **options):
        super().__init__(*args, steps=1, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "without"), [("GAN", DeafGAN), ("VAE", LooseVAE), ("flow", FlatFlow), ("diffusion", OneStepDiffusion)]
)
def test_without_its_defining_term_a_family_is_worse_on_three_seeds(name, without, monkeypatch):
    """Sliced Wasserstein to the ring, beyond the chance distance of exact sets: each seed better than any seed without."""
    ring, n = tune.RING, 2000
    options = {"lr": 1e-3 if name == "GAN" else LR, "betas": (0.0, 0.9) if name == "GAN" else (0.9, 0.99)}

    def distances():
        found = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            family = sized(name, 2, 10_000, **({"gamma": 1.0} if name == "GAN" else {}))
            draw = lambda source: ring.sample(128, source).float()
            done = fit_family(family, draw, STEPS[name], seed=seed, progress=False, **options)
            with torch.no_grad():
                points = done.net.sample(n, seed=seed).nan_to_num(1e3, 1e3, -1e3)
            found.append(metrics.sliced_wasserstein(points, ring.sample(n, generator(99))))
        return found

    whole = distances()
    monkeypatch.setitem(families.FAMILIES, name, without)
    lacking = distances()
    _, spread = metrics.sliced_wasserstein_floor(lambda k, source: ring.sample(k, source), n)
    assert max(whole) + 3 * spread < min(lacking), (whole, lacking)


def test_the_choice_is_the_best_of_what_was_tried_with_one_budget():
    for world in tune.WORLDS:
        found = tune.read()[world]
        assert found["command"] == f"course tune {world}" and found["hardware"]
        for name, one in found["families"].items():
            assert [entry["settings"] for entry in one["tried"]] == [
                {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
                for settings in tune.WORLDS[world].grids[name]
            ]
            assert len(one["tried"]) == 6
            best = min(one["tried"], key=lambda entry: entry["score"])
            assert tune.chosen(world, name) == (best["settings"], best["steps"])


def test_a_world_that_is_not_there():
    with pytest.raises(ValueError, match="world = 'mars'; expected one of ring, digits"):
        tune.world("mars")


def test_toys_ring_is_the_worlds_ring():
    x = tune.WORLDS["ring"].draw(generator(0))
    assert x.shape == (256, 2) and x.dtype == torch.float32
    assert torch.equal(tune.RING.means, toys.ring(8).means)
    assert SampleNoise(0)(x).shape == x.shape
