# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 05 Latent diffusion and architectures
#
# **What Stable Diffusion is made of.** A picture is squeezed into a small grid of numbers, a diffusion model learns those, a text steers it, and a decoder paints the result. Each of these parts is here in a size that you can retrain, taken apart and measured.
#
# After it you can
#
# - say what a pixel costs, and what a latent keeps and loses;
# - train a KL autoencoder, scale its latents, and say what happens to who forgets it;
# - write cross-attention, and see which word a place of the picture listens to;
# - tell U-Net, U-ViT and DiT apart by what they are and by what they cost, at equal numbers of weights;
# - hold a joint density in one network by two times, split the levels among experts, move a schedule to another resolution, and decode a latent at any size.
#
# You need lectures 01, 02 and 04. Time: 90 minutes. Everything runs on a laptop, with no network.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from course_lib import metrics, study, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.guidance import cfg
from course_lib.nets.crossattention import CrossAttention, recorded, word_maps
from course_lib.nets.dit import DiT, DiTBlock
from course_lib.nets.unet import UNet
from course_lib.nets.vae import Posterior
from course_lib.sample import sample
from course_lib.schedules import Cosine
from course_lib.shifts import Shifted
from course_lib.training import fit
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import labels
from course_lib.zoo import compare, latent_scenes
from course_lib.zoo.compare import latents as compared
from course_lib.zoo.recipes import scenes_joint

torch.set_num_threads(1)
study.use()
model = zoo.load("mini-sd", device="cpu")
reader = zoo.load("scenes-reader", device="cpu")
scenes = SceneDataset(200, 51)  # new ones: no model of the course was trained on them
pictures = scenes.pictures(torch.arange(200))
with torch.no_grad():
    latents = model.encode(pictures)
    back = model.decode(latents)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# On the left, scenes of 64 × 64 pixels, 12,288 numbers each. Then the four channels of their latents, 8 × 8 numbers each, 256 in all. On the right, what the decoder makes of those 256.


# %% slideshow={"slide_type": "-"}
def coloured(values, low, high, colours):
    """Numbers (N, h, w) as pictures (N, 3, 64, 64)."""
    rgb = torch.from_numpy(
        plt.get_cmap(colours)(((values - low) / (high - low)).clamp(0, 1).numpy())
    )
    return F.interpolate(2 * rgb[..., :3].permute(0, 3, 1, 2).float() - 1, (64, 64), mode="nearest")


shown = [2, 7, 9]
columns = [
    pictures[shown],
    *(coloured(latents[shown, k], -3, 3, "RdBu") for k in range(4)),
    back[shown],
]
names = ["picture", *(f"channel {k}" for k in range(1, 5)), "decoded"]
study.strip(list(zip(*columns, strict=True)), column_titles=names, scale=2)

# %% slideshow={"slide_type": "-"}
quality = metrics.psnr(back, pictures)
read = reader.read(back).shape[:, 0] == reader.read(pictures).shape[:, 0]
print(f"{pictures[0].numel() / latents[0].numel():.0f} times fewer numbers")
print(f"PSNR {quality:.1f} dB; the same shape is read in {float(read.double().mean()):.1%}")
assert quality > 30 and float(read.double().mean()) > 0.95

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Pixels are expensive
#
# The same small U-Net, on pictures and on latents. A convolution costs in proportion to the number of places, attention to its square, and training keeps what every layer gave until the gradient has come back. *Claim*: on the latents the same network costs a tenth of the operations and of the memory, or less.


# %% slideshow={"slide_type": "-"}
def cost(net, x):
    """Operations of a call, and the bytes that autograd keeps for the way back."""
    kept = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    time = torch.zeros(len(x))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, time)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net(x, time).sum().backward()
    return counter.get_total_flops(), sum(kept.values())


