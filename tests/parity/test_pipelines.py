"""A pipeline taken apart gives what the pipeline gives: the same latents and pictures from the same weights, noise and prompts.

Each pipeline is tiny, saved to a folder, and read from it twice: by diffusers, which runs its own call, and by the zoo, whose
Denoiser runs in the course's loop.
"""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch.testing import assert_close

from course_lib import zoo
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.schedules import Flow
from course_lib.steps import ddim, ddpm, euler
from course_lib.zoo.pretrained import wrap
from tests import pipelines
from tests.pipelines import PROMPTS, SCALED, STABLE

STEPS, GUIDANCE = 10, 5.0


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


TEXT_TO_IMAGE = {
    "epsilon": lambda: pipelines.stable_diffusion(),
    "v": lambda: pipelines.stable_diffusion("v_prediction"),
    "epsilon to alpha = 1": lambda: pipelines.stable_diffusion(scheduler=DDIMScheduler(**{**STABLE, "set_alpha_to_one": True})),
    "v trailing": lambda: pipelines.stable_diffusion(
        scheduler=DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", **STABLE)
    ),
    "epsilon Euler": lambda: pipelines.stable_diffusion(
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SCALED)
    ),
    "v Euler linspace": lambda: pipelines.stable_diffusion(
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", **SCALED)
    ),
    "epsilon Euler Karras": lambda: pipelines.stable_diffusion(
        scheduler=EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="trailing", **SCALED)
    ),
    "XL": lambda: pipelines.stable_diffusion_xl(),
    "XL Euler": lambda: pipelines.stable_diffusion_xl(
        EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SCALED)
    ),
    "XL, empty prompt as any": lambda: pipelines.stable_diffusion_xl(zeros=False),
    "XL, latents whitened": lambda: pipelines.stable_diffusion_xl(
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 0.8, 1.1]
    ),
    "3": lambda: pipelines.stable_diffusion_3(),
    "3 without T5": lambda: pipelines.stable_diffusion_3(with_t5=False),
    "3 with dynamic shift": lambda: pipelines.stable_diffusion_3(flow(use_dynamic_shifting=True)),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(found, theirs):
    """Equal but for rounding, relative to the largest entry.

    fp32 networks of some ten layers round by about 2^-21; guidance multiplies that by up to 2 GUIDANCE - 1 = 9, and 10 steps
    add up: 4e-5. A wrong convention shows in the first digits: see `test_the_comparison_sees_a_wrong_condition`.
    """
    return found.shape == theirs.shape and float((found - theirs).abs().max()) < 4e-5 * max(1.0, float(theirs.abs().max()))


def both(pipeline, folder):
    """The pipeline as diffusers reads it, and as the zoo does."""
    pipeline.save_pretrained(folder)
    empty = {part: None for part in ("text_encoder_3", "tokenizer_3") if getattr(pipeline, part, 0) is None}
    theirs = type(pipeline).from_pretrained(folder, **empty)
    theirs.set_progress_bar_config(disable=True)
    return theirs, zoo.load(str(folder), device="cpu")


def drawn(model, noise, step=ddim, prompts=PROMPTS, **changed):
    """Latents as the course draws them."""
    sigmas = model.sigmas(STEPS)
    asked, reference = ({**model.embed(p), **changed} for p in (prompts, [""] * len(prompts)))
    D = cfg(model.denoiser.given(**asked), model.denoiser.given(**reference), GUIDANCE)
    return model.finish(sample(D, model.start(noise, sigmas[0]), sigmas, step), sigmas[-1])


def call(pipeline, noise, output_type, **options):
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 16, "width": 16, **options}
    return pipeline(PROMPTS, latents=noise.clone(), output_type=output_type, **settings).images


@pytest.mark.filterwarnings("ignore:latents has the deviation")  # of networks that were never trained
@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_text_to_image(name, tmp_path):
    theirs, model = both(TEXT_TO_IMAGE[name](), tmp_path)
    assert model.pixels == 16
    noise = normal(2, *model.shape)
    latents = drawn(model, noise)
    assert same(latents, call(theirs, noise, "latent"))
    assert same(model.decode(latents) / 2 + 0.5, call(theirs, noise, "pt"))


