# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 11 Video diffusion
#
# **How a model of pictures becomes a model of clips.** A clip is frames that belong together. A text-to-image model draws each of them well, and no two of the same thing: it was never told that there is a next one. This lecture puts layers between its layers that look along time, trains *them alone*, and measures what that gives.
#
# After it you can
#
# - fold the frames of a clip into the batch, inflate a 2-D network, and say why it starts as the image model, to the last bit;
# - write factorised space-time attention, pseudo-3D layers, Video LDM's mixing and AnimateDiff's motion module, and count what they cost;
# - say why frames are started from noise that they share, and derive its covariance;
# - predict and interpolate frames, by a model that is told which are known and by one that is not;
# - draw clips longer than the model, and say where they drift;
# - judge clips, and not be fooled by a frozen one;
# - move a personalised image model, and add one kind of motion from few clips.
#
# You need lectures 02, 04, 05 and 07. Time: 120 minutes. Everything runs on a laptop, with no network.

# %%
import warnings
from itertools import pairwise

import torch
from diffusers import AnimateDiffPipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import study, zoo
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.gaussians import Mixture
from course_lib.guidance import cfg
from course_lib.metrics import flops
from course_lib.nets.temporal import (
    Context,
    ConvBlock,
    Mixed,
    RelativeAttention,
    TemporalAttention,
    from_time,
    inflate_conv,
    to_time,
)
from course_lib.posterior import replacement
from course_lib.posterior.moments import Relay, moments
from course_lib.sample import sample
from course_lib.steps import ddpm
from course_lib.study import video_pictures as figures
from course_lib.study.clips import filmstrip, play
from course_lib.study.control_pictures import few
from course_lib.study.video import VideoExplorer
from course_lib.training import denoising_loss, fit
from course_lib.video.animatediff import from_diffusers, motion_of, to_diffusers
from course_lib.video.conditioning import (
    by_parts,
    decay,
    enlarged,
    frames_seen,
    hierarchy,
    reconstructed,
    trip,
    windows,
)
from course_lib.video.inflation import (
    Inflated,
    factorised_of,
    inflated,
    mixed,
    pseudo_3d_of,
    video_ldm_of,
)
from course_lib.video.masks import context, every, first
from course_lib.video.measures import flicker, identity, smoothness
from course_lib.video.noise import KINDS, correlated, covariance
from course_lib.video.tracking import shares
from course_lib.worlds.scenes.clip_captions import directions, motion_captions, parse_motion
from course_lib.worlds.scenes.clips import MOTIONS, draw_clips, render_clips
from course_lib.zoo import image_to_video, judge_video, long_clips, video, videos
from course_lib.zoo.recipes.video import STAGES
from course_lib.zoo.video import clips_of, frames_of, split

torch.set_num_threads(1)
study.use()
model = zoo.load("mini-video", device="cpu")
motion = {
    name: zoo.load(f"mini-{name}", device="cpu") for name in ("motion", "motion-zoom", "motion-pan")
}
styled = zoo.load("mini-style", device="cpu")
decoder = zoo.load("mini-video-decoder", device="cpu")
reader, motions = zoo.load("scenes-reader", device="cpu"), zoo.load("scenes-motion", device="cpu")
image, T = model.image, model.frames
LEVELS = image.schedule.sigma(torch.arange(1000)).float()

drawn = draw_clips(24, 1111, objects=1, frames=T)  # new ones: nothing was trained on them
captions, true = motion_captions(drawn, 1111), render_clips(drawn)
scenes = [split(caption)[0] for caption in captions]
with torch.no_grad():
    z = image.encode(true.rgb.flatten(0, 1)).unflatten(0, true.rgb.shape[:2])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Above, `mini-sd` of lecture 05 draws the eight frames of each clip one by one: the right thing each time, and another one. Below, the same weights with temporal layers between them, `mini-video`, which were told what moves.

# %% slideshow={"slide_type": "-"}
PROMPTS = (
    "a large blue cube on sand, sliding right",
    "a large green cone on grass, bouncing",
    "a large orange mug, while the camera rolls to the right",
)
moved = clips_of(model, PROMPTS, seed=1)
with mixed(model.denoiser.net, 0.0):  # the temporal layers are off, and each frame has its noise
    alone = clips_of(model, [split(prompt)[0] for prompt in PROMPTS], seed=1, shared=0.0)
names = [split(prompt)[1] for prompt in PROMPTS]
play(
    few(torch.cat([alone[:2], moved[:2]]), 17),
    scale=2,
    columns=2,
    titles=["frame by frame"] * 2 + names[:2],
)

# %%
filmstrip(few(torch.stack([alone[2], moved[2]]), 17), ["frame by frame", "camera rolls"])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A clip is a tensor
#
# $b$ clips of $t$ frames with $c$ channels, $h\times w$ places each: $x\in\mathbb R^{[b,t,c,h,w]}$, frames before channels. There are two ways to look at it, and all of this lecture lives on going from one to the other:
#
# - **space**: a layer of the image model sees $[b\,t,\,c,\,h,\,w]$, frames as if they were a larger batch. A convolution $W$ gives $y_t=W*x_t$ in each frame. As one over time and space it would be $1\times3\times3$ (*inflated*; Video Diffusion Models, Ho et al. 2022): the same numbers.
# - **time**: a temporal layer sees $[b\,h\,w,\,t,\,c]$, at each place a sequence of $t$ frames.

# %% slideshow={"slide_type": "-"}
figures.space_then_time()

# %%
conv, x = image.net.conv_in, SampleNoise(0)(torch.empty(2, T, *image.shape))
with torch.no_grad():
    folded = conv(x.flatten(0, 1)).unflatten(0, (2, T))  # [b t, c, h, w]
    over_time = inflate_conv(conv)(x.transpose(1, 2)).transpose(
        1, 2
    )  # 1 x 3 x 3 on [b, c, t, h, w]
assert torch.allclose(folded, over_time, atol=1e-5)
assert torch.equal(from_time(to_time(x), x.shape), x)
study.source(to_time, from_time)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Attention along time
#
# At one place, $h_i\in\mathbb R^c$ is frame $i$ of the sequence, $q_i,k_i,v_i$ its query, key and value of width $d$. Every frame looks at every other:
# $$\boxed{\;h_i\;\leftarrow\;h_i+W_{\text{out}}\sum_j\operatorname{softmax}_j(e_{ij})\,v_j,\qquad e_{ij}=\frac{q_i^\top(k_j+a_{j-i})}{\sqrt d}\;}$$
# $a_{j-i}$ is a learned vector for each distance in time (Shaw et al. 2018). Without it nobody knows which frame comes first: attention is a function of a *set*. Space and time in turn, and not all $t\,h\,w$ tokens at once, is **factorised** attention: $t^2$ pairs at each of $h\,w$ places, in place of $(t\,h\,w)^2$.
#
# **The identity at first.** $W_{\text{out}}=0$, so that $h\leftarrow h$, and the network of clips is the image model, frame by frame. What it knows is there from the first step. Four ways to do it, each with its own zero:
#
# | | layers | at first |
# |---|---|---|
# | Video Diffusion Models (Ho et al. 2022) | attention with $a_{j-i}$ behind spatial attention | $W_{\text{out}}=0$ |
# | Make-A-Video (Singer et al. 2022) | $\mathrm{Conv1D}(\mathrm{Conv2D}(x))$ and attention | $\mathrm{Conv1D}$ the identity, $W_{\text{out}}=0$ |
# | Video LDM (Blattmann et al. 2023) | 3-D convolutions and attention, mixed with the spatial layer | last weights 0 |
# | AnimateDiff (Guo et al. 2023) | a small transformer along time | last weights 0 |

# %% slideshow={"slide_type": "-"}
study.source(RelativeAttention.forward, TemporalAttention.forward)

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*: on the U-Net of `mini-sd` all four start as it, to the last bit; and they are cheap. Counted in multiplications and additions at $t$ frames, as a share of the image model's; and how that share grows when $t$ doubles: what is linear in $t$ costs each frame the same, and of attention only $q^\top k$ and the sum over $v$, which are quadratic, cost more.

# %% slideshow={"slide_type": "-"}
WAYS = {
    "Video Diffusion Models": factorised_of,
    "Make-A-Video": pseudo_3d_of,
    "Video LDM": video_ldm_of,
    "AnimateDiff": motion_of,
}
told, level = image.embed(scenes[:2]), torch.tensor(1.0)
by_image = image.denoiser.given(**{name: c.repeat_interleave(T, 0) for name, c in told.items()})


def cost(net, t):
    """Operations of one call for a clip of t frames."""
    one = {name: c[:1] for name, c in told.items()}
    with sdpa_kernel(SDPBackend.MATH):  # attention as the two products that it is
        return flops(lambda: net(torch.zeros(1, t, *image.shape), level, **one))


