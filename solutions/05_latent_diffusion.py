# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 05: latent diffusion and architectures
#
# Nine functions that a text-to-image model is built of: the autoencoder's posterior and the scale of its latents, how a picture listens to a
# text, the block of a diffusion transformer, the training step, a schedule for another resolution, a picture at any place, and one network
# for pictures and for what is said of them.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("05.1")` gives the next hint, `solution("05.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 05.1 the posterior and its KL divergence | 1 | | 05.6 a training step with a text | 3 |
# | 05.2 the scale of latents | 1 | | 05.7 a schedule for another resolution | 1 |
# | 05.3 cross-attention with padded words | 2 | | 05.8 a picture at any place | 2 |
# | 05.4 an adaLN-zero block | 2 | | 05.9 one network, two times | 2 |
# | 05.5 pictures as tokens, and back | 1 | | **all** | **15** |
#
# Symbols: $z$ is a latent, `(B, C, h, w)`; $\sigma$ is the noise-to-signal ratio, $\bar\alpha = 1/(1+\sigma^2)$ the signal's share of the
# variance; $d$ is the number of channels of one attention head, except in 05.7, where it counts pixels.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import study
from course_lib.devices import generator
from course_lib.grading.check import check, hint, solution
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.nets.liif import places
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.worlds import digits

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS
images, labels = digits.load("train")
images = images.double()

# The smallest autoencoder that there is: the first six principal components of patches of 4 x 4 pixels.
pieces = F.unfold(images, 4, stride=4)  # (N, 16, 16): the numbers of a patch, and the patches
middle = pieces.mean((0, 2))
basis = torch.linalg.svd(
    (pieces - middle[:, None]).transpose(1, 2).flatten(0, 1), full_matrices=False
)
basis = basis.Vh[:6]


def encode(x: Tensor) -> Tensor:
    """Pictures (B, 1, 16, 16) -> latents (B, 6, 4, 4)."""
    return (basis @ (F.unfold(x, 4, stride=4) - middle[:, None])).unflatten(-1, (4, 4))


def decode(z: Tensor) -> Tensor:
    """Latents (B, 6, 4, 4) -> pictures (B, 1, 16, 16)."""
    return F.fold(basis.T @ z.flatten(2) + middle[:, None], (16, 16), 4, stride=4)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# %% [markdown] item="05.1"
# The encoder of latent diffusion gives no latent but a distribution over latents, $q(z\mid x) = \mathcal N(\mu, \operatorname{diag} s^2)$. It
# says $\mu$ and $\log s^2$, `mean` and `logvar`, both `(B, ...)`. Return the pair: a draw with gradients, and, for each sample, its
# divergence from the prior in nats, `(B,)`, summed over all numbers of the sample (Kingma and Welling 2014, Sec. 2.4 and App. B):
#
# $$z = \mu + s\,\epsilon,\qquad \mathrm{KL}\big(q(z\mid x)\,\|\,\mathcal N(0, I)\big) = \tfrac12\sum\left(\mu^2 + s^2 - 1 - \log s^2\right).$$


