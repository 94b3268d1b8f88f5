# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 07: posteriors and blind measurements
#
# Ten functions about one question: given $y = A x_0 + \sigma_y n$ and a network that knows what pictures look like, what is *likely* to be $x_0$?
# First the answer itself, where it has a closed form. Then the methods that approach it: guidance by the gradient of the measurement, variational
# descent, weighted particles, Langevin dynamics. Last, a measurement whose blur nobody has told.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("07.1")` gives the next hint, `solution("07.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 07.1 the exact posterior of a Gaussian | 2 | | 07.6 RED-diff's loss and its gradient | 2 |
# | 07.2 which component was measured? | 2 | | 07.7 the weight of a particle | 2 |
# | 07.3 the gradient of DPS | 2 | | 07.8 systematic resampling | 2 |
# | 07.4 how far to go along it | 1 | | 07.9 a Langevin step on the posterior | 1 |
# | 07.5 ΠGDM's covariance and estimate | 3 | | 07.10 the kernel's turn | 3 |
# | | | | **all** | **20** |
#
# Symbols: $x = x_0 + \sigma\epsilon$ at the noise level $\sigma$; a step leads from $\sigma$ to a lower $\sigma'$, `sigma_next`, and from $x$ to $x'$;
# $D(x, \sigma)$ is the network's estimate of $x_0$, and $J$ its Jacobian; $A$ is the measurement, $A^\top$ its adjoint; $z$ is standard normal. Samples
# are rows: $A x$ of all of them is `x @ A.T` where `A` is a matrix. Formulas that were published in DDPM's coordinate are written in this one.

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from course_lib import study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.gaussians import Mixture
from course_lib.grading.check import check, hint, solution
from course_lib.metrics import sliced_wasserstein
from course_lib.operators import BlockAverage, Blur, Mask, gaussian_kernel, motion_kernel
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim, ddpm
from course_lib.worlds import digits

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS
D_digits = zoo.load("digits", device="cpu")
images, labels = digits.load("test")  # the network has not seen these
seen, _ = digits.load("train")
SHAPE, TOP = digits.SHAPE, 15.0
few = images[:10]


def draw(n: int, seed: int) -> Tensor:
    """Standard normal pictures, (n, 1, 16, 16)."""
    return torch.randn(n, *SHAPE, generator=generator(seed))


def psnr(x: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (x.clamp(-1, 1) - truth).square().mean()))


# %% [markdown] item="07.1"
# What is $p(x_0 \mid y)$, if $x_0 \sim \mathcal N(m, C)$? Then $x_0$ and $y$ are jointly Gaussian, and the posterior is a Gaussian again, with
#
# $$G = C A^\top (A C A^\top + \sigma_y^2 I)^{-1},\qquad \text{mean} = m + G\,(y - A m),\qquad \text{covariance} = C - G A C .$$
#
# $G$, the *gain*, is Kalman's. `m` is `(d,)`, `C` `(d, d)`, `A` `(e, d)`; each row of `y` `(B, e)` is a measurement of its own. Return the means
# `(B, d)`, and the covariance `(d, d)`, which is the same for all $y$. All methods below are held against this.


# %% item="07.1"
def gaussian_posterior(
    m: Tensor, C: Tensor, A: Tensor, y: Tensor, sigma_y: float
) -> tuple[Tensor, Tensor]:
    """Mean (B, d) and covariance (d, d) of x0 given each row of y."""
    ### BEGIN SOLUTION
    S = A @ C @ A.T + sigma_y**2 * torch.eye(len(A), dtype=C.dtype)
    G = torch.linalg.solve(S, A @ C).T
    return m + (y - A @ m) @ G.T, C - G @ A @ C
    ### END SOLUTION


# %% item="07.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
gaussian_posterior = check("07.1", gaussian_posterior)

# %% [markdown]
# A Gaussian has the mean and the covariance of the training digits, 256 numbers each. Of ten new digits only the 16 means of 4 × 4 pixels are
# known, with noise. The posterior mean is the best *linear* estimate, and samples show what is left open. They are no digits: the world is no
# Gaussian, and this prior has never seen a stroke. But every number of it is exact.

# %%
pixels = seen.flatten(1).double()
centre, covariance = pixels.mean(0), torch.cov(pixels.T)
coarse = BlockAverage(SHAPE, 4)
means_of_blocks = coarse(torch.eye(256).double().reshape(-1, *SHAPE)).flatten(1).T  # A, (16, 256)
y_coarse = coarse(few) + 0.1 * torch.randn(10, 1, 4, 4, generator=generator(1))
best, rest = gaussian_posterior(
    centre, covariance, means_of_blocks, y_coarse.flatten(1).double(), 0.1
)
values, axes = torch.linalg.eigh((rest + rest.T) / 2)
root = axes * values.clamp_min(0).sqrt()
normals = torch.randn(2, 10, 256, generator=generator(2), dtype=torch.float64)
drawn = [(best + z @ root.T).float().reshape(few.shape) for z in normals]
best = best.float().reshape(few.shape)
assert psnr(best, few) > psnr(coarse.pinv(y_coarse), few) + 1
rows = {
    "digits": few,
    f"measured: {psnr(coarse.pinv(y_coarse), few):.1f} dB": coarse.pinv(y_coarse),
    f"posterior mean: {psnr(best, few):.1f} dB": best,
    "sample 1": drawn[0],
    "sample 2": drawn[1],
}
study.strip(list(rows.values()), list(rows), scale=4)

