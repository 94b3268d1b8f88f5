"""The benchmark `gmm`: its exact posterior, its metrics and its floor; a wrong posterior is seen; what is stored."""

import math

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.testing import assert_close

from course_lib import bench, bench_gmm
from course_lib.bench_gmm import ALPHA_BAR, D_X, D_Y, SEEDS, SOLVERS, Problem, grid, grid_means, judge, problem, run
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.operators import Matrix
from course_lib.posterior import replacement
from course_lib.sample import sample
from course_lib.steps import ddim_eta
from tests.draws import noise_of, normal

F64 = torch.float64
SE = 4.5  # standard errors
ASKED = [(8, 1, 0), (8, 2, 3), (8, 4, 19)]


def prior(p: Problem) -> Mixture:
    """The prior in the basis of A itself."""
    return Mixture.isotropic(grid_means(p.A.shape[1]), 1.0, p.weights)


@pytest.mark.parametrize("asked", ASKED)
def test_the_posterior_is_the_mixtures(asked):
    """Both in float64; entries are sums of 8 products of numbers up to 16, so that 1e-9 allows 1e5 times their rounding."""
    p = problem(*asked)
    weights, means, variances = p.posterior
    exact = prior(p).posterior(p.A, p.y, p.sigma_y)
    kept = weights > 1e-300  # as there
    assert_close(weights[kept], exact.weights, atol=1e-9, rtol=0)
    assert_close(means[kept] @ p.turn.T, exact.means, atol=1e-9, rtol=0)
    assert_close((p.turn * variances @ p.turn.T).expand_as(exact.covs), exact.covs, atol=1e-9, rtol=0)


def test_the_denoiser_is_the_mixtures():
    p, c = problem(8, 2, 3), 10 * normal(50, 8, seed=1)
    for sigma in (0.0, 0.3, 5.0, 150.0):
        ours = p.denoiser(c, torch.tensor(sigma, dtype=F64)) @ p.turn.T
        assert_close(ours, prior(p).denoiser(c @ p.turn.T, sigma), atol=1e-9, rtol=0)


def test_samples_of_the_exact_posterior_have_its_moments_and_shares():
    p, n = problem(8, 2, 3), 20_000
    weights, means, variances = p.posterior
    x = p.exact(n, generator(7))
    mean = weights @ means
    spread = (variances + weights @ means**2 - mean**2).sqrt()
    assert bool(((x.mean(0) - mean).abs() < SE * spread / math.sqrt(n)).all())
    # components are 8 deviations apart but for the measured directions, so that few samples are on the wrong side
    assert bool(((p.shares(x) - weights).abs() < SE * (weights * (1 - weights) / n).sqrt() + 1e-3).all())


def test_the_turned_problem_is_the_problem():
    """A solver with A itself, and with the start and the noise turned, gives the same samples turned."""
    p, z = problem(8, 2, 3), noise_of(1)
    sigmas, start = grid(p.s, p.sigma_y, 20)[10:], normal(6, 8, seed=2)
    solve = lambda noise, *given: replacement(ddim_eta(0.6, noise), *given, noise, p.sigma_y)
    turned = sample(p.denoiser, start, sigmas, solve(noise_of(1), p.operator, p.measurement))
    step = solve(lambda x: z(x) @ p.turn.T, Matrix(p.A), p.y[None])
    assert_close(sample(prior(p).denoiser, start @ p.turn.T, sigmas, step), turned @ p.turn.T, atol=1e-7, rtol=0)


def test_the_distance_is_the_mean_of_scipys_over_the_slices():
    p = problem(8, 1, 0)
    x = p.exact(300, generator(3))
    directions = torch.randn(8, 100, generator=torch.Generator().manual_seed(5), dtype=F64)
    directions = directions / directions.norm(dim=0)
    exact = p.exact(300, generator(5, 1))
    slices = [wasserstein_distance((x @ d).numpy(), (exact @ d).numpy()) for d in directions.T]
    assert judge(p, x, seed=5)["w1"] == pytest.approx(sum(slices) / 100, rel=1e-9)


