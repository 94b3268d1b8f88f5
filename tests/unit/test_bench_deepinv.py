"""Our solvers beside deepinv's: stored claims, our side computed again, and parity at each level where deepinv is installed."""

import math
import statistics
import sys

import pytest
import torch
from torch.testing import assert_close

from course_lib import bench, bench_deepinv
from course_lib.bench_deepinv import CALLS, CLAIMED, CLOSE, GRIDS, HALVED, PAIRS, PROBLEMS, AsModel, physics, rows
from course_lib.denoisers import Counted
from course_lib.operators import BlockAverage, Blur, Mask, gaussian_kernel
from course_lib.posterior import ddrm, ddrm_start
from course_lib.posterior.gradient import dps_score
from course_lib.posterior.plug_and_play import diffpir
from course_lib.sample import sample
from course_lib.steps import ddpm
from tests.draws import noise_of, normal

F64 = torch.float64
SE = 3  # standard errors


def row_of(part, solver, problem):
    return next(row for row in rows(part) if (row["solver"], row["problem"]) == (solver, problem))


# --- what is stored ------------------------------------------------------------------------------------------------------


def test_each_pair_was_measured_on_each_problem_with_this_deepinv():
    assert {row["package"]: row["version"] for row in rows("versions")}["deepinv"] == bench_deepinv.VERSION
    for part in ("tuning", "solvers", "alone"):
        found = {(row["solver"], row["problem"]) for row in rows(part)}
        assert found == {(solver, problem) for solver in PAIRS for problem in PROBLEMS}, f"run `{bench_deepinv.COMMAND} {part}`"


def test_both_sides_solve_one_problem_with_equal_calls_and_as_many_settings():
    for row in rows("solvers"):
        tuned = row_of("tuning", row["solver"], row["problem"])
        assert row["apart"] < 1e-5  # A x in float32, sums of at most 3,072 terms
        assert row["calls"] == row["their_calls"] == CALLS
        assert len(tuned["tried"]) == len(tuned["their_tried"]) == 4
        for side in ("", "their_"):
            best = max(tuned[f"{side}tried"], key=lambda one: one["psnr"])
            assert row[f"{side}setting"] == tuned[f"{side}chosen"] == {key: best[key] for key in best if key != "psnr"}


def test_ours_is_within_three_tenths_of_a_decibel_or_better():
    """On 64 held-out scenes and three seeds. DDRM with all of its noise stands beside theirs where theirs has all of it."""
    behind = {
        cell: row for row in rows("solvers") if (cell := (row["solver"], row["problem"])) in CLAIMED and row["lead"] < -CLOSE
    }
    assert not behind


def test_what_ddrm_is_behind_is_the_noise_that_theirs_leaves_out():
    """Where deepinv draws half the variance it is nearer to the truth, and so is ours with half of it."""
    for problem in ("box", "super-resolution"):
        ours, halved = (row_of("solvers", solver, problem) for solver in ("DDRM", HALVED))
        assert halved["lead"] > ours["lead"]
        assert ours["lead"] > -1


def test_the_table_has_both_and_limits_what_is_claimed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    found = bench_deepinv.table()
    assert len(found) == len(rows("solvers")) + len(rows("alone"))
    assert sum("value" in row and row["limit"] is not None for row in found) == len(CLAIMED)
    assert bench.over(found) == []
    assert all("pip install deepinv" in row["other"] for row in found if "ratio" in row)


def test_ours_takes_no_more_time():
    """Alone within the error of each row, and well under it where deepinv has coordinates of its own, not our SVD's. In a whole
    run, whose time is the network's, the mean over the table: three runs of one row scatter by more than the solvers take.
    """
    for row in rows("alone"):
        assert row["ratio"] < 1 + SE * row["ratio_error"], row
    assert statistics.mean(row["ratio"] for row in rows("alone") if row["problem"] != "super-resolution") < 0.9
    assert statistics.mean(row["ratio"] for row in rows("solvers")) < 1


@pytest.mark.parametrize(("solver", "problem"), [("DDRM", problem) for problem in PROBLEMS])
def test_our_side_gives_what_is_stored(solver, problem, monkeypatch):
    """On the first pictures, whose samples do not hang on their batch; in fp32 the mean is within 0.007 dB of bfloat16's."""
    row = row_of("solvers", solver, problem)
    A, x0, y = bench_deepinv.posed("scenes", problem, "held out")
    n = bench_deepinv.FIRST
    monkeypatch.setattr(bench_deepinv, "posed", lambda *_: (A, x0[:n], y[:n]))
    found = bench_deepinv.scored.__wrapped__(
        PAIRS[solver].ours, tuple(row["setting"].items()), problem, "held out", bench_deepinv.SEEDS[0]
    )
    assert found.calls == CALLS
    assert sum(found.psnr) / n == pytest.approx(sum(row["first"]) / n, abs=0.05)


