"""Guidance against exact answers: Bayes' rule on mixtures, the CFG field and its variants, and what each refuses."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib.denoisers import from_edm, from_eps, from_flow, from_v, from_x0
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.guidance import (
    apg,
    bayes_classifier,
    cfg,
    cfg_pp,
    cfg_rescaled,
    classifier_guidance,
    interval,
    noise_blind,
    reader_guidance,
)
from course_lib.sample import sample
from course_lib.schedules import Linear, karras
from course_lib.steps import ddim
from tests.draws import level, normal

F64 = torch.float64
LEVELS = (0.05, 0.5, 2.0, 20.0)
PARTS = (
    Mixture(torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[1.0, 0.5], [2.0, -1.0]]), 0.1 * torch.eye(2).expand(2, 2, 2)),
    Mixture.gaussian(torch.tensor([-1.0, 0.0]), torch.tensor([[0.3, 0.1], [0.1, 0.2]])),
    Mixture.gaussian(torch.tensor([0.2, 1.5]), torch.tensor([[0.05, 0.0], [0.0, 0.4]])),
)
"""Three classes, one of them itself a mixture of two."""
SHARES = (0.5, 0.2, 0.3)
WHOLE = Mixture(
    torch.cat([share * part.weights for share, part in zip(SHARES, PARTS, strict=True)]),
    torch.cat([part.means for part in PARTS]),
    torch.cat([part.covs for part in PARTS]),
)
EXACT = bayes_classifier(PARTS, SHARES)


def points(sigma: float, n: int = 64) -> torch.Tensor:
    return WHOLE.sample(n, generator(7), sigma)


# --- Bayes' rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", LEVELS)
def test_the_exact_classifier_is_the_share_of_each_class(sigma):
    x = points(sigma)
    shares = WHOLE.responsibilities(x, sigma)  # of four components, the first two of class 0
    expected = torch.stack([shares[:, :2].sum(1), shares[:, 2], shares[:, 3]], 1)
    assert_close(EXACT(x, level(sigma)).softmax(1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("label", [0, 1, 2])
def test_bayes_the_guided_score_at_w_1_is_the_conditional_score(sigma, label):
    """Both are exact in float64; the rounding of sigma^2 grad, of size up to sigma, is under 1e-12 sigma."""
    x = points(sigma)
    guided = classifier_guidance(WHOLE.denoiser, EXACT, label, 1.0)(x, level(sigma))
    assert_close(guided, PARTS[label].denoiser(x, sigma), rtol=0, atol=1e-9)
    assert float((guided - WHOLE.denoiser(x, sigma)).abs().max()) > 1e-3  # and it is not D as it was


def test_a_label_for_each_row_and_a_level_for_each_row():
    sigma, label = torch.tensor([0.1, 0.5, 2.0, 8.0], dtype=F64), torch.tensor([0, 1, 2, 1])
    x = normal(4, 2)
    guided = classifier_guidance(WHOLE.denoiser, EXACT, label, 1.0)(x, sigma)
    for i, c in enumerate(label.tolist()):
        assert_close(guided[i : i + 1], PARTS[c].denoiser(x[i : i + 1], sigma[i]), rtol=0, atol=1e-9)


def test_without_weight_it_is_the_denoiser_itself():
    assert classifier_guidance(WHOLE.denoiser, EXACT, 0, 0) == WHOLE.denoiser
    assert reader_guidance(WHOLE.denoiser, lambda x0: x0, 0, 0) == WHOLE.denoiser


@pytest.mark.parametrize("w", [0.5, 4.0])
def test_a_classifier_with_weight_w_is_cfg_with_weight_w(w):
    """D + w sigma^2 grad log p(c | x) = D + w (D_c - D), since log p(c | x) = log p_c - log p + const."""
    x, sigma = points(0.8), level(0.8)
    guided = classifier_guidance(WHOLE.denoiser, EXACT, 1, w)(x, sigma)
    assert_close(guided, cfg(PARTS[1].denoiser, WHOLE.denoiser, w)(x, sigma), rtol=0, atol=1e-9)


def test_gradients_are_opened_inside_alone_and_given_to_a_caller_who_asks():
    x, D = points(0.8, 5), classifier_guidance(WHOLE.denoiser, EXACT, 1, 2.0)
    with torch.no_grad():
        plain = D(x, level(0.8))
    assert not plain.requires_grad and not x.requires_grad
    assert not D(x, level(0.8)).requires_grad
    # the derivative of the guided Denoiser, as likelihoods need it: by autograd and by differences
    at, along, h = x.clone().requires_grad_(), normal(5, 2, seed=3), 1e-5
    (found,) = torch.autograd.grad((D(at, level(0.8)) * along).sum(), at)
    step = torch.zeros_like(x)
    step[:, 0] = h
    expected = ((D(x + step, level(0.8)) - D(x - step, level(0.8))) * along).sum(1) / (2 * h)
    assert_close(found[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_a_reader_of_one_gaussian_is_exact_where_the_posterior_mean_decides():
    """With logits linear in x0, log p(c | D(x)) has the gradient J^T (a_c - sum_k p_k a_k): the chain rule through D."""
    gauss = Mixture.gaussian(torch.tensor([0.4, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    A, x, sigma = normal(3, 2, seed=5), normal(6, 2), 0.7
    J = gauss.covs[0] @ torch.linalg.inv(gauss.covs[0] + sigma**2 * torch.eye(2, dtype=F64))  # dD/dx, symmetric here or not
    x0 = gauss.denoiser(x, sigma)
    p = (x0 @ A.T).softmax(1)
    expected = x0 + 3.0 * sigma**2 * (A[1] - p @ A) @ J
    guided = reader_guidance(gauss.denoiser, lambda x0: x0 @ A.T, 1, 3.0)(x, level(sigma))
    assert_close(guided, expected, rtol=0, atol=1e-10)
    assert not guided.requires_grad


def test_a_reader_calls_the_network_once():
    calls = []

    def D(x, sigma):
        calls.append(1)
        return 0.5 * x

    reader_guidance(D, lambda x0: x0, 0, 1.0)(normal(3, 2), level(0.5))
    assert len(calls) == 1


def test_a_blind_reader_hears_no_level():
    x = normal(4, 2)
    assert torch.equal(noise_blind(lambda x: 2 * x)(x, level(3.0)), 2 * x)


@pytest.mark.parametrize("guide", ["classifier", "reader"])
def test_a_classifier_that_breaks_is_named_in_one_line(guide):
    x = normal(4, 2)
    broken = lambda x: torch.where(x > 0, x, torch.sqrt(x))  # nan below 0
    D = lambda x, sigma: x
    guided = classifier_guidance(D, noise_blind(broken), 0, 5.0) if guide == "classifier" else reader_guidance(D, broken, 0, 5.0)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at sigma = 2.5 with w = 5; .*lower w") as caught:
        guided(x, level(2.5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [-1, 3, torch.tensor([0, 1, 2, 7])])
def test_a_class_that_the_classifier_lacks_is_refused(label):
    with pytest.raises(ValueError, match=r"label = (-1|3|7); expected a class from 0 to 2"):
        classifier_guidance(WHOLE.denoiser, EXACT, label, 1.0)(normal(4, 2), level(0.5))


def test_shares_that_do_not_fit_are_refused():
    for weights in ((0.5, 0.5), (0.5, 0.5, 0.0)):
        with pytest.raises(ValueError, match="expected 3 positive numbers"):
            bayes_classifier(PARTS, weights)


# --- the CFG field ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("w", [-2.0, 0.0, 0.3, 1.0, 3.0, 12.0])
def test_the_field_is_the_gradient_of_the_mixed_log_densities(sigma, w):
    """(D - x) / sigma^2 = grad [(1 - w) log p_ref(x; sigma) + w log p_cond(x; sigma)], of the noised marginals, to 1e-6.

    The densities' slopes come from autograd of `log_prob`, the Denoisers from their own closed form; both are float64, and
    w (D_cond - D_ref) / sigma^2 loses about 1e-16 w |x| / sigma^2 <= 1e-12.
    """
    cond, ref = PARTS[0], WHOLE
    x = points(sigma).requires_grad_()
    (slope,) = torch.autograd.grad(((1 - w) * ref.log_prob(x, sigma) + w * cond.log_prob(x, sigma)).sum(), x)
    field = (cfg(cond.denoiser, ref.denoiser, w)(x.detach(), level(sigma)) - x.detach()) / sigma**2
    assert_close(field, slope, rtol=0, atol=1e-6)
    mean = cfg(ref.denoiser, cond.denoiser, w)(x.detach(), level(sigma))  # the two exchanged: the usual mistake
    if w != 0.5:
        assert float(((mean - x.detach()) / sigma**2 - slope).abs().max()) > 1e-3


def test_a_negative_prompt_is_cfg_from_the_condition_that_is_not_wanted():
    """D_neg + w (D - D_neg), and fewer samples of what is not wanted: the exact classifier counts them."""
    wanted, unwanted = PARTS[1], PARTS[0]
    x = points(2.0, 400)
    D = cfg(wanted.denoiser, unwanted.denoiser, 2.0)
    assert_close(D(x, level(2.0)), 2 * wanted.denoiser(x, 2.0) - unwanted.denoiser(x, 2.0), rtol=0, atol=1e-12)
    share = lambda D: float(EXACT(sample(D, 10.0 * normal(500, 2), karras(20, 0.05, 10.0)), level(0.05)).softmax(1)[:, 0].mean())
    plain, less, least = (share(cfg(WHOLE.denoiser, unwanted.denoiser, w)) for w in (1.0, 2.0, 5.0))
    assert abs(plain - SHARES[0]) < 4.5 * (0.25 / 500) ** 0.5 + 0.02  # 4.5 standard errors, and 20 steps
    assert less < plain / 2 and least < less / 2


# --- scale as a function of the level ---------------------------------------------------------------------------------


class Counting(nn.Module):
    """A network that counts its calls and their rows."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x, time, label):
        self.rows.append(len(x))
        return 0.3 * x + label.to(x)[:, None]


