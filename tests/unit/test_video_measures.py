"""Measures of clips: exact laws of warping, flicker and smoothness, and what they say of true, shuffled and frozen clips."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.metrics import frechet_distance
from course_lib.video import measures
from course_lib.worlds.scenes.captions import Reading
from course_lib.worlds.scenes.clip_captions import motion_captions, parse_motion
from course_lib.worlds.scenes.clips import Clips, RenderedClips, draw_clips, render_clips

SE = 4.5  # standard errors: a true law fails once in 150,000 comparisons
SEED = 8_102


class Eyes(nn.Module):
    """Sees the picture itself."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(1))

    def seen(self, x: Tensor) -> Tensor:
        return x


class Plain:
    """A reader whose features are the mean colour, and which obeys prompts by their order."""

    def __init__(self, right: dict[str, Tensor] | None = None) -> None:
        self.net = Eyes()
        self.right = right or {}

    def features(self, pictures: Tensor) -> Tensor:
        return pictures.mean((2, 3))

    def obeys(self, pictures: Tensor, prompts: list[Reading]) -> dict[str, Tensor]:
        assert len(pictures) == len(prompts)
        return self.right


@pytest.fixture(scope="module")
def rendered() -> tuple[Clips, RenderedClips]:
    clips = draw_clips(80, SEED)
    return clips, render_clips(clips)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([one[torch.randperm(len(one), generator=generator)] for one in x])


