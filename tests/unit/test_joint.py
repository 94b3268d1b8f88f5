"""UniDiffuser: with the exact network of a joint Gaussian every Denoiser is exact; the transformer; the embedded model."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from course_lib import zoo
from course_lib.gaussians import Mixture
from course_lib.nets.joint import LAST, JointViT, vectors
from course_lib.schedules import Cosine
from course_lib.unidiffuser import UniDiffuser
from course_lib.zoo.latent_scenes import ATTRIBUTES, SIZES
from course_lib.zoo.recipes import scenes_joint as recipe
from tests.draws import level, normal

F64 = torch.float64
SCHEDULE = Cosine()
DX, DA = 4, 3  # of x (1, 2, 2) and of a
MEAN = normal(DX + DA, seed=1)
ROOT = normal(DX + DA, DX + DA, seed=2)
COV = ROOT @ ROOT.T / 4 + 0.1 * torch.eye(DX + DA, dtype=F64)


def exact_net(x, a, time_x, time_a):
    """The v of both of a Gaussian (x, a) at two levels: v = (alpha u - E[x0 | u]) / std, u = alpha x0 + std eps."""
    alpha, std = (torch.cat([f(time_x / LAST).expand(DX), f(time_a / LAST).expand(DA)]) for f in (SCHEDULE.alpha, SCHEDULE.std))
    u = torch.cat([x.flatten(1), a], 1)
    A = alpha.diag()
    gain = COV @ A @ torch.linalg.inv(A @ COV @ A + (std**2).diag() + 1e-14 * torch.eye(DX + DA, dtype=F64))
    clean = MEAN + (u - alpha * MEAN) @ gain.T
    v = (alpha * u - clean) / std.clamp(min=1e-12)  # where std is 0 it is not asked for
    return v[:, :DX].reshape(x.shape), v[:, DX:]


exact_net.sizes, exact_net.channels, exact_net.patch, exact_net.side = [2, 1], 1, 1, 2
MODEL = UniDiffuser(exact_net, SCHEDULE)
X, A = normal(5, 1, 2, 2, seed=3), normal(5, DA, seed=4)


def gaussian(part, given, value):
    """The rows `part` of the Gaussian, given that the rows `given` have this value; alone without."""
    if given is None:
        return Mixture.gaussian(MEAN[part], COV[part][:, part])
    gain = COV[part][:, given] @ torch.linalg.inv(COV[given][:, given])
    return Mixture.gaussian(MEAN[part] + gain @ (value - MEAN[given]), COV[part][:, part] - gain @ COV[given][:, part])


@pytest.mark.parametrize("sigma", [0.05, 0.7, 6.0])
def test_all_five_densities_are_exact(sigma):
    """In float64; 1e-6 for the given part, whose time of 0 leaves a deviation of 0 but for the regularisation of 1e-14."""
    s, x_rows, a_rows = level(sigma), torch.arange(DX), DX + torch.arange(DA)
    y = torch.cat([X.flatten(1), A], 1)
    assert_close(MODEL.joint()(y, s), Mixture.gaussian(MEAN, COV).denoiser(y, s), rtol=0, atol=1e-6)
    for k in range(len(X)):
        x, a = X[k : k + 1], A[k : k + 1]
        found = MODEL.pictures(a)(x, s).flatten(1)
        assert_close(found, gaussian(x_rows, a_rows, a[0]).denoiser(x.flatten(1), s), rtol=0, atol=1e-6)
        found = MODEL.attributes(x)(a, s)
        assert_close(found, gaussian(a_rows, x_rows, x[0].flatten()).denoiser(a, s), rtol=0, atol=1e-6)
    noise_a, noise_x = normal(5, DA, seed=5), normal(5, 1, 2, 2, seed=6)
    alone = gaussian(x_rows, None, None).denoiser(X.flatten(1), s)
    assert_close(MODEL.pictures(None, noise_a)(X, s).flatten(1), alone, rtol=0, atol=1e-6)
    assert_close(MODEL.attributes(None, noise_x)(A, s), gaussian(a_rows, None, None).denoiser(A, s), rtol=0, atol=1e-6)


def test_the_loss_is_that_of_both_and_least_for_the_exact_network(monkeypatch):
    monkeypatch.setattr(recipe, "SCHEDULE", SCHEDULE)
    n = 4_000
    y = Mixture.gaussian(MEAN, COV).sample(n, torch.Generator().manual_seed(7))
    x0, a0 = y[:, :DX].reshape(-1, 1, 2, 2), y[:, DX:]
    times = torch.rand(n, 2, generator=torch.Generator().manual_seed(8), dtype=F64).clamp(0.02, 0.98)
    eps_x, eps_a = normal(n, 1, 2, 2, seed=9), normal(n, DA, seed=10)

    def each(net):
        """One row at a time, since the exact network takes one pair of times."""
        rows = lambda x, a, tx, ta: zip(*(net(x[i : i + 1], a[i : i + 1], tx[i], ta[i]) for i in range(len(x))), strict=True)
        return lambda *args: tuple(torch.cat(part) for part in rows(*args))

    best = recipe.loss(each(exact_net), x0, a0, times, eps_x, eps_a)
    zero = recipe.loss(lambda x, a, tx, ta: (0 * x, 0 * a), x0, a0, times, eps_x, eps_a)
    swapped = recipe.loss(each(lambda x, a, tx, ta: exact_net(x, a, ta, tx)), x0, a0, times, eps_x, eps_a)
    for other in (zero, swapped):
        gap = other - best
        assert float(gap.mean()) > 4.5 * float(gap.std()) / math.sqrt(n)
    assert best.shape == (n,)


def test_the_network_is_zero_at_the_start_and_hears_everything():
    torch.manual_seed(0)
    net = JointViT((3, 2), width=32, depth=3, heads=4)
    x, a, t = normal(2, 4, 8, 8).float(), normal(2, 5).float(), torch.tensor(500.0)
    with torch.no_grad():
        assert all(float(part.abs().max()) == 0 for part in net(x, a, t, t))
        for layer in (net.last_x, *net.last_a):
            torch.nn.init.normal_(layer.weight)
        base = net(x, a, t, t)
        assert base[0].shape == x.shape and base[1].shape == a.shape
        for other in (net(x + 1, a, t, t), net(x, a + 1, t, t), net(x, a, t / 2, t), net(x, a, t, t / 2)):
            for old, new in zip(base, other, strict=True):
                assert float((old - new).abs().max()) > 1e-3


def test_attributes_are_written_and_read():
    values = torch.tensor([[0, 1], [2, 0]])
    a = vectors(values, (3, 2))
    assert torch.equal(a[0], torch.tensor([1.0, -1, -1, -1, 1]))
    model = UniDiffuser(SimpleNamespace(sizes=[3, 2], channels=1, patch=1, side=1), SCHEDULE)
    assert torch.equal(model.values(a + 0.4 * normal(2, 5).clamp(-1, 1)), values)
    assert torch.equal(model.vectors(values), a)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="depth = 4; expected an odd number"):
        JointViT((3,), depth=4)
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 6, 6\) and a \(1, 3\); expected \(B, 4, 8, 8\) and \(B, 3\)"):
        JointViT((3,), width=32, depth=1)(torch.zeros(1, 4, 6, 6), torch.zeros(1, 3), torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="both a and noise are missing; expected one of them"):
        MODEL.pictures(None)
    with pytest.raises(ValueError, match="both x and noise are given"):
        MODEL.attributes(X, X)


# --- the embedded model -----------------------------------------------------------------------------------------------


def test_its_card_claims_all_five():
    """Of 1,000 each: the standard error of a share is at most 0.016. Chance is 1 in 2,304 for all attributes at once."""
    card = zoo.card("scenes-joint")["metrics"]
    for part in ("pictures_of_attributes", "attributes_of_pictures", "joint"):
        assert set(card[part]) == {*ATTRIBUTES, "all"}
        assert card[part]["all"] > 0.3  # three in ten where chance gives none
        for name, size in zip(ATTRIBUTES, SIZES, strict=True):
            assert card[part][name] > 1 / size + 0.3
    for name, size in zip(ATTRIBUTES, SIZES, strict=True):  # told nothing, it knows nothing
        assert abs(card["pictures_alone_beside_attributes"][name] - 1 / size) < 4.5 * math.sqrt(1 / size / 1000)
        assert card["attributes_alone_total_variation"][name] < 0.15


@torch.no_grad()
def test_the_committed_weights_do_what_the_card_says():
    """40 pictures of asked attributes, with the sampler of the card: within 4.5 standard errors of its share."""
    n, card = 40, zoo.card("scenes-joint")["metrics"]["pictures_of_attributes"]
    model = zoo.load("scenes-joint", device="cpu")
    values = torch.stack([torch.randint(size, (n,), generator=torch.Generator().manual_seed(11)) for size in SIZES], 1)
    drawn = recipe.draw(model.pictures(model.vectors(values)), (n, 4, 8, 8), 5)
    found = recipe.agreement(recipe.read(recipe.decode(drawn)), values)
    assert found["ground"] > card["ground"] - 4.5 * math.sqrt(0.25 / n)
    assert found["shape"] > card["shape"] - 4.5 * math.sqrt(0.25 / n)
