# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 02: the reverse process
#
# Eleven functions that together are a diffusion model: the Gaussian that undoes a step, the loss and the training step,
# the sampler, condition dropout, the measures of samples and of likelihood. You train a small network with your own loss and draw
# from it with your own sampler. At the end you mend a sampler that runs and is wrong in three places.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("02.1")` gives the next hint, `solution("02.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 02.1 the posterior of one step | 2 | | 02.7 condition dropout | 1 |
# | 02.2 the loss at random times | 2 | | 02.8 precision and recall | 2 |
# | 02.3 one training step | 2 | | 02.9 bits per dimension of a Gaussian | 1 |
# | 02.4 a clipped estimate and its mean | 2 | | 02.10 one term of the bound | 1 |
# | 02.5 the ancestral step | 2 | | 02.11 find three faults | 3 |
# | 02.6 the whole sampler | 2 | | **all** | **20** |
#
# Symbols: `eps` is standard normal noise, `betas[t]` the variance that step `t` adds, `alpha_bar` the
# cumulative product of `1 - betas`; a batch holds $B$ samples of $d$ numbers each. Step $t$ makes $x_t$
# from $x_{t-1}$. Steps count from 0 to $T - 1$, and those of the papers from 1, so that their $\beta_1$
# is `betas[0]`. Before the first step all is signal, $\bar\alpha_{-1} = 1$: at `t = 0` the formulas'
# $x_{t-1}$ is the clean sample. That is what $x_0$ and `x0` always mean, never the state after step 0.
#
# The first cell makes one table of $T = 50$ steps for all pictures below. Its noise levels are those at which the course's network of
# digits draws, $\sigma = \sqrt{1-\bar\alpha}/\sqrt{\bar\alpha}$ from 0.01 to 15. `eps_net` turns a Denoiser of lecture 01, exact or trained, into
# the network of DDPM, which takes $x_t$ and $t$ and answers with the noise.

# %%
import copy
import itertools
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from course_lib import study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.gaussians import Mixture
from course_lib.grading.check import check, hint, solution
from course_lib.likelihood import variational_bound
from course_lib.metrics import sliced_wasserstein, sliced_wasserstein_floor
from course_lib.nets.mlp import MLP
from course_lib.schedules import karras
from course_lib.worlds import digits, toys

torch.set_num_threads(1)
study.use()
images, labels = digits.load("train")
D_digits = zoo.load("digits", device="cpu")

sigmas = karras(50, sigma_min=0.01, sigma_max=15.0)  # falling, with 0 at the end
alpha_bar = 1 / (1 + sigmas[:-1].flip(0) ** 2)
betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
T = len(betas)