def frozen(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


# --- warping ------------------------------------------------------------------------------------------------------


def test_a_warp_by_whole_pixels_is_a_shift_to_the_right_and_down() -> None:
    x = noise(1, 2, 6, 8)
    found = measures.warp(x, torch.tensor([2.0, 1.0])[None, :, None, None].expand(1, 2, 6, 8))
    assert torch.allclose(found[..., :5, :6], x[..., 1:, 2:], atol=1e-5)


def plane(frames: int, speed: tuple[float, float], size: int = 16) -> tuple[Tensor, Tensor]:
    """A clip of a picture that is linear in place and moves by `speed` pixels a frame, and its flow."""
    v, u = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    k = torch.arange(frames)[:, None, None]
    x = (0.02 * (u - speed[0] * k) - 0.03 * (v - speed[1] * k))[None, :, None].expand(1, frames, 3, size, size)
    return x, torch.tensor(speed)[:, None, None].expand(1, frames - 1, 2, size, size)


def test_the_warp_error_of_a_moving_plane_is_zero_with_its_flow_and_its_slope_without() -> None:
    """Bilinear look-up is exact on a plane; without flow the difference is |0.02 dx - 0.03 dy|."""
    x, flow = plane(4, (1.5, -0.75))
    inside = torch.zeros(1, 3, 1, 16, 16, dtype=torch.bool)
    inside[..., 2:-2, 2:-2] = True
    assert float(measures.warp_error(x, flow, inside)) < 1e-6
    assert float(measures.warp_error(x, -flow, inside)) == pytest.approx(2 * (0.02 * 1.5 + 0.03 * 0.75), abs=1e-6)
    assert float(measures.warp_error(x, 0 * flow, inside)) == pytest.approx(0.02 * 1.5 + 0.03 * 0.75, abs=1e-6)


def test_what_is_hidden_has_no_say_in_the_warp_error() -> None:
    x, flow = plane(3, (0.0, 0.0))
    visible = torch.ones(1, 2, 1, 16, 16, dtype=torch.bool)
    visible[..., :8] = False
    broken = x.clone()
    broken[:, 1, ..., :8] = 1.0
    assert float(measures.warp_error(broken, flow, visible)) == 0
    assert float(measures.warp_error(broken, flow, ~visible)) > 0.1
    assert measures.warp_error(x, flow, torch.zeros_like(visible)).isnan().all()


def test_white_noise_has_its_mean_difference_as_warp_error_and_as_still_flicker() -> None:
    """E |a - b| = 2 s / sqrt(pi) for independent Gaussians of deviation s; the deviation of |a - b| is s sqrt(2 - 4 / pi).

    Neighbouring differences share a frame, which at most doubles the variance of their mean.
    """
    s, n, size = 0.1, 2, 32
    x = s * noise(n, 5, 3, size, size)
    flow, visible = torch.zeros(n, 4, 2, size, size), torch.ones(n, 4, 1, size, size, dtype=torch.bool)
    error = SE * s * math.sqrt(2 - 4 / math.pi) * math.sqrt(2 / (4 * 3 * size**2))
    for found in (measures.warp_error(x, flow, visible), measures.still_flicker(x, flow, visible)):
        assert found.shape == (n,)
        assert (found - 2 * s / math.sqrt(math.pi)).abs().max() < error


def test_what_moves_or_is_hidden_has_no_say_in_the_still_flicker() -> None:
    x = noise(1, 3, 3, 8, 8)
    x[:, :, :, :4] = 0.5
    flow = torch.zeros(1, 2, 2, 8, 8)
    flow[..., 4:, :] = 0.2
    visible = torch.ones(1, 2, 1, 8, 8, dtype=torch.bool)
    assert float(measures.still_flicker(x, flow, visible)) == 0
    assert float(measures.still_flicker(x, flow, visible, within=0.3)) > 0.1
    assert measures.still_flicker(x, flow + 1, visible).isnan().all()
    x[:, 1, :, :2] = -0.5
    uncovered = visible.clone()
    uncovered[..., :2, :] = False
    assert float(measures.still_flicker(x, flow, uncovered)) == 0
    assert float(measures.still_flicker(x, flow, visible)) > 0.1


# --- flicker without flow -----------------------------------------------------------------------------------------


def test_a_clip_that_changes_linearly_with_time_does_not_flicker() -> None:
    x = noise(1, 1, 3, 8, 8) + noise(1, 1, 3, 8, 8, seed=1) * torch.linspace(-1, 1, 6).view(1, 6, 1, 1, 1)
    assert float(measures.flicker(x)) < 1e-6


def test_flicker_is_the_deviation_of_white_flicker() -> None:
    """Each |second difference| has deviation s sqrt(6) sqrt(1 - 2 / pi); at most three in a row share a frame."""
    s, size, frames = 0.07, 32, 8
    still = noise(1, 1, 3, size, size, seed=1)
    found = measures.flicker(still + s * noise(1, frames, 3, size, size))
    one = s * math.sqrt(6 * (1 - 2 / math.pi)) * math.sqrt(math.pi / 12)
    assert abs(float(found) - s) < SE * one * math.sqrt(5 / ((frames - 2) * 3 * size**2))


# --- the reader's measures ----------------------------------------------------------------------------------------


def test_identity_counts_frames_and_what_is_not_named_is_right() -> None:
    right = {"shape": torch.tensor([1.0, 0, 1, 1, 1, 0]), "colour": torch.tensor([1.0, 1, 0, 1, math.nan, math.nan])}
    found = measures.identity(torch.zeros(2, 3, 3, 8, 8), Plain(right), [Reading([{}]), Reading([{}])])
    assert found["shape"].tolist() == [[True, False, True], [True, True, False]]
    assert found["colour"].tolist() == [[True, True, False], [True, True, True]]
    assert found["both"].tolist() == [[True, False, False], [True, True, False]]


def test_smoothness_is_the_mean_cosine_of_neighbours() -> None:
    colours = torch.tensor([[1.0, 0, 0], [1.0, 1, 0], [0, 1.0, 0]])  # 45 degrees from one to the next
    x = colours[None, :, :, None, None].expand(1, 3, 3, 8, 8)
    assert float(measures.smoothness(x, Plain())) == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert float(measures.smoothness(frozen(x), Plain())) == pytest.approx(1.0, abs=1e-6)


def test_clip_features_are_mean_speed_and_jerk_in_units_of_true_clips() -> None:
    """With one axis along which clip i holds a_i + b_i k: mean a + b (F - 1) / 2, speed |b|, jerk 0."""
    a, b = noise(40).double(), noise(40, seed=1).double()
    value = (a[:, None] + b[:, None] * torch.arange(4)).float()
    x = torch.zeros(40, 4, 3, 4, 4)
    x[:, :, 0] = value[:, :, None, None]
    x[:, :, 0] += 1e-3 * noise(40, 4, 1, 1, seed=2)  # or the jerk has no deviation
    found = measures.clip_features(x, Plain(), 1)(x)
    assert torch.allclose(found.std(0), torch.ones(3).double(), atol=1e-6)
    middle, speed = a + 1.5 * b, b.abs()
    assert torch.corrcoef(torch.stack([found[:, 0], middle]))[0, 1].abs() > 0.9999
    assert torch.corrcoef(torch.stack([found[:, 1], speed]))[0, 1] > 0.9999


def test_two_sets_of_one_distribution_are_as_far_apart_as_chance_says() -> None:
    """The floor in the docstring, d (d + 5) / (2 N), on white Gaussians; higher orders add to it, some d / N of it."""
    d, n, rounds = 12, 75, 40
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [frechet_distance(torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)) for _ in range(rounds)]
    )
    floor = d * (d + 5) / (2 * n)
    assert abs(float(found.mean()) - floor) < SE * float(found.std()) / math.sqrt(rounds) + floor * d / n


