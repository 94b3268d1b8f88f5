"""Cross-attention: its laws, parity with diffusers, and maps that are what the network used."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from course_lib import zoo
from course_lib.nets.crossattention import CrossAttention, recorded, word_maps
from tests.draws import normal

X, TEXT = normal(2, 9, 32).float(), normal(2, 5, 12, seed=1).float()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return CrossAttention(32, 12, 4)


def alive(layer):
    torch.nn.init.normal_(layer.out.weight)
    return layer


@torch.no_grad()
def test_it_is_the_identity_at_the_start(layer):
    assert torch.equal(layer(X, TEXT), X)
    assert float((alive(layer)(X, TEXT) - X).abs().max()) > 0.1


def test_shares_sum_to_one_and_the_order_of_words_does_not_count(layer):
    layer = alive(layer)
    torch.testing.assert_close(layer.maps(X, TEXT).sum(-1), torch.ones(2, 4, 9))
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(layer(X, TEXT[:, order]), layer(X, TEXT), rtol=1e-4, atol=1e-5)


def test_masked_words_have_no_say(layer):
    layer, mask = alive(layer), torch.tensor([[True] * 3 + [False] * 2] * 2)
    other = torch.cat([TEXT[:, :3], 100 * TEXT[:, 3:]], 1)
    torch.testing.assert_close(layer(X, TEXT, mask), layer(X, other, mask))
    torch.testing.assert_close(layer(X, TEXT, mask), layer(X, TEXT[:, :3]))
    with pytest.raises(ValueError, match="mask leaves a text without a word; expected at least one"):
        layer(X, TEXT, torch.zeros(2, 5, dtype=torch.bool))


def test_it_is_diffusers_attention(layer):
    theirs, layer = Attention(32, 12, heads=4, dim_head=8), alive(layer)
    theirs.to_q, theirs.to_k, theirs.to_v, theirs.to_out[0] = layer.q, layer.k, layer.v, layer.out
    torch.testing.assert_close(layer(X, TEXT), X + theirs(layer.norm(X), TEXT), rtol=1e-4, atol=1e-5)


def test_recorded_maps_change_nothing_and_are_shares():
    model = zoo.load("mini-sd", device="cpu")
    words, unet = model.embed(["a large red cube on grass", "a small blue cone on sand"]), model.components["unet"]
    D, z, sigma = model.denoiser.given(**words), normal(2, 4, 8, 8).float(), torch.tensor(1.0)
    with torch.no_grad():
        plain, before = D(z, sigma), dict(unet.attn_processors)
        with recorded(unet) as kept:
            found = D(z, sigma)
        assert unet.attn_processors == before
        assert float((found - plain).abs().max()) < 1e-4
    assert kept and all(len(calls) == 1 for calls in kept.values())
    maps = word_maps(kept, 16)
    assert maps.shape == (2, 32, 16, 16)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 16, 16), rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="stop"), recorded(unet):
        raise RuntimeError("stop")
    assert unet.attn_processors == before


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="width = 30; expected a multiple of the number of heads, 4"):
        CrossAttention(30, 12, 4)
    with pytest.raises(ValueError, match="a map has 6 places; expected a square picture"):
        word_maps({"layer": [torch.ones(1, 6, 3)]}, 8)
