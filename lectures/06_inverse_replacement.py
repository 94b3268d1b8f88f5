# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 06 Inverse problems I: replacement and linear solvers
#
# **One prior for every broken picture.** A picture was measured: part of it is missing, it is blurred, it is small, it has no colours, it is a scan. One diffusion model, trained on whole pictures and on nothing else, restores them all. This lecture builds the measurements and the first family of solvers, which overwrite what was measured, and holds each against the exact posterior.
#
# After it you can
#
# - write a measurement as an operator, derive its adjoint, its pseudo-inverse and its null space, and test them;
# - overwrite what is known at the right noise level, and say why that is not enough;
# - go to the coordinates in which a linear measurement falls apart, and write DDRM, DDNM+ and SNIPS in them;
# - say which of these methods samples the posterior (one, in a limit), and by how much the others miss it;
# - start late from an estimate, reconstruct scans, and train a whole sampler end to end without storing it.
#
# You need lectures 01 to 03. Time: 90 minutes. Everything runs on a laptop, with no network.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from course_lib import bench_gmm, metrics, pyramid, study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.gaussians import Mixture
from course_lib.guidance import cfg
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.nets.reversible import Coupling
from course_lib.operators import (
    CT,
    JPEG,
    MRI,
    BlockAverage,
    Blur,
    GaussianNoise,
    Grey,
    LinearOperator,
    Mask,
    Matrix,
    cartesian_mask,
    gaussian_kernel,
    measure,
)
from course_lib.posterior import (
    come_closer,
    ddnm_plus,
    ddrm,
    ddrm_jpeg,
    ddrm_start,
    ilvr,
    mixed_projection,
    null_space,
    repaint,
    replacement,
    snips,
)
from course_lib.posterior.moments import Relay, moments
from course_lib.reversible import InvertibleSampler, SavedBytes
from course_lib.sample import sample
from course_lib.schedules import Linear, karras, uniform
from course_lib.steps import ddim, ddpm
from course_lib.worlds import digits
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo import inverse, invertible
from course_lib.zoo import pyramid as pyramids

torch.set_num_threads(1)
study.use()
F64 = torch.float64
D = zoo.load("scenes-prior", device="cpu")
shape, SIGMA_Y = (3, 32, 32), 0.05
digit_prior, digit = zoo.load("digits", device="cpu"), digits.load("test")[0]
pictures = SceneDataset(8, 61, 32).pictures(torch.arange(8))  # new ones


def grid(n=30):
    """Noise levels from 40 down to 0.01, then 0."""
    return karras(n, sigma_min=0.01, sigma_max=40.0)


def restore(step, n=30, seed=0, rows=8, start=None):
    """Pictures from noise by one solver."""
    sigmas = grid(n)
    x = SampleNoise(seed).start((rows, *shape), sigmas[0])
    x = x if start is None else start(x, sigmas[0])
    return sample(D, x, sigmas, step).clamp(-1, 1)


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Above, what was measured, with a little noise. Below, what one and the same network made of it. It was never told what a mask or a blur is.

# %% slideshow={"slide_type": "-"}
problems = {
    "a hole": Mask.box(shape, 12),
    "a quarter of the pixels": Mask.random(shape, 0.25, generator(1)),
    "4 × 4 means": BlockAverage(shape, 4),
    "blurred": Blur(gaussian_kernel(1.5), shape),
    "no colours": Grey(shape),
}
rows = {"truth": [], "measured": [], "restored": []}
for k, A in enumerate(problems.values()):
    x0 = pictures[k : k + 1]
    y = measure(A, x0, GaussianNoise(SIGMA_Y), generator(2, k))
    step = ddrm(A, y, SIGMA_Y, SampleNoise(3))
    found = restore(
        step, rows=1, start=lambda x, sigma, A=A, y=y: ddrm_start(x, sigma, A, y, SIGMA_Y)
    )
    shown = y if tuple(A.out) == shape else A.pinv(y)
    for row, one in zip(rows.values(), (x0, shown, found), strict=True):
        row.append(one[0])
study.strip(list(rows.values()), row_titles=list(rows), column_titles=list(problems), scale=4)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The problem
#
# A picture $x_0$ is measured by an operator $A$, with noise:
# $$y=A(x_0)+\sigma_y\,n,\qquad n\sim\mathcal N(0,I).$$
# Bayes' rule says all that can be known of $x_0$: the *posterior*
# $$p(x_0\mid y)\propto p(x_0)\;p(y\mid x_0).$$
# The prior $p(x_0)$ is the diffusion model, the likelihood $p(y\mid x_0)=\mathcal N(y;A(x_0),\sigma_y^2I)$ is known. To sample the posterior, lecture 04 says, add the gradient of $\log p(y\mid x)$ at each noise level. But at a noise level,
# $$p(y\mid x)=\int p(y\mid x_0)\,p(x_0\mid x)\,dx_0,$$
# an integral over all pictures that $x$ may hide. The methods of this lecture do not compute it: they *edit* $x$ or $D$ so that it agrees with $y$. Those of the next approximate it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Operators
#
# All of them need three things of a linear $A$:
#
# - the **adjoint** $A^\top$, defined by $\langle Ax,y\rangle=\langle x,A^\top y\rangle$. Reverse differentiation computes it of any code of $A$, for nothing else is backpropagation;
# - the **pseudo-inverse** $A^+$: of all $x$ that come closest to $y$, the shortest;
# - the two projections $A^+A$, onto what was measured, and $I-A^+A$, onto the **null space**, of which $y$ says nothing.
#
# Derive by default, override with the closed form:

