"""Motions read from frames: geometry against exact flow, laws of its parts, and true, shuffled and frozen clips."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from course_lib import zoo
from course_lib.video import tracking
from course_lib.video.tracking import Motions, shares, smoothed, steady_turn, straightness, track
from course_lib.worlds.scenes.attributes import FIELD_OF_VIEW, GROUNDS, SHAPES, Scenes
from course_lib.worlds.scenes.camera import centres
from course_lib.worlds.scenes.clip_captions import direction, directions
from course_lib.worlds.scenes.clips import BOUNCE, MOTIONS, ROLL, SLIDE, SPIN, ZOOM, Clips, draw_clips, render_clips

SEED, EACH = 8_201, 10
ONCE = 1 / 150_000
"""How often a true law may fail by chance, were the seed another."""
ELEVATION = 25.0


# --- geometry -----------------------------------------------------------------------------------------------------


def one_clip(motion: str, amount: float, shape: str = "house", frames: int = 2) -> Clips:
    """A clip of one large object in the middle of the world, from the distance at which `track` takes cameras to stand."""
    one = torch.tensor([1])
    start = Scenes(
        shape=torch.tensor([[SHAPES.index(shape)]]),
        colour=one[None],
        size=one[None],
        position=torch.zeros(1, 1, 3),
        yaw=torch.tensor([[20.0]]),
        ground=torch.tensor([list(GROUNDS).index("grass")]),
        light=torch.tensor([0]),
        azimuth=torch.tensor([30.0]),
        elevation=torch.tensor([ELEVATION]),
        distance=torch.tensor([tracking.STANDS]),
    )
    return Clips(start, torch.tensor([MOTIONS.index(motion)]), torch.tensor([amount]), frames)


def exact(seen_depth: Tensor, label: Tensor) -> tracking._Clip:
    """The scene that `track` would build if it read depth and masks without error: (F, S, S) each."""
    size = label.shape[-1]
    focal = size / (2 * math.tan(math.radians(FIELD_OF_VIEW) / 2))
    u, v = ((centres(size) - size / 2) / focal).view(size, size, 2).unbind(-1)
    far = label < 0
    depth = torch.where(far, tracking.SKY, seen_depth)
    e = math.radians(ELEVATION)
    return tracking._Clip(
        frames=torch.zeros(len(label), 3, size, size),
        points=torch.stack([u, -v, -torch.ones_like(u)], -1) * depth[..., None],
        thing=label > 0,
        beside=label > 0,
        far=far,
        axis=torch.tensor([0.0, 0.0, -tracking.STANDS]),  # a point of the axis on which the object stands
        ups=[torch.tensor([0.0, math.cos(e), math.sin(e)])],
        share=0.1,
    )


@pytest.mark.parametrize(
    ("motion", "amount"),
    [("slide", 0.3), ("slide", -0.3), ("bounce", 0.9), ("spin", 15.0), ("orbit", 9.0), ("orbit", -9.0), ("zoom", 0.2),
     ("zoom", -0.2), ("roll", 12.0), ("roll", -12.0), ("pan", 8.0), ("pan", -8.0)],
)  # fmt: skip
def test_a_motion_takes_points_where_the_exact_flow_takes_them(motion: str, amount: float) -> None:
    """Between two neighbouring frames, to the rounding of float32 at SKY, 1e-5 of 77 pixels, and of grazing points.

    A bounce is at its foot in frames 0 and 1 of two; of four, frame 1 is 4/3 (1 - 2/3) = 8/9 of `amount` higher.
    """
    frames, part = (4, 8 / 9) if motion == "bounce" else (2, 1.0)
    clips = one_clip(motion, amount, frames=frames)
    seen = render_clips(clips, 64, samples=1)
    clip = exact(seen.depth[0, :, 0], seen.segmentation[0, :, 0])
    to = tracking._moved(
        clip, MOTIONS.index(motion), torch.tensor([0]), torch.full((1, 1, 1, 1), amount * part), clip.ups[0], clip.thing
    )[0, 0]
    focal = 64 / (2 * math.tan(math.radians(FIELD_OF_VIEW) / 2))
    at = to[..., :2] / -to[..., 2:] * torch.tensor([1.0, -1.0]) * focal + 32
    every = tracking.EVERY
    expected = (centres(64).view(64, 64, 2) + seen.flow[0, 0].movedim(0, -1))[::every, ::every]
    near = (seen.depth[0, 0, 0] < 20)[::every, ::every] | clip.far[0, ::every, ::every]
    assert (at - expected).norm(dim=-1)[near].max() < 0.01
    moves = (expected - centres(64).view(64, 64, 2)[::every, ::every]).norm(dim=-1)
    assert moves.max() > 1.5  # so that a wrong sign is seen


# --- parts --------------------------------------------------------------------------------------------------------


def test_directions_are_those_of_captions() -> None:
    clips = Clips(
        one_clip("slide", 0.3).start[torch.zeros(2 * len(MOTIONS), dtype=torch.long)],
        torch.arange(len(MOTIONS)).repeat(2),
        torch.tensor([1.0] * len(MOTIONS) + [-1.0] * len(MOTIONS)),
        2,
    )
    words = [MOTIONS[k] for k in clips.motion]
    assert [direction(word, float(a)) for word, a in zip(words, clips.amount, strict=True)] == directions(clips)


def test_smoothing_keeps_even_pictures_and_has_the_deviation_it_names() -> None:
    flat = torch.full((2, 3, 16, 16), 0.3)
    assert torch.allclose(smoothed(flat), flat, atol=1e-6)
    dot = torch.zeros(1, 1, 33, 33)
    dot[..., 16, 16] = 1
    found = smoothed(dot, 2.0)[0, 0].double()
    place = torch.arange(33.0).double() - 16
    # the Gaussian is cut at 3 sigma, where it has lost 2.7 % of its variance
    assert float((found.sum(0) * place**2).sum() / found.sum()) == pytest.approx(4.0, rel=0.04)
    assert torch.allclose(found, found.T)


def test_straightness_of_steady_steps_is_three_over_frames_and_one() -> None:
    """Pairs k < l of F points on a line are (F + 1) / 3 steps apart on average."""
    steps = torch.arange(8.0)[:, None, None, None].expand(8, 3, 4, 4)
    everywhere = torch.ones(8, 4, 4, dtype=torch.bool)
    assert straightness(steps, everywhere) == pytest.approx(3 / 9, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    mixed = [straightness(steps[torch.randperm(8, generator=generator)], everywhere) for _ in range(300)]
    found = torch.tensor(mixed)
    assert abs(float(found.mean()) - 1) < 4.5 * float(found.std()) / math.sqrt(300)
    assert math.isnan(straightness(torch.zeros(8, 3, 4, 4), everywhere))


def test_only_where_the_object_is_has_a_say_in_straightness() -> None:
    x = torch.arange(8.0)[:, None, None, None].repeat(1, 3, 4, 4)
    x[..., 2:] = torch.randn(8, 3, 4, 2)
    left = torch.zeros(8, 4, 4, dtype=torch.bool)
    left[..., :2] = True
    assert straightness(x, left) == pytest.approx(3 / 9, abs=1e-6)


def test_a_steady_turn_is_found_across_the_end_of_the_circle() -> None:
    omega = torch.tensor([35.0, -160.0, 240.0, 0.0])
    angle = (350 + omega[:, None] * torch.linspace(0, 1, 8)) % 360
    found, regular = steady_turn(angle)
    assert torch.equal(found, omega)
    assert torch.allclose(regular, torch.ones(4), atol=1e-5)
    _, mixed = steady_turn(angle[1:3, torch.tensor([4, 0, 6, 2, 7, 3, 1, 5])])
    assert mixed.max() < tracking.REGULAR


def test_shares_count_words_and_directions() -> None:
    found = Motions(["slide", "slide", "pan", ""], ["left", "right", "left", ""], torch.zeros(4), torch.zeros(4))
    rates = shares(found, ["slide", "slide", "pan", "roll"], ["left", "left", "left", "left"])
    assert rates == {"word": 0.75, "direction": 0.5}
    with pytest.raises(ValueError, match="found has 4 clips, words 1 and ways 4"):
        shares(found, ["slide"], ["left"] * 4)


# --- true, shuffled and frozen clips ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> tuple[Clips, Tensor]:
    """EACH clips of every motion, and their frames."""
    drawn = [draw_clips(EACH, SEED, motion) for motion in MOTIONS]
    return (
        Clips(
            start=_joined([one.start for one in drawn]),
            motion=torch.cat([one.motion for one in drawn]),
            amount=torch.cat([one.amount for one in drawn]),
            frames=8,
        ),
        torch.cat([render_clips(one).rgb for one in drawn]),
    )


def _joined(scenes: list[Scenes]) -> Scenes:
    return Scenes(**{name: torch.cat([getattr(one, name) for one in scenes]) for name in vars(scenes[0])})


@pytest.fixture(scope="module")
def tracked(clips: tuple[Clips, Tensor]) -> Motions:
    return read(clips[1])


def read(x: Tensor) -> Motions:
    return track(x, zoo.load("scenes-maps", "cpu"), zoo.load("scenes-reader", "cpu"))


def rates(found: Motions, of: Clips) -> dict[str, float]:
    return shares(found, [MOTIONS[k] for k in of.motion], directions(of))


def test_motion_and_direction_of_true_clips_are_right(clips: tuple[Clips, Tensor], tracked: Motions) -> None:
    """At a rate of 95 % as many of the clips are right, but once in 150,000 sets."""
    n = len(clips[0])
    found = rates(tracked, clips[0])
    assert found["direction"] * n >= binom.ppf(ONCE, n, 0.95), found
    assert found["word"] >= found["direction"]


def test_the_amount_follows_the_true_one(clips: tuple[Clips, Tensor], tracked: Motions) -> None:
    """Correlation over both signs, and the median relative error of clips whose word is right.

    A shape of which no front is seen has no measured turn in a spin, and an orbit on an even ground moves little: these two
    are asked for less.
    """
    of = clips[0]
    for motion, name in enumerate(MOTIONS):
        rows = [i for i in range(len(of)) if int(of.motion[i]) == motion and tracked.word[i] == name]
        assert len(rows) >= EACH / 2, name
        found, true = tracked.amount[rows], of.amount[rows]
        error = float(((found - true) / true).abs().median())
        assert error < 0.25, (name, error)
        if motion != BOUNCE:  # bounces have one sign, and their heights differ little
            assert float(torch.corrcoef(torch.stack([found, true]))[0, 1]) > 0.85, name


def test_shuffled_clips_are_read_no_better_than_by_chance(clips: tuple[Clips, Tensor]) -> None:
    """Chance is one word in seven."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.stack([x[torch.randperm(8, generator=generator)] for x in clips[1]])
    assert rates(read(mixed), clips[0])["word"] <= 1 / len(MOTIONS)