def test_the_floor_is_what_theory_says_and_a_wrong_posterior_is_far_from_it():
    """Two empirical distributions of n differ at x by a normal number of variance 2 F (1 - F) / n, so that on average
    W1 = sqrt(2 / pi) times the integral of sqrt(2 F (1 - F) / n), F that of the projected mixture; checked over 8 pairs.
    A wrong posterior: the measurement's sign lost, its noise four times too large, or none taken at all (the prior).
    """
    p, n = problem(8, 1, 0), 2000
    weights, means, variances = p.posterior
    directions = torch.nn.functional.normalize(normal(8, 40, seed=1), dim=0)
    centres, spread = means @ directions, (variances @ directions**2).sqrt()
    x = torch.linspace(-1, 1, 4001, dtype=F64)[:, None] * 70
    F = sum(w * torch.special.ndtr((x - c) / spread) for w, c in zip(weights, centres, strict=True))
    expected = float((math.sqrt(2 / math.pi) * (2 * F * (1 - F) / n).clamp_min(0).sqrt()).sum(0).mean() * (140 / 4000))
    floors = torch.tensor([judge(p, p.exact(n, generator(k, 9)), seed=k)["w1"] for k in range(8)])
    assert float((floors.mean() - expected).abs()) < SE * float(floors.std()) / math.sqrt(8) + 0.1 * expected

    wrong = [Problem(p.A, -p.y, p.sigma_y, p.weights), Problem(p.A, p.y, 4 * p.sigma_y + 4, p.weights)]
    for samples in (*(q.exact(n, generator(3)) for q in wrong), run("prior", p, 20)[0]):
        found = judge(p, samples)
        assert found["w1"] > 5 * float(floors.max()) and found["tv"] > 0.1
    right = judge(p, p.exact(n, generator(4)))
    assert right["found"] == 1 and right["tv"] < 0.06


@pytest.mark.parametrize(("asked", "n"), [((8, 4, 19), 20), ((80, 2, 0), 20), ((800, 1, 5), 100)])
def test_the_grid_falls_over_the_schedules_times_and_has_the_levels_of_the_measurement(asked, n):
    p = problem(*asked)
    sigmas, table = grid(p.s, p.sigma_y, n), (1 / ALPHA_BAR - 1).sqrt()
    assert len(sigmas) == n and bool((sigmas.diff() < 0).all())
    assert sigmas[0] == table[-1] and sigmas[-1] == 0
    for level in p.sigma_y / p.s:
        t = int((table - level).abs().argmin())
        near = table[max(0, t - 1) : t + 2]
        if table[1] < level < 50:  # the noisiest levels are not among those that the schedule is walked to
            assert bool(torch.isin(near, sigmas).any()), (level, sigmas)
    assert ALPHA_BAR[0] == 1 and len(ALPHA_BAR) == 1000
    assert_close(1 - ALPHA_BAR[1:] / ALPHA_BAR[:-1], torch.linspace(0.02, 1e-4, 999, dtype=F64), atol=1e-12, rtol=0)


def test_the_stored_problems_are_as_the_setting_says():
    sizes = bench_gmm.PROBLEMS.stat().st_size
    assert sizes < 1_500_000
    for d_x in D_X:
        for d_y in D_Y:
            p = problem(d_x, d_y, SEEDS - 1)
            assert p.A.shape == (d_y, d_x) and 0 < p.sigma_y <= p.s[0] <= 1 and bool((p.s.diff() < 0).all())
            # y is A x0 + n with x0 of a component: some |y - A m_k|^2 is like that of d_y normal numbers
            cov, residual = p.A @ p.A.T + p.sigma_y**2 * torch.eye(d_y), p.y - grid_means(d_x) @ p.A.T
            assert float((residual @ torch.linalg.inv(cov) * residual).sum(1).min()) < d_y + SE * math.sqrt(2 * d_y) + SE
    means = grid_means(8)
    assert len(means.unique(dim=0)) == 25 and means.abs().max() == 16 and bool((means[:, :2].repeat(1, 4) == means).all())
    assert problem(8, 1, 0).weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_each_solver_runs_on_both_grids(name):
    p = problem(8, 2, 3)
    for levels in (20, 100):
        x, calls = run(name, p, levels, n=10)
        assert x.shape == (10, 8) and bool(torch.isfinite(x).all()) and calls == levels - 1


def test_a_solver_is_one_line_and_an_exact_one_scores_the_floor(monkeypatch):
    monkeypatch.setitem(SOLVERS, "oracle", lambda D, p, x, sigmas, noise: p.exact(len(x), generator(8)))
    p = problem(8, 1, 0)
    floor = judge(p, p.exact(2000, generator(4)))["w1"]
    assert judge(p, run("oracle", p, 20)[0])["w1"] < 3 * floor


