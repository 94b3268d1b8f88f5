"""Clips: motions inside the picture, flow and visibility against closed forms, captions that parse back."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.worlds.scenes import draw
from course_lib.worlds.scenes.attributes import FIELD_OF_VIEW, GROUNDS, SHAPES, SIZES, TARGET, Scenes
from course_lib.worlds.scenes.clip_captions import PHRASES, directions, parse_motion
from course_lib.worlds.scenes.clips import HOPS, MOTIONS, ROUND, Clips, draw_clips, render_clips
from course_lib.worlds.scenes.sampling import held_out, margins, middles, relations
from course_lib.worlds.scenes.solids import FOOT

SIZE = 64
FOCAL = SIZE / (2 * math.tan(math.radians(FIELD_OF_VIEW / 2)))
PLAIN, GRASS = list(GROUNDS).index("plain"), list(GROUNDS).index("grass")


def clip(shape: str, motion: str, amount: float, ground: int = GRASS, elevation: float = 25.0, frames: int = 2) -> Clips:
    """One clip of a large object at the origin, seen from azimuth 30."""
    one = torch.tensor([1])
    start = Scenes(
        shape=torch.tensor([[SHAPES.index(shape)]]),
        colour=one[None],
        size=one[None],
        position=torch.zeros(1, 1, 3),
        yaw=torch.tensor([[20.0]]),
        ground=torch.tensor([ground]),
        light=torch.tensor([0]),
        azimuth=torch.tensor([30.0]),
        elevation=torch.tensor([elevation]),
        distance=torch.tensor([4.0]),
    )
    return Clips(start, torch.tensor([MOTIONS.index(motion)]), torch.tensor([amount]), frames)


def centres() -> np.ndarray:
    """Pixel centres (H, W, 2) from the middle of the picture, to the right and down."""
    u, v = np.meshgrid(np.arange(SIZE) + 0.5 - SIZE / 2, np.arange(SIZE) + 0.5 - SIZE / 2)
    return np.stack([u, v], -1)


def stand(azimuth: float, elevation: float, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Eye and axes (right, up, back) of a camera, in float64, from the definition."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    return np.array(TARGET) + distance * back, np.stack([right, np.cross(back, right), back])


def ray(axes: np.ndarray) -> np.ndarray:
    """Directions (H, W, 3) through the pixel centres, not normalised."""
    c = centres() / FOCAL
    return c[..., :1] * axes[0] - c[..., 1:] * axes[1] - axes[2]


def seen_at(p: np.ndarray, eye: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Pixels (..., 2) of world points, from the middle of the picture."""
    q = (p - eye) @ axes.T
    return np.stack([FOCAL * q[..., 0] / -q[..., 2], FOCAL * q[..., 1] / q[..., 2]], -1)


