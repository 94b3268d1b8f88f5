# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 03: samplers
#
# Eleven functions: the ordinary differential equation that carries noise to data, four ways to walk along it and a measure of how good each is, the
# likelihood that it gives, the way back into noise, the choice of a grid, the straight flow, and a step that adds noise. All of them work with
# *any* denoiser. Here it is mostly an exact one, of a mixture in the plane, so that every error you see is the sampler's.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("03.1")` gives the next hint, `solution("03.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 03.1 the probability-flow ODE, and Euler's step | 1 | | 03.7 there and back | 1 |
# | 03.2 Heun's rule | 2 | | 03.8 choose the grid | 2 |
# | 03.3 DDIM is an exponential integrator | 2 | | 03.9 the straight flow | 2 |
# | 03.4 DPM-Solver++(2M) and its memory | 3 | | 03.10 reflow | 1 |
# | 03.5 the measured order | 1 | | 03.11 the reverse SDE, with the right noise | 2 |
# | 03.6 the exact likelihood | 3 | | **all** | **20** |
#
# Symbols: $x = x_0 + \sigma\epsilon$ is a clean sample with noise of level $\sigma$, and `D(x, sigma)` the denoiser, the mean of $x_0$
# given $x$. `x` is `(B, ...)`, points of the plane or pictures; the levels `sigma` and `sigma_next` ($\sigma'$) are 0-d tensors. A
# sampler's grid falls from $\sigma_{\max}$ to the data; a rising one leads the other way. $d$ counts the numbers in one sample.

# %%
import itertools
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from course_lib import study, zoo
from course_lib.devices import generator
from course_lib.flows import velocity
from course_lib.gaussians import Mixture
from course_lib.grading.check import check, hint, solution
from course_lib.metrics import sliced_wasserstein, sliced_wasserstein_floor
from course_lib.schedules import Linear, exponential, uniform
from course_lib.steps import ddim
from course_lib.worlds import digits, toys

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS
blobs, peaks = toys.three_blobs(), toys.two_peaks()
D = blobs.denoiser
falling = partial(exponential, to_zero=False)  # (n, low, high): n steps, even in log sigma


def walk(step, D, x: Tensor, sigmas: Tensor) -> Tensor:
    """The states of a walk along the grid, (n + 1, B, ...), one `step(D, x, sigma, sigma_next)` at a time."""
    states = [x]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        states.append(step(D, states[-1], sigma, sigma_next))
    return torch.stack(states)


# %% [markdown] item="03.1"
# Let $p_\sigma$ be the density of $x = x_0 + \sigma\epsilon$. Points that have this density at one level, and move by
#
# $$\frac{\mathrm dx}{\mathrm d\sigma} = -\sigma\,\nabla_x \log p_\sigma(x)$$
#
# have it at every level (the probability-flow ODE: Song et al. 2021, Eq. 13; Karras et al. 2022, Eq. 1). Tweedie's formula of lecture 01
# gives the score from a denoiser. Return the pair: this slope at `x`, and where Euler's step from `sigma` to `sigma_next` ends.


