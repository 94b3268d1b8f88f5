# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 03b Flows and few steps
#
# **When no solver is fast enough: straighter paths, students that take long steps, steps that choose their length, and steps taken side by side.** Lecture 03 took the model as it is and solved its flow well. Here the flow itself is changed, or the model, or the order in which the work is done.
#
# After it you can
#
# - train a flow by matching velocities, and say why it is the flow of lecture 03 in another time;
# - straighten a flow by *reflow*, measure how straight it is, and say what was lost;
# - distil a sampler of 64 steps into one of four, two and one, in two ways, and name what makes each of them work;
# - let a solver choose the lengths of its steps, and run many steps at once;
# - say what DDIM holds constant, and what takes its place where noise is a matrix.
#
# You need lecture 03. Time: 60 minutes. Everything runs on a laptop, with no network.

# %%
import copy
import itertools
import math

import matplotlib.pyplot as plt
import torch

from course_lib import metrics, study, zoo
from course_lib.adaptive import sample_adaptive
from course_lib.denoisers import from_edm
from course_lib.devices import SampleNoise, generator
from course_lib.distillation import (
    Followed,
    consistency_distillation,
    consistency_loss,
    from_consistency,
    progressive_round,
    truncated_snr,
    two_step_target,
)
from course_lib.flows import flow_grid, flow_paths, reflow_pairs, straightness, velocity
from course_lib.gaussians import Mixture
from course_lib.gddim import CLD, gddim
from course_lib.nets.mlp import MLP
from course_lib.parallel import sample_parallel
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim, ddpm
from course_lib.training import denoising_loss, fit
from course_lib.types import right as to_right
from course_lib.worlds import digits, toys
from course_lib.zoo.recipes import digits_students

torch.set_num_threads(1)  # tiny tensors are faster on one thread
study.use()
F64 = torch.float64
HIGH, LOW = 15.0, 0.02
blobs = toys.three_blobs()
square = (-2.9, 2.9, -2.9, 2.9)
D = zoo.load("digits", device="cpu")  # small enough that a GPU would not help


def levels(n):
    """Karras's grid of n steps from HIGH down to LOW, without a last step to 0."""
    return karras(n, LOW, HIGH, to_zero=False)


def apart(a, b):
    """Mean distance between the rows of two sets of points (n, ...)."""
    return float((a - b).flatten(1).norm(dim=1).mean())


def gaussian_noise(seed):
    """noise(x) from one stream: for toys, where a sample may depend on its batch."""
    source = generator(seed)
    return lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype)


def blobs_at(level):
    """draw(n, generator) from the blobs noised to this level."""
    return lambda n, source: blobs.sample(n, source, level)


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Forty points of noise on their way to three blobs, in 100 steps and in *one*. Left, a flow as lecture 03 knows it: the paths turn, and one straight step from the noise ends in the middle, where no data are. Right, the same network after it was trained once more on pairs of its own making: the paths are straight lines, and one step is enough.

# %% slideshow={"slide_type": "-"}
trained = zoo.load("blobs-reflow", device="cpu")  # for each of three seeds the flows by name
z = torch.randn(40, 2, generator=generator(33))
fig, axes = plt.subplots(1, 4, figsize=(9, 2.8), sharey=True)
for ax, (part, n) in zip(
    axes, (("first", 100), ("first", 1), ("reflowed", 100), ("reflowed", 1)), strict=True
):
    _, paths = flow_paths(trained[0][part], z, n, ddim)
    study.density(ax, blobs.log_prob, square)
    ax.plot(*paths.permute(2, 0, 1), color=study.COLOURS["muted"], linewidth=0.7)
    study.scatter(ax, paths[0], colour=study.COLOURS["noise"], size=6)
    study.scatter(ax, paths[-1], colour=study.COLOURS["model"], size=6)
    ax.set(title=f"{part}, {n} step{'s' if n > 1 else ''}", ylabel="")
    ax.title.set_fontsize(12)
plt.show()


# %% [markdown] slideshow={"slide_type": "slide"}
# ## Flow matching: the same flow in another time
#
# One can begin without any noise process. Take a data point $x_0$ and a noise $\epsilon$ that know nothing of one another, join them by a straight line, and walk it at even speed from $t=0$ to $t=1$:
#
# $$x_t=(1-t)\,x_0+t\,\epsilon,\qquad \frac{dx_t}{dt}=\epsilon-x_0 .$$
#
# Many such lines pass through one point. A network that is shown all of them learns their mean velocity there, and samples are made by following it from noise at $t=1$ back to $t=0$. This is **flow matching** (Lipman et al. 2023), or *rectified flow* (Liu et al. 2023):
#
# $$\boxed{\;\min_v\ \mathbb E\,\big|v(x_t,t)-(\epsilon-x_0)\big|^2\;}\qquad\text{with the minimum}\qquad v(x,t)=\mathbb E[\epsilon-x_0\mid x_t=x] .$$
#
# There is no SDE in it and no score. But $x_t/(1-t)=x_0+\sigma\epsilon$ with $\sigma=\frac t{1-t}$, so that the mean of $x_0$ is $D$, and with $\epsilon=(x_t-(1-t)\,x_0)/t$
#
# $$v(x_t,t)=\frac{x_t-D(x,\sigma)}t,\qquad x=\frac{x_t}{1-t} .$$
#
# It is the probability flow, divided by $1+\sigma$ and walked in the time $t=\frac\sigma{1+\sigma}$. The loss is the denoising loss of lecture 02, weighted by $(1+\sigma)^2/\sigma^2$. Euler's step in $t$ is DDIM. So every sampler of lecture 03 serves a flow-matching model, and every statement on $D$ is one on $v$. Check all of it on the exact flow:


