"""The articulated figure and ScoreHMR: kinematics by hand and by invariance, the solver on exact answers, what is stored."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib import zoo
from course_lib.gaussians import Mixture
from course_lib.posterior import body
from course_lib.schedules import karras
from course_lib.worlds import figures
from course_lib.worlds.figures import ANGLES, JOINTS, NAMES, OFFSETS, PARENTS, Keypoints
from course_lib.zoo import figures_fit
from tests.draws import noise_of, normal

F64 = torch.float64


def pose_of(heading: float = 0.0, **angles: float) -> torch.Tensor:
    """A pose that is at rest but for the angles named."""
    pose = torch.zeros(figures.DIM, dtype=F64)
    pose[0], pose[1] = math.cos(heading), math.sin(heading)
    for name, value in angles.items():
        pose[NAMES.index(name)] = value
    return pose


def at(pose: torch.Tensor, joint: str) -> torch.Tensor:
    return figures.forward(pose)[..., JOINTS.index(joint), :]


def poses(n: int, seed: int = 0) -> torch.Tensor:
    return figures.draw_poses(n, torch.Generator().manual_seed(seed)).double()


# --- kinematics ----------------------------------------------------------------------------------------


def test_joints_by_hand():
    """A hand case for each kind of angle, in exact numbers: bones of 0.29 and 0.25 m in the arm, 0.43 and 0.42 in the leg."""
    quarter = math.pi / 2
    rest = pose_of()
    assert_close(at(rest, "l_wrist"), torch.tensor([0, 0.18, 0.12 + 0.36 - 0.29 - 0.25], dtype=F64))
    assert_close(at(rest, "r_toe"), torch.tensor([0.16, -0.10, -0.04 - 0.43 - 0.42 - 0.06], dtype=F64))
    # an arm held straight out in front; with the elbow bent the forearm points up
    assert_close(at(pose_of(r_shoulder_flex=quarter), "r_wrist"), torch.tensor([0.29 + 0.25, -0.18, 0.48], dtype=F64))
    bent = pose_of(r_shoulder_flex=quarter, r_elbow=quarter)
    assert_close(at(bent, "r_wrist"), torch.tensor([0.29, -0.18, 0.48 + 0.25], dtype=F64))
    # to its own side, left and right
    assert_close(at(pose_of(l_shoulder_abd=quarter), "l_elbow"), torch.tensor([0, 0.18 + 0.29, 0.48], dtype=F64))
    assert_close(at(pose_of(r_shoulder_abd=quarter), "r_elbow"), torch.tensor([0, -0.18 - 0.29, 0.48], dtype=F64))
    # a knee bends backwards, a hip forwards: sitting
    sitting = pose_of(l_hip_flex=quarter, l_knee=quarter)
    assert_close(at(sitting, "l_ankle"), torch.tensor([0.43, 0.10, -0.04 - 0.42], dtype=F64))
    # heading a quarter to the left: what was in front is at +y
    assert_close(at(pose_of(quarter, r_shoulder_flex=quarter), "r_wrist"), torch.tensor([0.18, 0.54, 0.48], dtype=F64))
    # the spine carries the arms, and leaves the legs
    bowed = pose_of(spine_flex=quarter)
    assert_close(at(bowed, "neck"), torch.tensor([0.40, 0, 0.12], dtype=F64))
    assert_close(at(bowed, "l_wrist"), torch.tensor([0.36 - 0.54, 0.18, 0.12], dtype=F64))
    assert_close(at(bowed, "l_ankle"), at(rest, "l_ankle"))


def test_bones_keep_their_lengths_and_angles_without_descendants_move_nothing():
    x = poses(50)
    joints = figures.forward(x)
    bones = joints[:, 1:] - joints[:, PARENTS[1:]]
    assert_close(bones.norm(dim=-1), OFFSETS[1:].double().norm(dim=-1).expand(50, -1), atol=1e-12, rtol=0)
    moved = x.clone()
    moved[:, NAMES.index("l_elbow")] += 0.5
    changed = (figures.forward(moved) - joints).norm(dim=-1).amax(0) > 1e-9
    assert [name for name, c in zip(JOINTS, changed, strict=True) if c] == ["l_wrist"]


def test_equivariance_to_turns_and_moves_of_the_root_and_to_the_mirror():
    x, angle, root = poses(20), normal(20, seed=1), normal(20, 3, seed=2)
    c, s, o = angle.cos(), angle.sin(), torch.zeros(20, dtype=F64)
    R = torch.stack((c, -s, o, s, c, o, o, o, o + 1), -1).view(20, 1, 3, 3)
    joints = figures.forward(x)
    assert_close(figures.forward(figures.turned(x, angle)), (R @ joints[..., None])[..., 0], atol=1e-12, rtol=0)
    assert_close(figures.forward(x, root), joints + root[:, None], atol=1e-12, rtol=0)
    scaled = torch.cat((3.7 * x[:, :2], x[:, 2:]), -1)  # of the heading only the direction counts
    assert_close(figures.forward(scaled), joints, atol=1e-12, rtol=0)
    other = [JOINTS.index({"l": "r", "r": "l"}[n[0]] + n[1:] if n[1] == "_" else n) for n in JOINTS]
    reflected = joints[:, other] * torch.tensor([1, -1, 1], dtype=F64)
    assert_close(figures.forward(figures.mirrored(x)), reflected, atol=1e-12, rtol=0)
    assert_close(figures.mirrored(figures.mirrored(x)), x)


def test_shapes_are_kept_and_gradients_are_right():
    x = poses(6).view(2, 3, -1)
    assert figures.forward(x).shape == (2, 3, 18, 3)
    assert_close(figures.forward(x)[1, 2], figures.forward(x[1, 2]))
    one = poses(2, seed=3).requires_grad_(True)
    keypoints = figures.observe(one.detach().flip(0), torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(figures.forward, one)
    assert torch.autograd.gradcheck(lambda x: figures.project(figures.forward(x)), one)
    # in units of the noise the objective is about 1e4, so central differences of 1e-6 lose 1e-6 of it
    assert torch.autograd.gradcheck(lambda x: figures.reprojection(x, keypoints), one, rtol=1e-4, atol=1e-3)


# --- motions -------------------------------------------------------------------------------------------


def test_poses_are_within_limits_and_correlated():
    x = poses(4000)
    angles = x[:, 2:]
    assert bool((angles >= figures.LOW.double() - 1e-6).all() and (angles <= figures.HIGH.double() + 1e-6).all())

    def correlation(x: torch.Tensor, a: str, b: str) -> float:
        return float(torch.corrcoef(x[:, [NAMES.index(a), NAMES.index(b)]].T)[0, 1])

    # a squat, a gait and a crouch bend hip and knee together; in a run an arm swings against the leg of its side
    assert correlation(x, "l_hip_flex", "l_knee") > 0.4
    run = torch.full((1000,), list(figures.MOTIONS).index("run"))
    assert correlation(figures.draw_poses(1000, torch.Generator().manual_seed(5), run), "l_hip_flex", "l_shoulder_flex") < -0.3
    # left and right are drawn alike: 2 x 4,000 draws of deviation s, so that the gap is within 5 s sqrt(2 / 4000)
    left, right = angles[:, 7:15], angles[:, 15:23]
    bound = 5 * left.std(0) * math.sqrt(2 / 4000)
    assert bool(((left.mean(0) - right.mean(0)).abs() < bound).all())
    inside = torch.linspace(-0.2, 0.3, 5)[:, None].expand(5, len(ANGLES))
    keep = (2 * inside - figures.LOW - figures.HIGH).abs() <= 0.7 * (figures.HIGH - figures.LOW)
    assert_close(figures.within(inside)[keep], inside[keep])


def test_clips_move_smoothly_and_stand_on_a_foot_that_does_not_slide():
    clips = figures.draw_clips(16, 12, torch.Generator().manual_seed(0), torch.arange(16) % 8)
    assert clips.pose.shape == (16, 12, 25) and clips.root.shape == (16, 12, 3)
    between, apart = clips.pose.diff(dim=1).norm(dim=-1).mean(), (clips.pose[:8] - clips.pose[8:]).norm(dim=-1).mean()
    assert between < 0.5 * apart
    joints = figures.forward(clips.pose, clips.root)
    feet = joints[:, :, [JOINTS.index(f"{side}_{part}") for side in "lr" for part in ("ankle", "toe")]]
    assert_close(feet[..., 2].amin(-1), torch.zeros(16, 12), atol=1e-5, rtol=0)
    slide = feet.diff(dim=1)[..., :2].norm(dim=-1)
    lowest = feet[:, :-1, :, 2].argmin(-1, keepdim=True)
    assert_close(slide.gather(-1, lowest), torch.zeros(16, 11, 1), atol=1e-5, rtol=0)
    walk = list(figures.MOTIONS).index("walk")
    walking = figures.draw_clips(32, 24, torch.Generator().manual_seed(1), torch.full((32,), walk))
    way = (walking.root[:, -1] - walking.root[:, 0])[:, :2].norm(dim=-1)
    assert way.median() > 0.5  # metres in two seconds


# --- camera --------------------------------------------------------------------------------------------


def test_projection_by_hand():
    """At elevation 0 from 4.5 m with 30 degrees: f = 1 / tan 15, and what is nearer by 0.5 m is larger by 4.5 / 4."""
    f = 1 / math.tan(math.radians(15))
    points = torch.tensor([[0, 0, 0], [0, 0, 1.0], [0, 0.5, 0], [0.5, 0, 1.0]], dtype=F64)
    seen = figures.project(points, figures.camera(0, 0))
    # the camera is at +x: +y is to its right, up is -v
    expected = torch.tensor([[0, 0], [0, -f / 4.5], [0.5 * f / 4.5, 0], [0, -f / 4]], dtype=F64)
    assert_close(seen, expected, atol=1e-6, rtol=0)  # the camera's axes are float32
    # to walk around a figure by an angle is to turn it by the opposite angle
    x = poses(1)
    around = figures.project(figures.forward(x), figures.camera(40))
    assert_close(around, figures.project(figures.forward(figures.turned(x, -math.radians(40)))), atol=1e-6, rtol=0)


def test_keypoints_have_the_noise_and_the_gaps_that_they_say():
    x = poses(2000)
    keypoints = figures.observe(x, torch.Generator().manual_seed(0), noise=0.05, missing=0.3)
    n = keypoints.seen.numel()
    # both within 5 standard errors: of a share p sqrt(p (1 - p) / n), of a deviation s / sqrt(2 n)
    assert abs(float(keypoints.seen.double().mean()) - 0.7) < 5 * math.sqrt(0.21 / n)
    error = (keypoints.at - figures.project(figures.forward(x)))[keypoints.seen]
    assert abs(float(error.std()) - 0.05) < 5 * 0.05 / math.sqrt(2 * error.numel())
    assert not bool(keypoints.at[~keypoints.seen].any())
    assert not bool(figures.observe(x[:2], missing=1.0).flat().any())
    clean = figures.observe(x[:4], noise=0.0)
    assert_close(figures.reprojection(x[:4], clean), torch.zeros(4, dtype=F64))
    off = Keypoints(clean.at + 3 * figures.NOISE * torch.tensor([1.0, 0]) * clean.seen[..., None], clean.seen)
    assert_close(figures.reprojection(x[:4], off), 4.5 * clean.seen.sum(-1).double())
    assert_close(figures.joint_error(x, figures.turned(x, 0.0)), torch.zeros(2000, dtype=F64))


def test_a_drawing_has_ink_where_the_joints_are():
    places = figures.project(figures.forward(figures.draw_poses(5, torch.Generator().manual_seed(0))))
    picture = figures.draw(places, 96)
    assert picture.shape == (5, 3, 96, 96) and float(picture.min()) >= -1 and float(picture.max()) <= 1
    assert bool((picture[:, :, 0] == 1).all())  # white above the figure
    pixel = ((places + 1) * 48).long().clamp(0, 95)
    ink = picture.amin(1)[torch.arange(5)[:, None], pixel[..., 1], pixel[..., 0]]
    assert bool((ink < 0.5).all())


# --- the solver on exact answers -----------------------------------------------------------------------


def gaussian(d: int = 3):
    """A Gaussian prior, a linear measurement, and the exact posterior mean."""
    B = normal(d, d, seed=5)
    mean, cov = normal(d, seed=6), B @ B.T / d + 0.2 * torch.eye(d, dtype=F64)
    A, s = normal(2, d, seed=7), 0.3
    prior = Mixture.gaussian(mean, cov)
    y = prior.sample(1, torch.Generator().manual_seed(1)) @ A.T
    return prior, A, y, s


def test_guidance_is_the_gradient_of_the_objective_in_both_forms():
    """On a Gaussian D is affine, D = m + C (C + s^2)^-1 (x - m), so both gradients have a closed form."""
    prior, A, y, s_y = gaussian()
    x, sigma = normal(4, 3, seed=8), torch.tensor(0.7, dtype=F64)
    objective = lambda x0: 0.5 * (x0 @ A.T - y).square().sum(-1) / s_y**2
    x0 = prior.denoiser(x, sigma)
    g = (x0 @ A.T - y) @ A / s_y**2
    J = prior.cov @ torch.linalg.inv(prior.cov + sigma**2 * torch.eye(3, dtype=F64))
    for through, expected in ((False, g), (True, g @ J)):
        D = body.guided(prior.denoiser, objective, weight=0.5, through=through)
        assert_close(D(x, sigma), x0 - 0.5 * sigma**2 * expected)
    assert body.guided(prior.denoiser, objective, 0.0) == prior.denoiser
    for spread in (2.0, torch.tensor([1.0, 2.0, 3.0], dtype=F64)):
        D = body.guided(prior.denoiser, objective, body.widened(s_y, spread), through=False)
        assert_close(D(x, sigma), x0 - sigma**2 * g * s_y**2 / (s_y**2 + spread * sigma**2))
    each = torch.tensor([0.1, 0.7, 0.7, 2.0], dtype=F64)  # a level for each row
    D = body.guided(prior.denoiser, objective, body.widened(s_y, 2.0))
    assert_close(D(x, each)[1:3], D(x, sigma)[1:3])
    # with a reach no row moves farther than that many sigmas, in the same direction, and those that move less stay as they are
    move = body.guided(prior.denoiser, objective, 0.5)(x, sigma) - x0
    size = move.norm(dim=-1, keepdim=True)
    reach = float(size.median() / sigma)
    short = body.guided(prior.denoiser, objective, 0.5, reach=reach)(x, sigma) - x0
    assert_close(short, move * (reach * sigma / size).clamp_max(1))
    assert bool((short == move).all(-1).any()) and bool((short != move).any())


def test_widened_guidance_never_oversteps_where_a_constant_weight_diverges():
    """|A x0' - y| <= |A x0 - y| for spread the largest eigenvalue of A^T A: each part of the residual shrinks."""
    prior, A, y, _ = gaussian()
    x, sigma, s_y = normal(4, 3, seed=8), torch.tensor(0.7, dtype=F64), 0.01
    objective = lambda x0: 0.5 * (x0 @ A.T - y).square().sum(-1) / s_y**2
    residual = lambda D: (D(x, sigma) @ A.T - y).norm(dim=-1)
    before = residual(prior.denoiser)
    largest = float(torch.linalg.eigvalsh(A.T @ A)[-1])
    assert bool((residual(body.guided(prior.denoiser, objective, body.widened(s_y, largest), through=False)) <= before).all())
    assert bool((residual(body.guided(prior.denoiser, objective, 1.0, through=False)) > 10 * before).all())