# %% [markdown] item="07.2"
# A mixture $\sum_k w_k\,\mathcal N(m_k, C_k)$ comes close to anything, and its posterior is exact too: each component becomes its own posterior (07.1),
# and its weight says how well it has foretold $y$,
#
# $$w_k' \;\propto\; w_k\,\mathcal N\big(y;\; A m_k,\; S_k\big),\qquad S_k = A C_k A^\top + \sigma_y^2 I .$$
#
# `weights` `(K,)`, `means` `(K, d)`, `covs` `(K, d, d)`, `A` `(e, d)`, `y` `(B, e)`. Return $w'$ of each measurement, `(B, K)`, with sum 1 over $k$; also
# for a $y$ so far from everything that every density is 0 to the computer.


# %% item="07.2"
def component_weights(
    weights: Tensor, means: Tensor, covs: Tensor, A: Tensor, y: Tensor, sigma_y: float
) -> Tensor:
    """The weights of the components given each row of y, (B, K)."""
    ### BEGIN SOLUTION
    S = A @ covs @ A.T + sigma_y**2 * torch.eye(len(A), dtype=covs.dtype)  # (K, e, e)
    residual = y[:, None] - means @ A.T  # (B, K, e)
    solved = torch.linalg.solve(S, residual[..., None])[..., 0]
    logs = weights.log() - (residual * solved).sum(-1) / 2 - torch.logdet(S) / 2
    return torch.softmax(logs, -1)
    ### END SOLUTION


# %% item="07.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
component_weights = check("07.2", component_weights)

# %% [markdown]
# The world of the next items: three components in the plane, of which one coordinate is measured, askew and with noise. As $y$ grows, one
# component after the other is to blame. At the $y$ of the dashed line two of them are, and the posterior has two peaks. A method that
# returns *one* answer must leave out half of it.

# %%
world = Mixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-1.5, 1.0], [1.2, 1.4], [0.6, -1.6]]),
    torch.tensor([[[0.3, 0.2], [0.2, 0.4]], [[0.2, 0.0], [0.0, 0.3]], [[0.5, -0.2], [-0.2, 0.2]]]),
)
slanted, sigma_y = torch.tensor([[1.0, 0.3]]).double(), 0.3
measured = torch.tensor([[1.0]]).double()
truth = world.posterior(slanted, measured, sigma_y)
EXTENT = (-3.5, 3.5, -3.5, 3.5)
line = torch.linspace(-4, 4, 200)[:, None].double()
shares = component_weights(world.weights, world.means, world.covs, slanted, line, sigma_y)
assert torch.allclose(
    component_weights(world.weights, world.means, world.covs, slanted, measured, sigma_y)[0],
    truth.weights,
)
fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.8))
for k, (role, look) in enumerate((("data", "-"), ("warn", "--"), ("model", ":"))):
    left.plot(line[:, 0], shares[:, k], look, color=COLOURS[role], label=f"component {k + 1}")
left.axvline(float(measured), color=COLOURS["muted"], linestyle="dashed", linewidth=1)
left.set(xlabel="measurement y", ylabel="weight given y")
left.legend()
study.density(right, truth.log_prob, EXTENT)
study.outline(right, world.log_prob, EXTENT)
right.set_title("the posterior at y = 1; dotted: the prior")
plt.show()

# %% [markdown] item="07.3"
# Diffusion posterior sampling (DPS; Chung et al. 2023) asks at each level: how should $x$ change, such that the network's *estimate* comes closer to
# the measurement? The answer is a gradient through the network,
#
# $$g = \nabla_x\,\big\lVert y - A(D(x, \sigma))\big\rVert = -\,J^\top\!A^\top\frac{y - A D}{\lVert y - A D\rVert}\quad(A \text{ linear}).$$
#
# `A` is any function that can be differentiated, `x` `(B, ...)`, and the norm is that of each sample. The sampling loop runs under
# `torch.no_grad()`: open `torch.enable_grad()` where you need it. Return $g$, of the shape of `x`, *without* a graph.


