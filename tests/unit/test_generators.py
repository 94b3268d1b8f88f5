"""Generators of score distillation: pixels, a network of sines, a field of voxels, a painting; each against what is exact."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from course_lib.metrics import mean_psnr
from course_lib.nets.painted import Painted, superellipse
from course_lib.nets.pixels import Pixels
from course_lib.nets.siren import Siren
from course_lib.nets.voxel_field import VoxelField, absorb, in_cube
from course_lib.worlds.scenes import Scenes, draw, render
from course_lib.worlds.scenes.attributes import GROUNDS, SHAPES, TARGET
from course_lib.worlds.scenes.camera import Camera, camera, look_at, rays
from tests.draws import normal

EYE = torch.tensor([[2.6, 1.4, 1.1]], dtype=torch.float64)


def view(eye: Tensor = EYE, size: int = 16) -> tuple[Tensor, Tensor]:
    return rays(look_at(eye, torch.zeros(3, dtype=eye.dtype)), size)


def around_target(cameras: Camera | Scenes, size: int) -> tuple[Tensor, Tensor]:
    """Rays of the scenes' cameras in coordinates whose origin is where these look: objects lie in [-1, 1]^3."""
    origins, directions = rays(cameras, size)
    return origins - torch.tensor(TARGET), directions


FLOAT = tuple(x.float() for x in view(size=8))
MAKE = {
    "pixels": lambda n, seed: Pixels((3, 8, 8), n, seed),
    "squashed": lambda n, seed: Pixels((3, 8, 8), n, seed, tanh=True, spread=3.0),
    "siren": lambda n, seed: Siren(n, 8, width=16, seed=seed),
    "voxels": lambda n, seed: VoxelField(n, FLOAT, resolution=4, samples=6, seed=seed),
    "painted": lambda n, seed: Painted(n, 8, seed=seed),
}


