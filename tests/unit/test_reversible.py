"""Invertible diffusion: gradients are plain backpropagation's, and what is saved does not grow with the steps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib import metrics
from course_lib.denoisers import from_edm
from course_lib.nets.reversible import Coupling, ReversibleUNet, Stack, couple, unique
from course_lib.nets.unet import ResBlock
from course_lib.operators import Matrix
from course_lib.operators.base import LinearOperator
from course_lib.reversible import InvertibleSampler, Measured, SavedBytes
from course_lib.schedules import karras
from course_lib.steps import ddim
from course_lib.worlds import digits
from course_lib.zoo import invertible
from tests.draws import normal

F64 = torch.float64
SHAPE = (1, 4, 4)


class Sensed(LinearOperator):
    """A matrix on pictures."""

    def __init__(self, rows: int = 4):
        self.shape, self.out = SHAPE, (rows,)
        self.matrix = Matrix(normal(rows, 16, seed=3))

    def apply(self, x):
        return self.matrix.apply(x.flatten(1))

    def pinv(self, y):
        return self.matrix.pinv(y).reshape(-1, *SHAPE)


def scrambled(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights drawn anew, so that no layer starts as zero and every gradient is at work."""
    for k, parameter in enumerate(net.parameters()):
        if parameter.ndim:  # v, s and m are numbers, and stay
            with torch.no_grad():
                parameter.add_(0.2 * normal(*parameter.shape, seed=100 * seed + k))
    return net


