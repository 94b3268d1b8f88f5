"""Low-rank adaptation: the paper's equation, frozen weights that are shared and never touched, states and files."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import conv2d
from torch.testing import assert_close

from course_lib.devices import generator
from course_lib.nets import lora, mini_sd
from course_lib.nets.lora import ATTENTION, LoRA, add_lora, load_lora, lora_state, merge, scaled, unmerge, with_lora, without_lora
from course_lib.nets.unet import UNet
from course_lib.training import write_atomically
from tests.draws import normal

F64 = torch.float64
SE = 4.5  # standard errors

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 4, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
    "3 x 3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "strided, dilated": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=1), (2, 4, 9, 9)),
    "mirrored edge": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="reflect", bias=False), (2, 4, 5, 6)),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def made(kind, rank=3, alpha=None, learnt=True):
    """A layer in float64, its LoRA, which has learnt something where it is to, and an input."""
    torch.manual_seed(1)
    layer = LAYERS[kind][0]().double()
    one = LoRA(copy.deepcopy(layer), rank, alpha, generator(2))
    if learnt:
        one.up.data = normal(*one.up.shape, seed=3)
    return layer, one, normal(*LAYERS[kind][1], seed=4)


def learnt(net, seed=5):
    """The same network after some learning: no factor is 0."""
    for k, one in enumerate(lora.loras(net).values()):
        one.up.data = 0.1 * torch.randn(one.up.shape, generator=generator(seed, k)).to(one.up)
    return net


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(6)
    return mini_sd.unet().eval()


def called(net, dtype=torch.float32):
    x, text = (normal(*shape, seed=k).to(dtype) for k, shape in enumerate(((2, 4, 8, 8), (2, 5, mini_sd.WIDTH))))
    return net(x, torch.tensor([3, 700]), encoder_hidden_states=text, return_dict=False)[0]


# --- one layer ---------------------------------------------------------------------------------------------------------


@layers
def test_it_starts_as_the_layer_bit_for_bit(kind):
    layer, one, x = made(kind, learnt=False)
    assert torch.equal(one(x), layer(x))
    assert not one.up.any() and one.down.all()


@layers
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_it_is_the_equation_and_so_are_its_gradients(kind, scale):
    """y = W x + b + scale (alpha / rank) up down x, as one layer of the changed weight; and 0 is the layer, exactly."""
    layer, one, x = made(kind, rank=3, alpha=1.5)
    one.scale = scale
    up, down = (p.detach().clone().requires_grad_(True) for p in (one.up, one.down))
    changed = layer.weight.detach() + scale * (1.5 / 3) * (up @ down).reshape(layer.weight.shape)
    x, same = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    expected = torch.func.functional_call(layer, {"weight": changed}, (same,))
    assert_close(one(x), expected, rtol=0, atol=1e-12)
    one(x).square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in ((one.up, up), (one.down, down), (x, same)):
        assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-11)
    assert one.layer.weight.grad is None and not one.layer.weight.requires_grad
    assert all(p.grad is None for p in one.layer.parameters())
    one.scale = 0.0
    assert torch.equal(one(x), layer(x))


def test_alpha_is_the_rank_unless_it_is_given():
    for rank, alpha, strength in ((2, None, 1.0), (4, None, 1.0), (4, 2.0, 0.5), (2, 8, 4.0)):
        one = LoRA(nn.Linear(9, 9), rank, alpha)
        assert one.strength == strength
        one.scale = 0.5
        assert one.strength == strength / 2


def test_down_is_drawn_as_the_layer_itself_would_be():
    """Uniform in +-1 / sqrt(c_in k k), of variance 1 / (3 c_in k k), as torch's own layers and the paper's authors draw it."""
    one = LoRA(nn.Conv2d(25, 8, 2), 64, source=generator(7))
    bound, n = 100**-0.5, 6400
    values = one.down.detach().double()
    assert float(values.abs().max()) <= bound and float(values.abs().max()) > 0.99 * bound
    # the fourth moment of a uniform is bound^4 / 5, so a square has the variance bound^4 (1/5 - 1/9)
    assert abs(float(values.square().mean()) - bound**2 / 3) < SE * bound**2 * math.sqrt((1 / 5 - 1 / 9) / n)
    assert abs(float(values.mean())) < SE * bound / math.sqrt(3 * n)


@pytest.mark.parametrize("rank", [1, 2])
def test_it_learns_the_best_change_of_its_rank(rank):
    """On white inputs the least error of rank r is what the other singular values hold (Eckart and Young 1936)."""
    torch.manual_seed(8)
    layer, wanted = nn.Linear(6, 5, bias=False).double(), normal(5, 2, seed=9) @ normal(2, 6, seed=10)
    one = LoRA(layer, rank, source=generator(11))
    optimizer = torch.optim.Adam([one.up, one.down], lr=0.05)
    for _ in range(600):
        loss = (one(torch.eye(6, dtype=F64)) - layer(torch.eye(6, dtype=F64)) - wanted.mT).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rest = torch.linalg.svdvals(wanted)[rank:].square().sum()
    assert float(loss.detach()) == pytest.approx(float(rest), rel=1e-3, abs=1e-6)


def test_in_half_precision_it_keeps_what_the_weight_would_round_away():
    """bfloat16 has no number between 1 and 1 + 2^-7; the factors stay in float32, where AdamW can move them."""
    layer = nn.Linear(2, 1, bias=False).bfloat16()
    layer.weight.data = torch.tensor([[1.0, -1.0]]).bfloat16()
    one, x = LoRA(layer, 1), torch.ones(1, 2).bfloat16()
    assert one.up.dtype == one.down.dtype == torch.float32
    one.up.data, one.down.data = torch.ones(1, 1), torch.tensor([[1e-3, 0.0]])
    assert one(x).dtype == torch.bfloat16
    assert float(one(x).detach()) == pytest.approx(1e-3, rel=2**-8)
    merge(nn.Sequential(one))
    assert float(one(x).detach()) == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LoRA(nn.Linear(3, 3), 0), "rank = 0; expected at least 1"),
        (lambda: LoRA(nn.Linear(3, 3), 2, alpha=0.0), "alpha = 0.0; expected more than 0"),
        (lambda: LoRA(nn.Linear(3, 3), 2, alpha=-1), "alpha = -1; expected more than 0"),
        (lambda: LoRA(nn.Linear(3, 3), 2, alpha=math.nan), "alpha = nan; expected more than 0"),
        (lambda: LoRA(nn.Conv2d(4, 4, 3, groups=2), 2), r"groups=2\); expected an nn.Linear, or an nn.Conv2d with groups = 1"),
        (lambda: LoRA(nn.LayerNorm(4), 2), r"layer = LayerNorm.*; expected an nn.Linear"),
    ],
)
def test_mistakes_at_a_layer_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# --- a network -----------------------------------------------------------------------------------------------------------


def test_a_network_with_lora_shares_all_weights_and_leaves_its_parent_alone(unet):
    before = {name: (p.data_ptr(), p.requires_grad, p.clone()) for name, p in unet.named_parameters()}
    child = with_lora(unet, 4)
    assert torch.equal(called(child), called(unet))
    learns = [p for p in child.parameters() if p.requires_grad]
    assert len(learns) == 2 * len(lora.loras(child)) == 2 * 7 * 2 * 4  # of 7 blocks, with two attentions of four matrices each
    shapes = [one.layer.weight.shape for one in lora.loras(child).values()]
    assert sum(p.numel() for p in learns) == sum(4 * (c_out + c_in) for c_out, c_in in shapes) == 39_424
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for net in (unet, child) for p in net.parameters()}
    assert sum(held.values()) == 4 * (sum(p.numel() for p in unet.parameters()) + 39_424)
    optimizer = torch.optim.AdamW(learns, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        called(child).square().mean().backward()
        optimizer.step()
    assert float((called(child) - called(unet)).abs().max().detach()) > 1e-3
    assert list(before) == [name for name, _ in unet.named_parameters()] and not any(isinstance(m, LoRA) for m in unet.modules())
    for name, p in unet.named_parameters():
        place, required, value = before[name]
        assert p.data_ptr() == place and p.requires_grad == required and p.grad is None and torch.equal(p, value)


def test_children_of_one_parent_are_strangers_to_each_other(unet):
    one, other = learnt(with_lora(unet, 2)), with_lora(unet, 2)
    assert torch.equal(called(other), called(unet)) and not torch.equal(called(one), called(unet))
    merge(one)
    assert torch.equal(called(other), called(unet))


def test_the_start_is_a_function_of_the_seed_and_of_nothing_else(unet):
    torch.manual_seed(12)
    state = torch.get_rng_state()
    first, again, other = (lora_state(with_lora(unet, 2, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    downs = [name for name in first if name.endswith("lora_A.weight")]
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in downs)
    assert not torch.equal(first[downs[0]], first[downs[1]])  # of one shape, to_q and to_k


def test_our_own_unet_by_its_attention_or_by_any_layer():
    torch.manual_seed(13)
    net = UNet(channels=1, widths=(16, 32), blocks=1, classes=3).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)  # else its last layer says 0
    x, t = normal(2, 1, 8, 8).float(), torch.tensor([3.0, 700.0])
    for targets, ends in ((ATTENTION, {"qkv", "proj"}), (("conv1", "modulate"), {"conv1", "modulate"}), ("last", {"last"})):
        child = with_lora(net, 1, targets)
        assert {name.rpartition(".")[2] for name in lora.loras(child)} == ends
        assert torch.equal(child(x, t), net(x, t))
        assert float((learnt(child)(x, t) - net(x, t)).abs().max().detach()) > 1e-4
    with pytest.raises(ValueError, match="in which no linear layer"):  # parts of names, and the name of what is no layer
        with_lora(net, 1, ["v1", "down", "last_norm"])


def test_in_place_returns_what_learns_and_freezes_all_else():
    net = UNet(channels=1, widths=(16, 32), blocks=1)
    learns = add_lora(net, 2)
    assert {id(p) for p in learns} == {id(p) for p in net.parameters() if p.requires_grad}
    earlier = add_lora(net, 2, ["conv1"])  # a second one of other layers: the first is frozen, and still counts
    assert {id(p) for p in earlier} == {id(p) for p in net.parameters() if p.requires_grad}
    assert not {id(p) for p in earlier} & {id(p) for p in learns}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda net: with_lora(net, 2, ["to_query"]), r"targets = \('to_query',\), in which no .* ends; expected .*qkv"),
        (lambda net: with_lora(net, 0), "rank = 0; expected at least 1"),
        (lambda net: with_lora(net, 33), "rank = 33; expected at most 32, the smaller side of the weight of .*attention.qkv"),
        (lambda net: with_lora(net, 2, alpha=0), "alpha = 0; expected more than 0"),
        (lambda net: with_lora(lambda x, t: net(x, t), 2), "net is a function; expected an nn.Module"),
        (lambda net: with_lora(with_lora(net, 2), 2), "down.2.attention.proj and 7 more already with a LoRA; expected"),
        (lambda net: merge(net), "net is a UNet without a LoRA"),
        (lambda net: unmerge(with_lora(net, 2)), r"not merged into its weights; expected merge\(net\) before"),
        (lambda net: lora_state(net), "net is a UNet without a LoRA"),
    ],
)  # fmt: skip
def test_mistakes_with_a_network_are_named(make, said):
    net = UNet(channels=1, widths=(16, 32), blocks=1, attention=(1,))
    with pytest.raises(ValueError, match=said):
        make(net)
    assert all(p.requires_grad for p in net.parameters())


# --- teacher and student in one network ----------------------------------------------------------------------------------


def test_without_its_lora_a_network_is_its_parent(unet):
    child = learnt(with_lora(unet, 4))
    with_it = called(child)
    with without_lora(child):
        assert torch.equal(called(child), called(unet))
        with scaled(child, 1.0):
            assert torch.equal(called(child), with_it)
        assert torch.equal(called(child), called(unet))
    with pytest.raises(RuntimeError, match="on the way"), scaled(child, 0.5):
        assert not torch.equal(called(child), with_it)
        raise RuntimeError("on the way")
    assert torch.equal(called(child), with_it)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_merged_it_computes_the_same_and_unmerged_it_is_as_before_bit_for_bit(unet, dtype):
    parent = copy.deepcopy(unet).to(dtype)
    child = learnt(with_lora(parent, 4, alpha=2))
    for one in lora.loras(child).values():
        one.scale = 0.7
    expected, of_parent, names = called(child, dtype), called(parent, dtype), list(child.state_dict())
    places = [one.layer.weight.data_ptr() for one in lora.loras(child).values()]
    change = float((expected - of_parent).abs().max().detach())
    merge(child)
    assert_close(called(child, dtype), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    assert change > 1e-2
    assert torch.equal(called(parent, dtype), of_parent)
    for forbidden in (merge, lambda net: without_lora(net).__enter__(), lambda net: load_lora(net, lora_state(net))):
        with pytest.raises(ValueError, match=r"merged into its weights; expected unmerge\(net\) before"):
            forbidden(child)
    unmerge(child)
    assert torch.equal(called(child, dtype), expected) and torch.equal(called(parent, dtype), of_parent)
    assert list(child.state_dict()) == names
    assert [one.layer.weight.data_ptr() for one in lora.loras(child).values()] == places  # shared again


# --- states and files ----------------------------------------------------------------------------------------------------


def both():
    """A small network of a linear layer and two convolutions."""
    torch.manual_seed(14)
    return nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Conv2d(3, 6, 3), "c": nn.Conv2d(6, 4, 1)})


def test_a_state_has_the_names_and_shapes_of_peft_and_comes_back():
    one = learnt(with_lora(both(), 2, ["a", "b", "c"]))
    assert {name: tuple(value.shape) for name, value in lora_state(one).items()} == {
        "a.lora_A.weight": (2, 6), "a.lora_B.weight": (5, 2),
        "b.lora_A.weight": (2, 3, 3, 3), "b.lora_B.weight": (6, 2, 1, 1),
        "c.lora_A.weight": (2, 6, 1, 1), "c.lora_B.weight": (4, 2, 1, 1),
    }  # fmt: skip
    other, x = with_lora(both(), 2, ["a", "b", "c"], seed=3), normal(2, 3, 7, 7).float()
    load_lora(other, lora_state(one))
    assert torch.equal(other["b"](x), one["b"](x)) and not torch.equal(other["b"](x), both()["b"](x))
    kernels = lora_state(one)["b.lora_A.weight"]
    both_layers = conv2d(conv2d(x, kernels), lora_state(one)["b.lora_B.weight"])
    assert_close(one["b"](x) - one["b"].layer(x), both_layers, rtol=0, atol=1e-5)


def test_a_file_holds_little_and_brings_ranks_and_alphas_back(unet, tmp_path):
    path = tmp_path / "style" / "lora.safetensors"
    child = learnt(with_lora(unet, 4, alpha=8))
    write_atomically(path, lambda path: lora.save(child, path))
    assert [one.name for one in path.parent.iterdir()] == ["lora.safetensors"]
    weights = 4 * 39_424
    assert weights < path.stat().st_size < 1.2 * weights < 4 * sum(p.numel() for p in unet.parameters()) / 50
    again = with_lora(unet, 4)
    lora.load(again, path)
    assert torch.equal(called(again), called(child))
    assert {one.alpha for one in lora.loras(again).values()} == {8.0}


def test_layers_may_differ_in_rank_and_alpha(tmp_path):
    nets = [both(), both()]
    for net, alphas in zip(nets, ((1.0, 6.0), (None, None)), strict=True):
        add_lora(net, 2, "a", alphas[0])
        add_lora(net, 3, ["b", "c"], alphas[1])
    lora.save(learnt(nets[0]), tmp_path / "file", prefix="net")
    lora.load(nets[1], tmp_path / "file", prefix="net")
    assert [one.strength for one in lora.loras(nets[1]).values()] == [0.5, 2.0, 2.0]
    assert all(torch.equal(value, lora_state(nets[0])[name]) for name, value in lora_state(nets[1]).items())


def test_wrong_states_are_named_and_change_nothing(tmp_path):
    net = learnt(with_lora(both(), 2, ["a", "b"]))
    state = {name: value.clone() for name, value in lora_state(net).items()}
    one_less = {name: value for name, value in state.items() if name != "b.lora_B.weight"}
    wrong = {
        r"state lacks b.lora_B.weight; expected each of the 4 names": one_less,
        r"state has c.lora_A.weight; expected only the 4 names": state | {"c.lora_A.weight": torch.ones(2, 3)},
        r"state lacks a.lora_A.weight and 3 more": {},
        r"state has rank 3 at a.lora_A.weight; expected 2, that of the LoRA of net": lora_state(with_lora(both(), 3, ["a", "b"])),
        r"state has shape \(2, 7\) at a.lora_A.weight; expected \(2, 6\)": state | {"a.lora_A.weight": torch.ones(2, 7)},
    }
    for said, one in wrong.items():
        with pytest.raises(ValueError, match=said):
            load_lora(net, {name: torch.zeros_like(value) for name, value in one.items()})
    assert all(torch.equal(value, state[name]) for name, value in lora_state(net).items())
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="text is no safetensors file"):
        lora.load(net, tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        lora.load(net, tmp_path / "nothing")
    save_file({f"unet.{name}": value for name, value in state.items()}, tmp_path / "plain")  # of another program
    lora.load(net, tmp_path / "plain")
    assert {one.alpha for one in lora.loras(net).values()} == {2.0}
