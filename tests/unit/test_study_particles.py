"""Particles in the plane: what is drawn is the run, the score and the density of the level that is named."""

from __future__ import annotations

import asyncio
import base64
import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from course_lib import schedules
from course_lib.devices import SampleNoise
from course_lib.gaussians import Empirical, Mixture
from course_lib.sample import Trajectory, sample
from course_lib.steps import ddim, ddpm
from course_lib.study import explorer, particles, style
from course_lib.study.particles import ParticleExplorer
from course_lib.worlds import toys

RING = toys.ring(8)
STEPS = {
    "DDIM": lambda noise: ddim,
    "DDPM, small variance": lambda noise: ddpm(noise, "small"),
    "DDPM, large variance": lambda noise: ddpm(noise, "large"),
}


@pytest.fixture(scope="module")
def ring():
    return ParticleExplorer(RING, n=40)


def trace(shown: ParticleExplorer, name: str):
    return shown._traces[name]


def xy(shown: ParticleExplorer, name: str) -> np.ndarray:
    return np.stack([trace(shown, name).x, trace(shown, name).y], -1)


def reference(sampler: str, n: int, steps: int = 20, seed: int = 0) -> Trajectory:
    grid, noise = schedules.karras(steps), SampleNoise(seed)
    x = noise.start((n, 2), grid[0])
    record = Trajectory(x, grid[0])
    sample(RING.denoiser, x, grid, STEPS[sampler](noise), on_step=record)
    return record


# --- the run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 9, 20])
@pytest.mark.parametrize("sampler", STEPS)
def test_particles_and_trails_are_the_run_of_the_sampler_at_unit_size(ring, sampler, level):
    ring.controls["sampler"].value, ring.controls["level"].value = sampler, level
    assert ring.message.value == "" and list(STEPS) == list(particles.SAMPLERS)
    record = reference(sampler, 40)
    scaled = record.x.double() / (1 + torch.tensor(record.sigmas, dtype=torch.float64) ** 2).sqrt()[:, None, None]
    assert np.array_equal(xy(ring, "particles"), scaled[level].float())
    assert np.abs(trace(ring, "particles").customdata - record.x[level].numpy()).max() <= 1e-4, "hover shows x itself"
    for name, who, first in (
        ("trails", slice(-ring.FOLLOWED, None), 0),
        ("tails", slice(0, -ring.FOLLOWED), max(0, level - ring.TAIL)),
    ):
        lines = xy(ring, name).reshape(-1, level - first + 2, 2)
        assert np.isnan(lines[:, -1]).all(), "lines are parted"
        assert np.array_equal(lines[:, :-1], scaled[first : level + 1, who].float().transpose(0, 1))
    sigma = record.sigmas[level]
    assert ring.figure.layout.title.text == f"σ = {sigma:.3g}   (level {level} of 20, {sampler})"


def test_axes_are_named_and_have_equal_units(ring):
    layout = ring.figure.layout
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == particles.AXES
    assert layout.yaxis.scaleanchor == "x"
    assert layout.xaxis.range == layout.yaxis.range == (-3, 3)
    wide = ParticleExplorer(lambda x, sigma: 0 * x, data=torch.tensor([[0.0, 10.0]]), n=2)
    assert wide.extent == pytest.approx((-10.5, 10.5, -10.5, 10.5)), "the data are inside"


class Counted:
    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma):
        self.calls.append((len(x), float(sigma)))
        return RING.denoiser(x, sigma)


def test_a_run_is_sampled_once_and_a_field_computed_once():
    D = Counted()
    shown = ParticleExplorer(D, n=7)
    lattice, levels = shown.ARROWS**2, schedules.karras(20).tolist()
    assert [sigma for count, sigma in D.calls if count == 7] == levels[:-1]
    for level in (*range(21), 3, 5, 13):
        shown.controls["level"].value = level
    assert sorted(sigma for count, sigma in D.calls if count == lattice) == sorted(levels[:-1])
    shown.controls["seed"].value = 1
    assert sum(count == 7 for count, _ in D.calls) == 40
    shown.controls["seed"].value = 0
    shown.poster()
    assert sum(count == 7 for count, _ in D.calls) == 40 and len(D.calls) == 60


def test_the_level_keeps_its_share_of_the_steps():
    shown = ParticleExplorer(RING, n=3)
    shown.controls["level"].value = 10
    shown.controls["steps"].value = 8
    assert shown.controls["level"].value == 4 and shown.controls["level"].max == 8
    assert shown.figure.layout.title.text.endswith("(level 4 of 8, DDIM)") and shown.message.value == ""


def test_a_grid_is_walked_as_given_and_leaves_no_steps():
    shown = ParticleExplorer(RING, n=3, sigmas=torch.tensor([10.0, 1.0, 0.5]))
    assert "steps" not in shown.controls and shown.controls["level"].max == 2
    shown.controls["level"].value = 2
    assert shown.figure.layout.title.text == "σ = 0.5   (level 2 of 2, DDIM)"


