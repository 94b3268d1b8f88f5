# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 07 Inverse problems II: posterior, variational, particle and blind methods
#
# **Which methods sample the posterior, which only find a likely picture, and what does it cost?** Lecture 06 put the measurement in by overwriting. Here the measurement *guides*: its likelihood joins the score. Everything hangs on one integral that nobody can compute; each method is a way around it, and each is held against the exact answer.
#
# After it you can
#
# - say what DPS and ΠGDM put in place of the likelihood of a noisy $x$, when that is exact, and what it costs;
# - take a published step size from one set of coordinates to another;
# - tell optimisation from sampling: RED-diff, DiffPIR, DAPS, PnP-Flow, annealed Langevin, a fitted normalising flow;
# - sample the posterior in the limit, with weighted particles, and say what runs out when it fails;
# - restore when the operator itself is unknown, and fit a body to a few points in a picture.
#
# You need lectures 02, 03 and 06. Time: 120 minutes. Everything runs on a laptop, with no network.

# %%
import math
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from course_lib import bench_gmm, metrics, study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.gaussians import Mixture
from course_lib.guidance import cfg
from course_lib.operators import (
    HDR,
    JPEG,
    BlockAverage,
    Blur,
    GaussianNoise,
    Mask,
    Matrix,
    PhaseRetrieval,
    PoissonNoise,
    gaussian_kernel,
    measure,
)
from course_lib.posterior import (
    dps,
    dps_score,
    gaussian_variance,
    mcg,
    mcgdiff,
    pigdm,
    psld,
    red_diff,
    replacement,
)
from course_lib.posterior.blind import gaussian_kernels
from course_lib.posterior.moments import Relay, moments
from course_lib.posterior.particles import systematic
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim, ddpm
from course_lib.worlds import digits, figures, toys
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo import blind, figures_fit, inverse, posteriors
from course_lib.zoo.recipes.scenes_blind import MIDDLE, SHARPEST
from course_lib.zoo.recipes.scenes_blind import A as SMALL_BLUR

torch.set_num_threads(1)
study.use()
F64 = torch.float64
D = zoo.load("scenes-prior", device="cpu")
shape, SIGMA_Y = (3, 32, 32), 0.05
pictures = SceneDataset(8, 61, 32).pictures(torch.arange(8))  # new ones


def restore(step, n=30, seed=0, prior=D, rows=8):
    """Pictures from noise by one solver, in n steps of Karras's grid from 40."""
    sigmas = karras(n, sigma_min=0.01, sigma_max=40.0)
    return sample(prior, SampleNoise(seed).start((rows, *shape), sigmas[0]), sigmas, step).clamp(
        -1, 1
    )


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# A point in the plane: five blobs are the prior (dotted), one number was measured, with noise (the line). Blue: the exact posterior, in three of the five. Green: samples by each method, with 100 calls of the *exact* denoiser each, so that what is off is the method's own doing. Each has the best of four settings, chosen on other noise. The number is the sliced Wasserstein distance to exact samples (`python -m course_lib.zoo.posteriors`).

# %% slideshow={"slide_type": "-"}
METHODS = (
    "replacement",
    "DDRM",
    "DPS",
    "PiGDM",
    "MCG",
    "CSGM",
    "RED-diff",
    "DiffPIR",
    "DAPS",
    "RealNVP",
    "MCGdiff",
)
exact, row = posteriors.posterior(), posteriors.OPERATOR.A[0]
shown = {"exact": exact.sample(750, generator(1))}
for name in METHODS:
    shown[name] = posteriors.samples(name, n=750, **posteriors.chosen(name))[0]
fig, axes = plt.subplots(3, 4, figsize=(8.2, 6.4), sharex=True, sharey=True)
box = (-3.6, 3.6, -3.6, 3.6)
known = posteriors.Y * row / row.square().sum()
for ax, (name, x) in zip(axes.flat, shown.items(), strict=True):
    study.density(ax, exact.log_prob, box)
    study.outline(ax, posteriors.PRIOR.log_prob, box)
    ax.axline(
        known.tolist(),
        (known + torch.stack([-row[1], row[0]])).tolist(),
        color=study.COLOURS["muted"],
        lw=1,
    )
    study.scatter(ax, x[:150], colour=study.COLOURS["model"], size=4)
    study.plane(ax, box)
    ax.set_title(f"{name} {posteriors.judge(x)['w1']:.2f}", fontsize=11)
    ax.label_outer()
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One integral
#
# Bayes' rule holds at every noise level:
# $$\nabla_x\log p(x\mid y)=\nabla_x\log p(x)+\nabla_x\log p(y\mid x),\qquad p(y\mid x)=\int p(y\mid x_0)\,p(x_0\mid x)\,dx_0.$$
# The prior's score is in the network. The second term asks for the whole distribution of the clean picture given the noisy one, of which the network knows the mean, $D(x,\sigma)=\mathbb E[x_0\mid x]$, and no more. Guesses of $p(x_0\mid x)$ make methods:
#
# | $p(x_0\mid x)$ is taken for | method |
# |---|---|
# | a point at $D(x,\sigma)$ | DPS, reconstruction guidance |
# | $\mathcal N(D(x,\sigma),\,r^2I)$ | ΠGDM |
# | weighted samples | particles (at the end of this lecture) |
#
# *Look*: one number with two likely values, $x_0\approx\pm1$, and a measurement $y=0.8$. How likely is $y$, seen from a noisy $x$?

