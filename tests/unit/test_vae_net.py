"""The KL autoencoder: its loss terms against closed forms, and diffusers' output from diffusers' weights."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch.distributions import Normal, kl_divergence

from course_lib import zoo
from course_lib.nets.vae import VAE, Posterior, from_diffusers_vae
from tests.draws import normal

X = normal(2, 3, 16, 24).float()


def test_kl_and_reparameterisation_are_the_gaussians():
    q = Posterior(normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1))
    exact = kl_divergence(Normal(q.mean, q.std), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(q.kl(), exact)
    z = q.sample(normal(3, 4, 2, 2, seed=2))
    torch.testing.assert_close((z - q.mean) / q.std, normal(3, 4, 2, 2, seed=2))


def random_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 16, 24), "layers_per_block": 2, "latent_channels": 5, "norm_num_groups": 4}
    theirs = AutoencoderKL(3, 3, **{**kinds, **sizes, **changes})
    for parameter in theirs.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return theirs.eval()


def test_diffusers_weights_give_diffusers_output():
    theirs = random_vae()
    ours = from_diffusers_vae(theirs)
    with torch.no_grad():
        expected, found = theirs.encode(X).latent_dist, ours.encode(X)
        z = normal(2, 5, 4, 6).float()
        pairs = ((found.mean, expected.mean), (found.std, expected.std), (ours.decode(z), theirs.decode(z).sample))
    for a, b in pairs:
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def test_the_embedded_vae_loads():
    theirs = zoo.load("mini-sd", device="cpu").components["vae"].float()
    ours, x = from_diffusers_vae(theirs), 2 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)) - 1
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mean
        assert float((ours.encode(x).mean - z).abs().max()) < 1e-4 * float(z.abs().max())
        assert float((ours.decode(z) - theirs.decode(z).sample).abs().max()) < 1e-4


def test_shapes_and_bad_input():
    net = VAE(widths=(8, 16), latent=3)
    assert net.encode(X).mean.shape == (2, 3, 8, 12) and net.decode(torch.zeros(2, 3, 8, 12)).shape == X.shape
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 15, 16\); expected height and width divisible by 2"):
        net.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"z has shape \(1, 4, 8, 8\); expected 3 channels"):
        net.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="differs from VAE in decoder.middle.1"):
        from_diffusers_vae(random_vae(mid_block_add_attention=False))