# %%
def matching(v, x0, eps, t):
    """The loss of flow matching, for each sample."""
    x_t = (1 - t)[:, None] * x0 + t[:, None] * eps
    return (v(x_t, t) - (eps - x0)).square().mean(1)


def exact_velocity(x_t, t):
    return velocity(blobs.denoiser, x_t, t)


source = generator(31)
x0 = blobs.sample(4000, source)
eps = torch.randn(4000, 2, generator=source, dtype=F64)
t = 0.001 + 0.998 * torch.rand(4000, generator=source, dtype=F64)
loss = matching(exact_velocity, x0, eps, t)
same = denoising_loss(blobs.denoiser, x0, t / (1 - t), eps, "flow")
assert torch.allclose(loss, same.double(), rtol=1e-4, atol=1e-5)  # that loss is computed in fp32
wrong = 0.5 * ((1 - t)[:, None] * x0 + t[:, None] * eps)
more = matching(lambda x, s: exact_velocity(x, s) + 0.5 * x, x0, eps, t) - loss
extra = wrong.square().mean(1)  # what a velocity that is off by this costs, on average
print(f"loss {loss.mean():.3f}, above 0 since lines cross; off by 0.5 x: {more.mean():.3f} more")
assert abs((more - extra).mean()) < 4.5 * (more - extra).std() / len(t) ** 0.5
assert more.mean() > 0.05
z = torch.randn(300, 2, generator=generator(32), dtype=F64)
exact_end = blobs.reference_flow(1e6 * z, 1e6, 1e-6)
by_steps = reflow_pairs(blobs.denoiser, z, 100)[0]  # steps even in t
print(f"100 steps in t and the flow in sigma: {apart(by_steps, exact_end):.4f} apart")
assert apart(by_steps, exact_end) < 1e-3

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Reflow: straight paths
#
# The lines are straight, the paths are not: where lines cross, their mean turns. How much is measured by the **straightness** of a flow, the mean square by which the velocity along a path differs from the one straight way between its own ends (Liu et al. 2023, Sec. 2.2):
#
# $$S=\int_0^1\mathbb E\,\Big|(\epsilon-x_0)-\frac{dx_t}{dt}\Big|^2dt\qquad\text{along the paths of the flow; 0 if all are straight and even.}$$
#
# A path with $S=0$ needs one step of Euler's, from noise to data. **Reflow** goes there in two moves:
#
# 1. follow the flow from many $\epsilon$ to their ends $x_0$: these are the new pairs, $\epsilon$ with the end of *its own* path;
# 2. train flow matching again, the same loss, on these pairs.
#
# Paths of a flow cannot cross, so the lines between their ends hardly do, and where only one line passes, the mean is that line. The end points keep their densities; the mean square distance of a pair cannot rise (Theorem 3.5).
#
# `zoo.load("blobs-reflow")` holds three small networks for each of three seeds: *first*, flow matching on the blobs; *reflowed*, which goes on from it with pairs of its own; and *shuffled*, a control, which goes on just as long with the same $x_0$ and $\epsilon$, but each $x_0$ given to another $\epsilon$. Forty paths of 100 steps, from the same noise:

# %%
z = torch.randn(40, 2, generator=generator(33))
fig, axes = plt.subplots(1, 2, figsize=(7.6, 4.2), sharey=True)
for ax, part in zip(axes, ("first", "reflowed"), strict=True):
    times, paths = flow_paths(trained[0][part], z, 100)
    study.density(ax, blobs.log_prob, square)
    ax.plot(*paths.permute(2, 0, 1), color=study.COLOURS["muted"], linewidth=0.8)
    study.scatter(ax, paths[0], colour=study.COLOURS["noise"], size=9, label="noise")
    study.scatter(ax, paths[-1], colour=study.COLOURS["model"], size=9, label="its end")
    ax.set_title(f"{part}: $S$ = {straightness(times, paths).mean():.3f}")
axes[1].set_ylabel("")
axes[1].legend(loc="lower right", fontsize=11)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment: straighter, hence fewer steps, and by the pairs alone
#
# *Claims*, for each of three seeds. Reflow divides $S$ by more than 50, the control by less than 1.5. After reflow *one* step of Euler's is nearer to the blobs than eight were before, and as near as the first flow comes with any number of steps; the control gains nothing. Distance: sliced Wasserstein of 3,000 samples.

# %%
PARTS = {"first": ("data", "o-"), "reflowed": ("model", "s-"), "shuffled": ("warn", "^--")}
counts, many = (1, 2, 4, 8, 32), 3000
z, exact = torch.randn(many, 2, generator=generator(34)), blobs.sample(many, generator(35))
floor, spread = metrics.sliced_wasserstein_floor(blobs_at(0.0), many, rounds=16)


def from_exact(D, *options):
    """Distance to the blobs of where the flow of D carries z."""
    return metrics.sliced_wasserstein(reflow_pairs(D, z, *options)[0], exact)


bend = {
    part: [float(straightness(*flow_paths(D[part], z[:500])).mean()) for D in trained]
    for part in PARTS
}
off = {part: [[from_exact(D[part], n, ddim) for n in counts] for D in trained] for part in PARTS}
ends = [from_exact(D["first"]) for D in trained]  # 100 steps of UniPC
fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), width_ratios=(1, 1.5))
for k, (part, (role, mark)) in enumerate(PARTS.items()):
    colour = study.COLOURS[role]
    left.semilogy([k] * 3, bend[part], mark[0], color=colour, markersize=9, alpha=0.7)
    for row, label in zip(off[part], (part, None, None), strict=True):
        right.loglog(counts, row, mark, color=colour, label=label)
    print(f"{part:9s} S: {', '.join(f'{s:.4f}' for s in bend[part])}")
    for n, *row in zip(counts, *off[part], strict=True):
        print(f"{n:13d} steps, distance {', '.join(f'{gap:.3f}' for gap in row)}")