# %% item="05.1"
def posterior(mean: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """A draw z, of the shape of mean (B, ...), and the KL divergence, (B,); eps is standard normal."""
    ### BEGIN SOLUTION
    z = mean + (logvar / 2).exp() * eps
    terms = mean**2 + logvar.exp() - 1 - logvar
    return z, terms.flatten(1).sum(1) / 2
    ### END SOLUTION


# %% item="05.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
posterior = check("05.1", posterior)

# %% [markdown]
# Is the closed form right? The divergence is the mean of $\log q(z\mid x) - \log p(z)$ over draws $z$. Left: that difference at 20,000 draws
# of one posterior; their mean agrees with your number within its error. Right: what one number of a latent costs. The cost is 0 only where
# the posterior is the prior.

# %%
mean, logvar = torch.tensor([0.8, -0.4, 0.1]), torch.tensor([-2.0, -1.0, 0.3])
mean, logvar = (one.double().expand(20_000, -1) for one in (mean, logvar))
z, kl = posterior(mean, logvar, noise(mean.shape, 1))
normal = torch.distributions.Normal
log_ratio = normal(mean, (logvar / 2).exp()).log_prob(z) - normal(0, 1).log_prob(z)
log_ratio = log_ratio.sum(1)
assert abs(log_ratio.mean() - kl[0]) < 4 * log_ratio.std() / len(z) ** 0.5
line = torch.linspace(-5, 2, 141, dtype=torch.float64)[:, None]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
axes[0].hist(log_ratio, bins=80, density=True, color=COLOURS["other"])
axes[0].axvline(float(kl[0]), color=COLOURS["exact"], label="KL, closed form")
axes[0].set(xlabel="log q(z) − log p(z), nats", ylabel="density")
axes[0].legend()
for m, role in ((0.0, "data"), (1.0, "model"), (2.0, "warn")):
    cost = posterior(torch.full_like(line, m), line, torch.zeros_like(line))[1]
    axes[1].plot(line[:, 0], cost, color=COLOURS[role], label=f"mean {m:g}")
axes[1].set(xlabel="log variance", ylabel="KL of one number, nats")
axes[1].legend()
plt.show()

# %% [markdown] item="05.2"
# A noise level means something only for data of variance 1. Latents are not: their channels differ in mean and spread. Stable Diffusion
# multiplies all of them by one number, 1/std of the first batch that it encodes (Rombach et al. 2022, App. G); later models, and the course's
# own, have two numbers for each channel. From `latents` `(N, C, h, w)` find `shift` and `scale`, `(C,)` each, such that
# $(z - \text{shift})\cdot\text{scale}$ has mean 0 and variance 1 in every channel. Return four things: `shift`, `scale`, other latents `z` on
# their way *into* the model, and what the model has made, `y`, on its way *back* to the decoder; both `(B, C, h, w)`.


# %% item="05.2"
def standardised(latents: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """shift (C,), scale (C,), z as the model wants it, y as the decoder wants it."""
    ### BEGIN SOLUTION
    shift, scale = latents.mean((0, 2, 3)), 1 / latents.std((0, 2, 3))
    m, s = shift[:, None, None], scale[:, None, None]
    return shift, scale, (z - m) * s, y / s + m
    ### END SOLUTION


# %% item="05.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
standardised = check("05.2", standardised)

# %% [markdown]
# Digits, and an autoencoder of six principal components. The spread of its channels falls by a factor of fifteen. One noise, $\sigma = 0.7$, is
# added to two versions of the same latents, which then go back to pictures. As they are, it hides the weak channels, strokes' details, and
# leaves the strong ones as good as clean. Standardised, all channels drown at the same time.

# %%
latents, few = encode(images), encode(images[:10])
eps = noise(few.shape, 2)
shift, scale, into, _ = standardised(latents, few, few)
back = standardised(latents, few, into)[3]
assert torch.allclose(back, few)
assert float(scale.max() / scale.min()) > 10
one = 1 / latents.std()
rows = {
    "pictures": images[:10],
    "decoded": decode(few),
    "one factor": decode(few + 0.7 * eps / one),
    "by channel": decode(standardised(latents, few, into + 0.7 * eps)[3]),
}
study.strip(list(rows.values()), list(rows), scale=4)

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.2))
channel = torch.arange(6)
spread = {"one factor": latents.std((0, 2, 3)) * one, "by channel": latents.std((0, 2, 3)) * scale}
for (name, std), role, at in zip(spread.items(), ("warn", "model"), (-0.2, 0.2), strict=True):
    ax.bar(channel + at, (std / 0.7) ** 2, 0.38, color=COLOURS[role], label=name)
ax.set(xlabel="channel", ylabel="SNR at σ = 0.7", yscale="log")
ax.legend()
plt.show()

# %% [markdown] item="05.3"
# How does a picture listen to a text? Each place of it asks every word (Rombach et al. 2022, Sec. 3.3; Vaswani et al. 2017, Eq. 1):
#
# $$\operatorname{softmax}\!\left(\frac{q\,k^\top}{\sqrt d}\right)v.$$
#
# Queries `q` `(B, N, C)` are made of the N places, keys `k` and values `v` `(B, L, C)` of the L words. The C channels are split into `heads`
# of $d = C/\text{heads}$ channels *side by side*, head 0 first; each head attends by itself, and their answers are put side by side again.
# Texts differ in length: `mask` `(B, L)` is True for words and False for padding, which must have no effect at all.


