"""ParaDiGMS: what sequential sampling finds, with fewer calls one after the other; and what each part of it is for."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib import zoo
from course_lib.devices import SampleNoise
from course_lib.parallel import sample_parallel
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim, ddpm
from course_lib.types import right
from course_lib.worlds import digits
from course_lib.worlds.toys import three_blobs

F64 = torch.float64
LOW, HIGH, STEPS = 0.02, 15.0, 100
BLOBS = three_blobs()


def grid(n=STEPS):
    """n steps of Karras's grid, without one to 0."""
    return karras(n, LOW, HIGH, to_zero=False)


def start(rows=32, seed=1):
    return SampleNoise(seed).start((rows, 2), HIGH, dtype=F64)


def rms(a, b):
    return float((a - b).double().square().mean().sqrt())


# --- the algorithm --------------------------------------------------------------------------------------------------------


def test_one_call_adds_up_what_it_finds_along_the_first_guess():
    """A point mass at 0, D = 0: f(x) = (rho - 1) x. The guess is x_0 everywhere, so that a call which is accepted whole gives
    x_j = x_0 (1 + sum_{i < j} (rho_i - 1)), and not the product of the rho, which sequential sampling has."""
    sigmas, x = torch.tensor([2.0, 1.8, 1.7, 1.5], dtype=F64), torch.tensor([[3.0]], dtype=F64)
    rho = sigmas[1:] / sigmas[:-1]
    found = sample_parallel(lambda x, sigma: 0 * x, x, sigmas, window=3, tolerance=1e6)
    assert (found.calls, found.evaluations, found.accepted.flatten().tolist()) == (1, 3, [1, 1, 1])
    assert_close(found.x, x * (1 + (rho - 1).sum()), rtol=1e-14, atol=0)
    assert abs(float(found.x - x * rho.prod())) > 0.05


@pytest.mark.parametrize(("tolerance", "first"), [(0.9, 1), (1.1, 2)])
def test_the_window_moves_to_the_first_level_that_changed_by_more_than_the_tolerance(tolerance, first):
    """D = 0 again. The first call changes x_1 by (rho_1 - 1) x_0. Let x_0 be such that this is s_1 = sigma_1 sqrt(1 - rho_1^2):
    a tolerance of 0.9 refuses to pass it, one of 1.1 does not, and x_2, which changed more, then is where the window begins."""
    sigmas = torch.tensor([2.0, 1.6, 1.2, 0.9], dtype=F64)
    rho = sigmas[1:] / sigmas[:-1]
    s_1 = sigmas[1] * (1 - rho[0] ** 2).sqrt()
    x = (s_1 / (1 - rho[0])).reshape(1, 1)
    found = sample_parallel(lambda x, sigma: 0 * x, x, sigmas, window=3, tolerance=tolerance)
    assert int((found.accepted == 1).sum()) == first


def algorithm_1(D, x, sigmas, window, tolerance):
    """Shih et al. 2023, Algorithm 1, for one sample x (d,): its last value, and for each step the call that made it final.

    stride = min({j : error_j > tolerance^2 s_j^2} and p): the first level that changed too much is where the window goes on.
    """
    n, t, calls, final = len(sigmas) - 1, 0, 0, []
    values = {0: x} | {i: x for i in range(1, window + 1)}
    while t < n:
        p = min(window, n - t)
        drift = [ddim(D, values[t + j][None], sigmas[t + j], sigmas[t + j + 1])[0][0] - values[t + j] for j in range(p)]
        new = {t + j: values[t] + sum(drift[:j]) for j in range(1, p + 1)}
        calls, stride = calls + 1, p
        for j in range(1, p):
            variance = sigmas[t + j] ** 2 * (1 - sigmas[t + j] ** 2 / sigmas[t + j - 1] ** 2)
            if (new[t + j] - values[t + j]).square().sum() / len(x) > tolerance**2 * variance:
                stride = j
                break
        values |= new | {t + p + j: new[t + p] for j in range(1, stride + 1)}
        t, final = t + stride, final + [calls] * stride
    return values[n], final


