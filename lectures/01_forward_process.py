# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 01 The forward process
#
# **How to destroy a picture, exactly.** A diffusion model learns to undo noise. Before it can learn, somebody has to
# add the noise, in a way that can be written down, jumped through, and undone. That is this lecture.
#
# After it you can
#
# - noise a picture step by step, or to any time in a single draw, and prove that the two agree;
# - read a noise schedule (linear, cosine, EDM, flow) as one curve, and change it into another;
# - say what a network is asked for when it predicts $\epsilon$, $x_0$, $v$ or a velocity, and turn each into the others;
# - compute the *best possible* denoiser of a distribution, and see how near a trained one comes;
# - recognise the famous bugs: $\beta$ for $\bar\alpha$, a lost square root, a schedule that never reaches pure noise.
#
# Nothing is assumed but Gaussians and Python. Time: 60 minutes. Everything runs on a laptop, with no network.

# %%
import itertools
import math

import matplotlib.pyplot as plt
import torch

from course_lib import study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.gaussians import Empirical
from course_lib.sample import Trajectory, sample
from course_lib.schedules import (
    CONTINUOUS,
    Discrete,
    Linear,
    Schedule,
    cosine_betas,
    get,
    karras,
    linear_betas,
    scaled_linear_betas,
)
from course_lib.worlds import digits, toys

torch.set_num_threads(1)  # tiny tensors are faster on one thread
study.use()
F64 = torch.float64
images, labels = digits.load("train")
held_out, held_out_labels = digits.load("test")


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Five handwritten digits, real ones, with more noise from column to column. At the left you read them at once; at
# the right nobody can. *Somewhere in between the digit is lost*, and where that happens depends on the schedule.
# The time $t$ runs from 0, clean, to 1, noise; this is the *linear* schedule. Pictures are clipped to $[-1, 1]$ for show.

