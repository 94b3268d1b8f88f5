# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 13: ControlNet
#
# Ten functions about one question: how is a trained network told something *new*, a drawing, without a change to any of its weights? A copy of its encoder reads the drawing, and adds what it
# finds to what the locked network's decoder is given. In this set you build each part of that, use it on a small text-to-image model, and train one yourself.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("13.1")` gives the next hint, `solution("13.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 13.1 the zero convolution | 2 | | 13.6 guess mode | 2 |
# | 13.2 a locked block and its copy | 2 | | 13.7 control under guidance | 2 |
# | 13.3 the right places | 2 | | 13.8 are the lines where they were asked for? | 2 |
# | 13.4 scales and steps | 1 | | 13.9 a training step | 2 |
# | 13.5 several controls | 2 | | 13.10 a start that knows the segmentation | 2 |
# | | | | **all** | **19** |
#
# Symbols: $c$ is a *condition map*, a picture of values in $[0, 1]$; $F(\cdot\,;\Theta)$ a network or a part of one, with its locked weights; $Z$ a *zero convolution*, of 1 × 1 and with weights that start at 0;
# $r_i$ what a control adds to feature $i$, the *residuals*. Features are counted as the encoder makes them, finest first; the last is that of the middle. $w$ is the scale of guidance.

# %%
import copy
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import study, zoo
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.grading.check import check, hint, solution
from course_lib.nets.control import control_of, controlled
from course_lib.nets.unet import Level
from course_lib.noise_priors import coarse
from course_lib.sample import sample
from course_lib.study.control_pictures import few
from course_lib.worlds import digits
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.maps import (
    as_map,
    canny,
    classes,
    edge_map,
    nearness,
    segmentation_map,
)
from course_lib.worlds.scenes.render import render

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# %% [markdown] item="13.1"
# A zero convolution joins what is new to what is old, and starts at $W = 0$, $b = 0$. "Its gradient is then 0 too, and it never learns": is that so? A 1 × 1 convolution is one matrix, the
# same at each pixel,
#
# $$y_o = \sum_i W_{oi}\,x_i + b_o .$$
#
# Derive by hand how a loss $L$ depends on all three. `x` is `(B, I, H, W)`, `W` `(O, I)`, `b` `(O,)`, and `g` $= \partial L / \partial y$ is `(B, O, H, W)`. Return $y$, $\partial L/\partial W$, $\partial L/\partial b$ and
# $\partial L/\partial x$, without autograd.