# %% item="07.3"
def residual_slope(D, A, y: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """grad_x |y - A(D(x, sigma))| of each sample, of the shape of x (B, ...)."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        norms = (y - A(D(x, sigma))).flatten(1).norm(dim=1)
        return torch.autograd.grad(norms.sum(), x)[0]
    ### END SOLUTION


# %% item="07.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
residual_slope = check("07.3", residual_slope)

# %% [markdown]
# Digits whose middle is hidden, at $\sigma = 1$. Without the Jacobian the gradient says nothing of the hole: nothing was measured there. With it
# the network tells what a mismatch in the surroundings means for the hidden pixels. (Blue: less, red: more.)

# %%
hole = Mask.box(SHAPE, (6, 6))
known = hole.observed.expand(10, -1, -1, -1)
level = torch.tensor(1.0).double()
noisy = few + level.float() * draw(10, 3)
y_hole = hole(few)
with torch.no_grad():
    estimate = D_digits(noisy, level)
    outer = -hole.adjoint(y_hole - hole(estimate))
outer = outer / outer.flatten(1).norm(dim=1)[:, None, None, None]
slope = residual_slope(D_digits, hole, y_hole, noisy, level)
assert float(outer[~known].abs().max()) == 0 < float(slope[~known].abs().mean())


def signed(g: Tensor) -> Tensor:
    """Blue below 0, white at 0, red above; (B, 3, H, W)."""
    g = (3 * g / g.abs().amax((1, 2, 3), keepdim=True)).clamp(-1, 1)
    return torch.cat([1 - 2 * (-g).clamp_min(0), 1 - 2 * g.abs(), 1 - 2 * g.clamp_min(0)], 1)


def coloured(g: Tensor) -> Tensor:
    """Grey pictures as colour pictures, (B, 3, H, W)."""
    return g.clamp(-1, 1).expand(-1, 3, -1, -1)


study.strip(
    [coloured(y_hole), coloured(noisy / 2), coloured(estimate), signed(outer), signed(slope)],
    ["measured", "x at σ = 1", "D(x, σ)", "without J", "gradient"],
    scale=4,
)

# %% [markdown] item="07.4"
# DPS was published in DDPM's coordinate $x^{vp} = x / \sqrt{1 + \sigma^2}$: a step to $x'^{vp}$, as if nothing were known, and then
#
# $$x'^{vp} \leftarrow x'^{vp} - \zeta\,\nabla_{x^{vp}}\lVert y - A(D)\rVert .$$
#
# (The paper writes $\zeta_i = \zeta / \lVert y - A(D)\rVert$ before the gradient of the *squared* norm, which is twice this; its code has
# the line above.) What is this step for $x$ and $x'$, of which the first lies at $\sigma$ and the second at $\sigma'$? `move(x, sigma, sigma_next)` makes the plain step, and
# `slope(x, sigma)` returns $\nabla_x\lVert y - A(D(x, \sigma))\rVert$.


# %% item="07.4"
def dps_step(
    move, slope, x: Tensor, sigma: Tensor, sigma_next: Tensor, zeta: float
) -> Tensor:  # fmt: skip
    """x' at sigma_next, of the shape of x; sigma and sigma_next 0-d."""
    ### BEGIN SOLUTION
    size = zeta * ((1 + sigma**2) * (1 + sigma_next**2)).sqrt()
    return move(x, sigma, sigma_next) - size * slope(x, sigma)
    ### END SOLUTION


# %% item="07.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
dps_step = check("07.4", dps_step)

# %% [markdown]
# The digits of 07.1 again, from the same 16 means, now with the network as the prior. The two factors are large where $\sigma$ is: with them the
# estimate agrees with the measurement *while* the digit takes shape. Without them, and with a $\zeta$ that suits the last levels, the measurement
# is heard late, when the network has decided what to draw. (A likely picture that is close to $y$ is not yet a sample of the posterior: DPS does
# not know $\sigma_y$, and with this $\zeta$ it ends up closer to $y$ than the noise of $y$ allows.)

# %%
GRID = karras(20, 0.02, TOP)


def by_dps(zeta: float, factors: bool) -> tuple[Tensor, list[float]]:
    """Digits by DPS over DDPM steps, and the RMS of y - A D at each level; without the factors where `factors` is False."""
    plain, misfits = ddpm(SampleNoise(4)), []

    def slope(x, sigma):
        return residual_slope(D_digits, coarse, y_coarse, x, sigma)

    def step(D, x, sigma, sigma_next, memory=None):
        def seen_by(x, sigma):
            x0 = D(x, sigma)
            misfits.append(float((y_coarse - coarse(x0)).square().mean().sqrt()))
            return x0

        def move(x, sigma, sigma_next):
            return plain(seen_by, x, sigma, sigma_next)[0]

        if factors:
            return dps_step(move, slope, x, sigma, sigma_next, zeta), None
        return move(x, sigma, sigma_next) - zeta * slope(x, sigma), None

    return sample(D_digits, TOP * draw(10, 5), GRID, step), misfits


guided = {"with both factors": by_dps(2.5, True), "without": by_dps(2.5, False)}
misfit = {
    name: float((y_coarse - coarse(x)).square().mean().sqrt()) for name, (x, _) in guided.items()
}
halfway = [way[10] for _, way in guided.values()]
assert halfway[0] < halfway[1]
study.strip(
    [few, coarse.pinv(y_coarse), *(x for x, _ in guided.values())],
    ["digits", "measured", *(f"{name}: {misfit[name]:.2f}" for name in guided)],
    scale=4,
)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, (_, way)), role, look in zip(
    guided.items(), ("model", "warn"), ("o-", "s--"), strict=True
):
    ax.plot(GRID[:-1], way, look, color=COLOURS[role], label=name)