# --- parity --------------------------------------------------------------------------------------------------------------


def test_without_deepinv_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(
        SystemExit, match=r"deepinv cannot be imported \(.*\); expected an environment .* `pip install deepinv==0.5.0`"
    ):
        bench_deepinv.main([])


@pytest.fixture(scope="module")
def deepinv():
    try:
        return bench_deepinv.peer()
    except ValueError as error:
        pytest.skip(str(error))


SHAPE = (3, 16, 16)
OPERATORS = {
    "mask": Mask.box(SHAPE, 6),
    "means": BlockAverage(SHAPE, 4),
    "blur": Blur(gaussian_kernel(0.5), SHAPE),  # its least singular value, 0.3, is above sigma_y: see the test of the blur
}
SIGMA_Y = 0.06  # not one of the levels times a singular value: there 1e-6 decides which of two rules holds


def bent(x, sigma):
    """A denoiser that is neither linear nor ever outside [-1, 1]."""
    return torch.tanh(x / (1 + torch.as_tensor(sigma) ** 2).to(x))


def measured(A, n=2):
    return A(normal(n, *A.shape, seed=3).clamp(-1, 1)) + SIGMA_Y * normal(n, *A.out, seed=4) * (
        1 if A.observed is None else A.observed
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("own", [True, False])
def test_their_physics_is_our_operator(name, own, deepinv):
    A = OPERATORS[name]
    theirs = physics(A, SIGMA_Y, own)
    x, y = normal(3, *A.shape, dtype=torch.float32), normal(3, *A.out, seed=1, dtype=torch.float32)
    assert_close(theirs.A(x), A(x), rtol=0, atol=1e-5)
    assert_close(theirs.A_adjoint(y), A.adjoint(y), rtol=0, atol=1e-5)


def fed(monkeypatch, noise):
    """deepinv's draws come from `noise`."""
    monkeypatch.setattr(torch, "randn_like", lambda x: noise(x.double()).to(x))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("grid", "eta"), [("karras", 0.85), ("even", 1.0)])