torch.manual_seed(0)
on_pixels, on_latents = (
    cost(UNet(channels, (40, 56), blocks=1, attention=(1,)), torch.randn(1, channels, side, side))
    for channels, side in ((3, 64), (4, 8))
)
for name, pixels, latent in zip(
    ("operations of a call", "bytes kept in training"), on_pixels, on_latents, strict=True
):
    print(
        f"{name:24s} pixels {pixels / 1e6:8.1f} M, latents {latent / 1e6:6.2f} M: 1 / {pixels / latent:.0f}"
    )
    assert latent < pixels / 10

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The autoencoder
#
# The encoder says, for each number of the latent, a mean and a deviation: $q(z\mid x)=\mathcal N(\mu(x),\operatorname{diag}s(x)^2)$. The decoder paints from a draw $z=\mu+s\,\epsilon$. Training asks for two things at once (Rombach et al. 2022, Sec. 3.1):
# $$L=\underbrace{\mathbb E\,\lVert x-\mathrm{dec}(z)\rVert}_{\text{paint it again}}+\beta\;\underbrace{\tfrac12\sum\big(\mu^2+s^2-1-\log s^2\big)}_{\mathrm{KL}(q\,\Vert\,\mathcal N(0,I))}.$$
# A variational autoencoder draws by decoding $z\sim\mathcal N(0,I)$, so that it needs a $\beta$ at which the latents *are* about normal, and blurs. Here a diffusion model will learn what the latents are. They must only be bounded and smooth, so that a small error of the diffusion model is a small error of the picture, and $\beta$ is tiny.

# %% slideshow={"slide_type": "-"}
study.source(Posterior.sample, Posterior.kl)

# %% [markdown] slideshow={"slide_type": "slide"}
# *Claim*: the weight of the KL term trades one for the other. Autoencoders of the digits, three weights, three seeds each, judged on digits that they have not seen (`python -m course_lib.zoo.compare kl`): with the weight the reconstruction gets worse, and what the decoder makes of pure noise gets better. At no weight are both good: the gap is what the diffusion model fills.

# %% slideshow={"slide_type": "-"}
by_weight = {}
for row in compare.rows("kl"):
    by_weight.setdefault(row["weight"], []).append(row)
print("weight    KL in nats    PSNR of the reconstruction     Fréchet distance of decoded noise")
for weight, runs in by_weight.items():
    quality, distance = ([f"{run[key]:5.2f}" for run in runs] for key in ("psnr", "frechet"))
    nats = sum(run["kl"] for run in runs) / len(runs)
    print(f"{weight:6g} {nats:12.0f}       {', '.join(quality)} dB     {', '.join(distance)}")
small, middle, large = by_weight.values()
assert max(run["psnr"] for run in large) < min(run["psnr"] for run in small + middle) - 1
assert max(run["frechet"] for run in large) < min(run["frechet"] for run in middle)
assert max(run["frechet"] for run in middle) < min(run["frechet"] for run in small)

# %% [markdown] slideshow={"slide_type": "slide"}
# What does the latent keep? Noise of growing size is put on the latents, and the reader reads what the decoder makes of them. *Claim*: the posterior's own deviation is far below what shows, and a tenth of the latents' spread costs little.

# %% slideshow={"slide_type": "-"}
with torch.no_grad():
    posterior = model.vae.encode(pictures).latent_dist
    own = float((posterior.std / posterior.mean.std((0, 2, 3), keepdim=True)).mean())
few, true = latents[:60], reader.read(pictures[:60]).shape[:, 0]
kept = {}
for share in (0.0, own, 0.1, 0.3, 1.0):
    with torch.no_grad():
        again = model.decode(few + share * torch.randn(few.shape, generator=generator(4)))
    same = float((reader.read(again).shape[:, 0] == true).double().mean())
    kept[share] = (metrics.psnr(again, pictures[:60]), same)
    print(f"noise {share:5.3f} of the spread: {kept[share][0]:5.1f} dB, shape kept in {same:.0%}")
assert own < 0.05 and kept[0.0][0] - kept[own][0] < 0.3
assert kept[0.1][1] > 0.95 and kept[1.0][1] < 0.7

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The scale factor
#
# Nothing in the autoencoder's loss says how large its latents are: Stable Diffusion's have a deviation of 5.5, and its code multiplies them by 0.18215, one over it. A schedule is made for data of deviation 1. *Claim*: with latents five times too large the last level still shows the picture, so that a sampler that starts from pure noise starts where it never trained; five times too small, nearly all levels are nothing but noise. Both end farther from the data than latents of deviation 1, on three seeds.

