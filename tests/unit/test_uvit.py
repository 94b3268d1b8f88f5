"""U-ViT: time and class are tokens, skips join the right blocks, and the network starts at zero."""

import pytest
import torch

from course_lib.nets.uvit import UViT, UViTBlock
from tests.draws import normal

X = normal(2, 4, 8, 8).float()


def alive(net: UViT) -> UViT:
    """The same network with random last layers, since it starts at zero."""
    torch.manual_seed(1)
    for parameter in net.last.parameters():
        torch.nn.init.normal_(parameter)
    return net


def test_it_is_zero_at_the_start_and_hears_time_and_class():
    net = UViT(classes=3, width=32, depth=3, heads=4)
    with torch.no_grad():
        assert float(net(X, torch.tensor(500.0), torch.tensor([0, 3])).abs().max()) == 0
        net = alive(net)
        base = net(X, torch.tensor(500.0), torch.tensor([0, 1]))
        assert base.shape == X.shape
        assert float((net(X, torch.tensor(100.0), torch.tensor([0, 1])) - base).abs().max()) > 1e-3
        other = net(X, torch.tensor(500.0), torch.tensor([0, 2]))
        assert torch.allclose(other[0], base[0], atol=1e-5) and float((other[1] - base[1]).abs().max()) > 1e-3
        assert torch.allclose(net(X, torch.tensor(500.0)), net(X, torch.tensor(500.0), torch.tensor([3, 3])), atol=1e-6)


def test_skips_join_last_to_first():
    """The block after the middle joins what the block before it gave, the last block what the first gave."""
    net, seen = UViT(width=32, depth=5, heads=4), {}

    def keep(name):
        return lambda block, inputs, output: seen.update({name: (*inputs, output)})

    for part in ("before", "after"):
        for i, block in enumerate(getattr(net, part)):
            block.register_forward_hook(keep(f"{part} {i}"))
    net(X, torch.tensor(1.0))
    for i in range(2):
        assert torch.equal(seen[f"after {i}"][1], seen[f"before {1 - i}"][-1])


@torch.no_grad()
def test_a_joined_block_depends_on_what_was_kept():
    torch.manual_seed(0)
    block, x, kept = UViTBlock(32, 4, True), normal(2, 5, 32).float(), normal(2, 5, 32, seed=1).float()
    assert float((block(x, kept) - block(x, 0 * kept)).abs().max()) > 0.01


@torch.no_grad()
def test_without_skips_it_is_a_chain_of_equal_blocks():
    net, x = UViT(width=32, depth=3, heads=4, skips=False), normal(2, 5, 32).float()
    names = {frozenset(name for name, _ in block.named_parameters()) for block in (*net.before, net.middle, *net.after)}
    assert len(names) == 1
    assert torch.equal(net.through(x), net.after[0](net.middle(net.before[0](x))))


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="depth = 4; expected an odd number"):
        UViT(depth=4)
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 6, 8\); expected 8 pixels on each side"):
        UViT(width=32, depth=1)(torch.zeros(1, 4, 6, 8), torch.tensor(1.0))