@pytest.mark.parametrize(("window", "tolerance"), [(8, 0.05), (8, 0.5), (20, 0.1), (60, 0.2)])
def test_it_is_algorithm_1(window, tolerance):
    """Samples in a batch, each against a run of its own by plain loops; the values differ by the order of their sums."""
    found = sample_parallel(BLOBS.denoiser, start(4), grid(50), window, tolerance)
    for row, x in enumerate(start(4)):
        end, final = algorithm_1(BLOBS.denoiser, x, grid(50), window, tolerance)
        assert found.accepted[:, row].tolist() == final
        assert_close(found.x[row], end, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 7, 40, 1000])
@pytest.mark.parametrize("last", [LOW, 0.0])
def test_towards_no_tolerance_it_is_the_sequential_run(window, last):
    """Each call makes one more level exact, so that n calls make all. Sums of 40 terms of size 15 in float64: 1e-13."""
    sigmas = grid(40) if last else karras(40, LOW, HIGH)
    found = sample_parallel(BLOBS.denoiser, start(), sigmas, window, tolerance=1e-300)
    assert_close(found.x, sample(BLOBS.denoiser, start(), sigmas), rtol=0, atol=1e-12)
    assert found.calls <= 40
    assert (found.accepted <= torch.arange(1, 41)[:, None]).all()


def test_a_window_of_one_is_sequential_sampling():
    """The defining term off: no matter how loose the tolerance, as many calls as steps, and no difference."""
    found = sample_parallel(BLOBS.denoiser, start(), grid(), window=1, tolerance=100.0)
    assert found.calls == found.evaluations == STEPS
    assert_close(found.x, sample(BLOBS.denoiser, start(), grid()), rtol=0, atol=1e-12)


def test_one_call_serves_the_whole_window():
    """Every call has the rows of all levels of the window, each with its own sigma, the samples of a level side by side."""
    shapes = []

    def D(x, sigma):
        shapes.append((tuple(x.shape), tuple(sigma.shape), len(sigma.unique())))
        return BLOBS.denoiser(x, sigma)

    found = sample_parallel(D, start(3)[:1].expand(3, 2), grid(), window=20)
    assert len(shapes) == found.calls and sum(shape[0] for shape, _, _ in shapes) == 3 * found.evaluations
    assert shapes[0] == ((60, 2), (60,), 20)


# --- what it is for -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_hundred_steps_in_a_quarter_of_the_calls(seed):
    """Within a tolerance of 0.1 the result is nearer to the sequential run than that is to the exact flow; tighter is nearer.

    Measured: 16 to 18 calls. Picard's iteration makes many levels exact at once; 25 leaves room for other starts.
    """
    x = start(seed=seed)
    sequential, exact = sample(BLOBS.denoiser, x, grid()), BLOBS.reference_flow(x, HIGH, LOW)
    errors = []
    for tolerance in (0.5, 0.1, 0.01, 1e-9):
        found = sample_parallel(BLOBS.denoiser, x, grid(), 20, tolerance)
        assert found.calls <= (25 if tolerance >= 0.01 else 40)
        errors.append(rms(found.x, sequential))
    assert all(tight < loose for loose, tight in pairwise(errors))
    assert errors[1] < rms(sequential, exact) and errors[-1] < 1e-8


def without_the_sum(D, x, sigmas, tolerance):
    """The same iteration over all levels at once, but x_{j+1} <- x_j + f(x_j), without Picard's sum: (x, calls)."""
    path, calls = x.expand(len(sigmas), *x.shape).clone(), 0
    s = sigmas[1:] * (1 - (sigmas[1:] / sigmas[:-1]) ** 2).sqrt()
    while True:
        now = path[:-1].flatten(0, 1)
        level = lambda values: values.repeat_interleave(len(x))
        new = ddim(D, now, level(sigmas[:-1]), level(sigmas[1:]))[0].view_as(path[1:])
        change, calls = (new - path[1:]).square().mean((1, 2)).sqrt(), calls + 1
        path[1:] = new
        if bool((change <= tolerance * s).all()):
            return path[-1], calls


def test_without_picards_sum_a_call_is_worth_one_step():
    """The defining term off: what a level learns reaches only the next one, and 100 steps take 100 calls."""
    found = sample_parallel(BLOBS.denoiser, start(), grid(), STEPS, tolerance=1e-6)
    x, calls = without_the_sum(BLOBS.denoiser, start(), grid(), 1e-6)
    sequential = sample(BLOBS.denoiser, start(), grid())
    assert rms(found.x, sequential) < 1e-5 and rms(x, sequential) < 1e-5
    assert found.calls < STEPS / 3 and calls >= STEPS - 1


