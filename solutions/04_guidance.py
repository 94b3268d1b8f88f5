# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 04: guidance
#
# Ten functions that make a sampler obey: Bayes' rule, the gradient of a classifier, guidance without one, the training that it needs, what
# is *not* wanted, its cost, and where it goes wrong. Guidance changes what is believed, never how to move: every function here makes a
# denoiser out of others, and any sampler of set 03 takes it from there.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("04.1")` gives the next hint, `solution("04.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 04.1 Bayes' rule for scores | 1 | | 04.6 both predictions in one call | 2 |
# | 04.2 the gradient of a classifier | 2 | | 04.7 guidance in an interval | 1 |
# | 04.3 classifier-free guidance | 1 | | 04.8 what guidance is not | 3 |
# | 04.4 a training step with condition dropout | 2 | | 04.9 guidance with its spread brought back | 2 |
# | 04.5 negative prompts | 1 | | 04.10 what it gives and what it takes | 2 |
# | **all** | **17** | | | |
#
# Symbols: $x = x_0 + \sigma\epsilon$ is a clean sample with noise of level $\sigma$; $D(x, \sigma)$ is the denoiser, the mean of $x_0$ given
# $x$; $c$ is a condition, here a class. `x` is `(B, ...)`, points of the plane or pictures; `sigma` is 0-d where nothing else is said.
# The scale $w$ counts so that $w = 0$ is no condition and $w = 1$ the condition as it is.

# %%
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from course_lib import study, zoo
from course_lib.denoisers import from_edm
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.grading.check import check, hint, solution
from course_lib.guidance import bayes_classifier
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.nets.mlp import MLP
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.worlds import digits, toys

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS
blobs, EXTENT = toys.three_blobs(), (-3.0, 3.0, -3.0, 3.0)
parts = [
    Mixture(torch.ones(1), blobs.means[k : k + 1], blobs.covs[k : k + 1]) for k in range(3)
]  # the classes
classifier = bayes_classifier(parts, blobs.weights)  # exact: logits (B, 3) of a noisy x at sigma


def draw(D, n: int, seed: int = 1, steps: int = 40, high: float = 20.0) -> Tensor:
    """n points of the plane, (n, 2), from noise by DPM-Solver++(2M)."""
    start = high * torch.randn(n, 2, generator=generator(seed)).double()
    return sample(D, start, karras(steps, 0.01, high), dpm_solver_pp_2m)


# %% [markdown] item="04.1"
# Let $p_\sigma(x)$ be the density of noisy samples, and $p_\sigma(c\mid x)$ the probability of the class $c$ given a *noisy* $x$. By Bayes'
# rule, $p_\sigma(x\mid c) = p_\sigma(x)\,p_\sigma(c\mid x)/p(c)$. Take the logarithm, and the gradient in $x$ (Song et al. 2021, Eq. 14).
# Given $x$, the unconditional estimate $\hat x_0 = D(x, \sigma)$ and $g = \nabla_x\log p_\sigma(c\mid x)$, return the pair: the conditional
# score $\nabla_x\log p_\sigma(x\mid c)$, and the conditional estimate $\mathbb E[x_0\mid x, c]$.


