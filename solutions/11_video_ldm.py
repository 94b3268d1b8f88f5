# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises 11: Video diffusion
#
# Ten functions about one question: how does a model of *pictures* become one of *clips*, without a loss of what it knows? Layers that look along time are put between those that look at a frame; they start
# as if they were not there. Then come noise that frames share, frames that are known and frames between them, and what tells a good clip from a bad one.
#
# **How it works.** Fill in each function in place of `return ...` and run its `check`. A check tells you *which*
# mistake you made, not only that there is one. `hint("11.1")` gives the next hint, `solution("11.1")` the answer.
# Until your function passes, the cells below it use the library's, so you can do the items in any order.
#
# | item | points | | item | points |
# |---|---|---|---|---|
# | 11.1 inflate a convolution | 1 | | 11.6 frames that are known | 2 |
# | 11.2 sequences of frames | 2 | | 11.7 between key frames, by replacement | 2 |
# | 11.3 the mixing factor | 2 | | 11.8 reconstruction guidance | 3 |
# | 11.4 the identity at first | 2 | | 11.9 flicker and warping error | 2 |
# | 11.5 noise in common | 2 | | 11.10 MotionLoRA | 3 |
# | | | | **all** | **21** |
#
# Symbols: a clip is $[b, t, c, h, w]$, in code `(B, T, C, H, W)`: frames before channels. $x = x_0 + \sigma\epsilon$ is a noisy clip and $D(x, \sigma)$ the network's estimate of $x_0$; $x^a$ are the frames of a clip that are known, $x^b$ the others.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import study, zoo
from course_lib.devices import autocast, generator
from course_lib.gaussians import Mixture
from course_lib.grading.check import check, hint, solution
from course_lib.nets.temporal import TemporalAttention
from course_lib.sample import sample
from course_lib.study.control_pictures import few
from course_lib.video.animatediff import motion_of
from course_lib.video.measures import warp
from course_lib.video.noise import covariance
from course_lib.worlds.scenes.clips import draw_clips, render_clips

torch.set_num_threads(1)
study.use()
COLOURS = study.COLOURS


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


sliding = render_clips(draw_clips(1, 1101, "slide")).rgb.double()  # (1, 8, 3, 64, 64)
SHOWN = [0, 2, 4, 6]
study.strip([few(sliding[0, SHOWN])], ["a clip"], [f"frame {k}" for k in SHOWN], scale=1)

# %% [markdown] item="11.1"
# A U-Net for pictures is made of convolutions with weights $W$, `(O, I, k, k)`. For clips they become convolutions over time and space, `(O, I, kt, k, k)`, with odd $k_t$ and $k_t // 2$ frames of zeros before and after the clip:
#
# $$y_t = \sum_{j=0}^{k_t - 1} W_j * x_{t + j - k_t // 2} + b .$$
#
# Choose the taps $W_j$ so that at first each frame gets what the 2-D convolution gives it *alone*. (The bias $b$ stays as it is.) To go on from the image model, training then moves the taps. Video Diffusion Models (Ho et al. 2022)
# take $k_t = 1$ and leave time to the attention; Make-A-Video (Singer et al. 2022) puts a convolution over time, which starts as the identity, behind each one over space.


