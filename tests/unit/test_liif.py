"""The local implicit image function: its interpolation, its seams, its places, and that it learns a picture between pixels."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from course_lib.nets.liif import LIIF, ensemble, places
from tests.draws import normal

Z = normal(2, 5, 4, 6).float()


def test_places_are_the_centres_of_pixels():
    assert_close(places((2, 4)), torch.tensor([(y, x) for y in (-0.5, 0.5) for x in (-0.75, -0.25, 0.25, 0.75)]))


def test_the_ensemble_of_the_features_themselves_is_bilinear_interpolation():
    at = 2 * torch.rand(50, 2, generator=torch.Generator().manual_seed(1)) - 1
    found = ensemble(lambda z, away, cell: z, Z, at, torch.ones(2))
    grid = at.flip(-1).expand(2, 1, -1, -1)  # torch's order is x, y
    expected = F.grid_sample(Z, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_offsets_and_cells_are_in_units_of_a_feature():
    seen = []
    ensemble(lambda z, away, cell: seen.append((away, cell)) or z, Z, places((4, 6)), torch.tensor([2 / 8, 2 / 12]))
    assert_close(seen[0][0], torch.zeros(24, 2), rtol=0, atol=1e-5)  # the centre of a feature is no distance from it
    assert_close(seen[3][0], -torch.ones(24, 2), rtol=0, atol=1e-5)
    assert_close(seen[0][1], torch.tensor([0.5, 0.5]))  # a pixel of twice the resolution is half a feature


@torch.no_grad()
def test_there_are_no_seams():
    """Crossing from one feature's cell to the next, the picture moves by no more than between."""
    torch.manual_seed(0)
    net = LIIF(5)
    line = torch.stack([torch.full((4001,), 0.1), torch.linspace(-0.6, 0.6, 4001)], -1)
    jumps = net(Z, line, torch.tensor([0.1, 0.1])).diff(dim=-1).abs()
    assert float(jumps.max()) < 20 * float(jumps.median())


def test_it_learns_what_lies_between_the_pixels():
    """A wave of the plane, told at 8 x 8 places, is drawn at 32 x 32 nearer than bicubic enlargement does."""
    wave = lambda at: torch.stack([(5 * at[:, 0] + 3 * at[:, 1]).sin(), (4 * at[:, 1]).cos()])[None]
    torch.manual_seed(1)
    coarse, net = wave(places((8, 8))).reshape(1, 2, 8, 8), LIIF(2, out=2, hidden=64)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    source = torch.Generator().manual_seed(2)
    for _ in range(400):
        at = 2 * torch.rand(256, 2, generator=source) - 1
        loss = (net(coarse, at, torch.tensor([1 / 16, 1 / 16])) - wave(at)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    true = wave(places((32, 32))).reshape(1, 2, 32, 32)
    bicubic = F.interpolate(coarse, (32, 32), mode="bicubic", align_corners=False)
    with torch.no_grad():
        found = net.picture(coarse, (32, 32), chunk=100)
    assert float((found - true).square().mean()) < float((bicubic - true).square().mean()) / 2