# %% slideshow={"slide_type": "-"}
study.source(
    LinearOperator.adjoint, LinearOperator.solve, LinearOperator.pinv, LinearOperator.project
)

# %% slideshow={"slide_type": "-"}
scan = cartesian_mask(32, 32, 4.0, generator(3))
every = {**problems, "MRI": MRI((1, 32, 32), scan), "CT": CT((1, 32, 32), 12)}
for name, A in every.items():
    x, y = (torch.randn(1, *size, generator=generator(4), dtype=F64) for size in (A.shape, A.out))
    gap = float((A(x) * y).sum() - (x * A.adjoint(y)).sum())
    numbers = f"{math.prod(A.shape)} numbers become {math.prod(A.out)}"
    print(f"{name:24s} {numbers:32s} <Ax, y> - <x, A'y> = {gap:8.1e}, norm {A.norm(20):.3f}")
    assert abs(gap) < 1e-9

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Replacement
#
# The first idea (Song et al. 2021, App. I): sample as ever, and after each step, from the level $\sigma$ to the next one $\sigma'$, put what was measured into the new $x'$. *At the noise level of $x'$*: a clean $y$ in a noisy $x'$ is something that the network never saw. With $z\sim\mathcal N(0,I)$ fresh noise,
# $$x'\leftarrow x'+A^+\big(y_t-A\,x'\big),\qquad y_t=y+\sqrt{\sigma'^2-\sigma_y^2}\;A z .$$

# %% slideshow={"slide_type": "-"}
study.source(replacement)

# %% [markdown] slideshow={"slide_type": "slide"}
# Is what comes out a sample of the posterior? On a Gaussian prior everything is known: $D$ is affine, so is each step, and mean and covariance of the result follow *exactly*, step by step, with no samples at all. Two neighbours with correlation 0.8, the first measured without noise:

# %% slideshow={"slide_type": "-"}
prior = Mixture.gaussian(
    torch.zeros(2, dtype=F64), torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=F64)
)
first, y = Matrix(torch.tensor([[1.0, 0.0]], dtype=F64)), torch.tensor([[1.5]], dtype=F64)
truth = prior.posterior(first.A, y, 0.0)
steps = (5, 10, 20, 50, 100, 300)
cures = {
    "replacement": lambda noise: replacement(ddim, first, y, noise),
    "with noise (DDPM)": lambda noise: replacement(ddpm(noise), first, y, noise),
    "RePaint, 5 times": lambda noise: repaint(ddpm(noise), first, y, noise, jump=1, resamplings=5),
}
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.2))
ends = {}
for (name, make), colour in zip(cures.items(), ("model", "guide", "noise"), strict=True):
    found = []
    for n in steps:
        noise, sigmas = Relay(), karras(n, 0.01, 40.0)
        start = torch.zeros(2, dtype=F64), 40.0**2 * torch.eye(2, dtype=F64)
        mean, cov = moments(make(noise), prior.denoiser, noise, sigmas, *start)
        found.append((float(mean[1]), float(cov[1, 1])))
    ends[name] = found[-1]
    for ax, values in zip(axes, zip(*found, strict=True), strict=True):
        ax.semilogx(steps, values, "o-", color=study.COLOURS[colour], label=name)
for ax, exact, title in zip(
    axes, (truth.mean[1], truth.cov[1, 1]), ("mean", "variance"), strict=True
):
    ax.axhline(float(exact), color=study.COLOURS["exact"], linestyle="--", label="exact posterior")
    ax.set(xlabel="steps", ylabel=f"its {title}")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=10)
plt.show()
off = {name: abs(mean - float(truth.mean[1])) for name, (mean, _) in ends.items()}
print(", ".join(f"{name}: mean off by {gap:.2f}" for name, gap in off.items()), "in 300 steps")
assert off["RePaint, 5 times"] < 0.15 < 0.4 < off["with noise (DDPM)"] < off["replacement"]

# %% [markdown]
# Replacement leaves the unmeasured neighbour too near to the mean of the prior, and too widely spread: each step moves it by what $D$ makes of both, and the measured one is exchanged only *after* the step. More steps do not mend it. RePaint comes nearer, for five times the calls: go back up, and down again, so that both parts get to know each other.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## RePaint: go back and ask again
#
# After some steps, add the noise of these steps again, $x\leftarrow x'+\sqrt{\sigma^2-\sigma'^2}\,z$, and repeat them (Lugmayr et al. 2022). *Claim*: where the prior has two modes and the known part says which, replacement decides the rest too early and leaves a seam; RePaint's is smaller, on three seeds.

# %% slideshow={"slide_type": "-"}
twins = Mixture.isotropic(torch.tensor([[-2.0, -2.0], [2.0, 2.0]], dtype=F64), 0.3)
y = torch.tensor([[2.0]], dtype=F64)
sigmas, clouds = karras(24, 0.01, 10.0), {}
for seed in range(3):
    wrong = []
    for name, resamplings in (("replacement", 1), ("RePaint, 6 times", 6)):
        begin = SampleNoise(seed).start((1000, 2), sigmas[0], dtype=F64)
        step = repaint(
            ddpm(SampleNoise(10 + seed)), first, y, SampleNoise(20 + seed), 4, resamplings
        )
        clouds[name] = sample(twins.denoiser, begin, sigmas, step)
        wrong.append(float((clouds[name][:, 1] < 0).double().mean()))
    print(
        f"seed {seed}: in the wrong mode {wrong[0]:.1%} by replacement, {wrong[1]:.1%} by RePaint"
    )
    assert wrong[0] > 0.005 and wrong[1] < wrong[0] / 2