def fit(g: nn.Module, pictures: Tensor, lr: float, steps: int) -> float:
    """Fit theta to pictures (n, 3, H, W) by Adam, and return the mean PSNR in dB."""
    optimizer = torch.optim.Adam(g.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (g() - pictures).square().mean((1, 2, 3)).sum().backward()
        optimizer.step()
    return mean_psnr(g().detach(), pictures)


def flat(pictures: Tensor) -> float:
    """The mean PSNR of pictures of one colour each, the best one."""
    return mean_psnr(pictures.mean((2, 3), keepdim=True).expand_as(pictures), pictures)


# What all of them keep


@pytest.mark.parametrize("name", MAKE)
def test_a_particle_depends_on_the_seed_and_its_number_alone(name: str) -> None:
    three, again, five, other = MAKE[name](3, 1)(), MAKE[name](3, 1)(), MAKE[name](5, 1)(), MAKE[name](3, 2)()
    assert three.shape == (3, 3, 8, 8)
    assert torch.equal(three, again)
    assert_close(three, five[:3], rtol=0, atol=1e-6)  # a batch of another size may round differently
    assert (three - other).abs().flatten(1).amax(1).min() > 1e-3
    assert (three[0] - three[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MAKE)
def test_pictures_stay_in_range_and_particles_apart(name: str) -> None:
    """Whatever theta is, colours lie in [-1, 1]; the picture of one particle moves no other's theta."""
    g = MAKE[name](3, 0)
    with torch.no_grad():
        for p in g.parameters():
            p.add_(5 * normal(*p.shape, dtype=torch.float32))
    x = g()
    assert name == "pixels" or x.abs().max() <= 1 + 1e-6
    x[1].square().sum().backward()
    for p in g.parameters():
        assert p.grad.isfinite().all()
        assert not p.grad[[0, 2]].any()


@pytest.mark.parametrize("name", MAKE)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    g = MAKE[name](2, 0)
    if name == "voxels":
        g = VoxelField(2, view(size=3), resolution=3, samples=4)
    if name == "siren":
        g = Siren(2, 3, width=4, depth=2)
    if name == "painted":
        g = Painted(2, 4)
    g = g.double()
    names, values = zip(*((key, p.detach().requires_grad_()) for key, p in g.named_parameters()), strict=True)
    assert torch.autograd.gradcheck(lambda *theta: functional_call(g, dict(zip(names, theta, strict=True)), ()), values)


@pytest.mark.parametrize("name", MAKE)
def test_no_particles_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"^n = 0; expected at least one particle$"):
        MAKE[name](0, 0)


# Pixels


@pytest.mark.parametrize("tanh", [False, True])
def test_pixels_start_where_they_are_told(tanh: bool) -> None:
    start = 0.9 * normal(4, 6, 5).tanh()
    assert_close(Pixels((4, 6, 5), 3, start=start, tanh=tanh)(), start.expand(3, -1, -1, -1))
    g = Pixels((4, 6, 5), 1, start=start[None], tanh=tanh)
    picture = g()
    with torch.no_grad():
        g.theta.add_(1)  # in place, as an optimiser does
    assert_close(picture[0], start)
    assert start.abs().max() < 0.9
    assert_close(Pixels((4, 64, 64), 2, spread=0.3)().std(), torch.tensor(0.3), rtol=4 / math.sqrt(2 * 2 * 4 * 64 * 64), atol=0)


def test_wrong_pixels_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^shape = \(3, 64\); expected \(C, H, W\), each at least 1$"):
        Pixels((3, 64))
    with pytest.raises(ValueError, match=r"^start has shape \(3, 8, 9\); expected \(3, 8, 8\) or \(2, 3, 8, 8\)$"):
        Pixels((3, 8, 8), 2, start=torch.zeros(3, 8, 9))
    with pytest.raises(ValueError, match=r"^start reaches 1; expected values inside \(-1, 1\), where tanh ends$"):
        Pixels((3, 8, 8), start=torch.ones(3, 8, 8), tanh=True)


# A network of sines


def test_what_enters_the_sines_neither_shrinks_nor_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal, of variance 1 in the second layer and 1 - exp(-2 s^2) after one of s^2: the law of infinitely wide layers.

    Of 8 networks of 1024 units the mean of z^2 has a standard error of at most s^2 sqrt(2 / 8192), were all places alike, and
    that of z^4 one of s^4 sqrt(96 / 8192); what the last layer hands on adds half of the former. Bounds are 4 of these.
    """
    seen, sin = [], torch.sin
    monkeypatch.setattr(torch, "sin", lambda z: seen.append(z) or sin(z))
    with torch.no_grad():
        Siren(8, 8, width=1024, depth=9)()
    expected = 1.0
    for z in seen[1:]:
        assert abs(float(z.square().mean()) / expected - 1) < 4 * 1.12 * math.sqrt(2 / 8192)
        assert abs(float(z.pow(4).mean() / z.square().mean() ** 2) - 3) < 4 * math.sqrt(96 / 8192)
        expected = 1 - math.exp(-2 * expected)
    assert len(seen) == 9
    assert abs(expected - 0.7968) < 1e-3  # 0.79681 = 1 - exp(-2 x 0.79681)


def test_the_first_layer_has_uniform_phases_and_waves_of_up_to_omega0_over_4_pi(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sin = [], torch.sin
    monkeypatch.setattr(torch, "sin", lambda z: seen.append(z) or sin(z))
    with torch.no_grad():
        g = Siren(4, 3, width=4096, depth=1)
        g()
    z = seen[0].unflatten(1, (3, 3))  # (n, y, x, width); places are -2/3, 0 and 2/3
    periods = torch.stack([z[:, 2, 1] - z[:, 0, 1], z[:, 1, 2] - z[:, 1, 0]]) / (4 / 3) / (2 * math.pi)
    ends = periods.abs().amax((1, 2))  # of 16384 numbers the largest lies within 0.1% of the end
    assert_close(ends, torch.full((2,), 30 / (4 * math.pi)), rtol=1e-3, atol=0)
    phases = z[:, 1, 1]
    assert_close(phases.abs().max(), torch.tensor(math.pi), rtol=1e-3, atol=0)
    assert abs(float(phases.cos().mean())) < 4 / math.sqrt(2 * 16384)


def test_the_same_function_is_drawn_with_other_pixels() -> None:
    g = Siren(2, 16, seed=3)
    assert_close(g(48)[..., 1::3, 1::3], g(), rtol=0, atol=1e-4)  # centres that both have; places of order 1 times 30


def test_siren_learns_scenes() -> None:
    """In 100 steps the pictures that were 15.8 dB from their mean colours are 39.7 dB from the network's, measured."""
    pictures = render(draw(4, seed=3), 32).rgb
    assert flat(pictures) < 17
    assert fit(Siren(4, 32), pictures, 1e-3, 100) > 34


def test_wrong_sirens_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^size = 1; expected at least 2 pixels on each side$"):
        Siren(1, 1)
    with pytest.raises(ValueError, match=r"^size = 0; expected at least 2 pixels on each side$"):
        Siren(1)(0)
    with pytest.raises(ValueError, match=r"^width = 0, depth = 3; expected at least 1 of each$"):
        Siren(1, width=0)


# A field of voxels


def field(n: int = 1, size: int = 16, resolution: int = 9, samples: int = 64, eye: Tensor = EYE) -> VoxelField:
    """An empty field in float64: no density, black background."""
    g = VoxelField(n, view(eye, size), resolution, samples).double()
    with torch.no_grad():
        g.grid[:, 0], g.grid[:, 1:], g.background[:] = -60.0, 0.0, -20.0
    return g


def lengths(origins: Tensor, directions: Tensor) -> Tensor:
    """How long rays from outside stay in the cube: from the first to the last of the points in which they meet its six faces."""
    t = (torch.tensor([-1.0, 1.0])[:, None, None, None] - origins) / directions  # side, ray, axis
    points = origins[..., None, :] + t[..., None] * directions[..., None, :]  # side, (1, P), axis, 3
    others = points.abs().masked_fill(torch.eye(3, dtype=torch.bool), 0).amax(-1)
    on_face = others <= 1
    last = t.masked_fill(~on_face, -math.inf).amax((0, -1))
    first = t.masked_fill(~on_face, math.inf).amin((0, -1))
    return torch.where(on_face.any(-1).any(0), last - first, 0)


@pytest.mark.parametrize("samples", [1, 48])
@pytest.mark.parametrize("density", [0.1, 1.0, 7.0])
def test_constant_density_absorbs_as_beer_and_lambert_say(density: float, samples: int) -> None:
    """C = c (1 - exp(-density L)) + background exp(-density L), with L the length of the ray in the cube."""
    g = field(samples=samples)
    colour = torch.tensor([0.6, -0.3, 0.1], dtype=torch.float64)
    with torch.no_grad():
        g.grid[:, 0] = math.log(math.expm1(density * 2 / 8))  # softplus(theta) / voxel = density, voxel = 2 / 8
        g.grid[:, 1:] = colour.atanh()[:, None, None, None]
    length = lengths(*view())
    assert (length == 0).any() and length.max() > 2
    passed = torch.exp(-density * length).reshape(16, 16)
    expected = colour[:, None, None] * (1 - passed) + math.tanh(-20) * passed
    assert_close(g()[0], expected, rtol=0, atol=1e-12)
    assert_close(g.float()()[0], expected.float(), rtol=0, atol=1e-5)


def test_where_rays_enter_and_leave() -> None:
    origins, directions = (x.float() for x in view(EYE, 64))
    near, length = in_cube(origins, directions)
    assert_close(length, lengths(origins, directions), rtol=0, atol=1e-5)
    inside, out = (origins + t[..., None] * directions for t in (near, near + length))
    hit = length > 1e-3
    for points in (inside[hit], out[hit]):
        assert_close(points.abs().amax(-1), torch.ones(int(hit.sum())), rtol=0, atol=1e-5)
    near, length = in_cube(torch.zeros(1, 3), torch.tensor([[0.0, 0.6, 0.8]]))  # from within, along a side
    assert_close((near, length), (torch.zeros(1), torch.tensor([1.25])))


def test_weights_and_what_passes_sum_to_one() -> None:
    density, delta = 3 * normal(5, 7, 11).abs(), normal(5, 7, 1, seed=1).abs()
    weights, T_end = absorb(density, delta)
    assert weights.min() >= 0
    assert_close(weights.sum(-1), 1 - T_end, rtol=0, atol=1e-14)
    T = torch.ones(5, 7, dtype=torch.float64)
    for i in range(11):
        alpha = 1 - torch.exp(-density[..., i] * delta[..., 0])
        assert_close(weights[..., i], T * alpha)
        T = T * (1 - alpha)


def test_the_picture_converges_with_the_square_of_the_step() -> None:
    """In one cell, where density and colour are smooth."""
    g = VoxelField(1, view(size=6), resolution=2, samples=1).double()
    with torch.no_grad():
        g.grid.copy_(2 * normal(*g.grid.shape))
        pictures = []
        for g.samples in (12, 24, 3072):
            pictures.append(g())
    coarse, fine = ((picture - pictures[2]).abs().max() for picture in pictures[:2])
    assert 1.8 < math.log2(coarse / fine) < 2.2


def test_density_and_colour_are_those_of_the_corners_and_trilinear_between() -> None:
    g = VoxelField(2, view(), resolution=5).double()
    with torch.no_grad():
        g.grid.copy_(normal(*g.grid.shape))
    z, y, x = 3, 0, 2
    at = lambda i: 2 * i / 4 - 1
    found = g.at(torch.tensor([[[[at(x), at(y), at(z)], [at(x + 0.25), at(y), at(z)]]]], dtype=torch.float64))[:, :, 0]
    here, beside = g.grid[:, :, z, y, x], g.grid[:, :, z, y, x + 1]
    values = [torch.cat([nn.functional.softplus(u[:, :1]) * 2, u[:, 1:].tanh()], 1) for u in (here, beside)]
    assert_close(found[..., 0], values[0])
    assert_close(found[..., 1], 0.75 * values[0] + 0.25 * values[1])


@pytest.mark.parametrize("corner", [(4, 12, 6), (14, 2, 8), (8, 8, 8), (12, 10, 2)])
def test_a_corner_is_seen_where_the_camera_projects_it(corner: tuple[int, int, int]) -> None:
    """A thin haze about one corner (x, y, z): its middle in the picture is where `Camera.project` sees the corner.

    Perspective moves the middle of a haze of variance h^2 / 6 an axis, h = 1/8, seen from at least 2, by about
    f tan(22 degrees) 5 h^2 / (6 2^2) = 0.08 pixels, f = 58: the neighbours of the corner are 2 pixels away.
    """
    g, (x, y, z) = field(size=48, resolution=17, samples=400), corner
    with torch.no_grad():
        g.grid[:, 0, z, y, x], g.grid[:, 1:] = -9.0, 20.0
        light = g()[0, 0] + 1
    centres = torch.arange(48, dtype=torch.float64) + 0.5
    found = torch.stack([(light.sum(0) * centres).sum(), (light.sum(1) * centres).sum()]) / light.sum()
    point = torch.tensor([[[2 * i / 16 - 1 for i in corner]]], dtype=torch.float64)
    expected, _ = look_at(EYE, torch.zeros(3, dtype=torch.float64)).project(point, 48)
    assert_close(found, expected[0, 0], rtol=0, atol=0.08)


def test_an_opaque_voxel_hides_what_is_behind() -> None:
    """Seen along -x, red before blue is red; without the red it is blue; from the other side it is blue."""
    red, blue = torch.tensor([0.8, -0.8, -0.8]).double(), torch.tensor([-0.8, -0.8, 0.8]).double()
    g = field(2, size=15, resolution=9, samples=400, eye=torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64))
    with torch.no_grad():
        for x, colour in ((7, red), (2, blue)):  # each colour fills its half, so that edges do not mix it with grey
            half = slice(5, 9) if x == 7 else slice(0, 5)
            g.grid[:, 1:, :, :, half] = colour.atanh()[:, None, None, None]
            g.grid[:, 0, 3:6, 3:6, x] = 40.0
        g.grid[1, 0, :, :, 7] = -60.0
        front = g()[:, :, 7, 7]
        back = g(view(torch.tensor([[-4.0, 0.0, 0.0]], dtype=torch.float64), 15))[0, :, 7, 7]
    assert_close(front, torch.stack([red, blue]), rtol=0, atol=1e-6)
    assert_close(back, blue, rtol=0, atol=1e-6)