def test_a_scale_may_be_a_function_of_sigma():
    x = points(0.5, 3)
    w = lambda sigma: 1 + sigma
    for sigma in (0.5, 2.0):
        expected = cfg(PARTS[0].denoiser, WHOLE.denoiser, 1 + sigma)(x, level(sigma))
        assert_close(cfg(PARTS[0].denoiser, WHOLE.denoiser, w)(x, level(sigma)), expected, rtol=0, atol=1e-12)


def test_the_interval_guides_within_and_is_the_conditional_model_without():
    w = interval(4.0, 0.3, 2.0)
    assert [float(w(level(s))) for s in (0.1, 0.3, 0.31, 2.0, 2.1)] == [1, 1, 4, 4, 1]
    x, cond, ref = normal(4, 2), PARTS[0], WHOLE
    D, full = cfg(cond.denoiser, ref.denoiser, w), cfg(cond.denoiser, ref.denoiser, 4.0)
    for sigma, expected in ((0.1, cond.denoiser), (1.0, full), (5.0, cond.denoiser)):
        assert_close(D(x, level(sigma)), expected(x, level(sigma)), rtol=0, atol=1e-12)
    together = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=F64)  # one level a row
    rows = [(cond.denoiser, full)[inside](x[i : i + 1], together[i]) for i, inside in enumerate((0, 1, 1, 0))]
    assert_close(D(x, together), torch.cat(rows), rtol=0, atol=1e-12)


