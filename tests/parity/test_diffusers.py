"""The same tables, steps and whole runs as diffusers' schedulers, after x = x_t / sqrt(alpha_bar).

Their tables are single precision and so are their differences 1 - alpha_bar; where the comparison is in float64
the scheduler's table is widened first, so that both compute on the same numbers.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch.testing import assert_close

from course_lib import schedules
from course_lib.denoisers import discrete_of, from_diffusers, from_eps, from_v, from_x0
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.schedules import Discrete
from course_lib.steps import ddim, ddim_eta, ddpm
from tests.draws import normal
from tests.parity.tools import net, tiny_unet

F64 = torch.float64
MAKE = {"epsilon": from_eps, "sample": from_x0, "v_prediction": from_v}
BETAS = {  # diffusers' name, its options, our table
    "linear": ({}, schedules.linear_betas),
    "scaled_linear": ({"beta_start": 0.00085, "beta_end": 0.012}, schedules.scaled_linear_betas),
    "squaredcos_cap_v2": ({}, schedules.cosine_betas),
}


def widened(scheduler, steps: int):
    """The scheduler ready to run, its table in float64."""
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def make(scheduler_class, beta_schedule: str = "linear", **options):
    return scheduler_class(beta_schedule=beta_schedule, clip_sample=False, **BETAS[beta_schedule][0], **options)


def grid_of(scheduler) -> torch.Tensor:
    """sigma at the scheduler's times, then its last level."""
    final = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).double().reshape(1)
    alpha_bar = torch.cat([scheduler.alphas_cumprod.double()[scheduler.timesteps], final])
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def same(found: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for rounding: up to 50 steps of a few operations, relative to the largest entry.

    float32: 50 * 3 * 2^-24 = 1e-5. float64: 1e-10, of which most is log alpha_bar of the first entry, 1e-4, in 1 - alpha_bar.
    """
    share = 1e-5 if theirs.dtype == torch.float32 else 1e-10
    return found.dtype == theirs.dtype and float((found - theirs).abs().max()) < share * max(1.0, float(theirs.abs().max()))


class Recorded:
    """Noise drawn once and handed out in order, to both."""

    def __init__(self, shape, seed: int):
        self.generator, self.shape, self.drawn = torch.Generator().manual_seed(seed), shape, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.drawn += 1
        return torch.randn(self.shape, generator=self.generator, dtype=x.dtype)


def ours(scheduler, D, x_start, step):
    """Run our loop from x_t at the first time; back to the scheduler's coordinates at the end."""
    sigmas = grid_of(scheduler)
    end = sample(D, x_start * (1 + sigmas[0].to(x_start) ** 2).sqrt(), sigmas, step)
    return end / (1 + sigmas[-1].to(end) ** 2).sqrt()


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BETAS)
def test_tables(name):
    options, betas = BETAS[name]
    theirs = DDPMScheduler(beta_schedule=name, **options)
    table = Discrete(betas()).table
    assert_close(table, theirs.alphas_cumprod.double(), rtol=0, atol=1e-6)
    # relative, too, where alpha_bar is small: beta, 1 - beta and the product are each rounded to 2^-24
    share = (2**-24 * (2 + 1 / (1 - betas()))).cumsum(0)
    assert bool(((theirs.alphas_cumprod.double() / table - 1).abs() < share).all())


# --- whole runs with one network and one noise ------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", MAKE)
@pytest.mark.parametrize("name", BETAS)
def test_ddpm_runs(name, prediction, variance):
    """50 ancestral steps; the noise is drawn in the same order from one seed, none in the last step."""
    theirs = widened(make(DDPMScheduler, name, prediction_type=prediction, variance_type=f"fixed_{variance}"), 50)
    x = normal(4, 3)
    generator, start = torch.Generator().manual_seed(3), x
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), t, x, generator=generator).prev_sample
    noise = Recorded(x.shape, 3)
    found = ours(theirs, MAKE[prediction](net, discrete_of(theirs).t_of_sigma), start, ddpm(noise, variance))
    assert noise.drawn == 49
    assert same(found, x)


@pytest.mark.parametrize("spacing", [{}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": False, "steps_offset": 1}])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prediction", MAKE)
def test_ddim_runs(prediction, eta, spacing):
    """20 steps, to alpha_bar = 1, or to the first entry of the table as Stable Diffusion has it."""
    theirs = widened(make(DDIMScheduler, "scaled_linear", prediction_type=prediction, **spacing), 20)
    x = normal(4, 3)
    start, noise = x, Recorded(x.shape, 5)
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), int(t), x, eta=eta, variance_noise=noise(x) if eta else None).prev_sample
    D = MAKE[prediction](net, discrete_of(theirs).t_of_sigma)
    assert same(ours(theirs, D, start, ddim_eta(eta, Recorded(x.shape, 5))), x)
    if eta == 0:
        assert same(ours(theirs, D, start, ddim), x)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_runs_in_their_own_precision(kind):
    """float32 throughout, the scheduler as it comes."""
    theirs = make(DDPMScheduler if kind == "ddpm" else DDIMScheduler)
    theirs.set_timesteps(50)
    x = normal(4, 3).float()
    start, noise = x, Recorded(x.shape, 3)
    for t in theirs.timesteps:
        extra = {"generator": noise.generator} if kind == "ddpm" else {}
        x = theirs.step(net(x, t), int(t) if kind == "ddim" else t, x, **extra).prev_sample
    D = from_eps(net, discrete_of(theirs).t_of_sigma)
    found = ours(theirs, D, start, ddpm(Recorded(x.shape, 3)) if kind == "ddpm" else ddim)
    assert found.dtype == torch.float32
    assert same(found, x)