# %% slideshow={"slide_type": "-"}
row = images[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
eps = SampleNoise(7)(row)
linear = Linear()
levels = torch.tensor([0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0], dtype=F64)
noisy = [linear.add_noise(row[:5], t, eps[:5]) for t in levels]
study.strip(
    [list(column) for column in zip(*noisy, strict=True)],
    column_titles=[f"t = {t:.2f}" for t in levels],
)

# %%
frames = [
    study.tile(linear.add_noise(row, t, eps), columns=5)
    for t in torch.linspace(0, 1, 8, dtype=F64) ** 2
]
study.animate(torch.stack(frames), fps=4, scale=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One step
#
# Call the clean picture $x_0$. One step of the *forward process* shrinks it a little and adds a little noise
# (Sohl-Dickstein et al. 2015; Ho et al. 2020, Eq. 2):
#
# $$q(x_t \mid x_{t-1}) = \mathcal N\big(\sqrt{1-\beta_t}\;x_{t-1},\ \beta_t I\big)
# \qquad\Longleftrightarrow\qquad
# x_t = \sqrt{1-\beta_t}\;x_{t-1} + \sqrt{\beta_t}\;\epsilon_t,\quad \epsilon_t\sim\mathcal N(0, I).$$
#
# - $\beta_t \in (0, 1)$ is the variance that step $t$ adds. DDPM takes 1,000 steps, with $\beta$ rising linearly from
#   $10^{-4}$ to $0.02$.
# - **Why shrink?** If $x_{t-1}$ has variance 1, then $x_t$ has variance $(1-\beta_t)\cdot 1 + \beta_t = 1$ again. The
#   variance is *preserved*; without the factor it would grow with every step.
# - **Why square roots?** A draw from a Gaussian is mean + *standard deviation* × $\epsilon$, and $\beta_t$ is a variance.
#   Most bugs of this lecture are a missing root.
#
# ## A thousand steps in one
#
# Put one step into the next:
#
# $$x_t = \sqrt{1-\beta_t}\,\Big(\sqrt{1-\beta_{t-1}}\,x_{t-2} + \sqrt{\beta_{t-1}}\,\epsilon_{t-1}\Big) + \sqrt{\beta_t}\,\epsilon_t .$$
#
# The two noises are independent Gaussians, so that their variances add: $(1-\beta_t)\,\beta_{t-1} + \beta_t = 1 - (1-\beta_t)(1-\beta_{t-1})$.
# Two steps are *one larger step*, whose signal keeps the share $(1-\beta_t)(1-\beta_{t-1})$ of the variance. By induction, with
# $\bar\alpha_t = \prod_{s=1}^{t}(1-\beta_s)$,
#
# $$\boxed{\;x_t = \sqrt{\bar\alpha_t}\;x_0 + \sqrt{1-\bar\alpha_t}\;\epsilon\;}\qquad (\text{Ho et al. 2020, Eq. 4})$$
#
# $\bar\alpha_t$ is the one number that matters: **the share of the variance that is still signal**, for data of variance 1. Training never walks
# through the steps; it jumps.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One interface for every schedule
#
# Some schedules preserve variance and some do not. All have the form $x_t = \alpha(t)\,x_0 + \mathrm{std}(t)\,\epsilon$, so a
# schedule *is* its two functions $\alpha$ and $\mathrm{std}$. Everything else is derived from them. A step from $s$ to $t$ scales by $a=\alpha(t)/\alpha(s)$, so that the signal fits, and adds noise
# of variance $b^2=\mathrm{std}(t)^2-a^2\,\mathrm{std}(s)^2$, so that the noise does:

# %%
study.source(Schedule.add_noise, Schedule.transition)

# %% [markdown]
# | schedule | $\alpha(t)$ | $\mathrm{std}(t)$ | source |
# |---|---|---|---|
# | linear (VP) | $e^{-\frac12\left(\beta_{\min}t + \frac12(\beta_{\max}-\beta_{\min})t^2\right)}$ | $\sqrt{1-\alpha^2}$ | Ho 2020; Song 2021 |
# | cosine | $\cos\!\big(\tfrac\pi2\tfrac{t+s}{1+s}\big)/\cos\!\big(\tfrac\pi2\tfrac{s}{1+s}\big)$ | $\sqrt{1-\alpha^2}$ | Nichol and Dhariwal 2021 |
# | EDM (VE) | $1$ | $\big(\sigma_{\min}^{1/\rho}+t\,(\sigma_{\max}^{1/\rho}-\sigma_{\min}^{1/\rho})\big)^{\rho}$ | Karras 2022 |
# | flow | $1-t$ | $t$ | Liu 2023; Lipman 2023 |
#
# *VP* is variance preserving ($\alpha^2+\mathrm{std}^2=1$), *VE* variance exploding ($\alpha = 1$, the noise alone grows).
# Time is now continuous, $t\in[0,1]$, and DDPM's step $k$ of $1{,}000$ is $t=k/1{,}000$. Constants: $\beta_{\min}=0.1$ and $\beta_{\max}=20$ ($1{,}000$ times DDPM's first and last
# $\beta$); $s=0.008$; $\sigma_{\min}=0.002$, $\sigma_{\max}=80$, $\rho=7$. In the papers on flows time runs the other way, from noise to data, so that their velocity is minus ours.

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment 1: steps and jump agree, for every schedule
#
# The claim is exact, so we test it like one. Take 20,000 points of a lopsided mixture in the plane. Send one copy through 200 single
# steps to the time at which signal and noise are equal, jump with the other, and compare means and covariances. A control, the jump with its picture left out,
# must fail. They are averages over random draws, so they may
# differ by a few *standard errors*, and by no more: 4.5 of them is a chance of one in 150,000
# for one number, and of one in 4,000 for any of the 35 numbers compared here.


# %%
def standard_errors_apart(a, b):
    """Largest difference of the means and of the second moments of two sets of points (n, d), in standard errors."""

    def compare(p, q):
        error = (p.var(0) / len(p) + q.var(0) / len(q)).sqrt()
        return float(((p.mean(0) - q.mean(0)).abs() / error).max())

    centre = a.mean(0)
    products = [((p - centre)[:, :, None] * (p - centre)[:, None, :]).flatten(1) for p in (a, b)]
    return compare(a, b), compare(*products)


blobs, n = toys.three_blobs(), 20_000
schedules = [get(name) for name in CONTINUOUS] + [
    Discrete(linear_betas(), "DDPM table"),
    Discrete(cosine_betas(), "cosine table"),
]
print(f"{'schedule':14s} {'mean':>6s} {'covariance':>11s} {'no x0':>7s}   (standard errors apart)")
noise = torch.randn(n, 2, generator=generator(5), dtype=F64)
for schedule in schedules:
    end = float(schedule.t_of_sigma(1.0))  # as much signal as noise: a lost picture would show
    times = torch.linspace(schedule.t_min, end, 201, dtype=F64)
    walked = schedule.add_noise(
        blobs.sample(n, generator(1)),
        times[0],
        torch.randn(n, 2, generator=generator(2), dtype=F64),
    )
    for k, (t_prev, t) in enumerate(itertools.pairwise(times)):
        a, b = schedule.transition(t_prev, t)
        walked = a * walked + b * torch.randn(n, 2, generator=generator(3, k), dtype=F64)
    jumped = schedule.add_noise(blobs.sample(n, generator(4)), times[-1], noise)
    mean, covariance = standard_errors_apart(walked, jumped)
    control = max(standard_errors_apart(walked, schedule.std(times[-1]) * noise))
    print(f"{schedule.name:14s} {mean:6.2f} {covariance:11.2f} {control:7.1f}")
    assert max(mean, covariance) < 4.5 < control

betas = linear_betas()  # and DDPM's own steps, with beta itself: 300 of them, against one jump
walked = blobs.sample(n, generator(1))
for k, beta in enumerate(betas[:300]):
    eps_t = torch.randn(n, 2, generator=generator(6, k), dtype=F64)
    walked = (1 - beta).sqrt() * walked + beta.sqrt() * eps_t
jumped = Discrete(betas).add_noise(blobs.sample(n, generator(4)), torch.tensor(299), noise)
mean, covariance = standard_errors_apart(walked, jumped)
print(f"{'300 betas':14s} {mean:6.2f} {covariance:11.2f}")
assert max(mean, covariance) < 4.5

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How noisy is noisy?
#
# The difficulty of denoising at time $t$ is a ratio of variances, the **signal-to-noise ratio** (Kingma et al. 2021, Eq. 2):
#
# $$\mathrm{SNR}(t) = \frac{\alpha(t)^2}{\mathrm{std}(t)^2} = \frac{\bar\alpha_t}{1-\bar\alpha_t}\ \text{(for VP)}.$$
#
# Two schedules that share an SNR pose *the same problem*: one is the other, scaled. So the course has a single coordinate. Divide
# by $\alpha(t)$:
#
# $$\frac{x_t}{\alpha(t)} = x_0 + \sigma\,\epsilon,\qquad \sigma(t) = \frac{\mathrm{std}(t)}{\alpha(t)},\qquad \mathrm{SNR} = \frac1{\sigma^2}.$$
#
# From here on $x$ means $x_0 + \sigma\epsilon$, and every sampler, guidance rule and solver of the course is written in it.
# **A schedule is then nothing but the speed at which $\sigma$ is walked through.**

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
t = torch.linspace(0.002, 0.998, 400, dtype=F64)
for name in CONTINUOUS:
    schedule = get(name)
    left.plot(
        t, schedule.alpha(t) ** 2 / (schedule.alpha(t) ** 2 + schedule.std(t) ** 2), label=name
    )
    right.plot(t, schedule.log_snr(t), label=name)
left.set(xlabel="time t", ylabel="signal's share of the variance\n(data of variance 1)")
right.set(xlabel="time t", ylabel="log SNR (nats)")
right.axhline(0, color=study.COLOURS["muted"], linewidth=1)
right.legend()
t = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=F64)
for name in CONTINUOUS:
    level = get(name).log_snr(t)
    middle, late = (level.abs() < 2).double().mean(), (level < -4).double().mean()
    print(f"{name:7s} {middle:4.0%} of the time within 2 nats of 0, {late:4.0%} below -4")
plt.show()

# %% [markdown]
# Read the right-hand panel: *cosine* and *flow* spend about half of their time (56 % and 46 %) where signal and noise are comparable, within 2 nats of 0; *linear* spends
# 35 % there, and 37 % below $-4$, where hardly anything is left to learn (cosine 9 %, flow 12 %). *EDM*'s time is the sampler's: it too passes the middle fast (20 %).
#
# One schedule becomes another by looking up the time of equal $\sigma$:

# %%
cosine, x0 = get("cosine"), images[:10].double()
same = SampleNoise(7)(x0)
t_linear = torch.tensor(0.3, dtype=F64)
t_cosine = cosine.t_of_sigma(linear.sigma(t_linear))  # where cosine is at the same level
a = linear.add_noise(x0, t_linear, same) / linear.alpha(t_linear)
b = cosine.add_noise(x0, t_cosine, same) / cosine.alpha(t_cosine)
assert float((a - b).abs().max()) < 1e-12  # float64 rounding
print(f"linear at t = {t_linear:.2f} and cosine at t = {t_cosine:.2f} are one picture, scaled")

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment 2: the promises of the interface
#
# Three promises, for every schedule: where it says that variance is preserved, $\alpha^2+\mathrm{std}^2=1$; the SNR falls strictly; and the
# tables are those that the rest of the world trained with, here the `alphas_cumprod` of Hugging Face's diffusers.

# %%
from diffusers import DDPMScheduler

for schedule in schedules:
    times = torch.linspace(schedule.t_max * 1e-3, schedule.t_max * 0.999, 1000, dtype=F64)
    kept = (schedule.alpha(times) ** 2 + schedule.std(times) ** 2 - 1).abs().max()
    assert (kept < 1e-12) == schedule.preserves_variance
    assert bool((schedule.snr(times).diff() < 0).all())

tables = {
    "linear": linear_betas(),
    "scaled_linear": scaled_linear_betas(),
    "squaredcos_cap_v2": cosine_betas(),
}
ends = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "squaredcos_cap_v2": (1e-4, 0.02),
}
for name, betas in tables.items():
    theirs = DDPMScheduler(
        beta_schedule=name, beta_start=ends[name][0], beta_end=ends[name][1]
    ).alphas_cumprod
    gap = float((Discrete(betas).table - theirs.double()).abs().max())
    print(f"{name:18s} largest difference from diffusers {gap:.0e}")
    assert gap < 1e-6

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Move the slider. Left: a digit at time $t$. Middle: the histogram of its pixels, which becomes a bell. Right: where you are on
# the log-SNR curve. **At which log SNR do you stop reading the digit?** Try all four schedules: the time differs, the log SNR hardly does.