def test_outside_the_interval_a_step_costs_one_evaluation():
    net = Counting()
    D = from_edm(net)
    guided = cfg(D.given(label=torch.ones(3)), D.given(label=torch.zeros(3)), interval(4.0, 0.3, 2.0))
    for sigma in (5.0, 1.0, 0.1):
        guided(normal(3, 2), level(sigma))
    assert net.rows == [3, 6, 3]


@pytest.mark.parametrize(("low", "high"), [(2.0, 0.3), (0.3, 0.3), (-1.0, 2.0), (math.nan, 1.0)])
def test_an_interval_that_is_none_is_refused(low, high):
    with pytest.raises(ValueError, match="expected noise levels with 0 <= low < high"):
        interval(4.0, low, high)


# --- rescale, APG, CFG++ ----------------------------------------------------------------------------------------------

LABELS = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=F64)
NULL = torch.zeros(4, dtype=F64)
LINEAR = Linear()
ADAPTERS = {
    "eps": lambda net: from_eps(net, LINEAR.t_of_sigma),
    "v": lambda net: from_v(net, LINEAR.t_of_sigma),
    "x0": lambda net: from_x0(net, LINEAR.t_of_sigma),
    "flow": from_flow,
    "edm": from_edm,
}


class Wavy(nn.Module):
    """A smooth network of x, time and label, so that each sample's numbers spread."""

    def forward(self, x, time, label):
        return torch.sin(x * (1 + label[:, None])) + label[:, None] * x + 0.1 * label[:, None]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_is_what_diffusers_does_to_the_networks_output(adapter, phi):
    """Their rescale_noise_cfg on the raw outputs, then the adapter's line, for each of the predictions."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    net, w, sigma, x = Wavy(), 6.0, level(1.7), 2 * normal(4, 8)
    D = ADAPTERS[adapter](net)
    cond, ref = D.given(label=LABELS), D.given(label=NULL)
    c_skip, c_out, c_in = D.coefficients(sigma)
    said, none = (net(c_in * x, D.c_noise(sigma), label) for label in (LABELS, NULL))
    F = rescale_noise_cfg(none + w * (said - none), said, guidance_rescale=phi)
    found = cfg_rescaled(cond, ref, w, phi)(x, sigma)
    assert_close(found, c_skip * x + c_out * F, rtol=1e-10, atol=1e-10)
    assert phi == 0 or float((found - cfg(cond, ref, w)(x, sigma)).abs().max()) > 0.05


def test_rescaling_is_another_method_for_each_prediction():
    """It is the *output* that is scaled: the same beliefs rescaled as noise, as velocity or as pictures are three answers."""
    x, sigma, w = 3 * normal(5, 2), level(1.2), 5.0
    skips = (torch.ones_like, lambda s: 1 / (1 + s**2), torch.zeros_like)
    found = [cfg_rescaled(PARTS[0].denoiser, WHOLE.denoiser, w, 1.0, skip)(x, sigma) for skip in skips]
    for a in range(3):
        for b in range(a):
            assert float((found[a] - found[b]).abs().max()) > 0.05
    picture, cond = found[2], PARTS[0].denoiser(x, 1.2)
    assert_close(picture.std(1), cond.std(1), rtol=1e-9, atol=1e-9)  # the spread is the conditional's own


def test_rescaling_has_its_endpoints_and_says_what_it_needs():
    D = cfg_rescaled(PARTS[0].denoiser, WHOLE.denoiser, 5.0, 0.0, torch.ones_like)
    x = normal(5, 2)
    assert_close(D(x, level(0.6)), cfg(PARTS[0].denoiser, WHOLE.denoiser, 5.0)(x, level(0.6)), rtol=0, atol=1e-12)
    assert cfg_rescaled(PARTS[0].denoiser, WHOLE.denoiser, 1.0, 0.7, torch.ones_like) == PARTS[0].denoiser
    with pytest.raises(ValueError, match="expected c_skip"):
        cfg_rescaled(PARTS[0].denoiser, WHOLE.denoiser, 5.0)
    with pytest.raises(ValueError, match="phi = 1.5"):
        cfg_rescaled(PARTS[0].denoiser, WHOLE.denoiser, 5.0, 1.5, torch.ones_like)


@pytest.mark.parametrize(("eta", "radius"), [(0.0, math.inf), (0.5, 0.4), (1.0, 1.0)])
def test_apg_is_diffusers_projection(eta, radius):
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    x, sigma, w = normal(6, 2), level(0.9), 4.0
    cond, ref = PARTS[0].denoiser(x, sigma), WHOLE.denoiser(x, sigma)
    threshold = 0.0 if math.isinf(radius) else radius
    theirs = normalized_guidance(cond, ref, w - 1, None, eta, threshold, use_original_formulation=True)
    found = apg(PARTS[0].denoiser, WHOLE.denoiser, w, eta, radius)(x, sigma)
    assert_close(found, theirs, rtol=1e-9, atol=1e-9)


def test_apg_at_its_ends():
    x, sigma = normal(6, 2), level(0.9)
    plain = cfg(PARTS[0].denoiser, WHOLE.denoiser, 4.0)(x, sigma)
    assert_close(apg(PARTS[0].denoiser, WHOLE.denoiser, 4.0, eta=1.0)(x, sigma), plain, rtol=0, atol=1e-10)
    cond = PARTS[0].denoiser(x, sigma)
    moved = apg(PARTS[0].denoiser, WHOLE.denoiser, 4.0)(x, sigma) - cond
    assert_close((moved * cond).sum(1), torch.zeros(6, dtype=F64), rtol=0, atol=1e-10)  # nothing along D_cond
    assert apg(PARTS[0].denoiser, WHOLE.denoiser, 1.0) == PARTS[0].denoiser


@pytest.mark.parametrize(("sigma", "sigma_next"), [(3.0, 1.0), (0.5, 0.45), (0.2, 0.0)])
def test_cfg_pp_is_ddim_with_a_scale_that_grows_as_steps_get_shorter(sigma, sigma_next):
    """x'_cfg = D_ref + v Delta + rho (x - D_ref - v Delta) = x'_++ where v (1 - rho) = w."""
    x, w = normal(6, 2), 0.6
    found, memory = cfg_pp(WHOLE.denoiser, w)(PARTS[0].denoiser, x, level(sigma), level(sigma_next))
    v = w / (1 - sigma_next / sigma)
    expected, _ = ddim(cfg(PARTS[0].denoiser, WHOLE.denoiser, v), x, level(sigma), level(sigma_next))
    assert memory is None
    assert_close(found, expected, rtol=0, atol=1e-10)


def test_cfg_pp_goes_from_the_reference_alone_to_the_conditional_mean():
    x, cond, ref = normal(6, 2), PARTS[0].denoiser, WHOLE.denoiser
    found, _ = cfg_pp(ref, 0.0)(cond, x, level(2.0), level(1.0))
    assert_close(found, ddim(ref, x, level(2.0), level(1.0))[0], rtol=0, atol=1e-12)
    found, _ = cfg_pp(ref, 1.0)(cond, x, level(2.0), level(0.0))
    assert_close(found, cond(x, 2.0), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"w = 7.5; expected a number from 0 to 1"):
        cfg_pp(ref, 7.5)