# %% item="05.3"
def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
    """The answers, (B, N, C)."""
    ### BEGIN SOLUTION
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, N, L)
    scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    ### END SOLUTION


# %% item="05.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
cross_attention = check("05.3", cross_attention)

# %% [markdown]
# What if the mask is forgotten? Six words, and more and more padding behind them. The values are 1 for padding and 0 for words, so that
# the answer *is* the share that padding takes. Without a mask, most of what a picture hears of a short prompt is nothing at all. (CLIP's
# texts in Stable Diffusion come without a mask: there the padding is a token that the encoder has been trained with, and it carries
# meaning of its own.)

# %%
WORDS, PADDING = 6, [0, 2, 6, 12, 26, 71]
found = {"with the mask": [], "without": []}
for n in PADDING:
    q, k = noise((1, 50, 8), 3), noise((1, WORDS + 71, 8), 4)[:, : WORDS + n]
    real = torch.arange(WORDS + n)[None] < WORDS
    v = (~real).double()[..., None].expand(-1, -1, 8)
    for name, mask in zip(found, (real, torch.ones_like(real)), strict=True):
        found[name].append(100 * float(cross_attention(q, k, v, mask, 2).mean()))
assert max(found["with the mask"]) == 0 and found["without"][-1] > 80
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (name, share), role, look in zip(found.items(), ("model", "warn"), ("o-", "s--"), strict=True):
    ax.plot(PADDING, share, look, color=COLOURS[role], label=name)
ax.set(xlabel="padded words behind six real ones", ylabel="share of padding, %")
ax.legend()
plt.show()

# %% [markdown] item="05.4"
# A diffusion transformer is told time and class by its normalisations (Peebles and Xie 2023, Sec. 3.2). A linear layer turns `emb` `(B, D)`
# into six vectors of C numbers, in this order: shift, scale and gate of attention, and shift, scale and gate of the MLP,
#
# $$(\beta_1, \gamma_1, \alpha_1, \beta_2, \gamma_2, \alpha_2) = W\operatorname{silu}(\text{emb}) + b,$$
#
# with `weight` `(6C, D)` and `bias` `(6C,)`. With $\operatorname{norm}$, the layer norm over the C channels of a token without weights, the
# block is
#
# $$x \leftarrow x + \alpha_1\,\mathrm{attention}\big(\operatorname{norm}(x)(1 + \gamma_1) + \beta_1\big),\qquad
# x \leftarrow x + \alpha_2\,\mathrm{mlp}\big(\operatorname{norm}(x)(1 + \gamma_2) + \beta_2\big).$$
#
# "Zero": $W$ and $b$ start at 0, and so each block starts as the identity. `attention` and `mlp` take and give `(B, N, C)`.


# %% item="05.4"
def adaln_block(x: Tensor, emb: Tensor, weight: Tensor, bias: Tensor, attention, mlp) -> Tensor:
    """The tokens after the block, (B, N, C); one vector of each kind for all tokens of a sample."""
    ### BEGIN SOLUTION
    six = torch.nn.functional.silu(emb) @ weight.T + bias
    shift1, scale1, gate1, shift2, scale2, gate2 = six[:, None].chunk(6, dim=-1)  # (B, 1, C)

    def norm(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)

    x = x + gate1 * attention(norm(x) * (1 + scale1) + shift1)
    return x + gate2 * mlp(norm(x) * (1 + scale2) + shift2)
    ### END SOLUTION


# %% item="05.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
adaln_block = check("05.4", adaln_block)

# %% [markdown]
# Twenty-four blocks with random branches, one after the other, and the size of the tokens on the way. With gates at 0 a deep network starts
# as the identity, and gradients pass it unchanged; with gates at 1, as in a plain transformer, the tokens grow from block to block.