def flow_of(clips: Clips) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flow (H, W, 2), visibility (H, W) and labels (H, W) of the first frame of the first clip."""
    seen = render_clips(clips, SIZE, samples=1)
    return seen.flow[0, 0].movedim(0, -1).double().numpy(), seen.visible[0, 0, 0].numpy(), seen.segmentation[0, 0, 0].numpy()


# Flow, against closed forms. Float32 at coordinates up to 10 is good to 2e-6, at 80 pixels a unit 2e-4; grazing and far
# points lose a digit.
PIXEL = 2e-3


@pytest.mark.parametrize(
    ("motion", "amount", "after"),
    [
        ("orbit", 12.0, (42.0, 25.0, 4.0)),
        ("orbit", -12.0, (18.0, 25.0, 4.0)),
        ("zoom", math.log(1.25), (30.0, 25.0, 3.2)),
        ("zoom", -math.log(1.25), (30.0, 25.0, 5.0)),
    ],
)
def test_flow_of_the_ground_under_a_moving_camera_is_its_closed_form(
    motion: str, amount: float, after: tuple[float, ...]
) -> None:
    flow, _, label = flow_of(clip("cone", motion, amount))
    (eye, axes), (next_eye, next_axes) = stand(30.0, 25.0, 4.0), stand(*after)
    d = ray(axes)
    p = eye - eye[2] / np.where(d[..., 2:] < 0, d[..., 2:], np.nan) * d  # where the ray meets z = 0
    expected = seen_at(p, next_eye, next_axes) - centres()
    ground = label == 0
    assert ground.sum() > 2000
    assert np.abs(flow - expected)[ground].max() < PIXEL
    assert np.abs(expected[ground]).max() > 2
    sky = label == -1
    far = seen_at(next_eye + d, next_eye, next_axes) - centres()  # a direction, wherever the camera stands
    if sky.any():
        assert np.abs(flow - far)[sky].max() < PIXEL


def test_the_sky_stands_still_while_the_camera_comes_closer() -> None:
    flow, _, label = flow_of(clip("cone", "zoom", 0.3, ground=PLAIN))
    assert (label == -1).sum() > 2000
    assert np.abs(flow[label == -1]).max() < PIXEL


@pytest.mark.parametrize("amount", [10.0, -25.0])
def test_a_roll_turns_the_picture_the_other_way(amount: float) -> None:
    """The camera rolls clockwise, so every point turns counter-clockwise about the middle, near or far."""
    flow, _, _ = flow_of(clip("house", "roll", amount, elevation=12.0))
    c, a = centres(), math.radians(amount)
    u, v = c[..., 0], c[..., 1]
    turned = np.stack([math.cos(a) * u + math.sin(a) * v, math.cos(a) * v - math.sin(a) * u], -1)  # v points down
    assert np.abs(flow - (turned - c)).max() < PIXEL


def test_a_pan_moves_bearings_by_its_angle() -> None:
    """For a level camera, tan(bearing) = u / f before, and tan(bearing - pan) after, near or far; heights follow 1 / depth."""
    amount = 8.0
    flow, _, _ = flow_of(clip("house", "pan", amount, elevation=0.0))
    u, v = centres()[..., 0], centres()[..., 1]
    # The camera turns from -4 to 4 degrees, so from the first frame to the last by 8, to its right.
    bearing = np.arctan(u / FOCAL)
    after = bearing - math.radians(amount)
    expected = np.stack([FOCAL * np.tan(after) - u, v * np.cos(bearing) / np.cos(after) - v], -1)
    assert np.abs(flow - expected).max() < PIXEL


def test_a_spinning_sphere_flows_as_its_closed_form_and_hides_what_turns_away() -> None:
    angle = 25.0
    flow, visible, label = flow_of(clip("sphere", "spin", angle))
    eye, axes = stand(30.0, 25.0, 4.0)
    radius = 0.85 * SIZES["large"]
    centre = np.array([0.0, 0.0, radius])
    d = ray(axes)
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    b = d @ (eye - centre)
    square = b**2 - (eye - centre) @ (eye - centre) + radius**2
    p = eye + (-b - np.sqrt(np.maximum(square, 0)))[..., None] * d - centre
    a = math.radians(angle)
    turned = centre + p @ np.array([[math.cos(a), math.sin(a), 0], [-math.sin(a), math.cos(a), 0], [0, 0, 1]])
    expected = seen_at(turned, eye, axes) - centres()
    well = (label == 1) & (square > 1e-2)  # at the rim the square root loses digits
    assert well.sum() > 300
    assert np.abs(flow - expected)[well].max() < PIXEL
    facing = ((turned - centre) * (eye - turned)).sum(-1) / radius
    sure = well & (np.abs(facing) > 0.02)
    assert (visible == (facing > 0))[sure].all()
    assert (~visible[sure]).sum() > 20
    assert np.abs(flow[label != 1]).max() < PIXEL  # nothing else moves


@pytest.mark.parametrize("amount", [0.4, -0.4])
def test_a_slide_flows_sideways_in_proportion_to_nearness(amount: float) -> None:
    """It is parallel to the picture: by f amount / depth pixels. The ground is seen again where no object has come."""
    clips = clip("car", "slide", amount)
    seen = render_clips(clips, SIZE, samples=1)
    flow, label = seen.flow[0, 0], seen.segmentation[0, :, 0]
    car = label[0] == 1
    torch.testing.assert_close(flow[0][car], FOCAL * amount / seen.depth[0, 0, 0][car], atol=PIXEL, rtol=0)
    assert flow[1][car].abs().max() < PIXEL
    ground = label[0] == 0
    assert flow[:, ground].abs().max() < PIXEL  # what went through a point and back
    assert torch.equal(seen.visible[0, 0, 0][ground], (label[1] == 0)[ground])
    assert (~seen.visible[0, 0, 0][ground]).sum() > 20


def test_a_bounce_is_a_parabola_and_ends_where_it_began() -> None:
    height, frames = 0.6, 33
    position = clip("cube", "bounce", height, frames=frames).states()[0].position[:, 0]
    assert position[:, :2].abs().max() == 0
    z = position[:, 2]
    assert abs(float(z.max()) - height) < 1e-6 and z.min() == 0
    hop = (frames - 1) // HOPS
    torch.testing.assert_close(z[:hop], z[hop:-1], atol=1e-6, rtol=0)
    fall = z[:hop].diff(n=2)  # constant acceleration: -8 h / hop^2
    torch.testing.assert_close(fall, torch.full_like(fall, -8 * height / hop**2), atol=1e-5, rtol=0)


def warped(picture: Tensor, flow: Tensor) -> Tensor:
    """Each pixel's colour where the flow leads: (M, C, H, W), (M, 2, H, W) -> (M, C, H, W)."""
    c = torch.from_numpy(centres()).float() + SIZE / 2
    return F.grid_sample(picture, (c + flow.movedim(1, -1)) / SIZE * 2 - 1, padding_mode="border", align_corners=False)