print(f"where the first flow ends: {', '.join(f'{gap:.3f}' for gap in ends)}")
print(f"two exact sets: {floor:.3f}, standard deviation {spread:.3f}")
right.axhline(floor, color=study.COLOURS["muted"], linestyle=":", label="two exact sets")
left.set_xticks(range(3), PARTS)
left.set(xlim=(-0.5, 2.5), ylabel="straightness $S$", title="three seeds")
right.set(xlabel="Euler steps in $t$", ylabel="distance to the blobs", title="a line for each seed")
right.set_xticks(counts, [str(n) for n in counts])
right.minorticks_off()
right.legend(fontsize=11)
for seed in range(3):
    assert bend["first"][seed] > 50 * bend["reflowed"][seed]
    assert bend["first"][seed] < 1.5 * bend["shuffled"][seed]
    assert off["reflowed"][seed][0] < off["first"][seed][3]  # one step, and eight
    assert off["reflowed"][seed][0] < ends[seed] + floor
    assert off["shuffled"][seed][0] > 0.9 * off["first"][seed][0]
plt.show()


# %% [markdown] slideshow={"slide_type": "slide"}
# ## Fewer calls than any solver: students
#
# A solver takes the network as it is. A *student* is a network that is trained to make long steps. Two ways, both taught by the flow of the model that is there.
#
# **Progressive distillation** (Salimans and Ho 2022). What would $D$ have to say at $x$, so that *one* DDIM step from $\sigma$ to $\sigma''$ lands where *two* of the teacher's do, by way of $\sigma'$? DDIM keeps $x_0$ and shrinks the rest, $x''=\tilde x+\rho\,(x-\tilde x)$ with $\rho=\sigma''/\sigma$. Solve it for $\tilde x$:
#
# $$\boxed{\;\tilde x=\frac{x''-\rho\,x}{1-\rho},\qquad x''=\text{two steps of the teacher from }x\;}$$
#
# The student learns $\tilde x$ by the usual loss, at the levels of its own grid and nowhere else. Then it is the next teacher: $64\to32\to16\to8\to4\to2\to1$ steps. The equation as code, and its check: the target, put into one step, is the two steps.

# %%
study.source(two_step_target)

# %%
three = torch.tensor([9.0, 3.0, 1.0], dtype=F64)
x = blobs.sample(200, generator(40), float(three[0]))
target = two_step_target(blobs.denoiser, x, *three)
once, _ = ddim(lambda x, sigma: target, x, three[0], three[2])
twice = sample(blobs.denoiser, x, three)
assert apart(once, twice) < 1e-12 and apart(target, blobs.denoiser(x, three[0])) > 0.1
print("one step with the target is two steps with D")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Consistency distillation** (Song et al. 2023). Aim at the end at once: $f(x,\sigma)$ is the point at $\sigma_{\min}$ of the path of the flow that runs through $x$. Nobody knows that point, but two neighbours on one path have the *same* one:
#
# $$\boxed{\;\min_\theta\ \mathbb E\;d\Big(f_\theta(x,\sigma),\ f_{\theta^-}(\hat x,\sigma')\Big),\qquad \hat x=\text{one step of the teacher's flow from }x\text{ to }\sigma'\;}$$
#
# $\theta^-$ follows $\theta$ as a moving average, without gradients; $d$ is a distance. At $\sigma_{\min}$ the end is $x$ itself, and $f=c_{\text{skip}}\,x+c_{\text{out}}\,F_\theta$ has $c_{\text{out}}(\sigma_{\min})=0$ to hold that for every network: truth enters there, and spreads from neighbour to neighbour up to $\sigma_{\max}$. More than one call helps: raise the noise again, and go to the end once more.
#
# Two networks, then, with two meanings. A progressive student is a denoiser that is right for the steps of its own grid, and any other grid is none of its business; the consistency function is no denoiser at all. Called at $\sigma_{\max}$ once, $D$ gives the mean of everything, $f$ a sample.

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Experiment: what defines each method, left out
#
# A small network on the blobs, whose exact $D$ is the teacher. *Progressive*, 16 to 8 to 4 steps; without its two steps, the target is what the teacher says at the student's levels. *Consistency*, one call; without the path, the neighbour at $\sigma'$ has the same $x_0$ and noise of its own. As many steps of training each. *Claim*: each is useless without.

# %%
coarse, ROUND = karras(16, 0.02, HIGH), 250
fast = {"lr": 5e-3, "half": False, "progress": False, "ema_decay": 0.99}


def points(source):
    """A batch: points of the blobs and noise."""
    return blobs.sample(128, source).float(), torch.randn(128, 2, generator=source)


def as_denoiser(net):
    return from_edm(net, 1.1)


def as_consistency(net):
    return from_consistency(net, 1.1, 0.02)


def progressive():
    net, teacher, sigmas = MLP(2, 64, 2), blobs.denoiser, coarse
    for _ in range(2):  # 16 -> 8 -> 4
        run = progressive_round(
            lambda D=teacher: D, net, as_denoiser, points, sigmas, steps=ROUND, **fast
        )
        net, sigmas = copy.deepcopy(run.net).requires_grad_(True), sigmas[::2]
        teacher = as_denoiser(run.net)
    return teacher


def without_two_steps():
    def loss(net, x0, eps, k):
        sigma = coarse[::4][k]
        x = x0 + to_right(sigma, x0) * eps
        gap = as_denoiser(net)(x, sigma) - blobs.denoiser(x, sigma)
        return truncated_snr(sigma) * gap.square().mean(1)

    batch = lambda source: (*points(source), torch.randint(4, (128,), generator=source))
    return as_denoiser(fit(MLP(2, 64, 2), batch, loss, steps=2 * ROUND, **fast).net)