# %% slideshow={"slide_type": "-"}
found = {}
for row in compare.rows("scales"):
    found.setdefault(row["scale"], []).append(row)
for scale, runs in sorted(found.items()):
    distance = [f"{run['frechet'][0]:.3f}" for run in runs]
    obeyed = [f"{run['adherence']:.0%}" for run in runs]
    print(
        f"deviation {scale:3g}: Fréchet distance {', '.join(distance)}; shape as asked {', '.join(obeyed)}"
    )
for one, other in zip(found[1.0], found[5.0], strict=True):
    assert one["frechet"][0] < other["frechet"][0]
for one, other in zip(found[1.0], found[0.2], strict=True):
    assert one["frechet"][0] < other["frechet"][0]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What the text does: cross-attention
#
# Every place $i$ of the picture asks every word $j$ of the text,
# $$a_{ij}=\operatorname{softmax}_j\big(q_i\cdot k_j/\sqrt d\big),\qquad x_i\leftarrow x_i+W\sum_j a_{ij}\,v_j ,$$
# with queries $q$ made of the picture and keys and values $k,v$ made of the words.

# %% slideshow={"slide_type": "-"}
study.source(CrossAttention.maps, CrossAttention.forward)

# %% [markdown] slideshow={"slide_type": "slide"}
# The rows of $a$ sum to 1, so that a map of one word says *who listens to it*. *Claim*: the places of the object listen to the word of its colour.

# %% slideshow={"slide_type": "-"}
prompt = "a large red mug on grass"
words = prompt.split()
with torch.no_grad(), recorded(model.components["unet"]) as kept:
    D = model.denoiser.given(**model.embed([prompt]))
    sigmas = model.sigmas(15)
    begin = model.start(SampleNoise(2)(torch.empty(1, *model.shape)), sigmas[0])
    drawn = model.decode(model.finish(sample(D, begin, sigmas), sigmas[-1]))[0]
maps = word_maps(kept, 64)[0, 1:]
red = drawn[0] - drawn[1:].amax(0) > 0.5
listens = [float(maps[words.index("red")][part].mean()) for part in (red, ~red)]
print(f"attention to “red”: {listens[0]:.3f} on the object, {listens[1]:.3f} elsewhere")
assert listens[0] > 1.2 * listens[1]
chosen = ("large", "red", "mug", "grass")
heat = [maps[words.index(word)] for word in chosen]
heat = [coloured(one[None], one.min(), one.max(), "magma")[0] for one in heat]
study.grid([drawn, *heat], titles=[prompt.replace(" on", "\non"), *chosen], scale=2)

# %% slideshow={"slide_type": "slide"}
study.LatentExplorer(model)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## U-Net, ViT, U-ViT, DiT
#
# Four ways to make $v(x,t,c)$ of the same numbers.
#
# - **U-Net** (Ronneberger et al. 2015; Ho et al. 2020): convolutions on a pyramid, skips from the way down to the way up; time and class scale and shift every block.
# - **ViT** (Dosovitskiy et al. 2021): patches are tokens, and so are the time and the class; a plain transformer.
# - **U-ViT** (Bao et al. 2023a): a ViT with the U-Net's long skips, from the first half of the blocks to the second.
# - **DiT** (Peebles and Xie 2023): patches are tokens; time and class set the scale, shift and *gate* of every block, by a layer that starts at zero. So each block starts as the identity, and the network as 0.

# %% slideshow={"slide_type": "-"}
study.source(DiTBlock)

# %% slideshow={"slide_type": "-"}
torch.manual_seed(0)
block, tokens, told = DiTBlock(96, 4), torch.randn(2, 16, 96), torch.randn(2, 96)
assert torch.equal(block(tokens, told), tokens), "each block is the identity at the start"
with torch.no_grad():
    assert float(DiT(4, 96, 4, 4)(torch.randn(2, 4, 8, 8), torch.tensor(500.0)).abs().max()) == 0

# %% [markdown] slideshow={"slide_type": "slide"}
# Does it matter where a block starts? A small one, trained here and now for 100 steps on the latents of 150 of the scenes above, and once more with random weights where adaLN-zero has zeros. *Claim*: the identity is the better start; below it, the same on 12,000 scenes with 500 steps, three seeds (`python -m course_lib.zoo.compare starts`).