def test_without_guidance_the_rounds_return_to_where_they_began():
    """Inversion and DDIM walk the same flow, so that the difference is of the step's first order: half for twice the levels."""
    prior, *_ = gaussian()
    x = prior.sample(8, torch.Generator().manual_seed(2))
    ends = []
    for n in (40, 80, 160):
        levels = karras(n, 0.001, 1.0)[:-1]
        ends.append(float((body.score_hmr(prior.denoiser, x, levels, lambda x0: x0, 0.0) - x).norm()))
    assert 1.7 < ends[0] / ends[1] < 2.3 and 1.7 < ends[1] / ends[2] < 2.3


def test_rounds_bring_a_poor_guess_towards_the_measurement():
    """Each round lowers the misfit, and the result keeps to the prior where nothing is measured, as optimisation cannot."""
    prior, A, y, s_y = gaussian()
    objective = lambda x0: 0.5 * (x0 @ A.T - y).square().sum(-1) / s_y**2
    x = prior.mean + 2 * normal(16, 3, seed=9)
    levels, weight = karras(20, 0.01, 2.0)[:-1], body.widened(s_y, float(torch.linalg.eigvalsh(A.T @ A)[-1]))
    solve = lambda rounds: body.score_hmr(prior.denoiser, x, levels, objective, weight, rounds)
    misfit = [float(objective(x0).mean()) for x0 in (x, solve(1), solve(3))]
    assert misfit[2] < misfit[1] < 0.2 * misfit[0]
    fitted = body.optimise(x, objective, 500, 0.05)
    assert float(objective(fitted).mean()) < misfit[1]
    assert float(prior.log_prob(solve(3)).mean()) > float(prior.log_prob(fitted).mean())