# %%
study.ScheduleExplorer(images[0])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where does it end?
#
# Sampling will start from pure noise, so the forward process must *arrive* there. How far from $\mathcal N(0, I)$ is the last step?
# The Kullback-Leibler divergence $\mathrm{KL}(q\,\|\,p)=\mathbb E_q[\ln q-\ln p]$ measures it, in nats (1 nat = 1.44 bits). For a picture $x_0$ of mean square
# $m^2$ per pixel, with $T$ the last step,
#
# $$\mathrm{KL}\big(q(x_T\mid x_0)\,\big\|\,\mathcal N(0, I)\big)
# = \tfrac12\big(\bar\alpha_T\,m^2 - \bar\alpha_T - \ln(1-\bar\alpha_T)\big)\ \text{nats per pixel}
# \;\approx\; \tfrac12\,\bar\alpha_T\,m^2 .$$

# %%
mean_square = float(images.square().mean())
print(f"{'table':18s} {'alpha_bar_T':>12s} {'sqrt':>7s}   KL, bits for a 16 x 16 picture")
for name, betas in tables.items():
    last = float(Discrete(betas).table[-1])
    kl = 256 * (last * mean_square - last - math.log1p(-last)) / 2 / math.log(2)
    print(f"{name:18s} {last:12.1e} {last**0.5:7.3f}   {kl:.4f}")

