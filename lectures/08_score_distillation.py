# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 08 Score distillation
#
# **How a trained diffusion model teaches something that is no sample of it: a picture, a painting in 16 numbers, a solid.** A sampler goes from noise to a picture. Here a picture $x_0=g(\theta)$ is there from the start, drawn by any $g$ that can be differentiated, and the model says in which direction it should change. That direction is one line. What it leads to is not what the model samples, and the second half of this lecture is about making it so.
#
# After it you can
#
# - derive SDS from the denoising loss, say what is dropped on the way, and of what the rest is the gradient;
# - say when subtracting the noise lowers the variance, and when it raises it;
# - predict where SDS ends on a mixture, and why its particles have no spread;
# - replace its point by a distribution (VSD), exactly and with a LoRA, and anneal the noise so that modes get their shares;
# - take a gradient apart as NFSD does, and measure what guidance of 100 costs.
#
# You need lectures 02, 04 and 05. Time: 100 minutes. Everything runs on a laptop, with no network.

# %%
import math
import time

import matplotlib.pyplot as plt
import torch
from IPython.display import display

from course_lib import metrics, study, zoo
from course_lib.denoisers import Counted, from_edm
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.distill import (
    checkpointed,
    dds,
    distill,
    distill_grad,
    dreamfusion,
    falling,
    ism,
    log_uniform,
    nfsd,
    of_score,
    one,
    point,
    sds,
    sjc,
    uniform_times,
    vsd,
)
from course_lib.distill.exact import (
    Points,
    expected,
    follow,
    log_grid,
    mode_of,
    objective,
    of_moments,
    robbins_monro,
    shares,
    spreads,
)
from course_lib.distill.second import Bootstrapped, Learner, SecondScore, renoised
from course_lib.gaussians import Empirical, Mixture
from course_lib.guidance import cfg
from course_lib.nets.mlp import MLP
from course_lib.nets.painted import Painted
from course_lib.nets.pixels import Pixels
from course_lib.nets.siren import Siren
from course_lib.nets.voxel_field import VoxelField
from course_lib.training import denoising_loss
from course_lib.worlds import toys
from course_lib.worlds.scenes.camera import rays
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.render import render
from course_lib.zoo import distilled

torch.set_num_threads(1)
study.use()
F64 = torch.float64
blobs = Mixture.isotropic(
    torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.5]]), 0.3, torch.tensor([0.6, 0.3, 0.1])
)
box = (-3.6, 3.6, -2.2, 4.2)


def scattered(seed, n=128, spread=3.0):
    """Where particles start: (n, 2) from N(0, spread^2)."""
    return spread * torch.randn(n, 2, generator=generator(seed, 99), dtype=F64)


def particles(rule, levels, steps, seed=0, hold=math.inf):
    """128 particles in the plane after `steps` steps of gradient descent, whose rate falls as hold / (hold + k)."""
    points = Points(scattered(seed))
    optimizer = torch.optim.SGD(points.parameters(), lr=0.1)
    quiet = {} if hold == math.inf else {"on_step": robbins_monro(optimizer, hold)}
    return distill(points, rule, levels, optimizer, steps, seed=seed, **quiet).detach()


def among_particles(x0, sigma, noise):
    """VSD whose second score is exact: that of the particles as they are now."""
    return vsd(blobs.denoiser, Empirical(x0), of_score)(x0, sigma, noise)


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Three blobs hold 60, 30 and 10 % of the data (blue, exact). 128 particles start scattered, each one a "picture" of two numbers. All follow the same exact model. Under **SDS** (score distillation sampling) they gather in points; under **VSD** (variational score distillation) they fill the blobs; and only where the noise is *annealed*, from wider than everything down, do the blobs get their shares.

# %% slideshow={"slide_type": "-"}
shown = {
    "start": scattered(0),
    "SDS": particles(sds(blobs.denoiser), log_uniform(0.1, 1.0), 1500, hold=50),
    "VSD, σ in 0.1 to 0.5": particles(among_particles, log_uniform(0.1, 0.5), 700),
    "VSD, annealed": particles(among_particles, falling(10.0, 0.1), 1000),
}
fig, axes = plt.subplots(1, 4, figsize=(9, 2.9), sharey=True)
for ax, (name, x) in zip(axes, shown.items(), strict=True):
    study.density(ax, blobs.log_prob, box, levels=7)
    study.scatter(ax, x, colour=study.COLOURS["model"], size=7)
    study.plane(ax, box)
    ax.set_title(name, fontsize=11)
    ax.label_outer()
    if name != "start":
        for mean, share in zip(blobs.means, shares(x, blobs), strict=True):
            ax.annotate(
                f"{share:.0%}",
                mean,
                xytext=(0, -26),
                textcoords="offset points",
                ha="center",
                fontsize=10,
            )
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From a loss to SDS
#
# The names, once: $\theta$ are parameters, $x_0=g(\theta)$ is what they render, $\epsilon$ standard normal noise, $x=x_0+\sigma\epsilon$ the noised picture, $D(x,\sigma)$ the trained denoiser, and $\hat\epsilon=(x-D(x,\sigma))/\sigma$ the noise that it sees, whatever its network predicts. The model was trained to make $\hat\epsilon$ equal $\epsilon$, on data. So a picture that is like data should have a small
# $$L(\theta)=\mathbb E_{\sigma,\epsilon}\Big[\tfrac{w(\sigma)}{2}\,\lVert\hat\epsilon(x,\sigma)-\epsilon\rVert^2\Big],$$
# with $w(\sigma)$ a weight to be chosen. The chain rule, factor by factor:
# $$\nabla_\theta L=\mathbb E\Big[w\;\Big(\frac{\partial x_0}{\partial\theta}\Big)^{\!\top}\;\underbrace{\Big(\frac{\partial\hat\epsilon}{\partial x}\Big)^{\!\top}}_{\text{through the network}}\;(\hat\epsilon-\epsilon)\Big].$$
# DreamFusion (Poole et al. 2023) leaves the middle factor out. What is left is **SDS**:
# $$\boxed{\;\nabla_{x_0}^{\text{SDS}}=w(\sigma)\,(\hat\epsilon-\epsilon)=\frac{w(\sigma)}{\sigma}\,\big(x_0-D(x,\sigma)\big)\;}$$
# then pulled back through $g$ alone. No graph of the network is kept, and the model may be a box that only answers. In code all rules of this lecture share one line:

# %%
study.source(distill_grad, sds)

# %% [markdown] slideshow={"slide_type": "slide"}
# **It is a gradient after all, of something better.** Noise makes a distribution of a single picture, $q_\sigma=\mathcal N(x_0,\sigma^2I)$. Let $p_\sigma$ be the noised data, and ask how far $q_\sigma$ is from it. Under $x=x_0+\sigma\epsilon$,
# $$\nabla_{x_0}\,\mathrm{KL}(q_\sigma\,\|\,p_\sigma)=\mathbb E_\epsilon\big[\nabla\log q_\sigma(x)-\nabla\log p_\sigma(x)\big]=\mathbb E_\epsilon\Big[-\frac{\epsilon}{\sigma}+\frac{\hat\epsilon}{\sigma}\Big],$$
# since $\nabla\log q_\sigma(x)=-\epsilon/\sigma$ and, by Tweedie's formula, $\nabla\log p_\sigma(x)=(D-x)/\sigma^2=-\hat\epsilon/\sigma$. Hence
# $$\boxed{\;\mathbb E_\epsilon[\text{SDS}]=w(\sigma)\,\sigma\,\nabla_{x_0}\mathrm{KL}\big(\mathcal N(x_0,\sigma^2I)\,\|\,p_\sigma\big)\;}$$
# On $p=\mathcal N(\mu,s^2)$ everything is closed. With $\kappa=\sigma^2/(s^2+\sigma^2)$, the share of what is seen that is noise,
# $$\text{SDS}=w\Big[\frac{\kappa}{\sigma}(x_0-\mu)-(1-\kappa)\,\epsilon\Big],\qquad\nabla\mathrm{KL}=\frac{x_0-\mu}{s^2+\sigma^2}.$$
# *Claim*: measured on a Gaussian against the closed form, over levels and to 1e-3; and on the blobs against automatic differentiation of the KL itself. Means over $\epsilon$ are taken by quadrature.