print(f"{'':24s}" + "".join(f"{f'{t} frames':>11s}" for t in (4, 8, 16)) + f"{'weights':>12s}")
for name, make in WAYS.items():
    temporal = make(image.denoiser.net)
    D, added = inflated(image.denoiser, temporal), {}
    with torch.no_grad():
        start = by_image(x.flatten(0, 1), level).view_as(x)
        assert torch.equal(D.given(**told)(x, level), start)
    for t in (4, 8, 16):
        with mixed(D.net, 0.0):
            spatial = cost(D.net, t)
        added[t] = cost(D.net, t) - spatial
        added[f"{t} share"] = added[t] / spatial
    assert all(2 <= added[2 * t] / added[t] < 2.2 for t in (4, 8))
    shares_of = "".join(f"{added[f'{t} share']:11.1%}" for t in (4, 8, 16))
    print(f"{name:24s}{shares_of}{zoo.parameters(temporal):12,}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Video LDM: a layer, and how much of it is heard
#
# $z$ is what a spatial layer gives, $\ell$ the temporal layer behind it, $z'=\ell(z)$. Video LDM keeps all spatial layers *frozen* and learns $\ell$ and one number $a$ for each pair:
# $$\boxed{\;z\;\leftarrow\;\alpha\,z+(1-\alpha)\,z',\qquad\alpha=\operatorname{sigmoid}(a)\in(0,1)\;}$$
# What moves in which step? Let $g$ be the gradient of the loss $L$ at the mixed output. With $\ell(z)=z+Wu$, $W=0$ the last weights and $u$ what the rest of the layer makes of $z$,
# $$\frac{\partial L}{\partial a}=\alpha(1-\alpha)\,\langle g,\,z-z'\rangle,\qquad\frac{\partial L}{\partial W}=(1-\alpha)\,g\,u^\top,\qquad\frac{\partial L}{\partial u}=(1-\alpha)\,W^\top g.$$
# At first $z'=z$ and $W=0$. So **step 1** moves $W$ alone, since $u\neq0$: $\alpha$ does not move, because there is nothing yet to choose between. **Step 2** moves all of it. *Claim*: measured with plain gradient descent on true clips, what should not move has a gradient of exactly 0.

# %% slideshow={"slide_type": "-"}
study.source(Mixed.forward)

# %%
fresh = video_ldm_of(image.denoiser.net, T)


def part_of(name):
    """Which of the three a weight of the temporal layers belongs to."""
    last = ".to_out." in name or ".conv." in name
    return "a, of α" if name.endswith(".a") else "W, last weights" if last else "what makes u"


def loss_of(temporal, x0, sigma, eps, text):
    """The loss that mini-sd was trained with, on clips."""
    D = inflated(image.denoiser, temporal).given(encoder_hidden_states=text)
    return denoising_loss(D, x0, sigma, eps, "v")


text = image.embed(scenes)["encoder_hidden_states"].detach()
sizes, optimizer = {}, torch.optim.SGD(fresh.parameters(), lr=0.3)
for step in range(2):
    eps = correlated(SampleNoise(step)(z[:4]), 2.0)
    optimizer.zero_grad()
    loss_of(fresh, z[:4], LEVELS[[150, 350, 550, 750]], eps, text[:4]).mean().backward()
    for name, weight in fresh.named_parameters():
        size = 0.0 if weight.grad is None else float(weight.grad.square().sum())
        sizes.setdefault(part_of(name), [0.0, 0.0])[step] += size
    optimizer.step()
print(f"{'size of the gradient':22s}{'step 1':>12s}{'step 2':>12s}")
for name, of_steps in sizes.items():
    print(f"{name:22s}" + "".join(f"{s**0.5:12.1e}" if s else f"{'0':>12s}" for s in of_steps))
assert {name: s[0] > 0 for name, s in sizes.items()} == {name: name[0] == "W" for name in sizes}
assert all(of_steps[1] > 0 for of_steps in sizes.values())

# %% [markdown] slideshow={"slide_type": "slide"}
# **Off at any time.** With $m$ in place of 1, $z\leftarrow z+m\,(1-\alpha)(z'-z)$: $m=0$ is the image model, *later* as well as at first, since none of its weights ever moved. *Claims*: on the trained `mini-video` it is so to the last bit; frames then depend on themselves alone, and with $m=1$ on each other. And what $m$ does to clips, on validation prompts (`python -m course_lib.zoo.videos mixing`): the share in which the motion that was asked for is read, by a network that was trained on true clips (`scenes-motion`), and flicker, which a section below defines: at $m=0$ it is least, since frames from one noise are then all but one picture.

# %% slideshow={"slide_type": "-"}
D = model.denoiser.given(**model.embed(captions[:2]))
other = x.clone()
other[:, 3] = SampleNoise(1)(x[:, 3])  # another frame 3
leans = {}
with torch.no_grad():
    for m in (0.0, 1.0):
        with mixed(model.denoiser.net, m):
            found = D(x, level)
            leans[m] = (D(other, level) - found).square().mean((0, 2, 3, 4)).sqrt()
            if m == 0:
                assert torch.equal(found, by_image(x.flatten(0, 1), level).view_as(x))
for m, change in leans.items():
    print(f"m = {m:g}: frame 3 is another, and D changes by", " ".join(f"{c:.2f}" for c in change))
elsewhere = torch.arange(T) != 3
assert not leans[0.0][elsewhere].any() and leans[1.0][elsewhere].min() > 0.01
alphas = torch.cat([one.alpha for one in model.temporal.modules() if isinstance(one, Mixed)])
print(f"α of {len(alphas)} layers, 0.5 at first: {alphas.min():.2f} to {alphas.max():.2f}")

# %%
card = zoo.card("mini-video")["metrics"]
by_mixing = videos.rows("mixing")
ends = {row["m"]: row for row in by_mixing}
assert ends[1.0]["word"] > ends[0.0]["word"] + 0.3 and ends[1.0]["frechet"] < ends[0.0]["frechet"]
figures.settings(
    by_mixing,
    "m",
    "mixing m",
    {"word": "motion read as asked", "flicker": "flicker", "identity": "shape and colour kept"},
    {"true clips": card["true clips"]},
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Noise that frames share
#
# Frames of a clip look alike. Should their noise $\epsilon_i$ be independent? PYoCo (Ge et al. 2023) gives them something in common, in one of two ways. With $\epsilon_{\text{shared}}$ and all $\epsilon^{\text{own}}_i$ independent and standard normal,
# $$\text{mixed:}\quad\epsilon_i=\frac{a\,\epsilon_{\text{shared}}+\epsilon^{\text{own}}_i}{\sqrt{1+a^2}},\qquad\text{progressive:}\quad\epsilon_0=\epsilon^{\text{own}}_0,\quad\epsilon_i=\frac{a\,\epsilon_{i-1}+\epsilon^{\text{own}}_i}{\sqrt{1+a^2}}.$$
# Each frame alone has variance $\frac{a^2+1}{1+a^2}=1$: what the frozen layers know. Between frames, with $\rho=a/\sqrt{1+a^2}$,
# $$\boxed{\;\mathbb E[\epsilon_i\epsilon_j]=\rho^2\quad(i\neq j),\qquad\text{or}\qquad\mathbb E[\epsilon_i\epsilon_j]=\rho\,\mathbb E[\epsilon_{i-1}\epsilon_j]=\dots=\rho^{|i-j|}.\;}$$
#
# **Why it matters.** The sampler is deterministic: noise decides the scene. What no word fixes, the ground, the light, the view, the frozen layers read out of the noise of *their own frame*. At $a=0$ each frame chooses for itself, and thin temporal layers have to overrule them all. As $a\to\infty$ all frames start as one picture, and only what differs is left to be done. There is a second side to it: with $T$ frames that show the same, their mean has noise of variance
# $$\operatorname{Var}\Big[\tfrac1T\textstyle\sum_i\epsilon_i\Big]=\frac1T+\Big(1-\frac1T\Big)\rho^2,$$
# a $T$-th at $a=0$: a model of clips sees through independent noise what an image model cannot, and $\sigma_{\max}$ is too small for it. At large $a$ it is 1, as the image model has it. The price: *between* two frames the noise has variance $\mathbb E(\sigma\epsilon_i-\sigma\epsilon_j)^2=2\sigma^2(1-\rho^2)=\tfrac{2\sigma^2}{1+a^2}$, so that at $a=40$ and $\sigma_{\max}$ a noisy true clip shows what moves, where a sampler starts from noise that shows nothing. So `mini-video` is trained, and sampling starts, at levels up to $\sigma=600$.

# %% slideshow={"slide_type": "-"}
n = 20_000
for kind in KINDS:
    due = covariance(T, 2.0, kind)
    eps = correlated(SampleNoise(3)(torch.empty(n, T, 1, dtype=torch.float64)), 2.0, kind)[..., 0]
    gap = float((eps.T @ eps / n - due).abs().max())
    print(
        f"{kind:12s} a = 2: ρ(0, 1) = {due[0, 1]:.2f}, ρ(0, 7) = {due[0, 7]:.2f}; measured within {gap:.3f}"
    )
    assert gap < 5 * (2 / n) ** 0.5  # standard errors of a covariance of n draws
means = [float(covariance(T, a).mean()) for a in (0.0, 2.0, 10.0)]
print("variance of the noise of the mean of 8 frames, a = 0, 2, 10:", [round(v, 3) for v in means])
assert abs(means[0] - 1 / T) < 1e-12

# %% [markdown] slideshow={"slide_type": "-"}
# *Look*: one prompt and one draw of noise, with more and more in common. And over $a$ on the validation prompts (`... videos noise`). *Claim*: the more the frames have in common at the start, the less clips flicker and the nearer they come to true ones. Whether sampling starts above $\sigma_{\max}$ (`... videos start`) turns out to make no difference to these 56 prompts: a difference below $0.12$, two standard errors, would not be seen.

# %%
SAID, shared = "a small green cone, while the camera orbits to the left", (0.0, 2.0, model.shared)
print("in training a =", *(stage["shared"] for stage in STAGES), "in turn; in use", model.shared)
filmstrip(
    few(torch.cat([clips_of(model, [SAID], seed=4, shared=a) for a in shared]), 17),
    [f"a = {a:g}" for a in shared],
    every=2,
)

# %%
by_noise = videos.rows("noise")
own, common = (pick(by_noise, key=lambda row: row["shared"]) for pick in (min, max))
for name in ("frechet", "flicker"):
    assert common[name] < own[name] / 3
began = {row["above"]: row["word"] for row in videos.rows("start")}
print(
    f"motion read as asked: from σ = {model.sigmas(20)[0]:.0f} {began[True]:.0%}, from σ = {image.sigmas(20)[0]:.1f} {began[False]:.0%}"
)
p = began[True]
assert abs(p - began[False]) < 2 * (2 * p * (1 - p) / 56) ** 0.5
figures.settings(
    by_noise,
    "shared",
    "a",
    {"word": "motion read as asked", "flicker": "flicker", "frechet": "Fréchet video distance"},
    {"true clips": card["true clips"]},
    log=True,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Temporal layers, trained here and now
#
# The loss is that of lecture 05, over clips; $\Theta$, the image model, is frozen, and $\phi$, the temporal layers, learn:
# $$L(\phi)=\mathbb E_{x_0,\sigma,\epsilon}\big[\lambda(\sigma)\,\lVert D_{\Theta,\phi}(x_0+\sigma\epsilon,\sigma)-x_0\rVert^2\big],\qquad\epsilon\text{ with noise in common}.$$
# At first $L(\phi)$ is the image model's. *Claim*: after 50 steps on eight clips it is far lower on the same clips with the same noise, and lower on sixteen that it never saw.

# %% slideshow={"slide_type": "-"}
LEARNT, SHARED, BATCH = torch.arange(8), 10.0, 4


def draw(source):
    """Clips of the eight, levels spread evenly over time, noise, and texts."""
    rows = LEARNT[torch.randint(len(LEARNT), (BATCH,), generator=source)]
    t = (torch.arange(BATCH) + torch.rand(BATCH, generator=source)) / BATCH * 1000
    eps = torch.randn(BATCH, *z.shape[1:], generator=source)
    return z[rows], LEVELS[t.long()], correlated(eps, SHARED), text[rows]


run = fit(
    video_ldm_of(image.denoiser.net, T), draw, loss_of,
    steps=50, lr=5e-3, ema_decay=0.9, nhwc=False, device="cpu", progress=False,
)  # fmt: skip
levels = LEVELS[(torch.arange(24) * 7 % 24 * 1000 + 500) // 24]  # even in time, in both sets
with torch.no_grad(), autocast("cpu"):
    eps = correlated(SampleNoise(5)(z), SHARED)
    before = loss_of(video_ldm_of(image.denoiser.net, T), z, levels, eps, text)
    after = loss_of(run.net, z, levels, eps, text)
for name, rows in (("its eight clips", slice(8)), ("sixteen others", slice(8, None))):
    both = [float(part[rows].mean()) for part in (before, after)]
    print(f"{name:16s} the image model {both[0]:.4f}, with temporal layers {both[1]:.4f}")
    assert both[1] < (0.7 if name.startswith("its") else 0.97) * both[0]
facts = zoo.card("mini-video")
print(
    f"mini-video: {facts['steps']:,} steps, {facts['seconds'] / 60:.0f} minutes on {facts['hardware']}; {facts['data']}"
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How clips are judged
#
# $x_k$ is frame $k$ of $F$. What is faster than motion is in the second difference of each pixel, which is 0 where it changes evenly:
# $$\text{flicker}=\sqrt{\tfrac{\pi}{12}}\;\operatorname{mean}\,\lvert x_{k+1}-2x_k+x_{k-1}\rvert .$$
# For independent noise of deviation $s$ on a still clip its variance is $(1+4+1)\,s^2$, and a Gaussian of deviation $\sqrt6\,s$ has the mean size $\sqrt6\,s\sqrt{2/\pi}=s\sqrt{12/\pi}$: flicker is that $s$. Then
#
# - *smoothness*: the mean cosine between a reader's features of neighbouring frames;
# - *identity*: the share of frames in which shape and colour are read that the text names;
# - *motion*: the share of clips in which motion and direction are read that were asked for: by `scenes-motion`, and (*tracked*) by the exact geometry of each motion, which finds the amount that explains the change best;
# - **Fréchet video distance** (Unterthiner et al. 2018): between Gaussians with the means $m$ and covariances $C$ of the *clips'* features of two sets, $\lvert m-m'\rvert^2+\operatorname{tr}\big(C+C'-2(CC')^{1/2}\big)$. A feature that says nothing of time would not see motion: here they are what frames show, and how fast and how unsteadily that changes.
#
# A measure must be measured first, on clips of which it is known how good they are. *Claim*: by every measure of coherence a **frozen** clip is best, better than the truth. So coherence says nothing without motion beside it.

# %% slideshow={"slide_type": "-"}
wanted, words = [parse_motion(text).scene for text in captions], [MOTIONS[k] for k in drawn.motion]
ways = directions(drawn)
order = torch.rand(24, T, generator=generator(6)).argsort(1)


def judge(x):
    """What the measures say of clips of the 24 captions."""
    found = motions.read(x)
    return {
        "flicker": float(flicker(x).mean()),
        "smoothness": float(smoothness(x, reader).mean()),
        "identity": float(identity(x, reader, wanted)["both"].double().mean()),
        "motion": shares(found, words, ways)["word"],
        "direction": shares(found, words, ways)["direction"],
    }


judged = {
    "true": judge(true.rgb),
    "with noise 0.1": judge(true.rgb + 0.1 * SampleNoise(7)(true.rgb)),
    "shuffled": judge(true.rgb[torch.arange(24)[:, None], order]),
    "frozen": judge(true.rgb[:, :1].expand_as(true.rgb)),
}


def table(rows, keys):
    """Numbers of each row under the names of their keys; a dash where there is none."""
    wide = max(map(len, rows)) + 2
    print(" " * wide + "".join(f"{key:>12s}" for key in keys))
    for name, row in rows.items():
        numbers = (f"{row[key]:12.3f}" if key in row else f"{'–':>12s}" for key in keys)
        print(f"{name:{wide}s}" + "".join(numbers))


table(judged, judged["true"])
frozen, others = judged["frozen"], [row for name, row in judged.items() if name != "frozen"]
assert frozen["flicker"] == 0 and all(row["flicker"] > 0 for row in others)
assert frozen["smoothness"] > max(row["smoothness"] for row in others)
assert judged["shuffled"]["flicker"] > 2 * judged["true"]["flicker"]
assert (
    judged["true"]["motion"] > 0.8 > 0.3 > max(judged[k]["motion"] for k in ("shuffled", "frozen"))
)

# %% [markdown] slideshow={"slide_type": "slide"}
# `mini-video` on 200 test prompts (its card): beside true clips, these through the VAE, which is the floor, and the image model frame by frame. *Claims*: flicker at most $1.5$ times that of true clips, shape and colour right in nine frames of ten, and a Fréchet distance of at most a third of the frame-by-frame one. Of the two judges of motion the second is the stricter: where they differ, a motion is recognised and not exact, its amount uneven or the shape another on the way.

# %% slideshow={"slide_type": "-"}
seeds = {name: row for name, row in card.items() if name.startswith("seed")}
kinds = {name: card[name] for name in ("true clips", "true clips, reconstructed", "frame by frame")}
kinds |= {f"mini-video, {name}": row for name, row in seeds.items()}
MEASURES = ("word", "direction", "tracked", "identity", "flicker", "frechet")
table(kinds, MEASURES)
for row in seeds.values():
    assert row["flicker"] <= 1.5 * card["true clips"]["flicker"] and row["identity"] >= 0.9
    assert row["frechet"] <= card["frame by frame"]["frechet"] / 3
    assert row["word"] > card["frame by frame"]["word"] + 0.3
points = {
    "frame by frame": card["frame by frame"],
    "mini-video": card["seed 0"],
    **{
        name: {"flicker": judged[name]["flicker"], "word": judged[name]["motion"]}
        for name in ("shuffled", "frozen")
    },
}
figures.against(
    {name: (row["flicker"], row["word"]) for name, row in points.items()},
    "flicker",
    "motion read as asked",
    (card["true clips"]["flicker"], card["true clips"]["word"]),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Frames that are known
#
# To go on with a clip, or to fill it in, the network is told. $m_i=1$ where frame $i$ is known and 0 elsewhere, $z$ are the clean latents; each frame gets more channels,
# $$c=[\,m\odot z,\;m\,],\qquad h\;\leftarrow\;h+W_c*c\quad\text{behind the first convolution, }W_c=0\text{ at first}$$
# (Video LDM, Sec. 3.2). The mask must be told beside the frames, since a frame of zeros is a picture too. In training $m$ is drawn anew for each clip, from none to all but one, and the loss is over *unknown* frames. One network then draws from nothing, **predicts** (the first frames known), **interpolates** (key frames known), and shows a picture in motion (the first frame known).

# %% slideshow={"slide_type": "-"}
study.source(context, Context.forward)

# %% [markdown] slideshow={"slide_type": "-"}
# *Look*: key frames of a new clip; what lies between them, blended and drawn. A blend fades one out and the other in; what moves has to be *somewhere else*. Frame 7 is after the last key frame: the blend repeats it, the model predicts.

# %%
KNOWN, shown = every(T, 3), [i for i, word in enumerate(words) if word == "slide"][:2]
filled = clips_of(model, [captions[i] for i in shown], videos.known_w(), known=KNOWN, z=z[shown])
through = frames_of(model, z[shown])
keys, blended = figures.hidden(through[1], KNOWN), videos.blend(through, KNOWN)[1]
rows = {"key frames": keys, "blended": blended, "drawn": filled[1], "true": true.rgb[shown[1]]}
filmstrip(few(torch.stack(list(rows.values()))), list(rows))

# %% [markdown] slideshow={"slide_type": "slide"}
# Measured on test clips in which the object itself moves (`... videos known`, three seeds): peak signal-to-noise ratio in dB, over pixels of the moving object, of the frames between. *Reconstructed* are the true frames through the VAE: more than that cannot be had in these latents. *Claim*: with each of these masks and each seed the model is nearer to the truth than the blend of key frames, or than the last known frame held. It is far from what its latents could hold: much of a moving thing is made up anew.

# %% slideshow={"slide_type": "-"}


def by(rows, *names):
    """The values of `names` -> the rows that have them, which differ in their seeds."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return {key if len(key) > 1 else key[0]: held for key, held in found.items()}


def mean(rows, key):
    """Over the seeds."""
    return sum(row[key] for row in rows) / len(rows)


known = by(videos.rows("known"), "keys")
numbers = ("drawn", "blended", "reconstructed")
table({keys: {name: mean(rows, name) for name in numbers} for keys, rows in known.items()}, numbers)
gains = {keys: min(row["drawn"] - row["blended"] for row in rows) for keys, rows in known.items()}
print(
    "dB above the blend, the worst of three seeds:",
    {keys: round(g, 2) for keys, g in gains.items()},
)
assert min(gains.values()) > 0 and gains["both ends"] > 2

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Without training for it
#
# A model of whole clips that was told nothing can be steered. $x=x_0+\sigma\epsilon$ is the noisy clip, $x^a$ the known frames, $x^b$ the others. What is wanted is $\mathbb E[x_0\mid x,x_0^a]$. By Bayes and by Tweedie's formula, $D=x+\sigma^2\nabla_x\log p(x)$ (lecture 02),
# $$\nabla_x\log p(x\mid x_0^a)=\nabla_x\log p(x)+\nabla_x\log p(x_0^a\mid x)\quad\Rightarrow\quad\mathbb E[x_0\mid x,x_0^a]=D(x,\sigma)+\sigma^2\,\nabla_x\log p(x_0^a\mid x).$$
# That is exact. **Replacement** (Song et al. 2021) leaves the second term out, and overwrites the known frames of $x$ by $x_0^a+\sigma\epsilon$: the others are moved towards $\mathbb E[x_0^b\mid x]$, which knows the key frames only behind noise. **Reconstruction guidance** (Ho et al. 2022, Eq. 7) takes $p(x_0^a\mid x)\approx\mathcal N\big(D^a(x,\sigma),\,\tfrac{\sigma^2}{w_r}I\big)$:
# $$\boxed{\;\tilde D=D-\frac{w_r}2\,\nabla_x\big\lVert x_0^a-D^a(x,\sigma)\big\rVert^2\;}$$
# The network speaks of known frames too, and is wrong about them; the others move so that it becomes right. The price is a pass back through the network in each step.

# %% slideshow={"slide_type": "-"}
study.source(reconstructed)

# %% [markdown] slideshow={"slide_type": "-"}
# Where frames are Gaussian all of this can be *computed*: one pixel over eight frames, neighbours with a correlation of $0.9$, both ends known. Each step is affine in $x$ and the noise, so that the law of what is drawn follows without a sample. *Claim*: replacement stays too far from the known frames; guidance halves its error.

# %%
F64, SHAPE = torch.float64, (T, 1, 1, 1)
i = torch.arange(T, dtype=F64)
pixel = Mixture.gaussian(torch.zeros(T), 0.9 ** (i[:, None] - i).abs())
keys, clip = every(T, T - 1), torch.zeros(1, *SHAPE, dtype=F64)
clip[0, 0], clip[0, -1] = 2.0, -1.0
grid = torch.cat([torch.logspace(1.3, -1.7, 30, dtype=F64), torch.zeros(1, dtype=F64)])


def law(w_r):
    """Mean and deviation (T,) of the frames that `conditioning.fill` draws, exactly."""
    noise, A = Relay(), frames_seen(keys, SHAPE)
    step = replacement(ddpm(noise), A, A(clip), noise)
    D = reconstructed(pixel.denoiser, clip, keys, w_r) if w_r else pixel.denoiser

    def flat(D, x, sigma, sigma_next, memory=None):
        x, memory = step(D, x.view(-1, *SHAPE), sigma, sigma_next, memory)
        return x.flatten(1), memory

    begin = torch.zeros(T, dtype=F64), grid[0] ** 2 * torch.eye(T, dtype=F64)
    m, C = moments(flat, D, noise, grid, *begin)
    return m, C.diagonal().clamp_min(0).sqrt()


exact = pixel.posterior(torch.eye(T, dtype=F64)[keys], clip.flatten()[keys], 0.0)
best = exact.means[0], exact.covs[0].diagonal().clamp_min(0).sqrt()
laws = {"replacement": law(0.0), "guidance, $w_r$ = 2": law(2.0)}
off = {name: float((m - best[0]).norm()) for name, (m, _) in laws.items()}
print("error of the means of the frames:", {name: round(v, 3) for name, v in off.items()})
assert off["guidance, $w_r$ = 2"] < 0.5 * off["replacement"]
figures.bands(best, laws, keys, clip.flatten())

# %% [markdown] slideshow={"slide_type": "slide"}
# `mini-video` on the same test clips as above (`... videos rules`, three seeds): *told* of the known frames, or not told and steered. *psnr* on the moving object; *jump*: how far a known frame and its unknown neighbour lie apart, over the same in true clips; 1 is right. *Claim*: to be told is best, in both measures, with each seed. Of the two rules guidance is behind here, unlike above: through guided steps of a network that is itself far from exact, its gradient says less.

# %% slideshow={"slide_type": "-"}
rules = by(videos.rows("rules"), "keys", "rule")
table(
    {
        f"{keys} frame known, {rule}": {name: mean(rows, name) for name in ("psnr", "jump")}
        for (keys, rule), rows in rules.items()
    },
    ("psnr", "jump"),
)
for keys in {keys for keys, _ in rules}:
    best = rules[keys, "told"]
    for rule in ("replacement", "reconstruction guidance"):
        assert min(row["psnr"] for row in best) > max(row["psnr"] for row in rules[keys, rule])
        assert max(row["jump"] for row in best) < min(row["jump"] for row in rules[keys, rule])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Clips longer than the model
#
# A model of 8 frames draws clips of any length, part after part, each told of frames that are there already:
#
# - **windows**, or autoregression: $x^{(n)}\sim p(\,\cdot\mid\text{the last }o\text{ frames of }x^{(n-1)})$. What lies before these $o$ is forgotten.
# - **hierarchy** (FDM; Harvey et al. 2022): key frames over all of the clip first, then what is between.
#
# When is that right? If a frame depends on the $o$ before it alone (a Markov chain of order $o$), windows have the law of the whole clip, exactly. Else they **drift**. A process that keeps something throughout: $x_k=\sqrt{0.7}\,u+\sqrt{0.3}\,v_k$, with $u$ constant in a clip, as the colour of a car is, and $v_k$ with the correlations $0.8^{|j-k|}$, so that $C_{jk}=0.7+0.3\cdot0.8^{|j-k|}$. Drawn by the *exact* model of each part; so all error is that of the way of going on. *Claim*: windows forget $u$, the slower the more frames they are told; the hierarchy keeps it.

# %% slideshow={"slide_type": "-"}
N = 32
k = torch.arange(N, dtype=F64)
C = 0.7 + 0.3 * 0.8 ** (k[:, None] - k).abs()


def drawn_in(parts):
    """Covariance of clips drawn part after part by exact models: rows of the identity as noise give the linear map."""
    noise = iter(torch.eye(N, dtype=F64).T)

    def sample_one(clip, there, times):
        S, new = C[times][:, times], ~there
        G = torch.linalg.solve(S[there][:, there], S[there][:, new]).T
        values, axes = torch.linalg.eigh(S[new][:, new] - G @ S[there][:, new])
        fresh = torch.stack([next(noise) for _ in range(int(new.sum()))], 1)
        clip[:, new] = clip[:, there] @ G.T + fresh @ (axes * values.clamp_min(0).sqrt()).T
        return clip

    L = by_parts(sample_one, torch.zeros(N, N, dtype=F64), parts)
    return L.T @ L


found = {
    "exact": C,
    "windows, 1 told": drawn_in(windows(N, 8, 1)),
    "windows, 4 told": drawn_in(windows(N, 8, 4)),
    "hierarchy": drawn_in(hierarchy(N, 8, 2)),
}
with_first = {name: of[0] / (of[0, 0] * of.diagonal()).sqrt() for name, of in found.items()}
ends = {name: float(of[-1]) for name, of in with_first.items()}
print(
    "correlation of the first and the last frame:", {name: round(v, 3) for name, v in ends.items()}
)
assert ends["windows, 1 told"] < ends["windows, 4 told"] < 0.5 * ends["exact"]
assert abs(ends["hierarchy"] - ends["exact"]) < 1e-9
figures.lines(
    {name: (k.tolist(), of.tolist()) for name, of in with_first.items()},
    "frame",
    "correlation with frame 0",
    ylim=(0, 1.05),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# Fifteen frames of `mini-video`, in windows of eight, each told of the last frames of the one before. One frame shows where a thing is; two show how fast it goes. *Look* at the joins, behind frame 7, and below behind frame 12 too. Each window begins its motion anew, since its text and its numbers of frames are those of a whole clip.

# %% slideshow={"slide_type": "-"}
LONG = [PROMPTS[1]]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    long = torch.cat([video.long_clips(model, LONG, 15, overlap) for overlap in (1, 3)])
print(said[0].message)
steps = long.diff(dim=1).abs().mean((2, 3, 4))
for name, of in zip(("1 frame told", "3 frames told"), steps, strict=True):
    print(
        f"{name:14s} frame to frame: {of[:7].mean():.3f} in the first window, {of[7:].mean():.3f} after it"
    )
kept = identity(long, reader, [parse_motion(LONG[0]).scene] * 2)["both"].double().mean(1)
print("shape and colour are read in", ", ".join(f"{share:.0%}" for share in kept), "of the frames")
filmstrip(few(long), ["1 told", "3 told"], every=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## All frames at once
#
# Key frames first keep what lasts. What lies *between* two of them is still drawn window by window, each for itself: where the key frames leave a choice open, every window chooses anew. Two networks see all of a long clip in each step:
#
# - **Space-time U-Net** (Lumiere; Bar-Tal et al. 2024): its levels halve time as they halve space, $t\to t/2\to t/4$. Attention over time is only at the coarsest, which sees the whole clip in few frames.
# - **Video diffusion transformer** (Sora; Brooks et al. 2024): patches of $t_p$ frames of $s\times s$ pixels are tokens, $[b,\ \tfrac{t\,h\,w}{t_ps^2},\ t_p\,c\,s^2]$, and each looks at all, at a cost that is quadratic in their number.
#
# A world that tells them from a cascade: a blob swings along a line, $a\cos(2\pi ft+\varphi)$ in 32 frames, with $f=\tfrac1{16}$ or $\tfrac3{16}$. At key frames $t=4k$
# $$2\pi\tfrac3{16}\,4k=\tfrac{3\pi}2k=2\pi k-\tfrac\pi2k\quad\Rightarrow\quad\cos\big(2\pi\tfrac3{16}4k-\varphi\big)=\cos\big(2\pi\tfrac1{16}4k+\varphi\big):$$
# two motions pass through the same key frames. Eight windows that choose by themselves, each from its *exact* law, agree throughout in one clip of $2^7$.

# %% slideshow={"slide_type": "-"}
one = long_clips.Swings(*(torch.tensor([v], dtype=F64) for v in (2.0, 1 / 16, 0.6)))
other = long_clips.Swings(one.a, 1 / long_clips.EVERY - one.f, -one.phi)
t, at_keys = torch.arange(33, dtype=F64), long_clips.KEYS.double()
assert torch.allclose(one.along(at_keys), other.along(at_keys), atol=1e-12)
figures.lines(
    {
        "f = 1/16": (t.tolist(), one.along(t)[0].tolist()),
        "f = 3/16": (t.tolist(), other.along(t)[0].tolist()),
        "key frames": (at_keys.tolist(), one.along(at_keys)[0].tolist()),
    },
    "frame",
    "place / pixels",
)

# %% [markdown] slideshow={"slide_type": "-"}
# *Claim* (`python -m course_lib.zoo.long_clips`): three trainings each, with as many weights and about as many seconds, two minutes: of 200 clips that are drawn, the share of neighbouring windows that agree, of clips that keep one period throughout, and of those that are *consistent*: one swing of it, within a quarter of a pixel. The cascade is where exact windows are. To see all frames at once is worth more than any care in between; of the two networks that do, the transformer is ahead here.

# %%
at_once = by(long_clips.rows("clips"), "method")
bound = by(long_clips.rows("bounds"), "what")
MEASURED = ("agree", "one period", "consistent", "residual")
table(
    {name: {key: mean(of, key) for key in MEASURED} for name, of in {**bound, **at_once}.items()},
    MEASURED,
)
for name in ("space-time U-Net", "video DiT"):
    for row in at_once[name]:
        assert row["agree"] > 0.9 and row["consistent"] > 0.5
        assert row["agree"] > max(other["agree"] for other in at_once["cascade"]) + 0.3

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The decoder
#
# Latents that do not flicker may be decoded to a clip that does. The VAE of lecture 05 was trained on pictures: what a latent does not hold, the decoder makes up, in each frame anew. With $x_k$ a true frame and $\hat x_k=x_k+e_k$ what comes back, the second difference of the clip is that of $x$ plus that of $e$. So Video LDM fine-tunes the decoder on clips, and leaves the *encoder* as it is, for else all that was trained on its latents would be lost. Here the decoder's spatial layers are frozen too; mixed 3-D convolutions behind its blocks learn
# $$\min_\phi\;\mathbb E\Big[\operatorname{mean}\lvert\hat x-x\rvert^2+2\operatorname{mean}\lvert(\hat x_{k+1}-\hat x_k)-(x_{k+1}-x_k)\rvert^2\Big].$$
# *Claim*, on 100 test clips (its card): less change where nothing moves (*still_flicker*) and less error along the true optical flow (*warp_error*), at no loss of PSNR. How much less is printed, as the share of what lies between the image decoder and true clips: here it is little, since a VAE of 64 pixels leaves little to make up. Plain flicker is no judge of decoders: a blurred clip has less of it than a true one. *Look*: one row of pixels over time, downwards.

# %% slideshow={"slide_type": "-"}
facts = zoo.card("mini-video-decoder")["metrics"]
tuned, plain = facts["video decoder"], facts["image decoder"]
table(
    {name: facts[name] for name in ("true", "image decoder", "video decoder")},
    ("flicker", "still_flicker", "warp_error", "psnr"),
)
for name in ("still_flicker", "warp_error"):
    gap = plain[name] - facts["true"][name]
    print(f"{name}: {(plain[name] - tuned[name]) / gap:.1%} of the way to true clips")
    assert tuned[name] < plain[name]
assert tuned["psnr"] > plain["psnr"] - 0.1
with torch.no_grad():
    of_decoders = {
        "true": true.rgb[shown],
        "image decoder": through,
        "video decoder": decoder(z[shown]).clamp(-1, 1),
    }
study.strip(
    [[figures.over_time(one[0], 40) for one in of_decoders.values()]],
    column_titles=list(of_decoders),
    scale=3,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## AnimateDiff: one motion module, many models
#
# People have fine-tuned image models to a thousand styles. To train temporal layers for each is out of the question, and there are no clips in most styles. AnimateDiff (Guo et al. 2023) trains a **motion module** once, on the base model, so that it may be put into all of its children. In three stages:
#
# 1. **Domain adapter.** Frames of clips are worse than pictures, blurred and compressed (here: tilted). A LoRA of the *spatial* layers, $Wx+\alpha BAx$, learns how frames look, so that the module need not. It is thrown away afterwards.
# 2. **Motion module.** With the adapter in place and frozen, a transformer along time behind each block, $x+W_{\text{out}}\,\mathrm{blocks}(W_{\text{in}}\,\mathrm{norm}(x)+p)$, with $p_i$ sinusoids of the frame's number and $W_{\text{out}}=0$ at first. Nothing says what should move.
# 3. **MotionLoRA.** For one kind of motion, a zoom or a pan, a LoRA of the module's *own* attention, $W\to W+\tfrac{\alpha}{r}BA$ with $B=0$ at first, from some hundred clips of it.
#
# *Look*: `mini-style`, which was made from `mini-sd` and never saw a clip, moved by the module of `mini-sd`; then with each MotionLoRA. *Claims* (the cards, 100 prompts that say nothing of motion): the style stays, so do shape and colour; a motion is read in far more clips than frame by frame; and with a MotionLoRA it is the one that this was learnt from, and its direction, on `mini-style` as on `mini-sd`. By the exact geometry of a zoom or a pan (*tracked*) far fewer are.

# %% slideshow={"slide_type": "-"}
TEXTS = ["a large red car", "a large orange mug"]
found = {name: clips_of(one.on(styled), TEXTS, seed=1) for name, one in motion.items()}
rows = {
    "the module": found["motion"][0],
    "and zoom": found["motion-zoom"][0],
    "and pan": found["motion-pan"][1],
}
filmstrip(few(torch.stack(list(rows.values()))), list(rows))

# %%
facts = zoo.card("mini-motion")["metrics"]
bases = ("mini-sd", "mini-style")
table(
    {name: facts[name] for base in bases for name in (base, f"{base}, frame by frame")},
    ("style", "identity", "moving", "flicker", "smoothness"),
)
for base in bases:
    with_it, before = facts[base], facts[f"{base}, frame by frame"]
    assert (
        with_it["identity"] > before["identity"] - 0.05
        and with_it["moving"] > before["moving"] + 0.2
    )
    assert with_it["flicker"] < before["flicker"]
assert facts["mini-style"]["style"] > 0.95
of_loras = {
    f"{name} on {base}": zoo.card(f"mini-{name}")["metrics"][base]
    for name in ("motion-zoom", "motion-pan")
    for base in bases
}
table(of_loras, ("word", "direction", "tracked", "style", "identity"))
assert min(row["direction"] for row in of_loras.values()) > 0.7

# %% [markdown] slideshow={"slide_type": "slide"}
# **Is it AnimateDiff?** The layers have the names and the layout of `diffusers`, and its `AnimateDiffPipeline` is the judge: our module, handed over as a `MotionAdapter`, from the same noise. *Claim*: the latents agree to rounding. A call rounds at $5\cdot10^{-7}$ of the largest number, guidance $w=3$ multiplies that by up to $2w-1=5$, and four steps add up to $2\cdot10^{-5}$ at most.

# %% slideshow={"slide_type": "-"}
parts = {
    name: image.components[name]
    for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
}
pipe = AnimateDiffPipeline(**parts, motion_adapter=to_diffusers(motion["motion"].temporal))
pipe.set_progress_bar_config(disable=True)
noise = SampleNoise(9)(torch.empty(2, *model.shape))
theirs = pipe(
    TEXTS, num_frames=T, num_inference_steps=4, guidance_scale=3.0,
    latents=noise.transpose(1, 2).clone(), output_type="latent",
).frames.transpose(1, 2)  # fmt: skip
D, sigmas = motion["motion"].denoiser, image.sigmas(4)
guided = cfg(*(D.given(**image.embed(texts)) for texts in (TEXTS, ["", ""])), 3.0)
with torch.no_grad():
    ours = image.finish(sample(guided, image.start(noise, sigmas[0]), sigmas), sigmas[-1])
gap = float((ours - theirs).abs().max() / theirs.abs().max())
print(f"{type(pipe.unet).__name__}: the greatest difference is {gap:.1e} of the largest number")
assert gap < 2e-5

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Cascades, and a noise prior
#
# **Imagen Video** (Ho et al. 2022b) is a cascade: a small clip of few frames first, then models that multiply frames (*temporal* super-resolution, told the key frames) and pixels (*spatial*, told each frame enlarged). In training a stage is told true clips, in use what the stage before has drawn, with its errors. **Conditioning augmentation** (Ho et al. 2021) hides these: the stage is told $\text{low}+s\epsilon$ and $s$ itself, with $s$ drawn anew in training and chosen in use.
#
# Exactly, for the pixel above: stage one draws five key frames each with an error of its own of deviation $e$, stage two the nine frames from them. $G_s=C_{hl}(C_{ll}+s^2I)^{-1}$ is its mean, $P_s=C_{hh}-G_sC_{lh}$ its covariance; $E=e^2I$ is that of the error. So the pair of true key frames and the clip drawn has the covariance
# $$J=\begin{pmatrix}C_{ll}&C_{ll}G_s^\top\\G_sC_{ll}&G_s(C_{ll}+E+s^2I)G_s^\top+P_s\end{pmatrix}.$$
# *Claim*, by the Wasserstein distance of $J$ to the true one: where stage one is right, $s=0$ is best; where it errs as much as frames vary, some $s>0$ takes a fifth of the distance away.

# %% slideshow={"slide_type": "-"}
h = torch.arange(9, dtype=F64)
C_hh = 0.9 ** (h[:, None] - h).abs()
low = torch.arange(0, 9, 2)
C_hl, C_ll, I = C_hh[:, low], C_hh[low][:, low], torch.eye(5, dtype=F64)


def joint(G, P, error):
    """The covariance of true key frames and of the clip."""
    return torch.cat(
        [torch.cat([C_ll, C_ll @ G.T], 1), torch.cat([G @ C_ll, G @ (C_ll + error) @ G.T + P], 1)]
    )


def root(J):
    """J^(1/2)."""
    values, axes = torch.linalg.eigh((J + J.T) / 2)
    return axes * values.clamp_min(0).sqrt() @ axes.T


def w2(J, K):
    """The Wasserstein distance of N(0, J) and N(0, K)."""
    cross = root(root(K) @ J @ root(K))
    return float((J + K - 2 * cross).trace().clamp_min(0).sqrt())


def stage_two(s):
    """G_s and P_s."""
    G = torch.linalg.solve(C_ll + s**2 * I, C_hl.T).T
    return G, C_hh - G @ C_hl.T


wanted_pair, at = joint(*stage_two(0.0), 0.0 * I), [0.05 * j for j in range(21)]
errors = {
    e: [w2(joint(*stage_two(s), (e**2 + s**2) * I), wanted_pair) for s in at]
    for e in (0.0, 0.5, 1.0)
}
best_s = {e: at[min(range(len(at)), key=of.__getitem__)] for e, of in errors.items()}
print("best s for stage one's error e:", best_s)
assert best_s[0.0] == 0 and errors[0.0][0] < 1e-6
assert best_s[1.0] > 0 and min(errors[1.0]) < 0.8 * errors[1.0][0]
figures.lines(
    {f"e = {e:g}": (at, of) for e, of in errors.items()},
    "s, of the noise told",
    "distance to the true law",
)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Twice the size.** The spatial stage can also be a function of one frame: `mini-sd-any-scale` of lecture 05 reads the same latents at 128 pixels. It draws nothing, so no frame invents detail of its own, and frames agree as far as their latents do. *Claim*: on each clip it is nearer to the true large one than bilinear enlargement of the decoded small one. It cannot gain much: *true* small frames, enlarged in the same bilinear way, are nearer than either, so that most of what is missing was lost in the latents.

# %% slideshow={"slide_type": "-"}
of, scaled = judge_video.clips("validation").of[:3], zoo.load("mini-sd-any-scale", device="cpu")
small, large = (render_clips(of, side).rgb for side in (64, 128))
with torch.no_grad():
    latents = torch.stack([image.encode(clip) for clip in small])
    twice = {
        "bilinear": enlarged(torch.stack([image.decode(clip) for clip in latents]), 2),
        "any-scale decoder": torch.stack([scaled.decode(clip, 128) for clip in latents]),
        "true small": enlarged(small, 2),
    }
decibels = {
    name: 10 * torch.log10(4 / (x - large).square().mean((2, 3, 4))).mean(1)
    for name, x in twice.items()
}
for name, each in decibels.items():
    print(f"{name:20s}" + "".join(f"{value:8.2f}" for value in each.tolist()) + " dB")
assert (decibels["any-scale decoder"] > decibels["bilinear"]).all()
assert decibels["true small"].mean() > decibels["any-scale decoder"].mean()

# %% [markdown] slideshow={"slide_type": "slide"}
# **Twice the size, drawn.** Video LDM's upsampler (Sec. 3.4) is a diffusion model of the large latents, told of the small clip behind noise of level $s$, and of $s$. `mini-video-upsampler` draws what the latents $e$ of each enlarged frame lack:
# $$z_{\text{high}}=e+r,\qquad r\sim D(\cdot,\sigma;\,z_{\text{low}}+s\epsilon,\,s),\qquad e=\mathcal E(\mathrm{bilinear}(\mathcal D(z_{\text{low}}+s\epsilon))).$$
# $\mathcal E$ and $\mathcal D$ are the VAE's two halves, $D$ the denoiser. Its network of frames was trained first; then, with that frozen, temporal layers, so that the frames agree on what they make up. *Claims* (24 test clips, three seeds, `course train mini-video-upsampler`): there is as much *detail* (the mean size of the Laplacian, over that of true clips) as there should be, of which bilinear enlargement keeps less than half, at some tenths of a decibel; frames agree better with the temporal layers than without; and of small latents that a stage before got wrong (8 clips, off by noise of 0.3) it makes more when it is told of that; with *more* noise over such latents, and told of that alone, it makes less. *Look* at the edges of the tiles, and at the second picture before you blame the last: a VAE that was trained at 64 pixels turns dark tiles green at 128, and what is drawn in its latents is no better. The any-scale decoder, which never leaves 64-pixel latents, stays nearer to the truth in decibels, and blurred.

# %% slideshow={"slide_type": "-"}
upsampler = zoo.load("mini-video-upsampler", device="cpu")
middle = 2, T // 2  # a frame of the last of these clips
with torch.no_grad(), autocast("cpu"):
    larger = {
        "true": large[middle],
        "through the VAE": image.decode(image.encode(large[2]))[T // 2].float(),
        "bilinear": twice["bilinear"][middle],
        "any-scale decoder": twice["any-scale decoder"][middle],
        "drawn": image.decode(upsampler(latents[2:])[0])[T // 2].float(),
    }
cut = torch.stack(list(larger.values()))[..., 40:120, 24:104]
study.strip([few(cut)], column_titles=list(larger), scale=2)

# %% slideshow={"slide_type": "-"}
of_sizes = zoo.card("mini-video-upsampler")["metrics"]
measures = {"psnr": "14.2f", "detail": "14.2f", "still_flicker": "14.4f", "warp_error": "14.4f"}


def show_row(title, key):
    print(
        f"{title:28s}" + "".join(f"{of_sizes[key][name]:{form}}" for name, form in measures.items())
    )
    return of_sizes[key]


print(" " * 28 + "".join(f"{name:>14s}" for name in measures))
bilinear = show_row("bilinear", "bilinear")
show_row("any-scale decoder", "any scale")
show_row("true, through the VAE", "reconstructed")
for seed in range(3):
    apart = show_row(f"drawn frame by frame, {seed}", f"frame by frame, seed {seed}")
    ours = show_row(f"with temporal layers, {seed}", f"with temporal layers, seed {seed}")
    untold = show_row(f"wrong small latents, {seed}", f"wrong latents, s = 0, seed {seed}")
    heard = show_row(f"told how wrong, {seed}", f"wrong latents, told of it, seed {seed}")
    noisier = show_row(f"more noise, told of it, {seed}", f"wrong latents, s = 0.3, seed {seed}")
    assert ours["detail"] > 0.8 > bilinear["detail"] and ours["psnr"] > bilinear["psnr"] - 0.5
    assert ours["still_flicker"] < apart["still_flicker"]
    assert ours["warp_error"] < apart["warp_error"]
    assert heard["psnr"] > untold["psnr"] + 0.5 and heard["warp_error"] < untold["warp_error"]
    assert noisier["psnr"] < untold["psnr"]

# %% [markdown] slideshow={"slide_type": "slide"}
# **A picture that begins to move.** TRIP (Zhang et al. 2024) asks how much of the noise in frame $i$ is known if the clip begins with the picture $z^1$: were the frame that picture, the noise would be $\epsilon_i^{\to1}=(x_i-z^1)/\sigma$, the *image noise prior*. The network gives only the residual:
# $$\epsilon_i=\lambda_i\,\epsilon_i^{\to1}+(1-\lambda_i)\,\Delta\epsilon_i\qquad\Leftrightarrow\qquad D'_i=\lambda_i\,z^1+(1-\lambda_i)\,D_i,$$
# with $\lambda_i$ from 1 at the first frame down to 0. *Claim*: the first frame is $z^1$ to the last bit, whatever the network says.

# %% slideshow={"slide_type": "-"}
z1, D = z[:2, 0], model.denoiser.given(**model.embed(captions[:2]))
sigmas = torch.cat([image.sigmas(4), torch.zeros(1)])  # down to 0
with torch.no_grad():
    begun = sample(trip(D, z1, decay(T)), image.start(correlated(noise, 10.0), sigmas[0]), sigmas)
assert torch.equal(begun[:, 0], z1)

# %% [markdown] slideshow={"slide_type": "-"}
# **Does it help?** Here frames share noise, and that of the first is known, $\epsilon_1=(x_1-z^1)/\sigma$. So $u_i=x_i-\rho^2\sigma\epsilon_1$ is frame $i$ behind noise of only $s=\sigma\sqrt{1-\rho^4}$, and for moves of deviation $\tau_i$ the prior is
# $$P_i=\mathbb E[x_{0,i}\mid x_1,x_i,z^1]=z^1+\frac{\tau_i^2}{\tau_i^2+s^2}\,(u_i-z^1),\qquad\tau_i=0\text{ is TRIP}.$$
# `mini-video` told the first frame (*plain*), and with each prior; as it is, and after three short trainings of each (`python -m course_lib.zoo.image_to_video`). Nothing is written over. *kept*: the first frame, in dB; the next four over those of true clips, so that 1 is right, and 0 in *jump* is a clip that does not leave its picture. *Claims*: with either prior the first frame is kept better by 6 dB and more. That of shared noise makes clips go on from it with less of a jump than plain conditioning, untrained and trained, and move as asked more often; they flicker more, too. TRIP's one $\lambda_i$ for all noise levels holds clips back: where $\sigma\to0$, $D'_i=x_i$ asks the network for $\tfrac{\lambda_i}{1-\lambda_i}$ of the move.

# %%
SEEN = ("kept", "jump", "later", "flickers", "warped", "identity", "word")
moving = {part: by(image_to_video.rows(part), "method") for part in ("untrained", "clips")}
for part, of_methods in moving.items():
    print(f"--- {'trained' if part == 'clips' else part}")
    table(
        {name: {key: mean(of, key) for key in SEEN} for name, of in of_methods.items()},
        SEEN,
    )
for plain, *others in zip(*moving["clips"].values(), strict=True):
    assert min(row["kept"] for row in others) > plain["kept"] + 6
for of_methods in moving.values():
    with_prior, without = of_methods["TRIP, shared noise"], of_methods["plain"]
    assert 1 < mean(with_prior, "jump") < mean(without, "jump")
    assert mean(with_prior, "word") > mean(without, "word")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Prompt and motion, mixing, guidance and what the noise has in common; beside it the image model, frame by frame. **At which mixing does it begin to move? What does the noise in common decide at mixing 0? Which motion is read least often as what was asked?**

# %% slideshow={"slide_type": "-"}
VideoExplorer(model, motions, reader)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# **A reshape in place of a permute.** `x.reshape(b * h * w, t, c)` has the right shape and the wrong numbers: it takes what lies side by side in memory. There and back it undoes itself, so that all tests of shape pass, and so does the identity at first. What tells: another number at one place and time must change the *same place* alone.

# %% slideshow={"slide_type": "-"}
torch.manual_seed(0)
layer = TemporalAttention(32, frames=T)
nn.init.normal_(layer.attn.to_out[0].weight, std=0.1)
h = torch.randn(1, T, 32, 4, 4)
touched = h.clone()
touched[0, 3, :, 1, 2] += 1


def reshaped(x):
    """The mistake: sequences by reshape."""
    b, t, c, rows, columns = x.shape
    y = x.reshape(b * rows * columns, t, c)
    return (y + layer.attn(layer.norm(y))).reshape(x.shape)


with torch.no_grad():
    for name, of in (("permute", layer), ("reshape", reshaped)):
        changed = ((of(touched) - of(h)).abs().amax((0, 1, 2)) > 1e-6).sum()
        print(f"{name}: one place is touched, {int(changed)} of 16 change")
        assert (int(changed) == 1) == (name == "permute")
right_there = torch.equal(h.reshape(16, T, 32).reshape(h.shape), h)
print(f"reshape there and back gives the clip again: {right_there}")

# %% [markdown] slideshow={"slide_type": "-"}
# **Too many zeros.** One zero at the end makes the layer the identity, and learns. Two in a row do not: in $W u$ with $u=Vn$, $\partial L/\partial W=g\,u^\top=0$ because $u=0$, and $\partial L/\partial V=W^\top g\,n^\top=0$ because $W=0$. Nothing ever moves.

# %%
for name in ("last weights 0", "all weights 0"):
    layer = ConvBlock(32)
    if name.startswith("all"):
        for weight in layer.parameters():
            nn.init.zeros_(weight)
    (layer(h) - h.roll(1, 1)).square().sum().backward()
    alive = [key for key, weight in layer.named_parameters() if weight.grad.any()]
    print(f"{name}: at first a gradient in {alive}")
    assert ("conv.weight" in alive) == name.startswith("last")

# %% [markdown] slideshow={"slide_type": "-"}
# **Other noise in each frame.** A model that was trained on noise in common is started from `torch.randn(b, t, c, h, w)`. It runs, and each frame has a ground of its own (the figure above, $a=0$). **Judging by flicker alone.** Then the best model is a still: sorted by flicker, and by whether what was asked moves:

# %%
ranked = sorted(points, key=lambda name: points[name]["flicker"])
print("by flicker:", ", ".join(ranked))
print("by motion: ", ", ".join(sorted(points, key=lambda name: -points[name]["word"])))
assert ranked[0] == "frozen" and points["frozen"]["word"] < points["mini-video"]["word"]
print(
    f"flicker of mini-video from noise of its own in each frame {own['flicker']:.3f},"
    f" in common {common['flicker']:.3f}"
)

# %% [markdown] slideshow={"slide_type": "-"}
# **Channels before frames**, as in `Conv3d`; **frames of a batch that were never folded**; a condition for another number of frames: each is refused in one line.

# %%
D = inflated(image.denoiser, motion_of(image.denoiser.net)).given(**told)
wrong = {
    "channels first": lambda: D(x.transpose(1, 2), level),
    "no axis of time": lambda: D(x.flatten(0, 1), level),
    "inflated twice": lambda: inflated(D, motion_of(image.denoiser.net)),
    "17 frames": lambda: D(torch.zeros(2, 17, *image.shape), level),
    "told a frame": lambda: clips_of(motion["motion"], TEXTS, known=first(T, 1), z=z[:2]),
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
# The cells of `mini-sd` with another name. Where the weights of Stable Diffusion are, its U-Net is inflated: untrained, it must give what the image model gives, frame by frame and to the last bit. A published motion module comes in by `from_diffusers(MotionAdapter.from_pretrained(folder), sd.denoiser.net)`; here ours goes out and comes back.

# %%
name = next(name for name in ("stable-diffusion-1.5", "mini-sd") if zoo.available(name))
sd = zoo.load(name)
base = sd.denoiser.net
module = motion["motion"].temporal if name == "mini-sd" else motion_of(base)
adapter = to_diffusers(module)
again = from_diffusers(adapter, base)
print(
    f"{name}: {zoo.parameters(base) / 1e6:,.1f} M weights frozen, {adapter.num_parameters() / 1e6:,.1f} M in a {type(adapter).__name__},"
    f" {zoo.parameters(video_ldm_of(base)) / 1e6:,.1f} M for Video LDM"
)
one = sd.embed(["a red car"])
clip = SampleNoise(2)(torch.empty(1, 2, *sd.shape, device=sd.device))
with torch.no_grad():
    frames = sd.denoiser.given(**{key: c.repeat_interleave(2, 0) for key, c in one.items()})
    alone = frames(clip.flatten(0, 1), level.to(sd.device)).view_as(clip)
    for temporal in (video_ldm_of(base), motion_of(base)):
        assert torch.equal(
            inflated(sd.denoiser, temporal).given(**one)(clip, level.to(sd.device)), alone
        )
    moved_by = [
        inflated(sd.denoiser, one_of).given(**one)(clip, level.to(sd.device))
        for one_of in (module, again)
    ]
assert torch.allclose(*moved_by, atol=1e-4)
assert torch.equal(moved_by[0], alone) == (name != "mini-sd")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - Space sees $[b\,t,c,h,w]$, time $[b\,h\,w,t,c]$. A zero at the end of each temporal layer, and the model of clips starts as the image model.
# - Train the temporal layers alone: $z\leftarrow\alpha z+(1-\alpha)z'$. Switched off, they leave the image model, to the last bit, at any time.
# - Noise decides what no word says. Frames that share it, $\mathbb E[\epsilon_i\epsilon_j]=a^2/(1+a^2)$, agree on it from the start.
# - Told $[m\odot z,m]$, one network predicts and interpolates. Not told, guide it: replacement alone leaves jumps.
# - Windows forget what lies before the frames that they are told; key frames first do not. What is between them is consistent where one network sees all frames.
# - A frozen clip is the most coherent of all. Measure motion too.
# - A motion module belongs to a base model and moves all that was made from it.
#
# **Exercises.** [Set 11](../my_course/11_video_ldm.ipynb).
#
# | | | | |
# |---|---|---|---|
# | 11.1 inflate a convolution | 11.2 sequences of frames | 11.3 the mixing factor | 11.4 the identity at first |
# | 11.5 noise in common | 11.6 frames that are known | 11.7 between key frames | 11.8 reconstruction guidance |
# | 11.9 flicker and warping error | 11.10 MotionLoRA | | |
#
# ## Sources
#
# - J. Ho, T. Salimans, A. Gritsenko, W. Chan, M. Norouzi, D. Fleet. *Video Diffusion Models.* 2022. arXiv:2204.03458
# - J. Ho et al. *Imagen Video: High Definition Video Generation with Diffusion Models.* 2022b. arXiv:2210.02303
# - U. Singer et al. *Make-A-Video: Text-to-Video Generation without Text-Video Data.* 2022. arXiv:2209.14792
# - A. Blattmann, R. Rombach, H. Ling, T. Dockhorn, S. W. Kim, S. Fidler, K. Kreis. *Align your Latents: High-Resolution Video Synthesis with Latent Diffusion Models.* 2023. arXiv:2304.08818 (Video LDM)
# - S. Ge et al. *Preserve Your Own Correlation: A Noise Prior for Video Diffusion Models.* 2023. arXiv:2305.10474 (PYoCo)
# - Y. Guo, C. Yang, A. Rao, Z. Liang, Y. Wang, Y. Qiao, M. Agrawala, D. Lin, B. Dai. *AnimateDiff: Animate Your Personalized Text-to-Image Diffusion Models without Specific Tuning.* 2023. arXiv:2307.04725
# - V. Voleti, A. Jolicoeur-Martineau, C. Pal. *MCVD: Masked Conditional Video Diffusion for Prediction, Generation, and Interpolation.* 2022. arXiv:2205.09853
# - W. Harvey, S. Naderiparizi, V. Masrani, C. Weilbach, F. Wood. *Flexible Diffusion Modeling of Long Videos.* 2022. arXiv:2205.11495 (FDM)
# - O. Bar-Tal et al. *Lumiere: A Space-Time Diffusion Model for Video Generation.* 2024. arXiv:2401.12945
# - T. Brooks et al. *Video Generation Models as World Simulators.* 2024. openai.com/research (Sora)
# - Z. Zhang et al. *TRIP: Temporal Residual Learning with Image Noise Prior for Image-to-Video Diffusion Models.* 2024. arXiv:2403.17005
# - J. Ho, C. Saharia, W. Chan, D. Fleet, M. Norouzi, T. Salimans. *Cascaded Diffusion Models for High Fidelity Image Generation.* 2021. arXiv:2106.15282
# - T. Unterthiner et al. *Towards Accurate Generative Models of Video: A New Metric & Challenges.* 2018. arXiv:1812.01717 (Fréchet video distance)
# - Y. Song et al. *Score-Based Generative Modeling through Stochastic Differential Equations.* 2021. arXiv:2011.13456 (replacement)
# - P. Shaw, J. Uszkoreit, A. Vaswani. *Self-Attention with Relative Position Representations.* 2018. arXiv:1803.02155
# - E. Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models.* 2022. arXiv:2106.09685
