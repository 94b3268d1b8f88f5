# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 01: the forward process
#
# Nine short functions, from one line to a small whole: noise a picture, jump to any time, design a schedule,
# find the exact denoiser, write the loss that trains every diffusion model.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("01.1")` gives the next hint, `solution("01.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 01.1 one step of noise | 1 | | 01.6 eps, x0 and v | 2 |
# | 01.2 jump to any time | 2 | | 01.7 exact denoiser of a Gaussian | 2 |
# | 01.3 a schedule of your own | 2 | | 01.8 E[x0 \| x] of a mixture | 3 |
# | 01.4 signal-to-noise ratio | 1 | | 01.9 the training loss | 3 |
# | 01.5 from alpha_bar to sigma | 1 | | **all** | **17** |
#
# Symbols: `x0` clean data, `eps` standard normal noise, `beta` the variance that one step adds,
# `alpha_bar` the share of the variance that is still signal, `sigma` noise over signal.

# %%
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from course_lib import study
from course_lib.devices import generator
from course_lib.grading.check import check, hint, solution
from course_lib.schedules import cosine_betas, linear_betas
from course_lib.worlds import digits, toys

torch.set_num_threads(1)
study.use()
images, labels = digits.load("train")
betas = linear_betas(1000)

# %% [markdown] item="01.1"
# The forward process adds a little noise, again and again:
#
# $$q(x_t \mid x_{t-1}) = \mathcal N\left(\sqrt{1-\beta_t}\,x_{t-1},\ \beta_t I\right)$$
#
# Draw from it: return $x_t$, given $x_{t-1}$ as `x_prev`, the number $\beta_t$ as `beta` and standard normal noise
# `eps` of the shape of `x_prev`. (Ho et al. 2020, Eq. 2.)