fig, axes = plt.subplots(1, 2, figsize=(6.4, 3))
for ax, (name, cloud) in zip(axes, clouds.items(), strict=True):
    study.density(ax, twins.log_prob, (-3.5, 3.5, -3.5, 3.5), levels=7)
    ax.axvline(2.0, color=study.COLOURS["muted"], linewidth=1, linestyle="--")
    study.scatter(ax, cloud, colour=study.COLOURS["model"], size=4)
    ax.set(
        title=name, xlabel="measured, 2", ylabel="to be found", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5)
    )
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## ILVR: only the low frequencies
#
# ILVR (Choi et al. 2021) replaces not pixels but what a low-pass filter $\phi$ leaves of them: the coarse is the reference's, the fine is the model's. With $A$ a block average, $\phi=A^+A$ is a projection, and afterwards the low frequencies *are* the reference's, exactly. *Claim*: the coarser the filter, the more freedom.

# %% slideshow={"slide_type": "-"}
reference = pictures[3:4]
rows, freedom = {"reference": [reference[0]] * 4}, {}
for factor in (2, 4, 8):
    low = BlockAverage(shape, factor)
    found = restore(ilvr(ddpm(SampleNoise(5)), low, reference, SampleNoise(6)), rows=4)
    rows[f"{factor} × {factor} means"] = list(found)
    freedom[factor] = float(found.std(0).mean())
    shared = metrics.psnr(low.pinv(low(found)), low.pinv(low(reference)).expand_as(found))
    print(
        f"{factor} x {factor}: deviation among the four {freedom[factor]:.3f}; low frequencies agree to {shared:.0f} dB"
    )
assert freedom[2] < freedom[4] < freedom[8]
study.strip(list(rows.values()), row_titles=list(rows), scale=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Coordinates in which a measurement falls apart
#
# $A=U\operatorname{diag}(s)V^\top$. In the coordinates $\bar x=V^\top x$ and $\bar y_i=(U^\top y)_i/s_i$ every measurement is a list of separate ones,
# $$\bar y_i=\bar x_i+r_i\,n_i,\qquad r_i=\sigma_y/s_i,$$
# each with a noise of its own, and infinite where $s_i=0$. Now compare: the sampler's $x$ at level $\sigma$ is $\bar x_i+\sigma\epsilon_i$. Where $\sigma\ge r_i$, the measurement is the better of the two; below, the sampler is.

# %% slideshow={"slide_type": "-"}
fig, ax = plt.subplots(figsize=(6.4, 3))
for (name, A), colour in zip(
    problems.items(), ("data", "noise", "model", "warn", "guide"), strict=True
):
    s = A.svd().s
    padded = torch.cat([s.sort(descending=True).values, torch.zeros(math.prod(shape) - len(s))])
    ax.plot(
        torch.linspace(0, 1, len(padded)),
        padded,
        label=name,
        color=study.COLOURS[colour],
        linewidth=2,
    )
ax.set(xlabel="share of the coordinates", ylabel="singular value")
fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=9)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# **DDRM** (Kawar et al. 2022) makes three cases of it. With $\bar x_0$ the coordinates of $D(x,\sigma)$, $\epsilon=(\bar x-\bar x_0)/\sigma$ and $z$ fresh noise:
# $$\bar x'_i=\begin{cases}\bar x_{0,i}+\sigma'\big(\sqrt{1-\eta^2}\,\epsilon_i+\eta z_i\big)&\text{not measured, }s_i=0\\[2pt]\bar x_{0,i}+\sigma'\big(\sqrt{1-\eta^2}\,(\bar y_i-\bar x_{0,i})/r_i+\eta z_i\big)&\text{measured worse than }\sigma',\ \sigma'<r_i\\[2pt](1-\eta_b)\,\bar x_{0,i}+\eta_b\,\bar y_i+\sqrt{\sigma'^2-\eta_b^2r_i^2}\,z_i&\text{measured better, }\sigma'\ge r_i\end{cases}$$
# $\eta$ is the share of fresh noise, $\eta_b$ how far a good measurement is believed.

# %% slideshow={"slide_type": "-"}
study.source(ddrm)

# %% [markdown] slideshow={"slide_type": "slide"}
# What does it sample? One coordinate, $x_0\sim\mathcal N(0,1)$, $\sigma_y=0.5$, $y=1.5$: the posterior is $\mathcal N(1.2,\,0.2)$. *Claim*: DDRM's variance is far too small, and *more steps make it worse*.

# %% slideshow={"slide_type": "-"}
one, seen = (
    Mixture.gaussian(torch.zeros(1, dtype=F64), torch.ones(1, 1, dtype=F64)),
    torch.tensor([[1.5]], dtype=F64),
)
unit = Matrix(torch.ones(1, 1, dtype=F64))
exact = one.posterior(unit.A, seen, 0.5)


def narrow(x, sigma):
    """The denoiser of N(0, 1)."""
    return x / (1 + sigma**2)


def moments_of(make, n, low=0.002):
    """Mean and variance of what a solver draws in n steps of equal ratio, exactly."""
    noise = Relay()
    levels = torch.cat(
        [torch.logspace(math.log10(80), math.log10(low), n, dtype=F64), torch.zeros(1, dtype=F64)]
    )
    start = torch.zeros(1, dtype=F64), torch.full((1, 1), 80.0**2, dtype=F64)
    mean, cov = moments(make(noise), narrow, noise, levels, *start)
    return float(mean), float(cov)


