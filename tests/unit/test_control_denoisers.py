"""A controlled Denoiser is one like any other: samplers, solvers, distillation and LoRA take it; mistakes are named."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from course_lib.denoisers import from_edm
from course_lib.devices import SampleNoise
from course_lib.distill import sds
from course_lib.guidance import cfg
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.nets import lora
from course_lib.nets.control import control_of, controlled, feature_widths, fit_map
from course_lib.operators import Mask
from course_lib.posterior import dps, null_space, pigdm
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim
from tests import pipelines
from tests.control_bases import F64, KINDS, B, Base, base
from tests.draws import noise_of, normal

kinds = pytest.mark.parametrize("kind", KINDS)
SIGMAS = karras(4, 0.05, 10.0)


def starts(of: Base) -> torch.Tensor:
    return SampleNoise(3).start(tuple(of.x.shape), float(SIGMAS[0]), dtype=of.x.dtype)


@kinds
def test_samplers_take_it(kind):
    of = base(kind)
    first, later = (controlled(of.of(), edge=of.control(learnt=learnt)).given(edge=of.map()) for learnt in (False, True))
    for step in (ddim, dpm_solver_pp_2m):
        plain = sample(of.of(), starts(of), SIGMAS, step)
        assert torch.equal(sample(first, starts(of), SIGMAS, step), plain)
        assert float((sample(later, starts(of), SIGMAS, step) - plain).abs().max()) > 1e-2
        assert torch.equal(sample(later.given(edge_scale=torch.zeros(1)), starts(of), SIGMAS, step), plain)


def test_solvers_of_inverse_problems_take_it():
    """At step 0 a gradient adds the zeros of the copy in another order, so it is equal to rounding."""
    of = base("text", F64)
    A = Mask.half(tuple(of.x.shape[1:]), "left")
    y = A(normal(B, *of.x.shape[1:], seed=11))
    first, later = (controlled(of.of(), edge=of.control(learnt=learnt)).given(edge=of.map()) for learnt in (False, True))
    assert_close(A(sample(null_space(later, A, y), starts(of), SIGMAS)), y, rtol=0, atol=1e-12)  # D' is y where it was observed
    for solved in (
        lambda D: sample(null_space(D, A, y), starts(of), SIGMAS),
        lambda D: sample(pigdm(D, A, y, 0.1), starts(of), SIGMAS),
        lambda D: sample(D, starts(of), SIGMAS, dps(ddim, A, y)),
    ):
        plain = solved(of.of())
        assert_close(solved(first), plain, rtol=0, atol=1e-9)
        assert float((solved(later) - plain).abs().max()) > 1e-2


def test_gradients_pass_through_the_copy():
    """J^T v of the controlled Denoiser against central differences, which err by O(h^2) = 1e-8 of third derivatives near 1."""
    of = base("text", F64)
    D = controlled(of.of(), edge=of.control(learnt=True)).given(edge=of.map())
    v, direction, h = normal(*of.x.shape, seed=12), normal(*of.x.shape, seed=13), 1e-4
    x = of.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((D(x, of.sigma) * v).sum(), x)
    with torch.no_grad():
        ahead, behind = ((D(of.x + s * h * direction, of.sigma) * v).sum() for s in (1, -1))
    assert float((slope * direction).sum()) == pytest.approx(float((ahead - behind) / (2 * h)), rel=1e-5)


def test_score_distillation_takes_it():
    """SDS pulls by w (x0 - D(x, sigma)) / sigma."""
    of = base("text")
    D = controlled(of.of(), edge=of.control(learnt=True)).given(edge=of.map())
    x0, eps = normal(*of.x.shape, seed=14).float(), noise_of(15)(of.x)
    sigma = of.sigma.float()[:, None, None, None]
    with torch.no_grad():
        expected = (x0 - D(x0 + sigma * eps, of.sigma)) / sigma
        found = sds(D)(x0, of.sigma, noise_of(15))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_control_stands_beside_a_lora_of_the_same_network():
    """The copy is of the network without the LoRA; at step 0 the output is that of the network with it, bit for bit."""
    of = base("text")
    tuned = lora.with_lora(of.D.net, 4)
    for k, one in enumerate(lora.loras(tuned).values()):
        one.up.data = normal(*one.up.shape, seed=k).float()
    D, first, later = replace(of.of(), net=tuned), of.control(), of.control(learnt=True)
    assert torch.equal(controlled(D, edge=first).given(edge=of.map())(of.x, of.sigma), D(of.x, of.sigma))
    with_both = controlled(D, edge=later).given(edge=of.map())
    without_style = controlled(of.of(), edge=later).given(edge=of.map())
    assert float((with_both(of.x, of.sigma) - without_style(of.x, of.sigma)).detach().abs().max()) > 1e-3
    with lora.without_lora(tuned):
        assert torch.equal(with_both(of.x, of.sigma), without_style(of.x, of.sigma))


# --- mistakes ------------------------------------------------------------------------------------------------------------


def refused(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_maps_that_are_none_are_refused_in_one_line():
    of = base("text")
    D, c = controlled(of.of(), edge=of.control()), of.map()
    refused(lambda: D.given(edge=c[:, :1]), r"edge = \(2, 1, 64, 64\); expected a condition map \(B, 3, H, W\) in \[0, 1\]")
    refused(lambda: D.given(edge=c[0]), r"edge = \(3, 64, 64\); expected a condition map \(B, 3, H, W\)")
    refused(lambda: D.given(edge="lines"), r"edge = str; expected a condition map")
    refused(lambda: D.given(edge=2 * c - 1), r"edge has values from -.* to .*; expected .* map it by \(edge \+ 1\) / 2")
    refused(lambda: D.given(edge=255 * c), r"edge has values from .* to 25.*; expected .* map it by edge / 255")
    refused(lambda: D.given(edge=c - 5), "map it by clamp")
    for kind in (torch.uint8, torch.bool):
        refused(
            lambda kind=kind: D.given(edge=c.to(kind)), rf"edge has the type {kind}; expected floating-point numbers in \[0, 1\]"
        )
    for bad in (torch.nan, torch.inf):
        refused(lambda bad=bad: D.given(edge=torch.where(c > 0.5, bad, c)), "edge has a value that is not finite")
    learnt = controlled(of.of(), edge=of.control(learnt=True))
    empty = learnt.given(edge=torch.zeros_like(c))(of.x, of.sigma)  # an empty canvas is a map
    assert float((empty - of.of()(of.x, of.sigma)).detach().abs().max()) > 1e-2
    assert torch.equal(learnt.given(edge=torch.zeros_like(c).double())(of.x, of.sigma), empty)


def test_maps_that_do_not_fit_x_are_refused_in_one_line():
    of = base("text")
    D, c = controlled(of.of(), edge=of.control()), of.map()

    def call(**given):
        return lambda: D.given(**given)(of.x, of.sigma)

    for wrong in (c[..., :56], c[:, :, :63], F.interpolate(c, 128)):
        size = " x ".join(map(str, wrong.shape[-2:]))
        refused(call(edge=wrong), rf"{size} pixels; expected 64 x 64 for x of shape \(2, 4, 8, 8\).*fit_map\(c, \(64, 64\)\)")
    refused(call(edge=of.map(rows=3)), r"edge = \(3, 3, 64, 64\) for 2 samples; expected 2 rows, or one for all")
    refused(call(edge=c, edge_scale=torch.ones(3)), r"edge_scale = \(3,\) for 2 samples; expected 2 rows, or one for all")
    pixels = base("classes")
    D = controlled(pixels.of(), edge=pixels.control())
    refused(lambda: D.given(edge=c)(pixels.x, pixels.sigma), r"64 x 64 pixels; expected 8 x 8 for x of shape \(2, 2, 8, 8\)")


def test_scales_that_are_none_are_refused_in_one_line():
    of = base("text")
    D = controlled(of.of(), edge=of.control()).given(edge=of.map())
    layers = len(feature_widths(of.D.net))
    for bad in (0.5, torch.tensor(0.5), torch.ones(B, layers + 1), torch.ones(B, layers, 1)):
        refused(lambda bad=bad: D.given(edge_scale=bad), rf"edge_scale = .*; expected a tensor \(B,\), or \(B, {layers}\)")


def test_controls_that_do_not_fit_the_network_are_refused_in_one_line():
    of, other = base("text"), base("classes")
    control = of.control()
    refused(lambda: controlled(of.D), "no control was given; expected at least one")
    refused(lambda: controlled(other.D, edge=control), r"control 'edge' was made for features of \(32, .* network has \(16, ")
    refused(lambda: controlled(other.D, label=other.control()), "control 'label' takes 'label', a condition that there is")
    refused(lambda: controlled(of.D, timestep_cond=control), "control 'timestep_cond' takes 'timestep_cond'")
    refused(lambda: controlled(of.D, edge=control, edge_scale=control), "control 'edge_scale' takes 'edge_scale'")
    refused(lambda: controlled(of.D, edge_scale=control, edge=control), "control 'edge' takes 'edge_scale'")
    refused(lambda: controlled(controlled(of.D, edge=control), edge=control), "control 'edge' takes 'edge'")
    refused(lambda: controlled(cfg(of.of(), of.of(1), 3.0), edge=control), "D is a function; expected a NetworkDenoiser")
    refused(lambda: controlled(from_edm(nn.Conv2d(3, 3, 1)), edge=control), "net is a Conv2d; expected a UNet")
    refused(lambda: control_of(nn.Conv2d(3, 3, 1)), "net is a Conv2d; expected a UNet")
    D = controlled(of.D, edge=control)
    refused(lambda: D.given(depth=of.map()), "condition 'depth' is not taken by the network; expected one of .*edge, edge_scale")
    told = controlled(other.D, edge=other.control())
    refused(lambda: told.given(label=torch.tensor([9])), "label = 9; expected from 0 to 2")


def test_a_network_that_is_told_more_than_text_is_refused():
    refused(lambda: control_of(pipelines.stable_diffusion_xl().unet), "net has addition_embed_type = 'text_time'; expected None")


# --- maps of another size --------------------------------------------------------------------------------------------------


def test_a_map_is_fitted_with_a_warning_that_says_so():
    c = base("text").map()
    for size, shape in ((32, (32, 32)), ((48, 80), (48, 80)), (128, (128, 128))):
        with pytest.warns(UserWarning, match=rf"64 x 64 pixels and was resized to {shape[0]} x {shape[1]}") as said:
            found = fit_map(c, size)
        assert len(said) == 1 and said[0].filename == __file__
        assert found.shape == (B, 3, *shape) and float(found.min()) >= 0 and float(found.max()) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_map(c, 64) is c and fit_map(c, (64, 64)) is c
    with pytest.warns(UserWarning, match="was resized"):
        assert float(fit_map(torch.full_like(c, 1.0005), 32).max()) == 1


@pytest.mark.filterwarnings("ignore:c has")
def test_a_fitted_map_is_averaged_not_sampled():
    """Constants stay; the mean of a map stays where it shrinks by a whole number; a thin line does not vanish."""
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert_close(fit_map(flat, 24), torch.full((1, 3, 24, 24), 0.3))
    line = torch.zeros(1, 3, 64, 64)
    line[..., 21] = 1
    assert float(fit_map(line, 16).mean()) == pytest.approx(1 / 64, rel=1e-5)
    refused(lambda: fit_map(2 * line - 1, 16), r"map it by \(c \+ 1\) / 2")
    refused(lambda: fit_map(line[0], 16), r"c = \(3, 64, 64\); expected a condition map")