def test_a_clipped_denoiser_is_their_clipped_ddpm():
    """Clipping x0 is a wrapper of the Denoiser, not an option of the step."""
    theirs = widened(DDPMScheduler(clip_sample=True), 50)
    x = normal(4, 3)
    start, generator = x, torch.Generator().manual_seed(3)
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), t, x, generator=generator).prev_sample
    D = from_eps(net, discrete_of(theirs).t_of_sigma)
    assert same(ours(theirs, lambda x, s: D(x, s).clamp(-1, 1), start, ddpm(Recorded(x.shape, 3))), x)


# --- whole networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("prediction", MAKE)
def test_a_unet_runs_as_in_its_own_loop(prediction, dtype):
    unet = tiny_unet().to(dtype)
    theirs = make(DDIMScheduler, prediction_type=prediction)
    theirs = widened(theirs, 20) if dtype == F64 else theirs
    theirs.set_timesteps(20)
    x = normal(2, 2, 8, 8).to(dtype)
    start = x
    for t in theirs.timesteps:
        x = theirs.step(unet(x, t).sample, int(t), x).prev_sample
    assert same(ours(theirs, from_diffusers(unet, theirs), start, ddim), x)


def test_times_reach_the_network_as_trained():
    """At each trained level the network is told its integer time, and between two a time between."""
    seen = []

    class Listening(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, time, return_dict=True):
            seen.append(float(time))
            return (0 * x,)

    scheduler = make(DDIMScheduler)
    scheduler.set_timesteps(50)
    D = from_diffusers(Listening(), scheduler)
    sample(D, torch.ones(1, 1), grid_of(scheduler))
    assert seen == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
    seen.clear()
    levels = grid_of(scheduler)
    D(torch.ones(1, 1), (levels[3] + levels[4]) / 2)
    assert float(scheduler.timesteps[4]) < seen[0] < float(scheduler.timesteps[3])


def test_guidance_on_a_conditional_unet():
    """Classifier-free guidance in a DDIM run, as StableDiffusionPipeline does it: one call on [uncond, cond]."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=6, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip
    theirs = make(DDIMScheduler, "scaled_linear", set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(10)
    text, empty = normal(2, 5, 6).float(), normal(2, 5, 6, seed=1).float()
    x = normal(2, 4, 8, 8).float()
    start = x
    for t in theirs.timesteps:
        uncond, cond = unet(torch.cat([x, x]), t, torch.cat([empty, text])).sample.chunk(2)
        x = theirs.step(uncond + 3.0 * (cond - uncond), int(t), x).prev_sample
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    D = from_diffusers(unet, theirs)
    found = ours(theirs, cfg(D.given(encoder_hidden_states=text), D.given(encoder_hidden_states=empty), 3.0), start, ddim)
    assert len(calls) == 10
    assert same(found, x)


def test_a_learned_variance_unet():
    """out_channels = 2 * in_channels: the second half is left to ancestral steps that use it."""
    unet = tiny_unet()
    torch.manual_seed(0)
    wide = UNet2DModel(**{**unet.config, "out_channels": 4}).eval().requires_grad_(False)
    x, t = normal(2, 2, 8, 8).float(), torch.tensor(10)
    scheduler = make(DDIMScheduler)
    sigma = ((1 - scheduler.alphas_cumprod[10]) / scheduler.alphas_cumprod[10]).double().sqrt()
    found = from_diffusers(wide, scheduler)(x, sigma)
    expected = x - sigma.float() * wide(x / (1 + sigma.float() ** 2).sqrt(), t).sample[:, :2]
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_flow_unet_runs_as_in_its_own_loop():
    """FlowMatchEulerDiscreteScheduler: x_t = (1 - t) x0 + t eps, Euler in t, times of 1000 t to the network."""
    unet, theirs = tiny_unet(), FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(20)
    t = theirs.sigmas.double()
    t[0] = 1 - 1e-6  # sigma = t / (1 - t) is infinite at t = 1; at 1e6 the difference is of the order 1e-6
    x = normal(2, 2, 8, 8).float()
    start = x
    for time in theirs.timesteps:
        x = theirs.step(unet(x, time).sample, time, x).prev_sample
    sigmas = t / (1 - t)
    D = from_diffusers(unet, theirs)
    # x = x_t / (1 - t), about 1e6: in float64, or the difference of two such numbers would lose six digits of x0
    found = sample(D, start.double() * (1 + sigmas[0]), sigmas, ddim)
    assert_close(found.float(), x, rtol=0, atol=1e-4)


# --- what cannot be adapted is refused -----------------------------------------------------------------------------------


def test_what_is_not_known_is_refused():
    scheduler = make(DDIMScheduler)
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(ValueError, match="prediction_type = 'noise'; expected one of epsilon, sample, v_prediction"):
        from_diffusers(tiny_unet(), scheduler)


def test_a_scheduler_of_edm_is_not_taken_for_a_flow():
    """It has no alphas_cumprod either, and its network is preconditioned in another way."""
    with pytest.raises(ValueError, match="EDMEulerScheduler|scheduler"):
        from_diffusers(tiny_unet(), EDMEulerScheduler())


def test_a_table_that_ends_without_signal_is_named():
    """rescale_betas_zero_snr sets alpha_bar_T = 0, that is sigma = infinity."""
    with pytest.raises(ValueError, match="rescale_betas_zero_snr|zero.*SNR|alpha_bar"):
        from_diffusers(tiny_unet(), make(DDIMScheduler, rescale_betas_zero_snr=True))
