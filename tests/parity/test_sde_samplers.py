"""Whole runs of diffusers' stochastic schedulers and ours, with one network, one noise and the same times.

Most of them compute in float32 whatever they are given, so that rounding bounds the agreement; where they allow float64 it
is used. EDM and DPMSolverSDE walk x = x0 + sigma eps, as we do; the multistep solver walks x / sqrt(1 + sigma^2).
"""

import importlib
import math
import sys
import types
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    ScoreSdeVeScheduler,
)

from course_lib.denoisers import discrete_of, from_edm, from_eps, from_v
from course_lib.langevin import langevin, predictor_corrector
from course_lib.sample import sample
from course_lib.schedules import Discrete, exponential
from course_lib.steps import ddim_eta
from course_lib.stochastic import dpm_solver_pp_sde_2m, dpm_solver_sde, edm_stochastic, reverse_diffusion
from tests.draws import normal

F64 = torch.float64
MAKE = {"epsilon": from_eps, "v_prediction": from_v}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = 20


class Net:
    """Some nonlinear network of bounded output that remembers the times it was told."""

    def __init__(self):
        self.times = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        self.times.append(float(t))
        return torch.sin(1.7 * x + 0.002 * float(t)) + 0.2 * torch.cos(x.flip(-1))


class Recorded:
    """Noise drawn once and handed out in order, to both."""

    def __init__(self, shape, draws: int, dtype=F64):
        self.draws, self.used = normal(draws, *shape, seed=9, dtype=dtype), 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.used += 1
        return self.draws[self.used - 1].to(x.dtype)

    def rewound(self) -> "Recorded":
        self.used = 0
        return self


def serve(monkeypatch, module: str, noise: Recorded) -> None:
    """Let a scheduler draw the recorded noise."""
    place = importlib.import_module(f"diffusers.schedulers.{module}")
    monkeypatch.setattr(
        place, "randn_tensor", lambda shape, dtype=None, **_: noise(torch.empty(0, dtype=dtype or noise.draws.dtype))
    )


def close(found: torch.Tensor, theirs: torch.Tensor) -> bool:
    """float32: 20 steps of about ten roundings each, 200 * 2^-24 = 1.2e-5 of the largest entry, and the network (slope 2) may
    double it; float64: the same count gives 5e-14, and 1e-9 leaves room for 1 - alpha_bar (1e-4 at the first entry).
    """
    share = 2.5e-5 if theirs.dtype == torch.float32 else 1e-9
    return float((found.double() - theirs.double()).abs().max()) < share * max(1.0, float(theirs.abs().max()))


