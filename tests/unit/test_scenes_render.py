"""Rendered scenes against closed forms: cameras, primitives, distances, depth, normals, shadows, edges."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import COLOURS, FIELD_OF_VIEW, GROUNDS, ORIENTED, SHAPES, SIZES, TARGET, Scenes
from course_lib.worlds.scenes.camera import camera, centres, look_at, rays
from course_lib.worlds.scenes.geometry import Box, Frustum, Sphere, prism, tapered
from course_lib.worlds.scenes.render import FAR, Rendered, edges, render
from course_lib.worlds.scenes.solids import FOOT, sdf

PLAIN, GRASS = list(GROUNDS).index("plain"), list(GROUNDS).index("grass")
PRIMITIVES = {
    "sphere": Sphere((0.1, -0.2, 0.3), 0.6),
    "box": Box((0.1, 0.0, -0.1), (0.5, 0.3, 0.6)),
    "cylinder": Frustum((0.3, -0.4, -0.2), (-0.1, 0.3, 0.5), (0.4, 0.4)),
    "cone": Frustum((0.0, 0.1, -0.5), (0.2, 0.0, 0.6), (0.6, 0.0)),
    "frustum": Frustum((0.0, 0.0, 0.5), (0.3, 0.4, -0.5), (0.2, 0.7)),
    "prism": prism([(-0.5, -0.4), (0.6, -0.5), (0.1, 0.5)], "x", 0.4),
    "tapered": tapered((-0.6, 0.5, 0.4, -0.3), (-0.3, 0.2, 0.3, 0.4)),
}


def scenes(shapes: list[str] | str = SHAPES, **changes: float) -> Scenes:
    """One object a scene, at the origin; numbers in `changes` are given to all scenes, lists one to each."""
    shapes = [shapes] if isinstance(shapes, str) else list(shapes)
    n = len(shapes)
    values = {
        "colour": 0,
        "size": 1,
        "yaw": 0.0,
        "ground": GRASS,
        "light": 0,
        "azimuth": 30.0,
        "elevation": 20.0,
        "distance": 4.0,
    }
    values |= changes

    def column(name: str, kind: torch.dtype) -> Tensor:
        value = values[name]
        return torch.tensor(value if isinstance(value, list) else [value] * n, dtype=kind)

    return Scenes(
        shape=torch.tensor([[SHAPES.index(shape)] for shape in shapes]),
        position=torch.zeros(n, 1, 3),
        yaw=column("yaw", torch.float32)[:, None],
        **{name: column(name, torch.long)[:, None] for name in ("colour", "size")},
        **{name: column(name, torch.long) for name in ("ground", "light")},
        **{name: column(name, torch.float32) for name in ("azimuth", "elevation", "distance")},
    )


def directions(n: int, seed: int) -> Tensor:
    d = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return d / d.norm(dim=-1, keepdim=True)


def equal(a: Rendered, b: Rendered) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("rgb", "depth", "normal", "segmentation"))


# Cameras


def test_a_camera_stands_where_its_angles_say_and_sees_its_target_in_the_middle() -> None:
    view = camera(scenes(["sphere", "cube"], azimuth=[0.0, 90.0], elevation=[0.0, 30.0], distance=[3.0, 4.0]))
    expected = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4 * math.cos(math.pi / 6), 2.0]]) + torch.tensor(TARGET)
    torch.testing.assert_close(view.eye, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(view.axes @ view.axes.mT, torch.eye(3).expand(2, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(view.axes), torch.ones(2), atol=1e-6, rtol=0)  # right-handed
    pixels, depth = view.project(torch.tensor(TARGET).expand(2, 1, 3), 64)
    torch.testing.assert_close(pixels, torch.full((2, 1, 2), 32.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(depth[:, 0], torch.tensor([3.0, 4.0]))
    # Half the height of the picture is seen under half the field of view.
    top = view.eye + view.axes[:, 1] * math.tan(math.radians(FIELD_OF_VIEW / 2)) - view.axes[:, 2]
    assert view.project(top[:, None], 64)[0][:, 0, 1].abs().max() < 1e-4


def test_up_is_up_and_right_is_right() -> None:
    view = camera(scenes("sphere", azimuth=0.0))  # from +x: right is +y
    points = torch.tensor([[TARGET, (0.0, 0.5, TARGET[2]), (0.0, 0.0, TARGET[2] + 0.5)]])
    middle, right, up = view.project(points, 64)[0][0]
    assert right[0] > middle[0] + 1
    assert up[1] < middle[1] - 1


def test_projection_inverts_rays() -> None:
    batch = scenes(["cube"] * 3, azimuth=[0.0, 100.0, 250.0], elevation=[5.0, 30.0, 60.0])
    origins, d = rays(batch, 16)
    t = torch.linspace(1, 9, 256)[:, None]
    pixels, depth = camera(batch).project(origins + t * d, 16)
    # Float32 at coordinates up to 10: some 1e-6 of a world unit, times 20 pixels a unit at depth 1.
    torch.testing.assert_close(pixels, centres(16).expand(3, -1, 2), atol=2e-4, rtol=0)
    torch.testing.assert_close(camera(batch).unproject(depth.view(3, 1, 16, 16)), origins + t * d, atol=1e-4, rtol=0)


def test_a_camera_that_looks_straight_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eye\[1\].*straight up or down"):
        look_at(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 5.0]]), torch.zeros(3))


# Primitives and shapes


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_ray_enters_and_leaves_a_primitive_where_its_distance_is_zero(name: str) -> None:
    solid = PRIMITIVES[name]
    start, aim = 3 * directions(4000, 0).double(), 0.8 * directions(4000, 1).double()
    d = (aim - start) / (aim - start).norm(dim=-1, keepdim=True)
    o, d = start.unbind(-1), d.unbind(-1)
    near, far = solid.interval(o, d)
    hit = near.isfinite()
    assert 400 < hit.sum() < 4000
    for t in (near, far):
        p = tuple((a + t * b)[hit] for a, b in zip(o, d, strict=True))
        assert solid.distance(p).abs().max() < 1e-6
    inside = tuple((a + (near + far) / 2 * b)[hit] for a, b in zip(o, d, strict=True))
    assert (solid.distance(inside) < 1e-6).all()
    # Where there is no interval, no point of the ray lies inside.
    for t in torch.linspace(1, 5, 81):
        assert (solid.distance(tuple((a + t * b)[~hit] for a, b in zip(o, d, strict=True))) > -1e-6).all()


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitives_distance_has_unit_gradient_and_its_normal_is_that_gradient(name: str) -> None:
    solid = PRIMITIVES[name]
    p = (directions(2000, 2) * torch.linspace(0.1, 2, 2000)[:, None]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(solid.distance(p.unbind(-1)).sum(), p)
    torch.testing.assert_close(gradient.norm(dim=-1), torch.ones(2000, dtype=torch.float64), atol=1e-6, rtol=0)
    start = 3 * directions(2000, 3).double()
    d = -start / 3 + 0.1 * directions(2000, 4).double()
    d = d / d.norm(dim=-1, keepdim=True)
    near, _ = solid.interval(start.unbind(-1), d.unbind(-1))
    hit = near.isfinite()
    at = (start + (near[:, None] - 1e-7) * d)[hit].requires_grad_()  # just outside, where the gradient is unique
    (gradient,) = torch.autograd.grad(solid.distance(at.unbind(-1)).sum(), at)
    normal = torch.stack(solid.normal(at.detach().unbind(-1)), -1)
    agree = (gradient - normal).norm(dim=-1) < 1e-4
    assert agree.double().mean() > 0.999  # all but rays that pass within 1e-7 of an edge
    assert ((normal * d[hit]).sum(-1) < 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fits_the_unit_ball_and_stands_on_its_foot(shape: str) -> None:
    assert (sdf(shape, 1.0001 * directions(20000, 5)) > 0).all()
    u = torch.linspace(-1, 1, 201)
    x, y = torch.meshgrid(u, u, indexing="ij")
    under = sdf(shape, torch.stack((x, y, torch.full_like(x, -FOOT[shape] - 1e-4)), -1))
    above = sdf(shape, torch.stack((x, y, torch.full_like(x, -FOOT[shape] + 2e-3)), -1))
    assert (under > 0).all()
    assert (above < 0).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shapes_distance_never_exceeds_the_way_to_its_surface(shape: str) -> None:
    """A sphere-traced ray that steps by the sdf must not cross the surface: |sdf(a) - sdf(b)| <= |a - b|."""
    a = directions(20000, 6) * torch.rand(20000, 1, generator=torch.Generator().manual_seed(7)) * 1.5
    b = a + 0.2 * directions(20000, 8)
    assert ((sdf(shape, a) - sdf(shape, b)).abs() < (a - b).norm(dim=-1) + 1e-6).all()


# Pictures


def test_depth_of_a_sphere_is_its_closed_form() -> None:
    """Along a ray at angle a from the centre: t = c cos a - sqrt(r^2 - c^2 sin^2 a), depth = t cos(ray, axis)."""
    batch = scenes("sphere", ground=PLAIN, elevation=0.0)
    radius = 0.85 * SIZES["large"]
    batch.position[:, :, 2] = TARGET[2] - radius  # its centre is the target, on the viewing axis
    depth = render(batch, 65).depth[0, 0]
    offset = torch.arange(65, dtype=torch.float64) - 32
    focal = 65 / (2 * math.tan(math.radians(FIELD_OF_VIEW) / 2))
    cosine = 1 / (1 + (offset[:, None] ** 2 + offset**2) / focal**2).sqrt()
    square = radius**2 - 16 * (1 - cosine**2)
    expected = (4 * cosine - square.clamp(min=0).sqrt()) * cosine
    assert abs(float(depth[32, 32]) - (4 - radius)) < 1e-5
    well = square > 1e-3  # at the rim the square root loses digits
    torch.testing.assert_close(depth.double()[well], expected[well], atol=1e-4, rtol=0)
    assert (depth[square < -1e-3] == FAR).all()


@pytest.mark.parametrize("size", [0, 1])
def test_rendered_points_lie_on_the_surfaces(size: int) -> None:
    batch = scenes(size=size, yaw=40.0)
    seen = render(batch, 48)
    points = camera(batch).unproject(seen.depth)
    cos, sin, scale = math.cos(math.radians(40)), math.sin(math.radians(40)), list(SIZES.values())[size]
    for i, shape in enumerate(SHAPES):
        label = seen.segmentation[i].flatten()
        assert points[i][label == 0][:, 2].abs().max() < 1e-4  # the ground, up to 30 units away
        x, y, z = points[i][label == 1].unbind(-1)
        local = torch.stack((cos * x + sin * y, cos * y - sin * x, z), -1) / scale
        local[:, 2] -= FOOT[shape]
        assert len(local) > 50
        assert sdf(shape, local).abs().max() < 2e-5  # float32 at distances of about 5


def test_normals_are_unit_and_face_the_camera() -> None:
    batch = scenes(yaw=75.0)
    seen = render(batch, 64)
    hit = seen.segmentation[:, 0] >= 0
    length = seen.normal.norm(dim=1)
    torch.testing.assert_close(length[hit], torch.ones(int(hit.sum())), atol=1e-5, rtol=0)
    assert (length[~hit] == 0).all()
    _, d = rays(batch, 64)
    facing = -(d.view(8, 64, 64, 3).movedim(-1, 1) * seen.normal).sum(1)
    assert (facing[hit] > -1e-4).all()


def test_a_picture_is_deterministic_and_does_not_depend_on_its_batch() -> None:
    batch = scenes(azimuth=[float(40 * i) for i in range(8)], ground=[i % len(GROUNDS) for i in range(8)])
    whole = render(batch, 32)
    assert equal(whole, render(batch, 32))
    for i in (0, 4, 7):
        alone, part = render(batch[i], 32), {k: v[i : i + 1] for k, v in vars(whole).items()}
        assert torch.equal(alone.segmentation, part["segmentation"])
        for name in ("rgb", "depth", "normal"):  # vectors and remainders of a batch may round differently
            torch.testing.assert_close(getattr(alone, name), part[name], atol=1e-5, rtol=1e-6)


def test_larger_objects_cover_more_pixels() -> None:
    small, large = (render(scenes(size=size), 64).segmentation for size in (0, 1))
    assert ((large == 1).sum((1, 2, 3)) > 1.5 * (small == 1).sum((1, 2, 3))).all()


def close(a: Tensor, b: Tensor, share: float = 0.995) -> bool:
    """Whether pictures agree but for the few pixels whose ray passes an edge within rounding."""
    return bool(((a - b).abs().amax(1) < 1e-2).float().mean() >= share)


def test_moving_the_camera_is_turning_the_object_the_other_way() -> None:
    for ground in (PLAIN, GRASS):
        moved = render(scenes(azimuth=30.0 + 50.0, ground=ground), 64)
        turned = render(scenes(azimuth=30.0, yaw=-50.0, ground=ground), 64)
        assert close(moved.rgb, turned.rgb)
        assert close(moved.depth, turned.depth)


@pytest.mark.parametrize("shape", SHAPES)
def test_yaw_changes_the_picture_of_an_oriented_shape_only(shape: str) -> None:
    at, by_90, by_37 = (render(scenes(shape, yaw=yaw), 64).rgb for yaw in (0.0, 90.0, 37.0))
    assert close(at, by_90) == (shape not in ORIENTED)
    if shape not in ORIENTED:
        assert close(at, by_37) == (shape != "cube")


def test_a_nearer_object_hides_the_one_behind_it() -> None:
    pair = scenes("cube", azimuth=0.0)
    both = Scenes(**{k: (torch.cat([v, v], 1) if v.ndim > 1 else v) for k, v in vars(pair).items()})
    both.position[0, 0, 0], both.position[0, 1, 0] = -1.0, 1.0  # the camera stands on the +x side
    seen = render(both, 64).segmentation
    assert seen[0, 0, 32:40, 32].eq(2).any()
    alone = render(pair[0], 64).segmentation
    assert (seen == 1).sum() < (alone == 1).sum()


def test_the_light_casts_a_shadow_on_the_far_side_and_plain_scenes_have_none() -> None:
    """Under the light from the left the grass to the right of a sphere is darker than the same pixels without it."""
    lit = render(scenes(["sphere", "sphere"], light=[0, 1]), 64)
    empty = scenes(["sphere", "sphere"], light=[0, 1])
    empty.shape[:] = -1
    darker = ((render(empty, 64).rgb - lit.rgb).mean(1) > 0.1) & (lit.segmentation[:, 0] == 0)
    columns = torch.arange(64.0).expand(2, 64, 64)
    left, right = (columns[i][darker[i]].mean() for i in (0, 1))
    assert left > 36 and right < 28
    plain = render(scenes(ground=PLAIN), 64, samples=1)
    background = plain.rgb.movedim(1, -1)[plain.segmentation[:, 0] < 0]
    torch.testing.assert_close((background + 1) / 2, torch.tensor(GROUNDS["plain"][0]).expand_as(background), atol=1e-5, rtol=0)


def test_an_object_shows_its_colour() -> None:
    names = list(COLOURS)
    seen = render(scenes(["sphere"] * len(names), colour=list(range(len(names))), light=2), 64)
    for i, name in enumerate(names):
        mean = ((seen.rgb[i].movedim(0, -1)[seen.segmentation[i, 0] == 1] + 1) / 2).mean(0)
        gaps = {
            other: float((mean / mean.norm() - torch.tensor(rgb) / torch.tensor(rgb).norm()).norm())
            for other, rgb in COLOURS.items()
        }
        assert min(gaps, key=gaps.get) == name


def test_another_camera_sees_the_same_scene_under_the_same_light() -> None:
    """Two objects of one shape are met by the same rays; from elsewhere depth is that of a scene seen from there."""
    pair = scenes(["cube", "house"], azimuth=0.0)
    both = Scenes(**{k: (torch.cat([v, v], 1) if v.ndim > 1 else v) for k, v in vars(pair).items()})
    both.position[:, 0, 0], both.position[:, 1, 0] = -1.0, 1.0
    moved = dataclasses.replace(both, azimuth=torch.full((2,), 50.0))
    seen, direct = render(both, 48, view=camera(moved)), render(moved, 48)
    for name in ("depth", "normal", "segmentation"):
        assert torch.equal(getattr(seen, name), getattr(direct, name))
    assert {1, 2} <= set(seen.segmentation.unique().tolist())
    assert not close(seen.rgb, direct.rgb)  # the light of `moved` has gone round with its camera
    assert equal(render(both, 48, view=camera(both)), render(both, 48))


def test_a_picture_does_not_depend_on_how_many_are_rendered_together() -> None:
    many = scenes(["mug", "snowman"] * 40, azimuth=[4.5 * i for i in range(80)])
    whole, parts = render(many, 64), [render(many[i : i + 16], 64) for i in range(0, 80, 16)]
    for name in ("rgb", "depth"):
        pieces = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(getattr(whole, name), pieces, atol=1e-5, rtol=1e-6)
    assert len(render(many[:0], 16).rgb) == 0


def test_supersampling_approaches_the_average_of_many_rays() -> None:
    batch = scenes(ground=PLAIN, yaw=20.0)
    fine, one, two = (render(batch, 32, samples=samples).rgb for samples in (8, 1, 2))
    assert (two - fine).square().mean() < 0.5 * (one - fine).square().mean()


def test_edges_outline_the_object() -> None:
    seen = render(scenes("cube", azimuth=45.0), 64)
    lines = edges(seen.depth, seen.normal, seen.segmentation)
    assert lines.shape == (1, 1, 64, 64)
    assert set(lines.unique().tolist()) == {0.0, 1.0}
    s = seen.segmentation[0, 0]
    outline = torch.zeros_like(s, dtype=torch.bool)
    outline[:, :-1] |= s[:, 1:] != s[:, :-1]
    outline[:-1] |= s[1:] != s[:-1]
    assert lines[0, 0][outline].all()
    within = (lines[0, 0] == 1) & ~outline
    assert within.any()  # the three edges at which faces of the cube meet
    assert (s[within] == 1).all()


# Bad input


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="size = 0; expected a whole number from 4 to 1024"):
        render(scenes("cube"), 0)
    with pytest.raises(ValueError, match="samples = 9; expected a whole number from 1 to 8"):
        render(scenes("cube"), 64, samples=9)
    with pytest.raises(ValueError, match="camera of scene 1 stands inside its object 0"):
        render(scenes(["cube", "cube"], distance=[4.0, 0.2]), 16)
    with pytest.raises(ValueError, match="shape = 'teapot'; expected one of sphere"):
        sdf("teapot", torch.zeros(1, 3))
    with pytest.raises(ValueError, match="axis = 'z'"):
        prism([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)], "z", 0.5)
    with pytest.raises(ValueError, match="view has 2 cameras; expected 1"):
        render(scenes("cube"), 16, view=camera(scenes(["cube", "cube"])))
    seen = render(scenes("cube"), 16)
    with pytest.raises(ValueError, match="normal has shape"):
        edges(seen.depth, seen.normal[..., :8], seen.segmentation)
