"""Guidance by self-attention: what the hooks see and replace, on both kinds of U-Net, and that nothing of them stays."""

import contextlib
from types import SimpleNamespace

import pytest
import scipy.ndimage
import torch
from torch import nn
from torch.testing import assert_close

from course_lib.denoisers import from_edm, from_eps
from course_lib.guidance import pag, perturbed, sag
from course_lib.guidance.attention import attended, blur
from course_lib.nets.attention import identity_attention, observed, self_attention
from course_lib.nets.unet import Attention, UNet
from course_lib.schedules import Linear
from tests.draws import level, normal


def randomised(net: nn.Module) -> nn.Module:
    """Every weight drawn anew, since some start at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.2)
    return net.eval().requires_grad_(False)


def ours() -> UNet:
    return randomised(UNet(channels=1, widths=(32, 32), blocks=1, attention=(1,), classes=0))


def theirs() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return randomised(
        UNet2DConditionModel(
            8, 1, 1, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(32,), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
        )
    )  # fmt: skip


NETS = {"ours": ours, "diffusers": theirs}
TEXT = normal(2, 3, 16, seed=5, dtype=torch.float32)
X = normal(2, 1, 8, 8, dtype=torch.float32)


def denoiser(kind: str, net: nn.Module):
    if kind == "ours":
        return from_edm(net)
    return from_eps(lambda x, t: net(x, t, encoder_hidden_states=TEXT, return_dict=False)[0], Linear().t_of_sigma)


def split(h: torch.Tensor, heads: int) -> torch.Tensor:
    """Tokens (B, N, C) -> (B, heads, N, C / heads)."""
    return h.unflatten(-1, (heads, -1)).transpose(1, 2)


def by_hand(layer: nn.Module, tokens: torch.Tensor, grid: torch.Tensor, identity: bool) -> torch.Tensor:
    """The layer's equation on the same numbers as tokens and as a grid: A v, A = softmax(q k^T / sqrt(d)) or the identity."""
    own = isinstance(layer, Attention)
    if own:
        q, k, v = layer.qkv(layer.norm(grid)).flatten(2).transpose(1, 2).chunk(3, -1)
    else:
        q, k, v = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    q, k, v = (split(h, layer.heads) for h in (q, k, v))
    A = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    h = ((torch.eye(A.shape[-1]).expand_as(A) if identity else A) @ v).transpose(1, 2).flatten(2)
    return grid + layer.proj(h.transpose(1, 2).reshape(grid.shape)) if own else layer.to_out[0](h)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_a_layer_with_the_identity_for_its_map_gives_its_values(kind, identity):
    net = NETS[kind]()
    name, layer = next(iter(self_attention(net).items()))
    tokens = normal(2, 16, 32, seed=2, dtype=torch.float32)
    grid = tokens.transpose(1, 2).reshape(2, 32, 4, 4)
    with identity_attention(net, name) if identity else contextlib.nullcontext():
        found = layer(grid if isinstance(layer, Attention) else tokens)
    expected, other = by_hand(layer, tokens, grid, identity), by_hand(layer, tokens, grid, not identity)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - other).abs().max()) > 0.1


@pytest.mark.parametrize("kind", NETS)
def test_maps_are_the_softmax_of_the_layer_and_leave_its_output_alone(kind):
    net = NETS[kind]()
    layer = next(iter(self_attention(net).values()))
    tokens = normal(2, 16, 32, seed=2, dtype=torch.float32)
    x = tokens.transpose(1, 2).reshape(2, 32, 4, 4) if isinstance(layer, Attention) else tokens
    before = layer(x)
    with observed(layer) as kept:
        assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before) and len(kept) == 1
    assert_close(kept[0].sum(-1), torch.ones(2, 16))
    if isinstance(layer, Attention):
        q, k = layer.qkv(layer.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)[:2]
    else:
        q, k = layer.to_q(x), layer.to_k(x)
    heads = [
        (a @ b.mT / a.shape[-1] ** 0.5).softmax(-1)
        for a, b in zip(q.chunk(layer.heads, -1), k.chunk(layer.heads, -1), strict=True)
    ]
    assert_close(kept[0], sum(heads) / len(heads))


def test_the_blur_is_scipys():
    x = normal(2, 3, 12, 10)
    expected = scipy.ndimage.gaussian_filter(x.numpy(), 1.3, mode="mirror", radius=4, axes=(2, 3))
    assert_close(blur(x, 1.3), torch.from_numpy(expected))