# %% slideshow={"slide_type": "-"}
asked = labels(scenes.scenes).shape[:, 0]


def batch(source):
    """Rows of 150 scenes, noise levels, noise, and the shape that is asked for."""
    rows = torch.randint(150, (compared.BATCH,), generator=source)
    eps = torch.randn(len(rows), *latents.shape[1:], generator=source)
    return latents[rows], compared.levels(len(rows), source=source), eps, asked[rows]


ends = {}
for name in ("identity", "random"):
    torch.manual_seed(0)
    net = compared.NETWORKS["DiT, patch 2"]()
    if name == "random":
        compared.at_random(net)
    run = fit(net, batch, compared.loss_of, steps=100, lr=4e-3, device="cpu", progress=False)
    ends[name] = sum(run.losses[-25:]) / 25
print(", ".join(f"{name} start: loss {loss:.3f}" for name, loss in ends.items()))
assert ends["identity"] < ends["random"]
stored = {
    zero: [row["loss"] for row in compare.rows("starts") if row["zero"] == zero]
    for zero in (True, False)
}
print("12,000 scenes, identity:", *stored[True], "random:", *stored[False])
assert max(stored[True]) < min(stored[False])

# %% [markdown] slideshow={"slide_type": "slide"}
# Compared at equal numbers of weights, 0.73 million to within 4 %, on the same latents with the same batches; the learning rate of each chosen on a validation split among the same five; three seeds each (`python -m course_lib.zoo.compare networks`). Three axes for one curve, since *better* depends on what is scarce.

# %% slideshow={"slide_type": "slide"}
runs = compare.rows("networks")
COLOURS = {
    name: study.COLOURS[c]
    for name, c in zip(compared.NETWORKS, ("model", "data", "muted", "guide", "noise"), strict=True)
}
fig, axes = plt.subplots(1, 3, figsize=(8, 2.9), sharey=True)
for run in runs:
    steps, seconds, loss = (
        torch.tensor(c, dtype=torch.float64) for c in zip(*run["curve"], strict=True)
    )
    operations = 3 * run["flops"] * run["batch"] * steps / 1e12  # forward once, backward twice
    label = run["network"] if run["seed"] == 0 else None
    for ax, x in zip(axes, (steps, operations, seconds), strict=True):
        ax.plot(x, loss, color=COLOURS[run["network"]], label=label, linewidth=1.5)
for ax, name in zip(axes, ("steps", "10¹² operations", "seconds, one thread"), strict=True):
    ax.set(xlabel=name)
axes[0].set_ylabel("held-out loss")
axes[2].legend(fontsize=10)
plt.show()
final = {
    name: [run["loss"] for run in runs if run["network"] == name] for name in compared.NETWORKS
}
for name, losses in final.items():
    print(f"{name:15s} held-out loss {', '.join(f'{loss:.4f}' for loss in losses)}")
assert max(final["U-Net"]) < min(min(losses) for name, losses in final.items() if name != "U-Net")
for name in ("ViT, patch 2", "U-ViT, patch 2"):
    assert max(final["DiT, patch 2"]) < min(final[name])

# %% [markdown]
# At this size and length the U-Net is the best per step: its convolutions *know* that neighbours belong together, and a transformer must learn it from 12,000 pictures. Per operation the DiT with patches of 2 × 2 is ahead at first: it uses each weight for 16 tokens in place of 64 places. Patches of one number cost four times as much and end no better in loss. ViT and U-ViT come last: they are told time and class by one token each and must spread them by attention, where DiT and U-Net set every layer by them. U-ViT's long skips do not show at five blocks; its authors need them at thirteen. The published comparisons, at a thousand times the size, end with transformers in front: a bias helps until the data have taught it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Experts by noise level
#
# At high noise a model decides what there is, at low noise how it looks. eDiff-I (Balaji et al. 2022) gives each range of levels a network of its own: a step of sampling costs what it did, the memory doubles. Here a DiT is trained on all levels, then copied: one copy goes on with the lower half of the times, the other with the upper half; the control goes on with all of them. *Claim*: with as many steps for each network the experts' loss is lower, on each of three seeds, and experts on each other's half are worse than no experts. With half as many steps for each, which is the same training in all, they are slightly behind: what is learned at one level helps at the others, and that is what an expert gives up. Experts are a way to spend more training without a slower sampler (`python -m course_lib.zoo.compare experts`).