@pytest.mark.parametrize("motion", ["slide", "bounce", "orbit", "zoom", "roll", "pan"])
def test_the_next_frame_taken_back_along_the_flow_is_this_frame(motion: str) -> None:
    """The light stands still in the world, so what does not turn keeps its colour; only interpolation errs.

    On a sphere before a plain background shading has no edges. Within a pixel of its rim colours are mixed; elsewhere the
    error of bilinear interpolation is at most h^2 / 8 per axis of the second derivative. On a sphere of 12 pixels' radius,
    away from the rim, that is some 1e-3 of a range of 2; the terminator's corner in max(n . l, 0) costs more, but only there.
    """
    amount = {"slide": -0.5, "bounce": 0.4, "orbit": -60.0, "zoom": 0.4, "roll": 45.0, "pan": 14.0}[motion]
    seen = render_clips(clip("sphere", motion, amount, ground=PLAIN, frames=8), SIZE)
    back = warped(seen.rgb[0, 1:], seen.flow[0])
    error = (back - seen.rgb[0, :-1]).abs().amax(1, keepdim=True)
    label = seen.segmentation[0].float()
    rim = F.max_pool2d(label, 5, 1, 2) != -F.max_pool2d(-label, 5, 1, 2)
    after = warped(rim[1:].float(), seen.flow[0]) > 0
    fair = seen.visible[0] & ~rim[:-1] & ~after
    on_sphere = fair & (label[:-1] == 1)
    assert on_sphere.sum() > 1500
    assert error[on_sphere].mean() < 4e-3
    assert error[fair].max() < 0.1
    wrong = (warped(seen.rgb[0, 1:], -seen.flow[0]) - seen.rgb[0, :-1]).abs().amax(1, keepdim=True)
    assert wrong[on_sphere].mean() > 3 * error[on_sphere].mean()