def consistency():
    options = {"c": 0.01, "steps": 2 * ROUND, **fast}
    run = consistency_distillation(
        lambda: blobs.denoiser, MLP(2, 64, 2), as_consistency, points, coarse[:-1], **options
    )
    return as_consistency(run.net)


def without_the_path():
    def loss(net, x0, eps, k, other):
        f = as_consistency(net)
        anew = lambda D, x, s, s_next, memory=None: (x0 + to_right(s_next, x0) * other, None)
        follower = f.given(follower=True)
        return consistency_loss(
            f, follower, blobs.denoiser, x0, eps, k, coarse[:-1], c=0.01, step=anew
        )

    def batch(source):
        k = torch.randint(len(coarse) - 2, (128,), generator=source)
        return *points(source), k, torch.randn(128, 2, generator=source)

    return as_consistency(
        fit(Followed(MLP(2, 64, 2)), batch, loss, steps=2 * ROUND, **fast).net.net
    )


at_four, at_once = coarse[::4], torch.tensor([HIGH, 0.0])
RUNS = {  # name: (what to call, grid)
    "DDIM, 4 steps": (lambda: blobs.denoiser, at_four),
    "progressive, 4": (progressive, at_four),
    "… without two steps": (without_two_steps, at_four),
    "consistency, 1 call": (consistency, at_once),
    "… without the path": (without_the_path, at_once),
}
begin = HIGH * torch.randn(2000, 2, generator=generator(41))
real = blobs.sample(2000, generator(42))
fig, axes = plt.subplots(1, 5, figsize=(9.2, 2.5))
distances = {}
for ax, (name, (make, grid)) in zip(axes, RUNS.items(), strict=True):
    torch.manual_seed(0)
    cloud = sample(make(), begin, grid)
    distances[name] = metrics.sliced_wasserstein(cloud, real)
    study.density(ax, blobs.log_prob, square)
    study.scatter(ax, cloud[:300], colour=study.COLOURS["warn" if "…" in name else "model"], size=4)
    ax.set(xlim=square[:2], ylim=square[2:], xticks=(), yticks=(), xlabel="", ylabel="")
    ax.set_title(f"{name}\n{distances[name]:.2f}", fontsize=11)
assert distances["progressive, 4"] < distances["… without two steps"] / 2
assert distances["consistency, 1 call"] < distances["… without the path"] / 2
plt.show()

# %% [markdown]
# The number is the sliced Wasserstein distance; 16 steps of DDIM are at 0.05. Without its two steps the student is where DDIM with four steps is: it can only repeat what the teacher says there. Without the path the end of a point is not known, and the best guess is the mean of all ends. Over three seeds: see `tests/unit/test_distillation.py`.

# %% [markdown] slideshow={"slide_type": "slide"}
# ### On digits
#
# Teacher: the course's `digits`, 64 steps of DDIM. Its students are changes of low rank to its weights (LoRA, 0.4 MB each). All rows start from the same noise. The progressive students follow the teacher's own path, and so draw *its* digit; the consistency function follows the exact flow, and from the second call on it has noise of its own.

# %%
few, once_to_the_end = (
    zoo.load("digits-progressive", device="cpu"),
    zoo.load("digits-consistency", device="cpu"),
)
asked = {"label": torch.arange(10)}
ten = D.given(**asked)
noise_of_ten = SampleNoise(4).start((10, *digits.SHAPE), HIGH)
rows = {
    "teacher, 64 steps": sample(ten, noise_of_ten, digits_students.grid(64)),
    "teacher, 4": sample(ten, noise_of_ten, digits_students.grid(4)),
}
for n in (4, 2, 1):
    rows[f"progressive, {n}"] = sample(few[n].given(**asked), noise_of_ten, digits_students.grid(n))
for n in (2, 1):
    again = digits_students.consistency(SampleNoise(43))
    rows[f"consistency, {n}"] = sample(
        once_to_the_end.given(**asked), noise_of_ten, digits_students.levels(n), again
    )