# %%
mu, s = 1.0, 0.5
gauss = Mixture.gaussian(torch.tensor([mu]), torch.tensor([[s**2]]))
x0, sigmas = torch.linspace(-2, 4, 13, dtype=F64)[:, None], torch.logspace(-2, 1, 25, dtype=F64)
for weight in (one, dreamfusion, of_score):
    measured = expected(sds(gauss.denoiser, weight), x0, sigmas)
    exact = sum(weight(v) * v * (x0 - mu) / (s**2 + v**2) for v in sigmas) / len(sigmas)
    assert float((measured - exact).norm() / exact.norm()) < 1e-3
places, grid = scattered(1, n=40).requires_grad_(), log_grid(0.3, 3.0)
(kl,) = torch.autograd.grad(objective(blobs, places, grid, nodes=24).sum(), places)
pull = expected(sds(blobs.denoiser), places.detach(), grid, nodes=24)
off = float((pull - kl).norm() / kl.norm())
print(f"E[SDS] is w σ grad KL: on three blobs to {off:.0e}")
assert off < 1e-3

# %% [markdown] slideshow={"slide_type": "slide"}
# **Why may the Jacobian go?** It is $\partial\hat\epsilon/\partial x=-\sigma\,\nabla^2\log p_\sigma$, a Hessian.
#
# - *Cost*: a pass back through the network, and its memory.
# - *Condition*: on a Gaussian the pull becomes $w\,(\kappa/\sigma)^2(x_0-\mu)$. Directions in which the data are narrow and wide differ in $\kappa$ already; now they differ in its square, and the pull dies at both ends of the noise.
# - *Question*: the loss asks where noise is *easy to see*, not where pictures are likely. With two modes at $\pm2$ and $\sigma=1$ it is least outside of them, away from the other mode; the KL is least inside, toward the mean.
#
# **And the noise $-\epsilon$?** It is 0 on average, so that it may stay (a *baseline*) or go. On the Gaussian the deviation of SDS is $w(1-\kappa)$ with it and $w\kappa$ without: the ratio of variances is $\kappa^2/(1-\kappa)^2=(\sigma/s)^4$. The baseline is a help above $\sigma=s$, where $\hat\epsilon$ holds nearly all of $\epsilon$. Below, $\hat\epsilon$ holds little of it, and to subtract it *adds* noise. *Claim*: both sides measured, within 2 %.

# %% slideshow={"slide_type": "-"}
levels, n = torch.logspace(-1.3, 0.9, 12, dtype=F64), 20_000
kappa = levels**2 / (s**2 + levels**2)
away, eps = (
    torch.full((n, 1), mu + 1.0, dtype=F64),
    torch.randn(n, 1, generator=generator(0), dtype=F64),
)
deviation = {
    baseline: torch.stack(
        [sds(gauss.denoiser, baseline=baseline)(away, v, lambda x: eps).std() for v in levels]
    )
    for baseline in (True, False)
}
ratio = (deviation[False] / deviation[True]) ** 2
assert torch.allclose(ratio, kappa**2 / (1 - kappa) ** 2, rtol=0.02)
assert bool((ratio[levels > s] > 1).all() and (ratio[levels < s] < 1).all())

fig, axes = plt.subplots(1, 3, figsize=(10, 3.3))
for jacobian, colour, name in ((False, "model", "SDS"), (True, "warn", "with the Jacobian")):
    size = [
        expected(sds(gauss.denoiser, jacobian=jacobian), away[:1], v[None]).item() for v in levels
    ]
    axes[0].loglog(levels, size, "o", color=study.COLOURS[colour], label=name)
    exact = (kappa / levels) ** (2 if jacobian else 1)
    assert torch.allclose(torch.tensor(size, dtype=F64), exact, rtol=1e-6)
    axes[0].loglog(levels, exact, color=study.COLOURS["exact"], lw=1, zorder=0)
axes[0].set(title="mean pull at $x_0-\\mu=1$", xlabel="noise level σ")
two = toys.two_peaks(4.0, 0.4)
line, ends = torch.linspace(-3, 3, 121, dtype=F64)[:, None], {}
for jacobian, colour in ((False, "model"), (True, "warn")):
    force = -expected(sds(two.denoiser, jacobian=jacobian), line, torch.tensor([1.0]), nodes=32)
    axes[1].plot(line, force / force.abs().max(), color=study.COLOURS[colour])
    ends[jacobian] = float(line[(force < 0) & (line > 0)][0])  # where the push turns back
print(f"the mode at 2: SDS stops at {ends[False]:.2f}, with the Jacobian at {ends[True]:.2f}")
assert ends[False] < 2 < ends[True]
for peak in (-2, 2):
    axes[1].axvline(peak, color=study.COLOURS["data"], ls=":", lw=1.5)
axes[1].axhline(0, color="black", lw=0.8)
axes[1].set(title="two modes (dotted), σ = 1", xlabel="$x_0$", ylabel="mean push, scaled")
for baseline, colour, name in ((True, "model", "SDS"), (False, "noise", "without $-\\epsilon$")):
    axes[2].loglog(levels, deviation[baseline], "o", color=study.COLOURS[colour], label=name)
    axes[2].loglog(
        levels, 1 - kappa if baseline else kappa, color=study.COLOURS["exact"], lw=1, zorder=0
    )
axes[2].axvline(s, color=study.COLOURS["muted"], ls="--", lw=1.2)
axes[2].set(title="deviation over draws", xlabel="noise level σ  (dashed: σ = s)")
for ax in (axes[0], axes[2]):
    ax.legend(fontsize=10)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where SDS ends: modes
#
# $\mathrm{KL}(q_\sigma\|p_\sigma)=-\mathbb E_\epsilon\log p_\sigma(x_0+\sigma\epsilon)-\tfrac d2\log(2\pi e\sigma^2)$: the entropy of $q_\sigma$ does not depend on $x_0$. So SDS climbs the log-density, smoothed *twice*: once in $p_\sigma$, once by the expectation. It is an optimiser. Every particle ends in a stationary point of
# $$\mathbb E_\sigma\big[w\,\sigma\,\mathrm{KL}(q_\sigma\,\|\,p_\sigma)\big],$$
# which point is decided by the basin in which it starts, and none of them knows that there are others. On one Gaussian all of them end at $\mu$, and the width $s$ is lost.
#
# The weight and the range decide which stationary points there are. Much noise smooths the landscape: modes move toward the mean of all, and small ones vanish. *Claims*: particles that follow the mean gradient end where it vanishes, with no spread; shares are those of the basins; and with levels up to 3 under $w=\sigma$ the smallest blob has no basin left.