# %% item="13.1"
def zero_convolution(
    x: Tensor, W: Tensor, b: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, O, H, W), and the gradients of L by W (O, I), by b (O,) and by x (B, I, H, W)."""
    ### BEGIN SOLUTION
    y = torch.einsum("oi,bihw->bohw", W, x) + b[:, None, None]
    by_W = torch.einsum("bohw,bihw->oi", g, x)
    by_x = torch.einsum("oi,bohw->bihw", W, g)
    return y, by_W, g.sum((0, 2, 3)), by_x
    ### END SOLUTION


# %% item="13.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
zero_convolution = check("13.1", zero_convolution)

# %% [markdown]
# At $W = 0$ nothing comes *back through* the layer, but the layer itself learns, since $\partial L/\partial W = g\,x^\top$ does not have $W$ in it. So a ControlNet wakes up from its end.
# Below is one of a single layer, $y_c = y + Z_2\big(\tanh(A\,(x + Z_1(c)))\big)$, all of it with your gradients: in the first step only $Z_2$ moves; in the second all do.

# %%
x, c, aim = normal(1, 8, 2, 4, 4), normal(2, 8, 2, 4, 4), normal(3, 8, 2, 4, 4)
A, nothing = normal(4, 2, 2), torch.zeros(2).double()
parts = {name: [torch.zeros(2, 2).double(), nothing] for name in ("Z1", "Z2")} | {"A": [A, nothing]}
sizes = {name: [] for name in ("Z2", "A", "Z1")}
for _ in range(6):
    told, *_ = zero_convolution(c, *parts["Z1"], c)
    hidden, *_ = zero_convolution(x + told, *parts["A"], x)
    added, *_ = zero_convolution(hidden.tanh(), *parts["Z2"], aim)
    g = (
        2 * (added - aim) / aim.numel()
    )  # of the mean square of y_c - target, where aim = target - y
    by, inputs = {}, {"Z2": hidden.tanh(), "A": x + told, "Z1": c}
    for name in sizes:
        _, by_W, by_b, g = zero_convolution(inputs[name], *parts[name], g)
        by[name] = by_W, by_b
        g = g * (1 - hidden.tanh() ** 2) if name == "Z2" else g
        sizes[name].append(float(by_W.norm()))
    for name, gradients in by.items():
        parts[name] = [p - 0.5 * d for p, d in zip(parts[name], gradients, strict=True)]
assert sizes["Z2"][0] > 0 and sizes["A"][0] == sizes["Z1"][0] == 0 < min(
    sizes["A"][1], sizes["Z1"][1]
)
fig, ax = plt.subplots(figsize=(6.4, 3.0))
for (name, size), role, look in zip(
    sizes.items(), ("model", "other", "warn"), ("o-", "^:", "s--"), strict=True
):
    ax.plot(range(1, 7), size, look, color=COLOURS[role], label=name)
ax.set(xlabel="step", ylabel="size of the gradient")
ax.legend()
plt.show()

# %% [markdown] item="13.2"
# ControlNet's equation (Zhang, Rao and Agrawala 2023, Eq. 2) for one block $F(\cdot\,;\Theta)$ of a trained network: the block stays, *locked*; a *trainable copy* of it sees the map,
#
# $$y_c = F(x;\Theta) + Z_2\Big(F\big(x + Z_1(c);\Theta_c\big)\Big).$$
#
# `block`, `Z1` and `Z2` are modules. Train $\Theta_c$, $Z_1$ and $Z_2$ for `steps` steps of the loss $\operatorname{mean}\,(y_c - \text{target})^2$. `optimiser_of(list_of_parameters)` gives an optimiser with `zero_grad()` and
# `step()`. $\Theta_c$ starts as $\Theta$; $Z_1$ and $Z_2$ come as they are, at zero or not. Return $y_c$ before each step and after the last, `(steps + 1, B, C, H, W)`, without a graph.


# %% item="13.2"
def train_copy(
    block, Z1, Z2, x: Tensor, c: Tensor, target: Tensor, optimiser_of, steps: int
) -> Tensor:
    """y_c before each step and after the last, (steps + 1, B, C, H, W); `block` stays as it is."""
    ### BEGIN SOLUTION
    from copy import deepcopy

    trainable = deepcopy(block)
    optimiser = optimiser_of([*trainable.parameters(), *Z1.parameters(), *Z2.parameters()])
    seen = []
    for step in range(steps + 1):
        y = block(x) + Z2(trainable(x + Z1(c)))
        seen.append(y.detach())
        if step < steps:
            optimiser.zero_grad()
            ((y - target) ** 2).mean().backward()
            optimiser.step()
    return torch.stack(seen)
    ### END SOLUTION


# %% item="13.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
train_copy = check("13.2", train_copy)

# %% [markdown]
# What is the zero for? The same training from $Z = 0$ and from ordinary random $Z$. The block does its task well to begin with: the target is its own answer, and a little that the map
# says. With zeros the first $y_c$ *is* the block's, and nothing is lost; at random the copy shouts before it knows anything, and it takes a third of the steps to be as good again as the block alone.

# %%
STEPS = 60
torch.manual_seed(5)
block = nn.Sequential(nn.Conv2d(2, 16, 1), nn.SiLU(), nn.Conv2d(16, 2, 1)).double()
with torch.no_grad():
    wanted = block(x) + 0.3 * (c * x).tanh()
errors = {}
for name in ("zero", "random"):
    torch.manual_seed(6)
    Z1, Z2 = (nn.Conv2d(2, 2, 1).double() for _ in range(2))
    if name == "zero":
        for weight in (*Z1.parameters(), *Z2.parameters()):
            nn.init.zeros_(weight)
    ys = train_copy(block, Z1, Z2, x, c, wanted, lambda p: torch.optim.Adam(list(p), 0.01), STEPS)
    errors[name] = ((ys - wanted) ** 2).flatten(1).mean(1)
    if name == "zero":
        assert torch.equal(ys[0], block(x).detach())
assert errors["zero"][0] < errors["random"][0] and errors["zero"][-1] < errors["zero"][0]
fig, ax = plt.subplots(figsize=(6.4, 3.0))
for (name, curve), role, look in zip(errors.items(), ("model", "warn"), ("-", "--"), strict=True):
    ax.plot(curve, look, color=COLOURS[role], label=f"Z {name} at first")
ax.axhline(
    float(errors["zero"][0]), color=COLOURS["exact"], linestyle="dotted", label="the block alone"
)
ax.set(xlabel="step", ylabel="mean square error", yscale="log")
ax.legend()
plt.show()

# %% [markdown] item="13.3"
# In a U-Net not one block is copied, but the encoder and the middle. The copy gives as many features as the decoder is handed; each goes through a zero convolution of its own, and becomes a residual $r_i$.
# Where is it added? Write the network:
#
# - `down`, a list: each layer takes the running feature $h$ (the first takes `x`), and what it gives is *kept* for the decoder as well;
# - `middle` takes the last of them;
# - `up`, a list: `layer(h, skip)` takes the running feature and a kept one, the last that was kept first.
#
# `residuals` has one for each kept feature, in the order of `down`, and that for what the middle gives at its end. The locked encoder must not hear of them: only the decoder does. Change
# none of the tensors that you are given.


# %% item="13.3"
def told_unet(down: list, middle, up: list, x: Tensor, residuals: list[Tensor]) -> Tensor:
    """The network's answer to x, with the residuals added to what the decoder is given."""
    ### BEGIN SOLUTION
    h, kept = x, []
    for layer in down:
        h = layer(h)
        kept.append(h)
    *r, r_middle = residuals
    kept = [feature + one for feature, one in zip(kept, r, strict=True)]
    h = middle(h) + r_middle
    for layer in up:
        h = layer(h, kept.pop())
    return h
    ### END SOLUTION