def test_what_is_blurred_is_what_diffusers_blurs():
    """`sag_masking` of diffusers' pipeline on the same maps, in its own scaling: sqrt(alpha-bar) times our x."""
    from diffusers import DDIMScheduler
    from diffusers.pipelines.deprecated.stable_diffusion_sag import StableDiffusionSAGPipeline

    scheduler, t = DDIMScheduler(), torch.tensor(300)
    alpha = scheduler.alphas_cumprod[t].double().sqrt()
    sigma = (1 / alpha**2 - 1).sqrt()
    x0, eps, maps = normal(2, 4, 16, 16), normal(2, 4, 16, 16, seed=1), normal(6, 16, 16, seed=2).softmax(-1)
    pipeline = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(attention_head_dim=3)), scheduler=scheduler)
    expected = StableDiffusionSAGPipeline.sag_masking(pipeline, x0, maps, (4, 4), t, eps)
    mask = attended(maps.unflatten(0, (2, 3)).mean(1), (16, 16))
    assert 0 < float(mask.mean()) < 1
    found = x0 + sigma * eps + mask * (blur(x0) - x0)
    assert_close(alpha * found, expected.double(), rtol=0, atol=1e-6)  # its table of alpha-bar is fp32


@pytest.mark.parametrize("kind", NETS)
def test_sag_goes_away_from_the_blurred_picture(kind):
    net = NETS[kind]()
    D, sigma, w = denoiser(kind, net), level(0.8), 1.5
    with observed(next(layer for name, layer in self_attention(net).items() if "mid" in name)) as kept:
        plain = D(X, sigma)
    mask = attended(kept[0], (8, 8))
    worse = mask * (blur(plain) + 0.8 * (X - plain) / 0.8) + (1 - mask) * X
    eps, eps_worse = (X - plain) / 0.8, (worse - D(worse, sigma)) / 0.8
    assert float((worse - X).abs().max()) > 1e-3 and 0 < float(mask.mean()) < 1
    assert_close(sag(D, net, w)(X, sigma), X - 0.8 * (eps + w * (eps - eps_worse)), rtol=1e-4, atol=1e-4)
    assert torch.equal(sag(D, net, 0)(X, sigma), plain)
    assert not any(layer._forward_hooks for layer in net.modules())


@pytest.mark.parametrize("layers", ["mid", None])
@pytest.mark.parametrize("kind", NETS)
def test_the_reference_attends_worse_and_the_network_is_as_it_was(kind, layers):
    net = NETS[kind]()
    D, sigma = denoiser(kind, net), level(0.8)
    before = D(X, sigma)
    worse = perturbed(D, net, layers)(X, sigma)
    assert float((worse - before).abs().max()) > 1e-4  # rounding is 1e-6
    assert torch.equal(D(X, sigma), before)
    assert not any(layer._forward_hooks for layer in net.modules())
    if layers is None:  # all layers, not the middle alone
        assert not torch.allclose(worse, perturbed(D, net, "mid")(X, sigma))


@pytest.mark.parametrize("kind", NETS)
def test_pag_goes_away_from_the_worse_network(kind):
    net = NETS[kind]()
    D, sigma = denoiser(kind, net), level(0.8)
    plain, worse = D(X, sigma), perturbed(D, net)(X, sigma)
    assert_close(pag(D, net, 3.0)(X, sigma), plain + 3 * (plain - worse), rtol=1e-4, atol=1e-4)
    assert torch.equal(pag(D, net, 0)(X, sigma), plain)


@pytest.mark.parametrize("kind", NETS)
def test_hooks_are_removed_upon_an_error(kind):
    net = NETS[kind]()

    def D(x, sigma):
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        perturbed(D, net)(X, level(0.8))
    assert not any(layer._forward_hooks for layer in net.modules())


@pytest.mark.parametrize("kind", NETS)
def test_a_layer_that_is_not_there_is_named_with_those_that_are(kind):
    with pytest.raises(ValueError, match=r"layers = 'middel' is in the name of no .*; the network has .*mid"):
        pag(lambda x, sigma: x, NETS[kind](), 1.0, "middel")
    with pytest.raises(ValueError, match="layers = 'middel'"):
        sag(lambda x, sigma: x, NETS[kind](), 1.0, "middel")
    with pytest.raises(ValueError, match="the network has no self-attention at all"):
        perturbed(lambda x, sigma: x, nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["digits", "mini-sd"])
@torch.no_grad()
def test_the_embedded_networks_are_perturbed_and_come_back(name):
    from course_lib import zoo

    if name == "digits":
        D = zoo.load(name, device="cpu")
        net, x = D.net, normal(2, 1, 16, 16, dtype=torch.float32)
    else:
        model = zoo.load(name, device="cpu")
        D, net, x = model.denoiser.given(**model.embed(["a red cube on grass"] * 2)), model.net, normal(2, 4, 8, 8).float()
    before = D(x, level(1.0))
    assert 1e-4 < float((perturbed(D, net)(x, level(1.0)) - before).abs().max()) < 10
    assert torch.equal(D(x, level(1.0)), before)
