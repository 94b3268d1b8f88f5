"""The diffusion transformer: laws of its parts, and diffusers' own output from diffusers' weights."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from course_lib.nets.dit import DiT, DiTBlock, from_diffusers_dit, patchify, positions, unpatchify
from tests.draws import normal


def test_patches_are_squares_in_reading_order_and_come_back():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())  # second row of patches, second of three
    assert torch.equal(unpatchify(tokens, 2, (4, 6)), x)
    assert torch.equal(patchify(x, 1), x.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_a_block_is_the_identity_at_the_start_and_the_network_gives_zero():
    torch.manual_seed(0)
    block, x, emb = DiTBlock(32, 4), normal(2, 5, 32).float(), normal(2, 32, seed=1).float()
    assert torch.equal(block(x, emb), x)
    net = DiT(classes=3, width=32, depth=2)
    assert float(net(normal(2, 4, 8, 8).float(), torch.tensor(500.0), torch.tensor([0, 3])).abs().max()) == 0
    torch.nn.init.normal_(block.adaln.weight)
    assert float((block(x, emb) - x).abs().max()) > 0.1


def test_positions_tell_every_patch_apart_and_stretch():
    p = positions((4, 4), 32, 4)
    assert float(torch.cdist(p, p).fill_diagonal_(1).min()) > 0.1
    fine = positions((8, 8), 32, 4).reshape(8, 8, 32)
    torch.testing.assert_close(fine[::2, ::2].reshape(-1, 32), p)  # the same places of the picture


def random_dit() -> DiTTransformer2DModel:
    """A small diffusers model with random weights everywhere, and one embedding for all blocks, as published ones have."""
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(4, 8, in_channels=3, out_channels=5, num_layers=3, sample_size=8, num_embeds_ada_norm=7)
    state = {name: 0.2 * torch.randn_like(value) for name, value in theirs.state_dict().items()}
    for name in state:
        if ".norm1.emb." in name:
            state[name] = state["transformer_blocks.0" + name.removeprefix("transformer_blocks")[2:]]
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("size", [8, 12])
def test_diffusers_weights_give_diffusers_output(size):
    theirs, x, time = random_dit(), normal(2, 3, size, size).float(), torch.tensor([3, 741])
    label = torch.tensor([6, 7])  # a class, and the null class
    with torch.no_grad():
        expected = theirs(x, time, label).sample
        found = from_diffusers_dit(theirs)(x, time, label)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_what_cannot_be_loaded_is_said():
    theirs = random_dit()
    theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.data += 1
    with pytest.raises(ValueError, match="block 2 has another embedding of time or class than block 0; expected one"):
        from_diffusers_dit(theirs)


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 9, 8\); expected height and width divisible by the patch size, 2"):
        DiT(width=32, depth=1)(torch.zeros(1, 4, 9, 8), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 5, 8\); expected 4 of a multiple of 4"):
        unpatchify(torch.zeros(1, 5, 8), 2, (4, 4))
    with pytest.raises(ValueError, match="width = 30; expected a multiple of the number of heads, 4"):
        DiT(width=30)
    with pytest.raises(ValueError, match="width = 30; expected a multiple of 4"):
        positions((2, 2), 30, 2)
