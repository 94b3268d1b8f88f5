# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 08: score distillation
#
# Ten functions about one question: can a model that removes noise *teach*? Something with parameters $\theta$ makes pictures, $x_0 = g(\theta)$: pixels, a
# painted scene, a body. Noise is put on $x_0$, the model says what it would take off, and the difference moves $\theta$. No sampling, and no training of the model.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("08.1")` gives the next hint, `solution("08.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 08.1 the noise residual | 1 | | 08.6 variational score distillation | 2 |
# | 08.2 a loss that has a given gradient | 2 | | 08.7 how the second score learns | 2 |
# | 08.3 dropping the Jacobian | 2 | | 08.8 a low-rank layer | 2 |
# | 08.4 a time, its level and its weight | 2 | | 08.9 noise-free score distillation | 2 |
# | 08.5 perturb and average | 2 | | 08.10 through the encoder | 2 |
# | | | | **all** | **19** |
#
# Symbols: $x = x_0 + \sigma\epsilon$ at the noise level $\sigma$; $D(x, \sigma)$ is the model's estimate of $x_0$, $J$ its Jacobian by $x$, and
# $\hat\epsilon = (x - D(x, \sigma)) / \sigma$ its estimate of the noise, whatever its network predicts. A *gradient* is what an optimiser subtracts. Where `sigma` is `(B,)`,
# each sample has a level of its own. $w$ is the scale of guidance, $w(\sigma)$ a weight; formulas that were published in DDPM's coordinate are written in this one.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import study, zoo
from course_lib.devices import generator
from course_lib.gaussians import Empirical, Mixture
from course_lib.grading.check import check, hint, solution
from course_lib.guidance import cfg
from course_lib.schedules import linear_betas
from course_lib.worlds import digits

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS
D_digits = zoo.load("digits", device="cpu")
images, labels = digits.load("train")
TEN = torch.arange(10)
D_ten = D_digits.given(label=TEN)
D_none = D_digits.given(label=torch.full_like(TEN, digits.CLASSES))


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def falling(high: float, low: float, steps: int) -> Tensor:
    """Levels that fall geometrically, one for each step: first what stands where, then the details."""
    return high * (low / high) ** (torch.arange(steps) / (steps - 1))


# %% [markdown] item="08.1"
# All of score distillation starts from one difference: the noise that the model sees, less the noise that was put there,
#
# $$\hat\epsilon - \epsilon,\qquad x = x_0 + \sigma\epsilon,\qquad \hat\epsilon = \frac{x - D(x, \sigma)}{\sigma}.$$
#
# Score distillation sampling (SDS, the method of DreamFusion; Poole et al. 2023) takes it, times a weight, for the gradient with respect to $x_0$. `x0` and `eps` are `(B, ...)`,
# `sigma` is `(B,)`; `D(x, sigma)` is asked once, about all samples.