# --- the score --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [5, 14])
def test_arrows_point_along_the_score_and_say_its_size(ring, level):
    ring.controls["level"].value = level
    sigma = float(schedules.karras(20)[level])
    tip = xy(ring, "score").astype(float)
    shaft = xy(ring, "shafts").astype(float).reshape(-1, 3, 2)
    assert np.array_equal(shaft[:, 1], tip) and len(tip) == ring.ARROWS**2
    place = torch.tensor((shaft[:, 0] + shaft[:, 1]) / 2) * math.sqrt(1 + sigma**2)
    score = ((RING.denoiser(place, sigma) - place) / sigma**2).numpy()
    said = np.array(trace(ring, "score").customdata)
    # the place is read back in fp32, whose unit is 1.2e-7 at 1, and the score changes by at most 1/std^2 a unit of x
    slack = 2e-7 * 3 * math.sqrt(1 + sigma**2) * (1 / 0.15**2 + 1 / sigma**2) + 1e-4
    assert np.abs(said[:, :2] - score).max() < slack
    assert np.allclose(said[:, 2], np.linalg.norm(said[:, :2], axis=1), atol=2e-4)

    arrow, size = shaft[:, 1] - shaft[:, 0], said[:, 2]
    length = np.linalg.norm(arrow, axis=1)
    seen = (length > 1e-3) & (size > 1e-2)
    cosine = (arrow * said[:, :2]).sum(1)[seen] / (length * size)[seen]
    assert cosine.min() > 0.999
    angle = np.radians(np.array(trace(ring, "score").marker.angle, float))
    assert np.allclose((np.stack([np.sin(angle), np.cos(angle)], -1) * length[:, None])[seen], arrow[seen], atol=1e-5)

    cell = ring.field(sigma).cell
    assert f"size ≥ {cell:.3g}" in trace(ring, "score").name
    cut = size > cell * (1 + 1e-3)
    assert 0.1 < cut.mean() < 0.3, "the longest fifth is cut"
    assert np.allclose(length[cut], length.max(), rtol=1e-4)
    free = seen & (size < cell * (1 - 1e-3))
    assert np.allclose(length[free] / size[free], length.max() / cell, rtol=0.02)


def test_a_denoiser_has_the_field_of_its_mixture_and_none_without_noise(ring):
    shown = ParticleExplorer(RING.denoiser, data=RING, n=3)
    sigma = 0.5
    exact, seen = ring.field(sigma).score, shown.field(sigma).score
    # fp32: D and x are rounded to 1.2e-7 of a size of at most 5, and divided by sigma^2; D moves by 1/std^2 at most
    assert np.abs(exact - seen).max() < 5 * 1.2e-7 * (2 / sigma**2 + 1 / 0.15**2)
    shown.controls["level"].value = 20
    assert shown.message.value == "" and len(trace(shown, "score").x) == len(trace(shown, "shafts").x) == 0
    assert "none at σ = 0" in trace(shown, "score").name
    assert shown.poster().startswith(b"\x89PNG")
    ring.controls["level"].value = 20
    assert len(trace(ring, "score").x) == ring.ARROWS**2, "a mixture has a score at sigma = 0"


# --- the density ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 13, 20])
def test_contours_are_those_of_the_noised_mixture(level):
    blobs = toys.three_blobs()
    shown = ParticleExplorer(blobs, n=3, extent=(-3, 3, -2, 2.5))
    shown.controls["level"].value = level
    drawn, sigma = trace(shown, "density"), float(schedules.karras(20)[level])
    x, y = np.meshgrid(np.array(drawn.x), np.array(drawn.y))
    p = blobs.log_prob(torch.tensor(np.stack([x, y], -1).reshape(-1, 2)) * math.sqrt(1 + sigma**2), sigma).exp().numpy()
    assert np.abs(np.array(drawn.z).ravel() - np.sqrt(p / p.max())).max() <= 0.0005 + 1e-12, "rounded to 0.001"
    assert drawn.visible and (x.min(), x.max(), y.min(), y.max()) == shown.extent


def test_a_mixture_of_points_has_no_density_without_noise():
    points = Mixture.isotropic(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.0)
    shown = ParticleExplorer(points, n=3)
    assert trace(shown, "density").visible
    shown.controls["level"].value = 20
    assert shown.message.value == "" and trace(shown, "density").visible is False
    assert shown.poster().startswith(b"\x89PNG")


def test_data_are_scaled_as_the_particles_and_have_no_density():
    data = toys.moons(1000)
    shown = ParticleExplorer(Empirical(data), data=data, n=3)
    sigma = float(schedules.karras(20)[shown.controls["level"].value])
    assert "density" not in shown._traces
    assert np.allclose(xy(shown, "data"), data[: shown.DATA] / math.sqrt(1 + sigma**2), atol=1e-6)