ax.axhline(0.1, color=COLOURS["muted"], linestyle="dotted", label="noise of y")
ax.invert_xaxis()
ax.set(xlabel="σ", ylabel="RMS of y − A D", xscale="log", yscale="log")
ax.legend()
plt.show()

# %% [markdown] item="07.5"
# DPS takes $D$ for $x_0$ itself. But given $x$, $x_0$ is uncertain, the more the higher $\sigma$ is. ΠGDM (Song et al. 2023) takes it for
# $\mathcal N(D, r^2 I)$, so that
#
# $$p(y \mid x) \approx \mathcal N(y;\; A D,\; S),\qquad S = r^2 A A^\top + \sigma_y^2 I,\qquad
# \hat x_0 = D + \sigma^2\,\nabla_x \log p(y \mid x) = D + \sigma^2 J^\top A^\top S^{-1}(y - A D).$$
#
# What is $r^2$? For data $\mathcal N(m, s^2 I)$ it is known exactly: the variance of $x_0$, given $x = x_0 + \sigma\epsilon$. (With $s = 1$ this is the paper's.)
# `A` is a matrix `(m, n)`, `x` and `D(x, sigma)` are `(B, n)`, `y` `(B, m)`; the loop runs under `torch.no_grad()`.


# %% item="07.5"
def pigdm_estimate(
    D, A: Tensor, y: Tensor, x: Tensor, sigma: Tensor, sigma_y: float, s: float
) -> Tensor:
    """The estimate of x0 given x and y, (B, n); sigma 0-d, s the deviation of the data."""
    ### BEGIN SOLUTION
    r2 = sigma**2 * s**2 / (sigma**2 + s**2)
    S = r2 * A @ A.T + sigma_y**2 * torch.eye(len(A), dtype=A.dtype)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = D(x, sigma)
        v = torch.linalg.solve(S, (y - x0 @ A.T).detach().T).T
        pull = torch.autograd.grad((x0 @ A.T * v).sum(), x)[0]
    return x0.detach() + sigma**2 * pull
    ### END SOLUTION


# %% item="07.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
pigdm_estimate = check("07.5", pigdm_estimate)

# %% [markdown]
# One number, $x_0 \sim \mathcal N(0, s^2)$, measured as $y = s$ with $\sigma_y = s / 2$: the exact posterior has the mean $0.8\,s$ and the deviation
# $0.45\,s$. With the right $r^2$ ΠGDM samples it, whatever $s$ is. With the paper's it is right at $s = 1$; with data that vary less it takes $D$ for
# more uncertain than it is, and hears too little of $y$; with data that vary more, too much. (200 steps of DDPM: the rest is the
# error of the steps.)

# %%
STDS, chance = (0.25, 0.5, 1.0, 2.0), generator(5)
one = torch.ones(1, 1).double()
moments = {"right r²": [], "paper's r²": []}
fine = karras(200, 0.002, 40.0)
for s in STDS:
    for name, assumed in (("right r²", s), ("paper's r²", 1.0)):

        def exact_denoiser(x, sigma, s=s):
            return s**2 / (s**2 + sigma**2) * x

        def D_given(x, sigma, s=s, assumed=assumed, D=exact_denoiser):
            return pigdm_estimate(D, one, s * one.expand(len(x), -1), x, sigma, s / 2, assumed)

        start = 40 * torch.randn(2000, 1, generator=chance, dtype=torch.float64)
        fresh = lambda x: torch.randn(x.shape, generator=chance, dtype=torch.float64)
        x = sample(D_given, start, fine, ddpm(fresh)) / s
        moments[name].append((float(x.mean()), float(x.std())))
fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.2))
for name, role, look in (("right r²", "model", "o-"), ("paper's r²", "warn", "s--")):
    for ax, part in ((left, 0), (right, 1)):
        ax.plot(STDS, [pair[part] for pair in moments[name]], look, color=COLOURS[role], label=name)
for ax, exact, what in ((left, 0.8, "mean / s"), (right, 0.2**0.5, "deviation / s")):
    ax.axhline(exact, color=COLOURS["exact"], linestyle="dotted", label="posterior")
    ax.set(xlabel="s, deviation of the data", ylabel=f"{what} of the samples", xscale="log")
    ax.set_xticks(STDS, STDS)
    ax.minorticks_off()
    ax.legend()
gaps = {name: max(abs(m - 0.8) for m, _ in pairs) for name, pairs in moments.items()}
assert gaps["right r²"] < 0.05 < gaps["paper's r²"]
plt.show()

# %% [markdown]
# The ten digits, by ΠGDM, with half the steps of DPS. The numbers are the RMS of $y - A x$; the noise of $y$ is 0.1.