def test_ddpm_with_its_noise_drawn_beforehand():
    """The same noise in the same order as the sequential chain: its result, and not another sample of the same law."""
    sequential = sample(BLOBS.denoiser, start(), grid(), ddpm(SampleNoise(7)))
    tight = sample_parallel(BLOBS.denoiser, start(), grid(), 50, 1e-300, noise=SampleNoise(7))
    assert_close(tight.x, sequential, rtol=0, atol=1e-12)
    loose = sample_parallel(BLOBS.denoiser, start(), grid(), 50, 0.1, noise=SampleNoise(7))
    assert loose.calls < STEPS / 2 and rms(loose.x, sequential) < 0.02
    other = sample_parallel(BLOBS.denoiser, start(), grid(), 50, 0.1, noise=SampleNoise(8))
    assert rms(other.x, sequential) > 0.2


def test_a_sample_does_not_change_with_its_batch():
    """Each has its own window: the accepted steps are the same, and x to rounding (a mixture may add in another order)."""
    many = sample_parallel(BLOBS.denoiser, start(), grid(), 20)
    few = sample_parallel(BLOBS.denoiser, start()[5:8], grid(), 20)
    assert_close(few.x, many.x[5:8], rtol=0, atol=1e-12)
    assert torch.equal(few.accepted, many.accepted[:, 5:8])
    assert (many.accepted.diff(dim=0) >= 0).all() and int(many.accepted.max()) == many.calls
    assert len(many.accepted[-1].unique()) > 1


# --- with a network -------------------------------------------------------------------------------------------------------


def test_a_hundred_steps_of_digits():
    """The trained network, in float32, for one digit. Measured: 18 calls, 7e-4 away; a grey level of 256 is 0.008."""
    D = zoo.load("digits", device="cpu").given(label=torch.tensor([3]))
    x = SampleNoise(4).start((1, *digits.SHAPE), HIGH)
    sequential = sample(D, x, grid())
    repeated = lambda x, sigma: D.given(label=torch.tensor([3]).repeat(len(x)))(x, sigma)
    found = sample_parallel(repeated, x, grid(), 20)
    assert found.x.dtype == x.dtype and found.calls <= STEPS / 4
    assert rms(found.x, sequential) < 0.008


def test_conditions_are_repeated_level_by_level():
    """Labels of a batch, repeated as the docstring says: both rows are what they are alone."""
    net, labels = zoo.load("digits", device="cpu"), torch.tensor([3, 8])
    D = lambda x, sigma: net.given(label=labels.repeat(len(x) // len(labels)))(x, sigma)
    x = SampleNoise(4).start((2, *digits.SHAPE), HIGH)
    found = sample_parallel(D, x, grid(6), 3, tolerance=1e-6)
    assert_close(found.x, sample(net.given(label=labels), x, grid(6)), rtol=0, atol=1e-4)


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, r"^window = 0; expected a whole number of steps >= 1"),
        ({"window": 2.5}, r"^window = 2\.5; expected a whole number"),
        ({"tolerance": 0.0}, r"^tolerance = 0\.0; expected a number > 0"),
        ({"tolerance": float("nan")}, r"^tolerance = nan; expected a number > 0"),
        ({"sigmas": torch.tensor([1.0, 2.0])}, r"^sigmas rises from 1 to 2; expected a falling grid"),
        ({"sigmas": torch.tensor([1.0])}, r"^sigmas has shape \(1,\); expected a 1-d grid"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    options = {"sigmas": grid(4), "window": 2, "tolerance": 0.1} | change
    with pytest.raises(ValueError, match=message):
        sample_parallel(BLOBS.denoiser, start(2), **options)


def test_a_network_that_fails_is_named_with_its_level():
    bad = lambda x, sigma: torch.where(right(sigma, x) < 1, float("nan"), BLOBS.denoiser(x, sigma))
    with pytest.raises(FloatingPointError, match=r"^x is not finite after the step at sigma = 0\.\d+; expected finite"):
        sample_parallel(bad, start(2), grid(10), 10)