def test_rays_of_their_own_and_rays_for_all_give_the_same() -> None:
    origins, directions = FLOAT
    shared, own = (
        VoxelField(3, (o, d), resolution=4) for o, d in (FLOAT, (origins.expand(3, -1, -1), directions.expand(3, -1, -1)))
    )
    assert_close(shared(), own(), rtol=0, atol=1e-6)
    other = tuple(x.float() for x in view(-EYE, 8))
    mixed = own((torch.cat([origins, origins, other[0]]), torch.cat([directions, directions, other[1]])))
    assert_close(mixed[:2], own()[:2], rtol=0, atol=1e-6)
    assert_close(mixed[2], own(other)[2], rtol=0, atol=1e-6)


def test_voxels_learn_a_solid_that_a_new_camera_sees() -> None:
    """A car before an even background, from 24 sides: a 25th is 27.1 dB from the truth, the nearest picture 20.9, measured."""
    scene = draw(1, seed=5)
    scene.ground[:], scene.shape[:], scene.size[:] = list(GROUNDS).index("plain"), SHAPES.index("car"), 1
    alike = Scenes(**{key: torch.cat([value] * 25) for key, value in vars(scene).items()})
    around = torch.tensor([15.0 * k for k in range(24)] + [7.5])
    cameras = camera(dataclasses.replace(alike, azimuth=around, elevation=torch.tensor([10.0, 35.0, 22.0] * 8 + [22.0])))
    pictures = render(alike, 24, view=cameras).rgb  # under one light
    sides = [tuple(x[k : k + 1] for x in around_target(cameras, 24)) for k in range(25)]
    g = VoxelField(1, sides[0], resolution=16, samples=24)
    optimizer = torch.optim.Adam(g.parameters(), 0.1)
    for step in range(360):
        k = 7 * step % 24
        optimizer.zero_grad()
        (g(sides[k])[0] - pictures[k]).square().mean().backward()
        optimizer.step()
    new, nearest = g(sides[24]).detach(), max(mean_psnr(pictures[k : k + 1], pictures[24:]) for k in range(24))
    assert mean_psnr(new, pictures[24:]) > nearest + 4