# %%
WIDTH, DEPTH = 16, 24
tokens, emb = noise((4, 9, WIDTH), 5), noise((4, 8), 6)
still = torch.zeros(6 * WIDTH, 8, dtype=torch.float64)
sizes = {}
for gate in (0.0, 0.1, 1.0):
    bias, x = torch.zeros(6, WIDTH, dtype=torch.float64), tokens
    bias[[2, 5]] = gate
    sizes[gate] = [1.0]
    for k in range(DEPTH):
        U, V = (noise((WIDTH, WIDTH), seed) / 2 for seed in (100 + k, 200 + k))
        x = adaln_block(
            x, emb, still, bias.flatten(), lambda h, U=U: h.mean(1, keepdim=True) @ U + h @ U,
            lambda h, V=V: torch.tanh(h @ V),
        )  # fmt: skip
        sizes[gate].append(float(x.norm() / tokens.norm()))
assert sizes[0.0] == [1.0] * (DEPTH + 1) and sizes[1.0][-1] > 3
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for (gate, size), role in zip(sizes.items(), ("model", "other", "warn"), strict=True):
    ax.plot(size, color=COLOURS[role], label=f"gates {gate:g}")
ax.set(xlabel="blocks passed", ylabel="size of the tokens")
ax.legend()
plt.show()

# %% [markdown] item="05.5"
# A transformer sees tokens. A picture `x` `(B, C, H, W)` is cut into patches of `size` × `size` pixels: tokens
# `(B, H W / size², C size²)`, row by row from the upper left, each with its numbers in the order (channel, row, column). Return the pair:
# `x` as tokens, and other `tokens`, of the same shape, as a picture of the shape of `x`. Each way is to undo the other.


# %% item="05.5"
def patches(x: Tensor, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x as tokens (B, H W / size^2, C size^2), and tokens as a picture (B, C, H, W)."""
    ### BEGIN SOLUTION
    B, C, H, W = x.shape
    rows, columns = H // size, W // size
    cut = x.reshape(B, C, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    picture = tokens.reshape(B, rows, columns, C, size, size).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(B, rows * columns, -1), picture.reshape(B, C, H, W)
    ### END SOLUTION


# %% item="05.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
patches = check("05.5", patches)

# %% [markdown]
# Digits cut into 16 tokens; the tokens in another order; and back in the right one. Attention does not know the order of tokens: to it the
# second row holds the same pictures as the first, unless each token is told its place. That is what position embeddings are for.

# %%
few = images[:10]
cut, _ = patches(few, torch.zeros(10, 16, 16, dtype=torch.float64), 4)
order = torch.randperm(16, generator=generator(7))
shuffled = patches(few, cut[:, order], 4)[1]
again = patches(few, patches(shuffled, cut, 4)[0][:, order.argsort()], 4)[1]
assert torch.equal(again, few) and not torch.equal(shuffled, few)
study.strip([few, shuffled, again], ["pictures", "shuffled", "put back"], scale=4)

# %% [markdown] item="05.6"
# Now all of it in one training step. The autoencoder has said `mean` and `std` `(B, C, h, w)`; the step draws
# $z_0 = \text{scale}\cdot(\mu + s\,\epsilon_z)$. Noise comes in at each row's own $\bar\alpha$, `alpha_bar` `(B,)`, and the network predicts
# $v$ (Salimans and Ho 2022, App. D):
#
# $$z_t = \sqrt{\bar\alpha}\,z_0 + \sqrt{1 - \bar\alpha}\,\epsilon,\qquad v = \sqrt{\bar\alpha}\,\epsilon - \sqrt{1 - \bar\alpha}\,z_0.$$
#
# It is called once as `net(z_t, alpha_bar, text, mask)`, with the token embeddings `(B, L, T)` of the texts and the mask `(B, L)` of those
# that are there; `words` is that pair. For guidance, the text of each row with `u < p`, `u` `(B,)`, is replaced by the *empty* text. The empty
# text has tokens too, its start and its end: `empty` is the pair of its embeddings `(L, T)` and its mask `(L,)`. Return the mean of
# $(\text{net} - v)^2$ over all numbers of all rows.


# %% item="05.6"
def text_loss(
    net, mean: Tensor, std: Tensor, scale: float, words: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor], alpha_bar: Tensor, u: Tensor, p: float, eps_z: Tensor, eps: Tensor,
) -> Tensor:  # fmt: skip
    """The loss, 0-d; mean, std, eps_z and eps (B, C, h, w)."""
    ### BEGIN SOLUTION
    z0 = scale * (mean + std * eps_z)
    signal, noise = (one.sqrt().reshape(-1, 1, 1, 1) for one in (alpha_bar, 1 - alpha_bar))
    dropped = u < p
    text = torch.where(dropped[:, None, None], empty[0], words[0])
    mask = torch.where(dropped[:, None], empty[1], words[1])
    v = signal * eps - noise * z0
    return ((net(signal * z0 + noise * eps, alpha_bar, text, mask) - v) ** 2).mean()
    ### END SOLUTION


# %% item="05.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
text_loss = check("05.6", text_loss)

# %% [markdown]
# A small network learns the latents of digits with your loss, told texts of three or four tokens, "start *digit* end" and now and then
# "start *bold digit* end", a tenth of them dropped. Afterwards, on digits that it has not seen, the right text helps, no text is in between,
# and a wrong text misleads, most of all in strong noise, where the latents say least.

# %%
TOKENS, L, FEATURES = 13, 4, 16  # start, end, "bold" and ten digits
table = noise((TOKENS, FEATURES), 8).float()
START, END, BOLD = 10, 11, 12


def write(kinds: Tensor, bold: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, L, T) and mask (B, L) of the texts of these digits; padding is the mark of the end."""
    ids = torch.full((len(kinds), L), END)
    ids[:, 0], ids[:, 1] = START, torch.where(bold, BOLD, kinds)
    ids[bold, 2] = kinds[bold]
    return table[ids], torch.arange(L) < torch.where(bold, 4, 3)[:, None]


EMPTY = table[torch.tensor([START, END, END, END])], torch.arange(L) < 2
shift, scale, _, _ = standardised(latents, latents[:1], latents[:1])
mu = ((latents - shift[:, None, None]) * scale[:, None, None]).float()
boldness = images.mean((1, 2, 3))
is_bold = boldness > boldness.quantile(0.7)
train, test = slice(0, 1200), slice(1200, None)
with torch.random.fork_rng([]):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(96 + FEATURES + 2, 256), torch.nn.SiLU(), torch.nn.Linear(256, 256),
        torch.nn.SiLU(), torch.nn.Linear(256, 96),
    )  # fmt: skip


