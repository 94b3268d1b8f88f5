# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 02 The reverse process
#
# **How to walk back from noise, and who else can.** Lecture 01 destroyed pictures. This one makes them: it derives the way back, trains a first
# model on real digits, and puts it beside the three other families of generative models, with the same means for each.
#
# After it you can
#
# - derive the step back, $q(x_{t-1}\mid x_t, x_0)$, and say what is exact in it and what is not;
# - write training (Algorithm 1) and sampling (Algorithm 2) in ten lines each, and train a model with them;
# - choose what a network predicts, average its weights, and read its learning curve against the *best possible* loss;
# - compare a GAN, a VAE, a normalising flow and a diffusion model fairly, and say what each pays;
# - compute a variational bound in bits per pixel, and see it meet an exact likelihood;
# - find out why a model whose loss falls draws noise.
#
# You need lecture 01. Time: 90 minutes. Everything runs on a laptop, with no network.

# %%
import itertools
import math
import textwrap

import matplotlib.pyplot as plt
import torch

from course_lib import chains, debugging, families, metrics, steps, study, zoo
from course_lib.denoisers import from_edm, from_eps, from_flow, from_v, from_x0
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.gaussians import Mixture
from course_lib.likelihood import bound_gap, variational_bound
from course_lib.nets.mlp import MLP
from course_lib.sample import Trajectory, sample
from course_lib.schedules import (
    Discrete,
    equal_information,
    exponential,
    karras,
    leading,
    linear_betas,
    uniform,
)
from course_lib.training import EMA, denoising_loss, edm_weight, fit
from course_lib.types import right
from course_lib.worlds import digits, toys
from course_lib.zoo import tune
from course_lib.zoo.recipes import compared

torch.set_num_threads(1)  # tiny tensors are faster on one thread
study.use()
F64 = torch.float64
blobs, ring = toys.three_blobs(), toys.ring(8)
square = (-2.6, 2.6, -2.6, 2.6)


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Three hundred points of pure noise walk back, in forty steps, to the distribution that the blue contours show: three blobs, one of which
# holds half of the points. At the start nearly all of them are outside the frame. Nobody tells a point to which blob it belongs. *When does it
# decide?* The printed number counts a point as decided when one blob has more than 90 % of the probability, given where the point is now.

# %% slideshow={"slide_type": "-"}
levels = karras(40, 0.01, 20.0)
noise = SampleNoise(3)
x = noise.start((300, 2), levels[0])
walk = Trajectory(x, levels[0])
sample(blobs.denoiser, x, levels, steps.ddpm(noise), on_step=walk)
frames = []
for k in (0, 18, 21, 26, 40):
    fig, ax = plt.subplots(figsize=(3.0, 2.9))
    study.density(ax, blobs.log_prob, square)
    study.scatter(ax, walk.x[k], colour=study.COLOURS["model"], size=8)
    ax.set(xlim=square[:2], ylim=square[2:], title=rf"$\sigma$ = {walk.sigmas[k]:.2f}")
    frames.append(fig)
    likeliest = blobs.responsibilities(walk.x[k], walk.sigmas[k]).amax(-1)
    print(f"sigma = {walk.sigmas[k]:5.2f}: {float((likeliest > 0.9).double().mean()):4.0%} decided")