def test_terms_that_tie_views_and_frames():
    views = torch.tensor([[[0.0, 2.0]], [[2.0, 2.0]]], dtype=F64)  # (V = 2, one figure, d = 2): mean (1, 2)
    assert_close(body.consistency(views), torch.tensor([2.0], dtype=F64))
    clip = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]], dtype=F64)  # (T = 3, d = 2)
    assert_close(body.smoothness(clip), torch.tensor(5.0, dtype=F64))


def test_noise_in_place_of_the_inversion():
    prior, *_ = gaussian()
    x, levels = normal(4, 3, seed=8), karras(2, 0.1, 1.0)[:-1]
    noise = noise_of(3)
    got = body.score_hmr(prior.denoiser, x, levels, lambda x0: x0, 0.0, noise=noise)
    z = x + noise_of(3)(x)
    first = prior.denoiser(z, levels[0])
    z = first + 0.1 * (z - first)
    assert_close(got, prior.denoiser(z, levels[1]))


# --- what the course measured --------------------------------------------------------------------------


def mpjpe(problem: str, method: str) -> list[float]:
    return [row["mpjpe"][method] for row in figures_fit.rows() if row["problem"] == problem]


@pytest.mark.parametrize("problem", figures_fit.PROBLEMS)
def test_scorehmr_beats_the_regressor_and_plain_optimisation_on_every_seed(problem):
    assert figures_fit.FIGURES >= 64
    ours = mpjpe(problem, "ScoreHMR")
    assert len(ours) == len(figures_fit.SEEDS) == 3
    for other in ("regressor", "optimisation", "ScoreHMR, no guidance"):
        assert all(a < b for a, b in zip(ours, mpjpe(problem, other), strict=True)), other