def net(z: Tensor, alpha_bar: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """v of a latent (B, 6, 4, 4), from the mean of the text's tokens."""
    heard = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    time = torch.stack([alpha_bar, (1 - alpha_bar).sqrt()], 1)
    return layers(torch.cat([z.flatten(1), 2 * heard, time], 1)).unflatten(1, (6, 4, 4))


def step_loss(rows: Tensor, words: tuple[Tensor, Tensor], seed: int, p: float, alpha_bar=None):
    """Your loss on these rows of the data, with a posterior of deviation 0.1."""
    seeds, shape = generator(9, seed), mu[rows].shape
    eps_z, eps = torch.randn(2, *shape, generator=seeds)
    u, share = torch.rand(2, len(rows), generator=seeds)
    share = share if alpha_bar is None else torch.full_like(share, alpha_bar)
    std = torch.full(shape, 0.1)
    return text_loss(net, mu[rows], std, 1.0, words, EMPTY, share, u, p, eps_z, eps)


optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
for k in range(400):
    rows = torch.randint(1200, (128,), generator=generator(10, k))
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - k / 400)
    optimizer.zero_grad()
    step_loss(rows, write(labels[rows], is_bold[rows]), k, 0.1).backward()
    optimizer.step()

held = torch.arange(1200, len(mu))
LEVELS, errors = (0.03, 0.1, 0.3, 0.6), {}
texts = {
    "the right text": (write(labels[held], is_bold[held]), 0.0),
    "no text": (write(labels[held], is_bold[held]), 1.0),  # all dropped
    "a wrong text": (write((labels[held] + 3) % 10, ~is_bold[held]), 0.0),
}
with torch.no_grad():
    for name, (words, p) in texts.items():
        errors[name] = [
            sum(float(step_loss(held, words, 1000 + seed, p, a)) for seed in range(4)) / 4
            for a in LEVELS
        ]