def test_voxels_learn_the_pictures_of_scenes() -> None:
    """In 100 steps the pictures that were 18.0 dB from their mean colours are 39.1 dB from the field's, measured."""
    scenes = draw(2, seed=3)
    pictures = render(scenes, 24).rgb
    assert flat(pictures) < 19
    assert fit(VoxelField(2, around_target(scenes, 24), resolution=16, samples=24), pictures, 0.1, 100) > 34


def test_wrong_fields_are_an_error() -> None:
    origins, directions = FLOAT
    with pytest.raises(ValueError, match=r"^resolution = 1, samples = 48; expected at least 2 corners a side and 1 sample$"):
        VoxelField(1, FLOAT, resolution=1)
    with pytest.raises(
        ValueError, match=r"^rays has origins of shape \(2, 64, 3\); expected \(1 or 3, H \* H, 3\), of both the same$"
    ):
        VoxelField(3, (origins.expand(2, -1, -1), directions.expand(2, -1, -1)))
    with pytest.raises(ValueError, match=r"^rays has origins of shape \(1, 63, 3\); expected \(1 or 1, H \* H, 3\)"):
        VoxelField(1, (origins[:, 1:], directions[:, 1:]))
    with pytest.raises(ValueError, match=r"^rays has directions of shape \(1, 49, 3\)"):
        VoxelField(1, FLOAT)((origins, directions[:, :49]))