# %% slideshow={"slide_type": "-"}
two = toys.two_peaks(2.0, 0.25, 0.5)
x = torch.linspace(-4, 4, 400, dtype=F64)[:, None]
x0 = torch.linspace(-3, 3, 2001, dtype=F64)
fig, axes = plt.subplots(1, 3, figsize=(11, 2.9), sharey=True)
for ax, level in zip(axes, (0.1, 1.0, 3.0), strict=True):
    level = torch.tensor(level, dtype=F64)
    given = two.log_prob(x0[:, None]) - (x - x0) ** 2 / (
        2 * level**2
    )  # log p(x0 | x) up to a constant, (400, 2001)
    likely = torch.exp(-((0.8 - x0) ** 2) / (2 * 0.2**2))
    mean = two.denoiser(x, level)[:, 0]
    r2 = gaussian_variance(1.0)(level)
    curves = {
        "exact": (torch.softmax(given, 1) * likely).sum(1),
        "DPS": torch.exp(-((0.8 - mean) ** 2) / (2 * 0.2**2)),
        "ΠGDM": (0.2**2 / (0.2**2 + r2)).sqrt()
        * torch.exp(-((0.8 - mean) ** 2) / (2 * (0.2**2 + r2))),
    }
    for (name, p), colour in zip(curves.items(), ("exact", "guide", "model"), strict=True):
        ax.plot(x[:, 0], p, label=name, color=study.COLOURS[colour], linewidth=2)
    ax.set(title=f"σ = {float(level):g}", xlabel="noisy x")
axes[0].set_ylabel("p(y | x), up to a factor")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %% [markdown] slideshow={"slide_type": "-"}
# At little noise $D(x,\sigma)$ is nearly $x_0$, and the three agree. At much noise the truth is nearly flat, since $x$ says little of $x_0$. DPS's point guess is sure of itself: it calls $y$ impossible from every $x$ whose mean is not near 0.8, and its gradient is strongest where there is nothing to know.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## DPS
#
# **Diffusion posterior sampling** (Chung et al. 2023). After each unconditional step, move down the gradient of the residual, *through the network*:
# $$x'\leftarrow\mathrm{step}(x)-\zeta_i\,\nabla_x\lVert y-A\,D(x,\sigma)\rVert.$$
# $A$ need not be linear, only differentiable.

# %% slideshow={"slide_type": "-"}
study.source(dps)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Whose coordinates?** The paper's $x_{vp}=x/\sqrt{1+\sigma^2}$ shrinks, ours does not. Its gradient is $\sqrt{1+\sigma^2}$ times ours, and its move is $\sqrt{1+\sigma'^2}$ times longer here. Leave out the two factors, and at $\sigma=40$ the same $\zeta$ means 1,600 times less. *Claim*: below, the algorithm as it is printed, in $x_{vp}$ and with DDPM's coefficients, and ours draw the same points.

# %% slideshow={"slide_type": "-"}


def published(D, A, y, zeta, sigmas, noise, x):
    """Chung et al. 2023, Alg. 1, in its own coordinate and with its own names; the step size is that of the authors' code."""
    bar = 1 / (1 + sigmas**2)  # alpha-bar of each level
    x = x * bar[0].sqrt()
    for i in range(len(sigmas) - 1):
        alpha = bar[i] / bar[i + 1]
        x = x.detach().requires_grad_()
        x0 = D(x / bar[i].sqrt(), sigmas[i])
        mean = (
            alpha.sqrt() * (1 - bar[i + 1]) / (1 - bar[i]) * x
            + bar[i + 1].sqrt() * (1 - alpha) / (1 - bar[i]) * x0
        )
        spread = ((1 - bar[i + 1]) / (1 - bar[i]) * (1 - alpha)).sqrt()
        (slope,) = torch.autograd.grad((y - A(x0)).norm(dim=1).sum(), x)
        x = (mean + (spread * noise(x) if sigmas[i + 1] > 0 else 0) - zeta * slope).detach()
    return x


levels, A, y = (
    karras(50, 0.02, 10.0),
    posteriors.OPERATOR,
    torch.full((200, 1), posteriors.Y, dtype=F64),
)
begin = SampleNoise(0).start((200, 2), levels[0], dtype=F64)
D2 = posteriors.PRIOR.denoiser
printed = published(D2, A, y, 0.3, levels, SampleNoise(1), begin)
ours = sample(D2, begin, levels, dps(ddpm(SampleNoise(1)), A, y, 0.3))
print(f"largest difference {float((printed - ours).abs().max()):.1e}")
assert float((printed - ours).abs().max()) < 1e-8

# %% [markdown] slideshow={"slide_type": "slide"}
# **What does it sample?** Written as a score, DPS is a Denoiser: $D'=D+\zeta\,\sigma^2\,\nabla_x\log\mathcal N(y;A\,D,\sigma_y^2I)$. For one Gaussian all steps are affine, so that mean and variance follow exactly, without a sample. $x_0\sim\mathcal N(0,1)$, $y=1.5$, $\sigma_y=0.5$: the posterior is $\mathcal N(1.2,\,0.2)$. *Claim*: DPS's answer is not it, in any number of steps; ΠGDM's tends to it.

# %% slideshow={"slide_type": "-"}
one, seen = (
    Mixture.gaussian(torch.zeros(1, dtype=F64), torch.ones(1, 1, dtype=F64)),
    torch.tensor([[1.5]], dtype=F64),
)
unit = Matrix(torch.ones(1, 1, dtype=F64))


def narrow(x, sigma):
    """The denoiser of N(0, 1)."""
    return x / (1 + sigma**2)


def moments_of(guided, n):
    """Mean and variance of what DDPM's steps draw with this denoiser, exactly."""
    noise = Relay()
    levels = torch.cat(
        [torch.logspace(math.log10(80), math.log10(0.002), n, dtype=F64), torch.zeros(1, dtype=F64)]
    )
    start = torch.zeros(1, dtype=F64), torch.full((1, 1), 80.0**2, dtype=F64)
    mean, cov = moments(ddpm(noise), guided, noise, levels, *start)
    return float(mean), float(cov)