own, none, other = errors.values()
assert own[0] < none[0] < other[0] and own[1] < none[1] < other[1]
fig, ax = plt.subplots(figsize=(6.8, 3.4))
for (name, error), role, look in zip(
    errors.items(), ("model", "muted", "warn"), ("o-", "^:", "s--"), strict=True
):
    ax.plot(LEVELS, error, look, color=COLOURS[role], label=name)
ax.set(xlabel=r"$\bar\alpha$, the signal's share (left: strong noise)", ylabel="loss on new digits")
ax.legend()
plt.show()

# %% [markdown] item="05.7"
# A picture with more pixels hides noise better: average $k\times k$ of them, and the picture stays while its noise falls to $1/k$. A schedule
# made for $d_0$ pixels a side is therefore too gentle for $d > d_0$. Shift it (Hoogeboom et al. 2023, Sec. 3.1), with SNR $= 1/\sigma^2$:
#
# $$\log \mathrm{SNR}' = \log \mathrm{SNR} + 2\log\frac{d_0}{d}.$$
#
# Return the pair: the shifted levels $\sigma'$ of `sigma`, and the shifted times of a rectified flow, which has $x_t = (1-t)\,x_0 + t\,\epsilon$
# and so $\sigma = t/(1-t)$. The same shift then reads $t' = s\,t/(1 + (s-1)\,t)$, and it is yours to find $s$ (Esser et al. 2024, Eq. 23, count
# *all* pixels; here $d_0$ and $d$ are sides). Times include 0 and 1.


# %% item="05.7"
def shifted(sigma: Tensor, t: Tensor, d0: int, d: int) -> tuple[Tensor, Tensor]:
    """The levels sigma' and the times t', of the shapes of sigma and t; sides in pixels."""
    ### BEGIN SOLUTION
    s = d / d0
    return s * sigma, s * t / (1 + (s - 1) * t)
    ### END SOLUTION


# %% item="05.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
shifted = check("05.7", shifted)

# %% [markdown]
# The same digits with 16 and with 64 pixels a side. At the same $\sigma = 1$ the small ones are all but gone and the large ones can be read. At
# your $\sigma'$ the large ones, averaged down to 16 pixels, are exactly as noisy as the small ones.

# %%
few, level = images[10:18], torch.tensor([1.0], dtype=torch.float64)
large = few.repeat_interleave(4, 2).repeat_interleave(4, 3)
strong = float(shifted(level, torch.zeros(1), 16, 64)[0])
eps = noise(large.shape, 11)
small_eps = noise((400, 1, 16, 16), 12)
pooled = F.avg_pool2d(strong * noise((400, 1, 64, 64), 13), 4)
assert abs(float(pooled.std() / (level * small_eps).std()) - 1) < 0.02
rows = {
    "16 px, σ = 1": few + small_eps[:8],
    "64 px, σ = 1": large + eps,
    f"64 px, σ′ = {strong:g}": large + strong * eps,
    "… averaged": F.avg_pool2d(large + strong * eps, 4),
}
shown = [
    one if one.shape[-1] == 64 else F.interpolate(one, scale_factor=4.0) for one in rows.values()
]
study.strip([one / 2 for one in shown], list(rows), scale=1)

# %%
times = torch.linspace(0, 1, 201, dtype=torch.float64)
fig, ax = plt.subplots(figsize=(4.6, 3.8))
for d, role in ((8, "other"), (16, "exact"), (32, "model"), (64, "warn")):
    ax.plot(times, shifted(level, times, 16, d)[1], color=COLOURS[role], label=f"d = {d}")
ax.set(xlabel="t, for 16 pixels a side", ylabel="t′, for d pixels a side")
ax.legend()
plt.show()