# %% item="03.1"
def euler_step(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """dx/dsigma at x, and x one Euler step further; x (B, ...), D(x, sigma) the denoiser."""
    ### BEGIN SOLUTION
    slope = (x - D(x, sigma)) / sigma
    return slope, x + (sigma_next - sigma) * slope
    ### END SOLUTION


# %% item="03.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
euler_step = check("03.1", euler_step)

# %% [markdown]
# Noise on the left, data on the right: two narrow peaks on a line. Nothing is drawn at random on the way, each start has one end; and paths
# never cross, since the slope at a point is one number. So the order of the points stays as it is, and somewhere between two neighbours the
# flow is torn in two.


# %%
def euler(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return euler_step(D, x, sigma, sigma_next)[1]


sigmas = falling(200, 0.02, 4.0)
start = torch.linspace(-6, 6, 33, dtype=torch.float64)[:, None]
paths = walk(euler, peaks.denoiser, start, sigmas)
assert (paths.diff(dim=1) > 0).all()
fig, ax = plt.subplots(figsize=(8, 3.2))
ax.semilogx(sigmas, paths[:, :, 0], color=COLOURS["model"], linewidth=1)
ax.set(xlabel=r"$\sigma$", ylabel="x", title="the flow of two peaks")
ax.invert_xaxis()
plt.show()

# %% [markdown] item="03.2"
# Euler takes the slope where the step starts. Heun looks at both ends (Karras et al. 2022, Algorithm 1, with $\sigma(t) = t$): from $x$ and
# its slope $d$,
#
# $$\hat x = x + (\sigma' - \sigma)\,d,\qquad x' = x + (\sigma' - \sigma)\,\tfrac12\,(d + d'),$$
#
# where $d'$ is the slope at $\hat x$ and $\sigma'$. It asks $D$ twice. At $\sigma' = 0$ there is no second slope: the last step is Euler's.


# %% item="03.2"
def heun_step(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next by Heun's rule, by Euler's where sigma_next = 0; x (B, ...)."""
    ### BEGIN SOLUTION
    d = (x - D(x, sigma)) / sigma
    x_hat = x + (sigma_next - sigma) * d
    if sigma_next == 0:
        return x_hat
    d_next = (x_hat - D(x_hat, sigma_next)) / sigma_next
    return x + (sigma_next - sigma) * (d + d_next) / 2
    ### END SOLUTION


# %% item="03.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
heun_step = check("03.2", heun_step)

# %% [markdown]
# A call of $D$ is what costs time, so compare at equal *calls*: Heun makes half as many steps, each twice as dear. The flow of three blobs
# from $\sigma = 3$ to 0.15, its exact end from a solver of order 8: Heun wins wherever there are enough steps for an order to mean
# anything.

# %%
HIGH, LOW, CALLS = 3.0, 0.15, (8, 16, 32, 64, 128)
start = blobs.sample(100, generator(1), HIGH)
exact = blobs.reference_flow(start, HIGH, LOW)


def gap(end: Tensor) -> float:
    """Mean distance to the exact ends."""
    return float((end - exact).norm(dim=1).mean())


gaps = {
    "Euler": [gap(walk(euler, D, start, falling(calls, LOW, HIGH))[-1]) for calls in CALLS],
    "Heun": [gap(walk(heun_step, D, start, falling(calls // 2, LOW, HIGH))[-1]) for calls in CALLS],
}
assert all(h < e for h, e in zip(gaps["Heun"][1:], gaps["Euler"][1:], strict=True))
LOOKS = {"Euler": ("muted", "o-"), "Heun": ("data", "s-"), "2M": ("model", "^-")}


def compare(gaps: dict[str, list[float]]) -> None:
    _, ax = plt.subplots(figsize=(6, 3.2))
    for name, values in gaps.items():
        role, look = LOOKS[name]
        ax.loglog(CALLS, values, look, color=COLOURS[role], label=name)
    ax.set(xlabel="calls of D", ylabel="distance to the exact end")
    ax.set_xticks(CALLS, [str(calls) for calls in CALLS])
    ax.minorticks_off()
    ax.legend()
    plt.show()


compare(gaps)

# %% [markdown] item="03.3"
# Write the ODE in $\lambda = -\log\sigma$. It becomes *semi-linear*: a part that is linear in $x$ and a part that the network gives
# (DPM-Solver, Lu et al. 2022, Sec. 3.1). The linear part can be solved exactly, whatever the length of the step. Do this on paper, with $D$
# held at its value at the start of the step, and return $x'$ at $\lambda'$. You will find an old friend: put $\sigma = e^{-\lambda}$ back
# in, and compare with DDIM.
#
# Mind what `D` wants: the level $\sigma$, not $\lambda$.


# %% item="03.3"
def exponential_step(D, x: Tensor, lam: Tensor, lam_next: Tensor) -> Tensor:
    """x at lam_next, exactly for a D that stays as it is; x (B, ...) at lam = -log sigma, 0-d."""
    ### BEGIN SOLUTION
    # dx/dlam = D - x, so d(e^lam x)/dlam = e^lam D, and x' = e^-h x + (1 - e^-h) D with h = lam' - lam
    keep = torch.exp(lam - lam_next)  # = sigma' / sigma
    return keep * x + (1 - keep) * D(x, torch.exp(-lam))
    ### END SOLUTION


# %% item="03.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
exponential_step = check("03.3", exponential_step)

# %% [markdown]
# Your step *is* DDIM, and it is Euler's step in $\sigma$ as well. Euler's in $\lambda$ is another matter. One step of length $h$ from a
# point between two peaks: the true path comes to rest at the data; the exponential step comes to rest at $D$, with no noise left that $D$
# sees at the start; Euler in $\lambda$ runs past it for any $h > 1$.

# %%
x, sigma = torch.tensor([[1.6]], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
lengths = torch.linspace(0, 3.5, 141, dtype=torch.float64)
levels = sigma * torch.exp(-lengths)
true = walk(heun_step, peaks.denoiser, x, levels)[:, 0, 0]
target = peaks.denoiser(x, sigma)
steps = [exponential_step(peaks.denoiser, x, -sigma.log(), -level.log()) for level in levels]
for level, ours in zip(levels, steps, strict=True):
    assert torch.allclose(ours, ddim(peaks.denoiser, x, sigma, level)[0])
    assert torch.allclose(ours, euler_step(peaks.denoiser, x, sigma, level)[1])
in_lambda = x + lengths * (target - x)
assert float(in_lambda[0, -1]) < float(target) < float(steps[-1])
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(lengths, true, color=COLOURS["exact"], label="true path")
ax.plot(lengths, [float(x) for x in steps], color=COLOURS["model"], label="exponential (DDIM)")
ax.plot(lengths, in_lambda[0], color=COLOURS["warn"], label=r"Euler in $\lambda$")
ax.axhline(float(target), color=COLOURS["muted"], linewidth=1, label="D(x, σ)")
ax.set(xlabel=r"length of the step, $h = \log(\sigma/\sigma')$", ylabel="x'", ylim=(-2.5, 1.8))
ax.legend()
plt.show()

# %% [markdown] item="03.4"
# DDIM holds $D$ fixed. Better: let it go on as it did in the last step. **DPM-Solver++(2M)** (DPM-Solver++, Lu et al. 2022, Algorithm 2)
# lays a line in $\lambda$ through the last estimate and this one and reads it half a step ahead:
#
# $$D_{\mathrm{bar}} = \left(1 + \tfrac1{2r}\right) D_0 - \tfrac1{2r}\,D_{\mathrm{before}},\qquad r = \frac{h_{\mathrm{before}}}{h},\qquad x' = \tfrac{\sigma'}{\sigma}\,x + \left(1 - \tfrac{\sigma'}{\sigma}\right) D_{\mathrm{bar}}$$
#
# with $D_0 = D(x, \sigma)$ and $h = \log(\sigma/\sigma')$; $h_{\mathrm{before}}$ is the length of the step before. One call of $D$, and
# order 2. `D_before` is what the last step returned as its memory, and `sigma_before` the level where it started; both are `None` in the
# first step. Without history, and where $\sigma' = 0$, take $D_{\mathrm{bar}} = D_0$. Return the pair: $x'$, and what the next step has to
# remember.


# %% item="03.4"
def step_2m(
    D,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_before: Tensor | None,
    D_before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x at sigma_next, and the memory for the step after it, of the shape of x; x (B, ...)."""
    ### BEGIN SOLUTION
    D_0 = D_bar = D(x, sigma)
    if D_before is not None and sigma_next > 0:
        h, h_before = torch.log(sigma / sigma_next), torch.log(sigma_before / sigma)
        D_bar = D_0 + h / (2 * h_before) * (D_0 - D_before)
    keep = sigma_next / sigma
    return keep * x + (1 - keep) * D_bar, D_0
    ### END SOLUTION


# %% item="03.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
step_2m = check("03.4", step_2m)

# %% [markdown]
# The same comparison with the newcomer. It has the order of Heun at the price of Euler: at equal calls twice as many steps, and a smaller error.


# %%
def run_2m(D, x: Tensor, sigmas: Tensor) -> Tensor:
    """The end of a walk of 2M; the loop keeps what a step returns, and hands it to the next."""
    before = D_before = None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, D_before = step_2m(D, x, sigma, sigma_next, before, D_before)
        before = sigma
    return x


gaps["2M"] = [gap(run_2m(D, start, falling(calls, LOW, HIGH))) for calls in CALLS]
assert all(m < h for m, h in zip(gaps["2M"], gaps["Heun"], strict=True))
compare(gaps)

# %% [markdown] item="03.5"
# A rule of **order** $p$ has an error that falls as $n^{-p}$ with the number $n$ of steps. Measure it: from the errors at the end of a run
# of $n$ steps and of one of $2n$ return the order. `error_n` and `error_2n` are `(K,)`, one number for each of $K$ rules.


# %% item="03.5"
def order(error_n: Tensor, error_2n: Tensor) -> Tensor:
    """The measured orders, (K,), from the errors after n and after 2n steps, (K,) each."""
    ### BEGIN SOLUTION
    return torch.log2(error_n / error_2n)
    ### END SOLUTION


# %% item="03.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
order = check("03.5", order)

# %% [markdown]
# The orders of your own three rules, from each number of calls to the next. A wrong factor somewhere in a rule of order 2 would still give
# pictures, but an order of 1: this is the test to run before anything else. On the coarsest grids the number means little; the last one
# counts.

# %%
errors = torch.tensor([gaps[name] for name in LOOKS])  # (rules, calls)
orders = torch.stack([order(n, twice) for n, twice in itertools.pairwise(errors.T)])
assert (orders[-1] - torch.tensor([1.0, 2.0, 2.0])).abs().max() < 0.2
fig, ax = plt.subplots(figsize=(6, 3.2))
for (name, (role, look)), values in zip(LOOKS.items(), orders.T, strict=True):
    ax.plot([f"{n} to {2 * n}" for n in CALLS[:-1]], values, look, color=COLOURS[role], label=name)
ax.set(xlabel="calls of D", ylabel="measured order", ylim=(0, 3.5), yticks=(0, 1, 2, 3))
ax.legend(ncols=3)
plt.show()

# %% [markdown] item="03.6"
# The flow is one to one, so it gives what the bound of 02.10 only bounds: the *exact* density of the model (Song et al. 2021, Eq. 39; Chen
# et al. 2018, Theorem 1). Along a path
#
# $$\frac{\mathrm d}{\mathrm d\sigma}\log p_\sigma(x_\sigma) = -\operatorname{tr}\frac{\partial}{\partial x}\,\frac{x - D(x,\sigma)}{\sigma}.$$
#
# `x0` stands at the level `sigmas[0]`, which is small. Walk from there along the *rising* grid `sigmas` by Heun's rule, and take the trace
# by the same rule: in each step the mean of the traces at $(x, \sigma)$ and $(\hat x, \sigma')$, times $\sigma' - \sigma$. At the top the
# data no longer count, and $x_T\sim\mathcal N(0, \sigma_T^2 I)$ with the last level $\sigma_T$. Return $-\log_2 p(x_0)/d$, bits per
# dimension, `(B,)`. The traces come from `torch.autograd.grad`, $d$ calls each: the $i$-th gives the $i$-th row of the Jacobian, for all
# samples at once.


# %% item="03.6"
def flow_bits_per_dim(D, x0: Tensor, sigmas: Tensor) -> Tensor:
    """-log2 p(x0) / d at the level sigmas[0], (B,); x0 (B, ...), sigmas (n + 1,) rising."""

    ### BEGIN SOLUTION
    def slope_and_trace(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            slope = (x - D(x, sigma)) / sigma
            flat, trace = slope.flatten(1), 0
            for i in range(flat.shape[1]):
                row = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0]
                trace = trace + row.flatten(1)[:, i]
        return slope.detach(), trace

    x, total = x0, 0
    for k in range(len(sigmas) - 1):
        length = sigmas[k + 1] - sigmas[k]
        slope, trace = slope_and_trace(x, sigmas[k])
        slope_next, trace_next = slope_and_trace(x + length * slope, sigmas[k + 1])
        x = x + length * (slope + slope_next) / 2
        total = total + length * (trace + trace_next) / 2
    top = sigmas[-1]
    prior = -((x / top) ** 2) / 2 - torch.log(top) - math.log(2 * math.pi) / 2
    return -(prior.flatten(1).sum(1) + total) / (x0[0].numel() * math.log(2))
    ### END SOLUTION


# %% item="03.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
flow_bits_per_dim = check("03.6", flow_bits_per_dim)

# %% [markdown]
# For the mixture the density is known. Left: your bits against the exact ones, with 128 steps. Right: their distance falls with the order
# of Heun's rule, 2, to less than a hundredth of a bit.

# %%
x0 = blobs.sample(60, generator(2), 0.1)
known = -blobs.log_prob(x0, 0.1) / (2 * math.log(2))
counts = (16, 32, 64, 128)
bits = [flow_bits_per_dim(D, x0, falling(n, 0.1, 80.0).flip(0)) for n in counts]
off = torch.stack([(one - known).abs().mean() for one in bits])
assert off[-1] < 0.01 and abs(order(off[-2:-1], off[-1:]) - 2) < 0.2
fig, (left, right_) = plt.subplots(1, 2, figsize=(9, 3.4))
left.plot(known, known, color=COLOURS["exact"], linewidth=1, label="exact")
left.plot(known, bits[-1], "o", color=COLOURS["model"], markersize=4, label="flow")
left.set(xlabel="exact, bits per dimension", ylabel="flow, bits per dimension")
left.legend()
right_.loglog(counts, off, "s-", color=COLOURS["model"])
right_.set(xlabel="steps", ylabel="distance, bits per dimension")
right_.set_xticks(counts, [str(n) for n in counts])
right_.minorticks_off()
plt.show()

# %% [markdown] item="03.7"
# **Inversion**: the flow from the data to noise finds the noise from which a sample would have come, its *latent*. Walk from `x0` along the
# rising grid, then back along the falling one, and see what comes back. `sigmas` is a sampler's grid, falling from $\sigma_{\max}$ to the
# level of `x0`, which is above 0; `step(D, x, sigma, sigma_next)` returns the next $x$. Return the pair: the latent, which is $x$ at
# $\sigma_{\max}$, and for each sample the root of the mean square of what came back less `x0`.


# %% item="03.7"
def round_trip(D, x0: Tensor, sigmas: Tensor, step) -> tuple[Tensor, Tensor]:
    """The latent, of the shape of x0 (B, ...), and the RMS of the way there and back, (B,)."""
    ### BEGIN SOLUTION
    rising, x = sigmas.flip(0), x0
    for k in range(len(rising) - 1):
        x = step(D, x, rising[k], rising[k + 1])
    latent = x
    for k in range(len(sigmas) - 1):
        x = step(D, x, sigmas[k], sigmas[k + 1])
    return latent, (x - x0).square().flatten(1).mean(1).sqrt()
    ### END SOLUTION


# %% item="03.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
round_trip = check("03.7", round_trip)

# %% [markdown]
# Eight held-out digits, their latents under the course's network, and what comes back. To the eye the latent is noise; all of the digit is
# in it. How much is lost on the way depends on the rule: at 24 calls each way, Heun's 12 steps against Euler's 24.

# %%
D_digits = zoo.load("digits", device="cpu")
shown = digits.load("test")[0][:8]
with torch.no_grad():
    trips = {
        "Euler": round_trip(D_digits, shown, falling(24, 0.05, 15.0), euler),
        "Heun": round_trip(D_digits, shown, falling(12, 0.05, 15.0), heun_step),
    }
    back = walk(heun_step, D_digits, trips["Heun"][0], falling(12, 0.05, 15.0))[-1]
rms = {name: float(one[1].median()) for name, one in trips.items()}
assert rms["Heun"] < rms["Euler"]
study.strip([shown, trips["Heun"][0] / 15 / 2, back], ["digit", "latent", "back"], scale=5)

# %% [markdown] item="03.8"
# With few steps it matters where they are. Write two grids of `n` steps: `n` levels from $\sigma_{\max}$ down to $\sigma_{\min}$, and 0 at
# the end, `(n + 1,)` float64. **Karras'** levels are even in $\sigma^{1/\rho}$ (Karras et al. 2022, Eq. 5); the **geometric** ones in
# $\log\sigma$, and so in log-SNR. A third, `even`, is given: even in the time $t$ of a schedule. Then *measure*: `error(sigmas)` runs a
# sampler along a grid and returns its error, a number. Return the two grids and the index of the best of the three, 0 for Karras, 1 for
# geometric, 2 for `even`.


# %% item="03.8"
def choose_grid(
    error, n: int, sigma_min: float, sigma_max: float, rho: float, even: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Karras' grid, the geometric one, and the index of the least error among them and `even`."""
    ### BEGIN SOLUTION
    u, zero = torch.linspace(0, 1, n, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    karras = torch.cat([(top + u * (bottom - top)) ** rho, zero])
    geometric = torch.cat([sigma_max * (sigma_min / sigma_max) ** u, zero])
    found = [error(sigmas) for sigmas in (karras, geometric, even)]
    return karras, geometric, found.index(min(found))
    ### END SOLUTION


# %% item="03.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
choose_grid = check("03.8", choose_grid)

# %% [markdown]
# There is no best grid: it depends on the rule. The three blobs again, from $\sigma = 10$ to 0, with a ring around your choice (Heun's
# steps cost two calls each). A line in $\lambda$ is what 2M draws, and even steps in $\lambda$ suit it. Heun's slope is measured in
# $\sigma$: it wants its small steps where the path bends, in the middle, and at most budgets the noise schedule of a VP model has them
# there.

# %%
TOP, BOTTOM, BUDGETS = 10.0, 0.02, (5, 7, 10, 14, 20)
GRIDS = {"Karras": "data", "geometric": "model", "even in t of VP": "noise"}
start = blobs.sample(60, generator(3), TOP)
ends = blobs.reference_flow(start, TOP, 1e-3)
vp = Linear()
first, last = (float(vp.t_of_sigma(torch.tensor(level))) for level in (BOTTOM, TOP))
runs = {
    "2M": lambda sigmas: run_2m(D, start, sigmas),
    "Heun": lambda sigmas: walk(heun_step, D, start, sigmas)[-1],
}
chosen = {}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for ax, (rule, run) in zip(axes, runs.items(), strict=True):

    def error(sigmas: Tensor, run=run) -> float:
        return float((run(sigmas) - ends).norm(dim=1).mean())

    found, chosen[rule] = [], []
    for n in BUDGETS:
        even = uniform(vp, n, first, last)
        karras, geometric, index = choose_grid(error, n, BOTTOM, TOP, 7.0, even)
        found.append([error(sigmas) for sigmas in (karras, geometric, even)])
        chosen[rule].append(index)
        ax.plot(n, found[-1][index], "o", markersize=13, mfc="none", color=COLOURS["exact"])
    for (name, role), values in zip(GRIDS.items(), zip(*found, strict=True), strict=True):
        ax.loglog(BUDGETS, values, "o-", color=COLOURS[role], label=name)
    ax.set(xlabel="steps", title=rule)
    ax.set_xticks(BUDGETS, [str(n) for n in BUDGETS])
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
assert set(chosen["2M"]) == {1} and 1 not in chosen["Heun"]
axes[0].set_ylabel("distance to the exact end")
axes[1].legend()
plt.show()

# %% [markdown] item="03.9"
# Rectified flow mixes data and noise on a straight line, $x_t = (1-t)\,x_0 + t\,\epsilon$ (Liu et al. 2023, Eq. 1, where time runs the
# other way): data at $t = 0$, noise at $t = 1$, as everywhere in this course. Its model is a velocity, the mean of $\epsilon - x_0$ given
# $x_t$. You have a denoiser, and that is enough. Return the pair: the velocity $v$ at $x_t$, and $x_{t'}$ by one Euler step in $t$. `D`
# wants $x_0 + \sigma\epsilon$ and $\sigma$: how do these follow from $x_t$ and $t$?


# %% item="03.9"
def flow_step(D, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity at x_t and x_t at t_next; x_t (B, ...), t 0-d in (0, 1), t_next in [0, 1)."""
    ### BEGIN SOLUTION
    x0 = D(x_t / (1 - t), t / (1 - t))
    v = (x_t - x0) / t  # eps - x0, since x_t = x0 + t (eps - x0)
    return v, x_t + (t_next - t) * v
    ### END SOLUTION


# %% item="03.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
flow_step = check("03.9", flow_step)

# %% [markdown]
# Forty steps from noise to the blobs. Each pair $(x_0, \epsilon)$ is joined by a straight line, but the flow of their *mean* velocity is
# curved. And Euler's step in $t$ is, once more, DDIM: at $\sigma = t/(1-t)$ both give the same numbers.

# %%
times = torch.linspace(0.999, 0, 41, dtype=torch.float64)
start = torch.randn(60, 2, generator=generator(4)).double()
paths = walk(lambda D, x, t, t_next: flow_step(D, x, t, t_next)[1], D, start, times)
scale = 1 - times
by_ddim = walk(lambda D, x, s, s_next: ddim(D, x, s, s_next)[0], D, start / scale[0], times / scale)
assert torch.allclose(paths, by_ddim * scale[:, None, None])
extent = (-2.8, 2.8, -2.8, 2.8)
fig, ax = plt.subplots(figsize=(4.6, 4.6))
study.density(ax, blobs.log_prob, extent)
ax.plot(*paths.permute(2, 0, 1), color=COLOURS["muted"], linewidth=0.8)
study.scatter(ax, start, colour=COLOURS["noise"], size=8, label="noise")
study.scatter(ax, paths[-1], colour=COLOURS["model"], size=8, label="end")
ax.legend()
plt.show()

# %% [markdown] item="03.10"
# Curved paths need many steps. **Reflow** (Liu et al. 2023, Sec. 2.2) trains a second flow on better pairs: each noise with the end of *its
# own* path under the first. Make one batch for this training. Follow the velocity `v(x, t)`, by Euler's steps along the falling `times`,
# from `eps` at `times[0]` to $x_0$ at `times[-1] = 0`, without gradients. Then, as in any training of a flow, return the pair
# $x_t = (1-t)\,x_0 + t\,\epsilon$ at the given `t`, one for each sample, and its target velocity.


# %% item="03.10"
def reflow_batch(v, eps: Tensor, times: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and its target velocity, of the shape of eps (B, ...); times (n + 1,) falling, t (B,)."""
    ### BEGIN SOLUTION
    x0 = eps
    with torch.no_grad():
        for k in range(len(times) - 1):
            x0 = x0 + (times[k + 1] - times[k]) * v(x0, times[k])
    t = t.reshape(-1, *[1] * (eps.ndim - 1))
    return (1 - t) * x0 + t * eps, eps - x0
    ### END SOLUTION


# %% item="03.10" tags=["check"]
# NBVAL_CHECK_OUTPUT
reflow_batch = check("03.10", reflow_batch)

# %% [markdown]
# What makes these pairs better: their lines are shorter and hardly cross. The mean square distance of a pair never rises by reflow (Liu et
# al. 2023, Theorem 3.5); here it falls to less than a fifth. Where lines do not cross, the mean velocity at a point is that of the one line
# through it, and one Euler step is exact.

# %%
eps = torch.randn(400, 2, generator=generator(5)).double()
half = torch.full((len(eps),), 0.5, dtype=torch.float64)
_, target = reflow_batch(partial(velocity, D), eps, times, half)
pairs = {"independent pairs": blobs.sample(len(eps), generator(6)), "pairs of reflow": eps - target}
cost = {name: float((eps - x0).square().sum(1).mean()) for name, x0 in pairs.items()}
assert cost["pairs of reflow"] < 0.2 * cost["independent pairs"]
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
for ax, (name, x0) in zip(axes, pairs.items(), strict=True):
    study.plane(ax, extent)
    ax.plot(*torch.stack([eps, x0])[:, :60].permute(2, 0, 1), color=COLOURS["muted"], linewidth=0.8)
    study.scatter(ax, eps[:60], colour=COLOURS["noise"], size=10)
    study.scatter(ax, x0[:60], colour=COLOURS["model"], size=10)
    ax.set_title(name)
plt.show()

# %% [markdown] item="03.11"
# The ODE has a noisy twin with the same densities. For the variance-preserving SDE,
# $\mathrm dx = -\tfrac12\beta(t)\,x\,\mathrm dt + \sqrt{\beta(t)}\,\mathrm dw$, time runs back by (Song et al. 2021, Eq. 6)
#
# $$\mathrm dx = \left[-\tfrac12\beta\,x - \beta\,\nabla_x\log p_t(x)\right]\mathrm dt + \sqrt{\beta}\,\mathrm d\bar w$$
#
# with $\beta(t) = \beta_{\min} + t\,(\beta_{\max} - \beta_{\min})$, $x_t = \sqrt{\bar\alpha}\,x_0 + \sqrt{1-\bar\alpha}\,\epsilon$ and
# $\bar\alpha(t) = \exp(-\beta_{\min} t - \tfrac12(\beta_{\max}-\beta_{\min})\,t^2)$. Make one Euler step from `t` down to `t_next`, with
# everything taken at `t` and the standard normal noise `z`. A factor of two in the drift or in the noise is the classic fault here: the
# program runs, and the spread is wrong.


# %% item="03.11"
def reverse_sde_step(
    D, x_t: Tensor, t: Tensor, t_next: Tensor, z: Tensor, beta_min: float, beta_max: float
) -> Tensor:
    """x at t_next < t of the VP SDE run backwards; x_t, z (B, ...), t, t_next 0-d in (0, 1]."""
    ### BEGIN SOLUTION
    beta = beta_min + t * (beta_max - beta_min)
    alpha_bar = torch.exp(-beta_min * t - (beta_max - beta_min) * t**2 / 2)
    alpha, std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    score = (alpha * D(x_t / alpha, std / alpha) - x_t) / std**2
    drift = -beta / 2 * x_t - beta * score
    return x_t + (t_next - t) * drift + (beta * (t - t_next)).sqrt() * z
    ### END SOLUTION


# %% item="03.11" tags=["check"]
# NBVAL_CHECK_OUTPUT
reverse_sde_step = check("03.11", reverse_sde_step)

# %% [markdown]
# Left: the data are $\mathcal N(0, 0.3^2)$, so that $D$ is linear and a step turns variance $V$ into $a^2 V + b^2$. The numbers $a$ and $b$
# come from your step itself, at $x = 1$, $z = 0$ and at $x = 0$, $z = 1$: the spread of the samples without drawing any. It comes to the
# exact one with an error of order 1 in the steps. Right: samples of the blobs after 400 steps, as far from 600 draws of the mixture as
# other 600 draws are (sliced Wasserstein distance, within three deviations).


# %%
def step_to(D, x: Tensor, t: Tensor, t_next: Tensor, z: Tensor) -> Tensor:
    return reverse_sde_step(D, x, t, t_next, z, 0.1, 20.0)


def times_of(n: int) -> Tensor:
    return torch.linspace(1, 1e-3, n + 1, dtype=torch.float64)


narrow = Mixture.gaussian(torch.zeros(1), torch.tensor([[0.3**2]])).denoiser
one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
signal = Linear().alpha_bar(times_of(1))  # at the start and at the end
V_start, V_end = (signal * 0.3**2 + 1 - signal).tolist()
counts, spreads = (50, 100, 200, 400), []
for n in counts:
    V = V_start
    for t, t_next in itertools.pairwise(times_of(n)):
        a, b = step_to(narrow, one, t, t_next, zero), step_to(narrow, zero, t, t_next, one)
        V = float(a) ** 2 * V + float(b) ** 2
    spreads.append(V**0.5)
off = (torch.tensor(spreads) - V_end**0.5).abs()
assert abs(order(off[-2:-1], off[-1:]) - 1) < 0.2

draws, drawn = generator(7), torch.randn(600, 2, generator=generator(8)).double()
for t, t_next in itertools.pairwise(times_of(400)):
    drawn = step_to(D, drawn, t, t_next, torch.randn(drawn.shape, generator=draws).double())
chance, deviation = sliced_wasserstein_floor(blobs.sample, len(drawn))
apart = sliced_wasserstein(drawn, blobs.sample(len(drawn), generator(9)))
assert apart < chance + 3 * deviation
fig, (left, right_) = plt.subplots(1, 2, figsize=(9, 4.2))
left.semilogx(counts, spreads, "o-", color=COLOURS["model"], label="your step")
left.axhline(V_end**0.5, color=COLOURS["exact"], linewidth=1, label="exact")
left.set(xlabel="steps", ylabel="standard deviation of the samples")
left.set_xticks(counts, [str(n) for n in counts])
left.minorticks_off()
left.legend()
study.density(right_, blobs.log_prob, extent)
study.scatter(right_, drawn, colour=COLOURS["model"], size=5)
plt.show()

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 04, guidance.