def test_ddrm_is_theirs_at_each_level_when_its_noise_is_divided_by_the_root_of_two(name, grid, eta, deepinv, monkeypatch):
    """deepinv draws every coordinate with half the variance. That is the noise of the real and the imaginary part of half a
    spectrum, which is how its own blur counts, but in an orthonormal basis it is the noise of sigma / sqrt(2) at level sigma.

    It ends in D at its last level, our step to 0: k of its levels are k of ours and 0. It divides by s + 1e-6 where s >= 1/4:
    values up to 10 move by 4e-5.
    """
    A = OPERATORS[name]
    y, sigmas = measured(A), GRIDS[grid]()
    theirs = physics(A, SIGMA_Y, own=False).double()
    assert theirs.mask[theirs.mask > 0].min() > SIGMA_Y
    for k in (1, 2, 8, CALLS):
        fed(monkeypatch, noise_of(7))
        found = deepinv.sampling.DDRM(AsModel(bent), sigmas=sigmas[:k].numpy(), eta=eta)(y, theirs)
        source = noise_of(7)
        noise = lambda x, source=source: source(x) / math.sqrt(2)
        levels = torch.cat([sigmas[:k], torch.zeros(1, dtype=F64)])
        start = sigmas[0] * A.svd().V(noise(y.new_empty(len(y), math.prod(SHAPE))))
        x = ddrm_start(start, sigmas[0], A, y, SIGMA_Y)
        assert_close(sample(bent, x, levels, ddrm(A, y, SIGMA_Y, noise, eta)), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mask", "blur"])
def test_ddrm_without_noise_is_theirs_on_their_own_physics(name, deepinv, monkeypatch):
    """Their coordinates of a blur are no orthonormal basis, but what moves x towards y is the same picture in any; float32."""
    A = OPERATORS[name]
    y, sigmas, silent = measured(A).float(), GRIDS["karras"](), torch.zeros_like
    fed(monkeypatch, silent)
    found = deepinv.sampling.DDRM(AsModel(bent), sigmas=sigmas[:-1].numpy(), eta=0.85)(y, physics(A, SIGMA_Y))
    x = ddrm_start(torch.zeros(2, *SHAPE), sigmas[0], A, y, SIGMA_Y)
    assert_close(sample(bent, x, sigmas, ddrm(A, y, SIGMA_Y, silent)), found, rtol=0, atol=1e-4)


def test_of_a_blur_theirs_takes_singular_values_below_the_noise_for_zero(deepinv, monkeypatch):
    """What is not measured keeps x at D's; ours still weighs it, so that they part by more than rounding and by less than y."""
    A = Blur(gaussian_kernel(1.5), SHAPE)
    y, sigmas, silent = measured(A).float(), GRIDS["karras"](), torch.zeros_like
    fed(monkeypatch, silent)
    found = deepinv.sampling.DDRM(AsModel(bent), sigmas=sigmas[:-1].numpy())(y, physics(A, SIGMA_Y))
    x = sample(bent, ddrm_start(torch.zeros(2, *SHAPE), sigmas[0], A, y, SIGMA_Y), sigmas, ddrm(A, y, SIGMA_Y, silent))
    s = A.svd().s
    assert 0.2 < float((s < SIGMA_Y).double().mean()) < 0.9
    assert 1e-4 < float((found - x).abs().max()) < 1


@pytest.mark.parametrize("guidance", ["annealed", "norm"])
@pytest.mark.parametrize("name", OPERATORS)
def test_dps_is_theirs_at_each_level(name, guidance, deepinv):
    """'annealed' is `dps_score` with the variance sigma^2. 'norm' is no step of constant length, as the paper's: it is
    D' = D - weight sigma^2 grad_x |y - A D|, whose share in a step is sigma^2 - sigma'^2. Their network runs in float32.
    """
    A, weight, sigmas = OPERATORS[name], {"annealed": 1.0, "norm": 5.0}[guidance], GRIDS["karras"]()
    y, start = measured(A), normal(2, *SHAPE, seed=5)

    def pulled(x, sigma):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = bent(x, sigma)
            (slope,) = torch.autograd.grad((y - A(x0)).flatten(1).norm(dim=1).sum(), x)
        return (x0 - weight * sigma**2 * slope).detach()

    D = pulled if guidance == "norm" else dps_score(bent, A, y, SIGMA_Y, weight, variance=lambda sigma: sigma**2)
    for k in (2, 8, CALLS + 1):
        noise = noise_of(7)
        solver = deepinv.sampling.DDPMSolver(timesteps=bench_deepinv.vp_times(sigmas[:k]))
        model = deepinv.sampling.DPS(AsModel(bent), solver=solver, weight=weight, guidance=guidance, minus_one_one=False)
        scale = (1 + sigmas[0] ** 2).rsqrt()
        model.solver.randn_like = lambda x, seed=None, noise=noise: noise(x)
        theirs = model(y, physics(A, SIGMA_Y), x_init=scale * sigmas[0] * start, denoise_output=False)
        ours = sample(D, sigmas[0] * start, sigmas[:k], ddpm(noise_of(7)))
        assert_close(ours, theirs * (1 + sigmas[k - 1] ** 2).sqrt(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_diffpir_is_theirs_at_each_level_with_half_its_weight(name, deepinv, monkeypatch):
    """On its grid, from its start; the last of its calls changes nothing, so that k levels are k - 1 steps.

    In float64: at sigma = 150 its rho is 1e-7, and in float32 the rounding of A^T y over rho is in what A does not see. Its
    schedule stays in float32, whose rounding times 150 is 1e-5.
    """
    A, lam, zeta, ones = OPERATORS[name], 6.0, 0.3, torch.ones(1, *SHAPE, dtype=F64)
    y, fidelity = measured(A), deepinv.optim.data_fidelity.L2()
    for k in (2, 6, CALLS):
        fed(monkeypatch, noise_of(7))
        counted = Counted(bent)
        model = deepinv.sampling.DiffPIR(AsModel(counted, unit=True), fidelity, SIGMA_Y / 2, k, zeta=zeta, lambda_=lam)
        found = 2 * model((y + A(ones)) / 2, physics(A, SIGMA_Y / 2).double()) - 1
        levels, noise = model.sigmas[model.seq.long()].double(), noise_of(7)
        x = A.adjoint(y + A(ones)) - 1 + float(levels[0] ** 2 - SIGMA_Y**2) ** 0.5 * noise(torch.empty(2, *SHAPE, dtype=F64))
        x = sample(bent, x, levels, diffpir(A, y, SIGMA_Y, noise, lam / 2, zeta))
        assert counted.calls == k
        assert_close(x, found * float(1 + levels[-1] ** 2) ** 0.5, rtol=0, atol=2e-4)