# %% [markdown]
# DDPM's table ends 0.004 bits away from pure noise. *Stable Diffusion's* `scaled_linear` is a hundred times farther, half a bit: $\sqrt{\bar\alpha_T} = 0.068$, so that seven
# percent of the picture's amplitude survives, and with it the picture's mean brightness. A model trained on that has never seen pure noise, yet is
# started from it: the reason why Stable Diffusion 1 and 2 could hardly paint very dark or very bright pictures (Lin et al. 2024).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What a denoiser can know
#
# Given $x = x_0 + \sigma\epsilon$, which guess of $x_0$ has the smallest squared error? Always the **posterior mean**
#
# $$D(x, \sigma) = \mathbb E[x_0 \mid x],$$
#
# because $\mathbb E\big[\lVert x_0-g\rVert^2\mid x\big] = \mathbb E\big[\lVert x_0-D\rVert^2\mid x\big] + \lVert D-g\rVert^2$ (the cross term averages to 0), which is least at $g = D$.
# This function is all that a diffusion model learns, and in this course a *Denoiser* is exactly that: a function of $x$ and $\sigma$. Let $p_\sigma$ be the density of $x$.
# The denoiser also gives $p_\sigma$'s **score** $\nabla_x\log p_\sigma$, the direction in which the density grows:
#
# $$D(x, \sigma) = x + \sigma^2\,\nabla_x \log p_\sigma(x)\qquad\text{(Tweedie's formula; Robbins 1956, Efron 2011)}.$$
#
# **Derivation.** $p_\sigma(x) = \int p(x_0)\,\mathcal N(x; x_0, \sigma^2 I)\,dx_0$. Differentiate under the integral:
# $\nabla_x\,\mathcal N(x; x_0,\sigma^2 I) = \frac{x_0 - x}{\sigma^2}\,\mathcal N(x; x_0,\sigma^2 I)$. Divide by $p_\sigma(x)$; by Bayes' rule $p(x_0)\,\mathcal N(x; x_0,\sigma^2 I)/p_\sigma(x) = p(x_0\mid x)$, hence
# $\nabla \log p_\sigma(x) = \frac{1}{\sigma^2}\big(\mathbb E[x_0\mid x] - x\big)$. Multiply by $\sigma^2$. ∎
#
# For a mixture of Gaussians both sides are known in closed form. (You derive them in items 01.7 and 01.8.) Here is the field $D(x,\sigma)-x$ at three noise levels, over
# the density $p_\sigma$. Each panel has its own scale of arrows and of blue, and its longest arrows are cut.