# %% item="13.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
told_unet = check("13.3", told_unet)

# %% [markdown]
# How far does each place reach? The network is `digits`, of seven features; one number of one residual is not 0, in the middle of the picture. Shown is how much each pixel of the answer changes,
# relative to the largest change. The finest feature moves details near by; from the middle, where all pixels attend to each other, the whole picture changes.

# %%
D_digits = zoo.load("digits", device="cpu")
images, labels = digits.load("train")
unet = D_digits.net
noisy, time = images[:1] + 0.8 * normal(7, 1, 1, 16, 16).float(), torch.zeros(1)
emb = unet.embed(time, labels[:1], 1)


def with_emb(layer):
    """A layer of the encoder, of h alone."""
    return (lambda h: layer(h, emb)) if isinstance(layer, Level) else layer


def with_skip(layer, enlarge):
    """A layer of the decoder, of h and a kept feature, and the enlargement that stands before it where there is one."""

    def joined(h, skip):
        if enlarge is not None:
            h = enlarge(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return layer(torch.cat([h, skip], 1), emb)

    return joined


def bottom(h: Tensor) -> Tensor:
    """The middle."""
    for layer in unet.middle:
        h = layer(h, emb)
    return h


encoder = [unet.first, *map(with_emb, unet.down)]
before = [None, *unet.up]
decoder = [
    with_skip(layer, None if isinstance(above, Level) else above)
    for above, layer in zip(before, unet.up, strict=False)
    if isinstance(layer, Level)
]
with torch.no_grad():
    features = unet.encode(noisy, time, labels[:1])

    def answer(residuals: list[Tensor]) -> Tensor:
        """The network under these residuals."""
        return unet.last(
            F.silu(unet.last_norm(told_unet(encoder, bottom, decoder, noisy, residuals)))
        )

    silent = [torch.zeros_like(one) for one in features]
    plain, reach = answer(silent), []
    assert torch.allclose(plain, unet(noisy, time, labels[:1]), atol=1e-5)
    for i, feature in enumerate(features):
        poke = [one.clone() for one in silent]
        poke[i][0, :, feature.shape[2] // 2, feature.shape[3] // 2] = 0.3 * feature.std()
        change = (answer(poke) - plain).abs()
        reach.append(2 * change[0] / change.max() - 1)
shares = [float((one > -0.8).double().mean()) for one in reach]
assert shares[0] < shares[-1]
names = [f"{one.shape[1]} × {one.shape[2]}²" for one in features]
study.grid(reach, titles=[*names[:-1], "middle"], scale=6, columns=7)

# %% [markdown] item="13.4"
# A control need not act in full, nor always. Three settings are in use: a *scale* for each sample, a *weight* for each feature, and the part of the sampling in which it acts at all. `start` and `end` are
# shares of the *steps*, as in diffusers' `control_guidance_start` and `control_guidance_end`: of $N$ steps, step $n = 0, \dots, N - 1$ from `sigmas[n]` to `sigmas[n + 1]` is controlled where
#
# $$\text{start} \le \frac nN \qquad\text{and}\qquad \frac{n + 1}{N} \le \text{end}.$$
#
# `sigmas` is `(N + 1,)`, `scale` `(B,)`, `weights` `(L,)`. Return for each step, sample and feature the factor of the residual, `(N, B, L)`.


# %% item="13.4"
def control_scales(
    sigmas: Tensor, start: float, end: float, scale: Tensor, weights: Tensor
) -> Tensor:
    """The factor of each residual in each step, (N, B, L); 0 in steps without control."""
    ### BEGIN SOLUTION
    N = len(sigmas) - 1
    n = torch.arange(N)
    on = (n / N >= start) & ((n + 1) / N <= end)
    return on[:, None, None] * scale[:, None] * weights
    ### END SOLUTION


# %% item="13.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
control_scales = check("13.4", control_scales)

# %% [markdown]
# From here on the network is `mini-sd`, which makes pictures of a small world from texts, and the controls are those that the course trained for it. Four scenes, of which it is told the *lines*
# and no text: in all steps, in the first third, in the last third. What stands where is decided early: the first third of the steps does more for it than the last.

# %%
model = zoo.load("mini-sd", device="cpu")
trained = {kind: zoo.load(f"mini-control-{kind}", device="cpu") for kind in ("edge", "depth")}
scenes = SceneDataset(4, 1313)
seen, texts = render(scenes.scenes, 64), scenes.captions(None)
maps = {"edge": edge_map(seen), "depth": as_map(nearness(seen.depth))}
sigmas, n = model.sigmas(12), len(texts)
blank, words = (model.embed(some)["encoder_hidden_states"] for some in ([""] * n, texts))
L = len(trained["edge"].zeros)


def drawn(D) -> Tensor:
    """Pictures (4, 3, 64, 64), always from the same noise."""
    noise = SampleNoise(3)(torch.empty(n, *model.shape))
    with torch.no_grad(), autocast("cpu"):
        z = sample(D, model.start(noise, sigmas[0]), sigmas)
        return model.decode(model.finish(z, sigmas[-1])).float().clamp(-1, 1)


def by_parts(start: float, end: float) -> Tensor:
    """Pictures under the lines from `start` to `end`."""
    table = control_scales(sigmas, start, end, torch.ones(n), torch.ones(L))
    D = controlled(model.denoiser, edge=trained["edge"]).given(encoder_hidden_states=blank)

    def now(x: Tensor, sigma: Tensor) -> Tensor:
        factors = table[int((sigmas[:-1] - sigma).abs().argmin())]
        return (D.given(edge=maps["edge"], edge_scale=factors) if factors.any() else D)(x, sigma)

    return drawn(now)


in_parts = {
    "all steps": by_parts(0.0, 1.0),
    "first third": by_parts(0.0, 1 / 3 + 1e-6),
    "last third": by_parts(2 / 3 - 1e-6, 1.0),
    "no control": by_parts(1.0, 1.0),
}
study.strip(
    [few(row) for row in [2 * maps["edge"] - 1, *in_parts.values()]], ["lines", *in_parts], scale=1
)

# %% [markdown] item="13.5"
# Two maps, of two kinds, for each of which there is a control that was trained by itself. They are composed by adding their residuals, feature by feature, each times its weight,
#
# $$f_i \;\leftarrow\; f_i + \sum_k w_k\,r_{ki}.$$
#
# `control(x, t, text, c)` gives a list of residuals, `net(x, t, text, residuals)` the answer; `residuals` may be None. `controls`, `maps` and `weights` have one entry for each control; a map may
# be None, and then its control has no say. Ask the network once.


# %% item="13.5"
def composed(
    net, controls: list, maps: list, weights: list[float], x: Tensor, t: Tensor, text: Tensor
) -> Tensor:
    """The network's answer under all controls that have a map."""
    ### BEGIN SOLUTION
    total = None
    for control, c, w in zip(controls, maps, weights, strict=True):
        if c is not None:
            residuals = [w * r for r in control(x, t, text, c)]
            total = (
                residuals
                if total is None
                else [a + b for a, b in zip(total, residuals, strict=True)]
            )
    return net(x, t, text, total)
    ### END SOLUTION


# %% item="13.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
composed = check("13.5", composed)

# %% [markdown]
# The lines, the nearness, and both, without a text. Neither of the two controls has ever met the other.


# %%
def sd(x: Tensor, t: Tensor, text: Tensor, residuals: list[Tensor] | None = None) -> Tensor:
    """The network of mini-sd."""
    return model.denoiser.net(x, t, residuals=residuals, encoder_hidden_states=text)


def control_by(kind: str):
    """A control of mini-sd as control(x, t, text, c)."""
    return lambda x, t, text, c: trained[kind](x, t, c, encoder_hidden_states=text)


def answering(answer):
    """The Denoiser of a network answer(x, t)."""
    return replace(model.denoiser, net=lambda x, t: answer(x, t.expand(len(x))), condition={})


pair, both_maps = [control_by("edge"), control_by("depth")], [maps["edge"], maps["depth"]]
together = {
    name: drawn(answering(lambda x, t, m=m: composed(sd, pair, m, [1.0, 1.0], x, t, blank)))
    for name, m in (("told nearness", [None, both_maps[1]]), ("told both", both_maps))
}
rows = [2 * maps["depth"] - 1, in_parts["all steps"], *together.values()]
study.strip([few(row) for row in rows], ["nearness", "told lines", *together], scale=1)

# %% [markdown] item="13.6"
# *Guess mode*: no text, and the map is to say what there is. Two things change. The residuals get weights that are even in *logarithm*, from `lowest` for the finest feature to 1 for the middle, so that the coarse
# ones lead; for $L$ residuals
#
# $$s_i = \text{lowest}^{\,1 - i / (L - 1)},\qquad i = 0, \dots, L - 1 .$$
#
# And guidance needs two answers that differ. Both have the empty text, so it is the map that makes the difference: *told* has the weighted residuals, *untold* none, and the result is $\text{untold} + w\,(\text{told} - \text{untold})$.
# Return the weights `(L,)` and the result. `net` and `control` are as in 13.5.


# %% item="13.6"
def guess_mode(
    net, control, x: Tensor, t: Tensor, c: Tensor, empty: Tensor, w: float, lowest: float
) -> tuple[Tensor, Tensor]:
    """The weights (L,), and the guided answer, of the shape of x."""
    ### BEGIN SOLUTION
    residuals = control(x, t, empty, c)
    L = len(residuals)
    weights = lowest ** (1 - torch.arange(L, dtype=torch.float64) / (L - 1))
    told = net(x, t, empty, [s.to(r) * r for s, r in zip(weights, residuals, strict=True)])
    untold = net(x, t, empty)
    return weights, untold + w * (told - untold)
    ### END SOLUTION


# %% item="13.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
guess_mode = check("13.6", guess_mode)

# %% [markdown]
# With $w = 1$ there is no guidance, and the weights alone weaken the control; with $w = 3$ what the map adds is enlarged, and the contours come back.

# %%
edge, lines = control_by("edge"), maps["edge"]
guessed = {
    f"guess, w = {w:g}": drawn(
        answering(lambda x, t, w=w: guess_mode(sd, edge, x, t, lines, blank, w, 0.1)[1])
    )
    for w in (1.0, 3.0)
}
study.strip([few(row) for row in [2 * lines - 1, *guessed.values()]], ["lines", *guessed], scale=1)

# %% [markdown] item="13.7"
# With a text there are two halves that differ already, $\text{ref} + w\,(\text{cond} - \text{ref})$: *cond* is the answer to the text, *ref* that to the empty one. Is the map told to both, or to *cond* alone? In both, it cancels
# in the difference, and $w$ strengthens the text; in one, $w$ strengthens the map as well.
#
# Ask the network *once*, about $2B$ rows. `t` is `(B,)`; `text` and `empty` have $B$ rows each; `c` is `(B, ...)`. The control hears in each row the text that the network hears there. Where `both` is False, the rows of the empty text
# get no control, which is not the same as an empty map.


# %% item="13.7"
def controlled_cfg(
    net, control, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, c: Tensor, w: float, both: bool
) -> Tensor:
    """The guided answer, of the shape of x, by one call of the network."""
    ### BEGIN SOLUTION
    x, t, c, texts = (
        torch.cat([x, x]),
        torch.cat([t, t]),
        torch.cat([c, c]),
        torch.cat([text, empty]),
    )
    scale = torch.ones(len(x), 1, 1, 1).to(x)
    if not both:
        scale[len(text) :] = 0
    residuals = [scale * r for r in control(x, t, texts, c)]
    cond, ref = net(x, t, texts, residuals).chunk(2)
    return ref + w * (cond - ref)
    ### END SOLUTION


# %% item="13.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
controlled_cfg = check("13.7", controlled_cfg)

# %% [markdown]
# The four scenes with their texts, at $w = 3$. The two ways hardly differ here. In one half what the map adds is enlarged three times, which a control that is followed already does not need;
# lecture 13 measures what it costs, and how weights for the features mend it.

# %%
halves = {
    name: drawn(
        answering(lambda x, t, b=b: controlled_cfg(sd, edge, x, t, words, blank, lines, 3.0, b))
    )
    for name, b in (("in both halves", True), ("in one half", False))
}
study.strip(
    [few(row) for row in [2 * lines - 1, *halves.values(), seen.rgb]],
    ["lines", *halves, "the scene"],
    scale=1,
)

# %% [markdown] item="13.8"
# Does a picture *obey* its lines? Lines are read from it again and compared with those that were asked for. A line one pixel beside its place is no fault: so a pixel counts as right where the other drawing has
# a line at most `reach` away *along each axis*. Precision $P$ is the share of the lines *found* that are right, recall $R$ that of those *asked* for; and
#
# $$F_1 = \frac{2 P R}{P + R},$$
#
# 1 where both drawings are empty, 0 where only one of them is. `found` and `asked` are `(N, 1, H, W)`, bool. Return $F_1$ of each picture, `(N,)`.


# %% item="13.8"
def edge_f1(found: Tensor, asked: Tensor, reach: int) -> Tensor:
    """The F1 of the lines of each picture, (N,), within `reach` pixels."""

    ### BEGIN SOLUTION
    def near(drawing):
        return torch.nn.functional.max_pool2d(drawing.double(), 2 * reach + 1, 1, reach) > 0

    def share(part, whole):
        return (part & whole).sum((1, 2, 3)) / whole.sum((1, 2, 3)).clamp_min(1)

    P, R = share(near(asked), found), share(near(found), asked)
    f1 = 2 * P * R / (P + R).clamp_min(1e-12)
    return torch.where((found | asked).any(-1).any(-1).any(-1), f1, 1.0)
    ### END SOLUTION


# %% item="13.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
edge_f1 = check("13.8", edge_f1)

# %% [markdown]
# All pictures of this set, judged. Their lines are read by a network that was trained to see them in pictures; what it finds in the scenes themselves is the ceiling. Four pictures are few: the
# lecture measures on hundreds.

# %%
judge = zoo.load("scenes-maps", device="cpu")
asked = maps["edge"][:, :1] > 0.5
everything = {"the scenes themselves": seen.rgb, **halves, **guessed, **together, **in_parts}
scores = {
    name: float(edge_f1(judge.read(some).lines, asked, 1).mean())
    for name, some in everything.items()
}
assert scores["all steps"] > scores["no control"] + 0.1
assert scores["first third"] > scores["last third"]
fig, ax = plt.subplots(figsize=(6.4, 3.6))
ax.barh(
    list(scores),
    list(scores.values()),
    color=[COLOURS["exact"], *[COLOURS["model"]] * (len(scores) - 2), COLOURS["warn"]],
)
ax.invert_yaxis()
ax.set(xlabel="F1 of the lines", xlim=(0, 1))
plt.show()

# %% [markdown] item="13.9"
# Now train a control. The network, whose answer is the noise, is locked; the loss is the one that it was trained with itself, told the map beside the text,
#
# $$L = \operatorname{mean}\,\big(\text{net}(x, \sigma, \text{text}, r) - \epsilon\big)^2,\qquad x = x_0 + \sigma\epsilon,\quad r = \text{control}(x, \sigma, \text{text}, c).$$
#
# Half of the texts are dropped, so that the map must say by itself what there is: where `u < 0.5`, both network and control hear the empty one. The map stays. Take one step: `optimiser` has the control's parameters. Lock the network
# so that no gradient is stored in it. `sigma` and `u` are `(B,)`, `text` and `empty` `(B, E)`. Return the loss before the step, 0-d, without a graph.


# %% item="13.9"
def control_step(
    net, control, optimiser, x0: Tensor, sigma: Tensor, eps: Tensor, text: Tensor, empty: Tensor, c: Tensor, u: Tensor
) -> Tensor:  # fmt: skip
    """One step of the optimiser on the control; the loss before it, 0-d."""
    ### BEGIN SOLUTION
    net.requires_grad_(False)
    told = torch.where((u < 0.5)[:, None], empty, text)
    x = x0 + sigma.reshape(-1, 1, 1, 1) * eps
    loss = ((net(x, sigma, told, control(x, sigma, told, c)) - eps) ** 2).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()
    ### END SOLUTION


# %% item="13.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
control_step = check("13.9", control_step)

# %% [markdown]
# Your step, 120 times, on `digits`: its "text" is a class, the map what Canny's detector finds in a digit. The control starts at the network's own weights and adds nothing; after a few seconds the digits
# that are drawn, of no class, have the lines that were asked for.


# %%
class Noise(nn.Module):
    """What `digits` says of the noise: net(x, sigma, classes (B, 1), residuals)."""

    def __init__(self):
        super().__init__()
        self.unet = copy.deepcopy(D_digits.net)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, residuals=None) -> Tensor:
        D = replace(D_digits, net=lambda y, t: self.unet(y, t, text[:, 0], residuals))
        return (x - D(x, sigma)) / sigma.reshape(-1, 1, 1, 1)


class Lines(nn.Module):
    """A control of `digits`: control(x, sigma, classes (B, 1), lines)."""

    def __init__(self):
        super().__init__()
        self.control = control_of(D_digits.net, channels=1)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, c: Tensor) -> list[Tensor]:
        c_in, time = D_digits.coefficients(sigma.double())[2].to(x), D_digits.c_noise(sigma).to(x)
        return self.control(c_in.reshape(-1, 1, 1, 1) * x, time, c, label=text[:, 0])