study.animate(frames, fps=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One step back, if $x_0$ were known
#
# Most points decide between $\sigma = 1.6$ and $0.3$, where the noise becomes smaller than the distances between the blobs. Now to the step that moves them.
#
# The way forward has one step that is easy to write, $q(x_t\mid x_{t-1})$. The way back, $q(x_{t-1}\mid x_t)$, is not: to undo noise one must
# know what was under it, and that depends on the data. So suppose that somebody tells us $x_0$. In the course's coordinate, let $x = x_0+\sigma\epsilon$ be the state now and
# $x'$ the state at a smaller level $\sigma' < \sigma$ on the same walk; $\epsilon'$ and $\epsilon''$ below are independent standard normal noise. Two things are known about $x'$:
#
# - it was made from $x_0$: $\;x' = x_0 + \sigma'\epsilon'$, a Gaussian of variance $\sigma'^2$ around $x_0$;
# - it became $x$: $\;x = x' + \sqrt{\sigma^2-\sigma'^2}\;\epsilon''$, so that $x$ is a reading of $x'$ with error variance $\sigma^2-\sigma'^2$.
#
# Given $x'$, the state $x$ no longer depends on $x_0$, so that by Bayes' rule $q(x'\mid x,x_0)\propto q(x'\mid x_0)\,q(x\mid x')$: a product of two Gaussians in $x'$. In such a product
# the precisions, 1 / variance, add, and the mean is the average of the two centres $x_0$ and $x$, weighted by the precisions. With $\frac1{\sigma'^2}+\frac1{\sigma^2-\sigma'^2} = \frac{\sigma^2}{\sigma'^2(\sigma^2-\sigma'^2)}$,
#
# $$\boxed{\;q(x'\mid x, x_0) = \mathcal N\Big(x_0 + \frac{\sigma'^2}{\sigma^2}\,(x - x_0),\ \ \frac{\sigma'^2(\sigma^2-\sigma'^2)}{\sigma^2}\,I\Big)\;}$$
#
# Read it: go from $x$ towards $x_0$ until only the share $\sigma'^2/\sigma^2$ of the way is left, then add a little noise. In DDPM's scaling,
# $x_t = \sqrt{\bar\alpha_t}\,x$, the same Gaussian is (Ho et al. 2020, Eq. 6 and 7)
#
# $$\tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0 + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t,
# \qquad \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t ,\qquad \alpha_t = 1-\beta_t .$$
#
# ### Experiment 1: is that so?
#
# Walk 50,000 points forward, $x_0\to x'\to x$, and look back. If the box is right, then what is left of $x'$ after the box's mean is taken away has the box's variance,
# and is correlated with neither $x$ nor $x_0$. Both are measured in standard errors, and must be below 4.5. A control, a mean with $\sigma'/\sigma$ for its square, must fail.

# %%
n, sigma, sigma_next = 50_000, 1.5, 0.9
x0 = blobs.sample(n, generator(1))
x_next = x0 + sigma_next * torch.randn(n, 2, generator=generator(2), dtype=F64)
x = x_next + (sigma**2 - sigma_next**2) ** 0.5 * torch.randn(
    n, 2, generator=generator(3), dtype=F64
)
ratio = sigma_next**2 / sigma**2
rest = x_next - (x0 + ratio * (x - x0))
variance = sigma_next**2 * (1 - ratio)
apart = (rest.var(0) - variance) / (variance * (2 / n) ** 0.5)  # in standard errors
correlation = torch.corrcoef(torch.cat([rest, x, x0], 1).T)[:2, 2:] * n**0.5
wrong = x_next - (x0 + sigma_next / sigma * (x - x0))  # a root where there is none
control = torch.corrcoef(torch.cat([wrong, x, x0], 1).T)[:2, 2:] * n**0.5
print(
    f"variance {float(apart.abs().max()):.1f} standard errors off,"
    f" correlation {float(correlation.abs().max()):.1f} from 0"
)
print(f"with sigma' / sigma for its square, correlation {float(control.abs().max()):.0f}")
assert apart.abs().max() < 4.5 and correlation.abs().max() < 4.5 < control.abs().max()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One step back, in earnest
#
# Nobody tells us $x_0$. Put in its place the best guess, $D(x,\sigma)=\mathbb E[x_0\mid x]$ of lecture 01. What does that cost? The true step back averages the box over
# all $x_0$ that could be under $x$:
#
# $$q(x'\mid x) = \mathbb E_{x_0\mid x}\big[q(x'\mid x, x_0)\big],\qquad
# \text{mean}\ \ D + \tfrac{\sigma'^2}{\sigma^2}(x-D),\qquad
# \text{covariance}\ \ \tfrac{\sigma'^2(\sigma^2-\sigma'^2)}{\sigma^2} I + \Big(1-\tfrac{\sigma'^2}{\sigma^2}\Big)^2\,\mathrm{Cov}[x_0\mid x].$$
#
# (The mean of the box is linear in $x_0$, which gives the first; the second is the law of total variance.)
#
# The **mean is exact** with $D$ in place of $x_0$. The covariance then lacks its second term, but that term is of *second* order in the size of the step, $1-\sigma'^2/\sigma^2$; what else tells the true
# step from a Gaussian is of third order. Halve the size of the steps, and each errs a quarter as much; there are twice as many, so that all together err half as much. That is why the reverse process has many small steps.
#
# DDPM's step is the box with $D$. It leaves a choice: the box's variance, $\tilde\beta_t$, called *small*, or a larger one, $\beta_t$, called *large*. Small is right where
# the data are a single point, so that $x_0$ is certain; large where they are $\mathcal N(0, I)$ (Ho et al. 2020, Sec. 3.2). For data of variance 1 the truth lies between, on average over $x$ (Sohl-Dickstein et al. 2015); Nichol and Dhariwal (2021) learn where.
# In the course's coordinate:

# %%
study.source(steps.ddpm)

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Algorithm 2, in ten lines
#
# The same as the paper prints it, for a network `net` that predicts $\epsilon$ from $x_t$ and $t$. Steps count from 0 here, so that `betas[0]` is the paper's $\beta_1$; the last step adds no noise.


# %%
def algorithm_2(net, x_T, betas, noise):
    """Ho et al. 2020, Algorithm 2, small variance. x_T (B, ...), betas (T,); noise(x) is N(0, I), shaped like x."""
    alpha_bar = torch.cumprod(1 - betas, 0)
    x_t = x_T
    for t in reversed(range(len(betas))):
        eps_hat = net(x_t, torch.tensor(t))
        x_t = (x_t - betas[t] / (1 - alpha_bar[t]).sqrt() * eps_hat) / (1 - betas[t]).sqrt()
        if t > 0:
            variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * betas[t]
            x_t = x_t + variance.sqrt() * noise(x_t)
    return x_t


# the paper's coordinates and the course's are one: the same noise gives the same samples
betas = linear_betas(100, 1e-3, 0.2)
table = Discrete(betas)


def exact_eps(x_t, t):
    """What a perfect network says about the blobs: (x - D) / sigma at x = x_t / sqrt(alpha_bar)."""
    sigma, x = table.sigma(t), x_t / table.alpha(t)
    return (x - blobs.denoiser(x, sigma)) / sigma


x_T = SampleNoise(5)(torch.empty(2000, 2, dtype=F64))
paper = algorithm_2(exact_eps, x_T, betas, SampleNoise(6))
levels = leading(table, 100)
ours = sample(
    blobs.denoiser, x_T / table.alpha(torch.tensor(99.0)), levels, steps.ddpm(SampleNoise(6))
)
assert float((paper - ours).abs().max()) < 1e-9  # float64 rounding over 100 steps
print("Algorithm 2 and sample(D, x, sigmas, ddpm(noise)) agree to 1e-9")

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment 2: what the number of steps buys
#
# With the *exact* denoiser, the only error left is that of the steps. On a line it can be computed without drawing a single sample: a step is a Gaussian whose
# mean depends on $x$, so the density of the whole chain is an integral, carried from level to level on a lattice (`course_lib.chains`). The data are two peaks, one heavier than the other. The chain starts with the exact density
# at $\sigma = 50$ and ends at $\sigma = 0.05$. How far is its end from the exact density there, in the Wasserstein-1 distance, the mean way that probability must be moved? Left: the densities after 25 steps. Right: the distance, in units of $x$.

# %%
peaks = toys.two_peaks(weight=0.3)
lattice = chains.line(peaks)
last = 0.05
truth = peaks.log_prob(lattice[:, None], last).exp()
counts = (25, 50, 100, 200, 400)
far = {"small": [], "large": []}
for kind, distances in far.items():
    for count in counts:
        end = chains.chain_density(peaks, equal_information(count + 1, last, 50.0), kind, lattice)
        distances.append(chains.wasserstein(end, truth, lattice))
fig, (left, right_) = plt.subplots(1, 2, figsize=(9, 3.4))
left.plot(lattice, truth, color=study.COLOURS["exact"], label="exact")
for kind, line, colour in (("small", "-", "model"), ("large", "--", "warn")):
    end = chains.chain_density(peaks, equal_information(26, last, 50.0), kind, lattice)
    left.plot(lattice, end, line, color=study.COLOURS[colour], label=f"{kind}, 25 steps")
    right_.loglog(
        counts, far[kind], "o" + line, color=study.COLOURS[colour], label=f"{kind} variance"
    )
right_.loglog(
    counts, [0.6 * far["small"][0] * 25 / n for n in counts], ":", color="grey", label="1 / steps"
)
left.set(xlabel="x", ylabel="density", xlim=(-2.2, 2.2))
right_.set(xlabel="steps", ylabel="distance to the exact density")
right_.set_xticks(counts, [str(n) for n in counts])
right_.set_yticks((0.005, 0.01, 0.02, 0.05), ("0.005", "0.01", "0.02", "0.05"))
right_.minorticks_off()
left.legend()
right_.legend()
for kind, distances in far.items():
    slope = math.log(distances[-1] / distances[-2]) / math.log(counts[-1] / counts[-2])
    print(
        f"{kind}: from {counts[-2]} to {counts[-1]} steps the distance falls like steps^{slope:.2f}"
    )
    assert -1.1 < slope < -0.9
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# With 25 steps *small* draws the heavy peak too sharp and *large* too flat, as the missing and the surplus variance would have it. The distance falls like 1 / steps for both: an error of second order in each step, times the number of steps.
#
# Now in the plane, with samples: can 2,000 of them be told from exact ones? The measure is the *sliced* Wasserstein distance (Bonneel et al. 2015): project both sets on a line, take the distance there, and average over many directions.
# Two *exact* sets of that size are not at distance 0 either; their distance is the **floor** of the measure. After 1,000 steps the samples must be at the floor; after 10, the control, they must not.

# %%
count, distance = 2000, {}
exact = blobs.sample(count, generator(9))
for number in (10, 1000):
    draws = SampleNoise(8)
    levels = torch.cat([equal_information(number, 0.01, 50.0), torch.zeros(1, dtype=F64)])
    start = draws.start((count, 2), levels[0], dtype=F64)
    arrived = sample(blobs.denoiser, start, levels, steps.ddpm(draws))
    distance[number] = metrics.sliced_wasserstein(arrived, exact)
    print(f"{number:4d} steps: sliced Wasserstein distance {distance[number]:.4f}")
floor, spread = metrics.sliced_wasserstein_floor(lambda n, g: blobs.sample(n, g), count, rounds=30)
print(f"two exact sets: {floor:.4f}, standard deviation {spread:.4f}")
assert distance[1000] < floor + 4.5 * spread < distance[10]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Particles on a ring of eight Gaussians, with the score field that moves them and the density that they ought to have at each level. Move the level; change DDIM, the step without noise of lecture 03, for DDPM, and the number
# of steps. **At which level has a particle chosen its Gaussian?** With how few steps can you still see eight?

# %%
study.ParticleExplorer(ring, n=120)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Algorithm 1: training
#
# All that is missing is $D$ for data that are no mixture. Lecture 01 showed that the posterior mean is the minimiser of the squared error, so it can be *learned*: noise a sample
# to a random level, ask for what was under it, and take a step down the gradient. DDPM asks for the noise (Ho et al. 2020, Algorithm 1):


# %%
def algorithm_1(net, draw, alpha_bar, steps, batch=256, lr=2e-3, seed=0):
    """Ho et al. 2020, Algorithm 1, by Adam. draw(n, generator) -> (n, d). Returns the losses and the averaged weights."""
    optimizer, ema, losses = torch.optim.Adam(net.parameters(), lr, fused=True), EMA(net, 0.995), []
    for step in range(steps):
        source = generator(seed, step)
        x0 = draw(batch, source).float()
        t = torch.randint(len(alpha_bar), (batch,), generator=source)
        eps = torch.randn(x0.shape, generator=source)
        a = right(alpha_bar[t], x0)  # one number a row, shaped to multiply x0
        loss = (eps - net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(net, step)
        losses.append(float(loss.detach()))
    return losses, ema.net


schedule = Discrete(linear_betas())
nets, averages, curves = [], [], []
for seed in range(3):
    torch.manual_seed(seed)
    nets.append(MLP(2, width=96))
    losses, average = algorithm_1(nets[-1], blobs.sample, schedule.table, steps=1000, seed=seed)
    curves.append(losses)
    averages.append(average)

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Reading the learning curve
#
# The loss falls fast, then hovers, forever noisy, far above 0. Has training failed? Usually nobody can tell. Here we can: the *exact* denoiser $D^*$, asked 20,000 such questions, has the loss of the black line.
# On average it cannot be beaten, because noise cannot be told from data with certainty. By lecture 01, $\mathbb E\lVert x_0-D\rVert^2=\mathbb E\lVert x_0-D^*\rVert^2+\mathbb E\lVert D-D^*\rVert^2$ at every level:
# what counts is only the last term, the **excess**, here with the weight $1/\sigma^2$ of the loss in $\epsilon$. The noise of the curve hides it; the code below computes it.
#
# `ema.update` in the loop keeps an **exponential moving average** $\bar w$ of the weights $w$, $\bar w\leftarrow d\,\bar w+(1-d)\,w$ with $d = 0.995$. The weights jitter around their valley, and their average lies lower in it. *Claim*: in each of three runs the average has the smaller excess.


# %%
def excess(D, sigma, n=4000, seed=11):
    """Mean |D - D*|^2 at one level, where D* is the blobs' exact posterior mean."""
    x = blobs.sample(n, generator(seed), sigma)
    with torch.no_grad():
        return float((D(x.float(), torch.tensor(sigma)) - blobs.denoiser(x, sigma)).square().mean())


def weighted_excess(net):
    """The excess of the loss in eps: averaged over the levels of DDPM's table, with its weight 1 / sigma^2."""
    D = from_eps(net, schedule.t_of_sigma)
    grid = schedule.sigma(torch.arange(25, 1000, 50)).tolist()
    return sum(excess(D, sigma) / sigma**2 for sigma in grid) / len(grid)


source = generator(12)
t = torch.randint(1000, (20_000,), generator=source)
x0, eps = blobs.sample(20_000, source), torch.randn(20_000, 2, generator=source, dtype=F64)
sigma = schedule.sigma(t)
x = x0 + sigma[:, None] * eps
eps_hat = (x - blobs.denoiser(x, sigma)) / sigma[:, None]
best = float((eps - eps_hat).square().mean())
window = torch.ones(1, 1, 25) / 25
smooth = torch.nn.functional.conv1d(torch.tensor(curves[0])[None, None], window)[0, 0]
fig, ax = plt.subplots(figsize=(8, 3.6))
ax.plot(
    curves[0], color=study.COLOURS["other"], linewidth=0.8, alpha=0.7, label="loss of each step"
)
ax.plot(range(12, 12 + len(smooth)), smooth, color=study.COLOURS["data"], label="mean of 25 steps")
ax.axhline(best, color=study.COLOURS["exact"], label=f"exact denoiser, {best:.3f}")
ax.set(xlabel="training step", ylabel=r"loss in $\epsilon$", ylim=(0, 1.1))
ax.legend()
raw, averaged = ([weighted_excess(net) for net in group] for group in (nets, averages))
print("excess over the exact denoiser, three seeds")
print("  weights of the last step", [f"{value:.4f}" for value in raw])
print("  averaged weights        ", [f"{value:.4f}" for value in averaged])
assert all(b < a for a, b in zip(raw, averaged, strict=True))
plt.show()

# %% [markdown]
# The average has less than half of the excess, in all three runs. Can one see it? Below, the same noise is walked back by three denoisers. Both networks leave stray points between the blobs where
# the exact denoiser leaves hardly any, but which of the two is the better one cannot be told from 300 points: the excess is the sharper measure.

# %%
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), sharey=True)
levels = uniform(schedule, 100)
start = SampleNoise(13).start((300, 2), levels[0])
trio = {
    "exact denoiser": blobs.denoiser,
    "averaged weights": from_eps(averages[0], schedule.t_of_sigma),
    "weights of the last step": from_eps(nets[0], schedule.t_of_sigma),
}
for ax, (name, D) in zip(axes, trio.items(), strict=True):
    study.density(ax, blobs.log_prob, square)
    study.scatter(
        ax,
        sample(D, start, levels, steps.ddpm(SampleNoise(14))),
        colour=study.COLOURS["model"],
        size=6,
    )
    ax.set(xlim=square[:2], ylim=square[2:], title=name)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What should the network predict?
