"""The text encoder: causal, told the places of words, and transformers' output from transformers' weights."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from course_lib import zoo
from course_lib.nets.text import TextEncoder, from_transformers_text

IDS = torch.tensor([[0, 5, 6, 7, 1], [0, 7, 6, 5, 1]])


@torch.no_grad()
def test_a_word_is_read_after_those_before_it_only():
    torch.manual_seed(0)
    net = TextEncoder(10, width=16, heads=2)
    changed = IDS.clone()
    changed[:, 3] = 9
    before, after = net(IDS), net(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert bool(((before - after)[:, 3:].abs().amax(-1) > 1e-3).all())


@torch.no_grad()
def test_the_order_of_words_counts():
    torch.manual_seed(0)
    end = TextEncoder(10, width=16, heads=2)(IDS)[:, -1]
    assert float((end[0] - end[1]).abs().max()) > 1e-3  # the same words


def random_clip(activation: str) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=10, hidden_size=24, intermediate_size=72, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=7, hidden_act=activation, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


@torch.no_grad()
def test_transformers_weights_give_transformers_output():
    embedded = zoo.load("mini-sd", device="cpu").components["text_encoder"].float()
    torch.manual_seed(1)
    for theirs in (embedded, random_clip("gelu"), random_clip("quick_gelu")):
        expected = theirs(IDS).last_hidden_state
        assert float((from_transformers_text(theirs)(IDS) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"ids has shape \(2, 5\); expected at most 4 words a text"):
        TextEncoder(10, width=16, length=4)(IDS)
    with pytest.raises(ValueError, match="width = 15; expected a multiple of the number of heads, 4"):
        TextEncoder(10, width=15)
    with pytest.raises(ValueError, match="activation = 'relu'; expected one of gelu, quick_gelu"):
        from_transformers_text(random_clip("relu"))