torch.manual_seed(8)
base, learning = Noise(), Lines()
optimiser, chance, losses = torch.optim.Adam(learning.parameters(), 5e-3), generator(9), []
outlines = canny(images)
for _ in range(120):
    some = torch.randint(len(images), (24,), generator=chance)
    levels = torch.exp(1.2 * torch.randn(24, generator=chance) - 0.4)
    fog = torch.randn(24, *digits.SHAPE, generator=chance)
    none = torch.full((24, 1), digits.CLASSES)
    u = torch.rand(24, generator=chance)
    step = images[some], levels, fog, labels[some][:, None], none, outlines[some], u
    losses.append(float(control_step(base, learning, optimiser, *step)))
fig, ax = plt.subplots(figsize=(6.4, 2.8))
ax.plot(torch.tensor(losses).unfold(0, 15, 15).mean(1), "o-", color=COLOURS["model"])
ax.set(xlabel="steps / 15", ylabel="loss", ylim=(0, None))
plt.show()

# %%
tests, _ = digits.load("test")
asked_lines = canny(tests[:10])
unnamed, grid = torch.full((10, 1), digits.CLASSES), 20 * 0.75 ** torch.arange(25).double()


def told_lines(x: Tensor, sigma: Tensor) -> Tensor:
    """The Denoiser under the control, of no class."""
    level = sigma.float().expand(len(x))
    noise = base(x, level, unnamed, learning(x, level, unnamed, asked_lines))
    return x - level.reshape(-1, 1, 1, 1) * noise