#
# $\epsilon$, $x_0$, $v$ and the flow's velocity are the same thing on paper (lecture 01): each is a weight $\lambda(\sigma)$ on $\lVert D-x_0\rVert^2$. For a network of finite size and
# patience they are not the same. A prediction that is wrong by a fixed amount moves $D$ by $\sigma$ times that amount if it is $\epsilon$, and by just that amount if it is $x_0$. So $\epsilon$ ought to be bad at large
# $\sigma$, and $x_0$ at small, where $x$ itself is already nearer to $x_0$ than the network's error; $v$ (Salimans and Ho 2022), the flow and EDM's preconditioning (Karras et al. 2022), which mix the two, ought to be good everywhere.
# Same network, same data, same number of steps, each with the loss of its own prediction:

# %%
adapters = {
    "eps": lambda net: from_eps(net, schedule.t_of_sigma),
    "x0": lambda net: from_x0(net, schedule.t_of_sigma),
    "v": lambda net: from_v(net, schedule.t_of_sigma),
    "flow": lambda net: from_flow(lambda x, t: net(x, 1000 * t)),  # the net knows times to 1,000
    "EDM": lambda net: from_edm(net, sigma_data=1.1),  # about the deviation of the blobs
}


def training_batch(source):
    """Points, levels that are log-uniform from 0.02 to 50, and noise."""
    sigma = torch.exp(math.log(0.02) + math.log(2500) * torch.rand(256, generator=source))
    return blobs.sample(256, source).float(), sigma, torch.randn(256, 2, generator=source)


