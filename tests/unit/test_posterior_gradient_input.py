"""What DPS, PiGDM and MCG refuse, what they cost in calls and memory, and that they keep samples and graphs apart."""

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import Counted
from course_lib.gaussians import Mixture
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.operators import JPEG, GaussianNoise, Mask, Matrix, PoissonNoise
from course_lib.operators.base import Operator
from course_lib.posterior import checkpointed, dps, dps_score, gaussian_variance, mcg, pigdm
from course_lib.singlestep import heun
from course_lib.steps import ddim, ddpm
from tests import solver_laws
from tests.draws import level, noise_of, normal

F64 = torch.float64
A = Matrix(torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], dtype=F64))
Y = torch.tensor([[0.3, 0.2]], dtype=F64)
PRIOR = Mixture.isotropic(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0]]), 0.4)
GRID = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=F64)


class Squared(Operator):
    shape, out = (3,), (3,)

    def apply(self, x):
        return x**2


def solvers(noise, A=A, y=Y, D=PRIOR.denoiser, sigma_y=0.5):
    """Every solver by name, as the Denoiser and the Step that it makes of an unconditional pair."""
    return {
        "dps": lambda: (D, dps(ddpm(noise), A, y, 0.3)),
        "poisson": lambda: (D, dps(ddpm(noise), A, y, 0.3, PoissonNoise(10.0))),
        "dps_score": lambda: (dps_score(D, A, y, sigma_y), ddpm(noise)),
        "pigdm": lambda: (pigdm(D, A, y, sigma_y), ddpm(noise)),
        "mcg": lambda: (D, mcg(ddpm(noise), A, y, noise, 0.3, sigma_y)),
    }


NAMES = list(solvers(None))
GRADIENT = ["dps", "poisson", "dps_score"]
"""Those that take the operator's own gradient, and so any differentiable one."""


def test_an_operator_without_a_gradient_is_refused_and_the_way_out_named():
    jpeg = JPEG((1, 8, 8), 20)
    y = jpeg(torch.zeros(1, 1, 8, 8))
    for name in GRADIENT:
        with pytest.raises(
            ValueError, match=r"A = JPEG is not differentiable and dps.* takes its gradient; .*pigdm or ddrm_jpeg"
        ):
            solvers(noise_of(0), jpeg, y)[name]()
    pigdm(PRIOR.denoiser, jpeg, y)


