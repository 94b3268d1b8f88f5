"""Point clouds of scenes: on the surface, uniform by area, on the outside only; and the signed distance of a scene."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from course_lib.worlds.scenes import Scenes, camera, draw, point_cloud, render, scene_sdf, sdf
from course_lib.worlds.scenes.attributes import COLOURS, SHAPES, SIZES
from course_lib.worlds.scenes.clouds import _patches
from course_lib.worlds.scenes.geometry import prism
from course_lib.worlds.scenes.solids import FOOT


def standing(shapes: list[str], places: list[float], sizes: list[int] | None = None, yaw: float = 0.0) -> Scenes:
    """One scene with objects along x."""
    k = len(shapes)
    one = torch.tensor([0])
    return Scenes(
        shape=torch.tensor([[SHAPES.index(shape) for shape in shapes]]),
        colour=torch.arange(k)[None],
        size=torch.tensor([sizes or [1] * k]),
        position=torch.tensor([[[x, 0.0, 0.0] for x in places]]),
        yaw=torch.full((1, k), yaw),
        ground=one,
        light=one,
        azimuth=torch.tensor([0.0]),
        elevation=torch.tensor([20.0]),
        distance=torch.tensor([4.0]),
    )


def local(shape: str, n: int, seed: int = 0) -> Tensor:
    """Points (n, 3) on a shape, in its own frame."""
    p = point_cloud(standing([shape], [0.0]), n, seed).points[0] / SIZES["large"]
    return p - torch.tensor([0.0, 0.0, FOOT[shape]])


def surprise(counts: Tensor, shares: Tensor) -> float:
    """The probability of counts at least as uneven, by chi-square."""
    shares = shares.double() / shares.double().sum()
    return float(stats.chisquare(counts.numpy(), (shares * counts.sum()).numpy()).pvalue)


def test_points_lie_on_the_surface_and_normals_point_out_of_it() -> None:
    scenes = draw(24, 0, (1, 2))
    cloud = point_cloud(scenes, 500, 1)
    assert cloud.points.shape == cloud.normals.shape == cloud.colours.shape == (24, 500, 3)
    # A candidate is kept within 1e-4 of the surface of the whole at scale 1; the rest is rounding.
    assert scene_sdf(scenes, cloud.points).abs().max() < 1.1e-4
    torch.testing.assert_close(cloud.normals.norm(dim=-1), torch.ones(24, 500), atol=1e-5, rtol=0)
    alone = draw(24, 0, 1)
    cloud = point_cloud(alone, 500, 1)
    out = scene_sdf(alone, cloud.points + 1e-3 * cloud.normals)
    # Only beside a concave crease is another surface nearer. Creases are shorter than 20 at an area of 7 to 19: 1e-3 on
    # either side of them is less than 1 % of the area.
    assert ((out - 1e-3).abs() < 1e-4).float().mean() > 0.99


def test_points_on_a_sphere_are_uniform() -> None:
    """64 cells of equal area, 200 points each: by chance the chi-square is this uneven once in a thousand seeds."""
    p = local("sphere", 64 * 200) / 0.85

    def cells(x: Tensor) -> Tensor:
        slices = ((x[:, 2] + 1) * 4).long().clamp(0, 7)
        sectors = ((torch.atan2(x[:, 1], x[:, 0]) / math.pi + 1) * 4).long().clamp(0, 7)
        return torch.bincount(slices * 8 + sectors, minlength=64)

    assert surprise(cells(p), torch.ones(64)) > 1e-3
    # Uniform angles instead of uniform heights crowd at the poles, and the test sees it.
    crowded = p / p.norm(dim=1, keepdim=True)
    crowded[:, 2] = torch.sin(torch.pi / 2 * crowded[:, 2])
    assert surprise(cells(crowded), torch.ones(64)) < 1e-6


def test_points_on_a_cube_are_uniform() -> None:
    """Six faces of 4 x 4 squares, 100 points each."""
    p = local("cube", 96 * 100) * 3**0.5
    axis = p.abs().argmax(1)
    face = axis * 2 + (p.gather(1, axis[:, None])[:, 0] > 0)
    rest = torch.stack([p[range(len(p)), (axis + i) % 3] for i in (1, 2)], 1)
    square = ((rest + 1) * 2).long().clamp(0, 3)
    counts = torch.bincount(face * 16 + square[:, 0] * 4 + square[:, 1], minlength=96)
    assert surprise(counts, torch.ones(96)) > 1e-3


def test_points_on_a_cylinder_and_a_cone_share_out_as_their_areas() -> None:
    p = local("cylinder", 20000)
    cap = p[:, 2].abs() > 0.7 - 1e-5
    inner = cap & (p[:, :2].norm(dim=1) < 0.58 / 2)
    counts = torch.stack([(~cap).sum(), (cap & ~inner).sum(), inner.sum()])
    disc = math.pi * 0.58**2
    assert surprise(counts, torch.tensor([2 * math.pi * 0.58 * 1.4, 2 * disc * 3 / 4, 2 * disc / 4])) > 1e-3

    p = local("cone", 20000)
    base = p[:, 2] < -0.6 + 1e-5
    upper = p[:, 2] > -0.6 + 1.57 / 2  # half the height has a quarter of the side
    counts = torch.stack([base.sum(), (~base & ~upper).sum(), upper.sum()])
    side = math.pi * 0.76 * math.hypot(0.76, 1.57)
    assert surprise(counts, torch.tensor([math.pi * 0.76**2, side * 3 / 4, side / 4])) > 1e-3


def test_a_prism_is_cut_into_triangles_that_are_sampled_evenly() -> None:
    """A pentagon by its shoelace area; the three corners of a triangle cut off at half its sides hold a quarter each."""
    corners = [(-0.5, -0.6), (0.5, -0.6), (0.5, 0.1), (0.0, 0.6), (-0.5, 0.1)]
    pairs = list(itertools.pairwise([*corners, corners[0]]))
    area = sum(x * v - u * y for (x, y), (u, v) in pairs) / 2
    around = sum(math.hypot(u - x, v - y) for (x, y), (u, v) in pairs)
    patches = _patches(prism(corners, "x", 0.4))
    assert abs(sum(patch.area for patch in patches) - (2 * area + 0.8 * around)) < 1e-6
    u = torch.rand(2, 8000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for patch in patches:
        p, normal = (torch.stack(x, -1).numpy() for x in patch.sample(*u))
        a, b, c = map(np.array, (patch.a, patch.b, patch.c))
        assert ((normal @ np.ones(3)).std() < 1e-12) and np.abs((p - a) @ normal[0]).max() < 1e-12
        assert a @ normal[0] > 0  # the middle of the prism lies on the other side
        share = torch.from_numpy(np.linalg.lstsq(np.stack([b - a, c - a], 1), (p - a).T, rcond=None)[0])
        third = 1 - share.sum(0)
        assert min(float(share.min()), float(third.min())) > -1e-9
        corner = torch.stack([third > 0.5, share[0] > 0.5, share[1] > 0.5]).sum(1)
        assert surprise(torch.cat([corner, 8000 - corner.sum()[None]]), torch.ones(4)) > 1e-3


def test_parts_of_a_snowman_and_walls_of_a_mug_share_out_as_their_areas() -> None:
    p = local("snowman", 40000)
    belly = (p[:, 2] < -0.5) & (p[:, :2].norm(dim=1) < 0.46)
    crown = (p[:, 2] > 0.95 - 1e-4) & (p[:, :2].norm(dim=1) < 0.2)
    counts = torch.stack([belly.sum(), crown.sum()])
    assert surprise(counts, torch.tensor([2 * math.pi * 0.45**2, math.pi * 0.19**2])) > 1e-3

    p = local("mug", 40000)
    r = p[:, :2].norm(dim=1)
    within = ((r - 0.47).abs() < 1e-4) & (p[:, 2] > 0.42 + 1e-4)  # above the coffee
    coffee = ((p[:, 2] - 0.42).abs() < 1e-5) & (r < 0.47)
    bottom = p[:, 2] < -0.68 + 1e-5
    counts = torch.stack([within.sum(), coffee.sum(), bottom.sum()])
    shares = torch.tensor([2 * math.pi * 0.47 * 0.26, math.pi * 0.47**2, math.pi * 0.56**2])
    assert surprise(counts, shares) > 1e-3
    assert not ((r < 0.46) & (p[:, 2].abs() < 0.35)).any()  # nothing below the coffee


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_of_a_closed_surface_cancel(shape: str) -> None:
    """The integral of the normal over a closed surface is zero; 8000 points know the mean to 1 / sqrt(8000) at worst."""
    cloud = point_cloud(standing([shape], [0.0]), 8000, 3)
    assert cloud.normals.mean((0, 1)).abs().max() < 4.5 / math.sqrt(8000)


def test_objects_get_points_by_area_and_their_own_colours() -> None:
    pair = standing(["sphere", "sphere"], [-1.0, 1.0], [0, 1])
    cloud = point_cloud(pair, 20000, 4)
    counts = torch.bincount(cloud.objects[0], minlength=2)
    assert surprise(counts, torch.tensor([SIZES["small"] ** 2, SIZES["large"] ** 2])) > 1e-3
    assert torch.equal(cloud.objects == 1, cloud.points[..., 0] > 0)
    expected = torch.tensor(list(COLOURS.values()))[cloud.objects]
    torch.testing.assert_close(cloud.colours, expected, atol=1e-6, rtol=0)


def test_points_that_the_camera_sees_have_the_depth_that_is_rendered() -> None:
    """No point is nearer than the surface seen through its pixel, but for surfaces that turn away within the pixel."""
    scenes = draw(6, 5, 1)
    cloud, seen = point_cloud(scenes, 2000, 6), render(scenes, 256)
    pixels, depth = camera(scenes).project(cloud.points, 256)
    at = pixels.long()
    rows = torch.arange(6)[:, None].expand(-1, 2000)
    nearest = -torch.nn.functional.max_pool2d(-seen.depth, 3, 1, 1)[rows, 0, at[..., 1], at[..., 0]]
    assert (depth > nearest - 0.02).float().mean() > 0.999  # a pixel is 0.012 wide at depth 3.7
    assert (depth < nearest + 0.02).float().mean() > 0.2  # and many points are the ones seen


def test_a_point_depends_on_its_seed_scene_and_number_only() -> None:
    scenes = draw(5, 7, (1, 2))
    whole = point_cloud(scenes, 300, 8)
    few = point_cloud(scenes, 100, 8)
    part = point_cloud(scenes[2:4], 300, 8, first=2)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(few, name), value[:, :100], atol=1e-6, rtol=0)
        torch.testing.assert_close(getattr(part, name), value[2:4], atol=1e-6, rtol=0)
    assert not torch.equal(point_cloud(scenes, 300, 9).points, whole.points)
    assert point_cloud(scenes[:0], 10, 0).points.shape == (0, 10, 3)


def test_the_distance_of_a_scene_is_that_of_its_nearest_object() -> None:
    p = torch.randn(1, 400, 3, generator=torch.Generator().manual_seed(0)) * 1.5
    pair = standing(["cube", "house"], [-1.0, 1.0], yaw=90.0)
    each = []
    for shape, x in (("cube", -1.0), ("house", 1.0)):
        away = (p[0] - torch.tensor([x, 0.0, SIZES["large"] * FOOT[shape]])) / SIZES["large"]
        each.append(SIZES["large"] * sdf(shape, torch.stack([away[:, 1], -away[:, 0], away[:, 2]], -1)))  # turned back by 90
    least = torch.minimum(*each)
    torch.testing.assert_close(scene_sdf(pair, p)[0], least, atol=1e-5, rtol=0)
    torch.testing.assert_close(scene_sdf(pair, p, ground=True)[0], torch.minimum(least, p[0, :, 2]), atol=1e-5, rtol=0)


def test_bad_input_is_one_sentence() -> None:
    scenes = draw(2, 0, 1)
    with pytest.raises(ValueError, match="n = 0; expected at least one point"):
        point_cloud(scenes, 0, 0)
    scenes.shape[1] = -1
    with pytest.raises(ValueError, match=r"shape\[1\] = \[-1, -1\]; expected every scene to have an object"):
        point_cloud(scenes, 10, 0)
    with pytest.raises(ValueError, match=r"points has shape \(3, 5, 3\)"):
        scene_sdf(scenes, torch.zeros(3, 5, 3))