# %%
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), sharey=True)
for ax, sigma in zip(axes, (0.2, 0.8, 2.0), strict=True):
    study.density(ax, lambda p, s=sigma: blobs.log_prob(p, s), extent=(-3, 3, -3, 3))
    study.field(ax, lambda p, s=sigma: blobs.denoiser(p, s) - p, extent=(-3, 3, -3, 3), n=11)
    ax.set_title(rf"$\sigma$ = {sigma}")
plt.show()

# %%
points = 2 * torch.randn(2000, 2, generator=generator(6), dtype=F64)
for sigma in (0.05, 0.5, 5.0):
    x = points.clone().requires_grad_()
    (score,) = torch.autograd.grad(blobs.log_prob(x, sigma).sum(), x)
    gap = (blobs.denoiser(points, sigma) - points - sigma**2 * score).abs().max()
    assert gap < 1e-12  # float64 rounding
print("Tweedie's formula holds to rounding, with the gradient taken by autograd")

# %% [markdown] slideshow={"slide_type": "slide"}
# ### The loss, and four names for one guess
#
# Training needs nothing but the jump. Draw a clean $x_0$, a time $t$ and noise $\epsilon$, make $x_t$, ask a network $\epsilon_\theta$ (with weights $\theta$)
# for the noise, and lower
#
# $$L(\theta) = \mathbb E_{x_0,\,t,\,\epsilon}\,\big\lVert\epsilon-\epsilon_\theta(x_t,t)\big\rVert^2\qquad(\text{Ho et al. 2020, Algorithm 1 and Eq. 14}).$$
#
# A squared error is least at a posterior mean, here $\mathbb E[\epsilon\mid x_t] = (x-D)/\sigma$, since $\epsilon = (x-x_0)/\sigma$: a network that predicts the noise knows $D$.
# There are four customs. A hat marks the network's answer; in the row of $v$, $\alpha = 1/\sqrt{1+\sigma^2}$ and $\mathrm{std} = \sigma/\sqrt{1+\sigma^2}$ (VP).
# Each answer is an *affine* function of $D$ (a multiple plus a shift), known once $x$ is:
#
# | prediction | definition | as a Denoiser | the loss weighs $\lVert D - x_0\rVert^2$ by |
# |---|---|---|---|
# | noise $\epsilon$ (DDPM) | $\epsilon$ | $D = x - \sigma\,\hat\epsilon$ | $1/\sigma^2$ |
# | data $x_0$ | $x_0$ | $D = \hat x_0$ | $1$ |
# | $v$ (Salimans and Ho 2022) | $\alpha\,\epsilon - \mathrm{std}\;x_0$ | $D = \frac{x}{1+\sigma^2} - \frac{\sigma}{\sqrt{1+\sigma^2}}\,\hat v$ | $(1+\sigma^2)/\sigma^2$ |
# | velocity $u$ (flow) | $\epsilon - x_0$ | $D = \frac{x - \sigma\,\hat u}{1+\sigma}$ | $(1+\sigma)^2/\sigma^2$ |
#
# So "which prediction?" is two questions: how the network's output is scaled, and which noise levels the loss cares for. The error of $D$
# is $\sigma$ times that of $\hat\epsilon$: at small $\sigma$ a poor $\hat\epsilon$ does no harm, at large $\sigma$ a small error of $\hat\epsilon$ ruins $D$.

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
s = torch.logspace(-2, 2, 200, dtype=F64)
for name, weight in {
    "eps": s**-2,
    "x0": s**0,
    "v": (1 + s**2) / s**2,
    "flow": (1 + s) ** 2 / s**2,
}.items():
    ax.loglog(s, weight, label=name)