def test_the_linear_solvers_refuse_a_nonlinear_operator_that_dps_takes():
    y = torch.ones(1, 3, dtype=F64)
    for name in ("pigdm", "mcg"):
        with pytest.raises(ValueError, match=f"A = Squared is not linear and {name} takes linear operators only.*DPS"):
            solvers(noise_of(0), Squared(), y)[name]()
    for name in GRADIENT:
        D, step = solvers(noise_of(0), Squared(), y)[name]()
        assert bool(step(D, normal(2, 3), level(1.0), level(0.5))[0].isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_a_measurement_of_another_shape_batch_or_not_finite_is_refused(name):
    with pytest.raises(ValueError, match=r"y has shape \(1, 3\); expected \(B, 2\) for Matrix"):
        solvers(noise_of(0), y=torch.zeros(1, 3))[name]()
    with pytest.raises(ValueError, match="not finite"):
        solvers(noise_of(0), y=Y * float("nan"))[name]()
    D, step = solvers(noise_of(0), y=Y.repeat(2, 1))[name]()
    with pytest.raises(ValueError, match="y has 2 rows and x has 5; expected one for all samples or one for each"):
        step(D, normal(5, 3), level(1.0), level(0.5))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: dps(ddim, A, Y, -0.1), "zeta = -0.1; expected a step size, a finite number >= 0"),
        (lambda: dps(ddim, A, Y, float("nan")), "zeta = nan"),
        (lambda: dps(ddim, A, Y, 1.0, "laplace"), "likelihood = 'laplace'; expected 'gaussian', 'poisson' or a PoissonNoise"),
        (lambda: dps(ddim, A, Y, 1.0, GaussianNoise(0.1)), "likelihood = .*GaussianNoise.*; expected 'gaussian', 'poisson'"),
        (lambda: dps(ddim, A, -Y, 1.0, "poisson"), "y has a value of -0.3, a negative intensity; .* black = 0 .*black=-1"),
        (lambda: dps_score(None, A, -9 * Y, 0.1, 1.0, PoissonNoise(9.0, -1.0)), "value of -2.7, a negative .* black = -1 "),
        (lambda: dps_score(None, A, Y, -0.1), "sigma_y = -0.1; expected the measurement's standard deviation"),
        (lambda: dps_score(None, A, Y, 0.0), "sigma_y = 0 gives no density; .* use dps, or pigdm"),
        (lambda: dps_score(None, A, Y, 0.1, -1.0), "zeta = -1.0"),
        (lambda: pigdm(None, A, Y, float("inf")), "sigma_y = inf; expected the measurement's standard deviation"),
        (lambda: pigdm(None, JPEG((1, 8, 8), 9), torch.zeros(1, 1, 1, 1, 8, 8), -1.0), "sigma_y = -1.0; expected the measure"),
        (lambda: mcg(ddim, A, Y, noise_of(0), sigma_y=-1.0), "sigma_y = -1.0"),
        (lambda: gaussian_variance(0.0), "std = 0.0; expected the prior's standard deviation, a finite number > 0"),
        (lambda: checkpointed(None, 0), "rows = 0; expected a whole number >= 1"),
    ],
)
def test_values_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_unobserved_value_is_no_negative_intensity():
    """A mask leaves 0 where it sees nothing, below a black of 0.5; with a value there that is seen it is refused."""
    mask = Mask(torch.tensor([True, True, False]))
    dps(ddim, mask, torch.tensor([[0.7, 0.5, 0.0]]), 1.0, PoissonNoise(10.0, 0.5))
    with pytest.raises(ValueError, match="a negative intensity"):
        dps(ddim, mask, torch.tensor([[0.7, 0.4, 0.0]]), 1.0, PoissonNoise(10.0, 0.5))


def test_a_variance_that_is_none_is_refused():
    for make in (pigdm, dps_score):
        guided = make(PRIOR.denoiser, A, Y, 0.1, variance=lambda sigma: sigma - 1)
        with pytest.raises(ValueError, match=r"variance\(sigma\) = -0.5 at sigma = 0.5; expected numbers > 0 where sigma > 0"):
            guided(normal(2, 3), level(0.5))


@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_without_a_gradient_is_refused(name):
    D, step = solvers(noise_of(0), D=torch.no_grad()(PRIOR.denoiser))[name]()
    with pytest.raises(ValueError, match=r"D\(x, sigma\) has no gradient in x; expected a Denoiser that does not switch"):
        step(D, normal(2, 3), level(1.0), level(0.5))


# --- calls, graphs, batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_step_asks_d_once_and_leaves_no_graph(name):
    D = Counted(PRIOR.denoiser)
    guided, step = solvers(noise_of(0), D=D)[name]()
    x, memory = step(guided if guided is not D else D, normal(5, 3), level(1.0), level(0.5))
    assert D.calls == 1
    assert memory is None and not x.requires_grad


def test_steps_of_other_solvers_call_d_as_often_as_without_guidance():
    """Heun's second call is at another x: the gradient is that of the first."""
    for step, calls in ((heun, 2), (dpm_solver_pp_2m, 1)):
        D, x = Counted(PRIOR.denoiser), normal(5, 3)
        found, memory = dps(step, A, Y, 0.3)(D, x, level(1.0), level(0.5))
        assert D.calls == calls and memory is None
        plain, _ = step(PRIOR.denoiser, x, level(1.0), level(0.5))
        moved, _ = dps(ddim, A, Y, 0.3)(PRIOR.denoiser, x, level(1.0), level(0.5))
        assert_close(found - plain, moved - ddim(PRIOR.denoiser, x, level(1.0), level(0.5))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [dps_score, pigdm])
