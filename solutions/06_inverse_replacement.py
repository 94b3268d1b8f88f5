# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 06: inverse problems by replacement
#
# Nine functions that restore pictures with *one* network, which has learned nothing but what digits look like. A part of a digit is
# hidden, or it is blurred, or only a few of its averages are known: $y = A x_0 + \sigma_y n$. Each solver says in another way what $y$
# tells, and leaves the rest to the network.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("06.1")` gives the next hint, `solution("06.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 06.1 the adjoint of a measurement | 2 | | 06.6 ILVR's filter | 2 |
# | 06.2 projection onto a measurement | 1 | | 06.7 CCDF's start | 1 |
# | 06.3 replacement at the right noise level | 2 | | 06.8 RePaint's jump back | 2 |
# | 06.4 the null space from the network | 1 | | 06.9 a reversible step | 2 |
# | 06.5 one coordinate of DDRM | 3 | | **all** | **16** |
#
# Symbols: $x = x_0 + \sigma\epsilon$ at the noise level $\sigma$; a step leads from $\sigma$ to a lower $\sigma'$, `sigma_next`, and from $x$ to $x'$;
# $D(x, \sigma)$ is the network's estimate of $x_0$; $A$ is linear, $A^\top$ its adjoint, $A^+$ its pseudo-inverse; $z$ is standard normal.
# Formulas that were published in DDPM's coordinate are written in this one.

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.grading.check import check, hint, solution
from course_lib.operators import BlockAverage, Blur, Mask, gaussian_kernel
from course_lib.posterior import null_space, replacement
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim, ddpm
from course_lib.worlds import digits

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS
D_digits = zoo.load("digits", device="cpu")
reader = zoo.load("digits-reader", device="cpu")
images, labels = digits.load("test")  # the network has not seen these
SHAPE, TOP = digits.SHAPE, 15.0
GRID = karras(12, 0.02, TOP)


def draw(n: int, seed: int) -> Tensor:
    """Standard normal pictures, (n, 1, 16, 16)."""
    return torch.randn(n, *SHAPE, generator=generator(seed))


def psnr(x: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (x.clamp(-1, 1) - truth).square().mean()))


# %% [markdown] item="06.1"
# All solvers ask two things of a measurement: $A$, and the way back. The adjoint is defined by $\langle A x, y\rangle = \langle x, A^\top y\rangle$ for
# all $x$ and $y$. Here $A$ blurs a picture and then takes the means of its blocks of `factor` × `factor` pixels. The blur is a sum of shifted
# pictures, around the edges,
#
# $$(k * x) = \sum_{u,v} k_{uv}\,S^{\,u-u_0,\,v-v_0}\,x,$$
#
# where $S^{a,b}$ moves a picture $a$ rows down and $b$ columns to the right, `x.roll((a, b), (-2, -1))`, and $(u_0, v_0)$ = `(kh // 2, kw // 2)`
# is the kernel's middle. Given `y` `(B, C, h, w)`, return $A^\top y$, `(B, C, factor h, factor w)`.


