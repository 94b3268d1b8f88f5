"""Samplers at equal cost: what is drawn and said is the run of the sampler, measured against exact answers."""

from __future__ import annotations

import asyncio
import io
import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from course_lib import metrics, schedules
from course_lib.devices import SampleNoise, generator
from course_lib.gaussians import Mixture
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.sample import Trajectory, sample
from course_lib.steps import ddim_eta
from course_lib.study import explorer, pictures, samplers, style
from course_lib.study.samplers import SamplerExplorer
from course_lib.study.settings import GRIDS, RULES, Setting
from course_lib.worlds import toys
from tests.shown import REDRAW, SLACK, crop, decode, levels

BLOBS = toys.three_blobs()
HIGH, LOW, SEED = 15.0, 0.02, 0
ALONE = Mixture.gaussian(torch.tensor([0.8, -0.5]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
ETA = "DDIM with η (1: ancestral)"


class Normal:
    """The exact denoiser of N(0, I), which counts its calls; its flow is x' = x sqrt((1 + sigma'^2) / (1 + sigma^2))."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        return x / (1 + sigma**2)


@pytest.fixture(scope="module")
def blobs():
    return SamplerExplorer(BLOBS, Normal(), seed=SEED)


def choose(shown: SamplerExplorer, **values) -> None:
    """Set the controls, all of them; the rest is as at the start."""
    for name, value in {"sampler": "DPM-Solver++(2M)", "calls": 12, "grid": "Karras", "eta": 1.0, "seed": SEED, **values}.items():
        shown.controls[name].value = value
    assert shown.message.value == ""


def heading(shown: SamplerExplorer) -> str:
    return shown.figure.layout.title.text


def drawn(shown: SamplerExplorer, k: int) -> np.ndarray:
    """The paths of the particles of component k, (n, levels, 2)."""
    trace = shown._traces[f"component {k + 1}"]
    lines = np.stack([trace.x, trace.y], -1).reshape(-1, len(shown.run(shown._drawn).sigmas) + 1, 2)
    assert np.isnan(lines[:, -1]).all(), "lines are parted"
    return lines[:, :-1]


# --- particles --------------------------------------------------------------------------------------


def test_paths_are_the_run_of_the_sampler_at_unit_size(blobs):
    choose(blobs, grid="exponential (even in λ)", calls=9)
    grid = schedules.exponential(9, LOW, HIGH, to_zero=False)
    start = BLOBS.sample(1000, generator(SEED, 0), HIGH)[:40]
    record = Trajectory(start, grid[0])
    end = sample(BLOBS.denoiser, start, grid, dpm_solver_pp_2m, on_step=record)
    scaled = record.x / (1 + torch.tensor(record.sigmas, dtype=torch.float64) ** 2).sqrt()[:, None, None]
    exact = BLOBS.reference_flow(start, HIGH, LOW, tolerance=1e-11)
    where = BLOBS.responsibilities(exact, LOW).argmax(1)
    for k in range(3):
        assert np.array_equal(drawn(blobs, k), scaled[:, where == k].float().transpose(0, 1)), "coloured by the exact end"
    shown = np.stack([blobs._traces["exact"].x, blobs._traces["exact"].y], -1)
    # the flow was solved to 1e-8 a step, and is drawn in fp32, whose unit is 1.2e-7 at 1
    assert np.abs(shown - (exact / math.sqrt(1 + LOW**2)).numpy()).max() < 1e-6
    far = float((end - exact).norm(dim=1).mean())
    astray = int((BLOBS.responsibilities(end, LOW).argmax(1) != where).sum())
    assert f"{far:.2g} from the exact end, {astray} of 40 in another component" in heading(blobs)
    assert "9 steps, 9 calls, exponential (even in λ)" in heading(blobs)
    assert "component of the exact end" in blobs.figure.layout.legend.title.text


def test_exact_ends_are_those_of_the_closed_flow_and_good_samplers_reach_them():
    shown = SamplerExplorer(ALONE, Normal())
    start = shown.start(0)[:40]
    exact = ALONE.flow(start, HIGH, LOW)
    # DOP853 holds 1e-8 a step, of which it takes fewer than 100
    assert float((shown.ends(0) - exact).abs().max()) < 1e-6
    off = []
    for calls in (10, 20, 40):
        choose(shown, calls=calls)
        off.append(float(heading(shown).split(" from the exact end")[0].rpartition(">")[2]))
    assert all(first > 3 * second for first, second in pairwise(off)), "of order 2"
    assert "0 of 40 in another component" in heading(shown)


def test_cost_is_told_where_calls_are_left_over(blobs):
    choose(blobs, sampler="DPM-Solver-3", calls=7)
    assert "2 steps × 3 = 6 of 7 calls, Karras" in heading(blobs)
    choose(blobs, sampler="DPM-Solver-3", calls=3)
    assert "1 step × 3 = 3 calls, Karras" in heading(blobs)
    choose(blobs, sampler="PLMS (PNDM)", calls=12)
    assert "11 steps, 12 calls" in heading(blobs)


def test_noise_is_measured_on_a_set(blobs):
    choose(blobs, sampler=ETA, calls=8, eta=0.7, seed=3)
    source = generator(3, 1)
    noise = lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype)
    grid = schedules.karras(8, LOW, HIGH, to_zero=False)
    end = sample(BLOBS.denoiser, BLOBS.sample(1000, generator(3, 0), HIGH), grid, ddim_eta(0.7, noise))
    far = metrics.sliced_wasserstein(end, BLOBS.sample(1000, generator(2), LOW))
    mean, spread = metrics.sliced_wasserstein_floor(lambda n, source: BLOBS.sample(n, source, LOW), 1000)
    assert f"sliced Wasserstein {far:.3f} (exact sets {mean:.3f} ± {spread:.3f})" in heading(blobs)
    assert "DDIM, η = 0.7" in heading(blobs)
    where = BLOBS.responsibilities(end[:40], LOW).argmax(1)
    for k in range(3):
        assert np.allclose(drawn(blobs, k)[:, -1], (end[:40][where == k] / math.sqrt(1 + LOW**2)).numpy(), atol=1e-6)
    assert len(blobs._traces["exact"].x) == len(blobs._traces["gaps"].x) == 0, "there is no exact end"
    assert "component reached" in blobs.figure.layout.legend.title.text


def test_eta_is_offered_where_it_is_read(blobs):
    choose(blobs, calls=3)
    for name, rule in RULES.items():
        blobs.controls["sampler"].value = name
        assert blobs.controls["eta"].disabled == (rule.noise != "eta")
    choose(blobs, calls=6)
    before, redraws = blobs._drawn, blobs.run.cache_info().misses
    blobs.controls["eta"].value = 0.3
    assert blobs._drawn == before and blobs.run.cache_info().misses == redraws


@pytest.mark.parametrize("noisy, silent", [(ETA, "DDIM (Euler in σ)"), ("EDM with churn γ = 0.41 η", "Heun (EDM)")])
def test_without_noise_a_stochastic_rule_is_its_deterministic_one(blobs, noisy, silent):
    choose(blobs, sampler=noisy, eta=0.0, calls=8)
    ends = [drawn(blobs, k) for k in range(3)]
    assert "from the exact end" in heading(blobs)
    choose(blobs, sampler=silent, calls=8)
    assert all(np.allclose(old, drawn(blobs, k), atol=1e-6) for k, old in enumerate(ends))


def test_a_grid_that_begins_low_begins_with_less_noise(blobs):
    choose(blobs, grid="leading (SD's table)", calls=4)
    first = float(GRIDS["leading (SD's table)"](4, LOW, HIGH)[0])
    start = BLOBS.sample(1000, generator(SEED, 0), HIGH)[:40] * first / HIGH / math.sqrt(1 + first**2)
    seen = np.concatenate([drawn(blobs, k)[:, 0] for k in range(3)])
    assert np.allclose(seen[seen[:, 0].argsort()], start[start[:, 0].argsort()].float(), atol=1e-6)
    exact = np.array(blobs._traces["exact"].x)
    choose(blobs)
    assert np.array_equal(np.array(blobs._traces["exact"].x), exact), "the exact end is that of the noise at `high`"


# --- pictures ---------------------------------------------------------------------------------------


def block(shown: SamplerExplorer, index: int, i: int) -> np.ndarray:
    """Picture i of a block, which has three of 112 x 112 screen pixels in a row, 7 for each of theirs."""
    return crop(shown.picture.value, 119 * (i % 3), samplers.HEADS[index] + 119 * (i // 3), 112)


def test_pictures_are_those_of_the_network_at_the_same_setting_above_the_flow(blobs):
    choose(blobs, sampler=ETA, calls=5, eta=1.0, seed=2)
    noise = SampleNoise(2)
    start = noise.start((6, 1, 16, 16), HIGH)
    images = sample(Normal(), start, schedules.karras(5, LOW, HIGH, to_zero=False), ddim_eta(1.0, noise))
    flow = start * math.sqrt((1 + LOW**2) / (1 + HIGH**2))
    for i in range(6):
        assert np.abs(block(blobs, 0, i).astype(int) - levels(images[i], 7).astype(int)).max() <= 1, f"picture {i}"
        # 32 calls: UniPC-3 is nearer than 0.01 here, 1.3 of 255 levels
        assert np.abs(block(blobs, 1, i).astype(int) - levels(flow[i], 7).astype(int)).max() <= 2, f"answer {i}"
    titles = [title.get_text() for _, title in blobs._blocks]
    assert titles == ["the network, 5 calls:\nfresh noise: other pictures", "the flow, 32 calls of UniPC-3:"]

    choose(blobs, sampler="DDIM (Euler in σ)", calls=5, seed=2)
    grid = schedules.karras(5, LOW, HIGH, to_zero=False)
    ratio, exact = 1.0, math.sqrt((1 + LOW**2) / (1 + HIGH**2))
    for s, s_next in pairwise(grid.tolist()):  # DDIM on N(0, I) multiplies by D / x + s' / s (1 - D / x), D / x = 1 / (1 + s^2)
        ratio *= 1 / (1 + s**2) + s_next / s * s**2 / (1 + s**2)
    off = abs(ratio - exact) * float(start.square().mean().sqrt())
    said = float(blobs._blocks[0][1].get_text().splitlines()[1].split()[0])
    assert said == pytest.approx(off, abs=0.0005 + 0.002), "rounding, and the error of the flow's 32 calls"


@pytest.mark.parametrize("shape, n", [((3, 64, 64), 2), ((1, 300, 200), 4), ((1, 16, 16), 9)])
def test_blocks_of_other_sizes_do_not_meet(shape, n):
    shown = SamplerExplorer(ALONE, Normal(), n=n, shape=shape, particles=2)
    boxes = [image.get_window_extent() for image, _ in shown._blocks]
    boxes += [title.get_window_extent() for _, title in shown._blocks]
    for i, box in enumerate(boxes):
        assert box.x1 <= 360 and not any(box.overlaps(other) for other in boxes[:i])


# --- the widget -------------------------------------------------------------------------------------


def test_particles_come_first_and_pictures_follow_unless_a_change_has_come():
    D = Normal()
    shown = SamplerExplorer(BLOBS, D, particles=3)
    pause = explorer.PAUSE

    async def drag():
        built, picture = D.calls, shown.picture.value
        assert built == 12 + shown.ANSWER
        shown.controls["calls"].value = 13
        await asyncio.sleep(pause + 0.01)
        assert "13 calls" in heading(shown) and D.calls == built and shown.picture.value == picture
        shown.controls["calls"].value = 14  # before the pictures of 13
        await asyncio.sleep(4 * pause + 1)
        assert "14 calls" in heading(shown) and "14 calls" in shown._blocks[0][1].get_text()
        assert D.calls == built + 14 and shown.picture.value != picture

    asyncio.run(drag())
    assert shown.message.value == ""


def test_a_change_does_not_wait_for_pictures_that_take_long():
    D = Normal()

    def slow(x, sigma):
        time.sleep(0.02)
        return D(x, sigma)

    shown = SamplerExplorer(ALONE, slow, particles=3)

    built = 12 + shown.ANSWER

    async def drag():
        shown.controls["calls"].value = 40
        while D.calls < built + 5:  # the pictures of 40 calls are on their way
            await asyncio.sleep(0.01)
        before = D.calls
        shown.controls["calls"].value = 11
        while "11 steps, 11 calls" not in heading(shown):
            await asyncio.sleep(0.01)
        assert D.calls - before <= shown.SLICE / 0.02 + 2, "a slice, and the calls that began within it"
        while "11 calls" not in shown._blocks[0][1].get_text():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(drag(), 60))
    assert D.calls < built + 40, "the run of 40 calls was left"
    setting, start = shown._drawn, SampleNoise(SEED).start((6, 1, 16, 16), HIGH)
    whole = sample(D, start, setting.levels(LOW, HIGH), setting.step(SampleNoise(SEED)))
    assert torch.equal(shown.images(setting), whole), "pieces give the run of the whole grid"


def test_what_was_drawn_once_is_not_sampled_again():
    D = Normal()
    shown = SamplerExplorer(ALONE, D, particles=3)
    choose(shown, calls=20)
    choose(shown, calls=12)
    before, runs = D.calls, shown.run.cache_info().misses
    choose(shown, calls=20)
    assert D.calls == before and shown.run.cache_info().misses == runs


def test_the_bundle_holds_the_view_and_a_small_poster_of_the_newest_setting():
    shown = SamplerExplorer(BLOBS, Normal())

    async def show():
        shown.controls["calls"].value = 15
        return shown._repr_mimebundle_()

    bundle = asyncio.run(show())
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert sum(len(str(value)) for value in bundle.values()) < 120_000
    assert "15 calls" in heading(shown) and "15 calls" in shown._blocks[0][1].get_text()
    assert "calls=15" in bundle["text/plain"]


def test_the_poster_shows_each_end_in_the_colour_of_its_component(blobs):
    choose(blobs)
    seen = np.asarray(Image.open(io.BytesIO(blobs.poster())).convert("RGB")).astype(int)
    assert seen.shape == (samplers.HEIGHT, pictures.WIDTH, 3)
    beside = np.abs(seen[:, samplers.WIDTH :] - decode(blobs.picture.value).astype(int))
    assert beside.max() < 12, "the pictures, in the colours of one palette"
    ends = np.concatenate([drawn(blobs, k)[:, -1] for k in range(3)]).astype(float)
    of = np.concatenate([[k] * len(drawn(blobs, k)) for k in range(3)])
    column = samplers.LEFT + (ends[:, 0] + 3) / 6 * samplers.SIDE
    row = samplers.TOP + (3 - ends[:, 1]) / 6 * samplers.SIDE
    apart = np.array([np.sort(np.hypot(column - a, row - b))[1] > 16 for a, b in zip(column, row, strict=True)])
    assert len(set(of[apart])) == 3
    colours = 255 * np.array([to_rgb(style.COLOURS[role]) for role, *_ in samplers.MARKS])
    for i in np.flatnonzero(apart):
        off = np.abs(seen[int(row[i]), int(column[i])] - colours).max(1)
        assert off.argmin() == of[i] and off.min() < 40, f"particle {i}: a palette may move a colour, not to another's"


def test_texts_of_the_poster_are_legible_inside_and_apart(blobs, monkeypatch):
    figures, render = [], pictures.render
    monkeypatch.setattr(pictures, "render", lambda figure: figures.append(figure) or render(figure))
    longest = max(GRIDS, key=len)
    for values in (
        {"sampler": "DPM-Solver-3", "calls": 40, "grid": longest},
        {"sampler": "EDM with churn γ = 0.41 η", "calls": 39, "grid": "even in t (linear β)"},
    ):
        choose(blobs, **values)
        figures.clear()
        blobs.poster()
        (figure,) = figures
        legend = figure.axes[0].get_legend()
        texts = [*figure.texts, *legend.get_texts(), legend.get_title(), figure.axes[0].xaxis.label]
        boxes = [text.get_window_extent() for text in texts]
        assert min(text.get_fontsize() for text in texts) >= 12
        for i, box in enumerate(boxes):
            name = texts[i].get_text()
            assert min(box.x0, box.y0) >= 0 and box.x1 <= samplers.WIDTH and box.y1 <= samplers.HEIGHT, name
            assert not any(box.overlaps(other) for other in boxes[:i]), name


def test_a_redraw_of_the_particles_is_fast(blobs):
    took = {}
    for name, calls in (("DPM-Solver++(2M)", 40), ("EDM with churn γ = 0.41 η", 40)):
        for seed in range(3):
            blobs.ends(seed), blobs._floor  # once a seed, once an explorer
            start = time.process_time()
            blobs._show_particles(Setting(name, calls, "even in σ", 0.9, seed))
            took[name] = min(took.get(name, math.inf), time.process_time() - start)
    print({name: f"{1000 * one:.0f} ms" for name, one in took.items()})
    assert max(took.values()) < REDRAW * SLACK


def test_a_run_that_fails_is_told_and_the_figure_stays():
    works, exact = [True], Normal()
    shown = SamplerExplorer(ALONE, lambda x, sigma: exact(x, sigma) if works else x * math.nan, particles=3)
    before = shown.picture.value
    works.clear()
    shown.controls["calls"].value = 5
    assert "FloatingPointError: x is not finite" in shown.message.value and shown.picture.value == before
    assert "5 calls" in heading(shown), "the plane does not depend on D"
    works.append(True)
    shown.controls["calls"].value = 6
    assert shown.message.value == "" and shown.picture.value != before


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SamplerExplorer(toys.two_peaks(), Normal()), "mixture is in 1 dimensions; expected 2"),
        (lambda: SamplerExplorer(BLOBS, Normal(), n=0), "n = 0; expected at least one picture"),
        (lambda: SamplerExplorer(BLOBS, Normal(), particles=0), "particles = 0; expected a number from 1 to 1000"),
        (lambda: SamplerExplorer(BLOBS, Normal(), low=0), r"low = 0, high = 15.0; expected 0 < low < high"),
        (lambda: SamplerExplorer(BLOBS, lambda x, sigma: x[:1]), r"D returned shape \(1, 1, 16, 16\) for x of shape \(6, "),
        (lambda: SamplerExplorer(BLOBS, Normal(), shape=(2, 16, 16)), r"images has shape \(6, 2, 16, 16\); expected"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