def test_a_guided_denoiser_can_be_differentiated_itself(make):
    """Its own Jacobian against finite differences, to what gradcheck allows; without a caller's gradient it has none."""
    guided = make(PRIOR.denoiser, A, Y, 0.5)
    x = normal(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: guided(x, level(0.7)), x)
    with torch.no_grad():
        assert not guided(x, level(0.7)).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    solver_laws.samples_do_not_depend_on_their_batch(lambda noise, y: solvers(noise, y=y)[name](), Y, GRID)


@pytest.mark.parametrize("name", NAMES)
def test_x_keeps_its_type_and_a_level_each_is_the_level_of_all(name):
    solver_laws.x_keeps_its_type_and_a_level_each_is_the_level_of_all(lambda noise, y: solvers(noise, y=y)[name](), Y)


@pytest.mark.parametrize("name", ["dps", "poisson", "dps_score", "pigdm"])
def test_what_has_no_noise_passes_unchanged(name):
    """Row 0 waits at sigma = 0, as a frame that is done; with r^2 = 0 there the score form has no variance at all."""
    noise, sigma, after = noise_of(1), torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([0.0, 0.5], dtype=F64)
    guided, step = solvers(noise)[name]()
    x = normal(2, 3)
    found, _ = step(guided, x, sigma, after)
    assert_close(found[0], x[0], rtol=0, atol=1e-12)
    assert float((found[1] - x[1]).abs().max()) > 0.01
    guided = dps_score(PRIOR.denoiser, A, Y, 0.0, variance=lambda sigma: sigma**2)
    assert_close(guided(x, sigma)[0], x[0], rtol=0, atol=1e-12)


# --- memory ---------------------------------------------------------------------------------------------------------------


class Costly:
    """A Denoiser whose graph holds one tensor as large as x, of which it counts the rows alive, and the most there were."""

    def __init__(self):
        self.alive = self.most = self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        held = (x / (1 + sigma.reshape(-1, 1) ** 2)).exp()
        self.alive += len(x)
        self.most = max(self.most, self.alive)
        weakref.finalize(held, self._gone, len(x))
        return held * held

    def _gone(self, rows):
        self.alive -= rows


@pytest.mark.parametrize("each", [False, True])
def test_a_checkpointed_denoiser_holds_one_part_of_the_graph(each):
    """Eight samples in parts of two, twice computed: the same numbers, and two rows alive at a time instead of eight."""
    x, sigma = normal(8, 3), level(1.0).expand(8) if each else level(1.0)
    most = {}
    for rows in (None, 2):
        D = Costly()
        guided = dps_score(D if rows is None else checkpointed(D, rows), A, Y, 0.5)
        found = guided(x, sigma)
        gc.collect()
        most[rows] = (D.most, D.calls)
        if rows is None:
            whole = found
    assert torch.equal(found, whole)
    assert most == {None: (8, 1), 2: (2, 8)}
    with torch.no_grad():
        D = Costly()
        checkpointed(D, 2)(x, sigma)
    assert D.calls == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_too_little_memory_for_the_graph_names_the_way_out(name, error):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            raise error

    def forward(x, sigma):
        raise error

    for D in (forward, lambda x, sigma: Fails.apply(x)):
        guided, step = solvers(noise_of(0), D=D)[name]()
        said = r"the graph through D does not fit into memory for x of shape \(2, 3\); take a smaller batch, or gradient checkp"
        with pytest.raises(torch.OutOfMemoryError, match=said):
            step(guided, normal(2, 3), level(1.0), level(0.5))


def test_a_real_allocation_that_fails_on_the_cpu_is_recognised():
    """A petabyte, which no machine gives; the words are the installed torch's own."""

    def D(x, sigma):
        return x * torch.empty(2**50, dtype=torch.uint8)[0]

    with pytest.raises(torch.OutOfMemoryError, match="the graph through D does not fit"):
        pigdm(D, A, Y)(normal(2, 3), level(1.0))


def test_other_errors_pass_as_they_are():
    def D(x, sigma):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        pigdm(D, A, Y)(normal(2, 3), level(1.0))
    assert not isinstance(caught.value, torch.OutOfMemoryError)