class Pixelwise(nn.Module):
    """A network that costs nothing: tanh of one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, time):
        return torch.tanh(self.conv(x))


def sampler(n: int, stored: bool, blocks_stored: bool, measured: bool = True, net=None, **options) -> InvertibleSampler:
    torch.manual_seed(0)
    net = scrambled(net or ReversibleUNet(1, (8, 8), 2)).double()
    if isinstance(net, ReversibleUNet):
        net.store(blocks_stored)
    A = Sensed() if measured else None
    return InvertibleSampler(from_edm(net, 0.7), karras(n, 0.05, 3.0), A, stored=stored, **options).double()


def gradients(model: InvertibleSampler, measured: bool = True) -> tuple[list[torch.Tensor], int]:
    """Of the input, the measurement and each parameter; and the most bytes that were saved at one time."""
    x = normal(2, *SHAPE, seed=1).requires_grad_()
    y = normal(2, 4, seed=2).requires_grad_() if measured else None
    leaves = [x, *([y] if measured else []), *model.parameters()]
    with SavedBytes(model.parameters()) as saved:
        out = model(x, y)
        found = torch.autograd.grad((out * normal(*out.shape, seed=4)).sum() + out.square().mean(), leaves)
    return list(found), saved.peak


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("measured", [True, False])
def test_gradients_are_those_of_plain_backpropagation(n, measured):
    """Of the input, the measurement, v, s, m and all weights of the network, which the steps share."""
    plain, _ = gradients(sampler(n, True, True, measured), measured)
    assert all(float(g.abs().max()) > 0 for g in plain[:2])
    for stored, blocks_stored in ((False, True), (True, False), (False, False)):
        other, _ = gradients(sampler(n, stored, blocks_stored, measured), measured)
        for a, b in zip(plain, other, strict=True):
            assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_over_48_steps_gradients_and_bytes_hold_and_plain_backpropagation_grows_linearly():
    """Gradients within 1e-6; saved bytes within 5 % from 3 to 48 steps at both levels.

    Without them each step saves the same, 48 / 3 = 16 times as much; what is saved once, y and the start, is under 5 % of it.
    """
    plain, one, two = {}, {}, {}
    for n in (3, 48):
        network = lambda: ReversibleUNet(1, (16,), 2)
        exact, plain[n] = gradients(sampler(n, True, True, net=network()))
        for saved, blocks_stored in ((one, True), (two, False)):
            found, saved[n] = gradients(sampler(n, False, blocks_stored, net=network()))
            for a, b in zip(exact, found, strict=True):
                assert_close(a, b, atol=1e-6, rtol=1e-6)
        less = [f"{1 - saved[n] / plain[n]:.1%}" for saved in (one, two)]
        print(f"{n} steps: {plain[n]} bytes; one level {less[0]} less, two levels {less[1]} less; the paper: up to 93.8 %")
    assert plain[48] / plain[3] == pytest.approx(16, rel=0.05)
    assert one[48] / one[3] == pytest.approx(1, abs=0.05)
    assert two[48] / two[3] == pytest.approx(1, abs=0.05)
    assert two[3] < one[3] < plain[3]


def test_inverting_many_steps_without_keeping_a_pair_loses_the_gradient():
    """Each inversion doubles the rounding error at v = 1/2, and 2^48 times 1e-16 is no longer small."""

    def worst(every):
        plain, _ = gradients(sampler(48, True, True, False, net=Pixelwise()), False)
        found, _ = gradients(sampler(48, False, True, False, net=Pixelwise(), every=every), False)
        return max(float((a - b).abs().max()) for a, b in zip(plain, found, strict=True))

    assert worst(12) < 1e-9 < 1e-6 < worst(48)


def test_a_coupling_is_inverted_without_inverting_its_body():
    torch.manual_seed(0)
    layer = scrambled(Coupling(ResBlock(8, 8, 4, 0.0), v=0.3)).double()
    a, b, emb = normal(2, 8, 4, 4, seed=1), normal(2, 8, 4, 4, seed=2), normal(2, 4, seed=3)
    forth = layer(a, b, emb)
    assert_close(forth[0], (1 - layer.v) * layer.body(a, emb) + layer.v * b)
    assert_close(layer.inverse(*forth, emb), (a, b), atol=1e-12, rtol=0)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 3, seed=5))

    def forward(self, x, shift, scale):
        return torch.tanh(x @ self.weight + shift) * scale


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_layers_that_share_a_body_and_frozen_and_unused_tensors(depth):
    body = Twice().double()
    layers = [Coupling(body, 0.4).double() for _ in range(depth)]
    if depth > 1:
        layers[1].v.requires_grad_(False)
    a, b = normal(2, 3, seed=1).requires_grad_(), normal(2, 3, seed=2).requires_grad_()
    shift, scale = normal(3, seed=3).requires_grad_(), normal(3, seed=4)  # the second wants no gradient
    leaves = [a, b, *([shift] if depth else []), *(p for p in unique(layers) if p.requires_grad)]
    found = []
    for stored in (True, False):
        out = couple(layers, a, b, shift, scale, stored=stored)
        found.append(torch.autograd.grad(out[0].sin().sum(), leaves, allow_unused=True, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, atol=1e-10, rtol=0)


def test_a_stack_and_the_network_start_as_the_identity_and_as_zero():
    torch.manual_seed(0)
    x, emb = normal(2, 8, 4, 4, seed=1).float(), normal(2, 4, seed=2).float()
    stack = Stack(Coupling(ResBlock(8, 8, 4, 0.0)) for _ in range(3))
    assert_close(stack(x, emb), x)
    net = ReversibleUNet(1, (8, 16), 2)
    assert_close(net(normal(2, 1, 8, 8, seed=3).float(), torch.zeros(())), torch.zeros(2, 1, 8, 8))


def test_a_step_is_ddim_and_with_a_measurement_ends_on_it():
    D = from_edm(scrambled(ReversibleUNet(1, (8,), 1)).double(), 0.7)
    x, (high, low, zero) = normal(2, *SHAPE, seed=1), torch.tensor([2.0, 0.5, 0.0], dtype=F64)
    assert_close(Measured(D, high, low, None)(x), ddim(D, x, high, low)[0])
    A, y = Sensed(), normal(2, 4, seed=2)
    assert_close(A(Measured(D, high, zero, A)(x, y)), y, atol=1e-12, rtol=0)
    assert_close(A(Measured(D, high, low, A)(x, y)) - y, low / high * (A(x) - A(D(x, high))), atol=1e-12, rtol=0)


def test_the_sampler_starts_from_the_pseudo_inverse_and_mixes_in_the_state_before_the_last():
    model, y = sampler(2, False, False), normal(2, 4, seed=2)
    with torch.no_grad():
        model.m.fill_(0.25)
        x0, (first, second) = model.operator.pinv(y), model.steps
        x1 = (1 - first.v) * first.body(x0, y) + first.v * model.s * x0
        x2 = (1 - second.v) * second.body(x1, y) + second.v * x0
        assert_close(model(y=y), x2 + 0.25 * x1, atol=1e-12, rtol=0)


def test_bytes_are_counted_once_for_each_storage_and_while_they_are_kept():
    x = torch.ones(100, dtype=F64, requires_grad=True)
    with SavedBytes([x]) as saved:
        out = x * 2
        a, b = out.exp(), out.sin()  # saves the result of exp, and the argument of sin
        assert saved.now == 1600
        c = out.cos()
        assert saved.now == 1600  # the argument is there already
        (a + b + c).sum().backward()
        del a, b, c
        assert saved.now == 0 and saved.peak == 1600


def test_under_autocast_the_inverse_keeps_its_digits():
    torch.manual_seed(0)
    layers = [scrambled(Coupling(ResBlock(8, 8, 4, 0.0))) for _ in range(3)]
    a, b, emb = (normal(*shape, seed=k).float() for k, shape in enumerate([(2, 8, 4, 4), (2, 8, 4, 4), (2, 4)]))
    plain = couple(layers, a, b, emb)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(couple(layers, a, b, emb), plain, atol=0, rtol=0)


def test_training_the_wired_steps_end_to_end_raises_psnr_on_every_seed():
    """Stored, and the part that needs no training measured again: another machine's rounding is far below 0.01 dB."""
    rows = invertible.rows()
    assert [row["seed"] for row in rows] == list(invertible.SEEDS)
    for row in rows:
        assert row["after"] > max(row["before"], row["unwired"], row["start"]) and row["seconds"] < 60
        assert row["saved_reversible"] < 0.4 * row["saved_plain"]
    A, images = invertible.problem(0), digits.load("test")[0][: invertible.TEST]
    with torch.no_grad():
        before = metrics.mean_psnr(invertible.wired(A)(y=A(images)), images)
    assert before == pytest.approx(rows[0]["before"], abs=0.01)