# %% slideshow={"slide_type": "-"}
side = 30
across, up = torch.linspace(*box[:2], side, dtype=F64), torch.linspace(*box[2:], side, dtype=F64)
lattice = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1).reshape(-1, 2)
begin = scattered(0)
settings = {
    "w = 1, σ from 0.1 to 1": (one, log_grid(0.1, 1.0, 4), 0.8),
    "w = σ, σ from 0.1 to 3": (of_score, log_grid(0.1, 3.0, 4), 1.0),
}
inks = plt.matplotlib.colors.ListedColormap([study.COLOURS[c] for c in ("other", "guide", "noise")])
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.7), sharey=True)
stops, held = {}, {}
for ax, (name, (weight, grid, lr)) in zip(axes, settings.items(), strict=True):
    rule = sds(blobs.denoiser, weight)
    ends = follow(rule, torch.cat([lattice, begin]), grid, lr, 100, nodes=3)
    far = follow(rule, blobs.means, grid, lr, 400, nodes=3)  # from the modes themselves
    apart = torch.cdist(far, far).fill_diagonal_(9) > 1e-2
    stops[name] = far[[k for k in range(len(far)) if bool(apart[k, :k].all())]]
    assert float(expected(rule, stops[name], grid, nodes=3).abs().max()) < 1e-4
    gap, which = torch.cdist(ends, stops[name]).min(1)
    assert float(gap[len(lattice) :].max()) < 0.1 * 0.3  # a tenth of a blob's width
    basin = mode_of(stops[name], blobs)[which]
    held[name] = torch.bincount(basin[len(lattice) :], minlength=3) / len(begin)
    ax.imshow(
        basin[: len(lattice)].reshape(side, side),
        cmap=inks,
        alpha=0.45,
        vmin=0,
        vmax=2,
        origin="lower",
        extent=box,
    )
    study.outline(ax, blobs.log_prob, box)
    ax.plot(*stops[name].T, "kx", ms=9, mew=2.5)
    study.plane(ax, box)
    ax.set_title(name, fontsize=12)
    ax.label_outer()
    shown_shares = ", ".join(f"{v:.0%}" for v in held[name].tolist())
    print(f"{name}: {len(stops[name])} stationary points; shares of the start {shown_shares}")
plt.show()
with_noise = shares(shown["SDS"], blobs)
print(
    "shares with noise, from the first figure:", ", ".join(f"{v:.0%}" for v in with_noise.tolist())
)
width = spreads(shown["SDS"], blobs)
print("spread within a blob over the true one:", ", ".join(f"{v:.2f}" for v in width.tolist()))
assert [len(of) for of in stops.values()] == [3, 2] and float(width.max()) < 0.1
assert float((with_noise - next(iter(held.values()))).abs().max()) < 0.05

# %% [markdown] slideshow={"slide_type": "slide"}
# ## SJC: perturb, average
#
# **Score Jacobian chaining** (Wang, Du et al. 2023) begins elsewhere and comes to the same line. Chain the score with the Jacobian of $g$: $\nabla_\theta\log p_\sigma(g(\theta))=(\partial x_0/\partial\theta)^\top\,\nabla\log p_\sigma(x_0)$. But which score is asked for? The network was trained, at level $\sigma$, on pictures *with noise of that level on them*. A rendering $x_0$ has none: to the network it is a picture like no other it has seen. So perturb it and average (PAAS):
# $$\mathrm{PAAS}(x_0,\sigma)=\mathbb E_\epsilon\Big[\frac{D(x_0+\sigma\epsilon,\sigma)-x_0}{\sigma^2}\Big].$$
# With $n$ draws it is SDS with its baseline, averaged: $w\,\sigma$ times minus PAAS. *Claim*: equal in expectation to SDS; equal draw by draw for $n=1$.
#
# *How large is the gap?* Below is a small network, trained here on a mixture in 32 dimensions of which everything is known, so that its error can be measured at points of both kinds. *Claim*: on noised points its score is within a quarter of the exact one; at $x_0$ itself, at levels between the width of a blob and the distance between blobs, it is wrong by more than the size of the true one. At small $\sigma$ both points are the same place, and there is no gap.

# %% slideshow={"slide_type": "-"}
display(study.source(sjc))
draws = torch.randn(128, 2, generator=generator(3), dtype=F64)
same = [
    rule(begin, torch.tensor(0.7), lambda x: draws)
    for rule in (sds(blobs.denoiser), sjc(blobs.denoiser))
]
assert torch.equal(*same)
grid = log_grid(0.1, 1.0, 4)
means = [expected(rule(blobs.denoiser), begin, grid) for rule in (sds, sjc)]
assert torch.allclose(*means, atol=1e-12)

d, source = 32, generator(0)
wide = Mixture.isotropic(torch.randn(8, d, generator=source), 0.2)
torch.manual_seed(0)
learnt = from_edm(MLP(d, 192), sigma_data=1.0)
optimizer, rounds = torch.optim.Adam(learnt.net.parameters(), lr=2e-3), 900
slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / rounds)
for _ in range(rounds):
    clean, level = wide.sample(192, source).float(), log_uniform(0.05, 10.0)(0.0, 192, source)
    loss = denoising_loss(learnt, clean, level, torch.randn(192, d, generator=source)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    slower.step()

clean, levels = wide.sample(400, generator(5)).float(), torch.logspace(-1, 0.8, 10, dtype=F64)
error = {"noised, $x_0+\\sigma\\epsilon$": [], "$x_0$ itself": []}
with torch.no_grad():
    for level in levels:
        for name, x in zip(
            error,
            (clean + float(level) * torch.randn(400, d, generator=source), clean),
            strict=True,
        ):
            exact = wide.denoiser(x, level)
            error[name].append(float((learnt(x, level) - exact).norm() / (exact - x).norm()))
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, values), colour in zip(error.items(), ("model", "warn"), strict=True):
    ax.loglog(levels, values, "o-", color=study.COLOURS[colour], label=f"asked at {name}")
ax.axhline(1, color=study.COLOURS["muted"], ls="--", lw=1.2)
ax.set(xlabel="noise level σ", ylabel="error of the network's score\nover the exact one")
ax.legend(fontsize=11)
plt.show()
seen, unseen = error.values()
print(f"largest error: {max(seen):.2f} on noised points, {max(unseen):.2f} at x0 itself")
assert max(seen) < 0.25 and max(unseen) > 1

# %% [markdown] slideshow={"slide_type": "slide"}
# ## VSD: a distribution in place of a point
#
# **Variational score distillation** (Wang, Lu et al. 2023) asks for a *distribution* $q$ of pictures. Noise makes $q_\sigma=q*\mathcal N(0,\sigma^2I)$ of it, and
# $$\min_q\;\mathbb E_\sigma\big[w\,\sigma\,\mathrm{KL}(q_\sigma\,\|\,p_\sigma)\big],\qquad\text{least, namely 0, at }q=p.$$
# Let $q$ be particles $x_0^{(1)},\dots,x_0^{(n)}$, and move each. The gradient is the line above with the true score of $q_\sigma$, where SDS has that of a single point:
# $$\boxed{\;\nabla_{x_0}^{\text{VSD}}=w\,\big(\hat\epsilon_{\text{real}}-\hat\epsilon_{\text{fake}}\big)=\frac{w}{\sigma}\,\big(D_{\text{fake}}(x,\sigma)-D_{\text{real}}(x,\sigma)\big)\;}$$
# $D_{\text{real}}$ is the model; $D_{\text{fake}}(x,\sigma)=\mathbb E[x_0\mid x]$ over the *particles*. If $q$ is one point, the best guess of the clean picture is that point, whatever $x$: $D_{\text{fake}}=x_0$, and VSD *is* SDS. Where $q=p$ both denoisers agree and the gradient is 0, noise or no noise. *Claims*: both to 1e-6; and on $\mathcal N(\mu,s^2)$ SDS goes to a point, VSD to $s$, from above and from below.

# %% slideshow={"slide_type": "-"}
both = [
    rule(begin, torch.tensor(0.7), lambda x: draws)
    for rule in (sds(blobs.denoiser), lambda x0, *rest: vsd(blobs.denoiser, point(x0))(x0, *rest))
]
assert float((both[0] - both[1]).abs().max()) < 1e-6
at_rest = vsd(blobs.denoiser, blobs.denoiser)(begin, torch.tensor(0.7), lambda x: draws)
assert float(at_rest.abs().max()) < 1e-6


def own(x0, sigma, noise):
    """VSD on a Gaussian: the second score is that of the Gaussian with the particles' moments."""
    return vsd(gauss.denoiser, of_moments(x0), of_score)(x0, sigma, noise)