steps = (5, 10, 20, 50, 100, 300, 1000)
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), sharex=True)
kinds = {
    "η = 0.85, η_b = 1": lambda noise: ddrm(unit, seen, 0.5, noise),
    "η = 0.5, η_b = 1": lambda noise: ddrm(unit, seen, 0.5, noise, eta=0.5),
    "η = 1, η_b = 0.5": lambda noise: ddrm(unit, seen, 0.5, noise, eta=1.0, eta_b=0.5),
    "DDNM+": lambda noise: ddnm_plus(unit, seen, 0.5, noise),
}
found = {name: [moments_of(make, n) for n in steps] for name, make in kinds.items()}
for (name, values), colour in zip(found.items(), ("model", "guide", "noise", "data"), strict=True):
    for ax, of in zip(axes, zip(*values, strict=True), strict=True):
        ax.semilogx(steps, of, "o-", color=study.COLOURS[colour], label=name)
for ax, value, title in zip(axes, (exact.mean, exact.cov), ("mean", "variance"), strict=True):
    ax.axhline(float(value), color=study.COLOURS["exact"], linestyle="--", label="exact posterior")
    ax.set(xlabel="steps", ylabel=title)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
plt.show()
few, many = (found["η = 0.85, η_b = 1"][steps.index(n)][1] for n in (20, 1000))
print(f"variance in 20 steps {few:.3f}, in 1,000 steps {many:.3f}, exact {float(exact.cov):.3f}")
assert abs(few - 0.043) < 5e-4 and abs(many - 0.002) < 5e-4

# %% [markdown]
# Why? Below $r$ every step pulls $x$ a little toward $y$, by the share $\sqrt{1-\eta^2}\,\sigma'/r$, as if $y$ had been measured anew. More steps are more pulls: the mean goes to $y=1.5$, past the posterior's 1.2, and the variance to 0. Without the pull, $\eta=1$, many steps forget $y$ and drift back to the prior. DDRM restores; it does not say how sure one may be.

# %% [markdown] slideshow={"slide_type": "slide"}
# **JPEG.** Rounding is not linear: there is no SVD. But a decoder is a pseudo-inverse, encode(decode($y$)) = $y$, and that is all that the pull toward $y$ needs: $x_0+\eta_b\,(\mathrm{decode}(y)-\mathrm{decode}(\mathrm{encode}(x_0)))$ (Kawar et al. 2022). *Claim*: at least 2 dB nearer to the truth than the decoded file, on three seeds.

# %% slideshow={"slide_type": "-"}
compressed = JPEG(shape, 8)
y = compressed(pictures)
decoded = compressed.decode(y).clamp(-1, 1)
late = karras(
    20, sigma_min=0.01, sigma_max=0.3
)  # what the file says hides under less noise than a hole does
for seed in range(3):
    with torch.no_grad():
        begin = decoded + late[0] * SampleNoise(seed)(decoded)
        repaired = sample(D, begin, late, ddrm_jpeg(compressed, y, SampleNoise(10 + seed))).clamp(
            -1, 1
        )
    before, after = (metrics.mean_psnr(x, pictures) for x in (decoded, repaired))
    print(f"seed {seed}: decoded {before:.2f} dB, repaired {after:.2f} dB")
    assert after > before + 2