# %% item="01.1"
def noising_step(x_prev: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
    """One draw of q(x_t | x_{t-1}); x_prev and eps (B, ...), beta 0-d."""
    ### BEGIN SOLUTION
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * eps
    ### END SOLUTION


# %% item="01.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
noising_step = check("01.1", noising_step)

# %% [markdown]
# The step, one thousand times. The digit sinks into noise and nothing explodes: each step takes the variance, on average, a
# share beta nearer to 1. (t = 0 is the clean digit here, so t = 50 is after `betas[49]`.)

# %%
x, kept = images[:1], [images[0]]
for t, beta in enumerate(betas.float(), 1):
    x = noising_step(x, beta, torch.randn(x.shape, generator=generator(1, t)))
    if t in (50, 150, 300, 500, 1000):
        kept.append(x[0])
study.grid(torch.stack(kept), columns=6, titles=["t = 0", "50", "150", "300", "500", "1000"])

# %% [markdown] item="01.2"
# A thousand steps for one training example would be slow. Gaussians compose, so one draw does it:
#
# $$q(x_t \mid x_0) = \mathcal N\left(\sqrt{\bar\alpha_t}\,x_0,\ (1-\bar\alpha_t) I\right),\qquad
# \bar\alpha_t = \prod_{s\le t} (1-\beta_s)$$
#
# Every sample of the batch has a time of its own: `t` is `(B,)`, an index into `betas` that counts from 0, and the
# product includes `betas[t]`. (Ho et al. 2020, Eq. 4.)


# %% item="01.2"
def noise_to(x0: Tensor, t: Tensor, betas: Tensor, eps: Tensor) -> Tensor:
    """One draw of q(x_t | x_0); x0 and eps (B, C, H, W), t (B,) integers, betas (T,)."""
    ### BEGIN SOLUTION
    alpha_bar = torch.cumprod(1 - betas, 0)[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    ### END SOLUTION


# %% item="01.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
noise_to = check("01.2", noise_to)

# %% [markdown]
# The same digit at six times, each in a single draw.

# %%
times = torch.tensor([0, 49, 149, 299, 499, 999])
six = images[:1].expand(6, -1, -1, -1)
jumped = noise_to(six, times, betas.float(), torch.randn(six.shape, generator=generator(2)))
study.grid(jumped, columns=6, titles=[f"t = {int(t) + 1}" for t in times])

# %% [markdown] item="01.3"
# A schedule is easier to think of as $\bar\alpha$ (how much signal is left) than as $\beta$ (what a step adds).
# Turn the first into the second, so that you can draw any falling curve and train with it.
# `alpha_bar` is `(T,)`; clip the betas at 0.999, as Nichol and Dhariwal (2021, Sec. 3.2) do.


# %% item="01.3"
def betas_of(alpha_bar: Tensor) -> Tensor:
    """The betas whose cumulative product of 1 - beta is alpha_bar, at most 0.999 each; (T,) -> (T,)."""
    ### BEGIN SOLUTION
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    return (1 - alpha_bar / before).clamp_max(0.999)
    ### END SOLUTION


# %% item="01.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
betas_of = check("01.3", betas_of)

# %% [markdown]
# Now a schedule of your own: change `mine` to any curve that falls from 1 to 0, and compare.

# %%
t = torch.linspace(0, 1, 1001)[1:].double()
mine = (1 - t) ** 2  # its last beta is 1, and clipped
fig, (left, right_) = plt.subplots(1, 2, figsize=(9, 3))
for name, table in {
    "linear": linear_betas(),
    "cosine": cosine_betas(),
    "mine": betas_of(mine),
}.items():
    left.plot(t, torch.cumprod(1 - table, 0), label=name)
    right_.semilogy(t, table, label=name)
left.set(xlabel="time t / T", ylabel=r"$\bar\alpha_t$, share of signal")
right_.set(xlabel="time t / T", ylabel=r"$\beta_t$, variance of a step")
left.legend()
plt.show()

# %% [markdown] item="01.4"
# How hard is denoising at time $t$? One number tells, the signal-to-noise ratio; for
# a variance-preserving schedule $\mathrm{SNR} = \bar\alpha / (1-\bar\alpha)$. Return its natural logarithm. (Kingma et al. 2021, Eq. 2.)


# %% item="01.4"
def log_snr(alpha_bar: Tensor) -> Tensor:
    """log of the signal-to-noise ratio, in nats; any shape, values in (0, 1)."""
    ### BEGIN SOLUTION
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)
    ### END SOLUTION


# %% item="01.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
log_snr = check("01.4", log_snr)

# %% [markdown] item="01.5"
# The course has *one* coordinate: $x = x_0 + \sigma\,\epsilon$. Divide DDPM's $x_t$ by the factor of $x_0$, and it is
# in this form. Which $\sigma$ belongs to $\bar\alpha$?


# %% item="01.5"
def sigma_of(alpha_bar: Tensor) -> Tensor:
    """The noise-to-signal ratio of a variance-preserving schedule; any shape, values in (0, 1)."""
    ### BEGIN SOLUTION
    return (1 / alpha_bar - 1).sqrt()
    ### END SOLUTION


# %% item="01.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
sigma_of = check("01.5", sigma_of)

# %% [markdown]
# DDPM's thousand steps and the cosine schedule's, in the coordinate that both share: both start near
# 0.01; linear ends at 157 and cosine at 20,000 (beyond the axis), and they spend their steps differently.

# %%
fig, ax = plt.subplots(figsize=(6, 3))
for name, table in {"linear": linear_betas(), "cosine": cosine_betas()}.items():
    ax.semilogy(t, sigma_of(torch.cumprod(1 - table, 0)), label=name)
ax.set(xlabel="time t / T", ylabel=r"$\sigma$, noise over signal", ylim=(5e-3, 1e3))
ax.legend()
plt.show()

# %% [markdown] item="01.6"
# A network may be asked for the noise $\epsilon$, the clean $x_0$, or the combination
# $v = \sqrt{\bar\alpha}\,\epsilon - \sqrt{1-\bar\alpha}\,x_0$ (Salimans and Ho 2022, App. D). Knowing $x_t$, each gives the others.
# From $x_t$ and $\epsilon$ return the pair $(x_0, v)$; `alpha_bar` is `(B,)`, one for each sample.


# %% item="01.6"
def x0_and_v(x_t: Tensor, eps: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (x0, v) that belongs to x_t and eps; x_t, eps (B, C, H, W), alpha_bar (B,)."""
    ### BEGIN SOLUTION
    alpha = alpha_bar.sqrt().reshape(-1, 1, 1, 1)
    std = (1 - alpha_bar).sqrt().reshape(-1, 1, 1, 1)
    x0 = (x_t - std * eps) / alpha
    v = alpha * eps - std * x0
    return x0, v
    ### END SOLUTION


# %% item="01.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
x0_and_v = check("01.6", x0_and_v)

# %% [markdown] item="01.7"
# What is the best guess of $x_0$ from $x = x_0 + \sigma\epsilon$? If the data are Gaussian, $x_0 \sim \mathcal N(m, s^2)$,
# the answer is exact: a compromise between the reading $x$ and the prior mean $m$, weighted by how sure each is.
# `mean` and `std` are the numbers $m$ and $s$: `std` is the width of the *data* here, not the noise's scale std(t) of the lecture.


# %% item="01.7"
def denoise_gaussian(x: Tensor, sigma: Tensor, mean: float, std: float) -> Tensor:
    """E[x0 | x] for x0 ~ N(mean, std^2), x = x0 + sigma eps; x (B,), sigma 0-d."""
    ### BEGIN SOLUTION
    return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)
    ### END SOLUTION


# %% item="01.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
denoise_gaussian = check("01.7", denoise_gaussian)

# %% [markdown] item="01.8"
# Real data are not Gaussian, but mixtures of Gaussians come as close as one likes, and stay exact:
# $x_0 \sim \sum_k w_k\,\mathcal N(m_k, s^2 I)$. Each component has the answer of item 01.7; average the answers with the
# probability $p(k \mid x)$ that $x_0$ came from component $k$.
# `std` is $s$, the same for all components; the weights are positive and sum to 1.


# %% item="01.8"
def denoise_mixture(x: Tensor, sigma: Tensor, weights: Tensor, means: Tensor, std: float) -> Tensor:
    """E[x0 | x] for a mixture of round Gaussians; x (B, d), sigma 0-d, weights (K,), means (K, d) -> (B, d)."""
    ### BEGIN SOLUTION
    variance = std**2 + sigma**2
    distance2 = (x[:, None] - means).square().sum(-1)  # (B, K)
    share = torch.softmax(weights.log() - distance2 / (2 * variance), dim=-1)
    each = (std**2 * x[:, None] + sigma**2 * means) / variance  # (B, K, d)
    return (share[..., None] * each).sum(1)
    ### END SOLUTION


# %% item="01.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
denoise_mixture = check("01.8", denoise_mixture)

# %% [markdown]
# Arrows from $x$ towards $E[x_0 \mid x]$ at two noise levels, over the density of the noisy points: with much noise all
# point to the middle, with little noise to the nearest blob.

# %%
ring = toys.ring(6, std=0.2)
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
for ax, sigma in zip(axes, (2.0, 0.5), strict=True):

    def pull(points, sigma=sigma):
        return denoise_mixture(points, torch.tensor(sigma), ring.weights, ring.means, 0.2) - points

    study.density(
        ax, lambda points, sigma=sigma: ring.log_prob(points, sigma), extent=(-2.5, 2.5, -2.5, 2.5)
    )
    study.field(ax, pull, extent=(-2.5, 2.5, -2.5, 2.5), n=15)
    ax.set_title(rf"$\sigma$ = {sigma}")
plt.show()

# %% [markdown] item="01.9"
# And now the loss that trains diffusion models (Ho et al. 2020, Algorithm 1 and Eq. 14): noise each sample to its own
# time, ask the network for the noise, and return the *mean* squared error of each sample:
#
# $$L_b = \tfrac1d \left\lVert \epsilon_b - \epsilon_\theta\!\left(\sqrt{\bar\alpha_{t_b}}\,x_{0,b} + \sqrt{1-\bar\alpha_{t_b}}\,\epsilon_b,\ t_b\right)\right\rVert^2$$
#
# $b$ counts the samples of the batch, $d = CHW$ the numbers of one sample (the paper writes the sum, programs take the mean), and $\epsilon_\theta$ is the
# network: `net(x_t, t)` takes `t` as it is, `(B,)`, and returns a tensor of the shape of `x_t`. `alpha_bar` is the cumulative product already, with one entry for each time from 0.


# %% item="01.9"
def ddpm_loss(net, x0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """L_simple of each sample, (B,); x0 and eps (B, C, H, W), t (B,) integers, alpha_bar (T,)."""
    ### BEGIN SOLUTION
    signal = alpha_bar[t].reshape(-1, 1, 1, 1)
    x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
    error = net(x_t, t) - eps
    return error.square().flatten(1).mean(1)
    ### END SOLUTION


# %% item="01.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
ddpm_loss = check("01.9", ddpm_loss)

# %% [markdown]
# A last look: the loss of a network that always answers 0 is 1 at every time, since the noise has variance 1. A network
# that has learned something is below that line, on average over the times.

# %%
times = torch.arange(0, 1000, 50)
x0 = images[: len(times)]
eps = torch.randn(x0.shape, generator=generator(3))
loss = ddpm_loss(
    lambda x, t: torch.zeros_like(x), x0, times, eps, torch.cumprod(1 - betas, 0).float()
)
error = (2 / eps[0].numel()) ** 0.5  # of the mean of 256 values eps^2, each of variance 2
assert float((loss - 1).abs().max()) < 4.5 * error  # at every time
print("the loss of a network that answers 0 is 1 at every time, within its Monte-Carlo error")

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 02, where this loss trains a model.