def test_euler_in_the_flows_own_time(tmp_path):
    """FlowMatchEulerDiscreteScheduler is Euler's method in t, and that is `ddim`: both steps agree with it."""
    theirs, model = both(pipelines.stable_diffusion_3(), tmp_path)
    noise = normal(2, *model.shape)
    assert same(drawn(model, noise, step=euler(Flow())), call(theirs, noise, "latent"))


def test_guidance_calls_the_network_once_a_step(tmp_path):
    """The condition is flat tensors, so `cfg` merges both calls: also of XL, whose UNet wants part of it nested."""
    for i, make in enumerate((pipelines.stable_diffusion, pipelines.stable_diffusion_xl, pipelines.stable_diffusion_3)):
        _, model = both(make(), tmp_path / str(i))
        calls = []
        model.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        drawn(model, normal(2, *model.shape))
        assert len(calls) == STEPS


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (pipelines.stable_diffusion, "encoder_hidden_states"),
        (pipelines.stable_diffusion_xl, "text_embeds"),
        (pipelines.stable_diffusion_xl, "time_ids"),
        (pipelines.stable_diffusion_3, "encoder_hidden_states"),
        (pipelines.stable_diffusion_3, "pooled_projections"),
    ],
)
def test_the_comparison_sees_a_wrong_condition(make, part, tmp_path):
    """Each part of the condition matters to the tiny networks by far more than the tolerance."""
    theirs, model = both(make(), tmp_path)
    noise = normal(2, *model.shape)
    wrong = 0.5 * model.embed(PROMPTS)[part]
    found, expected = drawn(model, noise, **{part: wrong}), call(theirs, noise, "latent")
    assert float((found - expected).abs().max()) > 10 * 4e-5 * float(expected.abs().max())


def test_another_size_is_told_to_xl(tmp_path):
    theirs, model = both(pipelines.stable_diffusion_xl(), tmp_path)
    noise, size = normal(2, 4, 16, 8), (32, 16)
    told = model.embed(PROMPTS, size=size)["time_ids"]
    assert same(drawn(model, noise, time_ids=told), call(theirs, noise, "latent", height=32, width=16))


# --- pixels ------------------------------------------------------------------------------------------------------------


class Drawn:
    """Standard normal noise from one generator, in the order in which the pipeline draws."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x):
        return torch.randn(x.shape, generator=self.generator)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance, clip, tmp_path):
    """The ancestral chain of DDPMPipeline, with the noise of one generator; clipping is a wrapper of the Denoiser."""
    theirs, model = both(pipelines.ddpm(DDPMScheduler(variance_type=f"fixed_{variance}", clip_sample=clip)), tmp_path)
    expected = theirs(2, torch.Generator().manual_seed(7), num_inference_steps=STEPS, output_type="pt").images
    noise, sigmas = Drawn(7), model.sigmas(STEPS)
    x = model.start(noise(torch.empty(2, *model.shape)), sigmas[0])
    assert model.clip == (1.0 if clip else None)
    D = (lambda x, sigma: model.denoiser(x, sigma).clamp(-model.clip, model.clip)) if clip else model.denoiser
    found = model.finish(sample(D, x, sigmas, ddpm(noise, variance)), sigmas[-1])
    assert model.pixels == 8
    assert same(model.decode(found) / 2 + 0.5, expected)
    assert float(expected.std()) > 0.05 and float((expected - expected.round()).abs().max()) > 0.1  # not all is clamped


def test_ddpm_pipeline_with_ddim(tmp_path):
    theirs, model = both(pipelines.ddpm(DDIMScheduler(clip_sample=False)), tmp_path)
    expected = theirs(2, torch.Generator().manual_seed(7), num_inference_steps=STEPS, output_type="pt").images
    sigmas = model.sigmas(STEPS)
    x = model.start(Drawn(7)(torch.empty(2, *model.shape)), sigmas[0])
    assert isinstance(theirs, DDPMPipeline)
    assert same(model.decode(model.finish(sample(model.denoiser, x, sigmas), sigmas[-1])) / 2 + 0.5, expected)


# --- grids -------------------------------------------------------------------------------------------------------------


def levels_at_timesteps(scheduler, n):
    """sigma at the trained table's entries that the scheduler visits, from its own alphas_cumprod."""
    scheduler.set_timesteps(n)
    alpha_bar = scheduler.alphas_cumprod.double()[sorted({int(t) for t in scheduler.timesteps}, reverse=True)]
    return ((1 - alpha_bar) / alpha_bar).sqrt()