fig, ax = plt.subplots(figsize=(6.4, 3.2))
for rule, colour, name in ((sds(gauss.denoiser, of_score), "warn", "SDS"), (own, "model", "VSD")):
    for first in (0.05, 2.0):
        line = Points(mu + first * torch.randn(400, 1, generator=generator(1), dtype=F64))
        optimizer, trace = torch.optim.SGD(line.parameters(), lr=0.2), []
        on_step = robbins_monro(optimizer, 30) if name == "SDS" else lambda step, x0: None

        def watch(step, x0, on_step=on_step, trace=trace):
            on_step(step, x0)
            trace.append(float(x0.std()))

        distill(line, rule, log_uniform(0.1, 2.0), optimizer, 250, on_step=watch)
        label = name if first == 2.0 else None
        ax.semilogy(trace, color=study.COLOURS[colour], label=label)
        assert abs(trace[-1] / s - 1) < 0.1 if name == "VSD" else trace[-1] < 0.1 * s
ax.axhline(s, color=study.COLOURS["exact"], ls="--", lw=1.5, label="s, the data's")
ax.set(xlabel="step", ylabel="spread of 400 particles")
ax.legend(fontsize=11)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# **Anneal.** At a level $\sigma$ much smaller than the gap between modes, the particles of each mode see their own mode alone, on both sides of the difference: any shares are at rest. Only where $\sigma$ is as wide as the whole does the difference of scores count heads. *Claims*, 128 particles, three seeds: with $\sigma$ falling from 10 to 0.1 each share is within 5 points of the truth, each spread within 15 %; with a fixed range of small levels they are those of the basins, off by more than 20; even where it reaches up to 3, by more than 5.

# %% slideshow={"slide_type": "-"}
RANGES = {
    "fixed, σ from 0.1 to 0.5": (log_uniform(0.1, 0.5), 500),
    "fixed, σ from 0.1 to 3": (log_uniform(0.1, 3.0), 700),
    "falling, σ from 10 to 0.1": (falling(10.0, 0.1), 1000),
}
print(f"{'':26s} shares of 60, 30, 10 %, and the spread within a blob, three seeds")
worst = {}
for name, (levels, steps) in RANGES.items():
    found = [particles(among_particles, levels, steps, seed) for seed in range(3)]
    held, width = ([of(x, blobs) for x in found] for of in (shares, spreads))
    worst[name] = max(float((of - blobs.weights).abs().max()) for of in held)
    said = "   ".join("/".join(f"{100 * v:.0f}" for v in of.tolist()) for of in held)
    ranged = torch.stack(width)
    print(
        f"{name:26s} {said}   {float(ranged.min()):.2f} to {float(ranged.max()):.2f}; off by {worst[name]:.0%}"
    )
    assert float(ranged.min()) > 0.85 and float(ranged.max()) < 1.2
assert worst["falling, σ from 10 to 0.1"] < 0.05 < worst["fixed, σ from 0.1 to 3"]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## On pictures: a LoRA as the second score
#
# The exact score of particles that are pictures is known too, and useless: in so many dimensions each of a few particles sees, at nearly all levels, itself alone, and VSD is SDS again. A guess that is smoother is wanted: $D_{\text{fake}}$ becomes a network, which is trained, as any denoiser is, on the only data that it is for: the particles as they are now. It starts as the teacher itself, and all that it learns is a **LoRA** (Hu et al. 2022): next to a frozen weight $W$ of $c_{\text{out}}\times c_{\text{in}}$ numbers a product of two thin matrices,
# $$y=Wx+b+\tfrac{\alpha}{r}\,U V x,\qquad U:\ c_{\text{out}}\times r,\quad V:\ r\times c_{\text{in}},\quad U=0\text{ at first.}$$
# In turn: one step of $\theta$ with the LoRA held, one step of the LoRA with the pictures held. Here is the learner, and the test of it: one frozen picture. The perfect second score of a single point is $D_{\text{fake}}=x_0$, so that VSD's gradient should turn into that of SDS. *Claim*: their cosine rises as the LoRA learns. Guidance is 1: at a larger scale both gradients share its large term, and the cosine says little.

# %% slideshow={"slide_type": "-"}
model, reader = zoo.load("mini-sd", device="cpu"), zoo.load("scenes-reader", device="cpu")
some = SceneDataset(200, 51)
captions = some.captions(None)
times = uniform_times(model.schedule)  # between 2 % and 98 % of the trained times


def told(prompts):
    """The teacher under these prompts, without guidance."""
    return model.denoiser.given(**model.embed(list(prompts)))


def encoded(rows):
    """Latents of some of the scenes."""
    with torch.no_grad():
        return model.encode(some.pictures(torch.tensor(rows)))


frozen, teacher = encoded([9]).expand(8, -1, -1, -1), told([captions[9]] * 8)
second = SecondScore(teacher, times, rank=8, lr=3e-3, half=True)
trained = sum(p.numel() for p in second.net.parameters() if p.requires_grad)
print(f"{trained:,} of {sum(p.numel() for p in second.net.parameters()):,} numbers learn")
asked, curve = times(0.0, 8, generator(7)), {}
for step in range(41):
    if step in (1, 2, 5, 10, 20, 30, 40):
        with torch.no_grad():
            pulls = [
                rule(frozen, asked, SampleNoise(5)).flatten(1)
                for rule in (vsd(teacher, second), sds(teacher))
            ]
        curve[step] = float(torch.cosine_similarity(*pulls).mean())
    second.learn(frozen, step / 40, generator(1, step))
fig, ax = plt.subplots(figsize=(6.4, 2.8))
ax.plot(curve.keys(), curve.values(), "o-", color=study.COLOURS["model"])
ax.set(xlabel="steps of the LoRA", ylabel="cosine to SDS", ylim=(0, 1.02))
plt.show()
print(f"cosine {curve[1]:.2f} after one step, {curve[40]:.2f} after forty")
assert curve[40] > curve[10] > curve[1] and curve[40] > 0.7
for row in distilled.rows("cosine"):
    if row["w"] == 1:
        told_of = ", ".join(f"{value:.2f}" for value in row["cosine"])
        assert row["cosine"] == sorted(row["cosine"])
        print(
            f"stored, another picture, after {', '.join(map(str, row['steps']))} steps: {told_of}"
        )

# %%
study.source(Learner.learn)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## NFSD: what is in $\hat\epsilon$?
#
# Guidance is a Denoiser, so that all rules take it: $\hat\epsilon=\hat\epsilon_{\text{ref}}+w\,(\hat\epsilon_{\text{cond}}-\hat\epsilon_{\text{ref}})$, as in lecture 04 $w=0$ is the reference, $w=1$ the prompt. **Noise-free score distillation** (Katzir et al. 2024) takes SDS apart:
# $$\text{SDS}=\underbrace{\hat\epsilon_{\text{ref}}-\epsilon}_{\delta_D+(\delta_N-\epsilon)}+w\,\underbrace{(\hat\epsilon_{\text{cond}}-\hat\epsilon_{\text{ref}})}_{\delta_C}.$$
# $\delta_C$ is what the prompt asks for. $\hat\epsilon_{\text{ref}}$ has two parts: $\delta_D$, which leads into the domain of pictures, and $\delta_N$, the noise that it sees. SDS subtracts $\epsilon$ for $\delta_N$; but they are not equal. On a Gaussian $\delta_N=\kappa\,\epsilon$: the network takes off only the part of the noise that it can tell from data. *Look*, on `mini-sd`, at how much of $\epsilon$ there is in $\hat\epsilon_{\text{ref}}$ (left). At small $\sigma$ next to nothing: there $-\epsilon$ is noise pure and simple, and larger than all else (right). The weaker $\delta_C$ is beside it, the larger a $w$ is needed for the prompt to be heard. Here $\delta_C$ is a fifth of it, and a few units of $w$ do; where prompts move a model less, it takes more.
#
# NFSD leaves $-\epsilon$ out. At small $\sigma$, $\delta_D=\hat\epsilon_{\text{ref}}$ as it is. Above a *split*, $\delta_D=\hat\epsilon_{\text{ref}}-\hat\epsilon_{\text{bad}}$: a model of *bad* pictures sees the same noise and no domain. The authors get it by a negative prompt; `mini-sd` knows no words for bad pictures, and gets a small child trained on spoiled ones. *Look* at the left of the split as well: the authors' $t<200$ of 1,000 is $\sigma=0.56$ in this model, where $\hat\epsilon_{\text{ref}}$ already holds four fifths of $\epsilon$. A split belongs to a model too.