# --- true, shuffled and frozen clips ------------------------------------------------------------------------------


def test_true_clips_are_coherent_along_their_own_flow_only(rendered: tuple[Clips, RenderedClips]) -> None:
    """The flow undoes the change of every clip that moves the camera, and most of what the object does."""
    _, seen = rendered
    with_flow = measures.warp_error(seen.rgb, seen.flow, seen.visible)
    without = measures.warp_error(seen.rgb, 0 * seen.flow, seen.visible)
    mixed = measures.warp_error(shuffled(seen.rgb), seen.flow, seen.visible)
    assert float(with_flow.mean()) < float(without.mean()) / 3
    assert float(with_flow.mean()) < float(mixed.mean()) / 3
    noisy = seen.rgb + 0.05 * noise(*seen.rgb.shape)
    assert bool((measures.warp_error(noisy, seen.flow, seen.visible) > with_flow).all())


def test_flicker_sees_noise_and_order_and_prefers_a_frozen_clip(rendered: tuple[Clips, RenderedClips]) -> None:
    _, seen = rendered
    true = measures.flicker(seen.rgb)
    assert bool((measures.flicker(frozen(seen.rgb)) == 0).all())
    assert float(measures.flicker(shuffled(seen.rgb)).mean()) > 1.5 * float(true.mean())
    assert bool((measures.flicker(seen.rgb + 0.05 * noise(*seen.rgb.shape)) > true).all())


def test_the_reader_knows_true_clips_frame_by_frame(rendered: tuple[Clips, RenderedClips]) -> None:
    """Asked for what the captions say, and for what those of the next clips say, which agree once in eight."""
    clips, seen = rendered
    reader = zoo.load("scenes-reader", "cpu")
    wanted = [parse_motion(caption).scene for caption in motion_captions(clips, SEED)]
    right = measures.identity(seen.rgb, reader, wanted)
    assert right["both"].shape == seen.rgb.shape[:2]
    assert float(right["both"].double().mean()) > 0.9
    wrong = measures.identity(seen.rgb, reader, wanted[1:] + wanted[:1])
    assert float(wrong["both"].double().mean()) < 0.25


def test_features_of_true_clips_are_smoother_than_those_of_shuffled_ones(rendered: tuple[Clips, RenderedClips]) -> None:
    _, seen = rendered
    reader = zoo.load("scenes-reader", "cpu")
    true, mixed = measures.smoothness(seen.rgb, reader), measures.smoothness(shuffled(seen.rgb), reader)
    assert float((true > mixed).double().mean()) > 0.9
    assert torch.allclose(measures.smoothness(frozen(seen.rgb[:2]), reader), torch.ones(2), atol=1e-5)


def test_shuffled_and_frozen_clips_are_several_times_farther_than_other_true_ones(rendered: tuple[Clips, RenderedClips]) -> None:
    _, seen = rendered
    reader = zoo.load("scenes-reader", "cpu")
    one, other = seen.rgb[:40], seen.rgb[40:]
    true = measures.frechet_video_distance(one, other, reader, axes=2)
    assert measures.frechet_video_distance(one, shuffled(other), reader, axes=2) > 3 * true
    assert measures.frechet_video_distance(one, frozen(other), reader, axes=2) > 3 * true
    apart = torch.stack([other[torch.arange(40).roll(k), k] for k in range(8)], 1)  # each frame of another clip
    assert measures.frechet_video_distance(one, apart, reader, axes=2) > 3 * true
    assert measures.frechet_video_distance(one, one, reader, axes=2) == pytest.approx(0.0, abs=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong() -> None:
    x = torch.zeros(2, 4, 3, 8, 8)
    flow, visible = torch.zeros(2, 3, 2, 8, 8), torch.ones(2, 3, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"flow has shape \(2, 3, 2, 8, 4\); expected \(2, 3, 2, 8, 8\)"):
        measures.warp_error(x, flow[..., :4], visible)
    with pytest.raises(ValueError, match=r"visible has shape"):
        measures.still_flicker(x, flow, visible[:, 1:])
    with pytest.raises(ValueError, match=r"flow has shape"):
        measures.warp(x[:, 0], flow[:, 0, :1])
    with pytest.raises(ValueError, match=r"clips has shape \(2, 2, 3, 8, 8\).*F >= 3"):
        measures.flicker(x[:, :2])
    with pytest.raises(ValueError, match="wanted has 1 readings; expected 2"):
        measures.identity(x, Plain(), [Reading([{}])])
    with pytest.raises(ValueError, match="true has 1 clips"):
        measures.clip_features(x[:1], Plain())