def test_frozen_clips_have_no_motion(clips: tuple[Clips, Tensor]) -> None:
    still = clips[1][:: EACH // 2, :1].expand(-1, 8, -1, -1, -1)
    found = read(still)
    assert set(found.word) == {""}
    assert set(found.direction) == {""}
    assert bool((found.amount == 0).all())
    flickering = read(still + 0.05 * torch.randn(still.shape, generator=torch.Generator().manual_seed(0)))
    assert sum(word != "" for word in flickering.word) <= len(still) / len(MOTIONS)


def test_clips_played_backwards_go_the_other_way(clips: tuple[Clips, Tensor]) -> None:
    rows = torch.isin(clips[0].motion, torch.tensor([SLIDE, ZOOM, ROLL])).nonzero()[:, 0][::3]
    of = Clips(clips[0].start[rows], clips[0].motion[rows], -clips[0].amount[rows], 8)
    assert rates(read(clips[1][rows].flip(1)), of)["direction"] * len(rows) >= binom.ppf(ONCE, len(rows), 0.95)


def test_a_clip_is_read_alone(clips: tuple[Clips, Tensor], tracked: Motions) -> None:
    row = int((clips[0].motion == SPIN).nonzero()[0])
    alone = read(clips[1][row : row + 1])
    assert alone.word == tracked.word[row : row + 1]
    assert torch.allclose(alone.amount, tracked.amount[row : row + 1], rtol=0.05)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"clips has shape \(1, 3, 3, 64, 64\).*F >= 4"):
        track(torch.zeros(1, 3, 3, 64, 64), None, None)
    with pytest.raises(ValueError, match="expected square frames with a side that 16 divides"):
        track(torch.zeros(1, 8, 3, 64, 32), None, None)