def test_stored_rows_say_what_was_measured_and_no_linear_solver_reaches_the_floor():
    cells = bench_gmm.rows(d_x=8, levels=20)
    assert {(row["solver"], row["d_y"]) for row in cells} == {(name, d_y) for name in ("exact", *SOLVERS) for d_y in D_Y}
    for d_y in D_Y:
        w1 = {row["solver"]: row["w1"] for row in cells if row["d_y"] == d_y}
        assert w1["exact"] < min(w1[name] for name in SOLVERS if name != "exact")
        assert w1["prior"] == max(w1[name] for name in SOLVERS if name != "PiGDM")  # its r^2 is that of a prior of variance 1
    again = bench_gmm.measure("exact", 8, 1, 20)
    stored = next(row for row in cells if row["solver"] == "exact" and row["d_y"] == 1)
    assert again["w1"] == pytest.approx(stored["w1"], abs=stored["reach"])  # another basis of the null space, other samples


def table() -> dict[tuple[int, int, int], dict[str, dict]]:
    """The stored cells in which both samplers by particles and DDRM were measured: (d_x, d_y, levels) -> solver -> row."""
    cells = {}
    for row in bench_gmm.rows():
        cells.setdefault((row["d_x"], row["d_y"], row["levels"]), {})[row["solver"]] = row
    return {key: cell for key, cell in cells.items() if {"MCGdiff", "TDS", "DDRM"} <= cell.keys()}


def test_a_particle_method_is_lowest_in_every_cell_and_a_small_fraction_of_ddrm():
    cells = table()
    assert {(d_x, d_y, 20) for d_x in (8, 80) for d_y in D_Y} <= cells.keys()
    for key, cell in cells.items():
        others = [row["w1"] for name, row in cell.items() if name not in ("exact", "MCGdiff", "TDS")]
        assert max(cell["MCGdiff"]["w1"], cell["TDS"]["w1"]) < min(others), key
        assert min(cell["MCGdiff"]["w1"], cell["TDS"]["w1"]) > cell["exact"]["w1"], key
        if key[0] == 8:
            assert cell["MCGdiff"]["w1"] < cell["DDRM"]["w1"] / 3, key


@pytest.mark.parametrize("method", ["MCGdiff", "TDS"])
def test_more_particles_bring_it_nearer_to_the_floor(method):
    """2,000 samples in runs of 10 to 1,000 particles, 100 levels, the hardest of the problems in 8 dimensions."""
    w1 = {row["particles"]: row["w1"] for row in bench_gmm.rows("particles", method=method, d_y=1)}
    (floor,) = bench_gmm.rows(solver="exact", d_x=8, d_y=1, levels=100)
    assert w1[10] > w1[100] > w1[1000] > floor["w1"]
    assert w1[1000] - floor["w1"] < (w1[10] - floor["w1"]) / 2


def test_dps_is_under_ddrm_at_80_and_its_samples_are_in_the_wrong_modes():
    """The bias that is printed: `tv` is the share of the samples that a right posterior would hold in other modes."""
    for (d_x, _, levels), cell in table().items():
        if "DPS" in cell and levels == 20 and d_x == 80:
            assert cell["DPS"]["w1"] < cell["DDRM"]["w1"]
        if "DPS" in cell:
            assert cell["DPS"]["tv"] > 2 * cell["MCGdiff"]["tv"]
        if levels == 20:  # about half of them and more
            assert cell["DPS"]["tv"] > 0.5


def test_a_stored_cell_is_what_the_code_measures():
    """Within 1.96 standard errors of the stored mean: another machine may turn the null space, which draws other samples."""
    for solver in ("MCGdiff", "DPS"):
        again = bench_gmm.measure(solver, 8, 4, 20)
        (row,) = bench_gmm.rows(solver=solver, d_x=8, d_y=4, levels=20)
        assert again["w1"] == pytest.approx(row["w1"], abs=row["reach"])
        assert again["tv"] == pytest.approx(row["tv"], abs=0.05) and again["calls"] == row["calls"]


def test_the_benchmark_prints_the_stored_table():
    rows = bench.bench_gmm(dims=())
    assert "gmm" in bench.BENCHMARKS and len(rows) >= 3 * len(SOLVERS)
    assert all("floor" in row["beside"] and "stored" in row["beside"] for row in rows)


def test_bad_input_is_one_sentence(monkeypatch, tmp_path):
    p = problem(8, 1, 0)
    with pytest.raises(ValueError, match=r"solver = 'dps'; expected one of prior, "):
        run("dps", p, 20)
    with pytest.raises(ValueError, match=r"levels = 50; expected one of 20, 100"):
        run("DDRM", p, 50)
    with pytest.raises(ValueError, match=r"\(9, 1, 0\); expected d_x of"):
        problem(9, 1, 0)
    with pytest.raises(ValueError, match=r"no row of gmm.json has \{'d_x': 9\}; run `python -m course_lib.bench_gmm`"):
        bench_gmm.rows(d_x=9)
    monkeypatch.setattr(bench_gmm, "STORED", tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"none.json is missing; run"):
        bench_gmm.rows()
