# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 13 ControlNet and spatial control
#
# **How a picture is told where things are.** A text says *a red car on sand*; it does not say where the car stands, how large it is, or which way its bonnet points. A drawing says just that. ControlNet teaches a trained text-to-image model to follow a drawing, a depth map or a map of classes, and does not touch one of its weights.
#
# After it you can
#
# - write ControlNet's equation, and say which of its parts are locked, copied, and zero;
# - derive why a convolution that starts at zero learns, and in which step each part of the network first moves;
# - train a control on a laptop, and show that without it the base is the same to the last bit;
# - measure whether a picture obeys its map, and what that costs in prompts and in likeness to data;
# - set scale, interval and layers, combine controls, move them to another base, and use one without a prompt;
# - say what T2I-Adapter, concatenation, GLIGEN, guidance by a sketch and noise priors do instead.
#
# You need lectures 02, 04 and 05. Time: 100 minutes. Everything runs on a laptop, with no network.

# %%
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import bench_control, study, zoo
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.guidance import cfg
from course_lib.guidance.sketch import sketch_guided
from course_lib.nets.adapters import Concatenated, T2IAdapter, without_zeros
from course_lib.nets.control import (
    Controlled,
    ControlNet,
    control_of,
    controlled,
    from_diffusers,
    guess,
    to_diffusers,
)
from course_lib.sample import sample
from course_lib.study import control_pictures as figures
from course_lib.training import denoising_loss, edm_weight, fit, lognormal_sigmas
from course_lib.worlds import digits, hand
from course_lib.worlds.scenes.captions import parse
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
from course_lib.zoo import controls, controls_guided, controls_used, layouts
from course_lib.zoo.controls.curve import convergence
from course_lib.zoo.controls.train import BATCH, SHOWN, STEPS
from course_lib.zoo.map_judge import Maps, edge_f1, errors, mean_iou, nearness_rmse
from course_lib.zoo.recipes.digits import SIGMA_DATA, grid

torch.set_num_threads(1)
study.use()
model = zoo.load("mini-sd", device="cpu")
trained = {
    kind: zoo.load(f"mini-control-{kind}", device="cpu") for kind in ("edge", "depth", "seg")
}
judge, reader = zoo.load("scenes-maps", device="cpu"), zoo.load("scenes-reader", device="cpu")
NAMES = {"edge": "edges", "depth": "nearness", "seg": "classes"}

scenes = SceneDataset(24, 131, objects=(1, 2))  # new ones: nothing was trained on them
seen, texts = render(scenes.scenes, 64), scenes.captions(None)
truth = Maps(edge_map(seen)[:, :1] > 0.5, nearness(seen.depth), classes(seen, scenes.scenes))
maps = {
    "edge": as_map(truth.lines),
    "depth": as_map(truth.nearness),
    "seg": segmentation_map(truth.classes),
}


def draw(texts, D=model.denoiser, w=3.0, seed=0, reference=None, **told):
    """Pictures (N, 3, 64, 64) of these texts and of what else D is told; `reference`: what the half without text is told."""
    n, sigmas = len(texts), model.sigmas(20)
    halves = (texts, told), ([""] * n, told if reference is None else reference)
    D_cond, D_ref = (D.given(**given, **model.embed(words)) for words, given in halves)
    x = model.start(SampleNoise(seed)(torch.empty(n, *model.shape)), sigmas[0])
    with torch.no_grad(), autocast("cpu"):
        z = model.finish(sample(cfg(D_cond, D_ref, w), x, sigmas), sigmas[-1])
        return model.decode(z).float()


# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Above, what is told beside the text: the *edges* of a scene, its *nearness* (white is near), its *classes* (one colour for each kind of thing). In the middle, what the text alone gives; below, text and map together. A column has one text and one noise: the map is all that differs. Shown are the scenes of 24 where the text alone is farthest off.

# %% slideshow={"slide_type": "-"}
D_with = {kind: controlled(model.denoiser, **{kind: trained[kind]}) for kind in trained}
alone = draw(texts)
told = {kind: draw(texts, D_with[kind], **{kind: maps[kind]}) for kind in trained}
read = judge.read(alone)
off = {
    "edge": 1 - edge_f1(read.lines, truth.lines),
    "depth": nearness_rmse(read.nearness, truth.nearness),
    "seg": 1 - mean_iou(read.classes, truth.classes),
}
columns = [(kind, int(row)) for kind in trained for row in off[kind].topk(2).indices]
study.strip(
    [
        [figures.shown(maps[kind][row]) for kind, row in columns],
        figures.few(alone[[row for _, row in columns]]),
        [figures.few(told[kind][row]) for kind, row in columns],
    ],
    row_titles=("map", "text", "text and map"),
    column_titles=[NAMES[kind] for kind, _ in columns],
    scale=2,
)