# %% item="04.1"
def bayes(x: Tensor, sigma: Tensor, x0_hat: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The conditional score and the conditional estimate of x0; x, x0_hat and g (B, ...)."""
    ### BEGIN SOLUTION
    score = (x0_hat - x) / sigma**2 + g
    return score, x + sigma**2 * score
    ### END SOLUTION


# %% item="04.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
bayes = check("04.1", bayes)

# %% [markdown]
# Three blobs, each a class of its own, at $\sigma = 0.7$. Left: the score of all data. Middle: where the exact classifier sees more of the
# class whose density is shown. Right: their sum, which points to that class alone, and is its exact score. (Arrows are to scale within a
# picture, and cut where they are long.)

# %%
LEVEL, WANTED = torch.tensor(0.7, dtype=torch.float64), parts[1]


def slope(x: Tensor) -> Tensor:
    """The gradient of the classifier, which for a mixture is a difference of two scores."""
    return WANTED.score(x, LEVEL) - blobs.score(x, LEVEL)


def with_class(x: Tensor) -> tuple[Tensor, Tensor]:
    return bayes(x, LEVEL, blobs.denoiser(x, LEVEL), slope(x))


points = blobs.sample(200, generator(0), float(LEVEL))
score, estimate = with_class(points)
assert torch.allclose(score, WANTED.score(points, LEVEL))
assert torch.allclose(estimate, WANTED.denoiser(points, LEVEL))
shown = {
    "score": lambda x: blobs.score(x, LEVEL),
    "gradient of log p(c | x)": slope,
    "their sum": lambda x: with_class(x)[0],
}
fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
for ax, (title, vectors) in zip(axes, shown.items(), strict=True):
    density = blobs if title == "score" else WANTED
    study.density(ax, lambda x, density=density: density.log_prob(x, LEVEL), EXTENT)
    study.field(ax, vectors, EXTENT, n=14)
    ax.set_title(title)
for ax in axes[1:]:
    ax.set_ylabel("")
plt.show()

# %% [markdown] item="04.2"
# The gradient comes from autograd. `classifier(x, sigma)` returns logits `(B, classes)` of noisy samples; `label`, `(B,)`, is the class
# wanted of each. Return the pair: $g = \nabla_x\log p_\sigma(c\mid x)$, for each sample that of *its own* class, and the guided estimate
#
# $$D_w(x,\sigma) = D(x, \sigma) + w\,\sigma^2\,g,$$
#
# where $w = 1$ is Bayes' rule and $w > 1$ more than that (Dhariwal and Nichol 2021, Sec. 4.3). A sampler calls this under
# `torch.no_grad()`, hundreds of times: open gradients where you need them, leave the caller's `x` as it is, and let no graph hang on what
# you return. `D` is asked about `x` itself; no gradient goes through it.


# %% item="04.2"
def classifier_guided(
    D, classifier, x: Tensor, sigma: Tensor, label: Tensor, w: float
) -> tuple[Tensor, Tensor]:
    """The gradient of log p(label | x), and the guided estimate of x0; x (B, ...), label (B,)."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        log_p = torch.log_softmax(classifier(leaf, sigma), dim=1)
        total = log_p.gather(1, label[:, None]).sum()  # a sum: row b of the gradient is sample b's
        g = torch.autograd.grad(total, leaf)[0]
    return g, D(x, sigma) + w * sigma**2 * g
    ### END SOLUTION


# %% item="04.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
classifier_guided = check("04.2", classifier_guided)

# %% [markdown]
# The sampler of all blobs, led to one of them by the exact classifier. At $w = 1$ the samples are those of the class. Above, they crowd
# where the class is *surest*, away from the other blobs, which need not be where the class is likeliest.


# %%
def led(label: int, w: float):
    """The denoiser of all blobs, guided to one of them."""

    def D(x: Tensor, sigma: Tensor) -> Tensor:
        labels = torch.full((len(x),), label)
        return classifier_guided(blobs.denoiser, classifier, x, sigma, labels, w)[1]

    return D


ends = {w: draw(led(1, w), 300) for w in (0.0, 1.0, 6.0)}
sure = {w: float(classifier(x, 0.0).softmax(1)[:, 1].mean()) for w, x in ends.items()}
assert sure[0.0] < 0.6 and sure[1.0] > 0.9 and sure[6.0] > sure[1.0]
assert ends[6.0].std(0).norm() < ends[1.0].std(0).norm() < ends[0.0].std(0).norm()
fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
for ax, (w, x) in zip(axes, ends.items(), strict=True):
    study.density(ax, parts[1].log_prob, EXTENT)
    study.scatter(ax, x, colour=COLOURS["guide"], size=6)
    study.plane(ax, EXTENT)
    ax.set_title(f"w = {w:g}")
for ax in axes[1:]:
    ax.set_ylabel("")
plt.show()

# %% [markdown] item="04.3"
# A classifier of noisy pictures has to be trained, and its gradient can be fooled. **Classifier-free guidance** (Ho and Salimans 2022) needs
# none: Bayes' rule turned round gives $\nabla\log p(c\mid x)$ as the difference of a conditional and an unconditional score, and so, in
# estimates of $x_0$, it leads along $D_{\mathrm{cond}} - D_{\mathrm{ref}}$. Return the estimate with the scale $w$, counted as diffusers
# counts it: $w = 0$ gives $D_{\mathrm{ref}}$, $w = 1$ gives $D_{\mathrm{cond}}$, and it is linear in $w$. (The paper's own scale, in its
# Eq. 6, is $w - 1$: whenever you read "guidance 3", ask which.)


# %% item="04.3"
def guided(D_cond, D_ref, x: Tensor, sigma: Tensor, w: float) -> Tensor:
    """The guided estimate of x0, of the shape of x (B, ...); two denoisers D(x, sigma)."""
    ### BEGIN SOLUTION
    ref = D_ref(x, sigma)
    return ref + w * (D_cond(x, sigma) - ref)
    ### END SOLUTION


# %% item="04.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
guided = check("04.3", guided)

# %% [markdown]
# The course's digits, every column from the same noise, asked for 0 to 9. Without a condition any digit comes; $w = 1$ obeys; at 3 strokes
# are bolder; at 10 they are harder than any that were scanned, and some digits fall apart. 04.9 comes back to this.

# %%
D_digits = zoo.load("digits", device="cpu")
TEN, GRID = torch.arange(10), karras(12, 0.02, 15.0)
D_ten, D_none = (
    D_digits.given(label=TEN),
    D_digits.given(label=torch.full_like(TEN, digits.CLASSES)),
)
start = 15.0 * torch.randn(10, *digits.SHAPE, generator=generator(5))


def write(D) -> Tensor:
    """Ten digits from the same noise."""
    return sample(D, start, GRID, dpm_solver_pp_2m)


def at_scale(w: float):
    return lambda x, sigma: guided(D_ten, D_none, x, sigma, w)


rows = {w: write(at_scale(w)) for w in (0.0, 1.0, 3.0, 10.0)}
assert torch.allclose(rows[0.0], write(D_none), atol=1e-3)
assert torch.allclose(rows[1.0], write(D_ten), atol=1e-3)
study.strip(list(rows.values()), [f"w = {w:g}" for w in rows], list(range(10)), scale=4)

# %% [markdown] item="04.4"
# Where does $D_{\mathrm{ref}}$ come from? From the *same* network: in training, some labels are replaced by a null class, so that it learns
# both (Ho and Salimans 2022, Algorithm 1). Write the loss of one such step. Each label becomes `null` with probability `p`, where
# `u < p`, with `u` uniform in $[0, 1)$, one for each sample. The rest is as ever: $x = x_0 + \sigma\epsilon$ with `sigma` `(B,)`, one call
# of `D(x, sigma, label)`, and the mean over all numbers of all samples of
#
# $$\frac{\left(D(x, \sigma, c) - x_0\right)^2}{\sigma^2}.$$


# %% item="04.4"
def dropout_loss(
    D, x0: Tensor, label: Tensor, sigma: Tensor, eps: Tensor, u: Tensor, p: float, null: int
) -> Tensor:
    """The loss, 0-d; x0 and eps (B, ...), label (B,) integers, sigma and u (B,)."""
    ### BEGIN SOLUTION
    kept = torch.where(u < p, null, label)
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    return (((D(x0 + s * eps, sigma, kept) - x0) / s) ** 2).mean()
    ### END SOLUTION


# %% item="04.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
dropout_loss = check("04.4", dropout_loss)

# %% [markdown]
# Two small networks learn the blobs from your loss, with labels dropped and without. The exact answers are known, so we can measure what a
# network says: for a label, and for none. Without dropout the null class was never trained, and what it says means nothing; guidance would
# lead away from that.


# %%
def learn(p: float, steps: int = 500, n: int = 256):
    """A network of the plane after a short training; D(x, sigma, label), null class 3."""
    seeds = generator(6)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = MLP(dim=2, width=64, depth=3, classes=3)

    def D(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return from_edm(net, 1.3, label=label)(x, sigma)

    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - k / steps)
        x0 = blobs.sample(n, seeds)
        label = classifier(x0, 0.0).argmax(1)  # blobs so far apart hardly overlap
        sigma = (1.2 * torch.randn(n, generator=seeds) - 0.4).exp()
        eps, u = torch.randn(n, 2, generator=seeds), torch.rand(n, generator=seeds)
        loss = dropout_loss(D, x0.float(), label, sigma, eps, u, p, 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return D


probes, levels = blobs.sample(300, generator(7)), (0.3, 0.6, 1.2, 2.4)
networks = {p: learn(p) for p in (0.0, 0.2)}


@torch.no_grad()
def error(D, label: int, exact: Mixture, sigma: float) -> float:
    """RMS distance of a network's estimate to the exact one, at noisy points of all data."""
    x = probes + sigma * torch.randn(probes.shape, generator=generator(8)).double()
    said = D(x.float(), torch.tensor(sigma), torch.full((len(x),), label))
    return float((said - exact.denoiser(x, sigma)).square().mean().sqrt())


fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for ax, (title, label, exact) in zip(
    axes, (("label 1", 1, parts[1]), ("no label", 3, blobs)), strict=True
):
    for (p, D), role, look in zip(networks.items(), ("warn", "model"), ("s--", "o-"), strict=True):
        found = [error(D, label, exact, sigma) for sigma in levels]
        ax.semilogx(levels, found, look, color=COLOURS[role], label=f"p = {p:g}")
    ax.set(xlabel=r"$\sigma$", title=title)
    ax.set_xticks(levels, [str(one) for one in levels])
    ax.minorticks_off()
axes[0].set_ylabel("distance to the exact estimate")
axes[1].legend()
plt.show()
untrained, trained = (sum(error(D, 3, blobs, one) for one in levels) for D in networks.values())
assert trained < 0.5 * untrained

# %% [markdown] item="04.5"
# "A street, *no cars*": text encoders are deaf to "no". A **negative prompt** needs no new rule: the reference of 04.3 is what guidance leads
# away from, and nobody said that it must be the null class. `D(x, sigma, label)` takes labels `(B,)`. Return the estimate that leads, with
# the scale $w$, towards `label` and away from `negative`, both `(B,)`. A sample without a negative prompt has `null` there.


# %% item="04.5"
def negative_guided(
    D, x: Tensor, sigma: Tensor, label: Tensor, negative: Tensor, null: int, w: float
) -> Tensor:
    """The guided estimate of x0, of the shape of x (B, ...); label and negative (B,), null an index."""
    ### BEGIN SOLUTION
    ref = D(x, sigma, negative)
    return ref + w * (D(x, sigma, label) - ref)
    ### END SOLUTION


# %% item="04.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
negative_guided = check("04.5", negative_guided)

# %% [markdown]
# A ring of eight blobs. The prompt asks for the three at the top. Not wanted: the one in the upper right corner; what the negative prompt
# calls up is mostly that blob, and a little of all others, for texts are never pure. With the null class as the reference the corner gets
# its share of the samples; with the negative prompt an eighth of it is left. The side effect is real as well: the blob beside it loses too,
# since in strong noise the two are one.

# %%
ring, VIEW = toys.ring(), (-2.3, 2.3, -2.3, 2.3)
top, corner = [1, 2, 3], 1
impure = torch.full((8,), 0.02)
impure[corner] = 0.86
asked, unwanted = (
    Mixture.isotropic(ring.means[top], 0.15),
    Mixture.isotropic(ring.means, 0.15, impure),
)
KNOWN = (asked, unwanted, ring)  # labels 0 and 1, and the null class 2


def D_ring(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """The exact denoiser of each sample's label."""
    answers = torch.stack([one.denoiser(x, sigma) for one in KNOWN])
    return answers[label, torch.arange(len(x))]


def against(negative: int):
    def D(x: Tensor, sigma: Tensor) -> Tensor:
        label = torch.zeros(len(x), dtype=torch.long)
        return negative_guided(D_ring, x, sigma, label, label + negative, 2, 3.0)

    return D


def shares(x: Tensor) -> Tensor:
    """The share of samples at each blob of the ring, (8,)."""
    return ring.responsibilities(x).mean(0)


def show(ends: dict[str, Tensor], crossed: int | None = None) -> None:
    _, axes = plt.subplots(1, len(ends), figsize=(3.7 * len(ends), 3.8), sharey=True)
    for ax, (name, x) in zip(axes, ends.items(), strict=True):
        study.density(ax, ring.log_prob, VIEW)
        study.scatter(ax, x, colour=COLOURS["guide"], size=6)
        study.plane(ax, VIEW)
        ax.set_title(name)
        if crossed is not None:
            ax.plot(
                *ring.means[crossed], "x", color=COLOURS["warn"], markersize=14, markeredgewidth=3
            )
    for ax in axes[1:]:
        ax.set_ylabel("")
    plt.show()


ends = {"no negative prompt": draw(against(2), 600), "negative prompt": draw(against(1), 600)}
before, after = (float(shares(x)[corner]) for x in ends.values())
assert before > 0.15 and after < before / 4
show(ends, crossed=corner)

# %% [markdown] item="04.6"
# Two denoisers, two calls. But both are one network, and one call with a batch of $2B$ costs less than two with $B$ wherever the batch is
# too small to fill the machine: this is what every pipeline does. `D(x, sigma, label)` takes any batch, with `sigma` 0-d or one number for
# each of its rows. Call it **once**, and return the guided estimate of `label` against the null class. Here `sigma` *and* `w` are either
# 0-d or `(B,)`, one for each sample.


# %% item="04.6"
def batched_guided(D, x: Tensor, sigma: Tensor, label: Tensor, null: int, w: Tensor) -> Tensor:
    """The guided estimate of x0, of the shape of x (B, ...); label (B,), sigma and w 0-d or (B,)."""
    ### BEGIN SOLUTION
    labels = torch.cat([label, torch.full_like(label, null)])
    levels = sigma if sigma.ndim == 0 else torch.cat([sigma, sigma])
    cond, ref = D(torch.cat([x, x]), levels, labels).chunk(2)
    return ref + w.reshape(-1, *[1] * (x.ndim - 1)) * (cond - ref)
    ### END SOLUTION


# %% item="04.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
batched_guided = check("04.6", batched_guided)

# %% [markdown]
# With a scale for each sample one batch shows them all: one noise, one digit, eight scales, twelve calls of the network.

# %%
calls = 0


def D_counted(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    global calls
    calls += 1
    return D_digits.given(label=label)(x, sigma)


scales, four = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0]), torch.full((8,), 4)
one = start[3:4].expand(8, -1, -1, -1)
ladder = sample(
    lambda x, sigma: batched_guided(D_counted, x, sigma, four, digits.CLASSES, scales),
    one,
    GRID,
    dpm_solver_pp_2m,
)
assert calls == len(GRID) - 1
alone = sample(D_digits.given(label=four[:1]), one[:1], GRID, dpm_solver_pp_2m)
assert torch.allclose(ladder[2:3], alone, atol=1e-3)  # w = 1 is the conditional model
study.strip([ladder], ["a 4"], [f"w = {w:g}" for w in scales], scale=4)

# %% [markdown] item="04.7"
# Guidance does not do the same good at all levels: in strong noise it decides early and throws variety away, in weak noise it changes next
# to nothing. So confine it (Kynkäänniemi et al. 2024): the scale is $w$ where $\mathrm{low} < \sigma \le \mathrm{high}$, and 1 elsewhere,
# which is the conditional model alone. Outside the interval there is no use for `D_ref`: do not call it there.


# %% item="04.7"
def interval_guided(
    D_cond, D_ref, x: Tensor, sigma: Tensor, w: float, low: float, high: float
) -> Tensor:
    """The estimate of x0, guided where low < sigma <= high; x (B, ...), sigma 0-d."""
    ### BEGIN SOLUTION
    cond = D_cond(x, sigma)
    if not low < sigma <= high:
        return cond
    ref = D_ref(x, sigma)
    return ref + w * (cond - ref)
    ### END SOLUTION


# %% item="04.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
interval_guided = check("04.7", interval_guided)

# %% [markdown]
# The three blobs at the top of the ring again, at $w = 4$. Guidance at every level starves the outer two, which lie next to what was not
# asked for, and moves the samples outwards. In an interval it leaves each its share, at half of the calls of the reference or fewer.

# %%
calls, ends = [0, 0], {}


def counted(k: int, D):
    """D, with its calls counted in calls[k]."""

    def ask(x: Tensor, sigma: Tensor) -> Tensor:
        calls[k] += 1
        return D(x, sigma)

    return ask


RUNS = {
    "w = 1": (1.0, 0.0, 1e9),
    "w = 4 at all levels": (4.0, 0.0, 1e9),
    "w = 4, interval": (4.0, 0.1, 0.7),
}
for name, (w, low, high) in RUNS.items():
    calls[:] = 0, 0

    def D_interval(
        x: Tensor, sigma: Tensor, w: float = w, low: float = low, high: float = high
    ) -> Tensor:
        return interval_guided(
            counted(0, asked.denoiser), counted(1, ring.denoiser), x, sigma, w, low, high
        )

    ends[name] = draw(D_interval, 600)
assert calls[0] == 40 and calls[1] <= 20  # of the last run, the one in the interval
fewest = [float(shares(x)[top].min()) for x in ends.values()]
assert fewest[0] > 0.3 and fewest[1] < 0.2 and fewest[2] > 0.28
show(ends)

# %% [markdown] item="04.8"
# It is often said that guidance samples the *tilted* density $p_w(x_0) \propto p(x_0\mid c)^w\,p(x_0)^{1-w}$. At $\sigma = 0$ its score is the
# guided one. But a sampler needs the scores of $p_w$ *after noise*, and raising to a power and adding noise do not commute (Bradley and
# Nakkiran 2024). See it on a line, with $p(x_0\mid c) = \mathcal N(m_c, s_c^2)$ and $p(x_0) = \mathcal N(m_r, s_r^2)$, where both can be
# written down. At the level $\sigma$ return the pair: the **guided** field,
#
# $$w\,\nabla\log p_\sigma(x\mid c) + (1 - w)\,\nabla\log p_\sigma(x),$$
#
# which adds the scores of the *noised* densities, and the score of the noised **tilted** density, $\nabla\log\,(p_w * \mathcal N(0,\sigma^2))(x)$.


# %% item="04.8"
def two_scores(
    x: Tensor, sigma: Tensor, m_c: Tensor, s_c: Tensor, m_r: Tensor, s_r: Tensor, w: float
) -> tuple[Tensor, Tensor]:
    """The guided field and the score of the noised tilted density at x, (B,); all others 0-d."""
    ### BEGIN SOLUTION
    guided = w * (m_c - x) / (s_c**2 + sigma**2) + (1 - w) * (m_r - x) / (s_r**2 + sigma**2)
    precision = w / s_c**2 + (1 - w) / s_r**2
    m = (w * m_c / s_c**2 + (1 - w) * m_r / s_r**2) / precision
    return guided, (m - x) / (1 / precision + sigma**2)
    ### END SOLUTION


# %% item="04.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
two_scores = check("04.8", two_scores)

# %% [markdown]
# What difference does it make? Both fields as the scores of a flow from $\sigma = 1000$ to 0, at $w = 3$. They are straight lines in $x$, so
# that the ends are Gaussian, and two paths show which. The second field ends in the tilted density. The guided one ends elsewhere: with
# the deviation $s_c^{\,w}\,s_r^{\,1-w}$, a geometric mean, where the tilted density has 1 over the root of a sum of precisions.

# %%
m_c, s_c, m_r, s_r = (torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.6, -0.5, 1.2))
SCALE, TOP = 3.0, 1000.0
pair = TOP * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
found = []
for which in (0, 1):

    def D_line(x: Tensor, sigma: Tensor, which: int = which) -> Tensor:
        score = two_scores(x[:, 0], sigma, m_c, s_c, m_r, s_r, SCALE)[which][:, None]
        return x + sigma**2 * score

    low, high = sample(D_line, pair, karras(300, 1e-3, TOP), dpm_solver_pp_2m)[:, 0]
    found.append((float(low + high) / 2, float(high - low) / 2))
precision = SCALE / s_c**2 + (1 - SCALE) / s_r**2
tilted = (
    float((SCALE * m_c / s_c**2 + (1 - SCALE) * m_r / s_r**2) / precision),
    float(precision) ** -0.5,
)
assert torch.allclose(torch.tensor(found[1]), torch.tensor(tilted), atol=5e-3)
assert abs(found[0][1] - float(s_c**SCALE * s_r ** (1 - SCALE))) < 5e-3
line = torch.linspace(-4, 4, 400, dtype=torch.float64)
fig, ax = plt.subplots(figsize=(7, 3.6))
curves = {
    "all data": ((float(m_r), float(s_r)), "muted", ":"),
    "the class": ((float(m_c), float(s_c)), "data", "-"),
    "tilted, w = 3": (tilted, "exact", "-"),
    "guided, w = 3": (found[0], "guide", "--"),
}
for name, ((m, s), role, look) in curves.items():
    ax.plot(
        line,
        torch.distributions.Normal(m, s).log_prob(line).exp(),
        look,
        color=COLOURS[role],
        label=name,
    )
ax.set(xlabel="$x_0$", ylabel="density")
ax.legend(loc="upper left")
plt.show()

# %% [markdown] item="04.9"
# At a high $w$ pictures come out too hard: the guided estimate has more spread than any picture. **Rescaling** (Lin et al. 2024, Eq. 14 to 16)
# brings it back. A denoiser is $D = c_{\mathrm{skip}}\,x + c_{\mathrm{out}}\,F$, where $F$ is what the network says, and it is $F$ that is
# scaled. With the guided estimate $D_w$ of 04.3 this reads
#
# $$D' = c_{\mathrm{skip}}\,x + k\,(D_w - c_{\mathrm{skip}}\,x),\qquad k = \phi\,\frac{\operatorname{std}(D_{\mathrm{cond}} - c_{\mathrm{skip}}\,x)}{\operatorname{std}(D_w - c_{\mathrm{skip}}\,x)} + 1 - \phi,$$
#
# with one standard deviation, and so one $k$, for each sample, over all of its numbers. ($c_{\mathrm{out}}$ has cancelled.) `cond` and
# `ref` are the two estimates, `(B, ...)`; `c_skip` is a number.


# %% item="04.9"
def rescaled(x: Tensor, cond: Tensor, ref: Tensor, w: float, phi: float, c_skip: float) -> Tensor:
    """The guided estimate of x0 with its spread brought back; x, cond and ref (B, ...)."""
    ### BEGIN SOLUTION
    kept = c_skip * x
    said, wanted = ref + w * (cond - ref) - kept, cond - kept
    ratio = wanted.flatten(1).std(dim=1) / said.flatten(1).std(dim=1)
    k = (phi * ratio + 1 - phi).reshape(-1, *[1] * (x.ndim - 1))
    return kept + k * said
    ### END SOLUTION


# %% item="04.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
rescaled = check("04.9", rescaled)

# %% [markdown]
# The digits of 04.3 at $w = 10$, as they are and rescaled. Their grey values come back towards those of the conditional model; the shapes that
# guidance chose stay.


# %%
def at_phi(phi: float):
    def D(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip = float(D_digits.coefficients(sigma)[0])
        return rescaled(x, D_ten(x, sigma), D_none(x, sigma), 10.0, phi, c_skip)

    return D


back = {phi: write(at_phi(phi)) for phi in (0.7, 1.0)}
columns = [rows[1.0], rows[10.0], *back.values()]
spread = [float(one.flatten(1).std(1).mean()) for one in columns]
assert spread[0] < spread[1] and spread[3] < spread[2] < spread[1]
names = ["w = 1", "w = 10", *(f"w = 10, φ = {phi:g}" for phi in back)]
study.strip(columns, names, list(range(10)), scale=4)

# %% [markdown] item="04.10"
# What does guidance give, and what does it take? Two numbers tell. **Adherence**: the share of samples that a classifier reads as what was
# asked for, `label`. **Diversity**: how much samples of one class differ from one another: for each class that occurs in `label` the mean
# distance of two different samples that were asked for it, and of these the mean over the classes. Distances are Euclidean, between rows
# of `features`. Return the pair.


# %% item="04.10"
def adherence_and_diversity(
    logits: Tensor, label: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Two numbers, 0-d; logits (N, classes), label (N,), features (N, d), two or more of each class."""
    ### BEGIN SOLUTION
    adherence = (logits.argmax(dim=1) == label).double().mean()
    within = [torch.pdist(features[label == c]).mean() for c in label.unique()]
    return adherence, torch.stack(within).mean()
    ### END SOLUTION


# %% item="04.10" tags=["check"]
# NBVAL_CHECK_OUTPUT
adherence_and_diversity = check("04.10", adherence_and_diversity)

# %% [markdown]
# Four classes with your own functions. Each has two blobs, one far out and one in the middle, where all classes meet. At $w = 1$ samples are
# exact, and a seventh of them is read as another class. Up is more obedient, left is more alike: guidance buys the one with the other.
# Guidance by the exact classifier and guidance without one are the *same* field, and share a curve. In an interval the price is lower: what
# guidance in strong noise throws away first are the blobs in the middle.

# %%
angle = torch.arange(4, dtype=torch.float64) * torch.pi / 2
radii = torch.tensor([[0.6], [2.0]], dtype=torch.float64)
kinds = [Mixture.isotropic(radii * torch.stack([a.cos(), a.sin()]), 0.4) for a in angle]
both = Mixture.isotropic(torch.cat([one.means for one in kinds]), 0.4)
reader, wanted = bayes_classifier(kinds), torch.arange(4).repeat_interleave(80)


def D_kinds(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of each sample's class."""
    return torch.cat(
        [one.denoiser(rows, sigma) for one, rows in zip(kinds, x.split(80), strict=True)]
    )


def by_classifier(x: Tensor, sigma: Tensor, w: float) -> Tensor:
    return classifier_guided(both.denoiser, reader, x, sigma, wanted, w)[1]


def free(x: Tensor, sigma: Tensor, w: float) -> Tensor:
    return guided(D_kinds, both.denoiser, x, sigma, w)


def in_interval(x: Tensor, sigma: Tensor, w: float) -> Tensor:
    return interval_guided(D_kinds, both.denoiser, x, sigma, w, 0.1, 0.7)


probe, at = both.sample(len(wanted), generator(9), 1.0), torch.tensor(1.0, dtype=torch.float64)
assert torch.allclose(by_classifier(probe, at, 3.0), free(probe, at, 3.0))
SCALES, found = (1.0, 1.5, 2.0, 3.0, 5.0), {}
fig, ax = plt.subplots(figsize=(6.4, 4))
for name, method, role, look in (
    ("at all levels", free, "guide", "o-"),
    ("in an interval", in_interval, "model", "^-"),
):
    table = []
    for w in SCALES:
        x = draw(lambda x, sigma, method=method, w=w: method(x, sigma, w), len(wanted), steps=25)
        table.append(adherence_and_diversity(reader(x, 0.0), wanted, x))
    adherence, diversity = found[name] = torch.tensor(table).T
    assert adherence[-1] > adherence[0] and (diversity.diff() < 0).all()
    ax.plot(diversity, 100 * adherence, look, color=COLOURS[role], label=name)
    for w, a, d in zip(SCALES, adherence, diversity, strict=True):
        ax.annotate(
            f"w = {w:g}" if w == 1 else f"{w:g}",
            (d, 100 * a),
            xytext=(0, -14),
            textcoords="offset points",
            fontsize=10,
        )
everywhere, confined = found.values()
assert (
    confined[0, 3] > 0.98 and confined[1, 3] > everywhere[1, 2]
)  # more diverse at w = 3 than the other at w = 2
ax.set(xlabel="diversity", ylabel="adherence, %", ylim=(82, 102))
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 05, latent diffusion.