# --- Euler ancestral is DDIM with eta = 1 -----------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("prediction", MAKE)
def test_euler_ancestral_is_ddim_with_eta_1(prediction, spacing, monkeypatch):
    """Their step: Euler down to s_down, then noise of deviation s_up. In this coordinate that is Eq. 12 of DDIM.

    They draw noise in the last step too, times s_up = 0; ours draws none there. eta is not offered by the scheduler.
    """
    theirs = EulerAncestralDiscreteScheduler(prediction_type=prediction, timestep_spacing=spacing, **SCALED)
    theirs.set_timesteps(STEPS)
    noise = Recorded((4, 3), STEPS, torch.float32)
    serve(monkeypatch, "scheduling_euler_ancestral_discrete", noise)
    net, ours = Net(), Net()
    start = x = normal(4, 3, dtype=torch.float32) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        x = theirs.step(net(theirs.scale_model_input(x, t), t), t, x).prev_sample
    grid = theirs.sigmas.double()
    D = MAKE[prediction](ours, discrete_of(theirs).t_of_sigma)
    found = sample(D, start, grid, ddim_eta(1.0, noise.rewound()))
    assert noise.used == STEPS - 1
    # the table is single precision, and a time between two entries moves by its rounding
    assert ours.times == pytest.approx(net.times, abs=0.01)
    assert close(found, x)
    assert not close(sample(D, start, grid, ddim_eta(0.9, noise.rewound())), x)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_eta_is_the_ancestral_step_of_k_diffusion(eta):
    """With eta, which diffusers leaves out: s_up = min(s', eta sqrt(s'^2 (s^2 - s'^2) / s^2)), s_down^2 = s'^2 - s_up^2."""
    net, noise = Net(), Recorded((4, 3), 6)
    D = from_eps(net, Discrete(torch.linspace(1e-4, 0.02, 1000)).t_of_sigma)
    grid = torch.tensor([14.0, 6.0, 3.0, 1.1, 0.4, 0.1, 0.0], dtype=F64)
    start = x = 14 * normal(4, 3)
    for s, s_next in pairwise(grid):
        up = min(float(s_next), eta * math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
        down = math.sqrt(s_next**2 - up**2)
        x = x + (down - s) * (x - D(x, s)) / s + up * noise(x)
    assert close(sample(D, start, grid, ddim_eta(eta, noise.rewound())), x)


# --- EDM: Euler with churn --------------------------------------------------------------------------------------------


def edm_denoiser(net: Net):
    """The network of the paper is told log(sigma) / 4; `from_edm` scales its time by 1000, as diffusion tables are."""
    return from_edm(lambda x, t: net(x, t / 1000))


def euler_with_churn(noise, S_churn, steps, S_min, S_max, S_noise):
    """EDM's step without the Heun correction: `edm_stochastic` where D is told that each step ends at 0, read off at sigma'."""
    step = edm_stochastic(noise, S_churn, steps, S_min, S_max, S_noise)

    def euler(D, x, sigma, sigma_next, memory=None):
        seen = {}

        def listening(x_hat, s):
            seen.update(x=x_hat, s=s, x0=D(x_hat, s))
            return seen["x0"]

        step(listening, x, sigma, torch.zeros_like(sigma), memory)
        return seen["x0"] + (sigma_next / seen["s"]).to(x) * (seen["x"] - seen["x0"]), None

    return euler


@pytest.mark.parametrize("churn", [(0.0, 0.0, math.inf, 1.0), (5.0, 0.05, 50.0, 1.003), (80.0, 0.0, math.inf, 1.0)])
def test_edm_churn_runs(churn, monkeypatch):
    """EDMEulerScheduler has the churn of Algorithm 2, with Euler for Heun, and one difference, undone here.

    It is handed the network's output for x at sigma, and takes it for that at the raised x^ and s^: the pipeline's only call is
    made before the noise is added. Calling the network at (x^, s^), as Algorithm 2 does, makes the runs equal.
    """
    S_churn, S_min, S_max, S_noise = churn
    theirs = EDMEulerScheduler()
    theirs.set_timesteps(STEPS)
    noise = Recorded((4, 3), STEPS, torch.float32)
    net, ours = Net(), Net()
    start = x = normal(4, 3, dtype=torch.float32) * theirs.init_noise_sigma
    lifted_net = []

    def lift(shape, dtype=None, **_):
        return noise(torch.empty(0, dtype=torch.float32))

    place = importlib.import_module("diffusers.schedulers.scheduling_edm_euler")
    monkeypatch.setattr(place, "randn_tensor", lift)
    monkeypatch.setattr(
        theirs,
        "precondition_outputs",
        lambda x_hat, _, s_hat: lifted_net.append(1) or type(theirs).precondition_outputs(
            theirs, x_hat, net(theirs.precondition_inputs(x_hat, s_hat), theirs.precondition_noise(s_hat)), s_hat
        ),
    )  # fmt: skip
    for t in theirs.timesteps:
        theirs.scale_model_input(x, t)
        x = theirs.step(torch.zeros_like(x), t, x, S_churn, S_min, S_max, S_noise).prev_sample
    used = noise.used
    found = sample(
        edm_denoiser(ours), start, theirs.sigmas.double(), euler_with_churn(noise.rewound(), S_churn, STEPS, *churn[1:])
    )
    assert noise.used == used
    assert ours.times == pytest.approx(net.times, abs=1e-6)
    assert close(found, x)


def test_edm_churn_in_the_pipelines_order_is_another_sampler(monkeypatch):
    """As its pipeline calls it, the network sees x before the noise: with churn the end differs by more than a percent."""
    theirs = EDMEulerScheduler()
    theirs.set_timesteps(STEPS)
    noise, net = Recorded((4, 3), STEPS, torch.float32), Net()
    serve(monkeypatch, "scheduling_edm_euler", noise)
    start = x = normal(4, 3, dtype=torch.float32) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        x = theirs.step(net(theirs.scale_model_input(x, t), t), t, x, s_churn=5.0).prev_sample
    step = euler_with_churn(noise.rewound(), 5.0, STEPS, 0.0, math.inf, 1.0)
    found = sample(edm_denoiser(Net()), start, theirs.sigmas.double(), step)
    assert float((found - x).abs().max()) > 0.01 * float(x.abs().max())


# --- SDE-DPM-Solver++ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("prediction", MAKE)
@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpm_solver_pp_runs(order, prediction, steps):
    """Order 1 is DDPM's step, that is eta = 1; order 2 the multistep rule; both to sigma = 0, whose step is of order 1."""
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=order, prediction_type=prediction, **SCALED
    )
    theirs.set_timesteps(steps)
    noise, net, ours = Recorded((4, 3), steps, torch.float32), Net(), Net()
    start = x = normal(4, 3, dtype=torch.float32)
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), t, x, variance_noise=noise(x)).prev_sample
    grid = theirs.sigmas.double()
    start = start * (1 + grid[0].float() ** 2).sqrt()
    D = MAKE[prediction](ours, discrete_of(theirs).t_of_sigma)
    right, wrong = (dpm_solver_pp_sde_2m, lambda z: ddim_eta(1.0, z))[:: 1 if order == 2 else -1]
    found = sample(D, start, grid, right(noise.rewound()))
    assert noise.used == steps - 1
    assert ours.times == pytest.approx(net.times, abs=0.01)
    assert close(found, x)
    assert not close(sample(D, start, grid, wrong(noise.rewound())), x)