@pytest.mark.parametrize("problem", figures_fit.PROBLEMS)
def test_no_chosen_setting_of_the_baseline_is_at_the_end_of_its_grid(problem):
    grid = figures_fit.GRIDS["optimisation"][1]["lr"]
    assert min(grid) < figures_fit.tuned(problem, "optimisation")["lr"] < max(grid)
    assert figures_fit.CALLS >= figures_fit.ROUNDS * figures_fit.LEVELS  # optimisation has more gradients


def test_a_stored_number_is_measured_again():
    """All of it is computed alike without bfloat16: both are then the same to the last digit stored, 0.01 mm."""
    task = figures_fit.problem("one view", 0)
    stored = next(row for row in figures_fit.rows() if (row["problem"], row["seed"]) == ("one view", 0))["mpjpe"]
    x = figures_fit.start(task)
    assert task.error(x) == pytest.approx(stored["regressor"], abs=0.05)
    ours = task.error(figures_fit.refined(task, x, **figures_fit.tuned("one view", "ScoreHMR")))
    assert ours == pytest.approx(stored["ScoreHMR"], abs=0.05)
    assert ours < task.error(figures_fit.plain(task, x, **figures_fit.tuned("one view", "optimisation"))) < task.error(x)


def test_the_prior_knows_poses_and_reads_keypoints():
    models, card = zoo.load("figures", device="cpu"), zoo.card("figures")
    x = figures.draw_poses(256, torch.Generator().manual_seed(11))
    sigma = torch.tensor(0.8)
    noised = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(12))
    read = figures.observe(x, torch.Generator().manual_seed(13)).flat()
    error = lambda D: float((D(noised, sigma) - x).square().mean().sqrt())
    assert error(models.prior.given(observed=read)) < 0.9 * error(models.prior)
    # linear shrinkage towards the mean is the best that knows only second moments
    mean, cov = figures.draw_poses(5000, torch.Generator().manual_seed(14)).mean(0), torch.cov(x.T)
    assert error(models.prior) < error(Mixture.gaussian(mean.double(), cov.double()).denoiser)
    assert card["bytes"] <= 400_000


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match=r"pose has shape \(2, 24\); expected \(..., 25\)"):
        figures.forward(torch.zeros(2, 24))
    with pytest.raises(ValueError, match=r"motion = \[8\]; expected 1 indices of figures.MOTIONS, 0 to 7"):
        figures.draw_clips(1, 4, motion=torch.tensor([8]))
    with pytest.raises(ValueError, match=r"does not depend on x0"):
        body.guided(lambda x, s: x, lambda x0: torch.zeros(1))(torch.zeros(1, 2), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"reach = 0; expected a positive number of sigmas"):
        body.guided(lambda x, s: x, lambda x0: x0, reach=0)
    with pytest.raises(ValueError, match=r"sigma_y = 0.0, spread = 1.0; expected positive"):
        body.widened(0.0)
    zero, nothing = torch.zeros(1, 2), lambda x0: x0
    with pytest.raises(ValueError, match=r"expected a grid that falls to a level above 0"):
        body.score_hmr(lambda x, s: x, zero, karras(3), nothing)
    with pytest.raises(ValueError, match=r"rounds = 0"):
        body.score_hmr(lambda x, s: x, zero, karras(3)[:-1], nothing, rounds=0)
    with pytest.raises(FloatingPointError, match=r"after round 1; take a smaller weight"):
        body.score_hmr(lambda x, s: x / 0, zero, karras(3)[:-1], nothing)
    with pytest.raises(ValueError, match=r"steps = 0, lr = 0.1; expected at least one step"):
        body.optimise(zero, nothing, 0, 0.1)
    with pytest.raises(ValueError, match=r"name = 'two views'; expected one of one view, three views, clip"):
        figures_fit.problem("two views", 0)