# %%
def flat_digits(x: Tensor, sigma: Tensor) -> Tensor:
    """The network on flat pictures, (B, 256)."""
    return D_digits(x.reshape(-1, *SHAPE), sigma).flatten(1)


spread = float(pixels.var(0).mean().sqrt())
matrix = means_of_blocks.float()
x = sample(
    lambda x, sigma: pigdm_estimate(
        flat_digits, matrix, y_coarse.flatten(1), x, sigma, 0.1, spread
    ),
    TOP * draw(10, 5).flatten(1), karras(10, 0.02, TOP), ddim,
).reshape(few.shape)  # fmt: skip
misfit["ΠGDM"] = float((y_coarse - coarse(x)).square().mean().sqrt())
study.strip(
    [few, coarse.pinv(y_coarse), guided["with both factors"][0], x],
    [
        "digits",
        "measured",
        f"DPS, 20 steps: {misfit['with both factors']:.2f}",
        f"ΠGDM, 10 steps: {misfit['ΠGDM']:.2f}",
    ],
    scale=4,
)

# %% [markdown] item="07.6"
# RED-diff (Mardani et al. 2023) does not sample. It looks for the mean $\mu$ of a narrow Gaussian that comes closest to the posterior, and goes
# downhill on a loss. With a fresh $\sigma$ and $\epsilon$ at each turn, $x = \mu + \sigma\epsilon$ and $\epsilon_\theta = (x - D(x, \sigma)) / \sigma$,
#
# $$\text{loss} = \frac{\lVert y - A(\mu)\rVert^2}{2\sigma_y^2} + \lambda\,\sigma\;\mathrm{sg}\big[\epsilon_\theta - \epsilon\big]\cdot\mu .$$
#
# The bracket sg, *stop-gradient*, is a number to the differentiation; therefore no pass back through the network is needed. `A` is any function
# that can be differentiated, `mu` and `eps` are `(B, ...)`, `weight` is $\lambda$. Return the loss of each sample, `(B,)`, and its gradient by
# `mu`, of the shape of `mu`.