# %% item="06.1"
def adjoint(y: Tensor, kernel: Tensor, factor: int) -> Tensor:
    """A^T y for A = block averages of the picture blurred with `kernel` (kh, kw)."""
    ### BEGIN SOLUTION
    x = y.repeat_interleave(factor, -2).repeat_interleave(factor, -1) / factor**2
    rows, columns = kernel.shape
    total = torch.zeros_like(x)
    for u in range(rows):
        for v in range(columns):
            total = total + kernel[u, v] * x.roll((rows // 2 - u, columns // 2 - v), (-2, -1))
    return total
    ### END SOLUTION


# %% item="06.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
adjoint = check("06.1", adjoint)

# %% [markdown]
# With nothing but $A$ and $A^\top$ one can go downhill on $|y - A x|^2$, by $x \leftarrow x + \tau A^\top(y - A x)$. A shaken camera sees digits in
# 8 × 8 pixels. With the adjoint the residual falls. With the same kernel, not turned, what looks like a way downhill leads up.

# %%
few = images[:10]
path = torch.zeros(5, 5)
for u, v, share in ((2, 2, 0.3), (2, 3, 0.3), (1, 3, 0.2), (1, 4, 0.2)):
    path[u, v] = share
blur, small = Blur(path, SHAPE), BlockAverage(SHAPE, 2)
y = small(blur(few))
descents = {}
for name, kernel in (("adjoint", path), ("kernel not turned", path.flip(0, 1))):
    x, sizes = torch.zeros_like(few), []
    for _ in range(120):
        residual = y - small(blur(x))
        sizes.append(float(residual.square().mean().sqrt()))
        x = x + 4 * adjoint(residual, kernel, 2)  # |A|² <= 1 / factor²
    descents[name] = x, sizes
assert descents["adjoint"][1][-1] < 0.01 < descents["kernel not turned"][1][-1]
rows = {
    "digits": few,
    "measured": y.repeat_interleave(2, 2).repeat_interleave(2, 3),
    "adjoint": descents["adjoint"][0],
    "not turned": descents["kernel not turned"][0].nan_to_num().clamp(-3, 3),
}
study.strip(list(rows.values()), list(rows), scale=4)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, (_, sizes)), role, look in zip(
    descents.items(), ("model", "warn"), ("-", "--"), strict=True
):
    ax.plot(sizes, look, color=COLOURS[role], label=name)
ax.set(xlabel="steps", ylabel="RMS of y − A x", yscale="log")
ax.legend()
plt.show()

# %% [markdown] item="06.2"
# Of all pictures with the measurement $y$, which is nearest to $x$? The *projection*
#
# $$x' = x + A^+(y - A x).$$
#
# Here $A$ is a matrix `(m, n)` and samples are rows: `x` `(B, n)`, `y` `(B, m)`, and $A x$ of all of them is `x @ A.T`. Rows of $A$ may depend on
# one another, and then not every $y$ can be measured; $A^+$ gives the nearest.


# %% item="06.2"
def projection(A: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x' of each row, (B, n)."""
    ### BEGIN SOLUTION
    return x + (y - x @ A.T) @ torch.linalg.pinv(A).T
    ### END SOLUTION


# %% item="06.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
projection = check("06.2", projection)

# %% [markdown]
# Compressed sensing: of a digit's 256 pixels only 64 random sums are known. $A^+ y$ is the projection of nothing; the projections of the mean
# digit and of another digit of the same kind have the same 64 sums, and look far better. By Pythagoras a projection is never farther from the
# truth than $x$ was: right, each of 300 digits before and after. How far it comes depends on $x$. The line is $\sqrt{1 - 64/256}$, for an $x$ whose
# error has no preferred direction. The rest of this notebook gets its $x$ from a network.

# %%
sums = torch.randn(64, 256, generator=generator(1))
truth = images[:10].flatten(1)
y = truth @ sums.T
seen, kinds = digits.load("train")
alike = torch.stack([seen[kinds == label][0] for label in labels[:10]])
guesses = {
    "A⁺ y": torch.zeros_like(truth),
    "mean": seen.mean(0).flatten().expand(10, -1),
    "another": alike.flatten(1),
}
found = {name: projection(sums, guess, y) for name, guess in guesses.items()}
assert torch.allclose(found["mean"] @ sums.T, y, atol=1e-2)
study.strip([few, *(one.reshape(few.shape) for one in found.values())], ["digits", *found], scale=4)

# %%
others = seen[:300].flatten(1)
target = truth[:1].expand(300, -1)
before = (others - target).norm(dim=1)
after = (projection(sums, others, target @ sums.T) - target).norm(dim=1)
assert bool((after <= before + 1e-4).all())
fig, ax = plt.subplots(figsize=(4.8, 3.6))
line = torch.tensor([0.0, float(before.max())])
ax.scatter(before, after, s=8, color=COLOURS["other"], label="projections of digits")
ax.plot(line, line, color=COLOURS["muted"], label="no nearer")
ax.plot(line, 0.75**0.5 * line, "--", color=COLOURS["exact"], label="no direction preferred")
ax.set(xlabel="distance from the truth, before", ylabel="after")
ax.legend()
plt.show()

# %% [markdown] item="06.3"
# Inpainting with a network that knows nothing of holes (Song et al. 2021, App. I): make a step as if nothing were known, and then overwrite the
# known pixels with the measurement, *at the level of x'*. The step is deterministic DDIM, $x' = x_0 + \frac{\sigma'}{\sigma}(x - x_0)$ with
# $x_0 = D(x, \sigma)$. Where `mask` is True,
#
# $$x' \leftarrow y + s\,z,\qquad y = x_0 + \sigma_y n,$$
#
# and it is yours to find $s$ such that the known pixels, too, are $x_0$ with noise of deviation $\sigma'$. Where $\sigma' < \sigma_y$ that cannot be:
# $x'$ is left as it is. `mask` is `(C, H, W)`, `y` and `z` are of the shape of `x`, `(B, C, H, W)`.


# %% item="06.3"
def replaced(
    D, x: Tensor, sigma: Tensor, sigma_next: Tensor, y: Tensor, mask: Tensor, sigma_y: float, z: Tensor
) -> Tensor:  # fmt: skip
    """x' at sigma_next; sigma and sigma_next 0-d."""
    ### BEGIN SOLUTION
    x0 = D(x, sigma)
    x_next = x0 + sigma_next / sigma * (x - x0)
    if sigma_next < sigma_y:
        return x_next
    return torch.where(mask, y + (sigma_next**2 - sigma_y**2).sqrt() * z, x_next)
    ### END SOLUTION


# %% item="06.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
replaced = check("06.3", replaced)

# %% [markdown]
# Digits with a hole and with noise, $\sigma_y = 0.3$. On the way, at $\sigma' \approx 2$, hole and surroundings are equally noisy: that is what the
# network was trained for. In the end it has filled the hole *and* taken the noise off the rest, since below $\sigma_y$ nothing is overwritten.
# Last row: the same measurement taken for exact. Its noise stays. (What of the fresh noise $z$ itself? Without it these digits come out about
# as well. Replacement has a larger fault, of which 06.8 speaks.)

# %%
hole = Mask.box(SHAPE, (6, 6))
known = hole.observed
y = torch.where(known, few + 0.3 * draw(10, 2), 0.0)


def restore(sigma_y: float) -> tuple[Tensor, Tensor]:
    """Samples by replacement, and x' on the way."""
    fresh, way = SampleNoise(3), []

    def step(D, x, sigma, sigma_next, memory=None):
        return replaced(D, x, sigma, sigma_next, y, known, sigma_y, fresh(x)), None

    x = sample(
        D_digits, TOP * draw(10, 4), GRID, step,
        lambda x, sigma: way.append(x) if 1.5 < sigma < 3 else None,
    )  # fmt: skip
    return x, way[-1]


(noisy, between), (exact, _) = restore(0.3), restore(0.0)
gains = {"measured": y, "σ_y = 0.3": noisy, "σ_y = 0": exact}
gains = {name: psnr(one[:, known], few[:, known]) for name, one in gains.items()}
assert gains["σ_y = 0.3"] > gains["measured"] + 2
rows = {"digits": few, f"measured: {gains['measured']:.1f} dB": y, "on the way": between / 2}
rows |= {
    f"{name}: {gains[name]:.1f} dB": one for name, one in (("σ_y = 0.3", noisy), ("σ_y = 0", exact))
}
study.strip(list(rows.values()), list(rows), scale=4)

# %% [markdown] item="06.4"
# Replacement lets $y$ in after each step, and the network learns of it one step late. The null-space model (Wang et al. 2023) lets it into the
# *estimate*: of $x_0$, what $A$ sees comes from $y$, and what it does not see, its null space, from the network:
#
# $$\hat x_0 = A^+ y + (I - A^+ A)\,D(x, \sigma).$$
#
# `A` is an operator of the course: `A(x)` measures pictures, `A.pinv(y)` is $A^+ y$. With your function any sampler solves the problem: it is a
# denoiser again, `lambda x, sigma: null_space_estimate(D, A, y, x, sigma)`.


# %% item="06.4"
def null_space_estimate(D, A, y: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of x0 that agrees with y, of the shape of x (B, ...)."""
    ### BEGIN SOLUTION
    x0 = D(x, sigma)
    return x0 + A.pinv(y - A(x0))
    ### END SOLUTION


# %% item="06.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
null_space_estimate = check("06.4", null_space_estimate)

# %% [markdown]
# Digits of which only the 16 means of 4 × 4 pixels are known, and two samples of each. Both have exactly these means; the network invents
# the other 240 numbers, each time anew.

# %%
coarse = BlockAverage(SHAPE, 4)
y = coarse(few)
two = [
    sample(
        lambda x, sigma: null_space_estimate(D_digits, coarse, y, x, sigma),
        TOP * draw(10, seed), GRID, ddpm(SampleNoise(seed + 1)),
    )
    for seed in (4, 6)
]  # fmt: skip
assert all(float((coarse(one) - y).abs().max()) < 1e-5 for one in two)
study.strip([few, coarse.pinv(y), *two], ["digits", "measured", "sample 1", "sample 2"], scale=4)

# %% [markdown] item="06.5"
# With noise in $y$, how far is it to be trusted? In the coordinates of the singular value decomposition $A = U \operatorname{diag}(s) V^\top$ the
# question is asked of one number at a time. Below, `x`, `x0` and `z` are $V^\top$ of the noisy picture, of $D(x, \sigma)$ and of fresh noise, and
# `y` is $U^\top y$, all `(B, n)`; `s` `(n,)` is 0 where nothing is measured, and `y` is then 0, too. So $\bar y_i = y_i / s_i$ is $x_0$ with noise of
# deviation $r_i = \sigma_y / s_i$, and DDRM's step is (Kawar et al. 2022, Eq. 7 and 8; $\eta_b$ weighs the measurement)
#
# $$x'_i = \begin{cases}
# x_{0,i} + \sigma'\big(\sqrt{1-\eta^2}\,\epsilon_i + \eta z_i\big),\quad \epsilon = (x - x_0)/\sigma & s_i = 0\\
# x_{0,i} + \sigma'\big(\sqrt{1-\eta^2}\,(\bar y_i - x_{0,i})/r_i + \eta z_i\big) & \sigma' < r_i\\
# (1-\eta_b)\,x_{0,i} + \eta_b\,\bar y_i + \sqrt{\sigma'^2 - \eta_b^2 r_i^2}\;z_i & \sigma' \ge r_i
# \end{cases}$$
#
# Nothing may become infinite or undefined: $s_i$, $r_i$ and $\sigma'$ can be 0.


# %% item="06.5"
def ddrm_coordinates(
    x: Tensor, x0: Tensor, y: Tensor, s: Tensor, sigma: Tensor, sigma_next: Tensor,
    sigma_y: float, eta: float, eta_b: float, z: Tensor,
) -> Tensor:  # fmt: skip
    """x' in the coordinates V^T x, (B, n); sigma > 0 and sigma_next are 0-d."""
    ### BEGIN SOLUTION
    seen = s > 0
    divisor = torch.where(seen, s, 1.0)
    y_bar, r = y / divisor, sigma_y / divisor
    keep = (1 - eta**2) ** 0.5
    towards = (y_bar - x0) / torch.where(r > 0, r, 1.0)  # r = 0 is always of the third case
    unseen = x0 + sigma_next * (keep * (x - x0) / sigma + eta * z)
    noisier = x0 + sigma_next * (keep * towards + eta * z)
    rest = (sigma_next**2 - (eta_b * r) ** 2).clamp_min(0).sqrt()
    cleaner = (1 - eta_b) * x0 + eta_b * y_bar + rest * z
    return torch.where(seen, torch.where(sigma_next >= r, cleaner, noisier), unseen)
    ### END SOLUTION


# %% item="06.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
ddrm_coordinates = check("06.5", ddrm_coordinates)

# %% [markdown]
# Blurred and noisy digits, $\sigma_y = 0.1$. The blur all but erases fine detail, and dividing by its singular values, $A^+ y$, leaves nothing but
# noise. DDRM takes each coordinate for what it is worth.

# %%
lens = Blur(gaussian_kernel(1.0), SHAPE)
svd, noisy_y = lens.svd(), lens(few) + 0.1 * draw(10, 8)
weights = svd.s.float()


def ddrm_step(D, x, sigma, sigma_next, memory=None):
    """Your step, between the pictures and their coordinates."""
    parts = (svd.Vt(x), svd.Vt(D(x, sigma)), svd.Ut(noisy_y), weights)
    fresh = svd.Vt(torch.randn(x.shape, generator=chance))
    return svd.V(ddrm_coordinates(*parts, sigma, sigma_next, 0.1, 0.85, 1.0, fresh)), None


chance = generator(9)
sharp = sample(D_digits, TOP * draw(10, 10), GRID, ddrm_step)
assert psnr(sharp, few) > psnr(noisy_y, few) + 2
rows = {
    "digits": few,
    f"measured: {psnr(noisy_y, few):.1f} dB": noisy_y,
    f"A⁺ y: {psnr(lens.pinv(noisy_y), few):.1f} dB": lens.pinv(noisy_y),
    f"DDRM: {psnr(sharp, few):.1f} dB": sharp,
}
study.strip(list(rows.values()), list(rows), scale=4)

# %% [markdown]
# Good pictures; but are they samples of the *posterior*? One number with the prior $\mathcal N(0, 1)$, whose exact denoiser is
# $D(x, \sigma) = x / (1 + \sigma^2)$, measured as $y = 1.5$ with $\sigma_y = 0.5$: the posterior has the variance 0.2. DDRM's samples vary less,
# and the more steps it makes, the less they do: below $\sigma' = r$ each step forgets a part of what there was.

# %%
COUNTS, ones, chance = (10, 20, 40, 80, 160, 320), torch.ones(1).double(), generator(11)
spreads = []
for n in COUNTS:
    line = torch.randn(4000, 1, generator=chance, dtype=torch.float64) * TOP
    levels = karras(n, 0.002, TOP)
    for k in range(n):
        fresh = torch.randn(4000, 1, generator=chance, dtype=torch.float64)
        line = ddrm_coordinates(
            line, line / (1 + levels[k] ** 2), 1.5 * torch.ones_like(line), ones,
            levels[k], levels[k + 1], 0.5, 0.85, 1.0, fresh,
        )  # fmt: skip
    spreads.append(float(line.var()))
assert sorted(spreads, reverse=True) == spreads and spreads[0] < 0.2
fig, ax = plt.subplots(figsize=(6.4, 3.2))
ax.plot(COUNTS, spreads, "o-", color=COLOURS["model"], label="DDRM, η = 0.85")
ax.axhline(0.2, color=COLOURS["exact"], label="posterior")
ax.set(xlabel="steps", ylabel="variance of the samples", xscale="log", yscale="log")
ax.legend()
plt.show()

# %% [markdown] item="06.6"
# ILVR (Choi et al. 2021) wants a picture that *resembles* a reference: after a step to $\sigma'$ it takes the reference's low frequencies, at the
# noise level of $x'$, and keeps the high frequencies of $x'$:
#
# $$x' \leftarrow x' + \phi(y_t) - \phi(x'),\qquad y_t = \text{reference} + \sigma' z,\qquad \text{while } \sigma' \ge \text{until}.$$
#
# The filter $\phi = A^+ A$ puts the mean of each block of `factor` × `factor` pixels into all its pixels. `x` `(B, C, H, W)` is $x'$, the step
# having been made; return it as it is where $\sigma'$ is below `until`.


# %% item="06.6"
def refined(
    x: Tensor, reference: Tensor, sigma_next: Tensor, factor: int, until: float, z: Tensor
) -> Tensor:
    """x' with the low frequencies of the noised reference; reference and z of the shape of x."""
    ### BEGIN SOLUTION
    if sigma_next < until:
        return x
    small = torch.nn.functional.avg_pool2d(reference + sigma_next * z - x, factor)
    return x + small.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    ### END SOLUTION


# %% item="06.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
refined = check("06.6", refined)

# %% [markdown]
# Eight samples for one reference, with filters of three sizes, from the same noise. The larger the blocks, the less the reference says and
# the more the samples differ. (These digits were scanned with 8 × 8 pixels: means of 2 × 2 say all that there is to say.)

# %%
chosen = images[5:6].expand(8, -1, -1, -1)
drawn, spread = {}, {}
for size in (2, 4, 8):
    fresh, plain = SampleNoise(12), ddpm(SampleNoise(13))

    def ilvr_step(D, x, sigma, sigma_next, memory=None, size=size, fresh=fresh, plain=plain):
        x, _ = plain(D, x, sigma, sigma_next)
        return refined(x, chosen, sigma_next, size, 0.0, fresh(x)), None

    drawn[size] = sample(D_digits, TOP * draw(8, 14), GRID, ilvr_step)
    spread[size] = float(drawn[size].std(0).mean())
    assert torch.allclose(F.avg_pool2d(drawn[size], size), F.avg_pool2d(chosen, size), atol=1e-5)
assert spread[2] < spread[4] < spread[8]
study.strip(
    [chosen, *drawn.values()],
    ["reference", *(f"{size} × {size}: spread {spread[size]:.2f}" for size in drawn)],
    scale=4,
)

# %% [markdown] item="06.7"
# Why start from pure noise, when there is an estimate? "Come closer, diffuse faster" (Chung, Sim and Ye 2022) adds to it only the noise of a level
# in the middle, and goes down from there. Of the $n$ steps of the falling grid `sigmas`, `(n + 1,)`, the last $m = \operatorname{round}(t_0 n)$
# remain. Return the pair: $x = \text{estimate} + \sigma z$ at the first level $\sigma$ of what remains, and the grid that remains.


# %% item="06.7"
def closer(estimate: Tensor, sigmas: Tensor, t0: float, z: Tensor) -> tuple[Tensor, Tensor]:
    """Where the shortened run starts, of the shape of estimate (B, ...), and its levels."""
    ### BEGIN SOLUTION
    n = len(sigmas) - 1
    grid = sigmas[n - round(t0 * n) :]
    return estimate + grid[0] * z, grid
    ### END SOLUTION


# %% item="06.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
closer = check("06.7", closer)

# %% [markdown]
# Sixteen digits from their 4 × 4 means, by the null-space model. The estimate is the best linear one: it has learned from the training digits
# how all pixels hang together with these means. A grid of 24 steps, of which less and less is used. Dashed: as many steps of the same solver
# from pure noise. Its digits are sharper, and 5 dB worse: with so few means known they are often *another* digit. From too high a level
# the estimate is forgotten, from a low one its faults stay.

# %%
target, train = images[:16], seen.flatten(1)
y = coarse(target)
centre, inputs = train.mean(0), coarse(seen).flatten(1)
fit = torch.linalg.lstsq(inputs - inputs.mean(0), train - centre).solution
linear = (centre + (y.flatten(1) - inputs.mean(0)) @ fit).reshape(target.shape)
long = karras(24, 0.02, TOP)
D_coarse = null_space(D_digits, coarse, y)
curves = {"from the estimate": [], "from pure noise": []}
STEPS, results = (2, 4, 6, 12, 24), {}
for m in STEPS:
    x, rest = closer(linear, long, m / 24, draw(16, 15))
    results[m] = sample(D_coarse, x, rest, ddim)
    curves["from the estimate"].append(psnr(results[m], target))
    whole = sample(D_coarse, TOP * draw(16, 15), karras(m, 0.02, TOP), ddim)
    curves["from pure noise"].append(psnr(whole, target))
rows = {
    "digits": target,
    f"estimate: {psnr(linear, target):.1f} dB": linear,
    **{f"{m} steps: {psnr(results[m], target):.1f} dB": results[m] for m in (4, 24)},
}
study.strip([one[:10] for one in rows.values()], list(rows), scale=4)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, decibel), role, look in zip(
    curves.items(), ("model", "warn"), ("o-", "s--"), strict=True
):
    ax.plot(STEPS, decibel, look, color=COLOURS[role], label=name)
ax.axhline(psnr(linear, target), color=COLOURS["muted"], label="the estimate itself")
ax.set(xlabel="calls of the network", ylabel="PSNR, dB")
ax.legend()
plt.show()

# %% [markdown] item="06.8"
# What replacement paints into a hole often does not fit the rest: at the last levels it is too late to change it. RePaint (Lugmayr et al. 2022,
# Alg. 1) goes *back*: it adds noise to $x'$ at $\sigma'$ until it lies at an earlier level $\sigma$, and goes down again, now with a hole and
# surroundings that have seen each other,
#
# $$x \leftarrow x' + \sqrt{\sigma^2 - \sigma'^2}\;z.$$
#
# `levels` falls from $\sigma$ = `levels[0]` to $\sigma'$ = `levels[-1]`, where `x` lies; `down(x, levels[k], levels[k + 1])` is one step of the
# sampler, replacement and all. Jump back and go down through all levels once for each draw in `z` `(rounds, B, ...)`.


# %% item="06.8"
def resampled(down, x: Tensor, levels: Tensor, z: Tensor) -> Tensor:
    """x at levels[-1] after all rounds, (B, ...)."""
    ### BEGIN SOLUTION
    back = (levels[0] ** 2 - levels[-1] ** 2).sqrt()
    for fresh in z:
        x = x + back * fresh
        for k in range(len(levels) - 1):
            x = down(x, levels[k], levels[k + 1])
    return x
    ### END SOLUTION


# %% item="06.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
resampled = check("06.8", resampled)

# %% [markdown]
# Two numbers whose answer is known: $\mathcal N(0, 1)$ each, with the correlation 0.9, and the first one measured, $y = 1.5$ without noise. So the second
# is $\mathcal N(1.35, 0.19)$. Replacement alone is far off: $D$ takes the noised $y$ for less than it is worth, and the second number hears of
# it too late. The first rounds close a part of the gap; many more do not close the rest.

# %%
ROUNDS, chance, pair = (0, 1, 4, 16), generator(16), torch.eye(2).double() * 0.1 + 0.9
first = Mask(torch.tensor([[[True, False]]]))


def D_pair(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of the two numbers, (B, 1, 1, 2)."""
    return x @ torch.linalg.solve(pair + sigma**2 * torch.eye(2).double(), pair)


def fresh_pair(x: Tensor) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(x.shape, generator=chance, dtype=torch.float64)


def paint(D, operator, y: Tensor, x: Tensor, rounds: int, fresh) -> Tensor:
    """Replacement in stretches of three steps, each but the last repeated `rounds` times."""
    rule = replacement(ddpm(fresh), operator, y, fresh)

    def down(x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        with torch.no_grad():
            return rule(D, x, sigma, sigma_next)[0]

    for begin in range(0, 12, 3):
        levels = GRID[begin : begin + 4]
        for high, low in pairwise(levels):
            x = down(x, high, low)
        if rounds and levels[-1] > 0:
            x = resampled(down, x, levels, torch.stack([fresh(x) for _ in range(rounds)]))
    return x


blank = torch.zeros(2000, 1, 1, 2).double()
given = first(blank + 1.5)
second = {
    n: paint(D_pair, first, given, TOP * fresh_pair(blank), n, fresh_pair)[..., 1].flatten()
    for n in ROUNDS
}
gaps = [abs(float(x.mean()) - 1.35) for x in second.values()]
assert gaps[-1] < gaps[1] < gaps[0]
fig, ax = plt.subplots(figsize=(6.4, 3.4))
for (n, x), role in zip(second.items(), ("warn", "noise", "other", "model"), strict=True):
    name = {0: "replacement", 1: "1 round"}.get(n, f"{n} rounds")
    ax.hist(x, bins=60, density=True, histtype="step", color=COLOURS[role], label=name)
grey = torch.linspace(-2, 4, 200).double()
density = torch.distributions.Normal(1.35, 0.19**0.5).log_prob(grey).exp()
ax.plot(grey, density, color=COLOURS["exact"], label="exact")
ax.set(xlabel="the second number, given y = 1.5 for the first", ylabel="density")
ax.legend()
plt.show()

# %% [markdown]
# Digits of which the lower half is hidden, with three rounds more and without. A classifier reads thirty of them (± 9 %). Digits are small, and
# replacement joins their halves smoothly already: the rounds find other digits, not better ones.

# %%
half = Mask.half(SHAPE, "bottom")
some = images[:30]
rows = {"digits": some, "known": half(some)}
for rounds in (0, 3):
    x = paint(D_digits, half, half(some), TOP * draw(30, 17), rounds, SampleNoise(18))
    with torch.no_grad():
        share = float((reader(x).argmax(1) == labels[:30]).double().mean())
    assert torch.allclose(half(x), half(some))
    rows[f"{rounds} rounds: {share:.0%} read"] = x
study.strip([one[:10] for one in rows.values()], list(rows), scale=4)

# %% [markdown] item="06.9"
# A sampler of few steps can be *trained* to restore, end to end. Backpropagation keeps the activations of every step; invertible diffusion models
# (Chen et al. 2024) keep none, since they can run the sampler backwards. But a step $f$ has no inverse. Wired with the state before the last one
# it has: the pair (a, b) of the newest state and the one before becomes
#
# $$(a, b)\;\mapsto\;\big((1-v)\,f(a) + v\,b,\; a\big),\qquad 0 < v < 1,$$
#
# and the way back asks $f$ only about what is known. Return four things: what (a, b) becomes, and the pair that *becomes* (c, d).


# %% item="06.9"
def wired(
    f, a: Tensor, b: Tensor, c: Tensor, d: Tensor, v: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pair after (a, b), and the pair before (c, d), each of the shape of a."""
    ### BEGIN SOLUTION
    return (1 - v) * f(a) + v * b, a, d, (c - (1 - v) * f(d)) / v
    ### END SOLUTION


# %% item="06.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
wired = check("06.9", wired)

# %% [markdown]
# Digits from their 4 × 4 means once more, with steps that know $y$, wired with $v = 0.3$. This network was not trained for the wiring, and the
# share $v$ of b brings noise of an earlier level. So each $f$ aims beyond its level, at $t = (\sigma' - v\,\sigma_b)/(1 - v)$, and the mixture lies
# at $\sigma'$. First ahead; then, from the last pair alone, back to the noise from which it started. Nothing was stored on the way.

# %%
y, v = coarse(few), 0.3
D_few = null_space(D_digits, coarse, y)
start = TOP * draw(10, 18).double()


def step_of(k: int):
    """f of step k: DDIM with the null-space model; 64 bits for the state, 32 for the network."""
    aim = (GRID[k + 1] - v * GRID[max(k - 1, 0)]) / (1 - v)

    def f(a: Tensor) -> Tensor:
        with torch.no_grad():
            x0 = D_few(a.float(), GRID[k])
        return x0 + aim / GRID[k] * (a - x0)

    return f


a = b = start
for k in range(12):
    a, b, _, _ = wired(step_of(k), a, b, a, b, v)
made = a
for k in reversed(range(12)):
    _, _, a, b = wired(step_of(k), a, b, a, b, v)
assert float((a - start).abs().max()) < 1e-3
study.strip(
    [few, made, start / TOP, a / TOP],
    ["digits", "made", "start", "start, recovered"],
    scale=4,
)

# %% [markdown]
# What does it cost? The way back divides by $v$ at each step, and errors of rounding grow like $v^{-n}$. The exact sampler of
# $\mathcal N(0, 1)$ in 64 bits: a large $v$ can be undone, but leaves little of $f$. Therefore the library keeps a pair every few steps, and goes
# back from there.

# %%
DEPTHS = (3, 6, 12, 24, 48)
fig, ax = plt.subplots(figsize=(6.4, 3.4))
for weight, role, look in ((0.2, "warn", "s--"), (0.5, "model", "o-"), (0.8, "data", "^:")):
    errors = []
    for n in DEPTHS:
        levels = karras(n, 0.02, TOP)
        rates = [(1 + p * q) / (1 + p * p) for p, q in pairwise(levels)]
        a = b = start
        for rate in rates:
            a, b, _, _ = wired(lambda x, rate=rate: rate * x, a, b, a, b, weight)
        for rate in reversed(rates):
            _, _, a, b = wired(lambda x, rate=rate: rate * x, a, b, a, b, weight)
        errors.append(float((a - start).abs().max()) + 1e-17)
    ax.plot(DEPTHS, errors, look, color=COLOURS[role], label=f"v = {weight}")
ax.set(xlabel="steps", ylabel="error of the recovered start", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 07, where the network is asked what it thinks of the measurement.