with torch.no_grad():
    x_T = float(grid[0]) * torch.randn(10, *digits.SHAPE, generator=generator(10))
    free = sample(D_digits.given(label=unnamed[:, 0]), x_T, grid).clamp(-1, 1)
    obeying = sample(told_lines, x_T, grid).clamp(-1, 1)
agree = [float(edge_f1(canny(some) > 0.5, asked_lines > 0.5, 0).mean()) for some in (free, obeying)]
assert agree[1] > agree[0] + 0.15
study.strip(
    [2 * asked_lines - 1, free, obeying, tests[:10]],
    ["lines", f"no control, F1 = {agree[0]:.2f}", f"control, F1 = {agree[1]:.2f}", "whose lines"],
    scale=4,
)

# %% [markdown] item="13.10"
# A sampler starts from noise alone, as if nothing were known of $x_0$. With a map of classes much is: the latents of sky are unlike those of grass. SCP-Diff (Gao et al. 2024) starts from noise that knows it. Take
# `latents` `(N, C, h, w)` and their classes `labels` `(N, h, w)`, from 0 to `K - 1`. For each class, the mean and the standard deviation (divided by the count $n$, not $n - 1$) of each channel, over all its pixels in all
# pictures; a class that has no pixel takes those of all pixels. Then, for new maps `wanted` `(B, h, w)`, a start at level $\sigma$ (0-d), with $x_0$ at each pixel taken as normal with the mean and deviation of its class, by *one* noise `eps`
# `(B, C, h, w)`,
#
# $$x = m + \sqrt{s^2 + \sigma^2}\;\epsilon .$$
#
# Return the means `(K, C)`, the deviations `(K, C)` and the start `(B, C, h, w)`.