# A painting


def painted(size: int = 64, softness: float = 1.0, **parts: list[float]) -> Painted:
    """One painting in float64 with these parts, and these others: a dark ground below a light sky, an upright ellipse."""
    told = {"sky": [0.5, 0.6, 0.8], "ground": [-0.4, -0.2, -0.6], "colour": [0.7, -0.7, -0.5], "horizon": [0.25],
            "centre": [0.0, 0.0], "axes": [0.3, 0.2], "turn": [0.0], "exponent": [2.0]} | parts  # fmt: skip
    told["axes"] = [2 * (a - 0.05) / 0.95 - 1 for a in told["axes"]]
    told["turn"] = [angle / math.pi for angle in told["turn"]]
    told["exponent"] = [2 * math.log(p, 8) - 1 for p in told["exponent"]]
    g = Painted(1, size, softness).double()
    with torch.no_grad():
        for name, values in told.items():
            g.theta[name][0] = torch.tensor(values, dtype=torch.float64).atanh()
    return g


def pixel(x: float, y: float, size: int = 64) -> tuple[int, int]:
    """Row and column of the pixel in which the place (x, y) lies."""
    return int((y + 1) / 2 * size), int((x + 1) / 2 * size)


def test_a_painting_shows_the_colours_of_its_parts() -> None:
    g = painted(softness=0.25)
    (picture,), parts = g().detach(), g.parts()
    for name, places in {"sky": [(0, -0.9), (-0.9, 0), (0.4, 0.0)], "ground": [(0, 0.9), (0.9, 0.5)], "colour": [(0, 0)]}.items():
        for place in places:
            assert_close(picture[(slice(None), *pixel(*place))], parts[name][0], rtol=0, atol=1e-3)
    told = {key: [round(v, 6) for v in value[0].tolist()] for key, value in parts.items()}
    assert (told["axes"], told["turn"], told["exponent"], told["horizon"]) == ([0.3, 0.2], [0.0], [2.0], [0.25])