# %% item="08.1"
def noise_residual(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """eps_hat - eps of each sample, of the shape of x0 (B, ...)."""
    ### BEGIN SOLUTION
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    return (x0 - D(x0 + s * eps, sigma)) / s
    ### END SOLUTION


# %% item="08.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
noise_residual = check("08.1", noise_residual)

# %% [markdown]
# Why take $\epsilon$ off, which is 0 on average? Let the data be $\mathcal N(0, s^2)$. Then $D$ is known, and with $\kappa = \sigma^2 / (s^2 + \sigma^2)$
#
# $$\hat\epsilon - \epsilon = \frac{\kappa}{\sigma}\,x_0 - (1 - \kappa)\,\epsilon,\qquad \hat\epsilon = \frac{\kappa}{\sigma}\,x_0 + \kappa\,\epsilon .$$
#
# Both have the same mean, which leads to the data; they differ in their noise. Above $\sigma = s$ it is better to take $\epsilon$ off, below it is better to leave it.
# Dots: measured with your function, at $x_0 = 1$ and $s = 1/2$.

# %%
s, levels = 0.5, torch.logspace(-1.3, 1.3, 14).double()
draws, one = normal(1, 4000, 1), torch.ones(4000, 1).double()


def narrow(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(0, s²); x (B, 1), sigma (B,)."""
    return s**2 / (s**2 + sigma[:, None] ** 2) * x


residuals = [noise_residual(narrow, one, sigma.expand(4000), draws) for sigma in levels]
kappa = levels**2 / (s**2 + levels**2)
spreads = {
    "with − ε": [float(r.std()) for r in residuals],
    "without": [float((r + draws).std()) for r in residuals],
}
means = torch.stack([r.mean() for r in residuals])
assert float((means - kappa / levels).abs().max()) < 5 / 4000**0.5  # five standard errors
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, spread), exact, role, look in zip(
    spreads.items(), (1 - kappa, kappa), ("model", "warn"), ("o", "s"), strict=True
):
    ax.plot(levels, exact, "-", color=COLOURS[role])
    ax.plot(levels, spread, look, color=COLOURS[role], label=name)
ax.axvline(s, color=COLOURS["muted"], linestyle="dotted", label="σ = s")
ax.set(xlabel="σ", ylabel="deviation of the gradient", xscale="log")
ax.legend()
plt.show()

# %% [markdown] item="08.2"
# An optimiser wants a loss, and here is only a vector: $\hat\epsilon - \epsilon$ is *not* meant to be differentiated (08.3 says why). The way out is a loss that means nothing, but
# whose gradient is the vector. The stop-gradient sg, `.detach()` in PyTorch, makes a number of what stands in it. Given `x0`, which has a graph back to $\theta$, and
# `gradient` of the same shape, which may carry a graph of its own, return a loss, 0-d, with
#
# $$\nabla_{x_0}\,\text{loss} = \text{gradient},\qquad\text{so that}\qquad \nabla_\theta\,\text{loss} = \Big(\frac{\partial x_0}{\partial\theta}\Big)^{\!\top}\text{gradient}.$$
#
# Two such losses are in use, a product and a square; either will do.


# %% item="08.2"
def surrogate(x0: Tensor, gradient: Tensor) -> Tensor:
    """A loss, 0-d, whose gradient by x0 is `gradient`."""
    ### BEGIN SOLUTION
    target = (x0 - gradient).detach()
    return 0.5 * (x0 - target).square().sum()
    ### END SOLUTION


# %% item="08.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
surrogate = check("08.2", surrogate)

# %% [markdown]
# That is all of SDS: ten pictures, whose pixels are $\theta$, under a network that is asked for the digits 0 to 9 with guidance 7.5, with DreamFusion's weight. The
# levels fall from 5 to 0.1. The line below is the value of the loss, written as a square: $\lVert\text{gradient}\rVert^2/2$. The dots are the same for ten *real* digits. It falls because
# the levels fall, and real digits have about the same: it tells the level, not how good the pictures are. (Written as a product it tells even less.)

# %%
STEPS, W = 60, 7.5
SHAPE = (10, *digits.SHAPE)


def dreamfusion(sigma: Tensor) -> Tensor:
    """The weight sigma² / (1 + sigma²): DDPM's 1 - alpha_bar (08.4)."""
    return sigma**2 / (1 + sigma**2)


def distil(gradient_of, steps: int = STEPS, high: float = 5.0, low: float = 0.1, n: int = 10):
    """Pictures under a rule `gradient_of(x0, sigma, eps)`: what they are at some steps, and half their squared gradients."""
    chance = generator(2)
    x0 = nn.Parameter(0.3 * torch.randn(n, *digits.SHAPE, generator=chance))
    optimiser, kept, squares = torch.optim.Adam([x0], lr=0.08, betas=(0.9, 0.99)), [], []
    for step, sigma in enumerate(falling(high, low, steps), 1):
        eps = torch.randn(x0.shape, generator=chance)
        with torch.no_grad():
            gradient = dreamfusion(sigma) * gradient_of(x0.detach(), sigma.expand(n), eps)
        optimiser.zero_grad()
        surrogate(x0, gradient).backward()
        optimiser.step()
        squares.append(float(gradient.square().sum()) / 2)
        if step in (1, steps // 6, steps // 3, steps):
            kept.append(x0.detach().clone())
    return kept, squares


teacher = cfg(D_ten, D_none, W)
by_sds, squares = distil(lambda x0, sigma, eps: noise_residual(teacher, x0, sigma, eps))
study.strip(
    by_sds, ["1 step", f"{STEPS // 6}", f"{STEPS // 3}", f"{STEPS} steps"], list(range(10)), scale=4
)

# %%
real = images[torch.stack([(labels == k).nonzero()[0, 0] for k in TEN])]
some = torch.arange(0, STEPS, 6)
of_real = []
for sigma in falling(5.0, 0.1, STEPS)[some]:
    eps = torch.randn(real.shape, generator=generator(3))
    with torch.no_grad():
        gradient = dreamfusion(sigma) * noise_residual(teacher, real, sigma.expand(10), eps)
    of_real.append(float(gradient.square().sum()) / 2)
fig, ax = plt.subplots(figsize=(6.4, 3.0))
ax.plot(range(1, STEPS + 1), squares, color=COLOURS["model"], label="the pictures")
ax.plot(some + 1, of_real, "o", color=COLOURS["data"], label="real digits")
ax.set(xlabel="step", ylabel="loss", yscale="log")
ax.legend()
plt.show()

# %% [markdown] item="08.3"
# There *is* a loss behind SDS: that of denoising, $L = \tfrac12\lVert\hat\epsilon - \epsilon\rVert^2$ of $x = x_0 + \sigma\epsilon$. Its gradient has a factor that SDS drops,
#
# $$\nabla_{x_0} L = \underbrace{\Big(\frac{\partial\hat\epsilon}{\partial x_0}\Big)^{\!\top}}_{\text{dropped}}(\hat\epsilon - \epsilon),\qquad
# \frac{\partial\hat\epsilon}{\partial x_0} = \frac{I - J}{\sigma}.$$
#
# Return both: the gradient of $L$, *through* the network, where $L$ is the sum over all numbers of all samples, and the gradient without the whole factor. `sigma` is 0-d. The loop runs under
# `torch.no_grad()`: open `torch.enable_grad()` where you need it. Neither result carries a graph.


# %% item="08.3"
def with_and_without(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of L by x0, and what is left of it without d eps_hat / dx0; both of the shape of x0 (B, ...)."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        residual = (x0 - D(x0 + sigma * eps, sigma)) / sigma
        through = torch.autograd.grad(0.5 * residual.square().sum(), x0)[0]
    return through, residual.detach()
    ### END SOLUTION


# %% item="08.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
with_and_without = check("08.3", with_and_without)

# %% [markdown]
# Five digits, without guidance, once with each gradient, from the same start and with the same noise. Both draw digits: what is dropped is not needed. What it costs is a
# pass back through the network in each step. And what it does to the gradient depends on the level, as $(I - J)/\sigma$ must: in strong noise, where $J$ is small, it is short, in weak
# noise it is long, and it points elsewhere. (In large networks the Jacobian is, moreover, badly conditioned at small levels, as DreamFusion's authors report.)

# %%
five = D_digits.given(label=TEN[:5])
ways = {}
for part, name in enumerate(("through the network", "Jacobian dropped")):

    def gradient_of(x0, sigma, eps, part=part):
        return with_and_without(five, x0, sigma[0], eps)[part]

    ways[name] = distil(gradient_of, steps=40, n=5)[0][-1]
study.strip(list(ways.values()), list(ways), scale=4)

# %%
DRAWS, ladder = 8, (0.1, 0.2, 0.5, 1.0, 2.0)
forty = D_digits.given(label=TEN[:5].repeat(DRAWS))
between = (real[:5] + images.mean(0)) / 2  # on the way to a digit
lengths, cosines = [], []
for sigma in torch.tensor(ladder):
    eps = torch.randn(DRAWS, *between.shape, generator=generator(4)).flatten(0, 1)
    both = with_and_without(forty, between.repeat(DRAWS, 1, 1, 1), sigma, eps)
    through, dropped = (g.unflatten(0, (DRAWS, 5)).mean(0).flatten(1) for g in both)
    lengths.append(float((through.norm(dim=1) / dropped.norm(dim=1)).mean()))
    cosines.append(float(F.cosine_similarity(through, dropped).mean()))
assert lengths[0] > 2 and lengths[-1] < 1 and cosines[0] < cosines[-1]
fig, (ax1, ax2) = plt.subplots(1, 2, figsize=(9.0, 3.0))
ax1.plot(ladder, lengths, "o-", color=COLOURS["model"])
ax1.axhline(1, color=COLOURS["muted"], linestyle="dotted")
ax1.set(xlabel="σ", ylabel="length, with over without", xscale="log", yscale="log")
ax2.plot(ladder, cosines, "o-", color=COLOURS["model"])
ax2.set(xlabel="σ", ylabel="cosine between them", xscale="log", ylim=(0, 1.05))
plt.show()

# %% [markdown] item="08.4"
# Published weights are functions of DDPM's time. DreamFusion's gradient is $w(t)\,(\hat\epsilon - \epsilon)$ with $w(t) = 1 - \bar\alpha_t$, the variance of the noise in
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon$. Here the same point is $x = x_t / \sqrt{\bar\alpha_t}$, and the gradient is a multiple of $x_0 - D$,
#
# $$w(t)\,(\hat\epsilon - \epsilon) = c\,\big(x_0 - D(x, \sigma)\big).$$
#
# Which $\sigma$, and which $c$? `betas` is `(T,)`, `t` `(B,)` an index into it that counts from 0, and as in 01.2 $\bar\alpha_t$ includes `betas[t]`. Return both for each `t`, `(B,)`.


# %% item="08.4"
def level_and_factor(betas: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """sigma at t, and the factor c of x0 - D; (B,) each."""
    ### BEGIN SOLUTION
    alpha_bar = torch.cumprod(1 - betas, 0)[t]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    return sigma, (1 - alpha_bar) / sigma
    ### END SOLUTION


# %% item="08.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
level_and_factor = check("08.4", level_and_factor)

# %% [markdown]
# DDPM's thousand times. The factor is largest where $\sigma = 1$, and falls to both sides: details and coarse composition move the picture less than what lies between. The
# dots are even in $t$: of times that are drawn evenly, as in the paper, three in four lie above $\sigma = 1$.

# %%
every = torch.arange(1000)
sigma_of_t, factor = level_and_factor(linear_betas(), every)
peak = int(factor.argmax())
assert 0.7 < float((sigma_of_t > 1).double().mean()) < 0.8
assert abs(float(factor[peak]) - 0.5) < 1e-4 and abs(float(sigma_of_t[peak]) - 1) < 0.02
fig, (ax1, ax2) = plt.subplots(1, 2, figsize=(9.0, 3.2))
ax1.plot(every, sigma_of_t, color=COLOURS["model"])
ax1.set(xlabel="t", ylabel="σ", yscale="log")
ax2.plot(sigma_of_t, factor, color=COLOURS["model"])
ax2.plot(sigma_of_t[20::80], factor[20::80], "o", color=COLOURS["data"], label="every 80th t")
ax2.set(xlabel="σ", ylabel="c", xscale="log")
ax2.legend()
plt.show()

# %% [markdown] item="08.5"
# Score Jacobian chaining (SJC; Wang, Du et al. 2023) comes to the same place from the score: where should $x_0$ go, as it is, without noise? The network should not be asked about $x_0$
# itself at a level $\sigma$: what it was trained on has noise of that level. So noise is put on, n times, and its *answers* are averaged,
#
# $$\text{PAAS}(x_0, \sigma) = \frac1n\sum_{k=1}^n \frac{D(x_0 + \sigma\epsilon_k, \sigma) - x_0}{\sigma^2}.$$
#
# `x0` is `(B, ...)`, `eps` `(n, B, ...)`, `sigma` 0-d. `D` takes a batch of any size, `(N, ...)`.


# %% item="08.5"
def perturb_and_average(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """The score of x0 at the level sigma, averaged over the n draws; of the shape of x0 (B, ...)."""
    ### BEGIN SOLUTION
    answers = D((x0 + sigma * eps).flatten(0, 1), sigma).unflatten(0, eps.shape[:2])
    return (answers.mean(0) - x0) / sigma**2
    ### END SOLUTION


# %% item="08.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
perturb_and_average = check("08.5", perturb_and_average)

# %% [markdown]
# Five pictures of noise, asked for the digits 0 to 4 at $\sigma = 1.5$. Where the score leads, $x_0 + \sigma^2\,\text{PAAS}$, is another picture with each draw, and a stable average
# with many: the error falls as $1/\sqrt n$, and each draw costs a call. With $n = 1$ it is the gradient of SDS, times $-1/\sigma$: there the optimiser averages, over its steps. Dashed: no
# noise on $x_0$. What the paper warns of, that the network is lost there, is not seen in this small one: its answer is about as far off as that of four draws.

# %%
start = 0.3 * torch.randn(5, *digits.SHAPE, generator=generator(5))
level = torch.tensor(1.5)
fog = torch.randn(96, 5, *digits.SHAPE, generator=generator(6))


def any_five(x: Tensor, sigma: Tensor) -> Tensor:
    """The network, asked for 0 to 4 again and again; x (5 n, ...)."""
    return D_digits.given(label=TEN[:5].repeat(len(x) // 5))(x, sigma)


def lead(eps: Tensor) -> Tensor:
    """Where the score averaged over these draws leads."""
    return start + level**2 * perturb_and_average(any_five, start, level, eps)


def apart(a: Tensor, b: Tensor) -> float:
    """Root of the mean square difference."""
    return float((a - b).square().mean().sqrt())


with torch.no_grad():
    unperturbed = any_five(start, level)
    settled = lead(fog[:64])
    by_count = {n: [lead(few) for few in fog[64:].split(n)] for n in (1, 4, 16)}
off = {n: sum(apart(one, settled) for one in leads) / len(leads) for n, leads in by_count.items()}
study.strip(
    [unperturbed, *(leads[0] for leads in by_count.values()), settled],
    ["without noise", *(f"n = {n}" for n in by_count), "n = 64"],
    scale=4,
)

# %%
assert off[1] > 1.5 * off[4] > 2 * off[16]
fig, ax = plt.subplots(figsize=(6.0, 3.0))
ax.plot(off.keys(), off.values(), "o", color=COLOURS["model"], label="averaged answers")
ax.plot((1, 16), (off[1], off[1] / 4), color=COLOURS["exact"], linestyle="dotted", label="1 / √n")
ax.axhline(apart(unperturbed, settled), color=COLOURS["warn"], linestyle="dashed", label="no noise")
ax.set(xlabel="n", ylabel="distance from n = 64", xscale="log", yscale="log")
ax.set_xticks((1, 4, 16), (1, 4, 16))
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown] item="08.6"
# SDS looks for *one* picture that is likely under all noise, and finds an average. Variational score distillation (VSD; Wang, Lu et al. 2023) moves a whole set of pictures, the *particles*, towards a
# distribution. In the place of $\epsilon$ stands the noise that a second model sees, whose data are the particles themselves,
#
# $$\hat\epsilon_{\text{real}} - \hat\epsilon_{\text{fake}},\qquad D_{\text{real}} = D_{\text{ref}} + w\,(D_{\text{cond}} - D_{\text{ref}}).$$
#
# Only the teacher is guided. Write it by means of the denoisers; all are asked about the same $x$, at `sigma` `(B,)`. (With $D_{\text{fake}}(x, \sigma) = x_0$ it is SDS.)


# %% item="08.6"
def vsd_gradient(D_cond, D_ref, D_fake, x0: Tensor, sigma: Tensor, eps: Tensor, w: float) -> Tensor:
    """eps_real - eps_fake of each sample, of the shape of x0 (B, ...)."""
    ### BEGIN SOLUTION
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    x = x0 + s * eps
    D_real = D_ref(x, sigma) + w * (D_cond(x, sigma) - D_ref(x, sigma))
    return (D_fake(x, sigma) - D_real) / s
    ### END SOLUTION


# %% item="08.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
vsd_gradient = check("08.6", vsd_gradient)

# %% [markdown]
# 128 particles in the plane, where all is exact: the teacher is the denoiser of three peaks with the weights 0.6, 0.3 and 0.1, the second score that of the particles themselves. The
# levels fall from 10, where all peaks are one, to 0.1. SDS sends nearly all particles to one point, the top of the largest peak. VSD shares them out in the right proportion, and each group
# is as wide as its peak: a particle is pushed away from where too many others are.

# %%
peaks = Mixture.isotropic(
    torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.5]]), 0.3, torch.tensor([0.6, 0.3, 0.1])
)
EXTENT = (-3.5, 3.5, -2.0, 4.2)


def swarm(second, N: int = 128, steps: int = 800) -> Tensor:
    """Particles (N, 2) under VSD, unguided; the second score is `second(particles)`."""
    x0, chance = normal(7, N, 2), generator(8)
    for step, sigma in enumerate(falling(10.0, 0.1, steps).double()):
        eps = torch.randn(N, 2, generator=chance, dtype=torch.float64)
        gradient = vsd_gradient(
            peaks.denoiser, peaks.denoiser, second(x0), x0, sigma.expand(N), eps, 1.0
        )
        x0 = x0 - 0.15 * (1 - 0.8 * step / steps) * sigma * gradient
    return x0


def shares(points: Tensor) -> Tensor:
    """The share of the points that is nearest to each peak, (3,)."""
    return torch.bincount(torch.cdist(points, peaks.means).argmin(1), minlength=3) / len(points)


swarms = {
    "SDS": swarm(lambda points: lambda x, sigma: points),
    "VSD": swarm(Empirical),
    "exact samples": peaks.sample(128, generator(9)),
}
fig, panels = plt.subplots(1, 3, figsize=(11.0, 3.6), sharey=True)
for ax, (name, points), role in zip(
    panels, swarms.items(), ("warn", "model", "exact"), strict=True
):
    study.density(ax, peaks.log_prob, EXTENT)
    study.scatter(ax, points, colour=COLOURS[role], size=8)
    ax.set_title(f"{name}: " + ", ".join(f"{share:.2f}" for share in shares(points)))
particles = swarms["VSD"]
assert float((shares(particles) - peaks.weights).abs().max()) < 0.05
assert float(shares(swarms["SDS"])[0]) > 0.95
plt.show()

# %% [markdown] item="08.7"
# With pictures nobody has the exact score of the particles. So a second network, $D_{\text{fake}}$, learns it beside them, by the plain denoising loss on what the particles are at the moment,
#
# $$\text{loss} = \operatorname{mean}\,(\hat\epsilon_{\text{fake}} - \epsilon)^2,\qquad x = x_0 + \sigma\epsilon,$$
#
# the mean over all numbers of all samples. `x0` `(B, ...)` comes as it was rendered, with its graph back to $\theta$; but this loss belongs to the network's optimiser, and must not move the
# particles. `eps` is of the shape of `x0`, `sigma` `(B,)`. Return the loss, 0-d, with a graph to the parameters of `D_fake`.


# %% item="08.7"
def second_score_loss(D_fake, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """The denoising loss of the second score on the particles, 0-d."""
    ### BEGIN SOLUTION
    x0 = x0.detach()
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    return (((x0 - D_fake(x0 + s * eps, sigma)) / s) ** 2).mean()
    ### END SOLUTION


# %% item="08.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
second_score_loss = check("08.7", second_score_loss)

# %% [markdown]
# A network of two hidden layers learns the denoiser of the particles above. The smallest error that any network can have is that of the exact denoiser, and it is not 0: what
# noise was drawn cannot be known. The network comes close to it.


# %%
class Small(nn.Module):
    """D(x, sigma) in the plane: a network of two hidden layers, the second of which may have a change (y of a linear layer)."""

    def __init__(self, width: int = 64):
        super().__init__()
        torch.manual_seed(10)
        self.into, self.middle, self.out = (
            nn.Linear(3, width),
            nn.Linear(width, width),
            nn.Linear(width, 2),
        )
        self.double()

    def forward(self, x: Tensor, sigma: Tensor, middle=None) -> Tensor:
        s = sigma[:, None]
        scale = (1 + s**2).sqrt()
        hidden = F.silu(self.into(torch.cat([x / scale, s.log() / 2], 1)))
        hidden = F.silu((middle or self.middle)(hidden))
        return (x + 2 * s * scale * self.out(hidden)) / scale**2


def learn(D_fake, learns, points: Tensor, steps: int, lr: float = 5e-3) -> list[float]:
    """The losses of the second score as it learns the denoiser of these points."""
    optimiser, chance, losses = torch.optim.Adam(learns, lr=lr), generator(11), []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = second_score_loss(D_fake, points, *drawn(points, chance))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def drawn(points: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """A level between 0.2 and 5 and noise for each point."""
    sigma = 0.2 * 25 ** torch.rand(len(points), generator=chance, dtype=torch.float64)
    return sigma, torch.randn(points.shape, generator=chance, dtype=torch.float64)


def judged(D_fake, points: Tensor) -> float:
    """The loss over many draws."""
    chance = generator(12)
    with torch.no_grad():
        return (
            sum(float(second_score_loss(D_fake, points, *drawn(points, chance))) for _ in range(50))
            / 50
        )


second = Small()
before = judged(second, particles)
history = learn(second, second.parameters(), particles, 600)
after, best = judged(second, particles), judged(Empirical(particles), particles)
assert best < after < best + 0.2 * (before - best)
fig, ax = plt.subplots(figsize=(6.4, 3.0))
ax.plot(torch.tensor(history).unfold(0, 20, 20).mean(1), color=COLOURS["model"], label="network")
ax.axhline(best, color=COLOURS["exact"], linestyle="dotted", label="exact denoiser")
ax.set(xlabel="steps / 20", ylabel="loss", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown] item="08.8"
# A second score must follow the particles as they move, in a few steps. It is therefore no new network, but the teacher with a small change that learns: LoRA (Hu et al. 2021). To a linear layer
# $x W^\top$ a branch of rank $r$ is added, which leads *down* to $r$ numbers and *up* again, with the scale $\alpha / r$,
#
# $$y = x W^\top + \frac{\alpha}{r}\; x A^\top B^\top,\qquad W_{\text{merged}} = W + \frac{\alpha}{r}\,B A .$$
#
# `x` is `(..., d)`, `W` `(d, d)`, `A` `(r, d)`, `B` `(d, r)`. Return $y$ `(..., d)`, through which `A` and `B` can learn, and the merged weight `(d, d)`, with which the layer needs no branch.


# %% item="08.8"
def lora_layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The layer's output with its branch (..., d), and the merged weight (d, d)."""
    ### BEGIN SOLUTION
    scale = alpha / A.shape[0]
    return x @ W.T + scale * (x @ A.T @ B.T), W + scale * (B @ A)
    ### END SOLUTION


# %% item="08.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
lora_layer = check("08.8", lora_layer)

# %% [markdown]
# The particles turn by 40°, and the second score of 08.7 is wrong about them. Only a branch of its middle layer learns, from $B = 0$, so that it starts where it was. The higher its
# rank, the closer it comes to the exact denoiser; at rank 4 it has 512 numbers, and the layer 4,096.

# %%
turn = torch.tensor(40.0).double().deg2rad()
turned = particles @ torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()]).reshape(2, 2)
stale, errors = judged(second, turned), {}
for rank in (1, 4, 16):
    A = nn.Parameter(normal(13, rank, 64) / 8)
    B = nn.Parameter(torch.zeros(64, rank).double())

    def middle(x, A=A, B=B, rank=rank):
        return lora_layer(x, second.middle.weight, A, B, float(rank))[0] + second.middle.bias

    def with_branch(x, sigma, middle=middle):
        return second(x, sigma, middle)

    assert abs(judged(with_branch, turned) - stale) < 1e-12
    learn(with_branch, [A, B], turned, 300)
    errors[f"rank {rank}"] = judged(with_branch, turned)
best = judged(Empirical(turned), turned)
assert best < errors["rank 16"] < errors["rank 4"] < errors["rank 1"] < stale
bars = {"no branch": stale} | errors | {"exact": best}
fig, ax = plt.subplots(figsize=(6.4, 2.8))
ax.barh(
    list(bars),
    list(bars.values()),
    color=[COLOURS["warn"], *[COLOURS["model"]] * 3, COLOURS["exact"]],
)
ax.invert_yaxis()
ax.set(xlabel="loss on the turned particles")
plt.show()

# %% [markdown] item="08.9"
# What is it in SDS that needs guidance of 100, and blurs below? Katzir et al. (2024) take $\hat\epsilon$ apart: into what the prompt adds, $\delta_C$, what leads to the domain of pictures, $\delta_D$, and
# noise. SDS subtracts $\epsilon$, but the noise in $\hat\epsilon$ is not $\epsilon$, and the rest of it remains. Noise-free score distillation (NFSD) has no $-\,\epsilon$, and makes $\delta_D$ by other means,
#
# $$\delta_D + w\,\delta_C,\qquad \delta_C = \hat\epsilon_{\text{cond}} - \hat\epsilon_{\text{ref}},\qquad
# \delta_D = \begin{cases}\hat\epsilon_{\text{ref}} & \sigma < \text{split}\\ \hat\epsilon_{\text{ref}} - \hat\epsilon_{\text{bad}} & \sigma \ge \text{split.}\end{cases}$$
#
# Below the split $\hat\epsilon_{\text{ref}}$ has little noise in it; above, the noise goes with that of a model of *bad* pictures (the teacher under a negative prompt). All three are asked about the
# same $x$; each sample, with its own `sigma` `(B,)`, has a regime of its own.


# %% item="08.9"
def nfsd_gradient(
    D_cond, D_ref, D_bad, x0: Tensor, sigma: Tensor, eps: Tensor, w: float, split: float
) -> Tensor:  # fmt: skip
    """delta_D + w delta_C of each sample, of the shape of x0 (B, ...)."""
    ### BEGIN SOLUTION
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    x = x0 + s * eps
    eps_cond, eps_ref, eps_bad = ((x - D(x, sigma)) / s for D in (D_cond, D_ref, D_bad))
    delta_D = torch.where(s < split, eps_ref, eps_ref - eps_bad)
    return delta_D + w * (eps_cond - eps_ref)
    ### END SOLUTION


# %% item="08.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
nfsd_gradient = check("08.9", nfsd_gradient)

# %% [markdown]
# Bad pictures are blurred digits here, by their exact denoiser. Shown is the noise in three gradients at the same $x_0$, by level. With $\hat\epsilon_{\text{bad}}$ taken off, less is left in strong noise than with
# $\epsilon$; in weak noise more. That $\hat\epsilon_{\text{ref}}$ alone has little noise is true only where $\sigma$ is far below what the data vary by, pixel for pixel (08.1): for digits, with their
# flat background, nowhere in this range. So NFSD draws bold strokes, away from the blur, and leaves grain behind. A split belongs to a world, and has to be looked for.

# %%
bad = Empirical(F.avg_pool2d(images[:600], 5, 1, 2, count_include_pad=False))
unlabelled = D_digits.given(label=torch.full((5 * DRAWS,), digits.CLASSES))
ladder = torch.tensor([0.1, 0.3, 0.6, 1.0, 2.0, 4.0])
same = between.repeat(DRAWS, 1, 1, 1)
left_over = {"ε_ref − ε (SDS)": [], "ε_ref": [], "ε_ref − ε_bad": []}
for sigma in ladder:
    eps = torch.randn(same.shape, generator=generator(15))
    each = sigma.expand(len(same))
    with torch.no_grad():
        plain = noise_residual(unlabelled, same, each, eps)
        # without guidance delta_D is left alone; the split is put below the level, or above it
        alone, less_bad = (
            nfsd_gradient(unlabelled, unlabelled, bad, same, each, eps, 0.0, split)
            for split in (float("inf"), 0.0)
        )
    for kept, gradient in zip(left_over.values(), (plain, alone, less_bad), strict=True):
        kept.append(float(gradient.unflatten(0, (DRAWS, 5)).var(0).mean().sqrt()))
assert left_over["ε_ref − ε_bad"][-1] < left_over["ε_ref − ε (SDS)"][-1]
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, kept), role, look in zip(
    left_over.items(), ("warn", "other", "model"), ("s--", "^:", "o-"), strict=True
):
    ax.plot(ladder, kept, look, color=COLOURS[role], label=name)
ax.set(xlabel="σ", ylabel="deviation over draws", xscale="log", yscale="log")
ax.legend()
plt.show()

# %%
by_nfsd, _ = distil(
    lambda x0, sigma, eps: nfsd_gradient(D_ten, D_none, bad, x0, sigma, eps, 3.0, 0.8)
)
study.strip(
    [by_sds[-1], by_nfsd[-1], real], ["SDS", "NFSD", "real digits"], list(range(10)), scale=4
)

# %% [markdown] item="08.10"
# Stable Diffusion's teacher knows only latents, $z = \text{scaling} \cdot E(\text{image})$ with an encoder $E$. Its gradient by $z$ comes back to the picture, and from there to $\theta$, by the chain rule through
# the *encoder*; the decoder has no part in it,
#
# $$\nabla_{\text{image}} = \Big(\frac{\partial z}{\partial\,\text{image}}\Big)^{\!\top} \text{pull}(z).$$
#
# `pull(z)` returns a rule's gradient at `z`, a vector of the same shape: nothing is differentiated through it. The loop runs under `torch.no_grad()`. Return the gradient, of the shape of `image`
# `(B, C, H, W)`, without a graph.


# %% item="08.10"
def image_gradient(encode, pull, image: Tensor, scaling: float) -> Tensor:
    """The gradient by the picture of what pulls at its latents; of the shape of image (B, C, H, W)."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        z = scaling * encode(image)
        return torch.autograd.grad(z, image, grad_outputs=pull(z.detach()).detach())[0]
    ### END SOLUTION


# %% item="08.10" tags=["check"]
# NBVAL_CHECK_OUTPUT
image_gradient = check("08.10", image_gradient)

# %% [markdown]
# The smallest encoder that there is: six principal components of patches of 4 × 4 pixels. The teacher is the exact denoiser of each digit's latents; the pictures start as noise. Where the
# encoder sees something a digit appears. In the ten directions of each patch that it does not see, no gradient ever comes, and the noise of the start is still there: decoding the picture's
# latents takes it away. A picture may be perfect to a latent teacher, and not to you.

# %%
patches = F.unfold(
    images[:2000], 4, stride=4
)  # (N, 16, 16): the numbers of a patch, and the patches
centre = patches.mean((0, 2))
components = torch.linalg.svd(
    (patches - centre[:, None]).transpose(1, 2).flatten(0, 1), full_matrices=False
).Vh[:6]


def encoder(x: Tensor) -> Tensor:
    """Pictures (B, 1, 16, 16) -> latents (B, 6, 4, 4)."""
    return (components @ (F.unfold(x, 4, stride=4) - centre[:, None])).unflatten(-1, (4, 4))


def decoder(z: Tensor) -> Tensor:
    """Latents (B, 6, 4, 4) -> pictures (B, 1, 16, 16)."""
    return F.fold(components.T @ z.flatten(2) + centre[:, None], (16, 16), 4, stride=4)


latents = encoder(images[:2000])
SCALING = float(1 / latents.std())
families = [Empirical(SCALING * latents[labels[:2000] == k]) for k in TEN]


def D_latent(z: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of the latents of each digit's own training pictures, for ten rows."""
    return torch.cat([D(z[k : k + 1], sigma[k : k + 1]) for k, D in enumerate(families)])


chance = generator(16)
canvas = 0.3 * torch.randn(SHAPE, generator=chance)
begun = canvas
for sigma in falling(5.0, 0.3, 150):
    eps = torch.randn(10, 6, 4, 4, generator=chance)

    def pulled(z, sigma=sigma, eps=eps):
        return sigma * noise_residual(D_latent, z, sigma.expand(10), eps)

    canvas = canvas - 0.1 / SCALING**2 * image_gradient(encoder, pulled, canvas, SCALING)
unseen = [x - decoder(encoder(x)) for x in (begun, canvas)]
assert torch.allclose(unseen[0], unseen[1], atol=1e-4)
study.strip(
    [begun, canvas, decoder(encoder(canvas))], ["start", "picture", "decoded latents"], scale=4
)

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 09, where $\theta$ is a scene in three dimensions, and the pictures are its views.