def test_sde_dpm_solver_pp_on_a_karras_grid():
    """There they round the times for the network to integers: ours must read a rounding table to agree."""
    theirs = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, **SCALED)
    theirs.set_timesteps(STEPS)
    noise, net, rounding, exact = Recorded((4, 3), STEPS, torch.float32), Net(), Net(), Net()
    start = x = normal(4, 3, dtype=torch.float32)
    for t in theirs.timesteps:
        x = theirs.step(net(x, t), t, x, variance_noise=noise(x)).prev_sample
    grid = theirs.sigmas.double()
    begin = start * (1 + grid[0].float() ** 2).sqrt()
    table = Discrete(theirs.betas.double(), rounding=True)
    found = sample(from_eps(rounding, table.t_of_sigma), begin, grid, dpm_solver_pp_sde_2m(noise.rewound()))
    assert rounding.times == net.times
    assert close(found, x)
    sample(from_eps(exact, Discrete(theirs.betas.double()).t_of_sigma), begin, grid, dpm_solver_pp_sde_2m(noise.rewound()))
    off = max(abs(a - b) for a, b in zip(exact.times, net.times, strict=True))
    assert 0.1 < off <= 0.5 + 1e-6


# --- DPMSolverSDE: the single-step solver -----------------------------------------------------------------------------


@pytest.fixture
def sde_scheduler(monkeypatch):
    """DPMSolverSDEScheduler's own code; its import of torchsde is for the Brownian path alone, which is given here."""
    if importlib.util.find_spec("torchsde") is None:
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    monkeypatch.delitem(sys.modules, "diffusers.schedulers.scheduling_dpmsolver_sde", raising=False)
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    yield module.DPMSolverSDEScheduler
    sys.modules.pop("diffusers.schedulers.scheduling_dpmsolver_sde", None)


class Path:
    """One Brownian path in the time sigma, as their tree is: W(s) - W(s') over sqrt(s - s'), s' a middle first, then an end."""

    def __init__(self, noise: Recorded):
        self.noise = noise
        self.begun = None

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        sigma, sigma_next = float(sigma), float(sigma_next)
        if self.begun is None:  # to the middle
            self.begun = (sigma_next, math.sqrt(sigma - sigma_next) * self.noise(torch.empty(0, dtype=F64)))
            return self.begun[1] / math.sqrt(sigma - sigma_next)
        middle, increment = self.begun
        self.begun = None
        increment = increment + math.sqrt(middle - sigma_next) * self.noise(torch.empty(0, dtype=F64))
        return increment / math.sqrt(sigma - sigma_next)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", MAKE)
def test_dpm_solver_sde_runs(sde_scheduler, prediction, karras):
    """20 steps, 39 calls, in float64; their Brownian path runs in the time sigma, ours in 1 / sigma^2 unless it is told."""
    theirs = sde_scheduler(prediction_type=prediction, use_karras_sigmas=karras, **SCALED)
    theirs.set_timesteps(STEPS)
    theirs.sigmas = theirs.sigmas.double()
    noise = Recorded((4, 3), 2 * STEPS)
    theirs.noise_sampler = Path(noise)
    net, ours = Net(), Net()
    start = x = normal(4, 3) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        x = theirs.step(net(theirs.scale_model_input(x, t), t), t, x).prev_sample
    grid = torch.cat([theirs.sigmas[:1], theirs.sigmas[1:-1:2], theirs.sigmas[-1:]])
    D = MAKE[prediction](ours, Discrete(theirs.betas.double()).t_of_sigma)
    found = sample(D, start, grid, dpm_solver_sde(noise.rewound(), "sigma"))
    assert noise.used == 2 * (STEPS - 1)
    assert len(net.times) == len(ours.times) == 2 * STEPS - 1
    # the times are computed from float32 tables, and their rounding moves the network's output by 0.002 of theirs
    assert ours.times == pytest.approx(net.times, abs=0.02)
    told = iter(net.times)
    same_times = MAKE[prediction](lambda x, t: Net()(x, next(told)), Discrete(theirs.betas.double()).t_of_sigma)
    assert close(sample(same_times, start, grid, dpm_solver_sde(noise.rewound(), "sigma")), x)
    assert float((found - x).abs().max()) < 1e-4 * float(x.abs().max())
    other = sample(D, start, grid, dpm_solver_sde(noise.rewound(), "exact"))
    assert float((other - x).abs().max()) > 1e-2 * float(x.abs().max())