kinds = {
    "DPS": dps_score(narrow, unit, seen, 0.5),
    "ΠGDM": pigdm(narrow, unit, seen, 0.5),
    "ΠGDM, r² of s = 0.5": pigdm(narrow, unit, seen, 0.5, gaussian_variance(0.5)),
}
steps = (10, 20, 50, 100, 300, 1000)
found = {name: [moments_of(guided, n) for n in steps] for name, guided in kinds.items()}
answer = one.posterior(unit.A, seen, 0.5)
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.0), sharex=True)
for (name, values), colour in zip(found.items(), ("guide", "model", "noise"), strict=True):
    for ax, of in zip(axes, zip(*values, strict=True), strict=True):
        ax.semilogx(steps, of, "o-", color=study.COLOURS[colour], label=name)
for ax, value, title in zip(axes, (answer.mean, answer.cov), ("mean", "variance"), strict=True):
    ax.axhline(float(value), color=study.COLOURS["exact"], linestyle="--", label="exact posterior")
    ax.set(xlabel="steps", ylabel=title)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
plt.show()
for name, values in found.items():
    print(f"{name:22s} in 1,000 steps: mean {values[-1][0]:.3f}, variance {values[-1][1]:.3f}")
print(f"{'exact':22s} mean {float(answer.mean):.3f}, variance {float(answer.cov):.3f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## ΠGDM
#
# **Pseudoinverse-guided diffusion** (Song et al. 2023) says how sure it is. If $x_0$ given $x$ is $\mathcal N(D,r^2I)$, then $y$ given $x$ is $\mathcal N(A D,\,r^2AA^\top+\sigma_y^2I)$, and
# $$D'=D+\sigma^2\,J^\top A^\top\big(r^2AA^\top+\sigma_y^2I\big)^{-1}(y-A\,D),\qquad J=\partial D/\partial x.$$
# One product with $J^\top$: one pass back through the network. The paper's $r^2=\sigma^2/(1+\sigma^2)$ is exact for data of variance 1. For a prior $\mathcal N(m,s^2I)$ it is $\sigma^2s^2/(\sigma^2+s^2)$.

# %% slideshow={"slide_type": "-"}
study.source(pigdm)
assert abs(found["ΠGDM"][-1][0] - 1.2) < 0.01 and abs(found["ΠGDM"][-1][1] - 0.2) < 0.01
assert abs(found["DPS"][-1][0] - 1.2) > 0.05 and abs(found["DPS"][-1][1] - 0.2) > 0.05

# %% [markdown] slideshow={"slide_type": "slide"}
# ## On pictures, and beyond linear
#
# The prior is lecture 06's network of 32 × 32 scenes. What has an SVD goes to ΠGDM, what is only differentiable to DPS: clipped light, counted photons, and the *size* of the Fourier coefficients without their phase.

# %% slideshow={"slide_type": "-"}
photons = PoissonNoise(40.0, black=-1.0)  # 40 photons for each unit of light above black
problems = {
    "a hole": (Mask.box(shape, 12), GaussianNoise(SIGMA_Y), "gaussian", 4.0),
    "4 × 4 means": (BlockAverage(shape, 4), GaussianNoise(SIGMA_Y), "gaussian", 4.0),
    "clipped light": (HDR(shape), GaussianNoise(SIGMA_Y), "gaussian", 1.0),
    "photons, blurred": (Blur(gaussian_kernel(1.0), shape), photons, photons, 1.0),
}
rows = {"truth": [], "measured": [], "DPS": []}
for name, (operator, noise, likelihood, zeta) in problems.items():
    y = measure(operator, pictures, noise, generator(3))
    with torch.no_grad():
        found = restore(dps(ddpm(SampleNoise(1)), operator, y, zeta, likelihood), 60)
    seen = (y if y.shape == pictures.shape else operator.pinv(y)).clamp(-1, 1)
    before, after = metrics.mean_psnr(seen, pictures), metrics.mean_psnr(found, pictures)
    print(f"{name:17s} {before:.1f} dB as measured, {after:.1f} dB by DPS")
    assert after > before
    for row, one in zip(rows.values(), (pictures, seen, found), strict=True):
        row.append(one[1])
study.strip(list(rows.values()), row_titles=list(rows), column_titles=list(problems), scale=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Phases lost.** A detector counts photons: the size of each Fourier coefficient is measured, its phase is not. A picture turned by 180° has the same sizes, so that there are two answers at least, and between them many bad ones. DPS from four starts, the one kept whose residual is least, as its authors do. *Claim*: all six digits are found again, turned or not, to 25 dB.

# %% slideshow={"slide_type": "-"}
digit_prior, digit = (
    zoo.load("digits", device="cpu").given(label=torch.tensor([digits.CLASSES])),
    digits.load("test")[0][:6],
)
fourier = PhaseRetrieval(digits.SHAPE)
y = measure(fourier, digit, GaussianNoise(0.05), generator(0))
starts, levels = [], karras(60, 0.02, 15.0)
for seed in range(4):
    begin = SampleNoise(seed).start(tuple(digit.shape), levels[0])
    starts.append(
        sample(
            digit_prior, begin, levels, dps(ddpm(SampleNoise(10 + seed)), fourier, y, 2.0)
        ).clamp(-1, 1)
    )
residual = torch.stack([(fourier(x) - y).flatten(1).norm(dim=1) for x in starts])
found = torch.stack([starts[best][k] for k, best in enumerate(residual.argmin(0).tolist())])
quality = [
    max(metrics.psnr(x, truth), metrics.psnr(x.flip(1, 2), truth))
    for x, truth in zip(found, digit, strict=True)
]
print("best of both ways up:", ", ".join(f"{db:.1f}" for db in quality), "dB")
assert min(quality) > 25
study.strip([digit, starts[0], found], row_titles=["truth", "one start", "best of four"], scale=5)

# %% [markdown] slideshow={"slide_type": "slide"}
# **What does the gradient cost?** A pass back through the network at each step. Chung et al. report 2.14 times the time of plain sampling on their model. Ours, the same grid and step with and without guidance, taken in turn:

# %% slideshow={"slide_type": "-"}
operator, rounds = BlockAverage(shape, 4), []
y = operator(pictures)
for _ in range(4):
    took = []
    for rule in (ddpm(SampleNoise(1)), dps(ddpm(SampleNoise(1)), operator, y)):
        begun = time.process_time()
        with torch.no_grad():
            restore(rule, 8)
        took.append(time.process_time() - begun)
    rounds.append(took[1] / took[0])
print(f"DPS takes {sorted(rounds[1:])[1]:.2f} times the time of plain sampling")
memory = {row["solver"]: row["megabytes"] for row in inverse.rows("memory")}
print(
    f"memory beyond the network's, a picture: DDRM {memory['DDRM']:.2f} MB, DPS {memory['DPS']:.2f} MB"
)

# %% [markdown] slideshow={"slide_type": "slide"}
# **MCG** (Chung et al. 2022) does both: DPS's gradient, *and* replacement after each step. Without noise in $y$ that is better than replacement alone. With noise it forces the noise into the picture: its paper knows none. *Claims*, three seeds: in the hole it gains over replacement at $\sigma_y=0$; its error where $y$ was measured grows with $\sigma_y$ as the noise itself does.

# %% slideshow={"slide_type": "-"}
operator = Mask.box(shape, 12)
hidden = ~operator.observed


def errors_of(found):
    """Root mean square error in the hole and beside it."""
    gap = (found - pictures).square()
    return [float(gap[:, mask.expand(shape)].mean().sqrt()) for mask in (hidden, ~hidden)]


for seed in range(3):
    with torch.no_grad():
        plain = errors_of(
            restore(
                replacement(
                    ddpm(SampleNoise(seed)), operator, operator(pictures), SampleNoise(50 + seed)
                ),
                20,
                seed,
            )
        )
        told = {}
        for noise in (0.0, 0.1, 0.3):
            y = measure(operator, pictures, GaussianNoise(noise), generator(seed))
            told[noise] = errors_of(
                restore(
                    mcg(ddpm(SampleNoise(seed)), operator, y, SampleNoise(50 + seed), 1.0), 20, seed
                )
            )
    said = "; ".join(
        f"σ_y = {noise:g}: hole {of[0]:.2f}, beside {of[1]:.2f}" for noise, of in told.items()
    )
    print(f"seed {seed}: replacement, no noise: hole {plain[0]:.2f}. MCG {said}")
    assert (
        told[0.0][0] < plain[0]
        and told[0.0][1] < 1e-3
        and all(0.7 < told[n][1] / n < 1.05 for n in (0.1, 0.3))
    )

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Sampling, or optimising?
#
# Many methods alternate a *data step* and a *denoiser*, and look alike. Ask of each: if it ran forever, would it end in a distribution, or in a point?
#
# | method | what it does at a level $\sigma$ | ends in |
# |---|---|---|
# | **RED-diff** (Mardani et al. 2023) | descends on $\lVert y-A\mu\rVert^2/2\sigma_y^2+\lambda\,\langle\mathrm{sg}[\hat\epsilon-\epsilon],\mu\rangle$ | a point |
# | **PnP-Flow** (Martin et al. 2025) | data step, noise, denoise | a point |
# | **DiffPIR** (Zhu et al. 2023) | denoise, proximal step $\arg\min_z\lVert y-Az\rVert^2+\rho\lVert z-x_0\rVert^2$, noise | a sample of something |
# | **DAPS** (Zhang et al. 2024) | run the flow to $x_0$, Langevin on $x_0$ given $y$, noise anew | a sample, nearly |
# | **CSGM** (Jalal et al. 2021) | Langevin with the score of $p_\sigma(x)$ and of $y$ | the posterior, in the limit of its last levels |
# | **RealNVP** (Feng et al. 2023) | fits a flow $q$ to likelihood times prior, once | what the flow can be |
#
# RED-diff's bracket is *not* differentiated: the network's Jacobian never appears, and the gradient is $\sigma$ times the score's. Lecture 08 calls the same thing SDS. *Look* at what its points do: they gather, each a likely answer, none a sample. *Claim*: of all methods its points are the least spread within a mode (`width`, 1 for samples of the posterior), and they share the modes worst.

# %% slideshow={"slide_type": "-"}
study.source(red_diff)

# %% slideshow={"slide_type": "-"}
floor, deviation = posteriors.floor()
print(f"{'':16s}{'distance':>16s}{'width':>8s}{'wrong mode':>12s}{'calls':>8s}{'seconds':>9s}")
print(f"{'exact samples':16s}{floor:9.3f} ± {deviation:.3f}{1:8.2f}{0:12.0%}")
for line in posteriors.table():
    said = f"{line['w1']:9.3f} ± {line['deviation']:.3f}{line['width']:8.2f}{line['tv']:12.0%}"
    print(f"{line['solver']:16s}{said}{line['rows']:8.0f}{line['seconds']:9.2f}")
ranked = {line["solver"]: line for line in posteriors.table()}
assert ranked["RED-diff"]["width"] == min(line["width"] for line in ranked.values()) < 0.7
assert ranked["RED-diff"]["tv"] == max(line["tv"] for line in ranked.values())

# %% [markdown] slideshow={"slide_type": "slide"}
# **Two questions, two orders.** On pictures nobody has the posterior, and papers report PSNR. Below, the same solvers by PSNR on 64 scenes (super-resolution by four, 20 calls each, tuned alike; `python -m course_lib.zoo.inverse`) and by their distance to the posterior in the plane. *Claim*: who is good by the one is not good by the other; if anything, the orders run against each other.

# %% slideshow={"slide_type": "-"}
psnr = {}
for line in inverse.rows("solvers"):
    if (line["world"], line["problem"]) == ("scenes", "super-resolution") and "psnr" in line:
        psnr.setdefault(line["solver"], []).append(line["psnr"])
both = [name for name in psnr if name in ranked]
fig, ax = plt.subplots(figsize=(7.4, 4.2))
for name in both:
    x, y = ranked[name]["w1"], sum(psnr[name]) / len(psnr[name])
    ax.plot(x, y, "o", color=study.COLOURS["model"], markersize=8)
    place = {"replacement": ((4, -14), "left"), "RED-diff": ((-6, 6), "right")}.get(
        name, ((6, 4), "left")
    )
    ax.annotate(name, (x, y), xytext=place[0], ha=place[1], textcoords="offset points", fontsize=10)
ax.set(
    xlabel="distance to the exact posterior in the plane",
    ylabel="PSNR on scenes in dB",
    xscale="log",
)
ax.set_xticks([0.1, 0.2, 0.5, 1.0], labels=["0.1", "0.2", "0.5", "1"])
plt.show()
order = [
    sorted(both, key=key)
    for key in (lambda name: ranked[name]["w1"], lambda name: -sum(psnr[name]))
]
places = torch.tensor([[names.index(name) for name in both] for names in order], dtype=F64)
agreement = float(torch.corrcoef(places)[0, 1])
print(f"rank correlation {agreement:.2f} over {len(both)} solvers")
assert agreement < 0

# %% [markdown] slideshow={"slide_type": "slide"}
# All five problems of lecture 06, with this lecture's methods: PSNR of a sample (of the mean of three) and Fréchet distance, three seeds. *Claim*: where a quarter of the pixels, scattered, was measured, and every method of lecture 06 lost to a smooth filling, ΠGDM beats it on both counts: the network's Jacobian carries a pixel's residual to all the pixels that it speaks of.

# %% slideshow={"slide_type": "-"}
HERE = (
    "classical",
    "DDRM",
    "DPS",
    "PiGDM",
    "MCG",
    "CSGM",
    "RED-diff",
    "DiffPIR",
    "DAPS",
    "PnP-Flow",
)
table = {}
for line in inverse.rows("solvers"):
    if line["world"] == "scenes" and "psnr" in line:
        table.setdefault((line["solver"], line["problem"]), []).append(line)
kinds = list(dict.fromkeys(problem for _, problem in table))


def mean(runs, key):
    """Over the seeds."""
    return sum(run[key] for run in runs) / len(runs)


print(f"{'':10s}" + "".join(f"{kind:>24s}" for kind in kinds))
for solver in HERE:
    cells = []
    for kind in kinds:
        runs = table.get((solver, kind))
        numbers = runs and (mean(runs, "psnr"), mean(runs, "psnr_of_mean"), mean(runs, "frechet"))
        cells.append("{:.1f} ({:.1f}) dB, {:.2f}".format(*numbers) if runs else "diverged")
    print(f"{solver:10s}" + "".join(f"{cell:>24s}" for cell in cells))
ours, smooth = table["PiGDM", "random"], table["classical", "random"]
assert min(run["psnr_of_mean"] for run in ours) > mean(smooth, "psnr") + 0.5
assert max(run["frechet"] for run in ours) < mean(smooth, "frechet")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Particles: exact in the limit
#
# Do not guess $p(y\mid x)$ better: *weigh*. Move $N$ samples together by any guess. The ratio of what the exact chain would have given a sample to what the guess gave it is a number that can be computed, its **importance weight**. Heavy samples are copied, light ones die (**resampling**). Whatever the guess, the weighted samples tend to the posterior as $N$ grows; a good guess makes it happen with fewer.
#
# - **TDS** (Wu et al. 2023): the guess is a DPS step; the twist $\psi(x)=\mathcal N(y;A D(x,\sigma),\cdot)$ makes the weights
# $$w'=w\,\frac{\psi(x')\;p(x'\mid x)}{\psi(x)\;\tilde p(x'\mid x)}.$$
# - **MCGdiff** (Cardoso et al. 2023): in the SVD's coordinates a measured coordinate with noise $r_i=\sigma_y/s_i$ is a sample of $x_i$ *at level* $r_i$. Particles are steered through that value at that level, and weighed by how likely they were to get there.

# %% slideshow={"slide_type": "-"}
study.source(systematic)

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*: the distance falls with the number of particles, toward the floor. DPS, of which TDS corrects the steps, stays where it is with any number of samples.

# %% slideshow={"slide_type": "-"}
counts = (1, 2, 4, 16, 64)
fig, ax = plt.subplots(figsize=(6.6, 3.4))
curves = {}
for name, colour in (("MCGdiff", "model"), ("TDS", "noise")):
    curves[name] = [
        sum(
            posteriors.judge(posteriors.samples(name, seed, n=2048, particles=n)[0], seed)["w1"]
            for seed in range(3)
        )
        / 3
        for n in counts
    ]
    ax.loglog(counts, curves[name], "o-", color=study.COLOURS[colour], label=name)
    assert curves[name][-1] < 0.4 * curves[name][0]
ax.axhline(ranked["DPS"]["w1"], color=study.COLOURS["guide"], label="DPS")
ax.axhline(floor, color=study.COLOURS["exact"], linestyle="--", label="two exact sets")
ax.set(xlabel="particles in a run", ylabel="distance")
ax.set_xticks(counts, labels=counts)
ax.set_yticks([0.05, 0.1, 0.2], labels=["0.05", "0.1", "0.2"])
ax.minorticks_off()
fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=10)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# **The benchmark of lecture 06**, with this lecture's methods: mixtures of 25 Gaussians, 20 problems each, sliced Wasserstein distance to the exact posterior and the share of the weight in the wrong modes (`course bench gmm`). *Claim*: a particle method is nearest in every cell.
#
# Two errors remain to it. That of $N$ falls as $1/\sqrt N$. That of the *chain* falls with the number of levels: the particles correct the guess of $p(y\mid x)$, and take the prior's own steps for true. With 20 levels the second is the larger. DPS's error is of another kind: its move does not depend on $\sigma_y$, and no weight takes a sample from one mode to another, so that most stay in the mode into which the prior's chain falls. In 80 dimensions and 20 levels it still beats DDRM.

# %% slideshow={"slide_type": "-"}
GMM = ("exact", "prior", "DDRM", "DPS", "PiGDM", "TDS", "MCGdiff")
for d_x, levels in ((8, 20), (80, 20), (8, 100), (80, 100)):
    cells = {(line["solver"], line["d_y"]): line for line in bench_gmm.rows(d_x=d_x, levels=levels)}
    print(
        f"d_x = {d_x:2d}, {levels:3d} levels"
        + "".join(f"{f'd_y = {d_y}':>21s}" for d_y in bench_gmm.D_Y)
    )
    there = [name for name in GMM if all((name, d_y) in cells for d_y in bench_gmm.D_Y)]
    for solver in there:
        of = [cells[solver, d_y] for d_y in bench_gmm.D_Y]
        print(
            f"{solver:20s}"
            + "".join(f"{line['w1']:9.2f} ± {line['reach']:4.2f}, {line['tv']:3.0%}" for line in of)
        )
    for d_y in bench_gmm.D_Y:
        exactly, *rest, twisted, steered = (cells[name, d_y]["w1"] for name in there)
        assert exactly < min(twisted, steered) < min(rest)
    print()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## When the operator is not known
#
# A photograph that was made small was blurred first, by a kernel that nobody wrote down: $y=M(k*x_0)+\sigma_y n$, with $M$ the means of 2 × 2 blocks. For every $k$ some picture explains $y$; only the prior can tell kernels apart. Let $k_\theta$ be Gaussian and $\theta$ the logarithm of its covariance: every $\theta$ gives a kernel that is nowhere negative and sums to 1.
#
# **BlindDiff** (Li et al. 2024) finds picture and kernel in turn, in each step of the sampling. Its network gives two priors: of the kernel, $\theta\sim\mathcal N(\hat\theta(y),\tau^2)$, and, told the present kernel, of the picture, $x_0\sim\mathcal N(\hat x,r^2I)$ with $\hat x=D(x,\sigma;y,\theta)$.
#
# - *Image step*, ΠGDM's formula without a Jacobian: $x_0=\hat x+r^2A_\theta^\top(r^2A_\theta A_\theta^\top+\sigma_y^2I)^{-1}(y-A_\theta\hat x)$.
# - *Kernel step*, Gauss-Newton moves that never raise $-w\log\mathcal N(y;A_\theta\hat x,\,r^2A_\theta A_\theta^\top+\sigma_y^2I)+\tfrac12\lVert(\theta-\hat\theta)/\tau\rVert^2$.
#
# The picture is integrated out of the second: to minimise over both together prefers kernels that blur nothing (Levin et al. 2009). The authors follow the gradient through the network in place of the closed forms.

# %% slideshow={"slide_type": "-"}
x0, theta, y = blind.problem(0, 8)
kept = torch.tensor([0, 2, 4, 7])
x0, theta, y = x0[kept], theta[kept], y[kept]
found, kernel = blind.restore(y, SHARPEST, seed=0)
non_blind = blind.ddnm(y, MIDDLE, seed=0)


def as_picture(theta):
    """Kernels, enlarged twice, each as bright as it can be."""
    k = gaussian_kernels(theta.double(), SMALL_BLUR.kernel_shape[0]).expand(len(y), -1, -1)[:, None]
    k = F.pad(2 * k / k.amax((2, 3), keepdim=True) - 1, (0, 1, 0, 1), value=-1)
    return F.interpolate(k.float(), scale_factor=2).expand(-1, 3, -1, -1)


columns = {
    "y": F.interpolate(y, scale_factor=2),
    "start": as_picture(SHARPEST),
    "found": as_picture(kernel),
    "true": as_picture(theta),
    "restored": found,
    "non-blind": non_blind,
    "truth": x0,
}
rows = [[column[i] for column in columns.values()] for i in range(len(y))]
study.strip(
    rows, row_titles=[f"scene {i + 1}" for i in range(len(y))], column_titles=list(columns), scale=2
)

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claims*, on three seeds of 32 held-out scenes (`python -m course_lib.zoo.blind`): from "no blur", which plain super-resolution assumes, the kernel comes at least five times nearer; the picture is better than with a wrong kernel kept, by the same network and by DDNM+. Most of the kernel is the network's guess from $y$ alone; from the middle of all kernels it comes only three times nearer. And DDNM+ with the *true* kernel beats all: to know the operator is worth more than the choice of the solver.

# %% slideshow={"slide_type": "-"}
for line in blind.rows():
    error, db = line["kernel_error"], line["psnr"]
    assert error["found"] < error["initial"] / 5
    assert db["blind"] > max(
        db["kept_initial"], db["kept_middle"], db["ddnm_initial"], db["ddnm_middle"]
    )
    print(
        f"seed {line['seed']}: error of the kernel "
        + ", ".join(f"{name} {value:.3f}" for name, value in error.items())
    )
    print("        PSNR " + ", ".join(f"{name} {value:.2f}" for name, value in db.items()) + " dB")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From pictures to bodies: ScoreHMR
#
# A pose $x\in\mathbb R^{25}$, a heading and 23 joint angles, places 18 joints by forward kinematics, and a camera sees them: $y=P(p(x))+\sigma_y n$, some joints missing. The misfit is
# $$L(x)=\frac{1}{2\sigma_y^2}\sum_j m_j\,\lVert P(p_j(x))-y_j\rVert^2,\qquad m_j=1\text{ where joint }j\text{ was seen.}$$
# Depth and missing joints are not in it. From one view many poses fit, and an optimiser that starts at a regressor's guess fits the noise as well.
#
# **ScoreHMR** (Stathopoulos et al. 2024) puts a score prior over poses beside $L$. It inverts the guess by DDIM to a middle level, comes back down with $D'=D-w(\sigma)\,\sigma^2\,\nabla_x L(D(x,\sigma))$, and repeats. With $w=1$ this is DPS's score. Why not descend on $L$ itself? $\sigma^2\,\partial D/\partial x=\operatorname{Cov}[x_0\mid x]$, so that the gradient moves what the prior leaves open, and moves numbers together that vary together: a seen knee bends a hip.

# %% slideshow={"slide_type": "-"}


def bones(ax, pose, colour, azimuth=0.0, width=2.0, shift=0.0):
    """A figure as its bones, seen from an azimuth in degrees."""
    at = figures.project(figures.forward(pose), figures.camera(azimuth))
    for j, parent in enumerate(figures.PARENTS[1:], 1):
        ax.plot(
            at[[parent, j], 0] + shift, -at[[parent, j], 1], color=study.COLOURS[colour], lw=width
        )


def solved(name):
    """Twelve figures of a problem, the pose of each method, and the figure whose gain over optimisation is the middle one."""
    task = figures_fit.problem(name, 0, 12)
    guess = figures_fit.start(task)
    found = {
        "regressor": guess,
        "optimisation": figures_fit.plain(task, guess, **figures_fit.tuned(name, "optimisation")),
        "ScoreHMR": figures_fit.refined(task, guess, **figures_fit.tuned(name, "ScoreHMR")),
    }
    found = {method: x.view(task.truth.shape) for method, x in found.items()}
    error = {method: figures.joint_error(x, task.truth).mean(0) for method, x in found.items()}
    return task, found, int((error["optimisation"] - error["ScoreHMR"]).argsort()[6])


COLOURS = {"regressor": "noise", "optimisation": "warn", "ScoreHMR": "model"}
fig = plt.figure(figsize=(8.6, 4.8))
above, below = fig.subfigures(2, 1)
task, found, i = solved("one view")
axes = list(above.subplots(1, 4))
seen = task.keypoints.at[0, i][task.keypoints.seen[0, i]] * torch.tensor([1, -1])
axes[0].scatter(*seen.T, s=14, color=study.COLOURS["guide"], zorder=3)
bones(axes[0], task.truth[0, i], "data")
axes[0].set_title("truth, and the points seen", fontsize=10)
for ax, (method, x) in zip(axes[1:], found.items(), strict=True):
    bones(ax, task.truth[0, i], "data", azimuth=90)
    bones(ax, x[0, i], COLOURS[method], azimuth=90)
    ax.set_title(
        f"{method}, from the side\n{figures.joint_error(x[0, i], task.truth[0, i]):.0f} mm",
        fontsize=10,
    )
task, found, i = solved("clip")
axes += list(below.subplots(1, 2))
for ax, method in zip(axes[4:], ("optimisation", "ScoreHMR"), strict=True):
    for t, pose in enumerate(found[method][:, i]):
        bones(ax, task.truth[t, i], "data", azimuth=90, shift=0.9 * t, width=1.6)
        bones(ax, pose, COLOURS[method], azimuth=90, shift=0.9 * t, width=1.6)
    error = figures.joint_error(found[method][:, i], task.truth[:, i]).mean()
    ax.set_title(
        f"a clip of {len(task.truth)} frames, from the side: {method}, {error:.0f} mm", fontsize=10
    )
for ax in axes:
    ax.set_aspect("equal")
    ax.axis("off")
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*: a smaller error of the joints than plain optimisation of the same misfit from the same start, tuned and with more steps; from one view, from three, and over a clip, on each of three seeds of 64 figures (`python -m course_lib.zoo.figures_fit`). Beside it what the claim does not say: from three views the data decide almost alone, and a hand-made Gaussian prior in the fit does as well or better. Without guidance the sampling drifts away from the guess.

# %% slideshow={"slide_type": "-"}
for line in figures_fit.rows():
    error = line["mpjpe"]
    print(
        f"{line['problem']:12s} seed {line['seed']}: "
        + ", ".join(f"{name} {value:.0f}" for name, value in error.items())
        + " mm"
    )
    assert error["ScoreHMR"] < min(
        error["optimisation"], error["regressor"], error["ScoreHMR, no guidance"]
    )

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Turn the measured direction, move $y$, change the noise: which method follows the exact posterior, and which loses a mode? The arrow keys move $y$.

# %% slideshow={"slide_type": "-"}
study.PosteriorExplorer(posteriors.PRIOR)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# **The graph is cut.** The gradient has to run back through the network. `D(x, sigma).detach()`, or `no_grad` around it, and what is left is $A^\top(y-AD)$ without $J$: it runs, and it is another method, which pushes the noise of the estimate into pixels that the network would have held together. *Claim*: in the hole, where $J$ alone carries what was seen, nothing is guided, and the hole's edge shows.


# %% slideshow={"slide_type": "-"}
def cut(step, A, y, zeta):
    """DPS whose gradient stops at the estimate."""

    def guided(D, x, sigma, sigma_next, memory=None):
        moved, _ = step(D, x, sigma, sigma_next)
        r = y - A(D(x, sigma))
        slope = -A.adjoint(r) / r.flatten(1).norm(dim=1)[:, None, None, None]
        return moved - zeta * ((1 + sigma**2) * (1 + sigma_next**2)).sqrt().to(x) * slope, None

    return guided


y = operator(pictures)
for seed in range(3):
    with torch.no_grad():
        whole, broken = (
            restore(rule(ddpm(SampleNoise(seed)), operator, y, 3.0), 40, seed)
            for rule in (dps, cut)
        )
    print(
        f"seed {seed}: error in the hole {errors_of(whole)[0]:.3f}, with the graph cut {errors_of(broken)[0]:.3f}"
    )
    assert errors_of(whole)[0] < errors_of(broken)[0]
study.strip(
    [pictures[:4], whole[:4], broken[:4]], row_titles=["truth", "DPS", "graph cut"], scale=3
)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Weights that are not normalised in log space** underflow to 0 / 0 after a few steps. **Few particles in many dimensions**: one has all the weight, and all are its copies. And what cannot work says so:

# %% slideshow={"slide_type": "-"}
wrong = {
    "no gradient": lambda: dps(ddpm(SampleNoise(0)), JPEG(shape, 50), JPEG(shape, 50)(pictures)),
    "negative light": lambda: dps(
        ddpm(SampleNoise(0)),
        BlockAverage(shape, 4),
        pictures[:, :, ::4, ::4] - 2,
        likelihood="poisson",
    ),
    "no noise": lambda: dps_score(D, operator, y, 0.0),
    "a batch that is no multiple": lambda: sample(
        D2, begin[:7], levels, mcgdiff(A, torch.tensor([[0.4]]), 0.5, SampleNoise(0), particles=4)
    ),
}
A, begin, levels = posteriors.OPERATOR, torch.zeros(8, 2, dtype=F64), karras(5, 0.02, 10.0)
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
# A latent model knows no pixels: the measurement is of the *decoded* picture, $A(\mathrm{dec}(z))$, and many latents decode to nearly the same one. **PSLD** (Rout et al. 2023) adds a term that glues: the picture with the measurement put in must encode to the latent itself. Here on Stable Diffusion where its weights are, else on the course's model: a hole in a scene, filled under a prompt.

# %%
SETTINGS = {
    "stable-diffusion-1.5": ("a cat on a bench", 50, 1.0, 0.1),
    "mini-sd": ("a large red cone on grass", 40, 0.3, 1.0),
}
name = next(name for name in SETTINGS if zoo.available(name))
model, (prompt, n, zeta, gamma) = zoo.load(name), SETTINGS[name]
size = model.pixels
picture = SceneDataset(6, 51, size).pictures(torch.tensor([2])).to(model.device)
hole = Mask.box((3, size, size), size // 2)
y = hole(picture)
with torch.no_grad():
    ask = cfg(*(model.denoiser.given(**model.embed([text])) for text in (prompt, "")), 3.0)
    sigmas = model.sigmas(n)
    begin = model.start(SampleNoise(1)(model.encode(picture)), sigmas[0])
    rule = psld(ddpm(SampleNoise(2)), hole, y, model.encode, model.decode, zeta, gamma)
    filled = model.decode(model.finish(sample(ask, begin, sigmas, rule), sigmas[-1])).clamp(-1, 1)
beside = hole.observed.expand(3, size, size)
print(f"beside the hole {metrics.psnr(filled[0][beside], picture[0][beside]):.1f} dB")
study.grid(
    [x[0].float().cpu() for x in (picture, y, filled)],
    titles=["picture", "seen", "filled"],
    scale=2,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - $p(y\mid x)$ needs all of $p(x_0\mid x)$; the network gives its mean. DPS takes the mean for everything, ΠGDM adds a width, particles weigh.
# - A step size belongs to a coordinate. Take the factors along.
# - RED-diff and PnP-Flow find a point, DiffPIR and DAPS draw something near, annealed Langevin and particles the posterior in a limit. PSNR does not tell them apart.
# - Particles are exact in the limit, and the limit is far in high dimensions: watch the effective sample size.
# - Where the operator is unknown, it is one more unknown to be found in turn; where the unknown is a body, the same guidance moves joints.
#
# **Exercises.** [Set 07](../my_course/07_inverse_posterior.ipynb).
#
# ## Sources
#
# - A. Jalal, M. Arvinte, G. Daras, E. Price, A. Dimakis, J. Tamir. *Robust Compressed Sensing MRI with Deep Generative Priors.* 2021. arXiv:2108.01368 (CSGM)
# - J. Ho, T. Salimans, A. Gritsenko, W. Chan, M. Norouzi, D. Fleet. *Video Diffusion Models.* 2022. arXiv:2204.03458 (reconstruction guidance)
# - H. Chung, B. Sim, D. Ryu, J. C. Ye. *Improving Diffusion Models for Inverse Problems using Manifold Constraints.* 2022. arXiv:2206.00941
# - H. Chung, J. Kim, M. McCann, M. Klasky, J. C. Ye. *Diffusion Posterior Sampling for General Noisy Inverse Problems.* 2023. arXiv:2209.14687
# - J. Song, A. Vahdat, M. Mardani, J. Kautz. *Pseudoinverse-Guided Diffusion Models for Inverse Problems.* 2023. OpenReview 9_gsMA8MRKQ
# - M. Mardani, J. Song, J. Kautz, A. Vahdat. *A Variational Perspective on Solving Inverse Problems with Diffusion Models.* 2023. arXiv:2305.04391
# - Y. Zhu et al. *Denoising Diffusion Models for Plug-and-Play Image Restoration.* 2023. arXiv:2305.08995
# - B. Feng, J. Smith, M. Rubinstein, H. Chang, K. Bouman, W. Freeman. *Score-Based Diffusion Models as Principled Priors for Inverse Imaging.* 2023. arXiv:2304.11751
# - L. Rout, N. Raoof, G. Daras, C. Caramanis, A. Dimakis, S. Shakkottai. *Solving Linear Inverse Problems Provably via Posterior Sampling with Latent Diffusion Models.* 2023. arXiv:2307.00619
# - L. Wu, B. Trippe, C. Naesseth, D. Blei, J. Cunningham. *Practical and Asymptotically Exact Conditional Sampling in Diffusion Models.* 2023. arXiv:2306.17775
# - G. Cardoso, Y. Janati El Idrissi, S. Le Corff, E. Moulines. *Monte Carlo Guided Diffusion for Bayesian Linear Inverse Problems.* 2023. arXiv:2308.07983
# - B. Zhang, W. Chu, J. Berner, C. Meng, A. Anandkumar, Y. Song. *Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing.* 2024. arXiv:2407.01521
# - S. Martin, A. Gagneux, P. Hagemann, G. Steidl. *PnP-Flow: Plug-and-Play Image Restoration with Flow Matching.* 2025. arXiv:2410.02423
# - F. Li et al. *BlindDiff: Empowering Degradation Modelling in Diffusion Models for Blind Image Super-Resolution.* 2024. arXiv:2403.10211
# - A. Stathopoulos, L. Han, D. Metaxas. *Score-Guided Diffusion for 3D Human Recovery.* 2024. arXiv:2403.09623
