# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 00 Start here
#
# **A prompt becomes a picture on your own machine, and how this course works.** The page to open first. It shows the small world in which the course
# lives, the models that live in it, and how to work with the notebooks.
#
# After it you can
#
# - make a picture from a sentence, with a text-to-image model that is a real Stable Diffusion, only small;
# - say which four parts took part, and what each did;
# - render the world in which the model was trained: pictures, depth, captions, cameras;
# - let a *reader* judge whether a picture shows what the sentence asked for, and know how far to trust it;
# - find the lectures, do an exercise, and be told which mistake you made.
#
# You need Python and a little linear algebra. Time: 25 minutes. Everything runs on a laptop, with no network.

# %%
import time

import torch

from course_lib import study, zoo
from course_lib.devices import SampleNoise
from course_lib.grading.check import check
from course_lib.guidance import cfg
from course_lib.sample import Trajectory, sample
from course_lib.worlds import scenes

torch.set_num_threads(1)
study.use()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The picture first
#
# Six sentences, six pictures. Change a sentence and run the cell again: it takes a few seconds. The words that the model knows are shapes, colours, sizes,
# grounds, where the light comes from, from which side a thing is seen, and how two things stand to one another.

# %% slideshow={"slide_type": "-"}
prompts = [
    "a large red mug on grass, seen from the front",
    "a small cyan snowman on a checkered floor, lit from the left",
    "a big yellow house on sand",
    "a large blue car on grey ground, viewed from the left",
    "a small green ball to the left of a large purple cube on white ground",
    "a little pink cone on top of a large orange drum on a plain background",
]


def guided(model, prompts, w):
    """The denoiser that listens to these prompts, with guidance w."""
    words, nothing = model.embed(prompts), model.embed([""] * len(prompts))
    return cfg(model.denoiser.given(**words), model.denoiser.given(**nothing), w)


def paint(model, prompts, w=3.0, seed=0):
    """One picture for each prompt, in 30 steps; also the walk from noise, for the next cell."""
    sigmas = model.sigmas(30)
    noise = SampleNoise(seed)(torch.empty(len(prompts), *model.shape, device=model.device))
    x = model.start(noise, sigmas[0])
    walk = Trajectory(x, sigmas[0])
    x = sample(guided(model, prompts, w), x, sigmas, on_step=walk)
    return model.decode(model.finish(x, sigmas[-1])), walk


begun = time.perf_counter()
model = zoo.load("mini-sd")
pictures, walk = paint(model, prompts, seed=7)
seconds = time.perf_counter() - begun
print(f"six pictures in {seconds:.1f} s")
assert seconds < 60
study.grid(pictures, scale=3)

# %% [markdown]
# How the first three came out of noise, from left to right: what the model believes the clean picture to be at five noise levels. The layout is there first, then
# the colours, then the edges.

# %%
shown, D = (0, 8, 15, 22, 29), guided(model, prompts[:3], w=3.0)
levels = [torch.tensor(walk.sigmas[k]) for k in shown]
with torch.no_grad():
    beliefs = [
        model.decode(D(walk.x[k, :3].to(model.device), sigma))
        for k, sigma in zip(shown, levels, strict=True)
    ]