# --- the widget -------------------------------------------------------------------------------------


def test_rapid_moves_are_one_redraw_of_the_last_level():
    shown = ParticleExplorer(RING, n=3)

    async def drag():
        for level in (14, 15, 16, 17):
            shown.controls["level"].value = level
        await asyncio.sleep(explorer.PAUSE + 0.1)

    asyncio.run(drag())
    assert shown.redraws == 1 and "level 17 of 20" in shown.figure.layout.title.text


def test_a_redraw_keeps_the_traces_and_sends_no_library(monkeypatch):
    shown, sent = ParticleExplorer(RING, n=300), []
    before = shown.figure.data
    monkeypatch.setattr(shown.figure, "_send", lambda message, buffers=None: sent.append((message, buffers or [])))
    shown.controls["level"].value = 14
    assert shown.figure.data is before or shown.figure.data == before
    size = sum(len(repr(message)) + sum(memoryview(one).nbytes for one in buffers) for message, buffers in sent)
    assert sent and size < 200_000


def test_the_state_of_the_figure_is_what_it_shows():
    shown = ParticleExplorer(RING, n=3)
    shown.controls["level"].value = 4
    state = shown.figure.get_state()
    assert "level 4 of 20" in state["_widget_layout"]["title"]["text"]
    x = next(one for one in state["_widget_data"] if "3 particles" in one.get("name", ""))["x"]
    assert np.array_equal(np.frombuffer(base64.b64decode(x["bdata"]), np.float32), trace(shown, "particles").x)
    assert set(shown.figure.get_state("_config")) == {"_config"}


def test_the_bundle_holds_the_view_and_a_small_poster_of_the_newest_level():
    shown = ParticleExplorer(RING)

    async def show():
        shown.controls["level"].value = 15
        return shown._repr_mimebundle_()

    bundle = asyncio.run(show())
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.model_id
    assert sum(len(str(value)) for value in bundle.values()) < 200_000
    assert base64.b64decode(bundle["image/png"]) == shown.poster()
    assert "level 15 of 20" in shown.figure.layout.title.text and "level=15" in bundle["text/plain"]


def test_the_poster_shows_each_particle_where_it_is():
    shown = ParticleExplorer(lambda x, sigma: torch.zeros_like(x), n=20)
    seen = np.asarray(Image.open(io.BytesIO(shown.poster())).convert("RGB")).astype(int)
    assert seen.shape == (particles.HEIGHT, particles.WIDTH, 3)
    places = xy(shown, "particles").astype(float)
    inside = np.abs(places).max(1) < 2.9
    column = particles.LEFT + (places[:, 0] + 3) / 6 * particles.SIDE
    row = particles.HEIGHT - particles.BOTTOM - (places[:, 1] + 3) / 6 * particles.SIDE
    apart = np.array([np.sort(np.hypot(column - a, row - b))[1] > 12 for a, b in zip(column, row, strict=True)])
    chosen = inside & apart
    assert chosen.sum() > 5
    for i in np.flatnonzero(chosen):
        role = "noise" if i >= 20 - shown.FOLLOWED else "model"
        pixel, colour = seen[int(row[i]), int(column[i])], 255 * np.array(to_rgb(style.COLOURS[role]))
        assert np.abs(pixel - colour).max() < 8, f"particle {i}"  # the PNG has a palette


def test_a_run_that_fails_is_told_and_the_figure_stays():
    works = [True]
    shown = ParticleExplorer(lambda x, sigma: RING.denoiser(x, sigma) if works else x * math.nan, n=3)
    before = xy(shown, "particles")
    works.clear()
    shown.controls["seed"].value = 1
    assert "FloatingPointError: x is not finite" in shown.message.value
    assert np.array_equal(xy(shown, "particles"), before) and shown.poster().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ParticleExplorer(toys.two_peaks()), "D is a mixture in 1 dimensions; expected 2"),
        (lambda: ParticleExplorer(RING.denoiser, data=toys.two_peaks()), "data is a mixture in 1 dimensions; expected 2"),
        (lambda: ParticleExplorer(RING, data=torch.zeros(4, 3)), r"data has shape \(4, 3\); expected \(N, 2\)"),
        (lambda: ParticleExplorer(RING, data=torch.zeros(0, 2)), r"data has shape \(0, 2\); expected \(N, 2\) with N >= 1"),
        (lambda: ParticleExplorer(RING, n=0), "n = 0; expected at least one particle"),
        (lambda: ParticleExplorer(RING, sigmas=torch.tensor([1.0, 2.0])), "sigmas rises from 1 to 2; expected a falling grid"),
        (lambda: ParticleExplorer(RING, extent=(1, 0, 0, 1)), r"extent = \(1, 0, 0, 1\); expected"),
        (lambda: ParticleExplorer(lambda x, sigma: x[:, :1], n=2), r"D returned shape \(2, 1\)"),
    ],
)
def test_what_is_not_in_the_plane_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