# %% item="07.6"
def red_diff(
    D, A, y: Tensor, mu: Tensor, sigma: Tensor, eps: Tensor, sigma_y: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Loss of each sample (B,), and its gradient, of the shape of mu (B, ...)."""
    ### BEGIN SOLUTION
    with torch.no_grad():
        bracket = mu - D(mu + sigma * eps, sigma)  # sigma (eps_theta - eps)
    with torch.enable_grad():
        mu = mu.detach().requires_grad_()
        data = (y - A(mu)).square().flatten(1).sum(1) / (2 * sigma_y**2)
        loss = data + weight * (bracket * mu).flatten(1).sum(1)
        gradient = torch.autograd.grad(loss.sum(), mu)[0]
    return loss.detach(), gradient
    ### END SOLUTION


# %% item="07.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
red_diff = check("07.6", red_diff)

# %% [markdown]
# In the plane, with $\lambda = 1/\sigma^2$: the second term then pulls by the prior's own score at the level $\sigma$, which falls. 300 starts end on two
# points, the peaks of the posterior. A good picture may be all that is wanted; but that it is one of many, these points do not tell.

# %%
chance = generator(6)
mu = 2 * torch.randn(300, 2, generator=chance, dtype=torch.float64)
turns = 400
for turn in range(turns):
    sigma = 1.5 * (0.1 / 1.5) ** torch.tensor(turn / turns).double()
    eps = torch.randn(mu.shape, generator=chance, dtype=torch.float64)
    _, down = red_diff(
        world.denoiser, lambda x: x @ slanted.T, measured, mu, sigma, eps, sigma_y, float(sigma**-2)
    )
    mu = mu - 0.08 * sigma**2 / (0.3 + sigma**2) * down
exact_draws = truth.sample(300, generator(7))
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9))
for ax, points, title in (
    (left, mu, "RED-diff, 300 starts"),
    (right, exact_draws, "exact samples"),
):
    study.density(ax, truth.log_prob, EXTENT)
    study.scatter(ax, points, colour=COLOURS["model" if ax is left else "exact"], size=8)
    ax.set_title(title)
nearest = torch.cdist(mu, truth.means).min(1).values
assert float(nearest.median()) < float(torch.cdist(exact_draws, truth.means).min(1).values.median())
plt.show()

# %% [markdown] item="07.7"
# No guess of $p(y \mid x)$ is right, but a wrong guess can be *corrected*. Particles are moved by a guided step $q(x' \mid x) = \mathcal N(\text{guided}, \text{std}^2 I)$, while
# the prior's step would be $p(x' \mid x) = \mathcal N(\text{mean}, \text{std}^2 I)$. With the guesses $\tilde p(y \mid x)$ before and $\tilde p(y \mid x')$ after, the twisted diffusion
# sampler (TDS; Wu et al. 2023) multiplies the weight of each particle by
#
# $$\frac{p(x' \mid x)\;\tilde p(y \mid x')}{q(x' \mid x)\;\tilde p(y \mid x)},$$
#
# and at $\sigma = 0$, where the guess is the likelihood itself, the weighted particles *are* the posterior, more exactly the more there are.
# Given `log_w` `(N,)` of the steps before, `x_next`, `mean`, `guided` `(N, d)`, and the logarithms of the guesses `log_y`, `log_y_next` `(N,)`, return the new weights $W$
# `(N,)` with sum 1, and the *effective sample size* $1 / \sum W^2$, a number. Densities are small: stay with logarithms.


# %% item="07.7"
def particle_weights(
    log_w: Tensor, x_next: Tensor, mean: Tensor, guided: Tensor, std: float,
    log_y: Tensor, log_y_next: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Normalised weights (N,), and the effective sample size, 0-d."""
    ### BEGIN SOLUTION
    log_p = -(x_next - mean).square().sum(1) / (2 * std**2)
    log_q = -(x_next - guided).square().sum(1) / (2 * std**2)
    W = torch.softmax(log_w + log_p - log_q + log_y_next - log_y, 0)
    return W, 1 / W.square().sum()
    ### END SOLUTION


# %% item="07.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
particle_weights = check("07.7", particle_weights)

# %% [markdown]
# In the plane the particles are guided by ΠGDM (07.5), whose guess is $\mathcal N(y; A D, S)$. The weights grow apart from step to step: of 1,000
# particles fewer and fewer count. Black: as many dots as count in the end.

# %%
LEVELS = karras(80, 0.03, 10.0)
WIDE = 1.6  # the deviation that is assumed of the data


def guess(x: Tensor, sigma: Tensor) -> Tensor:
    """log N(y; A D, r² A A^T + sigma_y² I), up to what all particles share; (N,)."""
    r2 = sigma**2 * WIDE**2 / (sigma**2 + WIDE**2)
    residual = measured - world.denoiser(x, sigma) @ slanted.T
    return -residual.square().sum(1) / (2 * (r2 * slanted.square().sum() + sigma_y**2))


def tds(N: int, seed: int, resample) -> tuple[Tensor, Tensor, list[float]]:
    """Particles (N, 2), their weights, and the effective sample size at each step; `resample(x, W)` comes after each."""
    chance = generator(seed)
    x = LEVELS[0] * torch.randn(N, 2, generator=chance, dtype=torch.float64)
    log_w, sizes = guess(x, LEVELS[0]), []
    for sigma, sigma_next in pairwise(LEVELS[:-1]):
        keep = (sigma_next / sigma) ** 2
        std = float(sigma_next * (1 - keep).sqrt())
        centres = []
        for x0 in (
            world.denoiser(x, sigma),
            pigdm_estimate(world.denoiser, slanted, measured, x, sigma, sigma_y, WIDE),
        ):
            centres.append(x0 + keep * (x - x0))
        before = guess(x, sigma)
        x = centres[1] + std * torch.randn(N, 2, generator=chance, dtype=torch.float64)
        W, ess = particle_weights(log_w, x, *centres, std, before, guess(x, sigma_next))
        sizes.append(float(ess))
        x, W = resample(x, W, float(torch.rand(1, generator=chance)))
        log_w = W.log()
    return x, W, sizes


x, W, alone = tds(1000, 8, lambda x, W, u: (x, W))
assert alone[-1] < alone[0] / 2
fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.8))
left.plot(LEVELS[1:-1], alone, "-", color=COLOURS["model"])
left.invert_xaxis()
left.set(xlabel="σ after the step", ylabel="effective sample size", xscale="log", ylim=(0, 1000))
study.density(right, truth.log_prob, EXTENT)
study.scatter(right, x, colour=COLOURS["other"], size=4, alpha=0.5, label="all")
heavy = W.argsort(descending=True)[: int(alone[-1])]
study.scatter(right, x[heavy], colour=COLOURS["exact"], size=6, label="the heaviest")
right.legend(markerscale=3)
plt.show()

# %% [markdown] item="07.8"
# *Resampling* lets light particles die and heavy ones multiply, before most of the work is done for nothing. A particle of weight $W_k$ must
# come $N W_k$ times on average; nothing else is asked. N independent draws do that, with much chance. *Systematic* resampling has one
# draw $u$: lay the weights end to end from 0 to 1, and take the particles in whose intervals the positions
#
# $$(i + u) / N,\qquad i = 0, \dots, N - 1$$
#
# lie. So each particle comes $\lfloor N W_k\rfloor$ or $\lceil N W_k\rceil$ times. Given particles `x` `(N, ...)`, weights `W` `(N,)` with sum 1, and `u` in [0, 1), return the new
# particles, in any order, and *their* weights, with sum 1.


# %% item="07.8"
def systematic(x: Tensor, W: Tensor, u: float) -> tuple[Tensor, Tensor]:
    """Resampled particles (N, ...), and their weights (N,)."""
    ### BEGIN SOLUTION
    N = len(W)
    positions = (torch.arange(N, dtype=W.dtype) + u) / N
    index = torch.searchsorted(W.cumsum(0), positions).clamp_max(N - 1)  # the sum may be below 1
    return x[index], torch.full_like(W, 1 / N)
    ### END SOLUTION