def test_flow_of_known_points_agrees_with_their_projections() -> None:
    """Any clip: unproject, carry by the object's pose and project, in float64 and one pixel at a time."""
    clips = draw_clips(14, 2, None, (1, 2), frames=3)
    seen = render_clips(clips, SIZE, samples=1)
    scenes, view = clips.states()
    g = np.random.default_rng(0)
    checked = 0
    for i, f, r, c in zip(*(g.integers(0, high, 600) for high in (14, 2, SIZE, SIZE)), strict=True):
        thing = int(seen.segmentation[i, f, 0, r, c])
        if thing < 0:
            continue
        here, after = i * 3 + f, i * 3 + f + 1
        eye, axes = view.eye[here].double().numpy(), view.axes[here].double().numpy()
        p = eye + float(seen.depth[i, f, 0, r, c]) * ray(axes)[r, c]
        if thing > 0:
            a = math.radians(float(scenes.yaw[after, thing - 1] - scenes.yaw[here, thing - 1]))
            turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
            old, new = (scenes.position[j, thing - 1].double().numpy() for j in (here, after))
            p = turn @ (p - old) + new
        expected = seen_at(p, view.eye[after].double().numpy(), view.axes[after].double().numpy()) - centres()[r, c]
        assert np.abs(seen.flow[i, f, :, r, c].numpy() - expected).max() < PIXEL
        checked += thing > 0
    assert checked > 30


# Draws


@pytest.mark.parametrize("objects", [1, 2])
def test_objects_stay_in_the_picture_apart_and_above_the_ground(objects: int) -> None:
    clips = draw_clips(700, 0, None, objects)
    assert torch.bincount(clips.motion, minlength=len(MOTIONS)).min() > 60
    scenes, view = clips.states()
    assert margins(scenes, view).min() > -2e-5
    assert scenes.position[..., 2].min() >= 0
    if objects == 2:
        centre, radii = middles(scenes), scenes.scale.sum(1)
        apart = (centre[:, 0] - centre[:, 1]).norm(dim=1) - radii
        relation = relations(scenes)
        on_top = relations(clips.start).repeat_interleave(clips.frames) == 4
        assert apart[~on_top].min() > 0
        # What slides on its support, or hops above it, stays over it and does not sink in.
        support = torch.tensor([{"cube": 2 / 3**0.5, "cylinder": 1.4}.get(name, 0.0) for name in SHAPES])
        height = support[scenes.shape[:, 1]] * scenes.scale[:, 1]
        assert (scenes.position[:, 0, 2] - height)[on_top].min() > -1e-5
        assert (scenes.position[:, 0, :2] - scenes.position[:, 1, :2]).norm(dim=1)[on_top].max() < 0.45
        still = (clips.motion == MOTIONS.index("slide")).repeat_interleave(clips.frames)
        assert torch.equal(relation[still], relations(clips.start).repeat_interleave(clips.frames)[still])


def test_only_shapes_whose_turns_can_be_seen_spin_and_splits_are_kept() -> None:
    clips = draw_clips(200, 1, "spin", (1, 2), split="held out")
    assert not torch.isin(clips.start.shape[:, 0], torch.tensor(ROUND)).any()
    present = clips.start.present
    assert held_out(clips.start.shape, clips.start.colour, clips.start.size)[present].all()
    train = draw_clips(200, 1, None, 2).start
    assert not held_out(train.shape, train.colour, train.size).any()


def test_a_clip_depends_on_its_seed_and_number_only() -> None:
    whole = draw_clips(30, 4, None, (1, 2))
    part = draw_clips(10, 4, None, (1, 2), first=12, frames=5)
    for field in dataclasses.fields(Scenes):
        assert torch.equal(getattr(part.start, field.name), getattr(whole.start, field.name)[12:22])
    assert torch.equal(part.motion, whole.motion[12:22]) and torch.equal(part.amount, whole.amount[12:22])
    assert not torch.equal(draw_clips(30, 5, None, (1, 2)).amount, whole.amount)
    a, b = render_clips(whole[3:5], 32), render_clips(whole[4], 32)
    torch.testing.assert_close(a.rgb[1:], b.rgb, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.flow[1:], b.flow, atol=1e-4, rtol=0)
    assert a.flow.shape == (2, 7, 2, 32, 32) and a.visible.shape == (2, 7, 1, 32, 32)