# %% slideshow={"slide_type": "-"}
n, levels = 24, torch.logspace(-1.7, 1.1, 12, dtype=F64)
latents, cond, ref = encoded(list(range(n))), told(captions[:n]), told([""] * n)
spoiled = zoo.load("mini-sd-degraded", device="cpu")
parts = {
    "$\\hat\\epsilon_{ref}-\\epsilon$, of SDS": [],
    "$\\delta_D$, of NFSD": [],
    "$\\delta_C$": [],
}
split = float(model.schedule.sigma(torch.tensor(0.2 * model.schedule.t_max)))  # t < 200 of 1,000
seen = []
with torch.no_grad(), autocast("cpu"):
    for level in levels:
        eps = SampleNoise(2)(latents)
        x = latents + float(level) * eps
        in_ref, in_cond, in_bad = ((x - D(x, level)) / float(level) for D in (ref, cond, spoiled))
        seen.append(float((in_ref * eps).sum() / eps.square().sum()))
        delta_D = in_ref if level < split else in_ref - in_bad
        for values, part in zip(
            parts.values(), (in_ref - eps, delta_D, in_cond - in_ref), strict=True
        ):
            values.append(float(part.square().mean().sqrt()))
fig, axes = plt.subplots(1, 2, figsize=(9, 3.3))
axes[0].semilogx(levels, seen, "o-", color=study.COLOURS["model"], label="mini-sd")
middle = float(levels[sum(share < 0.5 for share in seen) - 1])
axes[0].semilogx(
    levels,
    levels**2 / (middle**2 + levels**2),
    color=study.COLOURS["exact"],
    ls="--",
    lw=1.5,
    label=f"κ of a Gaussian, s = {middle:.2f}",
)
axes[0].set(xlabel="noise level σ", ylabel="share of $\\epsilon$ in $\\hat\\epsilon_{ref}$")
for (name, values), colour in zip(parts.items(), ("warn", "model", "guide"), strict=True):
    axes[1].loglog(levels, values, "o-", ms=5, color=study.COLOURS[colour], label=name)
axes[1].axvline(split, color=study.COLOURS["muted"], ls="--", lw=1.2)
axes[1].set(xlabel="noise level σ  (dashed: the split)", ylabel="size (rms)")
for ax in axes:
    ax.legend(fontsize=10)
plt.show()
assert (
    seen[0] < 0.1
    and seen[-1] > 0.95
    and seen[sum(level < split for level in levels.tolist())] > 0.8
)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Live.** Four latents (three of them shown) of `mini-sd`, 100 steps of Adam, from noise. SDS at $w=30$ shows what too much guidance does: hard contrast, halos, things that nobody asked for. NFSD, without $-\epsilon$, hears the prompt at $w=1$ and has too much of it at 7.5.

# %% slideshow={"slide_type": "-"}
PROMPTS = (
    "a large red cone on grass",
    "a small blue cube on sand",
    "a green sphere on white ground",
    "a large yellow cylinder on grass",
)
cond, ref = told(PROMPTS), told([""] * 4)


def shown_as(x):
    """Pictures in 25 levels a channel, clipped: enough for the eye, and a small notebook."""
    return (x.clamp(-1, 1) * 12).round() / 12


def latents_of(rule, steps=100, lr=0.1, **options):
    """Pictures of four latents that followed a rule, and the latents."""
    theta = Pixels(model.shape, 4, seed=0, spread=1.0)
    adam = torch.optim.Adam(theta.parameters(), lr=lr, betas=(0.9, 0.99))
    z = distill(theta, rule, options.pop("levels", times), adam, steps, half=True, **options)
    with torch.no_grad(), autocast("cpu"):
        return model.decode(z, clamp=False).float(), z.detach()


rules = {
    "SDS, w = 7.5": sds(cfg(cond, ref, 7.5)),
    "SDS, w = 30": sds(cfg(cond, ref, 30.0)),
    "NFSD, w = 1": nfsd(cond, ref, spoiled, 1.0, split),
    "NFSD, w = 7.5": nfsd(cond, ref, spoiled, 7.5, split),
}
rows, beyond = {}, {}
for name, rule in rules.items():
    rows[name], z = latents_of(rule)
    right = int(
        reader.obeys(rows[name].clamp(-1, 1), [parse(text) for text in PROMPTS])["all"].sum()
    )
    beyond[name] = float((rows[name].abs() > 1).double().mean())
    print(
        f"{name}: {right} of 4 read as asked, {beyond[name]:.1%} of the values beyond [-1, 1],"
        f" deviation of the latents {float(z.std()):.2f}"
    )
