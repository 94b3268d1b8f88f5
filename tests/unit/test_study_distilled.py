"""The explorers of score distillation: their runs follow the closed forms, and what they say is measured on what they show."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from course_lib import zoo
from course_lib.devices import SampleNoise, generator
from course_lib.distill import sds
from course_lib.gaussians import Mixture
from course_lib.guidance import cfg
from course_lib.nets.pixels import Pixels
from course_lib.study import distilled_pictures as of_pictures
from course_lib.study.distilled import HEIGHT, NOTHING, WIDTH, DistillExplorer, Setting
from course_lib.study.distilled_pictures import RULES, Distilling, ImageDistillExplorer
from course_lib.types import right
from course_lib.worlds.toys import ring, three_blobs
from tests.shown import REDRAW, SLACK, decode, seconds

VSD = Setting("VSD", NOTHING, 1.0, 3.0, 0.1, True, 0)


@pytest.fixture
def explorer():
    return DistillExplorer(three_blobs())


# --- in the plane --------------------------------------------------------------------------------------------------------


def test_it_draws_what_is_chosen(explorer):
    assert decode(explorer.picture.value).shape[:2] == (HEIGHT, WIDTH)
    assert explorer.main_name == "step"
    explorer.controls["prompt"].value = "A or C"  # without a prompt guidance changes nothing
    changed = {"step": 5, "rule": "VSD", "prompt": "B", "guidance": 3.0, "high": 2.0, "low": 0.3, "annealed": False, "seed": 3}
    for name, value in changed.items():
        before, old = explorer.picture.value, explorer.controls[name].value
        explorer.controls[name].value = value
        assert explorer.message.value == "" and explorer.picture.value != before, name
        explorer.controls[name].value = old
        assert explorer.picture.value == before, name


def test_the_picture_is_a_function_of_the_controls_alone(explorer):
    """No time of a clock is in it, nor what was looked at before: anew, and in another explorer, it is the same byte for byte."""
    before = explorer.picture.value
    explorer.run = explorer._run
    assert explorer.draw(**explorer.values) == before
    assert DistillExplorer(three_blobs()).picture.value == before


def test_sds_on_a_gaussian_has_the_mean_and_variance_of_its_recursion():
    """On N(mu, s^2) the gradient with w = sigma is kappa (x0 - mu) - (1 - kappa) sigma eps, so that each step is linear."""
    s, mu = 0.5, torch.tensor([0.7, -0.4], dtype=torch.float64)
    explorer = DistillExplorer(Mixture.gaussian(mu, s**2 * torch.eye(2)))
    x = explorer.run(Setting("SDS", NOTHING, 1.0, 3.0, 0.1, True, 1))
    shrink, variance = 1.0, explorer.width**2
    for k in range(explorer.STEPS):
        progress = k / (explorer.STEPS - 1)
        lr, sigma = 0.3 * 0.1**progress, 3.0 * (0.1 / 3.0) ** progress
        kappa = sigma**2 / (s**2 + sigma**2)
        shrink *= 1 - lr * kappa
        variance = (1 - lr * kappa) ** 2 * variance + (lr * (1 - kappa) * sigma) ** 2
        if k + 1 in (10, 50, explorer.STEPS):
            n = 2 * explorer.N
            assert float((x[k + 1] - mu).mean(0).abs().max()) < 4 * math.sqrt(variance / explorer.N)
            assert float((x[k + 1] - mu).square().mean()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))
    assert shrink < 1e-6 and math.sqrt(variance) < 0.15 * s  # nothing is left of the start, and little of the spread


def test_annealed_vsd_has_the_parts_of_the_mixture_and_sds_gathers_in_the_heaviest(explorer):
    """Shares within 5 points and spreads within 15 %, for two seeds; those of SDS are nowhere near."""
    for seed in (0, 1):
        found = explorer.parts(explorer.run(VSD._replace(seed=seed))[-1])
        assert_close(found.shares, explorer.exact_shares(NOTHING), atol=0.05, rtol=0)
        assert_close(found.spreads, torch.ones(3, dtype=torch.float64), atol=0.15, rtol=0)
        found = explorer.parts(explorer.run(VSD._replace(rule="SDS", seed=seed))[-1])
        assert found.shares[0] > 0.75 and found.spreads[0] < 0.3


def test_a_prompt_is_asked_for(explorer):
    """At guidance 1 the particles of VSD are those of p(x0 | prompt); at 7.5 those of SDS first go beyond the part."""
    found = explorer.parts(explorer.run(VSD._replace(prompt="B or C"))[-1])
    assert_close(explorer.exact_shares("B or C"), torch.tensor([0.0, 0.6, 0.4], dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(found.shares, explorer.exact_shares("B or C"), atol=0.05, rtol=0)
    x = explorer.run(VSD._replace(rule="SDS", prompt="C", guidance=7.5))
    assert float(x[60].norm(dim=1).median()) > 2 * float(three_blobs().means[2].norm())
    assert_close(explorer.parts(x[-1]).shares, explorer.exact_shares("C"), atol=0.02, rtol=0)


def test_exact_samples_have_the_exact_shares_and_spreads_and_points_far_off_are_in_no_part(explorer):
    """200,000 samples: a share has deviation sqrt(w (1 - w) / n), a spread about 1 / sqrt(2 n w)."""
    n, exact = 200_000, explorer.exact_shares(NOTHING)
    found = explorer.parts(three_blobs().sample(n, generator(0)))
    assert bool(((found.shares - exact).abs() < 4 * (exact * (1 - exact) / n).sqrt() + math.exp(-8)).all())
    # beyond 4 deviations lies 1 / e^8 of a part, and (1 + 8) / e^8 of its second moment
    assert bool(((found.spreads - 1).abs() < 4 / (2 * n * exact).sqrt() + 9 * math.exp(-8)).all())
    found = explorer.parts(torch.tensor([[9.0, 9.0], [1.1, 1.0]], dtype=torch.float64))
    assert_close(found.shares, torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64), atol=1e-3, rtol=0)
    assert bool(found.spreads.isnan().all())


def test_what_is_shown_are_the_particles_of_the_step_and_their_parts(explorer):
    explorer.controls["step"].value = 40
    x = explorer.run(Setting(**{name: value for name, value in explorer.values.items() if name != "step"}))
    assert_close(torch.from_numpy(np.asarray(explorer._dots.get_offsets())), x[40])
    assert_close(torch.as_tensor(np.stack(explorer._trails.get_segments())), x[:41].transpose(0, 1))
    heights = [bar.get_height() for bar in explorer._bars[0]]
    assert heights[:3] == explorer.parts(x[40]).shares.tolist() and sum(heights) == pytest.approx(1)
    assert "SDS: step 40 of 300, σ = 1.9" in explorer._axes.get_title()


def test_a_redraw_takes_a_fifth_of_a_second_and_so_does_a_run(explorer):
    assert seconds(explorer) < REDRAW * SLACK
    explorer.controls["rule"].value = "VSD"
    explorer.run = explorer._run
    assert seconds(explorer) < 2 * REDRAW * SLACK


def test_bad_arguments_of_the_plane_say_what_was_expected():
    with pytest.raises(ValueError, match="prior is in 1 dimensions; expected 2"):
        DistillExplorer(Mixture.gaussian(torch.zeros(1), torch.eye(1)))
    with pytest.raises(ValueError, match="prior has 8 parts; expected at most 6"):
        DistillExplorer(ring(8))
    with pytest.raises(ValueError, match="rule = 'DDS'; expected one of SDS, VSD, NFSD"):
        DistillExplorer(three_blobs(), rule="DDS")
    with pytest.raises(ValueError, match="prompt = 'D'; expected one of none, A, B, C, A or B, A or C, B or C"):
        DistillExplorer(three_blobs(), prompt="D")
    with pytest.raises(ValueError, match=r"low = 2\.0; expected a number from 0\.05 to 0\.5"):
        DistillExplorer(three_blobs(), low=2.0)


# --- pictures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return zoo.load("mini-sd", device="cpu")


@pytest.fixture(scope="module")
def distilling(model):
    D_bad = model.denoiser.given(**model.embed(["a small cube"]))  # any Denoiser of these latents will do here
    return ImageDistillExplorer(model, D_bad, step=6)


def asked(explorer):
    return of_pictures.Setting(**{name: value for name, value in explorer.values.items() if name != "step"})


def test_a_picture_is_drawn_as_it_is_chosen(distilling):
    assert decode(distilling.picture.value).shape[:2] == (of_pictures.HEIGHT, of_pictures.WIDTH)
    assert distilling.main_name == "step"
    changed = {"step": 8, "prompt": "a small green cone", "guidance": 30.0, "annealed": False, "seed": 3}
    for name, value in (*changed.items(), *(("rule", rule) for rule in RULES[1:])):
        before, old = distilling.picture.value, distilling.controls[name].value
        distilling.controls[name].value = value
        assert distilling.message.value == "" and distilling.picture.value != before, name
        distilling.controls[name].value = old
        assert distilling.picture.value == before, name


def test_it_does_not_matter_how_far_a_run_went(model, distilling):
    """Computed in pieces, and further than the step that is shown, it is the same byte for byte."""
    distilling.run(asked(distilling)).step(8)
    before = distilling.draw(**distilling.values)
    fresh = ImageDistillExplorer(model, distilling._D_bad, step=6)
    assert len(fresh.run(asked(fresh)).done) == 6 and fresh.picture.value == before


@torch.no_grad()
def test_a_run_is_sds_on_the_latent(model, distilling):
    """The gradient is (x0 - D(x, sigma)) / sigma of the latent before the step; the first step of Adam moves each entry by lr."""
    D_cond, D_ref = (model.denoiser.given(**model.embed([text])) for text in ("a large red mug on grass", ""))
    D, start = cfg(D_cond, D_ref, 7.5), 0.1 * SampleNoise(0)(torch.empty(1, *model.shape))
    run = distilling.run(asked(distilling))
    for k in (1, 5):
        x0, now = (start if k == 1 else run.step(k - 1).x0), run.step(k)
        gradient = (x0 - D(now.x, now.sigma)) / right(now.sigma, x0)
        assert now.size == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-4)
        eps = (now.x - x0) / right(now.sigma, x0)
        assert abs(float(eps.square().mean()) - 1) < 4 * math.sqrt(2 / eps.numel())
        if k == 1:
            assert_close(now.x0, x0 - distilling.LR * gradient.sign(), atol=1e-4, rtol=0)


def test_each_step_has_noise_and_a_level_of_its_own(model):
    """Asked at the point itself, the rule draws anew in each step; where it stands still, x0 does not move."""
    theta = Pixels((1, 2, 2))
    start = theta().detach().clone()
    run = Distilling(
        sds(lambda x, sigma: start), lambda progress, rows, draws: torch.full((rows,), 1 + progress), theta, 5, 0.1, 0
    )
    noise = [(run.step(k).x - start) / run.step(k).sigma for k in (1, 2, 5)]
    assert float(run.step(1).sigma) == 1 and float(run.step(5).sigma) == 2
    assert not any(torch.allclose(one, other) for one, other in ((noise[0], noise[1]), (noise[1], noise[2])))
    assert_close(run.step(5).x0, start)
    assert run.step(5).size == 0


def test_guidance_saturates(distilling):
    """In the end at 100 the latent deviates more than half as much again as at 7.5."""
    small, large = (distilling.run(asked(distilling)._replace(guidance=w)).step(100).x0.std() for w in (7.5, 100.0))
    assert large > 1.5 * small


def test_words_that_the_model_never_saw_are_told_as_long_as_they_are_there(distilling):
    distilling.controls["prompt"].value = "a large red corgi"
    assert "never saw &#x27;corgi&#x27;" in distilling.message.value
    distilling.controls["step"].value = 5
    assert "never saw &#x27;corgi&#x27;" in distilling.message.value
    distilling.controls["step"].value, distilling.controls["prompt"].value = 6, "a large red mug on grass"
    assert distilling.message.value == ""


def test_a_redraw_of_steps_at_hand_takes_a_fifth_of_a_second(distilling):
    assert seconds(distilling) < REDRAW * SLACK


def test_bad_arguments_of_pictures_say_what_was_expected(model):
    with pytest.raises(ValueError, match=r"rule = 'NFSD'; expected one of SDS, SDS without − ε, SJC, mean of 2, or a D_bad"):
        ImageDistillExplorer(model, rule="NFSD")
    with pytest.raises(ValueError, match=r"guidance = 0\.5; expected a number from 1 to 100"):
        ImageDistillExplorer(model, guidance=0.5)
    with pytest.raises(ValueError, match="step = 0; expected a number from 1 to 100"):
        ImageDistillExplorer(model, step=0)