@pytest.mark.parametrize("exponent", [1.01, 2.0, 7.9])
@pytest.mark.parametrize("turn", [0.0, 0.6])
def test_what_is_inside_is_the_superellipse(exponent: float, turn: float) -> None:
    """Beyond a pixel and a half from the curve, pixels are inside or outside as |x / a|^p + |y / b|^p < 1 says."""
    g = painted(softness=0.1, centre=[0.1, -0.2], axes=[0.5, 0.3], turn=[turn], exponent=[exponent], ground=[0.5, 0.6, 0.8])
    (picture,) = g().detach()
    inside = (picture - g.parts()["sky"].detach()[0, :, None, None]).abs().amax(0) > 0.6  # colours are 1.3 apart
    y, x = torch.meshgrid(*[(torch.arange(64.0) + 0.5) / 32 - 1] * 2, indexing="ij")
    x, y = x - 0.1, y + 0.2
    u, v = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    level = lambda k: (u / (0.5 * k)).abs() ** exponent + (v / (0.3 * k)).abs() ** exponent < 1
    assert inside[level(0.85)].all() and not inside[~level(1.15)].any()
    assert abs(float(inside.sum()) / float(level(1).sum()) - 1) < 0.05


def test_the_distance_is_one_to_first_order() -> None:
    """Of a circle: r - radius up to the rounding at 0; of any shape: 0 on the curve, and of slope 1 across it."""
    angle = torch.linspace(0.1, 6.2, 40, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for r in (0.3, 0.5, 0.9):
        found = superellipse(r * angle.cos(), r * angle.sin(), 0.5 * one, 0.5 * one, 2 * one)
        assert_close(found, torch.full_like(found, r - 0.5), rtol=0.01, atol=1e-4)
    p, a, b = 3.0 * one, 0.7 * one, 0.4 * one
    k = (angle.cos().abs() ** 3 + angle.sin().abs() ** 3) ** (-1 / 3)
    x, y = (0.7 * k * angle.cos()).requires_grad_(), (0.4 * k * angle.sin()).requires_grad_()
    d = superellipse(x, y, a, b, p)
    assert d.abs().max() < 2e-3
    slope = torch.stack(torch.autograd.grad(d.sum(), (x, y))).norm(dim=0)
    assert_close(slope, torch.ones_like(slope), rtol=0.01, atol=0)


def test_moving_the_centre_moves_the_object() -> None:
    """By 8 pixels to the right and 4 down, where sky and ground have one colour."""
    even = {"ground": [0.5, 0.6, 0.8]}
    before, after = painted(**even)(), painted(centre=[8 / 32, 4 / 32], **even)()
    assert_close(after[..., 4:, 8:], before[..., :-4, :-8], rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1


def test_turning_by_a_quarter_swaps_the_axes() -> None:
    assert_close(painted(turn=[math.pi / 2])(), painted(axes=[0.2, 0.3])(), rtol=0, atol=1e-9)


def test_gradients_are_finite_where_the_object_is_and_far_from_it() -> None:
    """A pixel on the centre, on the axes, the flattest and the most angular shapes, far beyond the edge, in float32."""
    for exponent in (-20.0, 0.0, 20.0):
        for axes in (-20.0, 20.0):
            g = Painted(1, 65)
            with torch.no_grad():
                g.theta["exponent"][:], g.theta["axes"][0, 0], g.theta["centre"][:], g.theta["turn"][:] = exponent, axes, 0, 0
            g().square().sum().backward()
            assert all(p.grad.isfinite().all() for p in g.parameters())
            assert g().isfinite().all()


def test_a_painting_learns_the_rough_look_of_scenes() -> None:
    """With 16 numbers each, pictures that were 16.3 dB from their mean colours are 22.3 dB from the painting, measured."""
    pictures = render(draw(8, seed=3), 32).rgb
    assert fit(Painted(8, 32), pictures, 0.05, 300) > flat(pictures) + 4


def test_wrong_paintings_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^size = 1; expected at least 2 pixels on each side$"):
        Painted(1, 1)
    with pytest.raises(ValueError, match=r"^softness = 0; expected more than 0 pixels$"):
        Painted(1, softness=0)
