"""ControlNet: nothing at first, to the last bit; what learns when; scales multiply, controls add, and calls are merged."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib.denoisers import NetworkDenoiser, batched
from course_lib.devices import channels_last
from course_lib.guidance import cfg
from course_lib.nets.control import control_of, controlled, feature_widths, guess, resolution_weights, scaled
from course_lib.nets.unet import zero
from course_lib.training import denoising_loss
from tests.control_bases import F64, KINDS, B, Base, base
from tests.draws import normal

kinds = pytest.mark.parametrize("kind", KINDS)
SCALES = {
    "none": lambda layers: None,
    "one": lambda layers: torch.tensor([0.7]),
    "each sample": lambda layers: torch.tensor([0.7, -3.0]),
    "guess": lambda layers: guess(layers),
    "each layer": lambda layers: torch.linspace(-1, 2, B * layers).view(B, layers),
}


def residuals_of(D: NetworkDenoiser, given: Base) -> list[torch.Tensor]:
    """What the controls of D add to the features of the locked network, at x."""
    kept = []
    hook = D.net.net.register_forward_pre_hook(lambda _, args, words: kept.append(words["residuals"]), with_kwargs=True)
    with hook, torch.no_grad():
        D(given.x, given.sigma)
    return kept[0]


class Calls:
    """Counts the calls of a locked network and of its controls, and the rows of the network's."""

    def __init__(self, D: NetworkDenoiser):
        self.net, self.controls, self.rows = 0, 0, []
        first = D.net.net.unet.conv_in if hasattr(D.net.net, "unet") else D.net.net.first
        self.handles = [first.register_forward_hook(self.count("net"))]
        for control in D.net.controls.values():
            for part in (control.hint, control.copy.conv_in if hasattr(control.copy, "conv_in") else control.copy.first):
                self.handles.append(part.register_forward_hook(self.count("controls")))

    def count(self, name):
        def hook(module, inputs, output):
            setattr(self, name, getattr(self, name) + 1)
            if name == "net":
                self.rows.append(len(output))

        return hook


@pytest.fixture
def calls_of():
    """Makes `Calls` of a Denoiser, whose hooks are gone after the test: the locked networks serve others."""
    made = []

    def of(D):
        made.append(Calls(D))
        return made[-1]

    yield of
    for handle in (handle for calls in made for handle in calls.handles):
        handle.remove()


# --- the start ---------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("names", [("edge",), ("edge", "depth")])
def test_at_step_0_the_output_is_that_of_the_locked_network_bit_for_bit(kind, scale, names):
    of = base(kind)
    controls = {name: of.control(seed=k) for k, name in enumerate(names)}
    D = controlled(of.of(), **controls)
    plain = of.of()(of.x, of.sigma)
    assert torch.equal(D(of.x, of.sigma), plain)
    layers = len(feature_widths(of.D.net))
    scales = {f"{name}_scale": s for name in names if (s := SCALES[scale](layers)) is not None}
    for c in (of.map(), torch.zeros_like(of.map()), torch.ones_like(of.map()), of.map(rows=1)):
        assert torch.equal(D.given(**dict.fromkeys(names, c), **scales)(of.x, of.sigma), plain)
    learnt = controlled(of.of(), **{name: of.control(seed=k, learnt=True) for k, name in enumerate(names)})
    with torch.no_grad():
        moved = (learnt.given(**dict.fromkeys(names, of.map()), **scales)(of.x, of.sigma) - plain).abs().max()
    assert float(moved) > 1e-2 * float(plain.abs().max())  # so the comparison sees a control that does something


def test_at_step_0_in_half_precision_and_with_channels_last_too():
    of = base("text")
    net = channels_last(copy.deepcopy(of.D.net), "cpu")
    D = replace(of.of(), net=net)
    C = controlled(D, edge=control_of(net)).given(edge=of.map())
    assert torch.equal(C(of.x, of.sigma), D(of.x, of.sigma))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(C(of.x, of.sigma), D(of.x, of.sigma))


@kinds
def test_the_copy_is_the_encoder_and_the_network_is_left_as_it_is(kind):
    of = base(kind)
    before = {name: p.clone() for name, p in of.D.net.named_parameters()}
    control = of.control()
    own = dict(getattr(of.D.net, "unet", of.D.net).named_parameters())
    for name, p in control.copy.named_parameters():
        assert torch.equal(p, own[name]) and p.data_ptr() != own[name].data_ptr() and p.requires_grad
    assert sum(p.numel() for p in control.copy.parameters()) < sum(p.numel() for p in own.values())
    assert [Z.out_channels for Z in control.zeros] == list(feature_widths(of.D.net)) == list(control.copy.widths)
    for name, p in of.D.net.named_parameters():
        assert torch.equal(p, before[name]) and not p.requires_grad


