# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 03 Score SDEs and fast samplers
#
# **The same model in ten calls instead of a thousand, and how to know that nothing was lost.** Lecture 02 walked back from noise in many small random steps. This one lets the steps become infinitely small, finds
# two equations behind all samplers, solves them well, and holds every solver against exact answers.
#
# After it you can
#
# - write the forward process as a stochastic differential equation, and derive its two ways back: one with noise, one without;
# - say why DDIM is an *exponential integrator*, and derive DPM-Solver++(2M), UniPC and their relatives from one integral;
# - measure the order of a sampler, and tell an order that is claimed from one that is reached;
# - choose sampler, grid and number of network calls for a purpose, with or without fresh noise;
# - compute an exact likelihood, and carry a picture to its noise and back;
# - find the mistakes of samplers that run, look plausible and are wrong.
#
# You need lectures 01 and 02. Time: 90 minutes. Everything runs on a laptop, with no network.

# %%
import itertools
import math

import matplotlib.pyplot as plt
import torch

from course_lib import metrics, study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.flows import slerp
from course_lib.gaussians import Mixture
from course_lib.langevin import predictor_corrector
from course_lib.likelihood import exact_log_likelihood, rademacher
from course_lib.multistep import (
    deis,
    dpm_solver_pp_2m,
    dpm_solver_pp_3m,
    lms,
    plms,
    unipc,
)
from course_lib.sample import sample
from course_lib.schedules import (
    Discrete,
    exponential,
    karras,
    leading,
    linspace,
    scaled_linear_betas,
    trailing,
)
from course_lib.sdes import VE, VP, SubVP, euler_maruyama
from course_lib.singlestep import dpm_solver_2, dpm_solver_3, dpm_solver_pp_2s, heun
from course_lib.steps import ddim, ddpm, euler
from course_lib.stochastic import (
    dpm_solver_pp_sde_2m,
    dpm_solver_sde,
    edm_stochastic,
    reverse_diffusion,
)
from course_lib.worlds import digits, toys

torch.set_num_threads(1)  # tiny tensors are faster on one thread
study.use()
F64 = torch.float64
blobs, peaks = toys.three_blobs(), toys.two_peaks(weight=0.3)
square = (-2.6, 2.6, -2.6, 2.6)
D = zoo.load("digits", device="cpu")  # small enough that a GPU would not help


def apart(a, b):
    """Mean distance between the rows of two sets of points (n, ...)."""
    return float((a - b).flatten(1).norm(dim=1).mean())


def gaussian_noise(seed):
    """noise(x) from one stream: for toys, where a sample may depend on its batch."""
    source = generator(seed)
    return lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype)


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# The same noise, the same model, the same number of network calls, four ways to use them. Above, 150 points on their way to three blobs, whose *exact* end is known: a line joins each point to where it should be, and the
# title says how far that is on average. Below, six digits from the course's U-Net, and how far their pixels are off (white minus black is 2). First with **6 calls**, then with **20**; at the right the exact flow, and for the digits a run of 64 calls in its place.

# %% slideshow={"slide_type": "-"}
HIGH, LOW = 15.0, 0.02


def levels(n, low=LOW, high=HIGH):
    """Karras's grid of n steps from high down to low, without a last step to 0."""
    return karras(n, low, high, to_zero=False)


FOUR = {  # name: (step, network calls for each)
    "DDIM": (ddim, 1),
    "Heun (EDM)": (heun, 2),
    "DPM-Solver++(2M)": (dpm_solver_pp_2m, 1),
    "UniPC-3": (unipc(3), 1),
}
start = blobs.sample(150, generator(1), HIGH)
there = blobs.reference_flow(start, HIGH, LOW)
ten = D.given(label=torch.arange(10))
noise_of_ten = SampleNoise(4).start((10, *digits.SHAPE), HIGH)
best = sample(ten, noise_of_ten, levels(64), unipc(3))