def test_bad_input_is_one_sentence():
    D, levels, x = from_edm(ReversibleUNet(1, (8,), 1), 0.7), karras(2), torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match=r"v = 0; expected a weight between 0"):
        Coupling(nn.Identity(), 0)
    with pytest.raises(ValueError, match=r"a has shape \(1, 1, 4, 4\) and b \(2,\); expected the same"):
        couple([], x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"dropout in training mode"):
        couple([Coupling(nn.Dropout(0.1))], x, x)
    with pytest.raises(ValueError, match=r"widths = \(12,\); expected multiples of 8"):
        ReversibleUNet(1, (12,))
    with pytest.raises(ValueError, match=r"divisible by 2"):
        ReversibleUNet(1, (8, 8))(torch.zeros(1, 1, 5, 4), torch.zeros(()))
    with pytest.raises(ValueError, match=r"expected a falling grid"):
        InvertibleSampler(D, torch.tensor([0.1, 1.0]))
    with pytest.raises(ValueError, match=r"every = 0; expected at least one step"):
        InvertibleSampler(D, levels, every=0)
    with pytest.raises(ValueError, match=r"no y was given to a sampler with an operator"):
        InvertibleSampler(D, levels, Sensed())(x)
    with pytest.raises(ValueError, match=r"y was given to a sampler with no operator"):
        InvertibleSampler(D, levels)(x, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"x = None without a measurement"):
        InvertibleSampler(D, levels)()