# %% slideshow={"slide_type": "-"}
for run in compare.rows("experts"):
    kinds = ("before", "one network", "experts", "half as long", "swapped")
    mean = {name: sum(run[name]) / 2 for name in kinds}
    print(", ".join(f"{name} {loss:.4f}" for name, loss in mean.items()))
    assert mean["experts"] < mean["one network"] < mean["half as long"] < mean["before"]
    assert mean["before"] < mean["swapped"]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Two times: UniDiffuser
#
# A picture $x$ and what is said of it, $a$: five attributes, each as ones and minus ones. One network is trained with *independent* noise levels for both, and predicts both (Bao et al. 2023b). What is known has the time 0; what is unknown has the last time, where nothing is left of it. So the same weights hold
# $$p(x,a),\qquad p(x\mid a),\qquad p(a\mid x),\qquad p(x),\qquad p(a).$$

# %% slideshow={"slide_type": "-"}
uni = zoo.load("scenes-joint", device="cpu")
shape, colour, size, ground, light = (tuple(values) for values in latent_scenes.ATTRIBUTES.values())
asked = torch.tensor([[1, 5, 1, 3, 1], [6, 1, 1, 0, 1], [4, 0, 1, 2, 0], [2, 2, 1, 1, 2]])
told = scenes_joint.decode(scenes_joint.draw(uni.pictures(uni.vectors(asked)), (4, 4, 8, 8), 1))
seen = latents[[0, 2, 7, 9]]
guessed = uni.values(scenes_joint.draw(uni.attributes(seen), (4, sum(latent_scenes.SIZES)), 3))


def say(values):
    """Colour and shape, and the ground below them."""
    return f"{colour[values[1]]} {shape[values[0]]}\non {ground[values[3]]}"