# %% [markdown] item="05.8"
# A decoder with a fixed grid gives pictures of one size. A local implicit image function (Chen et al. 2021) is asked about any *place*. Around
# a place $p$ lie four features $z_{00}, z_{01}, z_{10}, z_{11}$; each says $f(z, p - p_z)$, with its own offset, and the four answers are
# mixed (Eq. 4, the local ensemble):
#
# $$s(p) = \sum_{i,j} \frac{S_{ij}}{S}\,f(z_{ij},\,p - p_{ij}),$$
#
# where $S_{ij}$ is the area of the rectangle between $p$ and the feature *opposite* to $z_{ij}$, and $S$ the sum of the four. Places `at` `(N, 2)`
# are $(y, x)$, from −1 to 1 across the picture; `features` is `(B, C, h, w)`, and the centre of row $k$ lies at $-1 + (2k+1)/h$. Offsets are told
# in units of a feature: 1 from a centre to the next. `f(z, away)` takes `(B, N, C)` and `(N, 2)` and gives `(B, N, out)`. All places lie between
# the outer centres, so that there are always four.


# %% item="05.8"
def local_ensemble(f, features: Tensor, at: Tensor) -> Tensor:
    """The answers at N places, (B, N, out)."""
    ### BEGIN SOLUTION
    index = (at + 1) / 2 * torch.tensor(features.shape[-2:]) - 0.5  # whole numbers are centres
    total = 0
    for dy in (0, 1):
        for dx in (0, 1):
            corner = index.floor() + torch.tensor([dy, dx])
            away, (row, column) = index - corner, corner.long().unbind(-1)
            area = (1 - away.abs()).prod(-1)  # of the four, which add up to 1
            total = total + area[:, None] * f(features[:, :, row, column].transpose(1, 2), away)
    return total
    ### END SOLUTION


# %% item="05.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
local_ensemble = check("05.8", local_ensemble)

# %% [markdown]
# Ten by ten features of a smooth picture. Told nothing but its value, $f(z, \cdot) = z$, the ensemble is bilinear interpolation. If each feature
# also holds its two slopes, and $f$ goes along them *half* of the way, the same hundred features give a far better picture: mixing is what
# goes the other half. (The whole way overshoots as far as none falls short. Try it.) In a trained model $f$ is an MLP, which finds this by
# itself, and features hold whatever helps it.

# %%
SIDE, FINE = 10, 120


def wave(at: Tensor) -> Tensor:
    """A smooth picture at places (..., 2)."""
    y, x = at.unbind(-1)
    return torch.sin(5 * x + 2 * y) * torch.cos(4 * y - x)


centres = places((SIDE, SIDE)).double()
slopes = torch.func.vmap(torch.func.grad(wave))(centres) * 2 / SIDE  # a unit is one feature
features = torch.cat([wave(centres)[:, None], slopes], 1).T.reshape(1, 3, SIDE, SIDE)
spots = places((FINE, FINE)).double() * (1 - 1 / SIDE)
answers = {
    "value alone": lambda z, away: z[..., :1],
    "value and slopes": lambda z, away: z[..., :1] + (z[..., 1:] * away).sum(-1, keepdim=True) / 2,
}
exact = wave(spots).reshape(1, 1, FINE, FINE)
drawn = {
    name: local_ensemble(f, features, spots).reshape(1, 1, FINE, FINE)
    for name, f in answers.items()
}
error = {name: float((one - exact).square().mean().sqrt()) for name, one in drawn.items()}
assert error["value and slopes"] < error["value alone"] / 3
grid = F.interpolate(features[:, :1], scale_factor=FINE / SIDE)
study.grid(
    torch.cat([grid, *drawn.values(), exact]),
    titles=["100 features", *(f"{name}\nRMS error {error[name]:.3f}" for name in drawn), "exact"],
    scale=1,
)

# %% [markdown] item="05.9"
# One network for pictures *and* for what is said of them. UniDiffuser (Bao et al. 2023) noises both, each with a time of its own, and learns
# `net(x, a, time_x, time_a) -> (v_x, v_a)`. Then every question is a choice of times. What is *given* is clean: time 0. What is *unknown* is
# nothing but noise: time `last`. At the level `sigma` of `x` `(B, C, H, W)`, return the pair of estimates of $x_0$: given the attributes `a`
# `(B, d)`, and of pictures alone, with `noise` `(B, d)`, standard normal, where `a` was. `t_of_sigma(sigma)` is the network's time for a
# level; as ever it sees $x/\sqrt{1+\sigma^2}$ and predicts $v$, so that
#
# $$\hat x_0 = \frac{x}{1+\sigma^2} - \frac{\sigma}{\sqrt{1+\sigma^2}}\,v_x.$$