def beside(calls):
    """Particles above digits: four samplers with this number of calls, and the answer."""
    six = D.given(label=torch.arange(6))
    fig, axes = plt.subplots(2, 5, figsize=(8.0, 3.8))
    for column, name in zip(axes.T, [*FOUR, "the answer"], strict=True):
        if name in FOUR:
            step, each = FOUR[name]
            grid = levels(calls // each)
            points = sample(blobs.denoiser, start, grid, step)
            pictures = sample(six, noise_of_ten[:6], grid, step)
        else:
            points, pictures = there, best[:6]
        study.density(column[0], blobs.log_prob, square)
        column[0].plot(
            *torch.stack([points, there], 2).permute(1, 2, 0), color="grey", linewidth=0.6
        )
        study.scatter(column[0], points, colour=study.COLOURS["model"], size=5)
        off = f"\n{apart(points, there):.3f} off" if name in FOUR else "\n"
        column[0].set(title=name + off, xlim=square[:2], ylim=square[2:], xticks=(), yticks=())
        column[0].title.set_fontsize(12)
        column[0].set(xlabel="", ylabel="")
        column[1].imshow(study.tile(pictures, columns=3)[0], cmap="gray", vmin=-1, vmax=1)
        wrong = float((pictures - best[:6]).square().mean().sqrt())
        column[1].set_title(f"{wrong:.3f} off" if name in FOUR else "64 calls", fontsize=12)
        column[1].set_axis_off()
    fig.suptitle(f"{calls} calls of the network")
    plt.show()


beside(6)

# %%
beside(20)

# %% [markdown]
# Three things to see. *Heun* spends two calls on a step: with 6 calls it has three steps, and is lost. The rules that remember what the network said before, *DPM-Solver++(2M)* and *UniPC*, ask it as rarely as DDIM does, and with 20 calls they are several times nearer. And a higher order is no promise: with 6 calls UniPC-3 is
# farther from the answer than DDIM. What order means, when it begins to pay and what it costs is the first half of this lecture.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From steps to an equation
#
# One step of DDPM, in its own coordinates, is $x_{k+1} = \sqrt{1-\beta_k}\,x_k+\sqrt{\beta_k}\,\epsilon$ (lecture 01). Let $1{,}000$ steps fill the time from 0 to 1, so that a step lasts $\Delta t$ and $\beta_k = \beta(t)\,\Delta t$. For small $\Delta t$,
# $\sqrt{1-\beta\,\Delta t}\approx 1-\tfrac12\beta\,\Delta t$, and
#
# $$x_{t+\Delta t}-x_t \approx -\tfrac12\beta(t)\,x_t\,\Delta t+\sqrt{\beta(t)}\,\sqrt{\Delta t}\;\epsilon .$$
#
# Noise of variance $\Delta t$, added up over many steps, is **Brownian motion** $w$: its increments are independent and $w_{t+\Delta t}-w_t\sim\mathcal N(0,\Delta t\,I)$. The limit is a **stochastic differential equation** (SDE), in general
#
# $$dx = f(x,t)\,dt + g(t)\,dw .$$
#
# $f$ is the *drift*, what happens on average; $g$ the *diffusion*, how much noise comes in. In all three processes of Song et al. (2021) the drift is linear, $f(x,t)=r(t)\,x$ with a rate $r$, so that $x_t=\alpha(t)\,x_0+\mathrm{std}(t)\,\epsilon$ as in lecture 01. Which $\alpha$ and
# $\mathrm{std}$? A step multiplies the signal by $1+r\,dt$; it multiplies the variance of the noise by $(1+r\,dt)^2\approx 1+2r\,dt$ and adds $g^2dt$:
#
# $$\alpha' = r\,\alpha,\qquad (\mathrm{std}^2)' = 2r\,\mathrm{std}^2+g^2 .$$
#
# | SDE | $r(t)$ | $g(t)^2$ | $\alpha$ | $\mathrm{std}$ |
# |---|---|---|---|---|
# | VP, variance preserving (DDPM) | $-\tfrac12\beta$ | $\beta$ | $e^{-\frac12\int\beta}$ | $\sqrt{1-\alpha^2}$ |
# | sub-VP | $-\tfrac12\beta$ | $\beta\,(1-\alpha^4)$ | $e^{-\frac12\int\beta}$ | $1-\alpha^2$ |
# | VE, variance exploding | $0$ | $2\ln\tfrac{\sigma_{\max}}{\sigma_{\min}}\;\mathrm{std}^2$ | $1$ | $\sigma_{\min}\big(\tfrac{\sigma_{\max}}{\sigma_{\min}}\big)^t$ |
#
# *sub-VP* has less noise than VP at every time and forgets the picture at the same pace. The two equations above are the check of the table, and of the code, at 500 times each:

# %%
SDES = {"VP": VP(), "sub-VP": SubVP(), "VE": VE(0.01, HIGH)}
t = torch.linspace(0.001, 1, 500, dtype=F64)
for name, sde in SDES.items():
    alpha, std = sde.alpha(t), sde.std(t)
    d_alpha, d_std = sde.velocity(t)  # by automatic differentiation
    signal = d_alpha - sde.rate(t) * alpha
    noise = 2 * std * d_std - 2 * sde.rate(t) * std**2 - sde.diffusion(t) ** 2
    assert float(signal.abs().max()) < 1e-9 * float(d_alpha.abs().max() + 1)
    assert float(noise.abs().max()) < 1e-9 * float((std * d_std).abs().max() + 1)
    print(f"{name}: alpha and std obey the SDE")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Two ways back
#
# How does the density $p_t$ of $x_t$ change? Drift carries probability along, noise spreads it. That is the Fokker-Planck equation (with $\nabla\cdot$ the divergence and $\Delta=\nabla\cdot\nabla$):
#
# $$\partial_t p_t = -\nabla\cdot(f\,p_t)+\tfrac12 g^2\,\Delta p_t .$$
#
# Now the one trick on which everything rests. The gradient of a density is the density times its **score** $s=\nabla\log p_t$, that is $\nabla p_t=p_t\,s$, so that $\Delta p_t=\nabla\cdot(p_t\,s)$: *spreading is the same as being carried with velocity* $-\tfrac12g^2s$, down the density. Take any share $\lambda^2\geq0$, and write
# the noise term as $\tfrac12g^2\Delta p=\tfrac{1+\lambda^2}2g^2\,\nabla\cdot(p\,s)-\tfrac{\lambda^2}2g^2\Delta p$:
#
# $$\partial_t p_t = -\nabla\cdot\Big(\big[f-\tfrac{1+\lambda^2}2\,g^2 s\big]\,p_t\Big)-\tfrac{\lambda^2}2 g^2\,\Delta p_t .$$
#
# Run the clock backwards, so that $dt<0$: the left side changes its sign, and with it the last term becomes an honest spreading. So *every* process
#
# $$\boxed{\;dx=\Big[f(x,t)-\tfrac{1+\lambda^2}2\,g(t)^2\,\nabla\log p_t(x)\Big]dt+\lambda\,g(t)\,d\bar w\;}\qquad dt<0$$
#
# passes through the same densities $p_t$ on its way back ($\bar w$ is Brownian motion in backward time).
#
# - $\lambda=1$ is the **reverse SDE** (Anderson 1982; Song et al. 2021, Eq. 6): the exact reversal, path by path. DDPM's sampler is a way to solve it.
# - $\lambda=0$ is the **probability-flow ODE** (Song et al. 2021, Eq. 13): no noise at all. Same densities, other paths. The end is a *function* of the start.
#
# All that is unknown is the score, and lecture 01 has it: $\sigma^2\nabla\log p=D-x$. Here are both, on a line, from the same six starts. The background is $p_t$; the flow's paths never cross.

# %%
sde = SDES["VP"]
times = torch.linspace(1, 0.002, 121, dtype=F64)
grid = sde.sigma(times)
six = peaks.sample(6, generator(3), float(grid[0]))
paths = {}
for name, step in {
    "reverse SDE": euler_maruyama(sde, gaussian_noise(5)),
    "flow": euler(sde),
}.items():
    seen = [six * sde.alpha(times[0])]
    sample(
        peaks.denoiser,
        six,
        grid,
        step,
        on_step=lambda x, sigma, seen=seen: seen.append(x * (1 + sigma**2) ** -0.5),
    )
    paths[name] = torch.stack(seen)[:, :, 0]
height = torch.linspace(-2.4, 2.4, 161, dtype=F64)
shade = torch.stack(
    [
        peaks.log_prob(height[:, None] / sde.alpha(s), sde.sigma(s)).exp() / sde.alpha(s)
        for s in times
    ]
)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
for ax, (name, path) in zip(axes, paths.items(), strict=True):
    ax.contourf(times, height, shade.T.sqrt(), levels=8, cmap=study.DENSITY)
    ax.plot(times, path, color=study.COLOURS["noise"], linewidth=1.2)
    ax.set(title=name, xlabel="time t (1 is noise, 0 is data)", xlim=(1, 0), ylim=(-2.4, 2.4))
    ax.grid(False)
axes[0].set_ylabel("$x_t$")
assert bool((paths["flow"].sort(1).indices == paths["flow"][0].sort().indices).all())  # no crossing
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment 1: the same law
#
# The derivation says that noise may be left out and the law stays. Test it in the plane, for all three SDEs: 1,000 exact draws of $p_1$ walk back to $\sigma=0.1$ in 200 steps, once by Euler and Maruyama's rule for the reverse SDE, $x+\text{drift}\cdot\Delta t+g\sqrt{|\Delta t|}\,z$ with fresh normal $z$, once by Euler's for the flow, which is the same without noise. Each must be as near to
# an exact set as exact sets are to one another (sliced Wasserstein distance, lecture 02), and they must be so near to each other. A control, the reverse SDE with half of its noise, must not be.


# %%
def blobs_at(level):
    """draw(n, generator) from the blobs noised to this level."""
    return lambda n, source: blobs.sample(n, source, level)


count, low = 1000, 0.1
exact = blobs.sample(count, generator(4), low)
floor, spread = metrics.sliced_wasserstein_floor(blobs_at(low), count, rounds=16)
near = floor + 4.5 * spread
print(f"two exact sets: {floor:.3f}, standard deviation {spread:.3f}; the bound is {near:.3f}")
for name, sde in SDES.items():
    times = torch.linspace(1, float(sde.t_of_sigma(torch.tensor(low))), 201, dtype=F64)
    grid = sde.sigma(times)
    begin = blobs.sample(count, generator(6), float(grid[0]))
    z = gaussian_noise(7)
    noisy = sample(blobs.denoiser, begin, grid, euler_maruyama(sde, z))
    smooth = sample(blobs.denoiser, begin, grid, euler(sde))
    pairs = ((noisy, exact), (smooth, exact), (noisy, smooth))
    found = [metrics.sliced_wasserstein(a, b) for a, b in pairs]
    print(f"{name:7s} SDE {found[0]:.3f}, flow {found[1]:.3f}, SDE and flow {found[2]:.3f}")
    assert max(found) < near
halved = sample(blobs.denoiser, begin, grid, euler_maruyama(sde, lambda x: z(x) / 2))
control = metrics.sliced_wasserstein(halved, exact)
print(f"control, half of the noise: {control:.3f}")
assert control > near

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One flow for all schedules
#
# In the course's coordinate, $x=x_0+\sigma\epsilon$, there is one flow. Take VE with $\sigma$ itself as the time: $\mathrm{std}=\sigma$, $r=0$, $g^2=2\sigma$, and Tweedie's formula $\sigma^2s=D-x$:
#
# $$\boxed{\;\frac{dx}{d\sigma}=-\sigma\,s(x,\sigma)=\frac{x-D(x,\sigma)}{\sigma}=\hat\epsilon(x,\sigma)\;}$$
#
# The slope is the network's guess of the noise. VP and sub-VP are this flow, multiplied by $\alpha$ and walked at another speed: the *exact* solution does not know the schedule, only the errors of a solver do.
#
# **What is known need not be approximated.** Write the flow as $\frac{dx}{d\sigma}=\frac1\sigma x-\frac1\sigma D$. One part is linear in $x$ and known, and fast where $\sigma$ is small; the other holds the network. Such an equation is *semi-linear*, and the linear part can be solved exactly: $\frac{d}{d\sigma}\frac x\sigma=-\frac{D}{\sigma^2}$, hence from $\sigma$ down to $\sigma'$, with $\tau$ for the levels between,
#
# $$\frac{x'}{\sigma'}=\frac x\sigma+\int_{\sigma'}^{\sigma}\frac{D}{\tau^2}\,d\tau .$$
#
# With $\lambda=-\ln\sigma$, half the log-SNR of lecture 01, $h=\lambda'-\lambda=\ln(\sigma/\sigma')$ the length of the step, and $\tau=e^{-\ell}$:
#
# $$\boxed{\;x'=\frac{\sigma'}{\sigma}\,x+\sigma'\int_{\lambda}^{\lambda'}e^{\ell}\,D\,d\ell\;}\qquad\text{(exact; Lu et al. 2022, DPM-Solver++, Prop. 4.1)}$$
#
# Only $D$ is left to approximate. **Hold it fixed**, $\int_\lambda^{\lambda'} e^\ell d\ell=\frac1{\sigma'}-\frac1\sigma$, and
#
# $$x'=\frac{\sigma'}\sigma\,x+\Big(1-\frac{\sigma'}\sigma\Big)D,$$
#
# which is DDIM. A rule that solves the linear part exactly is called an *exponential integrator*; DDIM is the simplest, and where $D$ is constant (the data are one point) it is exact in one step of any length. In the noise the same flow is $x'=x+\int_\sigma^{\sigma'}\hat\epsilon\,d\tau$, and holding $\hat\epsilon$ gives DDIM again. From
# order 2 on the two forms part: DPM-Solver, DEIS and PNDM interpolate $\hat\epsilon$; DPM-Solver++ and UniPC interpolate $D$.

# %%
study.source(ddim)

# %% [markdown]
# Every rule of first order is exact for *some* data. DDIM is so for a single point, whose $D$ is constant. Euler's rule in the time and the coordinates of the VP SDE, $x_t=x/\sqrt{1+\sigma^2}$, is so for $\mathcal N(0,I)$, whose points stand still there. Which is nearer on other data
# is a question for the data, and the answer is not always DDIM: 20 steps, even in the VP time.

# %%
point = Mixture.gaussian(torch.tensor([0.5, -0.3]), torch.zeros(2, 2))
normal = Mixture.gaussian(torch.zeros(2), torch.eye(2))
ends = [float(VP().t_of_sigma(torch.tensor(sigma))) for sigma in (HIGH, LOW)]
grid = VP().sigma(torch.linspace(*ends, 21, dtype=F64))
off = {}
for name, mixture in {"one point": point, "N(0, I)": normal, "three blobs": blobs}.items():
    x = mixture.sample(64, generator(8), HIGH)
    end = mixture.reference_flow(x, HIGH, LOW)
    rules = {"DDIM": ddim, "Euler in t": euler(VP())}
    off[name] = [apart(sample(mixture.denoiser, x, grid, step), end) for step in rules.values()]
    print(
        f"{name:12s}",
        *(f"{rule} {gap:.0e} off" for rule, gap in zip(rules, off[name], strict=True)),
    )
assert off["one point"][0] < 1e-6 < off["one point"][1]
assert off["N(0, I)"][1] < 1e-6 < off["N(0, I)"][0]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Order: what a halved step buys
#
# One step of length $h$ misses the exact flow by its **local error**, $C\,h^{p+1}$ for some $p$. There are $n\propto1/h$ steps, and the flow carries each miss on without blowing it up by more than a constant, so that the **global error** is $\propto n\,h^{p+1}\propto h^p\propto n^{-p}$. That $p$ is the **order**. Order 1: twice the
# calls, half the error. Order 3: an eighth.
#
# *DDIM* holds $\hat\epsilon$ (or $D$) at its first value. Its change within the step is about $h\,\frac{d\hat\epsilon}{d\lambda}$, and over a step of length $h$ that makes $h^2$: $p=1$.
#
# *Heun's rule* looks at the far end and takes the average slope: $\hat x=x+(\sigma'-\sigma)\,d$ with $d=\hat\epsilon(x,\sigma)$, then
#
# $$x'=x+(\sigma'-\sigma)\,\tfrac12\big(d+d'\big),\qquad d'=\hat\epsilon(\hat x,\sigma')\qquad\text{(Karras et al. 2022, Algorithm 1)}.$$
#
# The trapezoid rule integrates a straight line exactly and misses a parabola by $h^3$: $p=2$, for two calls. *DPM-Solver-2* calls the network in the middle of the step instead (in $\lambda$), and the single-step *DPM-Solver-3* at one and two thirds; these rules forget everything when a step ends.
#
# ## Rules that remember
#
# A rule with two calls a step can afford half as many steps. At $N$ calls, order 2 means an error $C\,(2/N)^2$: four times that of a rule of order 2 with one call a step. Is there one? The step before has left a value of $D$ behind, $D_1$ at $\lambda-h_1$; so draw a straight line through it and the new $D_0$ at $\lambda$:
#
# $$D(\ell)\approx D_0+(\ell-\lambda)\,\frac{D_0-D_1}{h_1}.$$
#
# Put it into the exact integral. With $u=\ell-\lambda$,
#
# $$\sigma'\!\int_\lambda^{\lambda'}\!e^\ell d\ell=1-e^{-h}=:\varphi_1,\qquad\sigma'\!\int_\lambda^{\lambda'}\!e^\ell\,u\,d\ell=h-\varphi_1=:\varphi_2,\qquad\sigma'\!\int_\lambda^{\lambda'}\!e^\ell\,\tfrac{u^2}2\,d\ell=\tfrac{h^2}2-\varphi_2=:\varphi_3 ,$$
#
# (integrate by parts), so that $x'=e^{-h}x+\varphi_1D_0+\varphi_2\frac{D_0-D_1}{h_1}$. *DPM-Solver++(2M)* replaces $\varphi_2=\frac{h^2}2-\frac{h^3}6+\dots$ by $\frac h2\varphi_1=\frac{h^2}2-\frac{h^3}4+\dots$, which agrees as far as order 2 asks, and gives the formula that everybody runs (Lu et al. 2022, Algorithm 2):
#
# $$x'=\frac{\sigma'}\sigma\,x+\Big(1-\frac{\sigma'}\sigma\Big)\bar D,\qquad\bar D=D_0+\frac h{2h_1}\,(D_0-D_1).$$
#
# It is DDIM with a better $D$. In the code, `memory` is the history: a step returns it, and the loop hands it to the next.

# %%
study.source(dpm_solver_pp_2m)

# %% [markdown]
# With two old values the polynomial is a parabola: order 3, *DPM-Solver++(3M)*, still one call a step. The slope at $\lambda$ and the second derivative are
#
# $$D'=D[\lambda,\lambda_1]+h_1\,D[\lambda,\lambda_1,\lambda_2],\qquad D''=\mathbf2\,D[\lambda,\lambda_1,\lambda_2],$$
#
# with $D[\lambda,\lambda_1]=\frac{D_0-D_1}{h_1}$, and $D[\lambda,\lambda_1,\lambda_2]$ the difference of two such slopes, divided by $h_1+h_2$; then $x'=e^{-h}x+\varphi_1D_0+\varphi_2D'+\varphi_3D''$. Mark the 2.
#
# **One idea, many names.** Every rule below is *the step that holds $f_0$ fixed, plus weights times* $(f_k-f_0)$. They differ in what is interpolated, in which variable it is a polynomial, and in where the values come from:
#
# | rule | $f$ | polynomial in | values from | calls | order |
# |---|---|---|---|---|---|
# | DDIM, Euler in $\sigma$ | either | constant | here | 1 | 1 |
# | Heun (EDM) | $\hat\epsilon$ | $\sigma$ | here, the end | 2 | 2 |
# | DPM-Solver-2, -3 | $\hat\epsilon$ | $\lambda$ | here, inside the step | 2, 3 | 2, 3 |
# | DPM-Solver++(2S) | $D$ | $\lambda$ | here, inside the step | 2 | 2 |
# | DPM-Solver++(2M), (3M) | $D$ | $\lambda$ | here, earlier steps | 1 | 2, 3 |
# | DEIS-$p$ (log-ρ form) | $\hat\epsilon$ | $\lambda$ | here, earlier steps | 1 | $p$ |
# | LMS-$p$ | $\hat\epsilon$ | $\sigma$ | here, earlier steps | 1 | $p$ |
# | PLMS (PNDM) | $\hat\epsilon$ | the index of the step | here, three earlier steps | 1 | 2 |
# | UniPC-$p$ | $D$ | $\lambda$ | here, earlier steps, *and the end* | 1 | $p+1$ |
#
# PLMS takes the weights 55, −59, 37, −9 of Adams and Bashforth, which suit equal steps in $\sigma$; its steps are not equal there, and so it is of order 2, not 4. (Its first step takes a call more.)
#
# **UniPC's free corrector** (Zhao et al. 2023). A prediction $\hat x'$ at $\sigma'$ is where the *next* step will call the network anyway. When that value, $D(\hat x',\sigma')$, has come, do the last step once more, with it among the values: the polynomial now reaches to the end of the step, one order is gained, and no call was spent. Only the very last point
# of a run is predicted and not corrected.

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment 2: every order, measured
#
# From $\sigma=3$ to $0.15$ with steps even in $\lambda$, through the range where the blobs part. The exact end of 32 points is known to ten digits. A rule that remembers is given *exact* earlier states, so that the order is the rule's own. *Claim*: on the two finest grids each has the order of the table within $\pm0.2$.

# %%
TOP, BOTTOM = 3.0, 0.15
RULES = {  # name: (step, calls for each, order, earlier values, steps of the finest grid)
    "DDIM": (ddim, 1, 1, 0, 128),
    "Heun": (heun, 2, 2, 0, 128),
    "DPM-Solver-2": (dpm_solver_2(), 2, 2, 0, 128),
    "DPM-Solver-3": (dpm_solver_3(), 3, 3, 0, 256),
    "DPM-Solver++(2S)": (dpm_solver_pp_2s(), 2, 2, 0, 128),
    "DPM-Solver++(2M)": (dpm_solver_pp_2m, 1, 2, 1, 128),
    "DPM-Solver++(3M)": (dpm_solver_pp_3m, 1, 3, 2, 256),
    "DEIS-3": (deis(3), 1, 3, 2, 256),
    "LMS-4": (lms(4), 1, 4, 3, 256),
    "PLMS": (plms(), 1, 2, 3, 256),
    "UniPC-2": (unipc(2), 1, 3, 2, 256),
    "UniPC-3": (unipc(3), 1, 4, 3, 512),
}
points, known = blobs.sample(32, generator(10), TOP), {}


def flow_to(sigma):
    """The exact states at a level, on the flow through `points`; each level is solved once."""
    key = round(float(sigma), 12)
    if key not in known:
        known[key] = blobs.reference_flow(points, TOP, float(sigma), tolerance=1e-13)
    return known[key]


def end_error(step, n, earlier=0):
    """Mean distance to the exact end after n steps, given exact states on `earlier` levels above TOP."""
    h = math.log(TOP / BOTTOM) / n
    grid = TOP * torch.exp(-h * torch.arange(-earlier, n + 1, dtype=F64))
    memory = None
    for sigma, sigma_next in itertools.pairwise(grid[: earlier + 1]):
        _, memory = step(blobs.denoiser, flow_to(sigma), sigma, sigma_next, memory)
        if hasattr(memory, "x"):  # UniPC also remembers where it corrected to
            memory = memory._replace(x=flow_to(sigma))
    x = points
    for sigma, sigma_next in itertools.pairwise(grid[earlier:]):
        x, memory = step(blobs.denoiser, x, sigma, sigma_next, memory)
    return apart(x, flow_to(BOTTOM))


curves = {}
print(f"{'rule':18s} {'order':>6s} {'measured':>9s}")
for name, (step, each, order, earlier, finest) in RULES.items():
    counts = [finest >> k for k in range(5, -1, -1)]
    errors = [end_error(step, n, earlier) for n in counts]
    curves[name] = ([each * n for n in counts], errors)
    measured = math.log2(errors[-2] / errors[-1])
    print(f"{name:18s} {order:6d} {measured:9.2f}")
    assert abs(measured - order) < 0.2

# %%
BY_ORDER = {1: "exact", 2: "data", 3: "model", 4: "warn"}  # order: role of its colour
MARKS = dict(zip(RULES, "os^vDosPX*os", strict=True))


def draw(ax, name, calls, errors):
    """One curve: colour by order, solid where a step costs one call, dashed where it costs more."""
    _, each, order, *_ = RULES[name]
    style = {"color": study.COLOURS[BY_ORDER[order]], "marker": MARKS[name], "markersize": 6}
    ax.loglog(calls, errors, "-" if each == 1 else "--", linewidth=1.5, label=name, **style)


fig, (left, right) = plt.subplots(1, 2, figsize=(7.8, 4.2))
for name, curve in curves.items():
    draw(left, name, *curve)
left.set(
    xlabel="network calls", ylabel="mean distance to the exact end", title="exact earlier values"
)
practice = {}
for name, (step, each, *_) in RULES.items():
    calls, extra = [n for n in (6, 12, 24, 48, 96) if n % each == 0], int(name == "PLMS")
    runs = [sample(blobs.denoiser, start, levels(n // each - extra), step) for n in calls]
    practice[name] = dict(zip(calls, (apart(run, there) for run in runs), strict=True))
    draw(right, name, calls, practice[name].values())
right.set(xlabel="network calls", title="from noise, Karras's grid")
right.set_xticks((6, 12, 24, 48, 96), ("6", "12", "24", "48", "96"))
right.minorticks_off()
fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=11)
for calls in (6, 12, 24, 48):
    nearest = sorted(practice, key=lambda name, calls=calls: practice[name].get(calls, 9))[:3]
    print(f"{calls:3d} calls: nearest are {', '.join(nearest)}")
plt.show()

# %% [markdown]
# Colours are orders: black 1, blue 2, green 3, vermilion 4; dashed lines are rules that spend several calls on a step. Left, slopes as the theory says. Right is how samplers are used: a wide range, cold start, few calls. There the rules that remember win, a high order pays only where steps are short (at 6 calls DPM-Solver-3 is worse than DDIM), and below a dozen calls the
# rules that interpolate the *noise* (DEIS, PLMS) are nearest on these data. That is not a law: with strong guidance (lecture 04) the papers find those that interpolate $D$ more stable.
#
# ### What a start of low order costs
#
# Nobody hands a sampler exact earlier values. At its first step a rule of order 3 has only one value, so it begins with DDIM. That one step has a local error of $h^2$, it is taken *once*, and so the run is of order 2 at best, whatever follows. UniPC corrects even its first step, which leaves $h^3$: it keeps order 3. The cold start, measured:

# %%
fig, axes = plt.subplots(1, 3, figsize=(9, 3.6), sharey=True)
claims = {  # name: (its own order, its order from a cold start, steps of the finest grid)
    "DPM-Solver++(3M)": (3, 2, 256),
    "LMS-4": (4, 2, 256),
    "UniPC-3": (4, 3, 1024),
}
for ax, (name, (own, cold, finest)) in zip(axes, claims.items(), strict=True):
    step, _, _, earlier, _ = RULES[name]
    counts = [finest >> k for k in range(4, -1, -1)]
    warm = [end_error(step, n, earlier) for n in counts]
    errors = [end_error(step, n) for n in counts]
    ax.loglog(counts, warm, "o-", color=study.COLOURS["model"], label="exact earlier values")
    ax.loglog(counts, errors, "s--", color=study.COLOURS["warn"], label="cold start")
    measured = math.log2(errors[-2] / errors[-1])
    ax.set(title=f"{name}\n{own} falls to {cold}", xlabel="network calls")
    ax.set_xticks(counts[::2], [str(n) for n in counts[::2]])
    ax.minorticks_off()
    print(f"{name:17s} order from a cold start {measured:.2f}")
    assert abs(measured - cold) < 0.2
axes[0].set_ylabel("mean distance to the exact end")
axes[0].legend(fontsize=11)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## With fresh noise
#
# The reverse SDE ($\lambda=1$) in our coordinate is $dx=\frac2\sigma(x-D)\,d\sigma+\sqrt{2\sigma}\,d\bar w$: twice the drift of the flow, and noise. It is semi-linear as well. Hold $D$, solve the rest exactly, and with $\rho=\sigma'/\sigma$
#
# $$x'=D+\rho^2(x-D)+\sigma'\sqrt{1-\rho^2}\;z,\qquad z\sim\mathcal N(0,I).$$
#
# That is DDPM's step of lecture 02, to the letter: **DDIM and DDPM are the same idea, for $\lambda=0$ and $\lambda=1$.** Its relatives:
#
# - *Euler ancestral* and *DDIM with $\eta=1$* are this step under other names. ($0<\eta<1$ is a $\lambda$ between.)
# - *ScoreSDE's reverse diffusion* has the same mean and more noise, $\sqrt{\sigma^2-\sigma'^2}$.
# - *SDE-DPM-Solver++(2M)* puts the line through $D_0$ and $D_1$ in place of $D$: second order for smooth quantities.
# - *DPM-Solver SDE*, a single step, looks halfway; the noise of its two halves must be one Brownian path.
# - *EDM's stochastic sampler* keeps Heun's rule for the flow, and before each step it *raises* the noise from $\sigma$ to $\hat\sigma=(1+\gamma)\,\sigma$ by adding some. This is **churn**, $\gamma=\min(S_\text{churn}/N,\sqrt2-1)$ for a grid of $N$ steps.

# %%
study.source(dpm_solver_pp_sde_2m)

# %% [markdown]
# ### Experiment 3: distance to the law, for all of them
#
# Paths differ now, and only laws can be compared: the sliced Wasserstein distance of 4,000 samples to an exact set, against network calls. The grey band is what two exact sets give: its mean and two standard deviations. *Claim*: with enough calls each sampler is in the floor (within 4.5 deviations), and with 6 calls none of the stochastic ones is.

# %%
NOISY = {  # name: (step factory of noise and number of steps, calls for each, colour, line)
    "DDIM": (lambda z, n: ddim, 1, "muted", "o-"),
    "DPM-Solver++(2M)": (lambda z, n: dpm_solver_pp_2m, 1, "exact", "s-"),
    "DDPM, Euler ancestral": (lambda z, n: ddpm(z), 1, "noise", "o-"),
    "reverse diffusion": (lambda z, n: reverse_diffusion(z), 1, "warn", "^-"),
    "SDE-DPM-Solver++(2M)": (lambda z, n: dpm_solver_pp_sde_2m(z), 1, "data", "s-"),
    "DPM-Solver SDE": (lambda z, n: dpm_solver_sde(z), 2, "model", "v--"),
    "EDM, churn 10": (lambda z, n: edm_stochastic(z, 10.0, n), 2, "guide", "D--"),
}
count = 4000
begin, exact = blobs.sample(count, generator(12), HIGH), blobs.sample(count, generator(13), LOW)
floor, spread = metrics.sliced_wasserstein_floor(blobs_at(LOW), count, rounds=12)
fig, ax = plt.subplots(figsize=(7.6, 4.0))
ax.axhspan(max(floor - 2 * spread, 0.006), floor + 2 * spread, color="#DDDDDD", label="floor")
calls = (6, 12, 24, 48, 96)
for name, (make, each, colour, line) in NOISY.items():
    far = []
    for n in calls:
        step = make(gaussian_noise(14), n // each)
        ended = sample(blobs.denoiser, begin, levels(n // each), step)
        far.append(metrics.sliced_wasserstein(ended, exact))
    ax.loglog(
        calls, far, line, color=study.COLOURS[colour], markersize=6, linewidth=1.5, label=name
    )
    first = next(
        (n for n, value in zip(calls, far, strict=True) if value < floor + 2 * spread), None
    )
    print(f"{name:22s} in the band from {first} calls on; with 6 at {far[0]:.2f}")
    assert far[-1] < floor + 4.5 * spread
    assert far[0] > floor + 4.5 * spread or name in ("DDIM", "DPM-Solver++(2M)")
ax.set(xlabel="network calls", ylabel="sliced Wasserstein distance")
ax.set_xticks(calls, [str(n) for n in calls])
ax.minorticks_off()
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=11)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ### What noise repairs
#
# On this figure noise looks like a pure expense: at few calls DPM-Solver++(2M) is nearer than any sampler that draws it. Its use shows when something *was already wrong*. The flow is a function: a point that starts wrong ends wrong. The SDE forgets: over a step it keeps only the share $\rho^2$ of an error where the flow keeps $\rho$ (both up to what $D$ makes
# of it), and fills up with fresh noise of the right size. *Experiment*: at $\sigma=2$ somebody has shrunk the whole set by a fifth, as a coarse sampler or an imperfect network would. Twenty steps of EDM's sampler follow, with more and more churn. The control starts right, and has four steps only.

# %%
middle = 2.0
exact = blobs.sample(count, generator(13), LOW)
right_start = blobs.sample(count, generator(15), middle)
amounts = (0, 1, 2, 4, 8)
cases = {
    "shrunk start, 20 steps": (0.8 * right_start, 20, "warn", "o-"),
    "right start, 20 steps": (right_start, 20, "exact", "s--"),
    "right start, 4 steps": (right_start, 4, "data", "v-"),
}
fig, ax = plt.subplots(figsize=(8, 3.8))
ax.axhspan(max(floor - 2 * spread, 0), floor + 2 * spread, color="#DDDDDD", label="floor")
churned = {}
for name, (begin, n, colour, line) in cases.items():
    churned[name] = []
    for amount in amounts:
        step = edm_stochastic(gaussian_noise(16), amount, n)
        ended = sample(blobs.denoiser, begin, levels(n, LOW, middle), step)
        churned[name].append(metrics.sliced_wasserstein(ended, exact))
    ax.plot(amounts, churned[name], line, color=study.COLOURS[colour], label=name)
    print(f"{name:24s}", ", ".join(f"{value:.3f}" for value in churned[name]))
ax.set(xlabel=r"$S_{\mathrm{churn}}$", ylabel="sliced Wasserstein distance", ylim=(0, None))
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
bound = floor + 4.5 * spread
assert churned["shrunk start, 20 steps"][0] > bound > churned["shrunk start, 20 steps"][-1]
assert churned["right start, 4 steps"][-1] > 1.2 * churned["right start, 4 steps"][0]
plt.show()

# %% [markdown]
# Enough churn brings the shrunk set back into the floor: nothing of the fault is left. But each churned step must also take away what was added, and four steps are too few for that: there the distance doubles. (With four steps the ceiling of $\gamma$ is reached below $S_\text{churn}=2$, and the curve is flat from there.) So noise is for imperfect networks and many calls.

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Predictor and corrector
#
# ScoreSDE's other way to repair (Song et al. 2021, Algorithms 1 to 3): after each *predictor* step, stay at the level and take a few steps of **Langevin dynamics**, which has $p_\sigma$ as its equilibrium:
#
# $$x\leftarrow x+e\,s(x,\sigma)+\sqrt{2e}\;z,\qquad e=2\,\big(\mathrm{snr}\,\lVert z\rVert/\lVert s\rVert\big)^2 .$$
#
# $e$ is the size of the step; the number $\mathrm{snr}$ sets how large the pull is beside the noise. Does it pay? Twelve steps of reverse diffusion down to $\sigma=0.1$ leave the blobs too wide. We count the points that lie on a blob at all (within three deviations): with corrections, and *at equal calls* with more predictor steps instead.

# %%
low = 0.1
wide = Mixture(blobs.weights, blobs.means, blobs.covs + low**2 * torch.eye(2, dtype=F64))
begin = blobs.sample(count, generator(17), HIGH)


def on_a_blob(n, corrections):
    """Share of points on a blob after n steps of reverse diffusion with this number of corrections each."""
    z = gaussian_noise(18)
    step = predictor_corrector(
        reverse_diffusion(z), z, snr=0.2, corrections=corrections, shared=True
    )
    ended = sample(blobs.denoiser, begin, levels(n, low), step)
    return metrics.mode_coverage(ended, wide).on_mode


print(f"exact samples: {metrics.on_mode_exact(2):.1%} are on a blob")
print("corrections a step    calls    on a blob    more steps instead")
for corrections in (0, 1, 2, 4):
    n = 12 * (1 + corrections)
    corrected, finer = on_a_blob(12, corrections), on_a_blob(n, 0)
    print(f"{corrections:18d} {n:8d} {corrected:12.1%} {finer:21.1%}")
    assert finer >= corrected
assert corrected > on_a_blob(12, 0) + 0.03

# %% [markdown]
# Corrections work, and with an *exact* score the same calls are better spent on shorter steps. The paper's gain at equal calls was measured with learned scores.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which levels?
#
# A sampler needs a grid as much as a rule. All of these are in use; the third column says by whom.
#
# | grid | levels | whose |
# |---|---|---|
# | uniform in $t$ | even times from the last one down (diffusers: `linspace`) | ScoreSDE, in continuous time; DPM-Solver's code recommends it for high resolution |
# | leading | $t=0,\,c,\,2c,\dots$ with $c=\lfloor1000/n\rfloor$ (plus an offset of 1) | DDIM; Stable Diffusion 1 with PLMS |
# | quadratic | $t\propto k^2$ | DDIM on CIFAR-10 |
# | trailing | $t=1000,\,1000-\tfrac{1000}n,\dots$, less 1: starts at the last time | Lin et al. 2024 |
# | Karras | $\sigma^{1/7}$ even | EDM |
# | exponential, log-SNR | $\lambda=-\ln\sigma$ even: two names for one grid | DPM-Solver on small pictures; k-diffusion |
#
# *leading* does not begin at the last level: with five steps its first time is 801, where a picture is still visible, and sampling starts it from pure noise all the same. Here is DPM-Solver++(2M) with Stable Diffusion's table of levels, from pure noise at each grid's first level to 0, against the exact flow from the table's last level.

# %%
table = Discrete(scaled_linear_betas())
top, bottom = (float(table.sigma(torch.tensor(t, dtype=F64))) for t in (999, 0))

GRIDS = {
    "uniform in t": lambda n: linspace(table, n, drop_lowest=True),
    "leading": lambda n: leading(table, n, offset=1),
    "trailing": lambda n: trailing(table, n),
    "Karras": lambda n: karras(n, bottom, top),
    "exponential": lambda n: exponential(n, bottom, top),
}
pure = gaussian_noise(20)(torch.empty(200, 2, dtype=F64))
truth = blobs.reference_flow(top * pure, top, 1e-3, tolerance=1e-9)
counts = (5, 10, 20, 40)
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6))
gridded = {}
for k, (name, make) in enumerate(GRIDS.items()):
    left.semilogx(make(10)[:-1], torch.full((10,), -k), "|", markersize=16, markeredgewidth=2)
    ends = [sample(blobs.denoiser, make(n)[0] * pure, make(n), dpm_solver_pp_2m) for n in counts]
    gridded[name] = [apart(end, truth) for end in ends]
    line = "s--" if name == "trailing" else "o-"  # it covers "uniform in t"
    right.loglog(counts, gridded[name], line, linewidth=1.5, label=name)
    print(f"{name:13s} first level {float(make(5)[0]):5.2f} with 5 steps", end="; error ")
    print(", ".join(f"{gap:.3f}" for gap in gridded[name]))
left.set(xlabel=r"$\sigma$", title="ten levels (without 0)", ylim=(-4.5, 0.5))
left.set_yticks(range(0, -5, -1), list(GRIDS))
left.invert_xaxis()
right.set(xlabel="steps", ylabel="mean distance to the exact end", title="DPM-Solver++(2M)")
right.set_xticks(counts, [str(n) for n in counts])
right.minorticks_off()
right.legend(fontsize=11)
assert gridded["leading"][0] > 1.5 * max(
    gaps[0] for name, gaps in gridded.items() if name != "leading"
)
assert 3 * gridded["exponential"][2] < gridded["trailing"][2]
plt.show()

# %% [markdown]
# Two faults in one picture. At 5 steps *leading* is worst, for its start. From 10 steps on the grids even in $t$ are the poor ones: *uniform* and *trailing* go nearly to the same levels, stay above $\sigma=0.3$ with ten steps, and jump from there to 0, where a rule in $\lambda$ falls back to order 1. Even steps in $\lambda$ are best at each count here. The blobs are narrow, so that small $\sigma$ matter;
# for large pictures, whose layout is decided at large $\sigma$, more levels belong up there. There is no best grid, only one for the data.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on digits
#
# A trained network is no mixture: it is not exact, and not even smooth. Do the orders survive? Ten digits, six samplers, the distance to the run of 64 calls (which a 40-step run of another rule must confirm): root mean square over pixels, whose range is 2.

# %%
ON_DIGITS = {
    name: RULES[name][:2] for name in ("DDIM", "Heun", "DPM-Solver++(2M)", "DEIS-3", "UniPC-3")
}
ON_DIGITS["DPM-Solver-3"] = RULES["DPM-Solver-3"][:2]
counts, on_digits = (6, 12, 24), {}
for name, (step, each) in ON_DIGITS.items():
    runs = [sample(ten, noise_of_ten, levels(n // each), step) for n in counts]
    on_digits[name] = [float((run - best).square().mean().sqrt()) for run in runs]
check = sample(ten, noise_of_ten, levels(40), deis(3))
doubt = float((check - best).square().mean().sqrt())
fig, ax = plt.subplots(figsize=(6.6, 3.6))
for name, off in on_digits.items():
    draw(ax, name, counts, off)
    print(f"{name:17s}", ", ".join(f"{gap:.4f}" for gap in off))
ax.axhline(doubt, color=study.COLOURS["muted"], linestyle=":", label="doubt of the reference")
ax.set(xlabel="network calls", ylabel="distance to the reference, rms")
ax.set_xticks(counts, [str(n) for n in counts])
ax.minorticks_off()
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
print(f"the reference itself is in doubt by {doubt:.4f}")
for name in ("DPM-Solver++(2M)", "DEIS-3", "UniPC-3"):
    assert on_digits[name][1] < on_digits["DDIM"][1] / 2
assert doubt < min(off[0] for off in on_digits.values()) / 2
plt.show()

# %% [markdown]
# As on the mixture: the rules with one call a step are ahead, DEIS most of all at 6 calls, and the single-step rules come from far behind. With 24 calls several are within two or three times the doubt of the reference, and nobody sees a difference.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Choose sampler, number of network calls, grid and, for DDIM and EDM, the share $\eta$ of fresh noise; a rule takes as many steps as the calls pay for. Left, the paths of particles in the plane, coloured by the blob in which the exact flow ends, a ring at each exact end; right, digits from the same settings, and below them the flow. **With how few calls can you still read the digits? Which grid does each sampler like? Which particle changes its blob first?**

# %%
study.SamplerExplorer(blobs, D.given(label=torch.arange(6)))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## An exact likelihood
#
# The flow is a function that can be undone, so that densities can be carried along it. A point moves by $dx=v\,d\sigma$ with $v=\hat\epsilon(x,\sigma)$; a small volume around it grows at the rate of the divergence $\nabla\cdot v=\mathrm{tr}\,\frac{\partial v}{\partial x}$; the probability in it stays; hence the density shrinks at that rate (Chen et al. 2018, the *instantaneous change of variables*):
#
# $$\frac{d}{d\sigma}\log p_\sigma\big(x(\sigma)\big)=-\nabla\cdot v.$$
#
# From the data up to $\sigma_{\max}$, with $u=\ln\sigma$, where $\frac{dx}{du}=x-D$, and $d$ the number of dimensions,
#
# $$\boxed{\;\log p(x_0)=\log p_{\sigma_{\max}}(x_T)+\int_{\ln\sigma_{\min}}^{\ln\sigma_{\max}}\Big(d-\mathrm{tr}\frac{\partial D}{\partial x}\Big)du\;}\qquad\text{(Song et al. 2021, Eq. 39)}$$
#
# It is not a bound, as that of lecture 02 is, but the likelihood of the flow. At the top $p_{\sigma_{\max}}$ is nearly Gaussian; as published it is $\mathcal N(0,\sigma_{\max}^2I)$, which leaves out the data's own mean and variance, and `exact_log_likelihood` takes them if they are known.
#
# ### Experiment 4: against the exact density
#
# Bits per dimension, $-\log_2p/d$, of 48 samples of the blobs. *Claim*: within 0.01 of the exact value for every one of them, with either prior. The integration is Runge and Kutta's classical rule, of order 4, so that from 64 steps on only the error of the prior is left.

# %%
x = blobs.sample(48, generator(21), 0.002)
exact_bits = -blobs.log_prob(x, 0.002) / (2 * math.log(2))
moments = {"data_mean": blobs.mean, "data_var": float(blobs.cov.trace()) / 2}
counts = (16, 32, 64, 128)
found = [exact_log_likelihood(blobs.denoiser, x, steps=n, **moments) for n in counts]
worst = [float((run.bits_per_dim - exact_bits).abs().max()) for run in found]
published = exact_log_likelihood(blobs.denoiser, x, steps=128)
plain = float((published.bits_per_dim - exact_bits).abs().max())
for n, gap in zip(counts, worst, strict=True):
    print(f"{n:4d} steps, the data's mean and variance: at most {gap:.1e} bits/dim off")
print(f" 128 steps, the published prior:          at most {plain:.1e} bits/dim off")
assert max(worst[2:]) < 0.01 and plain < 0.01
assert worst[1] > 4 * worst[2] and 0.9 < worst[2] / worst[3] < 1.1  # then the prior's error is left
assert worst[3] < plain / 5

# %% [markdown]
# ### The trace by probes
#
# In the plane the trace costs two derivatives, for a picture of 256 pixels 256. **Hutchinson's estimator** needs one: for random $z$ with $\mathbb E[zz^{\mathsf T}]=I$, $\ \mathbb E[z^{\mathsf T}Jz]=\mathrm{tr}\,J$. One $z$ is kept along the whole path, and the result is unbiased. How large is its spread? 300 copies of *one* point, with normal probes and with random signs; with $k$ probes averaged, the deviation must fall as $1/\sqrt k$.

# %%
one = blobs.sample(1, generator(22), 0.3)
options = {"sigma_min": 0.3, "sigma_max": 20.0, "steps": 24}
truth = float(exact_log_likelihood(blobs.denoiser, one, **options).log_prob)
copies = one.expand(300, 2)
print(f"log p = {truth:.3f} nats by the exact trace")
for kind in ("normal", "signs"):
    spreads = []
    for probes in (1, 4):
        z = gaussian_noise(23)
        z = rademacher(z) if kind == "signs" else z
        estimate = exact_log_likelihood(
            blobs.denoiser, copies, divergence="hutchinson", noise=z, probes=probes, **options
        ).log_prob
        spreads.append(float(estimate.std()))
        error = spreads[-1] / len(copies) ** 0.5
        off = (float(estimate.mean()) - truth) / error
        print(
            f"{kind:7s} {probes} probes: deviation {spreads[-1]:.3f} nats; mean {off:+.1f} standard errors off"
        )
        assert abs(off) < 4.5
    assert 1.6 < spreads[0] / spreads[1] < 2.5  # 2, and each deviation of 300 is known to about 4 %

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From data to noise and back
#
# A grid that *rises* carries a picture to the noise it would have come from, with the same steps: **inversion**. It is what editing by inversion starts from (lecture 14). An exact flow would come back exactly; a sampler takes $D$ at the other end of each step on its way back, and misses. Experiment, on the exact flow from $\sigma=0.02$: the error of the noise
# that is found, and of the point that comes back; medians, since a point on the border between two blobs may come back in the other. *Claim*: the noise has the order of the rule. Going up a step of length $h$ misses by $C\,h^{p+1}$ and coming down by $C\,(-h)^{p+1}$: for the odd $p=1$ the two add up, and the trip is of order 1; for $p=2$ they cancel, and it is of order 3.


# %%
def median_gap(a, b):
    """Median distance between rows: one point that falls into the wrong blob does not decide."""
    return float((a - b).norm(dim=1).median())


x = blobs.sample(64, generator(24), LOW)
latent = blobs.reference_flow(x, LOW, HIGH, tolerance=1e-12)
counts = (100, 200, 400, 800)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
for name, step, order, trip, mark in (("DDIM", ddim, 1, 1, "o-"), ("Heun", heun, 2, 3, "s-")):
    noise_error, trip_error = [], []
    for n in counts:
        up = sample(blobs.denoiser, x, levels(n).flip(0), step)
        noise_error.append(median_gap(up, latent))
        trip_error.append(median_gap(sample(blobs.denoiser, up, levels(n), step), x))
    left.loglog(counts, noise_error, mark, label=name)
    right.loglog(counts, trip_error, mark, label=name)
    there_order, trip_order = (math.log2(e[-2] / e[-1]) for e in (noise_error, trip_error))
    print(f"{name}: order of the noise {there_order:.2f}, of the round trip {trip_order:.2f}")
    assert abs(there_order - order) < 0.2 and abs(trip_order - trip) < 0.2
for ax, title in ((left, "the noise found"), (right, "there and back")):
    ax.set(xlabel="steps each way", ylabel="median distance", title=title)
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.minorticks_off()
    ax.legend()
plt.show()

# %% [markdown]
# On digits with the trained network (not told the class): four that it has made, four held-out ones that nobody made. Up and down in 60 calls each way. Inversion also gives a path *between* two pictures: carry both to noise, turn from one noise to the other on the sphere (a straight line would pass through noise that is too small), and
# come back.

# %%
held_out, _ = digits.load("test")
own = best[[1, 3, 5, 7]]
both = torch.cat([own, held_out[:4] + LOW * SampleNoise(25)(held_out[:4])])
latents, returned = {}, {}
for name, step, n in (("DDIM", ddim, 60), ("Heun", heun, 30)):
    latents[name] = sample(D, both, levels(n).flip(0), step)
    returned[name] = sample(D, latents[name], levels(n), step)
    off = (returned[name] - both).square().flatten(1).mean(1).sqrt()
    print(
        f"{name:5s} own samples {float(off[:4].median()):.1e}, held-out digits {float(off[4:].median()):.1e}"
    )
assert off[:4].median() < 1e-2
study.strip(
    [
        list(both),
        list(latents["Heun"] / (1 + HIGH**2) ** 0.5),
        *(list(r) for r in returned.values()),
    ],
    row_titles=["picture", "its noise", "back, DDIM", "back, Heun"],
    scale=3,
)

# %%
shares = torch.linspace(0, 1, 7)
a, b = (latents["Heun"][k].expand(len(shares), *digits.SHAPE) for k in (4, 5))
turned = slerp(a, b, shares)
middle = {"on the sphere": turned[3], "on the straight line": (a[0] + b[0]) / 2}
size = {way: float(z.square().mean().sqrt()) / HIGH for way, z in middle.items()}
print(", ".join(f"{way}: noise of size {found:.2f}" for way, found in size.items()))
assert abs(size["on the sphere"] - 1) < 0.1 and size["on the straight line"] < 0.8
between = sample(D, turned, levels(16), dpm_solver_pp_2m)
study.grid(between, columns=7, titles=[f"{float(s):.2f}" for s in shares], scale=4)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# Samplers seldom crash. A wrong one draws plausible pictures and is merely slow, or stops improving. These three mistakes are not invented: each is in code that many people run, here diffusers 0.42, and a few lines find it, because the flow of a mixture is exact.
#
# **Mistake 1: half of a second derivative.** The parabola of DPM-Solver++(3M) needs $D''=2\,D[\lambda,\lambda_1,\lambda_2]$. The authors' code and diffusers take it without the 2. Everything works, and the rule is of order 2, as 2M is.


# %%
def third_order(factor):
    """DPM-Solver++(3M), with `factor` times the second divided difference for the second derivative of D."""

    def step(D, x, sigma, sigma_next, memory=None):
        past = (memory or ())[:2]
        if len(past) < 2:
            return dpm_solver_pp_3m(D, x, sigma, sigma_next, memory)
        D_0, ((D_1, sigma_1), (D_2, sigma_2)) = D(x, sigma), past
        h, h_1, h_2 = (sigma / sigma_next).log(), (sigma_1 / sigma).log(), (sigma_2 / sigma_1).log()
        difference = ((D_0 - D_1) / h_1 - (D_1 - D_2) / h_2) / (h_1 + h_2)
        slope = (D_0 - D_1) / h_1 + h_1 * difference
        phi_1 = 1 - (-h).exp()
        phi_2 = h - phi_1
        phi_3 = h**2 / 2 - phi_2
        moved = (-h).exp() * x + phi_1 * D_0 + phi_2 * slope + phi_3 * factor * difference
        return moved, ((D_0, sigma), *past)[:2]

    return step


same = sample(blobs.denoiser, start, levels(20), third_order(2))
assert apart(same, sample(blobs.denoiser, start, levels(20), dpm_solver_pp_3m)) < 1e-9
thirds = (32, 64, 128, 256)
halves = [end_error(third_order(1), n, 2) for n in thirds]
wholes = [end_error(third_order(2), n, 2) for n in thirds]
for name, errors, order in (("without the 2", halves, 2), ("with it", wholes, 3)):
    measured = math.log2(errors[-2] / errors[-1])
    print(f"{name:14s} order {measured:.2f}, {errors[-1]:.1e} off after {thirds[-1]} steps")
    assert abs(measured - order) < 0.2

# %% [markdown]
# **Mistake 2: the history of the wrong quantity.** PLMS mixes four values of $\hat\epsilon$. A network that predicts $v=\alpha\,\epsilon-\mathrm{std}\,x_0$ gives $\hat\epsilon$ at its own level, by its own $\alpha$ and $\mathrm{std}$. diffusers' `PNDMScheduler` mixes the four $v$ first, and then turns the mixture into $\hat\epsilon$ at the present level.
#
# **Mistake 3: another level than the one that is told.** The same scheduler moves $x$ by `1000 // n` trained steps, while the network is told the times of the grid. With 100 steps both are 10. With 150 steps of the spacing *trailing* the times are $6\tfrac23$ apart, and $x$ moves by 6: at each step it is noisier than the network believes. *More* steps make it worse.

# %%
from diffusers import PNDMScheduler

from course_lib.denoisers import discrete_of


def pndm(n, prediction="epsilon", **options):
    """diffusers' PNDM and our PLMS with the exact network of the blobs, on the scheduler's levels: (theirs, ours, exact end)."""
    stable = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = PNDMScheduler(**stable, skip_prk_steps=True, prediction_type=prediction, **options)
    scheduler.set_timesteps(n)
    table = discrete_of(scheduler)
    grid = torch.cat(
        [table.sigma(scheduler.timesteps.unique().flip(0).to(F64)), table.sigma(torch.zeros(1))]
    )
    grid = grid.unique().flip(0)
    begin = blobs.sample(150, generator(26), float(grid[0]))
    x_t = begin * (1 + grid[0] ** 2) ** -0.5  # the coordinate of the scheduler
    for t in scheduler.timesteps:
        sigma = table.sigma(t.to(F64))
        alpha = (1 + sigma**2) ** -0.5
        x0 = blobs.denoiser(x_t / alpha, sigma)
        eps = (x_t / alpha - x0) / sigma
        answer = eps if prediction == "epsilon" else alpha * (eps - sigma * x0)
        x_t = scheduler.step(answer, t, x_t).prev_sample.to(F64)
    ours = sample(blobs.denoiser, begin, grid, plms())
    end = blobs.reference_flow(begin, float(grid[0]), float(grid[-1]), tolerance=1e-9)
    return x_t * (1 + grid[-1] ** 2) ** 0.5, ours, end


fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.5))
axes[0].loglog(thirds, halves, "o-", color=study.COLOURS["warn"], label="without the 2")
axes[0].loglog(thirds, wholes, "s-", color=study.COLOURS["model"], label="with it")
axes[0].set(title="1. 3M", ylabel="mean distance to the exact end")
wrong, mended = [], []
for n in (10, 20, 50):
    theirs, ours, end = pndm(n, "v_prediction", steps_offset=1)
    wrong.append(apart(theirs, end))
    mended.append(apart(ours, end))
    print(
        f"v mixed across levels, {n:3d} steps: {wrong[-1]:.3f} off; the noise mixed: {mended[-1]:.3f}"
    )
    assert wrong[-1] > 1.5 * mended[-1]
axes[1].loglog((10, 20, 50), wrong, "o-", color=study.COLOURS["warn"], label="v is mixed")
axes[1].loglog(
    (10, 20, 50), mended, "s-", color=study.COLOURS["model"], label=r"$\hat\epsilon$ is mixed"
)
axes[1].set(title="2. PLMS, prediction v")
wrong, mended = [], []
for n in (100, 150, 300, 600):
    theirs, ours, end = pndm(n, timestep_spacing="trailing")
    wrong.append(apart(theirs, end))
    mended.append(apart(ours, end))
    print(
        f"whole strides, trailing, {n:3d} steps: {wrong[-1]:.4f} off; the levels as told: {mended[-1]:.4f}"
    )
    if n > 100:
        assert wrong[-1] > 10 * mended[-1]
axes[2].loglog(
    (100, 150, 300, 600), wrong, "o-", color=study.COLOURS["warn"], label="strides of 1000 // n"
)
axes[2].loglog((100, 150, 300, 600), mended, "s-", color=study.COLOURS["model"], label="as told")
axes[2].set(title="3. PLMS, trailing", ylim=(1e-4, 3))
assert wrong[-1] > wrong[0]
for ax, ticks in zip(axes, (thirds, (10, 20, 50), (100, 150, 300, 600)), strict=True):
    ax.set_xlabel("steps")
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=11)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# A fourth kind is seen at once: a last step of length 0, or of infinite length, where a formula divides by $h$. Some schedulers run into it with options that their documentation offers. Which of these runs end in finite numbers?

# %%
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

LAST_STEPS = {
    "UniPC, bh2, to 0": UniPCMultistepScheduler(),
    "UniPC, bh1, to 0": UniPCMultistepScheduler(solver_type="bh1"),
    "UniPC-3 at full order, to 0": UniPCMultistepScheduler(solver_order=3, lower_order_final=False),
    "3M, exponential, to sigma_min": DPMSolverMultistepScheduler(
        solver_order=3, use_exponential_sigmas=True, final_sigmas_type="sigma_min"
    ),
}
for name, scheduler in LAST_STEPS.items():
    scheduler.set_timesteps(20)
    x_t = torch.randn(4, 3, generator=generator(27))
    try:
        for t in scheduler.timesteps:
            x_t = scheduler.step(torch.sin(x_t), t, x_t).prev_sample
        ending = "finite" if bool(torch.isfinite(x_t).all()) else "not a number"
    except RuntimeError as error:
        ending = "refused, " + ("singular matrix" if "singular" in str(error) else str(error))
    print(f"{name:30s} {ending}")
    assert (ending == "finite") == (name == "UniPC, bh2, to 0")

# %% [markdown] slideshow={"slide_type": "slide"}
# ### What published code does otherwise
#
# All schedulers of diffusers were run beside the steps of this course, with the same network, noise, levels and times. Nearly all agree to rounding. The rest, each held by a test in `tests/parity` that names the difference and, where an exact answer can tell, says which is nearer:
#
# | in diffusers | instead of | test |
# |---|---|---|
# | DPM-Solver multistep, EDM: half of $D''$ in order 3, mistake 1 | order 3 | `test_their_third_order_multistep_is_of_second_order` |
# | DPM-Solver singlestep 3: the inner levels from the grid of $t$, the second of them by a whole midpoint step | one and two thirds of the step in $\lambda$, Algorithm 2 | `test_their_singlestep_third_order_composes_a_second_order_step` |
# | PNDM: mixes $v$ across levels, mistake 2 | $\hat\epsilon$ | `test_pndm_mixes_v_across_levels` |
# | PNDM: strides of `1000 // n`, mistake 3 | the levels that it was given | `test_pndm_strides_by_a_whole_number` |
# | UniPC: lowers its order at the end of every run (on grids even in $t$ that helps) | runs under 15 steps, as documented | `test_unipc_lowers_its_order_at_any_number_of_steps` |
# | DPM-Solver, UniPC, DEIS on Karras's grid: the network is told whole times (costs less than the rule's own error) | times between | `test_which_round_the_times_of_a_karras_grid`, `test_rounded_times_cost_little` |
# | grids that end at $\sigma_{\min}$ get it twice; bh1 to $\sigma=0$ | a last step of finite length | `test_last_steps_of_no_or_infinite_length` |
# | UniPC-3 at full order to 0: singular | a first-order last step | `test_unipc_3_at_full_order_to_zero_is_refused` |
# | iPNDM: its first step takes 0 for the clean sample | $D$ | `test_ipndm_begins_without_a_sample` |
# | EDM Euler with churn: the network sees $x$ before the noise is added | after, Algorithm 2 | `test_edm_churn_in_the_pipelines_order_is_another_sampler` |
# | DPM-Solver SDE: its Brownian path runs in the time $\sigma$ (same order, another sampler) | $1/\sigma^2$ | `test_dpm_solver_sde_runs` |
# | ScoreSDE VE pipeline: corrects, then predicts | predicts, then corrects | `test_score_sde_pipeline_corrects_first` |
#
# Two names for one thing are no mistake, but good to know: *Euler ancestral* is DDIM with $\eta=1$ (`test_euler_ancestral_is_ddim_with_eta_1`).
#
# ### What to use when
#
# | you want | take | grid |
# |---|---|---|
# | good pictures in 10 to 25 calls | DPM-Solver++(2M) or UniPC-2 | Karras or even in $\lambda$; *trailing* if the times must be trained ones |
# | fewer than 10 calls, no guidance | DEIS-3 or PLMS; then a distilled model | try several: it matters more than the rule |
# | the exact flow, many calls (references, teachers) | UniPC-3, DPM-Solver-3 | even in $\lambda$ |
# | to repair an imperfect network, calls to spare | EDM's sampler with churn, SDE-DPM-Solver++(2M) | Karras |
# | one picture at a time, to a tolerance | `sample_adaptive` ([second part](03b_flows_and_few_steps.ipynb)) | none |
# | inversion, editing, interpolation | Heun; never a step with noise | rising, from above 0 |
# | a likelihood | `exact_log_likelihood`; no clipping of $D$ | even in $\ln\sigma$ |
# | to edit $x$ between steps (inpainting, lecture 06) | DDIM, Heun, or clear the memory | any |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# The steps know only $D$. With Stable Diffusion $D$ is a U-Net on latents, listening to a sentence; the guidance is that of lecture 04. Two samplers, ten steps each on Karras's grid, beside 50 steps: how far is the latent, and what do you see? The cell runs on Stable Diffusion 1.5 where its weights are, else on
# the course's `mini-sd`.

# %%
from IPython.display import display

from course_lib.guidance import cfg

SETTINGS = {  # name: (prompts, guidance)
    "stable-diffusion-1.5": (["a red mug"], 7.5),
    "mini-sd": (
        ["a large red mug on grass", "a blue car on grey ground"],
        3.0,
    ),
}
name = next((name for name in SETTINGS if zoo.available(name)), None)
if name is None:
    print(f"neither of {', '.join(SETTINGS)} is on this machine")
else:
    model, (prompts, w) = zoo.load(name), SETTINGS[name]
    words, nothing = model.embed(prompts), model.embed([""] * len(prompts))
    guided = cfg(model.denoiser.given(**words), model.denoiser.given(**nothing), w)
    z = SampleNoise(7)(torch.empty(len(prompts), *model.shape, device=model.device))

    def latents_of(step, n):
        """Clean latents after n steps of this rule, from the noise z, on Karras's grid."""
        first, last = model.sigmas(50)[[0, -1]].tolist()  # the pipeline's own ends
        sigmas = karras(n, last, first, to_zero=False)
        return model.finish(sample(guided, model.start(z, sigmas[0]), sigmas, step), sigmas[-1])

    rows = {"50 steps": latents_of(dpm_solver_pp_2m, 50)}
    gaps = {}
    for rule, step in {"DDIM": ddim, "UniPC-2": unipc(2)}.items():
        rows[f"{rule}, 10"] = latents_of(step, 10)
        gaps[rule] = float((rows[f"{rule}, 10"] - rows["50 steps"]).square().mean().sqrt())
        print(f"{name}, {rule}: the latent is {gaps[rule]:.3f} (rms) from that of 50 steps")
    assert gaps["UniPC-2"] < gaps["DDIM"]
    with torch.no_grad():
        shown = [list(model.decode(row)) for row in rows.values()]
    display(study.strip(shown, row_titles=list(rows), scale=1))

# %% [markdown]
# How paths are made straight, and how models of four steps and of one are made from one of sixty-four, is [the second part of this lecture](03b_flows_and_few_steps.ipynb).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - One density path, many processes: $\lambda=1$ is the reverse SDE, $\lambda=0$ the probability-flow ODE. In $x=x_0+\sigma\epsilon$ there is one flow, $dx/d\sigma=\hat\epsilon$, for all schedules.
# - The linear part is solved exactly; what is left is an integral of $D$ (or $\hat\epsilon$). Hold it: DDIM. A line through the last value: DPM-Solver++(2M). Use the next call to correct the last step: UniPC.
# - Order is what a halved step buys. Count network calls, not steps. A cold start bounds the order, a jump to 0 does, and at few calls order promises nothing.
# - Noise costs calls and forgets errors. The flow costs fewer, and remembers them.
# - A flow can be undone: likelihoods, inversion, interpolation.
# - Hold a sampler against an exact flow before you hold it against pictures.
#
# **Exercises.** [Set 03](../my_course/03_score_sdes_and_samplers.ipynb): eleven functions, 20 points: Euler, Heun, DDIM as an exponential integrator, DPM-Solver++(2M) with its memory, the measured order, an exact likelihood, a round trip, the choice of a grid, the straight flow, reflow and the reverse SDE. `course lab` puts a copy for you into `my_course/`; each check names the mistake that was made.
#
# ## Sources
#
# - Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole. *Score-Based Generative Modeling through Stochastic Differential Equations.* 2021. arXiv:2011.13456
# - B. Anderson. *Reverse-Time Diffusion Equation Models.* Stochastic Processes and their Applications 12, 1982.
# - J. Ho, A. Jain, P. Abbeel. *Denoising Diffusion Probabilistic Models.* 2020. arXiv:2006.11239
# - J. Song, C. Meng, S. Ermon. *Denoising Diffusion Implicit Models.* 2021. arXiv:2010.02502
# - T. Karras, M. Aittala, T. Aila, S. Laine. *Elucidating the Design Space of Diffusion-Based Generative Models.* 2022. arXiv:2206.00364
# - C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu. *DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps.* 2022. arXiv:2206.00927
# - C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu. *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models.* 2022. arXiv:2211.01095
# - L. Liu, Y. Ren, Z. Lin, Z. Zhao. *Pseudo Numerical Methods for Diffusion Models on Manifolds.* 2022. arXiv:2202.09778
# - Q. Zhang, Y. Chen. *Fast Sampling of Diffusion Models with Exponential Integrator.* 2023. arXiv:2204.13902
# - W. Zhao, L. Bai, Y. Rao, J. Zhou, J. Lu. *UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models.* 2023. arXiv:2302.04867
# - A. Jolicoeur-Martineau, K. Li, R. Piché-Taillefer, T. Kachman, I. Mitliagkas. *Gotta Go Fast When Generating Data with Score-Based Models.* 2021. arXiv:2105.14080
# - R. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud. *Neural Ordinary Differential Equations.* 2018. arXiv:1806.07366
# - W. Grathwohl, R. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud. *FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models.* 2019. arXiv:1810.01367 (the trace by probes)
# - S. Lin, B. Liu, J. Li, X. Yang. *Common Diffusion Noise Schedules and Sample Steps are Flawed.* 2024. arXiv:2305.08891
# - K. Shoemake. *Animating Rotation with Quaternion Curves.* SIGGRAPH 1985 (the path on the sphere)
# - M. Hutchinson. *A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines.* 1989.
# - K. Crowson. *k-diffusion.* 2022. P. von Platen et al. *diffusers.* 2022. Software.