# %%
for kind, row in columns:
    print(f"{NAMES[kind]:9s} {texts[row]}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Lock, copy, join
#
# The names, once: $F(\cdot\,;\Theta)$ is a trained network or a block of one, $\Theta$ its weights, $x$ what goes in, $y=F(x;\Theta)$ what comes out. $c$ is the map. $Z(\cdot\,;\Theta_z)$ is a **zero convolution**: $1\times1$, its weight and its bias 0 at the start. ControlNet (Zhang, Rao and Agrawala 2023) makes of $y$
# $$\boxed{\;y_c=F(x;\Theta)+Z\big(F(x+Z(c;\Theta_{z1});\,\Theta_c);\,\Theta_{z2}\big)\;}\qquad\text{(their Eq. 2)}$$
# in three moves, each the answer to a danger:
#
# 1. **Lock** $\Theta$. Pairs of maps and pictures are few beside what the model was trained on; fine-tuned on them, it would forget the rest.
# 2. **Copy**: $\Theta_c$ starts as $\Theta$. To follow a map one must know what pictures are like. The copy knows it already.
# 3. **Join by zeros.** A fresh layer would add noise to features that the locked network never saw, and gradients of that noise would spoil the copy. With $Z=0$
# $$y_c=F(x;\Theta)+0=y\quad\text{at the start (their Eq. 3), to the last bit.}$$
#
# In a U-Net $F$ is the encoder with the middle. It hands features $f_1,\dots,f_L$ to the decoder, and each gets a zero convolution of its own: the decoder is given $f_i+Z_i(\cdot)$. A small encoder $E$ of a few convolutions brings the map to the size of $x$ first. In the figure **0** is a zero convolution; the one behind $E$ is $3\times3$, here as in the authors' code.

# %% slideshow={"slide_type": "-"}
figures.architecture()

# %% [markdown] slideshow={"slide_type": "slide"}
# The code is the equation. `copy.encode` is $F(\cdot\,;\Theta_c)$ with $Z(E(c))$ added after the first layer; a control hands back a list, one tensor for each feature; and what takes it wraps the *network*. So what comes out is a Denoiser like any other: guidance, samplers and solvers take it as it is.

# %% slideshow={"slide_type": "-"}
study.source(ControlNet.forward, Controlled.forward)

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*: untrained, it changes nothing, to the last bit, on the course's readable U-Net and on the one of `diffusers` in `mini-sd`; and it has fewer weights than what it controls, since the decoder is not copied.

# %% slideshow={"slide_type": "-"}
D = zoo.load("digits", device="cpu")
bases = {
    "digits": (D.given(label=torch.tensor([3, 8])), digits.SHAPE, 16),
    "mini-sd": (model.denoiser.given(**model.embed(["a red car", ""])), model.shape, 64),
}
for name, (base, shape, side) in bases.items():
    fresh = control_of(base.net)
    x, level = SampleNoise(0)(torch.empty(2, *shape)), torch.tensor(1.0)
    with torch.no_grad():
        before = base(x, level)
        after = controlled(base, map=fresh).given(map=torch.rand(2, 3, side, side))(x, level)
    millions = [zoo.parameters(net) / 1e6 for net in (base.net, fresh)]
    print(
        f"{name:8s} {len(fresh.zeros)} features; weights in millions:"
        f" {millions[0]:.2f} locked, {millions[1]:.2f} to train"
    )
    assert torch.equal(before, after) and millions[1] < millions[0]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Why does a zero convolution learn?
#
# Weights of 0 that are multiplied by features: is the gradient not 0 as well, for ever? At one place of the picture, $y=Wx+b$. Let $g=\partial L/\partial y$ be what comes back from the loss. From $y_i=\sum_jW_{ij}x_j+b_i$,
# $$\frac{\partial y_i}{\partial W_{ij}}=x_j,\qquad\frac{\partial y_i}{\partial b_i}=1,\qquad\frac{\partial y_i}{\partial x_j}=W_{ij},$$
# $$\Rightarrow\quad\frac{\partial L}{\partial W}=g\,x^\top,\qquad\frac{\partial L}{\partial b}=g,\qquad\frac{\partial L}{\partial x}=W^\top g.$$
# At $W=0$ the last one vanishes. *The first does not*: it holds $x$, not $W$, and the features of a trained network are not 0. After one step at the rate $\eta$,
# $$W=-\eta\,g\,x^\top\neq0\quad\Rightarrow\quad\frac{\partial L}{\partial x}=-\eta\,x\,(g^\top g')\neq0,$$
# where $g'$ is what comes back then. So a zero convolution holds up what lies *before* it for one step. In Eq. 2 there are two in a row:
#
# - **step 1**: $\Theta_{z2}$ alone. Behind it nothing comes back to the copy.
# - **step 2**: $\Theta_c$ and $\Theta_{z1}$ too. But $\Theta_{z1}$ is still 0, and holds up the map's encoder $E$.
# - **step 3**: all.
#
# *Claim*: measured on the digits' U-Net with plain gradient descent, those that should not move have a gradient of *exactly* 0; and the formulas hold, sums over places included.

# %% slideshow={"slide_type": "-"}
torch.manual_seed(0)
Z, x, g = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
for parameter in Z.parameters():
    nn.init.zeros_(parameter)
Z(x).backward(g)
assert torch.allclose(Z.weight.grad[..., 0, 0], torch.einsum("bihw,bjhw->ij", g, x), atol=1e-5)
assert torch.allclose(Z.bias.grad, g.sum((0, 2, 3)), atol=1e-5) and not x.grad.any()

images, labels = digits.load("train")
tests, asked = digits.load("test")


def edges_of(pictures):
    """The lines (N, 1, H, W) in {0, 1} that Canny's detector finds in them."""
    return canny(pictures.clamp(-1, 1))


lines, test_lines = edges_of(images), edges_of(tests)


def batch(source, n=32):
    """Digits, levels, noise, and the lines of the digits."""
    rows = torch.randint(len(images), (n,), generator=source)
    eps = torch.randn(n, *digits.SHAPE, generator=source)
    return images[rows], lognormal_sigmas(n, -0.4, 1.2, source), eps, lines[rows]


def loss(control, x0, sigma, eps, c):
    """EDM's loss of `digits`, told the lines and no class."""
    return denoising_loss(
        controlled(D, edge=control).given(edge=c), x0, sigma, eps, edm_weight(SIGMA_DATA)
    )


watched = control_of(D.net, channels=1)
parts = {
    "Θ_z2, zero convolutions at the end": watched.zeros,
    "Θ_c, the copy": watched.copy,
    "Θ_z1, zero convolution of the map": watched.hint.conv_out,
    "E, the map's encoder": nn.ModuleList([watched.hint.conv_in, *watched.hint.blocks]),
}
optimizer, moved = torch.optim.SGD(watched.parameters(), lr=0.3), {name: [] for name in parts}
for step in range(3):
    optimizer.zero_grad()
    loss(watched, *batch(generator(5, step))).mean().backward()
    for name, part in parts.items():
        kept = [p.grad for p in part.parameters() if p.grad is not None]
        moved[name].append(float(torch.stack([one.norm() for one in kept]).norm()) if kept else 0.0)
    optimizer.step()
print(f"{'size of the gradient':36s}" + "".join(f"{f'step {k}':>12s}" for k in (1, 2, 3)))
for name, sizes in moved.items():
    print(f"{name:36s}" + "".join(f"{size:12.1e}" if size else f"{'0':>12s}" for size in sizes))
first = [next(k for k, size in enumerate(sizes, 1) if size > 0) for sizes in moved.values()]
assert first == [1, 2, 2, 3]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A control, trained here and now
#
# The base is `digits`, a readable U-Net of pixels (lecture 02); the map is what Canny's detector finds in a digit, one bit a pixel; no class is told. The loss is the one that the base was trained with, and $\Theta$ stays locked:
# $$L=\mathbb E_{x_0,c,\sigma,\epsilon}\Big[\lambda(\sigma)\,\big\lVert D(x_0+\sigma\epsilon,\sigma;\,c)-x_0\big\rVert^2\Big].$$
# *Claims*: after 150 steps the edges of what is drawn agree with those that were asked for, on test digits, far more than before; the class, which nobody told, follows; and without the map the base is what it was, to the last bit.

# %% slideshow={"slide_type": "-"}
state = {name: value.clone() for name, value in D.net.state_dict().items()}
run = fit(
    control_of(D.net, channels=1),
    batch,
    loss,
    steps=150,
    lr=5e-3,
    ema_decay=0.9,
    half=False,
    device="cpu",
    progress=False,
)
n, sigmas = 40, grid(12)
x = SampleNoise(1)(torch.empty(n, *digits.SHAPE)) * float(sigmas[0])
with_control = controlled(D, edge=run.net)
with torch.no_grad():
    drawn = {
        "alone": sample(D, x, sigmas),
        "with edges": sample(with_control.given(edge=test_lines[:n]), x, sigmas),
    }
    unchanged = torch.equal(with_control(x, sigmas[3]), D(x, sigmas[3]))
assert unchanged and all(
    torch.equal(value, state[name]) for name, value in D.net.state_dict().items()
)

digit_reader, agrees = zoo.load("digits-reader", device="cpu"), {}
for name, pictures in drawn.items():
    agrees[name] = float(edge_f1(edges_of(pictures) > 0.5, test_lines[:n] > 0.5, reach=0).mean())
    with torch.no_grad():
        right = float((digit_reader(pictures).argmax(1) == asked[:n]).double().mean())
    print(f"{name:10s}: F1 of the edges {agrees[name]:.2f}, the class of the digit in {right:.0%}")
assert agrees["with edges"] > agrees["alone"] + 0.3 and right > 0.7
rows = [figures.shown(test_lines[:9]), *(of[:9] for of in drawn.values()), tests[:9]]
study.strip(rows, row_titles=["edges", *drawn, "whose edges"], scale=5)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Does it obey?
#
# `mini-sd` has three controls, of 2,000 to 5,000 steps, trained as the paper trains: the loss of `mini-sd` itself, and **half of the texts left empty**, so that the map alone must say what there is. A picture can look right and miss its map. So a network that was trained on renders reads the maps back (`scenes-maps`), and what it reads is held against what was asked for:
#
# - *edges*: $1-F_1$, the harmonic mean of precision and recall of the lines, each within one pixel;
# - *nearness*: the root mean square error of $2/\text{depth}$;
# - *classes*: 1 − the mean over classes of intersection over union;
# - *obeyed*: the share that shows all that its text names, by another reader; and the *Fréchet distance* to renders, in that reader's features.
#
# The first three are errors, 0 at best. What the VAE does to true renders, under the same readers, is the floor. Here, on the 24 scenes above:

# %% slideshow={"slide_type": "-"}
wanted = [parse(text) for text in texts]
MEASURES = ("edge", "depth", "seg", "obeyed")


def worth(pictures):
    """Control errors of pictures of the 24 scenes, and the share that shows all that its text names."""
    obeyed = float(reader.obeys(pictures, wanted)["all"].mean())
    return errors(judge.read(pictures), truth) | {"obeyed": obeyed}


with torch.no_grad(), autocast("cpu"):
    floor = model.decode(model.encode(scenes.pictures(torch.arange(24)))).float()
live = {"text alone": worth(alone)}
live |= {f"and {NAMES[kind]}": worth(pictures) for kind, pictures in told.items()}
live |= {"renders, by the VAE": worth(floor)}
print(f"{'':20s}" + "".join(f"{NAMES.get(name, name):>12s}" for name in MEASURES))
for name, values in live.items():
    print(f"{name:20s}" + "".join(f"{values[key]:12.3f}" for key in MEASURES))
for kind in trained:
    assert live[f"and {NAMES[kind]}"][kind] < live["text alone"][kind]

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*, on 200 test scenes (the models' cards): each control takes away most of what lies between the text alone and the floor, in its own measure; of a hundred texts a few fewer are obeyed (a standard error is 2.6); and pictures come no farther from renders. The control of edges serves sketches and Canny's lines too, since it was trained on all three. With three seeds: `python -m course_lib.zoo.controls_used alone`, below it.

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


def table(groups, keys=(*MEASURES, "frechet")):
    """Means over the seeds, with standard errors where there are several."""
    wide = max(len(str(name)) for name in groups) + 1
    print(" " * wide + "".join(f"{NAMES.get(key, key):>16s}" for key in keys))
    for name, rows in groups.items():
        values = [torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in keys]
        errors_of = [of.std() / len(of) ** 0.5 if len(of) > 1 else None for of in values]
        cells = [
            f"{of.mean():.3f}" + (f" ± {error:.3f}" if error is not None else " " * 8)
            for of, error in zip(values, errors_of, strict=True)
        ]
        print(f"{name!s:{wide}s}" + "".join(f"{cell:>16s}" for cell in cells))


cards = {kind: zoo.card(f"mini-control-{kind}")["metrics"] for kind in trained}
floors, bare = (cards["edge"][name] for name in ("reconstructed renders", "without control"))
given = {"edge": ("lines", "scribbles", "canny"), "depth": ("near",), "seg": ("classes",)}
results = {f"given {name}": cards[kind][f"given {name}"] for kind in given for name in given[kind]}
table({name: [row] for name, row in {"text alone": bare, **results, "renders": floors}.items()})
for kind, names in given.items():
    gap, own = bare[kind] - floors[kind], cards[kind][f"given {names[0]}"]
    left = (own[kind] - floors[kind]) / gap
    print(f"given {names[0]}, of the gap in {NAMES[kind]} {left:.0%} is left")
    assert left < 0.5 and own["obeyed"] > bare["obeyed"] - 0.08
    assert own["frechet"] < bare["frechet"] + 0.02

# %%
once = by(controls_used.rows("alone"), "layer")
table(once)
for kind, layer in controls_used.EXACT.items():
    gap = mean(once["nothing"], kind) - mean(once["renders"], kind)
    left = max(row[kind] for row in once[layer]) - mean(once["renders"], kind)
    print(f"{layer}: at most {left / gap:.0%} of the gap in {NAMES[kind]} is left")
    assert left < 0.5 * gap
    assert mean(once[layer], "obeyed") > mean(once["nothing"], "obeyed") - 0.08
    assert mean(once[layer], "frechet") < mean(once["nothing"], "frechet") + 0.02

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How much, when, and at which layers
#
# The control's residuals $r_i$ are added; so they can be scaled, for a part of the steps, and for each layer by itself:
# $$f_i\;\leftarrow\;f_i+s_i\,r_i,\qquad s_i=0\text{ outside of }\sigma_{\text{low}}<\sigma\le\sigma_{\text{high}}.$$
# *Look* at what wins where map and text contradict each other: a text that names another shape, on the edges of a scene of ours, with the scale from 0 to 3.

# %% slideshow={"slide_type": "-"}
scales, rows = torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0]), []
for row, text in ((17, "a large green sphere on sand"), (22, "a large red mug on grass")):
    c = maps["edge"][[row] * len(scales)]
    pictures = draw([text] * len(scales), D_with["edge"], edge=c, edge_scale=scales)
    rows.append([figures.shown(c[0]), *figures.few(pictures)])