off = {
    name: float((row - rows["teacher, 64 steps"]).square().mean().sqrt())
    for name, row in rows.items()
}
assert off["progressive, 4"] < off["teacher, 4"] / 2
study.strip([list(row) for row in rows.values()], row_titles=list(rows), scale=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# How good are they as a set? The cards of the zoo hold the Fréchet distance of 1,797 samples (lecture 02) to the 1,797 real digits, against the number of calls. As many real digits, drawn with replacement, give the dotted line: nothing can be seen below it. *Claim*: in four calls the consistency function is nearer than its teacher in 64, and the progressive student within a fifth of it.

# %%
progressive_card, consistency_card = (
    zoo.card(f"digits-{kind}")["metrics"] for kind in ("progressive", "consistency")
)
CURVES = {
    "teacher, DDIM": (progressive_card["teacher"], "o-", "muted"),
    "progressive": (progressive_card["student"], "s-", "model"),
    "consistency": (consistency_card["student"], "^-", "noise"),
}
fig, ax = plt.subplots(figsize=(6.6, 3.8))
for name, (card, mark, colour) in CURVES.items():
    calls = sorted(map(int, card))
    found = [card[str(n)]["frechet"] for n in calls]
    ax.loglog(calls, found, mark, color=study.COLOURS[colour], label=name)
    print(f"{name:14s}", ", ".join(f"{n}: {gap:.4f}" for n, gap in zip(calls, found, strict=True)))
ax.axhline(progressive_card["frechet_floor"], color="black", linestyle=":", label="real digits")
ax.set(xlabel="network calls", ylabel="Fréchet distance")
ax.set_xticks((1, 2, 4, 20, 64), ("1", "2", "4", "20", "64"))
ax.minorticks_off()
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
low, high = progressive_card["frechet_4_over_64_interval"]
print(
    f"4 steps over 64: {progressive_card['frechet_4_over_64']:.3f}, interval {low:.3f} to {high:.3f}"
)
assert progressive_card["frechet_4_over_64"] <= 1.2
assert consistency_card["student"]["4"]["frechet"] <= progressive_card["teacher"]["64"]["frechet"]
for card in (progressive_card, consistency_card):
    for n, row in card["student"].items():
        assert row["frechet"] < progressive_card["teacher"][n]["frechet"]
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Steps that choose their length
#
# Where should the steps be short? Where the flow bends, and that differs from point to point: a point bends where it decides for a blob. *Gotta Go Fast* (Jolicoeur-Martineau et al. 2021) takes two rules of neighbouring order, an Euler step $x_1$ and its Heun correction $x_\text{new}$ from the same two calls. Their difference estimates the error; a step whose estimate exceeds a tolerance is refused,
# and the next length follows from it, $h\leftarrow0.9\,h\cdot\mathrm{error}^{-0.9}$. That is `sample_adaptive`; without noise it solves the flow. Left, the length of each step of four points. Right, the error against calls, beside the same rule in even steps of $\ln\sigma$.


# %%
def even_heun(x, n):
    """Heun's rule in log sigma in n even steps from HIGH to LOW: what sample_adaptive does, with steps of one length."""
    h = math.log(HIGH / LOW) / n
    for k in range(n):
        sigma, sigma_next = (torch.tensor(HIGH * math.exp(-h * i), dtype=F64) for i in (k, k + 1))
        x_1 = x + h * (blobs.denoiser(x, sigma) - x)
        x = (x_1 + x + h * (blobs.denoiser(x_1, sigma_next) - x_1)) / 2
    return x


def median_gap(a, b):
    """Median distance between rows: one point that falls into the wrong blob does not decide."""
    return float((a - b).norm(dim=1).median())


many = blobs.sample(400, generator(19), HIGH)
many_there = blobs.reference_flow(many, HIGH, LOW, tolerance=1e-9)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
adaptive, even = [], []
for atol in (0.1, 0.05, 0.02, 0.01):
    found = sample_adaptive(blobs.denoiser, many, HIGH, LOW, rtol=0.0, atol=atol)
    average = sum(2 * (len(row) - 1) for row in found.levels) / len(found.levels)
    adaptive.append((average, median_gap(found.x, many_there)))
    even += [
        (n, median_gap(even_heun(many, n // 2), many_there)) for n in (round(average), found.calls)
    ]
    print(
        f"tolerance {atol:.2f}: {average:.0f} calls a point on average, {found.calls} until the last arrives;"
        f" error {adaptive[-1][1]:.4f}, in even steps {even[-2][1]:.4f} and {even[-1][1]:.4f}"
    )
    assert adaptive[-1][1] < atol
    assert even[-2][1] > 1.5 * adaptive[-1][1]
    if atol == 0.02:
        for row in found.levels[:4]:
            left.loglog(row[:-1], (row[:-1] / row[1:]).log(), "o-", markersize=4, linewidth=1)
left.set(
    xlabel=r"$\sigma$", ylabel=r"length of the step, $\ln(\sigma/\sigma')$", title="four points"
)
left.invert_xaxis()
right.loglog(
    *zip(*sorted(even), strict=True), "s--", color=study.COLOURS["muted"], label="even steps"
)
right.loglog(*zip(*adaptive, strict=True), "o-", color=study.COLOURS["model"], label="adaptive")
right.set(xlabel="calls for the average point", ylabel="median distance\nto the exact end")
right.set(title="400 points")
right.set_xticks((40, 80, 160), ("40", "80", "160"))
right.minorticks_off()
right.legend()
plt.show()

# %% [markdown]
# At large $\sigma$ everything moves far in a unit of $\ln\sigma$, and a tolerance in units of $x$ asks for short steps; the dips below $\sigma=1$ are the decisions. Call for call of the average point, adaptive steps are nearer by a factor of two to three. But a batch goes on until its slowest point has arrived, and at *those* calls even steps do as well or better. For one picture at a time, or to find a good fixed grid, they are worth having; for large batches they are not.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Many steps at once
#
# Each step waits for the one before it. Must it? DDIM's step is $x_{i+1}=x_i+f(x_i)$ with $f(x_i)=(\sigma_{i+1}-\sigma_i)\,\hat\epsilon(x_i,\sigma_i)$, so that $x_{j+1}=x_0+\sum_{i\leq j}f(x_i)$. **Picard iteration** guesses all $x_i$, computes every $f(x_i)$ *in one call of the network*, adds up, and takes the sums for the next guess:
#
# $$x_{j+1}\;\leftarrow\;x_t+\sum_{i=t}^{j}f(x_i),\qquad j=t,\dots,t+p-1 .$$
#
# The first value after $x_t$ is exact after each call, so that $n$ steps never take more than $n$ calls; where $\hat\epsilon$ changes slowly, many become exact together. *ParaDiGMS* (Shih et al. 2023, Algorithm 1) does so in a window of $p$ steps, which moves on to the first $x_j$ that still changed by more than a tolerance, in units of the noise that
# DDPM adds in the step to $\sigma_j$. The result is *the same* as that of sequential DDIM, to this tolerance: the work grows, the waiting shrinks. That is `sample_parallel`. 100 steps, a digit of the trained network:

# %%
three = lambda x, sigma: D.given(label=torch.full((len(x),), 3))(x, sigma)  # a label for each row
noise_of_three, hundred = SampleNoise(4).start((1, *digits.SHAPE), HIGH), levels(100)
in_turn = sample(three, noise_of_three, hundred)
runs = {p: sample_parallel(three, noise_of_three, hundred, p, 0.1) for p in (1, 5, 10, 20)}
print("window   calls   rows of work   RMS distance to sequential DDIM")
for p, run in runs.items():
    off = float((run.x - in_turn).square().mean().sqrt())
    print(f"{p:6d} {run.calls:7d} {run.evaluations:14d}   {off:.1e}")
    assert off < 0.008  # one grey level of 256
assert runs[1].calls == 100 and runs[10].calls <= 30 and runs[20].calls <= 25

fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, p in zip(axes, (5, 20), strict=True):
    call = torch.arange(1, runs[p].calls + 1)
    begins = (runs[p].accepted[:, 0] < call[:, None]).sum(
        1
    )  # steps that were final before each call
    ax.barh(call, begins, color=study.COLOURS["data"], label="final")
    ax.barh(
        call,
        (100 - begins).clamp_max(p),
        left=begins,
        color=study.COLOURS["noise"],
        label="in the window",
    )
    ax.plot([0, 100], [0, 100], color=study.COLOURS["warn"], label="one step a call")
    ax.set(xlabel="step", title=f"window {p}: {runs[p].calls} calls", xlim=(0, 100), ylim=(36, 0))
axes[0].set_ylabel("call")
axes[1].legend(loc="lower right")
plt.show()

# %% [markdown]
# A window of 5 is quicker than its length tells, since several steps become final at once; one of 20 needs a fifth of the calls for three times the work. Longer ones gain little: a value far ahead cannot settle before those behind it. On a machine that runs 20 rows as fast as one, a GPU that one picture does not fill, waiting falls to a fifth. For a large batch nothing is gained.
#
# Picard's sum is what does it. Without it, $x_{j+1}\leftarrow x_j+f(x_j)$, all levels still improve at each call, and agree at the end. But a change travels by one level a call:


# %%
def without_the_sum(D, x, sigmas, tolerance):
    """All levels in one call, each moved by its own step: (x, calls until nothing changes)."""
    path, n = x.expand(len(sigmas), *x.shape).clone(), len(sigmas) - 1
    allowed = tolerance * sigmas[1:] * (1 - (sigmas[1:] / sigmas[:-1]) ** 2).sqrt()
    now, after = (s.repeat_interleave(len(x)) for s in (sigmas[:-1], sigmas[1:]))
    for calls in range(1, n + 1):
        moved = ddim(D, path[:-1].flatten(0, 1), now, after)[0].view_as(path[1:])
        change = (moved - path[1:]).square().flatten(1).mean(1).sqrt()
        path[1:] = moved
        if bool((change <= allowed).all()):
            return path[-1], calls
    return path[-1], n


exact_start = blobs.sample(50, generator(31), HIGH)
sequential = sample(blobs.denoiser, exact_start, hundred)
for tolerance in (1e-1, 1e-3, 1e-6):
    run = sample_parallel(blobs.denoiser, exact_start, hundred, 100, tolerance)
    plain, calls = without_the_sum(blobs.denoiser, exact_start, hundred, tolerance)
    print(
        f"blobs, tolerance {tolerance:.0e}: {run.calls} calls with the sum, {apart(run.x, sequential):.0e} off;"
        f" {calls} without, {apart(plain, sequential):.0e} off"
    )
    assert run.calls < 30
assert calls >= 99

# %% [markdown] slideshow={"slide_type": "slide"}
# ## When noise is not one number
#
# Why is DDIM so good with few steps? For a *single* datum, $\hat\epsilon$ is constant along the flow, and one step is exact from any level to any other. That holds because all directions have the same noise. *Critically damped Langevin diffusion* (CLD; Dockhorn et al. 2022) gives every picture $x$ a velocity $v$, and puts noise on $v$ alone, from where it flows into $x$:
#
# $$d\begin{pmatrix}x\\v\end{pmatrix}=\underbrace{\beta\begin{pmatrix}0&1/M\\-1&-\Gamma/M\end{pmatrix}}_{F}\begin{pmatrix}x\\v\end{pmatrix}dt+G\,dw,\qquad GG^\top=\begin{pmatrix}0&0\\0&2\Gamma\beta\end{pmatrix},\quad\Gamma=2\sqrt M .$$
#
# The noise of a datum is a matrix $\Sigma_t$, and $\epsilon$ depends on which *root* of it is taken: $u=\text{mean}+K_t\,\epsilon$ with $K_tK_t^\top=\Sigma_t$. The obvious root is Cholesky's $L_t$, in which CLD's network speaks. *gDDIM* (Zhang, Tao and Chen 2023) takes the one that the flow itself carries along,
#
# $$\frac{dR}{dt}=F R+\tfrac12\,GG^\top R^{-\top}\qquad\Longrightarrow\qquad u'=\Psi u+\big(R_{t'}-\Psi R_t\big)\,\epsilon,\quad\Psi=e^{(t'-t)F},\quad\epsilon=-R_t^\top\nabla\log p_t(u) ,$$
#
# which is DDIM with matrices in the place of numbers. (For $x=x_0+\sigma\epsilon$, $\Psi=1$ and $R=\sigma$.) Left, the two $\epsilon$ along the exact flow of one datum; right, the three blobs in CLD, whose score is exact too.

# %%
cld = CLD()
lone = Mixture.gaussian(torch.tensor([0.7, -0.4]), torch.zeros(2, 2))
lone_score, blob_score = cld.score(lone), cld.score(blobs)


def euler_cld(score, u, times):
    """Euler's method for the same flow, du/dt = F u - G G^T score / 2."""
    for t, t_next in itertools.pairwise(times.tolist()):
        u = u + (t_next - t) * (cld.F @ u - cld.GG @ score(u, t) / 2)
    return u


u_1 = cld.noised(lone, 1.0).sample(1, generator(5)).reshape(1, 2, 2)
clock = torch.linspace(1, 0, 41, dtype=F64)
along = [gddim(cld, lone_score, u_1, torch.stack([clock[0], t])) for t in clock[1:]]
exact_end = cld.flow(lone_score, u_1, 1.0, 0.0, tolerance=1e-9)
one_step = {
    name: float((gddim(cld, lone_score, u_1, clock[[0, -1]], root) - exact_end).abs().max())
    for name, root in (("R", cld.R), ("L", cld.L))
}
print(f"one datum, one step: {one_step['R']:.0e} off with R, {one_step['L']:.0e} with L")
assert one_step["R"] < 1e-7 and one_step["L"] > 1

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
for name, root, colour in (("R", cld.R, "model"), ("L", cld.L, "warn")):
    eps = torch.cat(
        [
            -root(float(t)).T @ lone_score(u, float(t))
            for t, u in zip(clock, [u_1, *along], strict=True)
        ]
    )  # (41, 2, 2): x and v, two dimensions
    for row, style in ((0, "-"), (1, "--")):
        left.plot(
            clock,
            eps[:, row, 0],
            style,
            color=study.COLOURS[colour],
            label=rf"$\epsilon_{'xv'[row]}$ with ${name}_t$",
        )
left.set(xlabel="$t$", ylabel=r"$\epsilon$, first dimension", title="one datum", ylim=(-0.65, 1.15))
left.invert_xaxis()
left.legend(ncols=2, loc="upper center", fontsize=11)

counts = (10, 20, 50)
samplers = {
    "gDDIM, $R_t$": (lambda u, times: gddim(cld, blob_score, u, times), "model"),
    "the same, $L_t$": (lambda u, times: gddim(cld, blob_score, u, times, cld.L), "warn"),
    "Euler": (lambda u, times: euler_cld(blob_score, u, times), "muted"),
}
for seed in (1, 2, 3):
    u = cld.noised(blobs, 1.0).sample(60, generator(40 + seed)).reshape(-1, 2, 2)
    ends = cld.flow(blob_score, u, 1.0, 0.0, tolerance=1e-5)
    gaps = {}
    for name, (walk, colour) in samplers.items():
        gaps[name] = [
            apart(walk(u, torch.linspace(1, 0, n + 1, dtype=F64) ** 2)[:, 0], ends[:, 0])
            for n in counts
        ]
        right.loglog(
            counts,
            gaps[name],
            "o-",
            color=study.COLOURS[colour],
            label=name if seed == 1 else None,
        )
    best_gap = gaps.pop("gDDIM, $R_t$")
    ratios = [other / r for row in gaps.values() for r, other in zip(best_gap, row, strict=True)]
    print(f"seed {seed}: {min(ratios):.1f} to {max(ratios):.0f} times nearer with R")
    assert min(ratios) > 4 and all(best_gap[0] < row[-1] for row in gaps.values())
right.set(xlabel="steps", ylabel="mean distance of $x$\nto the exact end", title="three blobs")
right.set_xticks(counts, [str(n) for n in counts])
right.minorticks_off()
right.legend()
plt.show()

# %% [markdown]
# With $R_t$ a step over the whole time is exact for one datum; with $L_t$, whose $\epsilon$ turns, it is off by thousands, because $\Psi$ backward in time grows by $5\cdot10^4$, and only the right $\epsilon$ cancels that. For the blobs 10 steps with $R_t$ are nearer than 50 with $L_t$ or of Euler's method. Same process, same score, same integrator: *what is held constant* makes a difference of seven to forty times.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Three flows to the same blobs, walked in few steps of Euler's. **At how many steps does *first* look as *reflowed* does at one? What do its paths do at two steps, and why do all of them point to the middle at one? Is *shuffled* any better than *first*?**

# %%
study.FlowExplorer(blobs, trained[0])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# **A reflowed model has no score.** # Its pairs belong together, so that $x_t-t\,v$ is the mean of $x_0$ over the pairs whose line passes there, mostly *one*, and not over all data that noise could have carried there. `from_flow(v)` makes a $D$ of it, and this $D$ has
#
# - the right ODE, $dx/d\sigma=(x-D)/\sigma$: DDIM, Heun, DPM-Solver, UniPC, inversion, interpolation and the likelihood hold;
# - **no score**: $(D-x)/\sigma^2$ is not $\nabla\log p$. DDPM, churn, Langevin correctors, and guidance or inverse methods that add a gradient to the score lose what they rest on.
#
# The same two models, 100 levels, once with the ODE's step and once with DDPM's:

# %%
grid = flow_grid(100)
walked = {}
for part in ("first", "reflowed"):
    for name, step in {"DDIM": ddim, "DDPM": ddpm(gaussian_noise(36))}.items():
        end = sample(trained[0][part], float(grid[0]) * z, grid, step)
        walked[part, name] = metrics.sliced_wasserstein(end, exact)
        print(f"{part:9s} {name}: {walked[part, name]:.3f} from the blobs")
assert walked["first", "DDPM"] < 3 * floor and walked["reflowed", "DDIM"] < 3 * floor
assert walked["reflowed", "DDPM"] > 3 * max(walked["first", "DDPM"], walked["reflowed", "DDIM"])

# %% [markdown]
# Reflow has its price: the second model learns from the samples of the first, and keeps its faults; the pairs cost a run of the first model each. In return the result is still a flow: it has an inverse and a likelihood, which a student distilled to one step has not.

# %% [markdown]
# **A student off its grid.** A progressive student knows the levels of its own grid and no others. In eight steps, on a finer grid than it was taught, the student of four is *worse* than in its own four, where every solver of lecture 03 gains:

# %%
own, finer = digits_students.grid(4), digits_students.grid(8)
student = few[4].given(**asked)
target = rows["teacher, 64 steps"]
at_home, abroad = (
    float((sample(student, noise_of_ten, grid) - target).square().mean().sqrt())
    for grid in (own, finer)
)
plain = [
    float((sample(ten, noise_of_ten, grid) - target).square().mean().sqrt())
    for grid in (own, finer)
]
print(f"student: {at_home:.3f} from the teacher's digits in 4 steps, {abroad:.3f} in 8")
print(f"teacher: {plain[0]:.3f} in 4 steps, {plain[1]:.3f} in 8")
assert abroad > at_home and plain[1] < plain[0]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# Few-step models of the large kind are made in these ways: SDXL-Turbo and LCM by distillation, InstaFlow by reflow. They load like any other, with one name changed. What needs no training is parallel sampling; here on Stable Diffusion 1.5 where its weights are, else on the course's `mini-sd`: one picture in 25 steps, guidance and all, in turn and side by side.

# %%
from IPython.display import display

from course_lib.guidance import cfg

SETTINGS = {
    "stable-diffusion-1.5": ("a red mug", 7.5),
    "mini-sd": ("a large red cube on grass", 3.0),
}
name = next((name for name in SETTINGS if zoo.available(name)), None)
if name is None:
    print(f"neither of {', '.join(SETTINGS)} is on this machine")
else:
    model, (prompt, w) = zoo.load(name), SETTINGS[name]

    def guided(x, sigma):
        """The model under guidance, for as many rows as there are."""
        words, nothing = (model.embed([text] * len(x)) for text in (prompt, ""))
        return cfg(model.denoiser.given(**words), model.denoiser.given(**nothing), w)(x, sigma)

    sigmas = model.sigmas(25)
    begin = model.start(
        SampleNoise(7)(torch.empty(1, *model.shape, device=model.device)), sigmas[0]
    )
    with torch.no_grad():
        latents = {"25 calls in turn": sample(guided, begin, sigmas)}
        run = sample_parallel(guided, begin, sigmas, 12, 0.1)
        latents[f"{run.calls} calls of up to 12 rows"] = run.x
        a, b = latents.values()
        off = float((a - b).square().mean().sqrt())
        print(
            f"{name}: {run.calls} calls for 25, the latent is {off:.4f} (rms) from that of sequential DDIM"
        )
        assert run.calls < 20 and off < 0.05
        shown = [model.decode(model.finish(x, sigmas[-1]))[0] for x in latents.values()]
    display(study.grid(torch.stack(shown), titles=list(latents), scale=2))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - Flow matching learns the mean velocity of straight lines from noise to data. It is the probability flow of lecture 03 in the time $t=\sigma/(1+\sigma)$, and $D$ and $v$ say the same.
# - Reflow trains again on the flow's own pairs: paths become straight, one step does what many did. It has no score any more.
# - A progressive student learns where two steps of its teacher lead, again and again. A consistency function learns that neighbours on a path have one end, and what holds it to the truth is its boundary.
# - Adaptive steps serve one picture at a time; parallel steps trade work for waiting and change nothing in the result.
# - A step is as long as what it holds constant *is* constant. Choose that well before you choose the rule.
#
# **Exercises.** Items 03.9 and 03.10 of [set 03](../my_course/03_score_sdes_and_samplers.ipynb) are the straight flow and reflow.
#
# ## Sources
#
# - Y. Lipman, R. Chen, H. Ben-Hamu, M. Nickel, M. Le. *Flow Matching for Generative Modeling.* 2023. arXiv:2210.02747
# - X. Liu, C. Gong, Q. Liu. *Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow.* 2023. arXiv:2209.03003
# - X. Liu, X. Zhang, J. Ma, J. Peng, Q. Liu. *InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation.* 2024. arXiv:2309.06380
# - T. Salimans, J. Ho. *Progressive Distillation for Fast Sampling of Diffusion Models.* 2022. arXiv:2202.00512
# - Y. Song, P. Dhariwal, M. Chen, I. Sutskever. *Consistency Models.* 2023. arXiv:2303.01469
# - Y. Song, P. Dhariwal. *Improved Techniques for Training Consistency Models.* 2024. arXiv:2310.14189 (the distance)
# - E. Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models.* 2022. arXiv:2106.09685
# - A. Jolicoeur-Martineau, K. Li, R. Piché-Taillefer, T. Kachman, I. Mitliagkas. *Gotta Go Fast When Generating Data with Score-Based Models.* 2021. arXiv:2105.14080
# - A. Shih, S. Belkhale, S. Ermon, D. Sadigh, N. Anari. *Parallel Sampling of Diffusion Models.* 2023. arXiv:2305.16317
# - Q. Zhang, M. Tao, Y. Chen. *gDDIM: Generalized denoising diffusion implicit models.* 2023. arXiv:2206.05564
# - T. Dockhorn, A. Vahdat, K. Kreis. *Score-Based Generative Modeling with Critically-Damped Langevin Diffusion.* 2022. arXiv:2112.07068
# - A. Sauer, D. Lorenz, A. Blattmann, R. Rombach. *Adversarial Diffusion Distillation.* 2023. arXiv:2311.17042 (SDXL-Turbo). S. Luo et al. *Latent Consistency Models.* 2023. arXiv:2310.04378
