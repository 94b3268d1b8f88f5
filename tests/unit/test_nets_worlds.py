"""Networks of the shapes they promise, and worlds whose numbers are known."""

import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from course_lib.nets import reader, unet
from course_lib.nets.embedding import TimeEmbedding
from course_lib.nets.mlp import MLP
from course_lib.nets.unet import Attention, Folded, ResBlock, UNet
from course_lib.worlds import digits, toys
from tests.draws import normal

SE = 4.5  # standard errors
F64 = torch.float64


def small_unet(**options) -> UNet:
    torch.manual_seed(0)
    return UNet(**{"channels": 2, "widths": (16, 32, 48), "blocks": 1, "attention": (1,), "classes": 5} | options)


def trained(net: torch.nn.Module, steps: int = 3) -> torch.nn.Module:
    """A few steps on noise: enough to move every layer that starts at zero."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(6, 2, 8, 8)
        (net(x, torch.rand(6) * 1000, torch.arange(6)) - torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    return net


# --- the U-Net -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"out": 4}, {"blocks": 2}, {"widths": (16,)}, {"attention": ()}, {"classes": 0}])
def test_unet_shapes(options):
    net = small_unet(**options)
    out = options.get("out", 2)
    for height, width in ((8, 8), (4, 12)):
        assert net(torch.randn(3, 2, height, width), torch.rand(3)).shape == (3, out, height, width)
    label = torch.tensor([0, 4, 5]) if net.classes else None
    assert net(torch.randn(3, 2, 8, 8), torch.tensor(7.0), label).shape == (3, out, 8, 8)  # a 0-d time


def test_unet_starts_at_zero():
    assert torch.equal(small_unet()(torch.randn(2, 2, 8, 8), torch.rand(2)), torch.zeros(2, 2, 8, 8))


def test_unet_no_class_is_the_null_class():
    net = trained(small_unet()).eval()
    x, time = torch.randn(3, 2, 8, 8), torch.rand(3) * 1000
    null = torch.full((3,), 5)
    assert torch.equal(net(x, time), net(x, time, null))
    assert not torch.allclose(net(x, time), net(x, time, torch.tensor([0, 1, 2])))


def test_unet_treats_samples_apart_and_knows_the_time():
    net = trained(small_unet()).eval().double().requires_grad_(False)
    x, time = torch.randn(3, 2, 8, 8, dtype=F64), torch.tensor([1.0, 50.0, 700.0])
    full = net(x, time)
    rows = torch.cat([net(x[i : i + 1], time[i : i + 1]) for i in range(3)])
    assert_close(full, rows, rtol=0, atol=1e-12)
    assert_close(net(x, torch.tensor(50.0)), net(x, torch.full((3,), 50.0)))
    other = net(x, time.flip(0))
    assert float((other - full)[[0, 2]].abs().max()) > 1e-8
    assert_close(other[1], full[1], rtol=0, atol=1e-12)


def test_every_parameter_of_the_unet_learns():
    """Layers that start at zero shut off what lies behind them; after three steps the gradient reaches everything."""
    net = trained(small_unet())
    x = torch.randn(6, 2, 8, 8)
    (net(x, torch.rand(6) * 1000, torch.arange(6)) - torch.randn_like(x)).square().mean().backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert still == []
    assert bool((net.label.weight.grad.abs().max(1).values > 0).all())  # every class, the null class too


def test_unet_names_a_size_that_cannot_be_halved():
    for shape in ((1, 2, 6, 8), (1, 2, 8, 6)):
        with pytest.raises(ValueError, match=r"x has shape .*; expected height and width divisible by 4"):
            small_unet()(torch.zeros(shape), torch.zeros(1))


@pytest.mark.parametrize("widths", [(16, 104), (12, 24)])
def test_unet_names_widths_that_do_not_divide(widths):
    """104 channels give 3 heads, 12 channels no 8 groups: refused where the network is built, not where it runs."""
    try:
        net = UNet(widths=widths)
    except ValueError as error:
        assert "width" in str(error)
    else:
        assert net(torch.zeros(1, 1, 8, 8), torch.zeros(1)).shape == (1, 1, 8, 8)


@torch.no_grad()
def test_a_folded_unet_sees_four_pixels_as_channels():
    """Nothing but the U-Net mixes them: moved by two pixels within the padding, what is folded moves by one."""
    net, x = Folded(3, (8, 16), blocks=1, attention=()), normal(2, 3, 8, 8).float()
    assert net(x, torch.tensor(1.0)).shape == x.shape and float(net(x, torch.tensor(1.0)).abs().max()) == 0
    net.unet.forward = lambda folded, time: folded.roll(1, -1)
    assert torch.equal(net(x, torch.tensor(1.0)), x.roll(2, -1))


def test_unet_is_short_enough_to_read():
    assert len(Path(unet.__file__).read_text().splitlines()) <= 220


def test_residual_block_is_its_equation():
    """skip(x) + conv(silu((1 + scale) norm(conv(silu(norm(x)))) + shift)); eight groups of channels are normalised."""
    torch.manual_seed(0)
    block = ResBlock(16, 32, emb=12, dropout=0.0)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 12)

    def norm(layer, h):
        grouped = h.reshape(2, 8, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + layer.eps).sqrt()
        return scaled.reshape(h.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]

    silu = lambda h: h * torch.sigmoid(h)
    scale, shift = block.modulate(silu(emb)).reshape(2, 2, 32, 1, 1).unbind(1)
    h = (1 + scale) * norm(block.norm2, block.conv1(silu(norm(block.norm1, x)))) + shift
    assert_close(block(x, emb), block.skip(x) + block.conv2(silu(h)), rtol=1e-4, atol=1e-4)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer, heads = Attention(16, 2), 2
    torch.nn.init.normal_(layer.proj.weight)
    x = torch.randn(2, 16, 3, 5)
    q, k, v = (part.reshape(2, heads, 8, 15).transpose(-1, -2) for part in layer.qkv(layer.norm(x)).chunk(3, 1))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1)
    mixed = (weights @ v).transpose(-1, -2).reshape(2, 16, 3, 5)
    assert_close(layer(x), x + layer.proj(mixed), rtol=1e-4, atol=1e-5)


# --- the other networks ---------------------------------------------------------------------------------------------


def test_mlp():
    net = MLP(dim=3, width=16, depth=2, classes=4, out=6)
    x, time = torch.randn(5, 3), torch.rand(5) * 1000
    assert net(x, time, torch.arange(5)).shape == (5, 6)
    assert torch.equal(net(x, time), net(x, time, torch.full((5,), 4)))
    assert_close(net(x, torch.tensor(3.0)), net(x, torch.full((5,), 3.0)))
    assert not torch.allclose(net(x, time), net(x, time.flip(0)))
    net(x, time, torch.arange(5)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in net.parameters())
    assert MLP(dim=2)(torch.randn(5, 2), time).shape == (5, 2)


def test_time_embedding_is_sines_and_cosines():
    """Distances depend on the difference of two times alone, until the layers mix them."""
    embedding = TimeEmbedding(8, features=64)
    embedding.mlp = torch.nn.Identity()
    a, b = embedding(torch.tensor([3.0, 500.0])), embedding(torch.tensor([10.0, 507.0]))
    assert a.shape == (2, 64)
    distance = (a - b).norm(dim=1)
    assert float(distance[0]) == pytest.approx(float(distance[1]), rel=1e-3)
    frequencies = 10_000.0 ** (-torch.arange(32) / 32)
    assert_close(a[0], torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()]))


READERS = [made for made in vars(reader).values() if hasattr(made, "features")]


def test_there_are_two_readers():
    assert len(READERS) >= 2


@pytest.mark.parametrize("make", READERS)
def test_readers(make):
    net = make(classes=7).eval()
    x = torch.randn(3, 1, 16, 16)
    assert net(x).shape == (3, 7) and net.features(x).shape == (3, net.head.in_features)
    assert_close(net.head(net.features(x)), net(x))
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in net.parameters())


# --- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_in_file_order():
    from sklearn.datasets import load_digits

    raw = load_digits()
    images, labels = digits.load("all")
    train, test = digits.load("train"), digits.load("test")
    assert images.shape == (1797, 1, 16, 16) and images.dtype == torch.float32
    assert len(train[0]) == 1437 and len(test[0]) == 360
    assert torch.equal(torch.cat([train[0], test[0]]), images) and torch.equal(torch.cat([train[1], test[1]]), labels)
    assert labels.tolist() == raw.target.tolist() and sorted(set(labels.tolist())) == list(range(10))
    assert float(images.min()) == -1 and float(images.max()) == 1


def test_pixels_are_the_originals_lightly_smoothed():
    """Bilinear doubling, then means of 2 x 2: along each axis the kernel [1/8, 3/4, 1/8], with the edge repeated."""
    from sklearn.datasets import load_digits

    K = torch.diag(torch.full((8,), 0.75)) + torch.diag(torch.full((7,), 0.125), 1) + torch.diag(torch.full((7,), 0.125), -1)
    K[0, 0] = K[7, 7] = 0.875
    raw = torch.as_tensor(load_digits().images, dtype=torch.float32) / 16
    assert_close(digits.pixels(digits.load("all")[0]).reshape(-1, 8, 8), K @ raw @ K.T, rtol=0, atol=1e-6)


def test_digits_cannot_be_spoiled_by_their_reader():
    digits.load("train")[0].zero_()
    assert float(digits.load("train")[0].std()) > 0.1
    with pytest.raises(ValueError, match="split = 'valid'; expected 'train', 'test' or 'all'"):
        digits.load("valid")


# --- toys ---------------------------------------------------------------------------------------------------------------


def within_error(x: torch.Tensor, mean: list[float], second: list[list[float]]) -> bool:
    """Sample mean and second moments within their standard errors."""
    x, n = x.double(), len(x)
    products = (x[:, :, None] * x[:, None, :]).flatten(1)
    first_ok = (x.mean(0) - torch.tensor(mean, dtype=F64)).abs() < SE * x.std(0) / math.sqrt(n)
    second_ok = (products.mean(0) - torch.tensor(second, dtype=F64).flatten()).abs() < SE * products.std(0) / math.sqrt(n)
    return bool(first_ok.all() and second_ok.all())


def test_moons():
    """On the upper arc E x = -1/2 and E y = 2/pi - 1/4; the lower is its point reflection."""
    x = toys.moons(40_000, torch.Generator().manual_seed(0))
    assert x.shape == (40_000, 2) and x.dtype == torch.float32
    cross = 1 / 8 - 1 / math.pi
    noise = 0.08**2
    assert within_error(x, [0, 0], [[0.75 + noise, cross], [cross, 0.5625 - 1 / math.pi + noise]])
    assert float(toys.moons(1000, std=0.0).norm(dim=1).max()) < 1.55


def test_swiss_roll():
    """r = angle / 4.5 pi, the angle uniform on [1.5 pi, 4.5 pi]: integrals of t cos t, t sin t, t^2 over it."""
    n, std = 40_000, 0.02
    x = toys.swiss_roll(n, torch.Generator().manual_seed(0), std).double()
    low, high = 1.5 * math.pi, 4.5 * math.pi
    mean = torch.tensor([6 * math.pi, 2.0], dtype=F64) / (3 * math.pi) / high
    assert bool(((x.mean(0) - mean).abs() < SE * x.std(0) / math.sqrt(n)).all())
    square = x.square().sum(1)
    expected = (high**3 - low**3) / 3 / (3 * math.pi) / high**2 + 2 * std**2
    assert abs(float(square.mean()) - expected) < SE * float(square.std()) / math.sqrt(n)
    clean = toys.swiss_roll(1000, std=0.0).norm(dim=1)
    assert float(clean.min()) >= 1 / 3 - 1e-6 and float(clean.max()) <= 1 + 1e-6


def test_mixtures_of_the_toys():
    blobs = toys.three_blobs()
    assert blobs.weights.tolist() == pytest.approx([0.5, 0.3, 0.2]) and blobs.dim == 2
    for C, (long, short) in zip(blobs.covs, [(0.45, 0.15), (0.5, 0.2), (0.6, 0.12)], strict=True):
        assert_close(torch.linalg.eigvalsh(C).sqrt(), torch.tensor([short, long], dtype=F64))
    ring = toys.ring(8, 1.5, 0.15)
    assert_close(ring.means.norm(dim=1), torch.full((8,), 1.5, dtype=F64))
    assert_close(ring.mean, torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)
    assert_close(ring.cov, (1.5**2 / 2 + 0.15**2) * torch.eye(2, dtype=F64), rtol=0, atol=1e-12)
    peaks = toys.two_peaks(2.0, 0.3, 0.25)
    assert float(peaks.mean) == pytest.approx(0.5)  # -0.25 + 0.75
    assert float(peaks.cov) == pytest.approx(0.09 + 0.75)  # 1 - 0.5^2


def test_toys_repeat_with_their_generator():
    for draw in (toys.moons, toys.swiss_roll, toys.three_blobs().sample):
        a, b = (draw(5, torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(a, b) and not torch.equal(a, draw(5, torch.Generator().manual_seed(2)))