titles = [*(f"“{say(row)}”" for row in asked), *(say(row) for row in guessed)]
study.grid([*told, *scenes_joint.decode(seen)], columns=4, titles=titles, scale=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# Above, pictures that were drawn for what stands over them; below, attributes that were drawn for pictures. *Claim*: all five are learned by the one network. Read back, 1,000 of each: pictures that were asked for by attributes, attributes that were drawn for pictures, and pairs that were drawn together; all five attributes agree by chance once in 2,304. The last row of the table is the control: told nothing, the pictures do not know what was said. The last line is the distance of $p(a)$ from the true frequencies of each attribute.

# %% slideshow={"slide_type": "-"}
card = zoo.card("scenes-joint")["metrics"]
for key, name in (
    ("pictures_of_attributes", "x given a"),
    ("attributes_of_pictures", "a given x"),
    ("joint", "both"),
    ("pictures_alone_beside_attributes", "x alone"),
):
    print(f"{name:10s}", ", ".join(f"{part} {share:.0%}" for part, share in card[key].items()))
print("p(a), total variation:", card["attributes_alone_total_variation"])
assert (
    min(card[key]["all"] for key in ("pictures_of_attributes", "attributes_of_pictures", "joint"))
    > 0.3
)
assert card["pictures_alone_beside_attributes"]["all"] < 0.01

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same picture at another size hides another amount of noise
#
# The mean of $k\times k$ pixels keeps the picture and divides the noise by $k$. So at 256 pixels $\sigma=1$ is what $\sigma=1/4$ is at 64: a schedule that was made for 64 pixels hardly ever hides what a picture of 256 shows. Simple diffusion (Hoogeboom et al. 2023) multiplies $\sigma$ by the ratio of the sizes, which shifts $\log\mathrm{SNR}$ by $2\log(d_0/d)$; Stable Diffusion 3 does the same to the straight line's time.

# %% slideshow={"slide_type": "-"}
sigma = 1.0
fine = SceneDataset(1, 51, 256).pictures(torch.arange(1))
coarse = F.avg_pool2d(fine, 4)
noisy = fine + sigma * torch.randn(fine.shape, generator=generator(3))
pooled = F.avg_pool2d(noisy, 4)
found = float((pooled - coarse).std())
print(f"after the mean of 4 x 4 pixels: sigma = {found:.3f}")
assert abs(found - sigma / 4) < 4.5 * 0.25 / (2 * coarse.numel()) ** 0.5
window = slice(96, 160)
views = [noisy[0, :, window, window], pooled[0, :, 24:40, 24:40], coarse[0, :, 24:40, 24:40]]
views = [F.interpolate(view[None], (64, 64), mode="nearest")[0].clamp(-1, 1) for view in views]
t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
torch.testing.assert_close(Shifted(Cosine(), 4.0).sigma(t), 4 * Cosine().sigma(t))
study.grid(views, titles=["256 px, σ = 1", "its 4 × 4 means", "64 px"], scale=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A latent at any size
#
# The decoder has 64 × 64 pixels built in. A *local implicit image function* (LIIF; Chen et al. 2021) asks instead: what is the colour *here*, of a pixel *this large*? Features of the decoder are a grid of vectors $z$; a place $p$ takes the four nearest, each with its own small vector of where $p$ lies in its cell, and mixes the four answers by the opposite areas,
# $$c(p)=\sum_{i=1}^{4} w_i\,f_\theta\big(z_i,\;p-p_i,\;\text{size of the pixel}\big).$$
# Kim and Kim (2024) put it behind a latent diffusion model, so that a picture that was drawn once can be looked at in any size. *Claim*: at each size but its own, against the renderer, it beats enlarging the 64 pixels bicubically, by more than 4.5 standard errors over 100 scenes; two of the sizes it was never trained on.

# %% slideshow={"slide_type": "-"}
decoder = zoo.load("mini-sd-any-scale", device="cpu")
for row in zoo.card("mini-sd-any-scale")["metrics"]["sizes"]:
    gain, error = row["gain"]
    print(f"{row['size']:4d} px: {row['psnr']:.2f} dB, gain {gain:.2f} ± {error:.2f} dB")
    assert gain > (4.5 * error if row["size"] != 64 else -3 * error)
z = latents[3:4]
large = SceneDataset(200, 51, 256).pictures(torch.tensor([3]))
with torch.no_grad():
    bicubic = F.interpolate(model.decode(z), (256, 256), mode="bicubic").clamp(-1, 1)
views = {
    "64 px, enlarged": bicubic,
    "latent at 256 px": decoder.decode(z, 256),
    "render at 256 px": large,
}
parts = torch.cat([view[:, :, 88:184, 80:176] for view in views.values()])
here = [metrics.psnr(views[name], large) for name in ("64 px, enlarged", "latent at 256 px")]
print(f"this one at 256 px: enlarged {here[0]:.2f} dB, asked {here[1]:.2f} dB")
study.grid(parts, titles=list(views), scale=2)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Cascades, and what a model is told about its data
#
# Imagen and DALL·E 2 draw a small picture first and refine it by models of their own. The refiner is trained on *true* small pictures and then given *drawn* ones, with mistakes that it never saw: it paints them out carefully. **Conditioning augmentation** (Ho et al. 2022, Sec. 4) trains it on small pictures with noise of a random level, which it is told, so that it learns to trust them less, and puts noise on the drawn ones too. Here both stages work on latents, 4 × 4 and 8 × 8. *Claim*: after a first stage of 400 steps, which is often wrong, the shape that was asked for is read more often with augmentation, on each of three seeds; after one of 1,500 steps the gain is smaller; from true small latents, where there is nothing to repair, it costs (`python -m course_lib.zoo.compare cascade`).

# %% slideshow={"slide_type": "-"}
found = {}
for row in compare.rows("cascade"):
    found.setdefault((row["first"], row["augmented"]), []).append(row)
for (first, augmented), runs in sorted(found.items()):
    for of in ("true", "sampled"):
        obeyed = ", ".join(f"{run[of]['adherence']:.0%}" for run in runs)
        distance = ", ".join(f"{run[of]['frechet'][0]:.2f}" for run in runs)
        kind = "augmented" if augmented else "plain"
        print(
            f"first stage of {first:,} steps, {kind:9s} from {of:7s} latents: as asked {obeyed}; Fréchet distance {distance}"
        )
for plain, with_noise in zip(found[400, False], found[400, True], strict=True):
    assert with_noise["sampled"]["adherence"] > plain["sampled"]["adherence"]
    assert with_noise["true"]["adherence"] < plain["true"]["adherence"]
gain = {
    first: [
        b["sampled"]["adherence"] - a["sampled"]["adherence"]
        for a, b in zip(found[first, False], found[first, True], strict=True)
    ]
    for first in (400, 1500)
}
assert all(small < large for small, large in zip(gain[1500], gain[400], strict=True))

# %% [markdown] slideshow={"slide_type": "slide"}
# **Size conditioning** (SDXL; Podell et al. 2023, Sec. 2.2). Half of the data are pictures of 16 pixels, enlarged. A model that is not told which they are learns to blur half of the time; SDXL is told the size that each picture had, and is then asked for a large one. *Claim*: it draws sharper, on each of three seeds: it learns from the small pictures and does not imitate them. The Fréchet distance, in the features of a reader that asks what there is and not how sharp it is, does not see the difference.

# %% slideshow={"slide_type": "-"}
found = {}
for row in compare.rows("sizes"):
    found.setdefault(row["told"], []).append(row)
for told, runs in found.items():
    sharp = ", ".join(f"{run['sharpness']:.2f}" for run in runs)
    distance = ", ".join(f"{run['frechet'][0]:.3f}" for run in runs)
    print(
        f"told {told!s:5}: sharpness {sharp} of that of real latents; Fréchet distance {distance}"
    )
for blind, knowing in zip(found[False], found[True], strict=True):
    assert knowing["sharpness"] > blind["sharpness"] + 0.05

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# - **A latent that is not scaled**, above. Print `latents.std()` before you train; it is 1.
# - **The wrong factor when loading another autoencoder.** 0.18215 belongs to Stable Diffusion 1, 0.13025 to XL; 3 has a shift as well. The picture comes out pale or burnt, and nothing fails.
# - **fp16 in the decoder of XL** overflows, and pictures are black. Decode in fp32 or bf16.
# - **Patches that do not divide the latent**, prompts longer than the text encoder reads, latents with another number of channels: here one sentence says what was expected.

# %% slideshow={"slide_type": "-"}
with torch.no_grad():
    pale = model.decode(0.18215 * latents[3:4])
study.grid(torch.stack([back[3], pale[0]]), titles=["as it is", "scaled once more"], scale=2)

# %% slideshow={"slide_type": "-"}
wrong = {
    "patches": lambda: DiT(4, 96, 4, 4, patch=3)(latents[:1], torch.tensor(500.0)),
    "channels": lambda: model.decode(latents[:1, :3]),
}
for name, call in wrong.items():
    try:
        call()
    except ValueError as error:
        print(f"{name}: {error}")
    else:
        raise AssertionError(f"{name}: no error")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From mini-sd to Stable Diffusion
#
# The same parts, larger. What changes, from the published configurations (numbers of weights in millions):
#
# | | mini-sd | Stable Diffusion 1.5 | SDXL | SD 3 medium |
# |---|---|---|---|---|
# | picture | 64 | 512 | 1024 | 1024 |
# | latent | 4 × 8 × 8 | 4 × 64 × 64 | 4 × 128 × 128 | 16 × 128 × 128 |
# | network | U-Net, 2.8 | U-Net, 860 | U-Net, 2,567 | MM-DiT, 2,030 |
# | autoencoder | 1.7 | 84 | 84 | 84 |
# | text | CLIP of 32 tokens, 0.3 | CLIP of 77, 123 | two CLIPs, 818 | two CLIPs, 818, and T5, 4,762 |
# | predicts | $v$ | $\epsilon$ | $\epsilon$ | the flow's velocity |
# | scale of the latents | 1 (in its weights) | 0.18215 | 0.13025 | 1.5305, after a shift by 0.0609 |
# | told besides | – | – | the sizes, the crop | – |

# %%
MILLIONS = {
    "Stable Diffusion 1.5": (860, 84, 123),
    "SDXL": (2567, 84, 818),
    "SD 3 medium, with T5": (2030, 84, 818, 4762),
    "SD 3 medium, without": (2030, 84, 818),
}
parts = [model.components[name] for name in ("unet", "vae", "text_encoder")]
MILLIONS = {"mini-sd": [zoo.parameters(part) / 1e6 for part in parts], **MILLIONS}
for name, millions in MILLIONS.items():
    print(
        f"{name:21s} {sum(millions):7.1f} M weights, {2 * sum(millions) / 1e3:6.3f} GB in half precision"
    )
assert abs(MILLIONS["mini-sd"][0] - 2.8) < 0.05

# %% [markdown] slideshow={"slide_type": "slide"}
# To that come the pictures on their way through the network; the decoder, at full resolution, needs the most, and can be asked for tiles. The cells of this lecture run on the real one by its name, or on your own folder by `COURSE_SD`: here encode and decode, the scale of the latents, and what the text does, on Stable Diffusion where its weights are, else on the course's model.

# %%
SETTINGS = {"stable-diffusion-1.5": ("a red mug on a wooden table", 25), "mini-sd": (prompt, 15)}
name = next(name for name in SETTINGS if zoo.available(name))
text, steps = SETTINGS[name]
real = zoo.load(name)
with torch.no_grad():
    D = cfg(*(real.denoiser.given(**real.embed([each])) for each in (text, "")), 3.0)
    grid = real.sigmas(steps)
    start = real.start(SampleNoise(2)(torch.empty(1, *real.shape, device=real.device)), grid[0])
    z = real.finish(sample(D, start, grid), grid[-1])
    drawn = real.decode(z)
    again = real.decode(real.encode(drawn))
print(f"{name}: latent {tuple(z.shape[1:])}, deviation {float(z.std()):.2f}")
print(
    f"decoded, encoded and decoded again: {metrics.psnr(again[0].float(), drawn[0].float()):.1f} dB"
)
study.grid(
    torch.cat([drawn, again]).float().cpu(), titles=["drawn", "encoded and decoded again"], scale=2
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - A latent of 256 numbers costs a hundredth of the pixels, and keeps what the decoder can paint. What it loses no diffusion model brings back.
# - Scale latents to deviation 1.
# - Cross-attention: queries from the picture, keys and values from the words.
# - adaLN-zero: start as the identity. Compare networks at equal weights, and say what else is equal.
# - One network, two times: joint, conditionals and marginals.
# - $k$ times the size hides $k$ times the noise.
#
# **Exercises.** [Set 05](../my_course/05_latent_diffusion.ipynb).
#
# ## Sources
#
# - R. Rombach, A. Blattmann, D. Lorenz, P. Esser, B. Ommer. *High-Resolution Image Synthesis with Latent Diffusion Models.* 2022. arXiv:2112.10752
# - A. Dosovitskiy et al. *An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale.* 2021. arXiv:2010.11929
# - F. Bao et al. *All are Worth Words: A ViT Backbone for Diffusion Models.* 2023a. arXiv:2209.12152
# - W. Peebles, S. Xie. *Scalable Diffusion Models with Transformers.* 2023. arXiv:2212.09748
# - F. Bao et al. *One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale.* 2023b. arXiv:2303.06555
# - Y. Balaji et al. *eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers.* 2022. arXiv:2211.01324
# - J. Ho et al. *Cascaded Diffusion Models for High Fidelity Image Generation.* 2022. arXiv:2106.15282
# - D. Podell et al. *SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis.* 2023. arXiv:2307.01952
# - E. Hoogeboom, J. Heek, T. Salimans. *simple diffusion: End-to-end diffusion for high resolution images.* 2023. arXiv:2301.11093
# - Y. Chen, S. Liu, X. Wang. *Learning Continuous Image Representation with Local Implicit Image Function.* 2021. arXiv:2012.09161
# - J. Kim, T.-K. Kim. *Arbitrary-Scale Image Generation and Upsampling using Latent Diffusion Model and Implicit Neural Decoder.* 2024. arXiv:2403.10255