# %% item="07.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
systematic = check("07.8", systematic)

# %% [markdown]
# Resampling where fewer than half of the particles count, the whole method is exact in the limit. Its samples' distance from the exact posterior
# falls with the number of particles, towards what two exact sets of the same size differ by. ΠGDM alone stays where it is: more samples of a
# wrong distribution do not make it right. (Means of four runs, of 80 steps each: what the particles correct is the guess. The prior's own steps they take for
# true, and with 20 steps the distance stays above 0.1.)


# %%
def when_needed(x: Tensor, W: Tensor, u: float) -> tuple[Tensor, Tensor]:
    """Systematic resampling, where the effective sample size is below N / 2."""
    return systematic(x, W, u) if 1 / W.square().sum() < len(W) / 2 else (x, W)


COUNTS, reference = (16, 64, 250, 1000), truth.sample(4000, generator(9))
distances = {"TDS": [], "ΠGDM": [], "exact samples": []}
for N in COUNTS:
    runs = {name: [] for name in distances}
    for seed in range(4):
        x, W, _ = tds(N, 20 + seed, when_needed)
        runs["TDS"].append(sliced_wasserstein(systematic(x, W, 0.5)[0], reference))
        runs["ΠGDM"].append(
            sliced_wasserstein(tds(N, 20 + seed, lambda x, W, u: (x, W))[0], reference)
        )
        runs["exact samples"].append(
            sliced_wasserstein(truth.sample(N, generator(40 + seed)), reference)
        )
    for name, values in runs.items():
        distances[name].append(sum(values) / len(values))
assert (
    distances["TDS"][-1] < distances["TDS"][0] / 2 and distances["TDS"][-1] < distances["ΠGDM"][-1]
)
fig, ax = plt.subplots(figsize=(6.4, 3.4))
for (name, line_of), role, look in zip(
    distances.items(), ("model", "warn", "exact"), ("o-", "s--", "^:"), strict=True
):
    ax.plot(COUNTS, line_of, look, color=COLOURS[role], label=name)
ax.set(xlabel="particles", ylabel="distance from the posterior", xscale="log", yscale="log")
ax.legend()
plt.show()

# %% [markdown] item="07.9"
# Langevin dynamics needs no particles and no Jacobian: it walks along the posterior's score, with noise, at each of many falling levels
# (Jalal et al. 2021). The score of the posterior is that of the prior and that of the likelihood; at the level $\sigma$ not only $y$ but $x$ is noisy, and
# $y - A x$ is allowed the additional variance $\gamma^2$,
#
# $$x \leftarrow x + \tau\left(\frac{D(x, \sigma) - x}{\sigma^2} + \frac{A^\top(y - A x)}{\sigma_y^2 + \gamma^2}\right) + \sqrt{2\tau}\,z .$$
#
# `A` is a matrix `(m, n)`, `x` and `z` are `(B, n)`, `y` is `(B, m)`.


# %% item="07.9"
def langevin_step(
    D, A: Tensor, y: Tensor, x: Tensor, sigma: Tensor, sigma_y: float, gamma: float, tau: float,
    z: Tensor,
) -> Tensor:  # fmt: skip
    """x after one step at the level sigma, (B, n)."""
    ### BEGIN SOLUTION
    prior = (D(x, sigma) - x) / sigma**2
    likelihood = (y - x @ A.T) @ A / (sigma_y**2 + gamma**2)
    return x + tau * (prior + likelihood) + (2 * tau) ** 0.5 * z
    ### END SOLUTION


# %% item="07.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
langevin_step = check("07.9", langevin_step)

# %% [markdown]
# The plane, 30 levels, with 1 to 27 steps at each. Both peaks are found, and in about the right proportion, if there is time to walk between
# them while the level is high: after that, each point stays with its peak.

# %%
walks, chance = {}, generator(10)
for steps in (1, 3, 9, 27):
    x = 5 * torch.randn(1000, 2, generator=chance, dtype=torch.float64)
    for sigma in karras(30, 0.05, 5.0)[:-1]:
        tau = 0.15 * float(sigma**2 * (sigma_y**2 + sigma**2) / (sigma_y**2 + 2 * sigma**2))
        for _ in range(steps):
            z = torch.randn(x.shape, generator=chance, dtype=torch.float64)
            x = langevin_step(
                world.denoiser, slanted, measured, x, sigma, sigma_y, float(sigma), tau, z
            )
    walks[steps] = x
errors = {steps: sliced_wasserstein(x, reference) for steps, x in walks.items()}
assert errors[27] < errors[1]
fig, panels = plt.subplots(1, 4, figsize=(12.0, 3.4), sharey=True)
for ax, (steps, x) in zip(panels, walks.items(), strict=True):
    study.density(ax, truth.log_prob, EXTENT)
    study.scatter(ax, x[:400], colour=COLOURS["model"], size=5)
    ax.set_title(f"{steps} a level: distance {errors[steps]:.2f}")