# %% item="11.1"
def inflate(W: Tensor, kt: int) -> Tensor:
    """The weights (O, I, kt, k, k) of a convolution over time and space that starts as W, frame by frame."""
    ### BEGIN SOLUTION
    inflated = W.new_zeros(*W.shape[:2], kt, *W.shape[2:])
    inflated[:, :, kt // 2] = W
    return inflated
    ### END SOLUTION


# %% item="11.1" tags=["check"]
# NBVAL_CHECK_OUTPUT
inflate = check("11.1", inflate)

# %% [markdown]
# A filter that finds edges, on the clip above. All taps $W / k_t$, the usual way to inflate a *classifier*, is right as long as nothing moves; here each frame shows the edges of its neighbours as well.

# %%
edges = (torch.full((3, 3), -1.0) + 9 * torch.eye(9)[4].reshape(3, 3)).double().expand(1, 3, 3, 3)
frames = sliding[0]  # (T, C, H, W)
alone = F.conv2d(frames, edges, padding=1)
in_time = {
    "inflated": inflate(edges, 3),
    "all taps W / 3": edges[:, :, None].expand(1, 3, 3, 3, 3) / 3,
}
seen = {
    name: F.conv3d(frames.transpose(0, 1)[None], weight, padding=1)[0].transpose(0, 1)
    for name, weight in in_time.items()
}
assert torch.allclose(seen["inflated"], alone, rtol=0, atol=1e-12)
assert not torch.allclose(seen["all taps W / 3"], alone, rtol=0, atol=0.1)
rows = [few(one[SHOWN] / 3) for one in (alone, *seen.values())]
study.strip(rows, ["frame by frame", *seen], [f"frame {k}" for k in SHOWN], scale=1)

# %% [markdown] item="11.2"
# Temporal attention lets each *place* of a clip look along its own course through time, and at no other place: from $[b, t, c, h, w]$ make $b\,h\,w$ sequences of $t$ steps with $c$ numbers each, and of what comes out a clip again,
#
# $$[b, t, c, h, w] \;\to\; [(b\,h\,w),\, t,\, c] \;\to\; \text{attend} \;\to\; [b, t, c, h, w].$$
#
# `attend` takes `(N, L, C)` and returns the same shape; in each of the $N$ rows the $L$ steps look at each other. It would take other shapes as well, so nothing but your care keeps the axes apart.


# %% item="11.2"
def along_time(x: Tensor, attend) -> Tensor:
    """`attend` along time at each place of the clips (B, T, C, H, W), whose shape is kept."""
    ### BEGIN SOLUTION
    b, t, c, h, w = x.shape
    tokens = x.permute(0, 3, 4, 1, 2).reshape(b * h * w, t, c)
    return attend(tokens).reshape(b, h, w, t, c).permute(0, 3, 4, 1, 2)
    ### END SOLUTION


# %% item="11.2" tags=["check"]
# NBVAL_CHECK_OUTPUT
along_time = check("11.2", along_time)

# %% [markdown]
# The simplest attention looks at all frames alike and takes their mean: along time that is a long exposure of the clip. With a `reshape` alone, there and back, the "sequences" are numbers that lie side by side in memory, and a
# "long exposure" of those is something else. Without attention in between nobody would notice: the two reshapes undo each other.


# %%
def exposure(h: Tensor) -> Tensor:
    """The mean over the steps of each sequence."""
    return h.mean(1, keepdim=True).expand_as(h)


b, t, c, h, w = sliding.shape
exposed = {
    "along time": along_time(sliding, exposure),
    "reshape alone": exposure(sliding.reshape(b * h * w, t, c)).reshape(sliding.shape),
}
assert torch.allclose(exposed["along time"], sliding.mean(1, keepdim=True), rtol=0, atol=1e-12)
layer = TemporalAttention(8).double()
nn.init.normal_(layer.attn.to_out[0].weight, generator=generator(3))  # at first it is 0: see 11.4
noise = normal(2, 2, 4, 8, 3, 3)
with torch.no_grad():
    ours = noise + along_time(noise, lambda h: layer.attn(layer.norm(h)))
    assert torch.allclose(ours, layer(noise), rtol=0, atol=1e-10)
study.strip([few(one[0, SHOWN]) for one in exposed.values()], list(exposed), scale=1)

# %% [markdown] item="11.3"
# Video LDM (Blattmann et al. 2023, Sec. 3.1) puts a temporal layer $\ell$ behind a spatial one and learns how much of each is heard. With the frames $z$ of all clips in one axis, as the spatial layer left them,
#
# $$z' = \ell(z), \qquad z \;\leftarrow\; \alpha\,z + (1 - \alpha)\,z', \qquad \alpha = \operatorname{sigmoid}(a).$$
#
# `z` is `(B T, C, H, W)`, the frames of a clip one after the other; `layer` takes clips as a 3-D convolution does, `(B, C, T, H, W)`, and keeps that shape; `a` is `(1,)`. Where $\alpha = 1$ the result is to be the image model's to the last bit:
# that is the switch by which the same weights make pictures again.


# %% item="11.3"
def mixed_layer(z: Tensor, layer, a: Tensor, T: int) -> Tensor:
    """alpha z + (1 - alpha) z' for the frames z (B T, C, H, W) of clips of T frames."""
    ### BEGIN SOLUTION
    clips = z.unflatten(0, (-1, T)).transpose(1, 2)
    z_time = layer(clips).transpose(1, 2).flatten(0, 1)
    alpha = torch.sigmoid(a)
    return alpha * z + (1 - alpha) * z_time
    ### END SOLUTION


# %% item="11.3" tags=["check"]
# NBVAL_CHECK_OUTPUT
mixed_layer = check("11.3", mixed_layer)

# %% [markdown]
# What does $\alpha$ learn? Frames with noise are to be cleaned, and all that the temporal layer does is to take the mean of a frame and its two neighbours. Where nothing moves, neighbours show the same and the layer is
# wanted; where they are shuffled, they mislead, and $\alpha$ switches it off.


# %%
def neighbours(clips: Tensor) -> Tensor:
    """The mean of each frame and the two beside it, of clips (B, C, T, H, W)."""
    return F.avg_pool3d(clips, (3, 1, 1), 1, (1, 0, 0), count_include_pad=False)


order = torch.randperm(8, generator=generator(4))
clean = {
    "frozen": sliding[0, :1].expand(8, -1, -1, -1),
    "sliding": sliding[0],
    "shuffled": sliding[0, order],
}
shares = {}
for name, wanted in clean.items():
    z, a = wanted + 0.15 * normal(5, *wanted.shape), torch.zeros(1).double().requires_grad_()
    optimiser, shares[name] = torch.optim.Adam([a], 0.1), []
    for _ in range(80):
        shares[name].append(float(a.sigmoid().detach()))
        loss = (mixed_layer(z, neighbours, a, 8) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
assert shares["frozen"][-1] < shares["sliding"][-1] < shares["shuffled"][-1]
assert torch.equal(mixed_layer(z, neighbours, torch.tensor([60.0]).double(), 8), z)
fig, ax = plt.subplots(figsize=(6.4, 3.0))
for (name, curve), role, look in zip(
    shares.items(), ("model", "data", "warn"), ("-", "--", ":"), strict=True
):
    ax.plot(curve, look, color=COLOURS[role], label=name)
ax.set(xlabel="step", ylabel="α, the frame's share", ylim=(0, 1))
ax.legend()
plt.show()

# %% [markdown] item="11.4"
# A new temporal block between trained layers must not disturb them before it has learned something; it must also be *able* to learn. Three modules are freshly made, and none of their weights is 0: `norm`, which normalises tokens `(N, T, C)`; `attend`, an attention with
# the projections `to_q`, `to_k`, `to_v` and `to_out`; and `out`, a last `nn.Linear`. The block is
#
# $$y = x + \text{out}\big(\text{attend}(\text{norm}(x))\big).$$
#
# Set to zero what must be zero so that $y = x$ at first, **and no more**, so that the gradient of the weights of `out` is not 0. Return the block's first answer, with its graph.


# %% item="11.4"
def new_block(x: Tensor, norm, attend, out) -> Tensor:
    """Make the block the identity that can learn; its first answer to the tokens x (N, T, C)."""
    ### BEGIN SOLUTION
    torch.nn.init.zeros_(out.weight)
    torch.nn.init.zeros_(out.bias)
    return x + out(attend(norm(x)))
    ### END SOLUTION


# %% item="11.4" tags=["check"]
# NBVAL_CHECK_OUTPUT
new_block = check("11.4", new_block)

# %% [markdown]
# Clips of which everything is known: 16 numbers a frame, each a Gaussian course of variance 1 in which neighbouring frames have the correlation 0.95, with noise of $\sigma = 1$. The best *image* model takes $x / 2$ for each
# frame, with a mean square error of 1/2; the best model of *clips* is exact too, and lies below. Four temporal blocks behind the image model are to find the difference, and in a hundred steps find half of it. They start where the image model stands; as drawn they first
# have to undo what they spoil; and with zeros too many they stay where they are.


# %%
class Course(nn.Module):
    """An attention over the 8 frames of a sequence, which adds to each frame a number of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.place = nn.Parameter(0.5 * torch.randn(8, width))

    def forward(self, h: Tensor) -> Tensor:
        q, k = self.to_q(h + self.place), self.to_k(h + self.place)
        return self.to_out(F.scaled_dot_product_attention(q, k, self.to_v(h)))


frame = torch.arange(8).double()
C_time = 0.95 ** (frame[:, None] - frame).abs()
L_time = torch.linalg.cholesky(C_time)
exact = float((C_time - C_time @ torch.linalg.inv(C_time + torch.eye(8)) @ C_time).trace() / 8)
curves = {}


def started(name: str) -> list[tuple[nn.Module, ...]]:
    """Four temporal blocks, each (norm, attend, out)."""
    torch.manual_seed(6)
    made = [(nn.LayerNorm(16), Course(16), nn.Linear(16, 16)) for _ in range(4)]
    for norm, attend, out in made:
        if name == "identity at first":
            new_block(torch.zeros(1, 8, 16), norm, attend, out)
        if name == "all zero":
            for weight in (*attend.parameters(), *out.parameters()):
                nn.init.zeros_(weight)
    return made


for name in ("identity at first", "as drawn", "all zero"):
    blocks = started(name)
    weights = [weight for block in blocks for part in block for weight in part.parameters()]
    optimiser, curves[name] = torch.optim.Adam(weights, 5e-3), []
    for step in range(120):
        x0 = torch.einsum("ij,njc->nic", L_time, normal(1000 + step, 64, 8, 16)).float()
        x = (x0 + normal(2000 + step, 64, 8, 16).float()) / 2  # the image model's estimate
        for norm, attend, out in blocks:
            x = x + out(attend(norm(x)))
        loss = (x - x0).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curves[name].append(float(loss.detach()))
ends = {name: sum(curve[-25:]) / 25 for name, curve in curves.items()}
assert curves["as drawn"][0] > curves["identity at first"][0] > ends["identity at first"]
assert ends["all zero"] > 0.48 and ends["identity at first"] < 0.4
fig, ax = plt.subplots(figsize=(6.4, 3.4))
for (name, curve), role, look in zip(
    curves.items(), ("model", "other", "warn"), ("-", "--", ":"), strict=True
):
    ax.plot(torch.tensor(curve).unfold(0, 3, 3).mean(1), look, color=COLOURS[role], label=name)
ax.axhline(0.5, color=COLOURS["muted"], linewidth=1, label="the image model")
ax.axhline(exact, color=COLOURS["exact"], linestyle="dotted", label="the best model of clips")
ax.set(xlabel="step / 3", ylabel="mean square error", ylim=(0, None))
ax.legend(ncols=2, loc="lower left")
plt.show()

# %% [markdown] item="11.5"
# Frames of a clip are alike; why should their noise be independent? PYoCo (Ge et al. 2023) trains on noise that frames share. *Mixed*: a part in common and a part of each frame's own. *Progressive*: each frame's noise is made of that of the frame before,
#
# $$\epsilon_i = \frac{a}{\sqrt{1 + a^2}}\,\epsilon_\text{shared} + \frac{1}{\sqrt{1 + a^2}}\,\epsilon_i^\text{own}, \qquad
# \epsilon_0 = \epsilon_0^\text{own},\quad \epsilon_i = \frac{a}{\sqrt{1 + a^2}}\,\epsilon_{i-1} + \frac{1}{\sqrt{1 + a^2}}\,\epsilon_i^\text{own} .$$
#
# Each frame by itself has noise of variance 1 in both, as the image model knows it. `shared` is `(B, C, H, W)`, `own` `(B, T, C, H, W)`, both standard normal. Return the mixed noise and the progressive one.


# %% item="11.5"
def clip_noise(shared: Tensor, own: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Mixed and progressive noise of clips, (B, T, C, H, W) each; a = 0 gives `own`."""
    ### BEGIN SOLUTION
    common, rest = a / (1 + a**2) ** 0.5, 1 / (1 + a**2) ** 0.5
    mixed = common * shared[:, None] + rest * own
    frames = [own[:, 0]]
    for i in range(1, own.shape[1]):
        frames.append(common * frames[-1] + rest * own[:, i])
    return mixed, torch.stack(frames, 1)
    ### END SOLUTION


# %% item="11.5" tags=["check"]
# NBVAL_CHECK_OUTPUT
clip_noise = check("11.5", clip_noise)

# %% [markdown]
# The correlation of the first frame with each of the others, measured on 40,000 numbers, and as it must be. Then `mini-sd`, a model of pictures that knows nothing of time: six frames from one text, each made by itself. From independent noise
# they are six scenes. The more the noise has in common, the more the scenes have: what a deterministic sampler makes is a function of its noise.

# %%
own, shared = normal(7, 1, 8, 1, 200, 200), normal(8, 1, 1, 200, 200)
fig, ax = plt.subplots(figsize=(6.4, 3.0))
for kind, noise, role in zip(
    ("mixed", "progressive"), clip_noise(shared, own, 2.0), ("model", "other"), strict=True
):
    measured = (noise[0, 0] * noise[0]).mean((1, 2, 3))
    due = covariance(8, 2.0, kind)[0]
    assert float((measured - due).abs().max()) < 4.5 * math.sqrt(2 / 40_000)
    ax.plot(due, color=COLOURS[role], label=kind)
    ax.plot(measured, "o", color=COLOURS[role])
ax.set(xlabel="frame", ylabel="correlation with frame 0", ylim=(0, 1.05))
ax.legend()
plt.show()

# %%
model = zoo.load("mini-sd", device="cpu")
prompt = "a red cube on grass"
sigmas, words = model.sigmas(12), model.embed([prompt] * 6)
D_frames = model.denoiser.given(**words)


def frame_by_frame(noise: Tensor) -> Tensor:
    """Pictures (6, 3, 64, 64), each from its own noise."""
    with torch.no_grad(), autocast("cpu"):
        z = sample(D_frames, model.start(noise.float(), sigmas[0]), sigmas)
        return model.decode(model.finish(z, sigmas[-1])).float().clamp(-1, 1)


own, shared = normal(9, 1, 6, *model.shape), normal(10, 1, *model.shape)
rows = {"a = 0": own[0]} | {f"mixed, a = {a:g}": clip_noise(shared, own, a)[0][0] for a in (1, 4)}
rows["progressive, a = 4"] = clip_noise(shared, own, 4.0)[1][0]
drawn = {name: frame_by_frame(noise) for name, noise in rows.items()}
apart = {name: float(one.diff(dim=0).abs().mean()) for name, one in drawn.items()}
assert apart["a = 0"] > apart["mixed, a = 1"] > apart["mixed, a = 4"]
study.strip([few(one) for one in drawn.values()], list(drawn), scale=1)

# %% [markdown] item="11.6"
# To go on with a clip, or to fill it in, the model is *told* the frames that are known. Video LDM (Blattmann et al. 2023, Sec. 3.2) gives its temporal layers a context of two things: the clean latents of the known frames, with 0 elsewhere, and a mask that says which they are,
#
# $$c = [\,m \odot z_0,\; m\,] \quad\text{on the axis of channels}, \qquad m_i = 1 \text{ where frame } i \text{ is known.}$$
#
# The mask is needed, since a frame of zeros could be a grey picture. The noisy clip $x = z_0 + \sigma\epsilon$ has noise in *all* frames. `net(x, sigma, context)` tells the noise; since a known frame is given, our loss is
#
# $$L = \operatorname{mean}\,(\text{net}(x, \sigma, c) - \epsilon)^2 \quad\text{over all numbers of all } \textit{unknown} \text{ frames of the batch.}$$
#
# `z0` and `eps` are `(B, T, C, H, W)`, `known` `(B, T)` bool, different for each clip, `sigma` `(B,)`. Return the context `(B, T, C + 1, H, W)` and the loss, 0-d, with its graph.


# %% item="11.6"
def frame_conditioning(
    net, z0: Tensor, known: Tensor, sigma: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """The context (B, T, C + 1, H, W) of the known frames, and the loss over the others."""
    ### BEGIN SOLUTION
    m = known.to(z0)[:, :, None, None, None]
    mask = m.expand(*z0.shape[:2], 1, *z0.shape[3:])
    context = torch.cat([m * z0, mask], 2)
    x = z0 + sigma[:, None, None, None, None] * eps
    square = (net(x, sigma, context) - eps) ** 2
    return context, square[~known].mean()
    ### END SOLUTION


# %% item="11.6" tags=["check"]
# NBVAL_CHECK_OUTPUT
frame_conditioning = check("11.6", frame_conditioning)

# %% [markdown]
# Your loss, on the courses of 11.4: a clip is 8 frames of one number. One small network learns all masks at once, and answers as well as the exact posterior allows, whatever it is told: nothing, the first frame
# (*prediction*), both ends (*interpolation*), or every second frame.


# %%
class Told(nn.Module):
    """net(x, sigma, context) of clips of 8 numbers; what it tells is the noise."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(25, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 8)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        level = sigma[:, None]
        given = torch.cat(
            [x.flatten(1) / (1 + level**2).sqrt(), context.flatten(1), level.log()], 1
        )
        return (self.layers(given) + x.flatten(1) * level / (1 + level**2)).view_as(x)


def courses(seed: int, n: int) -> Tensor:
    """Clips (n, 8, 1, 1, 1) of the exact world."""
    return (normal(seed, n, 8) @ L_time.T).float()[:, :, None, None, None]


def exact_loss(known: Tensor, sigma: float) -> float:
    """The least mean square error of the noise of unknown frames, by the Gaussian posterior."""
    told = torch.where(known, 1e-9, sigma**2)  # variance with which each frame is seen
    left = C_time - C_time @ torch.linalg.inv(C_time + told.double().diag()) @ C_time
    return float(left.diagonal()[~known].mean()) / sigma**2


torch.manual_seed(11)
net = Told()
optimiser = torch.optim.Adam(net.parameters(), 3e-3)
STEPS = 1200
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, STEPS)
for step in range(STEPS):
    z0, eps = courses(3000 + step, 256), normal(5000 + step, 256, 8, 1, 1, 1).float()
    chance = generator(7000 + step)
    known = torch.rand(256, 8, generator=chance) < torch.rand(256, 1, generator=chance)
    known[:, -1] &= ~known.all(1)  # something is left to be found
    level = torch.exp(0.7 * torch.randn(256, generator=chance))
    _, loss = frame_conditioning(net, z0, known, level, eps)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    schedule.step()

# %%
masks = {
    "nothing": [],
    "first": [0],
    "both ends": [0, 7],
    "every second": [0, 2, 4, 6],
}
found, due = [], []
z0, eps = courses(9000, 4000), normal(9001, 4000, 8, 1, 1, 1).float()
for frames_known in masks.values():
    known = torch.zeros(8, dtype=torch.bool)
    known[frames_known] = True
    with torch.no_grad():
        _, loss = frame_conditioning(net, z0, known.expand(4000, 8), torch.ones(4000), eps)
    found.append(float(loss))
    due.append(exact_loss(known, 1.0))
assert found == sorted(found, reverse=True)
assert all(0.95 * least < one < 1.2 * least for one, least in zip(found, due, strict=True))
fig, ax = plt.subplots(figsize=(6.4, 3.0))
place = torch.arange(len(masks))
ax.bar(place - 0.2, found, 0.4, color=COLOURS["model"], label="the network")
ax.bar(place + 0.2, due, 0.4, color=COLOURS["exact"], label="exact")
ax.set_xticks(place, list(masks))
ax.set(xlabel="frames that are known", ylabel="loss, σ = 1")
ax.legend()
plt.show()

# %% [markdown] item="11.7"
# A model that was never told anything can be shown the known frames all the same: *replacement*. Before each call of $D$ the known frames of $x$ are overwritten by the true ones, with noise of that level,
#
# $$x_i \;\leftarrow\; x_{0,i} + \sigma_k\,\epsilon_{k,i}\quad\text{where frame } i \text{ is known}, \qquad\text{then}\qquad x \;\leftarrow\; D(x, \sigma_k) + \frac{\sigma_{k+1}}{\sigma_k}\big(x - D(x, \sigma_k)\big).$$
#
# `sigmas` is `(N + 1,)`, from the largest level to 0; `noise[k]`, of the shape of `x`, is the draw for step $k = 0, \dots, N - 1$. `x0` `(B, T, C, H, W)` is 0 in unknown frames, `known` `(B, T)` bool. `x` comes as pure noise at `sigmas[0]`. In the result the known frames are `x0`.


# %% item="11.7"
def between(D, x: Tensor, sigmas: Tensor, x0: Tensor, known: Tensor, noise: Tensor) -> Tensor:
    """A clip (B, T, C, H, W) whose known frames are x0, the others sampled beside them by replacement."""
    ### BEGIN SOLUTION
    m = known[:, :, None, None, None]
    for k in range(len(sigmas) - 1):
        x = torch.where(m, x0 + sigmas[k] * noise[k], x)
        said = D(x, sigmas[k])
        x = said + sigmas[k + 1] / sigmas[k] * (x - said)
    return torch.where(m, x0, x)
    ### END SOLUTION


# %% item="11.7" tags=["check"]
# NBVAL_CHECK_OUTPUT
between = check("11.7", between)

# %% [markdown]
# Two key frames, the first and the last of eight, in the exact world of 11.4: here both $D$ and what *should* come out are known, and 2000 clips can be compared with it. The frames between lean to the key frames, yet not far enough, and vary
# too much: as long as the noise is large, $D$ sees the key frames behind noise, and when they are clear the frames between are settled already. From frame 0 to 1, and from 6 to 7, the clip jumps.

# %%
course = Mixture.gaussian(torch.zeros(8), C_time)


def D_course(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact Denoiser of clips (B, 8, 1, 1, 1)."""
    return course.denoiser(x.flatten(1), sigma).view_as(x)


keys = torch.zeros(2000, 8, dtype=torch.bool)
keys[:, [0, 7]] = True
ends = torch.zeros(2000, 8, 1, 1, 1).double()
ends[:, 0], ends[:, 7] = 2.0, -1.0
levels = torch.cat([20 * 0.8 ** torch.arange(36), torch.zeros(1)]).double()
fog = normal(12, 36, 2000, 8, 1, 1, 1)
replaced = between(D_course, levels[0] * normal(13, 2000, 8, 1, 1, 1), levels, ends, keys, fog)
truth = course.conditional([0, 7], torch.tensor([2.0, -1.0]))
middle, spread = truth.mean, truth.cov.diagonal().sqrt()


def bands(**clips: Tensor) -> None:
    """Mean and deviation of frames 1 to 6, and what they are exactly."""
    _, ax = plt.subplots(figsize=(6.4, 3.2))
    inner = torch.arange(1, 7)
    ax.fill_between(inner, middle - spread, middle + spread, color=COLOURS["exact"], alpha=0.25)
    ax.plot(inner, middle, color=COLOURS["exact"], label="exact")
    for (name, some), role in zip(clips.items(), ("warn", "model"), strict=False):
        m, s = (one.flatten() for one in (some[:, 1:7].mean(0), some[:, 1:7].std(0)))
        ax.errorbar(
            inner, m, s, fmt="o", capsize=3, color=COLOURS[role], label=name.replace("_", " ")
        )
    ax.plot([0, 7], [2.0, -1.0], "s", color=COLOURS["data"], label="key frames")
    ax.set(xlabel="frame", ylabel="value")
    ax.legend()
    plt.show()


def off(clips: Tensor) -> float:
    """Root mean square error of the means of the frames between."""
    return float((clips[:, 1:7].mean(0).flatten() - middle).square().mean().sqrt())


assert off(replaced) > 4.5 * float(spread.max()) / math.sqrt(2000)
bands(replacement=replaced)

# %% [markdown] item="11.8"
# Ho et al. (2022, *Video Diffusion Models*, Eq. 7) found the same jumps, and mend them by *reconstruction guidance*. The network speaks of the known frames too, and is wrong about them; the unknown frames $x^b$ are moved so that it becomes right. In this course's coordinate $x = x_0 + \sigma\epsilon$, where the paper's $\alpha$ cancels,
#
# $$\tilde D^b(x, \sigma) = D^b(x, \sigma) - \frac{w}{2}\,\nabla_{x^b}\,\big\|x_0^a - D^a(x, \sigma)\big\|^2 .$$
#
# Where frames are known we know the estimate: $\tilde D^a = x_0^a$. The gradient goes through the network, and the sampler runs under `torch.no_grad()`. `x` has the known frames at its level already; `x0` is 0 in unknown frames; `sigma` is 0-d, and each clip has a norm of its own. Return
# $\tilde D$, `(B, T, C, H, W)`, without a graph.


# %% item="11.8"
def reconstruction(D, x: Tensor, sigma: Tensor, x0: Tensor, known: Tensor, w: float) -> Tensor:
    """The guided estimate: x0 in known frames, in the others D's, moved for the sake of the known ones."""
    ### BEGIN SOLUTION
    m = known[:, :, None, None, None]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        said = D(x, sigma)
        square = ((x0 - said)[known] ** 2).sum()
        (slope,) = torch.autograd.grad(square, x)
    return torch.where(m, x0, said.detach() - w / 2 * slope)
    ### END SOLUTION


# %% item="11.8" tags=["check"]
# NBVAL_CHECK_OUTPUT
reconstruction = check("11.8", reconstruction)

# %% [markdown]
# The same key frames, at several $w$. The known frames start at $x_0 + \sigma\epsilon$; since $\tilde D$ is $x_0$ there, each step keeps them on their straight way down, and no replacement is needed. With $w = 0$ this is replacement with one noise for
# all levels, and as far off. A larger $w$ closes the jumps; one that is too large goes beyond.

# %%
begin = torch.where(keys[:, :, None, None, None], ends, 0.0)
begin = begin + levels[0] * normal(14, 2000, 8, 1, 1, 1)
guided = {}
for weight in (0.0, 2.0, 5.0, 12.0):
    D_keys = lambda x, sigma, w=weight: reconstruction(D_course, x, sigma, ends, keys, w)
    guided[weight] = sample(D_keys, begin, levels)
    assert torch.allclose(guided[weight][keys], ends[keys], rtol=0, atol=1e-9)
errors = {weight: off(clips) for weight, clips in guided.items()}
assert errors[5.0] < errors[2.0] < errors[0.0] and errors[5.0] < errors[12.0]
assert errors[5.0] < off(replaced) / 3
bands(replacement=replaced, reconstruction_guidance=guided[5.0])

# %%
fig, ax = plt.subplots(figsize=(6.4, 2.6))
ax.plot(list(errors), list(errors.values()), "o-", color=COLOURS["model"])
ax.axhline(off(replaced), color=COLOURS["warn"], linestyle="dotted", label="replacement")
ax.set(xlabel="w", ylabel="error of the means", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown] item="11.9"
# Does a clip hold together? Two measures, in units of the picture. *Flicker* is what changes faster than motion: the second difference of each pixel, $x_{k+1} - 2 x_k + x_{k-1}$, is 0 where it changes evenly. Its mean size, over all pixels, channels and inner frames of a clip, times $\sqrt{\pi / 12}$, is
# the deviation $s$ of independent Gaussian noise on a still clip, because the second difference of that has the variance $6 s^2$, and the mean size of a Gaussian is $\sqrt{2/\pi}$ of its deviation. The *warping error* asks whether what moves stays itself, where the flow is known,
#
# $$\text{flicker} = \sqrt{\tfrac{\pi}{12}}\,\operatorname{mean}\,|x_{k+1} - 2 x_k + x_{k-1}|, \qquad \text{error} = \operatorname{mean}_{\,p \text{ visible}}\, |x_{k+1}(p + f_k(p)) - x_k(p)| .$$
#
# Lai et al. (2018) measure by flow in this way, with squares. `clips` is `(N, F, 3, H, W)`; `flow[:, k]`, 2 numbers a pixel, leads from frame $k$ to $k + 1$; `visible` `(N, F - 1, 1, H, W)` says which pixels are still seen there. `warp(frames, flow)` looks frames `(M, 3, H, W)` up at $p + f(p)$. Return both, `(N,)` each.


# %% item="11.9"
def coherence(clips: Tensor, flow: Tensor, visible: Tensor, warp) -> tuple[Tensor, Tensor]:
    """Flicker and warping error of each clip, (N,) each."""
    ### BEGIN SOLUTION
    flicker = clips.diff(n=2, dim=1).abs().flatten(1).mean(1) * (torch.pi / 12) ** 0.5
    found = warp(clips[:, 1:].flatten(0, 1), flow.flatten(0, 1)).view_as(clips[:, 1:])
    size = (found - clips[:, :-1]).abs().mean(2, keepdim=True)  # (N, F - 1, 1, H, W)
    error = (size * visible).flatten(1).sum(1) / visible.flatten(1).sum(1)
    return flicker, error
    ### END SOLUTION


# %% item="11.9" tags=["check"]
# NBVAL_CHECK_OUTPUT
coherence = check("11.9", coherence)

# %% [markdown]
# A measure is itself to be measured, on clips of which we know how good they are: sixteen true ones, the same with flicker of deviation 0.03 on them, shuffled, and frozen at their first frame. Frozen clips are "perfect" in both: neither number says anything without one of *motion* beside it. True clips
# are not at 0, since edges pass pixels; so compare with true clips, never with 0.

# %%
rendered = render_clips(draw_clips(16, 1109))
true, flow, visible = rendered.rgb, rendered.flow, rendered.visible
still = true[:, :1].expand_as(true)
kinds = {
    "true": true,
    "true, flicker 0.03": true + 0.03 * normal(15, *true.shape).float(),
    "shuffled": true[:, torch.randperm(8, generator=generator(16))],
    "frozen": still,
}
table = {
    name: [
        float(one.mean())
        for one in coherence(some, 0 * flow if name == "frozen" else flow, visible, warp)
    ]
    for name, some in kinds.items()
}
assert table["true"][0] < table["true, flicker 0.03"][0] < table["shuffled"][0]
assert table["true"][1] < table["true, flicker 0.03"][1] < table["shuffled"][1]
assert max(table["frozen"]) < 1e-5
noisy = still + 0.03 * normal(17, *still.shape).float()
assert abs(float(coherence(noisy, flow, visible, warp)[0].mean()) / 0.03 - 1) < 0.01
fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.6), sharey=True, layout="constrained")
for ax, what, values in zip(
    axes, ("flicker", "warping error"), zip(*table.values(), strict=True), strict=True
):
    ax.barh(list(table), values, color=[COLOURS["exact"], *[COLOURS["warn"]] * 2, COLOURS["muted"]])
    ax.set(xlabel=what)
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# The last item is about a network of clips that is trained already. It has blocks of three parts: an attention over space, one over time, and a layer that sees each number of a pixel alone.


# %%
class Projected(nn.Module):
    """to_out(softmax(q k^T / sqrt(d)) v) of tokens (N, L, C), which knows the order of the steps."""

    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, h: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, h.shape[1])[:, None]
        q, k = self.to_q(h + place), self.to_k(h - place)
        return self.to_out(F.scaled_dot_product_attention(q, k, self.to_v(h)))