def test_both_directions_are_equally_likely_and_speeds_vary() -> None:
    """1000 clips a motion: a share of one half within 4 sqrt(1 / 4000) = 0.064."""
    for name in MOTIONS:
        amount = draw_clips(1000, 6, name).amount
        assert amount.abs().min() > 0.15 and amount.abs().std() > 0.1 * amount.abs().mean()
        assert name == "bounce" or abs(float((amount > 0).float().mean()) - 0.5) < 0.064


def test_room_is_the_margin_of_a_scenes_own_camera() -> None:
    scenes = draw(50, 0, (1, 2))
    still = Clips(scenes, torch.zeros(50, dtype=torch.long), torch.zeros(50), 1)
    torch.testing.assert_close(margins(*still.states()), margins(scenes), atol=1e-5, rtol=0)


def test_the_ground_stays_lit_from_where_it_was() -> None:
    """Half a turn round a sphere lit from its left: the shadow, to its right, comes to lie on the left."""
    clips = clip("sphere", "orbit", 180.0, elevation=35.0)
    seen = render_clips(clips, SIZE)
    ground, value = seen.segmentation[0, :, 0] == 0, seen.rgb[0].mean(1)
    columns = (torch.arange(SIZE) + 0.5 - SIZE / 2).expand(SIZE, SIZE)
    first, last = (columns[ok & (v < v[ok].median() - 0.1)].mean() for ok, v in zip(ground, value, strict=True))
    assert first > 3 and last < -3


# Directions


def test_directions_are_those_of_the_motion() -> None:
    """What slides to the right flows to the right; under a camera that pans, orbits or rolls to the right it flows otherwise."""
    for (motion, direction), _ in PHRASES.items():
        if not direction:
            continue
        sign = 1.0 if direction in ("right", "in") else -1.0
        amount = sign * {"slide": 0.4, "orbit": 10.0, "zoom": 0.2, "roll": 10.0, "pan": 5.0}[motion]
        clips = clip("sphere", motion, amount, elevation=20.0)
        assert directions(clips) == [direction]
        flow, _, label = flow_of(clips)
        ball = label == 1
        across = float(flow[ball][:, 0].mean())
        if motion == "slide":
            assert across * sign > 1
        elif motion == "pan":
            assert across * sign < -1
        elif motion == "orbit":  # the ground before the sphere goes left as the camera goes right
            assert float(flow[-8:, :, 0].mean()) * sign < -1
        elif motion == "zoom":  # what comes closer grows
            assert float((flow * centres()).sum(-1)[ball].mean()) * sign > 0.5
        else:  # counter-clockwise on the screen: what is right of the middle goes up
            assert float(flow[24:40, 48:, 1].mean()) * sign < -1


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="motion = 'fly'; expected None or one of slide"):
        draw_clips(1, 0, "fly")
    with pytest.raises(ValueError, match="frames = 0; expected at least one"):
        draw_clips(1, 0, frames=0)
    with pytest.raises(ValueError, match="objects = 3"):
        draw_clips(1, 0, objects=3)
    with pytest.raises(ValueError, match="ends in no motion"):
        parse_motion("a small red cube")
    with pytest.raises(ValueError, match="size = 2"):
        render_clips(draw_clips(1, 0), 2)
    assert FOOT["sphere"] == 0.85  # what `clip` and the closed form of the sphere take for granted


def test_a_ray_through_the_middle_of_an_object_that_is_not_there_misses_it() -> None:
    """In the seventh frame of this roll a ray passes the centre of the absent second object, within rounding."""
    clips = draw_clips(1, 8101, first=68)
    assert bool(render_clips(clips).rgb.isfinite().all())