@pytest.mark.parametrize("n", [1, 7, 20, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler])
def test_grids_are_the_levels_at_the_schedulers_times(scheduler_class, one, offset, spacing, n, grid_model):
    options = {**SCALED, "set_alpha_to_one": one, "steps_offset": offset, "timestep_spacing": spacing}
    options |= {"skip_prk_steps": True} if scheduler_class is PNDMScheduler else {"clip_sample": False}
    if spacing == "leading" and n == 1000 and offset == 1:
        n = 999  # 1000 visits time 1000, which is beyond their table
    model = grid_model(scheduler_class(**options))
    found, expected = model.sigmas(n), levels_at_timesteps(scheduler_class(**options), n)
    first = expected[-1:] if one else ((1 - (a := model.scheduler.alphas_cumprod[0].double())) / a).sqrt().reshape(1)
    last = torch.zeros(1, dtype=torch.float64) if one else first
    if one or bool((expected[-1] - last).abs() > 1e-9):  # else the walk has reached its last level already
        expected = torch.cat([expected, last])
    assert found.dtype == torch.float64 and found.device.type == "cpu"
    assert bool((found.diff() < 0).all())
    assert_close(found, expected, rtol=1e-9, atol=0)  # their table is read as it is: only float64 rounding, in 1 - alpha_bar
    times = model.schedule.t_of_sigma(found[: len(found) - one])
    assert_close(times, times.round(), rtol=0, atol=1e-6)  # so the network is told the times that it was trained on


@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(timestep_spacing="linspace", **SCALED),
        EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SCALED),
        EulerDiscreteScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min", **SCALED),
        DPMSolverMultistepScheduler(timestep_spacing="trailing", **SCALED),
    ],
)
def test_grids_of_schedulers_that_have_sigmas(scheduler, n, grid_model):
    model = grid_model(scheduler)
    found = model.sigmas(n)
    scheduler.set_timesteps(n)
    assert_close(found, scheduler.sigmas.double().unique().flip(0), rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 7, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grids_of_a_flow(shift, n, tmp_path):
    """sigma = t / (1 - t) at the scheduler's t, from a level that stands for infinity down to 0."""
    _, model = both(pipelines.stable_diffusion_3(flow(shift=shift), with_t5=False), tmp_path)
    theirs = flow(shift=shift)
    theirs.set_timesteps(n)
    t = theirs.sigmas.double()
    found = model.sigmas(n)
    assert len(found) == n + 1 and found[-1] == 0
    assert float(found[0]) == pytest.approx(model.sigma_max, rel=1e-5) and model.sigma_max >= 1e6
    assert_close(found[1:], t[1:] / (1 - t[1:]), rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def grid_model():
    """The unconditional model with a scheduler of choice."""
    pipeline = pipelines.ddpm()

    def make(scheduler):
        pipeline.scheduler = scheduler
        return wrap(pipeline, "grid")

    return make


# --- pictures to latents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon", "XL", "XL, latents whitened", "3"])
def test_noised_pictures_are_those_of_their_image_to_image_pipelines(name, tmp_path):
    """x = encode(picture, posterior noise) + sigma eps, in their coordinates, with the noise of one generator."""
    theirs, model = both(TEXT_TO_IMAGE[name](), tmp_path)
    kind = type(theirs).__name__.replace("Pipeline", "Img2ImgPipeline")
    twin = getattr(diffusers, kind)(**theirs.components, **({"requires_safety_checker": False} if name == "epsilon" else {}))
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    sigmas = model.sigmas(STEPS)
    twin.scheduler.set_timesteps(STEPS)
    time = twin.scheduler.timesteps[6:7]
    with torch.no_grad():
        expected = twin.prepare_latents(images, time, 2, 1, torch.float32, "cpu", torch.Generator().manual_seed(3))
    noise = Drawn(3)
    z = model.encode(images, noise(torch.empty(2, *model.shape)))
    x = z + float(sigmas[6]) * noise(z)
    assert same(model.finish(x, sigmas[6]), expected)
    assert float((model.encode(images) - z).abs().max()) > 0.01  # the posterior's noise was not lost