# --- ScoreSDE, variance exploding ---------------------------------------------------------------------------------------


def score_net(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A score with a time: -(x - sin) / (1 + sigma^2)."""
    return (torch.sin(x) - x) / (1 + sigma**2)


def D_of_score(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Tweedie: D = x + sigma^2 score."""
    return x + sigma.to(x) ** 2 * score_net(x, sigma.to(x))


def ve_scheduler(levels: torch.Tensor):
    """The scheduler, ready to walk these levels, falling."""
    theirs = ScoreSdeVeScheduler(snr=0.16)
    theirs.set_timesteps(len(levels))
    theirs.discrete_sigmas = levels.flip(0)
    return theirs


def time_of(i: int, levels: torch.Tensor) -> float:
    """A time that their truncation to an index reads as level i of a falling grid, far from rounding."""
    return (len(levels) - 1 - i + 0.25) / (len(levels) - 1)


def test_score_sde_predictor_runs(monkeypatch):
    """Reverse diffusion along 50 levels and from the last one to 0, in float64."""
    levels = exponential(49, 0.01, 50.0, to_zero=False)
    theirs, noise = ve_scheduler(levels), Recorded((4, 3), 50)
    serve(monkeypatch, "scheduling_sde_ve", noise)
    start = x = 50 * normal(4, 3)
    for i, sigma in enumerate(levels):
        x = theirs.step_pred(score_net(x, sigma), time_of(i, levels), x).prev_sample
    grid = torch.cat([levels, torch.zeros(1, dtype=F64)])
    assert close(sample(D_of_score, start, grid, reverse_diffusion(noise.rewound())), x)
    assert noise.used == 50
    assert not close(sample(D_of_score, start, grid, ddim_eta(1.0, noise.rewound())), x)  # the other variance


@pytest.mark.parametrize("batch", [1, 3])
def test_score_sde_corrector(batch, monkeypatch):
    """One Langevin step in float32. On a batch they share one step size, from the means of the norms."""
    x, sigma = 3 * normal(batch, 5, dtype=torch.float32), torch.tensor(2.0)
    noise = Recorded((batch, 5), 1, torch.float32)
    serve(monkeypatch, "scheduling_sde_ve", noise)
    expected = ve_scheduler(torch.ones(2)).step_correct(score_net(x, sigma), x).prev_sample
    assert close(langevin(D_of_score, x, sigma, noise.rewound(), 0.16, shared=True), expected)
    assert close(langevin(D_of_score, x, sigma, noise.rewound(), 0.16), expected) == (batch == 1)


def test_score_sde_pipeline_corrects_first(monkeypatch):
    """The paper's Algorithm 2 predicts, then corrects at the new level; their pipeline, as the authors' code, corrects first.

    So theirs is one correction at sigma_max, then ours, then a predictor step to 0 that is not corrected.
    """
    levels = torch.tensor([20.0, 7.0, 2.0, 0.6, 0.2])
    theirs, noise = ve_scheduler(levels), Recorded((1, 3), 10, torch.float32)
    serve(monkeypatch, "scheduling_sde_ve", noise)
    start = x = 20 * normal(1, 3, dtype=torch.float32)
    for i, sigma in enumerate(levels):
        x = theirs.step_correct(score_net(x, sigma), x).prev_sample
        x = theirs.step_pred(score_net(x, sigma), time_of(i, levels), x).prev_sample
    step = predictor_corrector(reverse_diffusion(noise.rewound()), noise, 0.16)
    y = sample(D_of_score, langevin(D_of_score, start, levels[0], noise, 0.16), levels, step)
    y = reverse_diffusion(noise)(D_of_score, y, levels[-1], torch.tensor(0.0))[0]
    assert noise.used == 10
    assert close(y, x)