# %% item="05.9"
def given_and_alone(
    net, x: Tensor, sigma: Tensor, a: Tensor, noise: Tensor, t_of_sigma, last: float
) -> tuple[Tensor, Tensor]:
    """The estimates of x0 given a, and without knowing a, of the shape of x; sigma 0-d."""
    ### BEGIN SOLUTION
    c, time = (1 + sigma**2).sqrt(), t_of_sigma(sigma)
    estimates = []
    for other, time_a in ((a, 0.0), (noise, last)):
        v_x, _ = net(x / c, other, time, torch.tensor(time_a))
        estimates.append(x / c**2 - sigma / c * v_x)
    return estimates[0], estimates[1]
    ### END SOLUTION


# %% item="05.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
given_and_alone = check("05.9", given_and_alone)

# %% [markdown]
# A joint density of two numbers, a "picture" $x$ of one pixel and an attribute $a$, whose exact network can be written down. Samples of $x$ given
# $a = 1$, and of $x$ alone, come from the same network; only the times differ. Curves are the exact densities.

# %%
centres = torch.tensor([[-1.2, -1.0], [0.2, 1.0], [1.3, 1.0], [0.6, -1.0]], dtype=torch.float64)
weights = torch.tensor([0.4, 0.15, 0.3, 0.15], dtype=torch.float64)
STD, LAST = 0.2, 1000.0


def time_of(sigma: Tensor) -> Tensor:
    """An angle from signal to noise, as a time from 0 to 1,000."""
    return LAST * torch.atan(sigma) * 2 / math.pi


def joint(x: Tensor, a: Tensor, time_x: Tensor, time_a: Tensor) -> tuple[Tensor, Tensor]:
    """The exact v of both, for four blobs in the plane of x and a."""
    y = torch.stack([x.flatten(), a.flatten()], 1)  # (B, 2)
    angle = torch.stack([torch.as_tensor(time_x), torch.as_tensor(time_a)]).double() / LAST
    signal, std = (angle * math.pi / 2).cos(), (angle * math.pi / 2).sin()
    var = signal**2 * STD**2 + std**2
    away = y[:, None] - signal * centres  # (B, 4, 2)
    share = (weights.log() - (away**2 / var).sum(-1) / 2).softmax(1)
    clean = (share[..., None] * (centres + signal * STD**2 / var * away)).sum(1)
    eps = torch.where(std > 0, (y - signal * clean) / std.clamp_min(1e-12), 0)
    v = signal * eps - std * clean
    return v[:, 0].reshape(x.shape), v[:, 1:]


N = 1500
start, ones, extra = 80 * noise((N, 1, 1, 1), 14), torch.ones(N, 1).double(), noise((N, 1), 15)
samples = [
    sample(
        lambda x, sigma, k=k: given_and_alone(joint, x, sigma, ones, extra, time_of, LAST)[k],
        start, karras(40, 0.01, 80.0), dpm_solver_pp_2m,
    ).flatten()
    for k in (0, 1)
]  # fmt: skip
at_one = weights * torch.exp(-((1 - centres[:, 1]) ** 2) / (2 * STD**2))
line = torch.linspace(-2.4, 2.4, 300, dtype=torch.float64)[:, None]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True)
for ax, x, w, name in zip(
    axes, samples, (at_one, weights), ("x given a = 1", "x alone"), strict=True
):
    w = w / w.sum()
    peaks = torch.distributions.Normal(centres[:, 0], STD).log_prob(line).exp()
    mean = float((w * centres[:, 0]).sum())
    assert abs(float(x.mean()) - mean) < 4 * float(x.std()) / N**0.5
    assert abs(float((x < -0.5).double().mean() - w[0])) < 0.06
    ax.hist(x, bins=60, density=True, color=COLOURS["other"], label="samples")
    ax.plot(line[:, 0], (w * peaks).sum(1), color=COLOURS["exact"], label="exact")
    ax.set(xlabel="x", title=name)
axes[0].set_ylabel("density")
axes[0].legend()
plt.show()

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 06, inverse problems by replacement.