class ClipBlock(nn.Module):
    """Space, then time, then each place of each frame alone; clips (B, T, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.space, self.time = Projected(width), Projected(width)
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1).flatten(2).mT  # (B T, H W, C)
        x = x + self.space(tokens).mT.reshape(x.shape)
        x = x + along_time(x, self.time)
        return x + self.mix(x.movedim(2, -1)).tanh().movedim(-1, 2)


class ClipNet(nn.Module):
    """net(x): `blocks`, one after the other."""

    def __init__(self, width: int, count: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(ClipBlock(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# %% [markdown] item="11.10"
# AnimateDiff (Guo et al. 2023, Sec. 4.3) learns a *kind of motion*, a pan or a zoom, from a handful of clips, as a small file beside the trained network: a LoRA, and since motion is what the attention over time makes, there alone,
#
# $$W x \;\to\; W x + \frac{\alpha}{r}\,B A\,x, \qquad A\ (r, c_\text{in}),\quad B\ (c_\text{out}, r),\quad B = 0 \text{ at first.}$$
#
# `net` is as above. In *every* block change the four projections `to_q`, `to_k`, `to_v` and `to_out` of `time`, each an `nn.Linear` without bias, and nothing else; `start(layer)` gives where the $A$ of that layer starts, $r$ rows. Then take `steps` steps of
# the loss $\operatorname{mean}\,(\text{net}(x) - \text{target})^2$, in which all $A$ and $B$ learn and no weight of `net` does. `optimiser_of(list_of_parameters)` gives an optimiser with `zero_grad()` and `step()`. Return `net(x)` before each step and after the last, `(steps + 1, B, T, C, H, W)`, without a
# graph. `net` is yours to change: put new modules in place of its layers.


# %% item="11.10"
def motion_lora(
    net, start, alpha: float, x: Tensor, target: Tensor, optimiser_of, steps: int
) -> Tensor:
    """net(x) before each step and after the last, (steps + 1, B, T, C, H, W); all A and B learn."""
    ### BEGIN SOLUTION
    from torch import nn

    class LowRank(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.A = layer, nn.Parameter(start(layer))
            self.B = nn.Parameter(self.A.new_zeros(len(layer.weight), len(self.A)))

        def forward(self, h):
            return self.layer(h) + alpha / len(self.A) * h @ self.A.T @ self.B.T

    net.requires_grad_(False)
    learns = []
    for block in net.blocks:
        for name in ("to_q", "to_k", "to_v", "to_out"):
            changed = LowRank(getattr(block.time, name))
            setattr(block.time, name, changed)
            learns += [changed.A, changed.B]
    optimiser, seen = optimiser_of(learns), []
    for step in range(steps + 1):
        y = net(x)
        seen.append(y.detach())
        if step < steps:
            optimiser.zero_grad()
            ((y - target) ** 2).mean().backward()
            optimiser.step()
    return torch.stack(seen)
    ### END SOLUTION


# %% item="11.10" tags=["check"]
# NBVAL_CHECK_OUTPUT
motion_lora = check("11.10", motion_lora)

# %% [markdown]
# How large must the rank be? A *teacher* moves things as `net` does, but for a change of rank 2 in each projection over time. With rank 2 or more the change is found; with rank 1 part of it stays out of reach. Beside it the numbers that such a file
# has for the motion module of `mini-sd`: a few hundredths of the module itself.

# %%
WIDTH, TRIES = 16, 200
clips_in = normal(18, 16, 6, WIDTH, 2, 2).float()


def moved(seed: int, rank: int, size: float) -> ClipNet:
    """The trained network, with a random change of this rank in what looks along time."""
    torch.manual_seed(19)
    net = ClipNet(WIDTH)
    for block in net.blocks:
        for k, weight in enumerate(block.time.parameters()):
            a, b = normal(seed + k, 2, WIDTH, rank).float()
            weight.data += size / WIDTH * a @ b.mT
    return net


with torch.no_grad():
    base, wanted = moved(20, 2, 0.0)(clips_in), moved(20, 2, 0.5)(clips_in)
learned = {}
for rank in (1, 2, 4):
    student, chance = moved(20, 2, 0.0), generator(21)
    begin_at = lambda layer, r=rank, g=chance: torch.randn(r, WIDTH, generator=g) / WIDTH**0.5
    adam = lambda weights: torch.optim.Adam(weights, 0.01)
    ys = motion_lora(student, begin_at, float(rank), clips_in, wanted, adam, TRIES)
    assert torch.allclose(ys[0], base, rtol=0, atol=1e-5)
    learned[rank] = ((ys - wanted) ** 2).flatten(1).mean(1) / ((base - wanted) ** 2).mean()
assert learned[2][-1] < 0.05 < learned[1][-1]
module = motion_of(model.denoiser.net)
places = [m for n, m in module.named_modules() if isinstance(m, nn.Linear) and ".attn" in n]
ranks, whole = [1, 2, 4, 8, 16], sum(weight.numel() for weight in module.parameters())
share = [r * sum(sum(m.weight.shape) for m in places) / whole for r in ranks]
fig, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.8), layout="constrained")
for (rank, curve), role, look in zip(
    learned.items(), ("warn", "other", "model"), (":", "--", "-"), strict=True
):
    left.plot(curve, look, color=COLOURS[role], label=f"rank {rank}")
left.set(xlabel="step", ylabel="error / error at first", yscale="log")
left.legend()
right.plot(ranks, [100 * one for one in share], "o-", color=COLOURS["data"])
right.set(xlabel="rank", ylabel="% of the motion module", ylim=(0, None))
plt.show()

# %% [markdown]
# ---
# Done? `course progress` in a terminal lists what you have solved. Next: lecture 12, where the clip exists already, and is to be changed.