ax.set(xlabel=r"noise level $\sigma$", ylabel=r"weight of $\|D - x_0\|^2$")
ax.legend(title="prediction")
plt.show()

# %%
# the table, measured: let each prediction be off by the same amount
x0, eps, off = images[:10].double(), *(SampleNoise(seed)(images[:10].double()) for seed in (7, 8))
for sigma in (0.05, 1.0, 20.0):
    x, alpha, std = x0 + sigma * eps, (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
    targets = (eps, x0, alpha * eps - std * x0, eps - x0)
    eps_hat, x0_hat, v_hat, u_hat = (target + off for target in targets)
    rows = [
        (x - sigma * eps_hat, 1 / sigma**2),
        (x0_hat, 1),
        (x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * v_hat, (1 + sigma**2) / sigma**2),
        ((x - sigma * u_hat) / (1 + sigma), (1 + sigma) ** 2 / sigma**2),
    ]
    for guess, weight in rows:  # equal up to float64 rounding
        assert float((weight * (guess - x0).square() - off.square()).abs().max()) < 1e-10
print("all four rows of the table hold")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The best denoiser and a trained one
#
# If the data were *only* the training images, the posterior mean would be an average of them, weighted by how well each explains $x$:
#
# $$D_{\text{emp}}(x,\sigma) = \sum_i p(i\mid x)\,x_i,\qquad p(i\mid x)\propto \exp\!\big(-\lVert x-x_i\rVert^2/2\sigma^2\big).$$
#
# This is the exact minimiser of the training loss, and it is useless: it can only give averages of training images back, at small $\sigma$ the images themselves. The model of this course, `digits`,
# a U-Net trained on the same 1,437 images, does something else. Look at *held-out* digits, through both (noisy ones are shown as $x/\sqrt{1+\sigma^2}$, clipped; the network is not told the class).

# %%
D = zoo.load("digits", device="cpu")  # small enough that a GPU would not help
memory = Empirical(images)
six = held_out[:6]
rows, titles = [list(six)], ["clean"]
for sigma in (0.3, 0.8, 1.6):
    x = six + sigma * SampleNoise(11)(six)
    with torch.no_grad():
        rows += [
            list(x / (1 + sigma**2) ** 0.5),
            list(D(x, torch.tensor(sigma))),
            list(memory(x, torch.tensor(sigma))),
        ]
    titles += [rf"noisy, $\sigma$ = {sigma}", "trained network", "memory"]
study.strip(rows, row_titles=titles)

# %% [markdown]
# ### Experiment 3: remembering is not denoising
#
# On the training images the memorising denoiser cannot be beaten. On images that it has not seen the network must win wherever
# the digit is still visible, up to $\sigma = 0.8$; otherwise it has learned nothing that a look-up table does not know. At $\sigma = 1.6$ the two are level:
# little is left but the average.


# %%
def errors(denoiser, clean, sigma):
    """Squared error per pixel of a denoiser at one noise level, for each image: (n,)."""
    with torch.no_grad():
        guess = denoiser(clean + sigma * SampleNoise(12)(clean), torch.tensor(sigma))
    return (guess - clean).square().flatten(1).mean(1)


def lead(worse, better):
    """How far `better` is ahead on the same noisy images, in standard errors of the difference."""
    gap = worse - better
    return float(gap.mean() / (gap.var() / len(gap)).sqrt())


sigmas = (0.1, 0.2, 0.4, 0.8, 1.6)
network, network_train = ([errors(D, c, s) for s in sigmas] for c in (held_out, images[:360]))
table, table_train = ([errors(memory, c, s) for s in sigmas] for c in (held_out, images[:360]))
curves = {
    "network, held-out digits": (network, "o-", "model"),
    "network, training digits": (network_train, "o--", "model"),
    "memory, held-out digits": (table, "s-", "warn"),
    "memory, training digits": (table_train, "s--", "warn"),
}
fig, ax = plt.subplots(figsize=(7, 4.4))
for name, (values, line, colour) in curves.items():
    means = [max(float(value.mean()), 1e-5) for value in values]  # less is drawn at 1e-5
    style = {"color": study.COLOURS[colour], "clip_on": False}
    style |= {"markerfacecolor": "white"} if "--" in line else {}
    ax.loglog(sigmas, means, line, label=name, **style)
ax.set(xlabel=r"noise level $\sigma$", ylabel="squared error per pixel", ylim=(1e-5, 1))
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handlelength=3)
ahead = [lead(a, b) for a, b in zip(table, network, strict=True)]
print("the network leads on held-out digits by", [f"{a:.1f}" for a in ahead], "standard errors")
assert min(ahead[:4]) > 4.5  # up to sigma = 0.8
assert all(lead(a, b) > 4.5 for a, b in zip(network_train, table_train, strict=True))
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A look ahead: the way back
#
# Knowing $D$ at every noise level is enough to walk back from noise to a digit (lectures 02 and 03): step by step, move from $x$ a little
# towards $D(x,\sigma)$, and let $\sigma$ fall. The ten digits below come out of pure noise, each asked for by its class.