grid = torch.logspace(-1.5, 1.5, 13).tolist()
predicting, wrong_by = {}, {}
for name, adapter in adapters.items():
    torch.manual_seed(0)
    weight = edm_weight(1.1) if name == "EDM" else name
    done = fit(
        MLP(2, width=96),
        training_batch,
        lambda net, *rows, adapter=adapter, weight=weight: denoising_loss(
            adapter(net), *rows, weight
        ),
        steps=400,
        lr=2e-3,
        half=False,
        progress=False,
    )
    predicting[name] = done.net
    wrong_by[name] = [excess(adapter(done.net), sigma) for sigma in grid]
fig, ax = plt.subplots(figsize=(8, 4))
for (name, values), line in zip(wrong_by.items(), ("-", "--", "-.", ":", "-"), strict=True):
    ax.loglog(grid, values, line, label=name)
ax.set(xlabel=r"noise level $\sigma$", ylabel=r"excess, mean $|D - D^*|^2$")
ax.legend(title="prediction")
plt.show()
assert wrong_by["eps"][-1] > 10 * wrong_by["x0"][-1]  # at sigma = 32
assert wrong_by["x0"][0] > 10 * wrong_by["eps"][0]  # at sigma = 0.03
best_of_two = [min(pair) for pair in zip(wrong_by["eps"], wrong_by["x0"], strict=True)]
for name in ("v", "flow", "EDM"):
    behind = max(a / b for a, b in zip(wrong_by[name], best_of_two, strict=True))
    print(f"{name:4s} at its worst level: {behind:.1f} times the better of eps and x0")
    assert behind < 10

# %% [markdown] slideshow={"slide_type": "slide"}
# As argued: at the right end $\epsilon$ is hundreds of times worse than $x_0$, at the left end $x_0$ hundreds of times worse than $\epsilon$, and the three mixed predictions are nowhere more than about four times behind the better of the two.
#
# ## On real digits
#
# The same two algorithms, not a line changed, on handwritten digits: the 1,437 scans of the training split, 8 × 8 pixels of 17 grey values. A plain network of three hidden layers, trained
# here and now. A grey value $g$ becomes continuous by noise inside its step, $x_0 = 2\,(g+u)/17-1$ with $u\sim U[0,1)$, so that a density exists.

# %%
grey = tune.grey_rows()  # (1437, 64), whole numbers from 0 to 16


def draw_digits(n, source):
    rows = grey[torch.randint(len(grey), (n,), generator=source)]
    return digits.dequantise(rows, torch.rand(rows.shape, generator=source))


torch.manual_seed(0)
digit_losses, digit_net = algorithm_1(
    MLP(64, width=256), draw_digits, schedule.table, steps=1200, batch=128, lr=1e-3
)
drawn = algorithm_2(
    digit_net, SampleNoise(20)(torch.empty(40, 64)), linear_betas().float(), SampleNoise(21)
)
study.grid(digits.quantise(drawn).reshape(-1, 1, 8, 8) / 8 - 1, columns=20, scale=5)

# %% [markdown]
# Some can be read, most are rough: the network was trained for seconds, and does not know which pixels are neighbours. The model of lecture 01, `digits`, is a U-Net of a million parameters, trained for half an hour, by a denoising loss with EDM's weight,
# on the same digits at 16 × 16, and told the class. Its **card** says how good it is, on the 8 × 8 grey values and against all 1,797 real digits, beside three references: real digits, and two cheats.

# %%
D = zoo.load("digits", device="cpu")
card = zoo.card("digits")["metrics"]
judged = {"the model": card["quality_at_guidance_1"], **card["references"]}
print(f"{'':24s} {'Frechet':>8s} {'precision':>10s} {'recall':>7s} {'relative distance':>18s}")
for name, row in judged.items():
    near = row.get("nearest_training_distance_ratio")
    print(
        f"{name:24s} {row['frechet']:8.4f} {row['precision']:10.3f} {row['recall']:7.3f}"
        + (f" {near:18.2f}" if near else "")
    )
print("class read as asked:", card["class_read_as_asked"])
model, gaussian, kernel = (judged[k] for k in ("the model", "Gaussian per class", "kernel density"))
assert model["precision"] > 0.85 > gaussian["precision"]
assert model["nearest_training_distance_ratio"] > 0.85 > kernel["nearest_training_distance_ratio"]

# %% [markdown]
# How to read it. The *Fréchet distance* compares means and covariances only (Heusel et al. 2017), here of 16 principal components. *Precision* is the share of samples that lie where real digits are, *recall* the share of real digits that lie where samples are:
# in a ball around some point of the other set that reaches to its third neighbour there (Kynkäänniemi et al. 2019). The *relative distance* is that to the nearest training digit, over the same of held-out digits: 1 is as far as new digits are, 0 is a copy. The first reference has half of the digits on each side, and so more chance in it.
#
# A **Gaussian per class** has a good Fréchet distance, but more than 40 % of its samples lie where no real digit is: precision tells. A **kernel density** passes all three, because it is the training set
# with a little blur: only its distance to the training set gives it away. And the samples of the loss's exact minimiser on these images, the empirical denoiser of lecture 01, *are* the
# training images. A number for quality means nothing until you know which cheat it would miss.
#
# Is the class that is asked the class that is drawn? On the card, for 99 % of the samples. Here: ask for three of each, and let the two readers, classifiers trained on real digits only, say what they see.

# %%
asked = torch.arange(10).repeat(3)
readers = [zoo.load(name, device="cpu") for name in ("digits-reader", "digits-reader-2")]


def draw_asked(count, rule, clip=False):
    """Thirty digits in `count` steps, always from the same start; `rule` makes the step from a noise source."""
    noise, levels = SampleNoise(22), karras(count, 0.01, 15.0)
    given = D.given(label=asked)
    believe = (lambda x, sigma: given(x, sigma).clamp(-1, 1)) if clip else given
    with autocast("cpu"):  # bfloat16, where the processor has it
        return sample(believe, noise.start((30, *digits.SHAPE), levels[0]), levels, rule(noise))


fifty = draw_asked(50, lambda noise: steps.ddim)
seen_right = [int((reader(fifty).argmax(1) == asked).sum()) for reader in readers]
print(f"50 steps: {seen_right[0]} and {seen_right[1]} of 30 read as asked")
assert min(seen_right) >= 26  # where 99 % are right, fewer have a chance of 1 in 90,000
study.grid(fifty[:20], columns=10, scale=4)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which variance, how many steps, and clipping
#
# The error of a step vanishes with its size, so that with many steps the choice hardly matters. With six it does. *Small* variance, *large* variance, none at all (DDIM, lecture 03), and *small* with $D$ clipped to $[-1, 1]$, where the data live. The number at each row is the variance of a pixel over thirty drawn digits, divided by that of real ones; it should be 1:

# %%
rules = {
    "DDIM (none)": (lambda noise: steps.ddim, False),
    "small": (lambda noise: steps.ddpm(noise, "small"), False),
    "small, clipped": (lambda noise: steps.ddpm(noise, "small"), True),
    "large": (lambda noise: steps.ddpm(noise, "large"), False),
}
pictures, names, wide = [], [], {}
pixels = digits.load("train")[0].var(0).mean()
for name, (rule, clip) in rules.items():
    for count in (6, 25):
        drawn = draw_asked(count, rule, clip)
        wide[name, count] = float(drawn.var(0).mean() / pixels)
        pictures.append(drawn[:6])
        names.append(f"{name}, {count} steps: {wide[name, count]:.2f}")