@kinds
def test_the_features_are_what_the_decoder_is_given(kind):
    """Residuals equal to minus the features leave the decoder nothing: it then says the same of any x."""
    of = base(kind, F64)
    time = of.D.c_noise(of.sigma).to(F64)
    text = of.given[0]

    def emptied(x):
        features = of.control().copy.encode(x, time, **text)
        assert [f.shape[1] for f in features] == list(feature_widths(of.D.net))
        return of.D.net(x, time, residuals=[-f for f in features], **text)

    assert_close(emptied(of.x), emptied(normal(*of.x.shape, seed=9)), rtol=0, atol=1e-9)
    difference = of.D.net(of.x, time, **text) - of.D.net(normal(*of.x.shape, seed=9), time, **text)
    assert float(difference.abs().max()) > 1e-2


def test_the_start_of_the_hint_encoder_is_a_function_of_the_seed():
    of = base("text")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (of.control(seed=seed).hint.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- learning ------------------------------------------------------------------------------------------------------------


def test_the_zero_convolution_learns_though_it_is_zero():
    """y = W f + b: dL/dW = sum over pixels of (dL/dy) f^T is not 0 where W is; dL/df = W^T dL/dy is, until W has moved."""
    Z = zero(nn.Conv2d(3, 4, 1)).double()
    f, g = normal(B, 3, 5, 5, seed=1).requires_grad_(), normal(B, 4, 5, 5, seed=2)
    (Z(f) * g).sum().backward()
    assert_close(Z.weight.grad[:, :, 0, 0], torch.einsum("bohw,bihw->oi", g, f), rtol=1e-12, atol=1e-12)
    assert_close(Z.bias.grad, g.sum((0, 2, 3)), rtol=1e-12, atol=1e-12)
    assert float(Z.weight.grad.abs().min()) > 0 and not f.grad.any()


@kinds
def test_the_first_step_moves_the_zero_convolutions_alone(kind):
    """Step 1: Theta_z2. Step 2: also the copy and Theta_z1, the hint's last. Step 3: all. Never the locked network."""
    of = base(kind)
    before = copy.deepcopy(of.D.net.state_dict())
    control = of.control()
    C = controlled(of.of(), edge=control).given(edge=of.map())
    optimizer = torch.optim.Adam(control.parameters(), lr=1e-2)
    x0, eps = normal(*of.x.shape, seed=8).float(), normal(*of.x.shape, seed=9).float()
    parts = {
        "zeros": list(control.zeros.parameters()),
        "copy": list(control.copy.parameters()),
        "Theta_z1": list(control.hint.conv_out.parameters()),
        "E": [p for name, p in control.hint.named_parameters() if not name.startswith("conv_out")],
    }
    assert sum(map(len, parts.values())) == len(list(control.parameters()))
    for learning in ({"zeros"}, {"zeros", "copy", "Theta_z1"}, set(parts)):
        start = {name: [p.detach().clone() for p in part] for name, part in parts.items()}
        optimizer.zero_grad()
        denoising_loss(C, x0, of.sigma, eps, "v").mean().backward()
        optimizer.step()
        for name, part in parts.items():
            assert all(bool(p.grad.any()) == (name in learning) for p in part), name
            assert all(torch.equal(p, old) != (name in learning) for p, old in zip(part, start[name], strict=True)), name
    assert all(torch.equal(value, before[name]) for name, value in of.D.net.state_dict().items())
    assert all(p.grad is None for p in of.D.net.parameters())


@kinds
def test_the_gradient_of_every_zero_convolution_is_its_closed_form(kind):
    of = base(kind, F64)
    control = of.control()
    kept = {}
    for k, Z in enumerate(control.zeros):
        Z.register_forward_hook(lambda _, inputs, y, k=k: (y.retain_grad(), kept.update({k: (inputs[0].detach(), y)}))[0])
    C = controlled(of.of(), edge=control).given(edge=of.map())
    denoising_loss(C, normal(*of.x.shape, seed=8), of.sigma, normal(*of.x.shape, seed=9), "v").mean().backward()
    for k, Z in enumerate(control.zeros):
        f, y = kept[k]
        expected = torch.einsum("bohw,bihw->oi", y.grad, f)
        assert_close(Z.weight.grad[:, :, 0, 0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        assert float(Z.weight.grad.abs().max()) > 0 and not Z.weight.any()


# --- scales --------------------------------------------------------------------------------------------------------------


@kinds
def test_scale_0_takes_a_control_away_and_scales_multiply_residuals(kind):
    of = base(kind)
    D = controlled(of.of(), edge=of.control(learnt=True)).given(edge=of.map())
    r, layers = residuals_of(D, of), len(D.net.controls["edge"].zeros)
    assert all(bool(one.any()) for one in r)
    for nothing in (torch.zeros(1), torch.zeros(B), torch.zeros(1, layers), torch.zeros(B, layers)):
        assert torch.equal(D.given(edge_scale=nothing)(of.x, of.sigma), of.of()(of.x, of.sigma))
    of_layer, of_both = torch.linspace(-1, 2, layers)[None], torch.linspace(-1, 2, B * layers).view(B, layers)
    for s in (torch.tensor([0.5]), torch.tensor([0.5, -2.0]), of_layer, of_both):
        each = s[:, None].expand(-1, layers) if s.ndim == 1 else s
        for k, (found, one) in enumerate(zip(residuals_of(D.given(edge_scale=s), of), r, strict=True)):
            assert torch.equal(found, each[:, k, None, None, None] * one)
    alone = D.given(edge_scale=torch.tensor([0.0, 1.0]))(of.x, of.sigma)  # a scale is its sample's alone
    apart = torch.stack([of.of()(of.x, of.sigma)[0], D(of.x, of.sigma)[1]])
    assert_close(alone, apart, rtol=1e-5, atol=1e-5)


@kinds
def test_controls_add_and_one_that_is_not_given_is_not_evaluated(kind, calls_of):
    of = base(kind)
    controls = {"edge": of.control(0, learnt=True), "depth": of.control(1, learnt=True)}
    D = controlled(of.of(), **controls)
    told = {"edge": of.map(1), "depth": of.map(2), "edge_scale": torch.tensor([0.3]), "depth_scale": torch.tensor([2.0])}
    one, other = (residuals_of(D.given(**{name: told[name], f"{name}_scale": told[f"{name}_scale"]}), of) for name in controls)
    for total, a, b in zip(residuals_of(D.given(**told), of), one, other, strict=True):
        assert torch.equal(total, a + b)
    assert residuals_of(D, of) is None
    in_turn = controlled(controlled(of.of(), edge=controls["edge"]).given(edge=of.map(1)), depth=controls["depth"])
    found = in_turn.given(**{name: value for name, value in told.items() if name != "edge"})(of.x, of.sigma)
    assert torch.equal(found, D.given(**told)(of.x, of.sigma))
    calls = calls_of(D)
    for given, evaluated in (({}, 0), ({"edge": None}, 0), ({"edge_scale": torch.ones(1)}, 0), ({"edge": of.map()}, 1)):
        calls.controls = 0
        D.given(**given)(of.x, of.sigma)
        assert calls.controls == 2 * evaluated  # the hint encoder and the copy, once each
    assert torch.equal(D.given(depth=None, edge=told["edge"])(of.x, of.sigma), D.given(edge=told["edge"])(of.x, of.sigma))


# --- guidance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "text"])
@pytest.mark.parametrize("halves", ["both", "one", "guess"])
def test_guidance_is_one_call_of_network_and_copy_and_equals_two(kind, halves, calls_of):
    of = base(kind, F64)
    D = controlled(of.D, edge=of.control(learnt=True))
    layers = len(D.net.controls["edge"].zeros)
    scale = {"both": torch.ones(1), "one": torch.ones(1), "guess": guess(layers)}[halves].double()
    reference = scale if halves == "both" else torch.zeros_like(scale)
    pair = [of.of(k, D).given(edge=of.map(rows=1), edge_scale=s) for k, s in enumerate((scale, reference))]
    apart = [one(of.x, of.sigma) for one in pair]
    if halves != "both":
        assert torch.equal(apart[1], of.of(1)(of.x, of.sigma))
    calls = calls_of(D)
    together = batched(*pair)(of.x, of.sigma)
    assert calls.net == 1 and calls.rows == [2 * B] and calls.controls == 2
    for found, expected in zip(together, apart, strict=True):
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
    guided = cfg(*pair, 3.0)(of.x, of.sigma)
    assert calls.net == 2
    assert_close(guided, apart[1] + 3.0 * (apart[0] - apart[1]), rtol=1e-9, atol=1e-9)


def test_guess_mode_and_weights_by_resolution():
    for layers in (5, 13):
        found = guess(layers)
        assert found.shape == (1, layers)
        assert_close(found[0, [0, -1]], torch.tensor([0.1, 1.0]), rtol=1e-6, atol=0)
        ratios = found[0, 1:] / found[0, :-1]
        assert_close(ratios, torch.full_like(ratios, 10 ** (1 / (layers - 1))), rtol=1e-5, atol=0)
    assert_close(guess(4, scale=0.5, lowest=0.5), 0.5 * torch.tensor([[0.5, 0.5 ** (2 / 3), 0.5 ** (1 / 3), 1.0]]))
    assert torch.equal(resolution_weights([8, 8, 8, 4, 4, 4]), torch.tensor([[1.0, 1, 1, 2, 2, 2]]))
    assert torch.equal(resolution_weights([64, 32, 8], finest=64), torch.tensor([[1.0, 2, 8]]))
    r = [normal(B, 3, 2, 2, seed=k) for k in range(2)]
    assert scaled(r, None) is r