# %%
ten = D.given(label=torch.arange(10))
levels = karras(28, 0.01, 20.0)
x = SampleNoise(4).start((10, *digits.SHAPE), levels[0])
walk = Trajectory(x, levels[0])
sample(ten, x, levels, on_step=walk)
frames = [
    study.tile(x / (1 + s**2) ** 0.5, columns=5)
    for x, s in zip(walk.x[::4], walk.sigmas[::4], strict=True)
]
study.animate(torch.stack(frames), fps=4, scale=3)

# %% [markdown]
# Scrub through such a walk yourself: above is the noisy state $x$, below the model's guess $\hat x_0 = D(x,\sigma)$ at that moment. The guess
# starts as the average of its class, takes a shape of its own around $\sigma \approx 1$, and only then sharpens.

# %%
asked = torch.arange(6)
study.ReverseExplorer(
    D.given(label=asked),
    "digits 0 to 5, asked for by class",
    n=6,
    sigmas=lambda n: karras(n, 0.01, 20.0),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# The bugs of the forward process never crash. They change a variance, and the model then learns to undo *another* process. Watch the variance
# of $x_t$, for data of variance 1: it must stay 1.

# %%
betas = linear_betas()
alpha_bar = torch.cumprod(1 - betas, 0)
variance = {
    "right": (alpha_bar + (1 - alpha_bar), "exact"),
    r"$\beta_t$ for $1-\bar\alpha_t$": (alpha_bar + betas, "warn"),
    "no square roots": (alpha_bar**2 + (1 - alpha_bar) ** 2, "model"),
    r"noise $\times\,(1-\bar\alpha_t)$": (alpha_bar + (1 - alpha_bar) ** 2, "guide"),
}
fig, ax = plt.subplots(figsize=(8, 3.8))
for name, (values, colour) in variance.items():
    ax.plot(torch.arange(1, 1001), values, color=study.COLOURS[colour], label=name)
ax.set(xlabel="step t of 1,000", ylabel=r"variance of $x_t$", ylim=(0, 1.1))
ax.legend(loc="center right")
plt.show()

# %% [markdown]
# | you see | it is | mend |
# |---|---|---|
# | $x_T$ is nearly 0, samples are grey | the noise was scaled by $\beta_t$, one step's share | $1-\bar\alpha_t$, from `cumprod` |
# | the variance dips to 1/2 | no square roots (correct for a *flow*, wrong for DDPM) | $\sqrt{\bar\alpha_t}$, $\sqrt{1-\bar\alpha_t}$ |
# | the variance dips to 3/4 | the noise alone lost its root | $\sqrt{1-\bar\alpha_t}$ |
# | training is fine, samples all have about the same mean brightness | $\bar\alpha_T$ is not near 0 | a schedule with zero terminal SNR |
# | all samples of a batch look equally noisy | one $t$ for the whole batch | draw $t$ for each sample, reshape to (B, 1, 1, 1) |
#
# The cure is always the same test: push data of known mean and variance through, and compare with the closed form. It catches
# the wrong variances, each by dozens of standard errors. It does not see the last two rows of the table: for those look at $\bar\alpha_T$ and at the shape of `t`.

# %%
x0 = blobs.sample(50_000, generator(8))
eps = torch.randn(x0.shape, generator=generator(9), dtype=F64)
beta, a = betas[250], alpha_bar[250]
exact = (a * blobs.cov + (1 - a) * torch.eye(2, dtype=F64)).diagonal()
tries = {
    "right": a.sqrt() * x0 + (1 - a).sqrt() * eps,
    "beta for 1 - alpha_bar": a.sqrt() * x0 + beta.sqrt() * eps,
    "no square roots": a * x0 + (1 - a) * eps,
    "noise x (1 - alpha_bar)": a.sqrt() * x0 + (1 - a) * eps,
}
for name, x_t in tries.items():
    squares = (x_t - x_t.mean(0)).square()
    error = (squares.var(0) / len(squares)).sqrt()  # standard error of the variance
    apart = float(((squares.mean(0) - exact).abs() / error).max())
    print(f"{name:24s} variance {apart:6.1f} standard errors from the closed form")
    assert (apart < 4.5) == (name == "right")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# Nothing above knows what $x_0$ is. In Stable Diffusion it is a latent of 4 × 64 × 64 numbers in place of a digit, and the schedule is the
# `scaled_linear` table; the code is the same line. (A draw of noise of that shape stands in for a latent here: the encoder that makes latents comes in lecture 05.) Its levels, in the course's coordinate, and those of DDPM:

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
for name, betas in {
    "DDPM": linear_betas(),
    "Stable Diffusion 1.5": scaled_linear_betas(),
    "cosine": cosine_betas(),
}.items():
    ax.semilogy(torch.arange(1000), Discrete(betas).sigma(torch.arange(1000)), label=name)
ax.set(xlabel="trained step t", ylabel=r"$\sigma$, noise over signal", ylim=(5e-3, 1e3))
ax.legend()
latent = SampleNoise(1)(torch.empty(1, 4, 64, 64))
stable = Discrete(scaled_linear_betas(), "Stable Diffusion")
x_t = stable.add_noise(latent, torch.tensor([500]), SampleNoise(2)(latent))
print(
    f"a latent of shape {tuple(x_t.shape)} at t = 500: sigma = {float(stable.sigma(torch.tensor(500.0))):.3f}"
)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - $x_t = \alpha(t)\,x_0 + \mathrm{std}(t)\,\epsilon$: a schedule is two functions. For DDPM $\alpha^2 = \bar\alpha$ and $\mathrm{std}^2 = 1-\bar\alpha$.
# - In the coordinate $x = x_0+\sigma\epsilon$ all schedules are one process, walked at different speeds.
# - The posterior mean $D(x,\sigma)=\mathbb E[x_0\mid x]$ is all there is to learn; $\epsilon$, $x_0$, $v$ and velocity are names for it.
# - Test moments, not pictures.
#
# **Exercises.** [Set 01](../my_course/01_forward_process.ipynb): nine functions, 17 points. `course lab` puts a copy for you into `my_course/`; each check names the
# mistake that was made.
#
# ## Sources
#
# - J. Sohl-Dickstein, E. Weiss, N. Maheswaranathan, S. Ganguli. *Deep Unsupervised Learning using Nonequilibrium Thermodynamics.* 2015. arXiv:1503.03585
# - J. Ho, A. Jain, P. Abbeel. *Denoising Diffusion Probabilistic Models.* 2020. arXiv:2006.11239
# - A. Nichol, P. Dhariwal. *Improved Denoising Diffusion Probabilistic Models.* 2021. arXiv:2102.09672
# - Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole. *Score-Based Generative Modeling through Stochastic Differential Equations.* 2021. arXiv:2011.13456
# - D. Kingma, T. Salimans, B. Poole, J. Ho. *Variational Diffusion Models.* 2021. arXiv:2107.00630
# - T. Salimans, J. Ho. *Progressive Distillation for Fast Sampling of Diffusion Models.* 2022. arXiv:2202.00512
# - R. Rombach, A. Blattmann, D. Lorenz, P. Esser, B. Ommer. *High-Resolution Image Synthesis with Latent Diffusion Models.* 2022. arXiv:2112.10752
# - T. Karras, M. Aittala, T. Aila, S. Laine. *Elucidating the Design Space of Diffusion-Based Generative Models.* 2022. arXiv:2206.00364
# - X. Liu, C. Gong, Q. Liu. *Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow.* 2023. arXiv:2209.03003
# - Y. Lipman, R. Chen, H. Ben-Hamu, M. Nickel, M. Le. *Flow Matching for Generative Modeling.* 2023. arXiv:2210.02747
# - S. Lin, B. Liu, J. Li, X. Yang. *Common Diffusion Noise Schedules and Sample Steps are Flawed.* 2024. arXiv:2305.08891
# - B. Efron. *Tweedie's Formula and Selection Bias.* 2011. H. Robbins. *An Empirical Bayes Approach to Statistics.* 1956.
# - Data: E. Alpaydin, C. Kaynak. *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998, as scikit-learn ships it.