assert wide["small", 6] < 0.95 and wide["large", 6] > 1.2
assert all(abs(wide[name, 25] - 1) < 0.1 for name in rules)
study.strip(pictures, row_titles=names, scale=3)

# %% [markdown]
# With six steps *small*, and DDIM, draw digits that vary too little, and *large* leaves noise in the picture; with 25 all are at 1, as far as thirty pictures can tell. Clipping keeps guesses made
# at high noise from leaving the range of the data; for this model, whose $D$ hardly does, it changes next to nothing.

# %% [markdown] slideshow={"slide_type": "slide"}
# ### How a sample forms
#
# Above the state, below the guess $D(x,\sigma)$. Scrub through the levels: the guess is the average of all digits of its class, then takes a shape, then a sharp edge.

# %%
study.ReverseExplorer(
    D.given(label=torch.arange(6)),
    "digits 0 to 5, DDPM's step",
    sigmas=lambda n: karras(n, 0.01, 15.0),
    noisy_step=steps.ddpm,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The four families
#
# A generative model turns noise $z\sim\mathcal N(0, I)$ into samples. What differs is how it learns to. ($G$, $C$, $m$ and $f$ are networks, $s$ is a number, $n$ is fresh noise.)
#
# | family | sample | learns by | likelihood |
# |---|---|---|---|
# | **GAN** (Goodfellow et al. 2014) | $x = G(z)$, one call | a discriminator, or critic, $C$ learns to tell real from generated, the generator $G$ to fool it | none |
# | **VAE** (Kingma and Welling 2014) | $x = m(z) + s\,n$, one call | an encoder guesses $z$ from $x$, as a Gaussian; the decoder $m$ reconstructs $x$; the guesses are kept near $\mathcal N(0, I)$ | a bound |
# | **normalising flow** (Dinh et al. 2017) | $x = f^{-1}(z)$, one call | $f$ is invertible and its Jacobian determinant cheap; maximise the likelihood | exact |
# | **diffusion** (Ho et al. 2020) | many calls of $D$ | denoising at all levels | a bound, or that of an ODE (lecture 03) |
#
# Their losses, as the course trains them:

# %%
study.source(families.GAN.loss, families.VAE.bound, families.Flow.loss, families.Diffusion.loss)

# %% [markdown]
# - *GAN*: an equilibrium of two losses, not the minimum of one: two networks chase each other. Each loss reaches only its own network, so the code may add them. The penalty on the critic's slope at real data
#   (R1, Mescheder et al. 2018) damps the chase.
# - *VAE*: the loss is minus the bound. The decoder's $s$ is learned (Rybkin et al. 2021); what the encoder does not tell apart, the decoder averages, and $s$ fills the gap with noise.
# - *Flow*: each layer scales and shifts half of the coordinates by amounts that depend on the other half (real NVP), so that its inverse and determinant cost hardly more than a call; but a chain of such maps cannot tear space apart, and separate modes stay joined by threads.
# - *Diffusion*: as above, with EDM's preconditioning; sampled by a hundred steps of DDIM.
#
# ### Experiment 3: a fair race
#
# Eight Gaussians on a ring. *Fair* means: every family gets the same number of parameters (20,000, in plain networks; GAN and VAE share them between two), the same processor time for training, as a number of steps measured when it was tuned, Adam and averaged weights, and six settings to choose from,
# judged by the sliced Wasserstein distance to validation draws (`course tune ring` repeats it, `course zoo ring-gan` prints the choice). It does not mean equal cost of a *sample*, nor that each family has the network that its experts would build. First a short race, about two seconds each, here and now; then the long one, nine times as many steps, from the zoo.

# %%
live = {}
for family in families.FAMILIES:
    settings, length = tune.chosen("ring", family)
    done = tune.train("ring", family, settings, length // 3, seed=0, progress=False)
    live[family] = done.net
    print(f"{family:10s} {len(done.losses):5d} steps")
long = {family: zoo.load(f"ring-{family.lower()}", device="cpu") for family in families.FAMILIES}

# %%
fig, axes = plt.subplots(2, 4, figsize=(8, 4.3), sharex=True, sharey=True)
for column, family in zip(axes.T, families.FAMILIES, strict=True):
    for ax, model, what in zip(
        column, (live[family], long[family][0]), ("short", "long"), strict=True
    ):
        study.density(ax, ring.log_prob, square)
        study.scatter(ax, model.sample(220, seed=31), colour=study.COLOURS["model"], size=4)
        ax.set(xlim=square[:2], ylim=square[2:], title=f"{family}, {what}", xlabel="", ylabel="")
plt.show()

# %% [markdown]
# Three seeds of the long race, 20,000 samples of each, from the cards of the models (`course train ring-gan --judge` measures again). A mode counts as *covered* if it holds a quarter of its share of the points; *on a mode* is the share of the points within
# three standard deviations of one, 0.99 for exact samples; precision and recall are as above, with 4,000 points. *Claim*: in every seed diffusion has more points on a mode, and a smaller distance, than any seed of the others.


# %%
def race(world, *columns):
    """Print what the cards say: a line for each family, the numbers of its three seeds in each column; returns them."""
    found = {}
    print(" " * 10 + "".join(f"{key.replace('_', ' '):>24s}" for key, _ in columns))
    for family in families.FAMILIES:
        rows = zoo.card(f"{world}-{family.lower()}")["metrics"]["seeds"]
        found[family] = {key: [row[key] for row in rows] for key, _ in columns}
        cells = ("  ".join(f"{v:.{n}f}" for v in found[family][key]) for key, n in columns)
        print(f"{family:10s}" + "".join(f"{cell:>24s}" for cell in cells))
    floor = zoo.card(f"{world}-gan")["metrics"]["sliced_wasserstein_floor"]
    print(f"two exact sets have a sliced Wasserstein distance of {floor:.4f}")
    return found


def diffusion_leads(found, key, sign=1):
    """Whether the worst seed of diffusion beats the best of all others; sign = -1 where less is better."""
    worst = min(sign * value for value in found["diffusion"][key])
    return worst > max(sign * v for f in found if f != "diffusion" for v in found[f][key])


on_ring = race(
    "ring",
    ("covered", 0),
    ("on_mode", 2),
    ("precision", 2),
    ("recall", 2),
    ("sliced_wasserstein", 3),
)
assert diffusion_leads(on_ring, "sliced_wasserstein", sign=-1)
assert diffusion_leads(on_ring, "on_mode")
assert all(covered == 8 for family in on_ring.values() for covered in family["covered"])

# %% [markdown] slideshow={"slide_type": "slide"}
# It holds: the distance of diffusion is less than half that of any other. All four find the eight modes, the GAN too: losing some is a risk of its training, not a law. The shapes of the errors tell the families apart. The GAN, the VAE and the flow map *one* connected blob of
# $z$ by a continuous function, and a continuous image of a connected set is connected: hence the bridges between the Gaussians (in the VAE blurred by $s\,n$). A bridge can be made thin only by a map that is steep there. Diffusion's map is continuous as well, but it is a hundred small maps in a row, which together can be far steeper
# than one call of a network of this size. That is also what diffusion pays: a hundred calls for a sample, where the others need one.
#
# ### On digits
#
# The same race on the scanned digits: 100,000 parameters each, equal time, settings from `course tune digits`, three seeds (`course train digits-gan`, and so on). The models are small, and all see only rows of 64 numbers. A class is *covered* if a reader finds at least a quarter of its share.
# As a single number for precision and recall the code takes their harmonic mean, which is low where either is.

# %%
digit_families = {
    name: zoo.load(f"digits-{name.lower()}", device="cpu") for name in families.FAMILIES
}
on_digits = race(
    "digits",
    ("covered", 0),
    ("precision", 2),
    ("recall", 2),
    ("frechet", 3),
    ("sliced_wasserstein", 4),
)
for family in on_digits.values():
    both = zip(family["precision"], family["recall"], strict=True)
    family["both"] = [2 * p * r / (p + r) for p, r in both]
print("harmonic means", {f: [f"{v:.2f}" for v in on_digits[f]["both"]] for f in on_digits})
assert diffusion_leads(on_digits, "both")
assert max(on_digits["GAN"]["recall"]) < min(
    min(on_digits[f]["recall"]) for f in on_digits if f != "GAN"
)
assert min(on_digits["GAN"]["precision"]) > max(
    max(on_digits[f]["precision"]) for f in on_digits if f != "GAN"
)


# %%
def pictures(x0):
    """Rows (n, 64) as pictures of 16 x 16."""
    return digits.enlarge(digits.quantise(x0).reshape(-1, 1, 8, 8) / 8 - 1)


rows, titles = [list(pictures(draw_digits(10, generator(40))))], ["real"]
for name, models in digit_families.items():
    rows.append(list(pictures(models[0].sample(10, seed=41))))
    titles.append(name)
study.strip(rows, row_titles=titles, scale=4)

# %% [markdown]
# Here no family wins on every judge, and that is the lesson. The **GAN** is the most precise, nine in ten of its digits lie where real ones are, and reaches only a third of the real ones: all ten classes, but few ways of writing each. **VAE** and **flow** reach four real digits in five, and nearly half of
# what they draw lies where no real digit does. **Diffusion** is second in precision, close behind those two in recall, and first in the harmonic mean of both; by the Fréchet distance it is level with the GAN, by the sliced Wasserstein distance with the flow. Small and plain as it is, it is far below the U-Net of the card above
# (precision 0.88, recall 0.86), which is ten times as large and is built for pictures.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The variational bound
#
# How likely is a picture under a diffusion model? Take levels $0<\sigma_1<\dots<\sigma_T$ and let $x_i = x_0+\sigma_i\epsilon$. The chain of DDPM is a model with hidden steps, $p(x_0) = \int p(x_T)\prod_{i=1}^T p(x_{i-1}\mid x_i)\,dx_{1:T}$, and like every such model, a VAE for one, it
# has a bound: the forward process $q$ is the encoder, and one pays for every step the divergence between the step back that knows $x_0$ and the model's (Ho et al. 2020, Eq. 5):
#
# $$-\log p(x_0) \le \underbrace{\mathrm{KL}\big(q(x_T\mid x_0)\,\|\,p(x_T)\big)}_{\text{prior}}
# + \sum_{i=2}^T \underbrace{\mathbb E\,\mathrm{KL}\big(q(x_{i-1}\mid x_i,x_0)\,\|\,p(x_{i-1}\mid x_i)\big)}_{\text{diffusion}}
# + \underbrace{\mathbb E\big[-\log p(x_0\mid x_1)\big]}_{\text{reconstruction}} .$$
#
# The means $\mathbb E$ are over $q$, that is over $\epsilon$. The prior $p(x_T)$ is $\mathcal N(0, (1+\sigma_T^2) I)$, the last step $p(x_0\mid x_1)$ is $\mathcal N(D(x_1,\sigma_1),\sigma_1^2 I)$. With the *small* variance both Gaussians of a divergence have the variance $s_i^2$ of the box above, so that it is the squared distance of their means over $2s_i^2$.
# The means differ by $(1-\sigma_{i-1}^2/\sigma_i^2)\,(x_0-D)$, hence
#
# $$\mathrm{KL}_i = \frac12\Big(\frac1{\sigma_{i-1}^2}-\frac1{\sigma_i^2}\Big)\,\lVert x_0 - D(x_i,\sigma_i)\rVert^2 .$$
#
# The denoising loss again, weighted by how much the signal-to-noise ratio $1/\sigma^2$ rises in the step (Kingma et al. 2021, Eq. 13): **training a denoiser and lowering this bound are one thing, up to the weight.** Divided
# by $\ln2$ and by the number $d$ of pixels, the bound counts bits per dimension.

# %%
study.source(variational_bound)

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment 4: the bound against the truth
#
# On a Gaussian everything is exact: the likelihood, $D$, and the mean of each term. What is left between bound and truth is the price of finite steps (and of the two ends): a divergence of second order in each step, so that it must fall as $1/T$ where all steps shrink alike. First the bound by sampling, 2,000 points with one draw of noise for each level:
# such an estimate may lie below the truth by chance, but its mean lies above, by a gap known in closed form.

# %%
gaussian = Mixture.gaussian(torch.zeros(2), torch.tensor([[1.0, 0.3], [0.3, 0.6]]))
x0 = gaussian.sample(2000, generator(50))
exact_bits = -gaussian.log_prob(x0) / (2 * math.log(2))
bound = variational_bound(gaussian.denoiser, x0, equal_information(1000, 0.1), SampleNoise(51))
for part in ("prior", "diffusion", "reconstruction", "total"):
    print(f"{part:15s} {float(getattr(bound, part).mean()):8.4f} bits per dimension")
print(f"{'exact':15s} {float(exact_bits.mean()):8.4f}")
difference = bound.total - exact_bits
gap, error = float(difference.mean()), float((difference.var() / len(difference)).sqrt())
closed = bound_gap(gaussian, equal_information(1000, 0.1))
print(f"bound - truth {gap:.4f}, standard error {error:.4f}; its mean in closed form {closed:.4f}")
assert abs(gap - closed) < 4.5 * error and closed > 0

# %% [markdown]
# The estimate agrees with the closed form, within about two standard errors, but this error is larger than the gap itself. So for the question *where* the steps should be, use the closed form:


# %%
def ddpm_levels(T):
    """The levels of DDPM's linear table with T steps, falling."""
    return Discrete(linear_betas(T, 0.1 / T, 20 / T)).sigma(torch.arange(T - 1, -1, -1))


grids = {
    "even in log(1 + 1/σ²), to 0.1": lambda T: equal_information(T, 0.1),
    "even in log σ, to 0.1": lambda T: exponential(T - 1, 0.1, 80.0, to_zero=False),
    "Karras, to 0.1": lambda T: karras(T - 1, 0.1, 80.0, to_zero=False),
    "DDPM's linear table, to 0.1": lambda T: ddpm_levels(T)[ddpm_levels(T) > 0.1],
    "DDPM's linear table, all of it": ddpm_levels,
}
counts = (125, 250, 500, 1000)
fig, ax = plt.subplots(figsize=(8, 4))
for name, make in grids.items():
    gaps = [bound_gap(gaussian, make(T)) for T in counts]
    ax.loglog(counts, gaps, "o-", label=name)
    print(f"{name:32s} T = 1000: {gaps[-1]:.4f} bits per dimension above the truth")
ax.axhline(0.01, color="grey", linestyle=":", linewidth=1)
ax.set(xlabel="levels T", ylabel="bound - truth,\nbits per dimension")
ax.set_xticks(counts, [str(T) for T in counts])
ax.minorticks_off()
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
even = [bound_gap(gaussian, equal_information(T, 0.1)) for T in counts]
assert even[-1] < 0.01
assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(even))  # twice the levels, half the gap
plt.show()

# %% [markdown]
# About the same number of levels down to 0.1, and the gap differs by a factor of five: the other grids spend levels where nothing is learned. The best of them spends its levels evenly in $\log(1+1/\sigma^2)$, twice the information that $x$ has about data of variance 1, in nats per number.
# The whole table of DDPM pays nearly a hundred times as much, and almost all of that for its last 27 levels, from 0.1 to 0.01: the very last step more than doubles the signal-to-noise ratio. Nor does its gap fall as $1/T$, since a longer table also ends lower. (The dotted line marks 0.01 bits.)
#
# ### On digits: two bounds and an exact likelihood
#
# For pictures of 17 grey values we count bits per pixel of the grey values themselves: $-\log_2 p(x_0)/d+\log_2\frac{17}2$. The second term is there because a step of grey is $\frac2{17}$ wide in $x_0$. On average over the noise $u$ this bounds, from above, what a perfect code would need (Theis et al. 2016). A code that knows nothing needs $\log_2 17 = 4.09$. The models are
# those of the race, the mean of their three seeds; beside them a single Gaussian, fitted to the training digits, and a flow of eight layers that is stopped after 700 steps, before it can learn the training set by heart, and whose samples are judged like those of the race. The density is exact for Gaussian and flows, bounded for VAE and diffusion.


# %%
def dequantised(split):
    """A split as continuous pixels, (N, 64)."""
    rows = tune.grey_rows(split)
    return digits.dequantise(rows, torch.rand(rows.shape, generator=generator(60)))


seen, held_out = dequantised("train"), dequantised("test")
bell = Mixture.gaussian(seen.double().mean(0), torch.cov(seen.double().T))
settings = {**tune.chosen("digits", "flow")[0], "layers": 8}
stopped = tune.train("digits", "flow", settings, steps=700, seed=0, progress=False).net
per_pixel = {}
for name, nats in {
    "a Gaussian, exact": lambda x0: -bell.log_prob(x0.double()),
    "flow of 700 steps, exact": stopped.nats,
}.items():
    per_pixel[name] = [
        float(nats(x0).mean()) / (64 * math.log(2)) + math.log2(17 / 2) for x0 in (seen, held_out)
    ]
for name, kind in (("flow", "exact"), ("VAE", "bound"), ("diffusion", "bound")):
    rows = zoo.card(f"digits-{name.lower()}")["metrics"]["seeds"]
    per_pixel[f"{name}, {kind}"] = [
        sum(row[f"bits_per_pixel_{split}"] for row in rows) / 3 for split in ("train", "test")
    ]
print(f"{'bits per pixel':26s} {'training':>9s} {'held out':>9s}")
for name, (on_training, on_test) in per_pixel.items():
    print(f"{name:26s} {on_training:9.2f} {on_test:9.2f}")
judged = compared.measure("digits", stopped, seed=0)
print(
    f"samples of the flow of 700 steps: precision {judged['precision']:.2f}, recall {judged['recall']:.2f}"
)
terms = variational_bound(
    digit_families["diffusion"][0].D, held_out, equal_information(1000, 0.02), SampleNoise(61)
)
print(
    f"diffusion, held out: prior {float(terms.prior.mean()):.3f}, diffusion {float(terms.diffusion.mean()):.3f},"
    f" reconstruction {float(terms.reconstruction.mean()):.3f}, grey values +{math.log2(17 / 2):.3f}"
)
assert (
    per_pixel["flow of 700 steps, exact"][1]
    < per_pixel["diffusion, bound"][1]
    < per_pixel["flow, exact"][1]
)
for key in ("precision", "recall"):  # it codes best and draws worse
    assert judged[key] < min(on_digits["diffusion"][key])

# %% [markdown]
# Two lessons. A likelihood is honest about *memory*: the flow and, far more, the VAE (its encoder is unsure of pictures that it has not seen) know the training digits and not the held-out ones, diffusion far less so; the other judges do not show it, and the samples of the flow and the VAE are no nearer to the training digits than new ones are
# (relative distance 1.2 on the cards). And likelihood is not quality: the flow that was stopped early has the fewest bits, and draws worse than diffusion in precision *and* recall. A density is paid for the right noise in every pixel, which hardly changes what a picture looks like (Theis et al. 2016). The last line says where the bound's bits go: hardly any into the prior; the reconstruction is negative because a *density* of pixels that
# are known to within 0.02 is high, and $\log_2\frac{17}{2}$ turns it into one of grey values.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# The most common bug report of this field: **the loss falls, and the samples are noise.** Nothing crashes. Training and sampling each make sense, and disagree: about the schedule, about the scale of the input, about what the
# output means, about the time. A network is right under exactly one convention. So let the network tell which: noise real data, read the network under *every* convention, and see under which it denoises best.
# That is a debugger. `debugging.diagnose(D, data)` does it for any network that the course can wrap.
#
# Take the trained network of the blobs, and make seven classic mistakes with it. Each panel shows 250 samples; a title says how many of them are outside the frame. Then the debugger is given each broken model, and must name its fault:

# %%
points = blobs.sample(4000, generator(70)).float()
healthy = from_eps(averages[0], schedule.t_of_sigma)
broken = {name: debugging.plant(name, healthy) for name in debugging.FAULTS}
fig, axes = plt.subplots(2, 4, figsize=(9, 4.9), sharex=True, sharey=True)
start = SampleNoise(71).start((250, 2), 20.0)
for ax, (name, D_) in zip(axes.flat, {"none": healthy, **broken}.items(), strict=True):
    drawn = sample(D_, start, karras(40, 0.01, 20.0))
    outside = int((drawn.abs() > 4).any(1).sum())
    study.density(ax, blobs.log_prob, (-4, 4, -4, 4))
    study.scatter(ax, drawn, colour=study.COLOURS["model" if name == "none" else "warn"], size=4)
    title = f"{name} ({outside} outside)" if outside else name
    ax.set(xlim=(-4, 4), ylim=(-4, 4), title=title, xlabel="", ylabel="")
plt.show()

# %%
for name, D_ in {"none": healthy, **broken}.items():
    found = debugging.diagnose(D_, points, raw=nets[0] if name == "ema" else None)
    print(f"planted: {name}\n   {textwrap.fill(found.words, 110, subsequent_indent='   ')}")
    assert found.faults == (() if name == "none" else (name,))

# %% [markdown] slideshow={"slide_type": "slide"}
# Choose a fault and look at the samples, and at the error of the sampler's reading against that of the best one. The dashed line is the best *affine* denoiser, which knows only the mean and the covariance of the data: at a level where a network is above it, the network is no use.

# %%
study.DebugExplorer({"blobs": (healthy, points)})

# %% [markdown]
# | you see, with the blobs | it is | mend |
# |---|---|---|
# | most samples on one spot near the middle, some anywhere | *prediction*: the output is read as another quantity, $\epsilon$ for $x_0$ | the adapter of the training target |
# | every sample at the same point | *scaling*: the input is not divided by $\sqrt{1+\sigma^2}$ | scale in the sampler what training scaled |
# | the right places, run together | *schedule*: the times come from another table | one schedule object for both |
# | the right places, the wrong shapes | *time*: $t$ is not passed on | pass it |
# | the right shape at half the size, off the centre | *range*: data in $[0, 1]$ in training, $[-1, 1]$ in the sampler | one map, and its inverse at the end |
# | most samples far away, though the loss is fine | *ema*: the averaged weights still hold the random start | a lower decay, or one that grows from 0 |
# | no sample in the frame, all still noise | *untrained* | train, or load the weights |
#
# On pictures the same faults look different, and often like one another; the error against $\sigma$ is read in the same way. Here is the debugger on the U-Net of the digits, first misread by a sampler that thinks it predicts $\epsilon$, then as it should be:

# %%
images, labels = digits.load("train")
images, labels = images[:128], labels[:128]
few = {"n": 16, "sigmas": torch.tensor([0.1, 0.3, 1.0, 3.0])}  # a U-Net is slow
misread = from_eps(D.net, schedule.t_of_sigma, label=labels)
found = debugging.diagnose(misread, images, **few)
print(textwrap.fill(found.words, 110))
assert found.faults == ("prediction",)
found = debugging.diagnose(D.given(label=labels), images, **few)
print(textwrap.fill(found.words, 110))
assert found.faults == ()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# Nothing above knows what $x$ is. Stable Diffusion 1.5 (Rombach et al. 2022) predicts the $\epsilon$ of a latent of 4 × 64 × 64 numbers, at the times of the `scaled_linear` table; Algorithm 2 is the same line. *Claim*: the course's step and Hugging Face's `DDPMScheduler` are one. Both walk four steps from
# the same noise, with a small untrained network of that shape in place of the real one, whose weights would have to be downloaded (a pocket Stable Diffusion comes in lecture 05).

# %%
from diffusers import DDPMScheduler, UNet2DModel

from course_lib.denoisers import discrete_of, from_diffusers

torch.manual_seed(0)
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
unet = UNet2DModel(
    64, 4, 4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks
).eval()
ends = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
scheduler = DDPMScheduler(**ends, clip_sample=False, timestep_spacing="leading")
scheduler.set_timesteps(1000)
table = discrete_of(scheduler)
latent = SampleNoise(80)(torch.empty(1, 4, 64, 64))
theirs, z = latent, SampleNoise(81)
levels = table.sigma(torch.arange(999, 994, -1))
ours = sample(
    from_diffusers(unet, scheduler),
    latent / table.alpha(torch.tensor(999.0)),
    levels,
    steps.ddpm(SampleNoise(81)),
)
with torch.no_grad():
    for t in scheduler.timesteps[:4]:
        mean = scheduler.step(
            unet(theirs, t).sample, t, theirs, generator=torch.Generator().manual_seed(0)
        ).prev_sample
        drawn = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
        spread = scheduler._get_variance(int(t)) ** 0.5
        theirs = mean + spread * (z(theirs) - drawn)  # our noise for the scheduler's own
gap = float((ours * table.alpha(torch.tensor(995.0)) - theirs).abs().max())
print(f"four steps of DDPM on a latent: largest difference {gap:.0e}")
assert gap < 1e-4 * float(theirs.abs().max())

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - One step back, given $x_0$: go towards $x_0$ until the share $\sigma'^2/\sigma^2$ is left, add noise of variance $\sigma'^2(1-\sigma'^2/\sigma^2)$. With $D$ for $x_0$ the mean stays exact, and the error of the samples falls as 1 / steps.
# - Training is denoising at random levels. The loss has a floor above 0: judge by the excess, and sample from averaged weights.
# - $\epsilon$, $x_0$, $v$: equal on paper, different weights in practice. Mix them, as $v$ and EDM do.
# - GAN, VAE, flow: one call a sample, and bridges, blur or few modes; diffusion: many calls, and the modes stay apart. Likelihood, precision and recall are different virtues.
# - The bound is the denoising loss, weighted by the gain in signal-to-noise ratio.
# - Loss falls, samples are noise: training and sampling disagree about a convention. Let the network tell which.
#
# **Exercises.** [Set 02](../my_course/02_reverse_process.ipynb): eleven functions, 20 points, from the posterior of one step to a whole sampler, and a broken one to mend. `course lab` puts a copy for you into `my_course/`; each check names the
# mistake that was made.
#
# ## Sources
#
# - J. Sohl-Dickstein, E. Weiss, N. Maheswaranathan, S. Ganguli. *Deep Unsupervised Learning using Nonequilibrium Thermodynamics.* 2015. arXiv:1503.03585
# - J. Ho, A. Jain, P. Abbeel. *Denoising Diffusion Probabilistic Models.* 2020. arXiv:2006.11239
# - A. Nichol, P. Dhariwal. *Improved Denoising Diffusion Probabilistic Models.* 2021. arXiv:2102.09672
# - J. Song, C. Meng, S. Ermon. *Denoising Diffusion Implicit Models.* 2021. arXiv:2010.02502
# - D. Kingma, T. Salimans, B. Poole, J. Ho. *Variational Diffusion Models.* 2021. arXiv:2107.00630
# - T. Salimans, J. Ho. *Progressive Distillation for Fast Sampling of Diffusion Models.* 2022. arXiv:2202.00512
# - T. Karras, M. Aittala, T. Aila, S. Laine. *Elucidating the Design Space of Diffusion-Based Generative Models.* 2022. arXiv:2206.00364
# - R. Rombach, A. Blattmann, D. Lorenz, P. Esser, B. Ommer. *High-Resolution Image Synthesis with Latent Diffusion Models.* 2022. arXiv:2112.10752
# - I. Goodfellow, J. Pouget-Abadie, M. Mirza, B. Xu, D. Warde-Farley, S. Ozair, A. Courville, Y. Bengio. *Generative Adversarial Networks.* 2014. arXiv:1406.2661
# - L. Mescheder, A. Geiger, S. Nowozin. *Which Training Methods for GANs do actually Converge?* 2018. arXiv:1801.04406
# - D. Kingma, M. Welling. *Auto-Encoding Variational Bayes.* 2014. arXiv:1312.6114
# - O. Rybkin, K. Daniilidis, S. Levine. *Simple and Effective VAE Training with Calibrated Decoders.* 2021. arXiv:2006.13202
# - L. Dinh, J. Sohl-Dickstein, S. Bengio. *Density Estimation using Real NVP.* 2017. arXiv:1605.08803
# - L. Theis, A. van den Oord, M. Bethge. *A Note on the Evaluation of Generative Models.* 2016. arXiv:1511.01844
# - T. Kynkäänniemi, T. Karras, S. Laine, J. Lehtinen, T. Aila. *Improved Precision and Recall Metric for Assessing Generative Models.* 2019. arXiv:1904.06991
# - M. Heusel, H. Ramsauer, T. Unterthiner, B. Nessler, S. Hochreiter. *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium.* 2017. arXiv:1706.08500
# - N. Bonneel, J. Rabin, G. Peyré, H. Pfister. *Sliced and Radon Wasserstein Barycenters of Measures.* 2015.
# - Data: E. Alpaydin, C. Kaynak. *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998, as scikit-learn ships it.