study.strip(
    rows,
    row_titles=("green sphere", "red mug"),
    column_titles=("map", *(f"s = {s:g}" for s in scales)),
    scale=2,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# Measured on 100 validation scenes (`... controls_used scale interval`): the error of the edges over the scale, and over the share of the steps in which the control acts, the first of them or the last.

# %% slideshow={"slide_type": "-"}
by_scale, parts = controls_used.rows("scale"), controls_used.rows("interval")
without, whole = (next(row["edge"] for row in by_scale if row["scale"] == s) for s in (0, 1))
half = {row["part"]: row for row in parts if row["share"] == 0.5}
for part, row in half.items():
    print(
        f"{part:5s} half of the steps: error of the edges {row['edge']:.3f}, of the nearness {row['depth']:.3f}"
    )
print(f"no step: error of the edges {without:.3f}; all steps {whole:.3f}")
assert whole < half["last"]["edge"] < half["first"]["edge"] < without
assert half["first"]["depth"] < half["last"]["depth"]
figures.how_much_and_when(by_scale, parts)

# %% [markdown] slideshow={"slide_type": "slide"}
# What is where is settled early, at large $\sigma$: the first half of the steps brings the nearness, which nobody told, closer to the scene's than the last half does. The last half draws the lines exactly. Which layers does the map speak through? Here one feature at a time is given to `mini-sd`, on twelve of the scenes above:

# %% slideshow={"slide_type": "-"}
count = len(trained["edge"].zeros)
few = Maps(truth.lines[:12], truth.nearness[:12], truth.classes[:12])
through = {}
for name, weights in {
    **{f"feature {k + 1} of {count}": torch.eye(count)[k] for k in range(count)},
    "all": torch.ones(count),
    "guess mode's": guess(count)[0],
}.items():
    pictures = draw(
        texts[:12], D_with["edge"], edge=maps["edge"][:12], edge_scale=weights.expand(12, -1)
    )
    through[name] = errors(judge.read(pictures), few)["edge"]
for name, error in through.items():
    print(f"{name:16s} error of the edges {error:.3f}")
assert through["all"] < min(error for name, error in through.items() if name.startswith("feature"))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Guidance: the map in both halves, or in one
#
# Classifier-free guidance has two halves, $D=D_{\text{ref}}+w\,(D_{\text{cond}}-D_{\text{ref}})$. Which of them is told the map?
#
# - **Both**: the map cancels in the difference, and $w$ enlarges what the *text* adds. Without a text the halves are equal, and there is no guidance left.
# - **One**, the half with the text: $w$ enlarges what the *map* adds too, and often too much. The paper's remedy is **resolution weighting**, $s_i=h/h_i$ with $h$ the side of the latents and $h_i$ that of feature $i$: 1 at the finest, more where one number covers more of the picture.
#
# On the test scenes at $w=3$, from the card; below it over $w$, on validation scenes (`... controls_used halves`). *Claim*: in one half the map is followed more closely.

# %% slideshow={"slide_type": "-"}
for kind, layer in (("edge", "lines"), ("seg", "classes")):
    halves = {
        "both halves": cards[kind][f"given {layer}"],
        "one half": cards[kind][f"given {layer} beside the prompt alone"],
    }
    table({f"{layer} in {name}": [row] for name, row in halves.items()})
    assert halves["one half"][kind] < halves["both halves"][kind]

# %%
found = by(controls_used.rows("halves"), "halves", "weights", "w")
table({f"{which}, {weights}, w = {w:g}": rows for (which, weights, w), rows in found.items()})

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Without a text: guess mode
#
# Half of the texts were empty in training, so that the map alone says something. **Guess mode** gives the map to one half only, both texts empty: $D_{\text{ref}}+w\,(D_{\text{map}}-D_{\text{ref}})$ guides *by the map*, and scales that rise from 0.1 at the first feature to 1 at the last leave the coarse part stronger. *Claim*, on 200 test scenes and three seeds (`... controls_used unprompted`): without any text the edges are followed, and the shape is recognised in more than half of the pictures, where chance gives one in eight.

# %% slideshow={"slide_type": "-"}
found = by(controls_used.rows("unprompted"), "mode", "w")
for (mode, w), rows in found.items():
    finds = {
        name: sum(row["finds"][name] for row in rows) / len(rows)
        for name in ("shape", "colour", "ground")
    }
    said = ", ".join(f"{name} {share:.0%}" for name, share in finds.items())
    print(f"{mode:12s} w = {w:<4g} error of the edges {mean(rows, 'edge'):.3f}; found: {said}")
blind = mean(found["nothing", 1.0], "edge")
for key in (("both halves", 1.0), ("one half", 3.0), ("guess", 3.0)):
    assert max(row["edge"] for row in found[key]) < blind
    assert min(row["finds"]["shape"] for row in found[key]) > 0.5

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Two controls at once
#
# Controls that were trained apart are added, with nothing to be trained or weighed: $f_i+\sum_k s_k\,r_{ki}$. *Look*: no text; three scenes' edges, their nearness, both. *Claim* (`... controls_used together`, three seeds): both are followed at once. In the measure of each control the two together lose at most an eighth of what it gains alone.

# %% slideshow={"slide_type": "-"}
both = controlled(model.denoiser, edge=trained["edge"], depth=trained["depth"])
which = [int(row) for row in off["edge"].topk(3).indices]
shown = {
    "edges": figures.shown(maps["edge"][which]),
    "nearness": figures.shown(maps["depth"][which]),
}
for name, given in (
    ("edges alone", ("edge",)),
    ("nearness alone", ("depth",)),
    ("both", ("edge", "depth")),
):
    own_maps = {kind: maps[kind][which] for kind in given}
    shown[name] = figures.few(draw([""] * 3, both, w=1.0, **own_maps))
study.strip(list(zip(*shown.values(), strict=True)), column_titles=list(shown), scale=2)

# %%
together = by(controls_used.rows("together"), "controls")
table(
    {
        "text alone": once["nothing"],
        **{name: once[layer] for name, layer in controls_used.EXACT.items()},
        **together,
    }
)
for names, rows in together.items():
    for kind in names.split("+"):
        own = mean(once[controls_used.EXACT[kind]], kind)
        assert mean(rows, kind) < own + (mean(once["nothing"], kind) - own) / 8

# %% [markdown] slideshow={"slide_type": "slide"}
# ## On another base
#
# A control adds to features, and fine-tuning moves features little. So one that was trained on `mini-sd` can be put on any child of it. `mini-style` is `mini-sd` with a LoRA for cut-outs: objects in even light on a white sheet, without shadows. *Claim* (`... controls_used transfer`, three seeds): the controls of `mini-sd` are followed there, unchanged, and nine pictures of ten stay in the style. The reader of maps sees less where there is no ground and no shadow: hold each row against its reading of renders in the style.

# %% slideshow={"slide_type": "-"}
style_model = zoo.load("mini-style", device="cpu")
said = [texts[row] for row in which]
shown = {"text alone": figures.few(draw(said, style_model.denoiser))}
for kind in ("edge", "depth"):
    D_style = controlled(style_model.denoiser, **{kind: trained[kind]})
    shown[NAMES[kind]] = figures.shown(maps[kind][which])
    shown[f"and {NAMES[kind]}"] = figures.few(draw(said, D_style, **{kind: maps[kind][which]}))
study.strip(list(zip(*shown.values(), strict=True)), column_titles=list(shown), scale=2)

# %%
moved_to = by(controls_used.rows("transfer"), "layer")
table(moved_to, (*MEASURES, "styled"))
for kind, layer in controls_used.EXACT.items():
    gap = mean(moved_to["nothing"], kind) - mean(moved_to["renders"], kind)
    assert mean(moved_to[layer], kind) - mean(moved_to["renders"], kind) < 0.5 * gap
    assert mean(moved_to[layer], "styled") > mean(moved_to["nothing"], "styled") - 0.1

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How it is learnt: sudden, and from little
#
# Five ways to tell `mini-sd` the lines of a scene, trained alike, in as many steps on the same scenes, the rate of each chosen on validation scenes, three seeds (`python -m course_lib.zoo.controls`). Beside ControlNet there are two of its ablations,
#
# - *no zero convolutions*: Gaussian ones in their place;
# - *light encoder*: one convolution for each block of the copy, which sees the map alone (their ControlNet-lite);
#
# and two of the alternatives below. The paper reports that a control does not come by degrees: at some step it is suddenly followed. Here *sudden* is a number: the share of the whole fall of the error within a factor of two in steps around its middle; a fall that is even in the logarithm of the step has the share that stands beside it. Pictures of three of the five were looked at on the way.

# %% slideshow={"slide_type": "-"}
variants, ends = by(controls.rows("variants"), "method"), by(controls.rows("ends"), "of")
curves = {}
for name in SHOWN:
    rows = variants[name]
    steps = rows[0]["curve"]["steps"]
    curves[name] = (steps, torch.tensor([row["curve"]["edge"] for row in rows]).mean(0).tolist())
print(f"{STEPS} steps of {BATCH} scenes; dashed: the text alone, dotted: test renders, by the VAE")
for name, (steps, fall) in curves.items():
    of = convergence(steps, fall)
    print(
        f"{name:21s} the middle of the fall at step {of.step:3.0f}; {of.share:.0%} of it within a factor of two (even: {of.even:.0%})"
    )
untold = curves["ControlNet"][1][0]  # at step 0 it is the text alone, to the last bit
figures.learning(curves, untold, mean(ends["renders"], "edge"))

# %%
table(
    {"mini-sd": ends["mini-sd"], **variants, "renders": ends["renders"]},
    ("edge", "obeyed", "frechet"),
)
for name, rows in variants.items():
    print(
        f"{name:21s} {rows[0]['weights']:9,} weights, {mean(rows, 'seconds_a_step'):.2f} s a step of training"
    )
    assert max(row["edge"] for row in rows) < min(row["edge"] for row in ends["mini-sd"])
assert mean(variants["T2I-Adapter"], "edge") < mean(variants["ControlNet"], "edge")

# %% [markdown] slideshow={"slide_type": "slide"}
# In so few steps T2I-Adapter and concatenation are ahead. The first of the five after 5,000 steps is `mini-control-edge`, above.
#
# **What the zeros are for** is not the end: there Gaussian convolutions are as good. It is the beginning. Without zeros noise is added to every feature before the first step. What that does to pictures, on the validation scenes before training and after 50 steps:

# %% slideshow={"slide_type": "-"}
started = by(controls.rows("start"), "method", "step")
table(
    {f"{name}, step {step}": rows for (name, step), rows in started.items()},
    ("edge", "obeyed", "frechet"),
)
first_pictures = [mean(started[name, 0], "edge") for name in ("ControlNet", "no zero convolutions")]
assert first_pictures[0] < first_pictures[1]

# %% [markdown] slideshow={"slide_type": "slide"}
# **Little data.** A hundredth and a tenth of the scenes, as many steps: the locked network cannot forget. Beside it, concatenation trains all of `mini-sd`. *Claim*: with a hundredth of the data ControlNet follows lines it never saw better than the fine-tuned model, and in 400 steps about as well as with all of them. How far a method learnt its scenes by heart is in its losses: on its own scenes, and on validation scenes.

# %% slideshow={"slide_type": "-"}
less = controls.rows("little data") + controls.rows("some data")
little = by(less, "method", "scenes")
little |= {
    (name, variants[name][0]["scenes"]): variants[name] for name in ("ControlNet", "concatenation")
}
little = dict(sorted(little.items()))
named = {f"{name}, {n:,} scenes": rows for (name, n), rows in little.items()}
table(named, ("edge", "obeyed", "frechet"))
for name, rows in named.items():
    print(
        f"{name:30s} loss {mean(rows, 'loss_on_its_own'):.4f} on its own scenes, {mean(rows, 'loss'):.4f} on others"
    )
least = min(n for _, n in little)
gap = mean(ends["mini-sd"], "edge") - mean(ends["renders"], "edge")
assert mean(little["ControlNet", least], "edge") - mean(ends["renders"], "edge") < 0.5 * gap
assert mean(little["ControlNet", least], "edge") < mean(little["concatenation", least], "edge")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What nobody rendered
#
# Drawings stroke by stroke, in a child's perspective, whose corners overshoot or stay open, and the lines of photographs, of which the world of `mini-sd` has nothing. *Look* at six drawings, each with its words and without. *Claim* on 50 of them, three seeds (`... controls_used scribbles`): their lines are followed, with words and without, and without words the shape is found more often than by chance.

# %% slideshow={"slide_type": "-"}
sheets = hand.sketches()
drawn_by_hand = [2, 5, 6, 8, 11, 15]
ink = as_map(torch.stack([hand.ink(sheets[k]) for k in drawn_by_hand]))
words = [controls_used.words_of(sheets[k], k) for k in drawn_by_hand]
rows = {
    "drawing": figures.shown(ink),
    "and words": figures.few(draw(words, D_with["edge"], edge=ink)),
    "no words": figures.few(draw([""] * 6, D_with["edge"], w=1.0, edge=ink)),
}
study.strip(list(rows.values()), row_titles=list(rows), scale=2)

# %%
for text in words:
    print(text)
found = by(controls_used.rows("scribbles"), "text", "mode")
table(
    {f"{text}, {mode}": rows for (text, mode), rows in found.items()}, ("edge", "shape", "obeyed")
)
for text in ("named", "none"):
    assert mean(found[text, "both halves"], "edge") < mean(found[text, "nothing"], "edge")
assert mean(found["none", "both halves"], "shape") > mean(found["none", "nothing"], "shape") + 0.1

# %% [markdown] slideshow={"slide_type": "slide"}
# An astronaut and a cat are nothing that `mini-sd` knows. *Look*: their lines by Canny's detector, what the control makes of them without a text, and under a text of the model's own world. Measured on 16 photographs (`... controls_used photos`), with no text and with those of scenes: what the reader of maps finds of the lines, and what Canny's detector finds.

# %% slideshow={"slide_type": "-"}
photos = hand.photos()[[0, 2]]
their_lines = as_map(canny(photos))
shown = {
    "photograph": figures.few(photos, 13),
    "its lines": figures.shown(their_lines),
    "no text": figures.few(draw([""] * 2, D_with["edge"], w=1.0, edge=their_lines)),
    "a red sphere": figures.few(
        draw(["a large red sphere on grass"] * 2, D_with["edge"], edge=their_lines)
    ),
}
study.strip(list(zip(*shown.values(), strict=True)), column_titles=list(shown), scale=2)

# %%
found = by(controls_used.rows("photos"), "text", "mode")
table({f"text: {text}, {mode}": rows for (text, mode), rows in found.items()}, ("edge", "canny"))

# %% [markdown] slideshow={"slide_type": "-"}
# Where lines enclose nothing that the model knows, it draws what it knows, and few of them are followed. A control says *where*; *what* must come from the base.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Five other ways
#
# **T2I-Adapter** (Mou et al. 2023). A small network of the map alone, whose features are added *within* the encoder, scale by scale:
# $$F_{\text{enc}}^i\leftarrow F_{\text{enc}}^i+s\,F_c^i,\qquad F_c=\mathrm{Adapter}(c).$$
# It sees neither $x$ nor $\sigma$, so that it is evaluated once for a picture and not once a step. Nothing starts at zero.
#
# **Concatenation** (Stable Diffusion 2's depth model). The map is more channels of the input, and all weights learn: $F([x,m];\Theta')$. There is no base left to return to.
#
# **GLIGEN** (Li et al. 2023). Boxes and phrases become tokens $h^e=\mathrm{MLP}(f_{\text{text}}(e),\mathrm{Fourier}(l))$, and a new layer between self- and cross-attention lets the places $v$ of the picture look at them:
# $$v\leftarrow v+\beta\,\tanh(\gamma)\cdot\mathrm{TS}\big(\mathrm{SelfAttn}([v,h^e])\big),\qquad\gamma=0\text{ at first}.$$
# The gate is ControlNet's zero in a single number, and its gradient is not 0 for the same reason: $\partial v/\partial\gamma$ holds the attention, not $\gamma$.

# %% slideshow={"slide_type": "-"}
study.source(T2IAdapter.forward, Concatenated.forward)

# %% [markdown] slideshow={"slide_type": "-"}
# At equal training, on the lines of a scene (the comparison above); and what concatenation leaves of `mini-sd` where no map is given, which ControlNet leaves as it is:

# %%
table(
    {name: variants[name] for name in ("ControlNet", "T2I-Adapter", "concatenation")},
    ("edge", "obeyed", "frechet"),
)
kept = by(controls.rows("blank"), "scenes")
table(
    {
        "mini-sd": ends["mini-sd"],
        **{f"concatenation, {n:,} scenes, no map": rows for n, rows in kept.items()},
    },
    ("obeyed", "frechet"),
)

# %% [markdown] slideshow={"slide_type": "-"}
# GLIGEN is told other things, boxes, and is measured by them: how well the boxes of what is seen agree with those asked for (intersection over union), and how many do by a half or more. $\tau$ is the share of the steps, the first ones, with $\beta=1$. *Claim* (`python -m course_lib.zoo.layouts`, three seeds of noise): where no text says anything, boxes put things in their places many times better than chance. Beside a text, which here says where things are already, this short training adds nothing that can be told from chance.

# %%
placed = by(layouts.rows("layouts"), "text", "tau")
untold = by(layouts.rows("without"), "text")
table(
    {
        **{f"{'text' if text else 'no text'}, no boxes": rows for text, rows in untold.items()},
        **{
            f"{'text' if text else 'no text'}, boxes, τ = {tau:g}": rows
            for (text, tau), rows in sorted(placed.items(), reverse=True)
        },
        "renders": layouts.rows("floor"),
    },
    ("iou", "in_place", "obeyed", "frechet"),
)
assert mean(placed[False, 1.0], "iou") > 4 * mean(untold[False], "iou")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Guidance by a sketch** (Voynov, Aberman and Cohen-Or 2022). No control is trained. A small perceptron $P$ reads, at each place, from the features of the locked U-Net which lines the picture is about to have; each step is followed by a move that makes them those of the sketch $e$. In $z=x/\sqrt{1+\sigma^2}$,
# $$z'\leftarrow z'-\alpha\,\nabla_z\lVert P(F(z,t),t)-e\rVert^2,\qquad\alpha=\beta\,\frac{\lVert z-z'\rVert}{\lVert\nabla_z\lVert\cdot\rVert^2\rVert}.$$
# Every step pays for a way back through the network. What $P$ can know is in the figure: the share of the drawing's variance that the features leave open, over the noise. The published $P$ predicts the VAE's latents of the drawing; beside it one that predicts its pixels. *Claim* (`python -m course_lib.zoo.controls_guided sketch`, 200 test scenes, three seeds): the lines are followed far better than by the text alone, and with $P$ of the pixels as well as by a trained control, which is given here to both halves of the guidance. The trained control needs no way back, and serves maps that are not lines.

# %% slideshow={"slide_type": "-"}
study.source(sketch_guided)

# %%
guided = by(controls_guided.rows("sketch"), "method")
table(guided)
for code in controls_guided.CODES:
    assert 2 * max(row["edge"] for row in guided[code]) < min(row["edge"] for row in guided["none"])
assert mean(guided["lines"], "edge") < mean(guided["control"], "edge")
figures.told_by_features(controls_guided.rows("predictor"))

# %% [markdown] slideshow={"slide_type": "slide"}
# **Noise priors** (SCP-Diff; Gao et al. 2024). Sampling starts from $\mathcal N(0,I)$, but training never ended there: $\bar\alpha_T>0$ leaves some of $x_0$ in $x_T$. So start where noised scenes of this map are:
# $$x=m(c)+\sqrt{v(c)+\sigma_{\max}^2}\;\epsilon,$$
# with $m,v$ the mean and variance of latents at each place (*spatial*), of each class (*categorical*), or of each class at each place (*joint*). How much there is to gain can be computed before any picture is drawn: the difference in nats between the usual start and the prior, for true noised scenes. *Claim* (`... controls_guided priors 'late priors'`, 200 test scenes, three seeds): with two steps pictures under the control of classes come nearer to renders, by little from the end of the schedule, and by a fifth when sampling begins at the time that was best on validation scenes. With five steps and more there is nothing left to gain.

# %% slideshow={"slide_type": "-"}
for row in controls_guided.rows("mismatch"):
    nats = ", ".join(f"{name} {value:.2f}" for name, value in row["nats"].items())
    print(
        f"t = {row['t']}, σ = {row['sigma']:.1f}: of x0 there is {row['signal']:.1%} in x; nats gained a scene: {nats}"
    )
measures = ("seg", "obeyed", "frechet")
from_the_end = by(controls_guided.rows("priors"), "steps", "prior")
table(
    {
        f"{steps} steps from t = 999, {name}": rows
        for (steps, name), rows in sorted(from_the_end.items())
    },
    measures,
)
later = by(controls_guided.rows("late priors"), "steps", "prior")
table(
    {
        f"{steps} steps from t = {rows[0]['t']}, {name}": rows
        for (steps, name), rows in sorted(later.items())
    },
    measures,
)
for began in (from_the_end, later):
    assert mean(began[2, "joint"], "frechet") < mean(began[2, "plain"], "frechet")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Draw, or take a map of a scene; text, scale, interval and guess mode beside it. **At which scale does the drawing beat a text that says something else? Give the control the first quarter of the steps only, then the last: what is lost? Draw two circles, say "a mug": what comes of the second?**

# %% slideshow={"slide_type": "-"}
study.ControlExplorer(model, trained, judge, reader)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# **A map in $[-1,1]$.** Pictures lie in $[-1,1]$ here, maps in $[0,1]$. A map of another range is refused, with the way to mend it; past the check it runs, and black means something that the control never saw. **A control for another width** is refused too. **A scale that is too high** follows the lines no better, and the text no longer. **Gaussian weights for zeros**: before the first step all pictures are others already.

# %% slideshow={"slide_type": "-"}
wrong = {
    "range": lambda: D_with["edge"].given(edge=2 * maps["edge"] - 1),
    "bytes": lambda: D_with["edge"].given(edge=255 * maps["edge"]),
    "channels": lambda: D_with["edge"].given(edge=maps["edge"][:, :1]),
    "width": lambda: controlled(D, edge=trained["edge"]),
}
for name, call in wrong.items():
    try:
        call()
    except ValueError as error:
        print(f"{name}: {error}")
    else:
        raise AssertionError(f"{name}: no error")


class Unchecked(nn.Module):
    """The control of a map that is turned to [-1, 1] behind the check."""

    def __init__(self, control):
        super().__init__()
        self.control, self.zeros, self.channels = control, control.zeros, control.channels

    def forward(self, x, time, c, **condition):
        return self.control(x, time, 2 * c - 1, **condition)


shifted = controlled(model.denoiser, edge=Unchecked(trained["edge"]))
no_zeros = controlled(model.denoiser, edge=without_zeros(control_of(model.net)))
pictures = {
    "as it should be": told["edge"],
    "map in [-1, 1]": draw(texts, shifted, edge=maps["edge"]),
    "scale 8": draw(texts, D_with["edge"], edge=maps["edge"], edge_scale=torch.full((24,), 8.0)),
    "no zeros, step 0": draw(texts, no_zeros, edge=maps["edge"]),
}
found = {name: worth(of) for name, of in pictures.items()}
for name, of in found.items():
    away = float((pictures[name] - alone).square().mean().sqrt())
    print(
        f"{name:17s} error of the edges {of['edge']:.3f}, obeyed {of['obeyed']:.0%},"
        f" away from the text alone by {away:.2f}"
    )
right = found["as it should be"]
assert all(of["edge"] > right["edge"] for name, of in found.items() if of is not right)
assert found["scale 8"]["obeyed"] < right["obeyed"]
study.strip(
    [figures.shown(maps["edge"][6:11]), *(figures.few(of[6:11]) for of in pictures.values())],
    row_titles=["map", *pictures],
    scale=1,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Maps that contradict each other.** The edges of one scene with the nearness of another. Residuals are added, and nothing decides between them; the scale does, and so does a text that belongs to one of the two (`... controls_used against`, 200 scenes):

# %% slideshow={"slide_type": "-"}
for row in controls_used.rows("against"):
    print(
        f"text of {row['text']:8s} scale of the edges {row['edge']:<4g}: edges are followed in {row['edges_win']:.0%}, nearness in {row['depth_wins']:.0%}"
    )

# %% [markdown] slideshow={"slide_type": "slide"}
# **No text is dropped.** Trained with texts always there, a control may leave to the text what the map says too, and without one it is at a loss. Half of them are dropped for that reason; guess mode above lives on it.
#
# ## What it costs
#
# Count operations: $E$ in the encoder and the middle, $D$ in the decoder, $H$ in what a control has beside its copy. A call with a control costs
# $$\frac{2E+D+H}{E+D}$$
# times one without. In training the way back costs as much as the layer for its input, and as much again for its weights: $3(E+D)$ where all of the U-Net learns. A control needs no way back through the locked encoder, and none to the locked decoder's weights; but *through* the decoder it must go, to reach the zero convolutions:
# $$\frac{E+2D+3\,(E+H)}{3\,(E+D)}.$$
# The optimiser holds averages of the control's weights alone. The map's encoder sees all of the map's pixels, and on latents as small as these that is as much work as the copy; it depends on the map alone, and could be kept from step to step. `course bench control` measures times and memory on your machine.

# %% slideshow={"slide_type": "-"}
for part in bench_control.parts():
    print(f"{part.name:20s} {part.flops / 1e6:6.1f} million operations, {part.weights:9,} weights")
for name, ratio in bench_control.expected().items():
    print(f"{name}: {ratio:.2f} times, by operations; published: {bench_control.PUBLISHED[name]}")
    assert 1 < ratio < 2

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# The cells of `mini-sd` with another name. The control goes out to `diffusers` and comes back, as one that was trained elsewhere would come in. Where the weights of Stable Diffusion are, `control_of` makes a control for its U-Net: untrained, so that the latents must be the same with a map and without, to the last bit. On `mini-sd` it is the control of edges from above.

# %%
name = next(name for name in ("stable-diffusion-1.5", "mini-sd") if zoo.available(name))
sd = zoo.load(name)
made = trained["edge"] if name == "mini-sd" else control_of(sd.net).requires_grad_(False)
theirs = to_diffusers(made, sd.net)  # for diffusers' pipelines, and to be saved
print(
    f"{name}: {zoo.parameters(sd.net) / 1e6:,.1f} M weights locked, {theirs.num_parameters() / 1e6:,.1f} M in a {type(theirs).__name__}"
)
D_sd = controlled(sd.denoiser, edge=from_diffusers(theirs).to(sd.device))
side = 8 * sd.shape[-1]  # of the map: made at its size, since thin lines do not survive resizing
c = edge_map(render(scenes.scenes[torch.tensor([7])], side)).to(sd.device)
levels, drawn = sd.sigmas(15), []
begin = sd.start(SampleNoise(2)(torch.empty(1, *sd.shape, device=sd.device)), levels[0])
with torch.no_grad():
    for given in ({}, {"edge": c}):
        halves = (D_sd.given(**given, **sd.embed([text])) for text in ("a red house on sand", ""))
        drawn.append(sd.finish(sample(cfg(*halves, 3.0), begin, levels), levels[-1]))
    pictures = sd.decode(torch.cat(drawn)).float().cpu()
assert torch.equal(*drawn) == (name != "mini-sd")
study.grid(
    [figures.shown(F.interpolate(c.cpu(), pictures.shape[-2:]))[0], *figures.few(pictures)],
    titles=["map", "text", "text and map"],
    scale=max(1, 128 // sd.pixels),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - $y_c=F(x;\Theta)+Z(F(x+Z(c))\,)$: lock, copy, join by zeros. At the start it is the base to the last bit, and without a map it always is.
# - A zero convolution learns because $\partial L/\partial W=g\,x^\top$ holds $x$ and not $W$; it holds up what lies before it for one step.
# - Measure control by reading the map back, beside what text and likeness lose.
# - Scales, intervals and layers are multipliers of residuals; controls add; what is where is settled at large $\sigma$, exact lines at small.
# - The map in both halves of guidance leaves $w$ to the text; in one, $w$ is the map's too.
# - A control says where. What, the base must know.
#
# **Exercises.** [Set 13](../my_course/13_controlnet.ipynb).
#
# ## Sources
#
# - L. Zhang, A. Rao, M. Agrawala. *Adding Conditional Control to Text-to-Image Diffusion Models.* 2023. arXiv:2302.05543 (ControlNet)
# - C. Mou, X. Wang, L. Xie, Y. Wu, J. Zhang, Z. Qi, Y. Shan, X. Qie. *T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion Models.* 2023. arXiv:2302.08453
# - Y. Li, H. Liu, Q. Wu, F. Mu, J. Yang, J. Gao, C. Li, Y. J. Lee. *GLIGEN: Open-Set Grounded Text-to-Image Generation.* 2023. arXiv:2301.07093
# - A. Voynov, K. Aberman, D. Cohen-Or. *Sketch-Guided Text-to-Image Diffusion Models.* 2022. arXiv:2211.13752
# - H. Gao et al. *SCP-Diff: Spatial-Categorical Joint Prior for Diffusion Based Semantic Image Synthesis.* 2024. arXiv:2403.09638
# - R. Rombach, A. Blattmann, D. Lorenz, P. Esser, B. Ommer. *High-Resolution Image Synthesis with Latent Diffusion Models.* 2022. arXiv:2112.10752 (concatenation)
# - J. Canny. *A Computational Approach to Edge Detection.* 1986. IEEE Transactions on Pattern Analysis and Machine Intelligence 8(6)
# - E. Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models.* 2022. arXiv:2106.09685