# %% item="13.10"
def class_prior(
    latents: Tensor, labels: Tensor, K: int, wanted: Tensor, sigma: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Means (K, C) and deviations (K, C) of the classes, and a start (B, C, h, w) for the maps `wanted`."""
    ### BEGIN SOLUTION
    pixels = latents.movedim(1, -1).flatten(0, -2)
    own = labels.flatten() == torch.arange(K)[:, None]  # (K, N h w)
    groups = [pixels[mask] if mask.any() else pixels for mask in own]
    mean = torch.stack([group.mean(0) for group in groups])
    std = torch.stack([group.std(0, correction=0) for group in groups])
    m, s = (values[wanted].movedim(-1, 1) for values in (mean, std))
    return mean, std, m + (s**2 + sigma**2).sqrt() * eps
    ### END SOLUTION


# %% item="13.10" tags=["check"]
# NBVAL_CHECK_OUTPUT
class_prior = check("13.10", class_prior)

# %% [markdown]
# The classes of `mini-sd`'s world, from 200 scenes. Above, what the decoder makes of the *means* alone, with no sampler at all: a layout is there already. Below, how much likelier new diffused latents are under this start
# than under the usual one, $\sqrt{1 + \sigma^2}\,\epsilon$: at the largest level, where the sampler begins, there is little to win for each number, and the gain falls as $1/\sigma^2$; started later, it is worth more.

# %%
K = 10
many = SceneDataset(200, 1314)
pictures = render(many.scenes, 64)
with torch.no_grad(), autocast("cpu"):
    latents = torch.cat([model.encode(some).float() for some in pictures.rgb.split(50)]).double()
cells = coarse(classes(pictures, many.scenes), 8, K)
fit, new = slice(0, 160), slice(160, 200)
mean, std, start = class_prior(
    latents[fit], cells[fit], K, cells[new], torch.tensor(1.0).double(), normal(11, 40, 4, 8, 8)
)
layout = mean[cells[new]].movedim(-1, 1)
with torch.no_grad(), autocast("cpu"):
    ghosts = model.decode(layout[:6].float()).float().clamp(-1, 1)
shown = segmentation_map(classes(pictures, many.scenes)[new][:6])
study.strip(
    [few(row) for row in [2 * shown - 1, ghosts, pictures.rgb[new][:6]]],
    ["classes", "means", "scenes"],
    scale=1,
)

# %%
ladder = torch.logspace(-0.5, float(torch.log10(torch.tensor(model.sigma_max))), 20).double()
square = latents[new] ** 2
within = std[cells[new]].movedim(-1, 1) ** 2
gains = []
for sigma in ladder:
    usual = torch.log(1 + sigma**2) + (square + sigma**2) / (1 + sigma**2)
    known = torch.log(within + sigma**2) + ((latents[new] - layout) ** 2 + sigma**2) / (
        within + sigma**2
    )
    gains.append(float((usual - known).mean() / 2))
assert min(gains) > 0 and gains == sorted(gains, reverse=True)
fig, ax = plt.subplots(figsize=(6.4, 3.0))
ax.plot(ladder, gains, "o-", color=COLOURS["model"])
ax.axvline(
    model.sigma_max, color=COLOURS["muted"], linestyle="dotted", label="where sampling begins"
)
ax.set(xlabel="σ", ylabel="gain, nats per number", xscale="log", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 14, where the picture that is told to the network is one that already exists, and is to be changed.