study.strip(
    [pictures[:3], decoded[:3], repaired[:3]],
    row_titles=["truth", "JPEG, quality 8", "repaired"],
    scale=3,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## SNIPS: a chain that does sample it, in the limit
#
# SNIPS (Kawar et al. 2021) writes the score of $p(x\mid y)$ itself in these coordinates: the noise of $x$ and that of $y$ are parts of one another, so that below $r_i$ the measurement of $x$ has the variance $r_i^2-\sigma^2$. Langevin steps on it converge to the posterior, if they are small and many:

# %% slideshow={"slide_type": "-"}
gaps = []
for inner, low in ((1, 0.1), (10, 0.1), (100, 0.03), (1000, 0.01)):
    mean, variance = moments_of(
        lambda noise, n=inner: snips(unit, seen, 0.5, noise, 0.4, n), 12, low
    )
    gaps.append(max(abs(mean - 1.2), abs(variance - 0.2)))
    print(f"{inner:4d} moves at each of 12 levels, the last {low:4.2f}:", end=" ")
    print(f"mean {mean:.3f}, variance {variance:.3f}; exact 1.200, 0.200")
assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.01

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The null space
#
# DDNM (Wang et al. 2023) says it in one line: from $y$ take what $y$ knows, from $D$ the rest.
# $$D'(x,\sigma)=A^+y+(I-A^+A)\,D(x,\sigma)$$
# It wraps a *Denoiser*, so that every sampler takes it. *Claim*: without noise the measurement holds to rounding. With noise it copies the noise into the picture; DDNM+ takes only as much of $y$ as the noise of the step can hide.

# %% slideshow={"slide_type": "-"}
study.source(null_space)

# %% slideshow={"slide_type": "-"}
A = BlockAverage(shape, 4)
y = A(pictures)
sigmas = grid(20)
begin = SampleNoise(0).start((len(pictures), *shape), sigmas[0])
with torch.no_grad():
    exactly = sample(null_space(D, A, y), begin, sigmas, ddim)
print(f"largest |A x - y| without noise: {float((A(exactly) - y).abs().max()):.1e}")
assert float((A(exactly) - y).abs().max()) < 1e-5
noisy = measure(A, pictures, GaussianNoise(0.2), generator(7))
with torch.no_grad():
    copied = sample(null_space(D, A, noisy), begin, sigmas, ddpm(SampleNoise(1))).clamp(-1, 1)
    mended = sample(D, begin, sigmas, ddnm_plus(A, noisy, 0.2, SampleNoise(1))).clamp(-1, 1)
for name, found in (("DDNM", copied), ("DDNM+", mended)):
    print(f"{name:6s} at σ_y = 0.2: {metrics.psnr(found, pictures):.2f} dB")
assert metrics.psnr(mended, pictures) > metrics.psnr(copied, pictures)
study.strip(
    [pictures[:3], A.pinv(noisy)[:3], copied[:3], mended[:3]],
    row_titles=["truth", "means, σ_y = 0.2", "DDNM", "DDNM+"],
    scale=3,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Scans
#
# MRI measures a part of the Fourier coefficients, CT the sums along lines. Both are linear, and a model that never saw a scan helps with both (Song et al. 2022). *Claim*: at a quarter of the frequencies, and at 12 angles, at least 3 dB over zero-filling and over filtered back-projection, within the circle that is seen from all sides.


# %% slideshow={"slide_type": "-"}
def scanned(A, classic, lam):
    """The classical picture and the model's; each colour is a scan of its own."""
    y = measure(A, pictures, GaussianNoise(0.01), generator(8))
    with torch.no_grad():
        found = restore(mixed_projection(ddpm(SampleNoise(2)), A, y, SampleNoise(3), lam), 40)
    return classic(A, y).clamp(-1, 1), found


across = torch.linspace(-1, 1, 32)
circle = (across[:, None] ** 2 + across**2) < 0.94  # what the scanner sees from all sides
scans = {
    "MRI": (MRI(shape, scan), lambda A, y: A.adjoint(y), 1.0),
    "CT": (CT(shape, 12), lambda A, y: A.fbp(y), 0.7),
}
rows = {"truth": pictures[:3]}
for name, (A, classic, lam) in scans.items():
    plain, found = scanned(A, classic, lam)
    before, after = (metrics.psnr(x[..., circle], pictures[..., circle]) for x in (plain, found))
    print(f"{name}: {before:.1f} dB without a model, {after:.1f} dB with it")
    assert after > before + 3
    rows[f"{name}, classical"], rows[f"{name}, restored"] = plain[:3], found[:3]
study.strip(list(rows.values()), row_titles=list(rows), scale=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Come closer, diffuse faster
#
# Who has an estimate need not start from noise. CCDF (Chung et al. 2022) puts noise of a middle level on it and walks only the rest of the way: the reverse steps contract, so that an error of the start is forgotten, up to a point. *Claim*: at the same spacing, at most a third of the calls, and the PSNR within 0.1 dB of the full run's.

# %% slideshow={"slide_type": "-"}
A = BlockAverage(shape, 4)
full = uniform(Linear(), 60)  # DDPM's, even in the time
y = measure(A, pictures, GaussianNoise(SIGMA_Y), generator(9))
solver = ddnm_plus(A, y, SIGMA_Y, SampleNoise(4))
quality = {}
for t0 in (1.0, 1 / 3, 0.2, 0.05):
    with torch.no_grad():
        x, levels = come_closer(A.pinv(y), full, t0, SampleNoise(5))
        quality[t0] = metrics.psnr(sample(D, x, levels, solver).clamp(-1, 1), pictures)
    print(f"from σ = {levels[0]:7.3f}, {len(levels) - 1:2d} calls: {quality[t0]:.2f} dB")
assert quality[1 / 3] > quality[1.0] - 0.1

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From coarse to fine
#
# The same start serves a model of *its own* small pictures. **Pyramidal diffusion** (Ryu and Ye 2022) trains one network on pictures of 8, 16 and 32 pixels. It is told where in the picture each pixel lies, as sines and cosines: neighbours that lie far apart belong to a small picture. It draws 8 × 8 pixels from noise, and twice enlarges, adds noise that hides what is missing, and walks the rest of the way. How much noise was chosen on other pictures: σ = 4.8, which hides much of what the small picture said, too. The ground stays, the thing on it is drawn again.

# %% slideshow={"slide_type": "-"}
study.source(pyramid.refine)

# %% slideshow={"slide_type": "-"}
P = zoo.load("scenes-pyramid", device="cpu")
begin = pyramids.rows("sampling")[0]["start"]
with torch.no_grad():
    stages = pyramids.grids(begin)
    small = sample(P, SampleNoise(2).start((5, 3, 8, 8), 40.0), stages[0], dpm_solver_pp_2m)
    middle = pyramid.refine(P, small, stages[1:2], SampleNoise(3), dpm_solver_pp_2m)
    large = pyramid.refine(P, middle, stages[2:], SampleNoise(4), dpm_solver_pp_2m)
views = [F.interpolate(x.clamp(-1, 1), (32, 32)) for x in (small, middle, large)]
study.strip(views, row_titles=["8 × 8", "16 × 16", "32 × 32"], scale=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*, on three seeds (`python -m course_lib.zoo.pyramid`): it costs less than half of drawing at full size with the same network, in floating-point operations, and the pictures are nearer to real ones, also than those of as few operations at full size.
#
# Not every part of a method earns its place everywhere. Below, the network is trained for 1,000 steps with and without its positions: *without* them it denoises better, at each size. It sees whole pictures here, whose size it can tell in other ways, and twelve channels of sines beside three of picture have to be learned to be left alone.

# %% slideshow={"slide_type": "-"}
ways = {}
for row in pyramids.rows("sampling"):
    ways.setdefault(row["way"], []).append(row)
for way, runs in ways.items():
    distance = ", ".join(f"{run['frechet']:.3f} ± {run['error']:.3f}" for run in runs)
    steps = ", ".join(f"{n} at {size} px" for size, n in runs[0]["steps"].items())
    print(
        f"{way:17s} {runs[0]['flops'] / 1e9:.2f} GFLOP a picture ({steps}): Fréchet distance {distance}"
    )
for fine, full in zip(ways["coarse to fine"], ways["full"], strict=True):
    assert fine["flops"] < 0.5 * full["flops"]
    assert fine["frechet"] < full["frechet"]
for fine, few in zip(ways["coarse to fine"], ways["full, equal cost"], strict=True):
    assert fine["frechet"] < few["frechet"]
told = {}
for row in pyramids.rows("positions"):
    told.setdefault(row["positioned"], []).append(row["psnr"])
for positioned, runs in told.items():
    quality = "; ".join(
        f"{size} px " + ", ".join(f"{run[size]:.2f}" for run in runs) for size in runs[0]
    )
    print(f"{'with' if positioned else 'without':7s} positions, denoised to {quality} dB")

# %% [markdown] slideshow={"slide_type": "slide"}
# And who has *measured* a small picture enlarges it in the same way, its means held by DDNM's projection at every size: super-resolution by two and by four with one network. *Claim*: the mean of four samples beats bicubic enlargement in PSNR, also where that is brought to the measured means.

# %% slideshow={"slide_type": "-"}
for factor in (2, 4):
    runs = [row for row in pyramids.rows("enlarging") if row["factor"] == factor]
    for name in runs[0]["psnr"]:
        print(
            f"x{factor}, {name:30s} "
            + ", ".join(f"{run['psnr'][name]:.2f}" for run in runs)
            + " dB"
        )
    for run in runs:
        assert (
            run["psnr"]["mean"]
            > run["psnr"]["bicubic, its means as measured"]
            > run["psnr"]["bicubic"]
        )
y = F.avg_pool2d(pictures, 4)
found = pyramids.enlarged(P, y, runs[0]["start"], seed=0)
shown = {
    "truth": pictures,
    "8 × 8 means": F.interpolate(y, (32, 32)),
    "bicubic": pyramids.bicubic(y)[0],
    "a sample": found[0],
    "mean of four": found.mean(0),
}
study.strip([x[:3] for x in shown.values()], row_titles=list(shown), scale=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Train the sampler, not only the denoiser
#
# For one kind of measurement one can do better than to reuse a prior: train *all steps together*, end to end, from $y$ to the picture. Backpropagation then keeps the activations of all steps. **Invertible diffusion models** (Chen et al. 2024) wire the steps so that they can be run *backwards*, and recompute what was not kept: $x_{k+1}=(1-v)\,\mathrm{step}(x_k)+v\,x_{k-1}$ gives $x_{k-1}$ back.

# %% slideshow={"slide_type": "-"}
study.source(Coupling)

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*: the gradients are those of plain backpropagation of the same wired network, and what is saved no longer grows with the number of steps. Below it, digits from 64 Gaussian measurements of their 256 pixels, three steps, before and after 30 batches of such training, three seeds (`python -m course_lib.zoo.invertible`).

# %% slideshow={"slide_type": "-"}
saved = {}
for n in (3, 12, 48):
    for plain in (True, False):
        levels = torch.cat([torch.linspace(0.6, 0.05, n, dtype=F64), torch.zeros(1, dtype=F64)])
        cs = invertible.problem(0)
        model = InvertibleSampler(digit_prior, levels, cs, v=0.2, stored=plain)
        with SavedBytes(model.parameters()) as kept:
            model(y=cs(digit[:1])).square().mean().backward()
        saved[n, plain] = kept.peak
    print(
        f"{n:2d} steps: plain {saved[n, True] / 1e6:6.2f} MB, reversible {saved[n, False] / 1e6:5.2f} MB"
    )
assert abs(saved[48, False] / saved[3, False] - 1) < 0.05 < saved[48, True] / saved[3, True] - 10
for row in invertible.rows():
    print(
        f"seed {row['seed']}: A⁺y {row['start']:.2f} dB, before {row['before']:.2f} dB, after {row['after']:.2f} dB"
    )
    assert row["after"] > row["before"] + 1

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it

# %% slideshow={"slide_type": "-"}
study.InverseExplorer(D, pictures, low=0.01, high=40.0)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Side by side
#
# Every solver with 20 calls of the network, each at the best of four settings on validation pictures; 64 held-out scenes, three seeds with three samples each (`python -m course_lib.zoo.inverse`). Two numbers, since there are two questions. *How near?* PSNR; of the mean of the samples beside it, since a classical method aims at the mean. *How alike, as a set?* Fréchet distance.

# %% slideshow={"slide_type": "-"}
HERE = (
    "replacement",
    "RePaint",
    "ILVR",
    "mixed projection",
    "DDRM",
    "DDNM",
    "DDNM+",
    "SNIPS",
    "CCDF",
)
kinds = list(
    dict.fromkeys(row["problem"] for row in inverse.rows("solvers") if row["world"] == "scenes")
)
table = {}
for row in inverse.rows("solvers"):
    if row["world"] == "scenes" and row["solver"] in ("classical", *HERE) and "psnr" in row:
        table.setdefault((row["solver"], row["problem"]), []).append(row)


def mean(rows, key):
    """Over the seeds."""
    return sum(row[key] for row in rows) / len(rows)


print(f"{'':17s}" + "".join(f"{kind:>24s}" for kind in kinds))
for solver in dict.fromkeys(solver for solver, _ in table):
    cells = []
    for kind in kinds:
        rows = table.get((solver, kind))
        said = (
            "-"
            if rows is None
            else f"{mean(rows, 'psnr'):.1f} ({mean(rows, 'psnr_of_mean'):.1f}) dB, {mean(rows, 'frechet'):.2f}"
        )
        cells.append(f"{said:>24s}")
    print(f"{solver:17s}" + "".join(cells))

# %% [markdown] slideshow={"slide_type": "slide"}
# Read the table with what was derived above. Methods that divide by singular values (replacement and its kin, by $A^+$) cannot deblur: a blur has values near 0, and noise over nearly 0 is more noise. DDRM asks first which of the two knows more, and works on all five. Where the means or the blur say something of every pixel, a model gains decibels. In the hole, which leaves much open, the classical filling is nearer *on average*, for it paints the mean of all that is possible, a smudge: as a set its pictures are farther from pictures. A quarter of the pixels, scattered, tell a smooth filling enough, and twenty steps of these solvers too little: there they lose on both counts, and lecture 07 will come back to it.

# %% slideshow={"slide_type": "-"}
best = {}
for kind in kinds:
    others = [rows for (solver, of), rows in table.items() if of == kind and solver != "classical"]
    plain = table["classical", kind]
    gain = max(mean(rows, "psnr_of_mean") for rows in others) - mean(plain, "psnr")
    alike = mean(plain, "frechet") / min(mean(rows, "frechet") for rows in others)
    best[kind] = gain, alike
    print(f"{kind:17s} mean of samples {gain:+.1f} dB beside the classical,", end=" ")
    print(f"whose Fréchet distance is {alike:.1f} times the best")
assert all(best[kind][0] > 2 for kind in ("super-resolution", "deblurring"))
assert best["box"][1] > 1.5

# %% [markdown] slideshow={"slide_type": "slide"}
# ## And the posterior?
#
# The truth of the picture is one sample of the posterior. The test that no picture can pass or fail is against the *exact* posterior: mixtures of 25 Gaussians in 8 dimensions, measured in 1, 2 and 4 of them with noise, 20 problems each (the setting of Cardoso et al. 2023; `course bench gmm`). Sliced Wasserstein distance to exact samples; its floor is what two exact sets are apart.

# %% slideshow={"slide_type": "-"}
cells = {
    (row["solver"], row["d_y"]): row
    for row in bench_gmm.rows(d_x=8, levels=20)
    if row["solver"] in ("exact", "prior", *HERE)
}
print("d_x = 8: distance, and how much of the weight lies in the wrong modes")
print(f"{'':12s}" + "".join(f"{f'd_y = {d_y}':>20s}" for d_y in bench_gmm.D_Y))
for solver in dict.fromkeys(solver for solver, _ in cells):
    found = [cells[solver, d_y] for d_y in bench_gmm.D_Y]
    said = "".join(f"{row['w1']:7.2f} ± {row['reach']:4.2f}, {row['tv']:3.0%}" for row in found)
    print(f"{solver:12s}{said}")
for d_y in bench_gmm.D_Y:
    floor, nothing = cells["exact", d_y]["w1"], cells["prior", d_y]["w1"]
    for solver in {solver for solver, _ in cells} - {"exact", "prior"}:
        assert 5 * floor < cells[solver, d_y]["w1"] < nothing, solver

# %% [markdown]
# They look at $y$, and beat the prior. None comes near the floor, and the *shares of the modes*, which are settled at high noise, are far from the posterior's: a third to two thirds of the weight lies in the wrong ones. The particles of lecture 07 will do better.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# **A clean $y$ in a noisy $x$.** $A^+y$ without $y_t$'s noise, or with $\sigma$ in place of $\sigma'$: it runs, and the rest of the picture is drawn for a neighbour that the network never saw.


# %% slideshow={"slide_type": "-"}
def clean(step, A, y):
    """Replacement that forgets the noise."""

    def replaced(D, x, sigma, sigma_next, memory=None):
        x, _ = step(D, x, sigma, sigma_next)
        return A.project(x, y), None

    return replaced


A = problems["a hole"]
y = A(pictures)
hidden, errors = ~A.observed, []
for seed in range(3):
    with torch.no_grad():
        forgot = restore(clean(ddpm(SampleNoise(seed)), A, y), 20, seed)
        knew = restore(replacement(ddpm(SampleNoise(seed)), A, y, SampleNoise(9 + seed)), 20, seed)
    errors.append([float((x - pictures)[:, hidden].square().mean().sqrt()) for x in (forgot, knew)])
    print(
        f"error in the hole: {errors[-1][0]:.3f} with a clean y, {errors[-1][1]:.3f} at its level"
    )
assert all(clean_y > at_level for clean_y, at_level in errors)
study.strip(
    [pictures[:3], forgot[:3], knew[:3]], row_titles=["truth", "clean y", "its level"], scale=3
)

# %% [markdown]
# **$A^\top$ for $A^+$.** For a mask they are the same, so that it works, until the first block average, whose $A^\top$ is sixteen times too small.  **Noise that is taken for none**: $\sigma_y=0$ in DDNM copies it. And what cannot work says so:

# %% slideshow={"slide_type": "-"}
wrong = {
    "nonlinear": lambda: replacement(ddim, JPEG(shape, 50), pictures, SampleNoise(0)),
    "another size": lambda: ddrm(BlockAverage(shape, 4), pictures, 0.05, SampleNoise(0)),
    "no noise": lambda: snips(
        BlockAverage(shape, 4), pictures[:, :, ::4, ::4], 0.0, SampleNoise(0)
    ),
    "no SVD": lambda: ddrm(CT(shape, 4), torch.zeros(1, 3, 4, 32), 0.05, SampleNoise(0)),
}
for name, call in wrong.items():
    try:
        call()
    except ValueError as error:
        print(f"{name}: {error}")
    else:
        raise AssertionError(f"{name}: no error")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# A mask of the picture is, nearly, a mask of the latents, so that replacement and RePaint inpaint with a text-to-image model that was never trained to. Here on Stable Diffusion where its weights are, else on the course's model: the lower right is to be drawn anew.

# %%
SETTINGS = {
    "stable-diffusion-1.5": ("a cat on a bench", 30),
    "mini-sd": ("a large red cone on grass", 30),
}
name = next(name for name in SETTINGS if zoo.available(name))
model, (prompt, n) = zoo.load(name), SETTINGS[name]
size = model.pixels
picture = SceneDataset(6, 51, size).pictures(torch.tensor([2])).to(model.device)
with torch.no_grad():
    known = model.encode(picture)
    keep = torch.ones(1, *known.shape[-2:], dtype=torch.bool)
    keep[:, known.shape[-2] // 4 :, known.shape[-1] // 4 : -known.shape[-1] // 4] = False
    A = Mask(keep.to(model.device), tuple(known.shape[1:]))
    ask = cfg(*(model.denoiser.given(**model.embed([text])) for text in (prompt, "")), 3.0)
    sigmas = model.sigmas(n)
    shown = {"picture": picture[0]}
    for title, k in (("replacement", 1), ("RePaint", 4)):
        begin = model.start(SampleNoise(1)(known), sigmas[0])
        step = repaint(ddpm(SampleNoise(2)), A, A(known), SampleNoise(3), 1, k)
        shown[title] = model.decode(model.finish(sample(ask, begin, sigmas, step), sigmas[-1]))[0]
study.grid([x.float().cpu() for x in shown.values()], titles=list(shown), scale=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - Adjoint, pseudo-inverse, null space: derive them from the code of $A$, test $\langle Ax,y\rangle=\langle x,A^\top y\rangle$.
# - What is put into a noisy $x$ must be as noisy as $x$.
# - In the SVD's coordinates a linear measurement is a list of separate ones; where $\sigma\ge\sigma_y/s_i$ the measurement knows more.
# - Replacement, ILVR, DDRM and DDNM restore. They do not sample the posterior, and more steps do not help. SNIPS does, in the limit of many small moves.
# - PSNR asks for the mean, the Fréchet distance for a sample. Say which you want.
#
# **Exercises.** [Set 06](../my_course/06_inverse_replacement.ipynb).
#
# ## Sources
#
# - Y. Song et al. *Score-Based Generative Modeling through Stochastic Differential Equations.* 2021. arXiv:2011.13456 (App. I: replacement)
# - J. Choi, S. Kim, Y. Jeong, Y. Gwon, S. Yoon. *ILVR: Conditioning Method for Denoising Diffusion Probabilistic Models.* 2021. arXiv:2108.02938
# - B. Kawar, G. Vaksman, M. Elad. *SNIPS: Solving Noisy Inverse Problems Stochastically.* 2021. arXiv:2105.14951
# - A. Lugmayr et al. *RePaint: Inpainting using Denoising Diffusion Probabilistic Models.* 2022. arXiv:2201.09865
# - B. Kawar, M. Elad, S. Ermon, J. Song. *Denoising Diffusion Restoration Models.* 2022. arXiv:2201.11793
# - B. Kawar, J. Song, S. Ermon, M. Elad. *JPEG Artifact Correction using Denoising Diffusion Restoration Models.* 2022. arXiv:2209.11888
# - H. Chung, B. Sim, J. C. Ye. *Come-Closer-Diffuse-Faster: Accelerating Conditional Diffusion Models for Inverse Problems through Stochastic Contraction.* 2022. arXiv:2112.05146
# - D. Ryu, J. C. Ye. *Pyramidal Denoising Diffusion Probabilistic Models.* 2022. arXiv:2208.01864
# - Y. Song, L. Shen, L. Xing, S. Ermon. *Solving Inverse Problems in Medical Imaging with Score-Based Generative Models.* 2022. arXiv:2111.08005
# - Y. Wang, J. Yu, J. Zhang. *Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model.* 2023. arXiv:2212.00490
# - B. Chen, Z. Zhang, W. Li, C. Zhao, J. Yu, S. Zhao, J. Chen, J. Zhang. *Invertible Diffusion Models for Compressed Sensing.* 2024. arXiv:2403.17006
# - G. Cardoso, Y. Janati El Idrissi, S. Le Corff, E. Moulines. *Monte Carlo Guided Diffusion for Bayesian Linear Inverse Problems.* 2023. arXiv:2308.07983