assert (
    beyond["SDS, w = 30"] > beyond["SDS, w = 7.5"]
    and beyond["NFSD, w = 7.5"] > beyond["NFSD, w = 1"]
)
study.strip([shown_as(x[:3]) for x in rows.values()], row_titles=list(rows), scale=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Experiment: what guidance costs
#
# DreamFusion guides with $w=100$. Here are four methods over $w$, on `mini-sd`: eight prompts, three particles each, 150 steps of Adam whose rate was chosen on other prompts, three seeds (`python -m course_lib.zoo.distilled`). *Obeyed*: the reader finds all that the prompt names. *Saturation*: HSV's. *Fréchet distance*: to renders that obey. *Diversity*: mean distance of pictures of one prompt, over that of renders. Dotted: sampling, by DDIM. Bars are standard errors over seeds.

# %% slideshow={"slide_type": "-"}
MARKS = {
    "SDS": ("warn", "o-"),
    "SJC": ("noise", "s--"),
    "VSD": ("model", "^-"),
    "NFSD": ("guide", "v-"),
    "sampling": ("muted", ".:"),
}
VALUES = {
    "obeyed": "obeyed",
    "saturation": "saturation",
    "frechet": "Fréchet distance",
    "diversity": "diversity",
}
runs = {}
for row in distilled.rows("methods"):
    runs.setdefault((row["method"], row["w"]), []).append(row)
for row in distilled.rows("ordinary"):
    runs.setdefault(("sampling", row["w"]), []).append(row)


def over_seeds(rows, key):
    """Mean and standard error over seeds."""
    values = torch.tensor([row[key] for row in rows], dtype=F64)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


fig, axes = plt.subplots(2, 2, figsize=(9, 5.2), sharex=True)
for ax, (key, title) in zip(axes.flat, VALUES.items(), strict=True):
    for name, (colour, mark) in MARKS.items():
        scales = sorted(w for method, w in runs if method == name)
        mean, bar = zip(*(over_seeds(runs[name, w], key) for w in scales), strict=True)
        ax.errorbar(
            scales, mean, bar, fmt=mark, ms=6, lw=2, color=study.COLOURS[colour], label=name
        )
    ax.set(xscale="log", ylabel=title)
    ax.set_xticks([1, 3, 7.5, 30, 100], labels=["1", "3", "7.5", "30", "100"])
    ax.minorticks_off()
    if ax in axes[1]:
        ax.set_xlabel("guidance w")
fig.legend(
    *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=11
)
plt.show()

# %%
print(f"{'':10s}" + "".join(f"{f'w = {w:g}':>26s}" for w in (1, 3, 7.5, 30, 100)))
for name in MARKS:
    cells = []
    for w in distilled.SCALES:
        obeyed, frechet, spread = (
            over_seeds(runs[name, w], key)[0] for key in ("obeyed", "frechet", "diversity")
        )
        cells.append(f"{obeyed:.0%}, {frechet:.2f}, {spread:.2f}")
    print(f"{name:10s}" + "".join(f"{cell:>26s}" for cell in cells))
print("in each cell: obeyed, Fréchet distance, diversity")


def mean(name, w, key):
    """Over the seeds."""
    return over_seeds(runs[name, w], key)[0]


OURS = ("SDS", "SJC", "VSD", "NFSD")
assert all(mean(name, 30, "frechet") > mean(name, 7.5, "frechet") for name in MARKS)
assert all(mean(name, 100, "obeyed") < 0.2 for name in MARKS)
assert max(distilled.SCALES, key=lambda w: mean("SDS", w, "obeyed")) == 3
for w in (1, 3, 7.5):
    assert mean("SDS", w, "obeyed") >= mean("sampling", w, "obeyed")
    assert mean("SDS", w, "diversity") < min(
        mean(name, w, "diversity") for name in ("sampling", "VSD")
    )
assert mean("NFSD", 1, "obeyed") > mean("SDS", 1, "obeyed")
for w, key in ((30, "frechet"), (30, "saturation"), (100, "frechet"), (100, "saturation")):
    assert min(OURS, key=lambda name: mean(name, w, key)) == "VSD"
assert min(OURS, key=lambda name: mean(name, 1, "frechet")) == "VSD"
best = mean("SDS", 3, "frechet")
print(
    f"Fréchet distance: SDS at 3 {best:.2f}; at 7.5 VSD {mean('VSD', 7.5, 'frechet'):.2f}, NFSD {mean('NFSD', 7.5, 'frechet'):.2f}"
)
assert best < min(mean(name, 7.5, "frechet") for name in ("VSD", "NFSD"))

# %% [markdown] slideshow={"slide_type": "slide"}
# What is there to see, and asserted above:
#
# - **Here nobody needs 100.** It breaks every method, plain sampling included; what is best for sampling, 3, is best for SDS. DreamFusion's scale was found on a model of everything; this one saw nothing but captions of this kind, and its $\delta_C$ is strong.
# - *Up to 7.5* SDS obeys no worse than sampling, and its pictures of one prompt are more alike. **VSD gives the diversity back**, at $w=1$ with the smallest distance of the four, and obeys less. Part of both is its slower rate: see *switched off* below.
# - *NFSD* at $w=1$ obeys more than SDS at $w=1$: without $-\epsilon$ the prompt is heard at once. Its $\delta_D$ is the smaller beside $\delta_C$ (figure above), so that the same $w$ weighs more, and 7.5 is too much. The claim of its authors, sharp at 7.5 where SDS needs 100, is about a model where SDS needs 100.
# - *SJC*, the mean of two draws, is SDS with less noise, at twice the price.
# - *At 30 and above* VSD breaks least: lowest saturation, smallest distance. That again is its slower rate. VSD and NFSD at 7.5 are *not* better here than SDS at its best.
#
# **Switched off.** The term that defines a method is taken out, at the method's own rate: SDS without the prompt, SJC asked at $x_0$ itself, VSD with $x_0$ in the place of its second score, NFSD without $\delta_D$.

# %% slideshow={"slide_type": "-"}
off = {}
for row in distilled.rows("ablations"):
    off.setdefault((row["off"], row["w"]), []).append(row)
for (name, w), rows in off.items():
    whole = runs[rows[0]["method"], w]
    said = ", ".join(
        f"{title} {over_seeds(whole, key)[0]:.2f} -> {over_seeds(rows, key)[0]:.2f}"
        for key, title in VALUES.items()
        if key != "saturation"
    )
    print(f"{name:20s} off at w = {w:g}: {said}")

gone = {name: over_seeds(rows, "obeyed")[0] for (name, w), rows in off.items() if w == 3}
assert max(gone["SDS, prompt"], gone["NFSD, delta_D"]) < 0.1
assert gone["SJC, perturbation"] < mean("SJC", 3, "obeyed")
for w in (1.0, 3.0, 7.5, 30.0):
    distance, spread = (
        over_seeds(off["VSD, second score", w], key)[0] for key in ("frechet", "diversity")
    )
    assert spread < mean("VSD", w, "diversity")
    assert (distance > mean("VSD", w, "frechet")) == (w == 1)
for w in (3.0, 7.5):
    assert over_seeds(off["VSD, second score", w], "obeyed")[0] > mean("VSD", w, "obeyed")

# %% [markdown] slideshow={"slide_type": "-"}
# Without the prompt, or without $\delta_D$, nothing is left. To ask SJC's network at $x_0$ itself costs a little obedience and no distance: this network forgives what the small one above did not. Without its second score VSD is SDS at a slower rate, and that tells what the score itself does. At $w=1$ it keeps its promise: with it pictures are nearer to renders and more various, though fewer obey. From 3 on it buys variety alone: without it pictures are nearer, and at 3 and 7.5 more of them obey. The theory says as much. It asks for the score of a density, and a guided teacher is none (lecture 04).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## BSD: a teacher that learns from its pupil
#
# **Bootstrapped score distillation** (DreamCraft3D; Sun et al. 2024) lets the *real* score learn as well. Now and then the pictures are noised to a middle level and denoised again under guidance, which mends them; on these the teacher is fine-tuned as DreamBooth does with photographs of one subject (Ruiz et al. 2023). Two LoRAs on one frozen network: one for what the pictures should be, one for what they are. The level falls as the pictures improve.
#
# A bootstrapped teacher is as good as what it is shown: in DreamCraft3D mended views of a single object that is nearly finished, here 24 pictures of eight prompts. *Claim*, in as many steps as VSD, with settings chosen on other prompts: pictures come nearer to renders. The gain is about as large as what chance does to a seed, so that seeds are compared one by one, nine of them (six were added when three could not decide).

# %% slideshow={"slide_type": "-"}
display(study.source(Bootstrapped.learn, renoised))
pair = {m: [row for row in distilled.rows("bsd") if row["method"] == m] for m in ("VSD", "BSD")}
for name, rows in pair.items():
    said = ", ".join(
        f"{title} {over_seeds(rows, key)[0]:.2f} ± {over_seeds(rows, key)[1]:.2f}"
        for key, title in VALUES.items()
    )
    print(f"{name} at w = {distilled.USUAL:g}: {said}")
gains = [
    {"gain": plain["frechet"] - boot["frechet"]}
    for plain, boot in zip(pair["VSD"], pair["BSD"], strict=True)
]
gain, error = over_seeds(gains, "gain")
nearer = sum(of["gain"] > 0 for of in gains)
print(f"nearer by {gain:.3f} ± {error:.3f}, in {nearer} of {len(gains)} seeds")
assert gain > 2 * error

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Two relatives: DDS and ISM
#
# **DDS** (Hertz et al. 2023) edits. From SDS of the picture under the new prompt it subtracts SDS of the picture that it came from, under the old prompt, *at the same noise*. What SDS does to any picture whatever the prompt is in both terms, and cancels: where nothing is to change, nothing moves. **ISM** (LucidDreamer; Liang et al. 2024) removes the chance: $x$ comes from $x_0$ by DDIM inversion, not by fresh noise, and the target is the same path one interval below.
#
# *Look*: red things are to be blue. The size of the first gradient at each of the 8 × 8 places, averaged over 16 draws. *Claims*: DDS puts a larger share of it on the object than SDS does; with the prompt unchanged DDS is exactly 0; and draws of SDS differ at the same $x_0$, those of ISM do not.

# %% slideshow={"slide_type": "-"}
red = [
    i
    for i, text in enumerate(captions)
    if " red " in text and "mug" not in text and "seen" not in text
][:4]
source_text = [captions[i] for i in red]
target_text = [text.replace(" red ", " blue ") for text in source_text]
latents, nothing = encoded(red), told([""] * 4)
old, new = (cfg(told(texts), nothing, 7.5) for texts in (source_text, target_text))
thing = torch.nn.functional.max_pool2d(
    (render(some.scenes[torch.tensor(red)], 64).segmentation > 0).float(), 8
)
thing = torch.nn.functional.max_pool2d(
    thing, 3, 1, 1
)  # and the places beside it, which the encoder sees too
rules = {"SDS": sds(new), "DDS": dds(new, old, latents), "ISM": ism(new, nothing)}
drawn = {name: [] for name in rules}
with torch.no_grad(), autocast("cpu"):
    for k in range(16):
        level = uniform_times(model.schedule, 0.1, 0.98)(0.0, 4, generator(k))
        for name in ("SDS", "DDS"):
            drawn[name].append(rules[name](latents, level, SampleNoise(k)).float())
    level = torch.full((4,), 1.0, dtype=F64)
    again = {
        name: torch.stack([rules[name](latents, level, SampleNoise(k)).float() for k in range(6)])
        for name in ("SDS", "ISM")
    }
    same = dds(old, old, latents)(latents, level, SampleNoise(0))
maps = {
    name: torch.stack(of).square().mean((0, 2)) for name, of in drawn.items() if of
}  # (4, 8, 8)
on_thing = {name: float((of * thing[:, 0]).sum() / of.sum()) for name, of in maps.items()}
chance = {name: float(of.std(0).norm() / of.mean(0).norm()) for name, of in again.items()}
fig, axes = plt.subplots(1, 6, figsize=(9, 1.9))
for ax, k, name in zip(axes, (0, 0, 0, 1, 1, 1), ("picture", "SDS", "DDS") * 2, strict=True):
    if name == "picture":
        ax.imshow((some.pictures(torch.tensor(red))[k].permute(1, 2, 0) + 1) / 2)
    else:
        ax.imshow(maps[name][k].sqrt(), cmap="viridis", vmin=0)
    ax.set_title(name, fontsize=11)
    ax.axis("off")
plt.show()
print(
    "share of the gradient's square on the object: "
    + ", ".join(f"{name} {share:.0%}" for name, share in on_thing.items())
)
print(
    "chance: deviation over draws against their mean: "
    + ", ".join(f"{name} {value:.2f}" for name, value in chance.items())
)
assert on_thing["DDS"] > on_thing["SDS"] and float(same.abs().max()) == 0.0
assert chance["ISM"] == 0.0 < chance["SDS"]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Generators: what $g$ may be
#
# Nothing above asks what draws $x_0$. $g$ needs a derivative, and it *constrains*: what it cannot draw, no gradient can make it draw.
#
# | $g(\theta)$ | numbers a picture | what it cannot do |
# |---|---|---|
# | latents, `Pixels((4, 8, 8))` | 256 | what the decoder cannot |
# | pixels | 12,288 | nothing, noise included |
# | a network of sines, `Siren` | about 8,700 | detail finer than its waves |
# | a solid of voxels, seen from a camera, `VoxelField` | 131,075 | what no solid looks like |
# | a painting, `Painted`: sky, ground, horizon, one shape | 16 | more than one thing |
#
# For all but the first, pictures must become latents on the way: the gradient runs back through the VAE's *encoder*. *Look*: what each draws at the start, and three paintings of *a large red cone on grass* after 100 steps. With so few numbers, most roads are closed: what a painting finds depends on its start.

# %% slideshow={"slide_type": "-"}
corners = rays(some.scenes[torch.tensor([0])], 64)
generators = {
    "pixels": Pixels(tanh=True),
    "Siren": Siren(),
    "voxels": VoxelField(1, corners),
    "painting": Painted(3, seed=1),
}
with torch.no_grad():
    starts = [make()[0] for make in generators.values()]
for name, make in generators.items():
    print(f"{name}: {sum(value[0].numel() for value in make.parameters()):,} numbers a picture")
ask = cfg(told([PROMPTS[0]] * 3), told([""] * 3), 7.5)
adam = torch.optim.Adam(generators["painting"].parameters(), lr=0.05, betas=(0.9, 0.99))
painted = distill(
    generators["painting"], sds(ask), times, adam, 100, encode=checkpointed(model.encode), half=True
)
for row in distilled.rows("generators"):
    print(
        f"stored: {row['generator']}, {row['steps']} steps at w = {row['w']:g}:"
        f" colour right in {row['colour']:.0%}, shape in {row['shape']:.0%} of 4"
    )
study.grid(
    [shown_as(x.detach()) for x in (*starts, *painted)],
    titles=[f"{name}, start" for name in generators] + [f"painting {k}, end" for k in (1, 2, 3)],
    columns=4,
    scale=2,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Pixels or latents?
#
# In latents the picture is 256 numbers, and SDS never leaves the network's own space. In pixels $z=\mathrm{enc}(x_0)$, and by the chain rule
# $$\nabla_{x_0}=\Big(\frac{\partial\,\mathrm{enc}}{\partial x_0}\Big)^{\!\top}\nabla_z^{\text{SDS}}:$$
# the encoder's Jacobian is *not* dropped, since without it there is no way from 8 × 8 to 64 × 64. It costs a pass forward and one back through the encoder, and the memory of all that it computed. **Checkpointing** keeps the input alone while the model is asked, and computes the rest again on the way back: the peak of a step is the larger of the two networks in place of their sum. The encoder is the larger here by far, so that little is saved; it pays where asking takes as much memory as encoding. And where the encoder is blind, no gradient comes back: noise from the start stays in the pixels, and in 150 steps no picture of pixels is read as asked.

# %% slideshow={"slide_type": "-"}
for row in distilled.rows("pixels"):
    print(
        f"pixels, activations {row['kept']:10s}: {row['seconds_a_step']:.2f} s a step of {row['pictures']} pictures,"
        f" at most {row['megabytes']:.0f} MB, {row['obeyed']:.0%} read as asked"
    )

peak = {row["kept"]: row["megabytes"] for row in distilled.rows("pixels")}
assert peak["recomputed"] < peak["kept"]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What does a step cost?
#
# Counted in rows that the network sees for one particle, and measured in the experiment above (24 latents, one thread). VSD pays for its second score twice: it is asked, and it is trained, forward and back.

# %% slideshow={"slide_type": "-"}
WORK = {
    "SDS": lambda cond, ref, bad: sds(cfg(cond, ref, 7.5)),
    "SJC": lambda cond, ref, bad: sjc(cfg(cond, ref, 7.5), distilled.DRAWS),
    "VSD": lambda cond, ref, second: vsd(cfg(cond, ref, 7.5), second),
    "NFSD": lambda cond, ref, bad: nfsd(cond, ref, bad, 7.5, split),
}
for name, make in WORK.items():
    counters = [Counted(blobs.denoiser) for _ in range(3)]
    make(*counters)(scattered(0, n=1), torch.tensor(1.0), SampleNoise(0))
    seconds = over_seeds(runs[name, 7.5], "seconds_a_step")[0]
    beside = ", and one forward and back" if name == "VSD" else ""
    print(f"{name:5s} {sum(of.rows for of in counters)} rows{beside}; {seconds:.3f} s a step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Particles in the plane. **Annealed from 3, all points of SDS end in A: why? What does VSD make of the same start, and which shares does it find with the annealing off? Ask for "A or B" and turn the guidance up: where do the points go?** The arrow keys move the step.

# %% slideshow={"slide_type": "-"}
study.DistillExplorer(blobs)

# %% [markdown] slideshow={"slide_type": "slide"}
# A picture as it is distilled: $x_0$, the noisy picture at which the model was asked, and what it believed there. **At which levels does the object get its place, at which its edges? What does $w=100$ do to the deviation of the latent?**

# %% slideshow={"slide_type": "-"}
study.ImageDistillExplorer(model, spoiled)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# **The graph is not cut.** SDS is often written as a loss, `((eps_hat - eps).detach() * x0).sum()`, whose gradient is the bracket. Without `.detach()` the product rule adds $(\partial\hat\epsilon/\partial x)^\top x_0$. On $\mathcal N(\mu,s^2)$ the mean becomes $\frac\kappa\sigma(2x_0-\mu)$: it runs, it converges, and to $\mu/2$. Pictures end half-way to grey.
#
# **The weight is off by $\sigma$.** A difference of *scores* is $(D_{\text{fake}}-D_{\text{real}})/\sigma^2$; of noises, $/\sigma$; of pictures, neither. All point the same way, and differ by the range of $\sigma$ and its square.
#
# **The rate is too high.** SDS has noise of its own, $w(1-\kappa)\epsilon$ in each step. At a constant rate $\eta$ particles never come to rest, but keep the variance $\eta^2(1-\kappa)^2/(1-(1-\eta\kappa/\sigma)^2)$, which looks like diversity, and beyond $\eta=2\sigma/\kappa$ they fly off.

# %% slideshow={"slide_type": "-"}


def uncut(x0, sigma, noise):
    """The loss (eps_hat - eps) x0 differentiated as it stands, without detach."""
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        eps = noise(x0)
        x = leaf + sigma[:, None] * eps
        residual = (x - gauss.denoiser(x, sigma)) / sigma[:, None] - eps
        return torch.autograd.grad((residual * leaf).sum(), leaf)[0]


def at_end(rule, lr, steps=300, sigma=0.5, quiet=True):
    """Mean and deviation of 2,000 particles after plain steps at one level."""
    x, source = torch.zeros(2000, 1, dtype=F64), generator(4)
    level = torch.full((2000,), sigma, dtype=F64)
    for k in range(steps):
        rate = lr / (1 + k / 30) if quiet else lr
        x = x - rate * rule(x, level, lambda x: torch.randn(x.shape, generator=source, dtype=F64))
    return float(x.mean()), float(x.std())


cut, leak = (at_end(rule, 0.3)[0] for rule in (sds(gauss.denoiser), uncut))
print(f"the data's mean is {mu:g}: SDS ends at {cut:.2f}, without detach at {leak:.2f}")
assert abs(cut - mu) < 0.05 and abs(leak - mu / 2) < 0.05

latents, ask = encoded(red), told(source_text)
with torch.no_grad():
    sizes = {
        v: float(
            (ask(latents + v * SampleNoise(0)(latents), torch.tensor(v)) - latents)
            .square()
            .mean()
            .sqrt()
        )
        for v in (0.05, 12.0)
    }
for power, name in enumerate(("pictures", "noises", "scores")):
    print(
        f"difference of {name}: {sizes[0.05] / 0.05**power:.2f} at σ = 0.05, {sizes[12.0] / 12.0**power:.4f} at σ = 12"
    )

k = 0.5  # kappa at sigma = s
for rate in (0.05, 0.5, 1.5):
    pull = rate * k / s
    exact = rate * (1 - k) / math.sqrt(1 - (1 - pull) ** 2)
    found = at_end(sds(gauss.denoiser), rate, quiet=False)[1]
    print(
        f"rate {rate:g}: SDS's particles keep the deviation {found:.2f} (predicted {exact:.2f}); the data's is {s:g}"
    )
    assert abs(found / exact - 1) < 0.1
assert at_end(sds(gauss.denoiser), 2.2, quiet=False)[1] > 1e3

# %% [markdown] slideshow={"slide_type": "slide"}
# **Guidance reversed**: $D_{\text{cond}}+w\,(D_{\text{ref}}-D_{\text{cond}})$ runs, converges, and obeys nothing. **A fixed range** misses shares (above); a range of small $\sigma$ alone draws edges and textures of what the start happened to look like, and cannot change a ground. On four pictures:

# %% slideshow={"slide_type": "-"}
cond, ref = told(PROMPTS), told([""] * 4)
wanted = [parse(text) for text in PROMPTS]
wrong = {
    "as it should be": latents_of(sds(cfg(cond, ref, 3.0)), 80)[0],
    "guidance reversed": latents_of(sds(cfg(ref, cond, 3.0)), 80)[0],
    "σ below 0.15 only": latents_of(sds(cfg(cond, ref, 3.0)), 80, levels=log_uniform(0.03, 0.15))[
        0
    ],
}
right = {name: int(reader.obeys(x.clamp(-1, 1), wanted)["all"].sum()) for name, x in wrong.items()}
print("read as asked, of 4: " + ", ".join(f"{name} {count}" for name, count in right.items()))
assert right["as it should be"] > max(right["guidance reversed"], right["σ below 0.15 only"])
study.strip([shown_as(x[:3]) for x in wrong.values()], row_titles=list(wrong), scale=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# The cells of `mini-sd` with another name: SDS of a latent, here where its weights are with DreamFusion's guidance and more steps, else on the course's model.

# %%
SETTINGS = {
    "stable-diffusion-1.5": ("a cat on a bench", 100.0, 300),
    "mini-sd": ("a large blue cone on sand", 3.0, 80),
}
name = next(name for name in SETTINGS if zoo.available(name))
sd, (prompt, w, steps) = zoo.load(name), SETTINGS[name]
with torch.no_grad():
    ask = cfg(*(sd.denoiser.given(**sd.embed([text])) for text in (prompt, "")), w)
theta = Pixels(sd.shape, spread=1.0).to(sd.device)
adam, snapshots = torch.optim.Adam(theta.parameters(), lr=0.1, betas=(0.9, 0.99)), []


def keep(step, x0):
    """Four pictures on the way."""
    if step in (1, steps // 8, steps // 3, steps):
        with torch.no_grad(), autocast(sd.device):
            snapshots.append(sd.decode(theta()).float().cpu()[0])


distill(theta, sds(ask), uniform_times(sd.schedule), adam, steps, half=True, on_step=keep)
study.grid(
    [shown_as(x) for x in snapshots],
    titles=[f"step {k}" for k in (1, steps // 8, steps // 3, steps)],
    scale=max(1, 128 // sd.pixels),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - SDS is $w\,(\hat\epsilon-\epsilon)$, pulled back through $g$ and not through the network: on average the gradient of $w\,\sigma\,\mathrm{KL}$ between one noised point and the noised data.
# - $-\epsilon$ changes the variance alone: down for $\sigma>s$, up below, by $(\sigma/s)^4$.
# - SDS is an optimiser. It ends in stationary points, in shares of their basins, with no spread; range and weight decide which points there are.
# - A second score of the particles makes a distribution of it (VSD); with $D_{\text{fake}}=x_0$ it is SDS. Noise that falls from wide to narrow gives modes their shares.
# - The published scale of guidance belongs to the published model. Take the gradient apart, compare sizes, measure.
#
# **Exercises.** [Set 08](../my_course/08_score_distillation.ipynb). Lecture 09 puts a solid in the place of $g$.
#
# ## Sources
#
# - B. Poole, A. Jain, J. Barron, B. Mildenhall. *DreamFusion: Text-to-3D using 2D Diffusion.* 2023. arXiv:2209.14988 (SDS)
# - H. Wang, X. Du, J. Li, R. Yeh, G. Shakhnarovich. *Score Jacobian Chaining: Lifting Pretrained 2D Diffusion Models for 3D Generation.* 2023. arXiv:2212.00774
# - Z. Wang, C. Lu, Y. Wang, F. Bao, C. Li, H. Su, J. Zhu. *ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation.* 2023. arXiv:2305.16213
# - O. Katzir, O. Patashnik, D. Cohen-Or, D. Lischinski. *Noise-Free Score Distillation.* 2024. arXiv:2310.17590
# - A. Hertz, K. Aberman, D. Cohen-Or. *Delta Denoising Score.* 2023. arXiv:2304.07090
# - Y. Liang, X. Yang, J. Lin, H. Li, X. Xu, Y. Chen. *LucidDreamer: Towards High-Fidelity Text-to-3D Generation via Interval Score Matching.* 2024. arXiv:2311.11284
# - J. Sun, B. Zhang, R. Shao, L. Wang, W. Liu, Z. Xie, Y. Liu. *DreamCraft3D: Hierarchical 3D Generation with Bootstrapped Diffusion Prior.* 2024. arXiv:2310.16818 (BSD)
# - N. Ruiz, Y. Li, V. Jampani, Y. Pritch, M. Rubinstein, K. Aberman. *DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation.* 2023. arXiv:2208.12242
# - E. Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models.* 2022. arXiv:2106.09685
# - V. Sitzmann, J. Martel, A. Bergman, D. Lindell, G. Wetzstein. *Implicit Neural Representations with Periodic Activation Functions.* 2020. arXiv:2006.09661