plt.show()

# %% [markdown] item="07.10"
# And if nobody knows the blur? Blind methods such as BlindDiff (Li et al. 2024) alternate between the picture, for which the network is the prior, and
# the kernel. In its turn the kernel is a problem of least squares, since $y = k * x$ is linear in $k$ too,
#
# $$k * x = \sum_{u,v} k_{uv}\,S^{\,u-u_0,\,v-v_0}\,x,\qquad
# k' = \arg\min_k\; \lVert y - k * x\rVert^2 + \rho\,\lVert k - k_{\text{old}}\rVert^2,$$
#
# where $S^{a,b} x$ = `x.roll((a, b), (-2, -1))` and $(u_0, v_0)$ = `(kh // 2, kw // 2)`, as in 06.1. The picture is only an estimate, and the term $\rho$, `ridge`,
# keeps the kernel from believing it too early. A blur gathers light: what comes out below 0 is set to 0, and then the sum is made 1. All
# pictures `x`, `y` `(B, C, H, W)` have the same kernel. Given the old one, `k` `(kh, kw)`, return the new one.


# %% item="07.10"
def kernel_update(k: Tensor, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The new kernel (kh, kw): not negative, with sum 1."""
    ### BEGIN SOLUTION
    kh, kw = k.shape
    moved = [
        x.roll((u - kh // 2, v - kw // 2), (-2, -1)).flatten() for u in range(kh) for v in range(kw)
    ]
    X = torch.stack(moved, 1)  # (pixels, kh kw)
    normal = X.T @ X + ridge * torch.eye(kh * kw, dtype=X.dtype)
    new = torch.linalg.solve(normal, X.T @ y.flatten() + ridge * k.flatten()).clamp_min(0)
    return (new / new.sum()).reshape(kh, kw)
    ### END SOLUTION


# %% item="07.10" tags=["check"]
# NBVAL_CHECK_OUTPUT
kernel_update = check("07.10", kernel_update)

# %% [markdown]
# Twenty digits that were shaken in the same way, with a little noise. The kernel starts as a round blur, which is wrong. Once the network's
# estimate shows strokes, from $\sigma = 2$ on, the kernel has its turn at each level; then the estimate is drawn towards the measurement with the new
# kernel. In this order: an estimate that was drawn already agrees with *any* kernel, the wrong one too. Last row: the same solver, told the true
# kernel.

# %%
shake = torch.zeros(7, 7).double()
path = motion_kernel(6, 30)
margin = (7 - len(path)) // 2
shake[margin : margin + len(path), margin : margin + len(path)] = path
many = images[:20]
y_shaken = Blur(shake, SHAPE)(many) + 0.03 * draw(20, 11)


def deblur(k: Tensor, blind: bool) -> tuple[Tensor, list[Tensor]]:
    """Digits and the kernels on the way, from the kernel k; it stays as it is unless blind."""
    x, kernels = TOP * draw(20, 12), [k]
    for sigma, sigma_next in pairwise(GRID):
        with torch.no_grad():
            x0 = D_digits(x, sigma)
        if blind and sigma < 2:
            k = kernel_update(k, x0.double(), y_shaken.double(), 100.0)
            kernels.append(k)
        lens, r2 = Blur(k, SHAPE), float(sigma**2 * spread**2 / (sigma**2 + spread**2))
        x0 = x0 + lens.solve(lens.adjoint(y_shaken - lens(x0)), 0.03**2 / r2 + 1e-3, steps=30)
        x = x0 + sigma_next / sigma * (x - x0)
    return x, kernels


round_kernel = gaussian_kernel(1.5, 7)
results = {}
for name, k, blind in (("round kernel", round_kernel, False), ("blind", round_kernel, True),
                       ("true kernel", shake, False)):  # fmt: skip
    results[name], kernels = deblur(k, blind)
    if blind:
        found = kernels
quality = {name: psnr(x, many) for name, x in results.items()}
off = [float((k - shake).norm() / (round_kernel - shake).norm()) for k in found]
assert quality["round kernel"] + 4 < quality["blind"] and off[-1] < 0.6
study.strip(
    [many[:10], y_shaken[:10], *(x[:10] for x in results.values())],
    [
        "digits",
        f"shaken: {psnr(y_shaken, many):.1f} dB",
        *(f"{n}: {q:.1f} dB" for n, q in quality.items()),
    ],
    scale=4,
)

# %%
fig, (ax, *panels) = plt.subplots(
    1, 4, figsize=(10.0, 2.9), gridspec_kw={"width_ratios": (2.2, 1, 1, 1)}
)
ax.plot(off, color=COLOURS["model"])
ax.set(xlabel="turns of the kernel", ylabel="error of the kernel", ylim=(0, None))
for panel, k, title in zip(
    panels, (round_kernel, found[-1], shake), ("start", "found", "true"), strict=True
):
    panel.imshow(k, cmap="Greys", vmin=0, vmax=float(shake.max()))
    panel.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 08, where the network does not restore a picture but teaches another model.