study.strip(
    [list(row) for row in zip(*beliefs, strict=True)],
    column_titles=[rf"$\sigma$ = {float(sigma):.2g}" for sigma in levels],
    scale=2,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Who took part
#
# `mini-sd` is a `StableDiffusionPipeline` of 4.9 million weights: the same classes, file by file, as Stable Diffusion 1.5, two hundred times smaller.
#
# | part | class | what it does |
# |---|---|---|
# | tokenizer | `CLIPTokenizer` | a sentence becomes 32 numbers, one a word |
# | text encoder | `CLIPTextModel` | the numbers become 32 vectors that know their neighbours |
# | U-Net | `UNet2DConditionModel` | from a noisy latent, a noise level and the 32 vectors it guesses the noise; called 60 times |
# | VAE | `AutoencoderKL` | packs $64\times64\times3$ pixels into a *latent* of $8\times8\times4$ numbers, and back |
#
# All of the course is about the middle of that table. A noisy latent is $x = x_0 + \sigma\epsilon$: a clean one plus noise of size $\sigma$. The network gives the
# **denoiser** $D(x,\sigma)$, the average of all clean latents that could be under $x$, and one step of sampling goes a part of the way there:
#
# $$x' = D(x,\sigma) + \frac{\sigma'}{\sigma}\,\big(x - D(x,\sigma)\big),\qquad \sigma' < \sigma .$$
#
# `sample` repeats it from pure noise to $\sigma\approx 0$. Lecture 01 makes the noise, lecture 02 derives the step, lecture 03 finds better ones. The words steer
# through $D_\text{empty} + w\,(D_\text{words} - D_\text{empty})$, *classifier-free guidance*: lecture 04. Here is all the code that these two lines need.

# %%
from course_lib import steps

study.source(steps.ddim, cfg)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The world
#
# Why a world of our own? Because in it everything is known. A photograph does not come with its depth, its camera or the right sentence. These pictures do: they are rendered, so that
# each claim of the course can be *measured*. Eight shapes (four of them have a front: car, mug, snowman, house), eight colours, two sizes, six grounds, three lights, one or two objects, any camera.
#
# Move the sliders.

# %%
study.SceneExplorer()

# %% [markdown] slideshow={"slide_type": "slide"}
# A scene is drawn from a seed, so that the hundredth scene of seed 5 is the same on every machine. Its caption is worded in many ways, and any caption can be read back:

# %%
some = scenes.draw(4, seed=5, objects=(1, 2))
rendered = scenes.render(some, size=128)
for seed in (None, 1, 2):
    print(scenes.captions(some, seed)[3])
print(scenes.parse(scenes.captions(some, 1)[3]))
lines = scenes.edges(rendered.depth, rendered.normal, rendered.segmentation)
depth = 1 - 2 * (rendered.depth.clamp(2, 9) - 2) / 7
study.strip(
    [list(rendered.rgb), list(depth), list(rendered.normal), list(1 - 2 * lines)],
    row_titles=["picture", "depth", "normals", "edges"],
    scale=2,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Does it show what was asked?
#
# You can see that. A computer needs a **reader**: a classifier, trained on renders, that says what is in a picture. The course has two, of different
# architecture, so that one can confirm the other. On renders that neither has seen they are right this often:

# %%
for name in ("scenes-reader", "scenes-reader-2"):
    row = zoo.card(name)["metrics"]["held-out combinations"]
    print(
        f"{name:16s}",
        {key: f"{row[key]:.1%}" for key in ("shape", "colour", "size", "light", "relation")},
    )
    print(" " * 16, f"azimuth {row['azimuth_mean_error_degrees']:.1f} degrees off on average")

# %% [markdown]
# ### Experiment: forty prompts
#
# Forty sentences about one object that were drawn for this page, worded at random. A picture counts only if *everything* is right that its sentence names. The bar is that of the model's card,
# less three standard errors of forty tries.

# %%
n = 40
asked = scenes.captions(scenes.draw(n, seed=700), seed=1)
wanted = [scenes.parse(prompt) for prompt in asked]
drawn, _ = paint(model, asked, seed=8)
reader = zoo.load("scenes-reader")
right = reader.obeys(drawn, wanted)
share = float(right["all"].mean())
card = zoo.card("mini-sd")["metrics"]["prompts"]["one object"]["obeyed"]["all"]
bar = card - 3 * (card * (1 - card) / n) ** 0.5
print(
    {
        name: f"{float(value.nanmean()):.0%}"
        for name, value in right.items()
        if name not in ("count", "relation")
    }
)
print(f"{share:.0%} of {n} pictures show all that was asked; the card says {card:.1%} of 500")
assert share >= bar

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Try it
#
# Type a sentence, turn the guidance up and down. At $w = 1$ the model only listens, at 3 it obeys, at 8 it shouts. The line above the picture is what the reader reads.

# %%
study.PromptExplorer(model, reader)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How to work with the course
#
# **A lecture** is read and run from top to bottom, in about 90 seconds of computing; every number in it was computed in it. Cells with sliders can be moved. In slide shows the same cells are the slides.
#
# **Exercises** lie in [my_course/](../my_course): `course lab` puts your copies there and never overwrites them. Each item is one function to write, with a check below it. Try
# the check on a wrong answer, one of lecture 01 that many would defend: noise added with the weight $\beta$ for its square root.


# %%
def noising_step(x_prev, beta, eps):
    return (1 - beta).sqrt() * x_prev + beta * eps


answer = check("01.1", noising_step)

# %% [markdown]
# It does not say "wrong": it says *which* mistake. `hint("01.1")` climbs a ladder of hints, `solution("01.1")` shows one answer. Until your function passes, the notebook goes on with the library's, so that
# every cell below still runs.
#
# | in a terminal | |
# |---|---|
# | `course lab` | open the lectures, and your copies of the exercises |
# | `course progress` | what you have solved |
# | `course zoo` | the embedded models; `course zoo mini-sd` prints a card with every number that was measured |
# | `course doctor` | what is installed, what is missing, and the command that brings it |
#
# **The code** is one idea in few files. A `Denoiser` is what we believe, a `Step` is how we move, `sample` is the only loop. Guidance, inverse problems, control: all of them wrap one of
# the two. So the code of a lecture reads like its equations, and `study.source(f)` shows any function.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What goes wrong
#
# **Words it never saw.** A small model has a small vocabulary. It says so, once, and draws something all the same:

# %%
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.embed(["a large dog on grass"])
print(str(caught[0].message)[:200], "...")
assert "'dog'" in str(caught[0].message)

# %% [markdown]
# **Too much guidance.** The same noise and sentence at four scales. Beyond about 6 the model leaves what it has seen: colours burn, shadows go, and the reader, which saw only renders, becomes
# a poor judge as well.

# %%
scales = (1.0, 3.0, 7.0, 15.0)
prompt = "a large red car on sand, seen from the front, lit from the right"
rows = [paint(model, [prompt] * 3, w, seed=11)[0] for w in scales]
study.strip([list(row) for row in rows], row_titles=[f"w = {w:g}" for w in scales], scale=2)

# %% [markdown]
# **More than it was taught.** It has seen one or two objects, never three, and never a *yellow house with a blue roof*: roofs have one colour in this world. A model interpolates in what it has
# seen. Sixteen pairs of shape and colour were held out of its training, and the card says how well it draws them:

# %%
for name, row in zoo.card("mini-sd")["metrics"]["prompts"].items():
    print(f"{name:36s} all right in {row['obeyed']['all']:.1%} of 500 pictures")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same on Stable Diffusion
#
# `zoo.load` takes a folder or a name of the Hugging Face hub as well, and gives the same object: denoiser, embed, encode, decode. So every algorithm of the course runs on the real Stable Diffusion, with one name changed.
# That needs its weights, a download of four gigabytes, and better a GPU; where they are not, the cell says so and goes on.

# %%
name = "stable-diffusion-1.5"
if zoo.available(name):
    large, _ = paint(zoo.load(name), ["a photo of a red mug on grass"], w=7.5, seed=7)
    display(study.grid(large))
else:
    print(f"{name} is not on this machine; its stand-in is {zoo.stand_in(name)}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Remember
#
# - Three networks and a tokenizer: text encoder, U-Net, VAE. The U-Net is a denoiser, called some sixty times.
# - In the scene world everything is known, so that claims can be measured: caption, depth, camera, and a reader to judge.
# - A number without its judge's accuracy is no number; the cards have both.
# - A wrong answer gets the name of its mistake.
#
# **Exercises.** The first set comes with the first lecture: open [01 The forward process](01_forward_process.ipynb), then [my_course/](../my_course).
#
# ## Sources
#
# - R. Rombach, A. Blattmann, D. Lorenz, P. Esser, B. Ommer. *High-Resolution Image Synthesis with Latent Diffusion Models.* 2022. arXiv:2112.10752
# - A. Radford et al. *Learning Transferable Visual Models From Natural Language Supervision.* 2021. arXiv:2103.00020 (the text encoder's architecture)
# - J. Ho, T. Salimans. *Classifier-Free Diffusion Guidance.* 2022. arXiv:2207.12598
# - J. Song, C. Meng, S. Ermon. *Denoising Diffusion Implicit Models.* 2021. arXiv:2010.02502 (the step)
# - T. Salimans, J. Ho. *Progressive Distillation for Fast Sampling of Diffusion Models.* 2022. arXiv:2202.00512 (what `mini-sd` predicts)
# - J. Johnson, B. Hariharan, L. van der Maaten, L. Fei-Fei, C. L. Zitnick, R. Girshick. *CLEVR.* 2017. arXiv:1612.06890 (rendered scenes with exact answers)