def eps_net(D):
    """The noise in x_t as a Denoiser sees it: (x - D(x, sigma)) / sigma at x = x_t / sqrt(alpha_bar)."""

    def net(x_t: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar[t].expand(len(x_t)).reshape(-1, *[1] * (x_t.ndim - 1))
        x, sigma = x_t / a.sqrt().to(x_t), ((1 - a) / a).sqrt()
        return (x - D(x, sigma.flatten())) / sigma.to(x_t)

    return net


# %% [markdown] item="02.1"
# The forward step is a Gaussian; is the step back one too? Not in general. But if $x_0$ is *known*, it is, and exactly
# (Ho et al. 2020, Eq. 6 and 7):
#
# $$q(x_{t-1}\mid x_t, x_0) = \mathcal N\left(\tilde\mu_t(x_t, x_0),\ \tilde\beta_t I\right)$$
#
# Bayes' rule gives it from two Gaussians that you wrote in set 01. Return mean and variance, for a time of its own for each sample:
# the mean has the shape of `x0`, the variance is `(B,)`. At `t = 0` the step ends at $x_0$ itself.


# %% item="02.1"
def posterior(x0: Tensor, x_t: Tensor, t: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x0); x0, x_t (B, C, H, W), t (B,) integers, betas (T,)."""
    ### BEGIN SOLUTION
    cumulative = torch.cat([torch.ones_like(betas[:1]), torch.cumprod(1 - betas, 0)])
    before, after, beta = cumulative[t], cumulative[t + 1], betas[t]
    of_x0 = before.sqrt() * beta / (1 - after)
    of_x_t = (1 - beta).sqrt() * (1 - before) / (1 - after)
    mean = of_x0.reshape(-1, 1, 1, 1) * x0 + of_x_t.reshape(-1, 1, 1, 1) * x_t
    return mean, (1 - before) / (1 - after) * beta
    ### END SOLUTION


# %% item="02.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
posterior = check("02.1", posterior)

# %% [markdown]
# The whole reverse process, if somebody tells us $x_0$: three walks back from the *same* $x_T$, each told another digit, each ending exactly
# at what it was told. A network has one thing to add: a guess of $x_0$.

# %%
known = images[:3].double()
x = SampleNoise(1)(known[:1]).expand(3, -1, -1, -1)
noise, kept = SampleNoise(2), {T: x}
for t in reversed(range(T)):
    mean, variance = posterior(known, x, torch.full((3,), t), betas)
    x = mean + variance.sqrt().reshape(-1, 1, 1, 1) * noise(x)
    kept[t] = x
assert torch.allclose(x, known)
times = (T, 40, 30, 20, 10, 0)
rows = [[kept[t][k] for t in times] for k in range(3)]
study.strip(rows, column_titles=[f"after {T - t} steps" for t in times], scale=6)

# %% [markdown] item="02.2"
# The loss of 01.9 with times drawn at random, as one training step needs it (Ho et al. 2020, Algorithm 1). `u` holds one number for each
# sample, uniform in $[0, 1)$, and picks $t = \lfloor u\,T\rfloor$, where $T$ is the length of `alpha_bar`:
#
# $$L = \tfrac1{Bd}\sum_b \left\lVert \epsilon_b - \epsilon_\theta\!\left(\sqrt{\bar\alpha_{t_b}}\,x_{0,b} + \sqrt{1-\bar\alpha_{t_b}}\,\epsilon_b,\ t_b\right)\right\rVert^2$$
#
# Return the mean over everything, one number. `x0` is `(B, ...)`: pictures or points of the plane. The
# network wants the times as `(B,)`, integers.


# %% item="02.2"
def random_time_loss(net, x0: Tensor, u: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """L_simple at the times floor(u T), a 0-d tensor; x0 and eps (B, ...), u (B,) in [0, 1), alpha_bar (T,)."""
    ### BEGIN SOLUTION
    t = (u * len(alpha_bar)).long()
    a = alpha_bar[t].reshape(-1, *[1] * (x0.ndim - 1))
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    return (net(x_t, t) - eps).square().mean()
    ### END SOLUTION


# %% item="02.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
random_time_loss = check("02.2", random_time_loss)

# %% [markdown]
# Where is the difficulty? Draw `u` from one tenth of $[0, 1)$ at a time. Noise is easy to find where there is nothing else; the cleaner the
# digit, the harder it is to tell from the strokes. The loss falls from tenth to tenth. A network that always answers 0 has loss 1 everywhere.

# %%
x0 = digits.load("test")[0][:24]
shares = torch.arange(10) / 10
losses = []
for k, start in enumerate(shares):
    u = start + torch.rand(len(x0), generator=generator(3, k)) / 10
    eps = torch.randn(x0.shape, generator=generator(4, k))
    losses.append(float(random_time_loss(eps_net(D_digits), x0, u, eps, alpha_bar.float())))
assert max(losses) < 1 and losses == sorted(losses, reverse=True)
fig, ax = plt.subplots(figsize=(6, 3))
ax.semilogy(shares + 0.05, losses, "o-", color=study.COLOURS["model"], label="network of digits")
ax.axhline(1, color=study.COLOURS["muted"], label="always 0")
ax.set(xlabel="u, time t / T", ylabel=r"mean of $(\epsilon_\theta - \epsilon)^2$", xlim=(0, 1))
ax.legend()
plt.show()

# %% [markdown] item="02.3"
# One step of the training loop. `loss_fn(net, batch)` returns the loss, a 0-d tensor; `optimizer` holds the weights of `net`. Let `net` take one
# step down its gradient, and after it let `ema`, a second network of the same form, follow slowly:
#
# $$e \leftarrow d\,e + (1-d)\,w$$
#
# for each of its parameters $e$ and the parameter $w$ of `net`, with the decay $d$. Both networks are changed in place. Return the loss whose gradient was taken.


# %% item="02.3"
def train_step(net, ema, optimizer, loss_fn, batch: Tensor, decay: float) -> Tensor:
    """One step of `net` by `optimizer`, then one of the average `ema`; the loss before the step, 0-d."""
    ### BEGIN SOLUTION
    loss = loss_fn(net, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for e, w in zip(ema.parameters(), net.parameters(), strict=True):
            e.lerp_(w, 1 - decay)
    return loss.detach()
    ### END SOLUTION


# %% item="02.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
train_step = check("02.3", train_step)

# %% [markdown]
# Your loss and your step, at work: a small network learns two half moons in 600 steps. The loss on fixed points and fixed noise, of the network and of
# its average: the network jumps about with every batch, the average does not. That is why it is the average that draws samples.


# %%
class Points(MLP):
    """The course's network for points; its time embedding was made for a thousand steps."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, torch.as_tensor(t) * (1000 / T))


def loss_fn(net, x0, seed=None):
    g = stream if seed is None else generator(seed)
    u, eps = torch.rand(len(x0), generator=g), torch.randn(x0.shape, generator=g)
    return random_time_loss(net, x0, u, eps, alpha_bar.float())


torch.manual_seed(0)
stream, decay = generator(5), 0.98
net = Points(dim=2, width=96)
ema = copy.deepcopy(net).requires_grad_(False)
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
held_out, curves = toys.moons(1024, generator(6)), []
for step in range(600):
    train_step(net, ema, optimizer, loss_fn, toys.moons(256, stream), decay)
    if step % 10 == 9:
        with torch.no_grad():
            curves.append([float(loss_fn(one, held_out, seed=7)) for one in (net, ema)])
of_net, of_ema = torch.tensor(curves[-30:]).T  # the last 300 steps
assert of_ema.mean() < of_net.mean() and of_ema.diff().std() < of_net.diff().std() / 3
fig, ax = plt.subplots(figsize=(6, 3))
for name, role, curve in zip(
    ("net", "ema"), ("muted", "model"), torch.tensor(curves).T, strict=True
):
    ax.plot(range(10, 601, 10), curve, color=study.COLOURS[role], label=name)
ax.set(xlabel="step", ylabel="loss on fixed points", ylim=(0.39, 0.5))
ax.legend()
plt.show()

# %% [markdown] item="02.4"
# A network answers with $\hat\epsilon$. Turn that into a guess of $x_0$, *clip it to* $[-1, 1]$, since no pixel is outside, and put it where the
# posterior of 02.1 wants $x_0$. Return the pair: the clipped $\hat x_0$ and the mean $\tilde\mu_t(x_t, \hat x_0)$. The time `t` is one integer for the whole
# batch from here on.


# %% item="02.4"
def x0_and_mean(x_t: Tensor, eps_hat: Tensor, t: int, betas: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped estimate of x0 and the mean of the step from it; x_t, eps_hat (B, C, H, W), betas (T,)."""
    ### BEGIN SOLUTION
    cumulative = torch.cat([torch.ones_like(betas[:1]), torch.cumprod(1 - betas, 0)])
    before, after, beta = cumulative[t], cumulative[t + 1], betas[t]
    x0_hat = ((x_t - (1 - after).sqrt() * eps_hat) / after.sqrt()).clamp(-1, 1)
    of_x0 = before.sqrt() * beta / (1 - after)
    of_x_t = (1 - beta).sqrt() * (1 - before) / (1 - after)
    return x0_hat, of_x0 * x0_hat + of_x_t * x_t
    ### END SOLUTION


# %% item="02.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
x0_and_mean = check("02.4", x0_and_mean)

# %% [markdown]
# What the network believes: above $x_t$, one digit at six times, and below it the clipped guess of $x_0$. In much noise the guess is an average of many digits; it
# sharpens as the noise goes.

# %%
times = (49, 40, 32, 24, 16, 8)
x0 = images[5:6].expand(len(times), -1, -1, -1)
a = alpha_bar[list(times)].reshape(-1, 1, 1, 1).float()
x_t = a.sqrt() * x0 + (1 - a).sqrt() * SampleNoise(8)(x0)
eps_hat = eps_net(D_digits)(x_t, torch.tensor(times))
guesses = [
    x0_and_mean(x_t[k : k + 1], eps_hat[k : k + 1], t, betas)[0][0] for k, t in enumerate(times)
]
study.strip([x_t, guesses], ["$x_t$", r"$\hat x_0$"], [f"t = {t}" for t in times], scale=6)

# %% [markdown] item="02.5"
# One step of the sampler is a draw from the Gaussian of 02.4, here without the clipping:
#
# $$x_{t-1} = \tilde\mu_t(x_t, \hat x_0) + \sigma_t z,\qquad
# \hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\hat\epsilon}{\sqrt{\bar\alpha_t}}$$
#
# Put $\hat x_0$ into the mean: a short formula in $x_t$ and $\hat\epsilon$ is left (Ho et al. 2020, Eq. 11;
# Algorithm 2, line 4). `variance` is `"small"` for $\sigma_t^2 = \tilde\beta_t$ of 02.1, or `"large"` for
# $\sigma_t^2 = \beta_t$; `z` is standard normal noise of the shape of `x_t`. The last step, `t = 0`, adds none.


# %% item="02.5"
def ancestral_step(
    x_t: Tensor, eps_hat: Tensor, t: int, betas: Tensor, z: Tensor, variance: str
) -> Tensor:
    """x_{t-1} from x_t; x_t, eps_hat, z (B, ...), betas (T,), variance 'small' or 'large'."""
    ### BEGIN SOLUTION
    cumulative = torch.cat([torch.ones_like(betas[:1]), torch.cumprod(1 - betas, 0)])
    before, after, beta = cumulative[t], cumulative[t + 1], betas[t]
    mean = (x_t - beta / (1 - after).sqrt() * eps_hat) / (1 - beta).sqrt()
    if t == 0:
        return mean
    sigma2 = beta if variance == "large" else (1 - before) / (1 - after) * beta
    return mean + sigma2.sqrt() * z
    ### END SOLUTION


# %% item="02.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
ancestral_step = check("02.5", ancestral_step)

# %% [markdown]
# Which variance is right? It depends on the data. Both runs below use the exact $\hat\epsilon$ of $x_0\sim\mathcal N(0, s^2)$, and show the deviation of $x_t$
# over what it should be, $\sqrt{\bar\alpha_t s^2 + 1 - \bar\alpha_t}$. For $s = 1$ the large variance is exact, and for $s = 0$, when all data are one
# point, the small one (Ho et al. 2020, Sec. 3.2). The other choice is wrong by more than 4 % on this table.

# %%
n = 20_000
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
worst = {}
for ax, s in zip(axes, (1.0, 0.0), strict=True):
    exact = eps_net(Mixture.gaussian(torch.zeros(1), torch.tensor([[s**2]])).denoiser)
    for variance, role in (("large", "data"), ("small", "warn")):
        x, ratios = torch.randn(n, 1, generator=generator(9)).double(), []
        for t in reversed(range(1, T)):
            z = torch.randn(n, 1, generator=generator(10, t)).double()
            x = ancestral_step(x, exact(x, torch.full((n,), t)), t, betas, z, variance)
            ratios.append(float(x.std() / (alpha_bar[t - 1] * s**2 + 1 - alpha_bar[t - 1]).sqrt()))
        worst[s, variance] = max(abs(ratio - 1) for ratio in ratios)
        ax.plot(range(1, T), ratios, color=study.COLOURS[role], label=f'"{variance}"')
    ax.axhline(1, color=study.COLOURS["muted"], linewidth=1)
    ax.set(xlabel="steps taken", title=f"s = {s:g}")
axes[0].set_ylabel("deviation of $x_t$ / exact")
axes[1].legend()
error = 1 / (2 * n) ** 0.5  # standard error of a deviation from n Gaussian draws, relative
assert max(worst[1.0, "large"], worst[0.0, "small"]) < 4.5 * error
assert min(worst[1.0, "small"], worst[0.0, "large"]) > 0.04
plt.show()

# %% [markdown] item="02.6"
# Now all of it (Ho et al. 2020, Algorithm 2): start at `x_T`, walk through every time down to 0, return $x_0$. Use $\sigma_t^2 = \beta_t$. `net(x, t)` wants `t` as
# `(B,)`, integers; `noise(x)` returns fresh standard normal noise of the shape of `x` at each call: one call in each step that adds noise. There is no clipping here.


# %% item="02.6"
def sample_ddpm(net, x_T: Tensor, betas: Tensor, noise) -> Tensor:
    """A sample from each row of x_T (B, ...); net(x, t) predicts the noise, betas (T,), noise(x) draws it."""
    ### BEGIN SOLUTION
    cumulative = torch.cumprod(1 - betas, 0)
    x = x_T
    for t in reversed(range(len(betas))):
        eps_hat = net(x, torch.full((len(x),), t))
        x = (x - betas[t] / (1 - cumulative[t]).sqrt() * eps_hat) / (1 - betas[t]).sqrt()
        if t > 0:
            x = x + betas[t].sqrt() * noise(x)
    return x
    ### END SOLUTION


# %% item="02.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
sample_ddpm = check("02.6", sample_ddpm)

# %% [markdown]
# Your sampler twice: with the *exact* noise of a mixture, whose density is blue, and with the network that was trained below 02.3, on its data. The first is as far
# from 800 draws of the mixture as other 800 draws are (sliced Wasserstein distance, within three deviations).


# %%
stream_of_points = generator(12)


def normal_points(x):
    """Noise for all points from one stream, which is faster than a stream for each."""
    return torch.randn(x.shape, generator=stream_of_points).to(x)


blobs, extent = toys.three_blobs(), (-2.6, 2.6, -2.6, 2.6)
start = torch.randn(800, 2, generator=generator(11))
drawn = sample_ddpm(eps_net(blobs.denoiser), start.double(), betas, normal_points)
moons = sample_ddpm(ema, start, betas, normal_points)
chance, spread = sliced_wasserstein_floor(blobs.sample, 800)
assert sliced_wasserstein(drawn, blobs.sample(800, generator(13))) < chance + 3 * spread
fig, (left, right_) = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
study.density(left, blobs.log_prob, extent)
study.scatter(left, drawn, colour=study.COLOURS["model"], size=5)
study.plane(right_, extent)
study.scatter(right_, held_out[:800], size=8, alpha=0.4, label="data")
study.scatter(right_, moons, colour=study.COLOURS["model"], size=5, label="samples")
left.set_title("exact noise of a mixture")
right_.set_title("the network of 02.3")
right_.legend(loc="upper right", markerscale=2)
plt.show()

# %% [markdown] item="02.7"
# A network that knows classes can also learn to do without: in training some labels are replaced by a null class, so that one network learns $p(x\mid c)$ and
# $p(x)$ (Ho and Salimans 2022, Algorithm 1). Replace each label by `null` with probability `p`: where `u < p`, with `u` uniform in $[0, 1)$, one for each sample.


# %% item="02.7"
def drop_labels(labels: Tensor, u: Tensor, p: float, null: int) -> Tensor:
    """The labels, some replaced by null; labels (B,) integers, u (B,) in [0, 1)."""
    ### BEGIN SOLUTION
    return torch.where(u < p, null, labels)
    ### END SOLUTION


# %% item="02.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
drop_labels = check("02.7", drop_labels)

# %% [markdown]
# The course's network of digits was trained so, with `p = 0.1`. Your sampler asks it twice from the same
# noise: for the classes 0 to 9, which stand above the columns (upper row), and, with all labels dropped,
# for any digit at all (lower row). A classifier reads in the upper row each class that was asked for.

# %%
asked = torch.arange(10)
any_digit = drop_labels(asked, torch.zeros(10), 0.1, digits.CLASSES)
start = SampleNoise(14)(torch.empty(10, *digits.SHAPE))
rows = [
    sample_ddpm(eps_net(D_digits.given(label=label)), start, betas, SampleNoise(15))
    for label in (asked, any_digit)
]
read = zoo.load("digits-reader", device="cpu")(rows[0]).argmax(1)
assert torch.equal(read, asked)
study.strip(rows, ["asked for", "any"], [str(int(label)) for label in asked])

# %% [markdown] item="02.8"
# Two ways to fail: samples that are no digits, and digits that are never drawn. **Precision** is the share of samples that lie within the real data's manifold,
# **recall** the share of real data within the samples'. The manifold of a set is the union of balls around its points, each reaching to the point's $k$-th nearest
# neighbour *in the same set*, itself not counted (Kynkäänniemi et al. 2019, Eq. 1 and 2). Return the pair.


# %% item="02.8"
def precision_recall(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Improved precision and recall, in [0, 1]; real (N, d), fake (M, d), k < N and k < M."""

    ### BEGIN SOLUTION
    def inside(points: Tensor, centres: Tensor) -> float:
        radii = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values  # 1 is the point itself
        return float((torch.cdist(points, centres) <= radii).any(1).double().mean())

    return inside(fake, real), inside(real, fake)
    ### END SOLUTION


# %% item="02.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
precision_recall = check("02.8", precision_recall)

# %% [markdown]
# Left, $k = 3$: the balls of 40 real points. Of the samples those in some ball are green. Right: four sets
# against 700 real digits. Other real digits are near the diagonal (grey), and not at 1: a set of 700 does
# not cover all ways of writing. Fewer classes cost recall, noise costs precision; faded digits are near
# real ones, but their small balls reach none. Note that noise *raises* recall: scattered samples have
# large balls. Neither number means much alone.

# %%
few, samples = held_out[:40].double(), moons[:150].double()
reach = torch.cdist(few, few).kthvalue(4, dim=1).values
good = (torch.cdist(samples, few) <= reach).any(1)
assert round(float(precision_recall(few, samples, 3)[0]) * len(samples)) == int(good.sum())

real, other, their = digits.pixels(images[:700]), images[700:1400], labels[700:1400]
noise = torch.randn(other.shape, generator=generator(16))
sets = {
    "other real digits": other,
    "only 1 and 7": other[(their == 1) | (their == 7)],
    "with noise": (other + noise / 2).clamp(-1, 1),
    "faded to the mean": (other + images.mean(0)) / 2,
}
found = {name: precision_recall(real, digits.pixels(x), 3) for name, x in sets.items()}
base = found["other real digits"]
assert abs(base[0] - base[1]) < 0.05
assert found["only 1 and 7"][1] < base[1] / 3 and found["with noise"][0] < base[0] / 3
assert found["with noise"][1] > base[1] and found["faded to the mean"][1] == 0

fig, (left, right_) = plt.subplots(1, 2, figsize=(9, 4.2))
study.plane(left, (-2.2, 2.2, -1.6, 1.6))
for centre, radius in zip(few.tolist(), reach.tolist(), strict=True):
    left.add_patch(plt.Circle(centre, radius, color=study.COLOURS["data"], alpha=0.12, linewidth=0))
study.scatter(left, few, size=14, label="real")
study.scatter(left, samples[good], colour=study.COLOURS["model"], size=8, label="inside")
study.scatter(left, samples[~good], colour=study.COLOURS["warn"], size=14, label="outside")
right_.plot([0, 1], [0, 1], color=study.COLOURS["muted"], linewidth=1)
for name, (precision, recall) in found.items():
    right_.plot(recall, precision, "o", label=name)
right_.set(xlabel="recall", ylabel="precision", xlim=(-0.05, 1), ylim=(-0.05, 1), aspect="equal")
for ax, columns in ((left, 3), (right_, 2)):
    ax.legend(
        ncols=columns,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        columnspacing=0.8,
        handletextpad=0.1,
    )
plt.show()

# %% [markdown] item="02.9"
# Likelihood is counted in **bits per dimension**: $-\log_2 p(x) / d$, for $x$ of $d$ numbers. The fewer, the better the model foresaw $x$; for a density it can be
# negative. Write it for the model $p = \mathcal N(m, s^2 I)$: `mean` is $m$, of the shape of one sample, and `std` is $s$, a 0-d tensor. One number for each sample.


# %% item="02.9"
def bits_per_dim(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """-log2 N(x; mean, std^2 I) / d, (B,); x (B, C, H, W), mean (C, H, W), std 0-d."""
    ### BEGIN SOLUTION
    log_p = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    return -log_p.flatten(1).mean(1) / math.log(2)
    ### END SOLUTION


# %% item="02.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
bits_per_dim = check("02.9", bits_per_dim)

# %% [markdown]
# A Gaussian as a model of digits, judged on held-out ones: the mean digit in the middle, and `std` to choose. The best is the root mean square distance from the mean, where the curve is lowest.
# Being too sure costs more than being too careful: half the best `std` adds more than twice the bits that twice the best adds.

# %%
test, middle = digits.load("test")[0], images.mean(0)
stds = torch.linspace(0.2, 1.2, 101)
bits = torch.stack([bits_per_dim(test, middle, std).mean() for std in stds])
best = (test - middle).square().mean().sqrt()
assert abs(float(stds[bits.argmin()] - best)) <= 0.01  # one step of the list
least, sure, careful = (bits_per_dim(test, middle, c * best).mean() for c in (1, 0.5, 2))
assert sure - least > 2 * (careful - least)
fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(stds, bits, color=study.COLOURS["model"], label="mean digit, std")
ax.axvline(best, color=study.COLOURS["muted"], linewidth=1.5, label="root mean square distance")
ax.set(xlabel="std", ylabel="bits per dimension")
ax.legend()
plt.show()

# %% [markdown] item="02.10"
# A diffusion model has no closed $p(x)$, but a bound on it (Ho et al. 2020, Eq. 5). All of its terms but
# the first and the last are the divergence of two Gaussians of equal variance: the posterior of 02.1 with
# the true $x_0$, and with the guess $\hat x_0$. In the course's coordinate $x = x_0 + \sigma\epsilon$ the step from $\sigma$ down to $\sigma'$ costs, in nats,
#
# $$\tfrac12\left(\frac{1}{\sigma'^2} - \frac{1}{\sigma^2}\right)\lVert x_0 - \hat x_0\rVert^2$$
#
# (Kingma et al. 2021, Eq. 13, with $\mathrm{SNR} = 1/\sigma^2$). Return it in bits per dimension, one number for each sample; `sigma_next` is $\sigma'$.


# %% item="02.10"
def bound_term(x0: Tensor, x0_hat: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The bound's term of one step, in bits per dimension, (B,); x0, x0_hat (B, C, H, W), sigma > sigma_next 0-d."""
    ### BEGIN SOLUTION
    gain = 1 / sigma_next**2 - 1 / sigma**2
    distance = (x0 - x0_hat).square().flatten(1).mean(1)
    return gain / 2 * distance / math.log(2)
    ### END SOLUTION


# %% item="02.10" tags=["check"]
# NBVAL_CHECK_OUTPUT
bound_term = check("02.10", bound_term)

# %% [markdown]
# Where are the bits of a digit? Your term for every step of the table, for eight held-out digits. All steps that start above $\sigma = 1$, in which the digit takes shape (02.4: at t = 24 it is 0.9), cost less than a tenth of the bits;
# the last ten, which fix the second decimal of each pixel, cost more than half. The sum over the steps is the diffusion part of the library's bound.

# %%
x0, noise, levels = test[:8], SampleNoise(17), sigmas[:-1]
terms = []
for sigma, sigma_next in itertools.pairwise(levels):
    guess = D_digits(x0 + sigma.float() * noise(x0), sigma)
    terms.append(bound_term(x0.double(), guess.double(), sigma, sigma_next))
terms = torch.stack(terms)  # (steps, B)
whole = variational_bound(D_digits, x0, levels, SampleNoise(17)).diffusion
assert torch.allclose(terms.sum(0), whole, rtol=1e-5)
share = terms.mean(1) / terms.mean(1).sum()
assert share[levels[:-1] > 1].sum() < 0.1 and share[-10:].sum() > 0.5
fig, ax = plt.subplots(figsize=(6, 3))
ax.loglog(levels[:-1], terms, color=study.COLOURS["muted"], linewidth=0.8)
ax.loglog(levels[:-1], terms.mean(1), color=study.COLOURS["model"], label="mean of 8 digits")
ax.set(xlabel=r"$\sigma$ at which the step starts", ylabel="bits per dimension")
ax.invert_xaxis()
ax.legend()
plt.show()

# %% [markdown] item="02.11"
# The last item is one for detectives. Below stands DDIM (Song, Meng and Ermon 2021, Eq. 12 and 16), a sampler that may leave times out: it walks along the falling list `times`,
# for example `[49, 39, 29, 19, 9]`, and from the last of them to $x_0$. A step guesses $\hat x_0$ and goes to the level $\bar\alpha'$ of the next time: to the signal
# $\sqrt{\bar\alpha'}\,\hat x_0$ and noise of variance $1-\bar\alpha'$ in all. Of this noise a part is fresh, $s z$, and the rest goes in the direction of $\hat\epsilon$, with
#
# $$s = \eta\,\sqrt{\frac{1-\bar\alpha'}{1-\bar\alpha}}\sqrt{1-\frac{\bar\alpha}{\bar\alpha'}}$$
#
# and `eta` from 0 (no fresh noise) to 1. **The program has three faults**, each in one place; the line of $s$ is right. It runs, and it draws something. Write the mended
# sampler below it; the check tells which faults are still there.


# %%
def faulty_ddim(net, x_T: Tensor, betas: Tensor, noise, times: list[int], eta: float) -> Tensor:
    """DDIM along the falling list `times`, with three faults."""
    alpha_bar = torch.cumprod(1 - betas, 0)
    x = x_T
    for i, t in enumerate(times):
        a = alpha_bar[t]
        a_next = alpha_bar[t - 1] if t > 0 else torch.ones_like(a)
        eps = net(x, torch.full((len(x),), i))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        s = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps + s * noise(x)
    return x


# %% item="02.11"
def sample_ddim(net, x_T: Tensor, betas: Tensor, noise, times: list[int], eta: float) -> Tensor:
    """DDIM with fresh noise along the falling list `times`, and on to x0; net(x, t), noise(x) as in 02.6."""
    ### BEGIN SOLUTION
    alpha_bar = torch.cumprod(1 - betas, 0)
    x = x_T
    for i, t in enumerate(times):
        a = alpha_bar[t]
        a_next = alpha_bar[times[i + 1]] if i + 1 < len(times) else torch.ones_like(a)
        eps = net(x, torch.full((len(x),), t))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        s = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next - s**2).sqrt() * eps + s * noise(x)
    return x
    ### END SOLUTION


# %% item="02.11" tags=["check"]
# NBVAL_CHECK_OUTPUT
sample_ddim = check("02.11", sample_ddim)

# %% [markdown]
# Both samplers with ten network calls in place of fifty and `eta = 0.5`: on the mixture of 02.6, where the faulty one ends more than three times as far from it, and asked for
# the digits 0 to 9.

# %%
times = list(range(49, 0, -5))  # 49, 44, ... 4
start, extent = torch.randn(800, 2, generator=generator(18)).double(), (-3.5, 3.5, -3.5, 3.5)
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
rows, apart = [], []
noisy = SampleNoise(19)(torch.empty(10, *digits.SHAPE))
for ax, sampler, name in zip(axes, (faulty_ddim, sample_ddim), ("faulty", "mended"), strict=True):
    points = sampler(eps_net(blobs.denoiser), start, betas, normal_points, times, 0.5)
    apart.append(sliced_wasserstein(points, blobs.sample(800, generator(20))))
    study.density(ax, blobs.log_prob, extent)
    study.scatter(ax, points, colour=study.COLOURS["model"], size=5)
    ax.set_title(name)
    rows.append(
        sampler(eps_net(D_digits.given(label=asked)), noisy, betas, SampleNoise(21), times, 0.5)
    )
assert apart[0] > 3 * apart[1]
plt.show()
study.strip(rows, ["faulty", "mended"], [str(int(label)) for label in asked])

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 03, the samplers that need only a few calls.
